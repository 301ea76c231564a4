"""How two models agree beyond their scores, and which samples changed between them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kd_bench.compare.align import AlignedTask

if TYPE_CHECKING:
    import pandas as pd


# A soft score of half or more counts as right (VQAv2: two of ten people gave that answer).
RIGHT = 0.5


@dataclass(frozen=True)
class Agreement:
    """A student beside its teacher on one benchmark; shares in [0, 1], None where undefined.

    Attributes:
        same_answer: documents with the same parsed answer.
        both_wrong: documents that both got wrong.
        same_wrong: of those, the share with the same wrong answer.
        same_wrong_beyond_chance: 0 when wrong answers meet as often as unrelated ones of the
            same two models would, 1 when always; see `_chance`.
        right_where_teacher_wrong: of the teacher's wrong documents, those the student got right.
    """

    same_answer: float
    both_wrong: int
    same_wrong: float | None
    same_wrong_beyond_chance: float | None
    right_where_teacher_wrong: float | None


@dataclass(frozen=True)
class Flip:
    """One document whose score changed; `change` is `fixed` or `broken`.

    `picture` is the path of the stored picture, empty where none was kept.
    """

    document_id: str
    category: str
    change: str
    question: str
    target: str
    reference_answer: str
    other_answer: str
    reference_score: float
    other_score: float
    image_digest: str
    picture: str = ""


def _text(frame: "pd.DataFrame", column: str) -> NDArray[np.object_]:
    return frame[column].astype(str).str.strip().str.lower().to_numpy(dtype=object)


def agreement(aligned: AlignedTask, teacher: int, student: int) -> Agreement:
    """Agreement of two of the aligned runs on the answers as the scorer understood them.

    An answer that could not be parsed equals no other.
    """
    one, other = aligned.samples[teacher], aligned.samples[student]
    target, a, b = _text(one, "target"), _text(one, "parsed"), _text(other, "parsed")
    same = (a == b) & (a != "")
    teacher_wrong = one["score"].to_numpy() < RIGHT
    student_wrong = other["score"].to_numpy() < RIGHT
    both = teacher_wrong & student_wrong
    same_wrong = float(same[both].mean()) if both.any() else None
    chance = _chance(target[both], a[both], b[both])
    beyond = None
    if same_wrong is not None and chance is not None and chance < 1 - 1e-9:
        beyond = (same_wrong - chance) / (1 - chance)
    return Agreement(
        same_answer=float(same.mean()),
        both_wrong=int(both.sum()),
        same_wrong=same_wrong,
        same_wrong_beyond_chance=beyond,
        right_where_teacher_wrong=(
            float((~student_wrong)[teacher_wrong].mean()) if teacher_wrong.any() else None
        ),
    )


def _chance(
    target: NDArray[np.object_], a: NDArray[np.object_], b: NDArray[np.object_]
) -> float | None:
    """How often a wrong answer of one model meets one that the other gave to another document.

    Over pairs of different documents i, j such that b_j would be wrong for i too: the share
    with a_i == b_j. It knows both models' habits (always C) and the number of options: with
    yes and no it is 1, so nothing can lie beyond it. None when there is no such pair.
    """
    words, codes = np.unique(np.concatenate([target, a, b]).astype(str), return_inverse=True)
    t, a_codes, b_codes = codes.reshape(3, -1) if len(target) else np.zeros((3, 0), dtype=int)
    given = np.bincount(b_codes, minlength=len(words))
    count = len(target)
    wrong_elsewhere = b_codes != t  # b_i is wrong for i itself unless the score was soft
    pairs = float((count - given[t]).sum() - wrong_elsewhere.sum())
    if pairs <= 0:
        return None
    unread = words[a_codes] == ""
    possible = (a_codes != t) & ~unread
    meets = given[a_codes] * possible - ((a_codes == b_codes) & possible)
    return float(meets.sum()) / pairs


def flips(aligned: AlignedTask, reference: int = 0, other: int = 1) -> list[Flip]:
    """Documents whose score changed, broken ones first; needs the texts in the samples."""
    one, two = aligned.samples[reference], aligned.samples[other]
    change = two["score"].to_numpy() - one["score"].to_numpy()
    rows = [int(row) for row in np.argsort(change, kind="stable") if abs(change[row]) > 1e-9]
    return [
        Flip(
            document_id=str(one["document_id"].iloc[row]),
            category=str(one["category"].iloc[row]),
            change="fixed" if change[row] > 0 else "broken",
            question=str(one["question"].iloc[row]),
            target=str(one["target"].iloc[row]),
            reference_answer=str(one["answer"].iloc[row]),
            other_answer=str(two["answer"].iloc[row]),
            reference_score=float(one["score"].iloc[row]),
            other_score=float(two["score"].iloc[row]),
            image_digest=str(one["image_digest"].iloc[row]),
        )
        for row in rows
    ]
