"""The modules that register faults; a new one is named here."""

from importlib import import_module

MODULES = ("tests.faults.stores", "tests.faults.interleavings", "tests.faults.inputs")


def load() -> None:
    """Import every module that registers faults."""
    for module in MODULES:
        import_module(module)
