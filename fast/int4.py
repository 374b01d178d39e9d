"""What is a 4-bit weight? A small integer, times a scale that it shares with its neighbours.

Four bits take a quarter of the memory of 16, but they tell only 16 values apart, which is too few
for the weights of a whole matrix. So every G neighbouring weights of a row share a scale, and a
weight is a small multiple of its scale:

    w[r, c] = q[r, c] · scale[r, c // G],    q an integer in −8 … 7

With G = 128 and scales of 16 bits, this costs 4 + 16/128 = 4.125 bits for each weight. The experts
hold 97 % of the weights of Mixtral 8x7B, and every token reads a quarter of them. The rest stays in
16 bits, because it is small, and because rounding should not change the router's choices.

The format is the one that compressed-tensors calls `pack-quantized`, which transformers and vLLM
read as well. A matrix `X.weight` of M rows and D columns becomes three tensors:

    X.weight_packed   int32, (M, D/8)   eight integers u = q + 8 in each word
    X.weight_scale    floats, (M, D/G)
    X.weight_shape    int64, (2)        M and D

A word holds eight neighbours of a row, the first in its lowest bits. Word j of a row has the
columns 8j … 8j + 7:

    bits   31…28  27…24  23…20  19…16  15…12  11…8   7…4    3…0
    holds   u₇     u₆     u₅     u₄     u₃     u₂     u₁     u₀

The letters are those of mixtral.py.
"""

import torch
import torch.nn.functional as F
from torch import nn


def pack(q):
    """Store eight neighbouring integers in −8 … 7 in each 32-bit word; `unpack` reads them.

    (M, D) -> (M, D/8)

    >>> f"{pack(torch.arange(-8, 0)[None]).item():x}"
    '76543210'
    """
    u = (q + 8).to(torch.int32).unflatten(1, (-1, 8))
    words = u[:, :, 7]
    for n in range(6, -1, -1):
        words = words << 4 | u[:, :, n]
    return words


def unpack(packed, scale):
    """The weights (u − 8)·scale, rounded to the dtype of the scales.

    packed (M, D/8), scale (M, D/G) -> (M, D)

    >>> unpack(torch.tensor([[0x76543210]], dtype=torch.int32), torch.tensor([[0.5]])).tolist()
    [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]]
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    u = ((packed[:, :, None] >> shifts) & 15).reshape(*scale.shape, -1)  # (M, D/G, G)
    return ((u - 8) * scale[:, :, None]).flatten(1)


PIECE = 2**17  # weights to convert at a time, so that they stay in the cache of the CPU


def unpacked_exactly(packed, scale):
    """Yield the weights in float64, some rows at a time. There the products are exact, because
    u − 8 has at most 3 significant bits, and a scale of float32 or less has at most 24.
    """
    rows = max(1, PIECE // (8 * packed.shape[1]))
    for words, scales in zip(packed.split(rows), scale.split(rows), strict=True):
        yield unpack(words, scales.double())


# ------------------------------------------------------------------ quantising

GROUP_SIZES = (32, 64, 128, 256)  # those that other programs have fast kernels for
# The values of c in the equation of `quantise`. On the embedded model in groups of 32 they leave a
# relative error of the weights of 8.8 %; c = 7.5 alone leaves 9.6 %, and steps of 0.5 leave 8.9 %.
DIVISORS = [n / 4 for n in range(27, 37)]


def quantise(weight, G, dtype, divisors=DIVISORS):
    """Round every group of G weights of a row to multiples q·s of a scale s, with −8 ≤ q ≤ 7.

    weight (M, D) -> (M, D), (M, D/G)

        s = max|w| / c, rounded to dtype        q = clamp(round(w / s), −8, 7)

    Each group takes the c with the least squared error Σ(w − q·s)². A larger c clips the largest
    weights and rounds all others more finely. The second result holds the scales.
    """
    groups = weight.unflatten(1, (-1, G))  # (M, D/G, G)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    best = least = None
    for divisor in divisors:
        scale = (largest / divisor).to(dtype).to(weight.dtype)
        scale.masked_fill_(scale == 0, 1)  # a group of zeros
        q = (groups / scale).round_().clamp_(-8, 7)
        error = (groups - q * scale).square_().sum(dim=-1, keepdim=True)
        best, least = (scale, error) if best is None else (
            torch.where(error < least, scale, best), torch.minimum(error, least))
    q = (groups / best).round_().clamp_(-8, 7)
    return q.flatten(1), best[:, :, 0].to(dtype)


def compress(weight, G, dtype):
    """The words and the scales of a matrix, and the sums Σ(w − q·s)² and Σw² over its weights.

    weight (M, D) -> (M, D/8), (M, D/G)

    The scales have the given dtype and are found in float32. Raises ValueError if a scale is NaN or
    infinite, as it is for a group with a weight that is.
    """
    words, scales, error, size = [], [], 0.0, 0.0
    for rows in weight.split(max(1, PIECE // weight.shape[1])):
        rows = rows.float()
        q, scale = quantise(rows, G, dtype)
        if not scale.isfinite().all():
            raise ValueError(f"holds NaN or numbers too large for 4 bits with scales of {dtype}")
        words.append(pack(q))
        scales.append(scale)
        rounded = (q.unflatten(1, (-1, G)) * scale[:, :, None]).flatten(1)
        error += (rows - rounded).square().sum().item()
        size += rows.square().sum().item()
    return torch.cat(words), torch.cat(scales), error, size


def check_group_size(G, config):
    """Raises ValueError unless the experts of a model can be stored in groups of G."""
    D, M = config.hidden_size, config.intermediate_size
    fitting = [n for n in GROUP_SIZES if D % n == 0 and M % n == 0]
    if G not in fitting:
        raise ValueError(f"groups of {G} do not fit hidden_size {D} and intermediate_size {M}; the "
                         f"group size can be {' or '.join(map(str, fitting)) or 'nothing'} here")


# ------------------------------------------------------------------ config.json and models


def scheme_of(G):
    """The quantization_config with which transformers and vLLM read 4-bit experts."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": G}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"]}


def check_scheme(scheme):
    """Raises ValueError if a quantization_config announces weights that mean something else.

    Which matrices have 4 bits, and in groups of which size, is seen in the tensors themselves.
    """
    def check(part, **fields):
        for name, wanted in fields.items():
            if (part.get(name) or None) not in wanted:
                raise ValueError(
                    f"config: quantization_config: {name} is {part.get(name)!r:.80}; of all "
                    "quantised formats only pack-quantized of compressed-tensors loads, with "
                    f"{name} {' or '.join(map(repr, wanted))}; if the weights have 16 bits, remove "
                    "quantization_config")

    try:
        check(scheme, quant_method=["compressed-tensors"], format=["pack-quantized"],
              transform_config=[None])
        for group in scheme["config_groups"].values():
            check(group, input_activations=[None], output_activations=[None])
            # With actorder "static", which is also called "weight", the columns were rounded in
            # another order but stored as always. With "group" those of a group are scattered.
            check(group["weights"], num_bits=[4], type=["int"], symmetric=[True],
                  strategy=["group"], actorder=[None, "static", "weight"])
    except (AttributeError, KeyError, TypeError):
        raise ValueError("config: quantization_config: config_groups must be an object as "
                         "compressed-tensors writes it") from None


def check_embeddings(names):
    """Raises ValueError if the embedding or the output projection has 4 bits."""
    for name in ("model.embed_tokens", "lm_head"):
        if f"{name}.weight_packed" in names:
            raise ValueError(f"{name} in 4 bits is not supported; convert with --dtype bfloat16")


def group_size(name, columns, tensors):
    """G of the matrix `name`, from its words and scales in the dict `tensors`.

    Raises ValueError unless both have the right dtype and divide the columns evenly.
    """
    packed, scale = tensors[f"{name}_packed"], tensors.get(f"{name}_scale")
    is_matrix = scale is not None and scale.is_floating_point() and scale.ndim == 2
    groups = scale.shape[1] if is_matrix else 0
    if packed.dtype != torch.int32 or columns % 8 or not groups or columns % groups:
        raise ValueError(f"{name}_packed must be of torch.int32 and {name}_scale a matrix of "
                         f"floats, whose columns divide the {columns} weights of a row evenly")
    return columns // groups


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights, which are unpacked in each call.

    (..., D) -> (..., M)

    For w2, exchange D and M.
    """

    def __init__(self, inputs, outputs, group_size):
        super().__init__()
        self.register_buffer("weight_packed", torch.empty(outputs, inputs // 8, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.empty(outputs, inputs // group_size))
        self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64))

    def forward(self, x):
        return F.linear(x, unpack(self.weight_packed, self.weight_scale))


def use_int4(model, scheme, weights):
    """Replace each linear layer that the dict `weights` holds in 4 bits by an Int4Linear.

    `scheme` is the quantization_config of config.json. The new layers have no numbers yet. Wrong
    shapes, zero points and anything else unknown are left for `load_state_dict` to refuse. Raises
    ValueError for another quantised format.
    """
    check_scheme(scheme)
    check_embeddings(weights)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and f"{name}.weight_packed" in weights:
            outputs, inputs = layer.weight.shape
            with layer.weight.device:
                G = group_size(f"{name}.weight", inputs, weights)
                model.set_submodule(name, Int4Linear(inputs, outputs, G))


# ------------------------------------------------------------------ PyTorch's kernel for CPUs


class TunedInt4Linear(nn.Module):
    """A 4-bit layer repacked for PyTorch's CPU kernel, which takes bfloat16 only.

    (..., D) -> (..., M)

    Compared with bfloat16, a model decodes 1.4 times as fast on an EPYC with AVX-512, 0.85 times as
    fast if that CPU is restricted to AVX2, and 1.2 times as fast on an EPYC without AVX-512. The
    kernel is used for any number of rows: up to 64 it is faster than a product with unpacked
    weights, and for 256 rows, twice what an expert gets of a chunk of 512 tokens, it takes 1.2
    times as long.
    """

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight_scale
        u = unpack(layer.weight_packed, torch.ones_like(scale)).int() + 8
        self.group_size = u.shape[1] // scale.shape[1]
        self.packed = nn.Buffer(torch._convert_weight_to_int4pack_for_cpu(u, 1))
        scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), dim=-1)
        self.scale_and_zero = nn.Buffer(scale_and_zero.transpose(0, 1).contiguous())

    @staticmethod
    def fits(layer):
        """Whether the kernel takes a layer of these sizes and of this dtype."""
        (outputs, words), groups = layer.weight_packed.shape, layer.weight_scale.shape[1]
        return (layer.weight_scale.dtype == torch.bfloat16 and outputs % 16 == 0
                and 8 * words // groups in GROUP_SIZES)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.packed, self.group_size, self.scale_and_zero)
        return y.view(*x.shape[:-1], -1)


def repack(model):
    """Replace 4-bit layers one by one, and copy the other weights, so that no file stays mapped."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, Int4Linear):
                setattr(parent, name, TunedInt4Linear(layer))
    for weight in model.parameters():
        weight.data = weight.data.clone()
