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

from kd_bench.distill.image_terms import (
    FirstLayerProbe,
    attention_mse,
    count_items,
    image_correlation,
    image_mse,
)
from kd_bench.distill.objective import Heads, KneeLog, token_terms
from kd_bench.distill.recipe import (
    VOCABULARY_LOSSES,
    Term,
    needs_student_logits,
    needs_switch,
    needs_teacher,
)
from kd_bench.distill.teacher_cache import TeacherCache
from kd_bench.distill.vision_language import (
    KeptVision,
    VisionLanguageModel,
    answer_positions,
    has_images,
    keeping_vision,
    seeing_with,
    teacher_inputs,
)
from kd_bench.errors import UsageError

LOGITS_AT_ONCE = 2**24


@dataclass
class Passes:
    """What the models gave for one batch.

    Attributes:
        hidden: last hidden states at the answers [N, width], of `student`, `teacher`, `switch`.
        at_images: the same at image positions [M, width], of student and teacher.
        embeddings: projected image tokens [M, width], of student and teacher.
        attention: first-layer weights [batch, heads, length, length], of student and teacher.
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
        vocabulary: rows that both LM heads are cut to; None is all of them.
        head_chunk: answer positions that pass through heads and losses at a time; None keeps
            64 MB of float32 logits a model.
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
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.terms = tuple(term for term in terms if term.weight)
        self.token_terms = tuple(
            term for term in self.terms if term.loss == "ce" or term.loss in VOCABULARY_LOSSES
        )
        self.image_terms = tuple(term for term in self.terms if term not in self.token_terms)
        self.vocabulary = vocabulary
        self.parts = VisionLanguageModel(student)
        # FSDP splits by these layers; not by the vision tower's, which a device without an image
        # does not run, so that the others would wait for it for ever.
        self._no_split_modules = self.parts.language_model._no_split_modules
        self.head_chunk = head_chunk or default_chunk(self.parts.vocab_size)
        teacher = teacher if needs_teacher(self.terms) else None
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        self.teacher = None if teacher is None else VisionLanguageModel(teacher)
        self.adapter = self._width_adapter()
        self.cache = cache
        if cache is not None and self.image_terms:
            raise UsageError(
                "teacher_cache keeps the teacher's states at answers only, but the term "
                f"{self.image_terms[0].label!r} looks at images.",
                "Take teacher_cache out.",
            )

    def _has(self, *names: str) -> bool:
        return any(term.loss in names for term in self.terms)

    def _width_adapter(self) -> nn.Module | None:
        """For `image_mse` between language models of different widths."""
        if self.teacher is None or not self._has("image_mse"):
            return None
        ours, theirs = self.parts.hidden_size, self.teacher.hidden_size
        return None if ours == theirs else nn.Linear(theirs, ours, bias=False)

    def forward(
        self,
        batch: Mapping[str, Tensor],
        items: Mapping[str, Tensor] | Tensor | float,
        knee_log: KneeLog | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch, and every term's unweighted share of its mean.

        Args:
            batch: what `Collator` makes.
            items: `count_items` of the whole batch, over all micro-batches and devices, by which
                sums are divided; a number is that of answers, where this batch is the whole one.
        """
        if not isinstance(items, Mapping):
            answered = torch.as_tensor(items)
            items = count_items(batch, self.parts.image_token_id) | {"answers": answered}
        answers = answer_positions(batch["labels"])  # [batch, length]
        targets = batch["labels"][:, 1:][answers[:, :-1]]  # [N]
        passes = self.run(batch, answers)
        # A text-only batch has no image to switch: z_SW is z_T and the term is exactly zero.
        terms = [t for t in self.token_terms if t.of != "switch" or "switch" in passes.hidden]
        heads = self._heads()
        loss, values = token_terms(
            terms,
            heads,
            passes.hidden,
            targets,
            items["answers"],
            chunk=self.head_chunk,
            knee_log=knee_log,
        )
        if self.image_terms and passes.embeddings:
            for term in self.image_terms:
                value = self._image_value(term, passes, batch, heads, items)
                loss = loss + term.weight * value
                values[term.label] = value.detach()
        return loss, values

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
        own = set() if self.adapter is None else {id(p) for p in self.adapter.parameters()}
        for parameter in self._of_images():
            if id(parameter) not in reached | own:
                parameter.requires_grad_(False)

    def _zero_of_images(self, device: torch.device) -> Tensor:
        """Zero, in whose graph all weights of images are.

        Devices exchange gradients weight by weight, so one whose piece of a batch has no image
        must give zeros too, and one device alone must give its optimizer the same zeros.
        """
        nothing = [p.flatten()[:0] for p in self._of_images()]
        return torch.cat([torch.zeros(0, device=device), *nothing]).sum()

    def _heads(self) -> Heads:
        head: Any = self.student.get_output_embeddings()  # type: ignore[operator]
        return Heads(
            student=self.parts.lm_head,
            teacher=self.teacher.lm_head if self.teacher else None,
            parameters=tuple(head.parameters()),
            vocabulary=self.vocabulary,
        )

    def run(self, batch: Mapping[str, Tensor], answers: Tensor) -> Passes:
        """Every forward pass that a term needs, once.

        Args:
            answers: positions [batch, length] whose next token is supervised.
        """
        passes = Passes()
        pictured = has_images(batch)
        switches = needs_switch(self.terms) and pictured
        kept: KeptVision | None = None
        if needs_student_logits(self.terms) or not pictured:
            keeping = keeping_vision(self.parts) if switches else contextlib.nullcontext()
            with keeping as kept:
                self._forward("student", self.parts, batch, answers, passes)
        if not pictured:
            passes.hidden["student"] = passes.hidden["student"] + self._zero_of_images(
                answers.device
            )
        if self.teacher is None:
            return passes
        with torch.no_grad():
            self._teach(self.teacher, batch, passes)
        if switches:
            with seeing_with(self.teacher, self.parts, kept):
                passes.hidden["switch"] = self.teacher.hidden_states(batch)[answers]
        return passes

    def _teach(
        self,
        teacher: VisionLanguageModel,
        batch: Mapping[str, Tensor],
        passes: Passes,
    ) -> None:
        """The teacher's own forward, from the cache where it holds the whole batch.

        Its own batch may be longer; the answers are the same tokens in the same order.
        """
        inputs = teacher_inputs(batch)
        answers = answer_positions(inputs["labels"])
        samples: list[int] = []
        counts: list[int] = []
        if self.cache is not None:
            samples, counts = batch["sample_index"].tolist(), answers.sum(1).tolist()
            known = self.cache.get(samples, counts)
            if known is not None:
                passes.hidden["teacher"] = known.to(answers.device)
                return
        self._forward("teacher", teacher, inputs, answers, passes)
        if self.cache is not None:
            self.cache.put(samples, counts, passes.hidden["teacher"])

    def _forward(
        self,
        name: str,
        model: VisionLanguageModel,
        batch: Mapping[str, Tensor],
        answers: Tensor,
        passes: Passes,
    ) -> None:
        """Run one model and keep what the terms look at."""
        if not self.image_terms or not has_images(batch):
            passes.hidden[name] = model.hidden_states(batch)[answers]
            return
        places = batch["input_ids"] == model.image_token_id  # [batch, length]
        watches_attention = self._has("attention_mse")
        with FirstLayerProbe(model, watches_attention) as probe:
            states = model.hidden_states(batch)
        passes.hidden[name] = states[answers]
        passes.at_images[name] = states[places]
        passes.embeddings[name] = probe.embeddings[places]
        if watches_attention:
            passes.attention[name] = probe.weights(batch["attention_mask"])

    def _image_value(
        self,
        term: Term,
        passes: Passes,
        batch: Mapping[str, Tensor],
        heads: Heads,
        items: Mapping[str, Tensor],
    ) -> Tensor:
        """One image term's share of its mean over the whole batch."""
        places = batch["input_ids"] == self.parts.image_token_id
        if term.loss == "image_kl":
            alike = Term(loss="kl", temperature=term.temperature)
            nothing = passes.at_images["student"].new_zeros(int(places.sum()), dtype=torch.long)
            value, _ = token_terms(
                [alike],
                heads,
                passes.at_images,
                nothing,
                items["image_tokens"],
                chunk=self.head_chunk,
            )
            return value
        if term.loss == "image_correlation":
            owners = places.nonzero()[:, 0]  # [M]
            states = passes.at_images
            return (
                image_correlation(states["teacher"], states["student"], owners)
                / items["image_samples"]
            )
        if term.loss == "image_mse":
            both = passes.embeddings
            return image_mse(both["teacher"], both["student"], self.adapter) / items["image_tokens"]
        asks = batch["attention_mask"].bool() & ~places
        weights = passes.attention
        return (
            attention_mse(weights["teacher"], weights["student"], asks, places)
            / items["image_pairs"]
        )


def default_chunk(vocabulary: int) -> int:
    """Answer positions whose logits are made at a time."""
    return max(16, min(512, LOGITS_AT_ONCE // vocabulary))


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
