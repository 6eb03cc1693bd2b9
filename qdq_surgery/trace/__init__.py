"""From a running model to the graphs of its blocks."""
