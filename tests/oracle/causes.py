"""What compare.py measures in a port's numbers, and the errors that it tries.

GUESSES lists, for some quantities, a table of rules or a function that measures. A rule is a text
and what the port may compute instead, as a function of a Place. A measuring function gets a Place,
and the port's numbers if they differ in this very quantity, otherwise None; it yields such rules,
or dicts of them if several quantities change. Whatever the numbers can tell is measured: positions,
visible keys, the weights of a sum and so on. Nothing here is a verdict. compare.py proves a guess
by computing with it.
"""

import itertools
import math

import torch
from steps import (
    LINEAR,
    NEGLIGIBLE,
    NORMS,
    STEPS,
    Place,
    calls_of,
    halves,
    neighbours,
    turn,
    unit,
)
from torch import Tensor
from torch.nn import functional as F

READ = "read from the numbers, "  # begins what no rule here describes


def listed(items, limit=3, joint=", "):
    """The first items as text."""
    items = list(items)
    return joint.join(map(str, items[:limit])) + f"{joint}…" * (len(items) > limit)


def spans(numbers):
    """Ascending numbers as text, such as "0 to 3, 5"."""
    groups = []
    for n in numbers:
        if groups and n == groups[-1][1] + 1:
            groups[-1][1] = n
        else:
            groups.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in groups) or "none"


def instead(p, found, usual):
    """Where numbers (B, S) read from the port differ from the usual ones, as text."""
    return listed(f"{found[b, s]:g} instead of {usual[b, s]:g} at token {s} of row {b}"
                  for b, s in (p.real() & (found != usual)).nonzero().tolist())


def nice(x):
    """A measured number with 1, 2, 3, 6 and 15 digits; the proof tells which is right."""
    return list(dict.fromkeys(float(f"{x:.{digits}g}") for digits in (1, 2, 3, 6, 15)))


def factor_names(c):
    """Factors that a port may have forgotten or added, by name."""
    d, D, H = c["head_dim"], c["hidden_size"], c["num_attention_heads"]
    found = {"√d": d, "√D": D, "√(D/d)": D / d, "√(d·H/D)": d * H / D, "√2": 2, "2": 4}
    found = {name: math.sqrt(x) for name, x in found.items()} | {"ln 2": math.log(2)}
    return found | {f"1/{name}": 1 / x for name, x in found.items()}


def factors(p, theirs):
    """A constant factor, measured if the tensor itself differs."""
    named = factor_names(p.config)
    found = set(named.values()) if p.word in ("embed_tokens", "scores") else ()
    if theirs is not None:
        clear = p.plain().isfinite() & theirs.isfinite()
        a, b = p.plain()[clear], theirs[clear]
        found = {((a * b).sum() / a.square().sum()).item()}
    for x in found:
        same = " or ".join(name for name, y in named.items() if abs(x / y - 1) < 1e-5)
        yield (f"it is multiplied by {x:.{6 if abs(x - 1) > 1e-5 else 15}g}"
               f"{', which is ' * bool(same)}{same}", lambda p, x=x: p.plain() * x)


def rounded(p, theirs):
    """A lower precision than that of the file."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.finfo(dtype).eps > torch.finfo(p.run.trace.dtype).eps:
            yield (f"it is rounded to {str(dtype)[6:]}; if the port computes in it, write it so",
                   lambda p, dtype=dtype: p.plain().to(dtype).double())


# ------------------------------------------------------------------ embeddings, norms, products


def embeddings(p, theirs):
    """Rows of another table, or of other token ids."""
    ids = p.run.trace.tensors["tokens"]
    yield "the rows of lm_head are used as embeddings", lambda p: p.weight("lm_head")[ids]
    if theirs is not None:
        found = torch.cdist(theirs.flatten(0, 1), p.weight()).argmin(1).view(ids.shape)
        yield f"{READ}the token ids are {instead(p, found, ids)}", lambda p: p.weight()[found]


def mean_square(x):
    return x.square().mean(-1, keepdim=True)


NORM_RULES = {
    "the norm is missing": Place.source,
    "the weight of the norm is missing": lambda p: p.product(1.0),
    "the norm multiplies by 1 + weight": lambda p: p.product(1 + p.weight()),
    "the norm reads the input of the layer": lambda p: p.product(x=p["stream"]),
    "the mean is subtracted: LayerNorm instead of RMSNorm": lambda p: p.product(
        x=p.source() - p.source().mean(-1, keepdim=True)),
    "the norm divides by the mean of squares, without the root": lambda p: p.product(
        scale=lambda x, eps: x / (mean_square(x) + eps)),
    "ε is added after the root instead of before it": lambda p: p.product(
        scale=lambda x, eps: x / (mean_square(x).sqrt() + eps))}


def epsilons(p, theirs):
    """Another ε in the norms, measured from √(mean(x²) + ε) = x·weight / norm."""
    found = [0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1e-2]
    if theirs is not None:
        x = p.source()
        found += nice(((x * p.weight() / theirs).square() - mean_square(x)).nanmedian().item())
    for eps in found:
        yield f"rms_norm_eps is {eps:g}", lambda p, eps=eps: p.product(
            scale=lambda x, _: unit(x, eps))


def exchanged_sides(w):
    """The buffer of a weight, read with inputs and outputs exchanged."""
    return w.reshape(w.shape[::-1]).mT if w.ndim == 2 else w


def products(p, theirs):
    """Another input of a linear layer, or its buffer read with inputs and outputs exchanged."""
    yield ("the buffers of weights are read with inputs and outputs exchanged",
           lambda p: p.product(exchanged_sides(p.weight())))
    others = ("stream", "residual", "input_layernorm", "post_attention_layernorm", "o_proj")
    for last in others if p.word != "lm_head" else ():
        yield f"the input is {last}", lambda p, last=last: p.product(x=p.source(last))


def substitutes(p, theirs):
    """Every other weight of the same shape, also transposed, in the place of the right one."""
    for other, weight in p.run.trace.weights.items() if theirs is not None else ():
        for how, w in (("", weight), (" transposed", weight.mT if weight.ndim > 1 else weight),
                       (" with inputs and outputs exchanged", exchanged_sides(weight))):
            if w.shape == p.weight().shape and (how or other != f"{p.name()}.weight"):
                yield f"{READ}the weight is {other.removesuffix('.weight')}{how}", {
                    p.name(): lambda p, w=w: p.product(w.double())}


HEAD_ROWS = {
    "the rows of each head are in Mistral's order, which fits a rotation of neighbours":
        lambda p: neighbours(p.plain().unflatten(-1, (-1, p.d))).flatten(-2),
    "the rows of each head are converted twice from Mistral's order":
        lambda p: halves(p.plain().unflatten(-1, (-1, p.d))).flatten(-2)}
HEAD_OUTPUTS = {
    "the heads are not transposed back: the rows of the heads follow one another":
        lambda p: p.product(x=p["mixed"].transpose(1, 2).reshape(*p["mixed"].shape[:2], -1))}
LOGITS = {"the logits are replaced by their softmax": lambda p: p.plain().softmax(-1)}
CAPS = {f"it is capped as {c:g}·tanh(x/{c:g})": lambda p, c=c: (c * (p.plain() / c).tanh()).where(
    p.plain().isfinite(), p.plain()) for c in (30.0, 50.0)}


# ------------------------------------------------------------------ rotation


ROTATIONS = {
    "heads are not rotated": Place.unrotated,
    "neighbours (2i, 2i + 1) are rotated as pairs instead of (i, i + d/2)":
        lambda p: neighbours(p.rotated(x=halves(p.unrotated()))),
    "neighbours (2i, 2i + 1) are rotated as pairs and written to (i, i + d/2)":
        lambda p: p.rotated(x=halves(p.unrotated())),
    "pairs (i, i + d/2) are rotated and written to neighbours (2i, 2i + 1)":
        lambda p: neighbours(p.rotated()),
    "only the first half of each head is rotated": lambda p: torch.cat((p.rotated(
        p.angles(frequency=p.frequencies(d=p.d // 2)), p.unrotated()[..., :p.d // 2]),
        p.unrotated()[..., p.d // 2:]), -1),
    "the second half has the wrong sign: b·cos − a·sin": lambda p: torch.cat(
        (p.rotated().chunk(2, -1)[0], p.rotated(-p.angles()).chunk(2, -1)[1]), -1),
    "cosine and sine are exchanged": lambda p: p.rotated(math.pi / 2 - p.angles()),
    "cosine and sine are rounded to bfloat16": lambda p: turn(p.unrotated(), *(
        x.bfloat16().double() for x in (p.angles().cos(), p.angles().sin())))}


def other_positions(p):
    """Rules for wrong positions, as (text, positions (B, S))."""
    at, first = p.positions(), p.run.trace.first_position
    lengths = torch.tensor(p.run.trace.lengths)[:, None]
    for n in (1, -1, 2):
        yield f"positions are shifted by {n:+}", at + n
    yield "positions start at 0 instead of the first position", at - first
    yield "rows continue the positions of the row before", at + lengths.cumsum(0) - lengths
    yield "positions are columns of rows padded on the left", at + lengths.max() - lengths
    yield "positions are rounded to bfloat16", at.bfloat16().double()
    for _, start, _, size in calls_of(p.run.trace):
        yield "positions restart with each call", at - start
        yield "all tokens of a call get the position of its first one", start + first
        for n in (1, -1):
            yield f"positions are shifted by {n:+} after the first call", at + n * (start > 0)
        for C in {p.W, p.W + size - 1} if p.W else ():
            yield f"slots are used as positions: p mod {C}", at % C


def rotations(p, theirs):
    """Other positions or frequencies, by rule or read from the numbers."""
    found = [(text, p.angles(at)) for text, at in other_positions(p)]
    for n in (-1, 2, 1 / 2, 1 / 4, 1 / 8):
        found.append((f"angles are multiplied by {n:g}", n * p.angles()))
    for theta in (1e4, 1e5, 5e5, 1e6):
        found.append((f"rope_theta is {theta:g}", p.angles(frequency=p.frequencies(theta))))
    found.append(("the exponent of the frequency is i/d instead of 2i/d", p.angles(
        frequency=p.frequencies() ** 0.5)))
    for text, angle in found + ([] if theirs is None else [*read_angles(p, theirs)]):
        yield text, lambda p, angle=angle: p.rotated(angle)
    if theirs is not None:
        yield from read_table(p, theirs)


def turns(p, theirs):
    """The factors by which the port turned its pairs, as complex numbers (B, S, 1, d/2).

    They are read in the head with the largest pair, where the division is most exact.
    """
    mine, other = (torch.complex(*x.chunk(2, -1)) for x in (p.unrotated(), theirs))
    best = mine.abs().argmax(2, keepdim=True)
    return other.gather(2, best) / mine.gather(2, best)


def read_angles(p, theirs):
    """Positions and frequencies by complex division, as (text, angles).

    The position of a token is the one near its own or near 0 whose turn fits best. From one
    token to the next the turn is the frequency, from which multiples and θ follow.
    """
    z, at, f = turns(p, theirs), p.positions(), p.frequencies()
    most = min(2 * p.S, 64)
    near = torch.arange(-most, most + 1).double()
    tried = torch.cat((at[..., None] + near, near.expand(*at.shape, -1)), -1)
    error = (z - torch.polar(torch.ones_like(f), tried[..., None] * f)).abs().sum(-1)
    found = tried.gather(-1, error.nan_to_num(math.inf).argmin(-1, keepdim=True))[..., 0]
    yield f"{READ}positions are {instead(p, found, at)}", p.angles(found)
    if p.S == 1:
        return
    step = (z[:, 1:] / z[:, :-1])[p.real()[:, 1:]].angle().nanmedian(0)[0][0]
    for n in nice((step[0] / f[0]).item()):
        yield f"angles are multiplied by {n:g}", n * p.angles()
    for theta in nice(step[1].item() ** (-p.d / 2)) if len(f) > 1 and 0 < step[1] < 1 else ():
        yield f"rope_theta is {theta:g}", p.angles(frequency=p.frequencies(theta))
    text = ", ".join(f"{x:.6g}" for x in step.tolist())
    yield f"{READ}the frequencies of the pairs are {text}", p.angles(frequency=step)


def read_table(p, theirs):
    """Angles that float32 could give, read in one head and proved by the others."""
    table, angle = turns(p, theirs), p.angles()
    off = (table - torch.polar(torch.ones_like(angle), angle)).abs().nan_to_num()
    if p.unrotated().shape[2] > 1 and (  # so that another head confirms it
            off <= 4 * torch.finfo(torch.float32).eps * (1 + angle.abs())).all():
        yield ("angles are computed in float32, or cosines and sines are rounded to it",
               lambda p: torch.view_as_real(
                   torch.complex(*p.unrotated().chunk(2, -1)) * table).mT.flatten(-2))


# ------------------------------------------------------------------ scores, mask and softmax


def other_masks(p):
    """Rules for wrong masks, as (text, mask (B, S, T)): from a first to a last key."""
    i = torch.arange(p.S).expand(len(p.run.trace.lengths), -1)
    window, every = i - p.W + 1 if p.W else 0 * i, 0 * i + p.S
    yield "there is no window", p.visible(0 * i)
    for n in (1, -1) if p.W else ():
        yield f"the window is off by one: {p.W + n} keys", p.visible(window - n)
    for text, last in ("to the next token", i + 1), ("without its own key", i - 1), (
            "and later tokens", every):
        yield f"queries see the keys of the window, {text}", p.visible(window, last)
    for _, start, end, size in calls_of(p.run.trace):
        yield "a call does not see the keys of earlier calls", p.visible(start.maximum(window))
        yield "queries see later tokens of the same call", p.visible(window, end - 1)
        yield ("calls after the first have no causal mask inside",
               p.visible() | p.visible(start.where(start > 0, every), end - 1))
        yield "all queries of a call use the mask of its first one", p.visible().gather(
            1, start.clamp(max=p.S - 1)[..., None].expand(-1, -1, p.S))
        for C in range(max(size, p.W), p.W + size) if p.W else ():
            kept, slot = end - C, torch.arange(p.S) % C
            yield (f"the rolling buffer is too small: {C} slots lose keys that are needed",
                   p.visible(kept.maximum(window)))
            yield (f"the window is off by one in a buffer of {C} slots",
                   p.visible(kept.maximum(window - 1)))
            yield (f"slots are read as positions by the mask, {C} slots", p.visible(kept, end - 1)
                   & (slot <= i[..., None]) & (slot >= window[..., None]))


SCORES = {
    "queries and keys are used without their rotation":
        lambda p: p.scores(q=p.heads("q_proj"), k=p.heads("k_proj")),
    "keys are used without their rotation, as if cached before it":
        lambda p: p.scores(k=p.heads("k_proj")),
    "there is no mask: every query sees every token": lambda p: p.scores(hide=False)}


def attention_scores(p, theirs):
    """Another mask, or keys that later calls changed."""
    masks = [*other_masks(p)]
    if theirs is not None:
        masks += read_mask(p, theirs > theirs.amax(-1, keepdim=True) - NEGLIGIBLE)
    for text, mask in masks:
        yield text, lambda p, mask=mask: p.scores(mask)
    if calls_of(p.run.trace):
        yield "keys are rotated again by every later call", lambda p: p.scores(k=rotated_again(p))


def rotated_again(p):
    """Keys (B, S, T, K, d) as each query sees them, turned once more by every call in between."""
    [calls] = calls_of(p.run.trace)
    again = (calls.number[:, :, None] - calls.number[:, None]).clamp(min=0)
    angle = p.angles()[:, None] * again[..., None, None]
    return turn(p["k_rotated"][:, None], angle.cos(), angle.sin())


def read_mask(p, seen):
    """The keys that the port's queries see, from (B, H, S, T), if all heads agree."""
    usual = p["scores"][:, 0] > -math.inf
    if (seen == seen[:, :1]).all():
        seen = seen[:, 0].where(p.real()[..., None], usual)
        keys = listed("query {} of row {} sees the keys {} instead of {}".format(i, b, *(
            spans(x[b, i].nonzero()[:, 0].tolist()) for x in (seen, usual)))
            for b, i in (seen != usual).any(-1).nonzero().tolist())
        yield f"{READ}{keys}", seen


SOFTMAX = {
    "the softmax has one more term e⁰ in its sum": lambda p: F.pad(
        p["scores"], (0, 1)).softmax(-1)[..., :-1],
    "the softmax runs over the queries instead of the keys": lambda p: p["scores"].softmax(-2),
    "the exponential has base 2 instead of e": lambda p: (p["scores"] * math.log(2)).softmax(-1),
    "the mask is applied after the softmax": lambda p: (
        p.scores(hide=False).softmax(-1) * p.visible()[:, None]),
    "the exponentials are not divided by their sum": lambda p: (
        p["scores"] - p["scores"].amax(-1, keepdim=True)).exp()}
VALUES = {"keys take the place of values": lambda p: p.mixed(p["k_rotated"])}
HEADS = {"query head h uses key/value head h mod K instead of h // (H/K)": lambda p: (
    p.scores if p.word == "scores" else p.mixed)(modulo=True)}


def visible_keys(p, theirs):
    """The keys that are visible, from the probabilities."""
    for text, mask in read_mask(p, theirs > 0) if theirs is not None else ():
        yield text, lambda p, mask=mask: p.scores(mask).softmax(-1)


def read_padding(p, theirs):
    """The share of each query that went to the value of token id 0, which pads.

    In layer 0 this value is known, because it depends on no position and no other token.
    """
    if theirs is not None and p.layer == 0 and not p.real().all():
        x = unit(p.weight("embed_tokens")[0], p.eps) * p.weight("input_layernorm")
        way = (p.weight("v_proj") @ x).view(-1, p.d)[p.head_map()] - p.plain()
        share = ((theirs - p.plain()) * way).sum(-1, keepdim=True) / mean_square(way) / p.d
        yield (f"{READ}the padding is not masked: queries mix in the value of token id 0",
               lambda p: p.plain() + share * way)


# ------------------------------------------------------------------ sums, router and experts


def sums(p, theirs):
    """a·x + b·y for two parts that a port may add."""
    x, y, normed = ("stream", "o_proj", "input_layernorm") if p.word == "residual" else (
        "residual", "block_sparse_moe", "post_attention_layernorm")
    for a, b in itertools.combinations(dict.fromkeys((x, y, normed, "stream", "o_proj")), 2):
        found = [(1, 1), (1, 0), (0, 1), (2, 1), (1, 2)]
        if theirs is not None and theirs.isfinite().all():
            parts = torch.stack([p[a].flatten(), p[b].flatten()], 1)
            fit = torch.linalg.lstsq(parts, theirs.reshape(-1, 1)).solution[:, 0].tolist()
            found = [[f if abs(f - round(f, 3)) > 1e-5 else round(f, 3) + 0.0 for f in fit]]
        for f, g in found:
            yield (f"it is {f:g}·{a} + {g:g}·{b} instead of {x} + {y}",
                   lambda p, a=a, b=b, f=f, g=g: f * p[a] + g * p[b])


CHOICES = {
    "of equal logits, the expert with the higher index is chosen": lambda p: (
        p.E - 1 - p.choose(p["gate"].flip(1))).where(p.real().view(-1, 1), -1)}


def ranks(p, theirs):
    """Experts with other ranks, also from the ranks of the port's choices."""
    found = {f"{n} experts per token are chosen": list(range(n)) for n in (p.A + 1, p.A - 1, 1)}
    found["the experts with the smallest logits are chosen"] = list(range(p.E))[:-p.A - 1:-1]
    if theirs is not None:
        order = p["gate"].sort(dim=-1, descending=True, stable=True)[1].argsort(-1)
        ok = p.real().flatten() & ((theirs >= 0) & (theirs < p.E)).all(1)
        read = order[ok].gather(1, theirs[ok])[:1].flatten().tolist()
        found[f"{READ}the experts with the ranks {listed(read, 9)}, from 0, are chosen"] = read
    for text, which in found.items():
        if which and len(which) <= p.E and which != list(range(p.A)):
            yield text, lambda p, which=which: p.choose(ranks=which)


def over_all(p):
    return p["gate"].softmax(-1).gather(1, p["chosen"].clamp(min=0))


WEIGHTS = {
    "renormalisation is missing: a softmax over all experts": over_all,
    "logits are used without a softmax": Place.chosen_logits,
    "all weights are 1/A": lambda p: torch.ones_like(p.shares()) / p.A,
    "the outputs of the experts are added without weights": lambda p: torch.ones_like(p.shares()),
    "only the first expert is used": lambda p: 1.0 * (torch.arange(p.A) == 0) + 0 * p.shares(),
    "only the first expert is used, with its weight":
        lambda p: (torch.arange(p.A) == 0) * p.shares(),
    "only the last of the chosen experts is used, with its weight":
        lambda p: (torch.arange(p.A) == p.A - 1) * p.shares(),
    "a sigmoid takes the place of the softmax": lambda p: p.chosen_logits().sigmoid(),
    "a normalised sigmoid takes the place of the softmax":
        lambda p: F.normalize(p.chosen_logits().sigmoid(), p=1, dim=1),
    "the softmax is taken twice": lambda p: p.shares().softmax(-1),
    "the weights are applied twice": lambda p: p.shares().square(),
    "the weights of the experts are in reverse order": lambda p: p.shares().flip(1),
    "weights in order of rank are combined with experts in order of their numbers":
        lambda p: p.shares().gather(1, p["chosen"].argsort(1).argsort(1))}


ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu with tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": torch.relu, "relu²": lambda g: g.relu().square(), "a sigmoid": torch.sigmoid,
    "tanh": torch.tanh, "the identity": lambda g: g}
ARRANGEMENTS = {"{} takes the place of silu": lambda g, u, f: f(g) * u,
                "{} is applied to w3·x instead of w1·x": lambda g, u, f: f(u) * g,
                "{} is applied to the product of w1·x and w3·x": lambda g, u, f: f(g * u),
                "{} is not multiplied by w3·x": lambda g, u, f: f(g)}


def activations(p, theirs):
    """Another function f in f(w1·x) ⊙ w3·x, or another arrangement of the two."""
    named = dict(ACTIVATIONS)
    if theirs is not None:  # f(g) = g·sigmoid(βg) with any β
        beta = ((theirs / p["w3"] / p["w1"]).logit() / p["w1"]).nanmedian().item()
        named |= {f"x·sigmoid({b:g}·x)": lambda g, b=b: g * (b * g).sigmoid() for b in nice(beta)}
    every = [*itertools.product(ARRANGEMENTS.items(), named.items())]
    for (text, how), (name, f) in every[1:]:  # the first one is right
        yield text.format(name), lambda p, how=how, f=f: how(p["w1"], p["w3"], f)


MIXTURES = {text: lambda p, f=f: p.mixture(f(p)) for text, f in WEIGHTS.items()} | {
    "row r of an expert is combined with the weight of token r":
        lambda p: p.mixture(origin=lambda token: torch.arange(len(token))),
    "the rows of an expert are added to tokens 0, 1, 2, …":
        lambda p: p.mixture(target=lambda token: torch.arange(len(token))),
    "the output of an expert overwrites that of earlier ones":
        lambda p: p.mixture(add=Tensor.index_copy_),
    "all experts are used, weighted by a softmax over all": lambda p: sum(
        p["gate"].softmax(-1)[:, e, None] * expert_output(p, e) for e in range(p.E)).view_as(
            p["residual"])}


def expert_output(p, e):
    """The output of an expert for every token, (N, D); a trace has that of some tokens only."""
    x = p["post_attention_layernorm"].flatten(0, 1)
    return (F.silu(x @ p.weight("w1", e).T) * (x @ p.weight("w3", e).T)) @ p.weight("w2", e).T


QK = "q_rotated k_rotated"
GUESSES = [  # the quantities, and what is guessed about them
    ("embed_tokens", embeddings), (" ".join(NORMS), NORM_RULES), (" ".join(NORMS), epsilons),
    *((words, products) for words in (*LINEAR, "q_proj k_proj v_proj", "gate w1 w3")),
    *((last, substitutes) for last in NORMS + LINEAR),
    ("q_proj k_proj", HEAD_ROWS), ("o_proj", HEAD_OUTPUTS), ("gate lm_head", LOGITS),
    ("gate lm_head scores", CAPS), (QK, ROTATIONS), (QK, rotations), ("scores", SCORES),
    ("scores", attention_scores),
    ("scores mixed", HEADS), ("probabilities", SOFTMAX), ("probabilities", visible_keys),
    ("mixed", VALUES), ("mixed", read_padding), ("residual", sums),
    ("layer", sums), ("chosen", CHOICES), ("chosen", ranks),
    ("weights", WEIGHTS), ("hidden", activations), ("block_sparse_moe", MIXTURES),
    *((name, guess) for name in STEPS for guess in (factors, rounded)
      if name != "chosen"),
    ("q_proj k_proj v_proj", factors), (" ".join(NORMS), factors)]
