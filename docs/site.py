"""MkDocs' hook: what the site has besides `docs/*.md`.

README is the first page; recipes, benchmark results, ARCHITECTURE and others are pages, too, so that links between
files hold on the site as they do in the repository. Settings and commands are written from the code.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import types
import typing
from pathlib import Path
from typing import Any

import click
import yaml
from mkdocs.structure.files import File, Files, InclusionLevel

from manta.cli import SECTIONS, main
from manta.config import Config, HFDatasetConfig
from manta.dataset_config import LintConfig
from manta.launch.config import SECTIONS as TARGETS
from manta.launch.config import SHARED, LaunchConfig, sections

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
# Files of the repository that are pages, and which.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    RESULTS: "benchmarks/index.md",
}
PAGES |= {f"recipes/{path.name}": f"recipes/{path.stem}.md" for path in sorted((ROOT / "recipes").glob("*.*"))}
PAGES |= {f"{RESULTS}/{path.name}": f"benchmarks/{path.name}" for path in sorted((ROOT / RESULTS).glob("*.md"))}
ORIGIN = {page: source for source, page in PAGES.items()}
FILES = {"Dockerfile": "files/Dockerfile.txt"}
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r'<img alt="([^"]*)" src="[^"]*images/([\w-]+\.svg)"\s*/?>')

MEMBERS = {
    "Stages": ["api.prepare", "api.train", "api.evaluate", "api.convert"],
    "Settings": ["config.Config", "dataset_config.HFDatasetConfig", "generation.Sampling", "scores.Scoring"],
    "Results": ["data.prepare.Prepared", "results.TrainResult", "results.Evaluation", "results.Scores", "results.Gain"],
    "Errors": ["errors.UserError", "errors.ConfigError", "errors.TrainingError"],
}


def on_config(config: Any) -> Any:
    """Recipes join the navigation, and pages that are not here leave it."""
    for section in config.nav:
        if "Recipes" in section:
            section["Recipes"] += [{Path(page).stem: page} for page in PAGES.values() if page.startswith("recipes/")]
    made = {*PAGES.values(), "reference/settings.md", "reference/commands.md", "reference/python.md"}
    config.nav = _present(config.nav, made)
    return config


def _present(nav: list[Any], made: set[str]) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        title, what = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(what, list):
            kept.append({title: _present(what, made)})
        elif what in made or (ROOT / "docs" / what).exists():
            kept.append(entry)
    return kept


def on_files(files: Files, config: Any) -> Files:
    def add(page: str, content: str, in_nav: bool = True) -> None:
        level = InclusionLevel.INCLUDED if in_nav else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, page, content=content, inclusion=level))

    for source, page in PAGES.items():
        path = ROOT / source
        if source == RESULTS:
            add(page, results_page())
        elif path.suffix == ".md":
            add(page, path.read_text(encoding="utf-8"), in_nav=not page.startswith("benchmarks/"))
        else:
            language = {".yaml": "yaml", ".sh": "bash"}[path.suffix]
            add(page, f"# {source}\n\n```{language}\n{path.read_text(encoding='utf-8')}```\n")
    for source, name in FILES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    add("reference/settings.md", settings_page())
    add("reference/commands.md", commands_page())
    add("reference/python.md", python_page())
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return relinked(markdown, page.file.src_uri)


def on_page_content(content: str, **_: Any) -> str:
    """Pictures become part of the page, so that they have its colours."""

    def inline(found: re.Match[str]) -> str:
        svg = (ROOT / "docs" / "images" / found[2]).read_text(encoding="utf-8")
        svg = re.sub(r"<style>.*?</style>", "", svg, flags=re.S)
        return f'<span class="picture" role="img" aria-label="{found[1]}">{svg}</span>'

    content = PICTURE.sub(inline, content)
    return re.sub(r"<td><code>[^<]*</code>", lambda cell: cell[0].replace("\\|", "|"), content)  # as GitHub shows it


def relinked(markdown: str, page: str) -> str:
    """Links to files of the repository as links to their pages; one that leads nowhere stays, and the build fails."""
    here = posixpath.dirname(ORIGIN.get(page, f"docs/{page}"))

    def link(found: re.Match[str]) -> str:
        if "://" in found[1] or found[1].startswith("mailto:"):
            return found[0]
        target = posixpath.normpath(posixpath.join(here, found[1]))
        to = {**PAGES, **FILES}.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if to is None:
            return found[0]
        return f"]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{found[2] or ''})"

    return LINK.sub(link, markdown)


def results_page() -> str:
    rows = "\n".join(
        f"- [{path.stem[:10]}: {path.stem[11:].replace('-', ' ')}]({path.name})"
        for path in sorted((ROOT / RESULTS).glob("*.md"), reverse=True)
    )
    return (
        f"# Benchmarks\n\nEach was measured by a script under `benchmarks/`, on the machine that it names.\n\n{rows}\n"
    )


def settings_page() -> str:
    """Every field: name, type, default, help."""
    page = (
        "# Settings\n\nEach is a key of a recipe and a flag of `manta train` of the same name; those of the data are "
        "under\n`hf_dataset_config` in a recipe, and are flags that begin with `hfdc_`. A flag wins over the recipe.\n"
    )
    for name, field in Config.model_fields.items():
        if name in SECTIONS:
            page += f"\n## {SECTIONS[name]}\n\n{_HEAD}"
        if name != "hf_dataset_config":
            page += _row(name, field)
    dataset = "".join(_row(f"hfdc_{name}", field) for name, field in HFDatasetConfig.model_fields.items())
    lint = "".join(_row(name, field) for name, field in LintConfig.model_fields.items())
    page = page.replace(f"\n## {SECTIONS['device']}\n", f"\n## Dataset\n\n{_HEAD}{dataset}\n## {SECTIONS['device']}\n")
    page += f"\n## Findings\n\nKeys of `lint`; [what each means](../data.md#findings).\n\n{_HEAD}{lint}"
    page += (
        "\n# Where a run goes\n\nUnder `launch` in a recipe, a target's own under its name; flags of `manta launch`.\n"
    )
    shared = "".join(_row(name, LaunchConfig.model_fields[name]) for name in SHARED)
    page += f"\n## For each target\n\n{_HEAD}{shared}"
    for section, model in TARGETS.items():
        page += f"\n## launch.{section}\n\n{_HEAD}" + "".join(_row(*each) for each in model.model_fields.items())
    return page


_HEAD = "| setting | type | default | |\n|---|---|---|---|\n"


def _row(name: str, field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    empty = default is None or default == () or default == {} or isinstance(default, LintConfig)
    shown = "" if empty else f"`{yaml.safe_dump(default).partition(chr(10))[0]}`"
    if isinstance(default, str):
        shown = f"`{default!r}`" if "\n" in default else f"`{default}`"
    about = _cell(str(field.description)).replace("{", "&#123;")
    return f"| `{name}` | {_kind(field)} | {shown} | {about} |\n"


def _kind(field: Any) -> str:
    """`int ≥ 1`, `one of a, b`, `text`."""
    names = {str: "text", int: "int", float: "number", bool: "bool", type(None): ""}

    def kind(annotation: Any) -> str:
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Literal:
            return "one of " + ", ".join(str(value) for value in arguments)
        if origin in (typing.Union, types.UnionType):
            return " or ".join(filter(None, map(kind, arguments)))
        if origin in (dict, tuple) or annotation is LintConfig:
            return "map" if origin is not tuple else "list"
        return names.get(annotation, getattr(annotation, "__name__", str(annotation)))

    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(each, name):g}"
        for each in field.metadata
        for name, sign in signs.items()
        if hasattr(each, name)
    ]
    return " ".join([kind(field.annotation), *bounds]).replace("<", "&lt;")


def commands_page() -> str:
    """Every verb with its own options; the settings have a page."""
    settings = {*Config.model_fields, *(f"hfdc_{name}" for name in HFDatasetConfig.model_fields)}
    page = "# Commands\n\n`manta VERB --help` says the same. [Settings](settings.md) are flags of those that train.\n"

    def describe(name: str, command: click.Command) -> str:
        if isinstance(command, click.Group):
            return "".join(describe(f"{name} {each}", found) for each, found in command.commands.items())
        context = click.Context(command)
        usage = [each.make_metavar(context) for each in command.params if isinstance(each, click.Argument)]
        text = f"\n## {name}\n\n{inspect.cleandoc(command.help or '')}\n\n"
        text += f"```text\n{' '.join([name, *usage, '[OPTIONS]'])}\n```\n\n"
        trains = any(each.name == "hf_model_id" for each in command.params)
        target = sections(name.rpartition(" ")[2]) if name.startswith("manta launch ") else {}
        elsewhere = {*settings, *target, *(SHARED if target else ())} if trains else set()
        options = [each for each in command.params if isinstance(each, click.Option) and each.name not in elsewhere]
        records = [found for each in options if (found := each.get_help_record(context))]
        rows = "".join(f"| `{_cell(flag)}` | {_cell(about)} |\n" for flag, about in records)
        rows += "| … | and [settings](settings.md) |\n" if trains else ""
        return text + (f"| option | |\n|---|---|\n{rows}" if rows else "")

    return page + "".join(describe(f"manta {name}", command) for name, command in main.commands.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def python_page() -> str:
    """From the docstrings, by mkdocstrings."""
    page = "# Python API\n\nAll are names of `manta`. [How to use them](../python.md).\n"
    for heading, members in MEMBERS.items():
        page += f"\n## {heading}\n"
        for member in members:
            hidden = "\n    options:\n      members: false\n" if "Config" in member.rpartition(".")[2] else "\n"
            page += f"\n::: manta.{member}{hidden}"
    return page
