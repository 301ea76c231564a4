"""`kd-bench data show`: what is learnt is marked, what cannot be used is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from kd_bench.cli import app
from kd_bench.distill.encoding import preview_data
from kd_bench.distill.recipe import DataSource
from kd_bench.errors import UsageError
from tests.support import tiny
from tests.support.chat_templates import PUBLIC

ROWS: list[Any] = [
    {
        "id": "two",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is shown?"},
            {"from": "gpt", "value": "Yes"},
            {"from": "human", "value": "and how many?"},
            {"from": "gpt", "value": "Two"},
        ],
    },
    {"query": "Is it?", "response": "No"},
    {"query": "Is it?", "response": "No", "video": "a.mp4"},
    {"query": "<image>", "response": "No", "image": "absent.png"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    tiny.picture("red").save(tmp_path / "a.png")
    path = tmp_path / "data.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture
def student(tmp_path: Path) -> str:
    PUBLIC["llava-1.5"].processor("pre-tokenizer").save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "config.json").write_text('{"model_type": "llava"}')
    return str(tmp_path / "student")


def test_counts_samples_and_reasons(data: Path, student: str) -> None:
    found = preview_data(DataSource(path=str(data)), student)
    assert dict(found.forms) == {"conversations": 1, "query and response": 2}
    assert (found.conversations, found.images, found.text_only, found.answers) == (3, 2, 1, 4)
    assert found.learnt == [4, 2]
    two, one = found.samples
    assert two.learnt == ["▁Yes", "</s>", "▁Two", "</s>"]
    assert [text for text, learnt in two.parts if learnt] == [" Yes</s>", " Two</s>"]
    assert ("<image tokens: 4>", False) in two.parts
    assert one.name == "1"
    assert found.unreadable == [("2", "video is not supported"), ("3", "absent.png is missing")]


def test_the_command(data: Path, student: str) -> None:
    def say(*options: str) -> str:
        done = typer.testing.CliRunner().invoke(app, ["data", "show", str(data), *options])
        assert done.exit_code == 0, done.output
        return done.output

    shown = say("--student", student)
    assert "form: conversations (1), query and response (2)" in shown
    assert "« Yes</s>»" in shown
    assert "2: video is not supported" in shown
    assert "<|im_end|>»" in say("--student", student, "--prompt-template", "chatml")
    assert "embedded:weights/student" in say("--samples", "1")


def test_what_cannot_be_shown_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no training data"):
        preview_data(DataSource(path=str(tmp_path / "absent.json")), "embedded:weights/student")
    with pytest.raises(UsageError, match="no prompt template"):
        preview_data(
            DataSource(path=str(data)), "embedded:weights/student", prompt_template="absent"
        )
