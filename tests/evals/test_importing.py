"""What `runs import` takes from another harness, and what it refuses by name."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kd_bench.errors import KdBenchError, UsageError
from kd_bench.evals.checkpoint import trained_name
from kd_bench.evals.engine import MemoryMeter
from kd_bench.evals.importing import import_results
from kd_bench.store import catalogue, find_run, set_baseline

ANSWERS = ("a", "b", "a", "a")


def entries(answers: tuple[Any, ...] = ANSWERS) -> list[dict[str, Any]]:
    return [
        {"doc_id": key, "input": f"q{key}", "target": "a", "filtered_resps": [said],
         "exact_match": float(said == "a")} for key, said in enumerate(answers)
    ]  # fmt: skip


def written(folder: Path, lines: list[Any] | bytes | None = None, **changes: Any) -> Path:
    """Results and log of a TextVQA evaluation as lmms-eval writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome = {
        "results": {"textvqa_val": {"exact_match,none": 0.75}},
        "config": {"model": "llava_hf", "model_args": "pretrained=/far/away/kl-seed0/final"},
        "n-samples": {"textvqa_val": {"original": 4, "effective": 4}},
        **changes,
    }
    (folder / "t_results.json").write_text(json.dumps(outcome), encoding="utf-8")
    log = folder / "t_samples_textvqa_val.jsonl"
    if isinstance(lines, bytes):
        log.write_bytes(lines)
    else:
        text = "".join(json.dumps(entry) + "\n" for entry in (lines or entries()))
        log.write_text(text, encoding="utf-8")
    return folder


def refused(folder: Path, tmp_path: Path, **options: Any) -> str:
    """The refusal of an import, after it has been seen to leave nothing behind."""
    with pytest.raises(KdBenchError) as error:
        import_results(folder, tmp_path / "results", **options)
    assert not (tmp_path / "results").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_sound_log_is_imported(tmp_path: Path) -> None:
    (run,) = import_results(written(tmp_path / "log"), tmp_path / "results")
    manifest = run.manifest
    assert run.result("textvqa").score == 75.0
    assert (manifest.model.name, manifest.model.seed, manifest.model.method) == (
        "kl-seed0",
        None,
        "",
    )
    assert manifest.protocol.limit == 4  # of the registry's 5,000
    assert run.samples("textvqa")["answer"].tolist() == list(ANSWERS)


def test_another_score_than_the_samples_give_is_refused_or_noted(tmp_path: Path) -> None:
    folder = written(tmp_path / "log", results={"textvqa_val": {"exact_match,none": 0.2}})
    told = refused(folder, tmp_path)
    assert "results.json says 20.00, the samples give 75.00" in told
    assert "--trust-samples" in told
    (run,) = import_results(folder, tmp_path / "results", trust_samples=True)
    assert run.result("textvqa").score == 75.0
    assert "results.json says 20.00" in " ".join(run.result("textvqa").notes)


@pytest.mark.parametrize(
    "lines, told",
    [
        ([*entries(), *entries()], "4 documents are there more than once, the first is doc_id 0"),
        ([*entries(), {**entries()[1], "exact_match": 1.0}], "doc_id 1"),
        (entries()[:2], "has 2 of 4 documents"),
        ([entries()[0], *entries()[2:]], "has 3 of 4 documents, the first is doc_id 1"),
        ([{**entry, "exact_match": 7} for entry in entries()], "the score 7 of document 0"),
        ([{**entry, "exact_match": float("nan")} for entry in entries()], "the score nan"),
        ([{**entry, "exact_match": None} for entry in entries()], "cannot be read as textvqa"),
        ([{**entry, "doc_id": "x"} for entry in entries()], "doc_id is 'x', not a number"),
        ([{**entry, "doc_id": True} for entry in entries()], "doc_id is True, not a number"),
        ([[1, 2]], "is not a logged sample"),
        ([{"doc_id": 0}], "documents"),
        (b"", "holds no sample"),
        (b"\n\n", "holds no sample"),
        (b"[" * 100_000, "is not a logged sample"),
        (b'\xff\xfe{"doc_id": 0}\n', "is not a logged sample"),
    ],
)
def test_what_is_wrong_with_a_log_is_named(tmp_path: Path, lines: Any, told: str) -> None:
    folder = written(tmp_path / "log", lines)
    if isinstance(lines, bytes) and not lines:
        (folder / "t_samples_textvqa_val.jsonl").write_bytes(b"")
    message = refused(folder, tmp_path)
    assert told in message
    assert "t_samples_textvqa_val.jsonl" in message


@pytest.mark.parametrize(
    "changes",
    [{"config": None}, {"results": None}, {"results": []}, {"config": "x"}],
    ids=str,
)
def test_a_results_file_without_its_parts_is_refused(tmp_path: Path, changes: Any) -> None:
    assert "is not lmms-eval's results" in refused(written(tmp_path / "log", **changes), tmp_path)


@pytest.mark.parametrize("score", [7, float("nan"), float("inf")])
def test_a_score_that_cannot_be_is_refused(tmp_path: Path, score: float) -> None:
    results = {"textvqa_val": {"exact_match,none": score}}
    assert "results.json says" in refused(written(tmp_path / "log", results=results), tmp_path)


def test_a_limited_log_is_a_limited_run(tmp_path: Path) -> None:
    for number, changes in enumerate(
        (
            {"n-samples": {"textvqa_val": {"original": 5000, "effective": 4}}},
            {"config": {"model": "m", "limit": 4}, "n-samples": None},
        )
    ):
        folder = written(tmp_path / f"log{number}", **changes)
        (run,) = import_results(folder, tmp_path / f"results{number}")
        assert run.manifest.protocol.limit == 4


def test_lines_end_at_a_line_feed_alone(tmp_path: Path) -> None:
    said = entries(("a\u2028\u0085", "b\x1c\x0b", "a", "a"))
    for entry in said:
        entry["input"] += "\u2029\x85"
        entry["exact_match"] = float(entry["filtered_resps"][0].startswith("a"))
    log = "".join(json.dumps(entry, ensure_ascii=False) + "\r\n" for entry in said).encode()
    (run,) = import_results(written(tmp_path / "log", log), tmp_path / "results")
    assert run.samples("textvqa")["answer"].tolist()[0] == "a\u2028\u0085"


@pytest.mark.parametrize("escaped", [True, False])
def test_half_a_character_is_replaced_and_counted(tmp_path: Path, escaped: bool) -> None:
    said = entries(("a", "b \ud83d", "a", "a"))
    said[3]["input"] += "\udc00"
    text = "".join(json.dumps(entry, ensure_ascii=escaped) + "\n" for entry in said)
    folder = written(tmp_path / "log", text.encode("utf-8", "surrogatepass"))
    (run,) = import_results(folder, tmp_path / "results")
    assert run.samples("textvqa")["answer"].tolist()[1] == "b \ufffd"
    assert "2 samples hold half a character" in " ".join(run.result("textvqa").notes)


@pytest.mark.parametrize("name", ["t_results.json", "t_samples_textvqa_val.jsonl"])
@pytest.mark.parametrize("filling", [b"\0", b"\n", b" "])
def test_a_gigabyte_of_nothing_is_refused_within_bounds(
    tmp_path: Path, name: str, filling: bytes
) -> None:
    folder = written(tmp_path / "log")
    with (folder / name).open("wb") as stream:
        if filling == b"\0":
            stream.truncate(1 << 30)  # a sparse file
        else:
            for _ in range(96):
                stream.write(filling * (1 << 20))
    import_results(written(tmp_path / "before"), tmp_path / "before")  # loads what is not yet there
    memory = MemoryMeter()
    assert name in refused(folder, tmp_path)
    assert (memory.peak() or 0) < 64 << 20  # less than the file, so that reading it whole is seen


def test_two_imports_do_not_replace_each_other(tmp_path: Path) -> None:
    one = written(tmp_path / "one")
    wrong = {"textvqa_val": {"exact_match,none": 0.0}}
    two = written(tmp_path / "two", entries(("b", "c", "d", "e")), results=wrong)
    results = tmp_path / "results"
    (first,) = import_results(one, results)
    (second,) = import_results(two, results)
    assert first.manifest.model.name == "kl-seed0"
    assert second.manifest.model.name.startswith("kl-seed0-")
    assert find_run(results, "kl-seed0").result("textvqa").score == 75.0
    with pytest.raises(UsageError, match="with other answers is there already"):
        import_results(two, results, name="kl-seed0")
    assert import_results(one, results) == [first]  # the same again is the same
    shown, left_out = catalogue(results).board("imported")
    assert len(shown) == 2
    assert left_out == []


@pytest.mark.parametrize(
    "path, name",
    [
        ("/a/switch-kd-seed0/final", "switch-kd-seed0"),
        ("runs/kl/checkpoint-400/", "kl"),
        ("C:\\models\\kl\\final", "kl"),
        ("org/llava-0.5b", "llava-0.5b"),
        ("final", "final"),
    ],
)
def test_a_checkpoint_is_named_after_its_training(path: str, name: str) -> None:
    assert trained_name(path) == name


@pytest.mark.parametrize("told", [{"original": "4", "effective": 4}, {"effective": 4.5}, "4", [4]])
def test_counts_that_are_no_numbers_are_refused(tmp_path: Path, told: Any) -> None:
    folder = written(tmp_path / "log", **{"n-samples": {"textvqa_val": told}})
    assert "not a number of documents" in refused(folder, tmp_path)


@pytest.mark.parametrize("labels", [{"seed": -1}, {"name": "a\x1b[2J"}, {"name": "a\nb"}], ids=str)
def test_labels_that_cannot_be_are_refused(tmp_path: Path, labels: dict[str, Any]) -> None:
    refused(written(tmp_path / "log"), tmp_path, **labels)


def test_results_without_a_log_and_the_reverse_are_said(tmp_path: Path) -> None:
    folder = written(tmp_path / "log", results={"gqa": {"exact_match,none": 0.5}})
    (run,) = import_results(folder, tmp_path / "results")
    assert run.manifest.notes[1:] == [
        "gqa has a score and no sample log: it is not imported",
        "textvqa has a sample log and no score in results.json",
    ]


def test_a_few_documents_are_no_baseline(tmp_path: Path) -> None:
    (run,) = import_results(written(tmp_path / "log"), tmp_path / "results")
    with pytest.raises(KdBenchError, match="limited to 4 documents"):
        set_baseline(tmp_path / "results", "main", run)


# --- every form that lmms-eval 0.1 to 0.7 has given its logs -------------------------------------

FORMS = ("0.2.0", "0.2.4", "0.4", "0.7", "renamed", "samples folder", "samples beside", "bare")
STAMP = "20260102_030405"


def as_logged(form: str, entry: dict[str, Any], answer: str, prompt: str) -> dict[str, Any]:
    """A sample as `evaluation_tracker` of that version writes it; `entry` holds its metrics."""
    document = {"question": "the data set's own words", "id": 1}
    if form == "0.2.0":  # evaluator.py, dumped as it was
        return {"target": "a", "doc": document, "arguments": [[prompt, 3, "task", "test"]],
                "resps": [[answer]], "filtered_resps": [answer], **entry}  # fmt: skip
    if form in ("0.2.4", "renamed"):
        return {"doc": document, "target": "a", "arguments": {"0": "max_new_tokens", "1": "until"},
                "resps": [[answer]], "filtered_resps": [answer], "doc_hash": "0",
                "prompt_hash": "1", "target_hash": "2", **entry, "input": prompt}  # fmt: skip
    if form == "bare":
        return {"target": "a", "resps": answer, "doc": {"question": prompt}, **entry}
    if form == "0.7":
        told: dict[str, Any] = {"filtered_resps": answer, "token_counts": [{"output_tokens": 1}]}
    else:
        told = {"filtered_resps": [answer]}
    return {"target": "a", **told, "doc_hash": "0", **entry, "input": prompt}


def logged(folder: Path, form: str, task: str, metrics: Any, said: list[Any]) -> Path:
    """One benchmark's results and log, laid out as that version lays them out.

    Args:
        said: metrics, answer and prompt of each document.
    """
    outcome = {"results": {task: {"alias": task, **metrics}}}
    settings = {"model": "llava_hf", "model_args": "pretrained=org/llava-0.5b", "limit": None}
    outcome["model_configs" if form == "0.2.0" else "config"] = settings
    if form != "0.2.0":
        outcome["n-samples"] = {task: {"original": len(said), "effective": len(said)}}
    samples = [{"doc_id": n, **as_logged(form, *each)} for n, each in enumerate(said)]
    beside = f"{STAMP}_samples_{task}.jsonl"
    results, log = {
        "0.2.0": ("0102_0304_out_llava_hf_model_args_0a1b2c/results.json",
                  f"0102_0304_out_llava_hf_model_args_0a1b2c/{task}.json"),
        "renamed": (f"results_{STAMP}.json", f"samples_{task}_{STAMP}.jsonl"),
        "samples folder": (f"{STAMP}_results.json", f"samples/{task}/{beside}"),
        "samples beside": (f"results/{STAMP}_results.json", f"samples/{beside}"),
        "bare": ("results.json", f"samples/{task}.jsonl"),
    }.get(form, (f"{STAMP}_results.json", beside))  # fmt: skip
    for name in (results, log):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / results).write_text(json.dumps(outcome, indent=4))
    if form == "0.2.0":
        whole = {"args": {"tasks": task}, "model_configs": {"task": task}, "logs": samples,
                 "time": "0102_0304"}  # fmt: skip
        (folder / log).write_text(json.dumps(whole, indent=4, ensure_ascii=False))
    else:
        lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in samples]
        (folder / log).write_text("".join(lines))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_log_says_the_same(tmp_path: Path, form: str) -> None:
    said = [
        ({"exact_match": float(a == "[a]")}, a, f"q{n}, 是") for n, a in enumerate(["[a]", "b"])
    ]
    folder = logged(tmp_path / "log", form, "gqa", {"exact_match,none": 0.5}, said)
    (run,) = import_results(folder, tmp_path / "results")
    samples = run.samples("gqa")
    assert samples["answer"].tolist() == ["[a]", "b"]
    assert samples["question"].tolist() == ["q0, 是", "q1, 是"]
    assert samples["score"].tolist() == [1.0, 0.0]
    assert (run.manifest.model.name, run.manifest.protocol.limit) == ("llava-0.5b", 2)
    assert run.result("gqa").score == 50.0


@pytest.mark.parametrize("form", FORMS)
def test_mme_by_its_old_name_and_its_new_one(tmp_path: Path, form: str) -> None:
    metric = "mme_percetion_score" if form == "0.2.0" else "mme_perception_score"
    row = {"question_id": "1.png", "category": "color"}
    said = [
        ({metric: {**row, "score": float(answer == "Yes")}}, answer, "red?")
        for answer in ("Yes", "No")
    ]
    told = {f"{metric},none": 50.0, f"{metric}_stderr,none": "N/A"}
    folder = logged(tmp_path / "log", form, "mme", told, said)
    (run,) = import_results(folder, tmp_path / "results")
    result = run.result("mme")
    assert (result.score, result.units) == (25.0, 1)
    # The log's target is no yes or no: whatever is said, no answer is right by its content.
    assert result.metrics == {"mme_perception_score": 50.0, "kd_bench_content": 0.0}
    wrong = {f"{metric},none": 200.0}
    assert "results.json says" in refused(
        logged(tmp_path / "other", form, "mme", wrong, said), tmp_path / "elsewhere"
    )


@pytest.mark.parametrize("form", ["0.2.0", "0.4", "0.7"])
def test_mmmu_logs_one_reading_or_a_list_of_them(tmp_path: Path, form: str) -> None:
    asked = [
        ("multiple-choice", "B", "B", 1.0),
        ("multiple-choice", "B", "A", 0.0),
        ("open", "24", [24.0, "24"], 1.0),
        ("open", "24", [7.0, "7"], 0.0),
    ]
    said = []
    for number, (kind, answer, parsed, _) in enumerate(asked):
        row: dict[str, Any] = {"id": f"validation_Math_{number}", "subdomain": "Math"}
        row |= {"question_type": kind, "answer": answer, "parsed_pred": parsed}
        entry = {"mmmu_acc": row}
        if form != "0.2.0":
            # 0.4 has an open answer's first reading as text, and then looks at its characters.
            text = form == "0.4" and isinstance(parsed, list)
            row["parsed_pred"] = [str(parsed[0]) if text else parsed]
            entry["mmmu_acc_pass_at_k"] = row
        said.append((entry, str(parsed), "how many?"))
    scores = [score for *_, score in asked]
    scores[2] = 0.0 if form == "0.4" else 1.0
    folder = logged(
        tmp_path / "log", form, "mmmu_val", {"mmmu_acc,none": sum(scores) / len(scores)}, said
    )
    (run,) = import_results(folder, tmp_path / "results")
    assert run.samples("mmmu")["score"].tolist() == scores
    assert run.samples("mmmu")["category"].tolist() == ["Math"] * 4


THOUGHT = "<think>b or a?</think>a"


@pytest.mark.parametrize(
    "resps, scored, score, note",
    [
        ({"filtered_resps": "a", "resps": THOUGHT}, "a", 1.0, "without the thoughts"),
        ({"filtered_resps": "a", "resps": [THOUGHT]}, "a", 1.0, "without the thoughts"),
        ({"filtered_resps": ["a"], "resps": [[THOUGHT]]}, "a", 1.0, "without the thoughts"),
        ({"filtered_resps": THOUGHT}, THOUGHT, 0.0, "with the thoughts"),
        ({"filtered_resps": "", "resps": THOUGHT}, "", 0.0, "without the thoughts"),
        ({"filtered_resps": [THOUGHT], "resps": [[THOUGHT]]}, THOUGHT, 0.0, "with the thoughts"),
    ],
)
def test_thoughts_are_kept_and_not_scored_twice(
    tmp_path: Path, resps: dict[str, Any], scored: str, score: float, note: str
) -> None:
    lines = [{"doc_id": n, "input": "q", "exact_match": score, **resps} for n in range(4)]
    changes = {"results": {"textvqa_val": {"exact_match,none": score}}}
    (run,) = import_results(written(tmp_path / "log", lines, **changes), tmp_path / "results")
    samples = run.samples("textvqa")
    assert set(samples["answer"]) == {THOUGHT}
    assert set(samples["parsed"]) == {scored.lower()}
    assert run.result("textvqa").score == 100 * score
    assert f"4 answers were scored {note} in them" in " ".join(run.result("textvqa").notes)


def test_a_thought_that_never_ends_was_cut_off(tmp_path: Path) -> None:
    lines = entries(("<think>b or", "b", "a", "a"))
    lines[0]["exact_match"] = 1.0
    (run,) = import_results(written(tmp_path / "log", lines), tmp_path / "results")
    assert run.samples("textvqa")["status"].tolist() == ["truncated", "ok", "ok", "ok"]


@pytest.mark.parametrize(
    "resps", [{}, {"filtered_resps": {"text": "a"}}, {"resps": [True]}], ids=str
)
def test_a_sample_without_an_answer_is_refused(tmp_path: Path, resps: dict[str, Any]) -> None:
    lines = [{"doc_id": n, "exact_match": 1.0, **resps} for n in range(4)]
    assert "the answer to document 0" in refused(written(tmp_path / "log", lines), tmp_path)


def test_two_logs_of_one_benchmark_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "log")
    (folder / "samples").mkdir()
    log = folder / "t_samples_textvqa_val.jsonl"
    (folder / "samples" / log.name).write_bytes(log.read_bytes())
    assert "are both logs of textvqa_val" in refused(folder, tmp_path)


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.95])
def test_an_old_log_that_is_cut_short_is_refused(tmp_path: Path, cut: float) -> None:
    said = [({"exact_match": 1.0}, "a", "x" * 1000) for _ in range(3000)]  # of several reads
    folder = logged(tmp_path / "log", "0.2.0", "gqa", {"exact_match,none": 1.0}, said)
    (log,) = folder.rglob("gqa.json")
    (run,) = import_results(folder, tmp_path / "whole")
    assert run.result("gqa").documents == 3000
    with log.open("r+b") as stream:
        stream.truncate(int(log.stat().st_size * cut))
    assert "Was the log cut short?" in refused(folder, tmp_path)


def test_a_folder_of_other_json_files_is_left_alone(tmp_path: Path) -> None:
    said = [({"exact_match": 1.0}, "a", "q")]
    folder = logged(tmp_path / "log", "0.2.0", "gqa", {"exact_match,none": 1.0}, said)
    (results,) = folder.rglob("results.json")
    (results.parent / "notes.json").write_text('{"mine": 1}')
    (folder / "results.json").write_text('{"mine": 2}')
    (run,) = import_results(folder, tmp_path / "results")
    assert run.manifest.tasks == ["gqa"]


FOREIGN: dict[str, Callable[[bytes], bytes]] = {
    "compressed by gzip": gzip.compress,
    "compressed by bzip2": bz2.compress,
    "compressed by xz": lzma.compress,
    "text in UTF-16": lambda data: data.decode().encode("utf-16"),
    "text in UTF-16 ": lambda data: data.decode().encode("utf-16-be"),
    "text in UTF-16  ": lambda data: ("\r\n" + data.decode()).encode("utf-16"),
    "text in UTF-32": lambda data: data.decode().encode("utf-32"),
    "text in UTF-8 behind a byte-order mark": lambda data: data.decode().encode("utf-8-sig"),
}


@pytest.mark.parametrize("form", FOREIGN)
@pytest.mark.parametrize("version, name", [
    ("0.7", "results.json"), ("0.7", "gqa.jsonl"), ("0.2.0", "results.json"), ("0.2.0", "gqa.json"),
])  # fmt: skip
def test_a_file_that_is_no_plain_text_is_named_with_what_it_is(
    tmp_path: Path, version: str, name: str, form: str
) -> None:
    """Under its own name, under one that says so, and given by itself."""
    said = [({"exact_match": 1.0}, "a", "q")]
    folder = logged(tmp_path / "log", version, "gqa", {"exact_match,none": 1.0}, said)
    (file,) = folder.rglob(f"*{name}")
    data = file.read_bytes()
    file.write_bytes(FOREIGN[form](data))
    told = refused(folder, tmp_path)
    assert str(file) in told
    assert f"is {form.strip()}" in told
    packed = file.rename(file.with_name(f"{file.name}.gz"))
    for given in (folder, packed) if name == "results.json" else (folder,):
        told = refused(given, tmp_path)
        assert str(packed) in told
        assert f"is {form.strip()}" in told
    file.write_bytes(data)  # a copy beside what is read is left alone
    assert len(import_results(folder, tmp_path / "results")) == 1


@pytest.mark.parametrize("version", ["0.7", "0.2.0"])
@pytest.mark.parametrize(
    "name", ["all_results.json", "results.json.d", "{log}.d", "{log}.gz", "notes.json"]
)
def test_a_folder_named_like_a_log_is_left_alone(tmp_path: Path, version: str, name: str) -> None:
    said = [({"exact_match": 1.0}, "a", "q")]
    folder = logged(tmp_path / "log", version, "gqa", {"exact_match,none": 1.0}, said)
    (log,) = folder.rglob("*gqa.json*")
    log.with_name(name.format(log=log.name)).mkdir()
    assert len(import_results(folder, tmp_path / "results")) == 1
    (file,) = (each for each in folder.rglob("*results.json") if each.is_file())
    file.unlink()
    assert "holds no *_results.json" in refused(folder, tmp_path / "other")


# --- several responses to a document -------------------------------------------------------------


def several(folder: Path, form: str, readings: list[tuple[str, list[Any], list[Any]]]) -> Path:
    """A log of MMMU with k responses, as a filter `take_first_k` leaves them.

    Args:
        readings: question type, responses and what upstream read in them, of each document.
    """
    lines, right = [], 0.0
    for number, (kind, said, read) in enumerate(readings):
        answer = "B" if kind == "multiple-choice" else "24"
        row = {"id": f"validation_Math_{number}", "subdomain": "Math", "question_type": kind,
               "answer": answer, "parsed_pred": read}  # fmt: skip
        flat = {"filtered_resps": said} if form == "0.7" else {"filtered_resps": [said]}
        if form == "0.3.5":
            flat["resps"] = [said]
        lines.append({"doc_id": number, "input": "q\nA. 1\nB. 2\n\nAnswer it.", "target": "B",
                      **flat, "mmmu_acc": row, "mmmu_acc_pass_at_k": row})  # fmt: skip
        right += "B" in read or [24.0, "24"] in read
    folder.mkdir(parents=True)
    outcome = {
        "results": {"mmmu_val": {"mmmu_acc,pass@2": right / len(lines)}},
        "config": {"model": "vllm", "model_args": "model=org/big"},
    }
    (folder / "t_results.json").write_text(json.dumps(outcome))
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "t_samples_mmmu_val.jsonl").write_text(log)
    return folder


TWICE = [
    ("multiple-choice", ["A", "(B)"], ["A", "B"]),
    ("multiple-choice", ["A", "C"], ["A", "C"]),
    ("open", ["7", "It is 24"], [[7.0, "7"], [24.0, "24"]]),
]


@pytest.mark.parametrize("form", ["0.3.5", "0.4", "0.7"])
def test_a_document_of_several_responses_is_right_where_one_is(tmp_path: Path, form: str) -> None:
    (run,) = import_results(several(tmp_path / "log", form, TWICE), tmp_path / "results")
    samples, result = run.samples("mmmu"), run.result("mmmu")
    assert samples["score"].tolist() == [1.0, 0.0, 1.0]
    assert samples["answer"].tolist() == ["(B)", "A", "It is 24"]  # the right one, else the first
    assert "2 responses a document: right where one of them is (pass@2)" in result.notes
    log = next((tmp_path / "log").glob("*.jsonl"))
    log.write_text(
        "".join(log.read_text().replace("mmmu_acc_pass_at_k", "other").splitlines(True)[:2])
    )
    results = next((tmp_path / "log").glob("*_results.json"))
    results.write_text(results.read_text().replace("0.6666666666666666", "0.5"))
    (letters,) = import_results(tmp_path / "log", tmp_path / "letters")  # a letter is no list
    assert letters.samples("mmmu")["answer"].tolist() == ["(B)", "A"]
    once = [(kind, said[1:], read[1:]) for kind, said, read in TWICE]
    (other,) = import_results(several(tmp_path / "one", form, once), tmp_path / "others")
    assert other.samples("mmmu")["score"].tolist() == [1.0, 0.0, 1.0]
    assert other.result("mmmu").fingerprint != result.fingerprint  # pass@2 beside pass@1


@pytest.mark.parametrize("form", ["0.4", "0.7"])
def test_of_several_responses_the_filter_took_one(tmp_path: Path, form: str) -> None:
    """`repeats` without a filter of its own takes the first; a vote takes the most frequent."""
    lines = entries(("a", "b", "a", "a"))
    for line in lines:
        whole = ["<think>hm</think>b", "<think>so</think>" + line["filtered_resps"][0]]
        line["resps"] = whole if form == "0.7" else [whole]
        if form == "0.7":
            line["filtered_resps"] = line["filtered_resps"][0]
    (run,) = import_results(written(tmp_path / "log", lines), tmp_path / "results")
    said = run.samples("textvqa")["answer"].tolist()
    assert said == [f"<think>{'hm' if a == 'b' else 'so'}</think>{a}" for a in ANSWERS]


def test_responses_whose_score_cannot_be_told_are_refused(tmp_path: Path) -> None:
    fewer = [TWICE[0], ("multiple-choice", ["A", "C"], ["A"])]
    told = refused(several(tmp_path / "fewer", "0.7", fewer), tmp_path)
    assert "document 1 cannot be read: it has 2 responses and 1 readings" in told
    mixed = [TWICE[0], ("multiple-choice", ["A"], ["A"])]
    told = refused(several(tmp_path / "mixed", "0.7", mixed), tmp_path)
    assert "has 1 to 2 responses a document" in told
    folder = several(tmp_path / "bare", "0.7", TWICE)
    log = folder / "t_samples_mmmu_val.jsonl"
    log.write_text(log.read_text().replace('"parsed_pred"', '"other"'))
    assert "document 0 cannot be read" in refused(folder, tmp_path)
    lines = [{**entry, "filtered_resps": ["a", "b"]} for entry in entries()]
    told = refused(written(tmp_path / "text", lines), tmp_path)
    assert "it has 2 responses, and its score may be of any of them" in told


# --- what the answers say, without the documents -------------------------------------------------

BOARD = "Which is red?\nA. apple\nB. sky\nAnswer with the option's letter."
SQA = {"question": "Which is red?", "choices": ["apple", "sky"], "answer": 1}
GIVEN = ["red"] * 6 + ["dark red"] * 4
ANNOTATORS = [{"answer": text, "answer_id": number} for number, text in enumerate(GIVEN)]


@pytest.mark.parametrize(
    "task, metrics, entry, said, content",
    [
        ("scienceqa_img", 0.0, {"target": "B", "input": BOARD}, "(B)", 1.0),
        ("scienceqa_img", 0.0, {"target": "B", "input": BOARD}, "**sky**", 1.0),
        ("scienceqa_img", 0.0, {"target": "B", "input": BOARD}, "(A)", 0.0),
        ("scienceqa_img", 0.0, {"target": "B", "input": "Which?", "doc": SQA}, "(B)", 1.0),
        ("scienceqa_img", 0.0, {"target": "B", "input": "Which?"}, "(B)", None),
        ("scienceqa_img", 0.0, {"target": "B", "input": f"{BOARD}\nA. no"}, "(B)", None),
        ("gqa", 0.0, {"target": "red", "input": "q"}, "The answer is **Red**.", 1.0),
        ("gqa", 1.0, {"target": "red", "input": "q"}, "Red", 1.0),
        ("gqa", 0.0, {"target": "red", "input": "q"}, "<think>blue?</think>Red", 1.0),
        ("textvqa_val", 1.0, {"input": "q"}, "red", 1.0),
        ("textvqa_val", 0.0, {"input": "q"}, "Answer: red", None),
        ("textvqa_val", 0.0, {"input": "q", "doc": {"answers": GIVEN}}, "Answer: red", 1.0),
        ("vqav2_val", 0.0, {"input": "q", "doc": {"answers": ANNOTATORS}}, "**red**", 1.0),
        # The log's own score does not follow from its annotators: they are others'.
        ("textvqa_val", 0.3, {"input": "q", "doc": {"answers": GIVEN}}, "Answer: red", None),
    ],
)  # fmt: skip
def test_what_the_answers_say_is_read_where_the_log_holds_it(
    tmp_path: Path, task: str, metrics: float, entry: dict[str, Any], said: str,
    content: float | None,
) -> None:  # fmt: skip
    folder = tmp_path / "log"
    folder.mkdir()
    line = {"doc_id": 0, "filtered_resps": [said], "exact_match": metrics, **entry}
    outcome = {"results": {task: {"exact_match,none": metrics}}, "config": {"model": "m"}}
    (folder / "t_results.json").write_text(json.dumps(outcome))
    (folder / f"t_samples_{task}.jsonl").write_text(json.dumps(line))
    (run,) = import_results(folder, tmp_path / "results")
    (result,) = run.results().values()
    assert result.metrics.get("kd_bench_content") == content
    told = run.samples(result.task, ["score", "score_by_content"]).iloc[0].tolist()
    assert told == [metrics, content] if content is not None else pd.isna(told[1])
    noted = "the score by content is not known" in " ".join(result.notes)
    assert noted == (content is None)


def test_tokens_are_those_of_the_log(tmp_path: Path) -> None:
    lines = entries((THOUGHT, "b", "a", "a"))
    lines[0] |= {"exact_match": 1.0, "token_counts": [{"output_tokens": 12}]}
    lines[1] |= {"token_counts": [{"output_tokens": 9, "reasoning_tokens": 7}]}
    lines[2] |= {"token_counts": [None]}
    (run,) = import_results(written(tmp_path / "log", lines), tmp_path / "results")
    samples = run.samples("textvqa", ["tokens", "thinking_tokens"])
    share = len(THOUGHT) - len("a")
    assert samples["tokens"].tolist() == [12, 9, 0, 0]
    assert samples["thinking_tokens"].tolist() == [round(12 * share / len(THOUGHT)), 7, 0, 0]
