"""Claims about mixtral.py: the main claims come first, error handling last."""

import dataclasses
import math
import sys

import pytest
import reference
import torch
from conftest import SMALL, random_model, save
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_convert import growth, large_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mixtral
from convert import write_safetensors
from mixtral import Mixtral, MixtralConfig, RMSNorm, attend, rotate, rotation, route, visible


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
    """Read random tokens call by call; returns the text of each row and the logits after it.

    The padding is the last token of the vocabulary, which is in no text.
    """
    generator = torch.Generator().manual_seed(0)
    texts, logits = [[] for _ in calls[0]], [[] for _ in calls[0]]
    for call in calls:
        shape, last = (len(call), max(1, *call)), model.config.vocab_size - 1
        tokens = torch.randint(last, shape, generator=generator)
        tokens[torch.arange(shape[1]) >= torch.tensor(call)[:, None]] = last
        output = model(tokens, cache, torch.tensor(call))
        for row, length in enumerate(call):
            texts[row] += tokens[row, :length].tolist()
            logits[row] += output[row, :length].unbind(0)
    return texts, logits


# ---------------------------------------------------------------- the whole model


@pytest.mark.claim
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


@pytest.mark.claim
@settings(max_examples=40, deadline=None)
@given(window=WINDOWS, chunk=st.integers(1, 30), cuts=st.lists(st.integers(1, 29), max_size=6))
def test_any_chunking_is_one_pass(window, chunk, cuts):
    model, tokens = random_model(sliding_window=window), torch.arange(60).view(2, 30) % 37
    cache = model.new_cache(2, 30, chunk)
    edges = sorted({0, *cuts, 30})
    parts = [model(tokens[:, a:b], cache) for a, b in zip(edges, edges[1:], strict=False)]
    assert relative_error(torch.cat(parts, 1), model(tokens)) < 1e-12


@pytest.mark.claim
@settings(max_examples=40, deadline=None)
@given(window=WINDOWS, chunk=st.integers(1, 12), calls=lengths_of_calls(3, 9, 4))
def test_a_ragged_row_gives_what_it_gives_alone_call_after_call(window, chunk, calls):
    """And padding leaves no trace, even if its token makes NaN of everything that it reaches."""
    model = random_model(sliding_window=window)
    model.model.embed_tokens.weight[-1] = math.nan
    cache = model.new_cache(3, max(1, sum(map(max, calls))), chunk)
    texts, logits = read_ragged(model, calls, cache)
    for text, row in zip(texts, logits, strict=True):
        if text:
            assert relative_error(torch.stack(row), model(torch.tensor([text]))[0]) < 1e-12
    assert cache.tokens_read.tolist() == [len(text) for text in texts]


def test_last_only_gives_the_logits_after_the_last_real_token_and_computes_no_others():
    model, tokens, widths = random_model(), torch.arange(20).view(2, 10), []
    full = model(tokens)
    model.lm_head.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    for cache in (None, model.new_cache(2, 10, chunk=3)):
        last = model(tokens, cache, torch.tensor([10, 4]), last_only=True)
        assert last.shape == (2, 1, 37)
        assert relative_error(last[:, 0], torch.stack((full[0, 9], full[1, 3]))) < 1e-12
    assert widths == [1, 1]


# ---------------------------------------------------------------- routing


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


def mixture(E=8, A=2, dtype=torch.float64):
    model = random_model(num_local_experts=E, num_experts_per_tok=A, dtype=dtype)
    return model.model.layers[0].block_sparse_moe


@pytest.mark.claim
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


# ---------------------------------------------------------------- norm, rotation and attention


def test_rotation_turns_pairs_from_the_two_halves_by_hand():
    cos, sin = rotation(torch.tensor([[3]]), 4, 100.0)
    angles = torch.tensor([3.0, 3.0 / 10], dtype=torch.float64)  # 100^(-2/4) = 1/10
    x = torch.tensor([1.0, 2.0, 5.0, 7.0], dtype=torch.float64).view(1, 1, 1, 4)
    c, s = angles.cos(), angles.sin()
    wanted = torch.stack((1 * c[0] - 5 * s[0], 2 * c[1] - 7 * s[1],
                          5 * c[0] + 1 * s[0], 7 * c[1] + 2 * s[1]))
    assert torch.allclose(rotate(x, cos, sin).flatten(), wanted, rtol=1e-15)


@settings(max_examples=50, deadline=None)
@given(window=st.none() | st.integers(1, 9), start=st.integers(0, 20))
def test_a_query_sees_w_keys_including_its_own(window, start):
    queries, keys = torch.arange(start, start + 5)[None], torch.arange(-2, start + 9)[None]
    mask = visible(queries, keys, window)
    for i in range(start, start + 5):
        seen = [j for j, lit in zip(keys[0].tolist(), mask[0, i - start], strict=True) if lit]
        assert seen == list(range(max(0, i + 1 - (window or i + 1)), i + 1))


def explicit(q, k, v, seen):
    """softmax(q·kᵀ/√d)·v over the keys that are seen, in float64, head by head: (B, S, H·d)."""
    heads, ratio = [], q.shape[2] // k.shape[2]
    for h in range(q.shape[2]):
        scores = q[:, :, h].double() @ k[:, :, h // ratio].double().mT / math.sqrt(q.shape[-1])
        mass = scores.masked_fill(~seen, -math.inf).softmax(-1)
        heads.append(mass @ v[:, :, h // ratio].double())
    return torch.cat(heads, dim=-1)


@pytest.mark.claim
@pytest.mark.parametrize("H, K", [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6), (4, 2)])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_is_the_explicit_formula_for_every_head(H, K, window):
    S, T = torch.arange(4, 9).expand(2, 5), torch.arange(9).expand(2, 9)
    q, k, v = randn(2, 5, H, 4, seed=1), *randn(2, 2, 9, K, 4, seed=2)
    seen = visible(S, T, window)
    got = attend(q, k, v, seen[:, None])
    assert relative_error(got, explicit(q, k, v, seen)) < 1e-14


# ---------------------------------------------------------------- cache


def tiny_cache(W, rows, max_length, chunk):
    return random_model(sliding_window=W, **TINY_SIZES).new_cache(rows, max_length, chunk)


@settings(max_examples=60, deadline=None)
@given(W=st.none() | st.integers(1, 6), chunk=st.integers(1, 5),
       calls=st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_a_call_never_overwrites_a_key_that_its_queries_need(W, chunk, calls):
    cache, length = tiny_cache(W, 1, 40, chunk), 0
    for S in calls:
        positions = torch.arange(length, length + min(S, chunk))[None]
        length += positions.shape[1]
        keys = cache.reserve(positions, torch.tensor([positions.shape[1]]))
        for i, row in zip(positions[0].tolist(), visible(positions, keys, W)[0], strict=True):
            assert sorted(keys[0, row].tolist()) == list(range(max(0, i + 1 - (W or i + 1)), i + 1))


def test_the_buffer_rolls_as_in_its_docstring_and_only_slots_in_use_are_read():
    cache, in_slot_3 = tiny_cache(128, 1, 300, chunk=1), []
    for position in range(300):
        keys = cache.reserve(torch.tensor([[position]]), torch.tensor([1]))
        assert sorted(keys[0].tolist()) == list(range(max(0, position - 127), position + 1))
        in_slot_3.append(cache.positions[0, 3].item())
    assert in_slot_3 == 3 * [-1] + 128 * [3] + 128 * [131] + 41 * [259]
    assert cache.reserve(torch.tensor([[300]]), torch.tensor([0])).shape == (1, 128)


@pytest.mark.parametrize("W, length, slots", [
    (128, 500, 128 + 256 - 1), (128, 2000, 128 + 256 - 1), (128, 9, 9), (None, 700, 700)])
def test_the_cache_stops_growing_at_the_window(W, length, slots):
    cache = random_model(sliding_window=W).new_cache(1, length)
    assert cache.keys.shape == cache.values.shape == (2, 1, slots, 2, 4)


# ---------------------------------------------------------------- precision


class RecordDtypes(TorchDispatchMode):
    """Records the floating-point dtypes of all that is computed outside of some functions."""

    def __init__(self, *but):
        super().__init__()
        self.seen, self.but = set(), {function.__code__ for function in but}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output, frame = func(*args, **kwargs or {}), sys._getframe()
        while frame and frame.f_code not in self.but:
            frame = frame.f_back
        if not frame:
            self.seen |= {x.dtype for x in tree_leaves(output)
                          if isinstance(x, torch.Tensor) and x.is_floating_point()}
        return output


@pytest.mark.claim
@pytest.mark.parametrize("dtype, but", [(torch.float64, []), (torch.float32, [rotation])])
def test_a_float64_model_computes_in_float64_and_a_float32_model_only_angles(dtype, but):
    """Devices without float64 run the model, because the angles are computed on the CPU."""
    model, tokens = random_model(dtype=dtype), torch.arange(12).view(2, 6)
    with RecordDtypes(*but) as dtypes:
        model(tokens)
        cache = model.new_cache(2, 6, chunk=4)
        model(tokens, cache, lengths=torch.tensor([6, 3]), last_only=True)
    assert dtypes.seen == {dtype}


def test_counting_positions_never_reads_numbers_from_the_device_of_the_model():
    """On the device "meta" there are none. The loop over experts, which reads some, is left out."""
    with torch.device("meta"):
        model = Mixtral(MixtralConfig(**SMALL))
    for layer in model.model.layers:
        layer.block_sparse_moe = torch.nn.Identity()
    cache, tokens = model.new_cache(2, 20, chunk=4), torch.zeros(2, 6, dtype=torch.int64)
    for lengths in ([6, 3], [1, 0], [1, 1]):
        logits = model(tokens[:, :max(lengths)].to("meta"), cache, torch.tensor(lengths),
                       last_only=True)
        assert logits.is_meta and cache.positions.is_cpu
    assert cache.tokens_read.tolist() == [8, 4]


def is_rounded_once(got, exact, slack):
    """Half a unit in the last place, and `slack` for what float32 loses before the rounding."""
    info = torch.finfo(got.dtype)
    half_unit = info.eps / 4 * 2.0 ** torch.frexp(exact).exponent
    half_unit = half_unit.clamp(min=info.eps * info.smallest_normal / 2)  # for subnormal numbers
    return ((got.double() - exact).abs() <= half_unit + slack).all()


NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


class Scale(torch.nn.Module):
    """In place of an expert: one product per number, so no sum is rounded inside."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@pytest.mark.claim
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


@NARROW
def test_attention_rounds_only_probabilities_and_its_result(dtype):
    q, k, v = (randn(2, 40, heads, 4, seed=heads + n, dtype=dtype) for n, heads in
               enumerate((6, 2, 2)))
    seen = visible(*2 * [torch.arange(40).expand(2, 40)], 30)
    got = attend(q, k, v, seen[:, None])
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
    assert model.new_cache(1, 5).keys.dtype == dtype


# ---------------------------------------------------------------- configuration and loading


def test_config_files_of_transformers_4_and_5_mean_the_same():
    old = MixtralConfig.from_dict({"rope_theta": 5e5, "head_dim": None, "sliding_window": None})
    new = MixtralConfig.from_dict(
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "unknown": 1})
    assert old == new and old.rope_theta == 5e5 and old.head_dim == 128
    assert MixtralConfig.from_dict({}) == MixtralConfig()
    assert MixtralConfig().rope_theta == 1e6 and MixtralConfig().num_experts_per_tok == 2
    assert MixtralConfig.from_dict({"sliding_window": 4096}).sliding_window == 4096


TOKENS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize("files", [1, 3])
def test_a_loaded_model_is_the_saved_one(checkpoint, files):
    tensors = load_file(checkpoint / "model.safetensors")
    write_safetensors(checkpoint / "consolidated.safetensors", tensors)  # not read
    (checkpoint / "model.safetensors").unlink()
    for n in range(files):
        write_safetensors(checkpoint / f"model-{n}.safetensors", dict([*tensors.items()][n::files]))
    model, saved = Mixtral.from_pretrained(checkpoint), random_model()
    assert relative_error(model(TOKENS), saved(TOKENS)) < 1e-14
    for name, weight in saved.named_parameters():
        assert torch.equal(model.get_parameter(name), weight)
    assert not any(weight.is_meta or weight.requires_grad for weight in model.parameters())
    narrow = Mixtral.from_pretrained(str(checkpoint), torch.bfloat16)
    assert {weight.dtype for weight in narrow.parameters()} == {torch.bfloat16}


def test_weights_of_a_kept_dtype_stay_mapped_from_disk(tmp_path):
    place, loaded = save(large_model(), tmp_path / "model"), []
    assert growth(lambda: loaded.append(Mixtral.from_pretrained(place))) < 20_000
    assert loaded[0].lm_head.weight.dtype == torch.float32


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("raw, name", [
    ({"num_key_value_heads": 5}, "num_key_value_heads"), ({"head_dim": 7}, "head_dim"),
    ({"num_attention_heads": 8192}, "head_dim"), ({"hidden_size": 4096.0}, "hidden_size"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok"), ({"vocab_size": None}, "vocab_size"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok"), ({"vocab_size": True}, "vocab_size"),
    ({"sliding_window": 0}, "sliding_window"), ({"sliding_window": "9"}, "sliding_window"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"model_type": "llama"}, "llama"),
    ({"rope_scaling": {"type": "yarn"}}, "yarn"),
    ({"rope_parameters": {"rope_type": "linear"}}, "linear"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}}, "yarn")])
def test_a_config_of_another_model_is_refused_by_name(raw, name):
    with pytest.raises(ValueError, match=f"config: .*{name}"):
        MixtralConfig.from_dict(raw)


def test_a_cache_refuses_more_than_it_was_made_for_and_stays_as_it_was():
    model = random_model()
    cache = model.new_cache(2, 4, chunk=2)
    model(torch.zeros(2, 3, dtype=torch.int64), cache, torch.tensor([3, 1]))
    state = cache.positions.clone()
    with pytest.raises(ValueError, match="more than its 4 tokens"):
        model(torch.zeros(2, 2, dtype=torch.int64), cache)
    assert torch.equal(cache.positions, state)
    model(torch.zeros(2, 3, dtype=torch.int64), cache, torch.tensor([1, 3]))
    assert cache.tokens_read.tolist() == [4, 4]


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
    {"num_local_experts": 9}, {"num_hidden_layers": 3}, {"num_hidden_layers": 10**9}])
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


@pytest.mark.parametrize("file, content", [
    ("config.json", "{"), ("config.json", "[]"), ("config.json", "[" * 100_000),
    ("config.json", ""), ("config.json", None), ("model.safetensors", "short"),
    ("model.safetensors", None)])
def test_a_broken_or_missing_file_is_refused_by_name(file, content, checkpoint):
    (checkpoint / file).unlink()
    if content is not None:
        (checkpoint / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file}|no model\*.safetensors"):
        Mixtral.from_pretrained(checkpoint)
