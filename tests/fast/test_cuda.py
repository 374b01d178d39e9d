"""Claims about fast/cuda.py. Without a GPU the steps run as they are, with a GPU as CUDA graphs."""

import copy
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fast.cuda")

from gpu import small_model

import fast
from fast import cuda
from mixtral import SparseMoE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def model_pair(seed=0, dtype=torch.float64, **changes):
    """A model of mixtral.py, and the same one prepared for the GPU."""
    torch.manual_seed(seed)
    plain = small_model(DEVICE, dtype, **changes)
    return plain, cuda.prepare(copy.deepcopy(plain))


def random_tokens(*shape):
    return torch.randint(16, shape, device=DEVICE)


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


class Pair:
    """A plain cache and a prepared one, which must stay equal after every call."""

    def __init__(self, rows, length, chunk=3, **changes):
        self.models = model_pair(**changes)
        self.caches = [model.new_cache(rows, length, chunk) for model in self.models]
        self.read = cuda.reader(self.models[1], self.caches[1])

    def call(self, tokens, lengths):
        lengths = torch.tensor(lengths)
        expected = self.models[0](tokens, self.caches[0], lengths, last_only=True)[:, 0]
        result = self.read(tokens, lengths)
        real = lengths > 0  # the logits of a row that reads nothing mean nothing
        assert result.shape == expected.shape
        if real.any():
            assert relative_error(result[real], expected[real]) < 1e-12
        assert torch.equal(self.caches[0].positions, self.caches[1].positions)
        torch.testing.assert_close(self.caches[1].keys, self.caches[0].keys)
        torch.testing.assert_close(self.caches[1].values, self.caches[0].values)


# ---------------------------------------------------------------- the static cache


@settings(max_examples=60, deadline=None)
@given(window=st.sampled_from([None, 1, 5, 40]), chunk=st.sampled_from([3, 64]),
       heads=st.sampled_from([2, 6]), rows=st.integers(1, 3), size=st.sampled_from([1, 60, 2**28]),
       data=st.data())
def test_the_static_cache_equals_the_cache_call_after_call(window, chunk, heads, rows, size, data):
    """Prompts and single tokens in any order, rows that have ended, wraps, and a trimmed chat.

    Masks of different sizes divide the prompts into parts.
    """
    pair = Pair(rows, 60, chunk, sliding_window=window, num_attention_heads=heads)
    for _ in range(data.draw(st.integers(1, 8))):
        longest = data.draw(st.sampled_from([1, 1, 1, 6]))
        ragged = st.lists(st.integers(0, longest), min_size=rows, max_size=rows)
        lengths = data.draw(st.just([longest] * rows) | ragged)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "MASK_SIZE", size)
            pair.call(random_tokens(rows, longest), lengths)
        if data.draw(st.integers(0, 4)) == 0:  # an interrupted turn ends, and the next one begins
            kept = data.draw(st.integers(0, 6))
            for cache in pair.caches:
                cache.positions[cache.positions >= kept] = -1
            pair.read = cuda.reader(pair.models[1], pair.caches[1])


def test_a_step_that_was_interrupted_does_not_count(monkeypatch):
    pair = Pair(2, 20)
    pair.call(random_tokens(2, 3), [3, 2])
    pair.call(random_tokens(2, 1), [1, 1])

    def interrupted(step):
        step.run()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cuda.Step, "replay", interrupted)
        pair.read(random_tokens(2, 1), torch.tensor([1, 1]))
    for _ in range(3):
        pair.call(random_tokens(2, 1), [1, 1])


def test_a_full_cache_is_refused_before_a_step_and_a_text_that_has_ended_takes_none(monkeypatch):
    pair = Pair(1, 4)
    pair.call(random_tokens(1, 3), [3])
    pair.call(random_tokens(1, 1), [1])
    monkeypatch.setattr(cuda.Step, "replay", None)
    pair.read(random_tokens(1, 1), torch.tensor([0]))
    with pytest.raises(ValueError, match="more than its"):
        pair.read(random_tokens(1, 1), torch.tensor([1]))
    assert pair.caches[1].positions.tolist() == [[0, 1, 2, 3]]


def test_logits_stay_as_they_are_when_the_next_token_is_read():
    pair = Pair(1, 20)
    for _ in range(2):
        pair.call(random_tokens(1, 1), [1])
    first = pair.read(random_tokens(1, 1), torch.tensor([1]))
    kept = first.clone()
    pair.read(random_tokens(1, 1), torch.tensor([1]))
    assert torch.equal(first, kept)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 3])
def test_steps_are_replayed_as_one_graph(rows):
    _, fast = model_pair(dtype=torch.bfloat16)
    cache = fast.new_cache(rows, 20, 4)
    read = cuda.reader(fast, cache)
    for _ in range(3):
        read(random_tokens(rows, 1), torch.ones(rows, dtype=torch.int64))
    assert isinstance(cache.step.graph, torch.cuda.CUDAGraph)
    assert (cache.step.kernels is not None) == (rows == 1)


# ---------------------------------------------------------------- all experts


IN_4_BITS = {"group_size": 16, "hidden_size": 32, "intermediate_size": 16}


@settings(max_examples=40, deadline=None)
@given(E=st.integers(1, 6), data=st.data(), rows=st.integers(1, 3), S=st.integers(1, 40),
       changes=st.sampled_from([{}, IN_4_BITS]))
def test_all_experts_on_all_tokens_equal_the_loop(E, data, rows, S, changes):
    A = data.draw(st.integers(1, E))
    plain, fast = model_pair(
        num_local_experts=E, num_experts_per_tok=A, num_hidden_layers=1, **changes)
    x = torch.randn(rows, S, plain.config.hidden_size, dtype=torch.float64, device=DEVICE)
    expected = plain.model.layers[0].block_sparse_moe(x)
    moe = fast.model.layers[0].block_sparse_moe
    assert type(moe) is cuda.MergedMoE
    assert relative_error(moe(x), expected) < 1e-12


def test_a_few_tokens_do_not_wait_for_the_choice_of_experts(monkeypatch):
    def loop(self, x):
        raise AssertionError

    _, fast = model_pair(num_hidden_layers=1)
    monkeypatch.setattr(SparseMoE, "forward", loop)
    moe = fast.model.layers[0].block_sparse_moe
    moe(torch.randn(1, cuda.FEW_TOKENS, 16, dtype=torch.float64, device=DEVICE))
    with pytest.raises(AssertionError):
        moe(torch.randn(1, cuda.FEW_TOKENS + 1, 16, dtype=torch.float64, device=DEVICE))


def test_an_expert_that_was_not_chosen_cannot_spoil_the_sum():
    """Its output for a token that it never sees in training may be infinite."""
    plain, fast = model_pair(num_hidden_layers=1)
    x = torch.ones(1, 1, 16, dtype=torch.float64, device=DEVICE)
    for model in plain, fast:
        moe = model.model.layers[0].block_sparse_moe
        moe.gate.weight[3] = -1  # expert 3 has the smallest logit
        moe.gate.weight[:3].abs_()
        for matrix in moe.experts[3].children():
            matrix.weight.fill_(1e200)  # its products overflow
    result = fast.model.layers[0].block_sparse_moe(x)
    assert relative_error(result, plain.model.layers[0].block_sparse_moe(x)) < 1e-12


@pytest.mark.parametrize("A, changes", [(1, {}), (2, {}), (4, {}), (2, IN_4_BITS)])
def test_many_tokens_run_on_their_own_experts_in_groups(A, changes):
    """In float32, because the grouped product takes no float64; some experts get no token."""
    plain, fast = model_pair(num_experts_per_tok=A, num_hidden_layers=1, **changes)
    x = torch.randn(2, 90, plain.config.hidden_size, device=DEVICE)
    x[..., 0] = 9
    assert x[..., 0].numel() > cuda.FEW_TOKENS
    moe = fast.float().model.layers[0].block_sparse_moe
    moe.w13, moe.w2 = ([part.float() if part.is_floating_point() else part for part in merged]
                       for merged in (moe.w13, moe.w2))
    for model in plain, fast:
        model.model.layers[0].block_sparse_moe.gate.weight[1, 0] = -9  # expert 1 is the last choice
    moe.sorts, loop = True, plain.float().model.layers[0].block_sparse_moe
    assert relative_error(moe(x).double(), loop(x).double()) < 1e-5


# ---------------------------------------------------------------- the prepared model


def test_the_prepared_model_has_the_same_weights_once():
    for changes in {}, IN_4_BITS:
        plain, fast = model_pair(**changes)
        weights = fast.state_dict()
        assert list(weights) == list(plain.state_dict())
        for name, weight in plain.state_dict().items():
            assert torch.equal(weights[name], weight)
        merged = [w for layer in fast.model.layers for w in (
            *layer.self_attn.qkv, *layer.block_sparse_moe.w13, *layer.block_sparse_moe.w2)]
        stored = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes()
                  for w in (*weights.values(), *merged)}
        assert sum(stored.values()) == sum(w.nbytes for w in plain.state_dict().values())


def test_a_prompt_takes_no_mask_until_rows_differ_or_a_key_leaves_the_window(monkeypatch):
    masked, product = [], cuda.attend_masked
    monkeypatch.setattr(cuda, "attend_masked", lambda *args: masked.append(1) or product(*args))
    pair = Pair(2, 40, chunk=64, num_hidden_layers=1, sliding_window=12)
    for length, masks in (6, 0), (6, 0), (2, 1):
        pair.call(random_tokens(2, length), [length, length])
        assert len(masked) == masks
    pair = Pair(2, 40, chunk=64, num_hidden_layers=1, sliding_window=None)
    for lengths, masks in ([6, 6], 1), ([6, 5], 1), ([6, 6], 2):
        pair.call(random_tokens(2, 6), lengths)
        assert len(masked) == masks


def hook_on_a_router(model):
    """As generate.py --experts has one. A graph would replay the kernels without it."""
    calls = []
    model.model.layers[1].block_sparse_moe.gate.register_forward_hook(lambda *_: calls.append(1))
    return calls


def split_over_devices(model):
    model.sharded, calls = True, []
    model.model.layers[0].block_sparse_moe.register_forward_hook(lambda *_: calls.append(1))
    return calls


def experts_that_are_not_alike(model):
    """One in 4 bits beside others in 16."""
    other = small_model(DEVICE, torch.float64, **IN_4_BITS)
    model.model.layers[1].block_sparse_moe.experts[2] = (
        other.model.layers[0].block_sparse_moe.experts[0])


@pytest.mark.parametrize("change", [
    hook_on_a_router, split_over_devices, experts_that_are_not_alike])
def test_without_a_graph_the_modules_run_with_their_hooks(change):
    torch.manual_seed(0)
    plain = small_model(DEVICE, torch.float64, **IN_4_BITS | {"group_size": None})
    calls = change(plain)
    fast = cuda.prepare(copy.deepcopy(plain))
    cache = fast.new_cache(1, 9)
    read, tokens = cuda.reader(fast, cache), random_tokens(1, 4)
    for n in range(4):
        logits = read(tokens[:, n:n + 1], torch.tensor([1]))
        assert relative_error(logits, plain(tokens[:, :n + 1])[:, -1]) < 1e-12
    assert calls is None or len(calls) == 2 * 4  # of both models
    assert not hasattr(cache, "step")


def test_the_kernels_are_for_triton_and_gpus_since_compute_capability_8(monkeypatch):
    capability, found = [(8, 0)], object()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setitem(sys.modules, "fast.kernels", found)
    monkeypatch.setattr(fast, "kernels", found, raising=False)
    assert cuda.triton_kernels(torch.device("cuda")) is found
    assert cuda.triton_kernels(torch.device("cpu")) is None
    capability[0] = (7, 5)
    assert cuda.triton_kernels(torch.device("cuda")) is None
    capability[0] = (9, 0)
    monkeypatch.delattr(fast, "kernels")
    monkeypatch.setitem(sys.modules, "fast.kernels", None)  # its import fails, as without Triton
    assert cuda.triton_kernels(torch.device("cuda")) is None
