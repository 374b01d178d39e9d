"""The model of mixtral.py made quick on this machine. generate.py calls the functions of this file.

This folder is optional. Without it generate.py computes the same numbers, slower, in 16 bits or
more and on one device.
"""

import sys

import torch
import torch.distributed as dist

from fast import cpu, cuda, int4, memory, ranks
from mixtral import MixtralConfig, assemble


def build(raw, weights, dtype=None, device="cpu"):
    """The model of a config.json with weights mapped from disk, made quick for its device.

    With dtype None the weights keep their dtype, and on a CPU they stay mapped from disk. If
    torch.distributed is initialised, this rank builds its share of the model. Raises ValueError if
    the device is not usable, or the weights fit neither config.json nor the memory, or cannot be
    divided.
    """
    check_device(device)
    if dist.is_initialized():
        raw, weights = ranks.shard(raw, weights, dist.get_rank(), dist.get_world_size())
    device = memory.choose_device(weights, dtype) if device == "auto" else device
    kind, scheme = torch.device(device).type, raw.get("quantization_config")
    if torch.device(device).index is not None and kind == "cuda":
        torch.cuda.set_device(device)
    fits = memory.check_weights(weights, dtype, device)
    weights = converted(weights, dtype, device)

    def adapt(model):
        if scheme is not None:
            int4.use_int4(model, scheme, weights)

    model = assemble(MixtralConfig.from_dict(raw), weights, adapt)
    weights.clear()  # so that `tune` can release each weight that it replaces
    if kind == "cpu":
        cpu.tune(model, may_copy=fits)
    elif kind == "cuda":
        cuda.prepare(model)
    return ranks.reduce_outputs(model) if dist.is_initialized() else model


def check_device(device):
    """Raises ValueError unless tensors can be made on the device and read back."""
    try:
        torch.zeros(1, device="cpu" if device == "auto" else device).item()
    except Exception as error:  # its type depends on the device
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} is not usable here: {reason}") from None


def converted(weights, dtype, device):
    """The weights on a device, floats also in a dtype; a terminal sees how far this has come."""
    result, done, total = {}, 0, sum(weight.nbytes for weight in weights.values())
    for name, weight in weights.items():
        result[name] = weight.to(device, dtype if weight.is_floating_point() else None)
        done += weight.nbytes
        if sys.stderr.isatty():
            print(f"\r[{done / 1e9:.1f} of {total / 1e9:.1f} GB loaded]",
                  end="" if done < total else "\r\x1b[K", file=sys.stderr, flush=True)
    return result


def reader(model, cache):
    """A function read(tokens, lengths) that gives the logits after the last token of each row.

    It takes tokens (B, S) and lengths (B), and returns (B, V).
    """
    if cache.keys.is_cuda:
        return cuda.reader(model, cache)

    def read(tokens, lengths):
        return model(tokens, cache, lengths, last_only=True)[:, 0]

    return read
