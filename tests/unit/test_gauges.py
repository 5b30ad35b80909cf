import socket
import subprocess
import sys
import urllib.request

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from manta.errors import UserError
from manta.gauges import served
from manta.status import Status
from ports import free_ports


def scrape(port):
    """`{(name, labels besides the run): value}`, as Prometheus' own parser reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels.pop("run") for sample in samples} == {'a "run"'}
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def test_a_scrape_says_how_far_the_run_is_at_that_moment():
    (port,), status = free_ports(1), Status('a "run"', began=5.0)
    with served(status, "127.0.0.1", port):
        first = scrape(port)
        assert first["manta_train_state", "preparing"] == 1 and first["manta_train_step",] == 0
        assert ("manta_train_loss",) not in first  # not known yet, which is not 0
        status.state, status.step, status.max_steps, status.loss, status.eval_loss = (
            "training",
            7,
            10,
            1.5,
            float("nan"),
        )
        status.answers, status.restarts, status.tokens = {"exact_match": 0.5}, 2, 900
        status.checkpoint_step, status.checkpoint_time, status.workers = 6, 100.0, 4
        second = scrape(port)
    assert (second["manta_train_step",], second["manta_train_max_steps",], second["manta_train_loss",]) == (7, 10, 1.5)
    assert second["manta_train_eval", "exact_match"] == 0.5
    assert second["manta_train_eval", "eval_loss"] != second["manta_train_eval", "eval_loss"]  # NaN, as it is
    assert (second["manta_train_restarts_total",], second["manta_train_tokens_total",]) == (2, 900)
    assert (second["manta_train_checkpoint_step",], second["manta_train_checkpoint_timestamp_seconds",]) == (6, 100)
    assert second["manta_train_state", "training"] == 1 and second["manta_train_state", "preparing"] == 0
    with socket.socket() as again:  # the port is free once the run has ended
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_nobody_listens_unless_asked():
    def listening() -> list[tuple[str, int]]:
        return [each.laddr for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]

    before = listening()
    with served(Status("a"), "127.0.0.1", 0):
        assert listening() == before


def test_a_host_that_is_not_ours_is_a_message():
    with pytest.raises(UserError, match="cannot be opened at"), served(Status("a"), "203.0.113.1", 9000):
        pass


def test_a_port_in_use_is_one_message_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        program = (
            "import sys\nfrom manta.cli import main\n"
            f"try: main(['train', '--results_dir', {str(tmp_path)!r}, '--metrics_port', '{port}'])\n"
            "except SystemExit as error: print(error.code, [name for name in ('torch',) if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "2 []", done.stderr
    assert done.stderr.strip().count("\n") == 0 and f"--metrics_port {port} cannot be opened" in done.stderr
    assert list(tmp_path.iterdir()) == []
