"""The commands that the documents show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"```(?:bash|sh|console)\n(.*?)```", re.S)
_INLINE = re.compile(r"(?<!`)`(manta [^`\n]+)`(?!`)")
_NOTE = re.compile(r"^#\s+((?:manta|recipes/)\S* .+?)(?:\s{2,}\(.*)?$", re.M)


@dataclass(frozen=True)
class Command:
    """A command as words, and where it stands."""

    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


def commands(paths: list[Path] = DOCUMENTS) -> Iterator[Command]:
    """Of all shell blocks, and of the comments of recipes."""
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for block in _FENCE.findall(text) if path.suffix == ".md" else _NOTE.findall(text):
            for words in _split(block):
                yield Command(path.name, tuple(words))


def inline(paths: list[Path] = DOCUMENTS) -> Iterator[Command]:
    """`manta …` in the middle of a text."""
    for path in paths:
        for found in _INLINE.findall(path.read_text(encoding="utf-8")):
            yield Command(path.name, tuple(shlex.split(found)))


def _split(block: str) -> Iterator[list[str]]:
    """The simple commands of a shell text: by line, `;`, `&`, `|`; without comments."""
    words: list[str] = []
    for line in [*block.replace("\\\n", " ").replace("\n\n", "\n").split("\n"), ""]:
        # A text in quotes may go over several lines.
        words.append(line)
        try:
            lexer = shlex.shlex("\n".join(words), posix=True, punctuation_chars=";&|")
            lexer.whitespace_split = True
            tokens = list(lexer)
        except ValueError:
            continue
        words = []
        command: list[str] = []
        for token in [*tokens, ";"]:
            if token and set(token) <= set(";&|"):
                if command:
                    yield command
                command = []
            else:
                command.append(token)
