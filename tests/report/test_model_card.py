"""A run's model card: what it says, what it must not seem to say, and how it is uploaded."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from huggingface_hub import ModelCard

from kd_bench.errors import UsageError
from kd_bench.files import write_text
from kd_bench.registry import load_task
from kd_bench.report.model_card import model_card, write_card
from kd_bench.store import find_run
from tests.support import report_store

TRAINING = {
    "recipe": "own",
    "recipe_digest": "ab" * 32,
    "method": "switch-kd",
    "seed": 0,
    "teacher": {"path": "Qwen/Teacher-3B", "weights_sha256": "12" * 32},
    "student": {"path": "Qwen/Student-0.5B", "weights_sha256": "34" * 32},
    "stages": {
        "distil": {
            "method": "switch-kd",
            "steps": 1200,
            "tokens": 738_000,
            "data": {"sha256": "56" * 32, "conversations": 6000},
        }
    },
    "provenance": {"code": {"version": "0.1.0", "commit": "c" * 40}, "versions": {"torch": "2.9"}},
}


def store(folder, suite, names=("teacher", "sft-seed0", "switch-kd-seed0"), **options):
    for model in report_store.demo_models((0,)):
        if model.name in names:
            report_store.add_run(folder, model, units=12, suite=suite, training=TRAINING, **options)
    return folder


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return store(tmp_path_factory.mktemp("mini"), "mini")


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    return store(tmp_path_factory.mktemp("ten"), "ten")


def test_every_score_stands_with_protocol_and_what_verifies_it(ten):
    run = find_run(ten, "switch-kd-seed0")
    text = str(model_card(ten, "switch-kd-seed0", "me/student"))
    for task, result in run.results().items():
        row = next(line for line in text.splitlines() if result.fingerprint[:16] in line)
        assert f"| {load_task(task).short} |" in row
        assert f"| {result.score:.1f} " in row
    assert "kd-bench tasks fetch --to DATA" in text
    assert "kd-bench eval me/student --suite ten --data DATA" in text
    assert f"sha256:{run.manifest.model.weights_digest}" in text
    assert "own (sha256 `abababab" in text
    for told in ("Qwen/Teacher-3B", "1,200 steps", "738,000 tokens", "5656565656565656"):
        assert told in text, told
    assert "## Comparison" in text
    assert "| sft-seed0 |" in text


def test_a_part_of_a_benchmark_is_not_in_the_metadata(ten):
    """Twelve units of a real benchmark are not its score, whatever the suite is called."""
    card = model_card(ten, "switch-kd-seed0")
    assert card.data.eval_results is None
    assert "GQA on 96 of 12,578 documents" in str(card)
    assert card.data.base_model == "Qwen/Student-0.5B"


def test_a_whole_benchmark_is_in_the_metadata_under_its_own_name(tmp_path):
    run = find_run(store(tmp_path, "ten", ["teacher"]), "teacher")
    frame, result = run.samples("gqa"), run.result("gqa")
    run.commit(replace(result, documents=load_task("gqa").documents), frame)
    (found,) = model_card(tmp_path, "teacher").data.eval_results
    spec = load_task("gqa")
    assert (found.dataset_type, found.dataset_config, found.dataset_split) == (
        spec.dataset.repo, spec.dataset.config, spec.dataset.split,
    )  # fmt: skip
    assert found.dataset_revision == spec.dataset.revision
    assert found.metric_value == pytest.approx(result.score, abs=0.005)


def test_mini_scores_never_look_like_the_real_benchmarks(mini):
    card = model_card(mini, "switch-kd-seed0")
    results = card.data.eval_results
    assert len(results) == 10
    repositories = {load_task(task).dataset.repo for task in report_store.TASKS}
    for found in results:
        assert found.dataset_type == "kd-bench-mini-world"
        assert found.dataset_name.startswith("kd-bench mini world")
        assert found.metric_name.startswith("mini ")
    text = str(card)
    assert not any(name in text for name in repositories)
    titles = {load_task(task).short for task in report_store.TASKS} | {"Avg10"}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        assert not titles & set(cells), line
    assert "They are not scores of those benchmarks" in text
    assert "--data" not in text


def test_an_embedded_suite_of_another_name_is_mini_too(tmp_path, monkeypatch):
    from kd_bench.report import model_card as module

    store(tmp_path, "shapes", ["teacher"])
    monkeypatch.setattr(module, "_embedded", lambda manifest: True)
    assert "mini GQA" in str(model_card(tmp_path, "teacher"))


def test_what_a_run_lacks_stands_above_its_scores(tmp_path):
    store(tmp_path, "mini", ["teacher"], tasks=["mme"], planned=["mme", "gqa"], status="partial")
    text = str(model_card(tmp_path, "teacher"))
    assert "not whole: partial: 1 of 2 benchmarks done" in text.partition("## Scores")[0]
    assert "| mini GQA | – |" in text
    assert "--tasks mme" in text or "kd-bench eval checkpoints/teacher --suite mini" in text


def test_the_recipe_is_shown_without_folders_of_this_machine(tmp_path):
    trained = tmp_path / "trained" / "final"
    model = report_store.demo_models((0,))[-2]
    report_store.add_training(trained.parent, model)
    write_text(
        trained / "recipe.yaml",
        "name: own\nteacher: /data/models/big\ndata:\n  path: [/srv/a/pairs.json, hub/name]\n"
        "  images: ~/pictures/all\noutput: checkpoints/own\n",
    )
    report_store.add_run(tmp_path, model, units=4, checkpoint=str(trained))
    text = str(model_card(tmp_path, model.name))
    recipe = text.partition("```yaml")[2].partition("```")[0]
    assert "teacher: big" in recipe
    assert "[pairs.json, hub/name]" in recipe
    assert "images: all" in recipe
    assert "output: checkpoints/own" in recipe
    assert str(tmp_path) not in text


def test_a_name_or_lineage_of_others_cannot_break_the_card(tmp_path):
    strange = replace(report_store.demo_models((0,))[0], name="<b>big | # *x*")
    training = {"teacher": "text", "student": {"path": 3}, "stages": {"a|b": "text"}, "seed": None}
    report_store.add_run(tmp_path, strange, units=4, training=training, checkpoint="a/b")
    text = str(model_card(tmp_path, strange.name))
    assert "# &lt;b&gt;big \\| \\# \\*x\\*" in text
    assert "| Stage a\\|b |" in text
    inert = re.sub(r"`[^`\n]*`", "", text.partition("---\n\n")[2])
    assert "<b>" not in inert


def test_hybrids_and_stock_models_are_named_as_eval_takes_them(tmp_path):
    models = {model.name: model for model in report_store.demo_models((0,))}
    for name, path, said in (
        (
            "switch-kd-seed0-hybrid",
            "ours/small + ours/big",
            "--vision ours/small --language ours/big",
        ),
        (
            "llava-kd-seed0",
            "lmms-eval llava_hf pretrained=a/b,x=1",
            "--model llava_hf --model-args pretrained=a/b,x=1",
        ),
    ):
        report_store.add_run(tmp_path, models[name], units=4, checkpoint=path)
        assert f"kd-bench eval {said} --suite mini" in str(model_card(tmp_path, name))


def test_a_readme_of_somebody_else_stays(mini, tmp_path):
    card = model_card(mini, "teacher")
    path = write_card(card, tmp_path)
    assert write_card(card, tmp_path) == path
    assert ModelCard.load(path).data.model_name == "teacher"
    write_text(path, "# Mine\n")
    with pytest.raises(UsageError, match="not made by kd-bench"):
        write_card(card, tmp_path)


def test_two_cards_of_one_run_are_the_same_bytes(mini):
    assert str(model_card(mini, "teacher")) == str(model_card(mini, "teacher"))


# --- the command ----------------------------------------------------------------------------------


def run_report(*arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-m", "kd_bench", "report", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**clean, "HF_HOME": "/nonexistent", **environment},
    )


@pytest.mark.slow
def test_the_command_writes_the_card_offline_and_says_why_it_cannot_upload(mini, tmp_path):
    card = ["--results", mini, "--model-card", "teacher", "--to", tmp_path]
    done = run_report(*card, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (0, f"Model card: {tmp_path / 'README.md'}\n")
    for arguments, environment, line in (
        (["--push", "me/it"], {}, "no token of the Hugging Face hub is set. Run `hf auth login`"),
        (["--push", "me/it"], {"HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (["--push", "it"], {"HF_TOKEN": "hf_x"}, "'it' is no repository. Write OWNER/NAME."),
        (
            ["--push", "me/it"],
            {"HF_TOKEN": "hf_x", "HF_ENDPOINT": "http://127.0.0.1:9"},
            "--push me/it:",
        ),
        (["--trend"], {}, "--model-card is about one run of the store."),
    ):
        done = run_report(*card, *arguments, **environment)
        assert done.returncode == 2, done.stderr
        assert line in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    done = run_report("--push", "me/it")
    assert "--push uploads a model card. Add --model-card RUN." in done.stderr


@pytest.mark.slow
def test_the_card_is_uploaded_where_a_token_is_set(mini, tmp_path):
    """Against a server that answers as the hub does."""
    received = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            received.append((self.path, self.headers.get("authorization"), body))
            answer = {}
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                answer = {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            if "/commit/" in self.path:
                url = "https://huggingface.co/me/it/commit/abc"
                answer = {"commitUrl": url, "commitOid": "abc", "success": True}
            self._answer(answer)

        def do_GET(self):
            self._answer({})

        def _answer(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = run_report(
            "--results", mini, "--model-card", "teacher", "--to", tmp_path, "--push", "me/it",
            HF_TOKEN="hf_secret", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        )  # fmt: skip
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "Uploaded: http" in done.stdout
    commit = next(each for each in received if "/api/models/me/it/commit/" in each[0])
    assert commit[1] == "Bearer hf_secret"
    assert "README.md" in commit[2]
    assert "hf_secret" not in done.stdout + done.stderr
