"""Write every intermediate of a forward pass to a file: `python tests/oracle/trace.py --help`.

    python tests/oracle/trace.py --prompt "Once upon a time" --output trace.safetensors

The file holds one tensor per quantity, in the dtype in which it was computed. What a module returns
has the name of the module, as `model.layers.0.self_attn.q_proj`. A quantity inside a module has the
name of the module and one more word, as `model.layers.0.self_attn.q_rotated`. The table AXES in
tests/reference.py lists them all.

The code of the model contains nothing for tracing: all quantities come from hooks, and from the
functions `route`, `rotate` and `attend` of mixtral.py, which are replaced while it runs.

Exit codes: 0 success, 1 bad input, 2 bad arguments, 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from reference import axes

import mixtral
from convert import check_output, reason, write_safetensors
from generate import DTYPES, TINY, pad
from mixtral import Attention, Block, Mixtral, SparseMoE, at_least_float32
from tokenizer import Tokenizer

# The quantities that are the input of a module, by the name of that module.
INPUTS = {"post_attention_layernorm": "residual", "w2": "hidden", "o_proj": "mixed"}


class Recorder:
    """Takes the quantities from hooks and replaced functions: {name: [one tensor per pass]}."""

    def __init__(self, scores, only):
        self.scores, self.only, self.seen = scores, only, {}
        self.running = None  # the name of the Attention or SparseMoE that runs now
        self.rotated = []  # the queries and keys of the Attention that runs now

    def keep(self, name, x):
        if self.only is None or name.rpartition(".")[2] in self.only:
            self.seen.setdefault(name, []).append(x)

    def before(self, name, module, args):
        """The pre-hook of every module."""
        parent, _, word = name.rpartition(".")
        if isinstance(module, Attention | SparseMoE):
            self.running, self.rotated = name, []
        if word in INPUTS:
            x = args[0].view(self.rotated[0].shape) if word == "o_proj" else args[0]
            self.keep(f"{parent}.{INPUTS[word]}", x)

    def after(self, name, module, args, output):
        """The hook of every module. Modules that only contain others return nothing new."""
        if isinstance(module, Attention | SparseMoE):
            self.running = None
        if isinstance(module, Block | SparseMoE) or not any(module.children()):
            self.keep(name, output)

    def rotate(self, original, x, cos, sin):
        """In place of mixtral.rotate, which Attention calls with the queries, then with the keys.

        Both are kept after the second call, so they follow q_proj and k_proj in a trace.
        """
        output = original(x, cos, sin)
        if self.running:
            self.rotated.append(output)
            if len(self.rotated) == 2:
                self.keep(f"{self.running}.q_rotated", self.rotated[0])
                self.keep(f"{self.running}.k_rotated", self.rotated[1])
        return output

    def route(self, original, logits, top_k):
        """In place of mixtral.route."""
        weights, chosen = original(logits, top_k)
        if self.running:
            if top_k < logits.shape[1]:
                best = logits.sort(dim=-1, descending=True)[0]
                self.keep(f"{self.running}.margin", best[:, top_k - 1] - best[:, top_k])
            self.keep(f"{self.running}.chosen", chosen)
            for e in chosen.unique().tolist():
                token = (chosen == e).any(dim=1).nonzero()[:, 0]
                self.keep(f"{self.running}.experts.{e}.tokens", token)
            self.keep(f"{self.running}.weights", weights)
        return weights, chosen

    def attend(self, name, original, q, k, v, mask):
        """In place of Attention.attend; records q·kᵀ/√d and its softmax, in at least float32.

        Where the mask forbids a key, the score is −∞. With a cache, T counts its used slots, and
        the keys are in the order of the slots.
        """
        if self.scores:
            (B, S, H, d), K = q.shape, k.shape[2]
            rows = (at_least_float32(q) / math.sqrt(d)).transpose(1, 2).reshape(B, K, -1, d)
            scores = (rows @ at_least_float32(k).permute(0, 2, 3, 1)).view(B, H, S, -1)
            scores = scores.masked_fill(~mask, -math.inf)  # (B, H, S, T)
            self.keep(f"{name}.scores", scores)
            self.keep(f"{name}.probabilities", scores.softmax(dim=-1))
        return original(q, k, v, mask)


@contextlib.contextmanager
def recording(model, layers=None, scores=False, only=None):
    """Record all passes inside a `with` block; yields {name: [one tensor per pass]}.

    The names are in the order of computation. `layers` selects some layers; what is outside the
    layers is always recorded. `scores` adds attention scores and probabilities, which are large.
    `only` selects quantities by the last words of their names. With a cache, each chunk is one
    pass, except that `lm_head` runs once per call of the model. An expert that no token of a pass
    chose has no tensors for that pass. Raises ValueError for an unknown layer.
    """
    L = model.config.num_hidden_layers
    if unknown := set(layers or ()) - set(range(L)):
        raise ValueError(f"layers must be in 0 … {L - 1}, got {min(unknown)}")
    recorder = Recorder(scores, only)
    with contextlib.ExitStack() as stack:
        def replace(owner, function, *first):
            instead = partial(getattr(recorder, function), *first, getattr(owner, function))
            stack.enter_context(mock.patch.object(owner, function, instead))

        replace(mixtral, "rotate")
        replace(mixtral, "route")
        for name, module in model.named_modules():
            layer = re.match(r"model\.layers\.(\d+)", name)
            if layers is None or not layer or int(layer[1]) in layers:
                if isinstance(module, Attention):
                    replace(module, "attend", name)
                before, after = partial(recorder.before, name), partial(recorder.after, name)
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after).remove)
        yield recorder.seen


@torch.inference_mode()
def record(model, tokens, layers=None, scores=False):
    """The quantities of one pass over tokens (B, S) without a cache, {name: tensor}."""
    with recording(model, layers, scores) as seen:
        model(tokens)
    return {name: x for name, [x] in seen.items()}


def write_trace(model, tokens, path, layers=None, scores=False):
    """Write `tokens` (B, S) and the quantities of a pass over them; returns the number of tensors.

    The metadata hold a format, its version, the dtype of the weights and, as JSON, the config and
    `order`: name, axes and shape of each tensor in the order of computation. The file is complete
    or, after any error, not there.
    """
    tensors = {"tokens": tokens} | record(model, tokens, layers, scores)
    order = [[name, axes(name), list(x.shape)] for name, x in tensors.items()]
    write_safetensors(path, {name: x.contiguous().cpu() for name, x in tensors.items()}, {
        "format": "mixtral-trace", "version": "1", "dtype": str(model.lm_head.weight.dtype)[6:],
        "config": json.dumps(dataclasses.asdict(model.config)), "order": json.dumps(order)})
    return len(tensors)


# ------------------------------------------------------------------ the command


def numbers(text):
    """The numbers of a list such as 0,15,31."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise argparse.ArgumentTypeError(f"wanted numbers as 0,15,31, got {text!r}")
    return [int(n) for n in text.split(",")]


def add_model_arguments(parser):
    """The flags --model and --dtype, for `load_model`."""
    parser.add_argument("--model", type=Path, default=TINY, metavar="DIR",
                        help="a checkpoint in the Hugging Face layout (default: the embedded one)")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="dtype of weights and arithmetic (default: float64 for the embedded "
                             "model, else that of the checkpoint)")


def load_model(args):
    """The plain model of --model and --dtype. Raises ValueError if it is incomplete or damaged."""
    default = torch.float64 if args.model.resolve() == TINY else None
    return Mixtral.from_pretrained(args.model, DTYPES.get(args.dtype, default))


def exit_code(program, run, args):
    """Run a command: 0, 1 after one line about what is wrong, or 130 after Ctrl-C."""
    if sys.stdout is None:
        return f"{program}: standard output must be open"
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not error.filename:
            error.filename = "standard output"  # Python flushes it at exit: do not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"{program}: {' '.join(reason(error).split())}", file=sys.stderr)
        return 1


def run(args):
    check_output(args.output)
    model = load_model(args)
    ids = args.tokens or Tokenizer(args.model).encode(args.prompt)
    tokens, _ = pad([ids], model.config.vocab_size, "cpu")
    count = write_trace(model, tokens, args.output, args.layers, args.scores)
    print(f"[{count} tensors of {len(ids)} tokens in {args.output}]", file=sys.stderr)


def main(argv=None):
    p = argparse.ArgumentParser(prog="trace.py", allow_abbrev=False,
                                description="Write every intermediate of a forward pass.")
    text = p.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="the text to read; BOS is put before it")
    text.add_argument("--tokens", type=numbers, metavar="N,N",
                      help="the token ids to read, as 1,429,440")
    add_model_arguments(p)
    p.add_argument("--layers", type=numbers, metavar="N,N",
                   help="record only these layers, as 0,15,31 (default: all)")
    p.add_argument("--scores", action="store_true",
                   help="record attention scores and probabilities too, which are large")
    p.add_argument("--output", type=Path, required=True, metavar="FILE",
                   help="the safetensors file to write")
    return exit_code("trace.py", run, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
