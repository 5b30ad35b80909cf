"""The thread that writes checkpoints: tried again, raised late, never two at once."""

from __future__ import annotations

import contextlib
import subprocess
import threading

import pytest
import torch

from manta import checkpoint, manifest, saver
from manta.errors import StorageError
from manta.runs import Run, checkpoint_path
from manta.saver import Saver


def snapshot(value: float = 1.0) -> checkpoint.Snapshot:
    return checkpoint.Snapshot(
        {"w": torch.full((64,), value)}, {"state.w.step": torch.ones(())}, {"a.json": "{}"}, [], False
    )


def save(writer: Saver, step: int, value: float = 1.0) -> None:
    folder = checkpoint_path(writer.run.path, step)
    writer.save(folder, snapshot(value), [(step - 1, 0, [1])], {"step": step, "metrics": {}})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(saver, "TRIES_AFTER_S", (0.01, 0.05))


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 KiB; whoever may not mount one skips."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("in_background", [True, False])
def test_a_checkpoint_is_complete_and_what_follows_it_comes_after(tmp_path, in_background):
    writer = Saver(Run(tmp_path), 0, None, in_background, print)
    seen = []
    save(writer, 5)
    writer.then(lambda: seen.append(manifest.damage(checkpoint_path(tmp_path, 5))))
    writer.wait()
    assert seen == [None] and writer.committed == 5


def test_training_may_change_a_weight_once_it_is_copied(tmp_path):
    writer = Saver(Run(tmp_path), 0, None, True, print)
    weight = torch.ones(1 << 16)
    taken = checkpoint.Snapshot({"w": weight}, {"s": torch.ones(())}, {}, [], False)
    writer.save(checkpoint_path(tmp_path, 1), taken, [], {"step": 1, "metrics": {}})
    writer.wait_copied()
    weight.fill_(7)
    writer.wait()
    from safetensors.torch import load_file

    assert load_file(checkpoint_path(tmp_path, 1) / "model" / "adapter_model.safetensors")["w"].eq(1).all()


def test_a_disk_that_is_full_for_a_moment_costs_nothing(small_disk, monkeypatch):
    monkeypatch.setattr(saver, "TRIES_AFTER_S", (0.1,) * 50)
    (small_disk / "filler").write_bytes(b"x" * (80 << 10))
    notes = []
    writer = Saver(Run(small_disk), 0, None, True, notes.append)
    threading.Timer(1.0, lambda: (small_disk / "filler").unlink()).start()
    save(writer, 3)
    writer.wait()
    assert manifest.damage(checkpoint_path(small_disk, 3)) is None
    assert notes and "tried again" in notes[0] and "No space left" in notes[0]


@pytest.mark.usefixtures("quick")
def test_a_full_disk_costs_one_checkpoint_then_the_run_and_never_an_older_one(small_disk):
    writer = Saver(Run(small_disk), 0, None, True, lambda text: None)
    save(writer, 3)
    writer.wait()
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"x" * 4096)
    save(writer, 6)
    save(writer, 9)  # the first refusal is let pass
    with pytest.raises(StorageError, match=r"step 9 could not be written in 3 tries: .*No space left"):
        save(writer, 12)
    assert manifest.damage(checkpoint_path(small_disk, 3)) is None
    assert writer.committed == 3
    (small_disk / "filler").unlink()


@pytest.mark.usefixtures("quick")
def test_the_last_save_of_a_run_is_raised_at_once(small_disk):
    (small_disk / "filler").write_bytes(b"x" * (94 << 10))
    writer = Saver(Run(small_disk), 0, None, True, lambda text: None)
    save(writer, 3)
    with pytest.raises(StorageError, match="step 3"):
        writer.wait()
