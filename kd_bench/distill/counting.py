"""Counting on models without values: weights, operations, bytes of a forward and backward pass.

Models are built as shapes, and a real micro-batch goes through the very `Distiller` that trains,
while operations, the bytes that are kept for the backward pass and the bytes alive are counted. So
a count follows the code: adapters, frozen parts, checkpointing, tied weights and mixed precision
count as what they do.

What depends on values (the objective's chunk of logits) is measured on a few random rows.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kd_bench.distill import build, checkpoints, models, objective
from kd_bench.distill.distiller import Distiller, Passes, default_chunk
from kd_bench.distill.recipe import NEW, Recipe, StudentParts, needs_switch

ROWS = (2, 4)  # of logits, on which the objective is measured


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
