"""Where and why a port differs: `python tests/oracle/compare.py OURS THEIRS`.

OURS is a trace of `generate.py --trace` or a golden file; THEIRS any safetensors file with some of
the same names, in any float dtype, with or without the axis B, heads and features joined or apart.
`--names FILE` maps their names to ours, as a JSON object. Tensors are compared in the order of
computation. A row is the vector of one token (for scores, of one query); its error is the length of
the difference by the usual length of a row of that tensor: single small elements of a sum have no
relative accuracy, rows have.

Without --rtol and --atol a row's error is rounding, and no more, up to
    64 · (n + 1) · ε     in layer n, ε of the lower dtype of the two, and up to
    16 · the largest error before it, or 64 · ε:
what enters an operation may leave it larger, but an error that jumps was made there. Within the
second bound but beyond the first it is drift. A cause is named only if it was tested: what theirs
would be by that error, computed from ours, is at least 8 times nearer to theirs than ours is.

Another choice of experts is a flip, and no error, where the router logits differ by as much as the
margin. What it can have touched, that token and from the next layer on those after it, is left out.

Exit codes: 0 equal within rounding, 1 not, 2 not comparable.
"""

import argparse
import itertools
import json
import math
import re
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

from generate import axes

JUMP, FLOOR, NEARER = 16, 64, 8
LABELS = {"H": "head", "K": "key head", "d": "feature", "D": "feature", "F": "feature",
          "E": "expert", "k": "choice", "V": "token id", "T": "key"}
DERIVED = ("margin", "tokens")  # say no more than the gate and the choice do


class Incomparable(Exception):
    """Why two files cannot be compared, in a line."""


def stored(path):
    """Metadata and tensors of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise Incomparable(f"{path}: not a safetensors file: {error}") from None


def word(name):
    """What a quantity is, as AXES calls it."""
    last = name.rpartition(".")[2]
    return "layer" if last.isdecimal() else last


def layer_of(name):
    found = re.match(r"model\.layers\.(\d+)", name)
    return int(found[1]) if found else None


def bare(shape):
    return [n for n in shape if n != 1]


def reshaped(theirs, ours):
    """Theirs in the shape of ours, where only axes of length one and joined axes differ."""
    if theirs.numel() != ours.numel():
        return None
    short, long = sorted((bare(theirs.shape), bare(ours.shape)), key=len)
    at = 0
    for n in short:
        size = 1
        while size < n and at < len(long):
            size, at = size * long[at], at + 1
        if size != n:
            return None
    return theirs.reshape(ours.shape)


class Pair:
    """Two traces: ours whole, theirs by our names as far as it goes."""

    def __init__(self, ours, theirs, names):
        self.metadata, self.ours = stored(ours)
        if self.metadata.get("format") != "mixtral-trace" or self.metadata.get("version") != "1":
            raise Incomparable(f"{ours}: wanted a trace of generate.py, version 1, got "
                               f"{self.metadata.get('format')} {self.metadata.get('version')}")
        self.config = json.loads(self.metadata["config"])
        _, found = stored(theirs)
        self.theirs = {names.get(name, name): x for name, x in found.items()}
        self.order = [name for name, *_ in json.loads(self.metadata["order"])]
        self.shared = [name for name in self.order if name in self.theirs and name != "tokens"]
        self.unknown = sorted(name for name in set(self.theirs) - set(self.order)
                              if not name.endswith(".weight") and ".experts." not in name)
        self.check_tokens()
        if not self.shared:
            raise Incomparable(f"{theirs}: none of our names, as {self.order[1]}; it has "
                               f"{', '.join(sorted(found)[:3])}; see --names")
        self.lengths = json.loads(self.metadata.get("lengths", "null")) or (
            [self.ours["tokens"].shape[1]] * len(self.ours["tokens"]))
        floats = [x.dtype for name in self.shared for x in (self.ours[name], self.theirs[name])
                  if x.is_floating_point()]
        self.dtype = max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)
        self.eps = torch.finfo(self.dtype).eps

    def check_tokens(self):
        theirs = self.theirs.get("tokens")
        if theirs is not None and theirs.flatten().tolist() != self.ours["tokens"].flatten(
                ).tolist():
            raise Incomparable(f"tokens differ: ours {self.ours['tokens'].flatten().tolist()}, "
                               f"theirs {theirs.flatten().tolist()}")

    def mine(self, name):
        """A tensor of ours in float64."""
        return self.ours[name].double()

    def before(self, name):
        """What entered the norm or the layer of that name: the residual stream before it."""
        n = layer_of(name)
        if word(name) == "post_attention_layernorm":
            return self.mine(f"model.layers.{n}.residual")
        last = (n if n is not None else self.config["num_hidden_layers"]) - 1
        return self.mine(f"model.layers.{last}" if last >= 0 else "model.embed_tokens")


def as_rows(x, letters):
    """One row a token, the other axes behind it: (B, S, …), (B, H, S, T) or (N, …) -> (N, …)."""
    if letters[:2] == ["B", "S"]:
        return x.flatten(0, 1)
    if letters == ["B", "H", "S", "T"]:
        return x.transpose(1, 2).flatten(0, 1)
    return x


def tokens_of(pair, name):
    """The token, counted through the batch, that each row of a tensor belongs to."""
    if axes(name)[0] == "visits":
        return pair.ours[name.rpartition(".")[0] + ".tokens"]
    S = pair.ours["tokens"].shape[1]
    return torch.arange(len(pair.lengths) * S)


def errors(ours, theirs):
    """Each row's length of difference by the usual length of a row; ∞ where masks differ."""
    masked = ours == -math.inf
    hidden = theirs <= -1e9  # as ports write −∞
    ours, theirs = ours.masked_fill(masked, 0), theirs.masked_fill(masked & hidden, 0)
    scale = ours.flatten(1).square().sum(1).mean().sqrt().clamp(min=1e-300)
    found = (ours - theirs).flatten(1).norm(dim=1) / scale
    return found.masked_fill((masked != hidden).flatten(1).any(1), math.inf).nan_to_num(
        math.inf, math.inf)


def in_order(pair, name, theirs):
    """The weights of theirs in the order in which ours chose, where theirs says what it chose."""
    chosen = name.replace("weights", "chosen")
    if word(name) != "weights" or chosen not in pair.theirs:
        return theirs
    mine, other = pair.ours[chosen], pair.theirs[chosen].reshape(pair.ours[chosen].shape).long()
    slots = (mine[:, :, None] == other[:, None]).double().argmax(-1)
    return theirs.gather(1, slots)


def visits_aligned(pair, name, ours, theirs):
    """Rows of one expert for the tokens that both sent to it, and those tokens."""
    at = name.rpartition(".")[0]
    mine, other = pair.ours[at + ".tokens"], pair.theirs.get(at + ".tokens")
    if other is None:
        chosen = pair.theirs.get(at.partition(".experts.")[0] + ".chosen")
        if chosen is None:
            return ours, reshaped(theirs, ours), mine
        e = int(at.rpartition(".")[2])
        other = (chosen.reshape(-1, chosen.shape[-1]) == e).any(1).nonzero()[:, 0]
    other = other.flatten().long()
    if theirs.numel() != len(other) * ours[0].numel():
        return ours, None, mine
    theirs = theirs.reshape(len(other), *ours.shape[1:])
    both = torch.tensor(sorted(set(mine.tolist()) & set(other.tolist())), dtype=torch.int64)
    pick = [[int((x == token).nonzero()[0]) for token in both.tolist()] for x in (mine, other)]
    return ours[pick[0]], theirs[pick[1]], both


def both(pair, name):
    """Rows of ours and of theirs in float64 and their tokens; theirs is None if no shape fits."""
    ours, theirs = pair.mine(name), pair.theirs[name].double()
    if axes(name)[0] == "visits":
        return visits_aligned(pair, name, ours, theirs)
    theirs = reshaped(theirs, ours)
    if theirs is None:
        return as_rows(ours, axes(name)), None, tokens_of(pair, name)
    theirs = in_order(pair, name, theirs)
    return *(as_rows(x, axes(name)) for x in (ours, theirs)), tokens_of(pair, name)


# Hypotheses: each yields words, and what theirs would be if they were true.


def turned(x, theta, offset=0, neighbours=False, sign=1):
    """The rotation of (B, S, heads, d) by other rules than ours."""
    d = x.shape[-1]
    position = torch.arange(x.shape[1], dtype=torch.float64) + offset
    angle = sign * position[:, None] * theta ** (-torch.arange(0, d, 2).double() / d)
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    a, b = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return torch.stack((a, b), -1).flatten(-2) if neighbours else torch.cat((a, b), -1)


def rotations(pair, name, theirs):
    projected = pair.mine(name.replace("_rotated", "_proj"))
    x = projected.unflatten(-1, (-1, pair.config["head_dim"]))
    theta = pair.config["rope_theta"]
    yield "not rotated", x
    yield "pairs of neighbours (2i, 2i + 1) rotated instead of halves (i, i + d/2)", turned(
        x, theta, neighbours=True)
    yield "rotated the other way: −angle", turned(x, theta, sign=-1)
    for offset in (1, -1, 2):
        yield f"positions shifted by {offset:+}", turned(x, theta, offset)
    for other in {1e4, 1e5, 5e5, 1e6, solved_theta(x, theirs)} - {theta, None}:
        yield f"rope_theta {other:g} instead of {theta:g}", turned(x, other)


def solved_theta(x, theirs):
    """The θ that turns token 1's second pair as theirs, if there is one."""
    if theirs is None or x.shape[1] < 2 or x.shape[-1] < 4:
        return None
    d = x.shape[-1]
    pairs = [torch.complex(*(part[0, 1, 0, 1] for part in y.chunk(2, -1)))
             for y in (x, theirs.reshape(x.shape))]
    angle = (pairs[1] / pairs[0]).angle().item()
    return float(f"{angle ** (-d / 2):.3g}") if 0 < angle < 1 else None


def permutations(pair, name, theirs):
    d = pair.config["head_dim"]
    heads = pair.mine(name).unflatten(-1, (-1, d))
    yield ("rows of each head in Mistral's order: neighbours are pairs; convert the weights",
           heads.unflatten(-1, (2, d // 2)).transpose(-1, -2).flatten(-3))
    yield ("rows of each head permuted once too often", heads.unflatten(
        -1, (d // 2, 2)).transpose(-1, -2).flatten(-3))
    yield from exchanged(pair, name, {"q_proj": [], "k_proj": ["v_proj"], "v_proj": ["k_proj"]})


def exchanged(pair, name, others):
    for other in others[word(name)]:
        x = pair.ours.get(name.rpartition(".")[0] + "." + other)
        if x is not None and x.shape == pair.ours[name].shape:
            yield f"{word(name)} and {other} swapped", x.double()


def attended(pair, name, what, scale=1.0, tiled=False, extra=0, causal=True, window=True):
    """Scores, probabilities or mixed values by other rules than ours, from q, k and v."""
    at, c = name.rpartition(".")[0], pair.config
    q, k = pair.mine(at + ".q_rotated"), pair.mine(at + ".k_rotated")
    v = pair.mine(at + ".v_proj").unflatten(-1, (-1, c["head_dim"]))
    H, K, S = q.shape[2], k.shape[2], q.shape[1]
    shared = torch.arange(H) % K if tiled else torch.arange(H) // (H // K)
    i, j = torch.arange(S)[:, None], torch.arange(S)
    mask = (j <= i) if causal else torch.ones(S, S, dtype=torch.bool)
    if window and c["sliding_window"]:
        mask = mask & (j > i - c["sliding_window"] - extra)
    scores = torch.einsum("bshd,bthd->bhst", q, k[:, :, shared]) * scale / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, -math.inf)
    if what == "scores":
        return scores
    shares = scores.softmax(-1).nan_to_num(0.0)
    return shares if what == "probabilities" else torch.einsum(
        "bhst,bthd->bshd", shares, v[:, :, shared])


def attentions(pair, name, theirs):
    what, d, W = word(name), pair.config["head_dim"], pair.config["sliding_window"]
    yield "scores not divided by √d", attended(pair, name, what, scale=math.sqrt(d))
    yield "scores divided by d instead of √d", attended(pair, name, what, scale=d ** -0.5)
    yield "query head h uses key head h mod K instead of h // (H/K)", attended(
        pair, name, what, tiled=True)
    yield "queries see later tokens: no causal mask", attended(pair, name, what, causal=False)
    yield "no mask: every query sees every token", attended(
        pair, name, what, causal=False, window=False)
    if W:
        for extra in (1, -1):
            yield (f"window off by one: {W + extra} keys instead of {W}",
                   attended(pair, name, what, extra=extra))
        yield f"no window: all earlier keys instead of {W}", attended(
            pair, name, what, window=False)


def norms(pair, name, theirs):
    x, y, eps = pair.before(name), pair.mine(name), pair.config["rms_norm_eps"]

    def unit(x, eps):
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    # The weight follows from ours, where no feature is always zero.
    weight = (y * unit(x, eps)).flatten(0, -2).sum(0) / unit(x, eps).square().flatten(0, -2).sum(0)
    yield "the norm is missing", x
    yield "the norm's weight is missing", unit(x, eps)
    yield "the norm's weight is 1 + weight", unit(x, eps) * (1 + weight)
    yield "LayerNorm instead of RMSNorm", unit(x - x.mean(-1, keepdim=True), eps) * weight
    yield "divided by the sum of squares, not by their mean", unit(x, eps) * weight / math.sqrt(
        x.shape[-1])
    for other in (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1e-2):
        if other != eps:
            yield f"rms_norm_eps {other:g} instead of {eps:g}", unit(x, other) * weight


def residuals(pair, name, theirs):
    at = f"model.layers.{layer_of(name)}"
    inside = word(name) == "residual"
    added = pair.mine(f"{at}.self_attn.o_proj" if inside else f"{at}.block_sparse_moe")
    x = pair.before(f"{at}.input_layernorm") if inside else pair.mine(f"{at}.residual")
    norm = pair.mine(f"{at}.input_layernorm" if inside else f"{at}.post_attention_layernorm")
    what = "attention" if inside else "mixture"
    yield "the residual stream is not added", added
    yield f"the {what} is not added", x
    yield f"the {what} is added to the normed stream", norm + added
    yield f"the {what} is added twice", x + 2 * added


def routings(pair, name, theirs):
    logits = pair.mine(name.replace("weights", "gate"))
    chosen = pair.ours[name.replace("weights", "chosen")]
    k, raw = chosen.shape[1], logits.gather(1, chosen)
    yield ("missing renormalisation: softmax over all experts, and no more",
           logits.softmax(-1).gather(1, chosen))
    yield "router logits used without a softmax", raw
    yield "equal weights", torch.full_like(raw, 1 / k)
    yield "sigmoid instead of softmax", raw.sigmoid()
    yield "sigmoid, normalised, instead of softmax", F.normalize(raw.sigmoid(), p=1, dim=1)
    yield "softmax taken twice", raw.softmax(-1).softmax(-1)
    yield "the weights of the experts are exchanged", pair.mine(name).flip(1)


def gates(pair, name, theirs):
    yield from exchanged(pair, name, {"w1": ["w3"], "w3": ["w1"]})


def hiddens(pair, name, theirs):
    at = name.rpartition(".")[0]
    gate, up = pair.mine(at + ".w1"), pair.mine(at + ".w3")
    yield "w1 and w3 swapped: silu is w1's", F.silu(up) * gate
    yield "no silu", gate * up
    yield "gelu instead of silu", F.gelu(gate) * up
    yield "tanh-gelu instead of silu", F.gelu(gate, approximate="tanh") * up
    yield "relu instead of silu", F.relu(gate) * up
    yield "w3 is missing", F.silu(gate)
    yield "sigmoid instead of silu", gate.sigmoid() * up


def mixtures(pair, name, theirs):
    chosen, weights = pair.ours[name + ".chosen"], pair.mine(name + ".weights")
    logits = pair.mine(name + ".gate")

    def mixed(share):
        y = torch.zeros(len(chosen), pair.ours[name].shape[-1], dtype=torch.float64)
        for e in range(logits.shape[1]):
            if f"{name}.experts.{e}.w2" in pair.ours:
                tokens = pair.ours[f"{name}.experts.{e}.tokens"]
                slot = (chosen[tokens] == e).long().argmax(-1)
                y[tokens] += share[tokens, slot][:, None] * pair.mine(f"{name}.experts.{e}.w2")
        return y.view_as(pair.ours[name])

    first = torch.zeros_like(weights)
    first[:, 0] = 1
    yield "the experts are added without weights", mixed(torch.ones_like(weights))
    yield ("missing renormalisation: weights of a softmax over all experts",
           mixed(logits.softmax(-1).gather(1, chosen)))
    yield "only the first expert is used", mixed(first)
    yield "only the first expert is used, with its weight", mixed(first * weights)
    yield "weights applied twice", mixed(weights.square())
    yield "the weights of the experts are exchanged", mixed(weights.flip(1))


def anywhere(pair, name, theirs):
    """What may happen to any quantity: other axes, other tokens, another factor."""
    ours = pair.mine(name)
    raw, letters = pair.theirs[name].double(), axes(name)
    apart = ours.unflatten(-1, (-1, pair.config["head_dim"])) if "·" in letters[-1] else ours
    for source, how in itertools.product((apart, ours), itertools.permutations(range(apart.ndim))):
        if len(how) == source.ndim and list(how) != sorted(how) and (
                bare(source.permute(how).shape) == bare(raw.shape)
                or theirs is not None and source is apart is not ours):
            try:
                back = raw.reshape(source.permute(how).shape).permute(
                    sorted(range(len(how)), key=how.__getitem__))
            except RuntimeError:
                continue
            # As theirs cannot be put beside ours, ours is put beside theirs, and both come back.
            yield "transposed: its axes are in another order", (source.reshape(ours.shape),
                                                               back.reshape(ours.shape))
    if theirs is None:
        return
    if "S" in letters:
        at = letters.index("S")
        for by in (1, -1):
            yield f"shifted by {by:+} token", ours.roll(by, at), by
    if (ours.isfinite() & theirs.isfinite()).all() and ours.square().sum() > 0:
        factor = ((ours * theirs).sum() / ours.square().sum()).item()
        yield f"multiplied by {factor:.4g}", ours * factor


HYPOTHESES = {
    "q_rotated": rotations, "k_rotated": rotations, "q_proj": permutations,
    "k_proj": permutations, "v_proj": permutations, "scores": attentions,
    "probabilities": attentions, "mixed": attentions, "input_layernorm": norms,
    "post_attention_layernorm": norms, "norm": norms, "residual": residuals, "layer": residuals,
    "weights": routings, "w1": gates, "w3": gates, "hidden": hiddens, "block_sparse_moe": mixtures}


def candidates(pair, name, theirs):
    """Words, our rows by that hypothesis and their rows to hold them against."""
    own = HYPOTHESES.get(word(name))
    for source in (own, anywhere):
        try:
            for words, x, *more in source(pair, name, theirs) if source else ():
                mine, other = x if isinstance(x, tuple) else (x, theirs)
                if other is not None and mine.shape == other.shape:
                    rows = [as_rows(y, axes(name)) for y in (mine, other)]
                    yield words, *rows, (more or [0])[0]
        except KeyError:  # a layer before, or another quantity, is not in our trace
            continue


def cause(pair, name, error):
    """The hypothesis that is nearest to theirs, if it is much nearer than ours, and how near."""
    theirs = pair.theirs[name].double()
    shaped = reshaped(theirs, pair.ours[name])
    if shaped is not None:
        shaped = in_order(pair, name, shaped)
    S, best = pair.ours["tokens"].shape[1], (math.inf, None)
    for words, mine, other, by in candidates(pair, name, shaped):
        found = errors(mine, other)
        if by and axes(name)[0] != "visits":  # a shift says nothing of the row that falls out
            kept = torch.arange(len(found)) % S
            found = found[(kept != 0) if by > 0 else (kept != S - 1)]
        best = min(best, (found.max().item() if len(found) else math.inf, words),
                   key=lambda pair: pair[0])
    near = max(FLOOR * pair.eps, min(error, 1) / NEARER)
    return best if best[0] <= near else lower_precision(theirs, pair.mine(name), error)


def lower_precision(theirs, ours, error):
    """Rounding to a shorter dtype, proved by their numbers having no more bits than it holds."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if theirs.is_floating_point() and theirs.to(dtype).double().equal(theirs):
            if error < 4 * torch.finfo(dtype).eps:
                return error, f"rounded to {str(dtype)[6:]} here"
            return math.inf, None
    return math.inf, None


def flips(pair, name, clean):
    """Tokens whose set of experts differs: (token, margin, whether that is no near tie)."""
    mine, other = pair.ours[name], pair.theirs[name].long()
    if other.numel() != mine.numel():
        raise Incomparable(f"{name}: ours chose {list(mine.shape)}, theirs {list(other.shape)}")
    other, logits = other.reshape(mine.shape), pair.mine(name.replace("chosen", "gate"))
    apart = (mine.sort(-1)[0] != other.sort(-1)[0]).any(-1) & clean
    gate = pair.theirs.get(name.replace("chosen", "gate"))
    gate = None if gate is None else reshaped(gate.double(), logits)
    for token in apart.nonzero()[:, 0].tolist():
        # The gap in our logits that theirs must have closed to choose otherwise.
        gap = logits[token, mine[token]].min() - logits[token, other[token]].min()
        allowed = FLOOR * pair.eps * logits[token].abs().max()
        if gate is not None:
            allowed = torch.minimum(allowed * 16, 4 * pair.eps * logits[token].abs().max()
                                    + 2 * (gate[token] - logits[token]).abs().max())
        yield token, gap.item(), gap.item() > allowed.item()


def spread(tainted, S):
    """From the next layer on, what a flipped token may have reached: its row's later tokens."""
    rows = tainted.view(-1, S)
    return (rows.cumsum(1) > 0).flatten()


class Report:
    """What is said at the end."""

    def __init__(self, pair):
        self.pair, self.lines, self.table, self.flips, self.worst = pair, [], [], 0, (0.0, "-")
        self.seen = 0.0
        S = pair.ours["tokens"].shape[1]
        self.real = torch.cat([torch.arange(S) < n for n in pair.lengths])
        self.tainted = torch.zeros_like(self.real)


def where(pair, name, ours, theirs, tokens):
    """The largest difference, its place, and which tokens and heads differ at all."""
    difference = (ours - theirs).abs().nan_to_num(0.0, math.inf)  # −∞ on both sides is equal
    place = [int(n) for n in torch.unravel_index(difference.argmax(), difference.shape)]
    S, index = pair.ours["tokens"].shape[1], tuple(place)
    token = int(tokens[place[0]])
    letters = [a for a in axes(name) if a not in ("B", "S", "N", "visits")]
    words = [f"row {token // S}, token {token % S}"]
    for letter, n in zip(letters, place[1:], strict=True):
        head, _, d = letter.partition("·")
        words += ([f"{LABELS[head]} {n // pair.config['head_dim']}, "
                   f"feature {n % pair.config['head_dim']}"] if d else [f"{LABELS[letter]} {n}"])
    if expert := re.search(r"experts\.(\d+)", name):
        words.append(f"expert {expert[1]}")
    a, b, size = ours[index].item(), theirs[index].item(), difference[index].item()
    line = f"ours {a:.6g}, theirs {b:.6g} at {', '.join(words)}"
    if not math.isfinite(size):
        return [line]
    ulp = pair.eps * 2.0 ** math.floor(math.log2(max(abs(a), 1e-300)))
    return [line, f"largest difference {size:.3g}, relative {size / max(abs(a), 1e-300):.3g}, "
            f"{size / ulp:.3g} ulps of {str(pair.dtype)[6:]}"]


def extent(pair, found, tokens, limit):
    S = pair.ours["tokens"].shape[1]
    bad = [int(t) for t, e in zip(tokens.tolist(), found.tolist(), strict=True) if e > limit]
    return f"beyond rounding at {len(bad)} of {len(found)} rows, the first at token {bad[0] % S}" \
        if bad else ""


def limits(pair, name, seen):
    """What rounding explains: by depth, and as a jump over the largest error before."""
    n = layer_of(name)
    depth = (n if n is not None else pair.config["num_hidden_layers"] * (
        word(name) != "embed_tokens")) + 1
    return FLOOR * depth * pair.eps, max(FLOOR * pair.eps, JUMP * seen)


def judge(pair, report, name, args, explain):
    """None where a tensor agrees, else the lines that say how it differs, if they are wanted."""
    ours, theirs, tokens = both(pair, name)
    if theirs is None and not explain:
        return ["another shape"]
    if theirs is None:
        _, words = cause(pair, name, math.inf)
        return [f"shape {list(pair.theirs[name].shape)}, ours {list(pair.ours[name].shape)}",
                f"cause: {words}" if words else "cause: not found"]
    keep = (report.real & ~report.tainted)[tokens]
    ours, theirs, tokens = ours[keep], theirs[keep], tokens[keep]
    if not len(ours):
        return None
    found = errors(ours, theirs)
    error = found.max().item()
    report.table.append((name, error))
    if args.rtol is not None or args.atol is not None:
        close = torch.isclose(theirs, ours, rtol=args.rtol or 0.0, atol=args.atol or 0.0)
        limit, bad = 0.0, not close.all()
    else:
        by_depth, by_jump = limits(pair, name, report.seen)
        limit, bad = min(by_depth, by_jump), error > by_depth or error > by_jump
    if not bad:
        report.seen = max(report.seen, error)
        report.worst = max(report.worst, (error, name))
        return None
    if not explain:
        return ["differs"]
    lines = [*where(pair, name, ours, theirs, tokens),
             f"error of the worst row {error:.3g}; {extent(pair, found, tokens, limit)}"]
    near, words = cause(pair, name, error)
    if words:
        return [*lines, f"cause: {words}; then equal to {near:.2g}"]
    if args.rtol is None and args.atol is None and error <= by_jump:
        return [*lines, "drift: it grew without a jump, as from lower precision inside; "
                "per layer: " + ", ".join(f"{n} {e:.2g}" for n, e in by_layer(report))]
    return [*lines, f"cause: not found; the largest error before it was {report.seen:.2g}"]


def by_layer(report):
    """The largest error of each layer so far."""
    largest = {}
    for name, error in report.table:
        if (n := layer_of(name)) is not None:
            largest[n] = max(largest.get(n, 0.0), error)
    return sorted(largest.items())


def routing(pair, report, name):
    """None where the same experts were chosen or the flips are near ties, else what differs."""
    wrong = []
    for token, gap, real in flips(pair, name, report.real & ~report.tainted):
        at = f"token {token % pair.ours['tokens'].shape[1]}"
        if real:
            wrong.append(f"another choice of experts at {at}, by a margin of {gap:.3g}: no near "
                         f"tie, ours {pair.ours[name][token].tolist()}, theirs "
                         f"{pair.theirs[name].reshape(pair.ours[name].shape)[token].tolist()}")
        else:
            report.flips += 1
            report.tainted[token] = True
            print(f"routing flip, no error: {name}, {at}, margin {gap:.2g}")
    return wrong or None


def compared(pair, args):
    """The report, and the name and lines of the first difference, or None."""
    report, first, last, layer = Report(pair), None, "the start", None
    S = pair.ours["tokens"].shape[1]
    for name in pair.shared:
        if word(name) in DERIVED:
            continue
        if layer_of(name) != layer:
            layer, report.tainted = layer_of(name), spread(report.tainted, S)
        lines = (routing(pair, report, name) if word(name) == "chosen"
                 else judge(pair, report, name, args, first is None))
        if lines:
            first = first or (name, last, lines)
            report.lines.append(name)
            if not args.all and word(name) == "chosen":
                break
        elif not first:
            last = name
    return report, first


def tell(pair, report, first, args):
    """Print the verdict; 0 if equal within rounding."""
    lacking = len([n for n in pair.order if word(n) not in DERIVED]) - len(
        [n for n in pair.shared if word(n) not in DERIVED])
    print(f"compared {len(report.table)} tensors to {str(pair.dtype)[6:]} rounding; "
          f"theirs lacks {lacking} of ours"
          + (f"; not ours: {', '.join(pair.unknown[:5])}" if pair.unknown else ""))
    if args.all:
        for name, error in report.table:
            print(f"{error:10.3g}  {name}")
    if not first:
        print(f"equal within {str(pair.dtype)[6:]} rounding: the largest error is "
              f"{report.worst[0]:.2g}, at {report.worst[1]}; routing flips: {report.flips}")
        return 0
    name, last, lines = first
    print(f"first difference: {name}; before it {last} is equal")
    print("\n".join("  " + line for line in lines))
    if skipped := pair.order[pair.order.index(last) + 1 if last in pair.order else 1:
                             pair.order.index(name)]:
        skipped = [n for n in skipped if word(n) not in DERIVED and n not in pair.theirs]
        if skipped:
            print(f"  not in theirs, and perhaps the place: {', '.join(skipped[:4])}"
                  + (", …" if len(skipped) > 4 else ""))
    print(f"  later tensors that differ as well: {len(report.lines) - 1}")
    return 1


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"compare.py: {message}; see --help\n")


def arguments(argv):
    p = Parser(prog="compare.py", description="Say where and why a port differs.")
    p.add_argument("ours", type=Path, help="a trace of generate.py --trace, or a golden file")
    p.add_argument("theirs", type=Path, help="a safetensors file of the port's intermediates")
    p.add_argument("--rtol", type=float, help="hold elements to rtol · |ours| + atol instead")
    p.add_argument("--atol", type=float)
    p.add_argument("--names", type=Path, metavar="JSON", help="an object of their name: our name")
    p.add_argument("--all", action="store_true", help="list the error of every tensor")
    return p.parse_args(argv)


def read_names(path):
    try:
        names = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError) as error:
        raise Incomparable(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(names, dict):
        raise Incomparable(f"{path}: wanted an object of their name: our name")
    return names


def main(argv=None):
    args = arguments(argv)
    try:
        pair = Pair(args.ours, args.theirs, read_names(args.names))
        return tell(pair, *compared(pair, args), args)
    except Incomparable as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
