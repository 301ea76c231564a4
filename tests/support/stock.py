"""The stock `lmms-eval` command on answers that are given: its own loader, task and scorer."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_bench.evals.benchmark import REASONING_TAGS, lmms_eval, quiet, task_config
from kd_bench.registry import load_task


def stock(
    task: str,
    folder: Path,
    texts: Sequence[str],
    scratch: Path,
    reasoning_tags: str | None = REASONING_TAGS,
) -> dict[str, Any]:
    """What the unmodified task makes of the answers, and what it logs of each."""
    evaluator = lmms_eval()
    from lmms_eval.api.model import lmms
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.tasks import TaskManager

    class Fixed(lmms):  # type: ignore[misc]
        def generate_until(self, requests: Any) -> list[str]:
            return [texts[request.args[3]] for request in requests]

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        generate_until_multi_round = loglikelihood

        def clean(self) -> None: ...

    spec = load_task(task)
    config = task_config(spec.upstream)
    file = next((folder / task).glob("*.parquet"))
    config.update(
        dataset_path="parquet",
        dataset_name=None,
        dataset_kwargs={
            "data_files": {spec.dataset.split: str(file)},
            "cache_dir": str(scratch / "cache"),
        },
    )
    config["process_docs"] = None  # GQA's downloads all images; none is scored
    config["doc_to_visual"] = lambda document: []
    config["metric_list"] = [m for m in config["metric_list"] if m["metric"] != "submission"]
    with quiet():
        found: dict[str, Any] = evaluator.simple_evaluate(
            Fixed(),
            tasks=[ConfigurableTask(config=config, model_name=None)],
            task_manager=TaskManager("ERROR", include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
            cli_args=argparse.Namespace(
                output_path=str(scratch), process_with_media=False, reasoning_tags=reasoning_tags
            ),
        )
    return found
