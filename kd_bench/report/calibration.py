"""Whether a model knows when it knows: confidence of the first answer token against accuracy."""

from dataclasses import dataclass

import numpy as np

from kd_bench.errors import KdBenchError
from kd_bench.report.board import Board, Entry
from kd_bench.report.style import (
    MUTED,
    WIDTH,
    Plot,
    canvas,
    colours,
    legend,
    marker,
    series,
    short,
    to_plot,
)

BINS = 10
LEAST = 5  # a bin with fewer answers is not drawn


@dataclass(frozen=True)
class Reliability:
    """Bins of answers by confidence.

    Attributes:
        confidence, accuracy: means of each bin, in percent; counts: answers in it.
        error: expected calibration error in points: |confidence - accuracy| weighted by count.
    """

    confidence: list[float]
    accuracy: list[float]
    counts: list[int]
    error: float


def measure(confidence: "np.typing.ArrayLike", score: "np.typing.ArrayLike") -> Reliability | None:
    """Equal-width bins over [0, 1] (Guo et al. 2017, arXiv 1706.04599); None without data."""
    probability = np.asarray(confidence, dtype=np.float64)
    right = np.asarray(score, dtype=np.float64)
    known = np.isfinite(probability) & np.isfinite(right)
    probability, right = np.clip(probability[known], 0, 1), right[known]
    if probability.size == 0:
        return None
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    used = counts > 0
    means = 100 * np.bincount(place, probability, BINS)[used] / counts[used]
    accuracy = 100 * np.bincount(place, right, BINS)[used] / counts[used]
    error = float(np.sum(np.abs(means - accuracy) * counts[used]) / counts.sum())
    return Reliability(means.tolist(), accuracy.tolist(), counts[used].tolist(), error)


def reliability(board: Board) -> Plot | None:
    """Accuracy against confidence, pooled over the benchmarks that store log-probabilities."""
    found = [(entry, measured) for entry in board.entries if (measured := _pooled(board, entry))]
    if not found:
        return None
    figure, axes = canvas(WIDTH, 4.0)
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    numbers = colours(board)
    for entry, bins in found:
        number = numbers[entry.key]
        kept = [i for i, count in enumerate(bins.counts) if count >= LEAST]
        axes.plot(
            [bins.confidence[i] for i in kept], [bins.accuracy[i] for i in kept],
            color=series(number), marker=marker(number), markersize=3.8, linewidth=1.2,
            label=f"{short(entry.name)} ({bins.error:.1f})",
        )  # fmt: skip
    axes.set_xlim(0, 101)
    axes.set_ylim(0, 101)
    axes.set_xlabel("Confidence of the first answer token, %")
    axes.set_ylabel("Right answers, %")
    axes.tick_params(axis="y", labelcolor=MUTED)
    legend(figure, axes)
    summary = (
        "A calibrated model lies on the dotted line; below it, it is too sure. "
        "In brackets: expected calibration error in points."
    )
    return to_plot(figure, "reliability", "Reliability", summary)


def _pooled(board: Board, entry: Entry) -> Reliability | None:
    confidence, scores = [], []
    for run, results in zip(entry.runs, entry.results, strict=True):
        for task in board.tasks:
            if task.id not in results:
                continue
            try:
                frame = run.samples(task.id, ("answer_confidence", "score"))
            except KdBenchError:
                continue
            stored = frame[frame["answer_confidence"].notna()]
            confidence.append(stored["answer_confidence"].to_numpy(dtype=np.float64))
            scores.append(stored["score"].to_numpy(dtype=np.float64))
    if not confidence:
        return None
    return measure(np.concatenate(confidence), np.concatenate(scores))
