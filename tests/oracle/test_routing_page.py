"""Claims about the page of `routing.py --html` in a real Chromium: it shows what was computed.

The tests speak to ChromeDriver over HTTP, as the WebDriver standard describes. They are skipped
if Chromium or ChromeDriver is missing.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
import routing
import torch

from generate import TINY
from mixtral import Mixtral, visible
from tokenizer import Tokenizer

TEXT = "Once upon a <b>time</b> & </script><script>alert(1)</script> there was a 🦙"
PROMPT_LENGTH = 20
RIGHT, LEFT, HOME, END = "\ue014", "\ue012", "\ue011", "\ue010"
SELECTED = "[tabindex='0'][role=option]"

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")),
    reason="chromium and chromedriver (Debian: chromium-driver) are not installed")


class Browser:
    """A headless Chromium session."""

    def __init__(self, port, profile):
        self.base = f"http://127.0.0.1:{port}/session"
        self.base += "/" + self.call("POST", "", {"capabilities": {"alwaysMatch": {
            "goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": {"args": [
                "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                "--disable-background-networking", "--disable-component-update", "--disable-quic",
                f"--user-data-dir={profile}"]}}}})["sessionId"]

    def call(self, method, path, data=None):
        request = urllib.request.Request(
            self.base + path, method=method, headers={"Content-Type": "application/json"},
            data=None if data is None else json.dumps(data).encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, path):
        self.call("POST", "/url", {"url": path.as_uri()})

    def run(self, script):
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def devtools(self, command, **parameters):
        self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def keys(self, selector, text):
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        [element] = found.values()
        self.call("POST", f"/element/{element}/value", {"text": text})

    def set_chunk(self, number):
        self.run(f"const input = document.getElementById('chunk'); input.value = '{number}';"
                 "input.dispatchEvent(new Event('input'))")

    def focused(self):
        """The token in focus, as a screen reader would say it."""
        return self.run("return document.activeElement.getAttribute('aria-label')")

    def seen(self):
        """The positions of the underlined tokens."""
        return self.run("return spans.flatMap("
                        "(span, i) => span.classList.contains('seen') ? [i] : [])")

    def buffer(self):
        """The position in each slot, −1 for an empty one; and the positions that are underlined."""
        cells = self.run("return [...document.querySelectorAll('#buffer div')].map("
                         "cell => [cell.textContent, cell.className, cell.title])")
        for slot, (text, _, title) in enumerate(cells):
            assert title == f"slot {slot}: " + ("empty" if text == "–" else f"position {text}")
        return ([-1 if text == "–" else int(text) for text, _, _ in cells],
                sorted(int(text) for text, kind, _ in cells if "seen" in kind))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "LC_ALL": "C.UTF-8"})
    try:
        for line in driver.stdout:
            if "started successfully on port" in line:
                port = int(line.rstrip(".\n").rpartition(" ")[2])
                break
        session = Browser(port, tmp_path_factory.mktemp("profile"))
        yield session
        with contextlib.suppress(OSError):
            session.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=30)
        driver.stdout.close()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY)


@pytest.fixture(scope="module")
def model():
    return Mixtral.from_pretrained(TINY, torch.float64)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return tokenizer.encode(TEXT) + tokenizer.encode("girl " * 400, bos=False)


def write_page(path, tokenizer, model, tokens):
    texts = routing.token_texts(tokenizer, tokens)
    path.write_text(routing.page("tiny", model.config, tokens, texts, PROMPT_LENGTH,
                                 routing.record(model, tokens)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(tokenizer, model, tokens, tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("page") / "page.html", tokenizer, model, tokens)


def test_the_page_shows_what_the_model_computed(browser, page, model, tokens):
    weights, experts, margins = routing.record(model, tokens)
    browser.open(page)
    assert browser.run("return document.getElementById('number').textContent") == "3"  # of 0 … 5
    browser.keys("#layer", HOME + RIGHT * 2)
    assert browser.run("return document.getElementById('number').textContent") == "2"
    first = browser.run("return spans.map(span => Number(span.mark.textContent))")
    assert first == experts[2, :, 0].tolist()
    colours = browser.run("return spans.map(span => span.style.background)")
    assert len(set(zip(first, colours, strict=True))) == len(set(first)) == len(set(colours))

    loads = browser.run("return [...document.querySelectorAll('#load tbody tr')].map("
                        "row => [...row.cells].slice(1).map(cell => Number(cell.textContent)))")
    assert len(loads) == 6
    for n, row in enumerate(loads):
        assert row == pytest.approx(
            [100 * x for x in routing.expert_load(experts[n], 8).tolist()], abs=0.051)
    legend = browser.run("return document.getElementById('legend').textContent")
    assert [float(x) for x in re.findall(r": ([\d.]+) %", legend)] == loads[2]

    browser.keys(SELECTED, HOME + RIGHT * 7)
    said, (one, two), weight = browser.focused(), experts[2, 7].tolist(), weights[2, 7].tolist()
    assert said.startswith(f"Token 7, id {tokens[7]}, ")
    assert (f"expert {one} with weight {100 * weight[0]:.1f} %, expert {two} with weight "
            f"{100 * weight[1]:.1f} %.") in said
    margin = float(re.search(r"best other expert by ([\d.e-]+)\.$", said)[1])
    assert margin == pytest.approx(float(margins[2, 7]), abs=1e-4)
    assert said in browser.run("return document.getElementById('details').textContent")


@pytest.mark.parametrize("chunk", [256, 1])
@pytest.mark.parametrize("position", [0, 127, 400])
def test_buffer_and_window_are_those_of_the_cache(browser, page, model, tokens, chunk, position):
    """A real cache reserves slots for the same tokens. At position 400 the buffer has wrapped."""
    cache = model.new_cache(1, len(tokens), chunk)
    for part in torch.arange(position + 1).split(chunk):
        cache.extend(part[None], torch.tensor([len(part)]))
    browser.open(page)
    browser.run(f"spans[{position}].focus()")
    browser.set_chunk(chunk)
    positions, seen = browser.buffer()
    assert positions == cache.positions[0].tolist() and len(positions) == 127 + chunk
    mask = visible(torch.tensor([[position]]), cache.positions, model.config.sliding_window)[0, 0]
    assert seen == browser.seen() == cache.positions[0, mask].sort()[0].tolist()


def test_the_page_opens_with_the_chunk_of_a_new_cache(browser, page, model, tokens):
    browser.open(page)
    shown = int(browser.run("return document.getElementById('chunk').value"))
    assert shown == routing.CHUNK == model.new_cache(1, 1).chunk
    rule = browser.run("return document.getElementById('rule').textContent")
    assert f"C = min({len(tokens)}, W + 256 − 1) = 383 slots" in rule


def test_a_model_without_a_window_sees_and_keeps_every_token(browser, tmp_path, tokenizer):
    model = Mixtral.from_pretrained(TINY, torch.float64)
    object.__setattr__(model.config, "sliding_window", None)
    page = write_page(tmp_path / "page.html", tokenizer, model, tokenizer.encode("One two " * 90))
    browser.open(page)
    N = browser.run("return spans.length")
    assert N > 150 and browser.seen() == list(range(N))
    assert browser.buffer() == (list(range(N)), list(range(N)))
    assert not browser.run("return document.getElementById('sizes').offsetHeight")


def test_the_keyboard_reaches_every_token_and_stops_at_the_ends(browser, page, tokens):
    browser.open(page)
    last = len(tokens) - 1
    for keys, wanted in ((HOME, 0), (LEFT, 0), (RIGHT, 1), (END, last), (RIGHT, last),
                         (LEFT, last - 1)):
        browser.keys(SELECTED, keys)
        assert browser.focused().startswith(f"Token {wanted}, ")
    assert browser.run("return document.querySelectorAll('[aria-selected=true]').length") == 1


def test_markup_in_a_text_is_text_and_nothing_is_loaded_or_logged(browser, model, tmp_path):
    texts = ["<s>", "</script><script>alert(1)</script>", "<b>", "<!--", "&amp;\\\"'", "🦙\n"] * 5
    tokens = list(range(len(texts)))
    page = tmp_path / "page.html"
    page.write_text(routing.page("<i>tiny</i>", model.config, tokens, texts, PROMPT_LENGTH,
                                 routing.record(model, tokens)), encoding="utf-8")
    browser.call("POST", "/se/log", {"type": "browser"})
    browser.open(page)
    assert browser.run("return spans.map(span => span.firstChild.data ?? '')") == texts
    italics = browser.run("return spans.filter(span => "
                          "getComputedStyle(span).fontStyle === 'italic').length")
    assert italics == PROMPT_LENGTH
    assert browser.run("return document.querySelectorAll('b, i, #text script').length") == 0
    assert browser.run("return document.querySelectorAll('script').length") == 2
    assert browser.call("POST", "/se/log", {"type": "browser"}) == []
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_any_screen_in_both_colour_schemes(browser, page, width, scheme):
    """SCREENSHOTS=DIR keeps a picture of each."""
    browser.devtools("Emulation.setDeviceMetricsOverride", width=width, height=900,
                     deviceScaleFactor=1, mobile=False)
    browser.devtools("Emulation.setEmulatedMedia",
                     features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(page)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    colours = browser.run("return ['color', 'backgroundColor'].map("
                          "name => getComputedStyle(document.body)[name])")
    ink, ground = (sum(map(int, re.findall(r"\d+", colour))) / 3 for colour in colours)
    assert (ink < 60 and ground > 220) if scheme == "light" else (ink > 220 and ground < 60)
    if directory := os.environ.get("SCREENSHOTS"):
        picture = base64.b64decode(browser.call("GET", "/screenshot"))
        (Path(directory) / f"{scheme}-{width}.png").write_bytes(picture)
