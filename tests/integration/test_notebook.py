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
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from manta.runs import Run
from running import lines

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "finetune.ipynb"

pytestmark = pytest.mark.slow


class Kernel:
    """A running kernel with a notebook: `run` adds a cell, `manager.interrupt_kernel` is the stop button."""

    def __init__(self, manager: KernelManager, client: NotebookClient, folder: Path):
        self.manager, self.client, self.folder, self.notebook = manager, client, folder, client.nb

    def run(self, code: str) -> tuple[str, str]:
        """What the new cell printed, or returned; and its error, as `name: text`, or nothing."""
        cell = nbformat.v4.new_code_cell(code, metadata={"tags": ["raises-exception"]})
        self.notebook.cells.append(cell)
        self.client.execute_cell(cell, len(self.notebook.cells) - 1)
        errors = [f"{each.ename}: {each.evalue}" for each in cell.outputs if each.output_type == "error"]
        return text_of(cell.outputs), "".join(errors)


def text_of(outputs: list[Any]) -> str:
    return "\n".join(str(each.get("text", "")) + str(each.get("data", {}).get("text/plain", "")) for each in outputs)


@contextmanager
def kernel_in(folder: Path, cells: slice) -> Iterator[Kernel]:
    """A kernel in which these cells of the notebook were run; they and their outputs are kept in the folder."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(folder))
    try:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][cells]
        client = NotebookClient(notebook, km=manager, timeout=400)
        try:
            client.execute()
            yield Kernel(manager, client, folder)
        finally:
            nbformat.write(notebook, folder / "executed.ipynb")
            if client.kc:
                client.kc.stop_channels()
    finally:
        manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel in which the notebook ran to its end."""
    with kernel_in(tmp_path_factory.mktemp("notebook"), slice(None)) as kernel:
        yield kernel


def outputs(kernel: Kernel, start: str) -> list[Any]:
    """Of the cell whose code begins so."""
    return next(cell.outputs for cell in kernel.notebook.cells if cell.source.startswith(start))


def shown(kernel: Kernel, start: str) -> str:
    return text_of(outputs(kernel, start))


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
    text, error = kernel.run("manta.train(config).steps, manta.train.__module__")
    assert not error and "(20, 'manta.api')" in text
    _, error = kernel.run("manta.train(config.model_copy(update={'learning_rate': 1.0}))")
    assert error.startswith("ConfigError") and "other settings" in error
    _, error = kernel.run("manta.convert('nowhere')")
    assert error.startswith("UserError")
    assert kernel.run("print(sum(range(4)))") == ("6\n", "")


def test_the_stop_button_interrupts_and_the_same_cell_goes_on_on_a_ray_of_the_users_own(tmp_path):
    with kernel_in(tmp_path, slice(2)) as kernel:  # the model, the data, the settings
        ray = "import ray\nray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False)"
        assert not kernel.run(ray)[1]
        assert not kernel.run("long = config.model_copy(update={'max_steps': 40, 'run_name': 'stopped'})")[1]
        run = Run(kernel.folder / "finetune/results/stopped")
        pressed = threading.Event()

        def press() -> None:
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and not run.latest():
                time.sleep(0.05)
            kernel.manager.interrupt_kernel()
            pressed.set()

        threading.Thread(target=press, daemon=True).start()
        _, error = kernel.run("manta.train(long)")
        assert pressed.is_set() and error.startswith("KeyboardInterrupt"), error
        assert "goes on from" in error
        assert run.result()["failure"] == "interrupted" and run.result()["steps"] < 40

        text, error = kernel.run("result = manta.train(long)\nprint(result.status, result.steps)")
        assert not error
        assert "finished 40" in text and "goes on from" in text
        attempts = [event["step"] for event in lines(run.events_file) if event["kind"] == "attempt"]
        assert attempts[0] == 0 and attempts[-1] >= 10
        assert kernel.run("print(ray.is_initialized()); ray.shutdown()") == ("True\n", "")
