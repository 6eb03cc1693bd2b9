"""The passes over an exported graph, one file each."""
