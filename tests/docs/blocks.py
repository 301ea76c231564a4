"""The code blocks of README and docs: where they stand, and whether a test can run them."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = ("sh", "python", "yaml")
NEEDS = ("a GPU", "a download", "hours")
"""What `<!-- needs: ... -->` above a block may say: it is read and not run."""


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: file below the repository.
        line: of its first line, from 1.
        language: the word behind the fence.
        needs: why it is not run; empty where it is.
        text: what stands between the fences.
    """

    page: str
    line: int
    language: str
    needs: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The shell's commands, one a line, without comments."""
        whole = self.text.replace("\\\n", " ")
        lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in whole.split("\n"))
        return [line for line in lines if line] if self.language == "sh" else []


def pages() -> list[Path]:
    """Everything that a user reads."""
    own = ("README.md", "CONTRIBUTING.md", "results/README.md", "tasks/README.md")
    return [ROOT / name for name in own] + sorted((ROOT / "docs").glob("*.md"))


@cache
def blocks_of(page: Path) -> tuple[Block, ...]:
    """The fenced blocks of a page in their order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").split("\n")
    start, language, needs = 0, "", ""
    inside = False
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not inside and (mark := re.fullmatch(r"<!-- needs: (.+) -->", text)):
            needs = mark[1]
        elif text.startswith("```") and not inside:
            inside, start, language = True, number + 1, text.removeprefix("```").strip()
        elif text == "```":
            body = "\n".join(lines[start - 1 : number - 1]) + "\n"
            name = page.relative_to(ROOT).as_posix()
            found.append(Block(name, start, language, needs, body))
            inside, needs = False, ""
        elif text and not inside:
            needs = ""
    return tuple(found)
