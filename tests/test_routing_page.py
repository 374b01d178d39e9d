"""Claims about the page of --routing-html, in a real Chromium: it shows what the model computed.

ChromeDriver is spoken to over HTTP as the WebDriver standard has it; skipped where it is missing.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from generate import pieces, routing, routing_page
from mixtral import Mixtral
from tokenizer import Tokenizer

TINY = Path(__file__).resolve().parent.parent / "tiny"
TEXT = "Once upon a <b>time</b> & </script><script>alert(1)</script> there was a 🦙"
RIGHT, HOME = "\ue014", "\ue011"

needs_chromium = pytest.mark.skipif(
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
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def keys(self, selector, text):
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        [element] = found.values()
        self.call("POST", f"/element/{element}/value", {"text": text})

    def told(self):
        """The token in focus, as a screen reader would say it."""
        return self.run("return document.activeElement.getAttribute('aria-label')")


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
def shown(tmp_path_factory):
    """Tokenizer, model, tokens and the page about them."""
    tokenizer, model = Tokenizer(TINY), Mixtral.from_pretrained(TINY, torch.float32)
    tokens = tokenizer.encode(TEXT) + tokenizer.encode("girl " * 150, bos=False)
    page = tmp_path_factory.mktemp("page") / "page.html"
    page.write_text(routing_page(tokenizer, model, tokens, 20, "tiny"), encoding="utf-8")
    return tokenizer, model, tokens, page


@needs_chromium
def test_the_page_shows_what_the_model_computed(browser, shown):
    tokenizer, model, tokens, page = shown
    weights, experts, margins = routing(model, tokens)
    browser.call("POST", "/url", {"url": page.as_uri()})
    browser.keys("#layer", HOME + RIGHT * 2)
    assert browser.run("return document.getElementById('number').textContent") == "2"
    first = browser.run("return spans.map(span => Number(span.mark.textContent))")
    assert first == experts[2, :, 0].tolist()
    loads = browser.run("return [...document.querySelectorAll('#load tbody tr')].map("
                        "row => [...row.cells].slice(1).map(cell => Number(cell.textContent)))")
    for n, row in enumerate(loads):
        counts = experts[n].flatten().bincount(minlength=8).tolist()
        assert row == pytest.approx([100 * c / (2 * len(tokens)) for c in counts], abs=0.051)

    browser.keys("[tabindex='0'][role=option]", HOME + RIGHT * 7)
    told, (one, two), at = browser.told(), experts[2, 7].tolist(), weights[2, 7].tolist()
    assert told.startswith(f"token 7, id {tokens[7]}, ")
    assert f"expert {one} at {100 * at[0]:.1f} %, then expert {two} at {100 * at[1]:.1f} %" in told
    assert float(told.rpartition(" ")[2]) == pytest.approx(float(margins[2, 7]), abs=1e-4)


@needs_chromium
def test_the_buffer_wraps_and_the_window_moves_as_the_cache_does(browser, shown):
    """Position p is in slot p mod 128, and the query at 140 sees 13 … 140."""
    browser.call("POST", "/url", {"url": shown[3].as_uri()})
    browser.keys("[tabindex='0'][role=option]", HOME + RIGHT * 140)
    held = browser.run("return [...document.querySelectorAll('#buffer div')].map("
                       "cell => Number(cell.textContent))")
    assert held == [128 + slot if slot <= 12 else slot for slot in range(128)]
    seen = browser.run("return spans.flatMap("
                       "(span, i) => span.classList.contains('seen') ? [i] : [])")
    assert seen == list(range(13, 141))
    browser.keys("[aria-selected=true]", HOME)
    assert browser.run("return document.querySelectorAll('#buffer .empty').length") == 127


@needs_chromium
def test_markup_in_a_text_is_text_and_nothing_goes_wrong(browser, shown):
    tokenizer, _, tokens, page = shown
    browser.call("POST", "/se/log", {"type": "browser"})
    browser.call("POST", "/url", {"url": page.as_uri()})
    text = browser.run("return spans.map(span => span.firstChild.data ?? '').join('')")
    assert text == "".join(pieces(tokenizer, tokens)) and TEXT in text
    assert browser.run("return document.querySelectorAll('#text b, #text script').length") == 0
    assert browser.run("return document.querySelectorAll('script').length") == 2
    assert browser.call("POST", "/se/log", {"type": "browser"}) == []
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


@needs_chromium
def test_a_page_of_a_thousand_tokens_opens(browser, shown, tmp_path):
    """The milliseconds are printed (pytest -s): about 200 on two cores; a second would annoy."""
    tokenizer, model, tokens, _ = shown
    page = tmp_path / "long.html"
    page.write_text(routing_page(tokenizer, model, (tokens * 7)[:1000], 10, "tiny"))
    start = time.perf_counter()
    browser.call("POST", "/url", {"url": page.as_uri()})
    assert browser.run("return spans.length") == 1000
    print(f"1,000 tokens: {1000 * (time.perf_counter() - start):.0f} ms")


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out_on_a_narrow_or_a_wide_screen(browser, shown, width):
    """SCREENSHOTS=DIR keeps what it looked like, light and dark."""
    emulate = "/goog/cdp/execute"
    for scheme in ("light", "dark"):
        browser.call("POST", emulate, {"cmd": "Emulation.setDeviceMetricsOverride", "params": {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}})
        browser.call("POST", emulate, {"cmd": "Emulation.setEmulatedMedia", "params": {
            "features": [{"name": "prefers-color-scheme", "value": scheme}]}})
        browser.call("POST", "/url", {"url": shown[3].as_uri()})
        assert browser.run("return document.documentElement.scrollWidth") <= width
        ground = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
        if directory := os.environ.get("SCREENSHOTS"):
            picture = base64.b64decode(browser.call("GET", "/screenshot"))
            (Path(directory) / f"{scheme}-{width}.png").write_bytes(picture)
