"""What an exception of a library means: its cause in one sentence, and what to type next in another.

By its type, its number, or text of it that is known, so that no library is imported to look at one. What nobody here
knows stays as it was: a traceback says more than a wrong guess.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

# What a worker's or an engine's last words mean, whatever process they come from; the first that matches.
_KNOWN_TEXT = {
    r"Watchdog caught collective|collective operation timeout|Timed out waiting \d+ms|wait timeout after|Application "
    r"timeout caused": (
        "An operation of all workers did not end within --torch_timeout_s: one of them stood still, or the network "
        "between nodes fails. Look at the last lines of each worker's log; NCCL_DEBUG=INFO (set where you type the "
        "command) says more, and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME chooses the network."
    ),
    r"low on memory|memory usage threshold|OOM killer": (
        "Ray ended it because the node's memory was full. Take fewer --num_workers, --dataloader_num_workers 0, "
        "--spare_workers false, or nodes with more memory."
    ),
    r"the process of rank \d+ died": (
        "A process that dies without a word was mostly killed by the kernel because memory was full: `dmesg -T | grep "
        "-i killed` names it. Take fewer --num_workers, --dataloader_num_workers 0, --spare_workers false, or nodes "
        "with more memory."
    ),
    r"index out of range in self|Indexing.cu|device-side assert|srcIndex < srcSelectDimSize": (
        "A token's id is beyond the model's embedding: the tokenizer was given tokens that the model was not. Take "
        "the tokenizer that came with the model, or a model that was saved after resize_token_embeddings."
    ),
    r"insufficient shared memory|Bus error|unable to (open|allocate|resize) shared memory": (
        "Shared memory is full: start the container with --shm-size 8g (docker) or an emptyDir of medium Memory at "
        "/dev/shm (Kubernetes), or set --dataloader_num_workers 0."
    ),
    r"no kernel image is available|CUDA driver version is insufficient|not compatible with the current PyTorch": (
        "This torch was not built for this GPU or driver: install the build that https://pytorch.org/get-started names."
    ),
}
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_GIB = 1 << 30


def is_out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for the allocator of a GPU only; on CPU, in NCCL and in cuBLAS it is another."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def advice(said: str) -> str:
    """What `said`, the last words of a worker, mean and what to do; empty if they are not known."""
    return next((text for known, text in _KNOWN_TEXT.items() if re.search(known, said, re.IGNORECASE)), "")


def explain(error: BaseException) -> str | None:
    """The message for an exception that ends a command in the middle of its work; None if it is not known."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in _NO_ROOM:
            return _no_room(each)
        if isinstance(each, OSError) and each.errno in _NO_ACCESS:
            where = each.filename2 or each.filename
            return (
                f"{where or 'A file'} cannot be written or read: {each.strerror}. Choose a folder that you may write."
            )
        if is_out_of_memory(each):
            return (
                f"Out of memory ({first_line(each)}). Lower the batch (--batch_size, --max_batch_tokens), take --dtype "
                "bfloat16, or a larger device."
            )
        if found := advice(str(each)):
            return f"{first_line(each)}. {found}"
    return None


def unloadable(name: str, error: BaseException, kind: str = "model", flag: str = "--hf_model_id") -> str:
    """Why `name`, a folder here or a model or dataset of the hub, could not be had, and what to do about it."""
    if "custom code" in str(error):
        return "it comes with Python code of its own. Read its *.py files; if you trust them: --trust_remote_code"
    if Path(name).expanduser().is_dir():
        return f"{first_line(error)}. Check {flag}"
    if _is_path(name):
        return (
            f"there is no such folder.{near(Path(name))} Check {flag}; what was moved and a run still looks for there "
            f"is found by a link: ln -s NEW_PLACE {name}"
        )
    from huggingface_hub import constants, errors, get_token

    chain = list(_chain(error))
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    status = next((each.response.status_code for each in chain if isinstance(each, errors.HfHubHTTPError)), None)
    if any(isinstance(each, errors.GatedRepoError) for each in chain):
        if get_token() is None:
            return (
                f"it is gated, and you are nobody there. Accept its terms at {page}, then: hf auth login (or HF_TOKEN)"
            )
        return f"it is gated, and your token's account may not read it. Ask for access at {page}, or take another token"
    if any(isinstance(each, errors.RepositoryNotFoundError) for each in chain):
        what = f"the hub has no such {kind}, or a private one"
        return f"{what}.{near(Path(name))} Check {flag}; for a private one: hf auth login (or HF_TOKEN)"
    if status == 401:
        return (
            f"the hub does not know your token. Make one at {constants.ENDPOINT}/settings/tokens, then: hf auth login "
            "(or set HF_TOKEN)"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set, and it is not in the cache.{near(Path(name))} Check {flag}, or unset the variable"
        )
    if any(isinstance(each, errors.LocalEntryNotFoundError) or _is_connection(each) for each in chain):
        return (
            f"{constants.ENDPOINT} cannot be reached.{near(Path(name))} Check the network and HTTPS_PROXY, or fetch it "
            f"elsewhere (hf download {name} --local-dir FOLDER) and give {flag} the folder"
        )
    return f"{first_line(error)}. Check {flag}; for what is gated or private: hf auth login (or HF_TOKEN)"


def near(path: Path) -> str:
    """` Did you mean …?` for the file or folder beside `path` whose name is most like its own; else nothing."""
    try:
        names = [each.name for each in path.expanduser().parent.iterdir() if not each.name.startswith(".")]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f" Did you mean {path.parent / found[0]}?" if found else ""


def first_line(error: BaseException) -> str:
    """Of its message, without the full stop; its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0].strip().rstrip(".") if text else type(error).__name__


def _no_room(error: OSError) -> str:
    where = error.filename2 or error.filename
    full = "A disk is full (`df -h` shows which)"  # a write that fails does not say of what file
    if where and (disk := next((path for path in (Path(where), *Path(where).parents) if path.exists()), None)):
        usage = shutil.disk_usage(disk)
        full = f"The disk of {where} is full ({usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB are free)"
    return (
        f"{full}: {os.strerror(error.errno or 0)}. Make room there (`manta runs gc` finds what no run needs), or go "
        "elsewhere: --data_dir, --results_dir, --output_dir; MANTA_CACHE, HF_HOME and TMPDIR for copies. The same "
        "command goes on."
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and what a task of Ray wrapped."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        wrapped = getattr(error, "cause", None)
        before = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or (wrapped if isinstance(wrapped, BaseException) else None) or before


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _is_connection(error: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError"})
