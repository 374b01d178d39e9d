"""Who goes where: `python tests/oracle/routing.py FILE [--model DIR]`, per layer, for a text.

`load` is the share of visits that each expert takes: 1/E each if it were even. `first` is the
share of tokens whose first expert is that of the token before; `either`, of tokens that share any
of their k experts with it (the paper's Table 5, section 5). Chance gives 1/E and
1 − C(E−k, k)/C(E, k): 12.5 % and 46.4 % for two of eight.
"""

import argparse
import math
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch

from generate import DTYPES, TINY, watching
from mixtral import Mixtral
from tokenizer import Tokenizer


def loads(chosen, E):
    """Share of visits of each expert: (N, k) -> (E)."""
    return chosen.flatten().bincount(minlength=E).double() / chosen.numel()


def repetitions(chosen):
    """Shares of tokens with the first expert, and with any expert, of the token before."""
    before, after = chosen[:-1], chosen[1:]
    first = before[:, 0] == after[:, 0]
    either = (before[:, :, None] == after[:, None]).flatten(1).any(1)
    return first.double().mean().item(), either.double().mean().item()


def chance(E, k):
    """What `repetitions` tends to where k experts of E are drawn at random."""
    return 1 / E, 1 - math.comb(E - k, k) / math.comb(E, k)


@torch.inference_mode()
def choices(model, tokens):
    """The experts of each token in each layer, (N, k) by layer, the text fed through a cache."""
    cache = model.new_cache(1, len(tokens))
    with watching(model) as seen:
        for at in range(0, len(tokens), cache.chunk):
            model(torch.tensor([tokens[at:at + cache.chunk]]), cache, last_only=True)
            # All but the choices is let go after each chunk: a book's intermediates are large.
            for name in [name for name in seen if not name.endswith(".chosen")]:
                del seen[name]
    return [torch.cat(pieces) for pieces in seen.values()]


def table(layers, E):
    k = layers[0].shape[1]
    yield "layer  " + "".join(f"load {e:<4}" for e in range(E)) + "first   either"
    for n, chosen in enumerate(layers):
        first, either = repetitions(chosen)
        yield (f"{n:5}  " + "".join(f"{share:7.1%}  " for share in loads(chosen, E).tolist())
               + f"{first:6.1%}  {either:6.1%}")
    first, either = chance(E, k)
    yield "chance " + f"{1 / E:7.1%}  " * E + f"{first:6.1%}  {either:6.1%}"


def main(argv=None):
    p = argparse.ArgumentParser(description="Expert load and repetitions of a text, per layer.")
    p.add_argument("file", type=Path, help="text in UTF-8")
    p.add_argument("--model", type=Path, default=TINY, help="default: the embedded checkpoint")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    args = p.parse_args(argv)
    try:
        text = args.file.read_text(encoding="utf-8")
        tokens = Tokenizer(args.model).encode(text)
        if len(tokens) < 2:
            raise ValueError(f"{args.file}: wanted a text of two tokens at least")
        model = Mixtral.from_pretrained(args.model, DTYPES[args.dtype])
    except (OSError, ValueError) as error:
        print(f"routing.py: {error}", file=sys.stderr)
        return 1
    print(f"{len(tokens)} tokens of {args.file}")
    print("\n".join(table(choices(model, tokens), model.config.num_local_experts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
