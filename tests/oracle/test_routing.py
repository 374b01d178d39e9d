"""Claims about routing.py: its statistics are the paper's, and it shows what the model computed."""

import json
import math
import re
import trace
import xml.etree.ElementTree as ET

import pytest
import routing
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st

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


@given(st.integers(2, 6).flatmap(lambda E: st.tuples(st.just(E), st.lists(
    st.permutations(range(E)), min_size=2, max_size=9))), st.integers(1, 6))
def test_statistics_are_those_of_plain_loops(drawn, A):
    E, orders = drawn
    rows = [order[:A] for order in orders]
    pairs = list(zip(rows, rows[1:], strict=False))
    load = routing.expert_load(torch.tensor(rows), E).tolist()
    assert load == pytest.approx([sum(row.count(e) for row in rows) / sum(map(len, rows))
                                  for e in range(E)])
    assert routing.repetitions(torch.tensor(rows)) == pytest.approx((
        sum(a[0] == b[0] for a, b in pairs) / len(pairs),
        sum(bool(set(a) & set(b)) for a, b in pairs) / len(pairs)))


@pytest.mark.parametrize("E, A, wanted", [(8, 2, ("12.5%", "46.4%")), (5, 3, ("20.0%", "100.0%"))])
def test_random_routing_repeats_as_table_5_of_the_paper_says(E, A, wanted):
    expected = routing.random_repetitions(E, A)
    assert tuple(f"{share:.1%}" for share in expected) == wanted
    drawn = torch.rand(200_000, E, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :A]
    assert routing.repetitions(drawn) == pytest.approx(expected, abs=0.005)


def test_the_table_lists_all_experts_of_all_layers_even_those_without_tokens():
    experts = torch.tensor([[[0, 1], [0, 2], [0, 3]], [[0, 1], [1, 0], [3, 2]]])
    _, head, *rows = routing.table(experts, 8, colour=False)
    assert head.split() == ["layer", *map(str, range(8)), "same", "first", "any", "shared"]
    assert [row.split() for row in rows] == [
        ["0", "50.0", "16.7", "16.7", "16.7", "0.0", "0.0", "0.0", "0.0", "100.0", "100.0"],
        ["1", "33.3", "33.3", "16.7", "16.7", "0.0", "0.0", "0.0", "0.0", "0.0", "50.0"],
        ["random", *["12.5"] * 9, "46.4"]]


# ------------------------------------------------------------------ text, page and picture


def test_a_text_is_marked_with_colours_or_with_small_numbers(tokenizer):
    tokens = tokenizer.encode(TEXT)
    texts = routing.token_texts(tokenizer, tokens)
    assert "".join(texts) == "<s>" + TEXT
    experts = torch.arange(2 * len(tokens)).view(-1, 2) % 13
    marks = [str(e).translate({48 + n: 0x2080 + n for n in range(10)})
             for e in experts[:, 0].tolist()]
    assert routing.marked_text(texts, experts, colour=False) == "".join(
        text + mark for text, mark in zip(texts, marks, strict=True))
    coloured = routing.marked_text(texts, experts, colour=True)
    assert re.sub("\x1b[^m]*m", "", coloured) == "<s>" + TEXT
    assert f"48;5;{routing.TERMINAL_COLOURS[2]}mOnce\x1b[0m" in coloured
    lines = [line.count("\x1b[30") - line.count("\x1b[0m") for line in coloured.split("\n")]
    assert lines == [0, 0]  # no colour reaches beyond the end of a line


def test_the_page_holds_the_routing_of_the_prompt_and_its_continuation(tokenizer, tmp_path):
    path, prompt = tmp_path / "page.html", tokenizer.encode(TEXT)
    assert routing.main(["--prompt", TEXT, "--max-new-tokens", "5", "--html", str(path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    data = json.loads(re.search('type="application/json">(.*?)</script>', path.read_text())[1])
    assert data["prompt"] == len(prompt) and data["ids"][:len(prompt)] == prompt
    assert len(data["ids"]) == len(data["tokens"]) == len(prompt) + 5
    assert "".join(data["tokens"]).startswith("<s>" + TEXT)
    model = Mixtral.from_pretrained(TINY, torch.float64)
    weights, experts, margins = routing.record(model, data["ids"])
    assert data["chosen"] == experts.tolist()
    assert (torch.tensor(data["weights"]).double() - weights).abs().max() < 5.1e-5
    assert (torch.tensor(data["margins"]).double() - margins).abs().max() < 5.1e-5


def test_the_page_loads_nothing_and_no_text_of_a_token_can_end_its_data():
    model, texts = random_model(), ["</script>", "<script>", "<!--", "\u2028\x00&amp;\\"]
    html = routing.page("<b>", model.config, [1, 2, 3, 4], texts, 4,
                        routing.record(model, [1, 2, 3, 4]))
    template = routing.PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|\b(src|href)=|url\(|@import|fetch|innerHTML", template)
    for markup in ("<script", "</script", "<!--", "<b>"):
        assert html.count(markup) == template.count(markup)
    data = json.loads(re.search('type="application/json">(.*?)</script>', html)[1])
    assert (data["model"], data["tokens"]) == ("<b>", texts)


def test_the_command_makes_the_picture_of_the_readme_bit_for_bit(tmp_path):
    options = ["--prompt", "Once upon a time", "--max-new-tokens", "70"]
    assert routing.main([*options, "--svg", str(tmp_path / "new.svg")]) == 0
    assert (tmp_path / "new.svg").read_bytes() == (TINY / "routing.svg").read_bytes()


def test_a_picture_shows_three_layers_and_all_experts():
    experts = torch.tensor([[[layer], [0], [9], [layer]] for layer in range(5)])
    svg = ET.fromstring(routing.picture(["a <&", "\n", "b\x00c", "d\ne"], experts, E=10))
    body = ["a <&", "b\ufffdc", "d", "e"]  # \x00 cannot be written in XML
    assert [node.text for node in svg.findall(".//{*}text")] == [
        "layer 0", *body, "layer 2", *body, "layer 4", *body, *(f"expert {e}" for e in range(10))]
    fills = [node.get("fill") for node in svg.findall(".//{*}rect")][1:]
    assert fills[4:8] == [routing.COLOURS[e % 8] for e in (2, 9, 2, 2)]


# ------------------------------------------------------------------ the command


def test_the_command_prints_the_text_and_a_row_for_each_layer(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("Once upon a time, there was a little dog.")
    for terminal, variable, options, layer in ((False, "", ["--layer", "1"], 1), (True, "1", [], 3),
                                               (True, "", [], 3)):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("NO_COLOR", variable)
        assert routing.main([str(tmp_path / "text"), *options]) == 0
        printed = capsys.readouterr().out
        assert ("\x1b[" in printed) == (terminal and not variable)
        lines = re.sub("\x1b[^m]*m|[₀-₉]", "", printed).splitlines()
        assert lines[0].startswith(f"layer {layer},")
        assert lines[2] == "<s>" + (tmp_path / "text").read_text()
        assert [line.split()[0] for line in lines[6:]] == [*"012345", "random"]


@pytest.mark.parametrize("options, word", [
    (["--prompt", ""], "empty"), (["--prompt", "x", "--layer", "6"], "--layer"),
    (["--prompt", "x", "--max-new-tokens", "-1"], "max_new_tokens"),
    (["--prompt", "x", "--model", "absent"], "absent"),
    (["--prompt", "x", "--html", "absent/page"], "absent/page"),
    (["--prompt", "x", "--svg", "."], "."), (["absent"], "absent"), (["bytes"], "bytes")])
def test_bad_input_is_refused_in_one_line_and_nothing_is_printed(
        options, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"Once \xff")
    assert routing.main(options) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("routing.py: ")
    assert word in printed.err and printed.err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["bytes"]
