"""What is a 4-bit weight? Temporary: moved here unchanged from mixtral.py."""

import torch
import torch.nn.functional as F
from torch import nn


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights: w[r, c] = (u[r, c] − 8) · scale[r, c // G], 0 ≤ u ≤ 15.

    (..., D) -> (..., M)

    For w2, exchange D and M. This is the format `pack-quantized` of compressed-tensors. G
    neighbouring weights of a row share one scale. A 32-bit word stores eight numbers u, the first
    in the lowest bits. Word j of a row holds the columns 8j … 8j + 7:

        bits   31…28  27…24  23…20  19…16  15…12  11…8   7…4    3…0
        holds   u₇     u₆     u₅     u₄     u₃     u₂     u₁     u₀
    """

    def __init__(self, inputs, outputs, group_size):
        super().__init__()
        self.register_buffer("weight_packed", torch.empty(outputs, inputs // 8, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.empty(outputs, inputs // group_size))
        self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64))

    def forward(self, x):
        return F.linear(x, unpack(self.weight_packed, self.weight_scale))


def unpack(packed, scale):
    """The weights that packed 32-bit words and their scales encode, in the dtype of the scales.

    packed (M, D/8), scale (M, D/G) -> (M, D)

    If the scales have been converted to float64, the products (u − 8)·scale are exact, because
    u − 8 has at most 3 significant bits, and a scale stored in float32 or less has at most 24.

    >>> unpack(torch.tensor([[0x76543210]], dtype=torch.int32), torch.tensor([[0.5]])).tolist()
    [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]]
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    u = ((packed[:, :, None] >> shifts) & 15).reshape(*scale.shape, -1)  # (M, D/G, G)
    return ((u - 8) * scale[:, :, None]).flatten(1)


def use_int4(model, raw, weights):
    """Replace each layer stored in 4 bits by an Int4Linear. Raises ValueError for other formats."""
    scheme = raw.get("quantization_config")
    if scheme is None:
        return
    G = int4_group_size(scheme)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and f"{name}.weight_packed" in weights:
            outputs, inputs = layer.weight.shape
            packed, shape = weights[f"{name}.weight_packed"], weights.get(f"{name}.weight_shape")
            if packed.dtype != torch.int32:
                raise ValueError(f"{name}.weight_packed must be torch.int32, got {packed.dtype}")
            if shape is None or shape.tolist() != [outputs, inputs] or inputs % G:
                found = "none" if shape is None else shape.tolist()
                raise ValueError(f"{name}.weight_shape must be [{outputs}, {inputs}], the last a "
                                 f"multiple of the group size {G}, got {found!s:.80}")
            model.set_submodule(name, Int4Linear(inputs, outputs, G))


def int4_group_size(scheme):
    """The group size G of a quantization_config. Raises ValueError unless Int4Linear reads it."""
    scheme = scheme if isinstance(scheme, dict) else {"quant_method": scheme}
    groups = scheme.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    group = groups[0] if groups and isinstance(groups[0], dict) else {}
    weights = group.get("weights") if isinstance(group.get("weights"), dict) else {}
    activations = group.get("input_activations") or group.get("output_activations")
    for name, wanted, found in (
            ("quant_method", "compressed-tensors", scheme.get("quant_method")),
            ("format", "pack-quantized", scheme.get("format")),
            ("transform_config", None, scheme.get("transform_config") or None),
            ("the number of config_groups", 1, len(groups)), ("activations", None, activations),
            ("num_bits", 4, weights.get("num_bits")), ("type", "int", weights.get("type")),
            ("symmetric", True, weights.get("symmetric")),
            ("strategy", "group", weights.get("strategy")),
            ("actorder", None, weights.get("actorder"))):
        if found != wanted:
            raise ValueError(f"config: quantization_config: {name} must be {wanted!r}, got "
                             f"{found!r:.80}; no other quantised format is supported")
    G = weights.get("group_size")
    if type(G) is not int or G < 8 or G % 8:
        raise ValueError(f"config: group_size must be a multiple of 8, got {G!r:.80}")
    return G
