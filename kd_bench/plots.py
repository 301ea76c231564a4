"""The report's plots as matplotlib figures, drawn from a store.

    figure = kd_bench.plots.forest("results")
    figure.savefig("forest.pdf")

Each takes the store's folder, `runs` (runs or model names; None: the run that stands for each
model) and `suite` (None: the newest run's), and returns a `Figure` in the colours of the light
theme. Each raises UsageError where a name fits no run, or where the runs do not hold what is drawn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_bench.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "bars",
    "forest",
    "gaps",
    "knees",
    "losses",
    "pareto",
    "radar",
    "reliability",
    "retention",
]

Store = str | Path
Runs = Sequence[str] | None


def _figure(name: str, results: Store, runs: Runs, suite: str | None, needs: str) -> "Figure":
    """One plot of the board of these runs; `needs` says what must be there."""
    from kd_bench.report.history import logs_of
    from kd_bench.report.leaderboard import MINI
    from kd_bench.report.plots import board_plots
    from kd_bench.report.relations import read_board
    from kd_bench.report.style import MUTED, PAPER

    board, evidence = read_board(Path(results), runs, suite)
    logs = {entry.key: logs_of(entry) for entry in board.entries}
    for plot in board_plots(board, evidence, logs, only=name):
        plot.figure.set_facecolor(PAPER)
        if board.mini:  # a figure alone has no page around it that says so
            plot.figure.supxlabel(MINI, fontsize=8, color=MUTED)
        return plot.figure
    raise UsageError(f"The runs below {results} give no plot {name!r}.", f"It needs {needs}.")


def radar(results: Store = "results", runs: Runs = None, *, suite: str | None = None) -> "Figure":
    """Mean score (0 to 100) by skill group, one polygon a model."""
    return _figure(
        "radar", results, runs, suite, "three skill groups and a model with all of their benchmarks"
    )


def bars(results: Store = "results", runs: Runs = None, *, suite: str | None = None) -> "Figure":
    """Score (0 to 100) by benchmark, one bar a model; its line is the spread over seeds."""
    return _figure("bars", results, runs, suite, "a run")


def forest(results: Store = "results", runs: Runs = None, *, suite: str | None = None) -> "Figure":
    """Difference from SFT in points by benchmark and on average, with intervals."""
    return _figure("forest", results, runs, suite, "a model of role sft and another student")


def retention(
    results: Store = "results", runs: Runs = None, *, suite: str | None = None
) -> "Figure":
    """Percent of the teacher's score that each student keeps, with intervals."""
    return _figure("retention", results, runs, suite, "a model of role teacher and a student")


def gaps(results: Store = "results", runs: Runs = None, *, suite: str | None = None) -> "Figure":
    """What a student's vision and what its language model cost, in points, from its hybrid."""
    return _figure(
        "gaps",
        results,
        runs,
        suite,
        "a teacher, a student and the visual switch of both (role switch)",
    )


def pareto(results: Store = "results", runs: Runs = None, *, suite: str | None = None) -> "Figure":
    """Average score against latency (milliseconds an answer) and parameters, with the front."""
    return _figure("pareto", results, runs, suite, "two models with an average and a measured cost")


def reliability(
    results: Store = "results", runs: Runs = None, *, suite: str | None = None
) -> "Figure":
    """How often answers are right by the probability of their first token."""
    return _figure(
        "reliability",
        results,
        runs,
        suite,
        "answers with a stored confidence (yes-or-no benchmarks)",
    )


def losses(results: Store = "results", runs: Runs = None, *, suite: str | None = None) -> "Figure":
    """Logged loss and each term by training step, one line a training."""
    return _figure(
        "losses", results, runs, suite, "models whose training logs lie beside their checkpoints"
    )


def knees(results: Store = "results", runs: Runs = None, *, suite: str | None = None) -> "Figure":
    """Logits above the knee by training step: median, and the band from 10 to 90 %."""
    return _figure(
        "knees", results, runs, suite, "training logs of a method with DBiLD beside the checkpoints"
    )
