"""Claims about rounding: its errors are small, no larger than a peer's, and repeatable."""

import trace

import drift
import pytest
import torch
from conftest import random_model


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """The directory of a random model, and tokens for it."""
    directory = tmp_path_factory.mktemp("random")
    return directory, drift.random_checkpoint(directory)


@pytest.mark.parametrize("dtype, bound", [
    (torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
def test_errors_stay_small_in_every_layer(dtype, bound, random):
    """The bounds are about 16, 4 and 5 times the machine epsilon of the dtype, in 8 layers.

    The errors are not zero either, so the dtype is really used.
    """
    exact, states = (drift.hidden_states(random[0], t, random[1]) for t in (torch.float64, dtype))
    assert len(states) == 9 and all(x.dtype == dtype for x in states)
    errors = [drift.error(x, y) for x, y in zip(states, exact, strict=True)]
    assert torch.finfo(dtype).eps / 8 < min(errors) and max(errors) < bound


def test_errors_are_at_most_a_tenth_above_those_of_transformers(random):
    """A tenth is left to chance, because the two add up their sums in different orders."""
    pytest.importorskip("transformers")
    for name, errors in drift.rows(*random):
        for ours, theirs in zip(errors[::2], errors[1::2], strict=True):
            assert ours < 1.1 * theirs, name


def test_the_error_is_the_median_of_the_relative_lengths():
    exact = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [6.0, 8.0]]], dtype=torch.float64)
    change = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
    assert drift.error(exact.float() + change, exact) == pytest.approx(0.2)  # 0.2, 0.5 and 0.1


def test_the_table_has_a_row_for_each_layer_and_the_logits(random, monkeypatch):
    monkeypatch.setattr(drift, "transformers_states", lambda *args: None)
    table = dict(drift.rows(random[0], random[1][:4]))
    assert [*table] == [*(f"layer {n}" for n in range(8)), "logits"]
    for float32, float16, bfloat16 in (errors[::2] for errors in table.values()):
        assert float32 < float16 / 100 and float16 < bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits_twice(dtype):
    model, tokens = random_model().to(dtype), torch.randint(0, 37, (2, 30))
    first, second = (trace.record(model, tokens, scores=True) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
