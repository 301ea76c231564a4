"""The models that lmms-eval sees: our engine, and any other model behind a journal."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image

from kd_bench.distill import processes
from kd_bench.distill.chat import use_template
from kd_bench.distill.compatibility import check_pair
from kd_bench.distill.models import check_image_token, load_model, load_processor
from kd_bench.distill.models import quiet as silence
from kd_bench.distill.recipe import Term
from kd_bench.distill.vision_language import VisionLanguageModel, put_vision
from kd_bench.errors import IncompleteRunError, UsageError, closest, explained, one_line
from kd_bench.evals.benchmark import Answer, Question, Settings, lmms_eval, quiet
from kd_bench.evals.checkpoint import Checkpoint, StockModel, best_device, chosen_dtype
from kd_bench.evals.engine import NOT_FINITE, Engine, MemoryMeter, measure, size_of
from kd_bench.evals.inputs import ImageStore
from kd_bench.records import Cost, Protocol

TOGETHER = "Do config.json, processor and weights belong together?"


class _Generative(lmms):
    """What lmms-eval demands of every model and ours do not do."""

    is_simple = True

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError("kd-bench asks one question at a time and ranks no given answers")

    generate_until_multi_round = loglikelihood

    def clean(self) -> None:
        """lmms-eval would delete the model after the first task."""


class KdBench(_Generative):
    """kd-bench's engine as an lmms-eval model: batched, equal to batch 1.

    Args:
        pretrained: checkpoint folder, adapter folder or hub name.
        batch_size: questions at a time; `auto` or None for the default.
        dtype: auto, float32, bfloat16 or float16.
        quantize: nf4 or int8 rounds the weights while they are loaded.
        share: prefill each image once for all its questions.
        device_map: accelerate's, in place of `device`: auto, balanced, ... A model in several
            places is asked by transformers' own `generate`.
        prompt_template: instead of the checkpoint's own; a name, a file or Jinja text.
        chat_template_kwargs: variables of the template, as JSON.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        quantize: str = "",
        share: bool = True,
        device_map: str = "",
        model: Any = None,
        processor: Any = None,
        images: ImageStore | None = None,
        prompt_template: str = "",
        chat_template_kwargs: str = "",
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval passes it to every model
        if unknown:
            raise UsageError(
                f"kd_bench has no model argument {next(iter(unknown))!r}.",
                "It knows pretrained, batch_size, device, dtype, quantize, share, device_map, "
                "prompt_template, chat_template_kwargs.",
            )
        if model is None:
            if pretrained is None:
                raise UsageError("No checkpoint was given.", "Pass pretrained=CHECKPOINT.")
            place = device or best_device()
            kind = getattr(torch, chosen_dtype(pretrained, dtype, place))
            where: dict[str, Any] = {"device_map": device_map} if device_map else {"device": place}
            model = load_model(pretrained, dtype=kind, quantize=quantize, **where)
            processor = load_processor(pretrained)
            check_image_token(pretrained, model, processor)
        variables = json.loads(chat_template_kwargs or "{}")
        use_template(processor, prompt_template or None, variables)
        size = None if batch_size in (None, "auto") else int(batch_size)
        self._tokenizer = processor.tokenizer
        self.engine = Engine(model, processor, batch_size=size, share=share, images=images)
        self.device = self.engine.device
        self.batch_size = size
        # How the engine answers and what of generation_config.json counts, for the run's record.
        self.path = f"{self.engine.path}, {'shared' if self.engine.share else 'not shared'}"
        if self.engine.places > 1:
            self.path += f", in {self.engine.places} places"
        self.generation = dict(self.engine.constraints.settings)

    def cost(self, memory: MemoryMeter) -> Cost:
        """What the model costs to run."""
        return measure(self.engine, memory)

    def check(self, name: str) -> None:
        """Answer one question about an image, so that a model that cannot is no run of failures.

        Args:
            name: the checkpoint as the user named it.

        Raises:
            UsageError: processor, settings and weights do not work together.
        """
        grey = Image.new("RGB", (224, 224), (128, 128, 128))
        question = Question(0, "What is this?", lambda: [grey], Settings(max_new_tokens=1))
        [[answer]] = self.engine.answers([question])
        if answer.status == "error" and NOT_FINITE not in answer.error:
            raise UsageError(
                f"{name} cannot answer a question about an image: {answer.error}",
                TOGETHER,
            )

    def count_tokens(self, text: str) -> int:
        """Tokens of a generated text."""
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def answers(self, requests: Sequence[Any], keys: Sequence[str]) -> Iterator[list[Answer]]:
        """Answers batch by batch; `index` is the request's place in `requests`."""
        asked = zip(count(), requests, keys)
        return self.engine.answers([_question(self.task_dict, *each) for each in asked])

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Texts in the order of the requests (the stock command line comes through here).

        Raises:
            IncompleteRunError: an answer failed; it must not be scored as an empty one.
        """
        texts = [""] * len(requests)
        # Without our own data source nothing tells cheaply whether two images are equal.
        for batch in self.answers(requests, [""] * len(requests)):
            for answer in batch:
                if answer.status == "error":
                    raise IncompleteRunError(
                        f"Question {answer.index} could not be answered: {answer.error}",
                        "Check its image.",
                    )
                texts[answer.index] = answer.text
        return texts


NO_ANSWER = re.compile(r"\[LMMS_EVAL_\w+( after \d+ retries)?\] ?")
"""How lmms-eval's clients of a server begin the text of a request that failed."""


class StockAdapter:
    """Any other lmms-eval model, asked in small batches so that its answers can be kept.

    Args:
        batch_size: requests at a time; by default as many as a server's client sends at once.
    """

    def __init__(self, model: Any, batch_size: int | None = None) -> None:
        self.model = model
        self.batch_size = batch_size or int(getattr(model, "num_concurrent", 1))
        self.path = "lmms-eval"
        self.generation: dict[str, Any] = {}  # lmms-eval's own concern

    def cost(self, memory: MemoryMeter) -> Cost:
        """Only what can be read off the model's weights, where it shows them."""
        inner = getattr(self.model, "model", None)
        known = size_of(inner) if isinstance(inner, torch.nn.Module) else Cost()
        return replace(known, peak_memory_bytes=memory.peak())

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
                if failed := NO_ANSWER.match(text):
                    said = text[failed.end() :] or "the server's budget is spent"
                    answers.append(Answer(start + place, "", "error", error=said[:500]))
                    continue
                answers.append(Answer(start + place, text, "ok" if text else "empty"))
            yield answers


class Journalled(_Generative):
    """Puts a journal between lmms-eval and a model: known answers are not computed again.

    Of several processes each answers its share; then all of them know every answer.

    Args:
        source: `KdBench` or `StockAdapter`.
        key: document index -> journal key and image key.
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
        self._inner = inner = getattr(source, "model", source)
        # lmms-eval hands chat models messages, simple ones a text and images.
        self.is_simple = bool(getattr(inner, "is_simple", True))
        # Multi-process evaluation asks for it.
        self.device = getattr(inner, "device", torch.device("cpu"))
        self._key = key
        self._known = known
        self._record = record
        self.answered: dict[int, Answer] = {}
        self.computed = 0

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Texts in the order of the requests; failed answers are empty and marked as failed."""
        if isinstance(self._inner, lmms):
            self._inner.task_dict = self.task_dict
        keys = [self._key(int(request.args[3])) for request in requests]
        missing: dict[str, int] = {}
        for place, (key, _) in enumerate(keys):
            if key not in self._known:
                missing.setdefault(key, place)
        places = own_share(list(missing.values()), lambda place: keys[place][1])
        asked = [requests[place] for place in places]
        own: dict[str, Answer] = {}
        for batch in self._source.answers(asked, [keys[place][1] for place in places]):
            pairs = [(keys[places[answer.index]][0], answer) for answer in batch]
            self._record(pairs)
            own.update(pairs)
        for share in processes.gather(own):
            self._known.update(share)
            self.computed += len(share)
        for request, (key, _) in zip(requests, keys, strict=True):
            self.answered[int(request.args[3])] = self._known[key]
        return [self._known[key].text for key, _ in keys]


IMAGE_COST = 15
"""What an image costs beside a question about it: its tower and the prefill of its tokens."""


def own_share(places: Sequence[int], image_key: Callable[[int], str]) -> list[int]:
    """Those of the requests that this process answers: all questions of an image, or none.

    Neighbours stay together, so that a process reads its own part of the images' files. Every
    process must be given the same requests.
    """
    groups: dict[str, list[int]] = {}
    for place in places:
        groups.setdefault(image_key(place) or f"alone {place}", []).append(place)
    total = len(places) + IMAGE_COST * len(groups)
    share: list[int] = []
    before = 0
    for group in groups.values():
        cost = len(group) + IMAGE_COST
        # It belongs where its middle lies.
        if (2 * before + cost) * processes.world_size() // (2 * total) == processes.rank():
            share += group
        before += cost
    return share


def _question(task_dict: Any, number: int, request: Any, key: str) -> Question:
    """lmms-eval's request (prompt, settings, doc_to_visual, document, task, split) as ours."""
    text, generation, to_visual, document, task, split = request.args
    documents = task_dict[task][split]
    until = generation.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    # Without a cap, 1024 as lmms-eval's own models have it.
    settings = Settings(int(generation.get("max_new_tokens") or 1024), stops)

    def images() -> list[Any]:
        return list(to_visual(documents[document]) or [])

    return Question(number, text, images, settings, key)


# Packages whose module has another name, as far as lmms-eval's models import them.
_PACKAGES = {"PIL": "pillow", "cv2": "opencv-python-headless", "decord": "eva-decord"}


def _lacking(kind: type) -> list[str]:
    """Packages that lmms-eval's modules of a model put None in the place of; videos aside."""
    modules = [sys.modules[each.__module__] for each in kind.__mro__]
    own = [each for each in modules if each.__name__.startswith("lmms_eval.models")]
    sources = "\n".join(inspect.getsource(each) for each in own)
    named = dict.fromkeys(re.findall(r"""optional_import\(\s*["'](\w+)""", sources))
    return [name for name in named if name != "decord" and find_spec(name) is None]


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
        if not torch.cuda.is_available():  # upstream's defaults place models on an accelerator
            known_names = inspect.signature(kind.__init__).parameters
            given = {part.partition("=")[0] for part in arguments.split(",")}
            places = {"device", "device_map"} & known_names.keys() - given
            extra |= dict.fromkeys(sorted(places), "cpu")
        model = kind.create_from_arg_string(arguments, extra)
    except (ImportError, ModuleNotFoundError) as error:
        lacking = (error.name or "").partition(".")[0]
        raise UsageError(
            f"lmms-eval's {name} cannot be loaded: {one_line(error)}.",
            f"Install what it needs: pip install {_PACKAGES.get(lacking, lacking) or name}",
        ) from error
    except Exception as error:
        if "'NoneType'" in str(error) and (lacks := _lacking(kind)):
            raise UsageError(
                f"lmms-eval's {name} cannot be loaded: {' and '.join(lacks)} cannot be imported.",
                f"Install what it needs: pip install {' '.join(lacks)}",
            ) from error
        raise UsageError(
            f"lmms-eval's {name} cannot be made with {arguments!r}: "
            f"{type(error).__name__}: {one_line(error)}",
            "Correct --model-args.",
        ) from error
    return StockAdapter(model, batch_size)


def load_switch(vision: Path, language: Path, dtype: str, quantize: str = "") -> dict[str, Any]:
    """Model and processor of the visual switch: the teacher with the student's vision tower.

    z_SW = L_T(P_T(V_S(x_v)), x_t), arXiv 2604.14629: teacher - switch is what the student's vision
    lost, switch - student what its language model lost.

    Raises:
        UsageError: the two do not fit each other; both values are named.
    """
    place, kind = best_device(), getattr(torch, dtype)
    student = load_model(vision, dtype=kind, device=place, quantize=quantize)
    teacher = load_model(language, dtype=kind, device=place, quantize=quantize)
    student_processor, processor = load_processor(vision), load_processor(language)
    check_image_token(language, teacher, processor)
    switch = [Term(loss="dbild", of="switch")]
    check_pair(student, teacher, student_processor, processor, switch, truncate_vocabulary=True)
    put_vision(VisionLanguageModel(student), into=VisionLanguageModel(teacher))
    return {"model": teacher, "processor": processor}


# Prepared images, shared by all checkpoints that this process evaluates.
_IMAGES = ImageStore()


def load_source(
    checkpoint: Checkpoint, protocol: Protocol, debug: bool = False, device_map: str = ""
) -> Any:
    """What answers: our engine on a checkpoint or visual switch, or a stock model of lmms-eval.

    Args:
        device_map: accelerate's, for a checkpoint.

    Raises:
        UsageError: it cannot be loaded, or cannot answer a question about an image.
    """
    if not debug:
        silence()  # what did not load is told in one line of ours
    with quiet(debug):
        if checkpoint.stock is not None:
            return load_stock(checkpoint.stock, protocol.batch_size)
        named = checkpoint.ref.path
        with explained(f"{named} cannot be evaluated", TOGETHER):
            parts: dict[str, Any] = {"pretrained": str(checkpoint.path)}
            if checkpoint.vision is not None:
                parts = load_switch(
                    checkpoint.vision, checkpoint.path, protocol.dtype, protocol.quantize
                )
            model = KdBench(
                **parts,
                batch_size=protocol.batch_size,
                dtype=protocol.dtype,
                quantize=protocol.quantize,
                device_map=device_map,
                prompt_template=protocol.prompt_template,
                chat_template_kwargs=protocol.chat_template_kwargs,
                images=_IMAGES,
            )
            model.check(named)
        return model
