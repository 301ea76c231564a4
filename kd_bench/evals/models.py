"""The models that lmms-eval sees: our engine, and any other model behind a journal."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms

from kd_bench.distill.chat import use_template
from kd_bench.distill.checkpoints import locate, stored_dtype
from kd_bench.distill.models import check_image_token, load_model, load_processor, weight_count
from kd_bench.distill.recipe import Term
from kd_bench.distill.vision_language import VisionLanguageModel, check_pair, put_vision
from kd_bench.errors import IncompleteRunError, UsageError, closest, one_line
from kd_bench.evals.benchmark import Answer, Question, Settings, lmms_eval, settings_of
from kd_bench.evals.checkpoint import StockModel
from kd_bench.evals.engine import NOT_FINITE, Engine, MemoryMeter, measure
from kd_bench.evals.inputs import PictureStore
from kd_bench.records import Cost

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Generative(lmms):
    """What lmms-eval demands of every model and ours do not do."""

    is_simple = True

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("kd-bench answers questions; it does not rank given answers")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("kd-bench asks one question at a time")

    def clean(self) -> None:
        """lmms-eval would delete the model after the first task."""


class KdBench(_Generative):
    """kd-bench's engine as an lmms-eval model: batched, left-padded, equal to batch 1.

    Args:
        pretrained: checkpoint folder, adapter folder or hub name.
        batch_size: questions at a time; `auto` or None for the default.
        dtype: auto, float32, bfloat16 or float16.
        quantize: nf4 or int8 rounds the weights while they are loaded.
        share: prefill each picture once for all its questions.
        prompt_template: instead of the checkpoint's own; a name, a file or Jinja text.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        quantize: str = "",
        share: bool = True,
        model: Any = None,
        processor: Any = None,
        pictures: PictureStore | None = None,
        prompt_template: str = "",
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval passes it to every model
        if unknown:
            raise UsageError(
                f"kd_bench has no model argument {next(iter(unknown))!r}.",
                "It knows pretrained, batch_size, device, dtype, quantize, share, prompt_template.",
            )
        if model is None:
            if pretrained is None:
                raise UsageError("No checkpoint was given.", "Pass pretrained=CHECKPOINT.")
            place = device or ("cuda" if torch.cuda.is_available() else "cpu")
            if dtype == "auto":
                dtype = "float32" if place == "cpu" else stored_dtype(locate(pretrained))
            kind = torch_dtype(dtype)
            model = load_model(pretrained, dtype=kind, device=place, quantize=quantize)
            processor = load_processor(pretrained)
            check_image_token(pretrained, model, processor)
        if prompt_template:
            use_template(processor, prompt_template)
        size = None if batch_size in (None, "auto") else int(batch_size)
        self._tokenizer = processor.tokenizer
        self._engine = Engine(model, processor, batch_size=size, share=share, pictures=pictures)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._engine.device

    @property
    def batch_size(self) -> int | None:
        """Questions at a time; None for as many as fit."""
        return self._engine.batch_size

    @property
    def path(self) -> str:
        """How the engine answers, for the run's record."""
        return f"{self._engine.path}, {'shared' if self._engine.share else 'not shared'}"

    @property
    def generation(self) -> dict[str, Any]:
        """The checkpoint's own settings that change greedy answers."""
        return dict(self._engine.constraints.settings)

    def cost(self, memory: MemoryMeter) -> Cost:
        """What the model costs to run."""
        return measure(self._engine, memory)

    def check(self, name: str) -> None:
        """Answer one question about an image, so that a model that cannot is no run of failures.

        Args:
            name: the checkpoint as the user named it.

        Raises:
            UsageError: processor, settings and weights do not work together.
        """
        question = Question(0, "What is this?", _grey, Settings(max_new_tokens=1))
        [[answer]] = self._engine.answers([question])
        if answer.status == "error" and NOT_FINITE not in answer.error:
            raise UsageError(
                f"{name} cannot answer a question about an image: {answer.error}",
                "Do config.json, processor and weights belong together?",
            )

    @property
    def engine(self) -> Engine:
        """What answers the questions."""
        return self._engine

    def count_tokens(self, text: str) -> int:
        """Tokens of a generated text."""
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def answers(self, requests: Sequence[Any], keys: Sequence[str]) -> Iterator[list[Answer]]:
        """Answers batch by batch; `index` is the request's place in `requests`."""
        questions = [
            _question(self, number, request, key)
            for number, (request, key) in enumerate(zip(requests, keys, strict=True))
        ]
        return self._engine.answers(questions)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Texts in the order of the requests (the stock command line comes through here).

        Raises:
            IncompleteRunError: an answer failed; it must not be scored as an empty one.
        """
        keys = [_shared_key(self, request) for request in requests]
        texts = [""] * len(requests)
        for batch in self.answers(requests, keys):
            for answer in batch:
                if answer.status == "error":
                    raise IncompleteRunError(
                        f"Question {answer.index} could not be answered: {answer.error}",
                        "Check its picture.",
                    )
                texts[answer.index] = answer.text
        return texts


class StockAdapter:
    """Any other lmms-eval model, asked in small batches so that its answers can be kept."""

    def __init__(self, model: Any, batch_size: int | None = None) -> None:
        self.model = model
        self.batch_size = batch_size or 1
        self.path = "lmms-eval"
        self.generation: dict[str, Any] = {}  # lmms-eval's own concern

    def cost(self, memory: MemoryMeter) -> Cost:
        """Only what can be read off the model's weights, where it shows them."""
        inner = getattr(self.model, "model", None)
        if not isinstance(inner, torch.nn.Module):
            return Cost(peak_memory_bytes=memory.peak())
        weights = {id(weight): weight for weight in inner.parameters()}.values()
        return Cost(
            parameters=sum(weight_count(weight) for weight in weights),
            weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
            peak_memory_bytes=memory.peak(),
        )

    def answers(self, requests: Sequence[Any], keys: Sequence[str]) -> Iterator[list[Answer]]:
        """Answers batch by batch; an exception becomes the status of the batch's answers."""
        from lmms_eval.api.instance import unwrap_generation_output

        size = self.batch_size
        for start in range(0, len(requests), size):
            batch = list(requests[start : start + size])
            try:
                outputs = self.model.generate_until(batch)
            except Exception as error:
                text = f"{type(error).__name__}: {one_line(error)}"[:500]
                yield [
                    Answer(start + place, "", "error", error=text) for place in range(len(batch))
                ]
                continue
            answers = []
            for place, output in enumerate(outputs):
                text = str(unwrap_generation_output(output)[0]).strip()
                answers.append(Answer(start + place, text, "ok" if text else "empty"))
            yield answers


class Journalled(_Generative):
    """Puts a journal between lmms-eval and a model: known answers are not computed again.

    Args:
        source: `KdBench` or `StockAdapter`.
        key: document index -> journal key and picture key.
        known: answers by journal key.
        record: called with each batch of (key, answer) as it is produced.
    """

    def __init__(
        self,
        source: Any,
        key: Callable[[int], tuple[str, str]],
        known: dict[str, Answer],
        record: Callable[[list[tuple[str, Answer]]], None],
    ) -> None:
        super().__init__()
        self._source = source
        # lmms-eval hands chat models messages, simple ones a text and pictures.
        self.is_simple = bool(getattr(getattr(source, "model", source), "is_simple", True))
        self._key = key
        self._known = known
        self._record = record
        self.answered: dict[int, Answer] = {}
        self.computed = 0

    @property
    def device(self) -> Any:
        """Where the model is; multi-process evaluation asks for it."""
        inner = getattr(self._source, "model", self._source)
        return getattr(inner, "device", torch.device("cpu"))

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Texts in the order of the requests; failed answers are empty and marked as failed."""
        inner = getattr(self._source, "model", self._source)
        if isinstance(inner, lmms):
            inner.task_dict = self.task_dict
        keys = [self._key(int(request.args[3])) for request in requests]
        missing: dict[str, int] = {}
        for place, (key, _) in enumerate(keys):
            if key not in self._known:
                missing.setdefault(key, place)
        places = list(missing.values())
        asked = [requests[place] for place in places]
        for batch in self._source.answers(asked, [keys[place][1] for place in places]):
            pairs = [(keys[places[answer.index]][0], answer) for answer in batch]
            self._record(pairs)
            self._known.update(pairs)
            self.computed += len(pairs)
        texts = []
        for request, (key, _) in zip(requests, keys, strict=True):
            answer = self._known[key]
            self.answered[int(request.args[3])] = answer
            texts.append(answer.text)
        return texts


def torch_dtype(name: str) -> torch.dtype:
    """The float type of that name.

    Raises:
        UsageError: it is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not known.", f"Use one of auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _question(model: _Generative, number: int, request: Any, key: str) -> Question:
    """lmms-eval's request (prompt, settings, doc_to_visual, document, task, split) as ours."""
    text, generation, to_visual, document, task, split = request.args
    documents = model.task_dict[task][split]
    pictures = partial(_pictures, to_visual, documents, document)
    return Question(number, text, pictures, settings_of(generation), key)


def _grey() -> list[Any]:
    from PIL import Image

    return [Image.new("RGB", (224, 224), (128, 128, 128))]


def _pictures(to_visual: Callable[[Any], Any], documents: Any, document: int) -> list[Any]:
    return list(to_visual(documents[document]) or [])


def _shared_key(model: _Generative, request: Any) -> str:
    """Without our own data source nothing tells cheaply whether two pictures are equal."""
    del model, request
    return ""


# Packages whose module has another name, as far as lmms-eval's models import them.
_PACKAGES = {"PIL": "pillow", "cv2": "opencv-python-headless", "decord": "eva-decord"}


def load_stock(wanted: StockModel, batch_size: int | None) -> StockAdapter:
    """The model behind its journal.

    Raises:
        UsageError: lmms-eval does not know it, or it cannot be made with these arguments.
    """
    name, arguments = wanted.name, wanted.arguments
    lmms_eval()
    from lmms_eval.models import get_model, list_available_models

    known = list_available_models(include_aliases=True)
    if name not in known:
        raise UsageError(
            f"lmms-eval has no model {name!r}.{closest(name, known)}",
            f"It has {len(known)}, among them llava_hf, qwen2_5_vl and internvl_hf.",
        )
    try:
        kind: Any = get_model(name)
        extra: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
        extra |= _on_this_machine(kind, arguments)
        model = kind.create_from_arg_string(arguments, extra)
    except (ImportError, ModuleNotFoundError) as error:
        lacking = (error.name or "").partition(".")[0]
        raise UsageError(
            f"lmms-eval's {name} cannot be loaded: {one_line(error)}.",
            f"Install what it needs: pip install {_PACKAGES.get(lacking, lacking) or name}",
        ) from error
    except Exception as error:
        raise UsageError(
            f"lmms-eval's {name} cannot be made with {arguments!r}: "
            f"{type(error).__name__}: {one_line(error)}",
            "Correct --model-args.",
        ) from error
    return StockAdapter(model, batch_size)


def _on_this_machine(kind: Any, arguments: str) -> dict[str, str]:
    """Arguments for a CPU: upstream's defaults place models on an accelerator, or nowhere."""
    import torch

    if torch.cuda.is_available():
        return {}
    known = inspect.signature(kind.__init__).parameters
    given = {part.partition("=")[0] for part in arguments.split(",")}
    return {name: "cpu" for name in ("device", "device_map") if name in known and name not in given}


def load_hybrid(vision: Path, language: Path, dtype: str, quantize: str = "") -> dict[str, Any]:
    """Model and processor of a hybrid, as `KdBench` takes them: the teacher with another tower.

    Raises:
        UsageError: the two do not fit each other; both values are named.
    """
    place = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch_dtype(dtype)
    student = load_model(vision, dtype=kind, device=place, quantize=quantize)
    teacher = load_model(language, dtype=kind, device=place, quantize=quantize)
    eyes, words = load_processor(vision), load_processor(language)
    check_image_token(language, teacher, words)
    switch = [Term(loss="dbild", of="switch")]
    check_pair(student, teacher, eyes, words, switch, truncate_vocabulary=True)
    put_vision(VisionLanguageModel(student), into=VisionLanguageModel(teacher))
    return {"model": teacher, "processor": words}
