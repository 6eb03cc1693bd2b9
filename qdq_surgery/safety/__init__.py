"""What keeps a stranger's file data, and a change to a model whole."""
