"""One training step's forward pass: run the pathways that the terms need, once each.

The student's encoder output is shared by the student and the switch pathway; the teacher runs
without gradient, the switch with gradients to the student's encoder only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_bench.distill.methods import (
    IMAGE_LOSSES,
    VOCABULARY_LOSSES,
    Term,
    needs_student_logits,
    needs_switch,
    needs_teacher,
)
from kd_bench.distill.objective import Heads, KneeLog, token_terms
from kd_bench.distill.pathways import Pathway, answer_positions, pathway_for

__all__ = ["Distiller"]


class Distiller(nn.Module):
    """The student with an objective; what the Trainer trains.

    The teacher is deliberately no submodule: it is neither saved, nor synchronised over devices,
    nor switched into training mode.

    Args:
        terms: the objective.
        vocabulary: rows that both LM heads are cut to; None is all of them.
        head_chunk: answer positions that pass through heads and losses at a time.
    """

    accepts_loss_kwargs = True  # the Trainer shall count the answers of the whole batch

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        terms: Sequence[Term],
        *,
        vocabulary: int | None = None,
        head_chunk: int = 512,
    ) -> None:
        super().__init__()
        self.student = student
        self.terms = tuple(term for term in terms if term.weight)
        self.token_terms = tuple(
            term for term in self.terms if term.loss == "ce" or term.loss in VOCABULARY_LOSSES
        )
        self.image_terms = tuple(term for term in self.terms if term.loss in IMAGE_LOSSES)
        self.head_chunk = head_chunk
        self.vocabulary = vocabulary
        self.pathway = pathway_for(student)
        teacher = teacher if needs_teacher(self.terms) else None
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        self._teacher: tuple[Pathway, ...] = () if teacher is None else (pathway_for(teacher),)

    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def teacher(self) -> Pathway | None:
        """The frozen teacher's pathway, where a term needs one."""
        return self._teacher[0] if self._teacher else None

    def forward(
        self, batch: Mapping[str, Tensor], items: Tensor | float, knee_log: KneeLog | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one piece of a batch, and every term's unweighted share of its mean.

        Args:
            batch: what `Collator` makes.
            items: answer positions of the whole batch; sums over pieces are divided by it.
        """
        positions = answer_positions(batch["labels"])  # [batch, length]
        targets = batch["labels"][:, 1:][positions[:, :-1]]  # [N]
        hidden = self.hidden_states(batch, positions)  # each [N, width]
        head = self.student.get_output_embeddings()
        heads = Heads(
            student=self.pathway.lm_head,
            teacher=self.teacher.lm_head if self.teacher else None,
            parameters=tuple(head.parameters()),
            vocabulary=self.vocabulary,
        )
        # A text-only batch has no picture to switch: z_SW is z_T and the term is exactly zero.
        terms = [term for term in self.token_terms if term.of != "switch" or "switch" in hidden]
        return token_terms(
            terms,
            heads,
            hidden,
            targets,
            items,
            chunk=self.head_chunk,
            knee_log=knee_log,
        )

    def hidden_states(self, batch: Mapping[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        """Last hidden states at the answers, by pathway: only of those that a term needs."""
        hidden: dict[str, Tensor] = {}
        features = self.pathway.encode_image(batch)
        if needs_student_logits(self.terms):
            embeddings = self.pathway.project(features, batch)
            hidden["student"] = self.pathway.decode(embeddings, batch, positions)
        teacher = self.teacher
        if teacher is None:
            return hidden
        with torch.no_grad():
            seen = teacher.project(teacher.encode_image(batch), batch)
            hidden["teacher"] = teacher.decode(seen, batch, positions)
        if needs_switch(self.terms) and features is not None:
            seen = teacher.project(features, batch)
            hidden["switch"] = teacher.decode(seen, batch, positions)
        return hidden
