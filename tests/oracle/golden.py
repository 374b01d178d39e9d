"""Make the golden vectors beside this file: `python tests/oracle/golden.py [DIRECTORY]`.

A golden file is a trace as `generate.py --trace` writes it, and the weights that it was made of,
under the names that end in `.weight`. All numbers come from tests/reference.py, plain Python floats
without torch; weights are drawn by Python's own generator, so that a second run writes the same
bytes up to the last bits of the machine's exp, cos and sin.

The metadata hold, besides a trace's: `case`, what the file is about; `chunk`, in which size the
prompt should be fed to a cache (0: at once, without one); `lengths`, the real tokens of each row;
`weights_sha256`, over the weights' bytes in the order of their names.
"""

import hashlib
import json
import math
import random
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import reference

BASE = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 8,
        "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
CASES = {
    "plain": ("no window, two of eight experts, three query heads to a key head", {}, [14], 0, 8),
    "window": ("a window of 5 under 14 tokens, rope_theta 100",
               {"sliding_window": 5, "rope_theta": 100.0}, [14], 0, 8),
    "one_expert": ("one expert of four, as many key heads as query heads",
                   {"num_experts_per_tok": 1, "num_local_experts": 4, "num_key_value_heads": 6},
                   [11], 0, 8),
    "three_experts": ("three experts of five, one key head, wide heads, a large epsilon",
                      {"num_experts_per_tok": 3, "num_local_experts": 5, "head_dim": 10,
                       "num_key_value_heads": 1, "rms_norm_eps": 1e-2}, [11], 0, 8),
    "ragged": ("rows of 9, 4 and 1 tokens in one batch, padded on the right",
               {"sliding_window": 3}, [9, 4, 1], 0, 8),
    "chunked": ("17 tokens through a rolling buffer, 4 at a time, window 5: two wraps",
                {"sliding_window": 5}, [17], 4, 8),
    "bfloat16": ("weights that bfloat16 holds; the trace is exact, float64",
                 {"sliding_window": 5}, [14], 0, 2)}
AXES_OF_ROWS = ("embed_tokens", "residual", "lm_head", "norm")  # of a ragged batch, with no axis N


def shapes(c):
    """The names and shapes of a checkpoint's tensors."""
    D, F, d, E = (c[f] for f in ("hidden_size", "intermediate_size", "head_dim",
                                 "num_local_experts"))
    H, K = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    yield "model.embed_tokens", (c["vocab_size"], D)
    for n in range(c["num_hidden_layers"]):
        at = f"model.layers.{n}."
        for name, shape in (("q", (H, D)), ("k", (K, D)), ("v", (K, D)), ("o", (D, H))):
            yield f"{at}self_attn.{name}_proj", shape
        yield at + "input_layernorm", (D,)
        yield at + "post_attention_layernorm", (D,)
        yield at + "block_sparse_moe.gate", (E, D)
        for e in range(E):
            for name, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
                yield f"{at}block_sparse_moe.experts.{e}.{name}", shape
    yield "model.norm", (D,)
    yield "lm_head", (c["vocab_size"], D)


def rounded(x, size):
    """The nearest bfloat16 where size is 2, ties to even; else the number itself."""
    if size == 8:
        return x
    [bits] = struct.unpack("<I", struct.pack("<f", x))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def drawn(config, seed, size):
    """Weights large enough for every term to matter, as nested lists by name."""
    draw, weights = random.Random(seed), {}
    for name, shape in shapes(config):
        scale = shape[-1] ** -0.5
        rows = [[rounded(draw.uniform(0.5, 1.5) if len(shape) == 1 else draw.gauss(0, scale), size)
                 for _ in range(shape[-1])] for _ in range(math.prod(shape[:-1]))]
        weights[name + ".weight"] = rows[0] if len(shape) == 1 else rows
    return weights


def shape_of(nested):
    return [len(nested), *shape_of(nested[0])] if isinstance(nested, list) else []


def flat(nested):
    return [x for part in nested for x in flat(part)] if isinstance(nested, list) else [nested]


def packed(nested, size):
    """Dtype, shape and bytes of a nested list: whole numbers as int64, else float64 or bfloat16."""
    numbers = flat(nested)
    if isinstance(numbers[0], int):
        dtype, data = "I64", struct.pack(f"<{len(numbers)}q", *numbers)
    elif size == 8:
        dtype, data = "F64", struct.pack(f"<{len(numbers)}d", *numbers)
    else:
        dtype, words = "BF16", struct.pack(f"<{len(numbers)}f", *numbers)
        data = b"".join(words[at + 2:at + 4] for at in range(0, len(words), 4))
    return dtype, shape_of(nested), data


def safetensors(tensors, metadata):
    """The format is this: the header's length in 8 bytes, the header as JSON, all numbers."""
    header, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(x[2] for x in tensors.values())


def batch(config, weights, rows):
    """The trace of a batch: with B = 1 all of it, else what has the axes B and S, padded with 0."""
    traces = [reference.trace(config, weights, row) for row in rows]
    if len(rows) == 1:
        no_rows = ("gate", "margin", "weights", "chosen", "tokens", "w1", "w2", "w3", "hidden")
        return {name: x if name.rpartition(".")[2] in no_rows else [x]
                for name, x in traces[0].items()}
    S = max(map(len, rows))
    return {name: [x[name] + [[0.0] * len(x[name][0])] * (S - len(x[name])) for x in traces]
            for name in traces[0]
            if name.endswith(AXES_OF_ROWS) or name.rpartition(".")[2].isdecimal()}


def golden(case):
    """The bytes of a golden file."""
    from generate import axes  # the names of axes alone: no number passes through it

    about, changes, lengths, chunk, size = CASES[case]
    config, draw = BASE | changes, random.Random(f"tokens of {case}")
    weights = drawn(config, f"weights of {case}", size)
    rows = [[draw.randrange(config["vocab_size"]) for _ in range(n)] for n in lengths]
    padded = [row + [0] * (max(lengths) - len(row)) for row in rows]
    found = {"tokens": padded} | batch(config, weights, rows)
    order = [[name, ["B", "S"] if name == "tokens" else axes(name), shape_of(x)]
             for name, x in found.items()]
    stored = {name: packed(x, size) for name, x in weights.items()}
    digest = hashlib.sha256(b"".join(stored[name][2] for name in sorted(stored)))
    return safetensors(stored | {name: packed(x, 8) for name, x in found.items()}, {
        "format": "mixtral-trace", "version": "1", "dtype": "float64", "case": about,
        "config": json.dumps(config), "order": json.dumps(order), "chunk": str(chunk),
        "lengths": json.dumps(lengths), "weights_sha256": digest.hexdigest()})


def main(directory=HERE):
    for case in CASES:
        path = Path(directory) / f"{case}.safetensors"
        path.write_bytes(golden(case))
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
