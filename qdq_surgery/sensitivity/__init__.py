"""What each site, each kind of site and each encoder layer costs at the model's output."""
