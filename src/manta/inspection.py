"""A look at prepared data before it costs anything: figures, findings, and samples with what is trained marked."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from manta import manifest
from manta.config import Config
from manta.data import lint, packing
from manta.data.figures import left_out, of_split
from manta.data.prepare import QUARANTINE, Prepared
from manta.data.shards import TOKENIZED
from manta.data.source import SPLITS
from manta.data.tokenize import IGNORE, load_tokenizer
from manta.errors import UserError
from manta.page import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ON_PAGE = 50  # samples
OPEN, CLOSE = "⟦", "⟧"  # around what is trained, where colour is not to be had
_BARS = " ▁▂▃▄▅▆▇█"
_PACKED_BY_TRIAL = 100_000  # samples from which the fill that packing would give is worked out


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that make whole characters, all trained or all masked."""

    text: str
    ids: tuple[int, ...]
    trained: bool


@dataclass(frozen=True)
class Picture:
    """One sample as the model sees it. `row` is its row in the source."""

    split: str
    sample: int
    row: int
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def trained(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.trained)


@dataclass(frozen=True)
class Inspection:
    """What `manta inspect` shows of prepared data."""

    prepared: Prepared
    figures: dict[str, dict[str, Any]]  # per split
    left_out: dict[str, int]  # reason → rows
    quarantine: list[dict[str, Any]]
    findings: list[lint.Finding]
    pictures: list[Picture]


def inspect(
    prepared: Prepared, config: Config, samples: int = 3, rows: Sequence[int] = (), split: str = "training"
) -> Inspection:
    """Look at prepared data: the first `samples` samples of a split, or those of the source `rows`.

    Raises UserError if a row is not in that split.
    """
    about = prepared.about
    tokenizer = load_tokenizer(about["model"], config.trust_remote_code)
    counts = about["counts"]
    return Inspection(
        prepared,
        {split: _figures(prepared, about, split, config.per_device_train_batch_size) for split in SPLITS},
        left_out(counts),
        _quarantine(prepared),
        lint.findings(counts, config.lint, about["made_from"]["objective"]),
        list(_pictures(prepared, tokenizer, split, samples, rows)),
    )


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> tuple[Piece, ...]:
    """Tokens as text. A character that several tokens make stands in one piece."""
    found: list[Piece] = []
    held: list[int] = []
    for index, token in enumerate(ids):
        held.append(token)
        trained = labels[index] != IGNORE
        text = str(tokenizer.decode(held))
        ends = index + 1 == len(ids) or (labels[index + 1] != IGNORE) != trained
        if not text.endswith("\ufffd") or ends or len(held) == 8:
            found.append(Piece(text, tuple(held), trained))
            held = []
    return tuple(found)


def show(inspection: Inspection, console: Console, samples: int) -> None:
    """Print figures, findings and so many samples. What is trained is told by colour and by ⟦ ⟧."""
    console.print(_table(inspection))
    for split in TOKENIZED:
        if histogram := inspection.figures[split].get("histogram"):
            highest = max(histogram["counts"]) or 1
            bars = "".join(_BARS[-(-count * 8 // highest)] for count in histogram["counts"])
            low, high = histogram["from"], histogram["to"]
            console.print(f"{split} lengths  {low} {bars} {high} tokens", markup=False, highlight=False)
    for reason, rows in inspection.left_out.items():
        console.print(f"{reason}: {rows:,} rows", markup=False)
    for bad in inspection.quarantine[:3]:
        console.print(f"  {bad['where']}: {bad['reason']}", markup=False)
    for finding in inspection.findings:
        style = "red" if finding.level == "error" else "yellow"
        console.print(Text(f"{finding.level}: {finding}", style))
    console.print(Text.assemble("\n", (f"{OPEN}trained{CLOSE}", "bold green"), "  ", ("masked", "dim")))
    for picture in inspection.pictures[:samples]:
        share = f"{picture.trained} of {picture.tokens} tokens trained"
        console.rule(f"row {picture.row} · {picture.split} sample {picture.sample} · {share}", align="left")
        console.print(_as_text(picture), soft_wrap=True)


def write_html(inspection: Inspection, path: Path) -> None:
    """The same as one page that needs no network, in light and dark."""
    about = inspection.prepared.about
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(path, render("inspection.html", it=inspection, about=about, splits=SPLITS, mark=_mark))


def _figures(prepared: Prepared, about: dict[str, Any], split: str, batch: int) -> dict[str, Any]:
    """Of a split; of training samples also how full their sequences are, and would be if they were packed."""
    figures = of_split(prepared, split)
    is_open = split == "training" and "lengths" in figures and "fill" not in figures
    if is_open and about["max_seq_length"] >= figures["lengths"]["max"]:
        lengths, _ = prepared.lengths(split)
        some = np.arange(min(len(lengths), _PACKED_BY_TRIAL))
        trial = packing.pack(lengths, some, about["max_seq_length"])
        figures["would_fill"] = packing.fill(trial, lengths, about["max_seq_length"])
        batches = np.random.default_rng(0).permutation(lengths)[: len(lengths) // batch * batch].reshape(-1, batch)
        figures["padded_fill"] = float(batches.sum() / (batches.max(1).sum() * batch)) if len(batches) else 1.0
        figures["batch"] = batch
    return figures


def _quarantine(prepared: Prepared) -> list[dict[str, Any]]:
    with (prepared.path / QUARANTINE).open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(100), strict=False)]


def _pictures(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, split: str, count: int, rows: Sequence[int]
) -> Iterator[Picture]:
    if split not in TOKENIZED:
        raise UserError(f"Only {' and '.join(TOKENIZED)} are tokenized. Look at {prepared.text(split)}.")
    samples = prepared.tokenized(split)
    chosen = list(range(min(count, len(samples))))
    if rows:
        _, sources = prepared.lengths(split)
        chosen = np.flatnonzero(np.isin(sources, rows)).tolist()
        if missing := sorted(set(rows) - set(sources[chosen].tolist())):
            raise UserError(f"Rows {missing} have no sample in the {split} split: they are in another, or left out.")
    for index in chosen:
        sample = samples[index]
        yield Picture(split, index, sample["row"], pieces(tokenizer, sample["input_ids"], sample["labels"]))


def _table(inspection: Inspection) -> Table:
    table = Table(title=str(inspection.prepared.path), title_justify="left")
    for heading in ("", *SPLITS):
        table.add_column(heading, justify="left" if not heading else "right")

    def row(name: str, cell: Any) -> None:
        cells = [cell(figures) for figures in inspection.figures.values()]
        if any(cells):
            table.add_row(name, *cells)

    for name in ("rows", "samples", "tokens", "sequences"):
        row(name, lambda figures, name=name: f"{figures[name]:,}" if name in figures else "")
    row("trained share", lambda figures: f"{figures['share']:.1%}" if "share" in figures else "")
    for name in ("min", "median", "p95", "max"):
        row(
            f"length {name}", lambda figures, name=name: f"{figures['lengths'][name]:,}" if "lengths" in figures else ""
        )
    row("packed fill", lambda figures: f"{figures['fill']:.1%}" if "fill" in figures else "")
    if batch := inspection.figures["training"].get("batch"):
        row(
            f"fill, {batch} a batch",
            lambda figures: f"{figures['padded_fill']:.1%}" if "padded_fill" in figures else "",
        )
        row("fill, if packed", lambda figures: f"{figures['would_fill']:.1%}" if "would_fill" in figures else "")
    return table


def _as_text(picture: Picture) -> Text:
    text = Text()
    inside = False
    for piece in picture.pieces:
        if piece.trained != inside:
            text.append(OPEN if piece.trained else CLOSE, "bold green")
            inside = piece.trained
        text.append(piece.text.replace("\n", "⏎\n"), "bold green" if piece.trained else "dim")
    return text.append(CLOSE, "bold green") if inside else text


def _mark(text: str) -> Any:
    """Text for the page, with line ends to be seen."""
    from markupsafe import Markup

    return Markup(html.escape(text).replace("\n", "<i>⏎</i>\n"))
