"""Measured cases, each beside plain Trio in the same run: ``python -m benchmarks.run``."""
