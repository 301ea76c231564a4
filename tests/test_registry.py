"""The registry: what it says, and what it says to mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_bench import config
from kd_bench.aggregators import AGGREGATORS
from kd_bench.errors import UsageError
from kd_bench.registry import (
    SKILLS,
    load_suite,
    load_task,
    load_tasks,
    published,
    suite_names,
    task_names,
    tasks_folder,
)
from tests.support.eval_world import TEN


def test_the_ten_in_the_papers_order() -> None:
    assert tuple(spec.id for spec in load_tasks()) == TEN
    assert tuple(load_suite("ten").tasks) == TEN == tuple(load_suite("mini").tasks)
    assert suite_names() == ["mini", "ten"]
    assert (load_suite("ten").data, load_suite("mini").data) == ("hub", "embedded")


def test_every_entry_is_complete() -> None:
    columns = set(published().columns)
    for spec in load_tasks():
        assert spec.aggregator in AGGREGATORS
        assert spec.published.column in columns
        assert spec.profile(None) is spec.profiles[spec.default_profile]
        for profile in spec.profiles.values():
            assert profile.aggregator is None or profile.aggregator in AGGREGATORS
    assert {spec.skill for spec in load_tasks()} == set(SKILLS)
    assert sum(spec.documents for spec in load_tasks()) == 259_200


def test_published_rows_carry_their_sources() -> None:
    frame = published()
    assert len(frame) == 60
    assert frame["source"].notna().all()


def say(name: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_task(name)
    return str(caught.value)


def test_unknown_names_get_a_suggestion_and_the_list(tmp_path: Path) -> None:
    assert "Did you mean 'mmbench_en'?" in say("mmbench")
    assert all(task in say("nonsense") for task in TEN)
    with pytest.raises(UsageError, match="Did you mean 'mini'"):
        load_suite("minni")
    with pytest.raises(UsageError, match=r"pope has no profile 'acuracy'. Did you mean 'accuracy'"):
        load_task("pope").profile("acuracy")
    assert "No such file" in say(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    "old,new,said",
    [
        ("skill: cognition", "skil: cognition", "Did you mean 'skill'?"),
        ("skill: cognition", "skill: seeing", "skill: Input should be"),
        ("scale: 100.0", "scale: many", "scale: expected a number"),
        ("id_columns: [id]", "id_columns: [number]", "column 'number' is used but not declared"),
        ("max_new_tokens: 16", "max_new_tokens: 0", "greater than 0"),
        ("id: gqa", "id: gpa", "the id is 'gpa'. Call the file gpa.yaml."),
    ],
)
def test_mistakes_in_a_file_are_named(old: str, new: str, said: str, tmp_path: Path) -> None:
    text = (tasks_folder() / "gqa.yaml").read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "gqa.yaml"
    file.write_text(text.replace(old, new), encoding="utf-8")
    message = say(str(file))
    assert said in message
    assert "\n" not in message


def test_reading_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from kd_bench.registry import load_tasks; load_tasks();"
        "print([m for m in ('torch', 'lmms_eval', 'transformers', 'pandas') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_a_file_is_parsed_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_tasks()
    parsed: list[str] = []
    parse = config.parse_yaml
    monkeypatch.setattr(config, "parse_yaml", lambda text: parsed.append(text) or parse(text))
    assert [spec.id for spec in load_tasks()] == task_names()
    assert not parsed
    own = tmp_path / "own.yaml"
    for title in ("One", "Two", "Two"):
        text = f"name: own\ntitle: {title}\ntasks: [pope]\ndata: hub\n"
        if not own.exists() or own.read_text(encoding="utf-8") != text:
            own.write_text(text, encoding="utf-8")
            os.utime(own, ns=(len(parsed), len(parsed)))
        assert load_suite(str(own)).title == title
    assert len(parsed) == 2
