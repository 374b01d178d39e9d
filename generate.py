"""Text from a Mixtral: `python generate.py --prompt "Once upon a time"`.

Prefill, then one token at a time:

    logits = model(prompt, cache)                 the whole prompt at once, in chunks
    repeat:  token  = sample(logits)              greedy, or from the top-p nucleus
             logits = model(token, cache)

Departures: every row of a batch draws from its own generator, so that what a prompt gives depends
neither on its neighbours nor on their number; the sampler works in float64 whatever the model's
dtype. Leaves out: beams, top-k, penalties.

With --json each text is a line: index, sample, prompt, text (without the prompt), tokens, logprobs
(natural, before temperature and top-p; null unless asked for), finish_reason (eos, stop, length or
interrupted) and timings. A --stop string ends a text and is not part of it; its tokens are listed.

Exit codes: 0 done (also when the reader of a pipe has gone), 1 bad input, 2 bad arguments,
130 interrupted, after printing what was said so far. In a chat Ctrl-C ends the answer alone.
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
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

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

    >>> sample(torch.tensor([1.0, 3.0, 3.0]))
    tensor(1)
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
def steps(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seeds=(None,), eos_id=None,
          cache=None, logprobs=False):
    """Yield each step's new token of every row as (token, logprob), None for rows that have ended.

    One row a seed: a lone prompt is read once for all of them. A cache continues its rows.
    """
    check_sampling(temperature, top_p)
    check_whole("max_new_tokens", max_new_tokens)
    device = model.lm_head.weight.device
    tokens, lengths = padded(prompts, model.config.vocab_size, device)
    generators = [seeded(seed, device) for seed in seeds]
    if cache is None:
        cache = model.new_cache(len(prompts), tokens.shape[1] + max_new_tokens)
    alive = torch.ones(len(seeds), dtype=torch.int64, device=device)
    for _ in range(max_new_tokens):
        # For a lone token oneDNN reads bfloat16 weights at 25 GB/s, PyTorch itself at 40 (AVX-512).
        with torch.backends.mkldnn.flags(enabled=tokens.numel() > 1):
            logits = model(tokens, cache, lengths, last_only=True)[:, 0]
        if len(logits) < len(seeds):
            logits, cache = logits.expand(len(seeds), -1), repeated(cache, len(seeds))
        drawn = torch.stack([sample(row, temperature, top_p, generator)
                             for row, generator in zip(logits, generators, strict=True)])
        tokens, known = drawn[:, None], [None] * len(drawn)
        if logprobs:
            known = logits.double().log_softmax(-1).gather(1, tokens)[:, 0].tolist()
        yield [(token, logprob) if lives else None for token, logprob, lives
               in zip(drawn.tolist(), known, alive.tolist(), strict=True)]
        lengths = alive = alive * (drawn != (-1 if eos_id is None else eos_id))
        if not alive.any():
            return


def repeated(cache, rows):
    """The cache of one row as that of many, to be continued in different ways."""
    keys, values = (x.repeat_interleave(rows, dim=1) for x in (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=keys, values=values, lengths=cache.lengths.repeat(rows))


def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=None, eos_id=None):
    """The new tokens of each prompt, a list of token lists; an EOS is included and is the last.

    Every row's draws are seeded with the same seed, as if it were alone: equal prompts give equal
    texts. Raises ValueError for an empty prompt or an id outside the vocabulary.
    """
    new = [[] for _ in prompts]
    if prompts:
        seeds = [seed] * len(prompts)
        for step in steps(model, prompts, max_new_tokens, temperature, top_p, seeds, eos_id):
            for row, drawn in zip(new, step, strict=True):
                row += [] if drawn is None else [drawn[0]]
    return new


def stream(model, prompt, max_new_tokens, temperature=0.0, top_p=1.0, seed=None, eos_id=None,
           cache=None):
    """Yield the tokens of `generate` for one prompt as they are drawn."""
    options = temperature, top_p, [seed], eos_id, cache
    for [(token, _)] in steps(model, [prompt], max_new_tokens, *options):
        yield token


class Chat:
    """A conversation with an instruct model, which reads only what is new in each turn.

    The cache holds the ids `read`. As long as the next turn's ids begin with them it is continued,
    which holds always but where a v2 or v3 tokenizer moves the system text to the latest message.
    """

    def __init__(self, model, tokenizer, system="", **sampling):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.messages = [{"role": "system", "content": system}] if system else []
        self.read, self.cache = [], None

    def answer(self, text, max_new_tokens):
        """Yield the answer's tokens as they are drawn; given up halfway, it counts as said so far.

        Without a single token drawn, it is as if nothing had been asked.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids, drawn = self.tokenizer.encode_chat(asked), []
        if ids[:len(self.read)] != self.read:
            self.read, self.cache = [], None
        self.cache = roomy(self.model, self.cache, len(ids) + max_new_tokens)
        try:
            for token in stream(self.model, ids[len(self.read):], max_new_tokens,
                                eos_id=self.tokenizer.eos_id, cache=self.cache, **self.sampling):
                drawn.append(token)
                yield token
        finally:
            self._keep(asked, ids, drawn)

    def _keep(self, asked, ids, drawn):
        if not drawn:
            self.read, self.cache = [], None
            return
        self.read = (ids + drawn)[:-1]  # the last one drawn has been said, and not been read
        self.cache.lengths.fill_(len(self.read))  # an interrupted step may have counted one more
        self.cache.fed = len(self.read)
        said = drawn[:-1] if drawn[-1] == self.tokenizer.eos_id else drawn
        self.messages = [*asked, {"role": "assistant", "content": said}]


def roomy(model, cache, length):
    """A cache of one row with room for a length, which keeps what it holds."""
    if cache is None:
        check_room(model, 1, length)
        return model.new_cache(1, length)
    if length <= cache.max_length:
        return cache
    check_room(model, 1, length)
    more = model.new_cache(1, max(length, 2 * cache.max_length), cache.chunk)
    held = cache.keys.shape[3]  # either nothing has wrapped, or the new one is no larger
    more.keys[:, :, :, :held], more.values[:, :, :, :held] = cache.keys, cache.values
    more.lengths, more.fed = cache.lengths, cache.fed
    return more


class Answer:
    """One row's tokens and its text, printed as far as no stop string can still begin in it."""

    def __init__(self, tokenizer, prompt=(), stops=()):
        self.decoder, self.stops, self.held = tokenizer.stream(), stops, ""
        self.prompt = "".join(map(self.decoder.feed, prompt))
        self.eos_id, self.text, self.tokens, self.logprobs = tokenizer.eos_id, "", [], []
        self.finish = "length"

    @property
    def ended(self):
        return self.finish != "length"

    def feed(self, token, logprob=None):
        """The text that a token makes certain."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token == self.eos_id:
            self.finish = "eos"
        return self._certain(self.decoder.feed(token))

    def flush(self):
        """The rest at the end."""
        if self.finish == "stop":
            return ""
        certain, rest, self.held = self._certain(self.decoder.flush()), self.held, ""
        self.text += rest
        return certain + rest

    def _certain(self, text):
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            certain, self.held, self.finish = self.held[:min(found)], "", "stop"
        else:
            begun = max((n for stop in self.stops for n in range(1, len(stop))
                         if self.held.endswith(stop[:n])), default=0)
            cut = len(self.held) - begun
            certain, self.held = self.held[:cut], self.held[cut:]
        self.text += certain
        return certain


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


def check_output(path):
    """Raises ValueError where a file cannot be made or replaced: a device or pipe stays one."""
    real = os.path.realpath(path)
    directory = os.path.dirname(real)
    if os.path.exists(real) and not os.path.isfile(real):
        raise ValueError(f"{path}: not written: is no ordinary file; name a new one")
    if not os.access(directory, os.W_OK | os.X_OK) or not os.path.isdir(directory):
        raise ValueError(f"{path}: not written: {directory} is no directory to write to")


@contextlib.contextmanager
def complete_or_absent(path):
    """A file to write to, which takes path's place at the end and vanishes on any error."""
    check_output(path)
    place = Path(os.path.realpath(path))  # what a link names is replaced, never the link
    part = place.with_name(f".{place.name}.part")
    try:
        yield part
        os.replace(part, place)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not written: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def save_file(tensors, path, metadata=FORMAT):
    """Write safetensors at once or not at all; the library's own save_file would need NumPy."""
    with complete_or_absent(path) as part:
        part.touch()
        mode = part.stat().st_mode  # as the user's umask has it; serialize_file would make it 0600
        serialize_file({name: TensorSpec(
            dtype=str(x.dtype).removeprefix("torch."), shape=list(x.shape), data_ptr=x.data_ptr(),
            data_len=x.nbytes) for name, x in tensors.items()}, str(part), dict(metadata))
        part.chmod(mode)


@torch.inference_mode()
def routing(model, tokens):
    """What each layer's router did with a text, read in chunks as a prompt is.

    tokens, a list of N ids -> weights (L, N, k), experts (L, N, k), margins (L, N)

    A margin is the last chosen logit less the first refused: near 0, rounding flips the choice.
    """
    [ids], _ = padded([tokens], model.config.vocab_size, model.lm_head.weight.device)
    seen = [[] for _ in model.model.layers]
    hooks = [block.block_sparse_moe.gate.register_forward_hook(
        lambda module, x, logits, layer=layer: layer.append(logits))
        for block, layer in zip(model.model.layers, seen, strict=True)]
    try:
        model(ids[None], model.new_cache(1, len(tokens)), last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    logits, k = [torch.cat(layer) for layer in seen], model.config.num_experts_per_tok
    weights, experts = zip(*(mixtral.route(layer, k) for layer in logits), strict=True)
    best = torch.stack(logits).sort(dim=-1, descending=True)[0]
    least = best[..., k] if k < best.shape[-1] else best[..., k - 1] - math.inf
    return torch.stack(weights), torch.stack(experts), best[..., k - 1] - least


def pieces(tokenizer, tokens):
    """What to show for each token: its text, a character's bytes at the last of them, or <s>."""
    decoder, control = tokenizer.stream(), tokenizer.control
    texts = [decoder.feed(t) + (tokenizer.pieces[t] if t in control else "") for t in tokens]
    return [*texts[:-1], texts[-1] + decoder.flush()]


COLOURS = (203, 215, 221, 114, 80, 75, 141, 211)  # of the 256 of a terminal: light, told apart


def routing_text(tokenizer, tokens, experts, colour):
    """The text with each token's first expert, as a colour or as a number after it, and the loads.

    experts (N, k)
    """
    shown, first, E = [], experts[:, 0].tolist(), 1 + int(experts.max())
    for text, e in zip(pieces(tokenizer, tokens), first, strict=True):
        if colour:
            start = f"\x1b[30;48;5;{COLOURS[e % len(COLOURS)]}m"
            shown.append("\n".join(f"{start}{line}\x1b[0m" if line else "" for line in
                                   text.split("\n")))
        else:
            shown.append(text + str(e).translate({48 + n: 0x2080 + n for n in range(10)}))
    shares = experts.flatten().bincount(minlength=E).double() / experts.numel()
    loads = "  ".join(f"{e}: {100 * share:.1f} %" for e, share in enumerate(shares.tolist()))
    return f"{''.join(shown)}\n\nvisits by expert: {loads}\n"


def routing_page(tokenizer, model, tokens, prompt_length, name):
    """One HTML file of `routing` for a text, with the buffer and the window of each token."""
    weights, experts, margins = routing(model, tokens)
    data = {"model": name, "prompt": prompt_length, "window": model.config.sliding_window,
            "experts": model.config.num_local_experts, "tokens": pieces(tokenizer, tokens),
            "ids": list(tokens), "chosen": experts.tolist(),
            "weights": [[[round(w, 4) for w in token] for token in layer]
                        for layer in weights.tolist()],
            "margins": [[round(m, 4) if m < math.inf else None for m in layer]
                        for layer in margins.tolist()]}
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    return (TINY / "routing.html").read_text(encoding="utf-8").replace("/*DATA*/null", text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def arguments(argv):
    p = Parser(prog="generate.py", description="Continue a text with a Mixtral model.",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    absent = {"default": argparse.SUPPRESS}
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="text to continue; without it, standard input is read")
    what.add_argument("--prompts", type=Path, metavar="FILE", **absent,
                      help="a prompt a line, all as one batch; - is standard input")
    p.add_argument("--chat", action="store_true", default=False,
                   help="talk to an instruct model: a line is a message, /system TEXT, /reset and "
                        "/exit are commands; with --prompt, answer that alone")
    p.add_argument("--system", default="", metavar="TEXT", help="system text of a chat")
    p.add_argument("--model", type=Path, default=TINY, metavar="DIR",
                   help="checkpoint in the Hugging Face layout; the default is the embedded one")
    p.add_argument("--max-new-tokens", type=int, default=300, metavar="N",
                   help="stop after N tokens, if the model has not ended its text before")
    p.add_argument("--stop", action="append", default=[], metavar="STRING",
                   help="end a text before this string; may be given many times")
    p.add_argument("--temperature", type=float, default=0.0,
                   help="0 takes the likeliest token; higher is more varied")
    p.add_argument("--top-p", type=float, default=1.0, help="mass of the nucleus to draw from")
    p.add_argument("--seed", type=int, help="makes draws repeatable; without it they differ")
    p.add_argument("--num-samples", type=int, default=1, metavar="N",
                   help="continue one prompt N times, with seeds SEED, SEED + 1, …")
    p.add_argument("--logprobs", action="store_true", default=False,
                   help="show the model's log-probability of each token, a token a line")
    p.add_argument("--json", action="store_true", default=False,
                   help="print one JSON object a line for each text")
    p.add_argument("--dtype", choices=DTYPES, **absent,
                   help="weights and arithmetic (default: float32 for the embedded checkpoint, "
                        "which not every CPU multiplies fast in bfloat16; else the checkpoint's)")
    p.add_argument("--device", default="cpu", help="torch device, as cpu or cuda")
    p.add_argument("--show-routing", type=int, nargs="?", const=-1, metavar="LAYER", **absent,
                   help="colour each token by its first expert there (default: the middle layer)")
    p.add_argument("--routing-html", type=Path, metavar="FILE", **absent,
                   help="write a page that shows each token's experts in every layer")
    p.add_argument("--trace", type=Path, metavar="FILE", **absent,
                   help="write every intermediate of reading the prompt as safetensors, and "
                        "generate nothing; with --dtype float64 they are exact")
    p.add_argument("--trace-layers", type=layer_list, metavar="N,N", **absent,
                   help="trace these layers alone, as 0,15,31 (default: all)")
    p.add_argument("--trace-scores", action="store_true", **absent,
                   help="trace attention's scores and probabilities too, which are large")
    args = p.parse_args(argv)
    args.batch = "prompts" in args or args.num_samples > 1
    for one, given, others in (
            ("--chat", args.chat, ["prompts"]), ("--json", args.json, ["show_routing"]),
            ("--trace", "trace" in args, ["chat", "json", "show_routing", "routing_html"]),
            ("--num-samples", args.num_samples > 1, ["prompts"]),
            ("a batch", args.batch, ["trace", "show_routing", "routing_html"])):
        for other in others if given else ():
            if getattr(args, other, False) is not False:
                p.error(f"{one} does not go with --{other.replace('_', '-')}")
    for one, whole, given in (
            ("trace-layers", "trace", "trace" in args), ("trace-scores", "trace", "trace" in args),
            ("system", "chat", args.chat)):
        if getattr(args, one.replace("-", "_"), None) and not given:
            p.error(f"--{one} goes with --{whole} alone")
    if args.chat and args.prompt is None and (args.json or args.logprobs or args.num_samples > 1):
        p.error("--json, --logprobs and --num-samples go with --chat only where --prompt is given")
    return args


def layer_list(text):
    """The numbers of a list as 0,15,31."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"wanted layers as 0,15,31, got {text!r}")
    return [int(n) for n in text.split(",")]


def check_device(name):
    """Raises ValueError unless float64 tensors, which rotation needs, can be made there."""
    try:
        torch.zeros(1, dtype=torch.float64, device=name).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not usable here: {reason}") from None


STORED = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # bytes of a number, as safetensors names them


def available(device):
    """Bytes of memory free for use, or None where this machine does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        told = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        limit = Path("/sys/fs/cgroup/memory.max")
        bound = limit.read_text().strip() if limit.exists() else "max"
    except OSError:
        return None
    return min(int(told[1]) * 1024, int(bound) if bound.isdecimal() else math.inf) if told else None


def check_fits(directory, files, dtype, device):
    """Says before the loading what would not fit. Raises ValueError where it cannot go on."""
    stored = needed = sum(file.stat().st_size for file in files)
    if dtype is not None:
        with safe_open(files[0], framework="pt") as file:
            kind = file.get_slice(next(iter(file.keys()))).get_dtype()
        needed = stored * dtype.itemsize // STORED.get(kind, dtype.itemsize)
    free = available(device)
    if free is None or needed <= free:
        return
    told = f"{directory}: {needed / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB of memory free"
    if needed == stored and device == "cpu":
        print(f"[{told}: they stay on disk and are read again for every token, which is slow; "
              "better a machine with more memory]", file=sys.stderr)
    else:
        raise ValueError(f"{told} on {device}; leave out --dtype to keep the stored one, which the "
                         f"CPU maps from disk ({stored / 1e9:.1f} GB), or use a larger machine")


def check_room(model, rows, length):
    """Raises ValueError where keys and values of `rows` texts of `length` tokens would not fit."""
    one = model.new_cache(1, 1)
    slots = min(length, (model.config.sliding_window or length) + 255)
    needed, free = rows * slots * 2 * one.keys.nbytes, available(one.keys.device)
    if free is not None and needed > free:
        raise ValueError(f"{rows} × {length} tokens need {needed / 1e9:.1f} GB of cache, "
                         f"{free / 1e9:.1f} GB of memory free; ask for fewer samples or tokens")


def counted(files):
    """What `from_pretrained` passes its tensors through: a progress bar, on a terminal alone."""
    if not sys.stderr.isatty():
        return iter
    total = sum(file.stat().st_size for file in files)

    def through(stored):
        done = 0
        for name, tensor in stored:
            yield name, tensor
            done += math.prod(tensor.get_shape()) * STORED.get(tensor.get_dtype(), 0)
            bar = "█" * (30 * done // total)
            print(f"\r[{bar:30}] {done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", file=sys.stderr,
                  flush=True)
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    return through


def load(args):
    """Tokenizer and model of the arguments. Raises ValueError where they do not fit together."""
    check_device(args.device)
    dtype = DTYPES[args.dtype] if "dtype" in args else torch.float32 if args.model == TINY else None
    files = mixtral.weight_files(args.model)
    check_fits(args.model, files, dtype, args.device)
    model = Mixtral.from_pretrained(args.model, dtype, args.device, counted(files))
    tokenizer = Tokenizer(args.model)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{args.model}: the tokenizer has {tokenizer.vocab_size} pieces, the "
                         f"model only {model.config.vocab_size}: they do not belong together")
    return tokenizer, model


def read_text(path=None):
    """A file of UTF-8 text, or standard input."""
    name = "standard input" if path in (None, Path("-")) else path
    try:
        data = sys.stdin.buffer.read() if name == "standard input" else path.read_bytes()
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ValueError(f"{name}: not readable: {error.strerror}") from None


def read_prompts(args):
    """The texts to continue: of --prompt, of --prompts line by line, or standard input whole."""
    if "prompts" in args:
        lines = read_text(args.prompts).removesuffix("\n").split("\n")
        if lines == [""]:
            raise ValueError(f"--prompts {args.prompts}: no prompt in it; wanted one a line")
        return lines
    return [read_text().removesuffix("\n") if args.prompt is None else args.prompt]


def peak_memory():
    """The most memory this process has held, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Clock:
    """When reading began, when the first token came and when the last: for rates."""

    def __init__(self):
        self.start = self.first = self.last = time.perf_counter()
        self.steps = 0

    def tick(self):
        self.last = time.perf_counter()
        self.first, self.steps = self.last if not self.steps else self.first, self.steps + 1

    def line(self, read, written, rows, cache):
        """The summary on standard error."""
        read = read if self.steps else 0
        reading = read / max(self.first - self.start, 1e-9)
        writing = max(written - rows, 0) / max(self.last - self.first, 1e-9)
        size = rows // len(cache.lengths) * (cache.keys.nbytes + cache.values.nbytes)
        return (f"[{read} tokens read, {reading:.0f} tokens/s; {written} written, {writing:.0f} "
                f"tokens/s; cache {size / 1e6:.1f} MB, peak memory {peak_memory() / 1e6:.0f} MB]")


def run(args):
    """Everything that was asked for, on standard output; what it took, on standard error."""
    check_sampling(args.temperature, args.top_p)
    check_whole("--max-new-tokens", args.max_new_tokens)
    if args.num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {args.num_samples}")
    check_whole("--seed", (args.seed or 0) + args.num_samples - 1)
    if "" in args.stop:
        raise ValueError("--stop: wanted a string that is not empty")
    for path in {"trace", "routing_html"} & vars(args).keys():
        check_output(getattr(args, path))
    if args.chat and args.prompt is None:
        return converse(args, *load(args))
    tokenizer, model = load(args)
    if getattr(args, "show_routing", -1) not in range(-1, model.config.num_hidden_layers):
        raise ValueError(f"--show-routing: layers are 0 … {model.config.num_hidden_layers - 1}, "
                         f"got {args.show_routing}")
    texts = read_prompts(args)
    prompts = [tokenizer.encode(text) for text in texts]
    if args.chat:
        prompts = [tokenizer.encode_chat(asked(args.system, text)) for text in texts]
    if "trace" in args:
        count = write_trace(model, prompts[0], args.trace, getattr(args, "trace_layers", None),
                            "trace_scores" in args)
        print(f"[{count} tensors of {len(prompts[0])} tokens in {args.trace}]", file=sys.stderr)
        return 0
    return write(args, tokenizer, model, texts, prompts)


def asked(system, text):
    """The messages of a conversation's first turn."""
    return [*([{"role": "system", "content": system}] if system else []),
            {"role": "user", "content": text}]


def write(args, tokenizer, model, texts, prompts):
    """Continue all prompts as one batch: a lone text as it comes, many when all are done."""
    length = max(map(len, prompts)) + args.max_new_tokens
    check_room(model, len(prompts) * args.num_samples, length)
    rows = [(i, n) for i in range(len(prompts)) for n in range(args.num_samples)]
    answers = [Answer(tokenizer, () if args.chat else prompts[i], args.stop) for i, _ in rows]
    streaming = not (args.batch or args.json or args.logprobs or "show_routing" in args)
    cache = model.new_cache(len(prompts), length)
    interrupted, clock = False, Clock()
    try:
        if streaming:
            print(answers[0].prompt, end="", flush=True)
        seeds = [None if args.seed is None else args.seed + n for _, n in rows]
        for step in steps(model, prompts, args.max_new_tokens, args.temperature, args.top_p, seeds,
                          tokenizer.eos_id, cache, args.logprobs):
            clock.tick()
            for answer, drawn in zip(answers, step, strict=True):
                if not answer.ended:
                    text = answer.feed(*drawn)
                    if streaming:
                        print(text, end="", flush=True)
            if all(answer.ended for answer in answers):
                break
    except KeyboardInterrupt:
        interrupted = True
    for (i, n), answer in zip(rows, answers, strict=True):
        rest = answer.flush()
        if interrupted and not answer.ended:
            answer.finish = "interrupted"
        if streaming:
            print(rest, flush=True)
        elif args.json:
            print(record(i, n, texts[i], len(prompts[i]), answer, clock, args.logprobs), flush=True)
        else:
            if args.batch:
                print(f"=== {1 + max(i, n)} of {len(rows)}")
            show(args, tokenizer, model, prompts[i], answer)
    if "routing_html" in args:
        tokens = prompts[0] + answers[0].tokens
        page = routing_page(tokenizer, model, tokens, len(prompts[0]), args.model.name)
        with complete_or_absent(args.routing_html) as part:
            part.write_text(page, encoding="utf-8")
        print(f"[routing of {len(tokens)} tokens in {args.routing_html}]", file=sys.stderr)
    print(clock.line(sum(map(len, prompts)), sum(len(answer.tokens) for answer in answers),
                     len(rows), cache), file=sys.stderr)
    return 130 if interrupted else 0


def show(args, tokenizer, model, prompt, answer):
    """Print a finished text: with log-probabilities, with its routing, or plain."""
    if "show_routing" in args:
        layer = args.show_routing if args.show_routing >= 0 else len(model.model.layers) // 2
        _, experts, _ = routing(model, prompt + answer.tokens)
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(f"layer {layer}, first expert of each token:\n")
        print(routing_text(tokenizer, prompt + answer.tokens, experts[layer], colour), end="")
    elif args.logprobs:
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
            piece = json.dumps(tokenizer.pieces[token], ensure_ascii=False)
            print(f"{logprob:9.4f} {token:6d} {piece}")
    else:
        print(answer.prompt + answer.text, flush=True)


def record(index, number, text, read, answer, clock, logprobs):
    """One line of --json."""
    return json.dumps({
        "index": index, "sample": number, "prompt": text, "text": answer.text,
        "tokens": answer.tokens, "logprobs": answer.logprobs if logprobs else None,
        "finish_reason": answer.finish, "timings": {
            "prompt_tokens": read, "prefill_seconds": round(clock.first - clock.start, 6),
            "decode_seconds": round(clock.last - clock.first, 6)}}, ensure_ascii=False)


def converse(args, tokenizer, model):
    """A conversation, a line a message, until /exit or the end of input."""
    terminal, system = sys.stdin.isatty(), args.system
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then edits the line and remembers earlier ones
    if args.model == TINY:
        print("[the embedded model was not taught to answer; it tells stories]", file=sys.stderr)
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    chat = Chat(model, tokenizer, system, **sampling)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            print(end="\n" if terminal else "", flush=True)
            return 0
        except KeyboardInterrupt:
            print(flush=True)
            continue
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return 0
        if command in ("/reset", "/system"):
            system = rest.strip() if command == "/system" else system
            chat = Chat(model, tokenizer, system, **sampling)
        elif command.startswith("/"):
            print(f"{command}: no such command; there are /system TEXT, /reset and /exit",
                  file=sys.stderr)
        elif command:
            try:
                speak(args, tokenizer, chat, line)
            except ValueError as error:
                print(f"generate.py: {error}", file=sys.stderr)


def speak(args, tokenizer, chat, line):
    """Print one answer as it comes; Ctrl-C ends it early."""
    answer, clock, known = Answer(tokenizer, stops=args.stop), Clock(), len(chat.read)
    tokens = chat.answer(line, args.max_new_tokens)
    with contextlib.closing(tokens), contextlib.suppress(KeyboardInterrupt):
        for token in tokens:
            clock.tick()
            print(answer.feed(token), end="", flush=True)
            if answer.ended:
                break
    print(answer.flush(), flush=True)
    if chat.cache is not None:
        read = len(chat.read) + 1 - len(answer.tokens) - known
        print(clock.line(read, len(answer.tokens), 1, chat.cache), file=sys.stderr)


def main(argv=None):
    args = arguments(argv)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return run(args)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # none at exit tries again
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"generate.py: {error.filename or 'standard output'}: {error.strerror}",
              file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
