"""The documents as a site: it builds without a warning, and is whole without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from browser import browser, needs_browser, open_file
from documents import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    mkdocs = Path(sys.executable).with_name("mkdocs")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", folder], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


def test_each_document_and_each_recipe_is_a_page(site):
    for path in (ROOT / "docs").glob("*.md"):
        assert (site / f"{path.stem}.html").exists(), path
    for path in (ROOT / "recipes").glob("*"):
        assert (site / "recipes" / f"{path.stem}.html").exists(), path
    assert "Fine-tune by" in (site / "reference" / "python.html").read_text()  # `manta.train`, from its docstring


def test_no_page_loads_anything_from_elsewhere(site):
    loads = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(https?:)?//[^"' >]+""")
    for page in site.rglob("*.html"):
        found = [each[0] for each in loads.finditer(page.read_text()) if 'rel="canonical"' not in each[0]]
        assert found == [], page


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (390, "light")])
def test_pages_fit_and_the_console_stays_empty(site, width, scheme):
    with browser(width=width) as driver:
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        for page in ("index", "how", "data", "faults", "comparison", "reference/settings", "reference/python"):
            open_file(driver, site / f"{page}.html")
            wide = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, page
            shown = driver.execute_script("return document.body.dataset.mdColorScheme")
            assert shown == {"light": "default", "dark": "slate"}[scheme]
            pictures = driver.execute_script(
                "return [...document.querySelectorAll('.picture svg')].map(each => each.getBoundingClientRect().width)"
            )
            assert all(width > 300 for width in pictures) and (pictures or page not in ("how", "data", "faults"))
        assert driver.get_log("browser") == []


@needs_browser
def test_search_works_in_pages_opened_as_files(site):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    with browser(width=1400) as driver:
        open_file(driver, site / "index.html", "?q=quarantine")
        found = WebDriverWait(driver, 30).until(
            lambda driver: [
                each.get_attribute("href") for each in driver.find_elements(By.CSS_SELECTOR, ".md-search-result__link")
            ]
        )
        assert any("data.html" in link for link in found)
        assert driver.get_log("browser") == []
