"""Inputs of strangers, by the thousand: what is read is what they say, or an error of the package says why not."""
