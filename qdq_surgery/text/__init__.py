"""Words and tables for people, and the optional packages that some of them need."""
