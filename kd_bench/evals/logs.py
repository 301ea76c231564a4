"""What lmms-eval 0.1 to 0.7 wrote with `--log_samples --output_path`, read in all its forms.

    <time>_results.json      <time>_samples_<task>.jsonl      since 0.2.4
    results.json             <task>.json                      before: a folder an evaluation
    results_<time>.json      samples_<task>_<time>.jsonl      as lm-evaluation-harness names them

The logs lie beside the results or in a folder `samples`. Whatever its version, a log comes out as
one `LoggedSample` a document: every document once, nothing missing, nothing cut short.
"""

import codecs
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_bench.errors import IncompleteRunError, UsageError, one_line
from kd_bench.evals.benchmark import REASONING_TAGS, mmmu_right, upstream_metrics
from kd_bench.evals.content import Thinking
from kd_bench.files import foreign_form, read_json
from kd_bench.records import Status
from kd_bench.registry import TaskSpec, load_tasks

Entry = dict[str, Any]

# Far beyond what lmms-eval writes; a file of nothing must not fill the memory.
RESULTS_BYTES = 64 << 20
LINE_BYTES = 16 << 20
BLANK_BYTES = 1 << 20
UTF8 = ("utf-8", "surrogatepass")
REPLACED = "kd_bench: replaced"
"""Key of a read entry: whether half a character, which no file can hold, was replaced in it."""
NEEDED = ("answer", "answers", "choices", "options", "question_type")
"""Columns of a logged document that upstream's scoring reads."""
THOUGHTS = Thinking(REASONING_TAGS)
"""lmms-eval's own tags, which it takes out since 0.7."""
SPELLINGS = {"mme_percetion_score": "mme_perception_score"}
"""Names of metrics before 0.2.4, and today's."""


def log_names(spec: TaskSpec) -> list[str]:
    """Names of a benchmark's log: MMBench EN is usually logged under its judged task."""
    return [spec.upstream, *(["mmbench_en_dev"] if spec.id == "mmbench_en" else [])]


# --- the results file, and which logs are its own ------------------------------------------------


@dataclass(frozen=True)
class Results:
    """A results file with the sample logs beside it.

    Attributes:
        config: the model, its arguments and how it was evaluated.
        told: all that the file holds, the metrics of each task under `results`.
        logs: sample logs by lmms-eval's task names.
    """

    file: Path
    config: Entry
    told: Entry
    logs: dict[str, Path]

    def metrics(self, task: str) -> dict[str, float]:
        """The numbers of one task by today's names; empty where it has none."""
        told = self.told["results"].get(task)
        found = upstream_metrics(told) if isinstance(told, dict) else {}
        return {SPELLINGS.get(name, name): value for name, value in found.items()}

    def counts(self, task: str) -> dict[str, int]:
        """lmms-eval's own count of documents: `original` of the data set, `effective` asked.

        Raises:
            IncompleteRunError: they are no numbers.
        """
        told = self.told.get("n-samples")
        told = told.get(task) if isinstance(told, dict) else told
        if told is None:
            return {}
        known = told if isinstance(told, dict) else {"n-samples": told}
        for key, value in known.items():
            if not isinstance(told, dict) or type(value) is not int or value < 0:
                raise IncompleteRunError(
                    f"n-samples of {task}: {key} is {value!r:.40}, not a number of documents.",
                    "Give the results file as lmms-eval wrote it.",
                )
        return dict(known)


def read_results(file: Path) -> Results:
    """A results file of any version, and the logs that belong to it.

    Raises:
        IncompleteRunError: it is none.
        UsageError: two files are logs of one task.
    """
    if file.stat().st_size > RESULTS_BYTES:
        raise IncompleteRunError(
            f"{file} has {file.stat().st_size >> 20:,} MiB, which no results file has.",
            "Give a *_results.json of lmms-eval.",
        )
    try:
        told = read_json(file)
        if isinstance(told, dict) and "config" not in told and "model_configs" in told:
            told = told | {"config": told["model_configs"]}  # before 0.2.4
        for part in ("config", "results"):
            if not isinstance(told[part], dict):
                raise TypeError(f"{part!r} is {told[part]!r:.40}")
    except (ValueError, KeyError, TypeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        problem = f"{file} is not lmms-eval's results: {why.removeprefix(f'{file} is ')}."
        raise IncompleteRunError(problem, "Give a *_results.json of lmms-eval.") from None
    return Results(file, told["config"], told, _sample_logs(file))


def results_files(folder: Path) -> list[Path]:
    """Results files at any depth; one without a time is taken where its logs are there.

    Where there are none, those under a further ending (`.gz`) that are compressed or in another
    encoding, for `read_results` to refuse by name.
    """
    # MMBench's own aggregation leaves a file of that name, too.
    found = {
        file
        for pattern in ("*_results.json", "results_*.json", "results.json")
        for file in folder.rglob(pattern)
        if file.parent.name != "submissions" and file.is_file()
    }
    taken = sorted(file for file in found if file.match("*_results.json") or _sample_logs(file))
    packed = (file for file in sorted(folder.rglob("*results*.json.*")) if file.is_file())
    return taken or [file for file in packed if _form_of(file)]


def _sample_logs(file: Path) -> dict[str, Path]:
    """The logs of a results file by their task; one that is compressed where no other is there.

    Raises:
        UsageError: two files are logs of one task.
    """
    stamp = re.fullmatch(r"(.*)_results\.json|results_(.*)\.json", file.name)
    time = re.escape("" if stamp is None else stamp[1] or stamp[2])
    of_time = rf"{time}_samples_(.+)\.jsonl|samples_(.+)_{time}\.jsonl"
    pattern = of_time if time else r"samples_(.+)\.jsonl?|(.+)\.jsonl?"
    named = re.compile(rf"(?:{pattern})(\.\w+)?")
    inside = [folder for folder in file.parent.glob("samples/**") if folder.is_dir()]
    beside = file.parent.parent / "samples"
    folders = [file.parent, *inside, *([beside] if file.parent.name == "results" else [])]
    found: dict[str, Path] = {}
    foreign: dict[str, Path] = {}
    for log in sorted(each for folder in folders for each in folder.glob("*.json*")):
        match = named.fullmatch(log.name)
        if match is None or log == file or not log.is_file():
            continue
        task = match[1] or match[2]
        if match[3] or (log.suffix == ".json" and not _is_log(log)):
            foreign |= {task: log} if _form_of(log) else {}
        elif task in found:
            raise UsageError(
                f"{found[task]} and {log} are both logs of {task}.", "Remove the wrong one."
            )
        else:
            found[task] = log
    ours = {name for spec in load_tasks() for name in log_names(spec)}
    return {task: log for task, log in foreign.items() if task in ours} | found


def _is_log(file: Path) -> bool:
    """Whether a JSON file begins as the logs of lmms-eval before 0.2.4 do."""
    with file.open("rb") as stream:
        return re.match(rb'\s*{\s*"(?:args|model_configs|logs)"\s*:', stream.read(200)) is not None


def _form_of(file: Path) -> str:
    with file.open("rb") as stream:
        return foreign_form(stream.read(8))


# --- a sample log: every document once, nothing missing ------------------------------------------


@dataclass
class LoggedSample:
    """One document as upstream asked and scored it.

    Attributes:
        entry: the logged values by their names there; under a metric's name, what it was given.
        responses: of each that upstream took, the text that it scored and what the model wrote.
        chosen: number of the response that upstream's score is of.
    """

    entry: Entry
    responses: list[tuple[str, str]]
    chosen: int = 0

    @property
    def index(self) -> int:
        """The document's number in the data set."""
        return int(self.entry["doc_id"])

    @property
    def prompt(self) -> str:
        """The question as it was asked."""
        return str(self.entry["input"])

    @property
    def document(self) -> Entry:
        """What the log holds of the document, as far as upstream's scoring reads it."""
        return dict(self.entry["doc"])

    @property
    def scored(self) -> str:
        """The text that upstream scored."""
        return self.responses[self.chosen][0]

    @property
    def generated(self) -> str:
        """What the model wrote, its thoughts among it."""
        return self.responses[self.chosen][1]

    @property
    def replaced(self) -> bool:
        """Whether half a character was replaced in it."""
        return bool(self.entry.get(REPLACED, False))

    @property
    def status(self) -> Status:
        """A thought that never ends was cut off."""
        if THOUGHTS.is_unfinished(self.generated):
            return "truncated"
        return "ok" if self.scored.strip() else "empty"

    @property
    def tokens(self) -> int:
        """Generated tokens where the log has them, as since 0.7; else 0."""
        return self._count("output_tokens")

    @property
    def thinking_tokens(self) -> int:
        """Tokens of a thought among them; by its share of the characters where not counted."""
        counted = self._count("reasoning_tokens")
        return min(counted or THOUGHTS.share(self.generated, self.tokens), self.tokens)

    def _count(self, key: str) -> int:
        told = self.entry.get("token_counts")
        counts = told[0] if isinstance(told, list) and told and isinstance(told[0], dict) else {}
        return value if type(value := counts.get(key)) is int and value > 0 else 0


def read_samples(spec: TaskSpec, log: Path, counts: dict[str, int]) -> list[LoggedSample]:
    """A log's samples in the order of their documents, each there once.

    Args:
        counts: of `Results.counts`.

    Raises:
        IncompleteRunError: documents are missing or there twice, or one cannot be read.
    """
    if form := _form_of(log):
        raise IncompleteRunError(
            f"{log} is {form}: its first line is not a logged sample.",
            "Give the log as it was written: unpacked, in UTF-8.",
        )
    entries = sorted(
        _read_old_log(log) if log.suffix == ".json" else _read_log(log),
        key=lambda entry: entry["doc_id"],
    )
    _check_documents(spec, log, entries, counts)
    samples = []
    for entry in entries:
        try:
            samples.append(_logged(spec, entry))
        except Exception as error:  # the log's values run through upstream's own functions
            raise IncompleteRunError(
                f"{log}: the answer to document {entry['doc_id']} cannot be read: "
                f"{one_line(error)}.",
                "Give the log as it was written.",
            ) from None
    counted = Counter(len(sample.responses) for sample in samples)
    if spec.id == "mmmu" and len(counted) > 1:
        raise IncompleteRunError(
            f"{log} has {min(counted)} to {max(counted)} responses a document, which is no "
            "pass@k of any k.",
            "Give the log of one evaluation.",
        )
    return samples


def _check_documents(
    spec: TaskSpec, log: Path, entries: list[Entry], counts: dict[str, int]
) -> None:
    """Refuse a log, sorted by document, that does not hold every document once."""
    again = "Evaluate it again into an empty folder: lmms-eval appends to a log that is there."
    if not entries:
        raise IncompleteRunError(f"{log} holds no sample.", again)
    seen = Counter(entry["doc_id"] for entry in entries)
    twice = [key for key, count in seen.items() if count > 1]
    if twice:
        raise IncompleteRunError(
            f"{log}: {len(twice):,} documents are there more than once, the first is doc_id "
            f"{twice[0]}.",
            again,
        )
    expected = counts.get("effective", entries[-1]["doc_id"] + 1)
    missing = sorted(set(range(min(expected, entries[-1]["doc_id"] + 1))) - seen.keys())
    if missing or len(entries) != expected:
        first = f", the first is doc_id {missing[0]}" if missing else ""
        raise IncompleteRunError(
            f"{log} has {len(entries):,} of {expected:,} documents{first}.",
            "Was the log cut short?",
        )
    if len(entries) > spec.documents:
        raise IncompleteRunError(
            f"{log} has {len(entries):,} documents, {spec.id} has {spec.documents:,}.", again
        )


def _read_log(path: Path) -> Iterator[Entry]:
    r"""Samples line by line: a line ends at `\n` alone, whatever Unicode has besides."""
    blank = 0
    with path.open("rb") as stream:
        for number in range(1, 1 << 62):
            line = stream.readline(LINE_BYTES)
            if not line:
                return
            if not line.strip(b" \t\r\n\0"):
                blank += len(line)
                if blank > BLANK_BYTES:
                    problem = f"{path} holds nothing but blanks from line {number} on."
                    raise IncompleteRunError(problem, "Was the disk full?")
                continue
            yield _entry(path, number, line)


def _read_old_log(path: Path) -> Iterator[Entry]:
    """Samples of a log that is one JSON object, `{"args": ..., "logs": [sample, ...], ...}`."""
    decoder = json.JSONDecoder()
    text, number, place = "", 0, None
    with path.open("rb") as stream:
        decode = codecs.getincrementaldecoder("utf-8")("surrogatepass").decode
        while chunk := stream.read(BLANK_BYTES):
            try:
                text += decode(chunk)
            except UnicodeDecodeError:
                problem = f"{path} is no text in UTF-8."
                raise IncompleteRunError(problem, "Give the log as it was written.") from None
            place = place if place is not None else _end_of(r'"logs"\s*:\s*\[', text, 0)
            while place is not None:
                start = _end_of(r"[\s,]*(?=[^\s,])", text, place)
                if start is not None and text[start] == "]":
                    return
                try:
                    _, end = decoder.raw_decode(text, len(text) if start is None else start)
                except (ValueError, RecursionError):
                    break  # the sample goes on in what is not read yet
                yield _entry(path, number := number + 1, text[start:end].encode(*UTF8), "sample")
                text, place = text[end:], 0
            if len(text) > LINE_BYTES:
                break
    problem = f"{path} ends, or goes on without an end, behind sample {number}."
    raise IncompleteRunError(problem, "Was the log cut short?")


def _end_of(pattern: str, text: str, start: int) -> int | None:
    found = re.compile(pattern).search(text, start)
    return found.end() if found else None


def _entry(path: Path, number: int, line: bytes, kind: str = "line") -> Entry:
    """One sample without what is not used of it: most of the document, the prompt's settings."""
    try:
        entry = json.loads(line.decode(*UTF8))
        if type(entry["doc_id"]) is not int or entry["doc_id"] < 0:
            raise TypeError(f"doc_id is {entry['doc_id']!r:.40}, not a number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f": {one_line(error)[:120]}" if isinstance(error, TypeError) else ""
        problem = f"{path} {kind} {number} is not a logged sample{why}."
        raise IncompleteRunError(problem, "Was the log cut short?") from None
    kept = {key: value for key, value in entry.items() if key not in ("doc", "arguments")}
    kept["input"] = _prompt(entry)
    kept["doc"] = _needed(entry.get("doc"))
    if b"\\ud" not in line.lower() and b"\xed" not in line:  # no surrogate, escaped or encoded
        return kept
    text = json.dumps(kept, ensure_ascii=False)
    whole: Entry = json.loads(valid_text(text))
    return whole | {REPLACED: valid_text(text) != text}


def valid_text(value: Any) -> str:
    """Text with every unpaired surrogate, which no file can hold, replaced."""
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _prompt(entry: Entry) -> str:
    """The question as it was asked; the document's own where the log does not tell."""
    given = entry.get("input")
    if given is None:  # before 0.2.4: [[prompt, document, task, split]]
        given = entry.get("arguments")
        while isinstance(given, list):
            given = given[0] if given else None
    if isinstance(given, str) or given:
        return str(given)
    document = entry.get("doc")
    return str(document.get("question", "")) if isinstance(document, dict) else ""


def _needed(document: Any) -> Entry:
    """What scoring reads of a logged document; ten annotators' answers as their words alone."""
    if not isinstance(document, dict):
        return {}
    kept = {key: document[key] for key in NEEDED if key in document}
    if isinstance(given := kept.get("answers"), list):
        texts = [each.get("answer") if isinstance(each, dict) else each for each in given]
        kept["answers"] = [sys.intern(str(text)) for text in texts]
    return kept


def _logged(spec: TaskSpec, entry: Entry) -> LoggedSample:
    """An entry with the response that upstream's score is of: the first; MMMU's first right one.

    Raises:
        TypeError: there is no answer, or one that is no text.
        ValueError: the log does not tell which response was scored.
    """
    sample = LoggedSample(entry, _responses(entry))
    count = len(sample.responses)
    if spec.id == "mmmu" and isinstance(told := entry.get("mmmu_acc"), dict):
        readings = told["parsed_pred"]
        # Before 0.3.1 there was one reading of one response: a letter, or candidates of a number.
        is_open = told["question_type"] == "open"
        if isinstance(readings, str) or (is_open and "mmmu_acc_pass_at_k" not in entry):
            readings = [readings]
        if len(readings) != count:
            raise ValueError(f"it has {count} responses and {len(readings)} readings")
        right = [number for number, said in enumerate(readings) if mmmu_right(told, said)]
        sample.chosen = right[0] if right else 0
        entry["mmmu_acc"] = told | {"parsed_pred": [readings[sample.chosen]]}
    elif count > 1 and spec.answer == "text":
        raise ValueError(f"it has {count} responses, and its score may be of any of them")
    return sample


def _responses(entry: Entry) -> list[tuple[str, str]]:
    """Of each response that upstream took: what it scored, and what the model wrote.

    A thought is taken out of `filtered_resps` since 0.7; `resps`, the whole, is there only where
    it differs, and holds all responses where a filter took one or some of them. Both are nested
    in a list before 0.7, and in two where a filter leaves several responses.

    Raises:
        TypeError: there is no answer, or one that is no text.
    """
    told = [entry[key] for key in ("filtered_resps", "resps") if entry.get(key) not in (None, [])]
    if not told:
        if not entry.keys() & {"filtered_resps", "resps"}:
            raise TypeError("neither filtered_resps nor resps is there")
        return [("", "")]
    scored, whole = _texts(told[0]), _texts(told[-1])
    if entry.get("filtered_resps") in (None, []):
        return [(scored[0], scored[0])]  # the filter that every task has takes the first
    # A vote may have taken any of the responses.
    left = list(whole)
    generated = []
    for number, text in enumerate(scored):
        same = [each for each in left if text in (each, THOUGHTS.answer(each))]
        if same:
            left.remove(same[0])
        generated.append(same[0] if same else whole[number] if len(whole) == len(scored) else text)
    return list(zip(scored, generated, strict=True))


def _texts(value: Any) -> list[str]:
    """The responses to a document, however deep the lists around them are."""
    while isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    texts = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict | bool | list):
            raise TypeError(f"{each!r:.40} is no text")
        texts.append("" if each is None else str(each))
    return texts or [""]
