"""Simulations of the gate's statistics at the real benchmarks' sizes."""
