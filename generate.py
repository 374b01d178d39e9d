"""Text from a Mixtral model: `python generate.py --prompt "Once upon a time"`.

Generation has two phases. The prefill reads the whole prompt in chunks. The decode then draws one
token at a time and reads it:

    logits = model(prompt, cache)
    repeat:  token  = sample(logits)
             logits = model(token, cache)

Every row of a batch draws from its own random generator. In float64 a row's text does not depend
on the other rows; in lower precision this holds up to rounding, which can change a close choice.
The sampler works in float64.

With --json each text is one line with the fields index, prompt, text (without the prompt), tokens,
logprobs (natural logarithms, before temperature and top-p), finish_reason (eos, stop, length or
interrupted) and timings. A stop string ends a text and is not part of it.

Exit codes: 0 for success, also if the reader of a pipe has gone; 1 for bad input; 2 for bad
arguments; 130 after an interruption, which still prints the tokens drawn so far.
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mixtral import (
    Int4Linear,
    MixtralConfig,
    assemble,
    at_least_float32,
    convert_floats,
    read_json,
    read_weights,
    unpack,
    weight_files,
)
from tokenizer import Tokenizer

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


# ------------------------------------------------------------------ sampling


def sample(logits, temperature=0.0, top_p=1.0, generator=None):
    """Draw from softmax(logits / temperature), restricted to the nucleus (top-p sampling).

    logits (..., V) -> (...)

    Temperature 0 is the argmax. The nucleus is the smallest set of the likeliest tokens whose
    probabilities sum to at least top_p, so it is never empty. Of equal logits, the token with the
    lower id counts as likelier. Raises ValueError unless the largest logit
    is finite.

    >>> sample(torch.tensor([1.0, 3.0, 3.0]))
    tensor(1)
    """
    check_sampling(temperature, top_p)
    if not all(map(math.isfinite, logits.amax(dim=-1).flatten().tolist())):
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


def check_sampling(temperature, top_p):
    """Raises ValueError unless 0 <= temperature < ∞ and 0 < top_p <= 1."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be greater than 0 and at most 1, got {top_p}")


def check_integer(name, value):
    """Raises ValueError unless the value is an integer in 0 … 2⁶³ − 1, the range of seeds."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} must be an integer >= 0 and < 2**63, got {value!r}")


def random_generator(seed, device):
    """A source of random numbers; with seed None it is seeded by the operating system."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


# ------------------------------------------------------------------ generation


def pad(prompts, vocab_size, device):
    """Lists of token ids as one right-padded tensor (B, S), and their lengths (B)."""
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt has no tokens; it needs at least the BOS token")
        if wrong := [t for t in prompt if type(t) is not int or not 0 <= t < vocab_size]:
            raise ValueError(f"prompt tokens must be integers in 0 … {vocab_size - 1}, "
                             f"got {wrong[0]!r}")
    S = max(map(len, prompts))
    tokens = torch.tensor([[*prompt] + [0] * (S - len(prompt)) for prompt in prompts])
    return tokens.to(device), torch.tensor([len(prompt) for prompt in prompts], device=device)


@torch.inference_mode()
def generate_steps(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=None,
                   eos_id=None, cache=None, logprobs=False):
    """Yield after each step a list with (token, log-probability) for every row.

    A row that has ended yields None. The log-probability is None unless `logprobs` is set. A given
    cache is continued, and at the end it lacks the last token of each row.
    """
    check_sampling(temperature, top_p)
    check_integer("max_new_tokens", max_new_tokens)
    if seed is not None:
        check_integer("seed", seed)
    device = model.lm_head.weight.device
    tokens, lengths = pad(prompts, model.config.vocab_size, device)
    generators = [random_generator(seed, device) for _ in prompts]
    if cache is None:
        cache = new_cache(model, len(prompts), tokens.shape[1] + max_new_tokens)
    alive = [True] * len(prompts)
    with packed_weights(model, len(prompts), max_new_tokens):
        for _ in range(max_new_tokens):
            logits = model(tokens, cache, lengths, last_only=True)[:, 0]  # (B, V)
            tokens = draw(logits, temperature, top_p, generators)  # (B)
            if is_sharded(model):
                dist.broadcast(tokens, src=0)  # so that rounding cannot make the ranks diverge
            drawn = tokens.tolist()
            tokens = tokens[:, None]  # (B, 1)
            known = [None] * len(prompts)
            if logprobs:
                known = logits.double().log_softmax(-1).gather(1, tokens)[:, 0].tolist()
            yield [pair if lives else None
                   for pair, lives in zip(zip(drawn, known, strict=True), alive, strict=True)]
            alive = [lives and token != eos_id for lives, token in zip(alive, drawn, strict=True)]
            if not any(alive):
                return
            lengths = torch.tensor(alive, dtype=torch.int64, device=device)  # an ended row reads 0


def draw(logits, temperature, top_p, generators):
    """One token per row, each row with its own generator: (B, V) to (B)."""
    if temperature == 0:
        return sample(logits)
    return torch.stack([sample(row, temperature, top_p, generator)
                        for row, generator in zip(logits, generators, strict=True)])


def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=None, eos_id=None):
    """The new tokens of each prompt as a list of lists; a drawn EOS is included and is the last.

    All rows use the same seed, so equal prompts give equal texts. Raises ValueError for an empty
    prompt or a token outside the vocabulary.
    """
    new = [[] for _ in prompts]
    if prompts:
        options = temperature, top_p, seed, eos_id
        for step in generate_steps(model, prompts, max_new_tokens, *options):
            for row, pair in zip(new, step, strict=True):
                row += [] if pair is None else [pair[0]]
    return new


class Completion:
    """The tokens and the text of one row as they grow.

    Text is released once it can no longer be the start of a stop string.
    """

    def __init__(self, tokenizer, stops=()):
        self.decoder, self.stops, self.eos_id = tokenizer.stream(), stops, tokenizer.eos_id
        self.text, self.tokens, self.logprobs, self.finish_reason = "", [], [], None
        self.pending = ""  # decoded text that is not yet released

    def echo(self, prompt):
        """Decode the tokens of the prompt, so that the text continues them; returns their text."""
        return "".join(map(self.decoder.feed, prompt))

    def feed(self, token, logprob=None):
        """Take the next token and return the text that it releases."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token == self.eos_id:
            self.finish_reason = "eos"
        return self._release(self.decoder.feed(token))

    def finish(self, reason):
        """End the text, with this reason if there is none yet, and return its last part."""
        text = "" if self.finish_reason == "stop" else self._release(self.decoder.flush())
        text, self.text, self.pending = text + self.pending, self.text + self.pending, ""
        self.finish_reason = self.finish_reason or reason
        return text

    def _release(self, text):
        self.pending += text
        found = [(at + len(stop), at) for stop in self.stops
                 if (at := self.pending.find(stop)) >= 0]
        if found:
            _, at = min(found)  # the stop string that was complete first, the longest of several
            text, self.pending, self.finish_reason = self.pending[:at], "", "stop"
        else:
            started = max((n for stop in self.stops for n in range(1, len(stop))
                           if self.pending.endswith(stop[:n])), default=0)
            split = len(self.pending) - started
            text, self.pending = self.pending[:split], self.pending[split:]
        self.text += text
        return text


class Chat:
    """A conversation with an instruct model; each turn reads only the tokens that are new.

    The cache holds `read`, the ids read so far. If the ids of the next turn do not begin with them,
    the conversation is read again. That happens only with v2 and v3 tokenizers, which move the
    system text to the latest user message.
    """

    def __init__(self, model, tokenizer, system="", **sampling):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.messages = [{"role": "system", "content": system}] if system else []
        self.read, self.cache, self.new_tokens = [], None, 0

    def answer(self, text, max_new_tokens):
        """Yield the tokens of the answer as they are drawn.

        If the caller stops early, the tokens drawn so far become the answer. If there are none, the
        conversation is as it was before the call.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids, drawn = self.tokenizer.encode_chat(messages), []
        length = len(ids) + max_new_tokens
        if not self.cache or length > self.cache.max_length or ids[:len(self.read)] != self.read:
            self.read, self.cache = [], new_cache(self.model, 1, 2 * length)
        new = ids[len(self.read):]
        self.new_tokens = len(new)  # the number of tokens that this turn's prefill reads
        try:
            for [(token, _)] in generate_steps(
                    self.model, [new], max_new_tokens,
                    eos_id=self.tokenizer.eos_id, cache=self.cache, **self.sampling):
                drawn.append(token)
                yield token
        finally:
            self._keep(messages, ids, drawn)

    def _keep(self, messages, ids, drawn):
        if not drawn:
            self.read, self.cache = [], None
            return
        self.read = (ids + drawn)[:-1]  # the last token has been drawn but not read
        # An interrupted step may have begun to store one more token.
        self.cache.positions[self.cache.positions >= len(self.read)] = -1
        content = drawn[:-1] if drawn[-1] == self.tokenizer.eos_id else drawn
        self.messages = [*messages, {"role": "assistant", "content": content}]


def chat_messages(system, text):
    """The messages of a conversation's first turn."""
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": text}]


# ------------------------------------------------------------------ loading, and this machine


def load(directory, dtype=None, device="cpu"):
    """The tokenizer and the model of a directory, prepared for this machine by `tune`.

    With dtype None the weights keep their dtype, and on a CPU they stay mapped from disk. If
    torch.distributed is initialised, every rank loads its share of the model. Raises ValueError if
    the directory is incomplete or damaged, or if the weights do not fit into memory.
    """
    check_device(device)
    files = weight_files(directory)
    raw = read_json(Path(directory) / "config.json")
    config = MixtralConfig.from_dict(raw)
    tokenizer = Tokenizer(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{directory}: the tokenizer has {tokenizer.vocab_size} pieces, the model "
                         f"only {config.vocab_size}; they do not belong together")
    weights = read_weights(files)
    if dist.is_initialized():
        raw, weights = shard(raw, weights, dist.get_rank(), dist.get_world_size())
    fits = check_memory(directory, weights, dtype, device)
    weights = {name: convert_floats(weight, dtype, device)
               for name, weight in with_progress(weights)}
    model = assemble(raw, weights)
    del weights  # so that `tune` can release each weight that it replaces
    model = tune(model, may_copy=fits)
    return tokenizer, reduce_outputs(model) if dist.is_initialized() else model


def tune(model, may_copy=True):
    """Make the linear layers of a model fast on this CPU; returns the model.

    4-bit weights are copied, which needs their size again in memory; without `may_copy` they stay
    as they are. The choices of operations change results by rounding only.
    """
    if not model.lm_head.weight.is_cpu:
        return model
    layers = [layer for layer in model.modules() if isinstance(layer, Int4Linear)]
    if may_copy and layers and all(map(TunedInt4Linear.fits, layers)):
        repack(model)
    for module in model.modules():
        if type(module) is nn.Linear and torch.backends.mkldnn.is_available():
            module.__class__ = TunedLinear
    return model


def repack(model):
    """Replace 4-bit layers one by one, and copy the other weights, so that no file stays mapped."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, Int4Linear):
                setattr(parent, name, TunedInt4Linear(layer))
    for weight in model.parameters():
        weight.data = weight.data.clone()


# These ranges were measured on 2 cores of an AMD EPYC, with AVX-512 and when restricted to AVX2. In
# float32, oneDNN's product takes 0.4–0.9 of the time of F.linear for 1 to 128 rows and weights of
# 3584 × 1024 or 1024 × 3584, and 0.8–1.0 for 512 rows. For small matrices it is slower.
SMALL = 2**18
# When restricted to AVX2, the CPU multiplies 16-bit floats at 40 GFLOP/s, and float32 at 200. To
# widen the weights to float32 first takes 0.9–1.0 of the time of the 16-bit product for 5 rows,
# 0.6–0.8 for 8 and 0.5 for 16. Widening 2²² weights at a time reuses the same memory.
WIDEN_ROWS, BLOCK = 5, 2**22


class TunedLinear(nn.Linear):
    """A linear layer that uses the fastest of PyTorch's products for its shape on this CPU."""

    packed = None  # the weights in oneDNN's layout, while `packed_weights` keeps them

    def forward(self, x):
        weight, packed, rows = self.weight, self.packed, x.numel() // self.in_features
        narrow = weight.dtype.itemsize < 4
        if rows == 1 and (narrow or weight.numel() < SMALL):
            return matrix_vector_product(weight, x).view(*x.shape[:-1], -1)
        if packed is not None:
            return onednn_product(x, packed)
        if not narrow or rows < WIDEN_ROWS or has_arithmetic(weight.dtype):
            return product(x, weight)
        wide = at_least_float32(x)
        outputs = max(BLOCK // self.in_features // 64, 1) * 64  # of one block
        blocks = weight.split(outputs)
        products = [product(wide, at_least_float32(block)) for block in blocks]
        return torch.cat(products, dim=-1).to(x.dtype)


def has_arithmetic(dtype):
    """Whether oneDNN multiplies matrices of this 16-bit dtype on this CPU."""
    return (torch.ops.mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else
            torch.ops.mkldnn._is_mkldnn_fp16_supported())


def product(x, weight):
    """F.linear(x, weight), by oneDNN for large float32 weights if no gradient is needed."""
    if (weight.dtype != torch.float32 or weight.numel() < SMALL
            or x.requires_grad or weight.requires_grad):
        return F.linear(x, weight)
    return onednn_product(x, weight)


def onednn_product(x, weight):
    """F.linear(x, weight) by oneDNN; the weight can be packed."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


@contextlib.contextmanager
def packed_weights(model, rows, steps):
    """Inside a `with` block, large bfloat16 weights have a copy in oneDNN's layout.

    On the EPYC with AVX-512 and bfloat16 arithmetic, copying takes 0.5 s per GB. Then a batch of 4
    rows decodes 1.26 times as fast, and one of 16 rows 1.74 times. Nothing is copied if that would
    not repay the copying, or if the memory or the CPU does not allow it.
    """
    layers = layers_to_pack(model, rows, steps)
    try:
        for layer in layers:
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, 128)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def layers_to_pack(model, rows, steps):
    """The layers that `packed_weights` copies for a batch of so many rows and decode steps."""
    # 60 steps with 4 rows save the time that copying takes, and so do 14 steps with 16 rows.
    if rows < 4 or rows * steps < 256:
        return []
    layers = [layer for layer in model.modules() if isinstance(layer, TunedLinear)
              and layer.weight.dtype == torch.bfloat16 and layer.weight.numel() >= SMALL]
    # An expert that gets one token reads the original weights. If they are mapped from disk, their
    # memory counts as free, so both copies must fit.
    needed, free = 2 * sum(layer.weight.nbytes for layer in layers), free_memory("cpu")
    fits = free is not None and needed <= free
    return layers if layers and fits and has_arithmetic(torch.bfloat16) else []


def matrix_vector_product(weight, x):
    """weight·x for 16-bit weights or a small matrix.

    In float32, the embedded model decodes 1.1 to 1.2 times as fast with this sum as with mv. For
    16-bit weights, the kernel that mv uses while oneDNN is disabled takes 0.5–0.6 of the time of
    oneDNN's.
    """
    if weight.dtype.itemsize >= 4:
        return (weight * x).sum(dim=-1)
    if not torch.backends.mkldnn.enabled:
        return torch.mv(weight, x.view(-1))
    try:
        torch.backends.mkldnn.enabled = False
        return torch.mv(weight, x.view(-1))
    finally:
        torch.backends.mkldnn.enabled = True


class TunedInt4Linear(nn.Module):
    """A 4-bit layer repacked for PyTorch's CPU kernel, which takes bfloat16 only.

    On an EPYC with AVX-512, a model decodes 1.4 times as fast in 4 bits as in bfloat16. When the
    same CPU is restricted to AVX2, it decodes at 0.85 of the rate in bfloat16, and on another EPYC
    without AVX-512, at 1.2 times that rate. Up to 64 rows the kernel is faster than a product with
    unpacked weights, and for 256 rows it takes 1.2 times as long. An expert gets 128 rows of a
    chunk of 512 tokens on average, so the kernel is used for any number of rows.
    """

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight_scale
        u = unpack(layer.weight_packed, torch.ones_like(scale)).int() + 8
        self.group_size = u.shape[1] // scale.shape[1]
        self.packed = nn.Buffer(torch._convert_weight_to_int4pack_for_cpu(u, 1))
        scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), dim=-1)
        self.scale_and_zero = nn.Buffer(scale_and_zero.transpose(0, 1).contiguous())

    @staticmethod
    def fits(layer):
        """Whether the kernel takes a layer of these sizes and of this dtype."""
        (outputs, words), groups = layer.weight_packed.shape, layer.weight_scale.shape[1]
        return (layer.weight_scale.dtype == torch.bfloat16 and outputs % 16 == 0
                and 8 * words // groups in (32, 64, 128, 256))

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.packed, self.group_size, self.scale_and_zero)
        return y.view(*x.shape[:-1], -1)


def check_device(device):
    """Raises ValueError unless float64 tensors, which rotary positions need, can be made there."""
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.zeros(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} is not usable here: {reason}") from None


def free_memory(device):
    """Bytes of memory free for this process, or None if the system does not say.

    Each rank gets an equal share of the memory of its machine.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free, group = None, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, TypeError, ValueError):
        text = Path("/proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1])
        limit = int((group / "memory.max").read_text())  # "max" is no limit: a ValueError
        cached = int(re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())[1])
        used = int((group / "memory.current").read_text()) - cached
        free = min(free, limit - used)
    if free is not None and dist.is_initialized():
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return free


def check_memory(directory, weights, dtype, device):
    """Whether the weights fit into the free memory. Raises ValueError if they do not but must."""
    stored = sum(weight.nbytes for weight in weights.values())
    kept = dtype is None and device == "cpu"
    needed = stored if dtype is None else sum(
        weight.numel() * dtype.itemsize for weight in weights.values())
    free = free_memory(device)
    if free is None or needed <= free:
        return True
    facts = f"{directory}: {needed / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB of memory free"
    if kept:
        print(f"[{facts}; the weights stay on disk and are read again for every token, which is "
              "slow; use a machine with more memory]", file=sys.stderr)
        return False
    raise ValueError(f"{facts} on {device}; on a CPU without --dtype the weights stay on disk "
                     f"({stored / 1e9:.1f} GB); otherwise use a larger machine")


# In chunks of 256, 512 and 1,024 tokens, a model of 0.79 billion parameters reads 2,048 tokens at
# 338, 390 and 395 tokens/s in float32, and at 534, 565 and 576 in bfloat16, with AVX-512. When the
# CPU is restricted to AVX2, the rates are 307, 323 and 312, and 278, 302 and 305.
CHUNK = 512


def new_cache(model, rows, length):
    """A cache for rows of that length. Raises ValueError if it does not fit into memory."""
    check_integer("the length of a text", length)
    one = model.new_cache(1, 1)
    slots = min(length, (model.config.sliding_window or length) + CHUNK - 1)
    needed, free = rows * slots * one.keys_and_values.nbytes, free_memory(one.positions.device)
    free = from_first_rank(free) if is_sharded(model) else free
    if free is not None and needed > free:
        raise ValueError(f"{rows} rows of {length} tokens need {needed / 1e9:.1f} GB of cache, but "
                         f"{free / 1e9:.1f} GB of memory are free; ask for fewer tokens")
    return model.new_cache(rows, length, CHUNK)


def with_progress(weights):
    """Yield name and weight one by one, with a progress bar if standard error is a terminal."""
    total, done = sum(weight.nbytes for weight in weights.values()), 0
    for name, weight in weights.items():
        yield name, weight
        done += weight.nbytes
        if sys.stderr.isatty():
            bar = "█" * (30 * done // max(total, 1))
            print(f"\r[{bar:30}] {done / 1e9:.2f} of {total / 1e9:.2f} GB", end="",
                  file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------ several devices
#
# `torchrun --nproc-per-node 2 generate.py ...` runs the model with tensor parallelism. Each rank
# holds a share of the heads and of the width of every expert:
#
#               q, k, v, w1, w3: split by rows        o_proj, w2: split by columns
#               ┌──────────┐                          ┌─────┬─────┐
#     x  ──►    │  rank 0  │  ──► its heads or  ──►   │     │     │  ──►  a partial sum of y;
#  (on all      ├──────────┤      its part of         │rank │rank │       all-reduce adds the sums
#   ranks)      │  rank 1  │      the expert          │  0  │  1  │       and gives y to all ranks
#               └──────────┘                          └─────┴─────┘
#
# Attention mixes values within a head, and SwiGLU works on single features, so nothing is exchanged
# between the two products. One all-reduce after attention and one after the mixture suffice. The
# norms, the router, the embedding and the output projection are on every rank, so all ranks choose
# the same experts.

SPLIT = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "w1": 0, "w3": 0, "o_proj": 1, "w2": 1}


def shard(raw, weights, rank, ranks):
    """The config.json and the weights of one rank. Raises ValueError if they cannot be divided."""
    config, local = MixtralConfig.from_dict(raw), {}
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, field)
        if size % ranks:
            raise ValueError(f"{ranks} ranks do not divide {field} {size}")
        local[field] = size // ranks
    parts = {}
    for name, weight in weights.items():
        layer, kind = ("." + name).split(".")[-2:]
        axis = SPLIT.get(layer)
        if axis is not None and kind == "weight_shape" and weight.numel() == 2:
            weight = weight.clone()
            weight[axis] //= ranks
        elif axis is not None and weight.ndim == 2:
            if weight.shape[axis] % ranks:
                raise ValueError(f"{name}: {ranks} ranks must divide its {weight.shape[axis]} "
                                 f"{'groups' if kind == 'weight_scale' else 'rows or columns'}")
            weight = weight.chunk(ranks, dim=axis)[rank].contiguous()
        parts[name] = weight
    return raw | local | {"head_dim": config.head_dim}, parts


def reduce_outputs(model):
    """Add an all-reduce to the output of every attention and every mixture; returns the model."""
    def all_reduce(module, inputs, output):
        output = output.contiguous()
        dist.all_reduce(output)
        return output

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(all_reduce)
        layer.block_sparse_moe.register_forward_hook(all_reduce)
    model.sharded = True
    return model


def is_sharded(model):
    """Whether this rank holds only a share of the model."""
    return getattr(model, "sharded", False)


def join_ranks():
    """Connect the processes that torchrun started, if any. CPU tensors travel by gloo."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        # The timeout is long because a chat waits for its user; a dead rank is noticed at once.
        dist.init_process_group(timeout=timedelta(days=1))


def own_device(device):
    """The device of this rank: with CUDA, the one with the number LOCAL_RANK."""
    if "TORCHELASTIC_RUN_ID" in os.environ and device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(device)
        torch.cuda.set_device(device)
    return device


def from_first_rank(value):
    """The value that rank 0 passed, on every rank; it must have a form in JSON."""
    if not dist.is_initialized():
        return value
    data = torch.tensor(list(json.dumps(value).encode()))
    size = torch.tensor([len(data)])
    dist.broadcast(size, src=0)
    data = data if dist.get_rank() == 0 else data.new_empty(int(size))
    dist.broadcast(data, src=0)
    return json.loads(bytes(data.tolist()))


ENDED = "generate.py: exit code"


def store():
    """The store through which torchrun connects the ranks; it outlives them."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                         is_master=False, timeout=timedelta(seconds=10))


def exit_code_of_first_rank():
    """The exit code that rank 0 has left in the store, or None."""
    with contextlib.suppress(RuntimeError):
        return int(store().get(ENDED)) if store().check([ENDED]) else None


def lead(argv):
    """`attempt` on rank 0, which prints. The others end silently if they find its exit code."""
    try:
        code = attempt(argv)
    except SystemExit as end:
        code = end.code
    if dist.is_initialized():
        store().set(ENDED, str(code))
    return code


def follow(argv):
    """`attempt` on another rank, which prints nothing.

    It joins first, so that rank 0 alone reports wrong arguments; then torchrun ends this rank.
    """
    with (open(os.devnull, "w") as null, contextlib.redirect_stdout(null),
          contextlib.redirect_stderr(null)):
        try:
            parse_arguments(argv)
        except SystemExit as end:
            if not end.code:  # --help: rank 0 does not join either
                return 0
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it while it waits for rank 0
        join_ranks()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on rank 0 ends all
        return attempt(argv)


def load_together(directory, dtype, device):
    """`load` on every rank. If it fails on one of them, all of them end."""
    error = None
    try:
        loaded = load(directory, dtype, own_device(device))
    except ValueError as problem:
        error = problem
    if not dist.is_initialized():
        if error:
            raise error
        return loaded
    rank, ranks = dist.get_rank(), dist.get_world_size()
    failed = torch.tensor(rank if error else ranks)
    dist.all_reduce(failed, op=dist.ReduceOp.MIN)
    if failed == rank:
        print(f"generate.py: {error}", file=sys.__stderr__)
    if failed < ranks:
        dist.barrier()  # the error has been printed
        sys.exit(1)
    return loaded


# ------------------------------------------------------------------ the command line


def parse_arguments(argv):
    p = argparse.ArgumentParser(
        prog="generate.py", description="Continue a text with a Mixtral model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p.add_argument("--prompt", action="append", metavar="TEXT", default=argparse.SUPPRESS,
                   help="text to continue; several prompts form one batch; without this flag the "
                        "prompt is read from standard input")
    p.add_argument("--model", type=Path, default=TINY, metavar="DIR",
                   help="a checkpoint in the Hugging Face layout")
    p.add_argument("--max-new-tokens", type=int, default=300, metavar="N",
                   help="stop after N tokens if the text has not ended before")
    p.add_argument("--temperature", type=float, default=0.0,
                   help="0 always takes the likeliest token; higher values vary more")
    p.add_argument("--top-p", type=float, default=1.0,
                   help="draw from the likeliest tokens with this total probability")
    p.add_argument("--seed", type=int, help="makes random draws repeatable")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT",
                   help="end a text before this string; can be repeated")
    p.add_argument("--json", action="store_true", help="print one JSON object per text")
    p.add_argument("--chat", action="store_true",
                   help="talk to an instruct model: each line is a message, and /system TEXT, "
                        "/reset and /exit are commands; with --prompt, answer it and exit")
    p.add_argument("--system", default="", metavar="TEXT", help="system text of a chat")
    p.add_argument("--dtype", choices=DTYPES, default=argparse.SUPPRESS,
                   help="dtype of weights and arithmetic (default: float32 for the embedded "
                        "model, else that of the checkpoint)")
    p.add_argument("--device", default="cpu", help="a torch device such as cpu or cuda")
    args = p.parse_args(argv)
    if args.system and not args.chat:
        p.error("--system needs --chat")
    if args.chat and args.json and "prompt" not in args:
        p.error("--json with --chat needs --prompt")
    return args


def read_prompt():
    """All of standard input as a list of one text; other ranks than the first get an empty text."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return [""]
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: {error}") from None
    return [text.replace("\r\n", "\n").removesuffix("\n")]


def read_line(prompt):
    """The next line of standard input, read by the first rank, or None at its end."""
    line = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        with contextlib.suppress(EOFError):
            line = input(prompt)
    return from_first_rank(line)


class Timer:
    """The times of the start, of the first token and of the last token, in seconds."""

    def __init__(self):
        self.start = self.first = self.last = time.perf_counter()
        self.steps = 0

    def tick(self):
        self.last = time.perf_counter()
        self.first, self.steps = self.first if self.steps else self.last, self.steps + 1

    def summary(self, read, written, rows, cache):
        """One line for standard error."""
        read = read if self.steps else 0
        prefill = read / max(self.first - self.start, 1e-9)
        decode = max(written - rows, 0) / max(self.last - self.first, 1e-9)
        size = cache.keys_and_values.nbytes / 1e6
        return (f"[{read} tokens read, {prefill:.0f} tokens/s; {written} written, {decode:.0f} "
                f"tokens/s; cache {size:.1f} MB, peak memory {peak_memory() / 1e6:.0f} MB]")


def peak_memory():
    """The most memory that this process has used, in bytes; 0 if the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(args):
    """Check the arguments, load the model, and generate or chat; returns the exit code."""
    check_sampling(args.temperature, args.top_p)
    check_integer("--max-new-tokens", args.max_new_tokens)
    if args.seed is not None:
        check_integer("--seed", args.seed)
    if "" in args.stop:
        raise ValueError("--stop needs a string that is not empty")
    join_ranks()
    embedded = args.model.resolve() == TINY
    dtype = DTYPES[args.dtype] if "dtype" in args else torch.float32 if embedded else None
    tokenizer, model = load_together(args.model, dtype, args.device)
    if args.chat and embedded:
        print("[the embedded model was not trained to chat; it tells stories]", file=sys.stderr)
    if args.chat and "prompt" not in args:
        return converse(args, tokenizer, model)
    texts = from_first_rank(args.prompt if "prompt" in args else read_prompt())
    prompts = [tokenizer.encode_chat(chat_messages(args.system, text)) if args.chat
               else tokenizer.encode(text) for text in texts]
    return complete(args, tokenizer, model, texts, prompts)


def complete(args, tokenizer, model, texts, prompts):
    """Generate for all prompts as one batch and print; a single text is printed as it grows."""
    completions = [Completion(tokenizer, args.stop) for _ in prompts]
    echoes = ["" if args.chat else c.echo(p) for c, p in zip(completions, prompts, strict=True)]
    streaming, reason, timer = len(texts) == 1 and not args.json, "length", Timer()
    cache = new_cache(model, len(prompts), max(map(len, prompts)) + args.max_new_tokens)
    try:
        show(echoes[0] if streaming else "")
        for step in generate_steps(model, prompts, args.max_new_tokens, args.temperature,
                                   args.top_p, args.seed, tokenizer.eos_id, cache, args.json):
            timer.tick()
            for completion, pair in zip(completions, step, strict=True):
                if not completion.finish_reason:
                    released = completion.feed(*pair)
                    show(released if streaming else "")
            if all(completion.finish_reason for completion in completions):
                break
    except KeyboardInterrupt:
        reason = "interrupted"
    for n, (text, echo, completion) in enumerate(zip(texts, echoes, completions, strict=True)):
        rest = completion.finish(reason)
        if streaming:
            show(rest + "\n")
        elif args.json:
            show(json_line(n, text, len(prompts[n]), completion, timer) + "\n")
        else:
            show(f"=== {n + 1} of {len(texts)}\n{echo}{completion.text}\n")
    written = sum(len(completion.tokens) for completion in completions)
    print(timer.summary(sum(map(len, prompts)), written, len(prompts), cache), file=sys.stderr)
    return 130 if reason == "interrupted" else 0


def show(text):
    print(text, end="", flush=True)


def json_line(index, prompt, prompt_tokens, completion, timer):
    return json.dumps({
        "index": index, "prompt": prompt, "text": completion.text, "tokens": completion.tokens,
        "logprobs": completion.logprobs, "finish_reason": completion.finish_reason,
        "timings": {"prompt_tokens": prompt_tokens,
                    "prefill_seconds": round(timer.first - timer.start, 6),
                    "decode_seconds": round(timer.last - timer.first, 6)}}, ensure_ascii=False)


def converse(args, tokenizer, model):
    """A conversation with one message per line, until /exit or the end of the input."""
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and a history
    if dist.is_initialized() and dist.get_rank() == 0:  # Ctrl-C ends torchrun and so all ranks
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    chat = Chat(model, tokenizer, args.system, **options)
    while True:
        try:
            line = read_line("> " if terminal else "")
        except KeyboardInterrupt:
            show("\n")
            continue
        if line is None:
            show("\n" if terminal else "")
            return 0
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return 0
        if command in ("/reset", "/system"):
            args.system = rest.strip() if command == "/system" else args.system
            chat = Chat(model, tokenizer, args.system, **options)
        elif command.startswith("/"):
            print(f"{command}: unknown; the commands are /system TEXT, /reset and /exit",
                  file=sys.stderr)
        elif command:
            try:
                print_answer(args, tokenizer, chat, line)
            except ValueError as error:
                print(f"generate.py: {error}", file=sys.stderr)


def print_answer(args, tokenizer, chat, line):
    """Print one answer as it grows; Ctrl-C ends it early."""
    completion, timer = Completion(tokenizer, args.stop), Timer()
    tokens = chat.answer(line, args.max_new_tokens)
    with contextlib.closing(tokens), contextlib.suppress(KeyboardInterrupt):
        for token in tokens:
            timer.tick()
            show(completion.feed(token))
            if completion.finish_reason:
                break
    show(completion.finish("length") + "\n")
    if chat.cache is not None:
        print(timer.summary(chat.new_tokens, len(completion.tokens), 1, chat.cache),
              file=sys.stderr)


def main(argv=None):
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return attempt(argv)
    return lead(argv) if os.environ["RANK"] == "0" else follow(argv)


def attempt(argv):
    """Run a command line; returns the exit code, or a message in its place."""
    args = parse_arguments(argv)
    if None in (sys.stdin, sys.stdout):
        return "generate.py: standard input and standard output must be open"
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        code = run(args)
        if code == 0 and dist.is_initialized():
            dist.barrier()  # no rank ends while another one still receives from it
        return code
    except OSError as error:
        if error.filename is None:  # Python flushes standard output at exit: do not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"generate.py: {error.filename or 'standard output'}: {error.strerror}",
              file=sys.stderr)
    except ValueError as error:
        if dist.is_initialized() and dist.get_rank() > 0:  # torchrun ends all ranks when one fails
            with contextlib.suppress(RuntimeError):
                store().wait([ENDED], timedelta(seconds=10))  # rank 0 reports the same error first
        print(f"generate.py: {error}", file=sys.stderr)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        if dist.get_rank() > 0 and (code := exit_code_of_first_rank()) is not None:
            return code
        print(f"generate.py: rank {dist.get_rank()} stops because another rank has ended",
              file=sys.__stderr__)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    code = main()
    if dist.is_initialized():  # the threads of torch.distributed can hang or abort at exit
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
