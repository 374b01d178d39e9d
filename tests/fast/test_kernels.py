"""Claims about fast/kernels.py and fast/kernels_int4.py.

Without a GPU the kernels run in Triton's interpreter, on the CPU and in float32. With a GPU they
are compiled, and the tests of single kernels also run in bfloat16 and float16.
"""

import copy
import os
import sys

import pytest
import torch
import torch.nn.functional as F

GPU = torch.cuda.is_available()
if not GPU:
    assert "triton" not in sys.modules, "triton must be imported after TRITON_INTERPRET is set"
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
pytest.importorskip("numpy")
pytest.importorskip("fast.kernels")

from gpu import small_model

from fast import cuda, kernels, kernels_int4
from fast.int4 import unpack
from mixtral import RMSNorm, rotate, route, visible

DEVICE = "cuda" if GPU else "cpu"
# The largest error of a kernel, divided by the largest number of its result.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCES) if GPU else [torch.float32]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def randn(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def random_norm(D, dtype):
    norm = RMSNorm(D, eps=1e-5)
    norm.weight.copy_(torch.rand(D) + 0.5)
    return norm.to(DEVICE, dtype)


def random_int4(*shape, G, dtype, seed=0):
    """Words and scales of matrices (..., M, D)."""
    generator = torch.Generator().manual_seed(seed)
    *rows, D = shape
    words = torch.randint(-2**31, 2**31, (*rows, D // 8), generator=generator).to(torch.int32)
    scales = (torch.rand(*rows, D // G, generator=generator) + 0.1) / (4 * D**0.5)
    return words.to(DEVICE), scales.to(DEVICE, dtype)


def random_experts(*shape, G, dtype, seed=0):
    """Matrices (E, M, D) as the kernels take them, perhaps in 4 bits, and as one tensor."""
    if G is None:
        whole = randn(*shape, dtype=dtype, seed=seed) / shape[-1]**0.5
        return [whole], whole
    stored = random_int4(*shape, G=G, dtype=dtype, seed=seed)
    assert kernels_int4.fits(*stored)
    return stored, torch.stack([unpack(*each) for each in zip(*stored, strict=True)])


def assert_close(result, expected, dtype, tolerance=1.0):
    error = (result - expected).abs().max() / expected.abs().max()
    assert result.shape == expected.shape
    assert error <= tolerance * TOLERANCES[dtype], f"{error:.1e}"  # false for NaN


# ---------------------------------------------------------------- whole steps


@pytest.fixture
def with_kernels(monkeypatch):
    monkeypatch.setattr(cuda, "triton_kernels", lambda device: kernels)


@pytest.mark.parametrize("changes", [
    {"sliding_window": 5, "num_key_value_heads": 2},
    {"num_attention_heads": 2, "num_experts_per_tok": 1, "head_dim": 6},
    {"sliding_window": 5, "num_attention_heads": 4, "num_key_value_heads": 1,
     "num_experts_per_tok": 3},
    {"group_size": 32, "hidden_size": 128, "intermediate_size": 128},
    {"group_size": 64, "hidden_size": 128, "intermediate_size": 128, "sliding_window": 5,
     "num_experts_per_tok": 3},
], ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()))
def test_twenty_steps_equal_the_plain_model(with_kernels, changes):
    """Windows, wraps of the rolling buffer, query heads per key head, experts per token, 4 bits."""
    torch.manual_seed(0)
    plain = small_model(DEVICE, torch.float32, **changes)
    fast = cuda.prepare(copy.deepcopy(plain))
    caches = [model.new_cache(1, 27, chunk=2) for model in (plain, fast)]
    read = cuda.reader(fast, caches[1])
    for length in [7] + [1] * 20:
        tokens, lengths = torch.randint(16, (1, length), device=DEVICE), torch.tensor([length])
        expected = plain(tokens, caches[0], lengths, last_only=True)[:, 0]
        assert_close(read(tokens, lengths), expected, torch.float32, tolerance=5)
        assert torch.equal(caches[0].positions, caches[1].positions)
    assert caches[1].step.kernels is kernels
    for name in ("keys", "values"):
        assert_close(getattr(caches[1], name), getattr(caches[0], name), torch.float32)


@pytest.mark.parametrize("change", ["float64", "attention", "one layer"])
def test_other_models_take_the_batch_path(with_kernels, change):
    """In float64, or with layers in 4 bits where the kernels expect 16, or the reverse."""
    sizes = {"group_size": 32, "hidden_size": 128, "intermediate_size": 128}
    model = small_model(DEVICE, torch.float64 if change == "float64" else torch.float32, **sizes)
    layer = model.model.layers[1]
    if change == "attention":
        layer.self_attn.o_proj = copy.deepcopy(layer.block_sparse_moe.experts[0].w1)
    if change == "one layer":
        other = small_model(DEVICE, torch.float32, **sizes | {"group_size": None})
        layer.block_sparse_moe = other.model.layers[1].block_sparse_moe
    assert cuda.chosen_kernels(cuda.prepare(model)) == (None, None)
    expected = unpack if change == "float64" else kernels_int4.unpack
    assert model.model.layers[0].block_sparse_moe.unpack is expected


# ---------------------------------------------------------------- kernel by kernel


@pytest.mark.parametrize("D", [24, 192])
def test_norm(D, dtype):
    x, norm = randn(D, dtype=dtype), random_norm(D, dtype)
    assert_close(kernels.norm(x, norm), norm(x), dtype)


@pytest.mark.parametrize("R, n", [(12, 192), (7, 40), (1, 3), (8, 2048 + 64)])
def test_product_reads_every_row_and_every_column(R, n, dtype):
    w, x, add = randn(R, n, dtype=dtype), randn(n, dtype=dtype, seed=1), randn(R, dtype=dtype)
    assert_close(kernels.product(w, x), F.linear(x, w), dtype)
    assert_close(kernels.product(w, x, add), add + F.linear(x, w), dtype)


@pytest.mark.parametrize("H, K, d", [(6, 2, 8), (4, 4, 6), (4, 1, 10)])
def test_rotate_stores_the_key_and_the_value_in_their_slot_and_nowhere_else(H, K, d, dtype):
    qkv = randn((H + 2 * K) * d, dtype=dtype)
    angles = randn(d // 2, dtype=torch.float32)
    keys, values = randn(2, 5, K, d, dtype=dtype)
    stored_keys, stored_values = keys.clone(), values.clone()
    slot = torch.tensor([3], device=DEVICE)
    q = kernels.rotate(qkv, angles.cos(), angles.sin(), slot, stored_keys, stored_values, H)
    heads = qkv.view(1, 1, -1, d)
    turned = rotate(heads[:, :, :H + K], angles.cos(), angles.sin())[0, 0]
    keys[3], values[3] = turned[H:], heads[0, 0, H + K:]
    assert_close(q, turned[:H], dtype)
    assert_close(stored_keys, keys, dtype)
    assert torch.equal(stored_values, values)


@pytest.mark.parametrize("H, K, d, C, W", [
    (6, 2, 8, 70, None), (4, 4, 6, 70, 5), (4, 1, 24, 200, 64),
    (8, 8, 4, 2100, None),  # a share has more slots than a tile
])
def test_attend_sees_the_slots_in_the_window_and_no_others(H, K, d, C, W, dtype):
    """The buffer has wrapped; slots that must not be seen hold NaN."""
    now = C + 30
    positions = torch.arange(C, device=DEVICE)
    positions[:31] += C  # positions C … C + 30 in slots 0 … 30
    positions[40:50] = -1
    positions[60] = now + 5
    q, (keys, values) = randn(1, 1, H, d, dtype=dtype), randn(2, 1, C, K, d, dtype=dtype)
    mask = visible(torch.tensor([[now]], device=DEVICE), positions[None], W)[:, None]
    expected = cuda.attend_masked(q, keys, values, mask)[0, 0]
    hidden = ~mask[0, 0, 0]
    keys[0, hidden], values[0, hidden] = float("nan"), float("nan")
    at = torch.tensor([now], device=DEVICE)
    assert_close(kernels.attend(q[0, 0], keys[0], values[0], positions, at, W), expected, dtype)


@pytest.mark.parametrize("E, A", [(8, 2), (6, 3), (3, 1), (4, 4)])
@pytest.mark.parametrize("logits", ["negative", "equal"])
def test_route(E, A, dtype, logits):
    """Two rows of zeros have equal logits, without a rounding error. The first of them wins."""
    D = 40
    x, gate, norm = randn(D, dtype=dtype), randn(E, D, dtype=dtype, seed=1), random_norm(D, dtype)
    y = norm(x)
    if logits == "equal":
        gate[0] = gate[E // 2] = 0
    else:
        gate -= 20 / (y @ y) * y
    result, chosen, share = kernels.route(x, norm, gate, A)
    weights, experts = route(F.linear(y, gate)[None], A)
    assert_close(result, y, dtype)
    assert chosen.tolist() == experts[0].tolist()
    assert_close(share, weights[0], dtype)


def test_route_chooses_experts_that_exist_for_logits_that_are_not_numbers(dtype):
    """An expert that does not exist would make the next kernel read memory of others."""
    x, gate, norm = randn(8, dtype=dtype), randn(3, 8, dtype=dtype), random_norm(8, dtype)
    x[0] = float("nan")
    assert set(kernels.route(x, norm, gate, 2)[1].tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("D, M, G", [
    (40, 24, None), (192, 320, None), (7, 5, None), (128, 768, 32), (128, 768, 64),
    (128, 768, 128),  # with 768, the rows of down are several tiles long, so that they are split
])
def test_gate_up_and_down_read_the_chosen_experts(D, M, G, dtype):
    (ops, tolerance), x = (kernels_int4, 2) if G else (kernels, 1), randn(D, dtype=dtype)
    stored13, w13 = random_experts(5, 2 * M, D, G=G, dtype=dtype)
    stored2, w2 = random_experts(5, D, M, G=G, dtype=dtype, seed=1)
    chosen = torch.tensor([4, 1, 2], dtype=torch.int32, device=DEVICE)
    share = torch.tensor([0.5, 0.3, 0.2], device=DEVICE)
    gate, up = (w13[chosen.long()] @ x).chunk(2, dim=1)
    h = F.silu(gate) * up
    assert_close(ops.gate_up(x, chosen, *stored13), h, dtype, tolerance)
    outputs = (w2[chosen.long()] @ h[:, :, None])[:, :, 0]
    expected = x + (share[:, None] * outputs).sum(0).to(dtype)
    assert_close(ops.down(h, chosen, share, x, *stored2), expected, dtype, tolerance)


@pytest.mark.parametrize("G", [4, 8, 32, 256])  # of 4, a word has weights of two groups
def test_unpack_gives_the_weights_of_int4_to_the_last_bit(G, dtype):
    packed, scale = random_int4(5, 512, G=G, dtype=dtype)
    assert torch.equal(kernels_int4.unpack(packed, scale), unpack(packed, scale))


def test_sizes_that_no_tile_divides_are_left_to_the_batch_path():
    for G, n, fits in ((32, 128, True), (32, 192, False), (96, 384, False), (1024, 1024, False),
                       (12, 384, False), (4, 128, False)):
        words, scale = torch.empty(2, 8, n // 8), torch.empty(2, 8, n // G)
        assert kernels_int4.fits(words, scale) == fits
