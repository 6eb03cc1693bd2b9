"""The contenders of ``benchmark_runtimes.py``: one file for each family of peers."""
