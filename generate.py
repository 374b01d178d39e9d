"""Text from a Mixtral model: `python generate.py --prompt "Once upon a time"`.

Generation has two phases. The prefill reads the whole prompt. The decode then draws one token at a
time and reads it, until the text ends:

    logits = read(prompt)
    repeat:  token  = sample(logits)
             logits = read(token)

Every row of a batch draws from its own random generator, so in float64 a row's text does not depend
on the other rows, and in lower precision only through rounding. The folder fast/ makes the same
model quick on this machine, and adds 4-bit weights and several devices.

With --json each text is one line with the fields index, prompt, text (without the prompt), tokens,
logprobs (natural logarithms, before temperature and top-p), finish_reason (eos, stop, length or
interrupted) and timings. Exit codes: 0 for success, also if the reader of a pipe has gone; 1 for
bad input; 2 for bad arguments; 130 after Ctrl-C, which still prints the tokens drawn so far.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import secrets
import signal
import sys
import time
import warnings
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while the following modules are imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch

from convert import HUGGINGFACE, dtype_of_experts, open_checkpoint
from mixtral import assemble, route
from tokenizer import Tokenizer

try:
    import fast.ranks
except ModuleNotFoundError as error:
    if error.name not in ("fast", "fast.ranks"):  # a folder without files is no fast/ either
        raise
    fast = None

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}
CHUNK, GPU_CHUNK = 512, 4096  # tokens that the prefill reads at a time, on a CPU and on a GPU
COLOURS = (203, 215, 221, 114, 80, 75, 141, 211)  # of the experts, on a terminal with 256 colours
show = functools.partial(print, end="", flush=True)


# ------------------------------------------------------------------ sampling and the loop


def sample(logits, temperature=0.0, top_p=1.0, generator=None):
    """Draw from softmax(logits / temperature), restricted to the nucleus (top-p sampling).

    logits (..., V) -> (...)

    Temperature 0 is the argmax. The nucleus is the smallest set of the likeliest tokens whose
    probabilities sum to at least top_p, so it is never empty. Of equal logits, the token with the
    lower id counts as likelier. Raises ValueError unless the largest logit is finite. The result is
    on the CPU, and so must the generator be.

    >>> sample(torch.tensor([1.0, 3.0, 3.0]))
    tensor(1)
    """
    check_options(temperature, top_p)
    logits = logits.to("cpu")  # first, because not every device has float64
    if not logits.amax(dim=-1).isfinite().all():
        raise ValueError("the logits are NaN or infinite; the weights are damaged, or the dtype is "
                         "too narrow for them")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.double()
    # Subtracting the maximum first keeps the quotient finite for any temperature.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    mass, ids = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_p < 1:
        mass = mass.masked_fill(mass.cumsum(dim=-1) - mass >= top_p, 0)
    drawn = torch.multinomial(mass.reshape(-1, mass.shape[-1]), 1, generator=generator)
    return ids.gather(-1, drawn.view(*ids.shape[:-1], 1)).squeeze(-1)


def check_options(temperature=0.0, top_p=1.0, max_new_tokens=0, seed=None):
    """Raises ValueError for an option that no text can be generated with."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be greater than 0 and at most 1, got {top_p}")
    for name, value in ("max_new_tokens", max_new_tokens), ("seed", seed or 0):
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"{name} must be an integer >= 0 and < 2**63, got {value!r}")


@torch.inference_mode()
def generate_steps(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=None,
                   eos_id=None, cache=None, logprobs=False):
    """Yield after each step a list with (token, log-probability) for every row.

    `eos_id` is the id that ends a row, or a set of such ids. A row that has ended yields None. The
    log-probability is None unless `logprobs` is set. A given cache is continued, and at the end it
    lacks the last token of each row.
    """
    check_options(temperature, top_p, max_new_tokens, seed)
    ends = {eos_id} if isinstance(eos_id, int | None) else eos_id
    device = model.lm_head.weight.device
    tokens, lengths = pad(prompts, model.config.vocab_size, device)
    seeds = [secrets.randbelow(2**63) if seed is None else seed for _ in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cache = cache or new_cache(model, len(prompts), tokens.shape[1] + max_new_tokens)
    read = fast.reader(model, cache) if fast else (
        lambda tokens, lengths: model(tokens, cache, lengths, last_only=True)[:, 0])
    alive = [True] * len(prompts)
    for _ in range(max_new_tokens):
        logits = read(tokens, lengths).to("cpu")  # (B, V)
        drawn = sample(logits) if temperature == 0 else torch.stack([
            sample(row, temperature, top_p, g) for row, g in zip(logits, generators, strict=True)])
        known = (logits.double().log_softmax(-1).gather(1, drawn[:, None])[:, 0].tolist()
                 if logprobs else [None] * len(prompts))
        step = [(token, logprob) if lives else None for token, logprob, lives in
                zip(drawn.tolist(), known, alive, strict=True)]
        if fast and fast.ranks.is_sharded(model):
            step = fast.ranks.from_first(step)  # so that rounding cannot make the ranks diverge
        yield step
        alive = [drawn is not None and drawn[0] not in ends for drawn in step]
        if not any(alive):
            return
        tokens = torch.tensor([[drawn[0] if drawn else 0] for drawn in step], device=device)
        lengths = torch.tensor(alive).long()  # a row that has ended reads nothing


def pad(prompts, vocab_size, device):
    """Lists of token ids as one right-padded tensor (B, S), and their lengths (B)."""
    for prompt in prompts:
        if not prompt or any(type(t) is not int or not 0 <= t < vocab_size for t in prompt):
            raise ValueError(f"a prompt must be a list of at least one token in 0 … "
                             f"{vocab_size - 1}, got {prompt!r:.80}")
    S = max(map(len, prompts))
    tokens = torch.tensor([[*prompt] + [0] * (S - len(prompt)) for prompt in prompts])
    return tokens.to(device), torch.tensor([len(prompt) for prompt in prompts])


def new_cache(model, rows, length):
    """A cache for rows of that length. Raises ValueError if it does not fit into memory."""
    chunk = GPU_CHUNK if model.lm_head.weight.is_cuda else CHUNK
    if fast:
        fast.memory.check_cache(model, rows, length, chunk)
    try:
        return model.new_cache(rows, length, chunk)
    except (RuntimeError, TypeError):  # PyTorch has no memory, or no integer, for this size
        raise ValueError(f"no memory for {rows} rows of {length} tokens; ask for fewer") from None


def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=None, eos_id=None):
    """The new tokens of each prompt, with the EOS if it was drawn; all rows use the same seed."""
    new, options = [[] for _ in prompts], (temperature, top_p, seed, eos_id)
    for step in generate_steps(model, prompts, max_new_tokens, *options) if prompts else ():
        for row, drawn in zip(new, step, strict=True):
            row.extend(drawn[:1] if drawn else [])
    return new


# ------------------------------------------------------------------ texts and conversations


class Completion:
    """The tokens and the text of one row as they grow; `beginning` is the text of its prompt.

    The last characters, one fewer than the longest stop string has, are held back until the text
    ends, because they could be part of a stop string.
    """

    def __init__(self, tokenizer, stops=(), prompt=()):
        self.decoder, self.stops, self.eos_ids = tokenizer.stream(), stops, tokenizer.eos_ids
        self.beginning = "".join(map(self.decoder.feed, prompt))
        self.text, self.released = "", 0  # characters
        self.tokens, self.logprobs, self.finish_reason = [], [], None

    def feed(self, token, logprob=None):
        """Take the next token and return the text that it releases."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.eos_ids:
            self.finish_reason = "eos"
        return self._release(self.decoder.feed(token), max(map(len, self.stops), default=1) - 1)

    def finish(self, reason):
        """End the text, with this reason if there is none yet, and return its last part."""
        text = "" if self.finish_reason == "stop" else self._release(self.decoder.flush(), 0)
        self.finish_reason = self.finish_reason or reason
        return text

    def _release(self, text, hold):
        """Add decoded text, and return all that is new but for the last `hold` characters."""
        self.text += text
        ends = [(at + len(stop), at) for stop in self.stops
                if (at := self.text.find(stop, self.released)) >= 0]
        if ends:
            _, at = min(ends)  # the stop string that was complete first, the longest of several
            self.text, self.finish_reason, hold = self.text[:at], "stop", 0
        start, self.released = self.released, max(self.released, len(self.text) - hold)
        return self.text[start:self.released]


class Chat:
    """A conversation with an instruct model; each turn reads only the tokens that are new.

    The cache holds the tokens `ids`. If the next turn does not begin with them, all is read again.
    This happens after a stop string, and with v2 and v3 tokenizers, which move the system text to
    the last message.
    """

    def __init__(self, model, tokenizer, system="", **sampling):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.messages = [{"role": "system", "content": system}] if system else []
        self.ids, self.cache, self.new_tokens = [], None, 0
        tokenizer.encode_chat([*self.messages, {"role": "user", "content": ""}])  # or a ValueError

    def answer(self, text, max_new_tokens):
        """Yield the tokens of the answer as they are drawn.

        If the caller stops early, the tokens drawn so far become the answer. If there are none, the
        conversation is as it was before the call.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids, drawn = self.tokenizer.encode_chat(messages), []
        length = len(ids) + max_new_tokens
        if not self.cache or length > self.cache.max_length or ids[:len(self.ids)] != self.ids:
            self.ids, self.cache = [], new_cache(self.model, 1, 2 * length)
        new = ids[len(self.ids):]
        self.new_tokens = len(new)  # which the prefill of this turn reads
        ends = self.tokenizer.eos_ids
        try:
            for [(token, _)] in generate_steps(self.model, [new], max_new_tokens, eos_id=ends,
                                               cache=self.cache, **self.sampling):
                drawn.append(token)
                yield token
        finally:
            # The last token has been drawn but not read; an interrupted step may have stored it.
            self.ids = (ids + drawn)[:-1] if drawn else []
            self.cache.positions[self.cache.positions >= len(self.ids)] = -1
            if drawn:
                content = drawn[:-1] if drawn[-1] in ends else drawn
                self.messages = [*messages, {"role": "assistant", "content": content}]


# ------------------------------------------------------------------ loading


def load(directory, dtype=None, device="auto"):
    """The tokenizer and the model of a directory; fast/ prepares the model for this machine.

    With dtype None all weights have that of the experts, and on a CPU stay mapped from disk. "auto"
    is CUDA if fast/ is there and the weights fit, else the CPU. Raises ValueError for bad files.
    """
    device = "cpu" if device == "auto" and not fast else device
    checkpoint = open_checkpoint(directory)
    if checkpoint.layout != HUGGINGFACE or checkpoint.files[0].suffix != ".safetensors":
        raise ValueError(f"{directory}: convert it first, with: python convert.py --input_dir "
                         f"{directory} --output_dir OUT")
    tokenizer, config = Tokenizer(directory), checkpoint.config
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{directory}: the tokenizer has {tokenizer.vocab_size} pieces, the model "
                         f"only {config.vocab_size}; they do not belong together")
    dtype, weights = dtype or dtype_of_experts(checkpoint), checkpoint.tensors
    for note in checkpoint.notes:
        print(f"[{note}]", file=sys.stderr)
    if fast:
        return tokenizer, fast.build(checkpoint.raw, weights, dtype, device)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("several ranks need the folder fast/")
    return tokenizer, assemble(config, {name: w.to(device, dtype) for name, w in weights.items()})


# ------------------------------------------------------------------ the command line


def parse_arguments(argv):
    p = argparse.ArgumentParser(
        prog="generate.py", description="Continue a text with a Mixtral model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add, absent = p.add_argument, argparse.SUPPRESS
    add("--prompt", action="append", metavar="TEXT", default=absent,
        help="text to continue (default: standard input); several form one batch")
    add("--model", type=Path, default=TINY, metavar="DIR", help="a Hugging Face checkpoint")
    add("--max-new-tokens", type=int, default=300, metavar="N", help="end a text after N tokens")
    add("--temperature", type=float, default=0.0,
        help="0 always takes the likeliest token; higher values vary more")
    add("--top-p", type=float, default=1.0,
        help="draw from the likeliest tokens with this total probability")
    add("--seed", type=int, help="makes random draws repeatable")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a text before this string")
    add("--json", action="store_true", help="print one JSON object per text")
    add("--experts", nargs="?", type=int, metavar="LAYER", default=absent,
        help="colour each token by its strongest expert in a layer (default: the middle one); in a "
             "pipe or with NO_COLOR, the expert is a small number after the token")
    add("--chat", action="store_true",
        help="talk to an instruct model: each line is a message, and /system TEXT, /reset and "
             "/exit are commands (// sends a /); with --prompt, answer it and exit")
    add("--system", default="", metavar="TEXT", help="system text of a chat")
    add("--dtype", choices=DTYPES, default=absent,
        help="of all numbers (default: that of the checkpoint; float32 for the embedded model)")
    add("--device", default="auto", help="cpu, cuda, …; auto is cuda if the weights fit, else cpu")
    args = p.parse_args(argv)
    for wrong, reason in (
            (args.system and not args.chat, "--system needs --chat"),
            (args.chat and args.json and "prompt" not in args, "--json with --chat needs --prompt"),
            ("" in args.stop, "--stop needs a string that is not empty"),
            ("experts" in args and (args.json or args.chat or args.stop
                                    or len(vars(args).get("prompt", [])) > 1),
             "--experts takes one prompt, and no --json, --chat or --stop")):
        if wrong:
            p.error(reason)
    return args


def write(args):
    """Load the model and print what the arguments ask for; returns the exit code."""
    options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    check_options(max_new_tokens=args.max_new_tokens, **options)
    device = fast.ranks.join(args.device) if fast else args.device
    embedded = args.model.resolve() == TINY
    dtype = DTYPES[args.dtype] if "dtype" in args else torch.float32 if embedded else None
    tokenizer, model = load(args.model, dtype, device)
    if args.chat and embedded:
        print("[the embedded model was not trained to chat; it tells stories]", file=sys.stderr)
    if "prompt" not in args:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        if args.chat:
            return converse(args, tokenizer, model, options)
        args.prompt = [sys.stdin.read().removesuffix("\n").removesuffix("\r")]
    texts = fast.ranks.from_first(args.prompt) if fast else args.prompt
    start = Chat(model, tokenizer, args.system).messages if args.chat else []
    prompts = [tokenizer.encode_chat([*start, {"role": "user", "content": text}]) if args.chat
               else tokenizer.encode(text) for text in texts]
    length = max(map(len, prompts)) + args.max_new_tokens + 1
    options |= {"eos_id": tokenizer.eos_ids, "cache": new_cache(model, len(prompts), length)}
    if "experts" in args:
        return print_experts(args, tokenizer, model, prompts[0], options)
    return print_texts(args, tokenizer, model, texts, prompts, options)


def print_texts(args, tokenizer, model, texts, prompts, options):
    """Print one text as it grows, or the texts of a batch or JSON at the end; an exit code."""
    completions = [Completion(tokenizer, args.stop, () if args.chat else prompt)
                   for prompt in prompts]
    steps = generate_steps(model, prompts, args.max_new_tokens, logprobs=args.json, **options)
    if len(texts) == 1 and not args.json:
        show(completions[0].beginning)
        prefill, decode = complete(completions, steps, show)
    else:
        prefill, decode = complete(completions, steps)
        for n, (text, prompt, c) in enumerate(zip(texts, prompts, completions, strict=True)):
            line = {"index": n, "prompt": text, "text": c.text, "tokens": c.tokens,
                    "logprobs": c.logprobs, "finish_reason": c.finish_reason,
                    "timings": {"prompt_tokens": len(prompt), "prefill_seconds": round(prefill, 6),
                                "decode_seconds": round(decode, 6)}}
            print(json.dumps(line, ensure_ascii=False) if args.json else
                  f"=== {n + 1} of {len(texts)}\n{c.beginning}{c.text}", flush=True)
    print_summary(model, completions, sum(map(len, prompts)), prefill, decode)
    return 130 if "interrupted" in [completion.finish_reason for completion in completions] else 0


def complete(completions, steps, show=lambda text: None):
    """Take steps until all texts have ended or Ctrl-C ends them, and show what they release.

    Returns the seconds until the first tokens, and from then on until the last ones.
    """
    reason, start, first, last = "interrupted", time.perf_counter(), None, None
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(steps):
        for step in steps:
            last = time.perf_counter()
            first = first or last
            for completion, drawn in zip(completions, step, strict=True):
                if not completion.finish_reason:
                    show(completion.feed(*drawn))
            if all(completion.finish_reason for completion in completions):
                break
        reason = "length"
    for completion in completions:
        show(completion.finish(reason) + "\n")
    return (first - start, last - first) if first else (0.0, 0.0)


def print_summary(model, completions, prompt_tokens, prefill, decode):
    """Print one line to standard error; the first token of a text belongs to the prefill."""
    written = sum(len(completion.tokens) for completion in completions)
    rate = (written - len(completions)) / decode if decode else 0
    print(f"[{prompt_tokens} tokens read in {prefill:.2f} s; {written} written, {rate:.0f} "
          f"tokens/s on {model.lm_head.weight.device}]", file=sys.stderr)


def print_experts(args, tokenizer, model, prompt, options):
    """Print one text as it grows, and with each token its strongest expert in one layer.

    The router sees a token one step after it was drawn, so there is one step more than tokens.
    """
    layers, E, decoder = model.model.layers, model.config.num_local_experts, tokenizer.stream()
    layer = len(layers) // 2 if args.experts is None else args.experts
    if not 0 <= layer < len(layers):
        raise ValueError(f"--experts must be a layer in 0 … {len(layers) - 1}, got {layer}")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and E <= len(COLOURS)

    def mark(text, expert):
        if colour:
            return f"\x1b[30;48;5;{COLOURS[expert]}m{text}\x1b[0m"
        return text + "".join(chr(ord("₀") + int(digit)) for digit in str(expert))

    unread, experts = prompt, []
    layers[layer].block_sparse_moe.gate.register_forward_hook(
        lambda gate, inputs, logits: experts.extend(route(logits, 1)[1].flatten().tolist()))
    try:
        for [(drawn, _)] in generate_steps(model, [prompt], args.max_new_tokens + 1, **options):
            for token, expert in zip(unread, experts, strict=True):
                lines = decoder.feed(token).split("\n")
                show("\n".join(line and mark(line, expert) for line in lines))
            unread, experts = [drawn], []
    finally:
        show(f"{decoder.flush()}\nexperts of layer {layer}: ")
        print(*(mark(f" {e} " if colour else "", e) for e in range(E)))
    return 0


def converse(args, tokenizer, model, options):
    """A conversation with one message per line, until /exit or the end; // sends a first slash."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and a history
    if os.environ.get("RANK") == "0":  # Ctrl-C ends torchrun and so all ranks
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    chat = Chat(model, tokenizer, args.system, **options)
    while (line := read_line()) is not None:
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            break
        if command in ("/reset", "/system"):
            args.system = rest.strip() if command == "/system" else args.system
            chat = Chat(model, tokenizer, args.system, **options)
        elif command.startswith("/") and not command.startswith("//"):
            print(f"{command}: unknown; use /system TEXT, /reset or /exit, and // in front of a "
                  "message that begins with /", file=sys.stderr)
        elif command:
            text = line.replace("//", "/", 1) if command.startswith("//") else line
            try:
                completion = Completion(tokenizer, args.stop)
                steps = ([(token,)] for token in chat.answer(text, args.max_new_tokens))
                seconds = complete([completion], steps, show)
                if completion.finish_reason == "stop":  # forget what follows the stop string
                    chat.messages[-1]["content"] = completion.text
                print_summary(model, [completion], chat.new_tokens, *seconds)
            except ValueError as error:
                print(f"generate.py: {error}", file=sys.stderr)
    return 0


def read_line():
    """The next line of standard input, or None at its end; Ctrl-C gives an empty line."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        line = None
    except KeyboardInterrupt:
        line = ""
        show("\n")
    line = line and line.removesuffix("\r")
    return fast.ranks.from_first(line) if fast else line


def main(argv=None):
    """Run a command line; returns the exit code. Bad input gives one line on standard error."""
    args = parse_arguments(argv)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        return write(args)
    except KeyboardInterrupt:
        return 130
    except OSError as problem:  # standard output is written again at the end: it must not fail then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(problem, BrokenPipeError):
            sys.exit(0)  # without waiting for other ranks, which still compute
        error = f"{problem.filename or 'standard output'}: {problem.strerror}"
    except ValueError as problem:
        error = str(problem)
    except Exception as problem:  # for example, config.json has a list in place of a number
        if sys.flags.dev_mode:
            raise
        error = f"{args.model}: {problem!r}; python -X dev shows where"
    error = "".join(c if c.isprintable() else " " for c in error)
    print(f"generate.py: {error:.2000}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(fast.ranks.run(main) if fast else main())
