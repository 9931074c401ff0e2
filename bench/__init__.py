"""Benchmarks of lkconv: ``python -m bench --help``."""
