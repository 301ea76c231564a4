"""One training step's forward pass: run the pathways that the terms need, once each.

The student's encoder output is shared by the student and the switch pathway; the teacher runs
without gradient, the switch with gradients to the student's encoder only.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd_bench.distill.image_terms import (
    AttentionProbe,
    attention_mse,
    image_correlation,
    image_mse,
)
from kd_bench.distill.methods import (
    VOCABULARY_LOSSES,
    Term,
    needs_student_logits,
    needs_switch,
    needs_teacher,
)
from kd_bench.distill.objective import Heads, KneeLog, token_terms
from kd_bench.distill.pathways import Features, Pathway, answer_positions, pathway_for
from kd_bench.distill.teacher_cache import TeacherCache
from kd_bench.errors import UsageError

__all__ = ["Distiller", "Passes", "default_chunk"]

AT_IMAGES = ("image_kl", "image_correlation")
LOGITS_AT_ONCE = 2**24


@dataclass
class Passes:
    """What the pathways gave for one batch.

    Attributes:
        hidden: last hidden states at the answers [N, width], by pathway.
        at_images: the same at image positions [M, width], of student and teacher.
        embeddings: projected image tokens, of student and teacher.
        attention: first-layer weights [batch, heads, length, length], of student and teacher.
    """

    hidden: dict[str, Tensor] = field(default_factory=dict)
    at_images: dict[str, Tensor] = field(default_factory=dict)
    embeddings: dict[str, Features] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)


class Distiller(nn.Module):
    """The student with an objective; what the Trainer trains.

    The teacher is deliberately no submodule: it is neither saved, nor synchronised over devices,
    nor switched into training mode.

    Args:
        terms: the objective.
        vocabulary: rows that both LM heads are cut to; None is all of them.
        head_chunk: answer positions that pass through heads and losses at a time; None keeps
            64 MB of float32 logits a pathway.
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
        self.pathway = pathway_for(student)
        # FSDP splits by these layers; not by the vision tower's, which a device without a picture
        # does not run, so that the others would wait for it for ever.
        self._no_split_modules = self.pathway.language_model._no_split_modules
        self.head_chunk = head_chunk or default_chunk(self.pathway.vocabulary_size)
        teacher = teacher if needs_teacher(self.terms) else None
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        self._teacher: tuple[Pathway, ...] = () if teacher is None else (pathway_for(teacher),)
        self.adapter = self._width_adapter()
        self.cache = cache
        if cache is not None and self.image_terms:
            raise UsageError(
                "teacher_cache keeps the teacher's states at answers only, but the term "
                f"{self.image_terms[0].label!r} looks at pictures.",
                "Take teacher_cache out.",
            )

    @property
    def teacher(self) -> Pathway | None:
        """The frozen teacher's pathway, where a term needs one."""
        return self._teacher[0] if self._teacher else None

    def _has(self, *names: str) -> bool:
        return any(term.loss in names for term in self.terms)

    def _width_adapter(self) -> nn.Module | None:
        """For `image_mse` between language models of different widths."""
        if self.teacher is None or not self._has("image_mse"):
            return None
        ours, theirs = _width(self.pathway), _width(self.teacher)
        return None if ours == theirs else nn.Linear(theirs, ours, bias=False)

    def forward(
        self, batch: Mapping[str, Tensor], items: Tensor | float, knee_log: KneeLog | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one piece of a batch, and every term's unweighted share of its mean.

        Args:
            batch: what `Collator` makes.
            items: answer positions of the whole batch; sums over pieces are divided by it.
        """
        answers = answer_positions(batch["labels"])  # [batch, length]
        targets = batch["labels"][:, 1:][answers[:, :-1]]  # [N]
        passes = self.run(batch, answers)
        # A text-only batch has no picture to switch: z_SW is z_T and the term is exactly zero.
        terms = [t for t in self.token_terms if t.of != "switch" or "switch" in passes.hidden]
        heads = self._heads()
        loss, values = token_terms(
            terms,
            heads,
            passes.hidden,
            targets,
            items,
            chunk=self.head_chunk,
            knee_log=knee_log,
        )
        if self.image_terms and passes.embeddings:
            share = len(targets) / torch.as_tensor(items).clamp(min=1)
            for term in self.image_terms:
                value = self._image_value(term, passes, batch, heads) * share
                loss = loss + term.weight * value
                values[term.label] = value.detach()
        return loss, values

    def _of_pictures(self) -> list[nn.Parameter]:
        """Learning weights outside the language model and its head."""
        language = {id(p) for p in self.pathway.language_model.parameters()}
        language |= {id(p) for p in self._heads().parameters}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in language]

    def freeze_unreached(self, batch: Mapping[str, Tensor]) -> None:
        """Freeze what no gradient can reach, such as a tower's layers above the one that is read.

        Args:
            batch: one with a picture.
        """
        embeddings = self.pathway.project(self.pathway.encode_image(batch), batch)
        reached = _leaves(embeddings)
        own = set() if self.adapter is None else {id(p) for p in self.adapter.parameters()}
        for parameter in self._of_pictures():
            if id(parameter) not in reached | own:
                parameter.requires_grad_(False)

    def _no_pictures(self, device: torch.device) -> Tensor:
        """Image embeddings [0, hidden] of a text-only batch, in whose graph all pictures' weights
        are.

        Devices exchange gradients weight by weight, so one whose piece of a batch has no picture
        must give zeros too, and one device alone must give its optimizer the same zeros.
        """
        nothing = [p.flatten()[:0] for p in self._of_pictures()]
        return torch.cat([torch.zeros(0, device=device), *nothing]).view(0, _width(self.pathway))

    def _heads(self) -> Heads:
        head: Any = self.student.get_output_embeddings()  # type: ignore[operator]
        return Heads(
            student=self.pathway.lm_head,
            teacher=self.teacher.lm_head if self.teacher else None,
            parameters=tuple(head.parameters()),
            vocabulary=self.vocabulary,
        )

    def run(self, batch: Mapping[str, Tensor], answers: Tensor) -> Passes:
        """Every pathway that a term needs, once.

        Args:
            answers: positions [batch, length] whose next token is supervised.
        """
        passes = Passes()
        features = self.pathway.encode_image(batch)
        if features is None:
            nothing = self._no_pictures(answers.device)
            passes.hidden["student"] = self.pathway.decode(nothing, batch, answers)
        elif needs_student_logits(self.terms):
            embeddings = self.pathway.project(features, batch)
            self._decode("student", self.pathway, embeddings, batch, answers, passes)
        teacher = self.teacher
        if teacher is None:
            return passes
        with torch.no_grad():
            self._teach(teacher, batch, answers, passes)
        if needs_switch(self.terms) and features is not None:
            seen = teacher.project(features, batch)
            passes.hidden["switch"] = teacher.decode(seen, batch, answers)
        return passes

    def _teach(
        self, teacher: Pathway, batch: Mapping[str, Tensor], answers: Tensor, passes: Passes
    ) -> None:
        """The teacher's own pathway, from the cache where it holds the whole batch."""
        samples: list[int] = []
        counts: list[int] = []
        if self.cache is not None:
            samples, counts = batch["sample_index"].tolist(), answers.sum(1).tolist()
            known = self.cache.get(samples, counts)
            if known is not None:
                passes.hidden["teacher"] = known.to(answers.device)
                return
        embeddings = teacher.project(teacher.encode_image(batch), batch)
        self._decode("teacher", teacher, embeddings, batch, answers, passes)
        if self.cache is not None:
            self.cache.put(samples, counts, passes.hidden["teacher"])

    def _decode(
        self,
        name: str,
        pathway: Pathway,
        embeddings: Features | None,
        batch: Mapping[str, Tensor],
        answers: Tensor,
        passes: Passes,
    ) -> None:
        """Run one language model and keep what the terms look at."""
        if embeddings is None or not self.image_terms:
            passes.hidden[name] = pathway.decode(embeddings, batch, answers)
            return
        passes.embeddings[name] = embeddings
        places = batch["input_ids"] == pathway.image_token_id  # [batch, length]
        wanted = answers | places if self._has(*AT_IMAGES) else answers
        probe = AttentionProbe(pathway) if self._has("attention_mse") else None
        with probe or contextlib.nullcontext():
            hidden = pathway.decode(embeddings, batch, wanted)
        if probe is not None:
            passes.attention[name] = probe.weights(batch["attention_mask"])
        passes.hidden[name] = hidden[answers[wanted]]
        passes.at_images[name] = hidden[places[wanted]]

    def _image_value(
        self, term: Term, passes: Passes, batch: Mapping[str, Tensor], heads: Heads
    ) -> Tensor:
        """One image term's mean over this batch."""
        places = batch["input_ids"] == self.pathway.image_token_id
        if term.loss == "image_kl":
            alike = Term(loss="kl", temperature=term.temperature)
            nothing = passes.at_images["student"].new_zeros(int(places.sum()), dtype=torch.long)
            value, _ = token_terms(
                [alike], heads, passes.at_images, nothing, len(nothing), chunk=self.head_chunk
            )
            return value
        if term.loss == "image_correlation":
            owners = places.nonzero()[:, 0]  # [M]
            states = passes.at_images
            return image_correlation(states["teacher"], states["student"], owners)
        if term.loss == "image_mse":
            both = passes.embeddings
            return image_mse(both["teacher"], both["student"], self.adapter)
        asks = batch["attention_mask"].bool() & ~places
        weights = passes.attention
        return attention_mse(weights["teacher"], weights["student"], asks, places)


def default_chunk(vocabulary: int) -> int:
    """Answer positions whose logits are made at a time."""
    return max(16, min(512, LOGITS_AT_ONCE // vocabulary))


def _leaves(outputs: Features | None) -> set[int]:
    """Ids of the weights that a backward pass from `outputs` would reach."""
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    nodes = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen, leaves = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        further = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= further
        nodes += further
    return leaves


def _width(pathway: Pathway) -> int:
    """Hidden size of a language model."""
    config: Any = pathway.language_model.config
    return int(config.hidden_size)
