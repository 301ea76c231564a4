"""Figures that are measured, not asserted: `python -m tests.benchmarks.<name>` prints a table."""
