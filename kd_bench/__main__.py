"""`python -m kd_bench` is `kd-bench`."""

from kd_bench.cli import entry

entry()
