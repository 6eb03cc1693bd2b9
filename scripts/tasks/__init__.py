"""What the run scripts share: task files and their generators, tokenizing, metrics, and the flow of one run."""
