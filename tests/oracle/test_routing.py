"""Claims about routing.py: the paper's measure, and what chance gives."""

import pytest
import routing
import torch
from conftest import random_model

from generate import watching


def drawn(E, k, N):
    """k distinct experts for each token, at random."""
    return torch.rand(N, E, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :k]


@pytest.mark.parametrize("E, k, wanted", [
    (8, 2, (0.125, 1 - (6 / 8) * (5 / 7))), (8, 1, (0.125, 0.125)), (5, 3, (0.2, 1.0))])
def test_random_routing_repeats_as_the_paper_says(E, k, wanted):
    assert routing.chance(E, k) == pytest.approx(wanted)
    assert routing.repetitions(drawn(E, k, 200_000)) == pytest.approx(wanted, abs=0.005)
    assert routing.loads(drawn(E, k, 200_000), E).tolist() == pytest.approx([1 / E] * E, abs=0.005)


def test_the_baselines_of_table_5_are_these_numbers():
    first, either = routing.chance(8, 2)
    assert (f"{first:.1%}", f"{either:.1%}") == ("12.5%", "46.4%")


def test_repetitions_are_counted_between_neighbours():
    chosen = torch.tensor([[0, 1], [0, 2], [3, 2], [4, 3], [5, 6]])
    first, either = routing.repetitions(chosen)
    assert (first, either) == (1 / 4, 3 / 4)
    assert routing.loads(chosen, 8).tolist() == [0.2, 0.1, 0.2, 0.2, 0.1, 0.1, 0.1, 0.0]


def test_the_choices_of_a_long_text_are_those_of_one_pass():
    model, tokens = random_model(), torch.randint(0, 37, (600,)).tolist()
    with torch.inference_mode(), watching(model) as seen:
        model(torch.tensor([tokens]))
    for n, chosen in enumerate(routing.choices(model, tokens)):
        assert torch.equal(chosen, seen[f"model.layers.{n}.block_sparse_moe.chosen"][0])


def test_the_command_prints_a_row_per_layer(tmp_path, capsys):
    (tmp_path / "text").write_text("Once upon a time, there was a little dog. He was happy.")
    assert routing.main([str(tmp_path / "text")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2", "3", "4", "5", "chance"]
    assert lines[-1].split()[-2:] == ["12.5%", "46.4%"]


@pytest.mark.parametrize("content", [None, ""])
def test_no_text_is_refused_in_one_line(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "text").write_text(content)
    assert routing.main([str(tmp_path / "text")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
