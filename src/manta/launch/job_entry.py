"""What the driver's pod of a RayJob runs: python -m manta.launch.job_entry

It trains by the recipe in MANTA_RECIPE, and writes the merged model once the run has finished. A word without a blank:
the operator pastes a job's command into a shell's line, from which Ray's command line makes another.
https://github.com/ray-project/kuberay/blob/master/ray-operator/controllers/ray/common/job.go
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from manta.config import Config
from manta.errors import UserError
from manta.launch import job
from manta.launch.supervise import say

RECIPE = "MANTA_RECIPE"
EXPORT = "MANTA_EXPORT"


def main() -> int:
    """Exit code: that of the driver, or of the conversion after it."""
    text = os.environ.get(RECIPE)
    if text is None:
        say(f"{RECIPE} is not set: this is the command of a job that `manta launch kubernetes` renders.")
        return 2
    # Whoever stops a job signals all of its processes: the driver saves, and this one waits for it.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(text, encoding="utf-8")
        try:
            config = Config.load(recipe)
        except UserError as error:
            say(str(error))
            return 2
        code = _run("train", "--config", str(recipe), "--ray_address", "auto")
    if code == 0 and os.environ.get(EXPORT):
        code = _run(*job.convert_command(config)[1:])
    return code


def _run(*arguments: str) -> int:
    code = subprocess.run([sys.executable, "-m", "manta", *arguments]).returncode
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
