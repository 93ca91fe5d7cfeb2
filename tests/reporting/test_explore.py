"""The explorer: what it shows and answers; and in the hands of a person, in Debian's chromium with its driver."""

from __future__ import annotations

import base64
import http.client
import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains

import selfsight
from selfsight import cli
from selfsight.datamodules import digits
from selfsight.engine import build
from selfsight.engine.measure import learnt_from
from selfsight.engine.reload import eval_datamodule
from selfsight.reporting import embedding
from selfsight.reporting.explorer import Explorer
from selfsight.reporting.explorer_server import is_own
from selfsight.runs.folder import RunFolder

from ..jobs.test_evaluate import finished, pictures, refused

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
def address(run: Path) -> Iterator[str]:
    words = [sys.executable, "-m", "selfsight.cli", "explore", f"run={run}", "projection=pca", "port=0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{20,}/", server.stdout.readline())
        assert found is not None
        yield found[0]
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[webdriver.Chrome]:
    needed = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in needed.items() if path is None]
    assert not missing, f"{missing} missing: apt-get install chromium chromium-driver (.ci/run does)"
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(option)
    options.binary_location = str(needed["chromium"])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(str(needed["chromedriver"])))
    try:
        browser.get(address)
        until(lambda: browser.execute_script(FIND, ".bk-events"))
        yield browser
    finally:
        browser.quit()


def answer(address: str, place: str = "", *, socket: bool = False, **headers: str) -> int:
    """The status that a request gets, by plain HTTP or to open a WebSocket; ``headers`` may give another host."""
    server = urlsplit(address)
    assert server.hostname is not None
    connection = http.client.HTTPConnection(server.hostname, server.port, timeout=30)
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "c2l4dGVlbiBieXRlcyEhIQ==", "Sec-WebSocket-Protocol": "bokeh, token",
    }  # fmt: skip
    try:
        connection.request("GET", server.path + place, headers=(upgrade if socket else {}) | headers)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("socket", [False, True], ids=["http", "websocket"])
def test_only_its_own_page_gets_an_answer(address: str, socket: bool) -> None:
    """Neither a page of another site, nor one under a name that was made to mean this machine."""
    port = urlsplit(address).port
    place, served = ("ws", 101) if socket else ("", 200)
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert answer(address, place, socket=socket) == served
    assert answer(address, place, socket=socket, **own) == served
    rebound = {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}
    assert answer(address, place, socket=socket, **rebound) == 403
    assert answer(address, place, socket=socket, Host=f"127.0.0.1.evil.example:{port}") == 403
    assert answer(address, place, socket=socket, **own | {"Origin": "http://evil.example"}) == 403
    assert answer(address, place, socket=socket, **own | {"Origin": "null"}) == 403
    assert answer(address, place, socket=socket, **own | {"Origin": f"http://localhost:{port}1"}) == 403
    without_token = f"http://127.0.0.1:{port}/"
    for guess in ("", "ws", f"{'x' * 22}/{place}", "static/js/bokeh.min.js"):
        assert answer(without_token, guess, socket=socket) == 404


@pytest.mark.parametrize(
    ("listens", "host", "own"),
    [
        ("127.0.0.1", "127.0.0.1:5006", True),
        ("127.0.0.1", "[::1]:5006", True),
        ("::1", "[::1]:5006", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("0.0.0.0", "192.168.1.7:5006", True),
        ("images.lab.example", "images.lab.example:5006", True),
        ("0.0.0.0", "rebound.example:5006", False),
        ("127.0.0.1", "localhost.rebound.example", False),
        ("127.0.0.1", "user@rebound.example", False),
        ("127.0.0.1", "", False),
    ],
)
def test_which_names_are_this_machine(listens: str, host: str, own: bool) -> None:
    assert is_own(listens, host, None) == own


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


def test_search_by_image(page: webdriver.Chrome) -> None:
    """An image of the set finds itself first; what is no image is said to be none."""
    data = digits(image_size=16, mean=(0.3,) * 3, std=(0.3,) * 3, test_fraction=0.2, seed=0, name="digits")
    content = io.BytesIO()
    Image.fromarray(data.limited(300).train.read(7)).save(content, "PNG")
    put(page, "upload", base64.b64encode(content.getvalue()).decode())
    until(lambda: "closest to your image" in model(page, "pictures", "text"))
    first = re.search(r"title='image (\d+) ", model(page, "pictures", "text"))
    assert first is not None
    assert first[1] == data.limited(300).train.name(7)
    put(page, "upload", base64.b64encode(b"no image").decode())
    until(lambda: model(page, "status", "text") == "That is no image (no image).")


def test_the_map_is_as_high_as_the_window_and_shows_pictures_on_request(page: webdriver.Chrome) -> None:
    window = page.execute_script("return window.innerHeight")
    map_height = page.execute_script("return Bokeh.documents[0].get_model_by_name('map').inner_height")
    assert map_height > 0.8 * window
    put(page, "draw", "pictures")
    until(lambda: model(page, "drawn", "data.url.length") > 50)
    put(page, "draw", "dots")
    until(lambda: model(page, "drawn", "data.url.length") == 0)


def test_nothing_is_wrong_in_the_console(page: webdriver.Chrome) -> None:
    severe = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in severe if "favicon" not in message]


def opened(run: Path) -> Explorer:
    folder, backbone = RunFolder(run), selfsight.load(run)
    data = eval_datamodule(build.dataset(folder.config()), backbone, num_workers=0)
    train, images = learnt_from(backbone, data)
    return Explorer(folder, data, backbone, train, embedding.build_map(train, train, images, "pca"), "train")


def name_of(explorer: Explorer, point: int) -> str:
    name: str = explorer.images.name(int(explorer.indices[point]))
    return name


def test_an_image_is_read_as_those_of_data_sets(tmp_path: Path) -> None:
    """One that was taken upright, and one of 16 bits, find themselves."""
    root = pictures(tmp_path / "photos", 8)
    grey = (np.arange(18 * 18, dtype=np.uint16).reshape(18, 18) % 251).astype(np.uint8)
    Image.fromarray(grey).save(root / "grey.png")
    run = finished(tmp_path / "run", "dataset=folder", f"dataset.root={root}", "dataset.test_fraction=0")
    explorer = opened(run)

    def found(picture: Image.Image, **options: Any) -> str:
        content = io.BytesIO()
        picture.save(content, "PNG", **options)
        explorer.search(content.getvalue())
        return name_of(explorer, explorer.selected[0])

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    with Image.open(root / "3.png") as upright:
        assert found(upright) == "3.png"
        assert found(upright.transpose(Image.Transpose.ROTATE_90), exif=exif) == "3.png"
    assert found(Image.fromarray(grey.astype(np.uint16) << 8)) == "grey.png"
    explorer.search(b"words")
    assert explorer.status.text == "That is no image (no image)."


def test_paths_are_of_the_data_set_alone(tmp_path: Path) -> None:
    """Of others nothing is told, not even which there are."""
    root = pictures(tmp_path / "photos", 8)
    shutil.copy(root / "3.png", tmp_path / "aside.png")
    (root / "link.png").symlink_to(tmp_path / "aside.png")
    os.mkfifo(root / "pipe")
    explorer = opened(finished(tmp_path / "run", "dataset=folder", f"dataset.root={root}", "dataset.test_fraction=0"))
    for path in ("3.png", str(root / "3.png")):
        explorer.source.selected.indices = []
        explorer.search_path(path)
        assert name_of(explorer, explorer.selected[0]) == "3.png"
    told = set()
    for path in ("../aside.png", str(tmp_path / "aside.png"), "../nothing.png", "link.png", "/etc/hostname"):
        explorer.source.selected.indices = []
        explorer.search_path(path)
        assert not explorer.selected
        told.add(explorer.status.text)
    assert told == {"Only images in the folder of the data set are found by their path; open others below."}
    explorer.search_path("pipe")
    assert explorer.status.text == "pipe cannot be read (a pipe, no file)."


def test_images_without_labels_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pictures(tmp_path / "photos", 10)
    odd = os.fsdecode(b"\xe4.png")  # a name that is no text
    (root / "9.png").rename(root / odd)
    (root / "labels.csv").write_text("".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(8)))
    run = finished(tmp_path / "run", "dataset=folder", f"dataset.root={root}", "dataset.test_fraction=0.25")
    explorer = opened(run)
    shown = [name_of(explorer, i) for i in range(len(explorer.known.rows))]
    folder = RunFolder.open(run)
    held_out = len(build.dataset(folder.config(), folder).split("test"))
    assert len(shown) == 10 - held_out < 10
    assert {"8.png", odd} < set(shown)
    explorer.marks.value = "pictures"
    assert len(explorer.drawn.data["url"]) == len(shown)
    assert all(url.startswith("data:image/") for url in explorer.drawn.data["url"])
    explorer.label.value = "no label"
    assert len(explorer.drawn.data["url"]) == 2, "of those that are shown"
    assert {*explorer.drawn.data["x"]} <= {*explorer.known.flat[:, 0]}
    explorer.marks.value = "dots"
    assert not len(explorer.drawn.data["url"])
    kept = explorer.view.filter.booleans
    assert {name for name, keep in zip(shown, kept, strict=True) if keep} == {"8.png", odd}
    explorer.label.value, explorer.errors.value = "everything", "only errors"
    kept = explorer.view.filter.booleans
    assert not {name for name, keep in zip(shown, kept, strict=True) if keep} & {"8.png", odd}

    explorer.source.selected.indices = [i for i, name in enumerate(shown) if name in ("8.png", odd)]
    explorer.export()
    assert sorted((run / "selections" / "selection.txt").read_bytes().split()) == [b"8.png", b"\xe4.png"]
    assert "labels.list" not in explorer.status.text
    explorer.source.selected.indices = [i for i, name in enumerate(shown) if name not in ("8.png", odd)]
    explorer.export()
    assert "labels.list" in explorer.status.text
    (run / "selections").rename(run / "aside")
    (run / "selections").touch()
    explorer.export()
    assert "cannot be made" in explorer.status.text


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("port=99999", "port is 99999; a whole number from 0 to 65535 was expected."),
        ("port=-5", "port is -5; a whole number from 0 to 65535 was expected."),
        ("split=banana", "split is 'banana'; train or test was expected."),
        ("split=tst", "Did you mean 'test'?"),
        ("projection=tsme", "Did you mean 'tsne'?"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(
    word: str, told: str, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, "explore", f"run={finished_run}", word)
