"""docs/troubleshooting.md as the catalogue that it is: each error by its heading, with the message and the exit code.

The page is the only list: tests produce each error for real and compare what was printed with what the page shows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
_ENTRY = re.compile(
    r"^### ([^\n]+)\n\n```text\n(?:\$ [^\n]+\n)?(.+?)\n```\n\nExit code (\d+)\. (.+?)(?=^##|\Z)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Entry:
    message: str  # where it differs from time to time, it has …
    code: int
    about: str


@cache
def entries() -> dict[str, Entry]:
    """By heading."""
    return {title: Entry(message, int(code), about) for title, message, code, about in _ENTRY.findall(PAGE.read_text())}


def check(title: str, printed: str, code: int | None = None) -> None:
    """`printed` ends in the message of the page, whatever its lines' width, and `code` is the one that it names."""
    entry = entries()[title]
    wanted, found = (" ".join(text.split()).removeprefix("manta: ") for text in (entry.message, printed))
    pattern = ".+?".join(map(re.escape, wanted.split("…")))
    assert re.search(f"{pattern}$", found), f"printed:\n{printed}\n\nthe page has:\n{entry.message}"
    assert "Traceback" not in printed
    assert code in (None, entry.code), f"exit code {code}, and the page has {entry.code}"
