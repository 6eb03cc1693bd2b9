"""The graph of a block: what it holds for, how it is kept, run and compiled."""
