"""Which values of an activation belong to padded tokens."""
