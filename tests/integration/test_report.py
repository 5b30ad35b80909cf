"""The page of a real run with a killed worker, as `manta train` leaves it: its text, and in a real browser."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from browser import browser, needs_browser, open_file
from manta.cli import main
from manta.runs import Run
from running import lines, small_config, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

STEPS = 40


def kill_a_worker(run: Run, at_step: int) -> None:
    wait_for(lambda: any(line["step"] >= at_step for line in lines(run.metrics_file)))
    begun = next(event for event in lines(run.events_file) if event["kind"] == "attempt")
    os.kill(begun["workers"][1]["pid"], signal.SIGKILL)


def manta(*arguments: object) -> str:
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Run:
    """Forty steps on two workers, of which one is killed, by the command line."""
    folder = tmp_path_factory.mktemp("page")
    config = small_config(folder, run_name="killed", max_steps=STEPS, eval_steps=10, save_steps=10)
    (folder / "recipe.yaml").write_text(config.dump())
    run = Run(folder / "results" / "killed")
    killer = threading.Thread(target=kill_a_worker, args=(run, 7), daemon=True)
    killer.start()
    output = manta("train", "--config", folder / "recipe.yaml")
    killer.join()
    assert f"Page:      {run.page}" in output
    return run


@pytest.fixture(scope="module")
def compared(run: Run) -> Path:
    """The page of a comparison with a run of another learning rate, which was stopped."""
    again = ["--config", run.config_file, "--run_name", "other", "--learning_rate", 1e-3, "--stop_at_step", 4]
    manta("train", *again)
    page = run.path / "compared.html"
    output = manta("runs", "compare", run.path, run.path.with_name("other"), "--html", page)
    assert re.search(r"learning_rate +0\.005 +0\.001", output) and re.search(rf"steps +{STEPS} +4", output)
    assert re.search(r"restarts +1 \(1 × worker\) +0", output)
    return page


def test_the_page_that_training_leaves_tells_of_the_killed_worker(run):
    text = run.page.read_text(encoding="utf-8")
    assert f"finished after step {STEPS} of {STEPS}" in text
    assert "1 (1 × worker)" in text and "attempt 2: 2 workers, from step" in text
    assert 'aria-label="Steps over time, with restarts and checkpoints"' in text and "workers ended" in text
    for picture in ("Loss", "Learning rate", "Norm of the gradients", "Tokens per second"):
        assert f'aria-label="{picture} over steps"' in text, picture
    for fact in ("tokens/s", "peak memory of a worker", "float32", "length, median", "newest", "transformers"):
        assert fact in text, fact
    logged = lines(run.metrics_file)
    assert all(line["tokens"] > 0 and line["peak_memory_bytes"] > 1 << 26 for line in logged)
    tokens = [line["tokens"] for line in logged]
    assert tokens == sorted(tokens) and tokens[-1] <= run.result()["tokens"]


def test_the_page_of_a_run_that_was_stopped_says_how_it_goes_on(compared, run):
    text = run.path.with_name("other").joinpath("report.html").read_text(encoding="utf-8")
    assert f"stopped after step 4 of {STEPS}" in text and f"manta train --resume {run.path.with_name('other')}" in text


@pytest.fixture(params=[(1100, False), (1100, True), (390, False)], ids=["light", "dark", "phone"])
def driver(request: pytest.FixtureRequest) -> Iterator[Any]:
    width, dark = request.param
    with browser(*(["--force-dark-mode"] if dark else []), width=width) as driver:
        driver.asked = (width, dark)
        yield driver


def check_looks(driver: Any) -> None:
    """Nothing sticks out of the page, every picture has its lines in colours of the page, nothing is an error."""
    width, dark = driver.asked
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") == dark
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(17, 17, 19)" if dark else "rgb(252, 252, 253)")
    strokes = driver.execute_script(
        "return [...document.querySelectorAll('svg path[style*=\"--series-1\"]')]"
        ".map(each => getComputedStyle(each).stroke)"
    )
    assert strokes and set(strokes) == {"rgb(132, 157, 255)" if dark else "rgb(62, 99, 221)"}
    assert driver.get_log("browser") == []


@needs_browser
def test_the_page_in_a_browser(run, driver):
    open_file(driver, run.page)
    check_looks(driver)
    assert len(driver.find_elements("tag name", "svg")) == 5
    assert "ended after step" not in driver.find_element("tag name", "body").text  # in details, which are closed

    focused = reach_by_tab(driver)
    assert focused[0] == "Skip to the run"
    assert [each for each in focused if each.startswith("Every")] == ["Every evaluation", "Every event"]
    open_with_enter(driver, "Every event")
    assert "ended after step" in driver.find_element("id", "events").text
    open_with_enter(driver, f"All {settings_shown(driver)} settings")
    assert "weight_decay" in driver.find_element("id", "all-settings").text
    check_looks(driver)


@needs_browser
def test_the_page_of_a_comparison_in_a_browser(compared, driver):
    open_file(driver, compared)
    check_looks(driver)
    assert len(driver.find_elements("tag name", "svg")) == 5
    assert "learning_rate" in driver.find_element("id", "settings").text
    assert "killed" in driver.find_element("tag name", "svg").text  # the legend
    assert reach_by_tab(driver)[0] == "Skip to the runs"


def settings_shown(driver: Any) -> int:
    return int(driver.execute_script("return document.querySelectorAll('#all-settings tr').length")) - 1


def reach_by_tab(driver: Any) -> list[str]:
    """What Tab reaches, in order, each in sight and with an outline; ends where the page does."""
    found: list[str] = []
    for _ in range(60):
        press(driver, "\ue004")
        element = driver.switch_to.active_element
        if element.tag_name == "body":
            return found
        seen = driver.execute_script(
            "const box = arguments[0].getBoundingClientRect(), style = getComputedStyle(arguments[0]);"
            "return [box.width > 0 && box.bottom > 0 && box.top < innerHeight && box.right > 0, style.outlineStyle];",
            element,
        )
        assert seen == [True, "solid"], element.get_attribute("outerHTML")[:200]
        found.append(element.get_attribute("aria-label") or element.text)
    raise AssertionError(f"the page has no end: {found}")


def open_with_enter(driver: Any, summary: str) -> None:
    for _ in range(60):
        press(driver, "\ue004")
        element = driver.switch_to.active_element
        if element.tag_name == "summary" and element.text == summary:
            press(driver, "\ue007")
            return
    raise AssertionError(f"Tab never reaches {summary}")


def press(driver: Any, key: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(key).perform()
