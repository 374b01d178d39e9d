"""Text from a Mixtral: `python generate.py --prompt "Once upon a time"`.

Prefill, then one token at a time:

    logits = model(prompt, cache)                 the whole prompt at once, in chunks
    repeat:  token  = sample(logits)              greedy, or from the top-p nucleus
             logits = model(token, cache)

Departures: every row of a batch draws from its own generator, so that what a prompt gives depends
neither on its neighbours nor on their number; the sampler works in float64 whatever the model's
dtype. Leaves out: beams, top-k, penalties.

Exit codes: 0 done (also when the reader of a pipe has gone), 1 bad input, 2 bad arguments,
130 interrupted, after printing what was said so far.
"""

import argparse
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while importing ends the program at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch

from mixtral import Mixtral
from tokenizer import Tokenizer

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


def sample(logits, temperature=0.0, top_p=1.0, generator=None):
    """Draw from softmax(logits / temperature) cut to its nucleus; temperature 0 is the argmax.

    logits (..., V) -> (...)

    The nucleus is the smallest set of likeliest tokens whose mass reaches top_p; it is never
    empty. Of equal logits the lower id counts as the likelier. Raises ValueError for NaN logits.
    """
    check_sampling(temperature, top_p)
    if logits.isnan().any():
        raise ValueError("logits hold NaN: the weights or the inputs are broken")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.double()
    # The largest becomes 0, so that no temperature, however small, makes ∞ − ∞.
    mass = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(dim=-1)
    mass, ids = mass.sort(dim=-1, descending=True, stable=True)
    if top_p < 1:
        mass = mass.masked_fill(mass.cumsum(-1) - mass >= top_p, 0)
    drawn = torch.multinomial(mass.reshape(-1, mass.shape[-1]), 1, generator=generator)
    return ids.gather(-1, drawn.view(*ids.shape[:-1], 1)).squeeze(-1)


def check_sampling(temperature, top_p):
    """Raises ValueError unless 0 <= temperature < ∞ and 0 < top_p <= 1."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def check_whole(name, value):
    """Raises ValueError unless the value is an integer in 0 … 2⁶³ − 1, as torch takes for seeds."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} must be an integer >= 0 and < 2**63, got {value!r}")


def seeded(seed, device):
    """A row's own source of draws; None seeds it from the system."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        check_whole("seed", seed)
        generator.manual_seed(seed)
    return generator


def padded(prompts, vocab_size, device):
    """Token lists as one right-padded tensor (B, S) and their lengths (B)."""
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt has no tokens: give it at least BOS")
        if wrong := [t for t in prompt if type(t) is not int or not 0 <= t < vocab_size]:
            raise ValueError(f"prompt tokens must be integers in 0 … {vocab_size - 1}, "
                             f"got {wrong[0]!r}")
    S = max(map(len, prompts))
    tokens = torch.tensor([[*prompt] + [0] * (S - len(prompt)) for prompt in prompts])
    return tokens.to(device), torch.tensor([len(prompt) for prompt in prompts], device=device)


@torch.inference_mode()
def steps(model, prompts, max_new_tokens, temperature, top_p, seed, eos_id):
    """Yield each step's new token of every row, None for the rows that have ended."""
    check_sampling(temperature, top_p)
    check_whole("max_new_tokens", max_new_tokens)
    device = model.lm_head.weight.device
    tokens, lengths = padded(prompts, model.config.vocab_size, device)
    generators = [seeded(seed, device) for _ in prompts]
    cache = model.new_cache(len(prompts), tokens.shape[1] + max_new_tokens)
    alive = torch.ones_like(lengths)
    for _ in range(max_new_tokens):
        logits = model(tokens, cache, lengths, last_only=True)[:, 0]
        drawn = [sample(row, temperature, top_p, generator)
                 for row, generator in zip(logits, generators, strict=True)]
        tokens = torch.stack(drawn)[:, None]
        yield [token if lives else None
               for [token], lives in zip(tokens.tolist(), alive.tolist(), strict=True)]
        lengths = alive = alive * (tokens[:, 0] != (-1 if eos_id is None else eos_id))
        if not alive.any():
            return


def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=None, eos_id=None):
    """The new tokens of each prompt, a list of token lists; an EOS is included and is the last.

    Every row's draws are seeded with the same seed, as if it were alone: equal prompts give equal
    texts. Raises ValueError for an empty prompt or an id outside the vocabulary.
    """
    new = [[] for _ in prompts]
    if prompts:
        for step in steps(model, prompts, max_new_tokens, temperature, top_p, seed, eos_id):
            for row, token in zip(new, step, strict=True):
                row += [] if token is None else [token]
    return new


def stream(model, prompt, max_new_tokens, temperature=0.0, top_p=1.0, seed=None, eos_id=None):
    """Yield the tokens of `generate` for one prompt as they are drawn."""
    for [token] in steps(model, [prompt], max_new_tokens, temperature, top_p, seed, eos_id):
        yield token


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def arguments(argv):
    p = Parser(prog="generate.py", description="Continue a text with a Mixtral model.",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--prompt", help="text to continue; without it, standard input is read")
    p.add_argument("--model", type=Path, default=TINY, metavar="DIR",
                   help="checkpoint in the Hugging Face layout; the default is the embedded one")
    p.add_argument("--max-new-tokens", type=int, default=300, metavar="N",
                   help="stop after N tokens, if the model has not ended its text before")
    p.add_argument("--temperature", type=float, default=0.0,
                   help="0 takes the likeliest token; higher is more varied")
    p.add_argument("--top-p", type=float, default=1.0, help="mass of the nucleus to draw from")
    p.add_argument("--seed", type=int, help="makes draws repeatable; without it they differ")
    p.add_argument("--dtype", choices=DTYPES, default=argparse.SUPPRESS,
                   help="weights and arithmetic (default: float32 for the embedded checkpoint, "
                        "which not every CPU multiplies fast in bfloat16; else the checkpoint's)")
    p.add_argument("--device", default="cpu", help="torch device, as cpu or cuda")
    return p.parse_args(argv)


def check_device(name):
    """Raises ValueError unless float64 tensors, which rotation needs, can be made there."""
    try:
        torch.zeros(1, dtype=torch.float64, device=name)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not usable here: {reason}") from None


def load(args):
    """Tokenizer and model of the arguments. Raises ValueError where they do not fit together."""
    check_device(args.device)
    dtype = DTYPES[args.dtype] if "dtype" in args else torch.float32 if args.model == TINY else None
    model = Mixtral.from_pretrained(args.model, dtype, args.device)
    tokenizer = Tokenizer(args.model)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{args.model}: the tokenizer has {tokenizer.vocab_size} pieces, the "
                         f"model only {model.config.vocab_size}: they do not belong together")
    return tokenizer, model


def read_prompt(args):
    """The text of --prompt, or standard input without its last line break."""
    if args.prompt is not None:
        return args.prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: {error}") from None


def run(args):
    """Print the prompt and its continuation as it comes, then one line about it to stderr."""
    check_sampling(args.temperature, args.top_p)
    check_whole("--max-new-tokens", args.max_new_tokens)
    check_whole("--seed", args.seed or 0)
    tokenizer, model = load(args)
    prompt = tokenizer.encode(read_prompt(args))
    text, new, interrupted, start = tokenizer.stream(), 0, False, time.perf_counter()
    first = start
    try:
        print("".join(map(text.feed, prompt)), end="", flush=True)
        for token in stream(model, prompt, args.max_new_tokens, args.temperature, args.top_p,
                            args.seed, tokenizer.eos_id):
            first, new = first if new else time.perf_counter(), new + 1
            print(text.feed(token), end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    end = time.perf_counter()
    print(text.flush(), flush=True)
    print(f"[{len(prompt)} tokens read, {len(prompt) / max(first - start, 1e-9):.0f} tokens/s; "
          f"{new} written, {max(new - 1, 0) / max(end - first, 1e-9):.0f} tokens/s]",
          file=sys.stderr)
    return 130 if interrupted else 0


def main(argv=None):
    args = arguments(argv)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return run(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
