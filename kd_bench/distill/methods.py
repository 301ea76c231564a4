"""What each method minimises: a list of weighted terms over named logits.

    z_T  teacher        z_S  student        z_SW  switch: student's eyes, teacher's language

A recipe names a method or spells the terms out, so that every ablation is a change in YAML. This
module is plain data; `objective.py` computes it.
"""

from typing import Literal

from pydantic import Field, model_validator

from kd_bench.config import StrictModel

Loss = Literal[
    "ce",
    "kl",
    "rkl",
    "jsd",
    "bild",
    "dbild",
    "image_kl",
    "image_correlation",
    "image_mse",
    "attention_mse",
]

# Options that a loss reads; any other option on it is a mistake worth a message.
OPTIONS: dict[str, tuple[str, ...]] = {
    "ce": (),
    "kl": ("temperature",),
    "rkl": ("temperature",),
    "jsd": ("temperature", "beta"),
    "bild": ("temperature", "top_k", "direction"),
    "dbild": (
        "temperature",
        "direction",
        "curve",
        "candidates",
        "k_min",
        "k_max",
        "pairs",
        "ids",
        "weight_by",
    ),
    "image_kl": ("temperature",),
    "image_correlation": (),
    "image_mse": (),
    "attention_mse": (),
}
VOCABULARY_LOSSES = ("kl", "rkl", "jsd", "bild", "dbild")


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
        return {
            option: getattr(self, option)
            for option in OPTIONS[self.loss]
            if getattr(self, option) is not None
        }


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
