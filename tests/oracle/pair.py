"""Two traces and which of their numbers belong together; compare.py and its tests use it.

The section Tolerances of README.md has the formulas for the error of a row and for rounding.
"""

import json
import math
import re

import torch
from reference import axes, word
from safetensors import SafetensorError, safe_open
from steps import NEGLIGIBLE, NORMS, Place, Run, Trace, parse, unit

from mixtral import read_weights

JUMP = 16
SLACK = {torch.bfloat16: 8, torch.float16: 16}  # units in the last place; 64 for others
FLOATS, WHOLE = (torch.float64, torch.float32, *SLACK), ("chosen", "tokens")


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
    """Our side in float64, its order and its dtype.

    The weights are those of the golden file or of the directory `model`.
    """
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
    tensors = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    trace = Trace(tensors, json.loads(metadata["config"]), weights,
                  chunk or int(metadata.get("chunk", 0)), int(metadata.get("first_position", 0)),
                  json.loads(metadata.get("lengths", "null")) or [S] * B,
                  None if chunk else json.loads(metadata.get("calls", "null")))
    weights |= {} if weights else norm_weights(trace)
    order = [name for name, *_ in json.loads(metadata["order"])]
    return trace, order, getattr(torch, metadata["dtype"])


def norm_weights(trace):
    """For a trace without weights, those of the norms: Σ x·y / Σ x² over the tokens, by feature."""
    run, found = Run(trace), {}
    for name in filter(lambda name: word(name) in NORMS, trace.tensors):
        if Place(run, name).inputs()[0] in trace.tensors:
            x, y = unit(Place(run, name).source(), trace.config["rms_norm_eps"]), run[name]
            found[f"{name}.weight"] = (x * y).sum((0, 1)) / x.square().sum((0, 1))
    return found


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
    masked = ours.isneginf()
    hidden = masked & (theirs <= theirs.amax(-1, keepdim=True) - NEGLIGIBLE)
    ours, theirs = (x.masked_fill(mask, 0).flatten(1) for x, mask in (
        (ours, masked), (theirs, hidden)))
    masked, hidden = masked.flatten(1), hidden.flatten(1)
    sizes = ours.norm(dim=1)
    found = (ours - theirs).norm(dim=1) / sizes.maximum(sizes.nanmedian().clamp(min=1e-300))
    return found.masked_fill((masked & ~hidden).any(1), math.inf).nan_to_num(math.inf, math.inf)


class Pair:
    """Both traces: `theirs` as the port wrote it, `port` in our shapes and order in float64."""

    def __init__(self, args, names):
        self.trace, self.order, dtype = read_trace(args.ours, args.model, args.chunk)
        self.ours, (_, found) = self.trace.tensors, read_file(args.theirs)
        self.file = {names.get(name, name): x for name, x in found.items()}
        self.S = self.ours["tokens"].shape[1]
        self.real = torch.cat([torch.arange(self.S) < n for n in self.trace.lengths])
        self.port = self.trace._replace(tensors={"tokens": self.ours["tokens"]})
        self.adopt(self.file)
        self.check(args.theirs, self.file)
        dtypes = [self.theirs[name].dtype for name in self.shared if word(name) not in WHOLE]
        self.dtype = max(dtypes + [dtype], key=lambda dtype: torch.finfo(dtype).eps)
        self.epsilon = torch.finfo(self.dtype).eps
        # Two correct ways to compute an angle in float64 differ by its rounding error.
        angle = torch.finfo(torch.float64).eps * (self.trace.first_position + self.S)
        self.rounding = SLACK.get(self.dtype, 64) * self.epsilon + angle

    def check(self, path, found):
        """Raises IncomparableError if the names or the tokens are not ours."""
        short = [name for name in found if f"model.{name}" in self.order]
        if short:
            raise IncomparableError(f"{path}: {min(short)} is our model.{min(short)}; write "
                                    "`model.` before the names, or map them with --names")
        if not self.shared:
            raise IncomparableError(
                f"{path}: has none of our names, such as {self.order[1]}; it has "
                f"{', '.join(sorted(found)[:3])}; map its names with --names")
        for name in self.shared:
            dtype, whole = self.theirs[name].dtype, word(name) in WHOLE
            if whole and (dtype.is_floating_point or dtype.is_complex) or (
                    not whole and dtype not in FLOATS):
                raise IncomparableError(f"{path}: {name} is {str(dtype)[6:]}; write it as "
                                        f"{'I64' if whole else 'F64, F32, F16 or BF16'}")
        ours, theirs = (side.get("tokens", self.ours["tokens"]).flatten().tolist()
                        for side in (self.ours, self.theirs))
        if theirs != ours:
            raise IncomparableError(f"the tokens differ: ours {ours}, theirs {theirs}")

    # ------------------------------------------------------------------ theirs in our form

    def adopt(self, theirs, at=""):
        """Read a file of theirs; of the tensors under `at`, what fits is the port's trace."""
        self.theirs = theirs
        self.shared = [name for name in self.order if name in theirs
                       and name != "tokens" and word(name) != "margin"]
        found = {name: self.own(name, theirs[name]) for name in self.shared if at in name}
        kept = {name: x for name, x in self.port.tensors.items() if not at or at not in name}
        self.port = self.trace._replace(tensors=kept | {"tokens": self.ours["tokens"]} | {
            name: x.double() if x.is_floating_point() else x.long()
            for name, x in found.items() if x is not None})

    def own(self, name, x):
        """One tensor of theirs in our form, or None. A token may have more experts than ours."""
        if axes(name)[0] == "R":
            return self.takers(name) if word(name) == "tokens" else self.expert_rows(name, x)
        x = self.unpacked(name, x)
        if word(name) not in ("chosen", "weights"):
            return reshaped(x, self.ours[name])
        if x.numel() % len(self.real):
            return None
        x = x.reshape(len(self.real), -1)
        return x.where(self.real[:, None], -1) if word(name) == "chosen" else x

    def unpacked(self, name, x):
        """A quantity whose rows are packed, without padding, with padding; others as they are."""
        shape, flat = self.ours[name].shape, axes(name)[0] == "N"
        rest = shape[1 if flat else 2:]
        if "T" in axes(name) or self.real.all() or x.numel() != self.real.sum() * math.prod(rest):
            return x
        full = x.new_zeros(len(self.real), *rest)
        full[self.real] = x.reshape(-1, *rest)
        return full.reshape(shape)

    def takers(self, name):
        """The tokens of an expert: those that chose it, or else those in theirs, or else ours.

        `chosen` comes first because it is what the model computes; the numbers only describe rows.
        """
        at, expert = name.rpartition("experts")[0], parse(name)[2]
        chosen, tokens = self.theirs.get(at + "chosen"), f"{at}experts.{expert}.tokens"
        chosen = None if chosen is None else self.own(at + "chosen", chosen)
        if chosen is not None:
            return ((chosen == expert).any(1) & self.real).nonzero()[:, 0]
        return self.numbered(self.theirs.get(tokens, self.ours[tokens]))[0].unique()

    def numbered(self, tokens):
        """The numbers of rows in ascending order, without padding, and where each row stood."""
        tokens, place = tokens.flatten().long().sort()
        inside = (tokens >= 0) & (tokens < len(self.real))
        kept = inside & self.real[tokens.clamp(0, len(self.real) - 1)]
        return tokens[kept], place[kept]

    def expert_rows(self, name, x):
        """The rows of an expert in the order of its tokens, without padding."""
        at, takers, rest = name.rpartition(".")[0], self.takers(name), self.ours[name].shape[1:]
        if x.numel() % math.prod(rest):
            return None
        x = x.reshape(-1, *rest)
        tokens = self.theirs.get(f"{at}.tokens", takers)
        numbers, place = self.numbered(tokens)
        if numbers.equal(takers) and tokens.numel() == len(x):
            return x[place]
        if len(x) == len(self.real):  # an expert that ran on all tokens
            return x[takers]
        if len(x) == self.real.sum():  # and whose rows are packed
            return x[(self.real.cumsum(0) - 1)[takers]]
        return x if len(x) == len(takers) else None

    # ------------------------------------------------------------------ what is compared

    def tokens_of(self, name, side):
        """The tokens of the rows of an expert in ours or in the port's."""
        at = name.rpartition(".")[0] + ".tokens"
        return side[at] if at in side else self.takers(name)

    def rows(self, name):
        """Rows of ours and of the port, and the token of each; None for the port's if none fit."""
        ours, theirs = self.ours[name], self.port.tensors.get(name)
        tokens = torch.arange(len(self.real))
        if theirs is not None and axes(name)[0] == "R":  # of the tokens that chose it in both
            tokens, other = (self.tokens_of(name, side) for side in (self.ours, self.port.tensors))
            ours, theirs = ours[torch.isin(tokens, other)], theirs[torch.isin(other, tokens)]
            return ours, theirs, tokens[torch.isin(tokens, other)]
        at = name.replace("weights", "chosen")
        chosen = self.port.tensors.get(at)
        if word(name) == "weights" and chosen is not None and theirs is not None and (
                chosen.shape == theirs.shape):
            same = self.ours[at][:, :, None] == chosen[:, None]
            theirs = theirs.gather(1, same.int().argmax(-1))  # in the order in which ours chose
        if word(name) == "chosen" and theirs is not None:  # as sets
            ours, theirs = (x.double().sort(-1)[0] for x in (ours, theirs))
        if theirs is None or theirs.shape != ours.shape:
            return as_rows(ours, axes(name)), None, tokens
        return as_rows(ours, axes(name)), as_rows(theirs, axes(name)), tokens

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
                if word(n) not in ("margin", "tokens") and n not in self.theirs
                and not (self.trace.chunk and "T" in axes(n))]  # a cache may have any order

    def unknown(self):
        """Names in theirs that are not ours, except weights."""
        return sorted(name for name in set(self.theirs) - set(self.order)
                      if not name.endswith(".weight") and ".experts." not in name)
