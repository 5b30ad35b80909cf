"""Exceptions of libraries: those that are known become a cause and a next command, others stay as they are."""

from __future__ import annotations

import errno
import os

import pytest

from manta import diagnosis

# As NCCL, CUDA, Ray and the loader's processes say it on machines that tests have not got.
SAID = {
    "rank 3: [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=604, OpType=ALLREDUCE, "
    "NumelIn=12712960, NumelOut=12712960, Timeout(ms)=1800000) ran for 1800616 milliseconds": "--torch_timeout_s",
    "RuntimeError: CUDA error: device-side assert triggered": "resize_token_embeddings",
    "Task was killed due to the node running low on memory.": "--num_workers",
    "RuntimeError: DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that dataloader's workers "
    "are out of shared memory. Please try to raise your shared memory limit.": "--shm-size",
    "RuntimeError: CUDA error: no kernel image is available for execution on the device": "pytorch.org",
}


@pytest.mark.parametrize("said", SAID)
def test_last_words_that_are_known_come_with_what_to_do(said):
    assert SAID[said] in diagnosis.advice(said)
    assert SAID[said] in (diagnosis.explain(RuntimeError(said)) or "")


def test_what_is_not_known_is_left_alone():
    assert diagnosis.advice("ValueError: of the user's own code") == ""
    assert diagnosis.explain(RuntimeError("of the user's own code")) is None
    assert diagnosis.explain(OSError(errno.EPIPE, os.strerror(errno.EPIPE))) is None


def test_the_cause_is_found_behind_what_was_raised(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "gone" / "file"))
    try:
        raise RuntimeError("the task failed") from full
    except RuntimeError as error:
        message = diagnosis.explain(error) or ""
    assert message.startswith(f"The disk of {tmp_path}/gone/file is full (") and "manta runs gc" in message


def test_no_access_is_a_message(tmp_path):
    if os.geteuid() == 0:  # whom permissions do not stop: a file where a folder should be does
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "below"
    else:
        tmp_path.chmod(0o500)
        path = tmp_path / "below"
    with pytest.raises(OSError) as caught:
        path.write_text("")
    assert f"{path} cannot be written or read" in (diagnosis.explain(caught.value) or "")


def test_the_nearest_name_beside_is_offered(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    assert diagnosis.near(tmp_path / "row.jsonl") == f" Did you mean {tmp_path / 'rows.jsonl'}?"
    assert diagnosis.near(tmp_path / "else") == diagnosis.near(tmp_path / "no" / "rows.jsonl") == ""
