"""Mixtral in float64, one function per quantity of a trace, in which any step can be replaced.

compare.py uses it to compute what a port with a certain error would give. A `Run` takes all that
the changes do not reach from a trace and computes the rest with STEPS. So what it needs depends on
the place: scores without their scale follow from our queries and keys, but the output of the same
layer follows only with the weights.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from reference import word
from torch import Tensor
from torch.nn import functional as F

ATTENTION = ("q_proj", "k_proj", "v_proj", "q_rotated", "k_rotated", "scores", "probabilities",
             "mixed", "o_proj")
ROUTER, EXPERT = ("gate", "chosen", "weights"), ("tokens", "w1", "w3", "hidden", "w2")


class MissingError(LookupError):
    """Something cannot be computed, because a tensor or a weight is missing."""


class Trace(NamedTuple):
    """What is known about one side."""

    tensors: dict
    config: dict
    weights: dict  # may be empty
    chunk: int  # tokens per call of the port; 0 if unknown
    first_position: int
    lengths: list  # real tokens per row
    calls: list = None  # real tokens per call and row, if the rows of a call are ragged
    positions: Tensor = None  # (B, S), if they do not count the tokens of a row


class Calls(NamedTuple):
    """How a port may read the tokens: for each token the call, its first token and its end."""

    text: str
    number: Tensor  # (B, S), as are the others
    start: Tensor
    end: Tensor
    size: int  # the tokens of the largest call


def calls_of(trace):
    """The calls of the port; if they are not known, calls of a power of two tokens."""
    B, S = trace.tensors["tokens"].shape
    if trace.calls:
        return [split("the calls of the file", list(zip(*trace.calls, strict=True)), S)]
    sizes = [trace.chunk] if trace.chunk else [2 ** n for n in range(S.bit_length()) if 2 ** n < S]
    return [split(f"calls of {c} tokens", [[c] * (S // c)] * B, S) for c in sizes]


def split(text, rows, S):
    """The Calls in which row r reads rows[r] tokens one after another, of S with the rest."""
    parts = []
    for sizes in rows:
        sizes = torch.tensor([*sizes, S - sum(sizes)])
        end, number = sizes.cumsum(0), torch.arange(len(sizes)).repeat_interleave(sizes)
        parts.append(torch.stack((number, (end - sizes)[number], end[number])))
    return Calls(text, *torch.stack(parts, 1), max(map(max, rows)))


class Run:
    """A forward pass in float64 with changes, {word or name: function of a Place}.

    What is in `equal` keeps the value of the trace, and so does all that no change reaches.
    """

    def __init__(self, trace, changes=None, equal=()):
        self.trace, self.changes, self.equal = trace, changes or {}, equal
        self.values, self.reached, self.depth = {}, {}, 0

    def change(self, name):
        return self.changes and (self.changes.get(name) or self.changes.get(parse(name)[0])) or None

    def affected(self, name):
        """Whether a change reaches a quantity, directly or through its inputs."""
        if name not in self.reached:
            place = Place(self, name)
            while self.depth < place.layer:  # layer by layer, so that the recursion stays shallow
                self.depth += 1
                self.affected(f"model.layers.{self.depth - 1}")
            self.reached[name] = name not in self.equal and (
                self.change(name) is not None or any(map(self.affected, place.inputs())))
        return self.reached[name]

    def reach(self, name):
        """The value of a quantity, layer by layer, so that the recursion stays shallow."""
        for n in range(Place(self, name).layer):
            if self.affected(f"model.layers.{n}"):
                self[f"model.layers.{n}"]
        return self[name]

    def __getitem__(self, name):
        if name not in self.values:
            change = None if name in self.equal else self.change(name)
            self.values[name] = change(Place(self, name)) if change else self.plain(name)
        return self.values[name]

    def plain(self, name):
        """The value of a quantity if no change is made in it."""
        place, tensor = Place(self, name), self.trace.tensors.get(name)
        if tensor is not None and (name in self.equal or not any(
                map(self.affected, place.inputs()))):
            return tensor.double() if tensor.is_floating_point() else tensor
        return STEPS[place.word][1](place)

    def local(self, name):
        """A quantity computed by our step, with the changes, from what the trace holds before it.

        This tells whether the step itself agrees with the trace, whatever is wrong before it.
        """
        others = {n: x for n, x in self.trace.tensors.items() if n != name}
        return Run(self.trace._replace(tensors=others), self.changes, others.keys()).reach(name)

    def place_of(self, last, name):
        """The place of a quantity in the layer of another one, or in layer 0."""
        place = Place(self, name)
        inside = place.layer < self.trace.config["num_hidden_layers"]
        return Place(self, place.name(last, place.expert or 0, place.layer if inside else 0))


@cache
def parse(name):
    """The word, the layer and the expert of a name; None if there is none."""
    parts = name.split(".")
    layer = int(parts[2]) if "layers" in parts else None
    return word(name), layer, int(parts[parts.index("experts") + 1]) if "experts" in parts else None


class Place:
    """A quantity in a run. `place[word]` is another quantity of the same layer and expert."""

    def __init__(self, run, name):
        self.run, self.config = run, run.trace.config
        self.word, self.layer, self.expert = parse(name)
        if self.layer is None:
            self.layer = 0 if self.word == "embed_tokens" else self.config["num_hidden_layers"]
        self.S = run.trace.tensors["tokens"].shape[1]
        self.W, self.d = self.config["sliding_window"], self.config["head_dim"]

    def name(self, last, expert=None, layer=None):
        layer = self.layer if layer is None else layer
        expert = self.expert if expert is None else expert
        if last == "stream":
            return f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
        if last in ("embed_tokens", "norm"):
            return f"model.{last}"
        if last == "lm_head":
            return last
        at = f"model.layers.{layer}"
        if last in EXPERT:
            return f"{at}.block_sparse_moe.experts.{expert}.{last}"
        group = "self_attn." * (last in ATTENTION) + "block_sparse_moe." * (last in ROUTER)
        return at if last == "layer" else f"{at}.{group}{last}"

    def inputs(self):
        """The names of the quantities from which this one is computed."""
        return [self.name(last, e) for last in STEPS[self.word][0]
                for e in (self.experts() if last == "w2" else [None])]

    def experts(self):
        """The experts that have tokens: those of the trace, or any if the choice may change."""
        chosen = self.name("chosen")
        if chosen not in self.run.trace.tensors or self.run.affected(chosen):
            return range(self.config["num_local_experts"])
        return experts_in(self.run.trace.tensors[chosen])

    def __getitem__(self, last):
        return self.run[self.name(last)]

    def plain(self, last=None):
        """A quantity if no change is made in it; by default this quantity."""
        return self.run.plain(self.name(last or self.word))

    def at(self, expert):
        return Place(self.run, self.name("w2", expert))

    def weight(self, last=None, expert=None, layer=None):
        """The weight of a module in float64, by default that of this quantity."""
        name = self.name(last or self.word, expert, layer) + ".weight"
        if name not in self.run.trace.weights:
            raise MissingError(name)
        return self.run.trace.weights[name].double()

    def norm_weight(self, last=None):
        """The weight of a norm. It also follows from the input and output in our trace."""
        last = last or self.word
        if self.name(last) + ".weight" in self.run.trace.weights:
            return self.weight(last)
        source = self.name("residual" if last.startswith("post") else "stream")
        x, y = (self.run.trace.tensors.get(name) for name in (source, self.name(last)))
        if x is None or y is None:
            raise MissingError(self.name(last))
        x = unit(x.double(), self.config["rms_norm_eps"]).flatten(0, -2)
        return (y.double().flatten(0, -2) * x).sum(0) / x.square().sum(0)

    def heads(self, last):
        """A quantity cut into heads: (B, S, heads·d) -> (B, S, heads, d)."""
        return self[last].unflatten(-1, (-1, self.d))

    def routing_weights(self):
        """The routing weight of each token of this expert, (R, 1)."""
        token, rank = torch.where(self["chosen"] == self.expert)
        return self["weights"][token, rank, None]


# ------------------------------------------------------------------ the forward pass


def unit(x, eps):
    """x / √(mean(x²) + ε)."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def norm_input(p):
    return p["residual" if p.word.startswith("post") else "stream"]


def norm(p):
    return unit(norm_input(p), p.config["rms_norm_eps"]) * p.norm_weight()


def experts_in(chosen):
    return sorted(set(chosen.flatten().tolist()) - {-1})


def expert_input(p, source="post_attention_layernorm"):
    """The rows of the tokens of an expert, (R, D)."""
    return p[source].flatten(0, 1)[p["tokens"]]


LINEAR = {
    "q_proj": lambda p: p["input_layernorm"], "k_proj": lambda p: p["input_layernorm"],
    "v_proj": lambda p: p["input_layernorm"], "o_proj": lambda p: p["mixed"].flatten(2),
    "gate": lambda p: p["post_attention_layernorm"].flatten(0, 1), "w1": expert_input,
    "w3": expert_input, "w2": lambda p: p["hidden"], "lm_head": lambda p: p["norm"]}


def linear(p, weight=None):
    """The product of a weight, by default the quantity's own, and the input in LINEAR."""
    return LINEAR[p.word](p) @ (p.weight() if weight is None else weight).T


def positions(p):
    """The positions of the tokens, (B, S)."""
    t = p.run.trace
    usual = torch.arange(p.S).double().expand(t.tensors["tokens"].shape) + t.first_position
    return usual if t.positions is None else t.positions.double()


def frequencies(p, theta=None, d=None):
    """θ^(−2i/d) for i < d/2."""
    d = d or p.d
    return (theta or p.config["rope_theta"]) ** (-torch.arange(0, d, 2).double() / d)


def angles(p, at=None, frequency=None):
    """position · frequency, with an axis of size 1 for the heads: (B, S, 1, d/2)."""
    frequency = frequencies(p) if frequency is None else frequency
    return (positions(p) if at is None else at)[..., None, None] * frequency


class Pairing(NamedTuple):
    """How the two features of each pair are taken from a head and put back."""

    take: Callable
    put: Callable


HALVES = Pairing(lambda x: x.chunk(2, -1), lambda a, b: torch.cat((a, b), -1))
NEIGHBOURS = Pairing(lambda x: (x[..., ::2], x[..., 1::2]),
                     lambda a, b: torch.stack((a, b), -1).flatten(-2))


def unrotated(p):
    return p.heads(p.word.replace("_rotated", "_proj"))


def turn(x, cos, sin, take=HALVES, put=HALVES):
    a, b = take.take(x)
    return put.put(a * cos - b * sin, b * cos + a * sin)


def rotated(p, angle=None, x=None, **pairing):
    angle = angles(p) if angle is None else angle
    return turn(unrotated(p) if x is None else x, angle.cos(), angle.sin(), **pairing)


def visible(p, first=None, last=None):
    """The mask (B, S, T) in which query i sees the keys first … last; Mixtral's by default."""
    i, j = torch.arange(p.S)[:, None], torch.arange(p.S)
    first = (i - p.W + 1 if p.W else torch.tensor(0)) if first is None else first[..., None]
    last = i if last is None else last[..., None]
    return ((j >= first) & (j <= last)).expand(len(p.run.trace.lengths), p.S, p.S)


def head_map(p, modulo=False):
    """The key/value head of every query head, (H)."""
    H, K = p.config["num_attention_heads"], p.config["num_key_value_heads"]
    return torch.arange(H) % K if modulo else torch.arange(H) // (H // K)


def real(p):
    """Which tokens are no padding, (B, S)."""
    return torch.arange(p.S) < torch.tensor(p.run.trace.lengths)[:, None]


def hidden_padding(p, mask):
    """A mask (B, S, T) without padded keys; padded queries keep theirs, so that no NaN arises."""
    return mask & (real(p)[:, None] | ~real(p)[:, :, None])


def scores(p, mask=None, scale=1.0, q=None, k=None, modulo=False, padding=False):
    """q·kᵀ/√d times a scale, −∞ where the mask is false and, without `padding`, at padded keys.

    With an axis more, (B, S, T, K, d), the keys can differ from query to query.
    """
    q, k = p["q_rotated"] if q is None else q, p["k_rotated"] if k is None else k
    k = k[..., head_map(p, modulo), :]
    s = torch.einsum("bshd,bthd->bhst" if k.ndim == 4 else "bshd,bsthd->bhst", q, k) * scale
    mask = visible(p) if mask is None else mask
    mask = mask if padding else hidden_padding(p, mask)
    return (s / math.sqrt(p.d)).masked_fill(~mask[:, None], -math.inf)


def mixed(p, v=None, modulo=False):
    v = p.heads("v_proj") if v is None else v
    return torch.einsum("bhst,bthd->bshd", p["probabilities"], v[:, :, head_map(p, modulo)])


def choose(p, logits, ranks=None):
    """The experts with certain ranks of each token, the best A by default; −1 for padding."""
    ranks = list(range(p.config["num_experts_per_tok"])) if ranks is None else ranks
    experts = logits.sort(dim=-1, descending=True, stable=True)[1][:, ranks]
    return experts.where(real(p).view(-1, 1), -1)


def chosen_logits(p):
    return p["gate"].gather(1, p["chosen"].clamp(min=0))


def mixture(p, weights=None, add=Tensor.index_add_, source=None, target=None, keep=None):
    """Σ routing weight · expert output.

    For wrong sums, `add` puts rows into the result, `source` says from which tokens their weights
    come, `target` to which tokens they are added, and `keep` which of them are added.
    """
    chosen, weights = p["chosen"], p["weights"] if weights is None else weights
    y = torch.zeros_like(p["residual"]).flatten(0, 1)
    for e in experts_in(chosen):
        token, rank = torch.where(chosen == e)
        share = weights[source(token) if source else token, rank, None]
        kept = keep(token, rank) if keep else slice(None)
        add(y, 0, (target(token) if target else token)[kept], (share * p.at(e)["w2"])[kept])
    return y.view_as(p["residual"])


STEPS = {  # the inputs of each quantity, and its function
    "embed_tokens": ((), lambda p: p.weight()[p.run.trace.tensors["tokens"]]),
    "input_layernorm": (("stream",), norm),
    "q_proj": (("input_layernorm",), linear),
    "k_proj": (("input_layernorm",), linear),
    "v_proj": (("input_layernorm",), linear),
    "q_rotated": (("q_proj",), rotated),
    "k_rotated": (("k_proj",), rotated),
    "scores": (("q_rotated", "k_rotated"), scores),
    "probabilities": (("scores",), lambda p: p["scores"].softmax(-1)),
    "mixed": (("probabilities", "v_proj"), mixed),
    "o_proj": (("mixed",), linear),
    "residual": (("stream", "o_proj"), lambda p: p["stream"] + p["o_proj"]),
    "post_attention_layernorm": (("residual",), norm),
    "gate": (("post_attention_layernorm",), linear),
    "chosen": (("gate",), lambda p: choose(p, p["gate"])),
    "weights": (("gate", "chosen"), lambda p: chosen_logits(p).softmax(-1)),
    "tokens": (("chosen",), lambda p: torch.where(p["chosen"] == p.expert)[0]),
    "w1": (("post_attention_layernorm", "tokens"), linear),
    "w3": (("post_attention_layernorm", "tokens"), linear),
    "hidden": (("w1", "w3"), lambda p: F.silu(p["w1"]) * p["w3"]),
    "w2": (("hidden",), linear),
    "block_sparse_moe": (("weights", "w2"), mixture),
    "layer": (("residual", "block_sparse_moe"), lambda p: p["residual"] + p["block_sparse_moe"]),
    "norm": (("stream",), norm),
    "lm_head": (("norm",), linear)}
