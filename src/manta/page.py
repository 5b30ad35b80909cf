"""Pages that need no network: one HTML file each, in light and dark, for a phone too."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manta.references import secret_in


def render(template: str, without_secrets: bool = False, **values: Any) -> str:
    """A template of this package, filled in; values are escaped, and `without_secrets` those of this process are not
    in them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def redact(value: Any) -> Any:
        return redacted(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=redact if without_secrets else None,
    )
    return environment.get_template(template).render(**values)


def redacted(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` with the name of each secret variable instead of its value, and no password of a URL."""
    for name, value in environ.items():
        if secret_in(text, {name: value}):
            text = text.replace(value, f"[{name}]")
    return re.sub(r"//[^/@\s]+@", "//…@", text)
