"""kd-bench: train, evaluate and compare distilled vision-language models."""

__version__ = "0.1.0"
