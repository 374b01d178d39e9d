"""What compare.py measures in a port's numbers, and the errors that it tries.

Each function in GUESSES belongs to some quantities. It gets a Place, and the port's numbers if they
differ in this very quantity, otherwise None. It yields pairs of a text and of what the port may
compute instead: a function of a Place, or a dict of such functions if several quantities change.
Whatever the numbers can tell is measured: positions, visible keys, the weights of a sum and so on.
Nothing here is a verdict. compare.py proves a guess by computing with it.
"""

import itertools
import math

import torch
from steps import (
    HALVES,
    LINEAR,
    NEIGHBOURS,
    STEPS,
    MissingError,
    Place,
    Run,
    angles,
    calls_of,
    choose,
    chosen_logits,
    expert_input,
    frequencies,
    head_map,
    linear,
    mixed,
    mixture,
    norm_input,
    positions,
    real,
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
                  for b, s in (real(p) & (found != usual)).nonzero().tolist())


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
    named, found = factor_names(p.config), {}
    for name, x in named.items():
        found[x] = f"{found[x]} or {name}" if x in found else f", which is {name}"
    if theirs is not None:
        a, b = (x[p.plain().isfinite() & theirs.isfinite()] for x in (p.plain(), theirs))
        x = ((a * b).sum() / a.square().sum()).item()
        same = [name for name, y in named.items() if abs(x / y - 1) < 1e-5]
        found = {x: f", which is {' or '.join(same)}" if same else ""} if x != 1 else {}
    elif p.word not in ("embed_tokens", "scores"):
        return
    for x, name in found.items():
        yield (f"it is multiplied by {x:.{6 if abs(x - 1) > 1e-5 else 15}g}{name}",
               lambda p, x=x: p.plain() * x)


# ------------------------------------------------------------------ embeddings, norms, products


def embeddings(p, theirs):
    """Rows of other token ids, or of another table."""
    ids, table = p.run.trace.tensors["tokens"], p.weight()
    yield "the rows of lm_head are used as embeddings", lambda p: p.weight("lm_head")[ids]
    found = {f"the embedding of token id {n:+} is read": (ids + n) % len(table) for n in (1, -1)}
    if theirs is not None:
        other = torch.cdist(theirs.flatten(0, 1), table).argmin(1).view(ids.shape)
        found[f"{READ}the token ids are {instead(p, other, ids)}"] = other
    for text, other in found.items():
        yield (text,
               lambda p, other=other: p.weight()[other])


def norms(p, theirs):
    """A norm is a scaled input times a weight; either can differ."""
    eps, last = p.config["rms_norm_eps"], p.word

    def square(x):
        return x.square().mean(-1, keepdim=True)
    scales = {
        "the mean is subtracted: LayerNorm instead of RMSNorm":
            lambda x: unit(x - x.mean(-1, keepdim=True), eps),
        "the variance, over D, takes the place of the mean of squares":
            lambda x: x * (x.var(-1, correction=0, keepdim=True) + eps).rsqrt(),
        "the variance, over D − 1, takes the place of the mean of squares":
            lambda x: x * (x.var(-1, keepdim=True) + eps).rsqrt(),
        "the norm divides by √(sum of squares) instead of √(mean of squares)":
            lambda x: unit(x, eps) / math.sqrt(x.shape[-1]),
        "the norm divides by the mean of squares, without the root":
            lambda x: x / (square(x) + eps),
        "ε is added after the root instead of before it": lambda x: x / (square(x).sqrt() + eps)}
    epsilons = [0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1e-2]
    if theirs is not None:
        x = norm_input(p)
        epsilons += nice(((x * p.norm_weight() / theirs).square() - square(x)).nanmedian().item())
    scales |= {f"rms_norm_eps is {e:g}": lambda x, e=e: unit(x, e) for e in epsilons if e >= 0}
    weights = {"the weight of the norm is missing": lambda p: 1.0,
               "the norm multiplies by 1 + weight": lambda p: 1 + p.norm_weight()}
    weights |= {f"the weight of {name.removesuffix('.weight')} is used": lambda p, w=w: w.double()
                for name, w in p.run.trace.weights.items() if w.ndim == 1}
    yield "the norm is missing", norm_input
    for text, f in scales.items():
        yield text, lambda p, f=f: f(norm_input(p)) * p.norm_weight()
    for text, weight in weights.items():
        yield text, lambda p, w=weight: unit(norm_input(p), eps) * w(p)
    if last == "norm":
        return
    a, b = "input_layernorm", "post_attention_layernorm"
    yield "the weights of the two norms of a layer are exchanged", {
        a: lambda p: unit(norm_input(p), eps) * p.norm_weight(b),
        b: lambda p: unit(norm_input(p), eps) * p.norm_weight(a)}
    yield "the mixture reads the input of the layer, parallel to the attention", {
        b: lambda p: unit(p["stream"], eps) * p.norm_weight()}


def exchanged_sides(w):
    """The buffer of a weight, read with inputs and outputs exchanged."""
    return w.reshape(w.shape[::-1]).T


def products(p, theirs):
    """Another weight or another input of linear layers."""
    yield ("the buffers of weights are read with inputs and outputs exchanged",
           lambda p: linear(p, exchanged_sides(p.weight())))
    for n in range(p.config["num_hidden_layers"]) if p.word != "lm_head" else ():
        yield f"the weight of layer {n} is used", lambda p, n=n: linear(p, p.weight(layer=n))
    for source in ("stream", "residual", "input_layernorm", "post_attention_layernorm", "o_proj"):
        yield f"the input is {source}", lambda p, s=source: from_stream(p, s)


def expert_weights(p, theirs):
    """The weights of a neighbouring expert."""
    E = p.config["num_local_experts"]
    for n in (1, -1):
        yield (f"the weights of expert e {n:+} are used for expert e",
               lambda p, n=n: linear(p, p.weight(expert=(p.expert + n) % E)))


def from_stream(p, source):
    """A linear layer with another input of width D."""
    x = expert_input(p, source) if p.word in ("w1", "w3") else p[source]
    return (x.flatten(0, 1) if p.word == "gate" else x) @ p.weight().T


def substitutes(p, theirs):
    """For all linear layers of one kind, the weight or buffer that gives the port's numbers."""
    port, read = p.run.port, {}
    alike = [n for n in port.tensors if Place(p.run, n).word == p.word]
    for name in alike if theirs is not None else ():
        others = {n: x for n, x in port.tensors.items() if n != name}
        place = Place(Run(port._replace(tensors=others), {}, others), name)
        try:
            x, own, goal = LINEAR[p.word](place), place.weight(), port.tensors[name]
        except (MissingError, RuntimeError, IndexError):
            continue
        for other, weight in port.weights.items():
            for how, w in (("", weight), (" transposed", weight.t() if weight.ndim < 3 else weight),
                           (" with inputs and outputs exchanged", exchanged_sides(weight))):
                if w.shape == own.shape and x.shape[:-1] == goal.shape[:-1] and (
                        x @ w.double().T - goal).norm() < 1e-4 * goal.norm():
                    read.setdefault(name, (other.removesuffix(".weight") + how, w.double()))
    read = {name: found for name, found in read.items() if found[0] != name}
    if read:
        yield (READ + "other weights are used: " + listed(
            f"that of {other} in {name}" for name, (other, _) in read.items()),
            {name: lambda p, w=w: linear(p, w) for name, (_, w) in read.items()})


def exchanged(p, theirs):
    """Two linear layers of equal shape in each other's place."""
    for a, b in (("q_proj", "k_proj"), ("k_proj", "v_proj"), ("q_proj", "v_proj"), ("w1", "w3")):
        if p.word in (a, b) and p.weight(a).shape == p.weight(b).shape:
            yield f"{a} and {b} are exchanged", {
                a: lambda p, b=b: linear(p, p.weight(b)), b: lambda p, a=a: linear(p, p.weight(a))}


def head_rows(p, theirs):
    """The rows of each head of q_proj and k_proj in another order."""
    for text, shape in (("in Mistral's order, in which neighbours are pairs; convert the weights",
                         (2, p.d // 2)), ("converted twice from Mistral's order", (p.d // 2, 2))):
        yield (f"the rows of each head are {text}", lambda p, shape=shape: p.plain().unflatten(
            -1, (-1, *shape)).transpose(-1, -2).flatten(-3))


def head_outputs(p, theirs):
    """The heads are joined in another order before o_proj."""
    for text, dims in (("the heads are not transposed back: the rows of the heads follow one "
                        "another", (1, 2)), ("o_proj reads the features of the heads in the order "
                                             "d·H instead of H·d", (2, 3))):
        yield text, lambda p, dims=dims: p["mixed"].transpose(*dims).reshape(
            *p["mixed"].shape[:2], -1) @ p.weight().T


def functions_of_logits(p, theirs):
    yield "the logits are replaced by their softmax", lambda p: p.plain().softmax(-1)
    yield "the logits are replaced by their log-softmax", lambda p: p.plain().log_softmax(-1)
    yield from caps(p)


def caps(p):
    for c in (30.0, 50.0):
        yield f"it is capped as {c:g}·tanh(x/{c:g})", lambda p, c=c: (
            c * (p.plain() / c).tanh()).where(p.plain().isfinite(), p.plain())


# ------------------------------------------------------------------ rotation


PAIRS = {"neighbours (2i, 2i + 1) are rotated as pairs instead of (i, i + d/2)":
         (NEIGHBOURS, NEIGHBOURS),
         "neighbours (2i, 2i + 1) are rotated as pairs and written to (i, i + d/2)":
         (NEIGHBOURS, HALVES),
         "pairs (i, i + d/2) are rotated and written to neighbours (2i, 2i + 1)":
         (HALVES, NEIGHBOURS)}


def other_positions(p):
    """Rules for wrong positions, as (text, positions (B, S))."""
    at, first = positions(p), p.run.trace.first_position
    lengths = torch.tensor(p.run.trace.lengths)[:, None]
    for n in (1, -1, 2):
        yield f"positions are shifted by {n:+}", at + n
    yield "positions start at 0 instead of the first position", at - first
    yield "rows continue the positions of the row before", at + lengths.cumsum(0) - lengths
    yield "positions are columns of rows padded on the left", at + lengths.max() - lengths
    for calls in calls_of(p.run.trace):
        how, start, later = f"with {calls.text}", calls.start, (calls.number > 0).double()
        yield f"positions restart with each call, {how}", at - start
        yield f"all tokens of a call get the position of its first one, {how}", start + first
        for n in (1, -1):
            yield f"positions are shifted by {n:+} after the first call, {how}", at + n * later
        for C in {p.W, p.W + calls.size - 1} if p.W else ():
            yield f"slots are used as positions: p mod C, {how} and C = {C}", at % C
    for dtype in (torch.bfloat16, torch.float16):
        yield f"positions are rounded to {str(dtype)[6:]}", at.to(dtype).double()


def other_angles(p):
    """Rules for wrong angles, as (text, angles (B, S, 1, d/2))."""
    usual, theta, x = angles(p), p.config["rope_theta"], torch.arange(0, p.d, 2).float() / p.d
    yield "heads are rotated the other way, by −angle", -usual
    yield "heads are rotated twice", 2 * usual
    yield "cosine and sine are exchanged", math.pi / 2 - usual
    yield "the exponent of the frequency is i/d instead of 2i/d", angles(
        p, frequency=frequencies(p, math.sqrt(theta)))
    for n in (2, 4, 8):
        yield f"positions are divided by {n} (linear RoPE scaling)", usual / n
    for other in sorted({1e4, 1e5, 5e5, 1e6} - {theta}):
        yield f"rope_theta is {other:g}", angles(p, frequency=frequencies(p, other))
    for how, f in (("θ^−x", torch.tensor(theta).float() ** -x), ("1/θ^x", 1 / theta ** x)):
        yield f"angles are computed in float32 ({how})", (
            positions(p).float()[..., None, None] * f).double()


def rotations(p, theirs):
    """Other pairs, positions or frequencies, by rule or read from the numbers."""
    yield "heads are not rotated", unrotated
    for text, (take, put) in PAIRS.items():
        yield text, lambda p, take=take, put=put: rotated(p, take=take, put=put)
    rules = [(text, angles(p, at)) for text, at in other_positions(p)]
    for text, angle in itertools.chain(
            rules, other_angles(p), () if theirs is None else read_angles(p, theirs)):
        yield text, lambda p, angle=angle: rotated(p, angle)
    whole = frequencies(p, d=p.d * unrotated(p).shape[2]).view(-1, p.d // 2)
    yield "only the first half of each head is rotated", lambda p: torch.cat(
        (rotated(p, angles(p, frequency=frequencies(p, d=p.d // 2)), unrotated(p)[..., :p.d // 2]),
         unrotated(p)[..., p.d // 2:]), -1)
    yield "all heads are rotated as one vector of H·d features", lambda p: rotated(
        p, angles(p, frequency=whole.flatten())[:, :, 0], unrotated(p).flatten(2)).view_as(
            unrotated(p))
    yield "the number of the head is used as position", lambda p: rotated(
        p, torch.arange(len(whole)).double()[:, None] * frequencies(p))
    yield "the second half has the wrong sign: b·cos − a·sin", lambda p: torch.cat(
        (rotated(p).chunk(2, -1)[0], rotated(p, -angles(p)).chunk(2, -1)[1]), -1)
    for dtype in (torch.bfloat16, torch.float16):
        yield f"cosine and sine are rounded to {str(dtype)[6:]}", lambda p, dtype=dtype: turn(
            unrotated(p), *(y.to(dtype).double() for y in (angles(p).cos(), angles(p).sin())))
    if theirs is not None and unrotated(p).shape[2] > 1:  # so that another head confirms it
        yield from read_table(p, theirs)


def turns(p, theirs):
    """The factors, as complex numbers (B, S, heads, d/2), by which the port turned its pairs."""
    x = unrotated(p)
    mine, other = (torch.complex(*HALVES.take(y)) for y in (x, theirs.reshape(x.shape)))
    best = mine.abs().argmax(2, keepdim=True)
    return other.gather(2, best) / mine.gather(2, best)


def read_angles(p, theirs):
    """Positions and frequencies by complex division."""
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
        yield f"{READ}angles are multiplied by {n:g}", n * angles(p)
    for theta in nice(step[1].item() ** (-p.d / 2)) if len(f) > 1 and 0 < step[1] < 1 else ():
        yield f"rope_theta is {theta:g}", angles(p, frequency=frequencies(p, theta))
    text = ", ".join(f"{x:.6g}" for x in step.tolist())
    yield f"{READ}the frequencies of the pairs are {text}", angles(p, frequency=step)


def read_table(p, theirs):
    """All heads are turned alike, by angles that float32 could give."""
    table, angle = turns(p, theirs), angles(p)
    off = (table - torch.polar(torch.ones_like(angle), angle)).abs().nan_to_num()
    if (off <= 4 * torch.finfo(torch.float32).eps * (1 + angle.abs())).all():
        yield (f"angles are computed in float32, or cosines and sines rounded to it: all heads "
               f"have the same, up to {off.max():.1g} from ours", lambda p: torch.view_as_real(
                   torch.complex(*HALVES.take(unrotated(p))) * table).mT.flatten(-2))


# ------------------------------------------------------------------ scores, mask and softmax


def masks(p):
    """Rules for wrong masks, as (text, mask (B, S, T)): from a first to a last key."""
    i = torch.arange(p.S).expand(len(p.run.trace.lengths), -1)
    window = i - p.W + 1 if p.W else 0 * i
    firsts, lasts = {}, {"": i, ", to the next token": i + 1, ", without its own key": i - 1,
                         ", and later tokens": 0 * i + p.S}
    if p.W:
        firsts = {"there is no window": 0 * i} | {
            f"the window is off by one: {p.W + n} keys": window - n for n in (1, -1)}
    for text, last in list(lasts.items())[1:]:
        yield f"queries see the keys of the window{text}", visible(p, window, last)
    for calls in calls_of(p.run.trace):
        how, start, end, number = f"with {calls.text}", calls.start, calls.end, calls.number
        firsts[f"a call does not see the keys of earlier calls, {how}"] = start.maximum(window)
        for C in range(max(calls.size, p.W), p.W + calls.size - 1) if p.W else ():
            text = f"the rolling buffer is too small: {C} slots {how} lose keys that are needed"
            firsts[text] = window.maximum(end - C)
            firsts[f"the window is off by one in a buffer of {C} slots, {how}"] = (
                window - 1).maximum(end - C)
        yield f"queries see later tokens of the same call, {how}", visible(p, window, end - 1)
        later = start.where(number > 0, 0 * i + p.S)
        yield (f"calls after the first have no causal mask inside, {how}",
               visible(p) | visible(p, later, end - 1))
        yield f"all queries of a call use the mask of its first one, {how}", visible(p).gather(
            1, start.clamp(max=p.S - 1)[..., None].expand(-1, -1, p.S))
        for C in {p.W, p.W + calls.size - 1} if p.W else ():
            slot = torch.arange(p.S) % C
            yield (f"slots are read as positions by the mask, {how} and {C} slots",
                   visible(p, end - C, end - 1) & (slot <= i[..., None])
                   & (slot > i[..., None] - p.W))
    for text, first in firsts.items():
        yield text, visible(p, first)


def attention_scores(p, theirs):
    """Another mask, or other queries, keys or functions of the scores."""
    yield "queries and keys are used without their rotation", lambda p: scores(
        p, q=p.heads("q_proj"), k=p.heads("k_proj"))
    yield "keys are used without their rotation, as if cached before it", lambda p: scores(
        p, k=p.heads("k_proj"))
    seen = [] if theirs is None else read_mask(
        p, theirs > theirs.amax(-1, keepdim=True) - 104)
    yield "there is no mask: every query sees every token", unmasked
    for text, mask in itertools.chain(masks(p), seen):
        yield text, lambda p, mask=mask: scores(p, mask)
    for calls in calls_of(p.run.trace):
        yield (f"keys are rotated again by every later call, with {calls.text}",
               lambda p, calls=calls: scores(p, k=rotated_again(p, calls)))
    yield from caps(p)
    masked = None if theirs is None else p.plain().isneginf() & theirs.isfinite()
    if masked is not None and masked.any():
        for text, x in (("masked scores are", theirs), ("the mask adds", theirs - unmasked(p))):
            value = x[masked].median().item()
            yield (f"{text} {value:.6g}, which the softmax does not turn into 0",
                   lambda p, value=value, text=text: p.plain().where(
                       p.plain().isfinite(), value + unmasked(p) * ("adds" in text)))


def unmasked(p):
    return scores(p, torch.ones_like(visible(p)), padding=True)


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
        keys = listed(f"query {i} of row {b} sees the keys {spans(where(seen[b, i]))} instead of "
                      f"{spans(where(usual[b, i]))}" for b, i in where((seen != usual).any(-1)))
        yield f"{READ}{keys}", seen


def where(mask):
    return mask.nonzero().squeeze(1).tolist()


def shares(p, theirs):
    """Another softmax over the keys."""
    yield "the softmax has one more term e⁰ in its sum", lambda p: torch.cat(
        (p["scores"], torch.zeros_like(p["scores"][..., :1])), -1).softmax(-1)[..., :-1]
    yield "the softmax runs over the queries instead of the keys", lambda p: p["scores"].softmax(-2)
    yield "the exponential has base 2 instead of e", lambda p: (
        p["scores"] * math.log(2)).softmax(-1)
    yield "the mask is applied after the softmax", lambda p: (
        unmasked(p).softmax(-1) * visible(p)[:, None])
    yield "the exponentials are not divided by their sum", lambda p: (
        p["scores"] - p["scores"].amax(-1, keepdim=True)).exp()
    for text, mask in () if theirs is None else read_mask(p, theirs > 0):
        yield text, lambda p, mask=mask: scores(p, mask).softmax(-1)


def mixed_values(p, theirs):
    """Other values, or other keys that are visible."""
    yield "keys take the place of values", lambda p: mixed(p, p["k_rotated"])
    yield "values are rotated like keys", lambda p: mixed(p, rotated(p, x=p.heads("v_proj")))
    if theirs is not None and p.S <= 128:
        for text, mask in read_mask(p, read_range(p, theirs)[:, None]):
            yield text, {"scores": lambda p, mask=mask: scores(p, mask)}


def read_range(p, theirs):
    """The range of keys (B, S, T) whose softmax gives each query's mixed values best."""
    s = unmasked(p)
    e = (s - s.amax(-1, keepdim=True)).exp().permute(3, 0, 2, 1)[..., None]  # (T, B, S, H, 1)
    v = p.heads("v_proj")[:, :, head_map(p)].transpose(0, 1)[:, :, None]  # (T, B, 1, H, d)
    start = torch.zeros_like(e[:1])
    total, sums = (torch.cat((start * x[:1], x.cumsum(0))) for x in (e, e * v))
    usual, best = visible(p), (p.plain() - theirs).flatten(2).norm(dim=-1) / 4
    found = torch.stack((usual.int().argmax(-1), usual.sum(-1) + usual.int().argmax(-1)), -1)
    for a, b in itertools.combinations(range(p.S + 1), 2):
        mean = (sums[b] - sums[a]) / (total[b] - total[a])
        error = (mean - theirs).flatten(2).norm(dim=-1).nan_to_num(math.inf)
        found[error < best], best = torch.tensor([a, b]), best.minimum(error)
    j = torch.arange(p.S)
    return (j >= found[..., :1]) & (j < found[..., 1:])


def head_order(p, theirs):
    """Query heads that share key/value heads in another order."""
    text = "query head h uses key/value head h mod K instead of h // (H/K)"
    changes = {"scores": lambda p: scores(p, modulo=True), "mixed": lambda p: mixed(p, modulo=True)}
    yield text, changes
    for last, change in changes.items():
        yield f"{text}, in {last} only", {last: change}


def left_padding(p, theirs):
    """The padding of each call is on the left and is not masked."""
    t = p.run.trace
    lengths, S = torch.tensor(t.lengths), p.S
    if len(set(t.lengths)) > 1:
        [calls] = calls_of(t) if t.calls else [None]
        width = calls.end - calls.start if calls else lengths[:, None].expand(-1, S)
        number = calls.number if calls else torch.zeros(len(lengths), S, dtype=torch.long)
        sizes = [int(width[real(p) & (number == n)].max()) for n in range(
            int(number[real(p)].max()) + 1)]
        ends = torch.tensor(sizes).cumsum(0)[number.clamp(max=len(sizes) - 1)]
        start = calls.start if calls else 0
        column = (ends - width + torch.arange(S) - start).clamp(0, sum(sizes) - 1)
        for by_column in (True, False):
            yield ("each call is padded on the left, and the padding is not masked; positions "
                   f"count {'columns' if by_column else 'tokens'}",
                   Moved(t, column, sum(sizes), real(p), by_column))


class Moved(Run):
    """A Run over wider rows, in which token s of our row b stands at column[b, s]."""

    def __init__(self, trace, column, width, real, by_column):
        ids, B = trace.tensors["tokens"], len(column)
        tokens, at = torch.zeros(2, B, width, dtype=torch.long)
        for b in range(B):
            tokens[b, column[b, real[b]]] = ids[b, real[b]]
            at[b, column[b, real[b]]] = torch.arange(int(real[b].sum())) + trace.first_position
        super().__init__(trace._replace(
            tensors={"tokens": tokens}, lengths=[width] * B, calls=None, chunk=width,
            positions=None if by_column else at))
        self.column = column

    def reach(self, name):
        x, B, last = super().reach(name), len(self.column), Place(self, name).word
        if last in ("scores", "probabilities", "tokens", "w1", "w3", "hidden", "w2"):
            raise MissingError(name)
        flat = last in ("gate", "chosen", "weights")
        rows = (x.unflatten(0, (B, -1)) if flat else x)[torch.arange(B)[:, None], self.column]
        return rows.flatten(0, 1) if flat else rows


# ------------------------------------------------------------------ residual stream


def sums(p, theirs):
    """a·x + b·y for two parts that a port may add."""
    y, normed = ("o_proj", "input_layernorm") if p.word == "residual" else (
        MOE, "post_attention_layernorm")
    x = "stream" if p.word == "residual" else "residual"
    pairs = list(itertools.combinations(dict.fromkeys((x, y, normed, "stream", "o_proj")), 2))
    for a, b in pairs:
        factors = [(1, 1), (1, 0), (0, 1), (2, 1), (1, 2)]
        if theirs is not None and theirs.isfinite().all():
            parts = torch.stack([p[a].flatten(), p[b].flatten()], 1)
            fit = torch.linalg.lstsq(parts, theirs.reshape(-1, 1)).solution[:, 0].tolist()
            factors = [[f if abs(f - round(f, 3)) > 1e-5 else round(f, 3) + 0.0 for f in fit]]
        for f, g in factors:
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
    ranks = {f"{n} experts per token are chosen": list(range(n)) for n in (A + 1, A - 1, 1, 2)}
    ranks["the experts with the smallest logits are chosen"] = list(range(E))[:-A - 1:-1]
    if theirs is not None:
        order = p["gate"].sort(dim=-1, descending=True, stable=True)[1].argsort(-1)
        own = theirs.long().reshape(len(order), -1)
        ok = real(p).flatten() & ((own >= 0) & (own < E)).all(1)
        found = order[ok].gather(1, own[ok])[:1].flatten().tolist()
        ranks[f"{READ}the experts with the ranks {listed(found, 9)}, from 0, are chosen"] = found
        usual, used = (set().union(*(x.flatten().tolist() for n, x in side.tensors.items()
                                     if n.endswith("chosen")))
                       for side in (p.run.trace, p.run.port))
        never = torch.tensor(sorted(usual - used - {-1})).long()
        yield f"the experts {spans(never.tolist())} are never chosen", lambda p: choose(
            p, p["gate"].index_fill(1, never, -math.inf))
    for text, which in ranks.items():
        if which and len(which) <= E and which != list(range(A)):
            yield text, lambda p, which=which: choose(p, p["gate"], which)


def over_all(p):
    return p["gate"].softmax(-1).gather(1, p["chosen"].clamp(min=0))


def routing_weights(p, theirs):
    """Another function of the logits of the chosen experts."""
    yield from {
        "renormalisation is missing: a softmax over all experts": over_all,
        "logits are used without a softmax": chosen_logits,
        "all weights are 1/A": lambda p: torch.ones_like(p.plain()) / p.plain().shape[1],
        "a sigmoid takes the place of the softmax": lambda p: chosen_logits(p).sigmoid(),
        "a normalised sigmoid takes the place of the softmax":
            lambda p: F.normalize(chosen_logits(p).sigmoid(), p=1, dim=1),
        "the softmax is taken twice": lambda p: p.plain().softmax(-1),
        "logits are divided by their sum instead of a softmax":
            lambda p: chosen_logits(p) / chosen_logits(p).sum(-1, keepdim=True),
        "the weights of the experts are in reverse order": lambda p: p.plain().flip(1)}.items()
    if theirs is not None and p.plain().shape[1] > 1:
        x = chosen_logits(p)
        slope = ((theirs[:, 0] / theirs[:, -1]).log() / (x[:, 0] - x[:, -1])).nanmedian().item()
        for t in nice(slope):
            yield f"{READ}the logits are multiplied by {t:g} before the softmax", lambda p, t=t: (
                chosen_logits(p) * t).softmax(-1)


def by_rank(p, theirs):
    """Weights in order of rank beside experts in order of their numbers."""
    def moved(p, x):
        return x.gather(1, p["chosen"].argsort(1).argsort(1))
    text = "the outputs in order of the experts are combined with weights in order of rank"
    yield text, {"weights": lambda p: moved(p, p.plain())}
    yield text, {MOE: lambda p: mixture(p, moved(p, p["weights"]))}


def unweighted(p):
    return mixture(p, torch.ones_like(p["weights"]))


def weight_inside(p, theirs):
    """The routing weight inside an expert, and perhaps also in the sum."""
    words, text = {"w1": (("w1", "w3"), "multiplies the input of the expert"),
                   "w3": (("w1", "w3"), "multiplies the input of the expert"),
                   "hidden": (("hidden",), "is inside `hidden`"),
                   "w2": (("w2",), "multiplies the output of w2")}[p.word]
    inside = dict.fromkeys(words, lambda p: p.plain() * p.routing_weights())
    yield f"the routing weight {text} instead of the terms of the sum", inside | {MOE: unweighted}
    yield f"the routing weight {text} and also the terms of the sum", inside


ACTIVATIONS = {
    "gelu": F.gelu, "gelu with tanh": lambda g: F.gelu(g, approximate="tanh"),
    "x·sigmoid(1.702·x)": lambda g: g * (1.702 * g).sigmoid(), "relu": torch.relu,
    "relu²": lambda g: g.relu().square(), "a sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "softplus": F.softplus, "mish": F.mish, "elu": F.elu, "hardswish": F.hardswish,
    "leaky relu": F.leaky_relu, "the identity": lambda g: g}


def activations(p, theirs):
    """Another function f in f(w1·x) ⊙ w3·x, or another arrangement of the two."""
    for name, f in ACTIVATIONS.items():
        yield f"{name} takes the place of silu", lambda p, f=f: f(p["w1"]) * p["w3"]
    arrangements = {"{} is applied to w3·x instead of w1·x": lambda g, u, f: f(u) * g,
                    "{} is applied to the product of w1·x and w3·x": lambda g, u, f: f(g * u),
                    "{} is not multiplied by w3·x": lambda g, u, f: f(g),
                    "{} is multiplied by w3·x + 1": lambda g, u, f: f(g) * (u + 1)}
    named = {"silu": F.silu} | (ACTIVATIONS if theirs is not None else {})
    for (text, how), (name, f) in itertools.product(arrangements.items(), named.items()):
        yield text.format(name), lambda p, how=how, f=f: how(p["w1"], p["w3"], f)


def combinations(p, theirs):
    """Other routing weights, rows or experts in the sum."""
    first = torch.arange(p["weights"].shape[1]) == 0
    yield from {
        "the outputs of the experts are added without weights": unweighted,
        "the weights of a softmax over all experts are used": lambda p: mixture(p, over_all(p)),
        "only the first expert is used": lambda p: mixture(p, first * torch.ones_like(
            p["weights"])),
        "only the first expert is used, with its weight": lambda p: mixture(
            p, first * p["weights"]),
        "the weights are applied twice": lambda p: mixture(p, p["weights"].square()),
        "the outputs are combined with the weights in reverse order":
            lambda p: mixture(p, p["weights"].flip(1)),
        "row r of an expert is combined with the weight of token r": lambda p: mixture(
            p, source=lambda token: torch.arange(len(token))),
        "the rows of an expert are added to tokens 0, 1, 2, …": lambda p: mixture(
            p, target=lambda token: torch.arange(len(token))),
        "the output of an expert overwrites that of earlier ones":
            lambda p: mixture(p, add=Tensor.index_copy_),
        "all experts are used, weighted by a softmax over all": lambda p: torch.einsum(
            "ne,ned->nd", p["gate"].softmax(-1), all_outputs(p)).view_as(p["residual"])}.items()
    for c in range(1, int(p["chosen"].flatten().clamp(min=0).bincount().max())):
        for text, by_rank in (("the first ones", 0), ("first choices first", 1)):
            yield (f"an expert takes no more than {c} tokens, {text}; others are dropped",
                   lambda p, c=c, by_rank=by_rank: mixture(p, keep=lambda token, rank: (
                       by_rank * rank * len(p["chosen"]) + token).argsort().argsort() < c))
    if theirs is not None and theirs.isfinite().all():
        yield from read_combination(p, theirs)


def all_outputs(p):
    """The output of every expert for every token, (N, E, D)."""
    x = p["post_attention_layernorm"].flatten(0, 1)
    return torch.stack([(F.silu(x @ p.weight("w1", e).T) * (x @ p.weight("w3", e).T))
                        @ p.weight("w2", e).T for e in range(p.config["num_local_experts"])], 1)


def read_combination(p, theirs):
    """The weights of all experts in the port's sum, fitted for each token."""
    outputs, chosen = all_outputs(p), p["chosen"]
    usual = torch.zeros_like(p["gate"]).scatter_(
        1, chosen.clamp(min=0), p["weights"] * (chosen >= 0))
    if outputs.shape[1] < outputs.shape[2]:
        found = torch.linalg.lstsq(outputs.mT, theirs.reshape(len(usual), -1, 1)).solution[..., 0]
        found = found.where((found - usual).abs() > 1e-4, usual)
        text = listed(f"{found[n, e]:.4g} instead of {usual[n, e]:.4g} for expert {e} at token "
                      f"{n % p.S}" for n, e in (found != usual).nonzero().tolist())
        yield f"{READ}the weights of the sum are {text}", lambda p: torch.einsum(
            "ne,ned->nd", found, outputs).view_as(p["residual"])


GUESSES = [  # the quantities, and what is guessed about them
    ("embed_tokens", embeddings), (NORMS, norms),
    *((name, guess) for name in LINEAR for guess in (products, substitutes)),
    ("q_proj k_proj v_proj", products),
    ("gate w1 w3", products), (" ".join(LINEAR), products), ("w1 w3 w2", expert_weights),
    *((name, exchanged) for name in ("q_proj", "k_proj", "w1")), ("q_proj k_proj", head_rows),
    ("o_proj", head_outputs), ("gate lm_head", functions_of_logits), (ROTATED, rotations),
    ("scores", attention_scores), ("scores mixed", head_order),
    ("probabilities", shares), ("mixed", mixed_values), ("residual", sums), ("layer", sums),
    ("chosen", choices), ("weights", routing_weights), ("weights block_sparse_moe", by_rank),
    *((name, weight_inside) for name in ("w1", "hidden", "w2")), ("hidden", activations),
    *((name, factors) for name in STEPS if name not in ("chosen", "tokens")),
    ("q_proj k_proj v_proj", factors), (MOE, combinations),
    ("q_rotated k_rotated mixed", left_padding)]
