"""Claims about routing.py: its statistics are the paper's, and it shows what the model computed."""

import json
import math
import os
import re
import trace
import xml.etree.ElementTree as ET

import pytest
import routing
import torch
from conftest import random_model, save
from hypothesis import given
from hypothesis import strategies as st

from generate import TINY
from mixtral import Mixtral
from tokenizer import Tokenizer

SVG = "{http://www.w3.org/2000/svg}"
TEXT = "Once upon\na time </script> & <b> 🦙"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY)


def random_choices(E, A, N):
    """A different experts for each of N tokens, drawn at random."""
    return torch.rand(N, E, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :A]


@pytest.mark.parametrize("options", [
    {}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": 3, "num_local_experts": 3},
    {"sliding_window": None}])
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


@pytest.mark.parametrize("E, A, wanted", [
    (8, 2, (0.125, 1 - (6 / 8) * (5 / 7))), (8, 1, (0.125, 0.125)), (5, 3, (0.2, 1.0))])
def test_random_routing_repeats_as_the_paper_says(E, A, wanted):
    assert routing.random_repetitions(E, A) == pytest.approx(wanted)
    assert routing.repetitions(random_choices(E, A, 200_000)) == pytest.approx(wanted, abs=0.005)
    load = routing.expert_load(random_choices(E, A, 200_000), E)
    assert load.tolist() == pytest.approx([1 / E] * E, abs=0.005)


def test_the_baselines_of_table_5_are_these_numbers():
    first, shared = routing.random_repetitions(8, 2)
    assert (f"{first:.1%}", f"{shared:.1%}") == ("12.5%", "46.4%")


def test_statistics_by_hand():
    experts = torch.tensor([[0, 1], [0, 2], [3, 2], [4, 3], [5, 6]])
    assert routing.repetitions(experts) == (1 / 4, 3 / 4)
    assert routing.expert_load(experts, 8).tolist() == [.2, .1, .2, .2, .1, .1, .1, 0]


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


def test_the_table_lists_all_experts_of_all_layers_even_those_without_tokens():
    """Experts 4 to 7 have no tokens; the last of a list must not depend on the text."""
    experts = torch.tensor([[[0, 1], [0, 2], [0, 3]], [[0, 1], [1, 0], [3, 2]]])
    _, head, *rows = routing.table(experts, 8, colour=False)
    assert head.split() == ["layer", *map(str, range(8)), "same", "first", "any", "shared"]
    assert [row.split() for row in rows] == [
        ["0", "50.0", "16.7", "16.7", "16.7", "0.0", "0.0", "0.0", "0.0", "100.0", "100.0"],
        ["1", "33.3", "33.3", "16.7", "16.7", "0.0", "0.0", "0.0", "0.0", "0.0", "50.0"],
        ["random", *["12.5"] * 9, "46.4"]]
    assert len({len(line) for line in (head, *rows)}) == 1  # the columns are aligned


def test_a_text_is_marked_with_colours_or_with_small_numbers(tokenizer):
    tokens = tokenizer.encode(TEXT)
    texts = routing.token_texts(tokenizer, tokens)
    assert "".join(texts) == "<s>" + TEXT
    experts = torch.arange(2 * len(tokens)).view(-1, 2) % 13
    plain = routing.marked_text(texts, experts, colour=False)
    marks = [str(e).translate({48 + n: 0x2080 + n for n in range(10)})
             for e in experts[:, 0].tolist()]
    assert plain == "".join(map("".join, zip(texts, marks, strict=True)))
    coloured = routing.marked_text(texts, experts, colour=True)
    assert re.sub("\x1b[^m]*m", "", coloured) == "<s>" + TEXT
    assert f"48;5;{routing.TERMINAL_COLOURS[2]}mOnce\x1b[0m" in coloured
    lines = [line.count("\x1b[30") - line.count("\x1b[0m") for line in coloured.split("\n")]
    assert lines == [0, 0]  # no colour reaches beyond the end of a line


def test_bytes_of_a_character_are_shown_at_the_last_of_them(tokenizer):
    texts = routing.token_texts(tokenizer, tokenizer.encode("🦙", eos=True))
    assert texts[0] == "<s>" and texts[-2:] == ["🦙", "</s>"] and set(texts[1:-2]) <= {"", " "}
    broken = [*tokenizer.encode("x"), tokenizer.byte_ids[0xF0]]
    assert "".join(routing.token_texts(tokenizer, broken)) == "<s>x\ufffd"


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search('id="data" type="application/json">(.*?)</script>', text)[1])


def test_the_page_holds_the_routing_of_the_prompt_and_its_continuation(tokenizer, tmp_path,
                                                                      capsys):
    path = tmp_path / "page.html"
    options = ["--prompt", TEXT, "--max-new-tokens", "5", "--html", str(path)]
    assert routing.main(options) == 0
    printed = capsys.readouterr()
    assert printed.err == f"[routing in {path}]\n" and os.listdir(tmp_path) == [path.name]
    data, prompt = page_data(path), tokenizer.encode(TEXT)
    assert data["prompt"] == len(prompt) and data["ids"][:len(prompt)] == prompt
    assert len(data["ids"]) == len(data["tokens"]) == len(prompt) + 5
    assert "".join(data["tokens"]).startswith("<s>" + TEXT)
    assert (data["model"], data["window"], data["experts"]) == ("tiny", 128, 8)
    model = Mixtral.from_pretrained(TINY, torch.float64)
    weights, experts, margins = routing.record(model, data["ids"])
    assert data["chosen"] == experts.tolist()
    assert (torch.tensor(data["weights"]).double() - weights).abs().max() < 5.1e-5
    assert (torch.tensor(data["margins"]).double() - margins).abs().max() < 5.1e-5


def test_no_text_of_a_token_can_end_the_data_of_the_page():
    model = random_model()
    texts = ["</script>", "<script>", "<!--", "\u2028\x00&amp;\\"]
    html = routing.page("<b>", model.config, [1, 2, 3, 4], texts, 4,
                        routing.record(model, [1, 2, 3, 4]))
    template = routing.PAGE.read_text(encoding="utf-8")
    for markup in ("<script", "</script", "<!--", "<b>"):
        assert html.count(markup) == template.count(markup)
    data = json.loads(re.search('type="application/json">(.*?)</script>', html)[1])
    assert (data["model"], data["tokens"]) == ("<b>", texts)


def test_the_command_makes_the_picture_of_the_readme_bit_for_bit(tmp_path):
    options = ["--prompt", "Once upon a time", "--max-new-tokens", "70"]
    assert routing.main([*options, "--svg", str(tmp_path / "new.svg")]) == 0
    assert (tmp_path / "new.svg").read_bytes() == (TINY / "routing.svg").read_bytes()


def test_a_picture_shows_three_layers_and_all_experts():
    texts = ["a <&", "\n", "b\x00c", "d\ne"]
    experts = torch.tensor([[[layer], [0], [9], [layer]] for layer in range(5)])
    svg = ET.fromstring(routing.picture(texts, experts, E=10))
    shown = [node.text for node in svg.iter(f"{SVG}text")]
    body = ["a <&", "b\ufffdc", "d", "e"]  # \x00 cannot be written in XML
    assert shown == ["layer 0", *body, "layer 2", *body, "layer 4", *body,
                     *(f"expert {e}" for e in range(10))]
    fills = [node.get("fill") for node in svg.iter(f"{SVG}rect")][1:]
    assert fills[4:8] == [routing.COLOURS[e % 8] for e in (2, 9, 2, 2)]
    for node in svg.iter(f"{SVG}rect"):
        if node.get("y"):
            assert float(node.get("x")) + float(node.get("width")) <= int(svg.get("width"))
            assert float(node.get("y")) + float(node.get("height")) <= int(svg.get("height"))


# ------------------------------------------------------------------ the command


def test_the_command_prints_the_text_and_a_row_for_each_layer(tmp_path, capsys):
    (tmp_path / "text").write_text("Once upon a time, there was a little dog. He was happy.")
    assert routing.main([str(tmp_path / "text"), "--layer", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layer 1, first expert of each token:"
    assert re.sub("[₀-₉]", "", lines[2]) == "<s>" + (tmp_path / "text").read_text()
    assert [line.split()[0] for line in lines[6:]] == ["0", "1", "2", "3", "4", "5", "random"]
    assert lines[-1].split()[-2:] == ["12.5", "46.4"]


def test_the_middle_layer_is_shown_unless_another_is_asked_for(tmp_path, capsys):
    model = random_model(seed=3, vocab_size=2048, num_hidden_layers=5)
    directory = str(save(model, tmp_path / "model"))
    (tmp_path / "model" / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    _, experts, _ = routing.record(model, Tokenizer(TINY).encode("One day"))
    for options, layer in (([], 2), (["--layer", "0"], 0), (["--layer", "4"], 4)):
        assert routing.main(["--prompt", "One day", "--model", directory, *options]) == 0
        first, _, text, *_ = capsys.readouterr().out.splitlines()
        assert first.startswith(f"layer {layer},")
        assert [ord(c) - 0x2080 for c in re.findall("[₀-₉]", text)] == experts[layer, :, 0].tolist()


def test_colour_is_for_terminals_unless_no_color_is_set(monkeypatch, capsys):
    for terminal, variable, wanted in ((True, "", True), (True, "1", False), (False, "", False)):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("NO_COLOR", variable)
        assert routing.main(["--prompt", "One"]) == 0
        assert ("\x1b[" in capsys.readouterr().out) == wanted


@pytest.mark.parametrize("options, words", [
    (["--prompt", ""], "the text is empty"),
    (["--prompt", "x", "--layer", "6"], "--layer must be in 0 … 5, got 6"),
    (["--prompt", "x", "--layer", "-1"], "--layer must be in 0 … 5, got -1"),
    (["--prompt", "x", "--max-new-tokens", "-1"], "--max-new-tokens must be an integer >= 0"),
    (["--prompt", "x", "--model", "absent"], "absent"),
    (["--prompt", "x", "--html", "absent/page"], "absent/page: not written"),
    (["--prompt", "x", "--svg", "."], ".: not written"),
    (["absent"], "absent: No such file or directory"),
    (["bytes"], "bytes: not UTF-8 text")])
def test_bad_input_is_refused_in_one_line_and_nothing_is_printed(options, words, tmp_path,
                                                                 monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"Once \xff")
    assert routing.main(options) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("routing.py: ")
    assert words in printed.err and printed.err.count("\n") == 1
    assert os.listdir() == ["bytes"]


@pytest.mark.parametrize("options", [
    [], ["--prompt", "x", "file"], ["--prompt", "x", "--lay", "1"], ["--prompt", "x", "--layer"]])
def test_wrong_arguments_exit_with_2(options, capsys):
    with pytest.raises(SystemExit) as stop:
        routing.main(options)
    assert stop.value.code == 2
