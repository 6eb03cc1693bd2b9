"""One folder per runtime: what it wants of a file, and what it makes of one."""
