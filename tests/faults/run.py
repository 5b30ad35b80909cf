"""Inject every fault of the matrix into real runs and write down what came of it: `make faults`.

    PYTHONPATH=tests python -m faults.run [SCENARIO ...]

Writes benchmarks/results/<date>-faults.{json,md}, and exits with 1 if a row does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from faults.bench import Bench, Row
from faults.scenarios import SCENARIOS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", choices=[*SCENARIOS, []], metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the table")
    options = parser.parse_args()
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # through the blocks that end what was started
    with TemporaryDirectory(prefix="manta-faults-") as name:
        bench = Bench(Path(name))
        for scenario in options.scenarios or SCENARIOS:
            try:
                SCENARIOS[scenario](bench)
            except Exception as error:
                bench.rows.append(Row(scenario, "the whole scenario", problems=[f"{type(error).__name__}: {error}"]))
                print(f"{scenario}: {bench.rows[-1].problems}", flush=True)
    write(bench.rows, time.monotonic() - start, options.results)
    sys.exit(not all(row.holds for row in bench.rows))


def write(rows: list[Row], seconds: float, folder: Path) -> None:
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("manta-train", "ray", "torch", "transformers", "peft")},
        "seconds": round(seconds),
        "hold": sum(row.holds for row in rows),
        "rows": [{**asdict(row), "holds": row.holds} for row in rows],
    }
    path = folder / f"{report['date']}-faults"
    path.with_suffix(".json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = (
        f"# The fault matrix, {report['date']}\n\n"
        f"{report['hold']} of {len(rows)} injections hold; {report['machine']}; {seconds / 60:.0f} minutes; "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        + ". Two workers, compared with an undisturbed run of the same settings.\n\n"
        "| fault | injected | holds | wasted steps | samples lost/repeated | max \\|Δloss\\| | max \\|Δweights\\| "
        "| s to the first new step | user actions |\n|---|---|---|---|---|---|---|---|---|\n"
        + "".join(_line(row) for row in rows)
        + "".join(f"\n{row.fault}, {row.injected}: {'; '.join(row.problems)}\n" for row in rows if row.problems)
        + "\nWhere a figure does not apply there is none. Command: `make faults`.\n"
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def _line(row: Row) -> str:
    samples = "" if row.samples_lost is None else f"{row.samples_lost}/{row.samples_repeated}"
    gaps = ["" if gap is None else f"{gap:.1e}" if gap else "0" for gap in (row.max_loss_gap, row.max_weight_gap)]
    seconds = "" if row.seconds_to_new_step is None else f"{row.seconds_to_new_step:.1f}"
    wasted = "" if row.wasted_steps is None else str(row.wasted_steps)
    holds = "yes" if row.holds else "**no**"
    cells = [row.fault, row.injected, holds, wasted, samples, *gaps, seconds, str(row.user_actions)]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
