"""Proofs about an exported file: the linter, the certificate, the receipt."""
