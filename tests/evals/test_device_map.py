"""A model in several places answers as in one: `eval --device-map`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kd_bench.cli import app
from kd_bench.distill.models import load_model, load_processor
from kd_bench.errors import UsageError
from kd_bench.evals.benchmark import Question, Settings
from kd_bench.evals.engine import Engine
from kd_bench.evals.run import EvalSettings, evaluate
from tests.support.eval_world import save_talker, write_replicas

QUESTIONS = [
    Question(
        number,
        text,
        lambda colour=colour: [Image.new("RGB", (40, 30), colour)],
        Settings(max_new_tokens=6),
        colour,
    )
    for number, (text, colour) in enumerate(
        [("What is this?", "red"), ("A boat? Yes or no.", "red"), ("How many?", "blue")]
    )
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("talker"))


def texts(model: Any, checkpoint: Path) -> tuple[str, list[str]]:
    engine = Engine(model, load_processor(checkpoint))
    answers = [answer for batch in engine.answers(QUESTIONS) for answer in batch]
    assert not [answer.error for answer in answers if answer.error]
    return engine.path, [a.text for a in sorted(answers, key=lambda answer: answer.index)]


def test_a_model_in_two_places_gives_the_answers_of_one(checkpoint: Path, tmp_path: Path) -> None:
    """Its language model lies on disk and is read layer by layer by accelerate's hooks."""
    whole = load_model(checkpoint, device="cpu")
    names = {name.rpartition(".")[0] for name, _ in whole.named_parameters()} | {"lm_head"}
    places = {name: "disk" if "layers" in name else "cpu" for name in sorted(names)}
    assert set(places.values()) == {"cpu", "disk"}
    spread = load_model(checkpoint, device_map=places)
    assert any(parameter.is_meta for parameter in spread.parameters())
    path, answers = texts(spread, checkpoint)
    assert path == "generate"
    assert answers == texts(whole, checkpoint)[1]


@pytest.mark.slow
def test_auto_is_a_run_like_any_other(checkpoint: Path, tmp_path: Path) -> None:
    data = write_replicas(tmp_path / "data")
    options: dict[str, Any] = {"data": data, "progress": False, "limit": 6, "tasks": ["gqa"]}
    plain = evaluate(checkpoint, EvalSettings(results=tmp_path / "plain", **options))
    auto = evaluate(
        checkpoint, EvalSettings(results=tmp_path / "auto", device_map="auto", **options)
    )
    assert auto.result("gqa").score == plain.result("gqa").score
    assert auto.samples("gqa")["answer"].tolist() == plain.samples("gqa")["answer"].tolist()


@pytest.mark.parametrize(
    "line, problem",
    [
        (["{0}", "--device-map", "cuda:0"], "accelerate has no such placement"),
        (["--vision", "{0}", "--language", "{0}", "--device-map", "auto"], "places one model"),
        (["--model", "dummy", "--device-map", "auto"], "goes into --model-args"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    checkpoint: Path, tmp_path: Path, line: list[str], problem: str
) -> None:
    given = [part.format(checkpoint) for part in line]
    shown = CliRunner().invoke(app, ["eval", *given, "--results", str(tmp_path)])
    assert isinstance(shown.exception, UsageError)
    assert problem in str(shown.exception)


def test_several_processes_spread_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = ["eval", str(checkpoint), "--device-map", "auto", "--results", str(tmp_path)]
    with pytest.raises(UsageError, match="there are several"):
        CliRunner().invoke(app, line, catch_exceptions=False)


def test_an_adapter_is_merged_on_one_device(checkpoint: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load_model(checkpoint), LoraConfig(target_modules=["q_proj"], r=2))
    adapted.peft_config["default"].base_model_name_or_path = str(checkpoint)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is an adapter"):
        load_model(tmp_path, device_map="auto")
    assert torch.is_tensor(next(load_model(tmp_path, device="cpu").parameters()))
