"""How far rounding carries, layer by layer: `python tests/oracle/drift.py`.

For each dtype the median over tokens of a row's error against float64 with the same weights: length
of the difference by length of the row. A median, since a token whose choice of experts flips at a
near tie is far off and says nothing of rounding. Beside it the same for transformers, if installed.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch

from generate import TINY, save_file, watching
from mixtral import Mixtral, MixtralConfig
from tokenizer import Tokenizer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TEXT = """Once upon a time, there was a little girl named Lily. She had a red ball and a small dog.
One day the ball rolled into the big, dark forest. "Do not go there alone," said her mom. Lily was
sad, but the dog ran after the ball. Soon he came back with it and they all played in the sun."""


def random_checkpoint(directory):
    """Eight layers of random bfloat16 weights, and short rows: a flip spoils only its own row."""
    torch.manual_seed(0)
    model = Mixtral(MixtralConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=8, head_dim=16,
        num_attention_heads=8, num_key_value_heads=2, sliding_window=64)).requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name
                     else torch.randn_like(weight) * weight.shape[1] ** -0.5)
    save_file({name: w.bfloat16() for name, w in model.named_parameters()},
              directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        | dataclasses.asdict(model.config)))
    return torch.randint(0, 512, (100, 8))


def ours(directory, dtype, tokens):
    """The residual stream after each layer, and the logits."""
    model = Mixtral.from_pretrained(directory, dtype)
    with torch.inference_mode(), watching(model) as seen:
        model(tokens)
    layers = range(model.config.num_hidden_layers)
    return [seen[f"model.layers.{n}"][0] for n in layers] + [seen["lm_head"][0]]


def theirs(directory, dtype, tokens):
    """The same of transformers, or None where it is missing."""
    with contextlib.suppress(ImportError):
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        found = []
        for layer in [*model.model.layers, model.lm_head]:
            layer.register_forward_hook(lambda module, _, out: found.append(
                out[0] if isinstance(out, tuple) else out))
        with torch.inference_mode():
            model(tokens)
        return found
    return None


def error(found, exact):
    difference = (found.double() - exact).flatten(0, -2).norm(dim=1)
    return (difference / exact.flatten(0, -2).norm(dim=1)).median().item()


def rows(directory, tokens):
    """Name, and the errors of ours and of theirs by dtype, of each layer and the logits."""
    exact = ours(directory, torch.float64, tokens)
    columns = [run(directory, dtype, tokens) for dtype in DTYPES for run in (ours, theirs)]
    for n, wanted in enumerate(exact):
        name = f"layer {n}" if n < len(exact) - 1 else "logits"
        yield name, [None if c is None else error(c[n], wanted) for c in columns]


def main():
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        story = torch.tensor([Tokenizer(TINY).encode(" ".join(TEXT.split()))])
        for title, source, tokens in (("embedded", TINY, story),
                                      ("random", place, random_checkpoint(place))):
            names = [f"{str(dtype)[6:]}{who}" for dtype in DTYPES for who in ("", ", transformers")]
            print(f"| {title}, {tokens.numel()} tokens | " + " | ".join(names) + " |")
            print("|---" * (len(names) + 1) + "|")
            for name, found in rows(source, tokens):
                print(f"| {name} | " + " | ".join(
                    "not measured" if x is None else f"{x:.1e}" for x in found) + " |", flush=True)
            print()


if __name__ == "__main__":
    main()
