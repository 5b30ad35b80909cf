"""Runs as `manta runs watch` finds them: real folders and leases, of this process or of hosts that are not this one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from click.testing import CliRunner

from manta import lease, manifest
from manta.cli import main
from manta.config import Config
from manta.jsonl import JsonLines, NewLines
from manta.lease import Lease
from manta.runs import Run
from manta.status import Status

RESULT = {
    **{"status": "finished", "failure": None, "steps": 9, "max_steps": 9, "asked_to_stop": False},
    **{"stopped_early": False, "metric": "eval_loss", "best_metric": 0.5, "best_checkpoint": None},
    **{"latest_checkpoint": None, "world_sizes": [2], "tokens_per_second": 10.0, "seconds": {"total": 3.0}},
}
MANTA = [sys.executable, "-m", "manta", "runs", "watch"]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "a-run")
    run.start(Config(hf_model_id="a-model"), tmp_path / "data")
    return run


def end(run, **how):
    manifest.write_json(run.result_file, {**RESULT, "run": str(run.path), **how})


def watch(run, *more):
    done = CliRunner().invoke(main, ["runs", "watch", str(run.path), *more])
    return done.exit_code, done.output


def started(*arguments, **how):
    return subprocess.Popen(
        [*MANTA, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
    )


def event(run, **what):
    with run.events_file.open("a") as file:
        file.write(json.dumps({"time": time.time(), **what}) + "\n")


def wait_for_line(process, words):
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"no {words!r}, and it ended with {process.wait()}")


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ({}, 0, "finished"),
        ({"status": "stopped"}, 0, "Go on:"),
        ({"status": "stopped", "asked_to_stop": True}, 75, "Go on:"),
        ({"status": "failed", "failure": "step 3 failed twice"}, 1, "a-run failed: step 3 failed twice"),
    ],
)
def test_a_run_that_has_ended_is_summed_up_with_its_drivers_exit_code(run, how, code, words):
    end(run, **how)
    found, output = watch(run)
    assert found == code and words in output


def test_a_run_whose_driver_is_gone_says_how_it_goes_on(run):
    code, output = watch(run)
    assert code == 1 and "its driver is gone" in output
    assert f"goes on from the start, since there is no checkpoint: manta train --resume {run.path}" in output


def test_no_run_is_a_message_that_names_those_there_are(run):
    code, output = watch(Run(run.path.parent / "b-run"))
    assert code == 2 and "There is no run at" in output and "a-run" in output and "--wait" in output


def test_it_follows_a_run_from_its_first_sign_to_its_end(run):
    """Attached before the folder is there; steps go back at a restart; what an earlier driver did is not told."""
    event(run, kind="attempt", attempt=1, world_size=2, step=0)
    event(run, kind="note", text="of an earlier driver")
    away = run.path.rename(run.path.with_name("away"))
    watcher = started(run.path, "--wait")
    time.sleep(0.5)
    with Lease(Run(away)) as held:
        away.rename(run.path)
        held.folder, held.path = run.path, run.path / lease.NAME
        wait_for_line(watcher, "starting workers")
        status = Status(run.name, "training", step=20, max_steps=40, loss=1.5, workers=2)
        manifest.write_json(run.progress_file, status.as_dict())
        event(run, kind="failure", attempt=1, step=20, cause="node", text="a node was lost (abc)")
        event(run, kind="attempt", attempt=2, world_size=1, step=15)
        assert "attempt 1 ended, node: a node was lost (abc)" in wait_for_line(watcher, "ended")
        assert "attempt 2 goes on from step 15" in wait_for_line(watcher, "goes on")
        status.step, status.eval_loss, status.time = 15, 1.25, time.time()  # an evaluation is told at once
        manifest.write_json(run.progress_file, status.as_dict())
        assert "a-run: step 15/40  loss 1.5000  eval 1.2500  2 workers" in wait_for_line(watcher, "eval")
        end(run)
    out, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 0 and "finished" in out and "earlier driver" not in err


def test_waiting_is_for_a_run_that_goes_on_and_not_for_one_that_has_finished(run):
    end(run)
    assert watch(run, "--wait")[0] == 0
    end(run, status="stopped", asked_to_stop=True)
    watcher = started(run.path, "--wait")
    time.sleep(2)
    assert watcher.poll() is None
    with Lease(run):
        wait_for_line(watcher, "starting workers")
        end(run)
    assert "finished" in watcher.communicate(timeout=60)[0] and watcher.returncode == 0


def test_ctrl_c_leaves_the_run_as_it_was(run):
    with Lease(run):
        before = {path: path.read_bytes() for path in run.path.iterdir()}
        watcher = started(run.path)
        wait_for_line(watcher, "starting workers")
        watcher.send_signal(signal.SIGINT)
        out, err = watcher.communicate(timeout=60)
        assert watcher.returncode == 130 and out == ""
        assert "a-run goes on" in err and "Traceback" not in err
        assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_a_driver_on_another_host_is_believed_by_its_renewals(run):
    """Its process cannot be looked up here; once it is not renewed for a minute, it is gone."""
    there = run.path / lease.NAME
    there.write_text(json.dumps({"token": "t", "host": "elsewhere", "pid": 1, "born": "1", "since": "now"}))
    watcher = started(run.path)
    wait_for_line(watcher, "starting workers")
    os.utime(there, (time.time() - 2 * lease.EXPIRES_S,) * 2)
    _, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 1 and "its driver is gone" in err


def test_who_may_only_read_can_watch(run):
    """A read-only mount, as another host may have it: nothing is written to learn the storage's clock."""
    there = run.path / lease.NAME
    there.write_text(json.dumps({"token": "t", "host": "elsewhere", "pid": 1, "born": "1", "since": "now"}))
    end(run)
    mount = f"mount --bind {run.path} {run.path} && mount -o remount,bind,ro {run.path} && exec "
    shell = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*shell, mount + "true"], capture_output=True).returncode:
        pytest.skip("no mounts may be made here")
    command = [*shell, mount + " ".join([*MANTA, str(run.path)])]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_line(watcher, "starting workers")
    there.unlink()
    out, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 0 and "finished" in out and "Traceback" not in err


def test_lines_are_read_whole_and_once(tmp_path):
    file = tmp_path / "events.jsonl"
    lines = NewLines(file)
    assert lines.read() == []
    file.write_text('{"a": 1}\n{"b": "é')
    assert lines.read() == [{"a": 1}]
    assert lines.read() == []
    with file.open("a") as more:
        more.write('"}\n')
    assert lines.read() == [{"b": "é"}]


@pytest.mark.slow
def test_a_run_on_a_store_is_followed_by_who_sees_the_store(tmp_path, monkeypatch):
    """The lease and the files of a run on S3, as its driver writes them; the watcher has nothing but the URL."""
    from manta import storage
    from s3 import s3_server

    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    with s3_server("bucket"):
        run = Run(storage.place("s3://bucket/runs/a-run"))
        run.start(Config(hf_model_id="a-model"), tmp_path / "data")
        events = JsonLines(run.events_file)
        with Lease(run):
            status = Status(run.name, "training", step=7, max_steps=9, loss=1.5, workers=2)
            manifest.write_json(run.progress_file, status.as_dict())
            watcher = started(run.path, env={**os.environ, storage.CACHE: str(tmp_path / "other")})
            ended = threading.Timer(300, watcher.kill)
            ended.start()
            wait_for_line(watcher, "step 7/9  loss 1.5000")
            events.add({"time": time.time(), "kind": "note", "text": "a word on the way"})
            events.flush(now=True)
            wait_for_line(watcher, "a word on the way")
            end(run)
        out, _ = watcher.communicate(timeout=120)
        ended.cancel()
    assert watcher.returncode == 0 and "finished" in out
