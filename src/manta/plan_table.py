"""A plan for people: what is trained and how, where memory goes, and what it takes."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30
# What each part of the memory is, in the order of the table.
PARTS = {
    "framework": "Python, torch and the libraries",
    "weights": "this worker's part of the base",
    "adapters": "LoRA, on every worker",
    "optimizer": "its state",
    "gradients": "of what is trained",
    "activations": "kept for the backward pass, and at work",
    "logits": "and their gradients, as if every token were trained",
    "casts": "half-precision copies of weights",
    "gathered": "layers that FSDP makes whole for a moment",
    "held": "what the heap keeps of what was freed",
    "runtime": "threads, buffers of kernels",
    "spare": "a process that is started ahead of a restart",
    "copies": "a checkpoint that is being written",
}


def show(found: dict[str, Any], console: Console) -> None:
    """Print it."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    place, chosen, work = found["place"], found["chosen"], found["work"]
    share = found["trainable"] / found["parameters"]
    counts = f"{_count(found['parameters'])} parameters, {_count(found['trainable'])} trained"
    say(f"{found['model']}: {counts} ({share:.1%}, {found['training']})")
    sharded = f"{chosen['sharding_strategy']}, " * (place["workers"] > 1)
    say(
        f"{place['workers']} worker{'s' if place['workers'] > 1 else ''} on {place['name']}: {chosen['dtype']}, "
        f"{sharded}{chosen['attention']} attention, "
        f"{'padded' if chosen['layout'] == 'padded' else 'without padding'}, gradient checkpointing "
        f"{chosen['gradient_checkpointing']} ({chosen['why']})"
    )
    console.print(_memory(found))
    _say_whether_it_fits(found, say)
    if "probe" in found:
        measured = found["probe"]
        say(
            f"Probe: {_size(measured['peak'])} at most on {measured['workers']} × {measured['device']}, estimated "
            f"{_size(measured['estimate'])} ({measured['ratio']:.2f} of it)"
        )
    product = f"{work['steps']:,} steps × {work['tokens_per_step']:,} tokens = {_count(work['tokens'])} tokens"
    say(f"{product} ({_told(work)})")
    time = found["time"]
    rate = f" at {time['tokens_per_second']:,.0f} tokens/s" if time["tokens_per_second"] else ""
    say(f"Time: {_hours(time['hours'])}{rate} ({time['from']})")
    disk = found["disk"]
    room = "" if disk["free"] is None else f"; {_size(disk['free'])} free: {'fits' if disk['fits'] else 'too little'}"
    say(
        f"Disk: {_size(disk['run'])} for up to {disk['at_once']} checkpoints at once of {_size(disk['weights'])} "
        f"weights and {_size(disk['optimizer'])} optimizer state{room}; merged, {_size(disk['export'])}"
    )
    if found["accelerators"]:
        console.print(_accelerators(found["accelerators"], place["workers"]))


def _memory(found: dict[str, Any]) -> Table:
    table = Table(title="Memory of one worker", title_justify="left")
    for column, where in (("part", "left"), ("size", "right"), ("what", "left")):
        table.add_column(column, justify=where)  # type: ignore[arg-type]
    parts = found["memory"]
    for name, about in PARTS.items():
        if parts.get(name):
            table.add_row(name, _size(parts[name]), about)
    table.add_section()
    table.add_row("total", _size(parts["total"]), f"of {_size(found['place']['room'])} that it may have")
    return table


def _say_whether_it_fits(found: dict[str, Any], say: Any) -> None:
    if found["fits"] is None:
        say("What a step needs is not known: this model cannot run without storage. --probe measures it.")
    elif found["fits"]:
        say("It fits.")
    else:
        say("It does not fit. What would need less, each by itself:")
        for each in found["remedies"]:
            say(f"  {each['change']}: {_size(each['needs'])}, {'fits' if each['fits'] else 'still too much'}")


def _accelerators(rows: list[dict[str, Any]], workers: int) -> Table:
    title = f"{workers} worker{'s' if workers > 1 else ''} elsewhere, at {rows[0]['mfu']:.0%} of the published peak"
    table = Table(title=title, title_justify="left")
    for column in ("GPU", "may have", "needs", "fits", "checkpointing", "tokens/s", "time"):
        table.add_column(column, justify="left" if column in ("GPU", "fits", "checkpointing") else "right")
    for row in rows:
        fits = "?" if row["fits"] is None else "yes" if row["fits"] else "no"
        known = row["fits"] is not None
        table.add_row(
            row["name"],
            _size(row["room"]),
            _size(row["needs"]) if known else "?",
            fits,
            row["gradient_checkpointing"],
            f"{row['tokens_per_second']:,.0f}",
            _hours(row["hours"]),
        )
    return table


def _told(work: dict[str, Any]) -> str:
    if work["from"] == "assumed":
        return "as if every sequence had max_seq_length: the data is not here"
    counted = "prepared data" if work["from"] == "prepared" else "a sample of the data"
    return f"{counted}: {work['sequences']:,} sequences, {work['mean_tokens']:,.0f} tokens on average"


def _count(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,.0f}"


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.1f} MiB"


def _hours(hours: float | None) -> str:
    if hours is None:
        return "unknown"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"
