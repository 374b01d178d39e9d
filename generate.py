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
import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while importing ends the program at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # mkldnn.flags

import torch
from safetensors import SafetensorError, TensorSpec, serialize_file

import mixtral
from mixtral import Block, Mixtral, SparseMoE
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
        # For a lone token oneDNN reads bfloat16 weights at 25 GB/s, PyTorch itself at 40 (AVX-512).
        with torch.backends.mkldnn.flags(enabled=tokens.numel() > 1):
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


# Every quantity of a trace by the last word of its name, in the key's letters; `visits` are the
# tokens that chose an expert, in their order, which `tokens` lists.
AXES = {
    "embed_tokens": "B S D", "input_layernorm": "B S D", "q_proj": "B S H·d", "k_proj": "B S K·d",
    "v_proj": "B S K·d", "q_rotated": "B S H d", "k_rotated": "B S K d", "scores": "B H S T",
    "probabilities": "B H S T", "mixed": "B S H d", "o_proj": "B S D", "residual": "B S D",
    "post_attention_layernorm": "B S D", "gate": "N E", "chosen": "N k", "weights": "N k",
    "margin": "N", "tokens": "visits", "w1": "visits F", "w3": "visits F", "hidden": "visits F",
    "w2": "visits D", "block_sparse_moe": "B S D", "layer": "B S D", "norm": "B S D",
    "lm_head": "B S V"}


@contextlib.contextmanager
def watching(model, layers=None, scores=False):
    """Collect the intermediates of the passes made inside: {name: [a tensor of each pass]}.

    What a module of the checkpoint returns has the module's name; what happens within one has its
    name and a word more, as `model.layers.0.self_attn.q_rotated`. AXES lists them. In the order of
    computation; `layers` keeps those alone, `scores` adds attention's scores and probabilities.
    """
    path, seen = [], {}

    def keep(name, x):
        inside = re.match(r"model\.layers\.(\d+)", name)
        if layers is None or not inside or int(inside[1]) in layers:
            seen.setdefault(name, []).append(x)

    def probed(word, x):
        if word in ("scores", "probabilities"):
            return keep(f"{path[-1]}.{word}", x) if scores else None
        keep(f"{path[-1]}.{word}", x)
        if word == "chosen":
            for e in x.unique().tolist():
                keep(f"{path[-1]}.experts.{e}.tokens", (x == e).any(dim=1).nonzero()[:, 0])

    def left(module, _, x):
        name = path.pop()
        if isinstance(module, Block | SparseMoE) or not any(module.children()):
            keep(name, x)
        if name.endswith(".gate"):
            best, k = x.sort(dim=-1, descending=True)[0], model.config.num_experts_per_tok
            if k < best.shape[-1]:
                keep(name.replace("gate", "margin"), best[:, k - 1] - best[:, k])

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
        hooks.append(module.register_forward_hook(left))
    mixtral.watch = probed
    try:
        yield seen
    finally:
        mixtral.watch = None
        for hook in hooks:
            hook.remove()


def axes(name):
    """The axes of a quantity in a trace, from AXES."""
    word = name.rpartition(".")[2]
    return AXES["layer" if word.isdecimal() else word].split()


@torch.inference_mode()
def write_trace(model, tokens, path, layers=None, scores=False):
    """Write every intermediate of one pass over tokens to a safetensors file; return their number.

    The file's metadata hold, as JSON, a format version, the config, the dtype, and `order`: name,
    axes and shape of each tensor in the order of computation. Raises ValueError for an unknown
    layer; a file is complete or not there.
    """
    unknown = set(layers or ()) - set(range(model.config.num_hidden_layers))
    if unknown:
        raise ValueError(f"--trace-layers: layers are 0 … {model.config.num_hidden_layers - 1}, "
                         f"got {min(unknown)}")
    [ids], _ = padded([tokens], model.config.vocab_size, model.lm_head.weight.device)
    with watching(model, layers, scores) as seen:
        model(ids[None])
    found = {"tokens": ids[None]} | {name: x for name, [x] in seen.items()}
    order = [[name, axes(name) if name != "tokens" else ["B", "S"], list(x.shape)]
             for name, x in found.items()]
    save_file({name: x.contiguous().cpu() for name, x in found.items()}, path, {
        "format": "mixtral-trace", "version": "1", "dtype": str(model.lm_head.weight.dtype)[6:],
        "config": json.dumps(dataclasses.asdict(model.config)), "order": json.dumps(order)})
    return len(found)


FORMAT = (("format", "pt"),)  # what transformers wants to find in a file of weights


def save_file(tensors, path, metadata=FORMAT):
    """Write safetensors at once or not at all; the library's own save_file would need NumPy."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as the user's umask has it; serialize_file would make it 0600
        serialize_file({name: TensorSpec(
            dtype=str(x.dtype).removeprefix("torch."), shape=list(x.shape), data_ptr=x.data_ptr(),
            data_len=x.nbytes) for name, x in tensors.items()}, str(part), dict(metadata))
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path}: not written: {error}") from None


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
    p.add_argument("--trace", type=Path, metavar="FILE", default=argparse.SUPPRESS,
                   help="write every intermediate of reading the prompt as safetensors, and "
                        "generate nothing; with --dtype float64 they are exact")
    p.add_argument("--trace-layers", type=layer_list, metavar="N,N", default=argparse.SUPPRESS,
                   help="trace these layers alone, as 0,15,31 (default: all)")
    p.add_argument("--trace-scores", action="store_true", default=argparse.SUPPRESS,
                   help="trace attention's scores and probabilities too, which are large")
    return p.parse_args(argv)


def layer_list(text):
    """The numbers of a list as 0,15,31."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"wanted layers as 0,15,31, got {text!r}")
    return [int(n) for n in text.split(",")]


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
    if "trace" in args:
        count = write_trace(model, prompt, args.trace, getattr(args, "trace_layers", None),
                            "trace_scores" in args)
        print(f"[{count} tensors of {len(prompt)} tokens in {args.trace}]", file=sys.stderr)
        return 0
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
