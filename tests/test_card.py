"""Claims about the model card: it agrees with the logs, and tiny/card.py measures correctly."""

import itertools
import random
import re

import card
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from generate import generate
from mixtral import Mixtral, MixtralConfig, route
from tokenizer import Tokenizer

README = (card.TINY / "README.md").read_text(encoding="utf-8")
LOG = (card.TINY / "train.log").read_text(encoding="utf-8")


def settings_of(log):
    """The settings that a log names; the last header counts."""
    return dict(re.findall(r"(\w+)=(\S+)", log))


def part_of(document, name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- -->", document, re.S)[1]


# ---- the card agrees with the logs and with the checkpoint


def test_the_scores_of_the_card_are_those_of_the_log():
    for dtype in ("float32", "bfloat16"):
        [score] = re.findall(rf"bits per byte, torch.{dtype}: (\S+)", LOG)
        [stated] = re.findall(rf"(?:\*\*)?([\d.]+)(?:\*\*)? in {dtype}[ ,]", README)
        assert stated == score


def test_the_settings_of_the_card_are_those_of_the_log():
    told, config = settings_of(LOG), Mixtral.from_pretrained(card.TINY).config
    steps, batch, context = (int(told[name]) for name in ("steps", "batch", "context"))
    [(documents, tokens, held_out)] = set(
        re.findall(r"^(\d+) documents, (\d+) tokens; held out (\d+)", LOG, re.M))
    [parameters] = set(re.findall(r"^(\d+) parameters", LOG, re.M))
    for words in (f"{int(documents):,} stories", f"{held_out} other stories",
                  f"{int(parameters):,} parameters", f"hidden size {told['hidden']}",
                  f"{told['layers']} layers", f"{told['heads']} query heads",
                  f"{told['kv_heads']} key/value heads",
                  f"experts of width {told['expert_hidden']}",
                  f"vocabulary of {int(told['vocab']):,} pieces", f"{told['window']} tokens.",
                  f"{steps:,} steps of {batch} × {context} tokens",
                  f"({steps * batch * context / 1e6:.1f} M tokens, "
                  f"{steps * batch * context / int(tokens):.1f} epochs)",
                  f"rises for {round(float(told['warmup']) * steps)} steps to 5e-3",
                  f"last {100 * float(told['decay']):.0f} % of the steps",
                  f"Weight decay is {told['weight_decay']}", f"weight {told['balance']}",
                  f"seed is {told['seed']}"):
        assert words in README, words
    assert float(told["rate"]) == 5e-3 and told["optimiser"] == "muon"
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.head_dim) == (
        2048, 192, 6, 32)
    assert (config.intermediate_size, config.num_local_experts, config.num_experts_per_tok) == (
        384, 8, 2)


STUDY = re.findall(r"^\| (.*) \| (\d+) \| ([\d.]+) \| ([\d.–]+) \| `(\w+\.log)` \|$", README, re.M)


def study_log(name):
    """A log of the study and the settings that it names."""
    log = (card.TINY / "study" / name).read_text(encoding="utf-8")
    return log, settings_of(log)


def test_the_study_names_every_log_that_is_kept():
    kept = [path.name for path in (card.TINY / "study").glob("*.log")]
    assert sorted(name for *_, name in STUDY) == sorted(kept) and len(kept) == 12


@pytest.mark.parametrize("changes, steps, score, loads, name", STUDY)
def test_a_row_of_the_study_is_what_its_log_says(changes, steps, score, loads, name):
    log, settings = study_log(name)
    assert f"held-out bits per byte, torch.float32: {score}\n" in log
    assert settings["steps"] == steps
    shares = [float(x) for row in re.findall(r"expert load: (.*)", log) for x in row.split()]
    assert loads == f"{min(shares)}–{max(shares)}"
    base = study_log("muon.log")[1] | {"steps": steps, "output": settings["output"]}
    other = {f"{name}={value}" for name, value in settings.items() if base.get(name) != value}
    assert other - {"check_every=100000"} == set(re.findall(r"`(\w+=\S+)`", changes))


def test_the_curve_is_drawn_from_the_log():
    drawn = card.curve(*card.read_log(LOG))
    assert (card.TINY / "curve.svg").read_text(encoding="utf-8") == drawn


def test_the_loads_of_the_card_are_near_those_of_the_log():
    """The log has them from the bfloat16 model and without EOS, so they differ by 0.3 % at most."""
    table = re.findall(r"^ +\d+ +(.*%)$", part_of(README, "load"), re.M)
    logged = re.findall(r"^layer \d+ expert load: (.*)$", LOG, re.M)
    assert len(table) == len(logged) == 6
    for row, line in zip(table, logged, strict=True):
        loads = [float(x) for x in row.replace("%", "").split()[:8]]
        assert loads == pytest.approx([float(x) for x in line.split()], abs=0.3)
        assert sum(loads) == pytest.approx(100, abs=0.4)


def test_the_samples_of_the_card_are_what_the_model_writes():
    """The shortest of the three samples; the command in the card draws it alone as well."""
    model, tokenizer = Mixtral.from_pretrained(card.TINY, torch.float64), Tokenizer(card.TINY)
    shown = part_of(README, "samples")
    seeds = re.findall(r"^Seed (\d+):$", shown, re.M)
    assert seeds == [str(n) for n in range(card.SHOWN_SAMPLES)]
    prompt, seed = tokenizer.encode(card.PROMPT), 2
    [row] = generate(model, [prompt], card.MAX_NEW_TOKENS, 0.7, 0.9, seed, tokenizer.eos_id)
    assert card.quoted([tokenizer.decode(prompt + row)], seed) == shown[shown.index("Seed 2:"):]
    assert len(row) < card.MAX_NEW_TOKENS


def test_the_study_has_the_other_samples_and_the_pieces_of_every_layer():
    samples = (card.TINY / "study" / "samples.md").read_text(encoding="utf-8")
    assert re.findall(r"^Seed (\d):$", samples, re.M) == list("3456789")
    experts = (card.TINY / "study" / "experts.md").read_text(encoding="utf-8")
    rows = part_of(experts, "all pieces").split("\n")
    assert [row.split("|")[1:3] for row in rows[2:]] == [
        [f" {layer} ", f" {e} "] for layer in range(6) for e in range(8)]
    assert part_of(README, "pieces").split("\n") == rows[:2] + [
        row for row in rows[2:] if row.split("|")[1] in (" 0 ", " 3 ", " 5 ")]


# ---- what card.py measures


def small_model():
    torch.manual_seed(0)
    model = Mixtral(MixtralConfig(
        vocab_size=32, hidden_size=12, intermediate_size=10, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, sliding_window=5))
    return model.double().requires_grad_(False)


def test_the_experts_of_a_text_are_those_that_its_router_chooses():
    model, stories, seen = small_model(), [[1, 5, 7, 9, 11, 3, 8], [1, 30], [2]], []
    found = card.chosen_experts(model, stories)
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.register_forward_hook(
            lambda module, args, logits: seen.append(route(logits, 2)[1].tolist()))
    for story in stories:
        model(torch.tensor([story]))
    assert [layer.tolist() for layer in found] == [
        [row for text in seen[n::2] for row in text] for n in range(2)]


assignments = st.integers(2, 5).flatmap(lambda E: st.integers(1, E).flatmap(lambda A: st.lists(
    st.permutations(range(E)).map(lambda order: order[:A]), min_size=2, max_size=12)))


@given(assignments)
def test_repetitions_are_counted_by_plain_loops(chosen):
    pairs = list(itertools.pairwise(chosen))
    first = sum(a[0] == b[0] for a, b in pairs) / len(pairs)
    either = sum(bool(set(a) & set(b)) for a, b in pairs) / len(pairs)
    assert card.repetitions(torch.tensor(chosen)) == pytest.approx((first, either))


@pytest.mark.parametrize("E, A", [(8, 2), (5, 1), (5, 3), (4, 4)])
def test_the_routing_table_counts_loads_and_knows_what_random_choices_give(E, A):
    sets = list(itertools.combinations(range(E), A))
    either = sum(bool(set(a) & set(b)) for a in sets for b in sets) / len(sets) ** 2
    draw = random.Random(0)
    layers = [[draw.sample(range(E), A) for _ in range(50)] for _ in range(3)]
    head, *lines, last = card.routing_table([torch.tensor(layer) for layer in layers], E)
    numbers = [[float(x) for x in line.replace("%", "").split()[1:]] for line in (*lines, last)]
    for layer, row in zip(layers, numbers, strict=False):
        counts = [sum(e in chosen for chosen in layer) for e in range(E)]
        assert row[:E] == pytest.approx([100 * n / (50 * A) for n in counts], abs=0.051)
    assert numbers[-1] == pytest.approx([100 / E] * (E + 1) + [100 * either], abs=0.051)
    assert len(lines) == 3 and all(len(row) == E + 2 for row in numbers)


def test_the_preferred_pieces_are_those_an_expert_receives_most_often():
    tokens = [3] * 60 + [4] * 50 + [5] * 10
    chosen = torch.tensor([[0, 1]] * 60 + [[1, 0]] * 30 + [[0, 1]] * 20 + [[1, 0]] * 10)
    names = ["", "", "", "three", "four", "rare"]
    rows = card.preferred_pieces(tokens, [chosen, chosen.flip(1)], names, 2)
    assert rows[0] == ["| 0 | 0 | `three` 100, `four` 40 |", "| 0 | 1 | `four` 60, `three` 0 |"]
    assert rows[1] == ["| 1 | 0 | `four` 60, `three` 0 |", "| 1 | 1 | `three` 100, `four` 40 |"]


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=30))
def test_the_longest_shared_run_is_that_of_trying_all(sample, text):
    def occurs(run):
        return any(text[at:at + len(run)] == run for at in range(len(text) + 1))

    runs = (sample[a:b] for a in range(len(sample) + 1) for b in range(a, len(sample) + 1))
    wanted = max(len(run) for run in runs if occurs(run))
    assert card.longest_shared(card.as_string(sample), card.as_string(text)) == wanted


def test_words_are_lower_case_and_keep_their_apostrophe():
    assert card.words("Tim’s dog didn't bark. \"No!\"") == ["tim's", "dog", "didn't", "bark", "no"]


def test_the_report_counts_words_that_are_not_in_the_training_text():
    said = card.word_report([[5, 2], [5, 6]], ["A cat zat.", "A cat"], ["a cat", "dogs"], 2)
    assert said == ("The samples contain 5 words, of which 80.00 % occur in the training text. "
                    "The others are: zat. 1 of 2 samples end within 300 tokens.")


# ---- the documents


def test_a_part_is_put_between_its_marks_and_a_missing_mark_is_refused():
    text = "a\n<!-- x -->\nold\n<!-- -->\nb\n<!-- y -->\nkept\n<!-- -->\n"
    empty = text.replace("old\n", "")
    assert card.fill(text, {"x": r"new \1"}) == text.replace("old", r"new \1")
    assert card.fill(empty, {"x": "old"}) == text
    for wrong, name in ((text, "z"), (text + text, "x")):
        with pytest.raises(ValueError, match=f"<!-- {name} -->"):
            card.fill(wrong, {name: ""})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of tiny/ whose marked parts say "old", with small samples to be measured."""
    (tmp_path / "study").mkdir()
    for name in ("model.safetensors", "tokenizer.model", "config.json", "train.log"):
        (tmp_path / name).symlink_to(card.TINY / name)
    for name in ("README.md", "study/samples.md", "study/experts.md"):
        text = (card.TINY / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(re.sub(r"(?s)(<!-- [\w ]+ -->\n).*?(<!-- -->)", r"\1old\n\2",
                                            text), encoding="utf-8")
    monkeypatch.setattr(card, "TINY", tmp_path)
    for name, value in (("SAMPLES", 4), ("MAX_NEW_TOKENS", 6), ("MIN_OCCURRENCES", 1)):
        monkeypatch.setattr(card, name, value)
    return tmp_path


def test_one_command_fills_in_every_part(folder):
    text = folder / "text"
    text.write_text("\n<|endoftext|>\n".join(
        f"Once upon a time, there was a {animal}." for animal in ("cat", "dog", "cow", "bird")))
    assert card.main(["--train", str(text), "--valid", str(text)]) == 0
    for name in ("README.md", "study/samples.md", "study/experts.md"):
        parts = re.findall(r"(?s)<!-- [\w ]+ -->\n(.*?)<!-- -->",
                           (folder / name).read_text(encoding="utf-8"))
        assert parts and all(part not in ("old\n", "\n", "") for part in parts)
    shown = (folder / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^Seed (\d+):$", shown, re.M) == ["0", "1", "2"]
    others = (folder / "study" / "samples.md").read_text(encoding="utf-8")
    assert re.findall(r"^Seed (\d+):$", others, re.M) == ["3"]
    assert "| 4 samples |" in shown and "| 4 held-out stories, cut" in shown
    assert "0 of 4 samples end within 6 tokens" in shown
    assert (folder / "curve.svg").read_text(encoding="utf-8") == card.curve(*card.read_log(LOG))


def test_bad_input_is_refused_in_one_line(folder, capsys):
    text = folder / "text"
    text.write_text("Once upon a time.")
    with pytest.raises(SystemExit) as exit_:
        card.main(["--train", str(text)])
    assert exit_.value.code == 2 and "--valid" in capsys.readouterr().err
    assert card.main(["--train", str(text), "--valid", str(folder / "none")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("card.py: ") and error.count("\n") == 1 and "none" in error
    assert card.main(["--train", str(text), "--valid", str(text)]) == 1
    assert capsys.readouterr().err.startswith("card.py: --valid")
    text.write_text("Once upon a time.\n<|endoftext|>\nOnce more.")
    (folder / "README.md").write_text("no marks")
    assert card.main(["--train", str(text), "--valid", str(text)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("card.py: ") and error.count("\n") == 1 and "README.md" in error
