"""Files that say what will run: shown, written, and looked through for secrets before anything leaves this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from manta.errors import UserError
from manta.manifest import write_text
from manta.references import secret_in

Files = dict[str, str]


def refuse_secrets(files: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> None:
    """Raises UserError, without the value, if a file holds what a secret variable of this process holds."""
    for file, text in files.items():
        if name := secret_in(text, environ):
            raise UserError(
                f"{file} would hold the value of {name}. Take it out of the recipe and the flags, and give "
                f'where it is: --secrets \'{{"{name}": "name#key"}}\'.'
            )


def write(files: Files, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(folder / name, text)


def to_yaml(value: Any) -> str:
    """In the order given; long command lines stay one line, texts of several lines are blocks."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
