"""A port for the tests: mixtral.py reads a golden file as its page says, with functions replaced.

`replaced` seeds errors. Attention runs as `attend` below, whose parts can be replaced too, so that
an error is made in the quantity to which it belongs. `now` tells them which call is running.
"""

import contextlib
import math
import trace
from types import SimpleNamespace
from unittest import mock

import pair
import torch
from reference import axes, word

import mixtral
from mixtral import MixtralConfig

now, kept = SimpleNamespace(), []


def score(q, k):
    """q·kᵀ/√d: (B, H, S, d), (B, H, T, d) -> (B, H, S, T)."""
    return q @ k.mT / math.sqrt(q.shape[-1])


def hide(scores, mask):
    return scores.masked_fill(~mask, -math.inf)


def softmax(scores):
    return scores.softmax(-1)


def shared(k, H):
    """The key or value head of every query head."""
    return k.repeat_interleave(H // k.shape[1], 1)


def attend(q, k, v, mask):
    """mixtral.attend in separate steps."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = PARTS.hide(PARTS.score(q, PARTS.shared(k, q.shape[1])), mask)
    kept.append((scores, PARTS.softmax(scores)))
    return (kept[-1][1] @ PARTS.shared(v, q.shape[1])).transpose(1, 2).flatten(2)


PARTS = SimpleNamespace(score=score, hide=hide, softmax=softmax, shared=shared)
TARGETS = {"score": PARTS, "hide": PARTS, "softmax": PARTS, "shared": PARTS}


@contextlib.contextmanager
def replaced(wrong):
    """Replace functions of mixtral.py, such as `rotate` or `RMSNorm.forward`, or parts of attend.
    """
    with contextlib.ExitStack() as stack:
        for name, function in wrong.items():
            owner, _, last = name.rpartition(".")
            target = TARGETS.get(name) or (getattr(mixtral, owner) if owner else mixtral)
            stack.enter_context(mock.patch.object(target, last, function))
        yield


def model_of(ours, dtype, weights=None):
    """The model of a golden file."""
    weights = {name: w.to(dtype) for name, w in (ours.weights | (weights or {})).items()}
    return mixtral.assemble(MixtralConfig(**ours.config), weights)


def run(ours, dtype=torch.float64, wrong=None, weights=None, buffer=None, left=False):
    """What a port writes for a golden file, {name: tensor}.

    `wrong` holds the replaced functions, `weights` other weights by name, and `buffer` the slots of
    the cache. With `left` the padding of each call is on the left and counts as tokens. From `ours`
    it takes the tokens and how they are read, as from the metadata.
    """
    tokens, lengths = ours.tensors["tokens"], torch.tensor(ours.lengths)
    model, cache, seen = model_of(ours, dtype, weights), None, {}
    first, original = ours.first_position, mixtral.rotation
    far = {"rotation": lambda positions, d, theta: original(positions + first, d, theta)}
    start = torch.zeros_like(lengths)
    with replaced({"Attention.attend": staticmethod(attend)} | (far if first else {})
                  | (wrong or {})), torch.inference_mode():
        if ours.calls:
            cache = model.new_cache(len(tokens), 99, max(map(max, ours.calls)))
            if buffer:
                cache = mixtral.Cache(cache.keys[:, :, :buffer], cache.values[:, :, :buffer],
                                      cache.positions[:, :buffer], 99, cache.chunk)
        for now.call, sizes in enumerate(ours.calls or [ours.lengths]):
            now.start, now.sizes, now.lengths = start, torch.tensor(sizes), lengths
            kept.clear()
            shift = max(sizes) - now.sizes if left else 0 * start
            column = start[:, None] + torch.arange(max(sizes)) - shift[:, None]
            read = tokens.gather(1, column.clamp(0, tokens.shape[1] - 1))
            read[torch.arange(max(sizes)) < shift[:, None]] = 0
            with trace.recording(model) as found:
                model(read, cache, None if left else now.sizes)
            collect(seen, {name: x for name, [x] in found.items()}, start, now.sizes, shift, tokens)
            start = start + now.sizes
    for name, rows in list(seen.items()):
        if axes(name)[0] == "R":
            rows = dict(sorted(rows.items())) or seen.pop(name)
        if axes(name)[0] == "R" and rows:
            seen[name] = torch.stack([*rows.values()])
            seen[name.rpartition(".")[0] + ".tokens"] = torch.tensor([*rows])
    if not ours.calls and not left:
        for n, both in enumerate(kept):
            for last, x in zip(("scores", "probabilities"), both, strict=True):
                seen[f"model.layers.{n}.self_attn.{last}"] = x
    return {"tokens": tokens} | {name: x.clone() for name, x in seen.items()}


def collect(seen, found, start, sizes, shift, tokens):
    """Put the quantities of one call, in which rows begin after `shift`, in the places of tokens.
    """
    B, S = tokens.shape
    width = int((sizes + shift).max())
    row, column = torch.where(torch.arange(width) < sizes[:, None])
    at = row, start[row] + column
    for name, x in found.items():
        if axes(name)[0] == "R" and word(name) != "tokens":
            taken = found[name.rpartition(".")[0] + ".tokens"]
            row_of, place = taken // width, taken % width - shift[taken // width]
            real = (place >= 0) & (place < sizes[row_of])
            numbers = (row_of * S + start[row_of] + place)[real]
            seen.setdefault(name, {}).update(zip(numbers.tolist(), x[real], strict=True))
        elif axes(name)[0] != "R":
            flat = axes(name)[0] == "N"
            x = x.view(B, width, *x.shape[1:]) if flat else x
            shape = [B * S] if flat else [B, S]
            full = seen.setdefault(name, x.new_zeros(*shape, *x.shape[2:]))
            full.view(B, S, *x.shape[2:])[at] = x[row, column + shift[row]]


def known(path):
    """Our side of a golden file."""
    return pair.read_trace(path)[0]
