"""Training data in its several forms, read the same; what is wrong is named."""

import io
import json

import pytest
from PIL import Image

from kd_bench.distill.conversations import data_digest, read_conversations
from kd_bench.distill.data import Unreadable, open_image
from kd_bench.distill.recipe import DataSource
from kd_bench.errors import UsageError
from tests.support import tiny

TURNS = [
    {"from": "human", "value": "<image>\nwhat colour ?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "and <image> this ?"},
    {"from": "gpt", "value": "blue"},
]


def written(folder, rows, name="data.json"):
    path = folder / name
    if name.endswith("l"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read(path, **options):
    return read_conversations(DataSource(path=str(path), **options))


def test_marks_become_places_in_order(tmp_path):
    (found,), broken = read(
        written(tmp_path, [{"id": 7, "image": ["a.png", "b.png"], "conversations": TURNS}])
    )
    assert broken == []
    assert found.id == "7"
    assert [turn.pieces for turn in found.turns] == [
        (None, "what colour ?"),
        ("red",),
        ("and ", None, " this ?"),
        ("blue",),
    ]
    assert found.images == (tmp_path / "a.png", tmp_path / "b.png")


def test_json_jsonl_and_a_dataset_folder_give_the_same(tmp_path):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    tiny.picture("red").save(tmp_path / "a.png")
    row = {"id": "x", "image": "a.png", "conversations": TURNS[:2]}
    (from_json,), _ = read(written(tmp_path, [row]))
    (from_jsonl,), _ = read(written(tmp_path, [row], "data.jsonl"))
    assert from_json == from_jsonl
    features = Features(
        {
            "id": Value("string"),
            "image": ImageFeature(),
            "conversations": List({"from": Value("string"), "value": Value("string")}),
        }
    )
    Dataset.from_list([{**row, "image": tiny.picture("red")}], features=features).save_to_disk(
        tmp_path / "set"
    )
    (from_folder,), _ = read(tmp_path / "set")
    assert from_folder.turns == from_json.turns
    assert isinstance(from_folder.images[0], bytes)
    left, right = open_image(from_folder.images[0]), open_image(from_json.images[0])
    assert left.tobytes() == right.tobytes()


def test_chat_messages_and_several_pictures_of_a_dataset_folder(tmp_path):
    from datasets import Dataset, DatasetDict, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {
            "images": List(ImageFeature()),
            "messages": List({"role": Value("string"), "content": Value("string")}),
        }
    )
    row = {
        "images": [tiny.picture("red"), tiny.picture("blue")],
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "compare"},
            {"role": "assistant", "content": "two"},
        ],
    }
    DatasetDict({"train": Dataset.from_list([row], features=features)}).save_to_disk(tmp_path / "s")
    (found,), _ = read(tmp_path / "s")
    assert [turn.role for turn in found.turns] == ["system", "user", "assistant"]
    assert found.turns[1].pieces == (None, None, "compare")  # pictures without marks come first
    assert len(found.images) == 2


def test_images_inside_the_messages_of_a_dataset_folder(tmp_path):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    part = {"type": Value("string"), "text": Value("string"), "image": ImageFeature()}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)})})
    asked = [
        {"type": "image", "image": tiny.picture("red")},
        {"type": "text", "text": "what colour ?"},
    ]
    said = [{"type": "text", "text": "red"}]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
    Dataset.from_list([row], features=features).save_to_disk(tmp_path / "s")
    (found,), broken = read(tmp_path / "s")
    assert broken == []
    assert found.turns[0].pieces == (None, "what colour ?")
    assert open_image(found.images[0]).tobytes() == tiny.picture("red").tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA", "I;16"])
def test_a_decoded_image_is_what_its_file_would_be(tmp_path, mode):
    from kd_bench.distill.data import conversation_of

    Image.linear_gradient("L").convert(mode).save(path := tmp_path / "a.tiff")
    with Image.open(path) as opened:
        row = {"image": opened, "query": "what ?", "response": "grey"}
        (image,) = conversation_of(row, 0, tmp_path).images
    assert open_image(image).tobytes() == open_image(path).tobytes()


def test_text_only_and_limits(tmp_path):
    rows = [{"id": str(i), "conversations": TURNS[1:2] * 2} for i in range(6)]
    found, _ = read(written(tmp_path, rows), skip=1, limit=3)
    assert [entry.id for entry in found] == ["1", "2", "3"]
    assert found[0].images == ()


@pytest.mark.parametrize(
    "row,reason",
    [
        ("text", "not a mapping"),
        ({"conversations": []}, "no conversations"),
        ({"conversations": TURNS[:2]}, "1 <image> marks for 0 images"),
        ({"image": ["a.png"], "conversations": TURNS}, "2 <image> marks for 1 images"),
        ({"conversations": [{"from": "dog", "value": "woof"}]}, "unknown speaker 'dog'"),
        ({"conversations": [{"from": "human"}]}, "no text"),
        ({"conversations": [{"from": "human", "value": "hm"}]}, "no answer"),
        ({"conversations": [3]}, "not a mapping"),
        ({"image": 5, "conversations": TURNS[:2]}, "no name"),
    ],
)
def test_a_malformed_row_is_reported_not_raised(tmp_path, row, reason):
    sound = {"id": "ok", "conversations": TURNS[1:2] * 2}
    found, broken = read(written(tmp_path, [sound, row]))
    assert [entry.id for entry in found] == ["ok"]
    assert len(broken) == 1
    assert reason in broken[0][1]


@pytest.mark.parametrize(
    "name", ["../a.png", "x/../../a.png", "/etc/passwd", "..", "C:\\a.png", "..\\a.png"]
)
def test_a_picture_outside_of_its_folder_is_refused(tmp_path, name):
    path = written(tmp_path, [{"id": "evil", "image": name, "conversations": TURNS[:2]}])
    with pytest.raises(UsageError, match="Sample evil names the image"):
        read(path)


@pytest.mark.parametrize(
    "content,message",
    [
        ("{", "not valid JSON"),
        ('{"a": 1}', "expected a list"),
        ("[]", "no conversations"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="There is no training data at"):
        read(tmp_path / "absent.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="not a dataset folder"):
        read(tmp_path / "folder")


def test_unreadable_pictures_say_why(tmp_path):
    with pytest.raises(Unreadable, match=r"a\.png is missing"):
        open_image(tmp_path / "a.png")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "png")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:-900])
    with pytest.raises(Unreadable, match=r"cut\.png"):
        open_image(tmp_path / "cut.png")
    with pytest.raises(Unreadable):
        open_image(b"no picture")


def test_pictures_of_any_mode_come_as_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        Image.new(mode, (4, 4)).save(path := tmp_path / f"{mode}.tiff")
        assert open_image(path).mode == "RGB"


def test_the_digest_follows_words_and_pixels(tmp_path):
    tiny.picture("red").save(tmp_path / "a.png")
    path = written(tmp_path, [{"id": "x", "image": "a.png", "conversations": TURNS[:2]}])
    first = data_digest(read(path)[0])
    assert first == data_digest(read(path)[0])
    assert (first["conversations"], first["images"], first["pictures"]) == (1, 1, "content")
    tiny.picture("blue").save(tmp_path / "a.png")
    second = data_digest(read(path)[0])
    other = written(tmp_path, [{"id": "x", "image": "a.png", "conversations": TURNS[:4]}])
    assert len({first["sha256"], second["sha256"], data_digest(read(other)[0])["sha256"]}) == 3
