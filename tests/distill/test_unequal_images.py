"""A student and a teacher whose processors make other images of one: each is given its own."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kd_bench.distill.compatibility import check_pair, image_difference
from kd_bench.distill.conversations import read_conversations
from kd_bench.distill.data import Unreadable
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.encoding import Collator, Encoder, PairEncoder
from kd_bench.distill.recipe import METHODS, DataSource, load_recipe
from kd_bench.distill.train import train
from kd_bench.distill.vision_language import answer_positions
from kd_bench.errors import UsageError
from tests.support import public_families, tiny

SIDE = 32  # 16 image tokens where the student has 4


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tiny.write_data(tmp_path_factory.mktemp("data"), count=8)
    return read_conversations(DataSource(path=str(path)))[0]


@pytest.fixture(scope="module")
def pair():
    teacher = tiny.model(width=48, layers=2, seed=1, side=SIDE)
    return tiny.model(width=32, seed=2), teacher


def encoded(conversations, **options):
    encoder = PairEncoder(tiny.processor(), tiny.processor(SIDE), **options)
    made = encoder.encode_many(conversations)
    return [
        sample if isinstance(sample, Unreadable) else {**sample, "sample_index": torch.tensor(i)}
        for i, sample in enumerate(made)
    ]


def test_answers_align_one_to_one_behind_prompts_of_different_lengths(conversations):
    for sample in encoded(conversations):
        ours, theirs = sample["labels"], sample["teacher.labels"]
        assert ours[ours != -100].tolist() == theirs[theirs != -100].tolist()
        pictured = "pixel_values" in sample
        assert len(sample["teacher.input_ids"]) - len(sample["input_ids"]) == 12 * pictured
        if pictured:
            assert sample["pixel_values"].shape[-1] == 16
            assert sample["teacher.pixel_values"].shape[-1] == SIDE


def test_the_teacher_is_asked_as_its_own_processor_asks(pair, conversations):
    """KL of a batch against transformers' own logits, sample by sample."""
    student, teacher = pair
    batch = Collator(0)(encoded(conversations))
    items = int((batch["labels"] != -100).sum())
    _, values = Distiller(student, teacher, METHODS["kl"])(batch, items)
    total = 0.0
    sides = [(student, Encoder(tiny.processor())), (teacher, Encoder(tiny.processor(SIDE)))]
    for conversation in conversations:
        logits = []
        for model, encoder in sides:
            sample = encoder.encode(conversation)
            positions = answer_positions(sample["labels"][None])[0]
            given = {"input_ids": sample["input_ids"][None]}
            if "pixel_values" in sample:
                given["pixel_values"] = sample["pixel_values"]
            with torch.no_grad():
                logits.append(model(**given).logits[0][positions])
        ours, theirs = logits
        total += F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="sum").item()
    assert values["kl"].item() == pytest.approx(total / items, rel=1e-4)


def test_a_sample_cut_at_max_length_is_cut_to_the_same_answers(conversations):
    whole = encoded(conversations)
    for limit in (14, 18):
        for sample, before in zip(encoded(conversations, max_length=limit), whole, strict=True):
            if isinstance(sample, Unreadable):
                continue
            kept = sample["labels"][sample["labels"] != -100].tolist()
            theirs = sample["teacher.labels"]
            assert theirs[theirs != -100].tolist() == kept
            answers = before["labels"][before["labels"] != -100].tolist()
            assert kept == answers[: len(kept)]


def test_only_terms_that_share_features_need_equal_images(pair):
    processors = tiny.processor(), tiny.processor(SIDE)
    assert "number of image tokens" in image_difference(*pair, *processors)
    for method in ("kl", "rkl", "jsd", "bild", "dbild"):
        assert check_pair(*pair, *processors, METHODS[method]) is None
    named = {
        "switch-kd": "switch",
        "vsd": "switch",
        "llava-kd": "image_kl",
        "align-kd": "image_mse",
    }
    for method, term in named.items():
        with pytest.raises(UsageError, match=r"student 4, teacher 16") as refused:
            check_pair(*pair, *processors, METHODS[method])
        assert f"The term {term!r} needs" in refused.value.problem


@pytest.mark.parametrize(
    "setting,value",
    [
        ("max_pixels", 256),
        ("do_image_splitting", True),
        ("image_grid_pinpoints", [[16, 32]]),
        ("size", {"height": 8, "width": 8}),
        ("do_pad", True),
        ("resample", 0),
    ],
)
def test_every_setting_of_pixels_counts(setting, value):
    """Some of them show on large images only, so settings are compared, not what they make."""
    ours, theirs = tiny.processor(), tiny.processor()
    models = tiny.model(), tiny.model()
    assert image_difference(*models, ours, theirs) == ""
    setattr(theirs.image_processor, setting, value)
    assert f"differ in {setting}" in image_difference(*models, ours, theirs)
    assert image_difference(*models, theirs, theirs) == ""


def test_what_is_off_or_not_of_pixels_does_not_count():
    ours, theirs = tiny.processor(), tiny.processor()
    theirs.image_processor.do_pad = False
    theirs.image_processor.crop_size = {"height": 9, "width": 9}
    theirs.image_processor.do_convert_rgb = True
    assert image_difference(tiny.model(), tiny.model(), ours, theirs) == ""


@pytest.mark.slow
def test_a_pair_with_unequal_processors_trains_by_kl_and_is_refused_by_switch_kd(tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    tiny.model(width=48, layers=2, seed=1, side=SIDE).save_pretrained(tmp_path / "teacher")
    tiny.processor(SIDE).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UsageError, match=r"student 4, teacher 16.*'switch'"):
        train(load_recipe(recipe))
    logs = []
    for name in ("plain", "filling", "cached"):
        settings = [f"output={tmp_path / name}", "method=kl", "steps=6", "log_every=1"]
        if name != "plain":
            settings.append(f"teacher_cache={tmp_path / 'cache'}")
        final = train(load_recipe(recipe, settings))
        lines = (final.parent / "train_log.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["terms"] for line in lines])
    assert logs[0] == logs[1] == logs[2]
    assert logs[0][-1]["ce"] < logs[0][0]["ce"]


UNEQUAL = {
    "llava-next": ("image_grid_pinpoints", [[28, 56], [56, 28], [56, 56], [84, 28]]),
    "llava-onevision": ("image_grid_pinpoints", [[28, 56], [56, 28], [84, 28]]),
    "qwen2.5-vl": ("size", {"longest_edge": 4704, "shortest_edge": 3136}),
    "smolvlm": ("size", {"longest_edge": 128}),
    "internvl": ("max_patches", 2),
    "gemma3": ("do_normalize", False),
}


def set_in(file, setting, value, under=None):
    content = json.loads(file.read_text())
    (content[under] if under else content)[setting] = value
    file.write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize("family", UNEQUAL)
def test_tiles_and_pixel_limits_may_differ_in_every_family(family, tmp_path):
    setting, value = UNEQUAL[family]
    public_families.save(tmp_path / "student", family)
    teacher = public_families.save(tmp_path / "teacher", family, seed=1)
    set_in(teacher / "processor_config.json", setting, value, under="image_processor")
    if setting == "image_grid_pinpoints":
        set_in(teacher / "config.json", setting, value)
    recipe = tiny.write_recipe(
        tmp_path / "rest", student=str(tmp_path / "student"), teacher=str(teacher)
    )
    for image in (tmp_path / "rest" / "data").glob("*.png"):
        with Image.open(image) as opened:
            opened.resize((300, 110)).save(image)
    questions = tmp_path / "rest" / "data" / "conversations.json"
    rows = [row for row in json.loads(questions.read_text()) if "image" in row]
    questions.write_text(json.dumps(rows))
    with pytest.raises(UsageError, match=rf"{setting}.*The term 'switch' needs"):
        train(load_recipe(recipe))
    final = train(load_recipe(recipe, ["method=kl", "steps=2", f"output={tmp_path / 'kl'}"]))
    lines = (final.parent / "train_log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["terms"]["kl"] > 0
    lineage = json.loads((final / "lineage.json").read_text())
    assert lineage["stages"]["train"]["unreadable"] == []
