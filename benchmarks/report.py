"""What every benchmark says of itself, and where its result goes: benchmarks/results/<date>-<name>.{json,md}."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def about(*packages: str) -> dict[str, Any]:
    """Date, machine, and versions of what was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in packages},
    }


def where(report: dict[str, Any]) -> str:
    """Machine and versions, for people."""
    return f"{report['machine']}; " + ", ".join(f"{name} {number}" for name, number in report["versions"].items())


def publish(name: str, report: dict[str, Any], text: str, to_files: bool = True) -> None:
    """Print `text`, and keep it with the figures."""
    print(text)
    if to_files:
        path = RESULTS / f"{report['date']}-{name}"
        path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(text, encoding="utf-8")
