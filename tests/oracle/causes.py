"""The errors of ports that compare.py recognises, in the table CAUSES at the end.

Each entry names the quantities in which the error is made, describes it, and has a function that
computes what a port with this error gives. The functions use the steps of steps.py.
"""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import torch
from steps import (
    HALVES,
    LINEAR,
    NEIGHBOURS,
    angles,
    choose,
    chosen_logits,
    expert_input,
    linear,
    mixed,
    mixture,
    norm,
    norm_input,
    positions,
    rotated,
    scores,
    turn,
    unit,
    unrotated,
    visible,
)
from torch import Tensor
from torch.nn import functional as F

NORMS = "input_layernorm post_attention_layernorm norm"
ROTATED, MOE = "q_rotated k_rotated", "block_sparse_moe"
LINEARITY = "The output of the mixture is equal nevertheless, because w2 is linear."


class Cause(NamedTuple):
    """An error: the quantities in which it is made, its description and what it computes instead.

    With `values`, a tuple or a function of a Place, the function takes one of them as its second
    argument, and the description names it. `also` holds what else the same error changes. `note` is
    printed if the output of the mixture is equal all the same.
    """

    words: str
    text: str
    function: Callable
    values: object = None
    also: dict = MappingProxyType({})
    note: str = ""

    def describe(self, value):
        values = value if isinstance(value, tuple) else (value,)
        return self.text.format(*(str(v)[6:] if isinstance(v, torch.dtype) else v for v in values))


# ------------------------------------------------------------------ values of causes


def chunks(p):
    """How many tokens the port may have read per call: powers of two, if it is not known."""
    return [p.run.trace.chunk] if p.run.trace.chunk else [
        2 ** n for n in range(p.S.bit_length()) if 2 ** n < p.S]


def calls(p, c):
    """The first token of the call of each query, and the first after it: (S, 1), (S, 1)."""
    start = torch.arange(p.S)[:, None] // c * c
    return start, (start + c).clamp(max=p.S)


def small_buffers(p):
    """Chunks and numbers of slots that are too small for them."""
    return [(c, C) for c in chunks(p) for C in range(max(c, p.W), p.W + c - 1)] if p.W else []


def buffers(p):
    """Chunks and numbers of slots, too small or just right."""
    return [(c, C) for c in chunks(p) for C in {p.W, p.W + c - 1} if C >= c] if p.W else []


def slots_as_positions(p, c, C):
    """The mask that takes the number of a slot for the position of its key."""
    i, j = torch.arange(p.S)[:, None], torch.arange(p.S)
    end = calls(p, c)[1]
    stored = (j >= end - C) & (j < end)
    return stored & (j % C <= i) & (j % C > i - p.W)


def other_thetas(p):
    """Usual values of rope_theta, √θ, and the one that turns the second pair of a token as theirs.

    The last needs a token whose angle in the second pair is below 1, such as the first ones.
    """
    theta, found = p.config["rope_theta"], {1e4, 1e5, 5e5, 1e6}
    if p.run.theirs is not None and p.S > 1 and p.d >= 4 and p.run.trace.first_position == 0:
        x = unrotated(p)
        mine, other = (torch.complex(*(part[0, 1, 0, 1] for part in y.chunk(2, -1)))
                       for y in (x, p.run.theirs.reshape(x.shape)))
        angle = (other / mine).angle().item()
        if 0 < angle < 1:
            found |= {float(f"{angle ** (-p.d / 2):.{digits}g}") for digits in (1, 2, 3, 6)}
    return [f"{other:g}" for other in sorted(found - {theta})]


def measured(p):
    """A table of cosines and sines from one head of theirs, if it has float32 precision."""
    x = unrotated(p)
    if p.run.theirs is None or x.shape[2] == 1:
        return []  # no other head could confirm it
    mine, other = (torch.complex(*y.chunk(2, -1)) for y in (x, p.run.theirs.reshape(x.shape)))
    head = mine.abs().argmax(2, keepdim=True)
    table, angle = other.gather(2, head) / mine.gather(2, head), angles(p)
    off = (table - torch.polar(torch.ones_like(angle), angle)).abs().nan_to_num()
    near = off <= 4 * torch.finfo(torch.float32).eps * (1 + angle.abs())
    return [(off.max().item(), table)] if near.all() else []


def single(p, how):
    """Angles of which every step is rounded to float32."""
    theta, x = torch.tensor(p.config["rope_theta"]).float(), torch.arange(0, p.d, 2).float() / p.d
    frequency = theta ** -x if how == "θ^−x" else 1 / theta ** x
    return (positions(p).float()[:, None, None] * frequency).double()


def other_epsilons(p):
    return [e for e in (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1e-2)
            if e != p.config["rms_norm_eps"]]


def masked_values(p):
    """The number that theirs has in place of −∞, if it is one number."""
    if p.run.theirs is None:
        return []
    masked = p.plain().isneginf() & p.run.theirs.isfinite()
    return [p.run.theirs[masked].median().item()] if masked.any() else []


def added_values(p):
    """The number that theirs adds to scores in place of −∞."""
    if p.run.theirs is None:
        return []
    masked = p.plain().isneginf() & p.run.theirs.isfinite()
    everything = scores(p, torch.ones(p.S, p.S, dtype=torch.bool), padding=True)
    return [(p.run.theirs - everything)[masked].median().item()] if masked.any() else []


def head_sizes(p):
    D, H = p.config["hidden_size"], p.config["num_attention_heads"]
    return sorted({D / H, D // H * 1.0} - {p.d, 0.0})


def other_counts(p):
    A = p.config["num_experts_per_tok"]
    return [n for n in sorted({1, 2, A - 1, A + 1} - {0, A}) if n <= p.config["num_local_experts"]]


def capacities(p):
    """Numbers of tokens per expert below the largest load."""
    return range(1, int(p["chosen"].flatten().clamp(min=0).bincount().max()))


def other_layers(p):
    return [n for n in range(p.config["num_hidden_layers"]) if n != p.layer]


# ------------------------------------------------------------------ the causes


def cut_rotation(p):
    """Only the first half of each head is rotated."""
    first, rest = unrotated(p).chunk(2, -1)
    if first.shape[-1] % 2:
        return p.plain()
    angle = angles(p, d=p.d // 2)
    return torch.cat((turn(first, angle.cos(), angle.sin()), rest), -1)


def joint_rotation(p):
    """The heads are rotated as one vector."""
    x = unrotated(p)
    angle = angles(p, d=x.shape[2] * p.d)[:, 0]
    return turn(x.flatten(2), angle.cos(), angle.sin()).view_as(x)


def wrong_sign(p):
    (a, b), angle = unrotated(p).chunk(2, -1), angles(p)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() - a * angle.sin()), -1)


def rounded_cos_sin(p, dtype):
    angle = angles(p)
    return turn(unrotated(p), angle.cos().to(dtype).double(), angle.sin().to(dtype).double())


def head_as_position(p):
    x = unrotated(p)
    return rotated(p, angles(p, torch.arange(x.shape[2]).double())[:, 0])


def permuted_rows(p, to_neighbours):
    """The features of each head in the other order of pairs."""
    shape = (p.d // 2, 2) if to_neighbours else (2, p.d // 2)
    return p.plain().unflatten(-1, (-1, *shape)).transpose(-1, -2).flatten(-3)


def exchanged(first, second):
    """A function for two quantities, which stay as they are if their shapes differ."""
    def function(p):
        other = p.plain(second if p.word == first else first)
        return other if other.shape == p.plain().shape else p.plain()
    return function


def transposed_weight(p):
    weight = p.weight()
    return linear(p, weight.T if weight.shape[0] == weight.shape[1] else weight)


def weight_of_expert(p, offset):
    E = p.config["num_local_experts"]
    return linear(p, p.weight(expert=(p.expert + int(offset)) % E))


def without_norm(p):
    """A linear layer on the stream itself instead of its norm."""
    source = {"gate": lambda: p["residual"].flatten(0, 1), "lm_head": lambda: p["stream"],
              "w1": lambda: expert_input(p, "residual"), "w3": lambda: expert_input(p, "residual")}
    return source.get(p.word, lambda: p["stream"])() @ p.weight().T


def softmax_plus_one(p):
    s = p["scores"]
    top = s.amax(-1, keepdim=True).clamp(min=0)
    powers = (s - top).exp()
    return powers / (powers.sum(-1, keepdim=True) + (-top).exp())


def masked_afterwards(p):
    everything = torch.ones(p.S, p.S, dtype=torch.bool)
    return scores(p, everything, padding=True).softmax(-1) * visible(p)


def unnormalised(p):
    return (p["scores"] - p["scores"].amax(-1, keepdim=True)).exp()


def post_norm(p, sublayer):
    """norm(x + sublayer(x))."""
    norm_name = "input_layernorm" if sublayer == "o_proj" else "post_attention_layernorm"
    x = p["stream" if sublayer == "o_proj" else "residual"] + p[sublayer]
    return unit(x, p.config["rms_norm_eps"]) * p.norm_weight(norm_name)


def added(p):
    """The two parts of a residual addition: the stream and the sublayer's output."""
    return (p["stream"], p["o_proj"]) if p.word == "residual" else (
        p["residual"], p["block_sparse_moe"])


def normed_stream(p):
    return p["input_layernorm" if p.word == "residual" else "post_attention_layernorm"]


def tied_from_above(p):
    """Of equal logits, the expert with the higher index."""
    chosen = choose(p, p["gate"].flip(1))
    return (p["gate"].shape[1] - 1 - chosen).where(chosen >= 0, -1)


def weights_by_rank(p):
    """Weights in order of rank beside experts in order of their numbers."""
    order = p["chosen"].argsort(1).argsort(1)
    if p.word == "weights":
        return p.plain().gather(1, order)
    return mixture(p, None if p.run.affected(p.name("weights")) else p["weights"].gather(1, order))


def first_only(p, weights):
    return mixture(p, torch.zeros_like(p["weights"]).index_copy_(
        1, torch.tensor([0]), weights[:, :1]))


def ones(p):
    return torch.ones(p["chosen"].shape, dtype=torch.float64)


def softmax_over_all(p):
    return p["gate"].softmax(-1).gather(1, p["chosen"].clamp(min=0))


def weights_of_wrong_token(p):
    """Row r of an expert takes the weight of token r."""
    y = torch.zeros_like(p["residual"]).flatten(0, 1)
    for e in sorted(set(p["chosen"].flatten().tolist()) - {-1}):
        token, rank = torch.where(p["chosen"] == e)
        share = p["weights"][torch.arange(len(token)), rank, None]
        y.index_add_(0, token, share * p.at(e)["w2"])
    return y.view_as(p["residual"])


def all_experts(p):
    """Every expert on every token, with a softmax over all."""
    x, share = p["post_attention_layernorm"], p["gate"].softmax(-1)
    y = torch.zeros_like(x)
    for e in range(share.shape[1]):
        w1, w2, w3 = (p.weight(w, e) for w in ("w1", "w2", "w3"))
        y += share[:, e].view(*x.shape[:2], 1) * ((F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T)
    return y


def capacity(p, c, by_rank=False):
    """Each expert takes c tokens, in the order of tokens or of rank and then token."""
    def keep(token, rank):
        order = (rank * len(p["chosen"]) + token).argsort() if by_rank else token.argsort()
        return order.argsort() < c
    return mixture(p, keep=keep)


def scaled(p):
    return p.plain() * p.routing_weights()


CAUSES = [
    # Embeddings and norms.
    Cause("embed_tokens", "the embeddings are multiplied by √D",
          lambda p: p.plain() * math.sqrt(p.plain().shape[-1])),
    Cause("embed_tokens", "the embedding of token id {:+} is read", lambda p, n: p.weight()[
        (p.run.trace.tensors["tokens"] + n) % len(p.weight())], (1, -1)),
    Cause("embed_tokens", "the rows of lm_head are used as embeddings",
          lambda p: p.weight("lm_head")[p.run.trace.tensors["tokens"]]),
    Cause(NORMS, "the norm is missing", norm_input),
    Cause(NORMS, "the weight of the norm is missing", lambda p: norm(p, weight=1.0)),
    Cause(NORMS, "the norm multiplies by 1 + weight",
          lambda p: norm(p, weight=1 + p.norm_weight())),
    Cause(NORMS, "the mean is subtracted: LayerNorm instead of RMSNorm",
          lambda p: norm(p, center=True)),
    Cause(NORMS, "the variance, over D − {}, takes the place of the mean of squares", lambda p, n:
          norm_input(p) * (norm_input(p).var(-1, correction=n, keepdim=True)
                           + p.config["rms_norm_eps"]).rsqrt() * p.norm_weight(), (0, 1)),
    Cause(NORMS, "the norm divides by √(sum of squares) instead of √(mean of squares)",
          lambda p: norm(p) / math.sqrt(p.plain().shape[-1])),
    Cause(NORMS, "the norm divides by the mean of squares, without the root", lambda p: norm(p) * (
        norm_input(p).square().mean(-1, keepdim=True) + p.config["rms_norm_eps"]).rsqrt()),
    Cause(NORMS, "ε is added after the root instead of before it", lambda p: norm(p, eps=0.0) / (
        1 + p.config["rms_norm_eps"] * norm_input(p).square().mean(-1, keepdim=True).rsqrt())),
    Cause(NORMS, "rms_norm_eps is {}", lambda p, eps: norm(p, eps=eps), other_epsilons),
    Cause("input_layernorm", "the weights of the two norms of a layer are exchanged",
          lambda p: norm(p, weight=p.norm_weight("post_attention_layernorm")),
          also={"post_attention_layernorm":
                lambda p: norm(p, weight=p.norm_weight("input_layernorm"))}),
    Cause("input_layernorm", "each norm follows the addition (post-norm) instead of preceding its "
          "sublayer", norm_input, also={
              "residual": lambda p: post_norm(p, "o_proj"), "post_attention_layernorm": norm_input,
              "layer": lambda p: post_norm(p, "block_sparse_moe")}),
    Cause("post_attention_layernorm", "the mixture reads the input of the layer, parallel to the "
          "attention", lambda p: unit(p["stream"], p.config["rms_norm_eps"]) * p.norm_weight()),
    # Projections.
    Cause("q_proj k_proj", "the rows of each head are in Mistral's order, in which neighbours are "
          "pairs; convert the weights", lambda p: permuted_rows(p, False)),
    Cause("q_proj k_proj", "the rows of each head were converted twice from Mistral's order",
          lambda p: permuted_rows(p, True)),
    Cause("k_proj v_proj", "keys and values are exchanged", exchanged("k_proj", "v_proj")),
    Cause("q_proj k_proj", "queries and keys are exchanged", exchanged("q_proj", "k_proj")),
    Cause(" ".join(LINEAR), "square weights are used transposed", transposed_weight),
    Cause(" ".join(LINEAR).replace(" lm_head", ""), "the weight of layer {} is used",
          lambda p, n: linear(p, p.weight(layer=n)), other_layers),
    Cause("q_proj k_proj v_proj", "the input of the projections is not normed", without_norm),
    Cause("gate w1 w3", "the input of the mixture is not normed", without_norm),
    Cause("lm_head", "the input of lm_head is not normed", without_norm),
    Cause("o_proj", "the heads are not transposed back: the rows of the heads follow one another",
          lambda p: p["mixed"].transpose(1, 2).reshape(*p["mixed"].shape[:2], -1) @ p.weight().T),
    Cause("o_proj", "o_proj reads the features of the heads in the order d·H instead of H·d",
          lambda p: p["mixed"].transpose(2, 3).flatten(2) @ p.weight().T),
    Cause("lm_head", "lm_head uses the embeddings, as if tie_word_embeddings were true",
          lambda p: linear(p, p.weight("embed_tokens"))),
    # Rotary embedding.
    Cause(ROTATED, "heads are not rotated", unrotated),
    Cause(ROTATED, "neighbours (2i, 2i + 1) are rotated as pairs instead of (i, i + d/2)",
          lambda p: rotated(p, take=NEIGHBOURS, put=NEIGHBOURS)),
    Cause(ROTATED, "neighbours (2i, 2i + 1) are rotated as pairs and written to (i, i + d/2)",
          lambda p: rotated(p, take=NEIGHBOURS, put=HALVES)),
    Cause(ROTATED, "pairs (i, i + d/2) are rotated and written to neighbours (2i, 2i + 1)",
          lambda p: rotated(p, take=HALVES, put=NEIGHBOURS)),
    Cause(ROTATED, "heads are rotated the other way, by −angle", lambda p: rotated(p, -angles(p))),
    Cause(ROTATED, "heads are rotated twice", lambda p: rotated(p, 2 * angles(p))),
    Cause(ROTATED, "cosine and sine are exchanged",
          lambda p: turn(unrotated(p), angles(p).sin(), angles(p).cos())),
    Cause(ROTATED, "the second half has the wrong sign: b·cos − a·sin", wrong_sign),
    Cause(ROTATED, "only the first half of each head is rotated", cut_rotation),
    Cause(ROTATED, "all heads are rotated as one vector of H·d features", joint_rotation),
    Cause(ROTATED, "positions are shifted by {:+}",
          lambda p, n: rotated(p, angles(p, positions(p) + n)), (1, -1, 2)),
    Cause(ROTATED, "the number of the head is used as position", head_as_position),
    Cause(ROTATED, "positions restart with each call of {} tokens",
          lambda p, c: rotated(p, angles(p, torch.arange(p.S) % c)), chunks),
    Cause(ROTATED, "all tokens of a call, of {} tokens, get the position of its first one",
          lambda p, c: rotated(p, angles(p, positions(p)[calls(p, c)[0][:, 0]])), chunks),
    Cause(ROTATED, "slots are used as positions: p mod C, with calls of {} tokens and C = {}",
          lambda p, c, C: rotated(p, angles(p, positions(p) % C)), buffers),
    Cause(ROTATED, "positions start at 0 instead of the first position",
          lambda p: rotated(p, angles(p, torch.arange(p.S)))),
    Cause(ROTATED, "positions are divided by {} (linear RoPE scaling)",
          lambda p, n: rotated(p, angles(p) / n), (2, 4, 8)),
    Cause(ROTATED, "the exponent of the frequency is i/d instead of 2i/d",
          lambda p: rotated(p, angles(p, theta=math.sqrt(p.config["rope_theta"])))),
    Cause(ROTATED, "rope_theta is {}",
          lambda p, theta: rotated(p, angles(p, theta=float(theta))), other_thetas),
    Cause(ROTATED, "angles are computed in float32, or cosines and sines rounded to it: all "
          "heads have the same, up to {:.1g} from ours", lambda p, _, table: torch.view_as_real(
              torch.complex(*unrotated(p).chunk(2, -1)) * table).mT.flatten(-2), measured),
    Cause(ROTATED, "angles are computed in float32 ({})",
          lambda p, how: rotated(p, single(p, how)), ("θ^−x", "1/θ^x")),
    Cause(ROTATED, "positions are rounded to {}", lambda p, dtype: rotated(
        p, angles(p, positions(p).to(dtype).double())), (torch.bfloat16, torch.float16)),
    Cause(ROTATED, "cosine and sine are rounded to {}", rounded_cos_sin,
          (torch.bfloat16, torch.float16)),
    # Scores, mask and softmax.
    Cause("scores", "scores are not divided by √d", lambda p: scores(p, scale=math.sqrt(p.d))),
    Cause("scores", "scores are divided by d instead of √d",
          lambda p: scores(p, scale=1 / math.sqrt(p.d))),
    Cause("scores", "scores are divided by √D instead of √d",
          lambda p: scores(p, scale=math.sqrt(p.d / p["stream"].shape[-1]))),
    Cause("scores", "scores are divided by √{0:.4g} instead of √d, with {0:.4g} = D / H",
          lambda p, n: scores(p, scale=math.sqrt(p.d / n)), head_sizes),
    Cause("scores mixed", "query head h uses key/value head h mod K instead of h // (H/K)",
          lambda p: (scores if p.word == "scores" else mixed)(p, modulo=True)),
    Cause("scores", "queries and keys are used without their rotation",
          lambda p: scores(p, q=p.heads("q_proj"), k=p.heads("k_proj"))),
    Cause("scores", "keys are used without their rotation, as if cached before it",
          lambda p: scores(p, k=p.heads("k_proj"))),
    Cause("scores", "the window is off by one: {} keys", lambda p, W: scores(
        p, visible(p, first=torch.arange(p.S)[:, None] - W + 1)),
        lambda p: [p.W + 1, p.W - 1] if p.W else []),
    Cause("scores", "there is no window",
          lambda p: scores(p, visible(p, first=0))),
    Cause("scores", "queries see later tokens: the window applies, the causal mask does not",
          lambda p: scores(p, visible(p, last=p.S))),
    Cause("scores", "there is no mask: every query sees every token",
          lambda p: scores(p, visible(p, first=0, last=p.S), padding=True)),
    Cause("scores", "the causal mask is off by one: every query sees the next token too",
          lambda p: scores(p, visible(p, last=torch.arange(p.S)[:, None] + 1))),
    Cause("scores", "a query does not see its own key",
          lambda p: scores(p, visible(p, last=torch.arange(p.S)[:, None] - 1))),
    Cause("scores", "a call does not see the keys of earlier calls, of {} tokens", lambda p, c:
          scores(p, visible(p) & visible(p, first=calls(p, c)[0])), chunks),
    Cause("scores", "queries see later tokens of the same call, of {} tokens", lambda p, c:
          scores(p, visible(p, last=calls(p, c)[1] - 1)), chunks),
    Cause("scores", "calls after the first, of {} tokens, have no causal mask inside", lambda p, c:
          scores(p, visible(p) | visible(p, calls(p, c)[0].where(calls(p, c)[0] > 0, p.S),
                                         calls(p, c)[1] - 1)), chunks),
    Cause("scores", "all queries of a call, of {} tokens, use the mask of its first one",
          lambda p, c: scores(p, visible(p)[calls(p, c)[0][:, 0]]), chunks),
    Cause("scores", "the rolling buffer is too small: calls of {} tokens with {} slots overwrite "
          "keys before they are read", lambda p, c, C: scores(p, visible(p) & visible(
              p, first=calls(p, c)[1] - C)), small_buffers),
    Cause("scores", "slots are read as positions by the mask, with calls of {} tokens and {} slots",
          lambda p, c, C: scores(p, slots_as_positions(p, c, C)), buffers),
    Cause("scores", "masked scores are {:.6g}, which the softmax does not turn into 0", lambda p, x:
          p.plain().masked_fill(p.plain().isneginf(), x), masked_values),
    Cause("scores", "the mask adds {:.6g}, which the softmax does not turn into 0", lambda p, x:
          scores(p, visible(p, first=0, last=p.S), padding=True) + x * ~visible(p), added_values),
    Cause("scores", "scores are capped as {0}·tanh(score/{0})", lambda p, cap: (
        cap * (p.plain() / cap).tanh()).masked_fill(p.plain().isneginf(), -math.inf), (30.0, 50.0)),
    Cause("probabilities", "the softmax has one more term e⁰ in its sum", softmax_plus_one),
    Cause("probabilities", "the softmax runs over the queries instead of the keys",
          lambda p: p["scores"].softmax(-2)),
    Cause("probabilities", "the exponential has base 2 instead of e",
          lambda p: (p["scores"] * math.log(2)).softmax(-1)),
    Cause("probabilities", "the mask is applied after the softmax", masked_afterwards),
    Cause("probabilities", "the exponentials are not divided by their sum", unnormalised),
    Cause("mixed", "keys take the place of values", lambda p: mixed(p, p["k_rotated"])),
    Cause("mixed", "values are rotated like keys",
          lambda p: mixed(p, rotated(p, x=p.heads("v_proj")))),
    # Residual stream.
    Cause("residual layer", "the residual stream is not added", lambda p: added(p)[1]),
    Cause("residual layer", "the output of the sublayer is not added", lambda p: added(p)[0]),
    Cause("residual layer", "the output is added to the normed stream, so residual and norm are in "
          "the wrong order", lambda p: normed_stream(p) + added(p)[1]),
    Cause("residual layer", "the output of the sublayer is added twice",
          lambda p: added(p)[0] + 2 * added(p)[1]),
    Cause("residual layer", "the residual stream is added twice",
          lambda p: 2 * added(p)[0] + added(p)[1]),
    Cause("layer", "the residual stream from before the attention is added",
          lambda p: p["stream"] + p[MOE]),
    # Router.
    Cause("gate", "the logits are replaced by their softmax", lambda p: p.plain().softmax(-1)),
    Cause("chosen", "of equal logits, the expert with the higher index is chosen", tied_from_above),
    Cause("chosen", "{} experts per token are chosen", lambda p, n:
          choose(p, p["gate"], count=n), other_counts),
    Cause("chosen", "the experts with the smallest logits are chosen",
          lambda p: choose(p, p["gate"], ascending=True)),
    Cause("weights", "renormalisation is missing: a softmax over all experts", softmax_over_all),
    Cause("weights", "logits are used without a softmax", chosen_logits),
    Cause("weights", "all weights are 1/A", lambda p: ones(p) / p["chosen"].shape[1]),
    Cause("weights", "a sigmoid takes the place of the softmax",
          lambda p: chosen_logits(p).sigmoid()),
    Cause("weights", "a normalised sigmoid takes the place of the softmax",
          lambda p: F.normalize(chosen_logits(p).sigmoid(), p=1, dim=1)),
    Cause("weights", "the softmax is taken twice", lambda p: p.plain().softmax(-1)),
    Cause("weights", "logits are divided by their sum instead of a softmax",
          lambda p: chosen_logits(p) / chosen_logits(p).sum(-1, keepdim=True)),
    Cause("weights", "the weights of the experts are in reverse order",
          lambda p: p.plain().flip(1)),
    # Experts.
    Cause("w1 w3", "w1 and w3 are exchanged", exchanged("w1", "w3")),
    Cause("w1 w3", "the routing weight multiplies the input of the expert instead of its output",
          scaled, also={MOE: lambda p: mixture(p, ones(p))}),
    Cause("w1 w3", "the routing weight multiplies the input of the expert and also its output",
          scaled),
    Cause("w1 w3 w2", "the weights of expert e {:+} are used for expert e", weight_of_expert,
          (1, -1)),
    Cause("hidden", "silu is applied to w3·x instead of w1·x",
          lambda p: F.silu(p["w3"]) * p["w1"]),
    Cause("hidden", "silu is missing", lambda p: p["w1"] * p["w3"]),
    Cause("hidden", "gelu takes the place of silu", lambda p: F.gelu(p["w1"]) * p["w3"]),
    Cause("hidden", "gelu with tanh takes the place of silu",
          lambda p: F.gelu(p["w1"], approximate="tanh") * p["w3"]),
    Cause("hidden", "x·sigmoid(1.702·x) takes the place of silu",
          lambda p: p["w1"] * (1.702 * p["w1"]).sigmoid() * p["w3"]),
    Cause("hidden", "relu takes the place of silu", lambda p: p["w1"].relu() * p["w3"]),
    Cause("hidden", "relu² takes the place of silu",
          lambda p: p["w1"].relu().square() * p["w3"]),
    Cause("hidden", "a sigmoid takes the place of silu", lambda p: p["w1"].sigmoid() * p["w3"]),
    Cause("hidden", "the product with w3·x is missing", lambda p: F.silu(p["w1"])),
    Cause("hidden", "w3·x + 1 takes the place of w3·x", lambda p: F.silu(p["w1"]) * (p["w3"] + 1)),
    Cause("hidden", "silu is applied to the product of w1·x and w3·x",
          lambda p: F.silu(p["w1"] * p["w3"])),
    Cause("hidden", "the routing weight is inside `hidden` instead of in the sum over the experts",
          scaled, also={MOE: lambda p: mixture(p, ones(p))}, note=LINEARITY),
    Cause("hidden", "the routing weight is inside `hidden` and also in the sum over the experts",
          scaled),
    Cause("w2", "the routing weight is applied before w2, or directly after it, instead of in the "
          "sum over the experts", scaled, also={MOE: lambda p: mixture(p, ones(p))},
          note=LINEARITY),
    # Sum over the experts.
    Cause(MOE, "the outputs of the experts are added without weights",
          lambda p: mixture(p, ones(p))),
    Cause(MOE, "the weights of a softmax over all experts are used",
          lambda p: mixture(p, softmax_over_all(p))),
    Cause(MOE, "only the first expert is used", lambda p: first_only(p, ones(p))),
    Cause(MOE, "only the first expert is used, with its weight",
          lambda p: first_only(p, p["weights"])),
    Cause(MOE, "the weights are applied twice", lambda p: mixture(p, p["weights"].square())),
    Cause(MOE, "the outputs are combined with the weights in reverse order",
          lambda p: mixture(p, p["weights"].flip(1))),
    Cause(f"weights {MOE}", "the outputs in order of the experts are combined with weights in "
          "order of rank", weights_by_rank),
    Cause(MOE, "row r of an expert is combined with the weight of token r",
          weights_of_wrong_token),
    Cause(MOE, "the rows of an expert are added to tokens 0, 1, 2, …",
          lambda p: mixture(p, rows=lambda token: torch.arange(len(token)))),
    Cause(MOE, "the output of an expert overwrites that of earlier ones",
          lambda p: mixture(p, add=Tensor.index_copy_)),
    Cause(MOE, "an expert takes no more than {} tokens, the first ones; others are dropped",
          capacity, capacities),
    Cause(MOE, "an expert takes no more than {} tokens, first choices first; others are dropped",
          lambda p, c: capacity(p, c, by_rank=True), capacities),
    Cause(MOE, "all experts are used, weighted by a softmax over all", all_experts),
    # Logits.
    Cause("lm_head", "the logits are replaced by their softmax", lambda p: p.plain().softmax(-1)),
    Cause("lm_head", "the logits are replaced by their log-softmax",
          lambda p: p.plain().log_softmax(-1)),
    Cause("lm_head", "the logits are capped as {0}·tanh(logit/{0})",
          lambda p, cap: cap * (p.plain() / cap).tanh(), (30.0, 50.0)),
]
