"""The explorer as a person uses it, in a real browser: Debian's chromium and chromium-driver."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains

from selfsight import cli
from selfsight.datamodules import digits

#: widgets live in shadow roots, which plain selectors do not enter
FIND = """
const found = [];
const walk = root => { for (const e of root.querySelectorAll('*')) {
  if (e.matches(arguments[0])) found.push(e);
  if (e.shadowRoot) walk(e.shadowRoot);
} };
walk(document);
return found;
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    cli.main(["pretrain", "debug=smoke", "limit_images=300", "report=false", f"runs={folder}", "name=one"])
    return folder / "one"


@pytest.fixture(scope="module")
def page(run: Path) -> Iterator[webdriver.Chrome]:
    needed = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in needed.items() if path is None]
    assert not missing, f"{missing} missing: apt-get install chromium chromium-driver (.ci/run does)"
    words = [sys.executable, "-m", "selfsight.cli", "explore", f"run={run}", "projection=pca", "port=0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
        assert address is not None
        options = webdriver.ChromeOptions()
        for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
            options.add_argument(option)
        options.binary_location = str(needed["chromium"])
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=Service(str(needed["chromedriver"])))
        try:
            browser.get(address[0])
            until(lambda: browser.execute_script(FIND, ".bk-events"))
            yield browser
        finally:
            browser.quit()
    finally:
        server.terminate()
        server.wait(20)


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What ``condition`` gives once it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError("it did not happen")


def model(page: webdriver.Chrome, name: str, attribute: str) -> Any:
    return page.execute_script(f"return Bokeh.documents[0].get_model_by_name('{name}').{attribute}")


def put(page: webdriver.Chrome, name: str, value: str) -> None:
    page.execute_script(f"Bokeh.documents[0].get_model_by_name('{name}').value = arguments[0]", value)


def test_lasso_export_and_use(page: webdriver.Chrome, run: Path) -> None:
    """A loop around the whole map selects it; the list that is exported names images of the training set."""
    field = page.execute_script(FIND, ".bk-events")[0]
    w, h = field.size["width"], field.size["height"]
    drag = ActionChains(page).move_to_element_with_offset(field, int(-0.49 * w), int(-0.49 * h)).click_and_hold()
    for x, y in ((0.97, 0), (0, 0.97), (-0.97, 0), (0, -0.95)):
        drag = drag.move_by_offset(int(x * w), int(y * h))
    drag.release().perform()
    until(lambda: "chosen" in model(page, "pictures", "text"))
    assert "<b>300 chosen</b>" in model(page, "pictures", "text")
    until(lambda: [b for b in page.execute_script(FIND, "button") if "export" in b.text])[0].click()
    until(lambda: "300 names" in model(page, "status", "text"))
    names = (run / "selections" / "selection.txt").read_text().split()
    data = digits(image_size=16, mean=(0.3,) * 3, std=(0.3,) * 3, test_fraction=0.2, seed=0, name="digits")
    training = data.limited(300).train
    assert sorted(names) == sorted(training.name(i) for i in range(300))


def test_filters(page: webdriver.Chrome) -> None:
    put(page, "class", "3")
    told = until(lambda: model(page, "status", "text") if "shown" in model(page, "status", "text") else None)
    of_class = int(told.split()[0])
    assert 20 < of_class < 40  # a tenth of 300, about
    put(page, "show", "only errors")
    until(lambda: model(page, "status", "text") != told)
    assert int(model(page, "status", "text").split()[0]) <= of_class
    put(page, "class", "everything")
    put(page, "show", "everything")
    until(lambda: model(page, "status", "text").startswith("300 of 300"))


def test_search_by_image(page: webdriver.Chrome, tmp_path: Path) -> None:
    """An image of the set finds itself first; what is no image is said to be none."""
    data = digits(image_size=16, mean=(0.3,) * 3, std=(0.3,) * 3, test_fraction=0.2, seed=0, name="digits")
    Image.fromarray(data.limited(300).train.read(7)).save(tmp_path / "seven.png")
    put(page, "path", str(tmp_path / "seven.png"))
    until(lambda: "closest to your image" in model(page, "pictures", "text"))
    first = re.search(r"title='image (\d+) ", model(page, "pictures", "text"))
    assert first is not None
    assert first[1] == data.limited(300).train.name(7)
    (tmp_path / "words.png").write_text("no image")
    put(page, "path", str(tmp_path / "words.png"))
    until(lambda: model(page, "status", "text") == "That is no image.")


def test_nothing_is_wrong_in_the_console(page: webdriver.Chrome) -> None:
    severe = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in severe if "favicon" not in message]
