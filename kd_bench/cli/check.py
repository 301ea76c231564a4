"""`kd-bench check`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kd_bench.cli.options import RESULTS, Results
from kd_bench.errors import ExitCode

if TYPE_CHECKING:
    from kd_bench.gate import GateReport


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
    from rich.console import Console

    from kd_bench import gate
    from kd_bench.policy import load_policy
    from kd_bench.report.tables_terminal import to_terminal
    from kd_bench.report.verdicts import verdict_table
    from kd_bench.store import baseline_run, find_run

    try:
        new = find_run(results, candidate)
        suite = new.manifest.protocol.suite
        old = find_run(results, against) if against else baseline_run(results, suite)
        report = gate.check(new, old, load_policy(policy))
    except Exception as error:  # CI shall show why there is no verdict, whatever the reason
        _publish(error, junit, summary)
        raise
    # The files first: nobody may be reading the table.
    unwritten = _publish(report, junit, summary)
    if as_json:
        typer.echo(report.to_json())
    else:
        to_terminal(verdict_table(report), Console())
    if unwritten is not None and report.exit_code == ExitCode.PASS:
        raise unwritten
    raise typer.Exit(report.exit_code)


def _publish(
    ending: "GateReport | Exception", junit: Path | None, summary: Path | None
) -> OSError | None:
    """Tell CI how the gate ended; the first file that could not be written, already named."""
    import os

    from kd_bench.report import ci

    unwritten: OSError | None = None
    for write, path in ((ci.write_junit, junit), (ci.append_summary, summary)):
        if path is None:
            continue
        try:
            write(ending, path)
        except OSError as error:
            typer.echo(f"{path} could not be written: {error.strerror or error}.", err=True)
            unwritten = unwritten or error
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in ci.annotations(ending):
            typer.echo(line, err=True)  # beside the table or the JSON, not in it
    return unwritten
