"""One bad sample costs itself: at the start or in mid-run, whatever raises."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kd_bench.distill import train as train_module
from kd_bench.distill.models import load_model, load_processor
from kd_bench.distill.recipe import load_recipe
from kd_bench.distill.train import train
from kd_bench.errors import TrainingError, UsageError
from tests.support import tiny

BAD: dict[str, dict[str, Any]] = {
    "answer": {"query": "say it", "response": "red </s> blue"},
    "marks": {"query": "<image> or <image>", "response": "red", "image": "0.png"},
    "damaged": {"query": "what", "response": "red", "image": "damaged.avif"},
    "huge": {"query": "what", "response": "red", "image": "huge.png"},
    "raises": {"query": "what", "response": "red", "image": "narrow.png"},
    "bytes": {"query": "what", "response": "red", "image": {"bytes": "abc"}},
    "long": {"query": "two " * 200, "response": "red"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unreadable")
    tiny.write_recipe(folder)
    path = folder / "data" / "conversations.json"
    rows = json.loads(path.read_text())
    rows += [{"id": name, **row} for name, row in BAD.items()]
    path.write_text(json.dumps(rows))
    Image.new("L", (300, 300)).save(folder / "data" / "huge.png")
    Image.new("RGB", (600, 2)).save(folder / "data" / "narrow.png")
    (folder / "data" / "damaged.avif").write_bytes(b"\0\0\0\x1cftypavif" + b"\xff" * 60)
    return folder


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image processor that refuses narrow images, as Qwen's does."""
    import transformers as hf

    inner = hf.SiglipImageProcessor.__call__

    def picky_call(self: Any, images: Any, *given: Any, **options: Any) -> Any:
        flat = [i for each in images for i in (each if isinstance(each, list) else [each])]
        if any(image.width > 200 * image.height for image in flat):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return inner(self, images, *given, **options)

    monkeypatch.setattr(hf.SiglipImageProcessor, "__call__", picky_call)


@pytest.mark.parametrize("small", [0, 50_000])
@pytest.mark.usefixtures("picky")
@pytest.mark.slow
def test_bad_samples_are_counted_with_their_reason(
    place: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(train_module, "SMALL_DATA", small)
    changes = [
        f"output={place / f'out{small}'}",
        "method=sft",
        "steps=14",  # two epochs of 30 rows, four at a time
        "max_length=100",
        "data.max_image_pixels=80000",
    ]
    final = train(load_recipe(place / "recipe.yaml", changes))
    told = json.loads((final / "lineage.json").read_text())["stages"]["train"]["unreadable"]
    reasons = dict(told)
    expected = {
        "answer": "an answer holds </s>",
        "marks": "2 <image> marks for 1 images",
        "damaged": "damaged.avif:",
        "huge": "300 x 300 pixels are more than the 80,000 allowed",
        "raises": "aspect ratio must be smaller",
        "bytes": "bytes are not bytes",
        "long": "no answer within max_length=100",
    }
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        row = 24 + list(BAD).index(name)
        assert reason in reasons[name]
        assert reasons[name].endswith(f"(row {row})")
    stopped = [*changes, f"output={place / f'stop{small}'}", "data.unreadable_limit=3"]
    with pytest.raises(
        TrainingError, match=r"more than the 3 allowed: marks: .*bytes: .*\(row 29\)"
    ):
        train(load_recipe(place / "recipe.yaml", stopped))


@pytest.mark.slow
def test_a_student_without_a_template_is_refused_or_given_one(place: Path) -> None:
    student = place / "bare"
    tiny.save(student, width=32, seed=2)
    (student / "chat_template.jinja").unlink()
    changes = [f"output={place / 'bare-out'}", f"student={student}", "method=sft", "steps=1"]
    with pytest.raises(UsageError, match=r"no chat template.*`prompt_template:`"):
        train(load_recipe(place / "recipe.yaml", changes))
    with pytest.raises(UsageError, match="no prompt template 'absent'"):
        train(load_recipe(place / "recipe.yaml", [*changes, "prompt_template=absent"]))
    settings = [*changes, "prompt_template=llava", "data.unreadable_limit=50", "data.limit=24"]
    final = train(load_recipe(place / "recipe.yaml", settings))
    assert "ASSISTANT:" in load_processor(final).chat_template  # evaluation finds it there


@pytest.mark.slow
def test_the_student_is_told_where_to_stop(place: Path) -> None:
    """`generate` stops at what was learnt, also where the tokenizer's end is another token."""
    student = place / "chatml"
    model = tiny.model(width=32, seed=2)
    processor = tiny.processor()
    processor.tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    model.resize_token_embeddings(len(processor.tokenizer))
    model.save_pretrained(student)
    processor.save_pretrained(student)
    changes = [
        f"output={place / 'chatml-out'}",
        f"student={student}",
        "method=sft",
        "steps=1",
        "prompt_template=chatml",
        "data.limit=24",
    ]
    final = train(load_recipe(place / "recipe.yaml", changes))
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = load_model(final).generation_config.eos_token_id
    assert found == [processor.tokenizer.eos_token_id, end]
    assert torch.is_tensor(next(load_model(final).parameters()))
