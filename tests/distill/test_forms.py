"""Rows as people have them: every form is read, what cannot be used is counted with its reason."""

import base64
import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from kd_bench.distill.conversations import read_conversations
from kd_bench.distill.data import FORMS, Conversation
from kd_bench.distill.encoding import ConversationDataset, Encoder
from kd_bench.distill.recipe import DataSource
from kd_bench.errors import UsageError
from tests.distill.test_chat import encoded_image
from tests.support import tiny
from tests.support.chat_templates import PUBLIC

ASKED, SAID = "what colour ?", "red"
LLAVA = {
    "id": "a",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": f"<image>\n{ASKED}"},
        {"from": "gpt", "value": SAID},
    ],
}
URI = "data:image/png;base64," + base64.b64encode(encoded_image()).decode()


def openai(part: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [part, {"type": "text", "text": ASKED}]},
            {"role": "assistant", "content": [{"type": "text", "text": SAID}]},
        ]
    }


def turn(**more: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": ASKED}
    return {"messages": [asked, {"role": "assistant", "content": SAID, **more}]}


def asked(**more: Any) -> dict[str, Any]:
    row = turn()
    row["messages"][0] |= more
    return row


def test_two_keys_that_agree_are_one(tmp_path: Path) -> None:
    row = turn(value=SAID, **{"from": "gpt"}, weight=1.0)
    row |= {"system": "be brief", "system_prompt": "be brief", "prompt": ASKED}
    (found,), broken = read(written(tmp_path, [row]))
    assert [each.pieces[0] for each in found.turns] == ["be brief", ASKED, SAID]
    assert broken == []


def written(folder: Path, rows: list[Any], name: str = "data.json") -> Path:
    tiny.picture("red").save(folder / "a.png")
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read(path: Path, **more: Any) -> tuple[list[Conversation], list[tuple[str, str]]]:
    return read_conversations(DataSource(path=str(path), **more))


ONE_IMAGE = {  # each is one image before one question, and one answer
    "llava": LLAVA,
    "image_url": openai({"type": "image_url", "image_url": {"url": "a.png"}}),
    "image_url as text": openai({"type": "image_url", "image_url": "a.png"}),
    "data uri": openai({"type": "image_url", "image_url": {"url": URI}}),
    "qwen": openai({"type": "image", "image": "a.png"}),
    "qwen without types": openai({"image": "a.png"}),
    "trl": {**openai({"type": "image"}), "images": ["a.png"]},
    "path": openai({"type": "image", "path": "a.png"}),
    "null beside": {**LLAVA, "images": None, "video": None, "system": None},
    "null image": {**LLAVA, "image": None, "images": ["a.png"]},
    "arrow union": openai({"type": "image", "image": "a.png", "text": None}),
    "arrow text": {
        "images": ["a.png"],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "text": None},
                    {"type": "text", "text": None},
                    {"type": "text", "text": ASKED},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": SAID, "image": None}]},
        ],
    },
    "prompt and completion": {"images": ["a.png"], "prompt": ASKED, "completion": SAID},
    "prompt of messages": {
        "images": ["a.png"],
        "prompt": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}
        ],
        "completion": [{"role": "assistant", "content": SAID}],
    },
    "ms-swift": {"query": f"<image>{ASKED}", "response": SAID, "images": ["a.png"]},
    "llama-factory": {
        "messages": [
            {"role": "user", "content": f"<image>{ASKED}"},
            {"role": "assistant", "content": SAID},
        ],
        "images": ["a.png"],
    },
    "alpaca": {"instruction": f"<image>{ASKED}", "input": "", "output": SAID, "images": ["a.png"]},
    "image of a turn": {
        "messages": [
            {"role": "user", "content": ASKED, "images": ["a.png"]},
            {"role": "assistant", "content": SAID},
        ]
    },
    "marked image of a turn": {
        "messages": [
            {"role": "user", "content": f"<image>{ASKED}", "image": {"path": "a.png"}},
            {"role": "assistant", "content": SAID, "images": []},
        ]
    },
    "anthropic": openai(
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": URI.split(",")[1]},
        }
    ),
    "indexed": {**openai({"type": "image", "index": 1, "detail": "high"}), "images": ["a.png"]},
    "where it is from": {
        **LLAVA,
        "source": "coco/val/1.jpg",
        "dataset": "coco",
        "model": "x",
        "image_id": "1.jpg",
        "width": 4,
        "height": 4,
        "task": "vqa",
        "score": 0.5,
        "flickr_url": "http://x.org/2.jpg",
    },
    "numbers of bytes": {**LLAVA, "image": {"bytes": list(encoded_image()), "path": "a.png"}},
    "decoded": openai({"type": "image", "image": tiny.picture("red")}),
    "decoded, of the row": {**LLAVA, "image": [tiny.picture("red")]},
    "cauldron": {
        "images": [{"bytes": encoded_image(), "path": None}],
        "texts": [{"user": ASKED, "assistant": SAID, "source": "x"}],
    },
}


@pytest.mark.parametrize("name", list(ONE_IMAGE))
def test_every_form_is_read(tmp_path: Path, name: str) -> None:
    from kd_bench.distill.data import conversation_of

    tiny.picture("red").save(tmp_path / "a.png")
    found = conversation_of(ONE_IMAGE[name], 3, tmp_path)
    turns = [turn for turn in found.turns if turn.role != "system"]
    assert [turn.role for turn in turns] == ["user", "assistant"]
    assert tuple(piece for piece in turns[0].pieces if piece != "") == (None, ASKED)
    assert turns[1].pieces == (SAID,)
    assert len(found.images) == 1
    assert found.images[0] == tmp_path / "a.png" or isinstance(found.images[0], bytes)
    has_id = "id" in ONE_IMAGE[name]
    assert found.given_up("why") == (("a", "why (row 3)") if has_id else ("3", "why"))


def test_earlier_turns_of_a_history_come_first(tmp_path: Path) -> None:
    row = {
        "system": "be brief",
        "history": [["one ?", "two"], ["three ?", "four"]],
        "query": ASKED,
        "response": SAID,
    }
    (found,), _ = read(written(tmp_path, [row]))
    assert [turn.pieces[0] for turn in found.turns] == [
        "be brief", "one ?", "two", "three ?", "four", ASKED, SAID,
    ]  # fmt: skip
    row = {"instruction": "add", "input": "1 and 2", "output": "3"}
    (found,), _ = read(written(tmp_path, [row]))
    assert [turn.pieces[0] for turn in found.turns] == ["add\n1 and 2", "3"]


@pytest.mark.parametrize(
    "row,reason",
    [
        ({**LLAVA, "video": "a.mp4"}, "video is not supported"),
        (openai({"type": "video", "video": "a.mp4"}), "'video' is not supported"),
        (openai({"type": "text", "text": "x", "image": "a.png"}), "not text alone"),
        (openai({"type": "image", "image": "a.png", "text": "x"}), "holds text"),
        (openai({"type": "text", "txt": "x"}), "not text alone"),
        (openai({"type": "image_url", "image_url": "https://x.org/a.png"}), "download it first"),
        (openai({"type": "image_url", "image_url": "data:image/png;base64,%"}), "base64"),
        ({"images": ["a.png"], "messages": [{"role": "user", "content": ["x"]}]}, "a part of a"),
        ({"picture": "a.png", "query": "x", "response": "y"}, "'picture' looks like an image"),
        ({"image": {"bytes": "abc"}, "query": "x", "response": "y"}, "bytes are not bytes"),
        ({"image": {"bytes": [1, 999]}, "query": "x", "response": "y"}, "bytes are not bytes"),
        ({"question": "x", "reply": "y"}, "keys: question, reply.*known are: conversations, texts"),
        ({"query": "\ud800", "response": "y"}, "lone surrogate"),
        ({"image": "a\0.png", "query": "x", "response": "y"}, "no file name"),
        ({"image": "a" * 300, "query": "x", "response": "y"}, "no file name"),
        ({"query": "x", "response": "see <image>", "image": "a.png"}, "an answer holds <image>"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown speaker"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown speaker 'tool'"),
        (
            {"messages": [{"role": "assistant", "content": "x", "weight": 0}]},
            "weight=0 is not supported",
        ),
        (turn(weight=0.5), "weight=0.5 is not supported"),
        (turn(reasoning_content="hm"), "reasoning_content is not supported"),
        (turn(value="other"), "value and content both"),
        (turn(**{"from": "human"}), "from and role contradict"),
        ({**turn(), "conversations": LLAVA["conversations"]}, "conversations and messages both"),
        ({**turn(), "system": "x", "system_prompt": "y"}, "system and system_prompt both"),
        ({**turn(), "rejected_response": "blue"}, "rejected_response is not supported"),
        ({**turn(), "history": [["a", "b"]]}, "its key history is not read"),
        ({"query": "<video>what", "response": "y"}, "holds <video>"),
        ({**LLAVA, "Video": "a.mp4"}, "Video is not supported"),
        ({**LLAVA, "video_path": "a.mp4"}, "video_path is not supported"),
        ({**LLAVA, "audio_path": "a.wav"}, "audio_path is not supported"),
        (asked(videos=["a.mp4"]), "video is not supported"),
        (asked(audio="a.wav"), "audio is not supported"),
        (asked(picture="a.png"), "'picture' looks like an image"),
        (asked(content="<image>", images=["a.png", "a.png"]), "1 <image> marks for 2 images of a"),
        (asked(content="", text="q"), "turn's key 'text' is not read"),
        (asked(content="", question="q"), "turn's key 'question' is not read"),
        (asked(text="other"), "turn's key 'text' is not read"),
        (asked(content="", text=["q"]), "turn's key 'text' is not read"),
        (turn(images=["a.png"]), "an answer holds an image"),
        ({**LLAVA, "image2": "a.png"}, "'image2' looks like an image"),
        ({**LLAVA, "image_path": "a.png"}, "'image_path' looks like an image"),
        ({**turn(), "image_path": "pictures/1"}, "'image_path' looks like an image"),
        ({**turn(), "file": "a.HEIC"}, "'file' looks like an image"),
        ({**turn(), "file": "a.jfif"}, "'file' looks like an image"),
        ({**turn(), "file": "a.png?s=1"}, "'file' looks like an image"),
        ({**turn(), "file": URI}, "'file' looks like an image"),
        ({**turn(), "file": [{"path": "a.png"}]}, "'file' looks like an image"),
        ({**turn(), "meta": {"image": "1"}}, "'meta' looks like an image"),
        (
            {"texts": [{"user": "x", "assistant": "y", "image": "a.png"}]},
            "'image' looks like an image",
        ),
        (openai({"type": "text", "text": "q", "video": "a.mp4"}), "not text alone"),
        (openai({"type": "text", "text": "q", "content": "more"}), "not text alone"),
        (
            openai({"type": "image", "image": "a.png", "image_url": "b.png"}),
            "both image and image_url",
        ),
        (openai({"type": "image", "image": "a.png", "video": "a.mp4"}), "holds 'video', too"),
        (openai({"type": "image", "source": {"type": "file", "file_id": "1"}}), "part's source"),
        ({**LLAVA, "image": {"bytes": 10**11}}, "bytes are not bytes"),
        ({**LLAVA, "image": {"bytes": True}}, "bytes are not bytes"),
        ({**LLAVA, "image": {"bytes": [True]}}, "bytes are not bytes"),
        ({**LLAVA, "image": {"path": "a.png", "url": "b.png"}}, "both path and url"),
        ({"\ud800": "x"}, r"its form is not known \(keys: \?\)"),
        (openai({"type": "text", "text": "<audio>"}), "holds <audio>"),
    ],
)
def test_what_would_be_dropped_is_counted(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    found, broken = read(written(tmp_path, [LLAVA, row]))
    assert [entry.id for entry in found] == ["a"]
    ((name, why),) = broken
    assert name == "1" or why.endswith("(row 1)")
    assert re.search(reason, why)


@pytest.mark.parametrize("depth", [120, 500, 700, 950])
@pytest.mark.parametrize("key", ["id", "meta", "query", "image"])
def test_a_row_nested_too_deep_is_counted(tmp_path: Path, depth: int, key: str) -> None:
    from kd_bench.distill.data import Unreadable, conversation_of, identifier_of

    value: Any = []
    for _ in range(depth):
        value = [value]
    row = {"query": "x", "response": "y", key: value}
    assert isinstance(identifier_of(row, 3), str)
    with pytest.raises(Unreadable, match="nested too deep"):
        conversation_of(row, 3, tmp_path)


def test_an_empty_image_is_text_only(tmp_path: Path) -> None:
    row = {
        "image": "",
        "conversations": [{"from": "human", "value": "x"}, LLAVA["conversations"][1]],
    }
    (found,), broken = read(written(tmp_path, [row]))
    assert (found.images, broken) == ((), [])


def test_limit_and_skip_come_first(tmp_path: Path) -> None:
    path = written(tmp_path, [LLAVA, 3, LLAVA, LLAVA, *["broken"] * 20])
    found, broken = read(path, skip=2, limit=2)
    assert (len(found), broken) == (2, [])


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    tiny.picture("red").save(tmp_path / "a.png")
    rows = [{"query": f"one{mark}two", "response": "y"} for mark in "\u2028\u2029\x85\x0b\x1c"]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    for name in ("data.jsonl", "lines.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        found, broken = read(tmp_path / name)
        assert (len(found), broken) == (5, [])
        assert found[0].turns[0].pieces == ("one\u2028two",)
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([LLAVA]).encode())
    assert len(read(tmp_path / "bom.json")[0]) == 1


def test_a_torn_line_is_counted(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"query": "x", "response": "y"}) + "\n{")
    found, broken = read(tmp_path / "data.jsonl")
    assert len(found) == 1
    assert broken[0][0] == "1"
    assert "not valid JSON" in broken[0][1]


def test_every_form_has_a_row_here() -> None:
    from kd_bench.distill.data import form_of

    assert {form_of(row) for row in ONE_IMAGE.values()} == set(FORMS)


VALUES: tuple[Any, ...] = (
    None, 0, -1, 1.5, True, "", "x", "<image>", "\ud800", "a\0b", "</s>", "<|im_end|>", [], [None],
    ["x"], [["x"]], {}, {"type": "image"}, {"bytes": "abc"}, {"bytes": [300]}, {"path": 3}, "b.png",
    "wide.png", "cut.png", "big.png", [1], {"text": 3}, "x" * 3000, "../x.png",
    "data:image/png;base64,!",
)  # fmt: skip


def mutated(row: Any, rng: random.Random) -> Any:
    """The row with one value exchanged, dropped, renamed or doubled."""
    made = copy.deepcopy(row)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in list(items):
            places.append((value, key))
            if isinstance(each, dict | list):
                walk(each)

    walk(made)
    owner, key = rng.choice(places)
    action = rng.randrange(5)
    if action == 0:
        del owner[key]
    elif action == 1 and isinstance(owner, dict):
        owner[f"{key}s"] = owner.pop(key)
    elif action == 2 and isinstance(owner, list):
        owner.append(copy.deepcopy(owner[key]))
    else:
        owner[key] = rng.choice(VALUES)
    return made


@pytest.mark.parametrize("family", ["llava-1.5", "qwen2.5-vl", "gemma3", "paligemma"])
def test_mutated_rows_are_read_or_counted(tmp_path: Path, family: str) -> None:
    """200 rows: a sample, a reason with the row's number, or one clear error; never another one."""
    from PIL import Image

    tiny.picture("red").save(tmp_path / "a.png")
    Image.new("RGB", (1000, 3)).save(tmp_path / "wide.png")
    Image.new("L", (400, 400)).save(tmp_path / "big.png")
    (tmp_path / "cut.png").write_bytes(encoded_image()[:60])
    rng = random.Random(7)
    sound = [
        json.loads(json.dumps(row, default=list))
        for name, row in ONE_IMAGE.items()
        if "decoded" not in name and "numbers" not in name
    ]
    path = tmp_path / "data.json"
    encoder = Encoder(PUBLIC[family].processor("normalizer"), 512, max_pixels=100_000)
    outcomes = {"learnt": 0, "counted": 0}
    refused: list[str] = []
    for _ in range(200):
        row = mutated(rng.choice(sound), rng)
        path.write_text(json.dumps([row]), encoding="utf-8")
        try:
            found, broken = read(path)
            dataset = ConversationDataset(found, encoder, unreadable=broken)
            lazy = [dataset[index] for index in range(len(found))]
            dataset.prepare()
        except UsageError as error:
            refused.append(str(error))
            continue
        assert len(dataset) + len(dataset.unreadable) == 1, row
        assert all(isinstance(each, dict) for each in lazy) == bool(len(dataset)) or not found
        for name, reason in dataset.unreadable:
            assert name == "0" or reason.endswith("(row 0)")
        outcomes["learnt" if len(dataset) else "counted"] += 1
    assert outcomes["learnt"] > 20
    assert outcomes["counted"] > 40
    assert len(refused) < 20
    assert not any("\n" in line for line in refused)
