"""Claims about the causes that compare.py names: it names the right one, and never a wrong one.

Every cause is seeded into `Port`, a third implementation that runs in any dtype, with a rolling
buffer if asked. Its errors are written here a second time, without the functions of causes.py.
"""

import json
import math
import random
import re
from types import MethodType

import compare
import golden
import pair
import pytest
import torch
from causes import CAUSES
from reference import axes, word
from steps import STEPS, Run
from torch.nn import functional as F

from convert import write_safetensors

CONFIG = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 20, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 6, "sliding_window": 5,
          "rope_theta": 1e4, "rms_norm_eps": 1e-3, "num_hidden_layers": 1}


class Port:
    """Mixtral for one row of tokens. Each method can be replaced to seed an error."""

    def __init__(self, trace, dtype, chunk=0, buffer=None):
        self.c, self.first = trace.config, trace.first_position
        self.weights = {name: w.to(dtype) for name, w in trace.weights.items()}
        self.tokens, self.chunk = trace.tensors["tokens"][0], chunk
        self.buffer = buffer or (self.c["sliding_window"] or len(self.tokens)) + (chunk or 1) - 1
        self.seen, self.cache, self.rows = {}, {}, {}

    def run(self):
        S = len(self.tokens)
        for start in range(0, S, self.chunk or S):
            self.call(start, min(S, start + (self.chunk or S)))
        found = {name: torch.cat(parts) for name, parts in self.seen.items()}
        for name, rows in self.rows.items():
            rows = dict(sorted(rows.items()))
            found[name] = torch.stack(list(rows.values()))
            found[name.rpartition(".")[0] + ".tokens"] = torch.tensor(list(rows))
        return {"tokens": self.tokens} | {name: x.contiguous() for name, x in found.items()}

    def keep(self, name, x):
        if not (self.chunk and word(name) in ("scores", "probabilities")):  # their T is slots
            self.seen.setdefault(name, []).append(x)
        return x

    def keep_row(self, name, token, x):
        self.rows.setdefault(name, {})[token] = x
        return x

    def call(self, start, end):
        self.start, self.end = start, end
        x = self.keep("model.embed_tokens", self.embed(self.tokens[start:end]))
        for n in range(self.c["num_hidden_layers"]):
            self.at = f"model.layers.{n}."
            x = self.keep(self.at[:-1], self.layer(x))
        x = self.keep("model.norm", self.norm(x, "model.norm"))
        self.keep("lm_head", self.logits(x))

    def layer(self, x):
        normed = self.keep(f"{self.at}input_layernorm", self.norm(x, f"{self.at}input_layernorm"))
        attention = self.attention(normed, x)
        h = self.keep(f"{self.at}residual", self.add_attention(x, attention, normed))
        normed = self.post(h, x)
        self.keep(f"{self.at}post_attention_layernorm", normed)
        y = self.keep(f"{self.at}block_sparse_moe", self.mixture(normed, h))
        return self.add_mixture(h, y, normed, x)

    def post(self, h, x):
        return self.norm(h, f"{self.at}post_attention_layernorm")

    def embed(self, tokens):
        return self.weights["model.embed_tokens.weight"][tokens]

    def add_attention(self, x, y, normed):
        return x + y

    def add_mixture(self, h, y, normed, x):
        return h + y

    def logits(self, x):
        return self.linear(x, "lm_head")

    def norm(self, x, name):
        eps = self.c["rms_norm_eps"]
        return self.scale(x / torch.sqrt(torch.mean(x * x, -1, True) + eps), name)

    def scale(self, x, name):
        return x * self.weights[name + ".weight"]

    def weight(self, name):
        return self.weights[name + ".weight"]

    def linear(self, x, name):
        return F.linear(x, self.weight(name))

    def project(self, normed, x, name):
        return self.linear(normed, name)

    def attention(self, normed, x):
        at, d = self.at + "self_attn.", self.c["head_dim"]
        q, k, v = (self.keep(at + name, self.project(normed, x, at + name))
                   for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (y.unflatten(-1, (-1, d)) for y in (q, k, v))
        positions = torch.arange(self.start, self.end) + self.first
        q_rotated = self.keep(at + "q_rotated", self.rotate(q, self.positions(positions)))
        k_rotated = self.keep(at + "k_rotated", self.rotate(k, self.positions(positions)))
        keys, values, held = self.remember(k_rotated, v, positions)
        heads = []
        scores = self.scores(q_rotated, keys, self.mask(positions, held))
        shares = self.softmax(scores)
        for h in range(q.shape[1]):
            heads.append(shares[h] @ self.values(values, keys)[:, self.value_head(h)])
        self.keep(at + "scores", scores)
        self.keep(at + "probabilities", shares)
        mixed = self.keep(at + "mixed", torch.stack(heads, 1))
        return self.keep(at + "o_proj", self.output(mixed, at + "o_proj"))

    def output(self, mixed, name):
        return self.linear(mixed.flatten(1), name)

    def values(self, values, keys):
        return values

    def positions(self, positions):
        return positions

    def angles(self, positions, d):
        i = torch.arange(d // 2, dtype=torch.float64)
        return positions.double()[:, None, None] / self.c["rope_theta"] ** (2 * i / d)

    def rotate(self, x, positions):
        angles = self.angles(positions, x.shape[-1])
        turns = torch.polar(torch.ones((), dtype=torch.float64), angles)
        x, dtype = torch.complex(*x.double().chunk(2, -1)) * turns, x.dtype
        return torch.cat((x.real, x.imag), -1).to(dtype)

    def remember(self, k, v, positions):
        """The rolling buffer with position p in slot p mod C; a call is stored, then read."""
        if not self.chunk:
            return k, v, positions
        K, V, P = self.cache.setdefault(self.at, (
            k.new_zeros(self.buffer, *k.shape[1:]), v.new_zeros(self.buffer, *v.shape[1:]),
            torch.full((self.buffer,), -1)))
        for row, p in enumerate(positions.tolist()):
            K[p % self.buffer], V[p % self.buffer], P[p % self.buffer] = k[row], v[row], p
        return K, V, P

    def key_head(self, h):
        return h // (self.c["num_attention_heads"] // self.c["num_key_value_heads"])

    value_head = key_head

    def mask(self, i, j):
        i, j, W = i[:, None], j[None], self.c["sliding_window"] or math.inf
        return (j >= 0) & (j <= i) & (i - j < W)

    def scores(self, q, k, mask):
        heads = [self.score(q[:, h], k[:, self.key_head(h)]) for h in range(q.shape[1])]
        return self.hide(torch.stack(heads), mask)

    def hide(self, scores, mask):
        return torch.where(mask, scores, -math.inf)

    def score(self, q, k):
        return q @ k.T / math.sqrt(q.shape[-1])

    def softmax(self, scores):
        return torch.softmax(scores, -1)

    def mixture(self, normed, h):
        at = self.at + "block_sparse_moe."
        logits = self.keep(at + "gate", self.gate(normed, h, at + "gate"))
        chosen = self.keep(at + "chosen", self.choose(logits))
        weights = self.keep(at + "weights", self.weigh(logits, chosen))
        y = torch.zeros_like(normed)
        for e in range(logits.shape[1]):
            tokens, ranks = torch.where(chosen == e)
            outputs = []
            for row, (n, a) in enumerate(zip(tokens.tolist(), ranks.tolist(), strict=True)):
                outputs.append((row, n, a, self.expert(
                    normed[n], h[n], f"{at}experts.{e}.", self.start + n, weights[n, a])))
            self.combine(y, outputs, weights, chosen, e)
        return self.finish(y, normed, logits)

    def finish(self, y, normed, logits):
        return y

    def gate(self, normed, h, name):
        return self.linear(normed, name)

    def choose(self, logits):
        A = self.c["num_experts_per_tok"]
        return torch.stack([torch.tensor(sorted(range(len(row)), key=lambda e: (-row[e], e))[:A])
                            for row in logits])

    def weigh(self, logits, chosen):
        powers = torch.exp(logits - logits.amax(-1, True)).gather(1, chosen)
        return powers / powers.sum(-1, True)

    def expert_input(self, x, weight):
        return x

    def expert_source(self, x, h):
        return x

    def expert(self, x, h, at, token, weight):
        x = self.expert_input(self.expert_source(x, h), weight)
        g = self.keep_row(at + "w1", token, self.linear(x, at + "w1"))
        u = self.keep_row(at + "w3", token, self.linear(x, at + "w3"))
        hidden = self.keep_row(at + "hidden", token, self.hidden(g, u, weight))
        return self.keep_row(at + "w2", token, self.down(hidden, weight, at + "w2"))

    def hidden(self, g, u, weight):
        return g * torch.sigmoid(g) * u

    def down(self, hidden, weight, name):
        return self.linear(hidden, name)

    def combine(self, y, outputs, weights, chosen, e):
        for row, n, a, out in outputs:
            self.accumulate(y, row, n, self.share(weights, chosen, row, n, a) * out)

    def accumulate(self, y, row, n, out):
        y[n] += out

    def share(self, weights, chosen, row, n, a):
        return weights[n, a]


# ------------------------------------------------------------------ the seeded errors


def normed(combine):
    """An error in every norm, from the input, its mean square, ε and the weight."""
    def norm(self, x, name):
        return combine(x, torch.mean(x * x, -1, True), self.c["rms_norm_eps"],
                       self.weights[name + ".weight"])
    return {"norm": norm}


def turned(angle=lambda self, angles: angles, take=None, put=None):
    """An error in the rotation: other angles, or other pairs."""
    def rotate(self, x, positions):
        angles = angle(self, self.angles(positions, x.shape[-1]))
        a, b = take(x) if take else x.chunk(2, -1)
        a, b = a.double(), b.double()
        pair = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
        return (put(*pair) if put else torch.cat(pair, -1)).to(x.dtype)
    return {"rotate": rotate}


def even_odd(x):
    return x[..., 0::2], x[..., 1::2]


def interleaved(a, b):
    x = torch.empty(*a.shape[:-1], 2 * a.shape[-1], dtype=a.dtype)
    x[..., 0::2], x[..., 1::2] = a, b
    return x


def placed(change):
    return {"positions": lambda self, p: change(self, p)}


def first_half(self, x, positions):
    half = x.shape[-1] // 2
    return torch.cat((Port.rotate(self, x[..., :half], positions), x[..., half:]), -1)


def one_vector(self, x, positions):
    return Port.rotate(self, x.flatten(1)[:, None], positions).view_as(x)


def head_positions(self, x, positions):
    return Port.rotate(self, x.transpose(0, 1), torch.arange(x.shape[1])).transpose(0, 1)


def single_angles(frequency):
    def angles(self, positions, d):
        i = torch.arange(0, d, 2).float()
        return (positions.float()[:, None, None] * frequency(self.c["rope_theta"], i / d)).double()
    return {"angles": angles}


def coarse_angles(dtype):
    def rotate(self, x, positions):
        angles = self.angles(positions, x.shape[-1])
        cos, sin = (y.to(dtype).to(x.dtype) for y in (angles.cos(), angles.sin()))
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return {"rotate": rotate}


def swapped_rows(shape):
    def project(self, normed, x, name):
        y = self.linear(normed, name)
        return y if "v_proj" in name else y.unflatten(-1, (-1, *shape)).mT.flatten(-3)
    return {"project": project}


def exchanged(first, second):
    def project(self, normed, x, name):
        other = name.replace(first, "?").replace(second, first).replace("?", second)
        return self.linear(normed, other)
    return {"project": project}


def weighed(weigh):
    return {"weigh": lambda self, logits, chosen: weigh(logits.gather(1, chosen), logits, chosen)}


def active(hidden):
    return {"hidden": lambda self, g, u, weight: hidden(g, u)}


def masked(mask):
    """An error of the mask, from the positions i of queries and j of keys and W."""
    return {"mask": lambda self, i, j: (j >= 0)[None] & mask(
        self, i[:, None], j[None], self.c["sliding_window"])}


def no_earlier_calls(self, i, j, W):
    return (j >= self.start) & (j <= i) & (i - j < W)


def first_query_mask(self, i, j, W):
    i = torch.full_like(i, self.start)
    return (j <= i) & (i - j < W)


def slot_mask(self, i, j):
    slots = torch.arange(len(j))[None].where(j[None] >= 0, 10**6)
    return (slots <= i[:, None]) & (i[:, None] - slots < self.c["sliding_window"])


def softmaxed(softmax):
    return {"softmax": lambda self, scores: softmax(scores)}


def late_mask(self, scores):
    """The mask after the softmax, which needs scores that were not masked before it."""
    i = torch.arange(scores.shape[-1])
    return torch.softmax(self.everything, -1) * Port.mask(self, i, i)


def keep_everything(self, scores, mask):
    self.everything = scores
    return torch.where(mask, scores, -math.inf)


def shared(share):
    return {"share": lambda self, *args: share(*args)}


def over_all(self, weights, chosen, row, n, a):
    return torch.softmax(self.last_logits, -1)[n, chosen[n, a]]


def keep_logits(self, logits):
    self.last_logits = logits
    return Port.choose(self, logits)


def limited(count, by_rank=False):
    def combine(self, y, outputs, weights, chosen, e):
        order = sorted(outputs, key=lambda out: (out[2] * by_rank, out[1]))
        Port.combine(self, y, order[:count], weights, chosen, e)
    return {"combine": combine}


def overwrite(self, y, row, n, out):
    y[n] = out


def wrong_row(self, y, row, n, out):
    y[row] += out


def every_expert(self, y, normed, logits):
    share, y = torch.softmax(logits, -1), torch.zeros_like(y)
    for e in range(logits.shape[1]):
        w1, w2, w3 = (self.weights[f"{self.at}block_sparse_moe.experts.{e}.{w}.weight"]
                      for w in ("w1", "w2", "w3"))
        y += share[:, e, None] * ((F.silu(normed @ w1.T) * (normed @ w3.T)) @ w2.T)
    return y


def next_expert(by):
    def weight(self, name):
        found = re.search(r"experts\.(\d+)", name)
        if found:
            other = (int(found[1]) + by) % self.c["num_local_experts"]
            name = name.replace(found[0], f"experts.{other}")
        return self.weights[name + ".weight"]
    return {"weight": weight}


def layer_zero(self, name):
    return self.weights[re.sub(r"layers\.\d+", "layers.0", name) + ".weight"]


def square_transposed(self, name):
    w = self.weights[name + ".weight"]
    return w.T if w.shape[0] == w.shape[1] else w


def attention_first(self, x, y, normed):
    return Port.norm(self, x + y, f"{self.at}input_layernorm")


def mixture_first(self, h, y, normed, x):
    return Port.norm(self, h + y, f"{self.at}post_attention_layernorm")


def exchanged_norms(self, x, name):
    a, b = "input_layernorm", "post_attention_layernorm"
    return Port.norm(self, x, name.replace(a, "?").replace(b, a).replace("?", b))


def rolled(x, by):
    return torch.roll(x, by, 0)


PLAIN = {"scale": lambda self, x, name: x}
UNWEIGHTED = {"share": lambda self, *args: 1}
FAR = {"first_position": 32750}
THREE = {"config": {"num_experts_per_tok": 3}}
NO_WINDOW = {"config": {"sliding_window": None}}

# What is replaced, the start of the cause's description, where it is found, and in which model.
SEEDS = [
    ({"embed": lambda self, t: Port.embed(self, t) * math.sqrt(32)},
     "the embeddings are multiplied by √D", "embed_tokens", {}),
    ({"embed": lambda self, t: Port.embed(self, (t + 1) % 37)},
     "the embedding of token id +1 is read", "embed_tokens", {}),
    ({"embed": lambda self, t: self.weights["lm_head.weight"][t]},
     "the rows of lm_head are used as embeddings", "embed_tokens", {}),
    ({"norm": lambda self, x, name: x}, "the norm is missing", "input_layernorm", {}),
    (PLAIN, "the weight of the norm is missing", "input_layernorm", {}),
    (normed(lambda x, m, eps, w: x / torch.sqrt(m + eps) * (1 + w)),
     "the norm multiplies by 1 + weight", "input_layernorm", {}),
    ({"norm": lambda self, x, name: Port.norm(self, x - x.mean(-1, True), name)},
     "the mean is subtracted", "input_layernorm", {}),
    ({"norm": lambda self, x, name: self.scale(x / torch.sqrt(
        torch.var(x, -1, correction=0, keepdim=True) + 1e-3), name)},
     "the variance, over D − 0, takes the place", "input_layernorm", {}),
    (normed(lambda x, m, eps, w: x / torch.sqrt((m + eps) * 32) * w),
     "the norm divides by √(sum of squares)", "input_layernorm", {}),
    (normed(lambda x, m, eps, w: x / (m + eps) * w),
     "the norm divides by the mean of squares, without the root", "input_layernorm", {}),
    (normed(lambda x, m, eps, w: x / (torch.sqrt(m) + eps) * w),
     "ε is added after the root", "input_layernorm", {}),
    (normed(lambda x, m, eps, w: x / torch.sqrt(m + 1e-2) * w), "rms_norm_eps is 0.01",
     "input_layernorm", {}),
    ({"norm": exchanged_norms}, "the weights of the two norms of a layer are exchanged",
     "input_layernorm", {}),
    ({"norm": lambda self, x, name: x, "add_attention": attention_first,
      "add_mixture": mixture_first}, "each norm follows the addition", "input_layernorm", {}),
    ({"post": lambda self, h, x: Port.post(self, x, x)}, "the mixture reads the input of the layer",
     "post_attention_layernorm", {}),
    (swapped_rows((2, 4)), "the rows of each head are in Mistral's order", "q_proj", {}),
    (swapped_rows((4, 2)), "the rows of each head were converted twice", "q_proj", {}),
    (exchanged("k_proj", "v_proj"), "keys and values are exchanged", "k_proj", {}),
    (exchanged("q_proj", "k_proj"), "queries and keys are exchanged", "q_proj",
     {"config": {"num_key_value_heads": 4}}),
    ({"weight": square_transposed}, "square weights are used transposed", "q_proj", {}),
    ({"weight": layer_zero}, "the weight of layer 0 is used", "layers.1.self_attn.q_proj",
     {"config": {"num_hidden_layers": 2}}),
    ({"project": lambda self, normed, x, name: self.linear(x, name)},
     "the input of the projections is not normed", "q_proj", {}),
    ({"gate": lambda self, x, h, name: self.linear(h, name), "expert_source": lambda self, x, h: h},
     "the input of the mixture is not normed", "gate", {}),
    ({"gate": lambda self, x, h, name: self.linear(h, name)},
     "the input of the mixture is not normed, in gate only", "gate", {}),
    ({"logits": lambda self, x: self.linear(self.seen["model.layers.0"][-1], "lm_head")},
     "the input of lm_head is not normed", "lm_head", {}),
    ({"output": lambda self, mixed, name: self.linear(mixed.transpose(0, 1).reshape(-1, 32), name)},
     "the heads are not transposed back", "o_proj", {}),
    ({"output": lambda self, mixed, name: self.linear(mixed.transpose(1, 2).flatten(1), name)},
     "o_proj reads the features of the heads in the order d·H", "o_proj", {}),
    ({"logits": lambda self, x: x @ self.weights["model.embed_tokens.weight"].T},
     "lm_head uses the embeddings", "lm_head", {}),
    ({"rotate": lambda self, x, p: x}, "heads are not rotated", "q_rotated", {}),
    (turned(take=even_odd, put=interleaved),
     "neighbours (2i, 2i + 1) are rotated as pairs instead", "q_rotated", {}),
    (turned(take=even_odd), "neighbours (2i, 2i + 1) are rotated as pairs and written", "q_rotated",
     {}),
    (turned(put=interleaved), "pairs (i, i + d/2) are rotated and written to neighbours",
     "q_rotated", {}),
    (turned(lambda self, a: -a), "heads are rotated the other way", "q_rotated", {}),
    ({"rotate": lambda self, x, p: Port.rotate(self, Port.rotate(self, x, p), p)},
     "heads are rotated twice", "q_rotated", {}),
    (turned(lambda self, a: math.pi / 2 - a), "cosine and sine are exchanged", "q_rotated", {}),
    ({"rotate": lambda self, x, p: torch.cat((
        Port.rotate(self, x, p)[..., :4], Port.rotate(self, x, -p)[..., 4:]), -1)},
     "the second half has the wrong sign", "q_rotated", {}),
    ({"rotate": first_half}, "only the first half of each head is rotated", "q_rotated", {}),
    ({"rotate": one_vector}, "all heads are rotated as one vector", "q_rotated", {}),
    (placed(lambda self, p: p + 1), "positions are shifted by +1", "q_rotated", {}),
    ({"rotate": head_positions}, "the number of the head is used as position", "q_rotated", {}),
    (placed(lambda self, p: p - self.start), "positions restart with each call of 4 tokens",
     "q_rotated", {"chunk": 4}),
    (placed(lambda self, p: torch.full_like(p, self.start)),
     "all tokens of a call, of 4 tokens, get the position of its first one", "q_rotated",
     {"chunk": 4}),
    (placed(lambda self, p: p % self.buffer),
     "slots are used as positions: p mod C, with calls of 4 tokens and C = 8", "q_rotated",
     {"chunk": 4}),
    (placed(lambda self, p: p - self.first), "positions start at 0 instead", "q_rotated", FAR),
    (placed(lambda self, p: p / 4), "positions are divided by 4", "q_rotated", {}),
    ({"angles": lambda self, p, d: p[:, None, None] / 3210 ** (torch.arange(4).double() / 4)},
     "rope_theta is 3210", "q_rotated", {}),
    ({"angles": lambda self, p, d: p[:, None, None] / 1e4 ** (torch.arange(4).double() / 8)},
     "the exponent of the frequency is i/d", "q_rotated", {}),
    (single_angles(lambda theta, x: torch.tensor(theta) ** -x),
     "angles are computed in float32", "q_rotated", FAR),
    (placed(lambda self, p: p.bfloat16()), "positions are rounded to bfloat16", "q_rotated", FAR),
    (coarse_angles(torch.bfloat16), "cosine and sine are rounded to bfloat16", "q_rotated", {}),
    ({"score": lambda self, q, k: q @ k.T}, "scores are not divided by √d", "scores", {}),
    ({"score": lambda self, q, k: q @ k.T / 8}, "scores are divided by d instead", "scores", {}),
    ({"score": lambda self, q, k: q @ k.T / math.sqrt(32)}, "scores are divided by √D", "scores",
     {}),
    ({"score": lambda self, q, k: q @ k.T / math.sqrt(8)}, "scores are divided by √8 instead",
     "scores", {"config": {"head_dim": 6}}),
    ({"key_head": lambda self, h: h % 2, "value_head": lambda self, h: h % 2},
     "query head h uses key/value head h mod K", "scores", {}),
    ({"rotate": lambda self, x, p: (setattr(self, f"raw{x.shape[1]}", x), Port.rotate(
        self, x, p))[1], "scores": lambda self, q, k, mask: Port.scores(
            self, self.raw4, self.raw2, mask)},
     "queries and keys are used without their rotation", "scores", {}),
    ({"rotate": lambda self, x, p: (setattr(self, f"raw{x.shape[1]}", x), Port.rotate(
        self, x, p))[1], "scores": lambda self, q, k, mask: Port.scores(self, q, self.raw2, mask)},
     "keys are used without their rotation", "scores", {}),
    (masked(lambda self, i, j, W: (j <= i) & (i - j < W + 1)), "the window is off by one: 6 keys",
     "scores", {}),
    (masked(lambda self, i, j, W: (j <= i) & (i - j < W - 1)), "the window is off by one: 4 keys",
     "scores", {}),
    (masked(lambda self, i, j, W: j <= i), "there is no window", "scores", {}),
    (masked(lambda self, i, j, W: i - j < W), "queries see later tokens: the window applies",
     "scores", {}),
    (masked(lambda self, i, j, W: j > -1), "there is no mask", "scores", {}),
    (masked(lambda self, i, j, W: (j <= i + 1) & (i - j < W)), "the causal mask is off by one",
     "scores", {}),
    (masked(lambda self, i, j, W: (j < i) & (i - j < W)), "a query does not see its own key",
     "scores", {}),
    (masked(no_earlier_calls), "a call does not see the keys of earlier calls, of 4 tokens",
     "mixed", {"chunk": 4}),
    (masked(lambda self, i, j, W: i - j < W), "queries see later tokens of the same call, of 4",
     "mixed", {"chunk": 4}),
    (masked(lambda self, i, j, W: (j <= i) & (i - j < W) | (j >= self.start) & (self.start > 0)),
     "calls after the first, of 4 tokens, have no causal mask inside", "mixed", {"chunk": 4}),
    (masked(first_query_mask), "all queries of a call, of 4 tokens, use the mask of its first one",
     "mixed", {"chunk": 4}),
    ({}, "the rolling buffer is too small: calls of 4 tokens with 5 slots", "mixed",
     {"chunk": 4, "buffer": 5}),
    ({"mask": slot_mask}, "slots are read as positions by the mask, with calls of 4 tokens and 8",
     "mixed", {"chunk": 4}),
    ({"hide": lambda self, s, mask: torch.where(mask, s, -9.0)}, "masked scores are -9, which",
     "scores", {}),
    ({"hide": lambda self, s, mask: s - 9.0 * ~mask}, "the mask adds -9, which", "scores", {}),
    ({"hide": lambda self, s, mask: torch.where(mask, 30 * torch.tanh(s / 30), -math.inf)},
     "scores are capped as 30.0·tanh", "scores", {}),
    (softmaxed(lambda s: torch.exp(s) / (1 + torch.exp(s).sum(-1, True))),
     "the softmax has one more term e⁰", "probabilities", {}),
    (softmaxed(lambda s: torch.softmax(s, -2)), "the softmax runs over the queries",
     "probabilities", {}),
    (softmaxed(lambda s: torch.exp2(s) / torch.exp2(s).sum(-1, True)),
     "the exponential has base 2", "probabilities", {}),
    ({"hide": keep_everything, "softmax": late_mask}, "the mask is applied after the softmax",
     "probabilities", {}),
    (softmaxed(lambda s: torch.exp(s - s.amax(-1, True))),
     "the exponentials are not divided by their sum", "probabilities", {}),
    ({"values": lambda self, v, k: k}, "keys take the place of values", "mixed", {}),
    ({"values": lambda self, v, k: self.rotate(v, torch.arange(len(v)))},
     "values are rotated like keys", "mixed", {}),
    ({"add_attention": lambda self, x, y, normed: y}, "the residual stream is not added",
     "residual", {}),
    ({"add_mixture": lambda self, h, y, normed, x: h}, "the output of the sublayer is not added",
     "layers.0", {}),
    ({"add_attention": lambda self, x, y, normed: normed + y},
     "the output is added to the normed stream", "residual", {}),
    ({"add_attention": lambda self, x, y, normed: x + y + y},
     "the output of the sublayer is added twice", "residual", {}),
    ({"add_mixture": lambda self, h, y, normed, x: h + h + y},
     "the residual stream is added twice", "layers.0", {}),
    ({"add_mixture": lambda self, h, y, normed, x: x + y},
     "the residual stream from before the attention is added", "layers.0", {}),
    ({"gate": lambda self, x, h, name: torch.softmax(self.linear(x, name), -1)},
     "the logits are replaced by their softmax", "gate", {}),
    ({"choose": lambda self, logits: logits.argsort(-1)[:, :2]},
     "the experts with the smallest logits are chosen", "chosen", {}),
    ({"choose": lambda self, logits: logits.argsort(-1, descending=True)[:, :3]},
     "3 experts per token are chosen", "chosen", {}),
    (weighed(lambda raw, logits, chosen: torch.softmax(raw, -1).gather(
        1, chosen.argsort(1).argsort(1))), "the outputs in order of the experts are combined with "
     "weights in order of rank", "weights", THREE),
    (weighed(lambda raw, logits, chosen: torch.softmax(logits, -1).gather(1, chosen)),
     "renormalisation is missing", "weights", {}),
    (weighed(lambda raw, *_: raw), "logits are used without a softmax", "weights", {}),
    (weighed(lambda raw, *_: torch.full_like(raw, 0.5)), "all weights are 1/A", "weights", {}),
    (weighed(lambda raw, *_: torch.sigmoid(raw)), "a sigmoid takes the place of the softmax",
     "weights", {}),
    (weighed(lambda raw, *_: torch.sigmoid(raw) / torch.sigmoid(raw).sum(-1, True)),
     "a normalised sigmoid", "weights", {}),
    (weighed(lambda raw, *_: torch.softmax(torch.softmax(raw, -1), -1)),
     "the softmax is taken twice", "weights", {}),
    (weighed(lambda raw, *_: raw / raw.sum(-1, True)), "logits are divided by their sum",
     "weights", {}),
    (weighed(lambda raw, *_: torch.softmax(raw, -1).flip(1)),
     "the weights of the experts are in reverse order", "weights", {}),
    ({"linear": lambda self, x, name: Port.linear(self, x, name.replace("w1", "?").replace(
        "w3", "w1").replace("?", "w3"))}, "w1 and w3 are exchanged", "w1", {}),
    ({"expert_input": lambda self, x, weight: x * weight} | UNWEIGHTED,
     "the routing weight multiplies the input of the expert instead", "w1", {}),
    ({"expert_input": lambda self, x, weight: x * weight},
     "the routing weight multiplies the input of the expert and also", "w1", {}),
    (next_expert(1), "the weights of expert e +1 are used", "w1", {}),
    (active(lambda g, u: F.silu(u) * g), "silu is applied to w3·x", "hidden", {}),
    (active(lambda g, u: g * u), "silu is missing", "hidden", {}),
    (active(lambda g, u: F.gelu(g) * u), "gelu takes the place of silu", "hidden", {}),
    (active(lambda g, u: F.gelu(g, approximate="tanh") * u), "gelu with tanh", "hidden", {}),
    (active(lambda g, u: g * torch.sigmoid(1.702 * g) * u), "x·sigmoid(1.702·x)", "hidden", {}),
    (active(lambda g, u: g.clamp(min=0) * u), "relu takes the place", "hidden", {}),
    (active(lambda g, u: g.clamp(min=0) ** 2 * u), "relu² takes the place", "hidden", {}),
    (active(lambda g, u: torch.sigmoid(g) * u), "a sigmoid takes the place of silu", "hidden", {}),
    (active(lambda g, u: F.silu(g)), "the product with w3·x is missing", "hidden", {}),
    (active(lambda g, u: F.silu(g) * (u + 1)), "w3·x + 1 takes the place", "hidden", {}),
    (active(lambda g, u: F.silu(g * u)), "silu is applied to the product", "hidden", {}),
    ({"hidden": lambda self, g, u, weight: F.silu(g) * u * weight} | UNWEIGHTED,
     "the routing weight is inside `hidden` instead", "hidden", {}),
    ({"hidden": lambda self, g, u, weight: F.silu(g) * u * weight},
     "the routing weight is inside `hidden` and also", "hidden", {}),
    ({"down": lambda self, hidden, weight, name: self.linear(hidden * weight, name)} | UNWEIGHTED,
     "the routing weight is applied before w2", "w2", {}),
    (UNWEIGHTED, "the outputs of the experts are added without weights", "moe", {}),
    ({"choose": keep_logits, "share": over_all}, "the weights of a softmax over all experts",
     "moe", {}),
    (shared(lambda weights, chosen, row, n, a: float(a == 0)), "only the first expert is used",
     "moe", {}),
    (shared(lambda weights, chosen, row, n, a: weights[n, a] * (a == 0)),
     "only the first expert is used, with its weight", "moe", {}),
    (shared(lambda weights, chosen, row, n, a: weights[n, a] ** 2), "the weights are applied twice",
     "moe", {}),
    (shared(lambda weights, chosen, row, n, a: weights[n, 1 - a]),
     "the outputs are combined with the weights in reverse order", "moe", {}),
    (shared(lambda weights, chosen, row, n, a: weights[n, int((chosen[n] < chosen[n, a]).sum())]),
     "the outputs in order of the experts are combined with weights in order of rank", "moe",
     THREE),
    (shared(lambda weights, chosen, row, n, a: weights[row, a]),
     "row r of an expert is combined with the weight of token r", "moe", {}),
    ({"accumulate": wrong_row}, "the rows of an expert are added to tokens 0, 1, 2", "moe", {}),
    ({"accumulate": overwrite}, "the output of an expert overwrites", "moe", {}),
    (limited(3), "an expert takes no more than 3 tokens, the first ones", "moe", {}),
    (limited(4, by_rank=True), "an expert takes no more than 4 tokens, first choices first", "moe",
     {}),
    ({"finish": every_expert}, "all experts are used", "moe", {}),
    ({"logits": lambda self, x: torch.softmax(Port.logits(self, x), -1)},
     "the logits are replaced by their softmax", "lm_head", {}),
    ({"logits": lambda self, x: torch.log_softmax(Port.logits(self, x), -1)},
     "the logits are replaced by their log-softmax", "lm_head", {}),
    ({"logits": lambda self, x: 30 * torch.tanh(Port.logits(self, x) / 30)},
     "the logits are capped as 30.0·tanh", "lm_head", {})]
NOT_SEEDED = {  # these do not change a number that is not an error itself
    "of equal logits, the expert with the higher index is chosen",
    "the ids of experts are counted from 1"}


@pytest.fixture(scope="session")
def golden_trace(tmp_path_factory):
    """A function that writes our trace for some changes of CONFIG; each is made once."""
    directory, made = tmp_path_factory.mktemp("golden"), {}

    def write(config=None, first_position=0, **_):
        key = json.dumps([config, first_position])
        if key not in made:
            made[key] = directory / f"{len(made)}.safetensors"
            case = golden.Case("", CONFIG | (config or {}), [14], first_position=first_position)
            made[key].write_bytes(golden.golden(case, "seeds"))
        return made[key]
    return write


def port(path, dtype, wrong, chunk=0, buffer=None, **_):
    """The tensors of a port with an error."""
    trace, _ = pair.read_trace(path, None, 0)
    made = Port(trace, dtype, chunk, buffer)
    for name, function in wrong.items():
        setattr(made, name, MethodType(function, made))
    return made.run()


def verdict(ours, tensors, tmp_path, capsys, *options):
    """The exit code and the text of compare.py."""
    write_safetensors(tmp_path / "theirs", tensors)
    code = compare.main([str(ours), str(tmp_path / "theirs"), *options])
    out, error = capsys.readouterr()
    return code, out + error


def causes_in(text):
    """The causes in a verdict: the first, and the ones that give the same numbers."""
    [first] = re.findall(r"Cause: (.*?)\. With it", text) or [""]
    others = re.findall(r"would follow if (.*)\.", text)
    return first, others[0].split("; or if ") if others else []


PLACES = {"moe": "block_sparse_moe", "layers.0": "model.layers.0"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("seed", SEEDS, ids=[seed[1][:40] for seed in SEEDS])
def test_a_seeded_error_is_named_from_a_full_trace(seed, dtype, golden_trace, tmp_path, capsys):
    wrong, cause, place, options = seed
    ours = golden_trace(**options)
    code, text = verdict(ours, port(ours, dtype, wrong, **options), tmp_path, capsys,
                         "--chunk", str(options.get("chunk", 0)))
    first, others = causes_in(text)
    named = re.search(r"first tensor that differs is (.*)\.\n", text)
    assert code == 1 and named and named[1].endswith(PLACES.get(place, place)), text
    assert first.startswith(cause) or dtype == torch.float32 and any(
        other.startswith(cause) for other in others), text
    assert "another error" not in text and ", in weights only" not in text


def test_every_cause_is_seeded():
    wanted = {cause.text.partition("{")[0] for cause in CAUSES} - NOT_SEEDED
    assert [text for text in sorted(wanted) if not any(
        text.startswith(seed[1]) or seed[1].startswith(text) for seed in SEEDS)] == []


@pytest.mark.parametrize("case", ["plain", "window", "ragged"])
def test_the_steps_without_an_error_are_the_second_implementation(case):
    trace, order = pair.read_trace(golden.HERE / f"{case}.safetensors", None, 0)
    run = Run(trace._replace(tensors={"tokens": trace.tensors["tokens"]}))
    for name in order[1:]:
        if word(name) in STEPS:
            ours, wanted = run.reach(name), trace.tensors[name]
            if axes(name)[0] == "N":
                real = trace.tensors[name.rpartition(".")[0] + ".chosen"][:, 0] >= 0
                ours, wanted = ours[real], wanted[real]
            if "S" in axes(name):
                assert "B" in axes(name)
                at = axes(name).index("S")
                pairs = [(x[:length] for x in (a.movedim(at - 1, 0), b.movedim(at - 1, 0)))
                         for a, b, length in zip(ours, wanted, trace.lengths, strict=True)]
            else:
                pairs = [(ours, wanted)]
            for a, b in pairs:
                a, b = (x.double().nan_to_num() for x in (a, b))
                assert torch.allclose(a, b, rtol=1e-12, atol=1e-13), name


def is_layer(name):
    return name == "tokens" or word(name) == "layer"


@pytest.mark.parametrize("kept, seeds", [
    (is_layer, SEEDS[::13]), (lambda name: name in ("tokens", "lm_head"), SEEDS[5::26])],
    ids=["layers", "logits"])
def test_most_errors_are_named_from_coarse_traces(kept, seeds, golden_trace, tmp_path, capsys):
    """From the outputs of layers only or the logits only. Some seeds are enough."""
    named = []
    for wrong, cause, place, options in seeds:
        ours = golden_trace(**options)
        tensors = {n: x for n, x in port(ours, torch.float64, wrong, **options).items() if kept(n)}
        code, text = verdict(ours, tensors, tmp_path, capsys, "--chunk",
                             str(options.get("chunk", 0)))
        first, others = causes_in(text)
        named.append(any(found.startswith(cause) for found in [first, *others]))
        assert named[-1] or "Cause: not found" in text or code == 0, (place, text)
    assert sum(named) >= 0.75 * len(named), named


def test_without_weights_a_coarse_trace_bounds_the_place_and_says_what_to_do(
        golden_trace, tmp_path, capsys):
    ours, weightless = golden_trace(), tmp_path / "ours"
    metadata, tensors = pair.read_file(ours)
    weights = {n: tensors.pop(n) for n in list(tensors) if n.endswith(".weight")}
    write_safetensors(weightless, tensors, metadata)
    theirs = port(ours, torch.float64, {"score": lambda self, q, k: q @ k.T})
    coarse = {n: x for n, x in theirs.items() if is_layer(n) or "embed" in n}
    code, text = verdict(weightless, coarse, tmp_path, capsys)
    assert code == 1 and "model.embed_tokens, the tensor before it in the trace, is equal." in text
    assert "The error is made between the two. Not traced there: model.layers.0.input_lay" in text
    assert re.search(r"could not be tested without the weights: \d\d\. Give .* --model", text)
    [wanted] = re.findall(r"Trace (.*) next", text)
    code, text = verdict(weightless, coarse | {wanted: theirs[wanted]}, tmp_path, capsys)
    assert causes_in(text)[0] == "scores are not divided by √d"
    model = tmp_path / "model"
    model.mkdir()
    write_safetensors(model / "model.safetensors", weights)
    code, text = verdict(weightless, coarse, tmp_path, capsys, "--model", str(model))
    assert causes_in(text)[0] == "scores are not divided by √d"


def perturbed(tensors, draw):
    """Moves some elements, a row or a feature of a tensor by 10 to 10⁶ units in the last place."""
    name = draw.choice([name for name, x in tensors.items()
                        if x.is_floating_point() and not name.endswith("margin")])
    x = tensors[name].clone()
    bits = x.view({8: torch.int64, 4: torch.int32}[x.itemsize])
    touched, place = torch.zeros(x.shape, dtype=torch.bool), [draw.randrange(n) for n in x.shape]
    kind = draw.choice(["element", "row", "feature", "third", "all"])
    if kind == "third":
        touched = torch.rand(x.shape) < 0.3
    else:
        touched[{"element": tuple(place), "row": tuple(place[:-1]), "feature": (..., place[-1]),
                 "all": ...}[kind]] = True
    ulps = 10 ** draw.uniform(1, 6) * (torch.randint(0, 2, x.shape) * 2 - 1)
    ulps = ulps * torch.rand(x.shape) if draw.random() < 0.5 else ulps
    bits += (ulps * (touched & x.isfinite())).to(bits.dtype)
    return tensors | {name: x}, name


def test_no_cause_is_named_for_random_perturbations_of_a_correct_trace(tmp_path, capsys):
    files = {path: pair.read_file(path)[1] for path in sorted(golden.HERE.glob("*.safetensors"))}
    for seed in range(200):
        torch.manual_seed(seed)
        draw = random.Random(seed)
        ours, dtype = draw.choice([*files]), draw.choice([torch.float64, torch.float32])
        tensors = {name: x.to(dtype) if x.is_floating_point() else x
                   for name, x in files[ours].items() if ".weight" not in name[-7:]}
        tensors, name = perturbed(tensors, draw)
        layer = pair.layer_of(name)
        tensors = {n: x for n, x in tensors.items() if layer is None or n == "tokens" or (
            pair.layer_of(n) == layer or word(n) in ("layer", "embed_tokens"))}  # to save time
        code, text = verdict(ours, tensors, tmp_path, capsys)
        if code == 1:
            assert f"The first tensor that differs is {name}.\n" in text, (seed, text)
            assert "Cause: not found" in text or "The error drifts" in text, (seed, text)
        else:
            assert code == 0, (seed, text)


@pytest.mark.parametrize("name, factor, spread, named", [
    ("lm_head", 0.5, 0.0, True), ("lm_head", 0.5, 1e-6, False),
    ("model.layers.0.self_attn.mixed", 0.7, 0.04, False),
    ("model.layers.0.block_sparse_moe", -1.0, 0.0, True)])
def test_a_factor_is_named_only_if_it_makes_the_tensors_equal(
        name, factor, spread, named, golden_trace, tmp_path, capsys):
    ours = golden_trace()
    tensors = port(ours, torch.float64, {})
    torch.manual_seed(0)
    x = tensors[name]
    tensors[name] = x * factor * (1 + spread * torch.randn_like(x))
    text = verdict(ours, tensors, tmp_path, capsys)[1]
    assert (f"Cause: it is multiplied by {factor:g}. " in text) is named, text
    assert ("Cause: not found" in text) is not named


@pytest.mark.parametrize("wrong, cause", [
    ({"mask": lambda self, i, j: (j[None] <= i[:, None]) & (i[:, None] - j[None] < 6)},
     "the window is off by one"),
    (turned(lambda self, a: 2 * a), "heads are rotated twice"),
    ({"hidden": lambda self, g, u, weight: F.gelu(g) * u}, "gelu takes the place of silu"),
    (weighed(lambda raw, *_: torch.softmax(torch.softmax(raw, -1), -1)), "the softmax is taken")])
def test_a_cause_that_only_nearly_fits_is_not_named(
        wrong, cause, golden_trace, tmp_path, capsys):
    """With another error of one part in a thousand in the same tensor."""
    ours = golden_trace()
    tensors = port(ours, torch.float64, wrong)
    code, text = verdict(ours, tensors, tmp_path, capsys)
    name = re.search(r"differs is (.*)\.\n", text)[1]
    assert causes_in(text)[0].startswith(cause)
    x = tensors[name]
    tensors[name] = torch.where(x.isfinite(), x * (1 + 1e-3 * torch.rand_like(x)), x)
    assert "Cause: not found" in verdict(ours, tensors, tmp_path, capsys)[1]


@pytest.mark.parametrize("wrong, equal", [
    ({"hidden": lambda self, g, u, weight: F.silu(g) * u * weight} | UNWEIGHTED, True),
    ({"down": lambda self, hidden, weight, name: self.linear(hidden * weight, name)} | UNWEIGHTED,
     True),
    ({"hidden": lambda self, g, u, weight: F.silu(g) * u * weight}, False),
    ({"hidden": lambda self, g, u, weight: F.silu(g) * u * weight, "accumulate": overwrite}
     | UNWEIGHTED, False)])
def test_it_says_when_a_misplaced_routing_weight_leaves_the_mixture_equal(
        wrong, equal, golden_trace, tmp_path, capsys):
    ours = golden_trace()
    text = verdict(ours, port(ours, torch.float32, wrong), tmp_path, capsys)[1]
    assert "Cause: the routing weight is " in text
    assert ("mixture is equal nevertheless, because w2 is linear" in text) is equal


def test_a_second_error_in_the_same_layer_is_reported(golden_trace, tmp_path, capsys):
    ours = golden_trace()
    wrong = {"score": lambda self, q, k: q @ k.T, **active(lambda g, u: F.gelu(g) * u)}
    text = verdict(ours, port(ours, torch.float64, wrong), tmp_path, capsys)[1]
    assert causes_in(text)[0] == "scores are not divided by √d"
    assert re.search(r"It does not explain .*hidden, so there is another error", text), text


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min, -math.inf])
def test_a_mask_that_the_softmax_turns_into_zero_is_no_error(fill, golden_trace, tmp_path, capsys):
    ours = golden_trace()
    wrong = {"hide": lambda self, scores, mask: torch.where(mask, scores, fill)}
    assert verdict(ours, port(ours, torch.float32, wrong), tmp_path, capsys)[0] == 0


def test_a_port_that_hides_padded_keys_but_has_no_causal_mask_is_named(tmp_path, capsys):
    ours, name = golden.HERE / "ragged.safetensors", "model.layers.0.self_attn.scores"
    known = pair.read_trace(ours, None, 0)[0]
    tensors = {n: x for n, x in known.tensors.items() if ".0.self_attn" in n and "prob" not in n}
    i, j, q, k = torch.arange(9)[:, None], torch.arange(9), *(
        tensors[name.replace("scores", f"{letter}_rotated")] for letter in "qk")
    scores = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(
        q.shape[2] // k.shape[2], 2)) / math.sqrt(q.shape[3])
    real = j < torch.tensor([9, 4, 1]).view(3, 1, 1, 1)
    tensors[name] = scores.where((i - j < 3) & real, -math.inf)
    text = verdict(ours, tensors, tmp_path, capsys)[1]
    assert causes_in(text)[0].startswith("queries see later tokens: the window applies")


def test_padding_has_no_experts_in_any_cause():
    known, order = pair.read_trace(golden.HERE / "ragged.safetensors", None, 0)
    name, padding = "model.layers.0.block_sparse_moe.chosen", torch.arange(9) >= torch.tensor(
        [[9], [4], [1]])
    for cause in [cause for cause in CAUSES if cause.words == "chosen"]:
        chosen = Run(known, cause, 1 if cause.values else None, ("chosen",))[name]
        assert (chosen[padding.flatten()] == -1).all() and chosen.max() < 8


def test_an_error_that_begins_with_a_call_points_to_the_cache(golden_trace, tmp_path, capsys):
    ours = golden_trace()
    tensors = port(ours, torch.float32, {}, chunk=4)
    tensors["model.layers.0.self_attn.mixed"][8:] += 1.0
    text = verdict(ours, tensors, tmp_path, capsys, "--chunk", "4")[1]
    assert "Token 8 is the first of a call of 4 tokens, which points to the cache." in text
    assert "cache" not in verdict(ours, tensors, tmp_path, capsys, "--chunk", "5")[1]


def test_a_port_that_prefers_the_higher_index_is_named_if_its_own_logits_are_equal(
        tmp_path, capsys):
    ours = golden.HERE / "tied.safetensors"
    wrong = {"choose": lambda self, logits: torch.stack([torch.tensor(sorted(
        range(len(row)), key=lambda e: (-row[e], -e))[:2]) for row in logits])}
    tensors = port(ours, torch.float64, wrong)
    coarse = {n: x for n, x in tensors.items() if is_layer(n)}
    for found in (tensors, coarse):
        code, text = verdict(ours, found, tmp_path, capsys)
        assert code == 1 and causes_in(text)[0] == (
            "of equal logits, the expert with the higher index is chosen")
    for name in list(tensors):
        if name.endswith("gate"):
            tensors[name] = tensors[name] * (1 + 1e-15 * torch.arange(8).double())  # other sums
    code, text = verdict(ours, tensors, tmp_path, capsys)
    assert code == 0 and "the logits are equal, and here the lower index is chosen" in text


def test_experts_counted_from_1_are_named(golden_trace, tmp_path, capsys):
    ours = golden_trace()
    tensors = port(ours, torch.float64, {})
    tensors["model.layers.0.block_sparse_moe.chosen"] += 1
    assert causes_in(verdict(ours, tensors, tmp_path, capsys)[1])[0] == (
        "the ids of experts are counted from 1")
