"""`kd-bench check`."""

from pathlib import Path
from typing import Annotated

import typer

from kd_bench.cli.options import RESULTS, Results


def check(
    candidate: Annotated[str, typer.Argument(help="Run or model name.")],
    against: Annotated[str | None, typer.Option(help="Baseline run or model.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy YAML; default: the shipped one.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
    results: Results = RESULTS,
) -> None:
    """Did the candidate regress? Exit code 0 pass, 1 regression, 3 cannot tell."""
    from kd_bench import gate
    from kd_bench.store import baseline_run, find_run

    new = find_run(results, candidate)
    old = (
        find_run(results, against)
        if against
        else baseline_run(results, new.manifest.protocol.suite)
    )
    report = gate.check(new, old, gate.load_policy(policy))
    raise typer.Exit(report.exit_code)
