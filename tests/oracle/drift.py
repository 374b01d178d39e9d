"""Measure how rounding errors grow with depth: `python tests/oracle/drift.py`.

The error of a dtype is measured against float64 with the same weights, after each layer and at the
logits. For each token it is the length of the difference divided by the length of the float64
vector. The table shows the median over tokens. A mean would say little about rounding: a token
whose choice of experts changes at a near tie has a large error, which comes from the other experts.

If transformers is installed, its errors are in the table too, measured against the same numbers.
"""

import tempfile
from pathlib import Path
from trace import record  # beside this file

import torch
from conftest import random_model, save

from generate import TINY
from mixtral import Mixtral
from tokenizer import Tokenizer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TEXT = """Once upon a time, there was a little girl named Lily. She had a red ball and a small dog.
One day the ball rolled into the big, dark forest. "Do not go there alone," said her mom. Lily was
sad, but the dog ran after the ball. Soon he came back with it and they all played in the sun."""


def random_checkpoint(directory):
    """Write a model of eight layers with random bfloat16 weights; returns tokens for it, (B, S).

    The rows are short, because a change of experts affects the later tokens of its row.
    """
    model = random_model(
        dtype=torch.float32, vocab_size=512, hidden_size=128, intermediate_size=256,
        num_hidden_layers=8, head_dim=16, num_attention_heads=8, sliding_window=64, rope_theta=1e6)
    save(model.bfloat16(), directory, architectures=["MixtralForCausalLM"])
    return torch.randint(0, 512, (100, 8))


def hidden_states(directory, dtype, tokens):
    """The output of each layer, (B, S, D), and the logits, (B, S, V)."""
    model = Mixtral.from_pretrained(directory, dtype)
    seen = record(model, tokens)
    layers = range(model.config.num_hidden_layers)
    return [seen[f"model.layers.{n}"] for n in layers] + [seen["lm_head"]]


def transformers_states(directory, dtype, tokens):
    """The same of transformers, or None if it is not installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    states = []
    for layer in [*model.model.layers, model.lm_head]:
        layer.register_forward_hook(lambda module, inputs, output: states.append(
            output[0] if isinstance(output, tuple) else output))
    with torch.inference_mode():
        model(tokens)
    return states


def error(states, exact):
    """The median over tokens of |states − exact| / |exact|, with vectors along the last axis."""
    return ((states.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()


def rows(directory, tokens):
    """Yield for each layer, and for the logits, a name and the errors in the order of the table."""
    *layers, logits = hidden_states(directory, torch.float64, tokens)
    exact = {f"layer {n}": x for n, x in enumerate(layers)} | {"logits": logits}
    columns = [states(directory, dtype, tokens) or [None] * len(exact) for dtype in DTYPES
               for states in (hidden_states, transformers_states)]
    for (name, wanted), *found in zip(exact.items(), *columns, strict=True):
        yield name, [None if x is None else error(x, wanted) for x in found]


def main():
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        story = torch.tensor([Tokenizer(TINY).encode(" ".join(TEXT.split()))])
        for title, source, tokens in (("embedded", TINY, story),
                                      ("random", place, random_checkpoint(place))):
            names = [f"{str(dtype)[6:]}{who}" for dtype in DTYPES for who in ("", ", transformers")]
            print(f"| {title}, {tokens.numel()} tokens | {' | '.join(names)} |")
            print("|---" * (len(names) + 1) + "|")
            for name, errors in rows(source, tokens):
                cells = ("not measured" if x is None else f"{x:.1e}" for x in errors)
                print(f"| {name} | {' | '.join(cells)} |", flush=True)
            print()


if __name__ == "__main__":
    main()
