"""Claims about mixtral.py: the main claims come first, error handling last."""

import dataclasses
import doctest
import json
import math
import random
import time
from pathlib import Path

import pytest
import reference
import torch
from conftest import SMALL, random_model, save
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import mixtral
from convert import write_safetensors
from mixtral import (
    Mixtral,
    MixtralConfig,
    RMSNorm,
    SparseMoE,
    at_least_float32,
    attend,
    rotate,
    rotation,
    route,
    unpack,
    visible,
)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_error(a, b):
    """The largest difference, divided by the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


WINDOWS = st.sampled_from([None, 1, 2, 5, 40])
TINY_SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6}


def lengths_of_calls(rows, longest, calls):
    """Strategy: the number of real tokens of each row in each call; all of them may be 0."""
    row = st.lists(st.integers(0, longest), min_size=rows, max_size=rows)
    return st.lists(row, min_size=1, max_size=calls)


def read_ragged(model, calls, cache):
    """Read random tokens call by call; returns the text of each row and the logits after it."""
    generator = torch.Generator().manual_seed(0)
    texts, logits = [[] for _ in calls[0]], [[] for _ in calls[0]]
    for call in calls:
        shape = len(call), max(1, *call)
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
        output = model(tokens, cache, torch.tensor(call))
        for row, length in enumerate(call):
            texts[row] += tokens[row, :length].tolist()
            logits[row] += output[row, :length].unbind(0)
    return texts, logits


# ---------------------------------------------------------------- the whole model


@settings(max_examples=100, deadline=None)
@given(window=WINDOWS, K=st.integers(1, 3), ratio=st.integers(1, 4), E=st.integers(1, 5),
       chunk=st.integers(1, 9), calls=lengths_of_calls(3, 5, 3), data=st.data())
def test_float64_logits_equal_a_second_implementation(window, K, ratio, E, chunk, calls, data):
    """For every window, ratio of heads, number of experts, chunking and ragged batch at once."""
    model = random_model(
        sliding_window=window, num_key_value_heads=K, num_attention_heads=K * ratio,
        num_local_experts=E, num_experts_per_tok=data.draw(st.integers(1, E)), **TINY_SIZES)
    longest = max(1, sum(map(max, calls)))
    texts, logits = read_ragged(model, calls, model.new_cache(3, longest, chunk))
    weights = {name: weight.tolist() for name, weight in model.named_parameters()}
    config, lengths = dataclasses.asdict(model.config), [len(text) for text in texts]
    padded = torch.tensor([text + [7] * (longest - len(text)) for text in texts])
    at_once = model(padded, lengths=torch.tensor(lengths))
    for row, text in enumerate(texts):
        if text:
            slow = torch.tensor(reference.logits(config, weights, text), dtype=torch.float64)
            assert relative_error(torch.stack(logits[row]), slow) < 1e-12
            assert relative_error(at_once[row, :len(text)], slow) < 1e-12


@pytest.mark.parametrize("sizes, total, active, tensors", [
    ({}, 46_702_792_704, 12_879_925_248, 995),
    ({"hidden_size": 6144, "num_hidden_layers": 56, "num_attention_heads": 48,
      "intermediate_size": 16384}, 140_620_634_112, 39_152_031_744, 1739)])
def test_the_released_sizes_have_the_published_parameter_counts(sizes, total, active, tensors):
    with torch.device("meta"):
        weights = dict(Mixtral(MixtralConfig(**sizes)).named_parameters())
    assert sum(w.numel() for w in weights.values()) == total and len(weights) == tensors
    idle = sum(w.numel() for n, w in weights.items() if ".experts." in n) * 6 // 8
    # A token looks up one row of the embedding; the published count includes the whole table.
    assert total - idle == active


@settings(max_examples=40, deadline=None)
@given(window=WINDOWS, chunk=st.integers(1, 30), cuts=st.lists(st.integers(1, 29), max_size=6))
def test_any_chunking_is_one_pass(window, chunk, cuts):
    model, tokens = random_model(sliding_window=window), torch.arange(60).view(2, 30) % 37
    cache = model.new_cache(2, 30, chunk)
    edges = sorted({0, *cuts, 30})
    parts = [model(tokens[:, a:b], cache) for a, b in zip(edges, edges[1:], strict=False)]
    assert relative_error(torch.cat(parts, 1), model(tokens)) < 1e-12


@pytest.mark.parametrize("window, chunk", [(None, 64), (1, 1), (5, 1), (5, 3), (5, 64)])
def test_one_token_at_a_time_is_one_pass_through_many_wraps(window, chunk):
    model, tokens = random_model(sliding_window=window), torch.arange(60)[None] % 37
    cache = model.new_cache(1, 60, chunk)
    steps = torch.cat([model(tokens[:, n:n + 1], cache) for n in range(60)], 1)
    assert relative_error(steps, model(tokens)) < 1e-12


@settings(max_examples=40, deadline=None)
@given(window=WINDOWS, chunk=st.integers(1, 12), calls=lengths_of_calls(3, 9, 4))
def test_a_ragged_row_gives_what_it_gives_alone_call_after_call(window, chunk, calls):
    model = random_model(sliding_window=window)
    cache = model.new_cache(3, max(1, sum(map(max, calls))), chunk)
    texts, logits = read_ragged(model, calls, cache)
    for text, row in zip(texts, logits, strict=True):
        if text:
            assert relative_error(torch.stack(row), model(torch.tensor([text]))[0]) < 1e-12
    assert cache.lengths.tolist() == [len(text) for text in texts]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chunk", [1, 2, 64])
@pytest.mark.parametrize("filler", [9, 36])
def test_padding_leaves_no_trace_even_if_it_is_nan(window, chunk, filler):
    """Token 36 makes NaN of everything that it reaches. The first row stays empty in two calls."""
    model = random_model(sliding_window=window)
    model.model.embed_tokens.weight[36] = math.nan
    text, cache = torch.arange(1, 13), model.new_cache(2, 40, chunk)
    for length in (3, 1):
        tokens = torch.full((2, 8), filler)
        tokens[1, :length] = 4
        model(tokens, cache, torch.tensor([0, length]))
    got = model(torch.stack((text, text)), cache)
    wanted = [model(torch.tensor([before + text.tolist()]))[0, -12:] for before in ([], [4] * 4)]
    assert relative_error(got, torch.stack(wanted)) < 1e-12


def test_the_future_never_changes_the_past():
    model, tokens = random_model(sliding_window=None), torch.arange(20)[None]
    changed = tokens.clone()
    changed[0, 12:] = 3
    assert relative_error(model(tokens)[:, :12], model(changed)[:, :12]) < 1e-14
    assert relative_error(model(tokens)[:, 12:], model(changed)[:, 12:]) > 0.01


def test_last_only_gives_the_logits_after_the_last_real_token_and_computes_no_others():
    model, tokens, widths = random_model(), torch.arange(20).view(2, 10), []
    full = model(tokens)
    model.lm_head.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    for cache in (None, model.new_cache(2, 10, chunk=3)):
        last = model(tokens, cache, torch.tensor([10, 4]), last_only=True)
        assert last.shape == (2, 1, 37)
        assert relative_error(last[:, 0], torch.stack((full[0, 9], full[1, 3]))) < 1e-12
    assert widths == [1, 1]


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(mixtral)
    assert result.attempted >= 4 and result.failed == 0


# ---------------------------------------------------------------- routing


def test_routing_by_hand():
    logits = torch.tensor([[0.0, math.log(3), -1.0, 0.0], [5.0, 0.0, 0.0, 5.0]]).double()
    weights, experts = route(logits, 2)
    assert experts.tolist() == [[1, 0], [0, 3]]
    assert torch.allclose(weights, torch.tensor([[0.75, 0.25], [0.5, 0.5]]).double(), rtol=1e-15)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), E=st.integers(1, 9), data=st.data())
def test_softmax_of_the_chosen_is_the_full_softmax_renormalised(seed, E, data):
    A = data.draw(st.integers(1, E))
    logits = 5 * randn(6, E, seed=seed)
    weights, experts = route(logits, A)
    full = logits.softmax(-1).topk(A)
    assert torch.equal(experts, full.indices)
    assert relative_error(weights, full.values / full.values.sum(-1, keepdim=True)) < 1e-13
    assert relative_error(weights.sum(-1), torch.ones(6).double()) < 1e-14


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=8), min_size=1, max_size=40))
def test_of_equal_logits_the_lowest_expert_is_chosen_first(rows):
    _, experts = route(torch.tensor(rows).bfloat16(), 3)
    assert experts.tolist() == [sorted(range(8), key=lambda e: (-row[e], e))[:3] for row in rows]


def mixture(E=8, A=2, dtype=torch.float64):
    model = random_model(num_local_experts=E, num_experts_per_tok=A, dtype=dtype)
    return model.model.layers[0].block_sparse_moe


@pytest.mark.parametrize("E, A", [(8, 2), (4, 1), (4, 3), (4, 4), (1, 1)])
def test_the_mixture_is_a_loop_over_tokens_and_a_masked_dense_sum(E, A):
    moe, x = mixture(E, A), randn(2, 9, 24)
    tokens = x.flatten(0, 1)
    weights, experts = route(moe.gate(tokens), A)
    loop = torch.stack([sum(w * moe.experts[e](token) for w, e in zip(ws, es, strict=True))
                        for token, ws, es in zip(tokens, weights, experts, strict=True)])
    dense = sum(torch.where(experts == e, weights, 0).sum(-1)[:, None] * moe.experts[e](tokens)
                for e in range(E))
    assert relative_error(moe(x).flatten(0, 1), loop) < 1e-14
    assert relative_error(dense, loop) < 1e-14


def test_with_all_experts_chosen_the_mixture_is_the_dense_sum():
    moe, x = mixture(4, 4), randn(1, 5, 24)
    shares = moe.gate(x).softmax(-1)
    dense = sum(shares[..., e:e + 1] * moe.experts[e](x) for e in range(4))
    assert relative_error(moe(x), dense) < 1e-14


def test_an_expert_is_swiglu_with_w1_as_the_gate():
    expert, x = mixture().experts[0], randn(3, 24)
    gate, up = x @ expert.w1.weight.T, x @ expert.w3.weight.T
    wanted = (gate / (1 + (-gate).exp()) * up) @ expert.w2.weight.T
    assert relative_error(expert(x), wanted) < 1e-14


def test_relabelling_experts_changes_nothing():
    moe, x, order = mixture(), randn(2, 9, 24), [3, 1, 7, 0, 6, 2, 5, 4]
    relabelled = SparseMoE(MixtralConfig(**SMALL)).double()
    relabelled.experts = torch.nn.ModuleList(moe.experts[e] for e in order)
    relabelled.gate.weight.data = moe.gate.weight[order]
    assert relative_error(relabelled(x), moe(x)) < 1e-14


def record_calls(moe):
    """The expert and the tokens of every call of an expert, as they happen."""
    calls = []
    for e, expert in enumerate(moe.experts):
        expert.register_forward_pre_hook(lambda module, args, e=e: calls.append((e, args[0])))
    return calls


def test_no_token_is_dropped_and_no_idle_expert_runs():
    moe, x = mixture(), randn(1, 50, 24)
    moe.gate.weight.data = torch.zeros(8, 24).double()
    calls = record_calls(moe)
    y = moe(x)
    assert [(e, len(tokens)) for e, tokens in calls] == [(0, 50), (1, 50)]
    assert relative_error(y, (moe.experts[0](x) + moe.experts[1](x)) / 2) < 1e-14


def test_the_example_of_the_mixture_gives_the_calls_in_its_docstring():
    moe, x = mixture(4, 2), torch.zeros(1, 3, 24).double()
    x[0, range(3), range(3)] = 1  # so token n reads column n of the gate
    moe.gate.weight.zero_()
    for token, choice in enumerate([[1, 3], [0, 1], [3, 2]]):
        moe.gate.weight[choice, token] = torch.tensor([2.0, 1.0]).double()
    assert route(moe.gate(x[0]), 2)[1].tolist() == [[1, 3], [0, 1], [3, 2]]
    calls = record_calls(moe)
    moe(x)
    ran = [(e, tokens.argmax(-1).tolist()) for e, tokens in calls]
    assert ran == [(0, [1]), (1, [0, 1]), (2, [2]), (3, [0, 2])]


# ---------------------------------------------------------------- norm, rotation and attention


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.5).double()
    norm.weight = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)  # mean of squares 12.5, with ε 13
    wanted = torch.tensor([[6.0, -4.0]], dtype=torch.float64) / 13**0.5
    assert torch.allclose(norm(x), wanted, rtol=1e-15)


def test_rotation_turns_pairs_from_the_two_halves_by_hand():
    cos, sin = rotation(torch.tensor([[3]]), 4, 100.0)
    angles = torch.tensor([3.0, 3.0 / 10], dtype=torch.float64)  # 100^(-2/4) = 1/10
    x = torch.tensor([1.0, 2.0, 5.0, 7.0], dtype=torch.float64).view(1, 1, 1, 4)
    c, s = angles.cos(), angles.sin()
    wanted = torch.stack((1 * c[0] - 5 * s[0], 2 * c[1] - 7 * s[1],
                          5 * c[0] + 1 * s[0], 7 * c[1] + 2 * s[1]))
    assert torch.allclose(rotate(x, cos, sin).flatten(), wanted, rtol=1e-15)


@settings(max_examples=50, deadline=None)
@given(m=st.integers(0, 5000), n=st.integers(0, 5000), shift=st.integers(0, 5000))
def test_scores_depend_on_distance_only_and_norms_are_kept(m, n, shift):
    q, k = randn(1, 1, 1, 8, seed=1), randn(1, 1, 1, 8, seed=2)

    def turned(x, position):
        return rotate(x, *rotation(torch.tensor([[position]]), 8, 1e4))

    near, moved = ((turned(q, m + s) * turned(k, n + s)).sum() for s in (0, shift))
    assert math.isclose(near, moved, rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(turned(q, m).norm(), q.norm(), rel_tol=1e-12)


@settings(max_examples=50, deadline=None)
@given(window=st.none() | st.integers(1, 9), start=st.integers(0, 20))
def test_a_query_sees_w_keys_including_its_own(window, start):
    queries, keys = torch.arange(start, start + 5)[None], torch.arange(-2, start + 9)[None]
    mask = visible(queries, keys, window)
    for i in range(start, start + 5):
        seen = [j for j, lit in zip(keys[0].tolist(), mask[0, i - start], strict=True) if lit]
        assert seen == list(range(max(0, i + 1 - (window or i + 1)), i + 1))


def added(seen, ratio, dtype):
    """The mask of `attend` for what queries see (B, S, T), spelled out: (B, 1, S·H/K, T)."""
    rows = [[0.0 if lit else -math.inf for lit in row] for row in seen.flatten(0, 1).tolist()
            for _ in range(ratio)]
    return torch.tensor(rows, dtype=dtype).view(len(seen), 1, -1, seen.shape[2])


def explicit(q, k, v, seen):
    """softmax(q·kᵀ/√d)·v over the keys that are seen, in float64, head by head: (B, S, H·d)."""
    heads, ratio = [], q.shape[2] // k.shape[2]
    for h in range(q.shape[2]):
        scores = q[:, :, h].double() @ k[:, :, h // ratio].double().mT / math.sqrt(q.shape[-1])
        mass = scores.masked_fill(~seen, -math.inf).softmax(-1)
        heads.append(mass @ v[:, :, h // ratio].double())
    return torch.cat(heads, dim=-1)


@pytest.mark.parametrize("H, K", [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6), (4, 2)])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_is_the_explicit_formula_for_every_head(H, K, window):
    S, T = torch.arange(4, 9).expand(2, 5), torch.arange(9).expand(2, 9)
    q, k, v = randn(2, 5, H, 4, seed=1), *randn(2, 2, 9, K, 4, seed=2)
    seen = visible(S, T, window)
    got = attend(q, k, v, added(seen, H // K, q.dtype))
    assert relative_error(got, explicit(q, k, v, seen)) < 1e-14


def test_query_head_13_of_32_uses_key_value_head_3_of_8():
    """Only key/value head 3 has values that are not zero; query heads 12 to 15 notice."""
    q, k, v = randn(1, 5, 32, 2), randn(1, 7, 8, 2), torch.zeros(1, 7, 8, 2).double()
    v[:, :, 3] = 1
    mixed = attend(q, k, v, torch.zeros(1, 1, 5 * 4, 7).double()).view(1, 5, 32, 2)
    assert mixed.abs().amax(dim=(0, 1, 3)).nonzero()[:, 0].tolist() == [12, 13, 14, 15]


# ---------------------------------------------------------------- cache


def tiny_cache(W, rows, max_length, chunk):
    return random_model(sliding_window=W, **TINY_SIZES).new_cache(rows, max_length, chunk)


@settings(max_examples=60, deadline=None)
@given(W=st.integers(1, 5), chunk=st.integers(1, 4), data=st.data())
def test_slot_s_holds_the_latest_position_that_is_s_mod_c(W, chunk, data):
    """And the keys and values in the slot belong to that position."""
    cache, C = tiny_cache(W, 2, 40, chunk), W + chunk - 1
    slots, lengths = [[-1] * C for _ in range(2)], [0, 0]
    for call in data.draw(lengths_of_calls(2, chunk, 10)):
        S = max(1, *call)
        positions = torch.arange(S) + torch.tensor(lengths)[:, None]
        _, remember = cache.extend(positions, torch.tensor(call))
        k = positions[:, :, None, None].expand(2, S, 2, 4).double()
        remember(1, k, -k)
        for row, length in enumerate(call):
            for position in range(lengths[row], lengths[row] + length):
                slots[row][position % C] = position
            lengths[row] += length
    stored = torch.tensor(slots)
    assert torch.equal(cache.positions, stored) and cache.lengths.tolist() == lengths
    keys, values = cache.keys_and_values[1]
    assert torch.equal(keys, stored.clamp(0)[:, :, None, None].expand(2, C, 2, 4))
    assert torch.equal(values, -keys) and not cache.keys_and_values[0].any()


def test_slot_3_of_128_holds_position_259_after_300_single_tokens():
    cache, held = tiny_cache(128, 1, 300, chunk=1), []
    assert cache.positions.shape == (1, 128)
    for n in range(300):
        cache.extend(torch.tensor([[n]]), torch.tensor([1]))
        held.append(cache.positions[0, 3].item())
    assert sorted(set(held)) == [-1, 3, 131, 259] and held[-1] == 259


@settings(max_examples=60, deadline=None)
@given(W=st.none() | st.integers(1, 6), chunk=st.integers(1, 5),
       calls=st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_a_call_never_overwrites_a_key_that_its_queries_need(W, chunk, calls):
    cache, length = tiny_cache(W, 1, 40, chunk), 0
    for S in calls:
        positions = torch.arange(length, length + min(S, chunk))[None]
        length += positions.shape[1]
        keys, _ = cache.extend(positions, torch.tensor([positions.shape[1]]))
        for i, row in zip(positions[0].tolist(), visible(positions, keys, W)[0], strict=True):
            assert sorted(keys[0, row].tolist()) == list(range(max(0, i + 1 - (W or i + 1)), i + 1))


def test_only_the_slots_in_use_are_read():
    cache = tiny_cache(None, 2, 600, chunk=100)
    for lengths, wanted in (([0, 0], 1), ([60, 20], 60), ([1, 1], 61)):
        S = max(1, *lengths)
        positions = torch.arange(S) + cache.lengths[:, None]
        keys, remember = cache.extend(positions, torch.tensor(lengths))
        assert keys.shape == (2, wanted)
        assert remember(0, *torch.zeros(2, 2, S, 2, 4).double())[1].shape == (2, wanted, 2, 4)


def test_the_cache_stops_growing_at_the_window():
    model = random_model(sliding_window=128)
    small, large = (model.new_cache(1, length) for length in (500, 2000))
    assert small.keys_and_values.shape == (2, 2, 1, 128 + 256 - 1, 2, 4)
    assert large.keys_and_values.shape == small.keys_and_values.shape
    assert model.new_cache(1, 9).keys_and_values.shape[3] == 9
    model = random_model(sliding_window=None)
    assert model.new_cache(1, 700).keys_and_values.shape[3] == 700


# ---------------------------------------------------------------- precision


class RecordDtypes(TorchDispatchMode):
    """Records the floating-point dtypes of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        self.seen |= {x.dtype for x in (output if isinstance(output, tuple | list) else [output])
                      if isinstance(x, torch.Tensor) and x.is_floating_point()}
        return output


def test_in_a_float64_model_every_number_is_float64():
    model, tokens = random_model(), torch.arange(12).view(2, 6)
    with RecordDtypes() as dtypes:
        model(tokens)
        cache = model.new_cache(2, 6, chunk=4)
        model(tokens, cache, lengths=torch.tensor([6, 3]), last_only=True)
    assert dtypes.seen == {torch.float64}


def test_only_16_bit_floats_are_widened():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert at_least_float32(torch.ones(1, dtype=dtype)).dtype == torch.float32
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def is_rounded_once(got, exact, slack):
    """Half a unit in the last place, and `slack` for what float32 loses before the rounding."""
    half_unit = torch.finfo(got.dtype).eps / 4 * 2.0 ** torch.frexp(exact).exponent
    return ((got.double() - exact).abs() <= half_unit + slack).all()


NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


class Scale(torch.nn.Module):
    """In place of an expert: one product per number, so no sum is rounded inside."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@NARROW
def test_the_weighted_sum_of_the_experts_is_rounded_once(dtype):
    """Fails if the router weights, a product or a partial sum is rounded to the narrow dtype."""
    moe, x = mixture(5, 3, dtype), randn(2, 50, 24).to(dtype)
    moe.experts = torch.nn.ModuleList(Scale(factor) for factor in (0.3, -0.7, 1.1, 0.9, -1.3))
    tokens = x.flatten(0, 1)
    best = moe.gate(tokens).double().sort(dim=-1, descending=True, stable=True)
    weights = best.values[:, :3].softmax(dim=-1)
    terms = torch.stack([
        torch.stack([w * moe.experts[e](token).double() for w, e in zip(ws, es, strict=True)])
        for token, ws, es in zip(tokens, weights, best.indices[:, :3].tolist(), strict=True)])
    y = moe(x)
    assert y.dtype == dtype
    assert is_rounded_once(y.flatten(0, 1), terms.sum(1), 1e-6 * terms.abs().sum(1))


@NARROW
def test_router_weights_are_computed_in_float32(dtype):
    logits = randn(200, 8).to(dtype)
    weights, experts = route(logits, 3)
    exact = logits.double().gather(1, experts).softmax(dim=-1)
    assert weights.dtype == torch.float32 and relative_error(weights, exact) < 3e-7


@NARROW
def test_the_norm_is_computed_in_float32_and_rounded_before_and_after_its_weight(dtype):
    norm, x = RMSNorm(24, 1e-5).to(dtype), randn(200, 24).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    quotient = norm(x)
    assert quotient.dtype == dtype and is_rounded_once(quotient, exact, 1e-6)
    norm.weight.copy_(torch.rand(24) + 0.5)
    assert torch.equal(norm(x), (norm.weight.double() * quotient.double()).to(dtype))


@NARROW
@pytest.mark.parametrize("start", [0, 30_000])
def test_rotation_is_computed_in_float32_and_rounded_once(dtype, start):
    """With the cosines and sines that the model gives to its layers, also far into a text."""
    model, seen = random_model(dtype=dtype, rope_theta=1e6, num_hidden_layers=1), []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.extend(args[1:3]))
    cache = model.new_cache(1, 40_000)
    cache.positions[0, 0] = start - 1  # as if the tokens before had been read
    model(torch.arange(30)[None], cache)
    cos, sin = seen
    angles = torch.tensor([[m * 1e6 ** (-2 * i / 4) for i in range(2)]
                           for m in range(start, start + 30)], dtype=torch.float64)
    assert cos.dtype == sin.dtype == torch.float32
    c, s = angles.cos()[None, :, None], angles.sin()[None, :, None]
    assert (cos - c).abs().max() < 1e-7 and (sin - s).abs().max() < 1e-7
    x = randn(1, 30, 6, 4).to(dtype)
    a, b = x.double().chunk(2, dim=-1)
    exact = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    assert rotate(x, cos, sin).dtype == dtype
    assert is_rounded_once(rotate(x, cos, sin), exact, 2e-6)


def test_a_float32_angle_near_position_30000_is_wrong_by_up_to_2e_3_radians():
    positions, i = torch.arange(30_000, 32_768), torch.arange(0, 128, 2)
    exact = positions[:, None] * 1e6 ** (-i.double() / 128)
    narrow = positions[:, None].float() * 1e6 ** (-i.float() / 128)
    assert 1.5e-3 < (narrow.double() - exact).abs().max() < 2e-3
    for ours, wanted in zip(rotation(positions[None], 128, 1e6), (exact.cos(), exact.sin()),
                            strict=True):
        assert relative_error(ours[0, :, 0], wanted) < 1e-11


@NARROW
def test_attention_rounds_only_probabilities_and_its_result(dtype):
    q, k, v = (randn(2, 40, heads, 4, seed=heads + n, dtype=dtype) for n, heads in
               enumerate((6, 2, 2)))
    seen = visible(*2 * [torch.arange(40).expand(2, 40)], 30)
    got = attend(q, k, v, added(seen, 3, dtype))
    exact, mass = explicit(q, k, v, seen), explicit(q, k, v.abs(), seen)
    assert got.dtype == dtype
    assert is_rounded_once(got, exact, (torch.finfo(dtype).eps / 2 + 2e-6) * mass)


@NARROW
def test_logits_are_the_narrow_product_widened(dtype):
    model, hidden = random_model(dtype=dtype), []
    model.lm_head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    logits = model(torch.arange(9)[None])
    assert logits.dtype == torch.float32 and hidden[0].dtype == dtype
    assert torch.equal(logits, torch.nn.functional.linear(hidden[0], model.lm_head.weight).float())
    assert model.new_cache(1, 5).keys_and_values.dtype == dtype


# ---------------------------------------------------------------- 4-bit weights


def pack(q):
    """Integers in −8 … 7 as 32-bit words, one bit pattern after the other: (M, D) to (M, D/8)."""
    words = [[sum(row[8 * j + i] + 8 << 4 * i for i in range(8)) for j in range(len(row) // 8)]
             for row in q]
    signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int32)


SCHEME = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
    "group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}}}}


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(st.integers(-8, 7), min_size=16, max_size=16), min_size=1,
                     max_size=4), G=st.sampled_from([8, 16]))
def test_unpacked_weights_are_the_integers_times_their_scales(rows, G):
    for dtype in (torch.float64, torch.bfloat16):
        scale = (randn(len(rows), 16 // G) + 3).to(dtype)
        exact = torch.tensor(rows) * scale.repeat_interleave(G, dim=1).double()
        got = unpack(pack(rows), scale)
        assert got.dtype == dtype and torch.equal(got, exact.to(dtype))


def save_int4(directory, G=8):
    """A checkpoint whose experts have 4 bits, and the model with the weights they stand for."""
    model = random_model(intermediate_size=16)
    tensors, generator = model.state_dict(), torch.Generator().manual_seed(1)
    for name in [name for name in tensors if ".experts." in name]:
        M, D = tensors.pop(name).shape
        q = torch.randint(-8, 8, (M, D), generator=generator)
        scale = torch.rand(M, D // G, generator=generator).double() / 8
        model.get_parameter(name).copy_(q * scale.repeat_interleave(G, dim=1))
        tensors |= {f"{name}_packed": pack(q.tolist()), f"{name}_scale": scale,
                    f"{name}_shape": torch.tensor([M, D])}
    save(model, directory, quantization_config=SCHEME)
    write_safetensors(directory / "model.safetensors", tensors)
    return model, tensors


def test_a_4_bit_checkpoint_gives_the_logits_of_the_weights_it_stands_for(tmp_path):
    model, _ = save_int4(tmp_path)
    loaded, tokens = Mixtral.from_pretrained(tmp_path), torch.arange(30).view(2, 15)
    assert not any(".experts." in name for name, _ in loaded.named_parameters())
    assert relative_error(loaded(tokens), model(tokens)) < 1e-13
    narrow = Mixtral.from_pretrained(tmp_path, torch.bfloat16)
    scale = narrow.model.layers[0].block_sparse_moe.experts[0].w1.weight_scale
    assert scale.dtype == torch.bfloat16 and narrow(tokens).isfinite().all()


@pytest.mark.parametrize("path, value, message", [
    ("quant_method", "gptq", "quant_method must be 'compressed-tensors', got 'gptq'"),
    ("format", "int-quantized", "format must be 'pack-quantized', got 'int-quantized'"),
    ("config_groups", {}, "quantised"), ("config_groups.group_0", None, "quantised"),
    ("config_groups.group_1", SCHEME["config_groups"]["group_0"], "config_groups must be 1, got 2"),
    ("config_groups.group_0.weights.num_bits", 8, "num_bits must be 4, got 8"),
    ("config_groups.group_0.weights.symmetric", False, "symmetric must be True, got False"),
    ("config_groups.group_0.weights.strategy", "channel", "strategy must be 'group'"),
    ("config_groups.group_0.weights.actorder", "group", "actorder must be None"),
    ("config_groups.group_0.weights.group_size", 12, "group_size must be a multiple of 8, got 12"),
    ("config_groups.group_0.weights.group_size", None, "group_size must be a multiple of 8"),
    ("config_groups.group_0.input_activations", {"num_bits": 8}, "activations must be None"),
    ("config_groups.group_0.output_activations", {"num_bits": 8}, "activations must be None"),
    ("transform_config", {"R1": {}}, "transform_config must be None"),
    ("config_groups.group_0.weights.group_size", 64, "weight_shape must be .* group size 64")])
def test_other_quantised_formats_are_refused_by_name(tmp_path, path, value, message):
    save_int4(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    *parents, last = path.split(".")
    place = raw["quantization_config"]
    for parent in parents:
        place = place[parent]
    place[last] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        Mixtral.from_pretrained(tmp_path)


@pytest.mark.parametrize("ending, tensor, message", [
    ("_packed", torch.zeros(16, 2, dtype=torch.int32), "size mismatch for .*weight_packed"),
    ("_packed", torch.zeros(16, 3, dtype=torch.int64), "weight_packed must be .*int32"),
    ("_packed", torch.zeros(16, 3, dtype=torch.float64), "weight_packed must be .*int32"),
    ("_shape", torch.tensor([24, 16]), r"weight_shape must be \[16, 24\]"),
    ("_shape", None, r"weight_shape must be \[16, 24\]"),
    ("_scale", None, "Missing .*weight_scale"),
    ("_scale", torch.ones(16, 3, dtype=torch.int32), "weight_scale must be floating-point")])
def test_4_bit_tensors_that_do_not_fit_are_refused(tmp_path, ending, tensor, message):
    _, tensors = save_int4(tmp_path)
    name = f"model.layers.1.block_sparse_moe.experts.7.w1.weight{ending}"
    tensors[name] = tensor
    write_safetensors(tmp_path / "model.safetensors",
                      {name: x for name, x in tensors.items() if x is not None})
    with pytest.raises(ValueError, match=message):
        Mixtral.from_pretrained(tmp_path)


# ---------------------------------------------------------------- configuration and loading


def test_config_files_of_transformers_4_and_5_mean_the_same():
    old = MixtralConfig.from_dict({"rope_theta": 5e5, "head_dim": None, "sliding_window": None})
    new = MixtralConfig.from_dict(
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "unknown": 1})
    assert old == new and old.rope_theta == 5e5 and old.head_dim == 128
    assert MixtralConfig.from_dict({}) == MixtralConfig()
    assert MixtralConfig.from_dict({}).rope_theta == 1e6
    assert MixtralConfig.from_dict({"sliding_window": 4096}).sliding_window == 4096


def test_a_config_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MixtralConfig().hidden_size = 1


TOKENS = torch.tensor([[1, 2, 3]])


def test_a_loaded_model_is_the_saved_one(checkpoint):
    model, saved = Mixtral.from_pretrained(checkpoint), random_model()
    assert relative_error(model(TOKENS), saved(TOKENS)) < 1e-14
    for name, weight in saved.named_parameters():
        assert torch.equal(model.get_parameter(name), weight)
    assert not any(weight.is_meta or weight.requires_grad for weight in model.parameters())
    narrow = Mixtral.from_pretrained(str(checkpoint), torch.bfloat16)
    assert {weight.dtype for weight in narrow.parameters()} == {torch.bfloat16}


def test_a_checkpoint_in_several_files_loads_as_one(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    for n in range(3):
        write_safetensors(checkpoint / f"model-0000{n + 1}-of-00003.safetensors",
                          dict(list(tensors.items())[n::3]))
    write_safetensors(checkpoint / "consolidated.safetensors", tensors)  # not read
    model = Mixtral.from_pretrained(checkpoint)
    assert relative_error(model(TOKENS), random_model()(TOKENS)) < 1e-14


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_weights_of_a_kept_dtype_stay_mapped_from_disk(tmp_path):
    """Anonymous memory grows by less than a fifth of the checkpoint."""
    def anonymous():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "head_dim": 32}
    model = random_model(dtype=torch.float32, **sizes)
    size = sum(weight.nbytes for weight in model.parameters())
    save(model, tmp_path / "model")
    del model
    before = anonymous()
    loaded = Mixtral.from_pretrained(tmp_path / "model")
    assert anonymous() - before < size / 5 and size > 70e6
    assert loaded.lm_head.weight.dtype == torch.float32


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("raw, message", [
    ({"num_key_value_heads": 5}, "num_key_value_heads must be a divisor.* 32, got 5"),
    ({"head_dim": 7}, "head_dim must be even, got 7"),
    ({"num_attention_heads": 24}, "hidden_size must be an even multiple of num_attention_heads 24"),
    ({"num_attention_heads": 4096, "num_key_value_heads": 8}, "hidden_size must be an even"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok must be <= num_local_experts 8, got 9"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok must be an integer in 1 … 1048576, got 0"),
    ({"num_local_experts": 2**70}, f"num_local_experts must be an integer in .*, got {2**70}"),
    ({"num_local_experts": 600}, "num_local_experts must be <= 16384 / num_hidden_layers"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer in 1 … 1048576, got 1000"),
    ({"hidden_size": 10**400}, "hidden_size must be an integer in 1 … 1048576, got 1000"),
    ({"sliding_window": 0}, "sliding_window must be an integer in 1 … 1048576 or null, got 0"),
    ({"sliding_window": "4096"}, "sliding_window must be an integer .*, got '4096'"),
    ({"hidden_size": 4096.0}, "hidden_size must be an integer"),
    ({"vocab_size": True}, "vocab_size must be an integer"),
    ({"vocab_size": None}, "vocab_size must be an integer"),
    ({"eos_token_id": -1}, "eos_token_id must be an integer in 0 … 1048576 or null, got -1"),
    ({"bos_token_id": [1]}, "bos_token_id must be an integer"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    ({"rope_theta": -1.0}, "rope_theta must be a number > 0 and < 2..63, got -1.0"),
    ({"rope_theta": math.inf}, "rope_theta must be a number > 0 and < 2..63, got inf"),
    ({"rope_theta": 10**400}, "rope_theta must be a number > 0 and < 2..63, got 1000"),
    ({"rope_theta": True}, "rope_theta must be a number > 0 and < 2..63, got True"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a number > 0 and < 2..63, got nan"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings must be false, got True"),
    ({"model_type": "llama"}, "model_type must be 'mixtral', got 'llama'"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_type must be 'default', got 'yarn'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_type must be 'default', got 'linear'"),
    ({"rope_parameters": 3}, "rope_parameters must be an object or null, got 3"),
    ({"rope_scaling": [1]}, r"rope_scaling must be an object or null, got \[1\]")])
def test_an_impossible_config_is_refused_by_name_in_a_short_line(raw, message):
    with pytest.raises(ValueError, match=message) as error:
        MixtralConfig.from_dict(raw)
    assert len(str(error.value)) < 250 and str(error.value).isprintable()


@pytest.mark.parametrize("tokens, message", [
    (torch.tensor([[37]]), "0 … 36, got 37"), (torch.tensor([[-1]]), "0 … 36, got -1"),
    (torch.tensor([[1.0]]), "int64"), (torch.tensor([1, 2]), "shape"),
    (torch.zeros(1, 0, dtype=torch.int64), "at least one")])
def test_tokens_outside_the_vocabulary_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        random_model()(tokens)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("lengths", [[3], [1, 4], [-1, 2], [1.0, 2.0], [True, True], [[1, 2]]])
def test_lengths_that_do_not_fit_are_refused_and_leave_the_cache_as_it_was(lengths, cached):
    model = random_model()
    cache = model.new_cache(2, 9) if cached else None
    with pytest.raises(ValueError, match="lengths must be 2 int64 numbers in 0 … 3"):
        model(torch.zeros(2, 3, dtype=torch.int64), cache, torch.tensor(lengths))
    assert not cached or cache.lengths.tolist() == [0, 0]


def test_a_cache_refuses_more_than_it_was_made_for_and_stays_as_it_was():
    model = random_model()
    cache = model.new_cache(2, 4, chunk=2)
    model(torch.zeros(2, 3, dtype=torch.int64), cache, torch.tensor([3, 1]))
    state = cache.positions.clone()
    with pytest.raises(ValueError, match="room for 4 tokens per row, got 5; .* max_length"):
        model(torch.zeros(2, 2, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="it has 2 rows, got 1 rows of tokens"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache)
    assert torch.equal(cache.positions, state)
    model(torch.zeros(2, 3, dtype=torch.int64), cache, torch.tensor([1, 3]))
    assert cache.lengths.tolist() == [4, 4]


@pytest.mark.parametrize("sizes", [(0, 4), (1, 0), (1, 4, 0), (1, 2.0), (True, 4), ("1", 4)])
def test_a_cache_of_impossible_size_is_refused(sizes):
    with pytest.raises(ValueError, match="must be integers >= 1"):
        random_model().new_cache(*sizes)


def test_missing_unexpected_and_misshaped_tensors_are_all_named(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    missing = "model.layers.1.block_sparse_moe.experts.6.w2.weight"
    del tensors["model.norm.weight"], tensors[missing]
    tensors |= {"model.extra": torch.zeros(1), "lm_head.weight": torch.zeros(3, 2).double()}
    write_safetensors(checkpoint / "model.safetensors", tensors)
    with pytest.raises(ValueError) as error:
        Mixtral.from_pretrained(checkpoint)
    message = str(error.value)
    for name in ("model.norm.weight", missing, "model.extra", "lm_head.weight", "[3, 2]",
                 "[37, 24]"):
        assert name in message
    assert message.isprintable() and "o_proj" not in message


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 16384, "num_local_experts": 1, "num_experts_per_tok": 1},
    {"num_local_experts": 8192}, {"num_local_experts": 9}, {"num_hidden_layers": 3}])
def test_a_config_with_more_layers_or_experts_is_refused_before_a_model_is_built(
        checkpoint, changes, monkeypatch):
    save(random_model(), checkpoint, **changes)
    monkeypatch.delattr(mixtral, "Mixtral")  # building one raises NameError
    with pytest.raises(ValueError, match="do not fit config.json: .* is missing"):
        Mixtral.from_pretrained(checkpoint)


def test_a_tensor_in_two_files_is_refused(checkpoint):
    write_safetensors(checkpoint / "model-2.safetensors", {"lm_head.weight": torch.zeros(37, 24)})
    with pytest.raises(ValueError, match="lm_head.weight is in an earlier file too"):
        Mixtral.from_pretrained(checkpoint)


@pytest.mark.parametrize("stored, dtype, message", [
    (torch.float32, None, "one floating-point dtype, got torch.float32, torch.float64"),
    (torch.int64, None, "model.norm.weight must be floating-point, got torch.int64"),
    (torch.int64, torch.float32, "model.norm.weight must be floating-point, got torch.int64")])
def test_mixed_or_integer_weights_are_refused(checkpoint, stored, dtype, message):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(stored)
    write_safetensors(checkpoint / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        Mixtral.from_pretrained(checkpoint, dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_weights_of_a_dtype_without_arithmetic_are_refused(dtype):
    model = random_model()
    weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="bfloat16, float16, float32 and float64 are supported"):
        mixtral.assemble(dataclasses.asdict(model.config), weights)


def test_a_dtype_makes_mixed_weights_alike(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    write_safetensors(checkpoint / "model.safetensors", tensors)
    model = Mixtral.from_pretrained(checkpoint, torch.float32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_truncated_file_is_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
        Mixtral.from_pretrained(checkpoint)


@pytest.mark.parametrize("text, message", [
    ("{", "config.json: not readable as JSON"), ("[]", "must hold a JSON object, got list"),
    ("[" * 100_000, "config.json: not readable as JSON"), ("", "config.json: not readable as JSON"),
    ('{"num_experts_per_tok": 99}', "num_experts_per_tok must be")])
def test_a_broken_config_is_refused(checkpoint, text, message):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Mixtral.from_pretrained(checkpoint)


def test_a_missing_config_or_directory_is_refused(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: not readable as JSON: No such file"):
        Mixtral.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"nowhere: no model\*.safetensors there"):
        Mixtral.from_pretrained(checkpoint / "nowhere")


def test_mistrals_weights_are_answered_with_the_command_that_converts_them(tmp_path):
    directory = tmp_path / "raw weights"
    directory.mkdir()
    (directory / "consolidated.00.pth").touch()
    with pytest.raises(ValueError) as error:
        Mixtral.from_pretrained(directory)
    command = f"python convert.py --input_dir '{directory}' --output_dir converted"
    assert str(error.value).endswith(command)


# ---------------------------------------------------------------- damaged checkpoints


@pytest.mark.parametrize("old", ["F64", "lm_head.weight"])
@pytest.mark.parametrize("new", [r"\n\u001b", 5000 * "x"], ids=["control", "long"])
def test_text_of_a_damaged_header_stays_one_short_printable_line(checkpoint, old, new):
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = content[8:size].decode()
    header = header.replace(f'"{old}"', f'"{new}"', 1).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[size:])
    with pytest.raises(ValueError) as error:
        Mixtral.from_pretrained(checkpoint)
    assert str(error.value).isprintable() and len(str(error.value)) < 3000


VALUES = [None, True, -1, 0, 1, 2, 3, 2**14, 2**20, 2**63, 2**70, 10**400, math.inf, math.nan, 0.5,
          "x", "", "F32", "I64", "F8_E4M3", "BF16", [], {}, [1, 2], {"rope_theta": 7}, "\n\x1b"]


def damage_bytes(rng, content, start=0, stop=None):
    """Change one to three bytes of a part of a file."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(start, stop or len(content))
        content[at] = rng.choice([rng.randrange(256), *b'0123456789{}[]",:.e-'])
    return bytes(content)


def damage_field(rng, fields):
    """Remove or rename a field, or give it or a field inside it another value."""
    name, value = rng.choice([*fields, "quantization_config", "rope_parameters"]), None
    kind = rng.choice(["remove", "rename", "inside", "replace", "replace"])
    if kind in ("remove", "rename"):
        value = fields.pop(name, {})
    if kind == "rename":
        fields[rng.choice([name + "x", "", "\n"])] = value
    elif kind == "inside" and isinstance(fields.get(name), dict):
        fields[name][rng.choice(list(fields[name]))] = rng.choice(VALUES)
    elif kind != "remove":
        fields[name] = rng.choice(VALUES)
    return json.dumps(fields).encode()


def damaged(rng, config, weights):
    """The two files of a checkpoint after one kind of damage."""
    kind, size = rng.randrange(6), 8 + int.from_bytes(weights[:8], "little")
    if kind == 0:
        return damage_bytes(rng, config), weights
    if kind == 1:
        return damage_field(rng, json.loads(config)), weights
    if kind == 2:
        return config, damage_bytes(rng, weights, 8, size)
    if kind == 3:
        return config, damage_bytes(rng, weights, 0, 8)
    if kind == 4:
        return config, weights[:rng.randrange(len(weights))]
    header = damage_field(rng, json.loads(weights[8:size]))
    header += b" " * (-len(header) % 8)
    return config, len(header).to_bytes(8, "little") + header + weights[size:]


def expected_logits(config, weights, tokens):
    """What the two files say, read and computed without mixtral.py."""
    fields = dataclasses.asdict(MixtralConfig()) | json.loads(config)
    fields |= fields.get("rope_parameters") or {}
    size, tensors = 8 + int.from_bytes(weights[:8], "little"), {}
    for name, entry in json.loads(weights[8:size]).items():
        if name != "__metadata__":
            start, end = (size + offset for offset in entry["data_offsets"])
            numbers = torch.frombuffer(bytearray(weights[start:end]), dtype=torch.float64)
            tensors[name] = numbers.view(entry["shape"]).tolist()
    return torch.tensor([reference.logits(fields, tensors, tokens)], dtype=torch.float64)


def try_damaged(directory, seed, config, weights):
    """Damage a checkpoint, load it and say what happened: "refused" or "right"."""
    config, weights = damaged(random.Random(seed), config, weights)
    (directory / "config.json").write_bytes(config)
    (directory / "model.safetensors").unlink(missing_ok=True)
    (directory / "model.safetensors").write_bytes(weights)
    start = time.process_time()
    try:
        logits = Mixtral.from_pretrained(directory)(torch.tensor([[1, 5, 3, 5, 0, 2, 2]]))
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 3000
        outcome = "refused"
    else:
        slow = expected_logits(config, weights, [1, 5, 3, 5, 0, 2, 2])
        assert relative_error(logits, slow) < 1e-12
        outcome = "right"
    assert time.process_time() - start < 5
    return outcome


def test_a_damaged_checkpoint_is_refused_in_one_line_or_gives_the_right_logits(tmp_path):
    save(random_model(num_local_experts=3, num_attention_heads=2, num_key_value_heads=1,
                      **TINY_SIZES), tmp_path)
    config, weights = ((tmp_path / name).read_bytes()
                       for name in ("config.json", "model.safetensors"))
    outcomes = [try_damaged(tmp_path, seed, config, weights) for seed in range(150)]
    assert outcomes.count("refused") > 75 and outcomes.count("right") > 5
