"""From a task's samples to its headline score, in a form that one bootstrap can resample.

Every benchmark's score is written as sums over resampling units and a function of those sums:

    statistics [units, m]  --weights @ statistics-->  sums [..., m]  --combine-->  score [...]

All scores are on the paper's 0-100 scale. NaN means that there was nothing to score.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kd_bench.errors import UsageError, closest
from kd_bench.records import AMBIGUOUS

if TYPE_CHECKING:
    import pandas as pd


Array = NDArray[np.float64]

# lmms_eval/tasks/mme/utils.py, eval_type_dict; whatever is not perception counts as cognition.
MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters",
    "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip

_CONTRARY = {"yes": "no", "no": "yes"}


@dataclass(frozen=True)
class UnitStatistics:
    """What each resampling unit adds to the sums; sorted by unit, so that row order is nothing.

    Attributes:
        units: unit ids, [units].
        values: additive statistics, [units, m].
    """

    units: NDArray[np.object_]
    values: Array


@dataclass(frozen=True)
class Aggregator:
    """One way to turn samples into a score.

    Attributes:
        statistics: samples -> additive statistics of each unit.
        combine: sums [..., m] -> score [...].
        category: the aggregator that scores one category's samples by themselves.
        item: what is right or wrong as a whole: a `document`, or a `unit` of several.
    """

    name: str
    statistics: Callable[["pd.DataFrame"], UnitStatistics]
    combine: Callable[[Array], Array]
    category: str
    item: str = "document"


def get_aggregator(name: str) -> Aggregator:
    """The aggregator of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in AGGREGATORS:
        raise UsageError(
            f"Unknown aggregator {name!r}.{closest(name, list(AGGREGATORS))}",
            f"Known: {', '.join(AGGREGATORS)}.",
        )
    return AGGREGATORS[name]


def unit_statistics(name: str, samples: "pd.DataFrame") -> UnitStatistics:
    """Per-unit sufficient statistics of a task's samples (columns: `records.SAMPLE_COLUMNS`)."""
    return get_aggregator(name).statistics(samples)


def aggregate(name: str, samples: "pd.DataFrame") -> float:
    """The score of a task's samples, 0-100; NaN when there is nothing to score."""
    aggregator = get_aggregator(name)
    return float(aggregator.combine(aggregator.statistics(samples).values.sum(axis=0)))


def by_content(samples: "pd.DataFrame") -> "pd.DataFrame":
    """The samples with what they say in place of what upstream's scorer read.

    Needs `records.CONTENT_COLUMNS`. What can be read as yes and as no is read as the wrong one: an
    F1 leaves out what is neither.
    """
    said = samples["content"]
    wrong = samples["target"].astype(str).str.strip().str.lower().map(_CONTRARY).fillna(said)
    parsed = said.where(said != AMBIGUOUS, wrong)
    return samples.assign(score=samples["score_by_content"], parsed=parsed)


def _by_unit(units: "pd.Series[str]", rows: Array) -> UnitStatistics:
    """Sum row statistics [rows, m] within units."""
    import pandas as pd

    codes, ids = pd.factorize(units.to_numpy(dtype=object), sort=True)
    columns = [np.bincount(codes, weights=column, minlength=len(ids)) for column in rows.T]
    return UnitStatistics(np.asarray(ids, dtype=object), np.stack(columns, axis=1))


def _scores(samples: "pd.DataFrame") -> Array:
    return samples["score"].to_numpy(dtype=np.float64)


def _lower(column: "pd.Series[str]") -> NDArray[np.object_]:
    return column.astype(str).str.strip().str.lower().to_numpy(dtype=object)


def _share(scores: Array, units: "pd.Series[str]") -> UnitStatistics:
    return _by_unit(units, np.stack([scores, np.ones_like(scores)], axis=1))


def _ratio(sums: Array) -> Array:
    """[..., (numerator, count)] -> 100 x their ratio."""
    return 100.0 * _divide(sums[..., 0], sums[..., 1])


def _divide(numerator: Array, denominator: Array) -> Array:
    """Elementwise quotient, NaN where the denominator is zero."""
    filled = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=filled, where=denominator > 0)
    return filled


def _mean(samples: "pd.DataFrame") -> UnitStatistics:
    return _share(_scores(samples), samples["unit_id"])


def _accuracy(samples: "pd.DataFrame") -> UnitStatistics:
    return _share((_scores(samples) >= 1.0).astype(np.float64), samples["unit_id"])


def _strict(samples: "pd.DataFrame") -> UnitStatistics:
    """lmms-eval guesses an unparsable MMMU choice at random; here it is wrong."""
    read = samples["parsed"].astype(str).str.strip().to_numpy(dtype=object) != ""
    return _share(_scores(samples) * read, samples["unit_id"])


def _circular(samples: "pd.DataFrame") -> UnitStatistics:
    """A group counts when all of its rotations are right (MMBench_Evaluator.eval_sub_data)."""
    rows = _share((_scores(samples) >= 1.0).astype(np.float64), samples["unit_id"])
    right, rotations = rows.values.T
    hits = (right == rotations).astype(np.float64)
    return UnitStatistics(rows.units, np.stack([hits, np.ones_like(hits)], axis=1))


def _mme_points(samples: "pd.DataFrame", perception: bool | None = None) -> UnitStatistics:
    """[pairs, 2 x categories]: each pair's (acc + acc+) / 2 in its category, then its count.

    A pair that a document limit cut in half has no acc+ and is left out.

    Args:
        perception: only those categories, only the others, or all.
    """
    category = samples["category"].astype(str)
    kept = category.notna()
    if perception is not None:
        kept = category.isin(MME_PERCEPTION) == perception
    right_rows = (_scores(samples)[kept.to_numpy()] >= 1.0).astype(np.float64)
    category = category[kept]
    pair = category + "\x1f" + samples.loc[kept, "unit_id"].astype(str)
    rows = _share(right_rows, pair)
    whole = rows.values[:, 1] == 2
    units, right = rows.units[whole], rows.values[whole, 0]
    points = (right / 2 + (right == 2)) / 2
    names = np.array([unit.split("\x1f", 1)[0] for unit in units], dtype=object)
    present = sorted(set(category))
    member = np.stack([names == name for name in present], axis=1) if present else np.zeros((0, 1))
    counts = member.astype(np.float64)
    return UnitStatistics(units, np.concatenate([points[:, None] * counts, counts], axis=1))


def _mean_of_ratios(sums: Array) -> Array:
    """[..., numerators then counts] -> 100 x the mean over groups that hold anything."""
    half = sums.shape[-1] // 2
    ratios = _divide(sums[..., :half], sums[..., half:])
    present = ~np.isnan(ratios)
    return 100.0 * _divide(np.where(present, ratios, 0.0).sum(-1), present.sum(-1))


def _f1_counts(samples: "pd.DataFrame") -> Array:
    """[rows, (tp, fp, fn, 1)], positive class `yes`.

    As in lmms_eval/tasks/pope/utils.py: an answer that is neither yes nor no counts nowhere.
    """
    said, truth = _lower(samples["parsed"]), _lower(samples["target"])
    tp = (said == "yes") & (truth == "yes")
    fp = (said == "yes") & (truth == "no")
    fn = (said == "no") & (truth == "yes")
    return np.stack([tp, fp, fn, np.ones_like(tp)], axis=1).astype(np.float64)


def _f1(samples: "pd.DataFrame") -> UnitStatistics:
    return _by_unit(samples["unit_id"], _f1_counts(samples))


def _f1_by_category(samples: "pd.DataFrame") -> UnitStatistics:
    """[units, categories x 4]; images are shared by POPE's three subsets."""
    counts = _f1_counts(samples)
    category = samples["category"].astype(str).to_numpy(dtype=object)
    blocks = [counts * (category == name)[:, None] for name in sorted(set(category))]
    return _by_unit(samples["unit_id"], np.concatenate(blocks or [counts], axis=1))


def _f1_of_counts(sums: Array) -> Array:
    """2 tp / (2 tp + fp + fn); zero without a true positive, as upstream has it."""
    tp, fp, fn, rows = np.moveaxis(sums, -1, 0)
    return np.where(rows > 0, 200 * tp / np.maximum(2 * tp + fp + fn, 1), np.nan)


def _mean_f1(sums: Array) -> Array:
    scores: Array = _f1_of_counts(sums.reshape(*sums.shape[:-1], -1, 4)).mean(-1)
    return scores


AGGREGATORS: dict[str, Aggregator] = {
    each.name: each
    for each in (
        Aggregator("mean", _mean, _ratio, "mean"),
        Aggregator("accuracy", _accuracy, _ratio, "accuracy"),  # documents with the full score
        Aggregator("strict", _strict, _ratio, "strict"),
        Aggregator("circular", _circular, _ratio, "circular", "unit"),
        # The raw sum over the present categories, over what an oracle would get there: for the
        # ten categories of the real MME this is perception / 20, the paper's column.
        Aggregator("mme", partial(_mme_points, perception=True), _mean_of_ratios, "mme_category"),
        Aggregator(
            "mme_cognition", partial(_mme_points, perception=False), _mean_of_ratios, "mme_category"
        ),
        Aggregator("mme_category", _mme_points, _mean_of_ratios, "mme_category"),
        Aggregator("f1", _f1, _f1_of_counts, "f1"),
        Aggregator("f1_mean", _f1_by_category, _mean_f1, "f1"),
    )
}
