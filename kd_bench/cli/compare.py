"""`kd-bench compare` and `kd-bench check`: what differs, and whether it is a regression."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kd_bench.cli.options import RESULTS, Command, Results, show_tables
from kd_bench.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from kd_bench.gate import GateReport


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
    from kd_bench import api
    from kd_bench.compare import list_flips
    from kd_bench.report import verdicts
    from kd_bench.store import find_runs

    if methods and flips is not None:
        raise UsageError(
            "--flips lists the samples of two runs; --methods names methods.",
            "Name two runs, without --methods.",
        )
    if methods:
        found = api.compare(*runs, methods=True, results=results, allow_different=allow_different)
        text, tables, warnings = found.to_json(), verdicts.method_tables(found), list[str]()
    elif flips is None:
        compared = api.compare(*runs, results=results, allow_different=allow_different)
        text, tables = compared.to_json(), verdicts.comparison_tables(compared)
        warnings = compared.warnings
    else:
        pair = find_runs(results, runs)
        if len(pair) > 2:
            raise UsageError("--flips lists the samples of two runs.", "Name the two.")
        changed = list_flips(pair, flips, allow_different=allow_different)
        text = json.dumps([asdict(flip) for flip in changed], ensure_ascii=False, indent=2)
        tables, warnings = [verdicts.flip_table(changed, flips, (runs[0], runs[1]))], list[str]()
    if as_json:
        typer.echo(text)
    else:
        show_tables(tables, warnings)


class SeveralBaselines(Command):
    """`check A0 A1 --against B0 B1`: every name after --against is a baseline's seed.

    Only where a candidate stands before it; `check --against B A` keeps its meaning.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The same arguments with --against before each of its names."""
        return super().parse_args(ctx, _spread(args))


def _spread(args: list[str]) -> list[str]:
    spread: list[str] = []
    candidates, inside = 0, False
    takes_value = False
    for word in args:
        if word == "--against" or word.startswith("--against="):
            inside, takes_value = candidates > 0, word == "--against"
        elif word.startswith("-") and word != "-":
            inside = False
            takes_value = word in ("--policy", "--junit", "--summary", "--results")
        elif takes_value:
            takes_value = False
        elif inside:
            spread.append("--against")
        else:
            candidates += 1
        spread.append(word)
    return spread


def check(
    candidate: Annotated[
        list[str],
        typer.Argument(help="Run or model name; several are training seeds of one method."),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Baseline run or model, or several seeds of one method; default: the suite's "
            "baseline.",
            metavar="RUN...",
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy YAML; default: the shipped one.")
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Margins that BASELINE [OTHER-SEED...] can carry, and their policy."
        ),
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
    summary: Annotated[
        Path | None,
        typer.Option(help="Append Markdown for GitHub here.", envvar="GITHUB_STEP_SUMMARY"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for machines.")] = False,
    results: Results = RESULTS,
) -> None:
    """Did the candidate regress? Exit code 0 pass, 1 regression, 3 cannot tell."""
    if plan:
        _plan(candidate, against, policy, results, as_json)
        return
    from kd_bench import api
    from kd_bench.report.verdicts import verdict_table

    try:
        report = api.check(candidate, against, policy=policy, results=results)
    except Exception as error:  # CI shall show why there is no verdict, whatever the reason
        _publish(error, junit, summary)
        raise
    # The files first: nobody may be reading the table.
    unwritten = _publish(report, junit, summary)
    if as_json:
        typer.echo(report.to_json())
    else:
        show_tables([verdict_table(report)], report.warnings)
    if unwritten is not None and report.exit_code == ExitCode.PASS:
        raise unwritten
    raise typer.Exit(report.exit_code)


def _publish(
    ending: "GateReport | Exception", junit: Path | None, summary: Path | None
) -> OSError | None:
    """Tell CI how the gate ended; the first file that could not be written, already named."""
    from kd_bench.report import verdicts

    unwritten: OSError | None = None
    for write, path in ((verdicts.write_junit, junit), (verdicts.append_summary, summary)):
        if path is None:
            continue
        try:
            write(ending, path)
        except OSError as error:
            typer.echo(f"{path} could not be written: {error.strerror or error}.", err=True)
            unwritten = unwritten or error
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in verdicts.annotations(ending):
            typer.echo(line, err=True)  # beside the table or the JSON, not in it
    return unwritten


def _plan(
    names: list[str],
    against: list[str] | None,
    policy: Path | None,
    results: Path,
    as_json: bool,
) -> None:
    """Print margins and the policy file to paste."""
    from kd_bench.gate_plan import plan
    from kd_bench.policy import load_policy
    from kd_bench.report.verdicts import plan_table
    from kd_bench.store import find_runs

    if against:
        raise UsageError(
            "--plan looks at one recipe; --against is of a check.",
            "Name the baseline and its other seeds: check --plan BASELINE [OTHER-SEED...].",
        )
    runs = find_runs(results, names)
    suite = runs[0].manifest.protocol.suite
    found = plan(runs[0], runs[1:], load_policy(policy, suites=[suite]))
    if as_json:
        typer.echo(found.to_json())
        return
    show_tables([plan_table(found)], found.warnings)
    typer.echo(f"\nPolicy file:\n\n{found.policy}", nl=False)
