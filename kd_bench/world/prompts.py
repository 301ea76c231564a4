"""The prompts and answers of the ten benchmarks, as lmms-eval 0.7.3 words them by default.

Training conversations are made of these. Evaluation uses upstream's own code; a test compares both.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from typing import Any

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接使用所提供的选项字母作为答案回答。"
OPTIONS = "There are several options:"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
FIXED_LINES = (SHORT, LETTER, LETTER_CN, OPTIONS, UNANSWERABLE)

Row = Mapping[str, Any]


def _mmbench(row: Row) -> str:
    options = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD" if row[letter])
    hint = f"{row['hint']} " if row["hint"] else ""
    return f"{hint}{row['question']} {OPTIONS}\n{options}\n"


def _scienceqa(row: Row) -> str:
    options = "\n".join(f"{chr(65 + k)}. {choice}" for k, choice in enumerate(row["choices"]))
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return f"{context}{row['question']}\n{options}{LETTER}"


def _mmmu(row: Row) -> str:
    if row["question_type"] == "open":
        return f"{row['question']}\n{SHORT}"
    choices = ast.literal_eval(row["options"])
    options = "\n".join(f"{chr(65 + k)}. {choice}" for k, choice in enumerate(choices))
    return f"{row['question']}\n{options}\n{LETTER}"


def prompt(benchmark: str, row: Row) -> str:
    """Return the text that lmms-eval asks a row's question with (MMMU keeps its <image n>)."""
    question = str(row["question"])
    if benchmark == "mmbench_en":
        return _mmbench(row) + LETTER
    if benchmark == "mmbench_cn":
        return _mmbench(row) + LETTER_CN
    if benchmark == "scienceqa_img":
        return _scienceqa(row)
    if benchmark == "mmmu":
        return _mmmu(row)
    if benchmark == "vizwiz_vqa":
        return question.capitalize() + UNANSWERABLE + SHORT
    if benchmark == "textvqa":
        return question.capitalize() + SHORT
    return question.replace(" Please answer yes or no.", "") + SHORT


def oracle_answer(benchmark: str, row: Row) -> str:
    """Return the answer that gets the highest score on a row, from the row's own targets."""
    if benchmark == "scienceqa_img":
        return chr(65 + int(row["answer"]))
    if benchmark == "vqav2":
        return _majority([answer["answer"] for answer in row["answers"]])
    if benchmark in ("textvqa", "vizwiz_vqa"):
        return _majority(list(row["answers"]))
    if benchmark in ("mme", "pope"):
        return str(row["answer"]).lower()
    return str(row["answer"])


def _majority(answers: list[str]) -> str:
    return Counter(answers).most_common(1)[0][0]
