"""`kd-bench check`."""

from pathlib import Path
from typing import Annotated

import typer

from kd_bench.cli.options import RESULTS, Results


def check(
    candidate: Annotated[str, typer.Argument(help="Run or model name.")],
    against: Annotated[
        str | None, typer.Option(help="Baseline run or model; default: the suite's baseline.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy YAML; default: the shipped one.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
    summary: Annotated[
        Path | None,
        typer.Option(help="Append Markdown for GitHub here.", envvar="GITHUB_STEP_SUMMARY"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for machines.")] = False,
    results: Results = RESULTS,
) -> None:
    """Did the candidate regress? Exit code 0 pass, 1 regression, 3 cannot tell."""
    import os

    from rich.console import Console

    from kd_bench import gate
    from kd_bench.policy import load_policy
    from kd_bench.report.ci import annotations, append_summary, write_junit
    from kd_bench.report.tables_terminal import to_terminal
    from kd_bench.report.verdicts import verdict_table
    from kd_bench.store import baseline_run, find_run

    new = find_run(results, candidate)
    suite = new.manifest.protocol.suite
    old = find_run(results, against) if against else baseline_run(results, suite)
    report = gate.check(new, old, load_policy(policy))
    if as_json:
        typer.echo(report.to_json())
    else:
        to_terminal(verdict_table(report), Console())
    if junit is not None:
        write_junit(report, junit)
    if summary is not None:
        append_summary(report, summary)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in annotations(report):
            typer.echo(line, err=True)  # beside the table or the JSON, not in it
    raise typer.Exit(report.exit_code)
