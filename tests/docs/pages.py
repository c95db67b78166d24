"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        ROOT / "docker" / "README.md",
        *(ROOT / "examples").rglob("README.md"),
    }
)
_BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its page, relative to the repository.
        number: its number among the blocks of the page, from 1.
        language: ``console``, ``python``, ``yaml``, …
        text: what is inside.
    """

    page: str
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}, block {self.number} ({self.language})"

    @property
    def commands(self) -> list[str]:
        """The commands of a block of a terminal: without comments and empty lines, continued lines as one."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [command for line in _joined(lines) if (command := _without_comment(line).strip())]

    @property
    def file_name(self) -> str | None:
        """The name of the file that the block shows, if its first line is a comment with nothing else."""
        found = re.match(r"# ([\w.-]+\.(?:yaml|py))\n", self.text)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    found = _BLOCK.findall(page.read_text())
    name = str(page.relative_to(ROOT))
    return [Block(name, number, language, text) for number, (language, text) in enumerate(found, 1)]


def _joined(lines: list[str]) -> list[str]:
    """Lines whose quotes are closed: a text over several lines is one."""
    found: list[str] = []
    for line in lines:
        if found and _open(found[-1]):
            found[-1] += "\n" + line
        else:
            found.append(line)
    return found


def _open(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


def _without_comment(line: str) -> str:
    """A line up to the ``#`` that begins a word outside quotes, where a shell ends it too."""
    quote = ""
    for place, character in enumerate(line):
        if quote:
            quote = "" if character == quote and line[place - 1] != "\\" else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (place == 0 or line[place - 1].isspace()):
            return line[:place]
    return line
