"""Claims about routing.py: its table, page and picture show what the model computed."""

import io
import json
import math
import re
import trace
import xml.etree.ElementTree as ET

import pytest
import routing
import torch
from conftest import random_model

from generate import TINY
from mixtral import Mixtral
from tokenizer import Tokenizer

TEXT = "Once upon\na time </script> & <b> 🦙"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY)


@pytest.mark.parametrize("options", [{}, {"num_experts_per_tok": 8}])
def test_the_routing_of_a_long_text_is_that_of_one_pass(options):
    """600 tokens are three chunks of the cache."""
    model, tokens = random_model(**options), torch.randint(0, 37, (600,)).tolist()
    weights, experts, margins = routing.record(model, tokens)
    seen = trace.record(model, torch.tensor([tokens]))
    for n in range(2):
        at = f"model.layers.{n}.block_sparse_moe."
        assert torch.equal(experts[n], seen[at + "chosen"])
        assert (weights[n] - seen[at + "weights"]).abs().max() < 1e-12
        margin = seen.get(at + "margin", torch.full((600,), math.inf, dtype=torch.float64))
        assert torch.allclose(margins[n], margin, rtol=0, atol=1e-12)


def data_of(page):
    return json.loads(re.search('type="application/json">(.*?)</script>', page)[1])


def test_the_page_holds_the_routing_of_the_prompt_and_its_continuation(tokenizer, tmp_path):
    path, prompt = tmp_path / "page.html", tokenizer.encode(TEXT)
    assert routing.main(["--prompt", TEXT, "--max-new-tokens", "5", "--html", str(path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    data = data_of(path.read_text())
    assert data["prompt"] == len(prompt) and data["ids"][:len(prompt)] == prompt
    assert len(data["ids"]) == len(data["tokens"]) == len(prompt) + 5
    assert "".join(data["tokens"]).startswith("<s>" + TEXT)
    cut = prompt[:-1]  # in the middle of the last character
    assert "".join(routing.token_texts(tokenizer, cut)) == "<s>" + tokenizer.decode(cut)
    model = Mixtral.from_pretrained(TINY, torch.float64)
    for name, numbers in zip(("weights", "chosen", "margins"), routing.record(model, data["ids"]),
                             strict=True):
        assert (torch.tensor(data[name]).double() - numbers).abs().max() < 5.1e-5


def test_the_page_loads_nothing_and_no_text_of_a_token_can_end_its_data():
    model, texts = random_model(), ["</script>", "<script>", "<!--", "\u2028\x00&amp;\\"]
    html = routing.page("<b>", model.config, [1, 2, 3, 4], texts, 4,
                        routing.record(model, [1, 2, 3, 4]))
    template = routing.PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|\b(src|href)=|url\(|@import|fetch|innerHTML", template)
    for markup in ("<script", "</script", "<!--", "<b>"):
        assert html.count(markup) == template.count(markup)
    assert (data_of(html)["model"], data_of(html)["tokens"]) == ("<b>", texts)


def test_a_picture_shows_three_layers_and_all_experts():
    experts = torch.tensor([[[layer], [0], [9], [layer]] for layer in range(5)])
    svg = ET.fromstring(routing.picture(["a <&", "\n", "b\x00c", "d\ne"], experts, E=10))
    body = ["a <&", "b\ufffdc", "d", "e"]  # \x00 cannot be written in XML
    assert [node.text for node in svg.findall(".//{*}text")] == [
        "layer 0", *body, "layer 2", *body, "layer 4", *body, *(f"expert {e}" for e in range(10))]
    fills = [node.get("fill") for node in svg.findall(".//{*}rect")][1:]
    assert fills[4:8] == [routing.COLOURS[e % 8] for e in (2, 9, 2, 2)]


# ------------------------------------------------------------------ the command


def test_the_command_makes_the_picture_of_the_readme_bit_for_bit(tmp_path):
    options = ["--prompt", "Once upon a time", "--max-new-tokens", "70"]
    assert routing.main([*options, "--svg", str(tmp_path / "new.svg")]) == 0
    assert (tmp_path / "new.svg").read_bytes() == (TINY / "routing.svg").read_bytes()


@pytest.fixture
def stdin(monkeypatch):
    """Give bytes to the standard input."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_the_command_prints_a_row_for_each_layer_of_the_standard_input(tokenizer, stdin, capsys):
    """With a column for every expert, also for those that no token chose."""
    text = "Once upon\na time 🦙"
    stdin(text.encode())
    assert routing.main([]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert [len(row.split()) for row in rows] == 7 * [1 + 8 + 2] and " 0.0%" in "".join(rows)
    model, tokens = Mixtral.from_pretrained(TINY, torch.float64), tokenizer.encode(text)
    assert [head, *rows] == list(routing.routing_table(routing.record(model, tokens)[1], 8))


@pytest.mark.parametrize("options, word", [
    (["--prompt", ""], "empty"), (["--prompt", "x", "--max-new-tokens", "-9"], "max_new_tokens"),
    (["--prompt", "x", "--model", "absent"], "absent"),
    (["--prompt", "x", "--html", "absent/page"], "absent/page"),
    (["--prompt", "x", "--svg", "."], "not written"), ([], "'utf-8' codec")])
def test_bad_input_is_refused_in_one_line_and_nothing_is_printed(
        options, word, tmp_path, monkeypatch, stdin, capsys):
    monkeypatch.chdir(tmp_path)
    stdin(b"Once \xff")
    assert routing.main(options) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("routing.py: ")
    assert word in printed.err and printed.err.count("\n") == 1 and not list(tmp_path.iterdir())
