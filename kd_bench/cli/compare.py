"""`kd-bench compare`."""

from pathlib import Path
from typing import Annotated

import typer

from kd_bench.cli.options import RESULTS, Results
from kd_bench.errors import UsageError


def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Two or more runs or model names; methods with --methods.")
    ],
    results: Results = RESULTS,
    flips: Annotated[
        str | None, typer.Option(help="List the samples of this benchmark that changed.")
    ] = None,
    methods: Annotated[
        bool,
        typer.Option(
            "--methods", help="The names are methods: each against each, over all their seeds."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for machines.")] = False,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Compare across protocols, marked.")
    ] = False,
) -> None:
    """Compare runs sample by sample against the first, with intervals."""
    from rich.console import Console

    from kd_bench.compare import compare as compare_runs
    from kd_bench.compare import list_flips
    from kd_bench.report.tables import to_terminal
    from kd_bench.report.verdicts import comparison_tables, flip_table
    from kd_bench.store import find_runs

    if methods:
        if flips is not None:
            raise UsageError(
                "--flips lists the samples of two runs; --methods names methods.",
                "Name two runs, without --methods.",
            )
        _compare_methods(results, runs, as_json, allow_different)
        return
    found = find_runs(results, runs)
    if flips is not None:
        if len(found) > 2:
            raise UsageError("--flips lists the samples of two runs.", "Name the two.")
        changed = list_flips(found, flips, allow_different=allow_different)
        if as_json:
            import json
            from dataclasses import asdict

            typer.echo(json.dumps([asdict(flip) for flip in changed], ensure_ascii=False, indent=2))
        else:
            to_terminal(flip_table(changed, flips, (runs[0], runs[1])), Console())
        return
    comparison = compare_runs(found, allow_different=allow_different)
    if as_json:
        typer.echo(comparison.to_json())
        return
    for table in comparison_tables(comparison):
        to_terminal(table, Console())
    for warning in comparison.warnings:
        Console().print(warning, style="bold yellow", markup=False, highlight=False)


def _compare_methods(
    results: Path, methods: list[str], as_json: bool, allow_different: bool
) -> None:
    from rich.console import Console

    from kd_bench.compare import compare_all_methods
    from kd_bench.report.tables import to_terminal
    from kd_bench.report.verdicts import method_tables

    found = compare_all_methods(results, methods, allow_different=allow_different)
    if as_json:
        typer.echo(found.to_json())
        return
    for table in method_tables(found):
        to_terminal(table, Console())
