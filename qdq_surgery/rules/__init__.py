"""What a rule file says, as frozen data that checks itself."""
