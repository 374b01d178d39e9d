"""Claims about rounding: its errors are small, no larger than a peer's, and repeatable."""

import trace

import drift
import pytest
import torch
from conftest import random_model


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """The directory of a random model, tokens for it, and its exact states."""
    directory = tmp_path_factory.mktemp("random")
    tokens = drift.random_checkpoint(directory)
    return directory, tokens, drift.hidden_states(directory, torch.float64, tokens)


@pytest.mark.parametrize("dtype, bound", [
    (torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
def test_errors_stay_small_in_every_layer(dtype, bound, random):
    """The bounds are about 16, 4 and 5 times the machine epsilon of the dtype, in 8 layers.

    The errors are not zero either, so the dtype is really used.
    """
    directory, tokens, exact = random
    states = drift.hidden_states(directory, dtype, tokens)
    assert len(states) == 9 and all(x.dtype == dtype for x in states)
    errors = [drift.error(x, y) for x, y in zip(states, exact, strict=True)]
    assert torch.finfo(dtype).eps / 8 < min(errors) and max(errors) < bound


@pytest.mark.parametrize("dtype", drift.DTYPES)
def test_errors_are_at_most_a_tenth_above_those_of_transformers(dtype, random):
    """A tenth is left to chance, because the two add up their sums in different orders."""
    pytest.importorskip("transformers")
    directory, tokens, exact = random
    ours, theirs = ([drift.error(x, y) for x, y in zip(states(directory, dtype, tokens), exact,
                                                       strict=True)]
                    for states in (drift.hidden_states, drift.transformers_states))
    assert all(a < 1.1 * b for a, b in zip(ours, theirs, strict=True))


def test_the_error_is_the_median_of_the_relative_lengths():
    exact = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [6.0, 8.0]]], dtype=torch.float64)
    change = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
    assert drift.error(exact.float() + change, exact) == pytest.approx(0.2)  # 0.2, 0.5 and 0.1


def test_the_table_has_a_row_for_each_layer_and_the_logits(random):
    directory, tokens, _ = random
    table = list(drift.rows(directory, tokens[:4]))
    assert [name for name, _ in table] == [*(f"layer {n}" for n in range(8)), "logits"]
    for _, errors in table:
        float32, _, float16, _, bfloat16, _ = errors
        assert float32 < float16 / 100 and float16 < bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits_twice(dtype):
    model, tokens = random_model().to(dtype), torch.randint(0, 37, (2, 30))
    first, second = (trace.record(model, tokens, scores=True) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-5)])
def test_one_thread_or_two_differ_by_no_more_than_rounding(dtype, tolerance):
    model, tokens = random_model().to(dtype), torch.arange(30)[None]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = trace.record(model, tokens)
        torch.set_num_threads(2)
        two = trace.record(model, tokens)
    finally:
        torch.set_num_threads(before)
    assert one.keys() == two.keys()
    assert drift.error(one["lm_head"], two["lm_head"].double()) < tolerance
