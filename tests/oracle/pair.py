"""Two traces and which of their numbers belong together; compare.py and its tests use it.

The section Tolerances of README.md has the formulas for the error of a row and for rounding.
"""

import itertools
import json
import math
import operator

import torch
from reference import axes, word
from safetensors import SafetensorError, safe_open
from steps import NEGLIGIBLE, Trace, halves, parse

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


def read_trace(path, model=None):
    """Our side in float64, and its order.

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
    order = [name for name, *_ in json.loads(metadata["order"])]
    (B, S), chunk = tensors["tokens"].shape, int(metadata.get("chunk", 0))
    calls = [[min(chunk, S - at)] * B for at in range(0, S, chunk)] if chunk else []
    for name in order[1:]:
        if axes(name)[0] == "R" and word(name) != "tokens":
            rows, at = tensors[name], tensors[name.rpartition(".")[0] + ".tokens"]
            tensors[name] = rows.new_zeros(B * S, *rows.shape[1:]).index_copy_(0, at, rows)
    tensors = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    return Trace(tensors, json.loads(metadata["config"]), weights,
                 getattr(torch, metadata["dtype"]), int(metadata.get("first_position", 0)),
                 json.loads(metadata.get("lengths", "null")) or [S] * B,
                 json.loads(metadata.get("calls", "null")) or calls), order


def boundaries(shape):
    """Where the axes of a tensor end, as products of their sizes."""
    return {*itertools.accumulate((n for n in shape if n != 1), operator.mul)}


def reshaped(theirs, ours):
    """Theirs in the shape of ours if only joined axes and axes of size 1 differ, else None."""
    a, b = boundaries(theirs.shape), boundaries(ours.shape)
    same = theirs.numel() == ours.numel() and (a <= b or b <= a)
    return theirs.reshape(ours.shape) if same else None


def as_rows(x, letters):
    """One row per token: (B, S, …), (B, H, S, T) or (N, …) -> (N, …)."""
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


def chosen_of(name):
    """The name of the choices of the layer to which an expert belongs."""
    return name.partition("experts")[0] + "chosen"


class Pair:
    """Both traces: `theirs` as the port wrote it, `port` in our shapes and order in float64."""

    def __init__(self, ours, theirs, names, model=None, interleaved=False):
        self.trace, self.order = read_trace(ours, model)
        self.ours, self.interleaved = self.trace.tensors, interleaved
        found = read_file(theirs)[1]
        self.theirs = {names.get(name, name): x for name, x in found.items()}
        if len(self.theirs) < len(found):
            raise IncomparableError(f"{theirs}: --names gives two tensors the same name")
        self.S = self.ours["tokens"].shape[1]
        self.real = torch.cat([torch.arange(self.S) < n for n in self.trace.lengths])
        self.shared = [name for name in self.order if name in self.theirs
                       and name != "tokens" and word(name) != "margin"]
        self.check(theirs)
        dtypes = [self.theirs[name].dtype for name in self.shared if word(name) not in WHOLE]
        self.dtype = max([*dtypes, self.trace.dtype], key=lambda dtype: torch.finfo(dtype).eps)
        self.epsilon = torch.finfo(self.dtype).eps
        # Two correct ways to compute an angle in float64 differ by its rounding error.
        angle = torch.finfo(torch.float64).eps * (self.trace.first_position + self.S)
        self.rounding = SLACK.get(self.dtype, 64) * self.epsilon + angle
        self.port = self.trace._replace(
            tensors={"tokens": self.ours["tokens"]}, dtype=self.dtype)
        for name in self.shared:  # the choices of a layer before its experts, which need them
            if (x := self.own(name, self.theirs[name])) is not None:
                self.port.tensors[name] = x.double() if x.is_floating_point() else x

    def check(self, path):
        """Raises IncomparableError if the names or the tokens are not ours."""
        short = [name for name in self.theirs if f"model.{name}" in self.order]
        if short:
            raise IncomparableError(f"{path}: {min(short)} is our model.{min(short)}; write "
                                    "`model.` before the names, or map them with --names")
        if not self.shared:
            raise IncomparableError(
                f"{path}: has none of our names, such as {self.order[1]}; it has "
                f"{', '.join(sorted(self.theirs)[:3])}; map its names with --names")
        for name in self.shared:
            dtype, whole = self.theirs[name].dtype, word(name) in WHOLE
            if whole and (dtype.is_floating_point or dtype.is_complex) or (
                    not whole and dtype not in FLOATS):
                raise IncomparableError(f"{path}: {name} is {str(dtype)[6:]}; write it as "
                                        f"{'I64' if whole else 'F64, F32, F16 or BF16'}")
            self.theirs[name] = x = self.theirs[name].long() if whole else self.theirs[name]
            if word(name) == "chosen" and (x := self.by_token(x)) is not None:
                x, E = x[self.real], self.trace.config["num_local_experts"]
                if ((x < 0) | (x >= E)).any() or (x.sort(1)[0].diff() == 0).any():
                    raise IncomparableError(f"{path}: {name} has experts from {x.min()} to "
                                            f"{x.max()}; write different ones from 0 to {E - 1}")
        ours, theirs = (side.get("tokens", self.ours["tokens"]).flatten().tolist()
                        for side in (self.ours, self.theirs))
        if theirs != ours:
            raise IncomparableError(f"the tokens differ: ours {ours}, theirs {theirs}")

    # ------------------------------------------------------------------ theirs in our form

    def own(self, name, x):
        """One tensor of theirs in our form, or None if it does not fit."""
        if word(name) == "tokens":
            found = self.marked(x)
            return self.takers(name) if found.equal(self.real) else found
        if axes(name)[0] == "R":
            return self.spread(name, x)
        if word(name) in ("chosen", "weights"):
            x = self.by_token(x)
            return x if x is None or word(name) == "weights" else x.where(self.real[:, None], -1)
        x = reshaped(x, self.ours[name])
        if x is not None and self.interleaved and word(name)[:2] in ("q_", "k_"):
            return halves(x.view(*x.shape[:2], -1, self.trace.config["head_dim"])).view_as(x)
        return x

    def by_token(self, x):
        """The choices or weights of each token, (N, any number); None if they do not fit."""
        N = len(self.real)
        return x.reshape(N, -1) if N in boundaries(x.shape) | {1} else None

    def takers(self, name):
        """The tokens of an expert, (N): those that chose it, or else those in theirs.

        `chosen` comes first because it is what the model computes; the numbers only describe rows.
        If an expert ran on all tokens, they do not say which chose it, so ours count.
        """
        chosen = self.port.tensors.get(chosen_of(name))
        if chosen is not None:
            return (chosen == parse(name)[2]).any(1)
        at = name.rpartition(".")[0] + ".tokens"
        found = self.marked(self.theirs.get(at, self.ours[at]))
        return self.marked(self.ours[at]) if found.equal(self.real) else found

    def marked(self, numbers):
        """Which tokens, (N), have one of these numbers and are no padding."""
        return torch.isin(torch.arange(len(self.real)), numbers) & self.real

    def spread(self, name, x):
        """The rows of an expert at their tokens: (R, …) -> (N, …); None if they do not fit."""
        rest, takers = self.ours[name].shape[1:], self.takers(name).nonzero()[:, 0]
        if x.numel() % rest.numel():
            return None
        x, every = x.reshape(-1, *rest), torch.arange(len(self.real))
        numbers = self.theirs.get(name.rpartition(".")[0] + ".tokens", takers).flatten()
        kept = torch.isin(numbers, every[self.real])
        if len(numbers) == len(x) and numbers[kept].sort()[0].equal(takers):
            x, takers = x[kept], numbers[kept]
        elif len(x) == len(every) > len(takers):  # an expert that ran on all tokens
            takers = every
        return x.new_zeros(len(every), *rest).index_copy_(0, takers, x) if (
            len(x) == len(takers)) else None

    # ------------------------------------------------------------------ what is compared

    def tokens(self, name):
        """Which tokens, (N), have numbers on both sides."""
        if axes(name)[0] != "R" or word(name) == "tokens":
            return self.real
        return self.takers(name) & self.marked(self.ours[name.rpartition(".")[0] + ".tokens"])

    def rows(self, name, theirs=None):
        """Rows of ours and of the port, and the token of each; None for the port's if none fit.

        `theirs` takes the place of the port's tensor.
        """
        ours, theirs = self.ours[name], self.port.tensors.get(name) if theirs is None else theirs
        chosen = self.port.tensors.get(name.replace("weights", "chosen"))
        if word(name) == "tokens":  # 1 for those of the expert and −1 for others
            known = chosen_of(name) in self.port.tensors
            ours = self.takers(name) if known else self.marked(ours)
            ours, theirs = (2.0 * x[:, None] - 1 for x in (ours, theirs))
        elif theirs is None or theirs.shape != ours.shape:
            theirs = None
        elif word(name) == "chosen":  # as sets
            ours, theirs = (x.double().sort(-1)[0] for x in (ours, theirs))
        elif word(name) == "weights" and chosen is not None and chosen.shape == theirs.shape:
            same = self.ours[name.replace("weights", "chosen")][:, :, None] == chosen[:, None]
            theirs = theirs.gather(1, same.int().argmax(-1)).where(  # as ours chose
                same.any(2).all(1, keepdim=True), theirs)
        keep = self.tokens(name)
        return (as_rows(ours, axes(name))[keep],
                None if theirs is None else as_rows(theirs, axes(name))[keep], keep.nonzero()[:, 0])

    def limits(self, name, before):
        """The errors that rounding explains: by depth, and after the largest error before."""
        last, depth, _ = parse(name)
        depth = self.trace.config["num_hidden_layers"] if depth is None else depth
        depth = 0 if last == "embed_tokens" else depth
        return self.rounding * math.sqrt(depth + 1), max(self.rounding, JUMP * before)

    def skipped(self, last=None, name=None):
        """Our quantities after one tensor and before another that the port has not traced."""
        start = self.order.index(last) + 1 if last else 1
        return [n for n in self.order[start:self.order.index(name) if name else None]
                if word(n) not in ("margin", "tokens") and n not in self.theirs
                and not (self.trace.calls and "T" in axes(n))]  # a cache may have any order

    def unknown(self):
        """Names in theirs that are not ours, except weights."""
        return sorted(name for name in set(self.theirs) - set(self.order)
                      if not name.endswith(".weight") and ".experts." not in name)
