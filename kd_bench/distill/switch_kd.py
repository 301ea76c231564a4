"""The objective as a module that anybody's own loop or Trainer calls on a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_bench.config import validate
from kd_bench.distill.compatibility import check_pair
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.objective import count_items
from kd_bench.distill.recipe import OPTIONS, Stage, Term, needs_switch
from kd_bench.errors import UsageError


class SwitchKD(nn.Module):
    """Switch-KD (arXiv 2604.14629), or another method of `kd-bench recipes`, on a student.

        L = CE(z_S, labels) + DBiLD(z_T, z_S) + DBiLD(z_T, z_SW)

    where z_T are the teacher's logits, z_S the student's, and z_SW those of the visual switch: the
    teacher's projector and language model behind the student's vision tower.

        objective = SwitchKD(student, teacher)
        loss = objective(batch)
        loss.backward()

    The student is the module's only submodule: `objective.parameters()` are what learns, and
    `student.save_pretrained` saves it. The teacher is frozen here and follows the batch's device.
    Where several devices share a batch, the objective (not the student) is what has to be wrapped,
    as `Trainer(model=objective)` does: gradients are exchanged by the wrapper's own forward pass.

    Args:
        student, teacher: models of transformers of a class in `vision_language.FAMILIES`; the
            student may wear a peft adapter.
        method: name of a list of terms: switch-kd, vsd, dbild, bild, kl, rkl, jsd, llava-kd,
            align-kd or sft.
        terms: instead of it, the terms as a recipe spells them: [{"loss": "ce"}, {"loss": "dbild",
            "of": "switch", "weight": 0.5}].
        weights: factor by the name of a term, e.g. {"align": 1.0, "switch": 0.5}.
        processor, teacher_processor: where both are given, their tokenizers and image settings are
            compared, too.
        truncate_vocabulary: allow LM heads of unequal size (padding) over equal tokenizers.
        head_chunk: answer positions that pass through the LM heads at a time; None: what keeps
            64 MB of float32 logits a model, or a quarter of a GPU's free memory holds.
        options: of the losses, for every term that knows them: temperature=2.0, curve="probs", ...

    Raises:
        UsageError: the two models do not fit the terms, or an option fits no term.
    """

    accepts_loss_kwargs = True  # transformers' Trainer shall count the answers of the whole batch

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        method: str = "switch-kd",
        terms: Sequence[Term | Mapping[str, Any]] | None = None,
        weights: Mapping[str, float] | None = None,
        processor: Any = None,
        teacher_processor: Any = None,
        truncate_vocabulary: bool = False,
        head_chunk: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        chosen = _terms(method, terms, weights or {}, options)
        vocabulary = check_pair(
            student,
            teacher,
            processor,
            teacher_processor,
            chosen,
            truncate_vocabulary=truncate_vocabulary,
        )
        self.distiller = Distiller(
            student, teacher, chosen, vocabulary=vocabulary, head_chunk=head_chunk
        )
        tower = self.distiller.parts.vision_tower
        if needs_switch(chosen) and not any(p.requires_grad for p in tower.parameters()):
            raise UsageError(
                "The student's vision tower is frozen, the only part that the gradient of a switch "
                "term reaches.",
                "Let it learn, or leave the switch out with method='dbild'.",
            )

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of weight."""
        return self.distiller.terms

    def forward(
        self,
        batch: Mapping[str, Tensor],
        num_items_in_batch: Mapping[str, Tensor] | Tensor | float | None = None,
        *,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar.

        Args:
            batch: what the student's processor gives, padded on the right, and `labels` [batch,
                length] with -100 where nothing is asked. Image tokens are never asked for, whatever
                the labels say (TRL's collator leaves them in).
            num_items_in_batch: answers (labels other than -100) of the whole batch, of which this
                may be one device's micro-batch: the loss is a sum over answers divided by it. None:
                this batch is the whole one. For image terms, `count_items` summed over all.
            return_parts: also every term's value before its weight, by name.

        Raises:
            UsageError: the batch has no labels, holds a video, or does not fit the student.
        """
        whole = self._complete(batch)
        if num_items_in_batch is None:
            num_items_in_batch = count_items(whole, self.distiller.parts.image_token_id)
        self._move_teacher(whole["input_ids"].device)
        loss, parts = self.distiller(whole, num_items_in_batch)
        return (loss, parts) if return_parts else loss

    def _complete(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with what a foreign collator may have left out or in."""
        if batch.get("labels") is None:
            raise UsageError(
                "The batch has no labels.",
                "Give token ids [batch, length], -100 where nothing is asked.",
            )
        labels, ids = batch["labels"], batch["input_ids"]
        image = ids == self.distiller.parts.image_token_id
        whole = {**batch, "labels": labels.masked_fill(image, -100)}
        if whole.get("attention_mask") is None:
            whole["attention_mask"] = torch.ones_like(ids)
        return whole

    def _move_teacher(self, device: torch.device) -> None:
        teacher = self.distiller.teacher
        if teacher is None or hasattr(teacher.whole, "hf_device_map"):  # placed by its loader
            return
        if next(teacher.model.parameters()).device != device:
            teacher.model.to(device)


def _terms(
    method: str,
    terms: Sequence[Term | Mapping[str, Any]] | None,
    weights: Mapping[str, float],
    options: Mapping[str, Any],
) -> tuple[Term, ...]:
    """The objective that a stage of a recipe with these settings would have."""
    given = {"method": method} if terms is None else {"terms": [_mapping(term) for term in terms]}
    plain = validate(Stage, {**given, "steps": 1}, "SwitchKD").objective
    labels = [term.label for term in plain]
    for label in weights:
        if label not in labels:
            raise UsageError(f"No term is called {label!r}.", f"There are: {', '.join(labels)}.")
    for name in options:
        if not any(name in OPTIONS[term.loss] for term in plain):
            known = sorted({option for term in plain for option in OPTIONS[term.loss]})
            raise UsageError(
                f"No term has an option {name!r}.",
                f"There are: {', '.join(known)}." if known else "Drop it.",
            )
    changed = []
    for term in plain:
        own = {name: value for name, value in options.items() if name in OPTIONS[term.loss]}
        weight = {"weight": weights[term.label]} if term.label in weights else {}
        changed.append({**_mapping(term), **own, **weight})
    return validate(Stage, {"terms": changed, "steps": 1}, "SwitchKD").objective


def _mapping(term: Term | Mapping[str, Any]) -> dict[str, Any]:
    return term.model_dump(exclude_none=True) if isinstance(term, Term) else dict(term)
