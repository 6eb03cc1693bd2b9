"""The matrix of versions: which environments there are, how they are made, and the table of what ran in them."""
