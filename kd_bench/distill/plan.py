"""What a training will need, counted before a model is loaded: `kd-bench train RECIPE --plan`.

Models are built as shapes without values, and the longest micro-batch of the real data goes through
the very `Distiller` that will train, forward and backward, while operations, the bytes that are
kept for the backward pass and the bytes alive are counted. So a plan follows the code: adapters,
frozen parts, checkpointing, tied weights and mixed precision count as what they do.

What depends on values (the objective's chunk of logits) is measured on a few random rows.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kd_bench.distill import checkpoints, models, objective
from kd_bench.distill.distiller import Distiller, Passes, default_chunk
from kd_bench.distill.recipe import NEW, Recipe, Stage, StudentParts, Term, needs_switch
from kd_bench.distill.vision_language import answer_positions
from kd_bench.errors import UsageError, closest

GB = 10**9
RESERVED = 0.08  # of a device: driver, kernels and what the allocator cannot place
UTILISATION = 0.4  # of the peak, as large models train at
ROWS = (2, 4)  # of logits, on which the objective is measured


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


# Models as shapes


@dataclass
class Shapes:
    """Makes models whose tensors have shapes and types, but no values."""

    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Inside, tensors get no values."""
        from transformers.initialization import no_init_weights

        with torch.random.fork_rng(devices=[]), self.mode, no_init_weights():
            yield

    def model(self, config: Any, dtype: torch.dtype = torch.float32) -> Any:
        """A vision-language model of a config."""
        from transformers import AutoModelForImageTextToText

        with self.making():
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
            model.tie_weights()  # which is part of giving values
        return model

    def empty(self, model: nn.Module) -> None:
        """Take the values from the weights of a model that have some, such as new adapters."""
        for module in model.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None and not isinstance(weight, FakeTensor):
                    fake = self.mode.from_tensor(weight.detach())
                    module._parameters[name] = nn.Parameter(fake, weight.requires_grad)


def config_of(path: str | Path, **allowed: Any) -> tuple[Any, Path]:
    """A checkpoint's config and the folder of its processor; no weights are fetched."""
    from transformers import AutoConfig

    folder = checkpoints.locate(path, weights=False, **allowed)
    whole = checkpoints.base_of(folder) or folder
    trusted = bool(allowed.get("trust_remote_code"))
    return AutoConfig.from_pretrained(str(whole), trust_remote_code=trusted), folder


def student_of(recipe: Recipe, shapes: Shapes) -> tuple[Callable[[], Any], Any]:
    """What makes the student that a recipe starts from, as shapes; and its processor."""
    from kd_bench.distill import build

    student = recipe.student
    if isinstance(student, StudentParts):
        config, processor = build.describe_student(student)
    elif student.startswith(NEW):
        processor = build.build_processor()
        with shapes.making():
            config = build.build_model(build.size_of(student), processor, 0).config
    else:
        config, folder = config_of(student, **recipe.allowed)
        trusted = recipe.trust_remote_code
        processor = models.load_processor(folder, trust_remote_code=trusted)
    return partial(shapes.model, config), processor


# Counting


_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


class Counting(TorchDispatchMode):
    """Bytes of all storages that operations made and that are alive; operations of products.

    Also lets masks with values select from tensors without. `FlopCounterMode` counts operations by
    the same registry, but its hooks hold on to what checkpointing would let go.

    Args:
        known: tensors that were there before.

    Attributes:
        now, peak: bytes.
        flops: of matrix products, convolutions and attention.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _INDEXED and any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args)):
            args = (args[0], [index for each in args[1] for index in _places(each)], *args[2:])
        output = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: Any) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _places(index: Any) -> tuple[Any, ...]:
    """An index as operations without values take it: places instead of a mask."""
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return index.nonzero(as_tuple=True)
    return (index,)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for a backward pass, weights excluded; a storage counts once."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        weights = (tensor for module in modules for tensor in module.parameters())
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._kept: dict[int, Any] = {}

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._kept[storage._cdata] = storage
        return tensor

    def total(self) -> int:
        """Bytes so far; storages are let go."""
        kept, self._kept = self._kept, {}
        return sum(storage.nbytes() for storage in kept.values())


@dataclass(frozen=True)
class Counts:
    """One micro-batch through the models and the terms on images, without those on logits.

    Attributes:
        kept: bytes kept for the backward pass.
        passing: bytes alive beyond those at the fullest moment, gradients excluded.
        flops: operations of matrix products and attention, those computed again included.
    """

    kept: int
    passing: int
    flops: int


def count(distiller: Distiller, batch: Mapping[str, Any], *, mixed: bool) -> Counts:
    """Count one forward and backward pass of every model that the terms need.

    Args:
        batch: of the collator, with values: some models look for empty tiles.
        mixed: under autocast to bfloat16.
    """
    owned = [distiller, *([distiller.teacher.model] if distiller.teacher else [])]
    learning = [p for p in distiller.parameters() if p.requires_grad]
    for parameter in learning:  # as they are from the second micro-batch on
        parameter.grad = torch.empty_like(parameter)
    there = [tensor for each in owned for tensor in (*each.parameters(), *each.buffers())]
    there += [parameter.grad for parameter in learning if parameter.grad is not None]
    counting, saved = Counting(there), SavedBytes(*owned)
    try:
        with counting:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed), saved:
                passes = distiller.run(batch)
                items = objective.count_items(batch, distiller.parts.image_token_id)
                of_images = [
                    distiller.image_value(term, passes, batch, items)
                    for term in distiller.image_terms
                    if passes.embeddings
                ]
            kept = saved.total()
            ends = [each for each in (*passes.hidden.values(), *of_images) if each.requires_grad]
            if ends:
                torch.autograd.backward(ends, [torch.ones_like(each) for each in ends])
    finally:
        for parameter in learning:
            parameter.grad = None
    return Counts(kept, max(counting.peak - kept, 0), counting.flops + _heads(distiller, passes))


def _heads(distiller: Distiller, passes: Passes) -> int:
    """Operations of the LM heads, forward and backward, of what the token terms look at."""
    student = distiller.student.get_output_embeddings().weight  # type: ignore[operator]
    total = 0
    for name, hidden in passes.hidden.items():
        vocabulary = distiller.parts.vocab_size
        if name != "student" and distiller.teacher is not None:
            vocabulary = distiller.teacher.vocab_size
        times = 1 + hidden.requires_grad + (name == "student" and student.requires_grad)
        total += 2 * hidden.numel() * vocabulary * times
    return total


def objective_bytes(distiller: Distiller, answers: int, *, mixed: bool) -> int:
    """Bytes that the token terms need at most, beside the states that they are given.

    Measured on a few random positions of the whole vocabulary and carried on to a chunk.

    Args:
        answers: positions of a micro-batch.
    """
    ours = distiller.parts.vocab_size
    theirs = distiller.teacher.vocab_size if distiller.teacher else ours
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, 8, generator=generator) for size in (ours, theirs))
    heads = objective.Heads(
        lambda hidden: nn.functional.linear(hidden, left),
        lambda hidden: nn.functional.linear(hidden, right),
        vocabulary=distiller.vocabulary,
    )
    names = {"student"} | ({"teacher"} if distiller.teacher else set())
    names |= {"switch"} if needs_switch(distiller.terms) else set()
    few, more = (_peak_of_terms(distiller, heads, names, rows, mixed) for rows in ROWS)
    a_row = (more - few) / (ROWS[1] - ROWS[0])
    rows = min(distiller.head_chunk or default_chunk(ours), answers)  # more only where it is free
    head = distiller.student.get_output_embeddings().weight  # type: ignore[operator]
    # The sum of its gradients over chunks, and one chunk's.
    own = 2 * head.numel() * head.element_size() if head.requires_grad else 0
    return int(few + a_row * max(rows - ROWS[0], 0)) + own


def _peak_of_terms(
    distiller: Distiller, heads: objective.Heads, names: set[str], rows: int, mixed: bool
) -> int:
    generator = torch.Generator().manual_seed(0)
    hidden = {name: torch.randn(rows, 8, generator=generator) for name in sorted(names)}
    for name in names - {"teacher"}:
        hidden[name].requires_grad_()
    targets = torch.arange(rows)
    with Counting() as counting, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        objective.token_terms(distiller.token_terms, heads, hidden, targets, rows, chunk=rows)
    return counting.peak


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
    mixed = stage.precision == "bfloat16"
    counted = count(distiller, batch, mixed=mixed)
    learning = _bytes(p for p in distiller.parameters() if p.requires_grad)
    kept = {"student": counted.kept}
    if needs_switch(distiller.terms):
        kept["student"] = count(_without_switch(distiller), batch, mixed=mixed).kept
        kept["switch"] = counted.kept - kept["student"]
    answers = int(answer_positions(batch["labels"]).sum())
    logits = objective_bytes(distiller, answers, mixed=mixed)
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
    for pieces in range(2, plan.micro_batch + 1):
        if plan.micro_batch % pieces == 0 and fixed + kept / pieces <= limit:
            return f"Set gradient_accumulation={stage.gradient_accumulation * pieces}."
    if sharding.devices > 1 and sharding.teacher == 1 and "teacher" in plan.parameters:
        return "Set teacher_sharding=fsdp2."
    if sharding.devices > 1 and sharding.student == 1:
        return "Launch it with `accelerate launch --use_fsdp --fsdp_version 2`."
    if stage.lora is None and "language_model" in stage.trainable:
        return "Train adapters (lora={r: 64}), spread it over devices, or lower max_length."
    return "Spread it over more devices, lower max_length, or take smaller models."


def plan_time(
    plan: StagePlan,
    make: Maker,
    batches: Sequence[Mapping[str, Any]],
    *,
    mixed: bool,
    peak: float | None,
    utilisation: float = UTILISATION,
) -> StagePlan:
    """The plan with the operations of a step by pass, and its hours.

    Args:
        batches: typical micro-batches, one in the middle by length.
        peak: operations a second of one device; None where it is not known.
        utilisation: share of them that is reached; what is computed again counts as work.
    """
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
    if peak is not None:
        hours = a_step * plan.steps / (peak * utilisation * plan.devices) / 3600
    return replace(plan, flops=flops, hours=hours)
