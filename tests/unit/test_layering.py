import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import manta
from manta.config import Config

ROOT = Path(__file__).parents[2]


def test_imports_go_one_way():
    """The contracts of pyproject.toml, which `make check` also runs."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", manta.__all__)
def test_public_names_are_importable_and_documented(name):
    assert getattr(manta, name).__doc__


def test_importing_manta_imports_nothing_heavy():
    code = "import manta, sys; print([m for m in ('torch', 'ray', 'transformers', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_no_room_is_a_hall():
    for path in (ROOT / "src").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path
        assert path.name != "utils.py"


def test_trust_remote_code_is_never_hard_coded():
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not (isinstance(node.value, ast.Constant) and node.value.value), path


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("**/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_loads(recipe):
    config = Config.load(recipe)
    assert Config.from_dict(config.to_dict()) == config
    assert config != Config()


def test_the_tests_that_the_docs_name_exist():
    written = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "guide.md").read_text())
    assert len(named) >= 25
    assert [name for name in named if f"def {name}(" not in written and name != "test_checkpoint"] == []
