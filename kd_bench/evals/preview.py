"""A sample of a benchmark as a model meets it, and whether a registry entry fits upstream."""

from dataclasses import dataclass
from pathlib import Path

from kd_bench.aggregators import AGGREGATORS
from kd_bench.errors import KdBenchError, closest, one_line
from kd_bench.evals.scoring import RULES
from kd_bench.evals.tasks import prepare
from kd_bench.evals.upstream import task_config
from kd_bench.registry import TaskSpec


@dataclass(frozen=True)
class Preview:
    """One document as a model meets it.

    Attributes:
        prompt: the question as upstream words it, before the chat template.
        pictures: where its pictures were written.
    """

    task: str
    document: int
    prompt: str
    pictures: list[Path]
    fingerprint: str


def preview(
    spec: TaskSpec,
    data: Path,
    pictures: Path,
    *,
    document: int = 0,
    profile: str | None = None,
) -> Preview:
    """Render one document and write its pictures into the folder `pictures`.

    Raises:
        UsageError: the data cannot be used.
    """
    prepared = prepare(spec, data, profile=profile)
    index = min(document, len(prepared.documents) - 1)
    pictures.mkdir(parents=True, exist_ok=True)
    written = []
    for number, picture in enumerate(prepared.task.doc_to_visual(prepared.documents[index]), 1):
        path = pictures / f"{spec.id}-{index}-{number}.png"
        picture.save(path)
        written.append(path)
    return Preview(spec.id, index, prepared.prompts[index], written, prepared.fingerprint)


def validate(spec: TaskSpec) -> list[str]:
    """Problems of a registry entry that its schema cannot see; none means that it fits."""
    problems = []
    for name, profile in spec.profiles.items():
        where = f"{spec.id}, profile {name}"
        try:
            config = task_config(profile.upstream or spec.upstream)
        except KdBenchError as error:
            problems.append(f"{where}: {one_line(error)}")
            continue
        reported = [str(entry["metric"]) for entry in config.get("metric_list") or []]
        metric = profile.metric or spec.metric
        if profile.scored and metric not in reported:
            problems.append(
                f"{where}: upstream reports {', '.join(reported)}, not {metric}."
                f"{closest(metric, reported)}"
            )
        aggregator = profile.aggregator or spec.aggregator
        if aggregator not in AGGREGATORS:
            known = list(AGGREGATORS)
            problems.append(f"{where}: no aggregator {aggregator!r}.{closest(aggregator, known)}")
        if profile.rescore is not None and profile.rescore not in RULES:
            problems.append(f"{where}: no rule {profile.rescore!r} for raw answers")
        if config.get("output_type") != "generate_until":
            problems.append(f"{where}: {config.get('output_type')} tasks are not supported")
        split = config.get("test_split") or config.get("validation_split")
        if not profile.split and split != spec.dataset.split:
            problems.append(f"{where}: upstream's split is {split}, not {spec.dataset.split}")
    return problems
