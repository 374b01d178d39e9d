"""Two traces and which of their numbers belong together; compare.py and its tests use it.

The section Tolerances of README.md has the formulas for the error of a row and for rounding.
"""

import json
import math
import re

import torch
from reference import axes, word
from safetensors import SafetensorError, safe_open
from steps import Trace, parse

from mixtral import read_weights

JUMP = 16
NEGLIGIBLE = 104  # e^−104 is 0 in float32 and vanishes beside 1 in float64
REDUNDANT = ("margin", "tokens")  # they follow from the logits and the choice


class IncomparableError(Exception):
    """One line that says why two files cannot be compared."""


def read_file(path):
    """The metadata and the tensors of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise IncomparableError(f"{path}: not a safetensors file: {error}") from None


def read_trace(path, model, chunk):
    """Our side, with the weights of the golden file or of the directory `model`, and its order."""
    metadata, tensors = read_file(path)
    found = metadata.get("format"), metadata.get("version")
    if found != ("mixtral-trace", "1"):
        raise IncomparableError(f"{path}: must be a golden file or a file of trace.py, version 1, "
                                f"got format {found[0]}, version {found[1]}")
    weights = {n: tensors.pop(n) for n in list(tensors) if n.endswith(".weight")}
    try:
        weights = read_weights(model) if model else weights
    except ValueError as error:
        raise IncomparableError(str(error)) from None
    B, S = tensors["tokens"].shape
    trace = Trace(tensors, json.loads(metadata["config"]), weights,
                  chunk or int(metadata.get("chunk", 0)), int(metadata.get("first_position", 0)),
                  json.loads(metadata.get("lengths", "null")) or [S] * B,
                  None if chunk else json.loads(metadata.get("calls", "null")))
    return trace, [name for name, *_ in json.loads(metadata["order"])]


def layer_of(name):
    """The number of the layer of a quantity, or None outside the layers."""
    found = re.match(r"model\.layers\.(\d+)", name)
    return int(found[1]) if found else None


def reshaped(theirs, ours):
    """Theirs in the shape of ours if only joined axes and axes of size 1 differ, else None."""
    if theirs.numel() != ours.numel():
        return None
    short, long = sorted(([n for n in x.shape if n != 1] for x in (theirs, ours)), key=len)
    at = 0
    for n in short:
        size = 1
        while size < n and at < len(long):
            size, at = size * long[at], at + 1
        if size != n:
            return None
    return theirs.reshape(ours.shape)


def as_rows(x, letters):
    """One row per token: (B, S, …), (B, H, S, T), (N, …) or (R, …) -> (rows, …)."""
    if letters == ["B", "H", "S", "T"]:
        x = x.transpose(1, 2)
    return x.flatten(0, 1) if letters[0] == "B" else x


def row_errors(ours, theirs):
    """The error of each row. A score that the softmax turns into 0 counts as −∞."""
    ours, theirs = ours.flatten(1), theirs.flatten(1)
    masked, wrong = ours.isneginf(), None
    if masked.any():
        hidden = masked & (theirs <= theirs.amax(1, keepdim=True) - NEGLIGIBLE)
        ours, theirs = ours.masked_fill(masked, 0), theirs.masked_fill(hidden, 0)
        wrong = (masked & ~hidden).any(1)
    sizes = ours.norm(dim=1)
    usual = sizes.nanmedian().clamp(min=1e-300)
    found = (ours - theirs).norm(dim=1) / sizes.maximum(usual)
    found = found if wrong is None else found.masked_fill(wrong, math.inf)
    return found.nan_to_num(math.inf, math.inf)


class Pair:
    """Both traces. What theirs has under other names is renamed."""

    def __init__(self, args, names):
        self.trace, self.order = read_trace(args.ours, args.model, args.chunk)
        self.ours, (_, found) = self.trace.tensors, read_file(args.theirs)
        self.theirs = {names.get(name, name): x for name, x in found.items()}
        self.S = self.ours["tokens"].shape[1]
        self.real = torch.cat([torch.arange(self.S) < n for n in self.trace.lengths])
        self.theirs |= {name: self.unpacked(name, x) for name, x in self.theirs.items()
                        if name in self.ours and len(self.real) > self.real.sum()}
        self.shared = [name for name in self.order if name in self.theirs
                       and name != "tokens" and word(name) != "margin"]
        self.check_names(args.theirs, found)
        self.check_tokens()
        self.undone = set()  # rows of experts that are in our order, after a layout was undone
        floats = [x.dtype for name in self.shared for x in (self.ours[name], self.theirs[name])
                  if x.is_floating_point()]
        self.dtype = max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)
        self.epsilon = torch.finfo(self.dtype).eps
        # Two correct ways to compute an angle in float64 differ by its rounding error.
        angle = torch.finfo(torch.float64).eps * (self.trace.first_position + self.S)
        self.rounding = (64 if self.dtype.itemsize >= 4 else 8) * self.epsilon + angle

    def check_names(self, path, found):
        """Raises IncomparableError if no name is ours, or if many are but for their beginning."""
        short = [name for name in found if f"model.{name}" in self.order]
        if short:
            raise IncomparableError(f"{path}: {min(short)} is our model.{min(short)}; write "
                                    "`model.` before the names, or map them with --names")
        if not self.shared:
            raise IncomparableError(
                f"{path}: has none of our names, such as {self.order[1]}; it has "
                f"{', '.join(sorted(found)[:3])}; map its names with --names")

    def unpacked(self, name, x):
        """A quantity whose rows are packed, without padding, with padding; others as they are."""
        ours, letters = self.ours[name], axes(name)
        if "T" in letters or letters[0] == "R" or name == "tokens":
            return x
        rest = ours.shape[1 + (letters[0] == "B"):]
        if x.numel() != self.real.sum() * math.prod(rest):
            return x
        full = x.new_zeros(len(self.real), *rest)
        full[self.real] = x.reshape(-1, *rest)
        return full.reshape(ours.shape)

    def check_tokens(self):
        ours, theirs = (side.get("tokens") for side in (self.ours, self.theirs))
        if theirs is not None and theirs.flatten().tolist() != ours.flatten().tolist():
            raise IncomparableError(f"the tokens differ: ours {ours.flatten().tolist()}, theirs "
                                    f"{theirs.flatten().tolist()}")

    def sibling(self, name, last, run=None):
        """A quantity of the router in theirs, in the shape of ours or of the run's, or None."""
        at = name.partition("block_sparse_moe")[0] + f"block_sparse_moe.{last}"
        theirs = self.theirs.get(at)
        return None if theirs is None else reshaped(theirs, (run or self.ours)[at])

    def takers(self, name):
        """The real tokens that chose the expert of a quantity by `chosen` in theirs, or None."""
        chosen = self.theirs.get(name.partition("experts")[0] + "chosen")
        if chosen is None or chosen.numel() % len(self.real):
            return None
        chosen = chosen.reshape(len(self.real), -1) == parse(name)[2]
        return (chosen.any(1) & self.real).nonzero()[:, 0]

    def aligned(self, name, ours, run=None):
        """Rows of ours and of theirs, and the token of each; theirs is None if no shape fits.

        `ours` is the tensor to compare with theirs, from our trace or from a run.
        """
        if axes(name)[0] == "R":
            return self.aligned_rows(name, ours, run)
        theirs = reshaped(self.theirs[name].double(), ours)
        if word(name) == "weights":  # theirs in the order in which ours chose
            at, chosen = name.replace("weights", "chosen"), self.sibling(name, "chosen", run)
            if chosen is not None and theirs is not None:
                mine = (run or self.ours)[at]
                theirs = theirs.gather(1, (mine[:, :, None] == chosen[:, None]).int().argmax(-1))
        if word(name) == "chosen" and theirs is not None:  # as a set
            ours, theirs = ours.double().sort(-1)[0], theirs.sort(-1)[0]
        theirs = None if theirs is None else as_rows(theirs, axes(name))
        return as_rows(ours, axes(name)), theirs, torch.arange(len(self.real))

    def aligned_rows(self, name, ours, run):
        """The rows of one expert, for the tokens that both sides routed to it."""
        tokens = self.expert_tokens(name, run)
        theirs, other = self.own_rows(name, ours.shape[1:], tokens)
        if theirs is None:
            return ours, None, tokens
        mine, picked = torch.where(tokens[:, None] == other)
        return ours[mine], theirs[picked], tokens[mine]

    def own_rows(self, name, shape, tokens=None):
        """The rows of an expert in theirs and the token of each; None if their number is unclear.

        The tokens are those of `experts.E.tokens`, or else of `chosen`, or else of ours.
        """
        if name in self.undone:
            return self.theirs[name], self.expert_tokens(name)
        theirs, takers = self.theirs[name].double(), self.takers(name)
        other = self.theirs.get(name.rpartition(".")[0] + ".tokens", takers)
        other = self.expert_tokens(name) if other is None else other.flatten().long()
        numbered = other[self.real[other.clamp(0, len(self.real) - 1)]].sort()[0]
        if takers is not None and not numbered.equal(takers):
            other = takers  # the numbers in `tokens` are wrong
        count = theirs.numel() // math.prod(shape)
        if count == len(self.real) > len(other):  # an expert that ran on all tokens
            other = torch.arange(count)
        if count != len(other) and tokens is not None:
            other = tokens
        if theirs.numel() != len(other) * math.prod(shape):
            return None, other
        return theirs.reshape(len(other), *shape), other

    def port(self):
        """Theirs as a trace of its own, in our shapes and float64; what does not fit is left out.

        Padding is no token of an expert, and the rows of an expert are in the order of its tokens.
        """
        tensors = {"tokens": self.ours["tokens"]}
        for name in self.shared:
            x = self.theirs[name]
            if word(name) == "tokens":
                own = self.takers(name)
            elif axes(name)[0] == "R":
                own, tokens = self.own_rows(name, self.ours[name].shape[1:])
                if own is not None:
                    real = self.real[tokens]
                    own = own[real][tokens[real].argsort()]
            elif word(name) in ("chosen", "weights") and x.numel() % len(self.real) == 0:
                own = x.reshape(len(self.real), -1)
                own = own.long().where(self.real[:, None], -1) if word(name) == "chosen" else own
            else:
                own = reshaped(x, self.ours[name])
            if own is not None:
                tensors[name] = own.double() if own.is_floating_point() else own
        return self.trace._replace(tensors=tensors)

    def undo(self, name, rows):
        """Put rows, as `aligned` gives them, in the place of a tensor of theirs."""
        if axes(name)[0] == "R":
            self.undone.add(name)
        elif axes(name)[-1] == "T":
            rows = rows.unflatten(0, (-1, self.S)).transpose(1, 2)
        self.theirs[name] = rows.reshape(self.ours[name].shape)

    def unknown(self):
        """Names in theirs that are not ours, except weights."""
        return sorted(name for name in set(self.theirs) - set(self.order)
                      if not name.endswith(".weight") and ".experts." not in name)

    def expert_tokens(self, name, run=None):
        """The tokens of an expert's rows, in a run or in our trace; None for other quantities."""
        at = name.rpartition(".")[0] + ".tokens"
        return None if axes(name)[0] != "R" else self.ours[at] if run is None else run[at]

    def limits(self, name, before):
        """The errors that rounding explains: by depth, and after the largest error before."""
        layer = layer_of(name)
        depth = self.trace.config["num_hidden_layers"] if layer is None else layer
        depth = 0 if word(name) == "embed_tokens" else depth
        return self.rounding * math.sqrt(depth + 1), max(self.rounding, JUMP * before)

    def skipped(self, last=None, name=None):
        """Our quantities after one tensor and before another that the port has not traced."""
        start = self.order.index(last) + 1 if last else 1
        return [n for n in self.order[start:self.order.index(name) if name else None]
                if word(n) not in REDUNDANT and n not in self.theirs
                and not (self.trace.chunk and "T" in axes(n))]  # a cache may have any order
