"""Pairs that do not fit are refused with both values and the way out; step-zero identities."""

import copy

import pytest
import torch

from kd_bench.distill.compatibility import check_pair, check_terms
from kd_bench.distill.distiller import Distiller, self_divergence, switch_gap
from kd_bench.distill.recipe import METHODS, Term
from kd_bench.distill.vision_language import VisionLanguageModel, answer_positions, seeing_with
from kd_bench.errors import TrainingError, UsageError
from tests.support import tiny

SWITCH = METHODS["switch-kd"]


@pytest.fixture(scope="module")
def teacher():
    return tiny.model(width=48, layers=2, seed=1)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids = torch.tensor([[4, 7, 2, 2, 2, 2, 12, 5, 7, 8, 1], [4, 7, 2, 2, 2, 2, 5, 7, 9, 1, 0]])
    labels = ids.clone()
    labels[:, :8] = -100
    labels[ids == 0] = -100
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": labels,
        "pixel_values": torch.randn(2, 3, 16, 16),
    }


def check(student, teacher, terms=SWITCH, ours=None, theirs=None, **options):
    return check_pair(
        student,
        teacher,
        ours or tiny.processor(),
        theirs or tiny.processor(),
        terms,
        **options,
    )


def test_a_pair_that_fits_passes(teacher):
    assert check(tiny.model(), teacher) is None


def test_another_vision_width_is_refused_for_the_switch_only(teacher):
    narrow = tiny.model(vision_width=24)
    with pytest.raises(UsageError, match=r"vision width.*student 24, teacher 16.*method=dbild"):
        check(narrow, teacher)
    assert check(narrow, teacher, METHODS["dbild"]) is None


def test_another_number_of_image_tokens_is_refused(teacher):
    student = tiny.model()
    student.config.vision_feature_select_strategy = "default"
    with pytest.raises(UsageError, match=r"number of image tokens.*student 3, teacher 4"):
        check(student, teacher)


def test_padding_rows_need_consent(teacher):
    padded = tiny.model(rows=30)
    with pytest.raises(UsageError, match=r"rows: student 30, teacher 22.*truncate_vocabulary=true"):
        check(padded, teacher)
    assert check(padded, teacher, truncate_vocabulary=True) == 22
    assert check(padded, teacher, METHODS["sft"]) is None


def test_other_tokenizers_are_refused_even_with_consent_to_truncate(teacher):
    longer = tiny.processor()
    longer.tokenizer.add_tokens(["purple"])
    with pytest.raises(UsageError, match="student 23 tokens, teacher 22"):
        check(tiny.model(), teacher, ours=longer, truncate_vocabulary=True)


def test_tokenizers_of_one_size_that_number_words_otherwise_are_refused(teacher):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ours = tiny.processor()
    vocabulary = dict(ours.tokenizer.get_vocab())
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ours.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(UsageError, match="'blue' is 8 for the student, 10 for the teacher"):
        check(tiny.model(), teacher, ours=ours)


def test_processors_that_make_other_pixels_are_refused(teacher):
    ours = tiny.processor()
    ours.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(UsageError, match=r"image_mean: student \[0.1, 0.2, 0.3\], teacher \[0.5"):
        check(tiny.model(), teacher, ours=ours)


def test_a_switch_term_needs_eyes_that_learn():
    with pytest.raises(UsageError, match=r"'distil' has a switch term but freezes"):
        check_terms(SWITCH, ["projector", "language_model"], "distil")
    check_terms(SWITCH, ["vision_tower"], "distil")
    check_terms(METHODS["dbild"], ["projector"], "distil")
    off = (Term(loss="ce"), Term(loss="dbild", of="switch", weight=0))
    check_terms(off, ["projector"], "distil")


def test_the_switch_of_equal_eyes_is_the_teacher_to_the_last_bit(teacher, batch):
    student = tiny.model(width=32, seed=2)
    ours, theirs = VisionLanguageModel(student), VisionLanguageModel(teacher)
    assert switch_gap(ours, theirs, batch) > 0
    ours.vision_tower.load_state_dict(theirs.vision_tower.state_dict())
    assert switch_gap(ours, theirs, batch) == 0
    assert self_divergence(theirs, batch) == 0
    distiller = Distiller(student, teacher, SWITCH)
    assert distiller.step_zero(batch) == {"self_divergence": 0, "switch_gap": 0}
    assert Distiller(student, None, METHODS["sft"]).step_zero(batch) == {}


def test_a_teacher_that_never_says_the_same_twice_is_found_out(batch):
    restless = tiny.model(width=48, layers=2, seed=1)
    distiller = Distiller(tiny.model(), restless, SWITCH)
    restless.model.language_model.layers[0].register_forward_hook(
        lambda module, given, output: output + torch.randn_like(output)
    )
    with pytest.raises(TrainingError, match=r"self_divergence is .* must be 0"):
        distiller.step_zero(batch)


def test_a_teacher_with_the_students_eyes_put_in_gives_the_switch_logits(teacher, batch):
    student = tiny.model(width=32, seed=2)
    hybrid = copy.deepcopy(teacher)
    hybrid.model.vision_tower = student.model.vision_tower
    given = {k: v for k, v in batch.items() if k != "labels"}
    answers = answer_positions(batch["labels"])
    ours, theirs = VisionLanguageModel(student), VisionLanguageModel(teacher)
    with torch.no_grad():
        with seeing_with(theirs, ours):
            expected = theirs.lm_head(theirs.hidden_states(batch)[answers])
        torch.testing.assert_close(hybrid(**given).logits[answers], expected)
