"""4-bit checkpoints for the tests: written, read bit by bit, and loaded without tuned layers."""

import torch
from conftest import save

from convert import write_safetensors
from fast.int4 import pack, quantise, scheme_of, use_int4
from mixtral import Mixtral, MixtralConfig, assemble, read_json, read_weights


def in_4_bits(name, weight, G, dtype):
    """The three tensors of a matrix in 4 bits by name, with scales of this dtype."""
    q, scale = quantise(weight.float(), G, dtype)
    return {f"{name}_packed": pack(q), f"{name}_scale": scale,
            f"{name}_shape": torch.tensor(weight.shape)}


def save_int4(model, directory, G):
    """Write a model with its experts in 4 bits, in groups of G and with scales of its dtype."""
    tensors = {}
    for name, weight in model.state_dict().items():
        tensors |= in_4_bits(name, weight, G, weight.dtype) if ".experts." in name else {
            name: weight}
    save(model, directory, quantization_config=scheme_of(G))
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def load(directory, dtype=None):
    """The model of a checkpoint with 4-bit layers as they are in fast/int4.py."""
    raw, weights = read_json(directory / "config.json"), read_weights(directory)
    weights = {name: weight.to(dtype if weight.is_floating_point() else None)
               for name, weight in weights.items()}
    return assemble(MixtralConfig.from_dict(raw), weights,
                    lambda model: use_int4(model, raw["quantization_config"], weights))


def dequantised(directory):
    """The float64 weights that a 4-bit checkpoint stands for, by name, read bit by bit."""
    weights, tensors = {}, read_weights(directory)
    for name, tensor in tensors.items():
        if name.endswith("_packed"):
            base = name.removesuffix("_packed")
            rows = [[(word >> 4 * i) % 16 - 8 for word in row for i in range(8)]
                    for row in tensor.tolist()]
            scale = tensors[f"{base}_scale"].double()
            G = len(rows[0]) // scale.shape[1]
            weights[base] = torch.tensor(rows).double() * scale.repeat_interleave(G, dim=1)
        elif not name.endswith(("_scale", "_shape")):
            weights[name] = tensor.double()
    return weights


def dequantised_model(directory):
    """The float64 model of the weights that a 4-bit checkpoint stands for."""
    model = Mixtral(MixtralConfig.from_dict(read_json(directory / "config.json")))
    model.double().eval().requires_grad_(False).load_state_dict(dequantised(directory))
    return model
