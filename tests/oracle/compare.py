"""Find where and why a port differs: `python tests/oracle/compare.py OURS THEIRS`.

OURS is a golden file or a file of trace.py. THEIRS is any safetensors file in which the port has
written some of the same quantities, in any floating-point dtype, with or without the axis B, with
heads and features as one axis or two. Tensors are compared in the order of computation.

The section Tolerances of tests/oracle/README.md says which errors count as rounding. A cause is
proved if our numbers, computed anew with that error in the port (see causes.py), are equal to
theirs: the error that remains is at most a quarter of what counts as rounding and at most an eighth
of the error without it. Nothing else is called a cause.

Exit codes: 0 equal within rounding, 1 different, 2 not comparable.
"""

import argparse
import itertools
import json
import math
import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from causes import CAUSES, Cause
from pair import IncomparableError, Pair, as_rows, layer_of, reshaped, row_errors
from reference import axes, word
from steps import MissingError, Run

NEARER = 8
LABELS = {"H": "head", "K": "key head", "d": "feature", "D": "feature", "M": "feature",
          "E": "expert", "A": "choice", "V": "token id", "T": "key"}


# ------------------------------------------------------------------ testing causes


def other_axes(pair, name):
    """Theirs as it is if its axes are in another order, as (description, ours, theirs)."""
    ours, theirs, letters = pair.ours[name].double(), pair.theirs[name].double(), axes(name)
    split = [part for letter in letters for part in letter.split("·")]
    apart = ours if split == letters else ours.unflatten(-1, (-1, pair.trace.config["head_dim"]))
    for how in itertools.permutations(range(apart.ndim)):
        moved = [n for n in how if apart.shape[n] > 1]
        if theirs.numel() == ours.numel() and moved != sorted(moved):
            back = theirs.reshape([apart.shape[n] for n in how]).permute(
                [how.index(n) for n in range(len(how))])
            yield (f"its axes are in the order {' '.join(split[n] for n in how)} instead of "
                   f"{' '.join(split)}", ours, back.reshape(ours.shape))


def anywhere(pair, name):
    """What can happen to any quantity, as (description, ours, theirs)."""
    yield from other_axes(pair, name)
    ours, letters = pair.ours[name].double(), axes(name)
    theirs = reshaped(pair.theirs[name].double(), ours)
    if theirs is None:
        return
    if word(name) == "chosen":
        yield "the ids of experts are counted from 1", ours + 1, theirs
    for by in (1, -1) if "S" in letters else ():
        moved = ours.roll(by, letters.index("S"))
        moved.select(letters.index("S"), 0 if by > 0 else -1).fill_(math.nan)
        yield f"it is shifted by {by:+} token", moved, theirs
    for other, x in pair.ours.items():
        if x.is_floating_point() and other != name and x.shape == ours.shape and (
                layer_of(other) in (layer_of(name), None)):
            yield f"it holds our {other}", x.double(), theirs


def scaled(pair, name):
    """A constant factor other than 1, as (description, ours); masked scores have none."""
    ours, theirs, _ = pair.aligned(name, pair.ours[name].double())
    if theirs is not None and word(name) != "chosen":
        a, b = (x[ours.isfinite() & theirs.isfinite()] for x in (ours, theirs))
        factor = ((a * b).sum() / a.square().sum()).item()
        if abs(factor - 1) > pair.rounding:
            digits = 6 if abs(factor - 1) > 1e-5 else 15
            yield f"it is multiplied by {factor:.{digits}g}", pair.ours[name].double() * factor


def rounded(ours, theirs):
    """The dtype to which theirs was rounded, or None. Nearly all numbers must be equal then."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if theirs.to(dtype).double().equal(theirs.double()):
            near = (ours.to(dtype).double() == theirs.double()).double().mean()
            return dtype if theirs.dtype.itemsize > dtype.itemsize and near > 0.9 else None
    return None


class Diagnosis:
    """Tests all causes of a difference.

    `equal` has the names of the tensors that are equal, `bad` marks the tokens that differ, `keep`
    those that can be compared. What was not tested for lack of weights is in `untested`.
    """

    def __init__(self, pair, name, equal, bad, keep, limit):
        self.pair, self.name, self.equal = pair, name, frozenset(equal)
        self.bad, self.keep, self.limit = bad, keep, limit
        self.untested, self.reach = set(), {}
        self.theirs = reshaped(pair.theirs[name].double(), pair.ours[name])

    def remaining(self, name, mine, run=None, theirs=None):
        """The largest error of theirs against `mine`, or ∞ if mine has too few numbers for a proof.

        Rows of `mine` with NaN are left out: a softmax over nothing gives no number to compare. At
        least a third of the rows that differ must be left.
        """
        if theirs is None:
            mine, theirs, tokens = self.pair.aligned(name, mine, run)
        else:
            mine, theirs = (as_rows(x, axes(name)) for x in (mine, theirs))
            tokens = self.pair.expert_tokens(name)
            tokens = torch.arange(len(mine)) if tokens is None else tokens
        if theirs is None or not len(mine):
            return math.inf
        bad, use = self.bad[tokens] & self.keep[tokens], ~mine.flatten(1).isnan().any(1)
        if not (bad & use).any() or 3 * (bad & use).sum() < bad.sum():
            return math.inf
        use &= self.keep[tokens]
        return row_errors(mine[use], theirs[use]).max().item()

    def runs(self):
        """Every cause that can reach the difference: in all its quantities, and in each alone."""
        for cause in CAUSES:
            words = tuple(cause.words.split())
            reaching = list(filter(self.reaches, words))
            if not reaching:
                continue
            theirs = self.theirs if word(self.name) in reaching else None
            place = Run(self.pair.trace, theirs=theirs).place_of(reaching[0], self.name)
            values = cause.values(place) if callable(cause.values) else cause.values or [None]
            for value, part in itertools.product(
                    values, dict.fromkeys([words, *((w,) for w in reaching)])):
                only = "" if part == words else f", in {part[0]} only"
                yield cause.describe(value) + only, Run(
                    self.pair.trace, cause, value, part, self.equal, theirs)

    def reaches(self, last):
        """Whether an error in quantities of this kind can change the tensor."""
        if last not in self.reach:
            run = Run(self.pair.trace, None, None, (last,), self.equal)
            self.reach[last] = run.affected(self.name)
        return self.reach[last]

    def proved(self):
        """The proved causes as (text, remaining error, run or None), in the order of CAUSES.

        If some leave a much larger error than others, or explain fewer of the later tensors of the
        layer, only the others are returned.
        """
        found = []
        for text, run in self.runs():
            try:
                error = self.remaining(self.name, run.reach(self.name), run)
            except MissingError:
                self.untested.add(run.cause.text)
                continue
            except (RuntimeError, IndexError):
                continue  # its shapes contradict those of a tensor that is equal
            found.append((text, error, run))
        found += [(text, self.remaining(self.name, mine, theirs=theirs), None)
                  for text, mine, theirs in anywhere(self.pair, self.name)]
        found = [cause for cause in found if cause[1] <= self.limit] or [
            cause for text, mine in scaled(self.pair, self.name)
            if (cause := (text, self.remaining(self.name, mine), None))[1] <= self.limit]
        least = 4 * max(min((error for _, error, _ in found), default=0.0), self.pair.epsilon)

        def rank(cause):
            equal, rest = self.follows(cause[2])
            return cause[1] > least, len(rest) - len(equal)
        ranks = [rank(cause) for cause in found]
        return [cause for cause, own in zip(found, ranks, strict=True) if own == min(ranks)]

    def follows(self, run):
        """The later tensors of the layer that a run makes equal, and those that it surely does not.

        Tokens without a number in the run are left out. The check ends where the routing differs
        from that of theirs or is not known, because the experts have other rows then.
        """
        equal, rest, largest, order = [], [], 0.0, self.pair.shared
        keep, at = self.keep.clone(), f"model.layers.{layer_of(self.name)}"
        chosen = f"{at}.block_sparse_moe.chosen"
        for name in order[order.index(self.name):] if run else ():
            if layer_of(name) != layer_of(self.name) or word(name) == "tokens" or (
                    not run.affected(name)):
                continue
            if (word(name) == "layer" or axes(name)[0] == "R") and chosen not in order and (
                    run.affected(chosen)):
                break
            try:
                mine, theirs, tokens = self.pair.aligned(name, run[name].double(), run)
            except (MissingError, RuntimeError, IndexError):
                continue
            if theirs is not None:
                keep[tokens[mine.flatten(1).isnan().any(1)]] = False
                mine, theirs = (x[keep[tokens]] for x in (mine, theirs))
            error = math.inf if theirs is None else max(
                row_errors(mine, theirs).tolist(), default=0.0)
            limits = self.pair.limits(name, largest)
            if name == chosen and error:
                break
            if error > max(limits):
                rest.append(name)
                continue
            largest = max(largest, error)
            equal += [name] if name != self.name and error <= min(limits) else []
        return equal, rest

    def is_ours(self, name):
        mine, theirs, tokens = self.pair.aligned(name, self.pair.ours[name].double())
        return theirs is not None and (
            row_errors(mine, theirs)[self.keep[tokens]] <= self.pair.rounding).all()


# ------------------------------------------------------------------ comparing


def describe_place(pair, name, ours, theirs, tokens):
    """One sentence about the largest difference of some rows."""
    difference = (ours - theirs).abs().nan_to_num(0.0, math.inf)  # −∞ on both sides is equal
    place, rest = [], int(difference.argmax())
    for size in reversed(difference.shape):
        rest, n = divmod(rest, size)
        place.insert(0, n)
    token = int(tokens[place[0]])
    words = [f"row {token // pair.S}, token {token % pair.S}"]
    letters = [a for a in axes(name) if a not in ("B", "S", "N", "R")]
    for letter, n in zip(letters, place[1:], strict=True):
        head, _, feature = letter.partition("·")
        d = pair.trace.config["head_dim"]
        words.append(f"{LABELS[head]} {n // d}, feature {n % d}" if feature else
                     f"{LABELS[letter]} {n}")
    if expert := re.search(r"experts\.(\d+)", name):
        words.append(f"expert {expert[1]}")
    a, b, size = (x[tuple(place)].item() for x in (ours, theirs, difference))
    how = ""
    if a and math.isfinite(size):
        ulps = size / (pair.epsilon * 2.0 ** math.floor(math.log2(abs(a))))
        how = (f" ({ulps:.3g} ulps of {str(pair.dtype)[6:]})" if ulps < 1e6 else
               f" ({size / abs(a):.2g} times |ours|)")
    return (f"The largest difference is {size:.3g}{how} at {', '.join(words)}: ours {a:.6g}, "
            f"theirs {b:.6g}.")


def flip(p, *tokens):
    """The experts if at these tokens the first refused expert takes the place of the last one."""
    chosen, A = p.plain().clone(), p.plain().shape[1]
    for token in tokens:
        chosen[token, -1] = p["gate"][token].sort(descending=True, stable=True)[1][A]
    return chosen


class Comparison:
    """Walks through the tensors that both files have, up to the first difference and beyond."""

    def __init__(self, pair, args):
        self.pair, self.args = pair, args
        self.tolerances = args.rtol is not None or args.atol is not None
        self.equal, self.errors, self.flips, self.different = [], {}, [], []
        self.first, self.largest = None, 0.0  # name and sentences; the largest error so far
        self.compared = 0
        self.tainted = torch.zeros_like(pair.real)  # tokens that a routing flip has reached

    def walk(self):
        layer = None
        for name in self.pair.shared:
            if layer_of(name) != layer:  # attention takes a flip to the later tokens of its row
                layer = layer_of(name)
                self.tainted = (self.tainted.view(-1, self.pair.S).cumsum(1) > 0).flatten()
            difference = {"chosen": self.choices, "tokens": self.numbering}.get(
                word(name), self.numbers)(name)
            self.compared += 1
            if difference is None:
                self.equal += [name] if word(name) != "tokens" else []
                continue
            self.different.append(name)
            if self.first is None:
                self.first = name, difference()
            if word(name) == "chosen":
                break  # other experts ran: nothing that follows can be compared
        return self

    def numbering(self, name):
        """None if the port numbers the rows of an expert by the tokens that chose it."""
        pair, takers, c = self.pair, self.pair.takers(name), self.pair.trace.chunk
        padding = (~pair.real).nonzero()[:, 0].tolist()
        own, want = (sorted(t for t in x.flatten().tolist() if t not in padding) for x in (
            pair.theirs[name], pair.ours[name] if takers is None else takers))
        restart = c and own == sorted(t % pair.S % c for t in want)
        if own == want or takers is None and not restart:
            return None
        return lambda: [
            f"It has the tokens {own}, but the expert was chosen by the tokens {want}.",
            f"Cause: the numbers restart with each call of {c} tokens. Add the number of the first "
            "token of the call." if restart else "Cause: not found."]

    def numbers(self, name):
        """None if a tensor is equal, else a function that returns sentences about it."""
        pair, keep = self.pair, self.pair.real & ~self.tainted
        ours, theirs, tokens = pair.aligned(name, pair.ours[name].double())
        if theirs is None:
            return lambda: self.shapes(name)
        kept = keep[tokens]
        ours, theirs, tokens = ours[kept], theirs[kept], tokens[kept]
        if not len(ours):
            return None
        found, limits = row_errors(ours, theirs), pair.limits(name, self.largest)
        self.errors[name] = found.max().item()
        bad = found > min(limits)
        if self.tolerances:
            bad = ~torch.isclose(theirs, ours, rtol=self.args.rtol or 0.0,
                                 atol=self.args.atol or 0.0).flatten(1).all(1)
        if not bad.any() or not self.tolerances and self.hidden_flips(name, tokens[bad], limits):
            self.largest = max(self.largest, found[~bad].max().item() if (~bad).any() else 0.0)
            return None
        return lambda: [describe_place(pair, name, ours, theirs, tokens), *self.explain(
            name, found, bad, tokens, limits)]

    def hidden_flips(self, name, bad, limits):
        """Whether near ties, in a layer of which theirs has no choices, explain the bad rows."""
        chosen = name.partition(".block")[0] + ".block_sparse_moe.chosen"
        if word(name) not in ("layer", "block_sparse_moe") or chosen in self.pair.theirs or (
                not all(self.margin(chosen, t) < self.allowed(chosen, t) for t in bad.tolist())):
            return False
        marked = torch.zeros_like(self.tainted).index_fill_(0, bad, True)
        run = Run(self.pair.trace, Cause("chosen", "", flip), tuple(bad.tolist()), ("chosen",),
                  self.equal)
        test = Diagnosis(self.pair, name, self.equal, marked, self.pair.real & ~self.tainted, 0.0)
        try:
            if test.remaining(name, run.reach(name), run) > min(limits):
                return False
        except (MissingError, RuntimeError, IndexError):
            return False
        self.flips += [(chosen, t, self.margin(chosen, t)) for t in bad.tolist()]
        self.tainted |= marked
        return True

    def logits(self, chosen, token):
        return self.pair.ours[chosen.replace("chosen", "gate")][token].double()

    def margin(self, chosen, token):
        """The logit of the last chosen expert minus that of the first refused one."""
        best = self.logits(chosen, token).sort(descending=True)[0]
        A = self.pair.ours[chosen].shape[1]
        return (best[A - 1] - best[A]).item() if A < len(best) else math.inf

    def allowed(self, chosen, token):
        """By how much rounding can change the difference of two router logits of a token."""
        logits = self.logits(chosen, token)
        usual = self.pair.rounding * logits.abs().max().item()
        theirs = self.pair.sibling(chosen, "gate")
        if theirs is None:
            return usual
        apart = (theirs[token].double() - logits).abs().max().item()
        return min(16 * usual, 4 * self.pair.epsilon * logits.abs().max().item() + 2 * apart)

    def tied(self, chosen, token, new):
        """Whether ours and theirs each have equal logits for the experts that `new` exchanges."""
        own, changed = self.pair.sibling(chosen, "gate"), set(new.tolist())
        changed ^= set(self.pair.ours[chosen][token].tolist())
        return own is not None and all(len({x[e].item() for e in changed}) == 1
                                       for x in (own[token], self.logits(chosen, token)))

    def gap(self, chosen, token, new):
        """How far our logits are from the choice `new`; ∞ if there are no such experts."""
        logits, mine = self.logits(chosen, token), self.pair.ours[chosen][token]
        if new.min() < 0 or new.max() >= len(logits):
            return math.inf
        return (logits[mine].min() - logits[new].min()).item()

    def choices(self, chosen):
        """Like `numbers` for the experts: None if they are the same or a flip explains each."""
        mine = self.pair.ours[chosen]
        other = reshaped(self.pair.theirs[chosen].long(), mine)
        if other is None:
            return lambda: self.shapes(chosen)
        wrong = (mine.sort(-1)[0] != other.sort(-1)[0]).any(1) & self.pair.real & ~self.tainted
        for token in wrong.nonzero()[:, 0].tolist():
            gap = self.gap(chosen, token, other[token])
            if gap <= self.allowed(chosen, token) and not self.tied(chosen, token, other[token]):
                self.flips.append((chosen, token, gap))
                self.tainted[token], wrong[token] = True, False
        return (lambda: self.explain_choices(chosen, other, wrong)) if wrong.any() else None

    def explain_choices(self, chosen, other, wrong):
        """Sentences about other experts at the tokens in `wrong`."""
        token = int(wrong.nonzero()[0])
        why = (f"Our margin is {self.margin(chosen, token):.3g}, so this is no near tie."
               if not self.tied(chosen, token, other[token]) else "The logits of the exchanged "
               "experts are equal in both files, so the lower index must be chosen.")
        return [f"{int(wrong.sum())} of {len(wrong)} tokens have other experts. At token "
                f"{token % self.pair.S} ours chose {self.pair.ours[chosen][token].tolist()} and "
                f"theirs {other[token].tolist()}. {why}",
                *self.cause(chosen, wrong, self.pair.rounding)]

    def shapes(self, name):
        pair = self.pair
        everything = torch.ones_like(pair.real)
        return [f"Its shape is {list(pair.theirs[name].shape)}, ours is "
                f"{list(pair.ours[name].shape)}.", *self.cause(name, everything, pair.rounding)]

    def explain(self, name, found, bad, tokens, limits):
        """Sentences about a tensor whose numbers differ, from the errors of its rows."""
        pair, limit, error = self.pair, min(limits), found.max().item()
        first = int(tokens[bad][0]) % pair.S
        lines = [f"{int(bad.sum())} of {len(bad)} rows differ, the first at token {first}. The "
                 f"largest error of a row is {error:.2g}; rounding explains {limit:.2g}."]
        if not pair.theirs[name].isfinite().all() and pair.ours[name].isfinite().all():
            lines.append("Theirs has infinite numbers or NaN.")
        if pair.trace.chunk and first and first % pair.trace.chunk == 0:
            lines.append(f"Token {first} is the first of a call of {pair.trace.chunk} tokens, "
                         "which points to the cache.")
        marked = torch.zeros_like(pair.real).index_fill_(0, tokens[bad], True)
        drift = not self.tolerances and error <= limits[1]
        return lines + self.cause(name, marked, limit, error, drift)

    def cause(self, name, bad, limit, error=math.inf, drift=False):
        """Sentences about the proved causes, or about what to do if there are none."""
        limit = min(limit / 4, error / NEARER) if word(name) != "chosen" else 0.0
        test = Diagnosis(self.pair, name, self.equal, bad, self.pair.real & ~self.tainted, limit)
        causes = test.proved()
        if causes:
            return self.found(test, *causes[0], causes[1:])
        dtype = None if test.theirs is None else rounded(
            self.pair.ours[name], self.pair.theirs[name])
        if dtype and error < 4 * torch.finfo(dtype).eps:
            return [f"Cause: the numbers are rounded to {str(dtype)[6:]}."]
        return self.not_found(name, test, drift)

    def found(self, test, text, remaining, run, others):
        """Sentences about a proved cause and about those that give the same numbers."""
        lines = [f"Cause: {text}. With it, the error that remains is {remaining:.2g}."]
        equal, rest = test.follows(run)
        if rest:
            lines.append(f"It does not explain {rest[0]}, so " + (
                "it is not made there." if test.is_ours(rest[0]) else "there is another error."))
        elif equal:
            lines.append("It also explains the later tensors of the layer that depend on it "
                         f"({len(equal)}).")
        mixture = f"model.layers.{layer_of(test.name)}.block_sparse_moe"
        if run and run.cause.note and mixture in self.pair.shared:
            ours, theirs, _ = self.pair.aligned(mixture, self.pair.ours[mixture].double())
            if row_errors(ours[test.keep], theirs[test.keep]).max() <= self.pair.rounding:
                lines.append(run.cause.note)
        others = [text for text, _, other in others if not (  # another error, not in fewer places
            run and other and run.cause is other.cause and run.value is other.value)]
        if others:
            lines.append(f"The same numbers would follow if {'; or if '.join(others[:3])}.")
        return lines

    def not_found(self, name, test, drift):
        if drift:
            layers = ", ".join(f"{n}: {error:.2g}" for n, error in self.by_layer())
            return ["Cause: no single operation. The error drifts: it grew without a jump, as "
                    "lower precision inside the port makes it grow. Largest error per layer: "
                    f"{layers}."]
        lines = [f"Cause: not found. The largest error before it is {self.largest:.2g}."]
        if test.untested:
            lines.append(f"Causes that could not be tested without the weights: "
                         f"{len(test.untested)}. Give the directory of the model with --model.")
        if skipped := self.pair.skipped(self.equal[-1] if self.equal else None, name):
            main = [n for n in skipped if ".experts." not in n] or skipped
            lines.append(f"Trace {main[len(main) // 2]} next.")
        return lines

    def by_layer(self):
        """The largest error of each layer."""
        largest = {}
        for name, error in self.errors.items():
            if layer_of(name) is not None:
                largest[layer_of(name)] = max(largest.get(layer_of(name), 0.0), error)
        return sorted(largest.items())


# ------------------------------------------------------------------ the command


def verdict(pair, found, args):
    """All sentences of the output."""
    dtype = str(pair.dtype)[6:]
    yield f"Compared {found.compared} of {len(pair.shared)} tensors with {dtype} rounding."
    if found.compared < len(pair.shared):
        yield f"The comparison stopped at {found.different[-1]}, because other experts ran there."
    if lacking := pair.skipped():
        names = list(dict.fromkeys(re.sub(r"(experts\.\d+)\..*", r"\1", n) for n in lacking))
        yield (f"The port's file lacks {len(lacking)} of ours: {', '.join(names[:4])}"
               f"{', …' if len(names) > 4 else ''}.")
    if pair.unknown():
        yield f"It has other names too: {', '.join(pair.unknown()[:5])}."
    if args.all:
        yield from (f"{error:10.3g}  {name}" for name, error in found.errors.items())
    for chosen, token, gap in found.flips:
        why = "the logits are equal, and here the lower index is chosen" if gap == 0 else (
            f"the margin is {gap:.2g}")
        yield (f"Routing flip, no error: {chosen}, row {token // pair.S}, token {token % pair.S}; "
               f"{why}.")
    if found.first is not None:
        yield from describe_difference(pair, found)
        return
    name, error = max(found.errors.items(), key=lambda x: x[1], default=("none", 0.0))
    yield (f"Equal within {dtype} rounding. The largest error is {error:.2g}, in {name}. "
           f"Routing flips: {len(found.flips)}.")


def describe_difference(pair, found):
    """The sentences about the first difference."""
    name, lines = found.first
    before = [n for n in found.equal if pair.order.index(n) < pair.order.index(name)]
    yield f"The first tensor that differs is {name}."
    if before:
        yield f"  {before[-1]}, the tensor before it in the trace, is equal."
    if skipped := pair.skipped(before[-1] if before else None, name):
        made = "between the two" if before else "in it or before it"
        yield (f"  The error is made {made}. Not traced there: {', '.join(skipped[:4])}"
               f"{', …' if len(skipped) > 4 else ''}.")
    yield from (f"  {line}" for line in lines)
    yield f"  Later tensors that differ too: {len(found.different) - 1}."


def arguments(argv):
    p = argparse.ArgumentParser(prog="compare.py", allow_abbrev=False,
                                description="Find where and why a port differs.")
    p.add_argument("ours", type=Path, help="a golden file or a file of trace.py")
    p.add_argument("theirs", type=Path, help="a safetensors file of the port's quantities")
    p.add_argument("--names", type=Path, metavar="JSON", help="an object {their name: our name}")
    p.add_argument("--model", type=Path, metavar="DIR",
                   help="the checkpoint of a trace, so that causes far from the difference can be "
                        "tested; golden files hold their weights")
    p.add_argument("--chunk", type=int, metavar="N", default=0,
                   help="tokens per call of the port (default: that of the golden file, else "
                        "powers of two are tried)")
    p.add_argument("--rtol", type=float, help="compare elements, with rtol·|ours| + atol")
    p.add_argument("--atol", type=float)
    p.add_argument("--all", action="store_true", help="list the error of every tensor")
    return p.parse_args(argv)


def read_names(path):
    try:
        names = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError) as error:
        raise IncomparableError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(names, dict):
        raise IncomparableError(f"{path}: must hold an object {{their name: our name}}")
    return names


def main(argv=None):
    args = arguments(argv)
    try:
        pair = Pair(args, read_names(args.names))
        found = Comparison(pair, args).walk()
        print("\n".join(verdict(pair, found, args)))
        return 0 if found.first is None else 1
    except IncomparableError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
