"""`kd-bench demo`."""


def demo() -> None:
    """Train, evaluate and report on the embedded world."""
