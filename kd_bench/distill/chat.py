"""What a checkpoint's chat template makes of a conversation: prompt, answer and stop ids.

    prompt    the conversation up to where an answer begins: what evaluation sends
    answer    the answer's own words, tokenised as a continuation of the prompt
    stop      the token that ends an answer

Training, evaluation and `data show` all ask here. A template's `{% generation %}` marks are not
looked at: they may hold a space too many and leave the stop token out. What an answer is follows
from the data, where it begins from the generation prompt, how it ends from what the template
writes behind it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_bench.distill.data import Unreadable
from kd_bench.errors import UsageError, closest, one_line


def shipped_template(name: str) -> str:
    """The Jinja text of one of kd-bench's own chat templates."""
    path = Path(__file__).parent / "templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8").removesuffix("\n")


TEMPLATES = {name: shipped_template(name) for name in ("llava", "chatml", "plain")}
"""Templates by name, for checkpoints that bring none."""

PLAIN_FAMILIES = {"PaliGemmaProcessor"}
"""Families that know no roles: the processor itself writes begin token and line break."""

HINT = (
    "Give one by `prompt_template:` in the recipe or `--prompt-template` (a Jinja file, or "
    f"{', '.join(TEMPLATES)})."
)
QUESTION, ANSWER = "what is seen here", "a quiet harbour"  # asked of every template once
ANCHORS = ("\n", ":", "a", "1")  # texts that few tokenizers merge with what follows
SYSTEM, FOLLOWING = "be brief and kind", "and what else"  # asked where a template takes them
LIST_IN_TEXT = "{'type': "  # how a list of parts looks where a template takes it for a text
THOUGHT = re.compile(
    r"<(think|thinking|thought|reasoning)>.*</\1>|\[THINK\].*\[/THINK\]", re.DOTALL
)
KNOWN_ANSWERS = 10_000  # tokenised answers that are remembered

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Turns:
    """One conversation as its template writes it.

    The whole text is `prompt answers[0] stop between[0] answers[1] stop between[1] ...`.

    Attributes:
        prompts: up to each answer that is learnt, as evaluation would send it.
        answers: with the space that the template puts before them.
        between: from behind one stop token to where the next answer begins.
        left_out: earlier answers that stand otherwise once others follow (the template rewrites
            them, or a token reaches over the end of their prompt): context only.
        images: how many stand in front of the last answer that is learnt.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    between: tuple[str, ...] = ()
    left_out: int = 0
    images: int = 0

    @property
    def prompt(self) -> str:
        """Up to the first answer that is learnt."""
        return self.prompts[0]

    def since(self, number: int) -> "Turns":
        """Without the answers before that one."""
        return Turns(
            self.prompts[number:],
            self.answers[number:],
            self.between[number:],
            self.left_out + number,
            self.images,
        )


class ChatFormat:
    """How one checkpoint's conversations are written and tokenised.

    Args:
        processor: its processor; the template is its own, else its tokenizer's.
        learns: refuse a template that cannot teach: answered turns begin otherwise than its
            generation prompt (a thinking model's opens a thought), or nothing ends an answer.
            A model that is only asked needs neither.

    Raises:
        UsageError: there is no template, it cannot be used, or cannot teach.
    """

    def __init__(self, processor: Any, learns: bool = True) -> None:
        self._learns = learns
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token = str(getattr(processor, "image_token", None) or "<image>")
        self.template = _own_template(processor)
        self.plain = self.template is None and type(processor).__name__ in PLAIN_FAMILIES
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        # What is read as one token with a meaning of its own, wherever it stands.
        control = {str(token) for token in added if token.special and str(token).strip()}
        self._control_tokens = sorted(control, key=len, reverse=True)
        self._answer_ids: dict[str, tuple[list[int], bool]] = {}
        self._as_text: frozenset[str] = frozenset()  # roles whose content it takes as one string
        self._trims = False
        self._lead = ""
        if self.template is None and not self.plain:
            raise UsageError(
                f"The checkpoint's {type(processor).__name__} has no chat template, and its family "
                "has no form of its own.",
                HINT,
            )
        if self.plain:
            self._anchor, stop = "\n", self.tokenizer.eos_token
        else:
            self._anchor, stop = self._probe()
        if stop is None and learns:
            raise UsageError(
                "The chat template writes nothing behind an answer and the tokenizer has no end "
                "token, so a model could not learn to stop.",
                "Set the tokenizer's eos_token, or use a template that ends its turns.",
            )
        self.stop = stop or ""
        self.stop_ids = [int(self.tokenizer.convert_tokens_to_ids(stop))] if stop else []

    # What the template does

    def _probe(self) -> tuple[str, str | None]:
        """Learn the template's ways from one question and answer.

        Returns the text between a question and its answer, and what ends an answer.
        """
        asked = {"role": "user", "content": [{"type": "image"}, _text(QUESTION)]}
        prompt, whole = self._first_rendering([asked], [asked, _said(ANSWER)])
        head, _, tail = whole.rpartition(ANSWER)
        answered, asked_for = head.rstrip(), prompt.rstrip()
        added = answered.removeprefix(asked_for).strip()
        if head.startswith(prompt):
            # A thought that the template invents is no part of the answer; a space is.
            self._lead = "" if added else head[len(prompt) :]
        elif prompt.startswith(answered):
            added = asked_for.removeprefix(answered).strip()
        else:
            added = answered or "nothing"
        if added and not THOUGHT.fullmatch(added) and self._learns:
            raise UsageError(
                "The chat template writes an answered turn otherwise than its generation prompt: "
                f"{head[-60:]!r} against {prompt[-60:]!r}, so training would not see what "
                "evaluation sends.",
                "Use a template whose answered turn starts with the generation prompt.",
            )
        self._probe_system()
        spaced = f"  {ANSWER}  "
        self._trims = spaced not in self._render([asked, _said(spaced)], False)
        return prompt.rpartition(QUESTION)[2], self._stop_in(tail) or self._stop_between()

    def _probe_system(self) -> None:
        """Learn whether a system message's content is taken as parts or as one string."""
        said = [{"role": "system", "content": [_text(SYSTEM)]}]
        said.append({"role": "user", "content": [_text(QUESTION)]})
        kept = self._as_text
        for roles in (kept, kept ^ {"system"}):
            self._as_text = roles
            try:
                self._render(said, True)
            except Unreadable:
                continue
            return
        self._as_text = kept  # each row that has one will be told why it cannot be used

    def _stop_between(self) -> str | None:
        """What ends an answer that another turn follows, else the tokenizer's end token."""
        asked = {"role": "user", "content": [_text(QUESTION)]}
        following = {"role": "user", "content": [_text(FOLLOWING)]}
        try:
            opened = self._render([asked], True).partition(QUESTION)[0]
            whole = self._render([asked, _said(ANSWER), following], True)
        except Unreadable:  # it knows one question, or none without an image
            return self.tokenizer.eos_token
        between = whole.rpartition(FOLLOWING)[0].rpartition(ANSWER)[2].lstrip()
        if opened.endswith(between):  # the next turn's header alone
            return self.tokenizer.eos_token
        return self._stop_in(between) or self.tokenizer.eos_token

    def _first_rendering(self, asked: Messages, answered: Messages) -> tuple[str, str]:
        """Both renderings, with the content as parts or, where that fails, as one string."""
        problem = ""
        for as_text in ((), ("assistant",), ("user", "assistant", "system")):
            self._as_text = frozenset(as_text)
            try:
                prompt, whole = self._render(asked, True), self._render(answered, False)
            except Unreadable as error:
                problem = problem or str(error)
                continue
            images = prompt.count(self.image_token)
            if images != 1:
                problem = problem or f"it writes {images} places for one image"
            elif QUESTION not in prompt or ANSWER not in whole:
                problem = problem or "it leaves out what is said"
            else:
                return prompt, whole
        raise UsageError(f"The chat template cannot be used: {problem}.", HINT)

    def _stop_in(self, tail: str) -> str | None:
        """The added token that `tail` begins with, white space aside."""
        rest = tail.lstrip()
        known = [*self.tokenizer.get_added_vocab(), self.tokenizer.eos_token]
        found = (token for token in known if token and rest.startswith(token))
        return max(found, key=len, default=None)

    def _render(self, messages: Messages, prompt: bool) -> str:
        given = []
        for message in messages:
            if message["role"] in self._as_text:
                mark = f"{self.image_token}\n"
                parts = (mark if p["type"] == "image" else p["text"] for p in message["content"])
                message = {**message, "content": "".join(parts)}
            given.append(message)
        try:
            made = self.processor.apply_chat_template(
                given,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # a template may raise what it likes
            raise Unreadable(f"the chat template refuses it: {one_line(error)}") from None
        _refuse_lost_text(str(made), messages)
        return str(made)

    # One conversation

    def prompt(self, messages: Messages) -> str:
        """The messages up to where the next answer begins.

        Raises:
            Unreadable: the template refuses them, or an image's mark stands in the text.
        """
        images = images_in(messages)
        for message in messages:
            for part in message["content"]:
                if self.image_token in part.get("text", ""):
                    raise Unreadable(f"its text holds {self.image_token}, the mark of an image")
        if self.plain:
            text = "".join(
                part["text"] for m in messages for part in m["content"] if part["type"] != "image"
            )
            return self.image_token * images + text
        made = self._render(messages, True)
        if made.count(self.image_token) != images:
            raise Unreadable(
                f"the chat template writes {made.count(self.image_token)} places for "
                f"{images} images"
            )
        return made

    def turns(self, messages: Messages) -> Turns:
        """Every answer of a conversation that the model can be asked for as it stands there.

        Raises:
            Unreadable: an answer is empty, holds an image or the stop token, or `prompt` refuses.
        """
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not places:
            raise Unreadable("no answer to learn from")
        for message in messages[: places[-1]]:
            self._refuse_control_tokens(message)
        answers = [self._lead + self._answer(messages[place]) for place in places]
        if self.plain:  # one question, one answer: what follows has no form
            asked = messages[: places[0]]
            return Turns(
                (self.prompt(asked),), (answers[0],), (), len(places) - 1, images_in(asked)
            )
        prompts = [self.prompt(messages[:place]) for place in places]
        first = 0  # answer from which on each prompt goes on where the one before ended
        between: list[str] = []
        for number in range(1, len(places)):
            before = prompts[number - 1] + answers[number - 1]
            if prompts[number].startswith(before):
                # What the template writes, without the stop token, which is set anew.
                text = prompts[number][len(before) :]
                rest = text.lstrip()
                follows = rest.startswith(self.stop)
                between.append(rest[len(self.stop) :] if follows else text)
            else:
                first = number
                between.append("")
        images = images_in(messages[: places[-1]])
        return Turns(tuple(prompts), tuple(answers), tuple(between), images=images).since(first)

    def _refuse_control_tokens(self, message: dict[str, Any]) -> None:
        """Text that spells a control token would be tokenised to it: a turn that nobody took."""
        for part in message["content"]:
            text = part.get("text", "")
            for token in self._control_tokens:
                if token in text and token != self.image_token:
                    whose = "an answer" if message["role"] == "assistant" else "its text"
                    raise Unreadable(f"{whose} holds {token}, a control token of the tokenizer")

    def _answer(self, message: dict[str, Any]) -> str:
        if any(part["type"] == "image" for part in message["content"]):
            raise Unreadable("an answer holds an image's mark")
        text = "".join(part["text"] for part in message["content"])
        if not text.strip():
            raise Unreadable("an answer is empty")
        for token in (self.image_token, self.stop):
            if token in text:
                raise Unreadable(f"an answer holds {token}")
        self._refuse_control_tokens(message)
        return text.strip() if self._trims else text

    # Ids

    def adds_special_tokens(self, prompt: str) -> bool:
        """False where the template has written the begin token already."""
        begin = self.tokenizer.bos_token
        return not (begin and prompt.startswith(begin))

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of prompts as they stand; images' marks are not expanded."""
        if not prompts:
            return []
        special = self.adds_special_tokens(prompts[0])
        return list(self.tokenizer(list(prompts), add_special_tokens=special)["input_ids"])

    def processed(
        self, prompts: Sequence[str], images: Sequence[Sequence[Any]], **more: Any
    ) -> Any:
        """What the model is given for prompts with their images: the processor's own call.

        Args:
            images: those of each prompt, so that a processor knows which belong together.
        """
        inputs: dict[str, Any] = {"text": list(prompts), "return_tensors": "pt", **more}
        if any(images):
            inputs["images"] = [list(group) for group in images]
        if not self.adds_special_tokens(prompts[0]):
            inputs["add_special_tokens"] = False
        made = self.processor(**inputs)
        made.pop("labels", None)  # PaliGemma's, of a prompt without its answer
        return made

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Ids of each answer behind its prompt, without the stop token."""
        known = self._answer_ids
        if len(known) > KNOWN_ANSWERS:
            known.clear()
        fresh = list({answer for answer in answers if answer not in known})
        known.update(zip(fresh, self._behind(self._anchor, fresh), strict=True))
        return [known[answer][0] for answer in answers]

    def settled(self, turns: Turns) -> Turns:
        """Without earlier answers that a later prompt tokenises otherwise than their own.

        Only for answers that `answer_ids` has just been asked for.
        """
        merged = [self._answer_ids[answer][1] for answer in turns.answers[:-1]]
        return turns.since(len(merged) - merged[::-1].index(True)) if any(merged) else turns

    def between_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that stand behind a stop token."""
        return [ids for ids, _ in self._behind(self.stop, texts)]

    def _behind(self, anchor: str, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Ids of texts as they are tokenised behind `anchor`, and whether it merges with them.

        Where it does (a prompt that ends in a space), behind another text: a prompt is tokenised
        before there is an answer, so no token may reach over its end.
        """
        if not texts:
            return []
        anchors = list(dict.fromkeys(each for each in (anchor, *ANCHORS) if each))
        lengths = [len(ids) for ids in self._ids(anchors)]
        found: list[tuple[list[int], bool]] = []
        whole = self._ids([anchors[0] + text for text in texts])
        start = self._ids([anchors[0]])[0]
        for text, ids in zip(texts, whole, strict=True):
            if ids[: lengths[0]] == start:
                found.append((ids[lengths[0] :], False))
                continue
            for other, length in zip(anchors[1:], lengths[1:], strict=True):
                head, both = self._ids([other, other + text])
                if both[:length] == head:
                    found.append((both[length:], True))
                    break
            else:
                found.append((self._ids([text])[0], True))
        return found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def use_template(
    processor: Any, template: str | None = None, variables: Mapping[str, Any] | None = None
) -> None:
    """Set a prompt template in place of the checkpoint's own, or variables of either, if given.

    Both are saved with the processor, so that a trained student is asked as it was taught.

    Args:
        template: a name, a file or Jinja text; None for the checkpoint's own.
        variables: such as enable_thinking=False, what `chat_template_kwargs` is elsewhere.

    Raises:
        UsageError: there is no template, or it reads no such variable.
    """
    if template is None and not variables:
        return
    text = read_template(template) if template else _own_template(processor) or ""
    if text in TEMPLATES.values():
        text = text.replace("<image>", str(getattr(processor, "image_token", None) or "<image>"))
    processor.chat_template = _with_variables(text, variables or {}) or None


def _with_variables(text: str, variables: Mapping[str, Any]) -> str:
    """The template behind assignments: whoever renders it renders it so."""
    from jinja2 import Environment, meta

    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)  # transformers' own mark
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    read = meta.find_undeclared_variables(tree)
    read -= {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
    for name in variables:
        if name not in read:
            raise UsageError(
                f"The chat template reads no variable {name!r}.{closest(name, sorted(read))}",
                f"It reads {', '.join(sorted(read)) or 'none'}.",
            )
    pairs = sorted(variables.items())
    assigned = "".join(f"{{% set {name} = {json.dumps(value)} %}}" for name, value in pairs)
    # Templates are rendered with `trim_blocks`: a line break behind a block is dropped.
    return assigned + "\n" * text.startswith("\n") + text


def read_template(name_or_path: str) -> str:
    """The Jinja text of a prompt template: a name of `TEMPLATES`, a file, or that text itself.

    Raises:
        UsageError: none of them.
    """
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    if "{{" in name_or_path or "{%" in name_or_path:
        return name_or_path
    try:
        return Path(name_or_path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError):
        hint = closest(name_or_path, list(TEMPLATES))
        raise UsageError(
            f"There is no prompt template {name_or_path!r}.{hint}",
            f"Give a Jinja file, or one of {', '.join(TEMPLATES)}.",
        ) from None


def _own_template(processor: Any) -> str | None:
    """The processor's chat template, else its tokenizer's; of several, the one called default."""
    for owner in (processor, processor.tokenizer):
        found = getattr(owner, "chat_template", None)
        if isinstance(found, dict):
            found = found.get("default") or next(iter(found.values()), None)
        if found:
            return str(found)
    return None


def images_in(messages: Messages) -> int:
    """How many places for images the messages have."""
    return sum(part["type"] == "image" for m in messages for part in m["content"])


def _refuse_lost_text(made: str, messages: Messages) -> None:
    """Refuse a rendering that leaves out what is said, or writes parts as Python's text.

    Earlier answers may be rewritten (thoughts are dropped), see `Turns`.
    """
    lists = made.count(LIST_IN_TEXT)
    for message in messages:
        for part in message["content"]:
            text = part.get("text", "")
            lists -= text.count(LIST_IN_TEXT)
            if message["role"] != "assistant" and text.strip() not in made:
                what = "its system text" if message["role"] == "system" else "what is said"
                raise Unreadable(f"the chat template leaves out {what}")
    if lists > 0:
        raise Unreadable("the chat template writes its parts as Python's text")


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [_text(text)]}
