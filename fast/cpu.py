"""Which of PyTorch's products is fastest for which shape? A model tuned for this CPU.

A linear layer can be computed by several functions of PyTorch, and which one is the fastest depends
on the number of rows of x, the dtype of the weights, their size and the CPU. A row is a token. The
decode of one text has one row, and an expert gets a part of the rows of its layer.

    rows    weights                                 product
    1       16-bit                                  torch.mv, with oneDNN on or off
    1       float32 or float64, small               elementwise product and sum
    >= 5    16-bit, not multiplied by this CPU      as in float32, on blocks of widened weights
    any     float32, large                          oneDNN
    any     all others                              F.linear

The results differ from those of F.linear by rounding only. Where nothing else is said, ratios of
times were measured on 2 cores of an AMD EPYC with AVX-512, and with it restricted to AVX2.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fast.int4 import Int4Linear, TunedInt4Linear, repack
from mixtral import at_least_float32, attend

# Weights below this number of elements are small. For 3584 × 1024 and 1024 × 3584, oneDNN takes 0.4
# to 0.9 of the time of F.linear with 1 to 128 rows; for small ones it takes longer.
SMALL_WEIGHT = 2**18
HAS_AMX = torch.cpu._is_amx_tile_supported()
# From this number of rows on, widening 16-bit weights to float32 pays on a CPU that multiplies
# float32 five times as fast. With 8 rows it takes 0.6 to 0.8 of the time, with 16 rows 0.5.
WIDEN_ROWS = 5
# So many weights are widened at a time, to reuse 16 MB of memory instead of filling more of it.
WIDENED_WEIGHTS = 2**22


def tune(model, may_copy=True):
    """Make a model fast on this CPU; returns the model.

    4-bit weights are copied, which needs their size again in memory; without `may_copy` they stay
    as they are.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Int4Linear)]
    if may_copy and layers and all(map(TunedInt4Linear.fits, layers)):
        repack(model)
    for module in model.modules():
        if type(module) is nn.Linear and torch.backends.mkldnn.is_available():
            module.__class__ = TunedLinear
    for layer in model.model.layers:
        layer.self_attn.attend = attend_as_rows
    return model


class TunedLinear(nn.Linear):
    """A linear layer that uses the fastest of PyTorch's products for its shape on this CPU."""

    def forward(self, x):
        weight, rows = self.weight, x.numel() // self.in_features
        narrow = weight.dtype.itemsize < 4
        if rows == 1 and narrow:
            return matrix_vector_product(weight, x)
        if rows == 1 and weight.numel() < SMALL_WEIGHT:
            return (weight * x.reshape(-1)).sum(dim=-1).view(*x.shape[:-1], -1)
        if narrow and rows >= WIDEN_ROWS and not has_arithmetic(weight.dtype):
            return widened_product(weight, x)
        return product(weight, x)


def product(weight, x):
    """F.linear(x, weight), by oneDNN for large float32 weights if no gradient is needed.

    On the Xeon with AMX, oneDNN takes 0.65 to 0.9 of the time from 4 rows on, but 1.1 to 1.4 times
    as long for 1 or 2.
    """
    few = HAS_AMX and x.numel() <= 2 * x.shape[-1]
    if (few or weight.dtype != torch.float32 or weight.numel() < SMALL_WEIGHT
            or x.requires_grad or weight.requires_grad):
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def matrix_vector_product(weight, x):
    """F.linear(x, weight) for one row and 16-bit weights.

    PyTorch's own kernel takes 0.5 to 0.6 of oneDNN's time on the EPYC. On an Intel Xeon with AMX,
    oneDNN's takes 0.6 to 0.7 of the time of PyTorch's for large weights in bfloat16, because it
    reads memory faster. But it takes 25 µs longer to start, so for 384 × 192 it takes twice as
    long, and in float16 it takes 1.4 to 1.8 times as long.
    """
    enabled, large = torch.backends.mkldnn.enabled, weight.numel() > SMALL_WEIGHT
    try:
        torch.backends.mkldnn.enabled = HAS_AMX and large and weight.dtype == torch.bfloat16
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    finally:
        torch.backends.mkldnn.enabled = enabled


def widened_product(weight, x):
    """F.linear(x, weight), computed in float32 and rounded to the dtype of x."""
    outputs = max(WIDENED_WEIGHTS // weight.shape[1] // 64, 1) * 64  # of one block of weights
    wide = at_least_float32(x)
    blocks = [product(at_least_float32(block), wide) for block in weight.split(outputs)]
    return torch.cat(blocks, dim=-1).to(x.dtype)


def has_arithmetic(dtype):
    """Whether oneDNN multiplies matrices of this 16-bit dtype on this CPU."""
    return (torch.ops.mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else
            torch.ops.mkldnn._is_mkldnn_fp16_supported())


def attend_as_rows(q, k, v, mask):
    """`attend`, which for one token reads each key once instead of H/K times.

    q (B, S, H, d), k (B, T, K, d), v (B, T, K, d), mask (B, 1, S, T) -> (B, S, H·d)

    The H/K query heads that share a key/value head become H/K rows of one head. They belong to the
    same token, so they see the same keys and the mask needs no change. For more tokens `attend` is
    as fast.
    """
    (B, S, H, d), K = q.shape, k.shape[2]
    if S > 1:
        return attend(q, k, v, mask)
    q, k, v = q.view(B, K, H // K, d), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, mask).view(B, 1, H * d)
