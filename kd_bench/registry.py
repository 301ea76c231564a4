"""The registry: what each benchmark asks, how it is scored and what its number may be put beside.

One YAML a benchmark in `tasks/`, one a suite in `tasks/suites/`, and the published numbers in
`tasks/published.csv`. Nothing here imports torch or lmms-eval.
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field, model_validator

from kd_bench import config
from kd_bench.config import StrictModel
from kd_bench.errors import UsageError, closest

if TYPE_CHECKING:
    import pandas as pd


# In the order of the paper's columns (github.com/haoyi199815/Switch-KD, README): three benchmarks
# of perception, four of cognition, then text in images, one domain's images, hallucination.
Skill = Literal["perception", "cognition", "ocr", "domain", "hallucination"]
SKILLS: tuple[str, ...] = get_args(Skill)

ColumnKind = Literal["image", "text", "integer", "id", "texts", "answers"]

Unit = Literal["pair", "circular", "picture", "document"]


class Dataset(StrictModel):
    """Where the documents come from.

    Attributes:
        repo, config, split: on the hub, in upstream's names.
        revision: pinned commit; None takes the newest once and writes it into the folder's lock.
        images: second configuration that holds the images, joined by `key` (GQA).
    """

    repo: str
    config: str | None = None
    split: str
    revision: str | None = None
    images: str | None = None


class Generation(StrictModel):
    """How answers are generated; always greedy."""

    max_new_tokens: int = Field(gt=0)
    until: list[str] = Field(default=[])


class Published(StrictModel):
    """Whether a published number of this benchmark may be put beside ours."""

    column: str
    verdict: Literal["comparable", "near", "not comparable"]
    why: str


class Profile(StrictModel):
    """A variant of a benchmark's protocol; what is not given is the benchmark's own.

    Attributes:
        prompt: changes to upstream's `lmms_eval_specific_kwargs`.
        columns: further required columns.
        rescore: name of our own rule over the raw answers, where upstream has none.
        upstream, split, documents: another upstream task and its data.
        generation: cap and stops, where the benchmark's own would end an answer too early.
        scored: False writes a submission file and no score.
    """

    title: str
    prompt: dict[str, Any] = Field(default={})
    columns: dict[str, ColumnKind] = Field(default={})
    metric: str | None = None
    aggregator: str | None = None
    rescore: str | None = None
    upstream: str | None = None
    split: str | None = None
    documents: int | None = None
    generation: Generation | None = None
    scored: bool = True
    published: Published | None = None


class TaskSpec(StrictModel):
    """One benchmark.

    Attributes:
        upstream: task name in lmms-eval; its prompts and scoring are used unmodified.
        columns: required columns and their kinds; `optional_columns` are checked where present.
        nullable: required columns whose values may be missing, as upstream's own data has them.
        id_columns: columns that name a document; repeated names are numbered.
        unit: what is resampled: a pair of questions (MME), the rotations of one question
            (MMBench), all questions about an image (`picture`), or the single document.
        unit_columns: columns that name the unit; empty for `picture` means the image itself.
        category_column: subset inside the benchmark, when it has one.
        answer: form of an answer: yes_no, letter or text.
        metric, scale: upstream's headline metric and the factor to the papers' 0-100.
        aggregator: name of the function in `kd_bench.aggregators` that turns samples into score.
    """

    id: str
    title: str
    short: str
    skill: Skill
    upstream: str
    dataset: Dataset
    documents: int
    columns: dict[str, ColumnKind]
    optional_columns: dict[str, ColumnKind] = Field(default={})
    nullable: list[str] = Field(default=[])
    id_columns: list[str] = Field(default=[])
    unit: Unit
    unit_columns: list[str] = Field(default=[])
    category_column: str | None = None
    answer: Literal["yes_no", "letter", "text"]
    generation: Generation
    metric: str
    scale: float
    aggregator: str
    profiles: dict[str, Profile]
    published: Published
    citation: str
    licence: str
    notes: list[str] = Field(default=[])

    @model_validator(mode="after")
    def _columns_exist(self) -> "TaskSpec":
        known = {**self.columns, **self.optional_columns}
        named = [*self.id_columns, *self.unit_columns]
        if self.category_column is not None:
            named.append(self.category_column)
        missing = [column for column in named if column not in known]
        if missing:
            raise ValueError(f"column {missing[0]!r} is used but not declared")
        if not self.profiles:
            raise ValueError("at least one profile is needed; the first is the default")
        return self

    @property
    def default_profile(self) -> str:
        """Name of the profile that is used unless another is asked for."""
        return next(iter(self.profiles))

    def profile(self, name: str | None) -> Profile:
        """A profile by name; None is the default.

        Raises:
            UsageError: the benchmark has no such profile.
        """
        chosen = self.default_profile if name in (None, "default") else str(name)
        if chosen not in self.profiles:
            known = ", ".join(self.profiles)
            meant = closest(chosen, list(self.profiles))
            raise UsageError(f"{self.id} has no profile {chosen!r}.{meant}", f"Profiles: {known}.")
        return self.profiles[chosen]

    def generation_of(self, profile: str | None) -> Generation:
        """How answers are generated under a profile."""
        return self.profile(profile).generation or self.generation


class Suite(StrictModel):
    """Benchmarks that are run and reported together.

    Attributes:
        data: `embedded` (the world that comes with kd-bench) or `hub` (the real data sets).
    """

    name: str
    title: str
    tasks: list[str] = Field(min_length=1)
    data: Literal["embedded", "hub"]


def tasks_folder() -> Path:
    """The registry's folder: `tasks/` of a checkout, `kd_bench/_tasks` of an installed wheel."""
    package = Path(__file__).resolve().parent
    packaged = package / "_tasks"
    return packaged if packaged.is_dir() else package.parent / "tasks"


def task_names() -> list[str]:
    """Ids of all benchmarks: the suite `ten` in the papers' order, then any added ones."""
    found = {path.stem for path in tasks_folder().glob("*.yaml")} - {"policy"}
    first = [name for name in load_suite("ten").tasks if name in found]
    return first + sorted(found - set(first))


@lru_cache(maxsize=256)
def _read_task(path: Path, modified: int) -> TaskSpec:
    del modified  # part of the cache's key only
    spec = config.load(TaskSpec, path)
    if spec.id != path.stem:
        raise UsageError(f"{path}: the id is {spec.id!r}.", f"Call the file {spec.id}.yaml.")
    return spec


def load_task(name: str) -> TaskSpec:
    """One benchmark by id, or by the path of a YAML file of one's own.

    Raises:
        UsageError: no such benchmark; the message lists those there are.
    """
    path = Path(name) if name.endswith(".yaml") else tasks_folder() / f"{name}.yaml"
    if "/" not in name and path.stem == name and name not in task_names():
        known = task_names()
        raise UsageError(
            f"There is no benchmark {name!r}.{closest(name, known)}",
            f"Known: {', '.join(known)}.",
        )
    return _read_task(path, path.stat().st_mtime_ns if path.exists() else 0)


def load_tasks() -> list[TaskSpec]:
    """Every benchmark of the registry."""
    return [load_task(name) for name in task_names()]


def suite_names() -> list[str]:
    """Names of the suites."""
    return sorted(path.stem for path in (tasks_folder() / "suites").glob("*.yaml"))


@lru_cache(maxsize=64)
def _read_suite(path: Path, modified: int) -> Suite:
    del modified  # part of the cache's key only
    return config.load(Suite, path)


def load_suite(name: str) -> Suite:
    """A suite by name, or by the path of a YAML file of one's own.

    Raises:
        UsageError: no such suite, or it names an unknown benchmark.
    """
    path = Path(name) if name.endswith(".yaml") else tasks_folder() / "suites" / f"{name}.yaml"
    if not path.exists():
        known = suite_names()
        raise UsageError(
            f"There is no suite {name!r}.{closest(name, known)}", f"Known: {', '.join(known)}."
        )
    return _read_suite(path, path.stat().st_mtime_ns)


def published() -> "pd.DataFrame":
    """Published results, one row a model, with their sources; scores on the papers' scales."""
    import pandas as pd

    return pd.read_csv(tasks_folder() / "published.csv")
