"""Notebooks: whether this process is one, where lines go there, and an output that is written anew."""

from __future__ import annotations

import html
import logging
import sys
import warnings
from typing import Any

from rich.console import Console


def inside() -> bool:
    """Whether this process is a notebook's kernel."""
    return Console().is_jupyter


def console(quiet: bool = False) -> Console:
    """Where a stage says what it does: standard error, or in a notebook the cell's output, as plain lines."""
    if inside():
        # Libraries miss widgets, which nothing here needs.
        warnings.filterwarnings("ignore", message="IProgress not found")
        logging.getLogger("ray.widgets").setLevel(logging.ERROR)
        # A kernel says of its output (FORCE_COLOR) that it is a terminal; a live display would fill the cell.
        return Console(file=sys.stdout, force_jupyter=False, force_terminal=False, highlight=False, quiet=quiet)
    return Console(stderr=True, highlight=False, quiet=quiet)


class Area:
    """One output of a cell with a bar and a line of text, which each call of `show` writes anew. Needs no widgets."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, done: int, total: int, text: str) -> None:
        from IPython.display import display

        line = f"{done}/{total}  {text}"
        bar = f'<progress value="{done}" max="{total}"></progress>'
        shown = {"text/plain": line, "text/html": f"{bar} {html.escape(line)}"}
        if self._handle:
            self._handle.update(shown, raw=True)
        else:
            self._handle = display(shown, raw=True, display_id=True)
