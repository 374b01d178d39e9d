"""Claims about rounding: small, no larger than transformers', and the same each time."""

import drift
import pytest
import torch
from conftest import random_model

from generate import watching


def every(model, tokens):
    with torch.inference_mode(), watching(model, scores=True) as seen:
        model(tokens)
    return {name: x for name, [x] in seen.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits_twice(dtype):
    model, tokens = random_model().to(dtype), torch.randint(0, 37, (2, 30))
    first, second = every(model, tokens), every(model, tokens)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-5)])
def test_one_thread_or_two_differ_by_no_more_than_rounding(dtype, tolerance):
    model, tokens = random_model().to(dtype), torch.arange(30)[None]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = every(model, tokens)
        torch.set_num_threads(2)
        two = every(model, tokens)
    finally:
        torch.set_num_threads(before)
    assert one.keys() == two.keys()
    assert drift.error(one["lm_head"], two["lm_head"].double()) < tolerance


@pytest.mark.parametrize("dtype, bound", [
    (torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
def test_drift_stays_small_and_under_transformers(dtype, bound, tmp_path):
    tokens = drift.random_checkpoint(tmp_path)
    exact = drift.ours(tmp_path, torch.float64, tokens)
    mine = [drift.error(x, y) for x, y in zip(
        drift.ours(tmp_path, dtype, tokens), exact, strict=True)]
    assert max(mine) < bound
    pytest.importorskip("transformers")
    other = [drift.error(x, y) for x, y in zip(
        drift.theirs(tmp_path, dtype, tokens), exact, strict=True)]
    # A tenth more is chance: either sums in an order of its own.
    assert all(a < 1.1 * b for a, b in zip(mine, other, strict=True))
