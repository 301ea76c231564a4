"""A recipe: which student and teacher, which data, what is minimised, in which stages.

    z_T  teacher     z_S  student     z_SW  switch: the student's vision, the teacher's language

A method is a list of weighted terms over these logits; a recipe names one or spells the terms out,
so that every ablation is a change in YAML. Stages run in order (pretrain the projector -> distil ->
...). `load_recipe` takes a shipped name or a path and `key=value` overrides; a key that belongs to
a stage (`method`, `learning_rate`, ...) and stands without a stage, in a file or on the command
line, applies to the last stage, the one that distils. A file without `stages` has one.

All of it is plain data: nothing here needs torch.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from kd_bench.config import StrictModel, apply_overrides, dump_yaml, read_yaml, validate
from kd_bench.errors import UsageError, closest

VocabularyLoss = Literal["kl", "rkl", "jsd", "bild", "dbild"]
ImageLoss = Literal["image_kl", "image_correlation", "image_mse", "attention_mse"]
Loss = Literal["ce", VocabularyLoss, ImageLoss]
VOCABULARY_LOSSES: tuple[str, ...] = get_args(VocabularyLoss)

# Options that a loss reads; any other option on it is a mistake worth a message.
KNEE_OPTIONS = ("curve", "candidates", "k_min", "k_max")
OPTIONS: dict[str, tuple[str, ...]] = {
    "ce": (),
    "kl": ("temperature",),
    "rkl": ("temperature",),
    "jsd": ("temperature", "beta"),
    "bild": ("temperature", "top_k", "direction"),
    "dbild": ("temperature", "direction", *KNEE_OPTIONS, "pairs", "ids", "weight_by"),
    "image_kl": ("temperature",),
    "image_correlation": (),
    "image_mse": (),
    "attention_mse": (),
}


class Term(StrictModel):
    """One weighted term of the objective; options left at None take the loss's own default.

    Attributes:
        loss: `ce` against the labels; `kl`, `rkl`, `jsd`, `bild`, `dbild` against the teacher on
            answer positions; `image_kl`, `image_correlation` on image positions of the last layer;
            `image_mse` on projected image tokens; `attention_mse` on first-layer text-to-image
            attention.
        of: whose logits are compared: the student's or the visual switch's.
        weight: factor in the total.
        name: name in the log; by default the loss, with `switch_` before it where `of` is switch.
    """

    loss: Loss
    of: Literal["student", "switch"] = "student"
    weight: float = Field(default=1.0, ge=0)
    name: str = Field(default="", pattern=r"^[\w .+-]*$")
    temperature: float | None = Field(default=None, gt=0)
    beta: float | None = Field(default=None, gt=0, lt=1)
    top_k: int | None = Field(default=None, ge=2)
    direction: Literal["forward", "reverse", "led"] | None = None
    curve: Literal["logits", "probs"] | None = None
    candidates: Literal["full"] | int | None = None
    k_min: int | None = Field(default=None, ge=2)
    k_max: int | None = Field(default=None, ge=2)
    pairs: Literal["flat", "row-wise", "none"] | None = None
    ids: Literal["each", "union"] | None = None
    weight_by: Literal["equal", "entropy"] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Term":
        known = OPTIONS[self.loss]
        for option in sorted({name for names in OPTIONS.values() for name in names}):
            if getattr(self, option) is not None and option not in known:
                offered = ", ".join(known) or "none"
                raise ValueError(f"{self.loss} has no option {option!r} (it has: {offered})")
        if self.of == "switch" and self.loss not in VOCABULARY_LOSSES:
            raise ValueError(f"{self.loss} cannot be taken of the switch logits")
        return self

    @property
    def label(self) -> str:
        """The term's name in logs."""
        return self.name or (f"switch_{self.loss}" if self.of == "switch" else self.loss)

    @property
    def options(self) -> dict[str, object]:
        """The options that were set, as keyword arguments of the loss."""
        given = {option: getattr(self, option) for option in OPTIONS[self.loss]}
        return {option: value for option, value in given.items() if value is not None}


_CE = Term(loss="ce")
_ALIGN = Term(loss="dbild", name="align")
_SWITCH = Term(loss="dbild", of="switch", name="switch")

METHODS: dict[str, tuple[Term, ...]] = {
    "sft": (_CE,),
    "kl": (_CE, Term(loss="kl")),
    "rkl": (_CE, Term(loss="rkl")),
    "jsd": (_CE, Term(loss="jsd")),
    "bild": (_CE, Term(loss="bild")),
    # The two terms of Switch-KD (arXiv 2604.14629), apart and together.
    "dbild": (_CE, _ALIGN),
    "vsd": (_CE, _SWITCH),
    "switch-kd": (_CE, _ALIGN, _SWITCH),
    # LLaVA-KD (arXiv 2410.16236): response KL, KL on image positions, visual self-correlation.
    "llava-kd": (
        _CE,
        Term(loss="kl", name="response_kl"),
        Term(loss="image_kl"),
        Term(loss="image_correlation", weight=0.5),
    ),
    # Align-KD (arXiv 2412.01282): response KL, projected image tokens, first-layer attention.
    "align-kd": (_CE, Term(loss="kl"), Term(loss="image_mse"), Term(loss="attention_mse")),
}
"""Terms by method name; `sft` is the floor that every method is compared with."""


def needs_teacher(terms: tuple[Term, ...]) -> bool:
    """Whether any term of weight looks at the teacher."""
    return any(term.loss != "ce" for term in terms if term.weight)


def needs_switch(terms: tuple[Term, ...]) -> bool:
    """Whether any term of weight looks at the switch logits."""
    return any(term.of == "switch" for term in terms if term.weight)


def needs_student_logits(terms: tuple[Term, ...]) -> bool:
    """Whether the student's own language model has to run (not for a switch term alone)."""
    return any(term.of == "student" for term in terms if term.weight)


def sharing_images(terms: tuple[Term, ...]) -> list[Term]:
    """The terms of weight that need both models to be given the very same image tokens."""
    at_answers = ("ce", *VOCABULARY_LOSSES)
    return [t for t in terms if t.weight and (t.of == "switch" or t.loss not in at_answers)]


RECIPES = Path(__file__).parent / "recipes"
NEW = "embedded:new/"
"""Before the name of an untrained model of the embedded world."""

MAX_PIXELS = 100_000_000
"""Larger images are not decoded: 0.3 GB as RGB, and every processor scales them down anyway."""

# Names become folders.
Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$", max_length=100)]
LearningRate = Annotated[float, Field(gt=0, le=1e3)]
Count = Annotated[int, Field(ge=1, le=10**9)]


class DataSource(StrictModel):
    """Conversations and their images.

    Attributes:
        path: JSON, JSONL, parquet, a folder written by `datasets.save_to_disk`, a pattern of those
            (`data/*.json`) or the name of a hub dataset; one or several.
        subset, split: of a hub dataset; the split is train where none is named.
        weight: how often each row is met in an epoch where `data` is a list of sources; 0.5 is
            every row once in two epochs. Without one, once.
        streaming: read rows in their order while training, mixed within windows, and never more
            of them than that; for parquet and hub data that are larger than the disk.
        images: folder that image names are relative to; by default the file's own folder.
        limit: only the first so many conversations, after `skip`.
        skip: leave out the first so many.
        unreadable_limit: samples that may be skipped before the training stops with their list.
        max_image_pixels: an image of more is not decoded; its sample counts as unreadable.
    """

    path: str | list[str]
    subset: str | None = None
    split: str | None = None
    weight: float | None = Field(default=None, gt=0, le=1_000)
    streaming: bool | None = None
    images: str | None = None
    limit: Count | None = None
    skip: int = Field(default=0, ge=0)
    unreadable_limit: int = Field(default=10, ge=0)
    max_image_pixels: Count = MAX_PIXELS

    @field_validator("path")
    @classmethod
    def _names_a_file(cls, path: str | list[str]) -> str | list[str]:
        if not path:
            raise ValueError("names no file; give one, or several: [a.json, b.json]")
        return path


Data = Annotated[
    Annotated[DataSource, Tag("One")] | Annotated[list[DataSource], Tag("Several")],
    Discriminator(lambda value: "Several" if isinstance(value, list) else "One"),
]
"""One source, or several that are mixed."""


class StudentParts(StrictModel):
    """A student put together from pretrained parts, with a fresh projector.

    Attributes:
        vision_tower, language_model: checkpoints; the tower may be a whole vision-language model.
        projector_act: activation between the projector's two layers.
        vision_feature_layer, vision_feature_select_strategy: as in transformers' LlavaConfig.
        chat_template: Jinja file; by default the language model's own template.
    """

    vision_tower: str
    language_model: str
    projector_act: str = "gelu"
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    chat_template: str | None = None


class LoraSettings(StrictModel):
    """Low-rank adapters on the language model through peft, merged into it on export.

    Attributes:
        r: rank.
        alpha: the adapters' part counts alpha / r.
        dropout: on the adapters' input.
        target_modules: names of linear layers, e.g. [q_proj, v_proj].
    """

    r: int = Field(default=64, ge=1)
    alpha: float = Field(default=128, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | str = "all-linear"


class Stage(StrictModel):
    """One part of the training with its own trainable set, terms, data and settings.

    Attributes:
        name: names its folder, and its settings on the command line: pretrain.steps=100.
        method: what is minimised: sft, kl, switch-kd, ...; or give `terms`.
        terms: a list of weighted terms: [{loss: ce}, {loss: dbild, of: switch, weight: 0.5}].
        new_projector_only: the stage teaches a fresh projector; where `student` is a checkpoint
            that brings its own, the stage is left out.
        trainable: parts that learn; a term on the switch logits needs `vision_tower` among them.
        lora: train low-rank adapters in place of the language model's weights.
        data: where it is not the recipe's.
        steps, epochs: length, one of the two.
        batch_size: samples per optimizer step, over all devices and accumulation pieces, so that
            a recipe means the same on any hardware.
        gradient_accumulation: pieces that a device's share of a batch is computed in.
        learning_rate: its largest value.
        vision_tower_learning_rate: where the vision tower shall learn at a rate of its own.
        schedule: of the learning rate behind the warm-up.
        warmup: steps if 1 or more, a share of all steps if below 1.
        weight_decay: AdamW's.
        betas: AdamW's.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them as they are.
        precision: `bfloat16` is mixed precision (weights stay float32).
        gradient_checkpointing: compute the student's activations again in the backward pass instead
            of keeping them; by default where they would not fit the device (`train --plan`).
        teacher_gradient_checkpointing: the same of the teacher, which keeps activations for the
            visual switch alone; by default as the student, where that is set.
        group_by_length: samples of similar length share a batch.
        max_length: tokens of a sample, image tokens included; longer ones lose their end.
        workers: processes that load data, on each device.
        save_every: steps between checkpoints that a killed run resumes from; 0 is only at the end.
        log_every: steps between lines of `train_log.jsonl`.
        head_chunk: answer positions that go through the LM heads and losses at a time; by default
            as many as keep 64 MB of float32 logits a model, at most 512; on a GPU as many as a
            quarter of its free memory holds, at most 1,024.
    """

    name: Name = "train"
    method: str | None = None
    terms: list[Term] | None = None
    new_projector_only: bool = False
    trainable: list[Literal["vision_tower", "projector", "language_model"]] = Field(
        default=["vision_tower", "projector", "language_model"], min_length=1
    )
    lora: LoraSettings | None = None
    data: Data | None = None
    steps: Count | None = None
    epochs: float | None = Field(default=None, gt=0, le=1e6)
    batch_size: Count = 32
    gradient_accumulation: Count = 1
    learning_rate: LearningRate = 2e-5
    vision_tower_learning_rate: LearningRate | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, le=1e9)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.999], min_length=2, max_length=2
    )
    max_grad_norm: float = Field(default=1.0, ge=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool | None = None
    teacher_gradient_checkpointing: bool | None = None
    group_by_length: bool = False
    max_length: int = Field(default=2048, ge=8, le=10**7)
    workers: int = Field(default=0, ge=0, le=1024)
    save_every: int = Field(default=500, ge=0)
    log_every: Count = 25
    head_chunk: Count | None = None

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str | None) -> str | None:
        if method is not None and method not in METHODS:
            hint = closest(method, list(METHODS))
            raise ValueError(f"unknown method {method!r}.{hint} Known: {', '.join(METHODS)}")
        return method

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        if (self.method is None) == (self.terms is None):
            both = "not both" if self.terms else f"e.g. method: sft ({', '.join(METHODS)})"
            raise ValueError(f"give a method or terms, {both}")
        if self.terms is not None:
            labels = [term.label for term in self.terms]
            if not any(term.weight for term in self.terms):
                raise ValueError("no term has a weight")
            if len(set(labels)) < len(labels):
                raise ValueError("two terms have one name; set `name` on them")
        if (self.steps is None) == (self.epochs is None):
            both = "not both" if self.steps else "one of the two says how long it takes"
            raise ValueError(f"give steps or epochs, {both}")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError("batch_size is not a multiple of gradient_accumulation")
        return self

    @property
    def objective(self) -> tuple[Term, ...]:
        """The terms, in the order in which they are logged."""
        return tuple(self.terms) if self.terms is not None else METHODS[self.method or "sft"]

    @property
    def mixed(self) -> bool:
        """Whether it computes in mixed precision."""
        return self.precision == "bfloat16"

    @property
    def method_name(self) -> str:
        """The method's name; `custom` where the terms are spelled out."""
        return self.method or "custom"


class Recipe(StrictModel):
    """A whole training.

    Attributes:
        name: of the training; by default the file's name.
        student: a checkpoint to start from, the parts to build it from, or
            `embedded:new/student`, the embedded world's own, untrained, drawn from `seed`.
        teacher: a checkpoint; not needed where every term is `ce`.
        data: where a stage names none of its own.
        seed: of everything that is drawn: order of samples, new weights, dropout.
        output: folder of the result; by default `checkpoints/<name>-<method>-seed<seed>`.
        truncate_vocabulary: allow a teacher whose LM head has more (padding) rows than the
            student's, by ignoring the surplus; the tokenizers must be equal all the same.
        prompt_template: instead of the student's chat template, and saved with it: a Jinja file,
            or a name of `chat.TEMPLATES`.
        chat_template_kwargs: variables of the chat template, such as enable_thinking: false; saved
            with the student.
        new_projector: the student checkpoint has no projector; one is drawn from `seed`.
        allow_pickle, trust_remote_code: permit checkpoints that can run code when loaded.
        teacher_cache: folder for the teacher's hidden states at answer positions. Up to 128 MB
            of them are kept in the user's cache folder without it, where samples are met again.
        teacher_sharding: `fsdp2` spreads the frozen teacher's layers over the devices and gathers
            them one by one; without it each device holds the teacher whole.
        device_memory: GB of memory of a device that a training must fit into, by an estimate before
            the first step; by default what the device reports, and 0 trains all the same.
        report_to: other loggers, e.g. [tensorboard].
        final_dtype: float type of the finished checkpoint; auto is that of the student it started
            from (training itself keeps float32 weights).
        stages: its parts, in order; a file without them has one, of the settings at its top.
    """

    name: Name
    student: str | StudentParts
    teacher: str | None = None
    data: Data | None = None
    seed: int = Field(default=0, ge=0, lt=2**31)
    output: str | None = None
    truncate_vocabulary: bool = False
    prompt_template: str | None = None
    chat_template_kwargs: dict[str, str | bool | int | float] | None = None
    new_projector: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False
    teacher_cache: str | None = None
    teacher_sharding: Literal["fsdp2"] | None = None
    device_memory: float | None = Field(default=None, ge=0, le=1e5)
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default_factory=list)
    final_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    stages: list[Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("two stages have one name")
        for stage in self.stages:
            if not stage.data and not self.data:
                raise ValueError(f"stage {stage.name!r} has no data, and the recipe has none")
            if self.teacher is None and any(term.loss != "ce" for term in stage.objective):
                raise ValueError(f"stage {stage.name!r} needs a teacher; set `teacher`")
        if self.teacher_sharding and self.teacher_cache:  # a device whose batch is kept would skip
            raise ValueError("teacher_cache and teacher_sharding exclude each other; keep one")
        return self

    @property
    def method(self) -> str:
        """The method of the last stage, which is the one that names the student."""
        return self.stages[-1].method_name

    @property
    def output_folder(self) -> Path:
        """Where everything of this training is written."""
        if self.output is not None:
            return Path(self.output).expanduser()
        return Path("checkpoints") / f"{self.name}-{self.method}-seed{self.seed}"

    @property
    def allowed(self) -> dict[str, Any]:
        """What checkpoints may do when they are loaded, as `load_model` and `locate` take it."""
        return {"allow_pickle": self.allow_pickle, "trust_remote_code": self.trust_remote_code}

    def data_of(self, stage: Stage) -> list[DataSource]:
        """The sources of the stage's own data, or of the recipe's."""
        data = stage.data or self.data
        assert data  # the validator saw to it
        return data if isinstance(data, list) else [data]


def list_recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a shipped recipe (by name) or a YAML file, apply overrides, validate.

    `method=sft`, `learning_rate=1e-3` and every other key of a stage apply to the last stage;
    `stages.0.learning_rate=1e-3` or `pretrain.learning_rate=1e-3` (a stage's name) to that one;
    `pretrain=null` drops a stage. Stages for a new projector go where the student brings one.

    Raises:
        UsageError: no such recipe, an unknown key, a value that does not fit.
    """
    path = find_recipe(name_or_path)
    mapping = _short_form(read_yaml(path), path)
    names = [_stage_name(stage) for stage in mapping["stages"]]
    given: dict[str, str] = {}
    overrides = list(overrides)
    set_here = {each.partition("=")[0] for each in overrides}
    for override in overrides:
        student = mapping.get("student")
        built = {"student.vision_tower", "student.language_model"} <= set_here
        if override.startswith("student.") and isinstance(student, str) and not built:
            raise UsageError(
                f"{override!r}: student is a checkpoint path ({student}), not built of parts.",
                "Set student.vision_tower= and student.language_model= both, or student= alone.",
            )
        addressed = _address(override, names)
        key, _, value = addressed.partition("=")
        where, *rest = key.split(".")[1:] if key.startswith("stages.") else [""]
        if where and not rest and value not in ("null", "~", ""):
            raise UsageError(f"{override!r}: a stage is no plain value.", "null drops it.")
        mapping = apply_overrides(mapping, [addressed])
        given[key] = override
        if where and len(rest) == 1 and rest[0] in _INSTEAD_OF:
            mapping["stages"][int(where)].pop(_INSTEAD_OF[rest[0]], None)
    return validate(Recipe, *_without_needless_stages(mapping, str(path), given))


# Of two settings that exclude each other, the one that is given on the command line counts.
_INSTEAD_OF = {"steps": "epochs", "epochs": "steps", "method": "terms", "terms": "method"}


def _short_form(mapping: dict[str, Any], path: Path) -> dict[str, Any]:
    """The mapping with a stage's keys that stand at its top moved to the last stage."""
    stages = mapping.setdefault("stages", [{}])
    mapping.setdefault("name", path.stem)
    if not isinstance(stages, list) or not stages or not isinstance(stages[-1], dict):
        raise UsageError(
            f"{path}: stages: expected a list of stages.", "Write `stages:` and `- name: train`."
        )
    for key in [key for key in mapping if key in Stage.model_fields.keys() - Recipe.model_fields]:
        if key in stages[-1]:
            raise UsageError(
                f"{path}: {key!r} stands at the top and in the last stage.", "Keep one of them."
            )
        stages[-1][key] = mapping.pop(key)
    return mapping


def _without_needless_stages(
    mapping: dict[str, Any], where: str, given: dict[str, str]
) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Leave out the stages that are null, or teach a projector that the student brings already.

    `given` follows: its keys count the stages that stay.
    """
    if not isinstance(stages := mapping["stages"], list):
        return mapping, where, given
    student = mapping.get("student")
    complete = isinstance(student, str) and not student.startswith(NEW)
    complete = complete and mapping.get("new_projector") is not True
    kept = [
        index
        for index, stage in enumerate(stages)
        if stage is not None
        and not (complete and isinstance(stage, dict) and stage.get("new_projector_only") is True)
    ]
    moved: dict[str, str] = {}
    for key, override in given.items():
        head, _, rest = key.partition(".")
        number, _, below = rest.partition(".")
        if head != "stages" or not below or int(number) in kept:
            new = f"stages.{kept.index(int(number))}.{below}" if below and head == "stages" else key
            moved[new] = override
        elif stages[int(number)] is not None:
            raise UsageError(
                f"{override!r}: stage {_stage_name(stages[int(number)])!r} is left out, since the "
                f"student is a checkpoint with a projector of its own.",
                f"Remove that setting, or set stages.{number}.new_projector_only=false.",
            )
    return {**mapping, "stages": [stages[index] for index in kept]}, where, moved


def _stage_name(stage: Any) -> str:
    return str(stage.get("name", "train")) if isinstance(stage, dict) else ""


def _address(override: str, stage_names: list[str]) -> str:
    """The override with its stage spelled as `stages.<index>`."""
    key, separator, value = override.partition("=")
    head, _, rest = key.partition(".")
    if head in Recipe.model_fields:
        return override
    if head in stage_names:
        below = f".{rest}" if rest else ""
        return f"stages.{stage_names.index(head)}{below}{separator}{value}"
    if head in Stage.model_fields:
        return f"stages.{len(stage_names) - 1}.{key}{separator}{value}"
    if rest.partition(".")[0] in Stage.model_fields:
        hint = closest(head, stage_names)
        raise UsageError(
            f"{override!r}: there is no stage {head!r}.{hint}", f"Stages: {', '.join(stage_names)}."
        )
    return override


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe, or the path of one's own.

    Raises:
        UsageError: neither.
    """
    path = Path(name_or_path).expanduser()
    known = list_recipes()
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UsageError(
            f"{path} is a checkpoint, not a recipe.",
            f"Name a recipe and set it in there: kd-bench train RECIPE student={path}",
        )
    if path.is_dir():
        inside = path / "recipe.yaml"
        hint = f"Give {inside}." if inside.is_file() else "Give a YAML file or a shipped recipe."
        raise UsageError(f"{path} is a folder, not a recipe.", hint)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        return path
    hint = closest(str(name_or_path), list(known))
    raise UsageError(
        f"There is no recipe {str(name_or_path)!r}.{hint}",
        f"Shipped recipes: {', '.join(known) or 'none'}; or give the path of a YAML file.",
    )


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json", exclude_none=True))


def check_method(name: str, *others: str) -> None:
    """Refuse a method that there is not; `others` are named as what could stand in its place.

    Raises:
        UsageError: it is none.
    """
    if name not in METHODS:
        raise UsageError(
            f"There is no method {name!r}.{closest(name, list(METHODS))}",
            f"Known: {', '.join([*METHODS, *others])}.",
        )


def plan(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Recipe]:
    """The recipes of a sweep, each with a folder of its own.

    Args:
        methods: names in `METHODS`, or `all`; by default the recipe's own.
        seeds: by default the recipe's own.

    Raises:
        UsageError: an unknown method, or a recipe that does not hold.
    """
    base = load_recipe(recipe, overrides)
    asked = list(METHODS) if methods and "all" in methods else list(methods or [])
    for name in asked:
        check_method(name, "all")
    planned = []
    for seed in seeds or [base.seed]:
        for name in asked or [""]:
            chosen = [f"method={name}"] if name else []
            single = load_recipe(recipe, [*overrides, f"seed={seed}", *chosen])
            if base.output is not None and (asked or seeds):  # each below the folder that was named
                own = f"{base.output}/{single.method}-seed{seed}"
                single = single.model_copy(update={"output": own})
            planned.append(single)
    return planned
