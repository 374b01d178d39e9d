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
import re

import torch
from steps import (
    HALVES,
    LINEAR,
    NEIGHBOURS,
    NORMS,
    STEPS,
    angles,
    calls_of,
    choose,
    chosen_logits,
    frequencies,
    linear,
    mixed,
    mixture,
    norm,
    positions,
    real,
    rotated,
    scores,
    source,
    turn,
    unit,
    unrotated,
    visible,
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


def where(mask):
    return mask.nonzero().squeeze(1).tolist()


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
        a, b = (x[p.plain().isfinite() & theirs.isfinite()] for x in (p.plain(), theirs))
        found = {((a * b).sum() / a.square().sum()).item()}
    for x in found:
        same = [name for name, y in named.items() if abs(x / y - 1) < 1e-5]
        yield (f"it is multiplied by {x:.{6 if abs(x - 1) > 1e-5 else 15}g}"
               f"{', which is ' * bool(same)}{' or '.join(same)}", lambda p, x=x: p.plain() * x)


# ------------------------------------------------------------------ embeddings, norms, products


def embeddings(p, theirs):
    """Rows of another table, or of other token ids."""
    ids = p.run.trace.tensors["tokens"]
    yield "the rows of lm_head are used as embeddings", lambda p: p.weight("lm_head")[ids]
    if theirs is not None:
        found = torch.cdist(theirs.flatten(0, 1), p.weight()).argmin(1).view(ids.shape)
        yield f"{READ}the token ids are {instead(p, found, ids)}", lambda p: p.weight()[found]


def instead(p, found, usual):
    """Where numbers (B, S) read from the port differ from the usual ones, as text."""
    return listed(f"{found[b, s]:g} instead of {usual[b, s]:g} at token {s} of row {b}"
                  for b, s in (real(p) & (found != usual)).nonzero().tolist())


SCALES = {
    "the mean is subtracted: LayerNorm instead of RMSNorm":
        lambda x, eps: unit(x - x.mean(-1, keepdim=True), eps),
    "the variance takes the place of the mean of squares":
        lambda x, eps: x * (x.var(-1, correction=0, keepdim=True) + eps).rsqrt(),
    "the norm divides by the mean of squares, without the root":
        lambda x, eps: x / (x.square().mean(-1, keepdim=True) + eps),
    "ε is added after the root instead of before it":
        lambda x, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps)}


def norms(p, theirs):
    """A norm is a scaled input times a weight; either can differ."""
    yield "the norm is missing", source
    yield "the weight of the norm is missing", lambda p: norm(p, weight=1.0)
    yield "the norm multiplies by 1 + weight", lambda p: norm(p, weight=1 + p.weight())
    yield "the norm reads the input of the layer", lambda p: unit(
        p["stream"], p.config["rms_norm_eps"]) * p.weight()
    for text, scale in SCALES.items():
        yield text, lambda p, scale=scale: norm(p, scale)
    epsilons = [0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1e-2]
    if theirs is not None:
        x = source(p)
        measured = (x * p.weight() / theirs).square() - x.square().mean(-1, keepdim=True)
        epsilons += nice(measured.nanmedian().item())
    for eps in epsilons:
        yield f"rms_norm_eps is {eps:g}", lambda p, eps=eps: unit(source(p), eps) * p.weight()


def exchanged_sides(w):
    """The buffer of a weight, read with inputs and outputs exchanged."""
    return w.reshape(w.shape[::-1]).mT if w.ndim == 2 else w


def products(p, theirs):
    """Another input of a linear layer, or its buffer read with inputs and outputs exchanged."""
    yield ("the buffers of weights are read with inputs and outputs exchanged",
           lambda p: linear(p, exchanged_sides(p.weight())))
    for last in ("stream", "residual", "input_layernorm", "post_attention_layernorm", "o_proj"):
        yield f"the input is {last}", lambda p, last=last: linear(p, x=source(p, last))


def substitutes(p, theirs):
    """For each norm and linear layer, the weight or buffer that gives the port's numbers."""
    port, read = p.run.port, {}
    for name in port.tensors if theirs is not None else ():
        place = p.run.place(name)
        if place.word not in NORMS + LINEAR or place.inputs()[0] not in port.tensors:
            continue
        x, goal, step = source(place), port.tensors[name], norm if place.word in NORMS else linear
        for other, weight in port.weights.items():
            for how, w in (("", weight), (" transposed", weight.T if weight.ndim == 2 else weight),
                           (" with inputs and outputs exchanged", exchanged_sides(weight))):
                if w.shape == place.weight().shape and x.shape[:-1] == goal.shape[:-1]:
                    some = slice(64) if step is linear else slice(None)  # of many outputs
                    error = step(place, weight=w[some].double()) - goal[..., some]
                    if error.norm() < 1e-4 * goal[..., some].norm():
                        read.setdefault(name, (other.removesuffix(".weight") + how, w.double()))
    read = {name: found for name, found in read.items() if found[0] != name}
    if read:
        yield (READ + "other weights are used: " + listed(
            f"that of {short(other)} in {short(name)}" for name, (other, _) in read.items()),
            {name: lambda p, w=w: (norm if p.word in NORMS else linear)(p, weight=w)
             for name, (_, w) in read.items()})


def short(name):
    return re.sub(r"model\.|self_attn\.|block_sparse_moe\.", "", name)


HEAD_ROWS = {
    "the rows of each head are in Mistral's order, in which neighbours are pairs; convert the "
    "weights": lambda p: NEIGHBOURS.put(*HALVES.take(p.plain().unflatten(-1, (-1, p.d)))).flatten(
        -2),
    "the rows of each head are converted twice from Mistral's order": lambda p: HALVES.put(
        *NEIGHBOURS.take(p.plain().unflatten(-1, (-1, p.d)))).flatten(-2)}
HEAD_OUTPUTS = {
    "the heads are not transposed back: the rows of the heads follow one another":
        lambda p: linear(p, x=p["mixed"].transpose(1, 2).reshape(*p["mixed"].shape[:2], -1)),
    "o_proj reads the features of the heads in the order d·H instead of H·d":
        lambda p: linear(p, x=p["mixed"].transpose(2, 3).flatten(2))}
LOGITS = {"the logits are replaced by their softmax": lambda p: p.plain().softmax(-1),
          "the logits are replaced by their log-softmax": lambda p: p.plain().log_softmax(-1)}
CAPS = {f"it is capped as {c:g}·tanh(x/{c:g})": lambda p, c=c: (c * (p.plain() / c).tanh()).where(
    p.plain().isfinite(), p.plain()) for c in (30.0, 50.0)}


# ------------------------------------------------------------------ rotation


ROTATIONS = {
    "heads are not rotated": unrotated,
    "neighbours (2i, 2i + 1) are rotated as pairs instead of (i, i + d/2)":
        lambda p: rotated(p, take=NEIGHBOURS, put=NEIGHBOURS),
    "neighbours (2i, 2i + 1) are rotated as pairs and written to (i, i + d/2)":
        lambda p: rotated(p, take=NEIGHBOURS),
    "pairs (i, i + d/2) are rotated and written to neighbours (2i, 2i + 1)":
        lambda p: rotated(p, put=NEIGHBOURS),
    "only the first half of each head is rotated": lambda p: torch.cat(
        (rotated(p, angles(p, frequency=frequencies(p, d=p.d // 2)), unrotated(p)[..., :p.d // 2]),
         unrotated(p)[..., p.d // 2:]), -1),
    "the second half has the wrong sign: b·cos − a·sin": lambda p: torch.cat(
        (rotated(p).chunk(2, -1)[0], rotated(p, -angles(p)).chunk(2, -1)[1]), -1),
    "cosine and sine are exchanged": lambda p: rotated(p, math.pi / 2 - angles(p)),
    "cosine and sine are rounded to bfloat16": lambda p: turn(
        unrotated(p), *(x.bfloat16().double() for x in (angles(p).cos(), angles(p).sin())))}


def other_positions(p):
    """Rules for wrong positions, as (text, positions (B, S))."""
    at, first = positions(p), p.run.trace.first_position
    lengths = torch.tensor(p.run.trace.lengths)[:, None]
    for n in (1, -1, 2):
        yield f"positions are shifted by {n:+}", at + n
    yield "positions start at 0 instead of the first position", at - first
    yield "rows continue the positions of the row before", at + lengths.cumsum(0) - lengths
    yield "positions are columns of rows padded on the left", at + lengths.max() - lengths
    yield "positions are rounded to bfloat16", at.bfloat16().double()
    for calls in calls_of(p.run.trace):
        how, start = f", with {calls.text}", calls.start
        yield f"positions restart with each call{how}", at - start
        yield f"all tokens of a call get the position of its first one{how}", start + first
        for n in (1, -1):
            yield f"positions are shifted by {n:+} after the first call{how}", at + n * (start > 0)
        for C in {p.W, p.W + calls.size - 1} if p.W else ():
            yield f"slots are used as positions: p mod C{how} and C = {C}", at % C


def rotations(p, theirs):
    """Other positions or frequencies, by rule or read from the numbers."""
    usual, theta = angles(p), p.config["rope_theta"]
    found = [(text, angles(p, at)) for text, at in other_positions(p)]
    for n in (-1, 2, 1 / 2, 1 / 4, 1 / 8):
        found.append((f"angles are multiplied by {n:g}", n * usual))
    for text, other in [("", 1e4), ("", 1e5), ("", 5e5), ("", 1e6), (
            ", its root: the exponent of the frequency is i/d instead of 2i/d", math.sqrt(theta))]:
        found.append((f"rope_theta is {other:g}{text}", angles(
            p, frequency=frequencies(p, other))))
    for text, angle in found + ([] if theirs is None else [*read_angles(p, theirs)]):
        yield text, lambda p, angle=angle: rotated(p, angle)
    if theirs is not None:
        yield from read_table(p, theirs)


def turns(p, theirs):
    """The factors, as complex numbers (B, S, heads, d/2), by which the port turned its pairs."""
    mine, other = (torch.complex(*HALVES.take(x)) for x in (unrotated(p), theirs))
    best = mine.abs().argmax(2, keepdim=True)
    return other.gather(2, best) / mine.gather(2, best)


def read_angles(p, theirs):
    """Positions and frequencies by complex division, as (text, angles)."""
    z, at, f = turns(p, theirs), positions(p), frequencies(p)
    near = torch.arange(-2 * p.S, 2 * p.S + 1).double()
    tried = torch.cat((at[..., None] + near, near.expand(*at.shape, -1)), -1)
    error = (z - torch.polar(torch.ones_like(f), tried[..., None] * f)).abs().sum(-1)
    found = tried.gather(-1, error.nan_to_num(math.inf).argmin(-1, keepdim=True))[..., 0]
    yield f"{READ}positions are {instead(p, found, at)}", angles(p, found)
    if p.S == 1:
        return
    step = (z[:, 1:] / z[:, :-1])[real(p)[:, 1:]].angle().nanmedian(0)[0][0]
    for n in nice((step[0] / f[0]).item()):
        yield f"angles are multiplied by {n:g}", n * angles(p)
    for theta in nice(step[1].item() ** (-p.d / 2)) if len(f) > 1 and 0 < step[1] < 1 else ():
        yield f"rope_theta is {theta:g}", angles(p, frequency=frequencies(p, theta))
    text = ", ".join(f"{x:.6g}" for x in step.tolist())
    yield f"{READ}the frequencies of the pairs are {text}", angles(p, frequency=step)


def read_table(p, theirs):
    """All heads are turned alike, by angles that float32 could give."""
    table, angle = turns(p, theirs), angles(p)
    off = (table - torch.polar(torch.ones_like(angle), angle)).abs().nan_to_num()
    if unrotated(p).shape[2] > 1 and (  # so that another head confirms it
            off <= 4 * torch.finfo(torch.float32).eps * (1 + angle.abs())).all():
        yield ("angles are computed in float32, or cosines and sines are rounded to it",
               lambda p: torch.view_as_real(
                   torch.complex(*HALVES.take(unrotated(p))) * table).mT.flatten(-2))


# ------------------------------------------------------------------ scores, mask and softmax


def other_masks(p):
    """Rules for wrong masks, as (text, mask (B, S, T)): from a first to a last key."""
    i = torch.arange(p.S).expand(len(p.run.trace.lengths), -1)
    window, every = i - p.W + 1 if p.W else 0 * i, 0 * i + p.S
    yield "there is no window", visible(p, 0 * i)
    for n in (1, -1) if p.W else ():
        yield f"the window is off by one: {p.W + n} keys", visible(p, window - n)
    for text, last in ("to the next token", i + 1), ("without its own key", i - 1), (
            "and later tokens", every):
        yield f"queries see the keys of the window, {text}", visible(p, window, last)
    for calls in calls_of(p.run.trace):
        how, start, end = f", with {calls.text}", calls.start, calls.end
        yield f"a call does not see the keys of earlier calls{how}", visible(
            p, start.maximum(window))
        yield f"queries see later tokens of the same call{how}", visible(p, window, end - 1)
        yield f"calls after the first have no causal mask inside{how}", visible(p) | visible(
            p, start.where(start > 0, every), end - 1)
        yield f"all queries of a call use the mask of its first one{how}", visible(p).gather(
            1, start.clamp(max=p.S - 1)[..., None].expand(-1, -1, p.S))
        for C in range(max(calls.size, p.W), p.W + calls.size) if p.W else ():
            first, slot, size = (end - C).maximum(window), torch.arange(p.S) % C, f"{C} slots{how}"
            yield (f"the rolling buffer is too small: {size} lose keys that are needed",
                   visible(p, first))
            yield (f"the window is off by one in a buffer of {size}",
                   visible(p, (end - C).maximum(window - 1)))
            yield (f"slots are read as positions by the mask, {size}", visible(
                p, end - C, end - 1) & (slot <= i[..., None]) & (slot >= window[..., None]))


def attention_scores(p, theirs):
    """Another mask, or other queries, keys or functions of the scores."""
    yield "queries and keys are used without their rotation", lambda p: scores(
        p, q=p.heads("q_proj"), k=p.heads("k_proj"))
    yield "keys are used without their rotation, as if cached before it", lambda p: scores(
        p, k=p.heads("k_proj"))
    masks = [*other_masks(p), ("there is no mask: every query sees every token", None)]
    if theirs is not None:
        masks += read_mask(p, theirs > theirs.amax(-1, keepdim=True) - 104)
    for text, mask in masks:
        yield text, lambda p, mask=mask: unmasked(p) if mask is None else scores(p, mask)
    for calls in calls_of(p.run.trace):
        yield (f"keys are rotated again by every later call, with {calls.text}",
               lambda p, calls=calls: scores(p, k=rotated_again(p, calls)))
    masked = None if theirs is None else p.plain().isneginf() & theirs.isfinite()
    if masked is not None and masked.any():
        for text, x in (("masked scores are", theirs), ("the mask adds", theirs - unmasked(p))):
            value = x[masked].median().item()
            yield (f"{text} {value:.6g}, which the softmax does not turn into 0",
                   lambda p, value=value, text=text: p.plain().where(
                       p.plain().isfinite(), value + unmasked(p) * ("adds" in text)))


def unmasked(p):
    return scores(p, hide=False)


def rotated_again(p, calls):
    """Keys (B, S, T, K, d) as each query sees them, turned once more by every call in between."""
    again = (calls.number[:, :, None] - calls.number[:, None]).clamp(min=0)
    angle = angles(p)[:, None] * again[..., None, None]
    return turn(p["k_rotated"][:, None], angle.cos(), angle.sin())


def read_mask(p, seen):
    """The keys that the port's queries see, from (B, H, S, T), if all heads agree."""
    usual = p["scores"][:, 0] > -math.inf
    if (seen == seen[:, :1]).all():
        seen = seen[:, 0].where(real(p)[..., None], usual)
        other = (seen != usual).any(-1).nonzero().tolist()
        keys = listed(f"query {i} of row {b} sees the keys {spans(where(seen[b, i]))} instead of "
                      f"{spans(where(usual[b, i]))}" for b, i in other)
        yield f"{READ}{keys}", seen


SOFTMAX = {
    "the softmax has one more term e⁰ in its sum": lambda p: F.pad(
        p["scores"], (0, 1)).softmax(-1)[..., :-1],
    "the softmax runs over the queries instead of the keys": lambda p: p["scores"].softmax(-2),
    "the exponential has base 2 instead of e": lambda p: (p["scores"] * math.log(2)).softmax(-1),
    "the mask is applied after the softmax": lambda p: (
        unmasked(p).softmax(-1) * visible(p)[:, None]),
    "the exponentials are not divided by their sum": lambda p: (
        p["scores"] - p["scores"].amax(-1, keepdim=True)).exp()}
VALUES = {
    "keys take the place of values": lambda p: mixed(p, p["k_rotated"]),
    "values are rotated like keys": lambda p: mixed(p, rotated(p, x=p.heads("v_proj")))}


def read_softmax(p, theirs):
    for text, mask in () if theirs is None else read_mask(p, theirs > 0):
        yield text, lambda p, mask=mask: scores(p, mask).softmax(-1)


def read_values(p, theirs):
    """The keys that are visible, or padding among them."""
    if theirs is not None and p.S <= 128:
        for text, mask in read_mask(p, read_range(p, theirs)[:, None]):
            yield text, {"scores": lambda p, mask=mask: scores(p, mask)}
    if theirs is not None and p.layer == 0 and not real(p).all():
        yield from read_padding(p, theirs)


def read_range(p, theirs):
    """The range of keys (B, S, T) whose softmax gives each query's mixed values best."""
    s, H = unmasked(p), p.config["num_attention_heads"]
    e = (s - s.amax(-1, keepdim=True)).exp().permute(3, 0, 2, 1)[..., None]  # (T, B, S, H, 1)
    v = p.heads("v_proj").repeat_interleave(H // p.config["num_key_value_heads"], 2)
    v, start = v.transpose(0, 1)[:, :, None], torch.zeros_like(e[:1])  # (T, B, 1, H, d)
    total, sums = (torch.cat((start * x[:1], x.cumsum(0))) for x in (e, e * v))
    usual, best = visible(p), (p.plain() - theirs).flatten(2).norm(dim=-1) / 4
    found = torch.stack((usual.int().argmax(-1), usual.sum(-1) + usual.int().argmax(-1)), -1)
    for a, b in itertools.combinations(range(p.S + 1), 2):
        mean = (sums[b] - sums[a]) / (total[b] - total[a])
        error = (mean - theirs).flatten(2).norm(dim=-1).nan_to_num(math.inf)
        found[error < best], best = torch.tensor([a, b]), best.minimum(error)
    j = torch.arange(p.S)
    return (j >= found[..., :1]) & (j < found[..., 1:])


def read_padding(p, theirs):
    """The share of each query that went to the value of the token id 0, which pads."""
    x = unit(p.weight("embed_tokens")[0], p.config["rms_norm_eps"]) * p.weight("input_layernorm")
    H, K = p.config["num_attention_heads"], p.config["num_key_value_heads"]
    v = (p.weight("v_proj") @ x).view(K, p.d).repeat_interleave(H // K, 0)
    way = v - p.plain()
    share = ((theirs - p.plain()) * way).sum(-1, keepdim=True) / way.square().sum(-1, keepdim=True)
    yield (f"{READ}the padding is not masked: queries mix in the value of token id 0", lambda p:
           p.plain() + share * (v - p.plain()))


HEADS = {"query head h uses key/value head h mod K instead of h // (H/K)": lambda p: (
    scores if p.word == "scores" else mixed)(p, modulo=True)}


# ------------------------------------------------------------------ sums


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


# ------------------------------------------------------------------ router, experts and their sum


def choices(p, theirs):
    """Another rule for the experts of a token, also from the ranks of the port's choices."""
    E, A = p.config["num_local_experts"], p.config["num_experts_per_tok"]
    yield "of equal logits, the expert with the higher index is chosen", lambda p: (
        E - 1 - choose(p, p["gate"].flip(1))).where(real(p).view(-1, 1), -1)
    yield "the experts with the largest absolute logits are chosen", lambda p: choose(
        p, p["gate"].abs())
    yield "the ids of experts are counted from 1", lambda p: p.plain() + 1
    ranks = {f"{n} experts per token are chosen": list(range(n)) for n in (A + 1, A - 1, 1)}
    ranks["the experts with the smallest logits are chosen"] = list(range(E))[:-A - 1:-1]
    if theirs is not None:
        order = p["gate"].sort(dim=-1, descending=True, stable=True)[1].argsort(-1)
        ok = real(p).flatten() & ((theirs >= 0) & (theirs < E)).all(1)
        found = order[ok].gather(1, theirs[ok])[:1].flatten().tolist()
        ranks[f"{READ}the experts with the ranks {listed(found, 9)}, from 0, are chosen"] = found
        used = [x.flatten() for n, x in p.run.port.tensors.items() if n.endswith("chosen")]
        never = torch.tensor(sorted({*range(E)} - {*torch.cat(used).tolist()})).long()
        if len(never):
            yield f"the experts {spans(never.tolist())} are never chosen", lambda p: choose(
                p, p["gate"].index_fill(1, never, -math.inf))
    for text, which in ranks.items():
        if which and len(which) <= E and which != list(range(A)):
            yield text, lambda p, which=which: choose(p, p["gate"], which)


def over_all(p):
    return p["gate"].softmax(-1).gather(1, p["chosen"].clamp(min=0))


def by_rank(p, x):
    """Numbers in order of rank, for experts in order of their numbers."""
    return x.gather(1, p["chosen"].argsort(1).argsort(1))


BY_RANK = "the outputs in order of the experts are combined with weights in order of rank"
WEIGHTS = {
    "renormalisation is missing: a softmax over all experts": over_all,
    "logits are used without a softmax": chosen_logits,
    "all weights are 1/A": lambda p: torch.ones_like(p.plain()) / p.plain().shape[1],
    "a sigmoid takes the place of the softmax": lambda p: chosen_logits(p).sigmoid(),
    "a normalised sigmoid takes the place of the softmax":
        lambda p: F.normalize(chosen_logits(p).sigmoid(), p=1, dim=1),
    "the softmax is taken twice": lambda p: p.plain().softmax(-1),
    "the weights of the experts are in reverse order": lambda p: p.plain().flip(1),
    BY_RANK: lambda p: by_rank(p, p.plain())}


def read_temperature(p, theirs):
    """A factor of the logits before the softmax."""
    if theirs is not None and p.plain().shape[1] > 1:
        x = chosen_logits(p)
        slope = ((theirs[:, 0] / theirs[:, -1]).log() / (x[:, 0] - x[:, -1])).nanmedian().item()
        for t in nice(slope):
            yield f"{READ}the logits are multiplied by {t:g} before the softmax", lambda p, t=t: (
                chosen_logits(p) * t).softmax(-1)


def unweighted(p):
    return mixture(p, torch.ones_like(p["weights"]))


def weight_inside(p, theirs):
    """The routing weight inside an expert, and perhaps also in the sum."""
    words = ("w1", "w3") if p.word in ("w1", "w3") else (p.word,)
    inside = dict.fromkeys(words, lambda p: p.plain() * p.routing_weights())
    text = f"the routing weight multiplies {' and '.join(words)}"
    yield f"{text} instead of the terms of the sum", inside | {"block_sparse_moe": unweighted}
    yield f"{text} and also the terms of the sum", inside


ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu with tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": torch.relu, "relu²": lambda g: g.relu().square(), "a sigmoid": torch.sigmoid,
    "tanh": torch.tanh, "the identity": lambda g: g}
ARRANGEMENTS = {"{} takes the place of silu": lambda g, u, f: f(g) * u,
                "{} is applied to w3·x instead of w1·x": lambda g, u, f: f(u) * g,
                "{} is applied to the product of w1·x and w3·x": lambda g, u, f: f(g * u),
                "{} is not multiplied by w3·x": lambda g, u, f: f(g),
                "{} is multiplied by w3·x + 1": lambda g, u, f: f(g) * (u + 1)}


def activations(p, theirs):
    """Another function f in f(w1·x) ⊙ w3·x, or another arrangement of the two."""
    named = dict(ACTIVATIONS)
    if theirs is not None:  # f(g) = g·sigmoid(βg) with any β
        beta = ((theirs / p["w3"] / p["w1"]).logit() / p["w1"]).nanmedian().item()
        named |= {f"x·sigmoid({b:g}·x)": lambda g, b=b: g * (b * g).sigmoid() for b in nice(beta)}
    for (text, how), (name, f) in [*itertools.product(ARRANGEMENTS.items(), named.items())][1:]:
        yield text.format(name), lambda p, how=how, f=f: how(p["w1"], p["w3"], f)


def first_only(p):
    return torch.arange(p["weights"].shape[1]) == 0


MIXTURES = {
    "the outputs of the experts are added without weights": unweighted,
    "the weights of a softmax over all experts are used": lambda p: mixture(p, over_all(p)),
    "only the first expert is used": lambda p: mixture(p, 1.0 * first_only(p).expand_as(
        p["weights"])),
    "only the first expert is used, with its weight": lambda p: mixture(
        p, first_only(p) * p["weights"]),
    "the weights are applied twice": lambda p: mixture(p, p["weights"].square()),
    "the outputs are combined with the weights in reverse order":
        lambda p: mixture(p, p["weights"].flip(1)),
    BY_RANK: lambda p: mixture(p, by_rank(p, p["weights"])),
    "row r of an expert is combined with the weight of token r": lambda p: mixture(
        p, origin=lambda token: torch.arange(len(token))),
    "the rows of an expert are added to tokens 0, 1, 2, …": lambda p: mixture(
        p, target=lambda token: torch.arange(len(token))),
    "the output of an expert overwrites that of earlier ones":
        lambda p: mixture(p, add=Tensor.index_copy_),
    "all experts are used, weighted by a softmax over all": lambda p: torch.einsum(
        "ne,ned->nd", p["gate"].softmax(-1), all_outputs(p)).view_as(p["residual"])}


def all_outputs(p):
    """The output of every expert for every token, (N, E, D)."""
    x = p["post_attention_layernorm"].flatten(0, 1)
    return torch.stack([(F.silu(x @ p.weight("w1", e).T) * (x @ p.weight("w3", e).T))
                        @ p.weight("w2", e).T for e in range(p.config["num_local_experts"])], 1)


def read_mixture(p, theirs):
    """The weights of all experts in the port's sum, fitted for each token."""
    if theirs is None or not theirs.isfinite().all() or (
            p.config["num_local_experts"] >= p.config["hidden_size"]):
        return
    outputs, chosen = all_outputs(p), p["chosen"]
    usual = torch.zeros_like(p["gate"]).scatter_(
        1, chosen.clamp(min=0), p["weights"] * (chosen >= 0))
    found = torch.linalg.lstsq(outputs.mT, theirs.reshape(len(usual), -1, 1)).solution[..., 0]
    found = found.where((found - usual).abs() > 1e-4, usual).where(found.abs() > 1e-12, 0.0)
    text = listed(f"{found[n, e]:.4g} instead of {usual[n, e]:.4g} for expert {e} at token "
                  f"{n % p.S}" for n, e in (found != usual).nonzero().tolist())
    yield f"{READ}the weights of the sum are {text}", lambda p: torch.einsum(
        "ne,ned->nd", found, outputs).view_as(p["residual"])


GUESSES = [  # the quantities, and what is guessed about them
    ("embed_tokens", embeddings), (" ".join(NORMS), norms),
    *((words, products) for words in (*LINEAR, "q_proj k_proj v_proj", "gate w1 w3")),
    *((last, substitutes) for last in NORMS + LINEAR),
    ("q_proj k_proj", HEAD_ROWS), ("o_proj", HEAD_OUTPUTS), ("gate lm_head", LOGITS),
    ("gate lm_head scores", CAPS), ("q_rotated k_rotated", ROTATIONS),
    ("q_rotated k_rotated", rotations), ("scores", attention_scores), ("scores mixed", HEADS),
    ("probabilities", SOFTMAX), ("probabilities", read_softmax), ("mixed", VALUES),
    ("mixed", read_values), ("residual", sums), ("layer", sums), ("chosen", choices),
    ("weights", WEIGHTS), ("weights", read_temperature),
    *((name, weight_inside) for name in ("w1", "hidden", "w2")), ("hidden", activations),
    ("block_sparse_moe", MIXTURES), ("block_sparse_moe", read_mixture),
    *((name, factors) for name in STEPS if name not in ("chosen", "tokens")),
    ("q_proj k_proj v_proj", factors), (" ".join(NORMS), factors)]
