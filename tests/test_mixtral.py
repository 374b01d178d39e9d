"""Claims about mixtral.py, in the order of its source."""

import dataclasses
import json
import math

import pytest
import reference
import torch
from conftest import SMALL, random_model, save, save_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import mixtral
from mixtral import (
    Cache,
    Mixtral,
    MixtralConfig,
    RMSNorm,
    SparseMoE,
    at_least_float32,
    attend,
    rotate,
    rotation,
    route,
    visible,
)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def far(a, b):
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ---------------------------------------------------------------- configuration

EIGHT_TIMES_22B = {"hidden_size": 6144, "num_hidden_layers": 56, "num_attention_heads": 48,
                   "intermediate_size": 16384}


@pytest.mark.parametrize("sizes, total, active, tensors", [
    ({}, 46_702_792_704, 12_879_925_248, 995),
    (EIGHT_TIMES_22B, 140_620_634_112, 39_152_031_744, 1739),
    (EIGHT_TIMES_22B | {"vocab_size": 32768}, 140_630_071_296, None, 1739)])
def test_the_released_sizes_have_the_published_parameter_counts(sizes, total, active, tensors):
    with torch.device("meta"):
        weights = dict(Mixtral(MixtralConfig(**sizes)).named_parameters())
    assert sum(w.numel() for w in weights.values()) == total and len(weights) == tensors
    idle = sum(w.numel() for n, w in weights.items() if ".experts." in n) * 6 // 8
    # A token looks up one row of the embedding; the published count takes the table whole.
    assert active is None or total - idle == active


def test_versions_4_and_5_of_the_config_file_mean_the_same():
    old = MixtralConfig.from_dict({"rope_theta": 5e5, "head_dim": None, "sliding_window": None})
    new = MixtralConfig.from_dict(
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "unknown": 1})
    assert old == new and old.rope_theta == 5e5 and old.head_dim == 128
    assert MixtralConfig.from_dict({}).rope_theta == 1e6
    assert MixtralConfig.from_dict({"sliding_window": 4096}).sliding_window == 4096


@pytest.mark.parametrize("raw, message", [
    ({"num_key_value_heads": 5}, "num_key_value_heads must be a divisor.* 32, got 5"),
    ({"head_dim": 7}, "head_dim must be even, got 7"),
    ({"num_attention_heads": 24}, "num_attention_heads must be a divisor of hidden_size"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok must be <= num_local_experts 8, got 9"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok must be an integer >= 1, got 0"),
    ({"sliding_window": 0}, "sliding_window must be an integer >= 1, got 0"),
    ({"sliding_window": "4096"}, "sliding_window must be an integer >= 1, got '4096'"),
    ({"hidden_size": 4096.0}, "hidden_size must be an integer"),
    ({"vocab_size": True}, "vocab_size must be an integer"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    ({"rope_theta": -1.0}, "rope_theta must be a finite number > 0"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a finite number > 0"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
    ({"model_type": "llama"}, "model_type must be 'mixtral', got 'llama'"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_type must be 'default', got 'yarn'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_type must be 'default', got 'linear'"),
    ({"rope_parameters": 3}, "rope_parameters must be an object or null, got 3"),
    ({"rope_scaling": [1]}, r"rope_scaling must be an object or null, got \[1\]")])
def test_what_cannot_be_is_refused_by_name(raw, message):
    with pytest.raises(ValueError, match=message):
        MixtralConfig.from_dict(raw)


def test_a_config_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MixtralConfig().hidden_size = 1


# ---------------------------------------------------------------- precision

def test_only_what_is_narrower_than_float32_is_widened():
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        assert at_least_float32(torch.ones(1, dtype=narrow)).dtype == torch.float32
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


class Dtypes(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the floating dtypes of all that is ever computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.seen |= {x.dtype for x in (out if isinstance(out, tuple | list) else [out])
                      if isinstance(x, torch.Tensor) and x.is_floating_point()}
        return out


def test_in_a_float64_model_everything_is_float64():
    model, tokens = random_model(), torch.arange(12).view(2, 6)
    with Dtypes() as dtypes:
        model(tokens)
        cache = model.new_cache(2, 6, chunk=4)
        model(tokens, cache, lengths=torch.tensor([6, 3]), last_only=True)
    assert dtypes.seen == {torch.float64}


def test_a_bfloat16_model_widens_where_the_rule_says():
    model = random_model(dtype=torch.bfloat16)
    assert model(torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.float32
    assert route(model.model.layers[0].block_sparse_moe.gate.weight, 2)[0].dtype == torch.float32
    assert model.new_cache(1, 5).keys.dtype == torch.bfloat16
    x = randn(2, 24, dtype=torch.float32).bfloat16()
    norm = model.model.norm
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert torch.equal(norm(x), norm.weight * exact.bfloat16())


@pytest.mark.parametrize("shift", [0, 1000])
def test_bfloat16_rotation_and_attention_round_once(shift):
    q, k, v = (randn(1, *n, 4, seed=sum(n)).bfloat16() for n in ((6, 8), (2, 6), (2, 6)))
    positions = torch.arange(6)[None] + shift
    cos, sin = rotation(positions, 4, 1e4)
    assert torch.equal(rotate(q, cos, sin), rotate(q.double(), cos, sin).bfloat16())
    mask = visible(positions, positions, 3)
    wide = attend(q.double(), k.double(), v.double(), mask)
    # Half a unit in the last of bfloat16's 8 bits, and float32's own rounding.
    assert ((attend(q, k, v, mask).double() - wide).abs() <= wide.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 5, 300])
def test_a_widened_product_is_the_exact_one_rounded_once(dtype, rows, monkeypatch):
    """Half a unit in the last place, and what float32 sums lose before it, near zero most."""
    monkeypatch.setattr(mixtral, "WIDEN_ROWS", 5)
    linear = mixtral.Linear(24, 40).to(dtype)
    x = randn(1, rows, 24, dtype=torch.float32).to(dtype)
    exact = x.double() @ linear.weight.double().mT
    got, unit = linear(x), torch.finfo(dtype).eps
    assert got.dtype == dtype and got.shape == (1, rows, 40)
    assert ((got.double() - exact).abs() <= exact.abs() * unit / 2 + 1e-5).all()


@pytest.mark.parametrize("rows", [1, 5, 256, 257])
def test_a_product_in_slices_and_its_gradients_are_those_of_the_whole(rows):
    with torch.inference_mode(False):
        linear, x = mixtral.Linear(24, 512).double(), randn(1, rows, 24).requires_grad_()
        got, wanted = linear(x), x @ linear.weight.mT
        pairs = [(got, wanted), *zip(*(torch.autograd.grad(y.square().sum(), (linear.weight, x))
                                       for y in (got, wanted)), strict=True)]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and far(ours, theirs) < 1e-13


# ---------------------------------------------------------------- norm and rotation

def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.5).double()
    norm.weight = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)  # mean of squares 12.5, with ε 13
    assert torch.allclose(norm(x), torch.tensor([[6.0, -4.0]], dtype=torch.float64) / 13**0.5,
                          rtol=1e-15)


def test_the_pairs_of_rotation_are_the_halves_by_hand():
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


# ---------------------------------------------------------------- mask and attention

@settings(max_examples=50, deadline=None)
@given(window=st.none() | st.integers(1, 9), start=st.integers(0, 20))
def test_a_query_sees_w_keys_including_itself(window, start):
    queries, keys = torch.arange(start, start + 5)[None], torch.arange(-2, start + 5)[None]
    mask = visible(queries, keys, window)
    for i in range(start, start + 5):
        seen = [j for j, lit in zip(keys[0].tolist(), mask[0, i - start], strict=True) if lit]
        assert seen == list(range(max(0, i + 1 - (window or i + 1)), i + 1))


@pytest.mark.parametrize("K", [1, 2, 3, 6])
def test_grouped_queries_are_many_heads_with_repeated_keys_and_values(K):
    q, k, v = randn(2, 4, 6, 8, seed=1), randn(2, K, 7, 8, seed=2), randn(2, K, 7, 8, seed=3)
    mask = visible(torch.arange(3, 7).expand(2, 4), torch.arange(7).expand(2, 7), 3)
    many = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), *(x.repeat_interleave(6 // K, dim=1) for x in (k, v)),
        attn_mask=mask[:, None]).transpose(1, 2)
    assert far(attend(q, k, v, mask), many) < 1e-14


# ---------------------------------------------------------------- cache

@settings(max_examples=60, deadline=None)
@given(C=st.integers(1, 9), last=st.integers(0, 40), data=st.data())
def test_slot_s_holds_the_latest_position_that_is_s_mod_c(C, last, data):
    fed = data.draw(st.integers(last + 1, 50))
    slots = [-1] * min(C, fed)
    for position in range(last + 1):
        slots[position % C] = position
    buffer = torch.zeros(1, 1, 1, C, 2)
    cache = Cache(buffer, buffer, torch.zeros(1), max_length=fed, chunk=1, fed=fed)
    held = cache.held(torch.tensor([last]))[0].tolist()
    assert [max(position, -1) for position in held] == slots


WINDOWS = st.sampled_from([None, 1, 2, 5, 40])


@settings(max_examples=40, deadline=None)
@given(window=WINDOWS, chunk=st.integers(1, 30), cuts=st.lists(st.integers(1, 29), max_size=6))
def test_any_chunking_is_one_pass(window, chunk, cuts):
    model, tokens = random_model(sliding_window=window), torch.arange(60).view(2, 30) % 37
    cache = model.new_cache(2, 30, chunk)
    edges = sorted({0, *cuts, 30})
    parts = [model(tokens[:, a:b], cache) for a, b in zip(edges, edges[1:], strict=False)]
    assert far(torch.cat(parts, 1), model(tokens)) < 1e-12


@pytest.mark.parametrize("window, chunk", [(None, 64), (1, 1), (5, 1), (5, 3), (5, 64)])
def test_one_token_at_a_time_is_one_pass_through_many_wraps(window, chunk):
    model, tokens = random_model(sliding_window=window), torch.arange(60)[None] % 37
    cache = model.new_cache(1, 60, chunk)
    steps = torch.cat([model(tokens[:, n:n + 1], cache) for n in range(60)], 1)
    assert far(steps, model(tokens)) < 1e-12


@settings(max_examples=40, deadline=None)
@given(window=WINDOWS, chunk=st.integers(1, 12), data=st.data())
def test_a_ragged_row_gives_what_it_gives_alone_call_after_call(window, chunk, data):
    model, B = random_model(sliding_window=window), 3
    calls = [data.draw(st.lists(st.integers(0, 9), min_size=B, max_size=B)) for _ in range(4)]
    calls = [call for call in calls if max(call)]
    cache = model.new_cache(B, max(1, sum(map(max, calls))), chunk)
    texts, got = [[] for _ in range(B)], [[] for _ in range(B)]
    for n, call in enumerate(calls):
        tokens = torch.randint(37, (B, max(call)), generator=torch.Generator().manual_seed(n))
        full = model(tokens, cache, torch.tensor(call))
        assert full.isfinite().all()
        for row, length in enumerate(call):
            texts[row] += tokens[row, :length].tolist()
            got[row] += full[row, :length].unbind(0)
    for text, logits in zip(texts, got, strict=True):
        if text:
            assert far(torch.stack(logits), model(torch.tensor([text]))[0]) < 1e-12
    assert cache.lengths.tolist() == [len(text) for text in texts]


def test_what_padding_holds_changes_nothing():
    model, results = random_model(), []
    for filler in (0, 9):
        cache = model.new_cache(1, 30, chunk=4)
        first = torch.tensor([[1, 2, 3] + [filler] * 8])
        model(first, cache, torch.tensor([3]))
        results.append(model(torch.tensor([[4, 5, 6, 7, 8, 9]]), cache))
    assert far(*results) < 1e-12


def test_the_future_never_changes_the_past():
    model, tokens = random_model(sliding_window=None), torch.arange(20)[None]
    changed = tokens.clone()
    changed[0, 12:] = 3
    assert far(model(tokens)[:, :12], model(changed)[:, :12]) < 1e-14


def test_memory_stops_growing_at_the_window():
    model = random_model(sliding_window=128)
    small, large = (model.new_cache(1, length) for length in (500, 2000))
    assert small.keys.shape == large.keys.shape and large.keys.shape[3] == 128 + 256 - 1
    assert model.new_cache(1, 9).keys.shape[3] == 9
    assert random_model(sliding_window=None).new_cache(1, 700).keys.shape[3] == 700


def test_a_cache_refuses_more_than_it_was_made_for():
    model = random_model()
    cache = model.new_cache(2, 4)
    with pytest.raises(ValueError, match="room for 4 of 4 tokens, got 2 rows of 5"):
        model(torch.zeros(2, 5, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="2 rows .* got 1 rows"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache)
    for sizes in ((0, 4), (1, 0), (1, 4, 0), (1, 2.0)):
        with pytest.raises(ValueError, match="must be integers >= 1"):
            model.new_cache(*sizes)


# ---------------------------------------------------------------- routing

def test_routing_by_hand():
    logits = torch.tensor([[0.0, math.log(3), -1.0, 0.0], [5.0, 0.0, 0.0, 5.0]]).double()
    weights, experts = route(logits, 2)
    assert experts.tolist() == [[1, 0], [0, 3]]
    assert torch.allclose(weights, torch.tensor([[0.75, 0.25], [0.5, 0.5]]).double(), rtol=1e-15)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), E=st.integers(1, 9), data=st.data())
def test_softmax_of_the_chosen_is_the_full_softmax_renormalised(seed, E, data):
    k = data.draw(st.integers(1, E))
    logits = 5 * randn(6, E, seed=seed)
    weights, experts = route(logits, k)
    full = logits.softmax(-1).topk(k)
    assert torch.equal(experts, full.indices)
    assert far(weights, full.values / full.values.sum(-1, keepdim=True)) < 1e-13
    assert far(weights.sum(-1), torch.ones(6).double()) < 1e-14


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=8), min_size=1, max_size=40))
def test_equal_logits_choose_the_lowest_expert(rows):
    _, experts = route(torch.tensor(rows).bfloat16(), 3)
    assert experts.tolist() == [sorted(range(8), key=lambda e: (-row[e], e))[:3] for row in rows]


def mixture(E=8, k=2, seed=0):
    return random_model(seed, num_local_experts=E, num_experts_per_tok=k
                        ).model.layers[0].block_sparse_moe


@pytest.mark.parametrize("E, k", [(8, 2), (4, 1), (4, 3), (4, 4), (1, 1)])
def test_grouped_dispatch_is_a_loop_over_tokens_and_a_masked_dense_sum(E, k):
    moe, x = mixture(E, k), randn(2, 9, 24)
    tokens = x.flatten(0, 1)
    weights, experts = route(moe.gate(tokens), k)
    loop = torch.stack([sum(w * moe.experts[e](token) for w, e in zip(ws, es, strict=True))
                        for token, ws, es in zip(tokens, weights, experts, strict=True)])
    dense = sum(torch.where(experts == e, weights, 0).sum(-1)[:, None] * moe.experts[e](tokens)
                for e in range(E))
    assert far(moe(x).flatten(0, 1), loop) < 1e-14 and far(dense, loop) < 1e-14


def test_all_experts_chosen_is_the_dense_sum():
    moe, x = mixture(4, 4), randn(1, 5, 24)
    shares = moe.gate(x).softmax(-1)
    assert far(moe(x), sum(shares[..., e:e + 1] * moe.experts[e](x) for e in range(4))) < 1e-14


def test_relabelling_experts_changes_nothing():
    moe, x, order = mixture(), randn(2, 9, 24), [3, 1, 7, 0, 6, 2, 5, 4]
    relabelled = SparseMoE(MixtralConfig(**SMALL)).double()
    relabelled.experts = torch.nn.ModuleList(moe.experts[e] for e in order)
    relabelled.gate.weight.data = moe.gate.weight[order]
    assert far(relabelled(x), moe(x)) < 1e-14


def test_no_token_is_dropped_and_no_idle_expert_runs():
    moe, x, ran = mixture(), randn(1, 50, 24), []
    for n, expert in enumerate(moe.experts):
        expert.register_forward_hook(lambda m, args, out, n=n: ran.append((n, len(args[0]))))
    moe.gate.weight.data = torch.zeros(8, 24).double()
    y = moe(x)
    assert ran == [(0, 50), (1, 50)]
    assert far(y, (moe.experts[0](x) + moe.experts[1](x)) / 2) < 1e-14


# ---------------------------------------------------------------- the whole model

@pytest.mark.parametrize("window, k, E, H, K", [
    (None, 2, 8, 6, 2), (1, 2, 8, 6, 6), (5, 1, 4, 6, 1), (5, 3, 8, 4, 2), (50, 2, 4, 2, 1)])
def test_float64_logits_equal_a_second_implementation(window, k, E, H, K):
    model = random_model(sliding_window=window, num_experts_per_tok=k, num_local_experts=E,
                         num_attention_heads=H, num_key_value_heads=K)
    rows = [[1, 5, 9, 2, 36, 0, 7, 7, 3, 11, 30], [4] * 11]
    weights = {name: weight.tolist() for name, weight in model.named_parameters()}
    config = dataclasses.asdict(model.config)
    slow = torch.tensor([reference.logits(config, weights, row) for row in rows],
                        dtype=torch.float64)
    assert far(model(torch.tensor(rows)), slow) < 1e-12
    cache = model.new_cache(2, 11, chunk=3)
    assert far(torch.cat([model(torch.tensor(rows)[:, :4], cache),
                          model(torch.tensor(rows)[:, 4:], cache)], 1), slow) < 1e-12


def test_last_only_is_the_last_of_all_and_makes_no_others():
    model, tokens, widths = random_model(), torch.arange(20).view(2, 10), []
    full = model(tokens)
    model.lm_head.register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
    lengths = torch.tensor([10, 4])
    last = model(tokens, model.new_cache(2, 10, chunk=3), lengths, last_only=True)
    assert widths == [1]
    assert far(last[:, 0], torch.stack((full[0, 9], full[1, 3]))) < 1e-12


@pytest.mark.parametrize("tokens, message", [
    (torch.tensor([[37]]), "0 … 36, got 37"), (torch.tensor([[-1]]), "got -1"),
    (torch.tensor([[1.0]]), "int64"), (torch.tensor([1, 2]), "shape"),
    (torch.zeros(1, 0, dtype=torch.int64), "at least one")])
def test_what_is_no_token_is_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        random_model()(tokens)


@pytest.mark.parametrize("lengths", [[3], [1, 4], [-1, 2]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths must be 2 integers in 0 … 3"):
        random_model()(torch.zeros(2, 3, dtype=torch.int64), lengths=torch.tensor(lengths))


# ---------------------------------------------------------------- loading

TOKENS = torch.tensor([[1, 2, 3]])


def test_a_loaded_model_is_the_saved_one(checkpoint):
    model, saved = Mixtral.from_pretrained(checkpoint), random_model()
    assert far(model(TOKENS), saved(TOKENS)) < 1e-14
    for name, weight in saved.named_parameters():
        assert torch.equal(model.get_parameter(name), weight)
    assert not any(weight.is_meta for weight in model.parameters())
    assert Mixtral.from_pretrained(str(checkpoint), torch.bfloat16).lm_head.weight.dtype == \
        torch.bfloat16


def shard(checkpoint, name_of):
    """Split model.safetensors by a function of the tensor's name, with an index."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    files = {}
    for name, tensor in tensors.items():
        files.setdefault(name_of(name), {})[name] = tensor
    for file, part in files.items():
        save_file(part, checkpoint / file)
    index = {"weight_map": {name: name_of(name) for name in tensors}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_shards_load_as_one(checkpoint):
    shard(checkpoint, lambda name: f"part-{len(name) % 3}.safetensors")
    assert far(Mixtral.from_pretrained(checkpoint)(TOKENS), random_model()(TOKENS)) < 1e-14


def test_missing_unknown_and_misshaped_tensors_are_refused_all_of_them(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.block_sparse_moe.experts.7.w2.weight"]
    tensors["model.extra"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(3, 2).double()
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Mixtral.from_pretrained(checkpoint)
    for part in ("missing model.norm.weight", "missing model.layers.1.block_sparse_moe.experts.7",
                 "unknown or repeated model.extra",
                 "lm_head.weight has shape [3, 2], not [37, 24]"):
        assert part in str(error.value)


def test_a_tensor_in_two_shards_is_refused(checkpoint):
    tensors = shard(checkpoint, lambda name: f"part-{'norm' in name}.safetensors")
    save_file(tensors, checkpoint / "part-True.safetensors")
    with pytest.raises(ValueError, match="unknown or repeated lm_head.weight"):
        Mixtral.from_pretrained(checkpoint)


@pytest.mark.parametrize("dtype, message", [
    (torch.float32, "wanted one of floats"), (torch.int64, "wanted one of floats")])
def test_mixed_or_whole_number_weights_are_refused(checkpoint, dtype, message):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        Mixtral.from_pretrained(checkpoint)


def test_a_truncated_file_is_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        Mixtral.from_pretrained(checkpoint)


@pytest.mark.parametrize("entry", ["../model.safetensors", "/etc/passwd", "lost.safetensors"])
def test_an_index_names_only_files_beside_it(checkpoint, entry):
    shard(checkpoint, lambda name: "part.safetensors")
    index = {"weight_map": {"lm_head.weight": entry}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"not found: {entry}"):
        Mixtral.from_pretrained(checkpoint)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": [1, 2]}])
def test_an_index_without_a_map_is_refused(checkpoint, content):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="index.json: wanted weight_map"):
        Mixtral.from_pretrained(checkpoint)


@pytest.mark.parametrize("text, message", [
    ("{", "not readable as JSON"), ("[]", "wanted a JSON object, got list"),
    ('{"num_experts_per_tok": 99}', "num_experts_per_tok must be")])
def test_a_broken_config_is_refused(checkpoint, text, message):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Mixtral.from_pretrained(checkpoint)


def test_a_missing_config_or_directory_is_refused(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: not readable"):
        Mixtral.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="wanted a directory with config.json"):
        Mixtral.from_pretrained(checkpoint / "nowhere")


def test_raw_weights_are_answered_with_the_command_that_converts_them(tmp_path):
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(ValueError, match="python convert.py --input_dir .* --output_dir .*-hf"):
        Mixtral.from_pretrained(tmp_path)


@pytest.mark.skipif(not mixtral.Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_weights_of_a_kept_dtype_stay_mapped_from_disk(tmp_path):
    """Anonymous memory grows by under a fifth of the checkpoint: far from 1.2 times."""
    def anonymous():
        status = mixtral.Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 32}
    model = random_model(dtype=torch.float32, **sizes)
    size = sum(weight.nbytes for weight in model.parameters())
    save(model, tmp_path / "model")
    del model
    before = anonymous()
    loaded = Mixtral.from_pretrained(tmp_path / "model")
    assert anonymous() - before < size / 5 and size > 90e6
    assert loaded.lm_head.weight.dtype == torch.float32
