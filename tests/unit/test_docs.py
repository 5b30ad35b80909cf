"""What the documents say of commands, recipes and settings is so."""

from __future__ import annotations

import html
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import click
import pytest

from documents import DOCUMENTS, ROOT, Command, commands, inline
from manta import preparation
from manta.cli import config_from_flags, main
from manta.config import Config, HFDatasetConfig
from manta.dataset_config import LintConfig
from manta.launch.config import SECTIONS, LaunchConfig
from tiny import tiny_model

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHOWN = [*commands(), *commands(RECIPES)]
OURS = [command for command in SHOWN if command.words[0] == "manta" and "--help" not in command.words]
SETTINGS = {*Config.model_fields, *(f"hfdc_{name}" for name in HFDatasetConfig.model_fields)}


def parsed(words: tuple[str, ...]) -> click.Context:
    """What click makes of a command line; nothing runs. Raises click's errors."""
    command: click.Command = main
    context = click.Context(main, info_name="manta")
    rest = list(words[1:])
    while isinstance(command, click.Group):
        if not rest or rest[0].startswith("-"):
            return command.make_context("manta", rest, resilient_parsing=True)
        _, found, rest = command.resolve_command(context, rest)
        assert found
        command = found
    return command.make_context(command.name, rest, parent=context)


def test_the_documents_show_commands():
    assert len(OURS) >= 60
    assert {command.where for command in OURS} >= {"README.md", "recipes.md", "launch.md", "lora.yaml"}


@pytest.mark.parametrize("command", OURS, ids=str)
def test_each_command_parses_and_its_settings_are_valid(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    context = parsed(command.words)
    given = {name: value for name, value in context.params.items() if name in SETTINGS | {"config"}}
    recipe = given.get("config")
    if recipe and recipe.startswith("recipes/"):
        assert Path(recipe).is_file()
    if "hf_model_id" in given and (not recipe or recipe.startswith("recipes/")):
        config_from_flags(given)


def test_a_flag_that_does_not_exist_is_found():
    with pytest.raises(click.NoSuchOption):
        parsed(("manta", "launch", "ray", "--addres", "x"))
    with pytest.raises(click.UsageError):
        parsed(("manta", "trane"))


@pytest.mark.parametrize("command", [each for each in inline() if "--help" not in each.words], ids=str)
def test_each_command_within_a_text_has_flags_that_exist(command):
    if command.words[1].isupper():  # manta VERB --help
        return
    try:
        context = parsed(command.words)
    except (click.MissingParameter, click.BadArgumentUsage, click.BadParameter):
        return  # shown without all that it needs, or with a placeholder for a value
    assert context.command.name != "manta" or len(command.words) == 2


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_each_file_and_target_that_a_command_names_is_there(command):
    words = command.words
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert [word for word in words[1:] if "=" not in word and word not in targets] == []
    for word in words:
        if re.match(r"(recipes|benchmarks|docs|src|tests)/[\w./-]+\.\w+$", word):
            assert (ROOT / word).exists(), word
    if words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists()


def test_benchmarks_that_a_text_names_are_there():
    named = [found for path in DOCUMENTS for found in re.findall(r"benchmarks/\w+\.py", path.read_text())]
    assert len(named) >= 5 and [name for name in named if not (ROOT / name).exists()] == []


QUESTION = {"question": "What is the capital of Peru?", "answer": "Lima."}
DOLLY = {"instruction": "What is the capital of Peru?", "response": "Lima."}
ALPACA = {"instruction": "What is the capital of Peru?", "output": "Lima."}
CHAT = {"messages": [{"role": "user", "content": "Peru?"}, {"role": "assistant", "content": "Lima."}]}
TEXT = {"text": "The capital of Peru is Lima."}
ROWS = {"chat": CHAT, "cpt": TEXT, "gpu": DOLLY, "multi-node": DOLLY, "launch": DOLLY}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}Q: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_prepares_data_of_its_kind(recipe, tmp_path, monkeypatch):
    """At its own length, packing and weights; without a network, and in this process."""
    monkeypatch.setattr(preparation, "SHARDS_HERE", 9)
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    data = {"dataset_name": _written(tmp_path / "rows.jsonl", ROWS.get(recipe.stem, QUESTION))}
    parts = []
    for number, part in enumerate(Config.load(recipe).hf_dataset_config.mixture):
        row = CHAT if part.get("format") == "messages" else ALPACA if part.get("chat") else QUESTION
        parts.append({**part, "dataset_name": _written(tmp_path / f"{number}.jsonl", row)})
    config = Config.load(
        recipe,
        {
            "hf_model_id": tiny_model(tmp_path / "base"),
            "data_dir": str(tmp_path / "prepared"),
            "results_dir": str(tmp_path / "results"),
            "chat_template": str(template) if "chat" in recipe.read_text() else None,
            "hf_dataset_config": {**data, "mixture": parts},
        },
    )
    counts = preparation.prepared_by(config).counts
    assert counts["training"]["tokens"] > 0 and counts["quarantined"] == 0
    assert counts["validation"]["rows"] > 0


def _written(path: Path, row: dict) -> str:
    """A file of 120 rows like this one, told apart by a number."""
    text = json.dumps(row).replace("Peru", "Peru, asked {number} times").replace("{", "{{").replace("}", "}}")
    text = text.replace("{{number}}", "{number}")
    path.write_text("".join(text.format(number=number) + "\n" for number in range(120)))
    return str(path)


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """The site's hook."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "docs" / "site.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_page_has_every_setting_with_its_default_and_help(site):
    rows = {}
    for line in site.settings_page().splitlines():
        if line.startswith("| `"):
            name, kind, default, about = (each.strip() for each in re.split(r"(?<!\\)\|", line)[1:-1])
            rows.setdefault(name.strip("`"), []).append((kind, default, about))
    fields = {name: field for name, field in Config.model_fields.items() if name != "hf_dataset_config"}
    fields |= {f"hfdc_{name}": field for name, field in HFDatasetConfig.model_fields.items()}
    fields |= {**LintConfig.model_fields, **{n: f for n, f in LaunchConfig.model_fields.items() if n not in SECTIONS}}
    for section in SECTIONS.values():
        fields |= section.model_fields
    assert rows.keys() == fields.keys()
    for name, field in fields.items():
        for kind, _, about in rows[name]:
            assert kind and about, name
        written = [html.unescape(about).replace("\\|", "|") for _, _, about in rows[name]]
        assert field.description in written, name
    assert rows["learning_rate"] == [("number > 0", "`5.0e-05`", "Peak learning rate")]
    assert rows["max_steps"] == [("int ≥ 1", "`10000`", "Optimizer steps")]
    assert rows["objective"][0][:2] == ("one of sft, cpt", "`sft`")


def test_the_commands_page_has_every_verb_and_every_option_of_its_own(site):
    page = site.commands_page()
    for name, command in main.commands.items():
        assert f"## manta {name}" in page
        if not isinstance(command, click.Group):
            about = page.partition(f"## manta {name}\n")[2].partition("\n## ")[0]
            trains = any(option.name == "hf_model_id" for option in command.params)
            for option in command.params:
                if isinstance(option, click.Option) and not (trains and option.name in SETTINGS):
                    assert f"`{option.opts[0]}" in about, option.name


def test_links_of_the_site_lead_where_those_of_the_repository_do(site):
    relinked = site.relinked
    assert relinked("[a](docs/data.md#packing)", "index.md") == "[a](data.md#packing)"
    assert relinked("[a](../recipes/lora.yaml) [b](faults.md)", "data.md") == "[a](recipes/lora.md) [b](faults.md)"
    assert relinked("[a](../benchmarks/results)", "data.md") == "[a](benchmarks/index.md)"
    assert relinked("[a](../nowhere.md)", "data.md") == "[a](../nowhere.md)"
    assert relinked("[a](https://ray.io/x.md)", "data.md") == "[a](https://ray.io/x.md)"


def test_command_lines_are_divided_as_a_shell_does(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('```bash\nmanta a \\\n  --b 1  # why\nmanta c | jq . && manta d &\npython -c "\nx\n"\n```\n')
    words = [command.words for command in commands([page])]
    assert words == [("manta", "a", "--b", "1"), ("manta", "c"), ("jq", "."), ("manta", "d"), ("python", "-c", "\nx\n")]
    assert isinstance(next(commands([page])), Command)
