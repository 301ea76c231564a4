"""What a training will need, before a model is loaded: `kd-bench train RECIPE --plan`.

A stage's distiller is made of shapes, and counted on the longest micro-batch of the real data for
memory, and on typical ones for time.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kd_bench.distill import checkpoints, models, processes
from kd_bench.distill.chat import use_template
from kd_bench.distill.conversations import Stream
from kd_bench.distill.counting import Shapes, config_of, count, objective_bytes, student_of
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.encoding import Collator, ConversationDataset
from kd_bench.distill.recipe import Recipe, Stage, Term, needs_switch, needs_teacher
from kd_bench.distill.stage import (
    Resources,
    build_distiller,
    micro_batch,
    nothing_usable,
    step_count,
    teacher_dtype,
)
from kd_bench.distill.vision_language import answer_positions, has_images
from kd_bench.errors import KdBenchError, UsageError, closest

GB = 10**9
RESERVED = 0.08  # of a device: driver, kernels and what the allocator cannot place
UTILISATION = 0.4  # of the peak, as large models train at
TYPICAL = 3  # micro-batches by which a plan counts operations
SAMPLED = 64  # conversations that a plan encodes at least


@dataclass(frozen=True)
class Card:
    """A device.

    Attributes:
        memory: bytes.
        bfloat16, float32: dense operations a second at the peak.
    """

    name: str
    memory: float
    bfloat16: float
    float32: float


CARDS = {
    name: Card(name, memory * GB, low * 1e12, full * 1e12)
    for name, memory, low, full in (
        ("rtx4090", 25.3, 165, 82.6),
        ("a10", 24.2, 125, 31.2),
        ("l40s", 47.7, 362, 91.6),
        ("a100-40", 42.4, 312, 19.5),
        ("a100", 85.1, 312, 19.5),
        ("h100", 85.0, 989, 67),
        ("h200", 150.1, 989, 67),
        ("b200", 191.5, 2250, 80),
    )
}
"""Public cards: memory as the driver reports it, peaks of NVIDIA's data sheets without sparsity."""


def card_of(text: str) -> Card:
    """A card by its name, or `GB:TFLOPS`, as in 24:125.

    Raises:
        UsageError: neither.
    """
    if (known := CARDS.get(text.lower())) is not None:
        return known
    memory, _, peak = text.partition(":")
    with contextlib.suppress(ValueError):
        size, flops = float(memory), float(peak)
        if 0 < size < 1e6 and 0 < flops < 1e6:
            return Card(text, size * GB, flops * 1e12, flops * 1e12)
    raise UsageError(
        f"There is no card {text!r}.{closest(text, list(CARDS))}",
        f"Known: {', '.join(CARDS)}; or write GB:TFLOPS, as in 24:125.",
    )


def this_device() -> int | None:
    """Bytes of memory of this process's accelerator; None on a CPU."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


# A stage


@dataclass
class StagePlan:
    """What a stage needs.

    Attributes:
        steps: optimizer steps.
        devices, micro_batch, gradient_accumulation: how a batch is shared.
        tokens: padded length of the longest micro-batch that was met.
        checkpointing: whether activations are computed again, of student and teacher.
        parameters: weights by part, in all and learning, of the student; the teacher's.
        memory: bytes of one device by part.
        flops: operations of a step by pass, over all devices.
        memory_limit: bytes that a device may give; None where it is not known.
        hours: at the card's peak times the utilisation; None where no card is known.
        hint: what to change where it does not fit; empty where it does.
    """

    stage: str
    method: str
    steps: int
    devices: int
    micro_batch: int
    gradient_accumulation: int
    tokens: int
    checkpointing: dict[str, bool]
    parameters: dict[str, int]
    memory: dict[str, int]
    flops: dict[str, float] = field(default_factory=dict)
    memory_limit: int | None = None
    hours: float | None = None
    hint: str = ""

    @property
    def needed(self) -> int:
        """Bytes of one device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a device has the memory, or none is known."""
        return self.memory_limit is None or self.needed <= self.memory_limit

    def refusal(self) -> UsageError:
        """Why the stage cannot be trained on its device."""
        return UsageError(
            f"Stage {self.stage!r} needs about {self.needed / GB:.1f} GB of a device's memory, and "
            f"{(self.memory_limit or 0) / GB:.1f} GB can be used.",
            f"{self.hint} `kd-bench train RECIPE --plan` shows the parts; device_memory=0 trains "
            "all the same.",
        )


@dataclass(frozen=True)
class Sharding:
    """How many devices share a batch, and over how many weights are spread.

    Attributes:
        teacher_bytes: of a quantized teacher's weights, which their shapes do not tell.
    """

    devices: int = 1
    student: int = 1
    teacher: int = 1
    teacher_bytes: int | None = None


Maker = Callable[[bool, bool], Distiller]
"""Makes the stage's distiller of shapes, with activations of student and teacher recomputed."""


def choices(stage: Stage) -> list[tuple[bool, bool]]:
    """Whether student and teacher recompute their activations: what the stage allows, cheap first.

    The teacher keeps activations only for the visual switch's gradient.
    """
    ours, theirs = stage.gradient_checkpointing, stage.teacher_gradient_checkpointing
    if not needs_switch(stage.objective):
        theirs = False
    elif theirs is None and ours is not None:
        theirs = ours
    students = [False, True] if ours is None else [ours]
    return [(s, t) for t in ([False, True] if theirs is None else [theirs]) for s in students]


def plan_memory(
    stage: Stage,
    make: Maker,
    batch: Mapping[str, Any],
    *,
    steps: int,
    sharding: Sharding,
    limit: int | None,
) -> StagePlan:
    """The first of the stage's choices that fits a device, else the one that needs least.

    Args:
        batch: the longest micro-batch.
        limit: bytes of memory of a device; None where it is not known.
    """
    usable = None if limit is None else int(limit * (1 - RESERVED))
    plans = []
    for ours, theirs in choices(stage):
        distiller = make(ours, theirs)
        plan = StagePlan(
            stage=stage.name,
            method=stage.method_name,
            steps=steps,
            devices=sharding.devices,
            micro_batch=len(batch["input_ids"]),
            gradient_accumulation=stage.gradient_accumulation,
            tokens=batch["input_ids"].shape[1],
            checkpointing={"student": ours, "teacher": theirs},
            parameters=_parameters(distiller),
            memory=_memory(stage, distiller, batch, sharding),
            memory_limit=usable,
        )
        plans.append(plan)
        if plan.fits:
            return plan
    best = min(plans, key=lambda plan: plan.needed)
    return replace(best, hint=_hint(stage, best, sharding))


def _parameters(distiller: Distiller) -> dict[str, int]:
    found = models.parameter_counts(distiller.student)
    if distiller.teacher is not None:
        found["teacher"] = models.parameter_counts(distiller.teacher.model)["total"]
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(each): each.nbytes for each in tensors}.values())


def _memory(
    stage: Stage, distiller: Distiller, batch: Mapping[str, Any], sharding: Sharding
) -> dict[str, int]:
    counted = count(distiller, batch, mixed=stage.mixed)
    learning = _bytes(p for p in distiller.parameters() if p.requires_grad)
    kept = {"student": counted.kept}
    if needs_switch(distiller.terms):
        kept["student"] = count(_without_switch(distiller), batch, mixed=stage.mixed).kept
        kept["switch"] = counted.kept - kept["student"]
    answers = int(answer_positions(batch["labels"]).sum())
    logits = objective_bytes(distiller, answers, mixed=stage.mixed)
    found = {"student's weights": _bytes(distiller.parameters()) // sharding.student}
    if distiller.teacher is not None:
        layers = _bytes(p for each in distiller.teacher.layers for p in each.parameters())
        rest = _bytes(distiller.teacher.model.parameters()) - layers
        found["teacher's weights"] = sharding.teacher_bytes or rest + layers // sharding.teacher
    found["gradients"] = learning // sharding.student
    if sharding.devices > 1 and sharding.student == 1:
        found["gradients on their way between devices"] = learning
    found["optimizer states"] = 2 * learning // sharding.student
    found |= {f"activations kept of the {name} pass": size for name, size in kept.items()}
    found["logits and objective, or what else comes and goes"] = max(logits, counted.passing)
    return found


def _without_switch(distiller: Distiller) -> Distiller:
    """The same models without the switch pass."""
    terms = tuple(term for term in distiller.terms if term.of != "switch")
    return _alike(distiller, terms)


def _alike(distiller: Distiller, terms: Sequence[Term]) -> Distiller:
    teacher = distiller.teacher.model if distiller.teacher else None
    training = {each: each.training for each in teacher.modules()} if teacher else {}
    made = Distiller(
        distiller.student,
        teacher,
        terms,
        vocabulary=distiller.vocabulary,
        head_chunk=distiller.head_chunk,
    )
    for module, mode in training.items():  # a teacher that is put to use is put into eval mode
        module.training = mode
    return made


def _hint(stage: Stage, plan: StagePlan, sharding: Sharding) -> str:
    """What to change first, and with which value, where a stage does not fit."""
    kept = sum(size for part, size in plan.memory.items() if part.startswith("activations"))
    fixed, limit = plan.needed - kept, plan.memory_limit or 0
    recomputes = plan.checkpointing["student"], plan.checkpointing["teacher"]
    if recomputes != (True, needs_switch(stage.objective)):
        return "Set gradient_checkpointing=true, and leave teacher_gradient_checkpointing out."
    for micro_batches in range(2, plan.micro_batch + 1):
        if plan.micro_batch % micro_batches == 0 and fixed + kept / micro_batches <= limit:
            return f"Set gradient_accumulation={stage.gradient_accumulation * micro_batches}."
    if sharding.devices > 1 and sharding.teacher == 1 and "teacher" in plan.parameters:
        return "Set teacher_sharding=fsdp2."
    if sharding.devices > 1 and sharding.student == 1:
        return "Launch it with `accelerate launch --use_fsdp --fsdp_version 2`."
    if stage.lora is None and "language_model" in stage.trainable:
        return "Train adapters (lora={r: 64}), spread it over devices, or lower max_length."
    return "Spread it over more devices, lower max_length, or take smaller models."


def plan_time(
    plan: StagePlan,
    stage: Stage,
    make: Maker,
    batches: Sequence[Mapping[str, Any]],
    *,
    card: Card | None,
    utilisation: float = UTILISATION,
) -> StagePlan:
    """The plan with the operations of a step by pass, and its hours.

    Args:
        batches: typical micro-batches, one in the middle by length.
        card: None where it is not known.
        utilisation: share of its peak that is reached; what is computed again counts as work.
    """
    mixed = stage.mixed
    distiller = make(*plan.checkpointing.values())
    every = [count(distiller, batch, mixed=mixed).flops for batch in batches]
    middle = batches[len(batches) // 2]
    whole = every[len(batches) // 2]
    taught = alone = whole
    if needs_switch(distiller.terms):
        taught = count(_without_switch(distiller), middle, mixed=mixed).flops
    if distiller.teacher is not None:
        alone = count(_alike(distiller, [Term(loss="ce")]), middle, mixed=mixed).flops
    parts = {"student": alone}
    if distiller.teacher is not None:
        parts["teacher"] = taught - alone
    if needs_switch(distiller.terms):
        parts["switch"] = whole - taught
    a_step = sum(every) / len(every) * plan.gradient_accumulation * plan.devices
    flops = {name: a_step * part / max(whole, 1) for name, part in parts.items()}
    hours = None
    if card is not None:
        peak = card.bfloat16 if mixed else card.float32
        hours = a_step * plan.steps / (peak * utilisation * plan.devices) / 3600
    return replace(plan, flops=flops, hours=hours)


# A recipe


def plan_training(
    recipe: Recipe,
    *,
    card: Card | None = None,
    devices: int = 1,
    utilisation: float = UTILISATION,
) -> list[StagePlan]:
    """What each stage needs, before anything but configs, tokenizers and data is loaded.

    Args:
        card: on which it shall run; its memory gives way to the recipe's `device_memory`.
        devices: how many of them.
        utilisation: share of the card's peak that is reached.

    Raises:
        UsageError: recipe, configs or data do not fit.
    """
    models.quiet()
    shared = Resources(recipe)
    shared.check_settings(recipe.stages, devices)
    needs = _needs(shared, recipe.stages, _memory_limit(recipe, card), devices)
    return [
        plan_time(plan, stage, make, typical, card=card, utilisation=utilisation)
        for stage, (plan, make, typical) in zip(recipe.stages, needs, strict=True)
    ]


def choose_checkpointing(
    shared: Resources, stages: list[Stage], say: Callable[[str], None]
) -> dict[str, tuple[bool, bool]]:
    """Of each stage, whether student and teacher recompute their activations, so that it fits.

    Args:
        shared: the training's; nothing of it is changed.

    Raises:
        UsageError: a stage needs more than the device has.
    """
    chosen = {stage.name: choices(stage)[0] for stage in stages}
    limit = _memory_limit(shared.recipe)
    if limit is None:
        return chosen
    own = Resources(shared.recipe, read=shared.read)  # whose models have no values
    try:
        plans = [plan for plan, _, _ in _needs(own, stages, limit, processes.world_size())]
    except KdBenchError:
        raise
    except Exception as error:  # an architecture of its own, say: no reason not to train it
        say(f"The memory that it needs is not known ({type(error).__name__}).")
        return chosen
    for plan in plans:
        if not plan.fits:
            raise plan.refusal()
        chosen[plan.stage] = (plan.checkpointing["student"], plan.checkpointing["teacher"])
        recomputed = [name for name, on in plan.checkpointing.items() if on]
        again = f"; activations of {' and '.join(recomputed)} computed again" if recomputed else ""
        say(
            f"{plan.stage}: about {plan.needed / GB:.1f} of {(plan.memory_limit or 0) / GB:.1f} GB"
            f" a device{again}"
        )
    return chosen


def _memory_limit(recipe: Recipe, card: Card | None = None) -> int | None:
    """Bytes of a device that a training must fit into; None where nothing says."""
    if recipe.device_memory is not None:
        return int(recipe.device_memory * GB) or None
    return this_device() if card is None else int(card.memory)


def _needs(
    shared: Resources, stages: list[Stage], limit: int | None, devices: int
) -> Iterator[tuple[StagePlan, Maker, list[dict[str, Any]]]]:
    """Of each stage its memory, a maker of its distiller as shapes, and typical micro-batches."""
    recipe, shapes = shared.recipe, Shapes()
    new_student, shared.processor = student_of(recipe, shapes)
    student = new_student()
    use_template(shared.processor, recipe.prompt_template, recipe.chat_template_kwargs)
    new_teacher, quantized = None, None
    if recipe.teacher is not None and any(needs_teacher(each.objective) for each in stages):
        described, folder = config_of(recipe.teacher, **recipe.allowed)
        new_teacher = partial(shapes.model, described, teacher_dtype(recipe))
        trusted = recipe.trust_remote_code
        shared.teacher_processor = models.load_processor(folder, trust_remote_code=trusted)
        if checkpoints.quantization_of(checkpoints.read_config(folder)):
            quantized = sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None
    sharding = Sharding(
        devices=devices,
        student=devices if processes.shards_student() else 1,
        teacher=devices if recipe.teacher_sharding else 1,
        teacher_bytes=quantized,
    )
    for stage in stages:
        taught_by = new_teacher if needs_teacher(stage.objective) else None
        shared.teacher = taught_by() if taught_by else None
        vocabulary = shared.check_models(stage, student)
        dataset, size = shared.dataset(stage, student), micro_batch(stage, devices)
        longest, typical = _met(dataset, size, stage, shared.collator(dataset, student))
        make = _maker(shapes, stage, new_student, taught_by, vocabulary, longest)
        steps = step_count(stage, dataset.conversations.epoch_size)
        plan = plan_memory(stage, make, longest, steps=steps, sharding=sharding, limit=limit)
        yield plan, make, typical


def _maker(
    shapes: Shapes,
    stage: Stage,
    new_student: Callable[[], Any],
    new_teacher: Callable[[], Any] | None,
    vocabulary: int | None,
    batch: Mapping[str, Any],
) -> Maker:
    def make(ours: bool, theirs: bool) -> Distiller:
        student, teacher = new_student(), new_teacher() if new_teacher else None
        with torch.random.fork_rng(devices=[]):
            distiller = build_distiller(
                stage, student, teacher, checkpointing=(ours, theirs), vocabulary=vocabulary
            )
        shapes.empty(distiller)
        if has_images(batch):
            distiller.freeze_unreached(batch)
        return distiller.train()

    return make


def _met(
    dataset: ConversationDataset, size: int, stage: Stage, collator: Collator
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The longest micro-batch of the data; and typical ones, sorted by length.

    Of large data a sample is read, and of all rows those with the most characters.
    """
    rows = len(dataset)
    spread = torch.linspace(0, rows - 1, min(rows, max(TYPICAL * size, SAMPLED))).long().tolist()
    if isinstance(dataset.conversations, Stream):  # only read forward
        spread, top = list(range(len(spread))), []
    else:
        characters, images = dataset.lengths(), dataset.conversations.images
        alike = size if stage.group_by_length else 1  # others meet the longest one at a time
        top = sorted(range(rows), key=lambda i: (images[i] > 0, characters[i]))[-alike:]
    samples = {
        index: sample
        for index in dict.fromkeys([*top, *spread])
        if isinstance(sample := dataset[index], dict)
    }
    if not samples:
        raise nothing_usable(stage, [])
    drawn = [samples[index] for index in spread if index in samples] or list(samples.values())
    drawn = drawn * -(-size // len(drawn))
    if stage.group_by_length:
        drawn.sort(key=_length)
    groups = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]
    groups.sort(key=lambda group: max(map(_length, group)))
    chosen = [groups[int((part + 0.5) * len(groups) / TYPICAL)] for part in range(TYPICAL)]
    first = sorted(samples.values(), key=_length)[-1]
    others = [samples[index] for index in top if index in samples and samples[index] is not first]
    longest = [first, *others, *reversed(groups[-1])][:size]
    return collator(longest), [collator(group) for group in chosen[: len(groups)]]


def _length(sample: Mapping[str, Any]) -> int:
    return len(sample["input_ids"])
