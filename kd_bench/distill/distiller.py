"""One training step's forward pass: run the models that the terms need, once each.

The student's vision tower runs once for the student and the switch; the teacher runs without
gradient, the switch with gradients to the student's vision tower only.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kd_bench.distill import losses, objective
from kd_bench.distill.recipe import (
    VOCABULARY_LOSSES,
    Term,
    needs_student_logits,
    needs_switch,
    needs_teacher,
)
from kd_bench.distill.teacher_states import TeacherCache, TeacherStates
from kd_bench.distill.vision_language import (
    Inputs,
    Places,
    VisionLanguageModel,
    answer_positions,
    has_images,
    is_plain,
    keeping_vision,
    places_of,
    queries_and_keys,
    seeing_with,
    teacher_inputs,
)
from kd_bench.errors import TrainingError, UsageError

LOGITS_AT_ONCE = 2**24
BYTES_A_LOGIT = 32
"""Of all models' logits, their float32 copies and gradients together, an answer position."""
HOST_READS = ("cpu", "mps")
"""Devices whose values the host reads for nothing, or that cannot sort in double precision."""


@dataclass
class Passes:
    """What the models gave for one batch.

    Attributes:
        hidden: last hidden states at the answers [N, width], of `student`, `teacher`, `switch`.
        at_images: the same at image positions [M, width], of student and teacher.
        embeddings: projected image tokens [M, width], of student and teacher.
        attention: first-layer weights averaged over heads, of text rows and image columns [batch,
            text, images], of student and teacher.
    """

    hidden: dict[str, Tensor] = field(default_factory=dict)
    at_images: dict[str, Tensor] = field(default_factory=dict)
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)


class Distiller(nn.Module):
    """The student with an objective; what the Trainer trains.

    The teacher is deliberately no submodule: it is neither saved, nor synchronised over devices,
    nor switched into training mode.

    Args:
        terms: the objective.
        vocabulary: size that both LM heads are cut to; None is all of them.
        head_chunk: answer positions that pass through heads and losses at a time; None is
            `default_chunk`.
        cache: the teacher's hidden states of earlier passes over the same samples.
    """

    accepts_loss_kwargs = True  # the Trainer shall count the answers of the whole batch

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        terms: Sequence[Term],
        *,
        vocabulary: int | None = None,
        head_chunk: int | None = None,
        cache: "TeacherCache | None" = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.terms = tuple(term for term in terms if term.weight)
        self.token_terms = tuple(
            term for term in self.terms if term.loss == "ce" or term.loss in VOCABULARY_LOSSES
        )
        self.image_terms = tuple(term for term in self.terms if term not in self.token_terms)
        self._watches_attention = any(term.loss == "attention_mse" for term in self.terms)
        self.vocabulary = vocabulary
        self.parts = VisionLanguageModel(student)
        # FSDP splits by these layers; not by the vision tower's, which a device without an image
        # does not run, so that the others would wait for it for ever.
        self._no_split_modules = self.parts.language_model._no_split_modules
        self.head_chunk = head_chunk
        self.limits = losses.Limits()
        self.teacher: VisionLanguageModel | None = None
        self.adapter: nn.Module | None = None  # for `image_mse` between unequal widths
        if teacher is not None and needs_teacher(self.terms):
            self.teacher = VisionLanguageModel(teacher.requires_grad_(False).eval())
            ours, theirs = self.parts.hidden_size, self.teacher.hidden_size
            if ours != theirs and any(term.loss == "image_mse" for term in self.terms):
                self.adapter = nn.Linear(theirs, ours, bias=False)
        self.cache = cache
        self.teacher_states: TeacherStates | None = None  # instead of all of its own passes
        if cache is not None and self.image_terms:
            raise UsageError(
                "teacher_cache keeps the teacher's states at answers only, but the term "
                f"{self.image_terms[0].label!r} looks at images.",
                "Take teacher_cache out.",
            )

    def forward(
        self,
        batch: Inputs,
        items: Mapping[str, Tensor] | Tensor | float,
        knee_log: objective.KneeLog | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch, and every term's unweighted share of its mean.

        Args:
            batch: what `Collator` makes.
            items: `count_items` of the whole batch, over all micro-batches and devices, by which
                sums are divided; a number is that of answers, where this batch is the whole one.
        """
        if not isinstance(items, Mapping):
            answered = torch.as_tensor(items)
            items = objective.count_items(batch, self.parts.image_token_id) | {"answers": answered}
        places = places_of(batch, self.parts.image_token_id)
        targets = batch["labels"].flatten().index_select(0, places.answers + 1)  # [N]
        batch = {**batch, "places": places}
        passes = self.run(batch)
        if self.head_chunk is None:
            self.head_chunk = default_chunk(self.parts.vocab_size, free_memory(targets.device))
        # A text-only batch has no image to switch: z_SW is z_T and the term is exactly zero.
        terms = [t for t in self.token_terms if t.of != "switch" or "switch" in passes.hidden]
        loss, values = objective.token_terms(
            terms,
            self._heads(),
            passes.hidden,
            targets,
            items["answers"],
            chunk=self.head_chunk,
            knee_log=knee_log,
            limits=None if targets.device.type in HOST_READS else self.limits,
        )
        if passes.embeddings:
            for term in self.image_terms:
                value = self.image_value(term, passes, batch, items)
                loss = loss + term.weight * value
                values[term.label] = value.detach()
        return loss, values

    def _heads(self) -> objective.Heads:
        head: Any = self.student.get_output_embeddings()  # type: ignore[operator]
        return objective.Heads(
            student=self.parts.lm_head,
            teacher=self.teacher.lm_head if self.teacher else None,
            parameters=tuple(head.parameters()),
            vocabulary=self.vocabulary,
        )

    def image_value(
        self,
        term: Term,
        passes: Passes,
        batch: Inputs,
        items: Mapping[str, Tensor],
    ) -> Tensor:
        """One image term's share of its mean over the whole batch."""
        places = places_of(batch, self.parts.image_token_id)
        sides = ("teacher", "student")
        if term.loss == "image_kl":
            return objective.image_kl(
                self._heads(),
                passes.at_images,
                items["image_tokens"],
                temperature=term.temperature,
                chunk=self.head_chunk or default_chunk(self.parts.vocab_size),
            )
        if term.loss == "image_correlation":
            theirs, ours = (passes.at_images[side] for side in sides)
            is_image = batch["input_ids"] == self.parts.image_token_id  # [batch, length]
            shape = [len(is_image), places.sizes[0]]
            in_sample = (is_image.cumsum(1) - 1).flatten().index_select(0, places.images)
            slots = places.images // is_image.shape[1] * shape[1] + in_sample  # [M]
            value = objective.image_correlation(theirs, ours, slots, shape)
            return value / items["image_samples"]
        if term.loss == "image_mse":
            theirs, ours = (passes.embeddings[side] for side in sides)
            return objective.image_mse(theirs, ours, self.adapter) / items["image_tokens"]
        theirs, ours = (passes.attention[side] for side in sides)
        text, images = text_and_images(batch, places, self.parts.image_token_id)
        pairs = (images.unsqueeze(1) < text.unsqueeze(2)) & (text.unsqueeze(2) < LAST)
        return objective.attention_mse(theirs, ours, pairs) / items["image_pairs"]

    # Forward passes

    def run(self, batch: Inputs) -> Passes:
        """Every forward pass that a term needs, once."""
        passes = Passes()
        with_images = has_images(batch)
        switches = needs_switch(self.terms) and with_images
        kept: list[Any] | None = None
        if needs_student_logits(self.terms) or not with_images:
            keeping = keeping_vision(self.parts) if switches else contextlib.nullcontext()
            with keeping as kept:
                self._forward("student", self.parts, batch, passes)
        if not with_images:
            states = passes.hidden["student"]
            passes.hidden["student"] = states + self._zero_of_images(states.device)
        if self.teacher is None:
            return passes
        with torch.no_grad():
            self._teach(self.teacher, batch, passes)
        if switches:
            with seeing_with(self.teacher, self.parts, kept):
                passes.hidden["switch"] = self.teacher.answer_states(batch)
        elif needs_switch(self.terms) and hasattr(self.teacher.layers[0], "unshard"):  # FSDP2's
            states = passes.hidden["student"]
            passes.hidden["student"] = states + self._zero_of_switch(self.teacher, batch)
        return passes

    def _zero_of_switch(self, teacher: VisionLanguageModel, batch: Inputs) -> Tensor:
        """Zero, behind a pass through the teacher's layers that a backward pass goes through, too.

        Where devices share the teacher's layers, one whose part of a batch has no image must run
        them as often as the others do.
        """

        def begin(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            embeddings = named["inputs_embeds"]
            zero = self._zero_of_images(embeddings.device).to(embeddings.dtype)
            return given, {**named, "inputs_embeds": embeddings + zero}

        hook = teacher.language_model.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            return teacher.answer_states(batch).flatten()[:0].sum().float()
        finally:
            hook.remove()

    def _teach(self, teacher: VisionLanguageModel, batch: Inputs, passes: Passes) -> None:
        """The teacher's own forward, from the cache where it holds the whole batch.

        Its own batch may be longer; the answers are the same tokens in the same order.
        """
        if self.teacher_states is not None:
            found = self.teacher_states.of(batch["sample_index"], batch["places"])
            passes.hidden["teacher"] = found
            return
        inputs = teacher_inputs(batch)
        if self.cache is None:
            self._forward("teacher", teacher, inputs, passes)
            return
        samples, answers = batch["sample_index"], answer_positions(batch["labels"]).sum(1)
        samples, counts = torch.stack([samples, answers]).tolist()
        known = self.cache.get(samples, counts)
        if known is not None:
            passes.hidden["teacher"] = known.to(answers.device)
            return
        self._forward("teacher", teacher, inputs, passes)
        self.cache.put(samples, counts, passes.hidden["teacher"])

    def _forward(
        self, name: str, model: VisionLanguageModel, batch: Inputs, passes: Passes
    ) -> None:
        """Run one model and keep what the terms look at."""
        if not self.image_terms or not has_images(batch):
            passes.hidden[name] = model.answer_states(batch)
            return
        places = places_of(batch, model.image_token_id)
        with FirstLayerProbe(model, self._watches_attention) as probe:
            states = model.plain_states(batch).flatten(0, 1)
        passes.hidden[name] = states.index_select(0, places.answers)
        passes.at_images[name] = states.index_select(0, places.images)
        embeddings = probe.embeddings.flatten(0, 1)
        passes.embeddings[name] = embeddings.index_select(0, places.images)
        if self._watches_attention:
            text, images = text_and_images(batch, places, model.image_token_id)
            passes.attention[name] = probe.averaged(batch["attention_mask"], text, images)

    # Weights that only images reach

    def _of_images(self) -> list[nn.Parameter]:
        """Learning weights outside the language model and its head."""
        language = {id(p) for p in self.parts.language_model.parameters()}
        language |= {id(p) for p in self._heads().parameters}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in language]

    def freeze_unreached(self, batch: Mapping[str, Tensor]) -> None:
        """Freeze what no gradient can reach, such as a tower's layers above the one that is read.

        Args:
            batch: one with an image.
        """
        reached = _leaves(self.parts.image_embeddings(batch))
        if self.adapter is not None:
            reached |= {id(p) for p in self.adapter.parameters()}
        for parameter in self._of_images():
            if id(parameter) not in reached:
                parameter.requires_grad_(False)

    def _zero_of_images(self, device: torch.device) -> Tensor:
        """Zero, in whose graph all weights of images are.

        Devices exchange gradients weight by weight, so one whose part of a batch has no image
        must give zeros too, and one device alone must give its optimizer the same zeros.
        """
        nothing = [p.flatten()[:0] for p in self._of_images()]
        return torch.cat([torch.zeros(0, device=device), *nothing]).sum()

    # What must hold before the first step

    def step_zero(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Check what must be zero before the first step, where it can be known; the values by name.

        Raises:
            TrainingError: a switch of equal vision weights differs from the teacher, or KL(T || T)
                is not 0.
        """
        if self.teacher is None:
            return {}
        found = {"self_divergence": self_divergence(self.teacher, teacher_inputs(batch))}
        towers = self.parts.vision_tower, self.teacher.vision_tower
        if needs_switch(self.terms) and _equal_weights(*towers):
            found["switch_gap"] = switch_gap(self.parts, self.teacher, batch)
        for name, value in found.items():
            if not value == 0:
                raise TrainingError(
                    f"Before the first step {name} is {value:.3g} and must be 0.",
                    "The teacher does not compute the same twice: look for dropout or remote code.",
                )
        return found


def default_chunk(vocabulary: int, free: int | None = None) -> int:
    """Answer positions whose logits are made at a time.

    Args:
        free: bytes of an accelerator's memory that hold nothing, of which a quarter is taken, in
            powers of two up to 1,024 positions; None keeps 64 MB of float32 logits a model.
    """
    if free is None:
        return max(16, min(512, LOGITS_AT_ONCE // vocabulary))
    fitting = max(free // (4 * BYTES_A_LOGIT * vocabulary), 1)
    return max(16, min(1024, 1 << fitting.bit_length() - 1))


def free_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device that hold nothing; None elsewhere."""
    if device.type != "cuda":
        return None
    reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved - used


def _leaves(outputs: Sequence[Tensor]) -> set[int]:
    """Ids of the weights that a backward pass from `outputs` would reach."""
    nodes = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen, leaves = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        further = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= further
        nodes += further
    return leaves


@torch.no_grad()
def switch_gap(
    student: VisionLanguageModel, teacher: VisionLanguageModel, batch: Mapping[str, Tensor]
) -> float:
    """Largest |z_SW - z_T| over the answers' hidden states of a batch.

    Exactly zero where student and teacher have equal vision weights.
    """
    answers = answer_positions(batch["labels"])
    own = teacher.hidden_states(batch)[answers]
    with seeing_with(teacher, student) if has_images(batch) else contextlib.nullcontext():
        switched = teacher.hidden_states(batch)[answers]
    return float((switched - own).abs().max()) if switched.numel() else 0.0


@torch.no_grad()
def self_divergence(teacher: VisionLanguageModel, batch: Mapping[str, Tensor]) -> float:
    """Largest KL(T || T) over the answers of a batch: zero unless the teacher is not repeatable."""
    answers = answer_positions(batch["labels"])
    first, second = (teacher.lm_head(teacher.hidden_states(batch)[answers][:64]) for _ in range(2))
    return float(losses.kl(first, second).abs().max()) if len(first) else 0.0


def _equal_weights(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(
        tensor.shape == theirs[name].shape
        and tensor.dtype == theirs[name].dtype
        and torch.equal(tensor.to(theirs[name].device), theirs[name])
        for name, tensor in ours.items()
    )


LAST = 1 << 30
"""Stands behind the positions of a sample in tables of them."""


def text_and_images(batch: Inputs, places: Places, image_token_id: int) -> tuple[Tensor, Tensor]:
    """Positions of every sample's text tokens [batch, text] and image tokens [batch, images].

    Rising, and `LAST` behind those of a sample that has fewer than the most.
    """
    image = batch["input_ids"] == image_token_id  # [batch, length]
    positions = torch.arange(image.shape[1], device=image.device)
    text = batch["attention_mask"].bool() & ~image
    tables = (positions.where(chosen, LAST).sort(dim=1).values for chosen in (text, image))
    found, seen = (t[:, :most] for t, most in zip(tables, reversed(places.sizes), strict=True))
    return found, seen


class FirstLayerProbe(contextlib.ExitStack):
    """What enters a language model and its first layer's attention, while it runs inside a `with`.

    The fused kernels that models use do not give attention weights, so that one layer's attention
    is run again in its plain form on the same inputs.

    Attributes:
        embeddings: [batch, length, width], image tokens in their places.
    """

    def __init__(self, model: VisionLanguageModel, watches_attention: bool = True) -> None:
        super().__init__()
        self.embeddings: Any = None
        self.inputs: dict[str, Any] = {}
        self.module: Any = None
        self.layer: Any = None
        language: Any = model.language_model
        watched: list[tuple[Any, Any]] = [(language, self._keep_embeddings)]
        if watches_attention:
            layers = getattr(language, "layers", None)
            if layers is None or not hasattr(layers[0], "self_attn"):
                raise UsageError(
                    f"{type(language).__name__} has no layers[0].self_attn to watch.",
                    "Leave attention_mse out for this model.",
                )
            self.layer = layers[0]
            self.module = layers[0].self_attn
            watched.append((self.module, self._keep_inputs))
        for module, keep in watched:
            self.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)

    def _keep_embeddings(self, _: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        self.embeddings = given["inputs_embeds"]

    def _keep_inputs(self, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if not self.inputs:
            names = ("hidden_states", "position_embeddings")
            self.inputs = {**dict(zip(names, args, strict=False)), **given}

    def averaged(self, attention_mask: Tensor, text: Tensor, images: Tensor) -> Tensor:
        """Mean over heads of the weights of text rows and image columns [batch, text, images].

        One head at a time, computed again in the backward pass: all heads' weights of a batch of
        long samples take gigabytes.

        Args:
            text, images: as `text_and_images` gives them.
        """
        if not is_plain(self.layer):
            whole = self.weights(attention_mask).float().mean(1)
            return _chosen(_chosen(whole, text, 1), images, 2)
        query, key = queries_and_keys(
            self.module, self.inputs["hidden_states"], self.inputs["position_embeddings"]
        )
        query = _chosen(query, text.unsqueeze(1), 2)  # [batch, heads, text, head width]
        positions = torch.arange(key.shape[2], device=key.device)
        blocked = (positions > text.unsqueeze(2)) | ~attention_mask.bool().unsqueeze(1)

        def one(of_head: Tensor, keys: Tensor) -> Tensor:
            scores = (of_head @ keys.transpose(1, 2)) * self.module.scaling
            low = torch.finfo(scores.dtype).min
            shares = scores.masked_fill(blocked, low).softmax(-1, dtype=torch.float32)
            return _chosen(shares.to(scores.dtype).float(), images, 2)

        groups = self.module.num_key_value_groups
        total = torch.zeros((), device=key.device)
        for head in range(query.shape[1]):
            given = (query[:, head], key[:, head // groups])
            total = total + checkpoint(one, *given, use_reentrant=False)
        return total / query.shape[1]

    def weights(self, attention_mask: Tensor) -> Tensor:
        """[batch, heads, length, length] for a right-padded batch's mask [batch, length]."""
        settings = self.module.config
        before = settings._attn_implementation
        settings._attn_implementation = "eager"
        try:
            _, weights = self.module.forward(
                hidden_states=self.inputs["hidden_states"],
                position_embeddings=self.inputs["position_embeddings"],
                attention_mask=self._blocked(attention_mask),
            )
        finally:
            settings._attn_implementation = before
        assert isinstance(weights, Tensor)
        return weights

    def _blocked(self, attention_mask: Tensor) -> Tensor:
        """What is added to attention scores, [batch or 1, 1, length, length].

        The layer's own mask where it was given one (Gemma's prefix sees in both directions), else
        causal.
        """
        hidden, given = self.inputs["hidden_states"], self.inputs.get("attention_mask")
        if isinstance(given, Tensor) and given.dim() == 4:
            if given.is_floating_point():
                return given
            allowed = given.bool()
        else:
            length = hidden.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
            allowed = attention_mask.bool()[:, None, None, :] & causal
        blocked = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        return blocked.masked_fill(~allowed, torch.finfo(hidden.dtype).min)


def _chosen(states: Tensor, positions: Tensor, dim: int) -> Tensor:
    """Entries of `dim` at positions [batch, ..., n]; those at `LAST` are the last one's."""
    places = positions.clamp(max=states.shape[dim] - 1)
    shape = list(states.shape)
    shape[dim] = places.shape[-1]
    view = [len(places)] + [1] * (states.dim() - 1)
    view[dim] = places.shape[-1]
    return states.gather(dim, places.reshape(view).expand(shape))
