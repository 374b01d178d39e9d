"""Mixtral in float64, one step per quantity of a trace, any of which can be replaced.

compare.py uses it to compute what a port with a certain error would give. A `Run` takes what a
trace holds and computes with STEPS what it lacks. So what it needs depends on the place: scores
without their scale follow from queries and keys, but the output of the same layer follows from
that of the layer before only with the weights.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from reference import word
from torch import Tensor
from torch.nn import functional as F

NAMES = {last: f"model.layers.{{layer}}.{group}{last}" for group, words in {
    "": "input_layernorm residual post_attention_layernorm block_sparse_moe",
    "self_attn.": "q_proj k_proj v_proj q_rotated k_rotated scores probabilities mixed o_proj",
    "block_sparse_moe.": "gate chosen weights",
    "block_sparse_moe.experts.{expert}.": "w1 w3 hidden w2"}.items() for last in words.split()} | {
    "embed_tokens": "model.embed_tokens", "layer": "model.layers.{layer}", "norm": "model.norm",
    "lm_head": "lm_head"}
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w3", "w2", "lm_head")
NEGLIGIBLE = 104  # e^−104 is 0 in float32 and vanishes beside 1 in float64


class MissingError(LookupError):
    """Something cannot be computed, because a tensor or a weight is missing."""


class Trace(NamedTuple):
    """What is known about one side. The rows of an expert are spread over all tokens, (N, …)."""

    tensors: dict
    config: dict
    weights: dict  # may be empty
    dtype: torch.dtype  # in which the tensors were written
    first_position: int
    lengths: list  # real tokens per row
    calls: list  # for each call the tokens that each row reads; empty if one call reads all


class Calls(NamedTuple):
    """How a port reads the tokens: for each token the call, its first token and its end, (B, S)."""

    number: Tensor
    start: Tensor
    end: Tensor
    size: int  # the tokens of the largest call


def calls_of(trace):
    """The Calls of the port in a list, which is empty if all tokens are read at once."""
    S, parts = trace.tensors["tokens"].shape[1], []
    for sizes in zip(*trace.calls, strict=True):  # of one row; the padding is one more call
        sizes = torch.tensor([*sizes, S - sum(sizes)])
        end, number = sizes.cumsum(0), torch.arange(len(sizes)).repeat_interleave(sizes)
        parts.append(torch.stack((number, (end - sizes)[number], end[number])))
    return [Calls(*torch.stack(parts, 1), max(map(max, trace.calls)))] if parts else []


def halves(x):
    """The features of heads with the pairs (2i, 2i + 1) moved to (i, i + d/2)."""
    return torch.cat((x[..., ::2], x[..., 1::2]), -1)


def neighbours(x):
    """The features of heads with the pairs (i, i + d/2) moved to (2i, 2i + 1)."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


def turn(x, cos, sin):
    """The pairs (a, b) of each head as (a·cos − b·sin, b·cos + a·sin)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def unit(x, eps):
    """x / √(mean(x²) + ε)."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def experts_in(chosen):
    return sorted(set(chosen.flatten().tolist()) - {-1})


def without(trace, name):
    """A trace that lacks one quantity."""
    return trace._replace(tensors={n: x for n, x in trace.tensors.items() if n != name})


@cache
def parse(name):
    """The word, the layer and the expert of a name; None if there is none."""
    parts = name.split(".")
    layer = int(parts[2]) if "layers" in parts else None
    return word(name), layer, int(parts[parts.index("experts") + 1]) if "experts" in parts else None


class Run:
    """The quantities that a trace holds, and all others computed from them, with changes.

    A change replaces a step: {the word or the name of a quantity: a function of its Place}.
    """

    def __init__(self, trace, changes=None):
        self.trace, self.changes, self.values = trace, changes or {}, dict(trace.tensors)

    def __getitem__(self, name):
        if name not in self.values:
            last = parse(name)[0]
            step = self.changes.get(name) or self.changes.get(last) or STEPS[last][1]
            self.values[name] = step(Place(self, name))
        return self.values[name]

    def lacking(self, name):
        """All that must be computed for a quantity, inputs first, as {name: inputs}.

        The search goes into the first missing input only, so that inputs come before their users.
        """
        found, todo = {}, [] if name in self.values else [name]
        while todo:
            inputs = Place(self, todo[-1]).inputs()
            new = [n for n in inputs if n not in self.values and n not in found]
            if not new:
                found[todo.pop()] = inputs
            todo += new[:1]
        return found


class Place:
    """A quantity in a run. `place[word]` is another quantity of the same layer and expert.

    Below are the forward pass and what can be other in it. The steps take no arguments; with
    arguments they compute what wrong ports compute.
    """

    def __init__(self, run, name):
        self.run, self.config = run, run.trace.config
        self.word, self.layer, self.expert = parse(name)
        if self.layer is None:
            self.layer = 0 if self.word == "embed_tokens" else self.config["num_hidden_layers"]
        self.S = run.trace.tensors["tokens"].shape[1]
        self.W, self.d = self.config["sliding_window"], self.config["head_dim"]
        self.A, self.E = self.config["num_experts_per_tok"], self.config["num_local_experts"]
        self.eps = self.config["rms_norm_eps"]

    def name(self, last=None, expert=None):
        """The name of another quantity, by default in the same layer and of the same expert."""
        if last == "stream":
            return f"model.layers.{self.layer - 1}" if self.layer else "model.embed_tokens"
        return NAMES[last or self.word].format(
            layer=self.layer, expert=self.expert if expert is None else expert)

    def inputs(self):
        """The names of the quantities from which this one is computed; any expert may be chosen."""
        chosen = self.run.values.get(self.name("chosen"))
        experts = range(self.E) if chosen is None else experts_in(chosen)
        return [self.name(last, e) for last in STEPS[self.word][0]
                for e in (experts if last == "w2" else [None])]

    def __getitem__(self, last):
        return self.run[self.name(last)]

    def plain(self):
        """This quantity if its own step is right."""
        return STEPS[self.word][1](self)

    def weight(self, last=None, expert=None):
        """The weight of a module in float64, by default that of this quantity."""
        name = self.name(last, expert) + ".weight"
        if name not in self.run.trace.weights:
            raise MissingError(name)
        return self.run.trace.weights[name].double()

    def heads(self, last):
        """A quantity cut into heads: (B, S, heads·d) -> (B, S, heads, d)."""
        return self[last].unflatten(-1, (-1, self.d))

    def real(self):
        """Which tokens are no padding, (B, S)."""
        return torch.arange(self.S) < torch.tensor(self.run.trace.lengths)[:, None]

    def source(self, last=None):
        """The input of a norm or a linear layer, or another quantity in its place."""
        x = self[last or STEPS[self.word][0][0]]
        return x.flatten(0, 1) if self.word in ("gate", "w1", "w3") else (
            x.flatten(2) if x.ndim == 4 else x)

    def product(self, weight=None, x=None, scale=unit):
        """x·Wᵀ, or in a norm the scaled x times its weight; by default with its own."""
        x, weight = self.source() if x is None else x, self.weight() if weight is None else weight
        return scale(x, self.eps) * weight if self.word in NORMS else x @ weight.T

    def positions(self):
        """The positions of the tokens, (B, S)."""
        t = self.run.trace
        return torch.arange(self.S).double().expand(t.tensors["tokens"].shape) + t.first_position

    def frequencies(self, theta=None, d=None):
        """θ^(−2i/d) for i < d/2."""
        d = d or self.d
        return (theta or self.config["rope_theta"]) ** (-torch.arange(0, d, 2).double() / d)

    def angles(self, at=None, frequency=None):
        """position · frequency, with an axis of size 1 for the heads: (B, S, 1, d/2)."""
        frequency = self.frequencies() if frequency is None else frequency
        return (self.positions() if at is None else at)[..., None, None] * frequency

    def unrotated(self):
        return self.heads(self.word.replace("_rotated", "_proj"))

    def rotated(self, angle=None, x=None):
        angle = self.angles() if angle is None else angle
        return turn(self.unrotated() if x is None else x, angle.cos(), angle.sin())

    def visible(self, first=None, last=None):
        """The mask (B, S, T) in which query i sees the keys first … last; Mixtral's by default."""
        j = torch.arange(self.S)
        i = j.expand(len(self.run.trace.lengths), -1)
        first = (i - self.W + 1 if self.W else 0 * i) if first is None else first
        return (j >= first[..., None]) & (j <= (i if last is None else last)[..., None])

    def head_map(self, modulo=False):
        """The key/value head of every query head, (H)."""
        H, K = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        return torch.arange(H) % K if modulo else torch.arange(H) // (H // K)

    def scores(self, mask=None, q=None, k=None, modulo=False, hide=True):
        """q·kᵀ/√d, −∞ where the mask (B, S, T) is false and at padded keys: (B, H, S, T).

        With an axis more, (B, S, T, K, d), the keys can differ from query to query. Padded queries
        see padded keys, so that no NaN arises.
        """
        q, k = self["q_rotated"] if q is None else q, self["k_rotated"] if k is None else k
        k = k[..., self.head_map(modulo), :]
        s = torch.einsum("bshd,bthd->bhst" if k.ndim == 4 else "bshd,bsthd->bhst", q, k)
        mask = self.visible() if mask is None else mask
        mask = mask & (self.real()[:, None] | ~self.real()[:, :, None])
        return (s / math.sqrt(self.d)).masked_fill(~mask[:, None] & hide, -math.inf)

    def mixed(self, v=None, modulo=False):
        """Σ probability · value, (B, S, H, d)."""
        v = (self.heads("v_proj") if v is None else v)[:, :, self.head_map(modulo)]
        return torch.einsum("bhst,bthd->bshd", self["probabilities"], v)

    def choose(self, logits=None, ranks=None):
        """The experts with certain ranks of each token, the best A by default; −1 for padding."""
        logits = self["gate"] if logits is None else logits
        experts = logits.sort(dim=-1, descending=True, stable=True)[1]
        return experts[:, range(self.A) if ranks is None else ranks].where(
            self.real().view(-1, 1), -1)

    def chosen_logits(self):
        return self["gate"].gather(1, self["chosen"].clamp(min=0))

    def shares(self):
        """The routing weights, (N, A)."""
        return self.chosen_logits().softmax(-1)

    def mixture(self, weights=None, add=Tensor.index_add_, origin=None, target=None):
        """Σ routing weight · expert output.

        For wrong sums, `add` puts rows into the result, `origin` says from which tokens their
        weights come, and `target` to which tokens they are added.
        """
        chosen, weights = self["chosen"], self["weights"] if weights is None else weights
        y = torch.zeros_like(self["residual"]).flatten(0, 1)
        for e in experts_in(chosen):
            token, rank = torch.where(chosen == e)
            share = weights[origin(token) if origin else token, rank, None]
            rows = share * self.run[self.name("w2", e)][token]
            add(y, 0, target(token) if target else token, rows)
        return y.view_as(self["residual"])


STEPS = {  # the inputs of each quantity, and its function
    "embed_tokens": ((), lambda p: p.weight()[p.run.trace.tensors["tokens"]]),
    "input_layernorm": (("stream",), Place.product),
    "q_proj": (("input_layernorm",), Place.product),
    "k_proj": (("input_layernorm",), Place.product),
    "v_proj": (("input_layernorm",), Place.product),
    "q_rotated": (("q_proj",), Place.rotated),
    "k_rotated": (("k_proj",), Place.rotated),
    "scores": (("q_rotated", "k_rotated"), Place.scores),
    "probabilities": (("scores",), lambda p: p["scores"].softmax(-1)),
    "mixed": (("probabilities", "v_proj"), Place.mixed),
    "o_proj": (("mixed",), Place.product),
    "residual": (("stream", "o_proj"), lambda p: p["stream"] + p["o_proj"]),
    "post_attention_layernorm": (("residual",), Place.product),
    "gate": (("post_attention_layernorm",), Place.product),
    "chosen": (("gate",), Place.choose),
    "weights": (("gate", "chosen"), Place.shares),
    "w1": (("post_attention_layernorm", "chosen"), Place.product),
    "w3": (("post_attention_layernorm", "chosen"), Place.product),
    "hidden": (("w1", "w3"), lambda p: F.silu(p["w1"]) * p["w3"]),
    "w2": (("hidden",), Place.product),
    "block_sparse_moe": (("chosen", "weights", "w2"), Place.mixture),
    "layer": (("residual", "block_sparse_moe"), lambda p: p["residual"] + p["block_sparse_moe"]),
    "norm": (("stream",), Place.product),
    "lm_head": (("norm",), Place.product)}
