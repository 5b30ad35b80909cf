"""`manta inspect` on real data, in a terminal and in a real browser. The data is not part of the project."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from browser import browser, needs_browser, open_file
from manta import inspection
from manta.cli import main
from manta.config import Config
from manta.data import prepare
from manta.data.prepare import Prepared
from manta.data.source import SPLITS
from manta.data.tokenize import IGNORE, load_tokenizer
from tiny import EOS, tiny_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the data sets in {DATA}")
CASES: dict[str, dict[str, Any]] = {
    "alpaca": {"max_seq_length": 1024, "data": {"dataset_name": DATA / "chat" / "alpaca_en_demo.json"}},
    "C4": {"objective": "cpt", "packing": True, "data": {"dataset_name": DATA / "text" / "c4_demo.jsonl"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("inspect")
    sample = (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8")[:200_000] if DATA.is_dir() else "some text"
    tiny_tokenizer(where / "base", sample, vocab_size=2000)
    return where


def prepared_here(folder: Path, data: dict[str, Any], **settings: Any) -> tuple[Prepared, Config]:
    named = data | {"dataset_name": str(data["dataset_name"])}
    base = {"hf_model_id": str(folder / "base"), "data_dir": str(folder / "prepared"), "hf_dataset_config": named}
    config = Config.from_dict({**base, **settings})
    prepared, parts = prepare.locate(config)
    if not prepare.is_ready(prepared):
        prepare.prepare(config, prepared, parts, prepare.open_job(config, prepared), here=True)
    return prepared, config


def shown(found: inspection.Inspection, **console: Any) -> str:
    screen = io.StringIO()
    inspection.show(found, Console(file=screen, width=120, **console), samples=3)
    return screen.getvalue()


@needs_data
@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_the_tokens(folder, case):
    prepared, config = prepared_here(folder, **CASES[case])
    found = inspection.inspect(prepared, config)
    rows = prepared.tokenized("training").with_format("numpy")
    lengths = [len(ids) for ids in rows["input_ids"]]
    trained = sum(int((labels != IGNORE).sum()) for labels in rows["labels"])
    figures = found.figures["training"]
    assert figures["tokens"] == sum(lengths) and figures["trained_tokens"] == trained
    assert figures["lengths"]["max"] == max(lengths) <= config.max_seq_length
    assert sum(figures["histogram"]["counts"]) == len(lengths)
    assert figures["share"] == (1.0 if case == "C4" else pytest.approx(trained / sum(lengths)))
    assert figures.get("fill", figures.get("would_fill")) > 0.9
    assert figures["sequences"] == (len(prepared.packs()) if case == "C4" else len(lengths))


@needs_data
def test_duplicates_and_rows_in_two_splits_are_found_in_the_alpaca_demo(folder):
    data = CASES["alpaca"]["data"]
    rows = json.loads(Path(data["dataset_name"]).read_text(encoding="utf-8"))
    doubled = folder / "doubled.json"
    doubled.write_text(json.dumps([*rows, *rows[:100]]), encoding="utf-8")
    prepared, config = prepared_here(folder, data | {"dataset_name": doubled}, max_seq_length=1024)
    found = inspection.inspect(prepared, config)
    texts = {}
    for split in SPLITS:
        lines = [json.loads(line) for line in prepared.text(split).open(encoding="utf-8")]
        texts[split] = [(line["input"], line["output"]) for line in lines]
    held_out = {*texts["validation"], *texts["test"]}
    by_name = {finding.name: finding.rows for finding in found.findings}
    assert by_name["duplicates"] == len(texts["training"]) - len(set(texts["training"])) > 60
    assert by_name["overlap"] == sum(text in held_out for text in texts["training"]) > 10
    assert "duplicates" in shown(found)


@pytest.mark.parametrize("colour", [True, False])
def test_a_sample_is_told_by_colour_and_by_sign(folder, tmp_path, colour):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "What is 1 + 1?", "a": "It is 2 – 🙂 café."}\n' * 3, encoding="utf-8")
    data = {"dataset_name": path, "input_template": "Q: {q}\nA: ", "output_template": "{a}", "train_split_ratio": 1.0}
    prepared, config = prepared_here(folder, data, eval_steps=0)
    found = inspection.inspect(prepared, config, samples=1)
    text = shown(found, force_terminal=colour, color_system="truecolor" if colour else None)
    assert ("\x1b[1;32m" in text) == colour
    plain = text if not colour else "".join(part.partition("m")[2] for part in ("m" + text).split("\x1b["))
    assert f"Q: What is 1 + 1?⏎\nA: ⟦It is 2 – 🙂 café.{EOS}⟧" in plain
    pieces = found.pictures[0].pieces
    sample = prepared.tokenized("training")[0]
    assert [token for piece in pieces for token in piece.ids] == sample["input_ids"]
    assert [piece.trained for piece in pieces for _ in piece.ids] == [label != IGNORE for label in sample["labels"]]
    tokenizer = load_tokenizer(str(folder / "base"))
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(sample["input_ids"])


@pytest.mark.parametrize("packing", [[], ["--packing"]], ids=["samples", "packed"])
def test_a_page_has_what_there_is_of_each_split(folder, tmp_path, packing):
    rows = [{"question": f"{number}?", "answer": "yes " * (number % 7 + 1)} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "manta", "inspect", "--hf_model_id", str(folder / "base")]
    command += ["--hfdc_dataset_name", str(tmp_path / "rows.jsonl"), "--hfdc_input_template", "{question}"]
    command += ["--hfdc_output_template", "{answer}", "--html", "page.html", *packing]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "Lengths, training" in page and "Lengths, test" not in page  # of the test split no token is made
    assert ("fill in padded batches of 2" in page) is not bool(packing)
    assert ("packed fill" in page) is bool(packing)  # a figure that there is not has no row


@needs_data
@needs_browser
def test_the_page_in_a_browser(folder, tmp_path):
    command = [sys.executable, "-m", "manta", "inspect", "--hf_model_id", str(folder / "base")]
    command += ["--hfdc_dataset_name", str(DATA / "gsm8k" / "train.jsonl"), "--data_dir", str(folder / "prepared")]
    command += ["--hfdc_input_template", "Question: {question}\nAnswer: ", "--hfdc_output_template", "{answer}"]
    command += ["--html", str(tmp_path / "page.html"), "--samples", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("⟦") == 3 and "6,726" in done.stdout  # the legend and two samples
    with browser() as driver:
        open_file(driver, tmp_path / "page.html")
        articles = driver.find_elements("tag name", "article")
        assert len(articles) == inspection.ON_PAGE
        assert "6,726" in driver.find_element("id", "figures").text
        first = articles[0]
        assert first.find_element("tag name", "b").value_of_css_property("text-decoration-line") == "none"
        assert first.find_element("tag name", "b").value_of_css_property("border-bottom-width") == "2px"
        answer = first.find_element("tag name", "pre").text.partition("Answer: ")[2]
        trained = "".join(each.text for each in first.find_elements("css selector", "pre b"))
        assert "".join(trained.split()) == "".join(answer.split()) != ""

        driver.find_element("id", "find").send_keys("Natalia")
        visible = [article for article in articles if article.is_displayed()]
        assert 0 < len(visible) < len(articles) and all("Natalia" in article.text for article in visible)
        assert driver.find_element("id", "shown").text == f"{len(visible)} of {len(articles)}"
        driver.find_element("id", "only").click()
        assert "Question" not in visible[0].find_element("tag name", "pre").text
        assert driver.get_log("browser") == []
    with browser("--force-dark-mode", width=390, height=844) as driver:
        open_file(driver, tmp_path / "page.html", "?find=Natalia")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert driver.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches")
        assert driver.get_log("browser") == []


def test_a_prepared_folder_is_looked_at_by_source_row(folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"q": "{number}?", "a": "{number}."}}\n' for number in range(20)), encoding="utf-8")
    data = {"dataset_name": path, "input_template": "{q}\n", "output_template": "{a}", "train_split_ratio": 1.0}
    prepared, _ = prepared_here(folder, data, eval_steps=0)
    path.unlink()
    look = ["inspect", "--prepared", str(prepared.path), "--rows"]
    done = CliRunner().invoke(main, [*look, "3,17"])
    assert done.exit_code == 0, done.output
    assert f"3?⏎\n⟦3.{EOS}⟧" in done.output and f"17?⏎\n⟦17.{EOS}⟧" in done.output and "⟦4." not in done.output
    missing = CliRunner().invoke(main, [*look, "99"])
    assert missing.exit_code == 2 and "Rows [99] have no sample in the training split" in missing.output
    other = CliRunner().invoke(main, ["inspect", "--prepared", str(tmp_path)])
    assert other.exit_code == 2 and "is not prepared data" in other.output
    letters = CliRunner().invoke(main, [*look, "a"])
    assert letters.exit_code == 2 and "--rows" in letters.output
