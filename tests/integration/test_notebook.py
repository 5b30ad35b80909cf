"""The Python API in a real Jupyter kernel: the notebook of the docs, then a stop button and a Ray of the user's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

from manta.runs import Run
from running import lines

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "finetune.ipynb"

pytestmark = pytest.mark.slow


class Kernel:
    """A running kernel: `run` gives the outputs of a cell, `interrupt` is the stop button."""

    def __init__(self, manager: Any, client: Any, folder: Path, notebook: Any):
        self.manager, self.client, self.folder, self.notebook = manager, client, folder, notebook

    def run(self, code: str) -> tuple[str, list[str], str]:
        """(status, names of the error if any, text of all outputs)."""
        texts: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            content = message["content"]
            texts.append(content.get("text") or str(content.get("data", {}).get("text/plain", "")))

        reply = self.client.execute_interactive(code, output_hook=hear, timeout=400)["content"]
        return reply["status"], [reply.get("ename", ""), reply.get("evalue", "")], "\n".join(texts)


@contextmanager
def kernel_in(folder: Path, cells: slice) -> Iterator[Kernel]:
    """A kernel in which these cells of the notebook were run; they and their outputs are kept in the folder."""
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder))
    try:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][cells]
        try:
            NotebookClient(notebook, km=manager, timeout=400).execute(cleanup_kc=False)
        finally:
            nbformat.write(notebook, folder / "executed.ipynb")
        yield Kernel(manager, client, folder, notebook)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel in which the notebook ran to its end."""
    with kernel_in(tmp_path_factory.mktemp("notebook"), slice(None)) as kernel:
        yield kernel


def outputs(kernel: Kernel, start: str) -> list[Any]:
    """Of the cell whose code begins so."""
    return next(
        cell.outputs for cell in kernel.notebook.cells if cell.cell_type == "code" and cell.source.startswith(start)
    )


def shown(kernel: Kernel, start: str) -> str:
    return "\n".join(
        str(each.get("text", "")) + str(each.get("data", {}).get("text/plain", "")) for each in outputs(kernel, start)
    )


def test_the_notebook_prepares_trains_evaluates_and_converts(kernel):
    assert "'rows': 900" in shown(kernel, "prepared =")
    assert "-100" in shown(kernel, "sample =")
    assert "status='finished'" in shown(kernel, "result =") and "steps=20" in shown(kernel, "result =")
    assert "Gain(mean=" in shown(kernel, "evaluation.gains")
    assert "Question: write forty-two in digits." in shown(kernel, "export =")
    run = Run(kernel.folder / "finetune/results/numbers")
    assert run.result()["status"] == "finished" and run.result()["world_sizes"] == [2]
    assert (run.export / "model.safetensors").exists()


def test_what_a_notebook_shows(kernel):
    bar = next(each for each in outputs(kernel, "result =") if "<progress" in str(each.get("data", {})))
    assert '<progress value="20" max="20">' in bar.data["text/html"] and "eval" in bar.data["text/plain"]
    table = next(each for each in outputs(kernel, "evaluation =") if each.output_type == "execute_result")
    assert table.data["text/html"].count("<tr>") == 3 and "tuned" in table.data["text/html"]
    written = [each.text for cell in kernel.notebook.cells for each in cell.outputs if each.output_type == "stream"]
    assert [text for text in written if "\x1b" in text] == []
    # Bars of libraries are theirs; the first cell imports transformers by itself, which misses ipywidgets.
    imported = [each.text for each in kernel.notebook.cells[0].outputs if each.output_type == "stream"]
    assert [text for text in written if "Warning" in text or "widgets" in text] == [
        text for text in imported if "TqdmWarning" in text
    ]


def test_a_finished_run_is_returned_at_once_and_a_wrong_setting_is_an_error_that_ends_nothing(kernel):
    status, _, text = kernel.run("manta.train(config).steps, manta.train.__module__")
    assert status == "ok" and "(20, 'manta.api')" in text
    status, error, _ = kernel.run("manta.train(config.model_copy(update={'learning_rate': 1.0}))")
    assert (status, error[0]) == ("error", "ConfigError") and "other settings" in error[1]
    status, error, _ = kernel.run("manta.convert('nowhere')")
    assert (status, error[0]) == ("error", "UserError")
    assert kernel.run("print(sum(range(4)))")[2].strip() == "6"


def test_the_stop_button_interrupts_and_the_same_cell_goes_on_on_a_ray_of_the_users_own(tmp_path):
    with kernel_in(tmp_path, slice(2)) as kernel:  # the model, the data, the settings
        ray = "import ray, logging; ray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False)"
        assert kernel.run(ray)[0] == "ok"
        setting = "long = config.model_copy(update={'max_steps': 40, 'stop_at_step': None, 'run_name': 'stopped'})"
        assert kernel.run(setting)[0] == "ok"
        run = Run(kernel.folder / "finetune/results/stopped")
        pressed = threading.Event()

        def press() -> None:
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and not run.latest():
                time.sleep(0.05)
            kernel.manager.interrupt_kernel()
            pressed.set()

        threading.Thread(target=press, daemon=True).start()
        status, error, _ = kernel.run("manta.train(long)")
        assert pressed.is_set() and (status, error[0]) == ("error", "KeyboardInterrupt"), error
        assert "goes on from" in error[1]
        assert run.result()["failure"] == "interrupted" and run.result()["steps"] < 40

        status, error, text = kernel.run("result = manta.train(long)\nprint(result.status, result.steps)")
        assert status == "ok", error
        assert "finished 40" in text and "goes on from" in text
        attempts = [event["step"] for event in lines(run.events_file) if event["kind"] == "attempt"]
        assert attempts[0] == 0 and attempts[-1] >= 10
        assert kernel.run("print(ray.is_initialized()); ray.shutdown()")[2].strip() == "True"
