"""Claims about tiny/card.py: its measures, and that the card, the curve and the logs agree."""

import re

import card
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st

from generate import generate

README = (card.TINY / "README.md").read_text(encoding="utf-8")
LOG = (card.TINY / "train.log").read_text(encoding="utf-8")


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=30))
def test_the_longest_shared_run_is_that_of_trying_all(sample, text):
    def occurs(run):
        return any(text[at:at + len(run)] == run for at in range(len(text) + 1))

    runs = (sample[a:b] for a in range(len(sample) + 1) for b in range(a, len(sample) + 1))
    wanted = max(len(run) for run in runs if occurs(run))
    assert card.longest_shared(card.as_string(sample), card.as_string(text)) == wanted


def test_words_are_lower_case_and_keep_their_apostrophe():
    assert card.words("Tim’s dog didn't bark. \"No!\"") == ["tim's", "dog", "didn't", "bark", "no"]


def test_an_experts_specialities_are_the_pieces_it_takes_most():
    tokens = [3] * 60 + [4] * 50 + [5] * 10
    chosen = torch.tensor([[0, 1]] * 60 + [[1, 0]] * 30 + [[0, 1]] * 20 + [[1, 0]] * 10)
    names = ["", "", "", "three", "four", "rare"]
    rows = list(card.specialities(tokens, [chosen], names, 2))
    assert rows == ["| 0 | 0 | `three` 100, `four` 40 |", "| 0 | 1 | `four` 60, `three` 0 |"]


def test_a_sample_is_what_its_seed_gives_alone():
    class Tokenizer:
        eos_id = 2

        def encode(self, text):
            return [1, 5, 7]

    model = random_model()
    rows = card.samples(model, Tokenizer(), 4, 12)
    assert rows == [generate(model, [[1, 5, 7]], 12, 0.7, 0.9, seed, 2)[0] for seed in range(4)]
    assert len(set(map(tuple, rows))) > 1


def test_a_part_is_put_between_its_marks_and_a_missing_mark_is_said():
    text = "a\n<!-- x -->\nold\n<!-- -->\nb\n<!-- y -->\nkept\n<!-- -->\n"
    empty = text.replace("old\n", "")
    assert card.fill(text, {"x": r"new \1"}) == text.replace("old", r"new \1")
    assert card.fill(empty, {"x": "old"}) == text
    with pytest.raises(ValueError, match="<!-- z -->"):
        card.fill(text, {"z": ""})


def test_the_readme_is_refreshed_where_output_is_whole_and_kept_where_it_is_cut(tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\necho Once upon a time, $@\n")
    python.chmod(0o755)
    old = ("    Once upon a time, x …\n\n```console\n$ python b\ncut …\n$ python a\nold\n```\n"
           "```python\ncode\n```\n\n```text\nold\n```\n")
    new = card.refreshed(old, tmp_path)
    assert new == old.replace("x …", "generate.py --prompt Once upon a time …").replace(
        "a\nold", "a\nOnce upon a time, a").replace(
        "```text\nold", "```text\nOnce upon a time, block.py")


def test_the_curve_is_drawn_from_the_log():
    assert (card.TINY / "curve.svg").read_text() == card.curve(*card.read_log(LOG))


def test_the_scores_of_the_card_are_those_of_the_log():
    for dtype in ("float32", "bfloat16"):
        [score] = re.findall(rf"bits per byte, torch.{dtype}: (\S+)", LOG)
        assert re.search(rf"\*\*{score}\*\* in {dtype}|{score} in {dtype}", README)


STUDY = re.findall(r"^\| (.*) \| (\d+) \| ([\d.]+) \| ([\d.–]+) \| `(\w+\.log)` \|$", README, re.M)


def study_log(name):
    """A log of the study and the settings that it names."""
    log = (card.TINY / "study" / name).read_text(encoding="utf-8")
    return log, dict(re.findall(r"(\w+)=(\S+)", log))


def test_the_study_names_every_log_that_is_kept():
    kept = [path.name for path in (card.TINY / "study").iterdir()]
    assert sorted(name for *_, name in STUDY) == sorted(kept)


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
