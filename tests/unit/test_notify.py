"""Notifications over real HTTP and by real commands: also by some that hang, fail or hold a secret."""

import json
import logging
import shlex
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

from manta import notify
from manta.cli import main
from manta.config import Config
from manta.errors import ConfigError, TrainingError, UserError
from manta.notify import Notifier
from manta.status import Status

KEEP = "import json,os,sys; print(json.dumps([json.load(sys.stdin), dict(os.environ)]), file=open({file!r}, 'a'))"
FAILURE = {"kind": "failure", "attempt": 1, "step": 3, "cause": "node", "text": "a node was lost (abc)"}
RESULT = {
    **{"status": "finished", "steps": 9, "max_steps": 10, "best_metric": 0.25, "metric": "eval_loss"},
    "asked_to_stop": False,
}


def attempt(number):
    return {"kind": "attempt", "attempt": number, "step": 3, "world_size": 2}


@contextmanager
def server(answer=200, wait_s=0.0):
    """A server that keeps the paths and bodies it was sent."""
    got, ended = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            ended.wait(wait_s)
            self.send_response(answer)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", got
    finally:
        ended.set()
        listening.shutdown()
        listening.server_close()


def notifier(target, said, **status):
    return Notifier(target, Status("a-run", **status), "/runs/a-run", said.append)


def test_a_url_is_sent_what_happened_in_order():
    said = []
    with server() as (url, got), notifier(f"{url}/hook", said, step=3, loss=float("nan")) as told:
        for message in (attempt(1), {"kind": "log"}, FAILURE, attempt(2)):
            told.take(message)
        while not got:  # the end would take the place of what still waits
            time.sleep(0.01)
        told.ended(RESULT)
    assert [path for path, _ in got] == ["/hook", "/hook"] and said == []
    restarted, finished = (body for _, body in got)
    assert restarted["event"] == "restarted" and restarted["cause"] == "node"
    assert restarted["text"] == "Manta, a-run: restarted from step 3 on 2 workers: a node was lost (abc)"
    assert (restarted["run"], restarted["path"], restarted["step"]) == ("a-run", "/runs/a-run", 3)
    assert restarted["loss"] is None  # JSON has no NaN
    assert finished["event"] == "finished" and finished["result"] == RESULT
    assert finished["text"] == "Manta, a-run: finished after step 9 of 10, best eval_loss 0.2500"


def test_a_command_gets_json_and_variables_and_no_shell(tmp_path):
    said, file = [], tmp_path / "kept; touch no-shell"
    command = shlex.join([sys.executable, "-c", KEEP.format(file=str(file))])
    with notifier(command, said, step=4) as told:
        told.failed(TrainingError("a-run failed: step 5 failed twice"))
    payload, environment = json.loads(file.read_text())
    assert said == [] and list(tmp_path.iterdir()) == [file]
    assert payload["event"] == environment["MANTA_EVENT"] == "failed"
    assert payload["text"] == environment["MANTA_TEXT"] == "Manta, a-run: a-run failed: step 5 failed twice"
    assert environment["MANTA_RUN"] == "a-run" and environment["MANTA_STEP"] == "4"
    assert environment["MANTA_PATH"] == "/runs/a-run"


def test_a_stop_by_a_signal_says_so():
    with server() as (url, got), notifier(url, []) as told:
        told.ended({**RESULT, "status": "stopped", "asked_to_stop": True, "best_metric": None})
    assert got[0][1]["event"] == "stopped" and "it was asked to stop" in got[0][1]["text"]


@pytest.mark.parametrize("kind", ["a command that fails", "a server that fails", "nobody listens"])
def test_what_fails_is_said_once_and_ends_nothing(kind):
    said = []
    with server(answer=500) as (url, _):
        target = {"a command that fails": "false", "a server that fails": url, "nobody listens": "http://127.0.0.1:9"}
        with notifier(target[kind], said) as told:
            for number in range(1, 5):
                told.take(attempt(number))
            told.ended(RESULT)
    assert len(said) == 1 and "--notify does not work" in said[0]
    assert {"a command that fails": "ends with 1", "a server that fails": "answers 500"}.get(kind, "Connect") in said[0]


@pytest.mark.parametrize("kind", ["command", "server"])
def test_what_hangs_holds_up_nobody_and_the_end_still_gets_its_turn(kind, tmp_path, monkeypatch):
    """The command's own child is ended with it. Ten restarts wait behind the first one; the end goes before them."""
    monkeypatch.setattr(notify, "TIMEOUT_S", 0.5)
    said, file = [], tmp_path / "begun"
    hanging = f"import os,subprocess,sys; open({str(file)!r}, 'a').write(os.environ['MANTA_EVENT'] + '\\n'); "
    hanging += (
        f"child = subprocess.Popen(['sleep', '600']); open({str(file)!r} + '.pid', 'a').write(f'{{child.pid}} '); "
    )
    hanging += "child.wait()"
    with server(wait_s=600) as (url, got):
        start = time.monotonic()
        with notifier(url if kind == "server" else shlex.join([sys.executable, "-c", hanging]), said) as told:
            for number in range(1, 12):
                told.take(attempt(number))
            handed_over = time.monotonic() - start
            while not (got or file.exists()):
                time.sleep(0.01)
            told.ended(RESULT)
        took = time.monotonic() - start
        events = [body["event"] for _, body in got] if kind == "server" else file.read_text().split()
    assert events == ["restarted", "finished"]
    assert handed_over < took / 2  # nobody waited while it was told
    assert took < 60 and len(said) == 1
    if kind == "command":
        assert "took longer than" in said[0]
        for pid in (tmp_path / "begun.pid").read_text().split():
            assert not alive(int(pid))


def alive(pid):
    import psutil

    limit = time.monotonic() + 5  # until it is reaped
    while time.monotonic() < limit:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.05)
    return True


def test_a_secret_is_given_by_reference_and_said_nowhere(monkeypatch, caplog, capfd):
    said, secret = [], "T0SECRETSECRETSECRETSECRET9"
    caplog.set_level(logging.DEBUG)
    with server(answer=404) as (url, got):
        monkeypatch.setenv("HOOK", f"{url}/services/{secret}?key={secret}")
        with notifier("env:HOOK", said) as told:
            told.ended(RESULT)
    assert got[0][0] == f"/services/{secret}?key={secret}"
    printed = "".join(capfd.readouterr())
    assert said and secret not in "".join(said) + caplog.text + printed


@pytest.mark.parametrize(
    "target",
    [
        "https://user:password1@example.com/hook",
        "https://example.com/hook?key=abc",
        "https://hooks.example.com/services/T00000000/B00000000/a1b2c3d4e5f6g7h8i9j0k1l2",
    ],
)
def test_a_secret_itself_is_refused_and_not_repeated(target):
    with pytest.raises(ConfigError, match="env:NAME") as refused:
        Config.from_dict({"notify": target})
    assert "hook" not in str(refused.value) and "example" not in str(refused.value)
    done = CliRunner().invoke(main, ["train", "--notify", target])
    assert done.exit_code == 2 and "example.com" not in done.output


def test_a_secret_of_this_process_in_a_command_is_refused(monkeypatch):
    monkeypatch.setenv("CHAT_TOKEN", "abcdefgh12345")
    with pytest.raises(UserError, match="The value of CHAT_TOKEN would be written down"):
        notifier("curl -H abcdefgh12345 example.com", [])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no-such-program --flag", "there is no such command"),
        ("env:MANTA_NO_SUCH_VARIABLE", "is not set here"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(target, message, tmp_path):
    done = CliRunner().invoke(main, ["train", "--notify", target, "--results_dir", str(tmp_path)])
    assert done.exit_code == 2 and message in done.output and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["", "  ", "echo 'open", "env:", "env:a b", "http://"])
def test_what_means_nothing_is_refused(target):
    with pytest.raises(ConfigError, match="notify"):
        Config.from_dict({"notify": target})


def test_a_driver_that_fails_before_training_tells_and_one_that_is_refused_does_not(tmp_path):
    """The run that another driver has goes on."""
    from manta.lease import Lease
    from manta.runs import Run
    from manta.train import train

    with server() as (url, got):
        settings = {"hf_model_id": str(tmp_path), "results_dir": str(tmp_path), "run_name": "a-run", "notify": url}
        with Lease(Run(tmp_path / "a-run")), pytest.raises(UserError, match="Another driver"):
            train(Config.from_dict(settings))
        assert got == []
        with pytest.raises(UserError) as refused:
            train(Config.from_dict(settings))
    assert [body["event"] for _, body in got] == ["failed"] and str(refused.value) in got[0][1]["text"]
    assert got[0][1]["state"] == "failed" and got[0][1]["step"] == 0
