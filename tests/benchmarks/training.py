"""What a step costs beside its parts: `python -m tests.benchmarks.training`.

Takes about five minutes and 12 GB on one core; `python -m tests.benchmarks.training mini`, the
embedded models' steps alone, a minute.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd_bench.distill.checkpoints import locate
from kd_bench.distill.conversations import read_conversations
from kd_bench.distill.distiller import Distiller, default_chunk
from kd_bench.distill.encoding import BatchOrder, Collator, ConversationDataset, Encoder
from kd_bench.distill.models import load_model, load_processor
from kd_bench.distill.objective import Heads, count_items, token_terms
from kd_bench.distill.recipe import METHODS, load_recipe
from kd_bench.distill.teacher_states import TeacherCache, TeacherStates, compute_states
from kd_bench.distill.vision_language import (
    VisionLanguageModel,
    answer_positions,
    keeping_vision,
    seeing_with,
)
from tests.benchmarks.figures import Figure, peak_memory, print_table, seconds
from tests.benchmarks.losses import VOCABULARY, pair_list_dbild
from tests.support import tiny
from tests.support.counting import counted

SWITCH_KD = METHODS["switch-kd"]
# Widths, layers, heads and key-value heads of Qwen2.5.
QWEN_HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2}  # fmt: skip
QWEN_THREE = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
              "num_attention_heads": 16, "num_key_value_heads": 2}  # fmt: skip
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
          "num_attention_heads": 16, "image_size": 384, "patch_size": 14}  # fmt: skip


# --- memory of the objective --------------------------------------------------------------------


def memory_figure(rows: int = 1024, k: int = 256, student: int = 64, teacher: int = 128) -> Figure:
    """Three heads, CE, align and switch: value and all gradients.

    Heads are narrow so that it takes a minute: what is compared lies behind them.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads = nn.Parameter(normal(VOCABULARY, student) * 0.3), normal(VOCABULARY, teacher) * 0.3
    hidden = {
        "student": normal(rows, student).requires_grad_(),
        "teacher": normal(rows, teacher),
        "switch": normal(rows, teacher).requires_grad_(),
    }
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    wanted = [hidden["student"], hidden["switch"], heads[0]]

    def ours() -> tuple[Tensor, ...]:
        both = Heads(lambda h: h @ heads[0].T, lambda h: h @ heads[1].T, (heads[0],))
        terms = [term.model_copy(update={"k_max": k}) if term.loss == "dbild" else term
                 for term in SWITCH_KD]  # fmt: skip
        chunk = default_chunk(VOCABULARY)
        loss, _ = token_terms(terms, both, hidden, targets, rows, chunk=chunk)
        return torch.autograd.grad(loss, wanted)

    def theirs() -> tuple[Tensor, ...]:
        z_t = hidden["teacher"] @ heads[1].T
        z_s, z_sw = hidden["student"] @ heads[0].T, hidden["switch"] @ heads[1].T
        loss = F.cross_entropy(z_s, targets, reduction="sum")
        loss = loss + pair_list_dbild(z_t, z_s, k).sum() + pair_list_dbild(z_t, z_sw, k).sum()
        return torch.autograd.grad(loss / rows, wanted)

    peaks = peak_memory(ours), peak_memory(theirs)
    return Figure(
        f"objective of switch-kd, N = {rows}, V = {VOCABULARY}: peak memory against materialised "
        f"logits and pair lists of k = {k}, hidden sizes {student} and {teacher}",
        f"{peaks[0] / 2**20:.0f} MB",
        f"{peaks[1] / 2**20:.0f} MB",
        peaks[1] / peaks[0],
        8,
    )


# --- operations of a full-size step -------------------------------------------------------------


def llava(language: dict[str, Any], vision: dict[str, Any], **more: Any) -> Any:
    """A LLaVA of SigLIP and Qwen2 with random weights."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    side = vision["image_size"] // vision["patch_size"]
    text: Any = Qwen2Config(vocab_size=more.get("vocabulary", VOCABULARY), **language)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(vision_use_head=False, **vision),
        text_config=text,
        image_token_id=tiny.SPECIAL.index("<image>"),
        image_seq_length=side * side,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return LlavaForConditionalGeneration(config).eval()


def batch_of(model: Any, size: int, question: int, answer: int) -> dict[str, Tensor]:
    """Pictures, each with one question and one answer of that many tokens."""
    config = model.config
    tokens = config.image_seq_length
    length = tokens + question + answer
    ids = torch.randint(10, config.text_config.vocab_size, (size, length))
    ids[:, :tokens] = config.image_token_id
    labels = ids.clone()
    labels[:, : tokens + question] = -100
    side = config.vision_config.image_size
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(size, 3, side, side),
    }


def share_figure(question: int = 48, answer: int = 96) -> Figure:
    """Share of the objective in a 0.5B / 3B step, by counted operations of matrix products."""
    with torch.device("meta"):
        student, teacher = llava(QWEN_HALF, SIGLIP), llava(QWEN_THREE, SIGLIP)
    teacher.requires_grad_(False)
    total = _operations(lambda: _passes(student, teacher, question + answer))
    widths = QWEN_HALF["hidden_size"], QWEN_THREE["hidden_size"]
    # Forward of three heads; backward of two to the hidden states, of one to its weights.
    heads = 2 * answer * VOCABULARY * (widths[0] * 3 + widths[1] * 3)
    return Figure(
        f"objective's share of a switch-kd step, 0.5B student and 3B teacher, {answer} answer "
        "tokens, counted matrix products",
        f"{heads / (total + heads):.1%}",
        "10 %",
        0.1 * (total + heads) / heads,
        1,
    )


def _passes(student: Any, teacher: Any, text: int) -> None:
    """Student forward and backward, teacher forward, switch forward and input-backward."""
    side = student.config.vision_config.image_size
    pixels = torch.empty(1, 3, side, side, device="meta")

    def see(model: Any) -> Tensor:
        features: Tensor = model.model.vision_tower(pixels).last_hidden_state
        return features

    def read(model: Any, features: Tensor) -> Tensor:
        seen = model.model.multi_modal_projector(features)
        words = torch.empty(1, text, seen.shape[-1], device="meta")
        states = model.model.language_model(inputs_embeds=torch.cat([seen, words], dim=1))
        hidden: Tensor = states.last_hidden_state
        return hidden

    features = see(student)
    with torch.no_grad():
        read(teacher, see(teacher))
    (read(student, features).sum() + read(teacher, features).sum()).backward()


def _operations(work: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


# --- time of a step against its floor -----------------------------------------------------------

SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LARGER = {**SMALL, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
EYES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 4, "image_size": 112, "patch_size": 14}  # fmt: skip


def floor_figure(size: int = 4, question: int = 24, answer: int = 16) -> Figure:
    """A step against its parts, each timed alone."""
    torch.manual_seed(0)
    vocabulary = 8192
    student = llava(SMALL, EYES, vocabulary=vocabulary)
    teacher = llava(LARGER, EYES, vocabulary=vocabulary).requires_grad_(False)
    batch = batch_of(student, size, question, answer)
    distiller = Distiller(student, teacher, SWITCH_KD)
    answers = answer_positions(batch["labels"])
    items = int(answers.sum())

    def step() -> None:
        distiller(batch, items)[0].backward()

    alone = copy.deepcopy(student)
    parts = Distiller(alone, teacher, METHODS["sft"])
    judge = distiller.teacher
    assert judge is not None
    with torch.no_grad(), keeping_vision(parts.parts) as kept:
        parts.parts.image_embeddings(batch)
    for state in kept[0].hidden_states:
        if isinstance(state, Tensor):
            state.requires_grad_()

    def teacher_logits() -> Tensor:
        return judge.lm_head(judge.hidden_states(batch)[answers])

    own = torch.no_grad()(teacher_logits)

    def switched() -> None:
        with seeing_with(judge, parts.parts, kept):
            teacher_logits().sum().backward()

    def sft() -> None:
        parts(batch, items)[0].backward()

    floor = seconds(sft) + seconds(own) + seconds(switched)
    ours = seconds(step)
    return Figure(
        "switch-kd step against student forward + backward, teacher two forwards and one "
        "input-backward, each alone (lower is better)",
        f"{ours * 1e3:.0f} ms",
        f"{floor * 1e3:.0f} ms",
        ours / floor,
        1.15,
    )


# --- the embedded models' step against its bare products ------------------------------------------


def mini_figures(batches: int = 6) -> list[Figure]:
    """Steps of the recipe `mini` against the matrix products and attention in them, replayed alone.

    The baseline's products are those of whole passes of student, teacher and switch; what is not
    computed at all (the last layer beside the answers, a teacher whose states are known, attention
    to what comes later) makes our steps cheaper than their floor.
    """
    recipe = load_recipe("mini")
    stage = recipe.stages[0]
    paths = locate(recipe.student), locate(str(recipe.teacher))
    student, teacher = (load_model(path) for path in paths)
    conversations, _ = read_conversations(*recipe.data_of(stage))
    encoder = Encoder(load_processor(paths[0]), stage.max_length)
    dataset = ConversationDataset(conversations, encoder)
    dataset.prepare()
    order = BatchOrder(dataset, stage.batch_size, stage.batch_size, 0, stage.group_by_length)
    token = student.config.image_token_id
    collate = Collator(0, (token, token))
    some = [collate([dataset.kept[i] for i in each]) for each in list(order)[:batches]]
    judge = VisionLanguageModel(teacher)
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder), judge.hidden_size, torch.float32)
        states = compute_states(judge, dataset.kept, collate, cache)
    return [
        _mini_figure(name, student, teacher, some, states) for name in ("sft", "kl", "switch-kd")
    ]


def _mini_figure(
    method: str, student: Any, teacher: Any, batches: list[dict[str, Any]], states: TeacherStates
) -> Figure:
    distiller = Distiller(student, teacher, METHODS[method]).train()
    items = [count_items(batch, distiller.parts.image_token_id) for batch in batches]

    def steps() -> None:
        for batch, counts in zip(batches, items, strict=True):
            distiller.zero_grad(set_to_none=True)
            distiller(batch, counts)[0].backward()

    models = [distiller.parts, *([distiller.teacher] if distiller.teacher else [])]
    for model in models:
        vars(model)["_plain_last_layer"] = None
    with counted() as whole:
        steps()
    for model in models:
        del vars(model)["_plain_last_layer"]
    distiller.teacher_states = states if distiller.teacher else None
    with counted() as own:
        steps()
    ours, floor, bare = (seconds(work) / len(batches) for work in (steps, whole.replay, own.replay))
    return Figure(
        f"{method} step of the recipe mini against bare products and attention of whole passes "
        f"(its own: {bare * 1e3:.0f} ms; lower is better)",
        f"{ours * 1e3:.0f} ms",
        f"{floor * 1e3:.0f} ms",
        ours / floor,
        1.25,
    )


def main() -> None:
    torch.set_num_threads(1)
    figures = mini_figures()
    if "mini" not in sys.argv[1:]:
        figures += [floor_figure(), share_figure(), memory_figure()]
    print_table("A training step", figures)


if __name__ == "__main__":
    main()
