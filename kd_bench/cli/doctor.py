"""`kd-bench doctor`."""

import typer


def doctor() -> None:
    """What is installed, what is missing, and how to get it."""
    import sys
    from importlib.metadata import PackageNotFoundError, version

    from rich.console import Console
    from rich.table import Table

    table = Table("Package", "Version", "Needed for", box=None)
    for package, purpose in (
        ("kd-bench", "everything"),
        ("pandas", "report, compare, check"),
        ("matplotlib", "report"),
        ("torch", "train, eval"),
        ("transformers", "train, eval"),
        ("accelerate", "train on several GPUs"),
        ("peft", "train with LoRA"),
        ("lmms-eval", "eval"),
    ):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = 'missing: pip install "kd-bench[all]"'
        table.add_row(package, found, purpose)
    typer.echo(f"Python {sys.version.split()[0]}")
    Console().print(table)
