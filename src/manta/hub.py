"""The hub: a base model's files on this machine, and a folder of ours there. Tokens are the library's own matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manta import diagnosis, manifest
from manta.errors import UserError


def local_files(name: str, weights: bool = True) -> Path:
    """A base model's folder: the local one, or what is needed of the hub's, fetched once. Raises UserError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.py", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # of the client, of HTTP, of names
        reason = diagnosis.unloadable(name, error, flag="--base_model")
        raise UserError(
            f"The base model {name} is neither a folder here nor what the hub gives us: {reason}."
        ) from error


def check_account(repo: str) -> None:
    """Before anything is computed: that `repo` can be a name, and that the hub knows the user. Raises UserError."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _as_user_errors(f"Nothing can be pushed to {repo}"):
        validate_repo_id(repo)
        HfApi().whoami()


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a model folder without its manifest, which names local paths; returns the address. Raises UserError.

    With `private`, a repository that is there already and public is refused.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    with _as_user_errors(f"{folder} is complete, but could not be pushed to {repo}"):
        url = hub.create_repo(repo, private=private or None, exist_ok=True)
        if private and not hub.model_info(repo).private:
            raise UserError(
                f"{repo} is public and --private was asked for. Nothing was uploaded; {folder} is complete."
            )
        hub.upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=[manifest.NAME], commit_message="Upload from Manta"
        )
    return str(url)


@contextmanager
def _as_user_errors(what: str) -> Iterator[None]:
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the client, of HTTP, of names
        raise UserError(
            f"{what}: {diagnosis.first_line(error)}. Check the name, and your token: hf auth login (or HF_TOKEN)."
        ) from error
