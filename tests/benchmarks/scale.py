"""VQAv2 at its full size, with synthetic answers: `python -m tests.benchmarks.scale`, five minutes.

Everything but the model is real: the parquet file in the upstream columns, lmms-eval's prompts and
scores, the journal, the store. The pictures are tiny; decoding real ones is the model's side.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from tests.support.memory import peak_memory

ROWS, PICTURES = 214_354, 40_504
WORDS = tuple(
    f"{first} {number}{second}"
    for number in range(2_000)
    for first in ("number", "a dog", "two")
    for second in ("", ", red", " on the table", "-left", ".5")
)
"""30,000 wordings, about as many as VQAv2's training answers have."""


def write_vqav2(folder: Path, rows: int = ROWS, pictures: int = PICTURES) -> None:
    """The validation split; of ten annotators about six agree, wordings are spread as in speech."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = np.random.default_rng(0)
    files = []
    for number in range(pictures):
        buffer = io.BytesIO()
        pixels = numbers.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "png")
        files.append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
    given = np.minimum(numbers.zipf(1.3, (rows, 10)), len(WORDS)) - 1
    given = np.where(numbers.random((rows, 10)) < 0.6, given[:, :1], given)
    table = [
        {
            "question_type": "what",
            "multiple_choice_answer": WORDS[words[0]],
            "answers": [
                {"answer": WORDS[word], "answer_confidence": "yes", "answer_id": place + 1}
                for place, word in enumerate(words)
            ],
            "image_id": row * pictures // rows,
            "answer_type": "other",
            "question_id": row,
            "question": f"What is thing {row % 977} near the {WORDS[words[1]]}?",
            "image": files[row * pictures // rows],
        }
        for row, words in enumerate(given)
    ]
    place = folder / "vqav2"
    place.mkdir(parents=True)
    step = 1 + rows // 4
    for part, start in enumerate(range(0, rows, step)):
        rows_of_part = pa.Table.from_pylist(table[start : start + step])
        file = place / f"validation-{part:05d}-of-00004.parquet"
        pq.write_table(rows_of_part, file, row_group_size=1000)  # as data sets of pictures have it


FORMS = ("{}", "{}.", "The answer is {}.", "Answer: {}", "**{}**")
"""Every fifth answer in each: four of five are scored again for what they say."""


class Synthetic:
    """Answers at once, with words that no picture is needed for."""

    batch_size = 64
    path = "synthetic"
    generation: Mapping[str, Any] = {}
    forms = FORMS[:1]

    def __init__(self, *_: Any) -> None: ...

    def answers(self, requests: Sequence[Any], keys: Sequence[str]) -> Iterator[list[Any]]:
        from kd_bench.evals.benchmark import Answer

        for start in range(0, len(requests), self.batch_size):
            stop = min(start + self.batch_size, len(requests))
            yield [
                Answer(n, self.forms[n % len(self.forms)].format(WORDS[n % 10]), "ok", 2)
                for n in range(start, stop)
            ]

    def cost(self, memory: Any) -> Any:
        from kd_bench.records import Cost

        return Cost(peak_memory_bytes=memory.peak())


def main(rows: int, wrapped: bool) -> None:
    """Score and store all documents; print seconds and peak memory."""
    from kd_bench.evals import models, scoring
    from kd_bench.evals import run as runs
    from kd_bench.world.build import resolve

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_in_another_process(folder / "data", rows)
        models.load_source = Synthetic
        Synthetic.forms = FORMS if wrapped else FORMS[:1]
        content_of, spent = scoring.content_of, [0.0]

        def timed(*given: Any) -> Any:
            begin = time.perf_counter()
            found = content_of(*given)
            spent[0] += time.perf_counter() - begin
            return found

        scoring.content_of = timed
        start = time.perf_counter()
        settings = runs.EvalSettings(
            suite="ten", tasks=["vqav2"], data=folder / "data", results=folder / "results"
        )
        run = runs.evaluate(resolve("embedded:weights/student"), settings)
        elapsed = time.perf_counter() - start
        result = run.result("vqav2")
        peak = peak_memory()
        stored = sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())
    Console(width=120).print(
        f"VQAv2, {result.documents:,} documents ({result.units:,} pictures), synthetic answers, "
        f"score {result.score:.1f}: {elapsed:.0f} s, {elapsed / result.documents * 1e3:.2f} ms a "
        f"document, peak memory {peak / 1e9:.2f} GB, {stored / 1e6:.0f} MB stored "
        f"(to reach: 180 s, 2 GB). Of that {spent[0]:.1f} s for the score by content, "
        f"{spent[0] / (elapsed - spent[0]):.1%} more than without (to reach: 10 %).",
        highlight=False,
    )


def write_in_another_process(folder: Path, rows: int) -> None:
    """The rows' memory shall not count as the evaluation's."""
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=write_vqav2, args=(folder, rows))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("The parquet files could not be written.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--wrapped", action="store_true", help="answers in sentences and marks")
    options = parser.parse_args()
    main(options.rows, options.wrapped)
