"""Make the golden files beside this file: `python tests/oracle/golden.py [DIRECTORY]`.

A golden file holds the weights of a small model, under names that end in `.weight`, and a trace of
some tokens through it. All numbers come from tests/reference.py, which uses plain Python floats.
This file needs no package, not even torch. The weights are drawn by Python's own generator, so a
second run writes the same bytes, as far as the exp, cos and sin of the machine agree.
"""

import hashlib
import json
import math
import random
import struct
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import reference
from reference import AXES, axes, word

BASE = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 8,
        "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5}


class Case(NamedTuple):
    """What one golden file holds. `config` changes BASE; `lengths` has one number per row."""

    about: str
    config: dict
    lengths: list
    chunk: int = 0  # tokens per call to a port with a cache; 0 means one call without a cache
    first_position: int = 0
    weight_bytes: int = 8  # 8 for float64 weights, 2 for weights that bfloat16 can hold
    tied_experts: tuple = ()  # experts whose router logits are equal for every token
    calls: tuple = ()  # the tokens of each call, one number per row, if its rows are ragged


CASES = {
    "plain": Case("no window, two of eight experts, three query heads to a key head", {}, [14]),
    "window": Case("a window of 5 under 14 tokens, rope_theta 100",
                   {"sliding_window": 5, "rope_theta": 100.0}, [14]),
    "one_expert": Case("one expert of four, as many key heads as query heads",
                       {"num_experts_per_tok": 1, "num_local_experts": 4,
                        "num_key_value_heads": 6}, [11]),
    "three_experts": Case("three experts of five, one key head, wide heads, a large epsilon",
                          {"num_experts_per_tok": 3, "num_local_experts": 5, "head_dim": 10,
                           "num_key_value_heads": 1, "rms_norm_eps": 1e-2}, [11]),
    "ragged": Case("rows of 9, 4 and 1 tokens in one batch, padded on the right",
                   {"sliding_window": 3}, [9, 4, 1]),
    "chunked": Case("17 tokens through a rolling buffer, 4 at a time, window 5: two wraps",
                    {"sliding_window": 5}, [17], chunk=4),
    "bfloat16": Case("weights that bfloat16 holds; the trace is exact, float64",
                     {"sliding_window": 5}, [14], weight_bytes=2),
    "tied": Case("the router logits of experts 1, 4 and 6 are equal for every token",
                 {}, [14], tied_experts=(1, 4, 6)),
    "far": Case("positions 32,750 to 32,761, rope_theta 10,000, heads of 32 features",
                {"rope_theta": 1e4, "head_dim": 32, "num_attention_heads": 2,
                 "num_key_value_heads": 1}, [12], first_position=32750),
    "serving": Case("ragged rows in six calls through a rolling buffer, window 5, D = H·d",
                    {"sliding_window": 5, "num_attention_heads": 4}, [14, 9, 8], chunk=6,
                    calls=((6, 3, 1), (1, 1, 1), (4, 2, 3), (1, 0, 1), (1, 1, 1), (1, 2, 1)))}


def shapes(c):
    """The names and shapes of the tensors of a checkpoint."""
    D, M, d, E = (c[field] for field in ("hidden_size", "intermediate_size", "head_dim",
                                         "num_local_experts"))
    queries, keys = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    yield "model.embed_tokens", (c["vocab_size"], D)
    for n in range(c["num_hidden_layers"]):
        at = f"model.layers.{n}."
        for name, shape in (("q", (queries, D)), ("k", (keys, D)), ("v", (keys, D)),
                            ("o", (D, queries))):
            yield f"{at}self_attn.{name}_proj", shape
        yield at + "input_layernorm", (D,)
        yield at + "post_attention_layernorm", (D,)
        yield at + "block_sparse_moe.gate", (E, D)
        for e in range(E):
            for name, shape in (("w1", (M, D)), ("w2", (D, M)), ("w3", (M, D))):
                yield f"{at}block_sparse_moe.experts.{e}.{name}", shape
    yield "model.norm", (D,)
    yield "lm_head", (c["vocab_size"], D)


def rounded(x, size):
    """The nearest number of `size` bytes: float64, or bfloat16 with ties to even."""
    if size == 8:
        return x
    [bits] = struct.unpack("<I", struct.pack("<f", x))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def drawn(config, seed, size):
    """Weights so large that every term of the forward pass matters, as nested lists by name."""
    draw, weights = random.Random(seed), {}
    for name, shape in shapes(config):
        scale = shape[-1] ** -0.5
        rows = [[rounded(draw.uniform(0.5, 1.5) if len(shape) == 1 else draw.gauss(0, scale), size)
                 for _ in range(shape[-1])] for _ in range(math.prod(shape[:-1]))]
        weights[name + ".weight"] = rows[0] if len(shape) == 1 else rows
    return weights


def tie(weights, experts):
    """Give some experts the same router row, in every layer.

    The row has a single number that is not zero, so that the logits are equal whatever the order in
    which a port adds the products.
    """
    for name, rows in weights.items():
        if name.endswith("gate.weight"):
            for e in experts:
                rows[e] = [2.0] + [0.0] * (len(rows[e]) - 1)


def shape_of(nested):
    """The lengths of a nested list, outermost first."""
    return [len(nested), *shape_of(nested[0])] if isinstance(nested, list) else []


def flat(nested):
    """The numbers of a nested list in one list."""
    return [x for part in nested for x in flat(part)] if isinstance(nested, list) else [nested]


def packed(nested, size):
    """Dtype, shape and bytes of a nested list: integers as int64, else float64 or bfloat16."""
    numbers = flat(nested)
    if isinstance(numbers[0], int):
        dtype, data = "I64", struct.pack(f"<{len(numbers)}q", *numbers)
    elif size == 8:
        dtype, data = "F64", struct.pack(f"<{len(numbers)}d", *numbers)
    else:  # the upper half of a float32
        dtype, data = "BF16", b"".join(struct.pack("<f", x)[2:] for x in numbers)
    return dtype, shape_of(nested), data


def safetensors(tensors, metadata):
    """The bytes of a file: the length of the header in 8 bytes, the header as JSON, the numbers."""
    header, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(x[2] for x in tensors.values())


def place(name):
    """Sorts the names of a trace in the order of computation."""
    order, parts = list(AXES), name.split(".")
    layer = int(parts[2]) if "layers" in parts else -1 if "embed" in name else math.inf
    expert = int(parts[parts.index("experts") + 1]) if "experts" in parts else -1
    rank = order.index(word(name))
    return layer, order.index("tokens") if expert >= 0 else rank, expert, rank


def filled(example, filler):
    """A nested list in the shape of another one, with the same number everywhere."""
    return [filled(x, filler) for x in example] if isinstance(example, list) else filler


def padded(name, x, S):
    """A quantity of one row of tokens, extended with padding to S tokens."""
    if "T" not in axes(name):  # the first axis counts tokens
        return x + [filled(x[0], -1 if word(name) == "chosen" else 0.0)] * (S - len(x))
    missing = S - len(x[0])  # the axes are heads, queries and keys
    unseen = -math.inf if word(name) == "scores" else 0.0
    return [[row + [unseen] * missing for row in head] + [[0.0] * S] * missing for head in x]


def joined(name, rows, S):
    """A quantity of a batch from that of its rows; None stands for an expert without tokens."""
    if axes(name)[0] == "R":
        offset = S if word(name) == "tokens" else 0
        return [x + n * offset if offset else x for n, row in enumerate(rows) for x in row or []]
    rows = [padded(name, row, S) for row in rows]
    return rows if axes(name)[0] == "B" else [x for row in rows for x in row]


def batch(config, weights, rows, first_position):
    """The trace of a batch of rows of tokens, padded on the right."""
    traces = [reference.trace(config, weights, row, first_position) for row in rows]
    names, S = sorted({name for one in traces for name in one}, key=place), max(map(len, rows))
    return {name: joined(name, [one.get(name) for one in traces], S) for name in names}


def golden(case, name):
    """The bytes of the golden file of a case. All random numbers follow from the name."""
    config, draw = BASE | case.config, random.Random(f"tokens of {name}")
    weights = drawn(config, f"weights of {name}", case.weight_bytes)
    tie(weights, case.tied_experts)
    rows = [[draw.randrange(config["vocab_size"]) for _ in range(n)] for n in case.lengths]
    tokens = [row + [0] * (max(case.lengths) - len(row)) for row in rows]
    found = {"tokens": tokens} | batch(config, weights, rows, case.first_position)
    order = [[name, axes(name), shape_of(x)] for name, x in found.items()]
    stored = {name: packed(x, case.weight_bytes) for name, x in weights.items()}
    digest = hashlib.sha256(b"".join(stored[name][2] for name in sorted(stored)))
    return safetensors(stored | {name: packed(x, 8) for name, x in found.items()}, {
        "format": "mixtral-trace", "version": "1", "dtype": "float64", "case": case.about,
        "config": json.dumps(config), "order": json.dumps(order), "chunk": str(case.chunk),
        "lengths": json.dumps(case.lengths), "first_position": str(case.first_position),
        "weights_sha256": digest.hexdigest()} | (
            {"calls": json.dumps(case.calls)} if case.calls else {}))


def main(directory=HERE):
    for name, case in CASES.items():
        path = Path(directory) / f"{name}.safetensors"
        path.write_bytes(golden(case, name))
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
