"""Claims about the model card: it agrees with the logs, and tiny/card.py measures correctly."""

import itertools
import re
import shutil

import card
import pytest
import torch

from generate import generate
from mixtral import Mixtral
from tokenizer import Tokenizer

README = (card.TINY / "README.md").read_text(encoding="utf-8")
LOG = (card.TINY / "train.log").read_text(encoding="utf-8")
STUDY = re.findall(r"^\| .* \| (\d+) \| ([\d.]+) \| ([\d.–]+) \| `(\w+\.log)` \|$", README, re.M)


def test_the_scores_and_the_curve_of_the_card_are_those_of_the_log():
    for dtype, score in re.findall(r"bits per byte, torch\.(\w+): (\S+)", LOG):
        assert re.search(rf"{re.escape(score)}\W+in {dtype}", README)
    assert (card.TINY / "curve.svg").read_text() == card.curve(*card.read_log(LOG))
    assert len(STUDY) == len(list((card.TINY / "study").glob("*.log")))


@pytest.mark.parametrize("steps, score, loads, name", STUDY)
def test_a_row_of_the_study_is_what_its_log_says(steps, score, loads, name):
    log = (card.TINY / "study" / name).read_text(encoding="utf-8")
    shares = [float(x) for row in re.findall(r"expert load: (.*)", log) for x in row.split()]
    assert f"bits per byte, torch.float32: {score}\n" in log and f"steps={steps} " in log
    assert loads == f"{min(shares)}–{max(shares)}"


def test_the_shortest_sample_of_the_card_is_what_the_model_writes():
    model, tokenizer = Mixtral.from_pretrained(card.TINY, torch.float64), Tokenizer(card.TINY)
    prompt = tokenizer.encode(card.PROMPT)
    [row] = generate(model, [prompt], card.MAX_NEW_TOKENS, 0.7, 0.9, 2, tokenizer.eos_id)
    assert card.quoted([tokenizer.decode(prompt + row)], 2) in README


def test_the_routing_table_has_the_loads_and_repetitions_of_plain_loops():
    chosen = torch.rand(50, 8).argsort(dim=1)[:, :2].tolist()
    pairs = list(itertools.pairwise(chosen))
    first = sum(a[0] == b[0] for a, b in pairs) / 49
    either = sum(bool(set(a) & set(b)) for a, b in pairs) / 49
    wanted = [sum(e in row for row in chosen) for e in range(8)] + [100 * first, 100 * either]
    _, *lines = card.routing_table([torch.tensor(chosen)], 8)
    found = [[float(x) for x in line.replace("%", "").split()[1:]] for line in lines]
    assert found == [pytest.approx(wanted, abs=0.051), [12.5] * 9 + [46.4]]


def test_one_command_fills_in_every_part_and_bad_input_is_refused(tmp_path, monkeypatch, capsys):
    place, text = shutil.copytree(card.TINY, tmp_path / "tiny"), tmp_path / "text"
    for name, value in (("TINY", place), ("SAMPLES", 4), ("MAX_NEW_TOKENS", 6)):
        monkeypatch.setattr(card, name, value)
    for path in place.rglob("*.md"):
        path.write_text(re.sub(r"(?s)(<!-- \w.*? -->\n).*?(<!-- -->)", r"\1\2", path.read_text()))
    text.write_text("\n<|endoftext|>\n".join(["Once there was a cat.", "One day, it ran."] * 20))
    assert card.main(["--train", str(text), "--valid", str(text)]) == 0
    assert not any(re.search(r"-->\n<!-- -->", path.read_text()) for path in place.rglob("*.md"))
    assert card.main(["--train", str(text), "--valid", str(tmp_path / "none")]) == 1
    assert re.fullmatch(r"card\.py: .*none.*\n", capsys.readouterr().err)
