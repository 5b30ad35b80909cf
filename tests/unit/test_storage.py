"""Folders on an object store: S3 as moto speaks it, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from upath import UPath

from manta import garbage, jsonl, lease, ledger, manifest, snapshot, storage
from manta.config import Config
from manta.data import prepare
from manta.errors import UserError
from manta.jsonl import JsonLines, append_json
from manta.lease import Lease
from manta.preparation import absolute, prepared_by
from manta.runs import METRIC, Run
from s3 import s3_server
from tiny import tiny_tokenizer
from troubleshooting import check

STORE = "s3://store"
HOLD = (
    "import sys, time; from manta import lease, storage; from manta.runs import Run\n"
    "lease.RENEW_S = 0.3\n"
    "with lease.Lease(Run(storage.place(sys.argv[1]))) as held: print(held.token, flush=True); time.sleep(60)"
)


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with s3_server("store"):
        yield


@pytest.fixture
def folder(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty remote folder."""
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    return storage.place(f"{STORE}/{tmp_path.name}")


def closed(folder: Path, content: bytes = b"weights", **about: object) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "part").write_bytes(content)
    (folder / "state.json").write_text("{}")
    manifest.close(folder, manifest.digests(folder), about)
    return folder


def checkpoint(run: Run, tmp_path: Path, step: int, loss: float | None = None) -> Path:
    metrics = {} if loss is None else {METRIC: loss}
    local = closed(tmp_path / f"local-{step}", b"w" * step, kind="checkpoint", step=step, metrics=metrics)
    storage.publish(local, run.path / f"checkpoint_{step:08d}")
    return run.path / f"checkpoint_{step:08d}"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- Folders


def test_a_name_is_a_path_on_this_machine_or_a_url(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.place("results") == tmp_path / "results" and not storage.is_remote(storage.place("results"))
    assert str(storage.place(f"{STORE}/runs/") / "one") == f"{STORE}/runs/one"
    assert storage.near(tmp_path) == tmp_path
    assert storage.near(folder) == tmp_path / "cache" / "s3" / "store" / folder.name
    with pytest.raises(UserError, match="on no store that fsspec knows"):
        storage.place("s4://bucket/runs")


def test_what_is_published_is_fetched_once_and_whole(folder, tmp_path):
    local = closed(tmp_path / "local")
    storage.publish(local, folder / "one")
    assert names(folder / "one") == ["manifest.json", "model/part", "state.json"]
    assert manifest.damage(folder / "one") is None and storage.fetch(local) == local
    here = storage.fetch(folder / "one")
    assert here == storage.near(folder / "one") and manifest.damage(here) is None
    inode = here.stat().st_ino
    assert storage.fetch(folder / "one").stat().st_ino == inode

    storage.publish(closed(tmp_path / "other", b"WEIGHTS"), folder / "one")  # of the same size
    assert (storage.fetch(folder / "one") / "model" / "part").read_bytes() == b"WEIGHTS"


def test_damage_on_the_store_or_in_the_cache_is_never_used(folder, tmp_path):
    storage.publish(closed(tmp_path / "local"), folder / "one")
    here = storage.fetch(folder / "one")
    (here / "model" / "part").write_bytes(b"cut")
    assert (storage.fetch(folder / "one") / "model" / "part").read_bytes() == b"weights"

    storage.remove(here)
    (folder / "one" / "model" / "part").write_bytes(b"weighty")
    assert storage.problem(folder / "one") == "model/part does not match its SHA-256"
    with pytest.raises(OSError, match="does not match"):
        storage.fetch(folder / "one")
    assert not here.exists()
    (folder / "one" / "model" / "part").unlink()
    assert "model/part" in storage.problem(folder / "one")
    assert manifest.damage(folder / "one", content=False) == "model/part is missing"
    (folder / "one" / "manifest.json").unlink()
    assert "no readable manifest" in storage.problem(folder / "one")


def test_a_folder_moves_and_goes_with_all_it_holds(folder, tmp_path):
    storage.publish(closed(tmp_path / "local"), folder / "one")
    storage.publish(closed(tmp_path / "other"), folder / "two")
    storage.move(folder / "one", folder / "two")
    assert names(folder) == ["two/manifest.json", "two/model/part", "two/state.json"]
    storage.remove(folder / "two")
    storage.remove(folder / "two")
    assert names(folder) == []


def test_a_store_that_is_away_is_an_error_and_not_an_empty_one(folder, tmp_path):
    """Otherwise every checkpoint would look unfinished, and be deleted."""
    away = UPath("s3://store/run", endpoint_url="http://127.0.0.1:9", config_kwargs={"retries": {"max_attempts": 0}})
    away.fs.retries = 1
    with pytest.raises(Exception, match=r"[Cc]onnect"):
        manifest.read(away / "checkpoint_00000001")
    with pytest.raises(OSError, match="cannot upload"):
        storage.upload(closed(tmp_path / "local"), away, ["state.json"])


# --- Checked before anything is loaded


def test_a_bucket_that_is_not_there_is_one_message(folder):
    storage.check(str(folder))
    assert names(folder) == []
    with pytest.raises(UserError) as caught:
        storage.check("s3://no-such-bucket/runs")
    check("The bucket is not there", str(caught.value))


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"results_dir .*cannot be written"):
        storage.check(str(tmp_path / "file" / "runs"))
    storage.check(str(tmp_path / "not" / "yet"))
    assert not (tmp_path / "not").exists()


# --- Lease


@pytest.fixture
def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()


def test_a_second_driver_is_refused_until_the_first_is_gone(folder, holder):
    process, token = holder
    assert lease.loss(folder, token) is None
    with pytest.raises(UserError, match=rf"Another driver .*process {process.pid} on "), Lease(Run(folder)):
        pass
    assert lease.holder_of(folder)["token"] == token
    process.kill()
    process.wait()
    with Lease(Run(folder)) as held:
        assert lease.holder_of(folder)["token"] == held.token and "is lost" in lease.loss(folder, token)
    assert not lease.is_held(folder) and "nobody has it now" in lease.loss(folder, held.token)
    assert names(folder) == ["lease-000002.json"]  # released, and never given again
    with Lease(Run(folder)):
        assert names(folder) == ["lease-000003.json"]


def test_a_lease_of_another_host_expires_by_the_clock_of_the_store(folder, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES_S", 3.0)
    theirs = {"token": "theirs", "host": "elsewhere", "pid": 1, "born": "1", "since": "now"}
    manifest.write_json(folder / "lease-000007.json", theirs)
    with pytest.raises(UserError, match="process 1 on elsewhere"):
        lease.refuse_if_held(folder)
    time.sleep(4)
    with Lease(Run(folder)) as held:
        assert held.path.name == "lease-000008.json"
        manifest.write_json(folder / "lease-000007.json", theirs)  # they wake up, and renew
        assert lease.loss(folder, held.token) is None and lease.loss(folder, "theirs")


def test_a_holder_that_is_stopped_for_long_loses_its_lease_to_one(folder, holder, monkeypatch):
    """Of many that find it expired at once, one has the run; the first one's renewals change nothing when it wakes."""
    process, _ = holder
    host = {**lease.holder_of(folder), "host": "elsewhere"}  # so that only the clock can tell
    process.send_signal(signal.SIGSTOP)
    manifest.write_json(folder / "lease-000001.json", host)
    time.sleep(3)
    code = HOLD.replace("with", "lease.EXPIRES_S = 2.5; print(flush=True); sys.stdin.readline()\nwith")
    command = [sys.executable, "-c", code.replace("time.sleep(60)", "sys.stdin.read()"), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    drivers = [subprocess.Popen(command, text=True, **pipes) for _ in range(5)]
    for driver in drivers:
        driver.stdout.readline()
    for driver in drivers:
        driver.stdin.write("go\n")
        driver.stdin.flush()
    limit = time.monotonic() + 60
    while sum(driver.poll() is not None for driver in drivers) < 4 and time.monotonic() < limit:
        time.sleep(0.1)
    outputs = [driver.communicate(timeout=60) for driver in drivers]
    process.send_signal(signal.SIGCONT)
    winners = [out.strip() for out, _ in outputs if out.strip()]
    assert len(winners) == 1, outputs
    assert sum("Another driver is training" in err for _, err in outputs) == 4


def test_a_lease_is_renewed_on_the_store(folder, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    with Lease(Run(folder)) as held:
        before = held.path.stat().st_mtime
        time.sleep(2.5)
        assert held.path.stat().st_mtime > before and lease.loss(folder, held.token) is None


# --- Lines that are added


def test_lines_are_added_on_a_store_and_rewritten_seldom(folder, monkeypatch):
    monkeypatch.setattr(jsonl, "REWRITE_S", 1.0)
    path = folder / "events.jsonl"
    append_json(path, {"n": 0})
    log = JsonLines(path)
    log.open()
    seen = []
    for n in range(1, 4):
        log.add({"n": n})
        log.flush()
        seen.append(len(path.read_text().splitlines()))
    append_json(path, {"n": 4})  # by another thread of the driver: through the same log
    log.close()
    assert seen == [2, 2, 2]
    append_json(path, {"n": 5})
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4, 5]


def test_lines_wait_for_a_store_that_fails(folder, monkeypatch):
    monkeypatch.setattr(jsonl, "REWRITE_S", 0.0)
    log = JsonLines(folder / "metrics.jsonl")
    log.add({"n": 0})
    with monkeypatch.context() as away:
        away.setattr(type(folder), "write_text", lambda *a, **k: (_ for _ in ()).throw(TimeoutError("away")))
        assert "cannot be written just now: away" in log.flush()
        log.add({"n": 1})
        assert log.flush() is None  # said once
    log.flush()
    assert (folder / "metrics.jsonl").read_text() == '{"n": 0}\n{"n": 1}\n'


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_lines_wait_for_room_on_a_full_disk(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        monkeypatch.setattr(jsonl, "REWRITE_S", 0.0)
        log = JsonLines(disk / "metrics.jsonl")
        log.add({"n": 0})
        assert log.flush() is None
        with (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"x" * 4096) == 4096:
                pass
    except OSError:
        pass
    try:
        log.add({"n": 1, "text": "y" * 8192})
        assert "No space left" in log.flush()
        assert (disk / "metrics.jsonl").read_text() == '{"n": 0}\n'
        (disk / "filler").unlink()
        assert log.flush() is None
        assert [json.loads(line)["n"] for line in (disk / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    finally:
        subprocess.run(["umount", disk], check=True)


# --- A run's own files


def test_a_run_on_a_store_is_told_as_one_on_a_disk(folder, tmp_path):
    run = Run(folder / "a-run")
    config = Config.from_dict({"hf_model_id": str(tmp_path), "max_steps": 7})
    run.start(config, folder / "prepared" / "abc")
    assert run.config() == config and str(run.prepared()) == f"{folder}/prepared/abc"
    assert Config.load(f"{run.path}/config.yaml") == config
    for step, loss in ((2, 1.5), (4, 1.0), (6, None)):
        checkpoint(run, tmp_path, step, loss)
    (run.path / "checkpoint_00000008" / "model").write_text("half")
    ledger.write(run.ledger, 0, 2, [(0, 0, [1]), (1, 0, [2])])
    ledger.write(run.ledger, 2, 4, [(2, 0, [3])])
    assert [found.step for found in run.checkpoints()] == [2, 4, 6]
    assert run.best().step == 4 and run.latest().step == 6
    assert ledger.read(run.ledger, 4) == [(0, 0, [1]), (1, 0, [2]), (2, 0, [3])]
    assert run.remove_unfinished() == ["checkpoint_00000008"]

    (run.path / "checkpoint_00000004" / "state.json").unlink()
    done = snapshot.repair(run)
    assert done == [
        "checkpoint_00000004 is put aside: state.json is missing",
        "Ray's list of checkpoints is made anew from 2 manifests",
    ]
    assert (run.path / "damaged-checkpoint_00000004").is_dir() and not (run.path / "checkpoint_00000004").exists()
    assert snapshot.repair(run) == []


@pytest.mark.parametrize("remote", [False, True], ids=["disk", "store"])
def test_gc_deletes_what_no_run_needs_and_nothing_else(remote, folder, tmp_path):
    run = Run((folder if remote else tmp_path / "runs") / "a-run")
    run.start(Config.from_dict({"hf_model_id": str(tmp_path)}), tmp_path)
    for step, parent in ((3, 0), (5, 3), (6, 3), (7, 5), (9, 6)):
        ledger.write(run.ledger, parent, step, [(step, 0, [step])])
    local = {step: checkpoint(run, tmp_path, step, 1.0 / step) for step in (3, 6, 9)} if remote else {}
    for step in () if remote else (3, 6, 9):
        folder_of_step = run.path / f"checkpoint_{step:08d}"
        closed(folder_of_step, b"w" * step, kind="checkpoint", step=step, metrics={METRIC: 1.0 / step})
    for path in local.values():
        storage.fetch(path)
    for left in ("checkpoint_00000012/model", "damaged-checkpoint_00000005/model"):
        storage.make_folder((run.path / left).parent)
        (run.path / left).write_text("left over")
    console = Console(file=(tmp_path / "said").open("w"), width=200)

    before = names(run.path)
    expected = garbage.collect(str(run.path), True, console)
    assert names(run.path) == before and expected > 0
    with Lease(run):
        assert garbage.collect(str(run.path.parent), False, console) == 0
        assert set(before) <= set(names(run.path))
    assert garbage.collect(str(run.path.parent), False, console) == expected
    gone = {"checkpoint_00000012/model", "damaged-checkpoint_00000005/model"}
    gone |= {"ledger/00000005.jsonl", "ledger/00000007.jsonl"}
    assert {name for name in before if name not in names(run.path)} == gone
    assert [found.step for found in run.checkpoints()] == [3, 6, 9]
    if remote:
        assert [path.name for path in run.here.glob("checkpoint_*")] == ["checkpoint_00000009"]
    assert garbage.collect(str(run.path), False, console) == 0
    if remote:
        shutil.copytree(run.here, run.here.with_name("deleted-run"))
        assert garbage.collect(str(run.path.parent), False, console) > 0
        assert [path.name for path in run.here.parent.iterdir()] == ["a-run"]
    with pytest.raises(UserError, match="no run at"):
        garbage.collect(str(tmp_path / "nothing"), False, console)


# --- Prepared data


def test_data_is_prepared_here_and_kept_on_the_store(folder, tmp_path):
    tiny_tokenizer(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"instruction": f"Say {n}.", "output": f"{n}!"}) + "\n" for n in range(40))
    )
    data = {"dataset_name": str(tmp_path / "rows.jsonl")}
    config = Config.from_dict(
        {"hf_model_id": str(tmp_path / "base"), "results_dir": str(folder), "hf_dataset_config": data}
    )
    assert absolute(config).data_dir == f"{folder}/prepared"
    prepared = prepared_by(config)
    assert prepared.path.parent == folder / "prepared" and prepare.is_ready(prepared)
    storage.remove(storage.near(folder))  # another node has no copy
    here = prepared.fetched()
    assert len(here.tokenized("training")) == here.counts["training"]["rows"] == prepared.counts["training"]["rows"]
    written = (folder / "prepared").stat().st_mtime, names(folder / "prepared")
    assert prepared_by(config) == prepared and names(folder / "prepared") == written[1]
    (prepared.path / "training.jsonl").unlink()
    assert not prepare.is_ready(prepared)
    assert prepare.is_ready(prepared_by(config))
