"""Right answers in the forms that models give them: upstream's score, and what they say."""

from pathlib import Path

import pytest

from kd_bench.aggregators import aggregate, by_content, unit_statistics
from kd_bench.cli.options import profiles_of
from kd_bench.compare.align import content_statistics
from kd_bench.compare.estimates import CONTENT, Evidence, TaskEvidence, beside
from kd_bench.errors import UsageError
from kd_bench.evals.benchmark import REASONING_TAGS, prepare
from kd_bench.evals.content import Thinking
from kd_bench.evals.run import answer_keys, ask
from kd_bench.evals.scoring import headline, rates, tokens
from kd_bench.records import AMBIGUOUS
from kd_bench.registry import load_task
from tests.support.eval_world import TEN, Parrot, oracle, write_replicas

WRAPPINGS = {
    "bare": "{}",
    "full stop": "{}.",
    "brackets": "({})",
    "bold": "**{}**",
    "stated": "Answer: {}",
    "sentence": "The answer is {}.",
    "boxed": "\\boxed{{{}}}",
    "full-width stop": "{}。",
}
FORGIVEN = {  # what upstream reads through, by benchmark: see the deviations in tasks/README.md
    "pope": {"bare"},
    "mme": {"bare", "full stop", "brackets", "full-width stop"},
    "scienceqa_img": {"bare", "full stop"},
}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replicas(tmp_path_factory.mktemp("replicas"))


def answered(task, folder, wrapping, limit=24, tags=REASONING_TAGS):
    prepared = prepare(load_task(task), folder, limit=limit)
    right = oracle(task)
    parrot = Parrot(prepared, lambda document: wrapping.format(right(document)))
    asked = ask(prepared, parrot, answer_keys(prepared, "parrot"), reasoning_tags=tags)
    content = aggregate(prepared.aggregator, by_content(asked.samples))
    return headline(prepared, asked.samples), content, asked.samples


@pytest.mark.parametrize("form", WRAPPINGS)
@pytest.mark.parametrize("task", TEN)
@pytest.mark.slow
def test_what_a_right_answer_says_is_right_in_every_form(task, form, replicas):
    score, content, _ = answered(task, replicas, WRAPPINGS[form])
    best, _, _ = answered(task, replicas, "{}")
    assert content == pytest.approx(best)
    if task in FORGIVEN:
        assert (score == pytest.approx(best)) == (form in FORGIVEN[task])


# What upstream gives a right answer in each form, on the embedded test sets, in whole points.
UPSTREAM = {
    "bare": (100, 100, 100, 100, 100, 100),
    "full stop": (0, 100, 100, 100, 100, 100),
    "brackets": (0, 100, 0, 100, 100, 100),
    "bold": (0, 25, 0, 0, 100, 30),
    "stated": (0, 0, 0, 0, 100, 100),
    "boxed": (0, 0, 0, 0, 100, 30),
    "full-width stop": (0, 100, 0, 0, 100, 30),
}
IN_TABLE = ("pope", "mme", "scienceqa_img", "vqav2", "mmbench_en", "mmmu")


@pytest.mark.parametrize("form", UPSTREAM)
@pytest.mark.slow
def test_the_form_gap_of_a_right_answer_is_what_upstream_does_not_read(form, replicas):
    for task, score in zip(IN_TABLE, UPSTREAM[form], strict=True):
        _, content, samples = answered(task, replicas, WRAPPINGS[form], limit=None)
        name = prepare(load_task(task), replicas, limit=2).aggregator
        columns = {
            "oracle": unit_statistics(name, samples),
            beside(CONTENT, "oracle"): content_statistics(name, samples),
        }
        values = {run: each.values for run, each in columns.items()}
        task_evidence = TaskEvidence.of(name, columns["oracle"].units, values, 1000)
        gap = Evidence({task: task_evidence}).form_gap(task, ["oracle"])
        assert content == pytest.approx(100)
        assert gap.value == pytest.approx(100 - score, abs=0.5)
        assert gap.interval.low <= gap.value <= gap.interval.high <= 100


@pytest.mark.parametrize("task", TEN)
def test_a_thought_is_left_out_of_what_is_scored_and_stays_in_the_sample(task, replicas):
    thought = "<think>It might be no, or (C).</think>\n\n{}"
    score, content, samples = answered(task, replicas, thought)
    best, _, _ = answered(task, replicas, "{}")
    assert (score, content) == (pytest.approx(best), pytest.approx(best))
    assert samples["answer"].str.startswith("<think>").all()
    assert (samples["status"] == "ok").all()
    assert (samples["thinking_tokens"] <= samples["tokens"]).all()
    spent = samples.assign(tokens=[12, 8] * (len(samples) // 2), thinking_tokens=6)
    assert tokens(spent) == {"answer": 4.0, "thinking": 6.0}
    assert tokens(spent.assign(tokens=0, thinking_tokens=0)) == {}


def test_a_thought_without_an_end_is_cut_off(replicas):
    _, content, samples = answered("pope", replicas, "<think>Yes, I think it is {}")
    assert (samples["status"] == "truncated").all()
    assert rates(samples)["truncated"] == 1.0
    assert content == 0.0


def test_answers_that_may_be_read_in_two_ways_are_wrong_and_counted(replicas):
    _, content, samples = answered("pope", replicas, "{}. Answer: yes")
    clash = samples["target"] == "no"
    assert (samples.loc[clash, "content"] == AMBIGUOUS).all()
    assert rates(samples)["ambiguous"] == clash.mean() > 0
    right = len(samples) - clash.sum()  # each of the others is read as yes, which is wrong
    assert content == pytest.approx(100 * 2 * right / (2 * right + clash.sum()))
    assert "ambiguous" not in rates(answered("pope", replicas, "{}.")[2])


def test_answers_are_scored_as_they_are_without_tags(replicas):
    score, _, _ = answered("pope", replicas, "<think>Hm.</think>{}", tags="none")
    assert score == 0.0


@pytest.mark.parametrize("tags", ["", "[", "{}", '["<a>"]', '[["<a>"]]', '[["<a>", ""]]', "null"])
def test_tags_that_are_no_pairs_are_refused(tags):
    with pytest.raises(UsageError, match="reasoning-tags"):
        Thinking(tags)


@pytest.mark.parametrize(
    "tags, same",
    [
        ('[["<think>","</think>"],["<analysis>","</analysis>"]]', REASONING_TAGS),
        (REASONING_TAGS, REASONING_TAGS),
        ("[]", "none"),
        ('[["◁think▷", "◁/think▷"]]', '[["◁think▷", "◁/think▷"]]'),
    ],
)
def test_tags_of_one_meaning_are_one_protocol(tags, same):
    assert Thinking(tags).tags == same


def test_thoughts_are_found_as_upstream_finds_them():
    thinking = Thinking(REASONING_TAGS)
    assert thinking.answer("<think>a</think> yes") == "yes"
    assert thinking.answer("a thought</think>yes") == "yes"  # the template opened it
    assert thinking.answer("<analysis>x</analysis><think>y</think>no") == "no"
    assert thinking.thought("<think>a</think> yes") == "<think>a</think>"
    assert thinking.thought("yes") == ""
    assert thinking.is_unfinished("<think>a</think><think>b")
    assert not thinking.is_unfinished("yes")


def test_the_thinking_profile_leaves_room_and_no_stop_inside_a_thought(replicas):
    specs = [load_task(task) for task in TEN]
    assert set(profiles_of(["thinking"], specs)) == set(TEN)
    assert profiles_of(["pope=llava", "thinking"], specs)["pope"] == "llava"
    prepared = prepare(load_task("mme"), replicas, profile="thinking", limit=4)
    plain = prepare(load_task("mme"), replicas, limit=4)
    assert prepared.task.config.generation_kwargs["max_new_tokens"] > 1000
    assert prepared.task.config.generation_kwargs["until"] == []
    assert prepared.prompts == plain.prompts
    assert prepared.fingerprint != plain.fingerprint
    assert answer_keys(prepared, "x") != answer_keys(plain, "x")
