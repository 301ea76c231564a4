"""`kd-bench compare`."""

from typing import Annotated

import typer

from kd_bench.cli.options import RESULTS, Results


def compare(
    runs: Annotated[list[str], typer.Argument(help="Two or more runs or model names.")],
    results: Results = RESULTS,
    flips: Annotated[
        str | None, typer.Option(help="List the samples of this benchmark that changed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for machines.")] = False,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Compare across protocols, marked.")
    ] = False,
) -> None:
    """Compare runs sample by sample, with intervals."""
    from kd_bench import compare as comparison
    from kd_bench.store import find_run

    found = [find_run(results, name) for name in runs]
    outcome = comparison.compare(found, allow_different=allow_different)
    typer.echo(outcome)
