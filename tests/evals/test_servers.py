"""Models behind a server (vLLM, SGLang, ...): lmms-eval's clients through our store."""

import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kd_bench.errors import UsageError
from kd_bench.evals.checkpoint import StockModel
from kd_bench.evals.models import NO_ANSWER
from kd_bench.evals.run import EvalSettings, evaluate
from tests.support.eval_world import write_replicas


class Server(ThreadingHTTPServer):
    """A stand-in for `vllm serve`: OpenAI's chat completions, answered by what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.broken = False
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(asked)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        time.sleep(0.01)
        text = "" if self.server.broken else _answer(asked)
        with self.server.lock:
            self.server.at_once -= 1
        said = {"role": "assistant", "content": text}
        reply: dict[str, Any] = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": asked["model"],
            "choices": [{"index": 0, "message": said, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
        }
        if self.server.broken:
            reply = {"error": {"message": "out of memory", "type": "server_error"}}
        body = json.dumps(reply).encode()
        self.send_response(400 if self.server.broken else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _parts(asked: dict[str, Any]) -> tuple[str, list[Image.Image]]:
    """Text and images of a request."""
    parts = [part for message in asked["messages"] for part in message["content"]]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    data = [base64.b64decode(re.sub(r"^data:image/\w+;base64,", "", url)) for url in urls]
    return text, [Image.open(io.BytesIO(each)) for each in data]


def _answer(asked: dict[str, Any]) -> str:
    text, images = _parts(asked)
    return f"{len(images)} of {images[0].size[0]}, {len(text)}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replicas(tmp_path_factory.mktemp("data"))


def served(server: Server, **more: Any) -> StockModel:
    arguments = {"base_url": server.address, "model_version": "mine", "api_key": "none"}
    arguments |= {"max_retries": 2, "retry_backoff_s": 0, **more}
    return StockModel("openai", ",".join(f"{key}={value}" for key, value in arguments.items()))


def go(model: StockModel, data: Path, results: Path) -> Any:
    settings = EvalSettings(data=data, results=results, progress=False, limit=12, tasks=["gqa"])
    return evaluate(model, settings)


def test_a_served_model_is_asked_once_and_kept(server: Server, data: Path, tmp_path: Path) -> None:
    run = go(served(server), data, tmp_path)
    assert run.manifest.status == "complete", run.manifest.notes
    samples = run.samples("gqa")
    assert len(server.asked) == len(samples)
    assert server.most_at_once > 1
    assert {asked["model"] for asked in server.asked} == {"mine"}
    assert {asked["temperature"] for asked in server.asked} == {0}
    assert sorted(samples["answer"]) == sorted(map(_answer, server.asked))
    assert all(answer.startswith("1 of ") for answer in samples["answer"])
    assert go(served(server), data, tmp_path).path == run.path
    assert len(server.asked) == len(samples)


def test_what_the_server_did_not_answer_is_no_answer(
    server: Server, data: Path, tmp_path: Path
) -> None:
    """lmms-eval's client gives the failure as a text, which would be scored."""
    server.broken = True
    run = go(served(server), data, tmp_path)
    assert run.manifest.status != "complete"
    server.broken = False
    mended = go(served(server), data, tmp_path)
    assert mended.path == run.path
    assert mended.manifest.status == "complete", mended.manifest.notes
    assert all(answer.startswith("1 of ") for answer in mended.samples("gqa")["answer"])


def test_texts_of_failures_are_lmms_evals() -> None:
    from lmms_eval.models.chat import async_openai, openai

    for module in (openai, async_openai):
        source = Path(module.__file__).read_text(encoding="utf-8")
        texts = re.findall(r"\[LMMS_EVAL_[^\"]*\]", source)
        assert texts, "the client says it in another way now"
        for text in texts:
            assert NO_ANSWER.match(re.sub(r"\{[^}]*\}", "3", text))


def test_vllm_itself_is_asked_for_in_one_line(data: Path, tmp_path: Path) -> None:
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    with pytest.raises(UsageError, match=r"vllm cannot be imported.*pip install vllm"):
        go(StockModel("vllm", "model=mine"), data, tmp_path)
