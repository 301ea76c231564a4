"""lmms-eval behind one door: imported late, kept quiet, never asked to use the network."""

import argparse
import contextlib
import functools
import io
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd_bench.errors import MissingExtraError, UsageError


def lmms_eval() -> Any:
    """The module `lmms_eval.evaluator`; importing it costs seconds and about a gigabyte."""
    already = "lmms_eval.evaluator" in sys.modules
    try:
        import lmms_eval.evaluator as evaluator
    except ImportError as error:
        raise MissingExtraError("eval", "eval", error.name or "lmms-eval") from error
    if not already:
        from loguru import logger

        logger.disable("lmms_eval")
        _remember_normalised_answers()
    return evaluator


def _remember_normalised_answers() -> None:
    """Let upstream normalise each wording of an answer once.

    VQA scores normalise ten annotators' answers a question, most of them alike, and took most of
    the time outside the model. The function looks at its text alone.
    """
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    normalise = EvalAIAnswerProcessor.process_punctuation
    remembered = functools.lru_cache(maxsize=2**16)(
        functools.partial(normalise, EvalAIAnswerProcessor())
    )
    remembered_method = functools.wraps(normalise)(lambda _, text: remembered(text))
    EvalAIAnswerProcessor.process_punctuation = remembered_method


def lmms_eval_version() -> str:
    """The installed version."""
    return version("lmms-eval")


@contextlib.contextmanager
def quiet(debug: bool = False) -> Iterator[None]:
    """Keep upstream's prints and progress bars off the terminal, unless debugging."""
    if debug:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def task_config(name: str) -> dict[str, Any]:
    """Upstream's own configuration of a task, with its prompt and scoring functions.

    Raises:
        UsageError: lmms-eval has no such task.
    """
    evaluator = lmms_eval()
    from lmms_eval.utils import load_yaml_config

    folder = Path(evaluator.__file__).parent / "tasks"
    found = sorted(folder.glob(f"*/{name}.yaml")) or sorted(folder.rglob(f"{name}.yaml"))
    if not found:
        raise UsageError(
            f"lmms-eval {lmms_eval_version()} has no task {name!r}.",
            "`lmms-eval --tasks list` shows those it has.",
        )
    with quiet():
        config = load_yaml_config(str(found[0]), mode="full")
    return dict(config)


REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
"""What the stock `lmms-eval` command leaves out of an answer by default (`--reasoning_tags`)."""


def simple_evaluate(
    model: Any, task: Any, folder: Path, reasoning_tags: str = "none"
) -> dict[str, Any] | None:
    """Upstream's evaluation of one task; what its aggregations write goes to `folder`.

    None on every process but the first.
    """
    evaluator = lmms_eval()
    from lmms_eval.tasks import TaskManager

    arguments = argparse.Namespace(
        output_path=str(folder), process_with_media=False, reasoning_tags=reasoning_tags
    )
    result: dict[str, Any] | None = evaluator.simple_evaluate(
        model,
        tasks=[task],
        task_manager=TaskManager("ERROR", include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
        process_docs_parallel=1,
        cli_args=arguments,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        fewshot_random_seed=None,
        verbosity="ERROR",
    )
    task._instances = None  # a kilobyte a document that nobody asks for any more
    return result


def upstream_metrics(aggregates: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of one task by their own names, out of lmms-eval's `results`."""
    found = {}
    for key, value in aggregates.items():
        name, _, filtered = key.partition(",")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if filtered and number and "_stderr" not in name:
            found[name] = float(value)
    return found
