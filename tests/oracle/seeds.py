"""Errors of ports for the tests: what is replaced in mixtral.py, and the cause to be named.

SEEDS has for each error the replaced functions (see port.py), the beginning of the cause, the end
of the name of the first tensor that differs, the golden file, and other weights.
"""

import math
import re

import torch
from causes import READ
from port import now
from torch.nn import functional as F

import mixtral
from mixtral import Attention, Cache, RMSNorm, at_least_float32

ROTATION, ROTATE, ROUTE, VISIBLE, UPDATE = (
    mixtral.rotation, mixtral.rotate, mixtral.route, mixtral.visible, Cache.update)


# ------------------------------------------------------------------ how errors are made


def norm(combine):
    """RMSNorm from its input, the mean square, ε and the weight."""
    return {"RMSNorm.forward": lambda self, x: combine(
        x, x.square().mean(-1, keepdim=True), self.eps, self.weight)}


def turned(change=lambda a: a, take=None, put=None):
    """Other angles, or other pairs."""
    def rotate(x, cos, sin):
        angle = change(torch.atan2(sin, cos).double())
        a, b = take(x.double()) if take else x.double().chunk(2, -1)
        pair = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return (put(*pair) if put else torch.cat(pair, -1)).to(x.dtype)
    return {"rotate": rotate}


def even_odd(x):
    return x[..., 0::2], x[..., 1::2]


def interleaved(a, b):
    return torch.stack((a, b), -1).flatten(-2)


def placed(change):
    """Other positions, of queries and keys."""
    return {"rotation": lambda positions, d, theta: ROTATION(change(positions), d, theta)}


def one_side(heads, change):
    """Other positions for the tensor with that many heads, queries or keys, only."""
    def rotation(positions, d, theta):
        now.turns = ROTATION(change(positions), d, theta)
        return ROTATION(positions, d, theta)

    def rotate(x, cos, sin):
        turns = now.turns if x.shape[2] == heads else (cos, sin)
        return ROTATE(x, *(part.to(cos.dtype) for part in turns))
    return {"rotation": rotation, "rotate": rotate}


def frequencies(change):
    """The angles from the positions (B, S, 1, 1), i (d/2), d and θ."""
    def rotation(positions, d, theta):
        angle = change(positions[:, :, None, None], torch.arange(d // 2).double(), d, theta)
        return angle.double().cos(), angle.double().sin()
    return {"rotation": rotation}


def seen(mask):
    """The mask from the positions i of queries (B, S, 1) and j of keys (B, 1, T), and the window.
    """
    return {"visible": lambda queries, keys, window: (keys >= 0)[:, None] & mask(
        queries[:, :, None], keys[:, None], window)}


def start():
    """The first position of the call in each row, (B, 1, 1)."""
    return now.start[:, None, None]


def slots(queries, keys, window):
    j = torch.arange(keys.shape[1]).expand_as(keys).where(keys >= 0, 10 ** 6)
    return VISIBLE(queries, j, window)


def rotated_again(self, layer, k, v):
    """In place of Cache.update: each call rotates the keys of earlier calls once more."""
    row, _, slot = self.target
    old = self.positions.clone()
    old[row, slot] = 0
    angle = old.clamp(min=0)[..., None, None] * 1e6 ** (
        -torch.arange(0, k.shape[-1], 2).double() / k.shape[-1])
    self.keys[layer] = ROTATE(self.keys[layer], angle.cos(), angle.sin())
    return UPDATE(self, layer, k, v)


def project(change):
    """Attention.forward with a change of the input of its projections, or of their outputs."""
    forward = Attention.forward
    return {"Attention.forward": lambda self, x, *rest: forward(self, change(x), *rest)}


def routed(weigh):
    """Weights of the chosen experts from (their logits, all logits, the choice)."""
    def route(logits, top_k):
        _, chosen = ROUTE(logits, top_k)
        return weigh(logits.gather(1, chosen), logits, chosen), chosen
    return {"route": route}


def chosen(choose):
    """Other experts, from the logits and their number."""
    def route(logits, top_k):
        found = choose(logits, top_k)
        return logits.gather(1, found).softmax(-1), found
    return {"route": route}


def best(logits, count):
    return logits.argsort(dim=-1, descending=True, stable=True)[:, :count]


def active(hidden):
    """Another function of g = w1·x and u = w3·x."""
    return {"Expert.forward": lambda self, x: self.w2(hidden(self.w1(x), self.w3(x)))}


def mixture(share=None, put=torch.Tensor.index_add_, target=None, origin=None):
    """SparseMoE with other weights, another addition, or other rows."""
    def forward(self, x):
        tokens = x.flatten(0, 1)
        logits = self.gate(tokens)
        weights, chosen = mixtral.route(logits, self.top_k)
        weights = share(weights, chosen, logits) if share else weights
        y = torch.zeros_like(at_least_float32(tokens))
        for e in sorted(set(chosen.flatten().tolist())):
            token, rank = torch.where(chosen == e)
            first = torch.arange(len(token))
            own = weights[first if origin else token, rank, None]
            put(y, 0, first if target else token, own * self.experts[e](tokens[token]))
        return y.to(x.dtype).view(x.shape)
    return {"SparseMoE.forward": forward}


def block(add_attention=torch.add, add_mixture=torch.add):
    """Block with other sums, of (stream, output, normed stream, input of the layer)."""
    def forward(self, x, *rest):
        normed = self.input_layernorm(x)
        h = add_attention(x, self.self_attn(normed, *rest), *([normed] * (
            add_attention is not torch.add)))
        normed = self.post_attention_layernorm(h)
        y = self.block_sparse_moe(normed)
        return h + y if add_mixture is torch.add else add_mixture(h, y, normed, x)
    return {"Block.forward": forward}


# Weights under other names, as functions of all weights.


def swapped(a, b):
    return lambda weights: {name.replace(x, y): weights[name] for x, y in ((a, b), (b, a))
                            for name in weights if x in name}


def exchanged_sides(part):
    """The buffers of weights read with inputs and outputs exchanged."""
    return lambda weights: {name: w.reshape(w.shape[::-1]).T.contiguous()
                            for name, w in weights.items() if part in name}


def rows_of_heads(shape):
    return lambda weights: {name: w.unflatten(0, (-1, *shape)).transpose(1, 2).reshape(w.shape)
                            for name, w in weights.items() if "q_proj" in name or "k_proj" in name}


def scaled(part, factor):
    return lambda weights: {n: w * factor for n, w in weights.items() if part in n}


def copied(target, source):
    return lambda weights: {target + ".weight": weights[source + ".weight"]}


AT = "model.layers.0.block_sparse_moe.experts."
OTHER, LEFT = READ + "the weight is model.", (None, None, True)
SEEDS = [
    # Embeddings and norms.
    ({}, "it is multiplied by 4, which is √D", "embed_tokens", "plain", scaled("embed_tokens", 4)),
    ({}, READ + "the token ids are 7 instead of 6 at token 0", "embed_tokens", "plain",
     lambda w: {"model.embed_tokens.weight": w["model.embed_tokens.weight"].roll(-1, 0)}),
    (norm(lambda x, m, eps, w: x / (m + eps).sqrt() * (1 + w)), "the norm multiplies by 1 + weight",
     "input_layernorm", "plain"),
    ({"RMSNorm.forward": lambda self, x, forward=RMSNorm.forward: forward(
        self, x - x.mean(-1, keepdim=True))}, "the mean is subtracted", "input_layernorm", "plain"),
    (norm(lambda x, m, eps, w: x / ((m + eps) * 16).sqrt() * w),
     "it is multiplied by 0.25, which is 1/√D", "input_layernorm", "plain"),
    (norm(lambda x, m, eps, w: x / (m.sqrt() + eps) * w), "ε is added after the root",
     "input_layernorm", "three_experts"),
    (norm(lambda x, m, eps, w: x / (m + 0.0237).sqrt() * w), "rms_norm_eps is 0.0237",
     "input_layernorm", "three_experts"),
    ({}, OTHER + "layers.0.post_attention_layernorm", "input_layernorm", "plain",
     swapped("input_layernorm", "post_attention_layernorm")),
    ({}, OTHER + "norm", "layers.1.input_layernorm", "plain",
     copied("model.layers.1.input_layernorm", "model.norm")),
    # Projections.
    ({}, "the rows of each head are in Mistral's order", "q_proj", "far", rows_of_heads((2, 16))),
    ({}, OTHER + "layers.0.self_attn.v_proj", "k_proj", "plain", swapped("k_proj", "v_proj")),
    ({}, "the buffers of weights are read with inputs and outputs exchanged", "q_proj", "serving",
     exchanged_sides("q_proj")),
    ({}, "the buffers of weights are read with inputs and outputs exchanged", "w1", "plain",
     exchanged_sides(".w1")),
    ({}, OTHER + "layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj", "plain",
     copied("model.layers.1.self_attn.o_proj", "model.layers.0.self_attn.o_proj")),
    (project(lambda x: x * 1.5), "it is multiplied by 1.5", "q_proj", "plain"),
    ({}, OTHER + "embed_tokens", "lm_head", "plain",
     copied("lm_head", "model.embed_tokens")),
    ({}, OTHER + AT[6:] + "7.w3", "experts.2.w1", "plain",
     copied(AT + "2.w1", AT + "7.w3")),
    ({}, OTHER + AT[6:] + "7.w2", "experts.0.w2", "plain", lambda w: {n: w[re.sub(
         r"experts\.(\d)", lambda m: f"experts.{7 - int(m[1])}", n)] for n in w if ".w2" in n}),
    # Rotation.
    (turned(take=even_odd, put=interleaved),
     "neighbours (2i, 2i + 1) are rotated as pairs instead", "q_rotated", "plain"),
    (turned(lambda a: -a), "angles are multiplied by -1", "q_rotated", "plain"),
    (turned(lambda a: 2 * a), "angles are multiplied by 2", "q_rotated", "plain"),
    (placed(lambda p: p.flip(1)), READ + "positions are 13 instead of 0 at token 0",
     "q_rotated", "plain"),
    (placed(lambda p: p - now.start[:, None]), "positions restart with each call", "q_rotated",
     "chunked"),
    (placed(lambda p: p * 0 + now.start[:, None]), "all tokens of a call get the position of its",
     "q_rotated", "chunked"),
    (placed(lambda p: p % 8), "slots are used as positions: p mod 8", "q_rotated", "chunked"),
    (placed(lambda p: p + (now.call > 0)), "positions are shifted by +1 after the first call",
     "q_rotated", "serving"),
    (one_side(2, lambda p: p + (now.call > 0)), "positions are shifted by +1 after the first call",
     "k_rotated", "serving"),
    (placed(lambda p: p + (now.lengths.cumsum(0) - now.lengths)[:, None]),
     "rows continue the positions of the row before", "q_rotated", "ragged"),
    (placed(lambda p: p + (now.lengths.cumsum(0) - now.lengths)[:, None] * (now.call > 0)),
     READ + "positions are ", "q_rotated", "serving"),
    (frequencies(lambda p, i, d, theta: p / 3210 ** (2 * i / d)), "rope_theta is 3210", "q_rotated",
     "plain"),
    (frequencies(lambda p, i, d, theta: p / theta ** (i / d)), "the exponent of the frequency is",
     "q_rotated", "plain"),
    (frequencies(lambda p, i, d, theta: p / theta ** ((2 * i + 1) / d)), "angles are multiplied by "
     "0.316228", "q_rotated", "window"),
    (frequencies(lambda p, i, d, theta: p * (1 + i) / 7.0), READ + "the frequencies "
     "of the pairs are 0.142857, 0.285714", "q_rotated", "window"),
    (frequencies(lambda p, i, d, theta: (p + 32750.0).float() / theta ** (2 * i / d).float()),
     "angles are computed in float32", "q_rotated", "far"),
    (frequencies(lambda p, i, d, theta: p / theta ** (2 * i / d)),
     "positions start at 0 instead", "q_rotated", "far"),
    # Scores, mask and softmax.
    ({"score": lambda q, k: q @ k.mT}, "it is multiplied by 2, which is", "scores", "plain"),
    ({"shared": lambda k, H: k.repeat(1, H // k.shape[1], 1, 1)},
     "query head h uses key/value head h mod K", "scores", "plain"),
    (seen(lambda i, j, W: (j <= i) & (i - j < W + 1)), "the window is off by one: 6 keys", "scores",
     "window"),
    (seen(lambda i, j, W: j <= i), "there is no window", "scores", "window"),
    (seen(lambda i, j, W: i - j < W), "queries see the keys of the window, and later tokens",
     "scores", "window"),
    (seen(lambda i, j, W: (j <= i) & (i - j < W) & ((i - j) % 4 != 2)),
     READ + "query 2 of row 0 sees the keys 1 to 2 instead of 0 to 2", "scores",
     "window"),
    (seen(lambda i, j, W: (j >= start()) & (j <= i) & (i - j < W)),
     "a call does not see the keys of earlier calls", "mixed", "chunked"),
    (seen(lambda i, j, W: i - j < W), "queries see later tokens of the same call", "mixed",
     "chunked"),
    (seen(lambda i, j, W: (j <= i) & (i - j < W) | (j >= start()) & (start() > 0)),
     "calls after the first have no causal mask inside", "mixed", "chunked"),
    (seen(lambda i, j, W: (j <= start()) & (start() - j < W) & (i > -1)),
     "all queries of a call use the mask of its first one", "mixed", "chunked"),
    ({}, "the rolling buffer is too small: 5 slots", "mixed", "chunked", None, 5),
    ({"visible": slots}, "slots are read as positions by the mask", "mixed", "serving"),
    (seen(lambda i, j, W: (j <= i) & (i - j < W + 1)), "the window is off by one", "mixed",
     "serving", None, 9),
    ({}, "positions are columns of rows padded on the left", "q_rotated", "ragged", *LEFT),
    ({}, READ + "positions are 14 instead of 13", "q_rotated", "serving", *LEFT),
    (placed(lambda p: (p - (9 - now.lengths)[:, None]).clamp(min=0)),
     READ + "the padding is not masked", "mixed", "ragged", *LEFT),
    ({"Cache.update": rotated_again}, "keys are rotated again by every later call", "mixed",
     "serving"),
    ({"hide": lambda s, mask: torch.where(mask, 30 * torch.tanh(s / 30), -math.inf)},
     "it is capped as 30·tanh", "scores", "plain"),
    ({"softmax": lambda s: s.exp() / (1 + s.exp().sum(-1, True))},
     "the softmax has one more term e⁰", "probabilities", "plain"),
    ({"softmax": lambda s: (s * math.log(2)).softmax(-1)}, "the exponential has base 2",
     "probabilities", "plain"),
    # Residual stream.
    (block(add_mixture=lambda h, y, normed, x: h + 2 * y), "it is 1·residual + 2·block_sparse_moe",
     "layers.0", "plain"),
    # Router and experts.
    (chosen(lambda logits, k: (-logits).argsort(-1, descending=True)[:, :k]),
     "the experts with the smallest logits are chosen", "chosen", "plain"),
    (chosen(lambda logits, k: best(logits, k + 1)[:, 1:]),
     READ + "the experts with the ranks 1, 2, from 0, are chosen", "chosen",
     "plain"),
    (routed(lambda raw, logits, c: logits.softmax(-1).gather(1, c)), "renormalisation is missing",
     "weights", "plain"),
    (routed(lambda raw, *_: F.normalize(raw.sigmoid(), p=1, dim=1)), "a normalised sigmoid takes",
     "weights", "plain"),
    (active(lambda g, u: F.silu(u) * g), "silu is applied to w3·x", "hidden", "plain"),
    (active(lambda g, u: F.gelu(g) * u), "gelu takes the place of silu", "hidden", "plain"),
    (active(lambda g, u: g * torch.sigmoid(1.702 * g) * u), "x·sigmoid(1.702·x)", "hidden",
     "plain"),
    (active(lambda g, u: F.silu(g * u)), "silu is applied to the product", "hidden", "plain"),
    # Sum over the experts.
    (mixture(lambda w, c, logits: torch.ones_like(w)), "the outputs of the experts are added witho",
     "block_sparse_moe", "plain"),
    (mixture(lambda w, c, logits: logits.softmax(-1).gather(1, c)),
     "renormalisation is missing", "block_sparse_moe", "plain"),
    (mixture(lambda w, c, logits: w.flip(1)), "the weights of the experts are in reverse",
     "block_sparse_moe", "plain"),
    (mixture(origin=True), "row r of an expert is combined with the weight of token r",
     "block_sparse_moe", "plain"),
    (mixture(target=True), "the rows of an expert are added to tokens 0, 1, 2", "block_sparse_moe",
     "plain"),
    (mixture(put=torch.Tensor.index_copy_), "the output of an expert overwrites",
     "block_sparse_moe", "plain"),
]
