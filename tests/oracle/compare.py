"""Find where and why a port differs: `python tests/oracle/compare.py OURS THEIRS`.

OURS is a golden file or a file of trace.py, THEIRS any safetensors file in which the port has
written some of the same quantities. They are compared in the order of computation. README.md says
which errors count as rounding, when a cause is proved, and what is a layout and no error.

Exit codes: 0 equal within rounding, 1 different, 2 not comparable.
"""

import argparse
import contextlib
import functools
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
from causes import GUESSES, READ, factor_names, listed, spans
from pair import IncomparableError, Pair, as_rows, layer_of, row_errors
from reference import axes, word
from steps import MissingError, Place, Run, calls_of, experts_in, parse, without
from torch.nn import functional as F

NEARER = 8
LABELS = {"H": "head", "K": "key head", "d": "feature", "D": "feature", "M": "feature",
          "E": "expert", "A": "choice", "V": "token id", "T": "key"}
UNFIT = (MissingError, RuntimeError, IndexError)  # what a step raises if it cannot be computed


# ------------------------------------------------------------------ where a tensor differs


def parts(pair, name, x):
    """Rows (n, …) with the heads and their features apart, and a letter for each later axis."""
    letters = [a for a in axes(name) if a not in ("B", "S", "N", "R")]
    if letters and "·" in letters[-1]:
        x = x.unflatten(-1, (-1, pair.trace.config["head_dim"]))
        letters = letters[-1].split("·")
    return x, letters


def distance(ours, theirs):
    """|theirs − ours|; −∞ on both sides is equal, and NaN is infinitely far from a number."""
    difference = (ours - theirs).abs().masked_fill(ours == theirs, 0.0)
    return difference.nan_to_num(math.inf, math.inf)


def describe_place(pair, name, ours, theirs, tokens):
    """One sentence about the largest difference of some rows."""
    difference, letters = parts(pair, name, distance(ours, theirs))
    place = torch.unravel_index(difference.argmax(), difference.shape)
    size, a, b = (parts(pair, name, x)[0][place] for x in (distance(ours, theirs), ours, theirs))
    row, token = divmod(int(tokens[place[0]]), pair.S)
    words = [f"row {row}, token {token}", *(
        f"{LABELS[letter]} {n}" for letter, n in zip(letters, place[1:], strict=True))]
    return (f"The largest difference is {size:.3g}, at {', '.join(words)}: ours {a:.6g}, theirs "
            f"{b:.6g}.")


def confined(pair, name, ours, theirs, tokens, bad):
    """One sentence that confines the difference along each axis; `bad` marks rows."""
    difference, letters = parts(pair, name, distance(ours, theirs)[bad])
    sizes = ours.masked_fill(ours.isinf(), 0.0).flatten(1).norm(dim=1)
    floor = pair.rounding * sizes.maximum(sizes.median())[bad] / math.sqrt(ours[0].numel())
    wrong, what = difference > floor.view(-1, *[1] * len(letters)), "It is"
    if difference.isinf().any():  # beside them, what is only wrong is hard to see
        wrong = difference.isinf()
        what = "It is" if ours.isinf().any() else "NaN or infinity is"
    words = token_words(pair, name, tokens, tokens[bad][wrong.flatten(1).any(1)])
    for axis, letter in enumerate(letters, 1):
        found = wrong.movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0].tolist()
        size = wrong.shape[axis]
        if len(found) < size:
            tail = ", from the last multiple of 8 on" * (found == [*range(size // 8 * 8, size)])
            words.append(f"{LABELS[letter]}s {spans(found)}{tail}")
    zero = ", where theirs is 0" * bool((parts(pair, name, theirs[bad])[0][wrong] == 0).all())
    return f"{what} confined to {'; '.join(words)}{zero}." if words else (
        f"It concerns all tokens and all numbers of each{zero}.")


def token_words(pair, name, tokens, bad):
    """Which rows and which of their tokens differ, of those compared; [] if all."""
    S, bad, all_tokens = pair.S, set(bad.tolist()), set(tokens.tolist())
    rows = sorted({n // S for n in bad})
    own = {n for n in all_tokens if n // S in rows}
    words = [f"rows {spans(rows)}"] if own != all_tokens else []
    if bad == own:
        return words
    for text, pattern in token_patterns(pair, name, sorted(own)):
        if bad == pattern & own:
            return [*words, text]
    by_row = {row: spans([n % S for n in sorted(bad) if n // S == row]) for row in rows}
    if len(set(by_row.values())) == 1:
        return [*words, f"tokens {by_row[rows[0]]}"]
    return [listed((f"tokens {found} of row {row}" for row, found in by_row.items()), joint="; ")]


def token_patterns(pair, name, own):
    """Sets of tokens with a name, as (text, set)."""
    S = pair.S
    yield "the first token of each row", {n for n in own if n % S == 0}
    yield "all tokens but the first of each row", {n for n in own if n % S}
    yield "the last token of each row", {*{n // S: n for n in own}.values()}
    for number, start in ((x.flatten() for x in calls[:2]) for calls in calls_of(pair.trace)):
        yield "the first token of each call", {n for n in own if start[n] == n % S}
        for at in range(1, int(number.max()) + 1):
            found = {n for n in own if number[n] >= at}
            yield f"the tokens from call {at} on, counted from 0", found
            yield f"the tokens of call {at}, counted from 0", {n for n in found if number[n] == at}
    chosen = pair.ours.get(f"model.layers.{layer_of(name)}.block_sparse_moe.chosen")
    if chosen is not None and word(name) in ("block_sparse_moe", "layer"):
        takers = {e: (chosen == e).any(1).nonzero()[:, 0].tolist() for e in experts_in(chosen)}
        yield from ((f"the tokens of expert {e}", set(found)) for e, found in takers.items())
        yield "the last token of each expert", {found[-1] for found in takers.values()}


def summary(names):
    """Names as text, those of one kind together: w1 of layer 1, experts 0, 2."""
    kinds = {}
    for last, layer, expert in map(parse, names):
        last = {"layer": "the output", "norm": "model.norm"}.get(last, last)
        kinds.setdefault(last, (set(), set()))
        for found, n in zip(kinds[last], (layer, expert), strict=True):
            found.update([] if n is None else [n])

    def plural(what, numbers):
        return f"{what}{'s' * (len(numbers) > 1)} {spans(sorted(numbers))}" * bool(numbers)
    return listed((f"{last} of {plural('layer', layers)}{', ' * bool(experts)}"
                   f"{plural('expert', experts)}" if layers else last
                   for last, (layers, experts) in kinds.items()), 8, "; ")


# ------------------------------------------------------------------ maps between ours and theirs


def reordered(ours, theirs, axis, what):
    """Theirs after slices in another order were moved back, as (text, order, theirs)."""
    forms = (lambda x: x, F.normalize,  # also beside a factor, and beside an order inside slices
             lambda x: x.view(len(x), len(ours), -1).sort(-1)[0].flatten(1))
    for form in forms:
        a, b = (form(x.nan_to_num(0, 0, 0).movedim(axis, 0).flatten(1)) for x in (ours, theirs))
        order = torch.cdist(b, a, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        moved = (order != torch.arange(len(order))).nonzero()[:, 0].tolist()
        if moved and len(set(order.tolist())) == len(order):
            text = f"{what}s {moved[0]} and {moved[1]} are exchanged" if len(moved) == 2 else (
                f"its {what}s are ours in the order {listed(order.tolist(), 12)}")
            yield text, order, theirs.index_select(axis, order.argsort())


def rescaled(ours, theirs, dims, text, c):
    """Theirs without a factor that is constant along `dims`, as (text, theirs)."""
    clear = ours.isfinite() & theirs.isfinite() & (ours != 0)
    a, b = (x.where(clear, 0.0) for x in (ours, theirs))
    factor = (a * b).sum(dims, keepdim=True) / a.square().sum(dims, keepdim=True)
    if len(dims) == ours.ndim:
        named = [name for name, x in factor_names(c).items() if abs(factor.item() / x - 1) < 1e-5]
        text += f" {factor.item():.6g}" + f", which is {' or '.join(named)}" * bool(named)
    if ours.numel() >= 3 * factor.numel():  # fewer numbers would prove nothing
        yield text, theirs / factor.where(factor.isfinite() & (factor != 0), 1.0)


def maps(pair, name, rows=None):
    """What another layout may have done to a tensor, as (text, the port's rows without it)."""
    ours, theirs, _ = pair.rows(name)
    theirs = theirs if rows is None else rows
    if word(name) in ("chosen", "tokens") or theirs is None:
        return
    shape, letters = ours.shape, parts(pair, name, ours)[1]
    ours, theirs = (parts(pair, name, x)[0] for x in (ours, theirs))
    found, every = [], range(ours.ndim)
    for axis, letter in enumerate(letters, 1):
        if letter in ("H", "K", "d", "M", "E"):
            found += [(text, back) for text, _, back in reordered(
                ours, theirs, axis, LABELS[letter])]
    for dims, text in ((every, "it is multiplied by"),
                       (every[:-1], "each feature has its own factor"),
                       (every[1:], "each token has its own factor")):
        found += rescaled(ours, theirs, tuple(dims), text, pair.trace.config)
    if word(name) in ("scores", "gate"):
        clear = ours.isfinite() & theirs.isfinite()
        added = (theirs - ours).where(clear, math.nan).nanmedian(-1, keepdim=True)[0]
        found.append(("a number is added to each row", theirs - added.nan_to_num()))
    yield from ((text, back.reshape(shape)) for text, back in found)


def layouts(pair, name):
    """What one or two layouts may have done to a tensor, like `maps`."""
    yield from maps(pair, name)
    for text, rows in maps(pair, name):
        yield from ((f"{text}, and {other}", back) for other, back in maps(pair, name, rows))


def renumbered(pair, gate):
    """The port's file with the experts of a layer in our order, as (text, file)."""
    at, port = gate.removesuffix("gate"), pair.port.tensors
    for text, order, back in reordered(pair.ours[gate], port[gate], 1, "expert"):
        new = {f"{at}experts.{e}.": f"{at}experts.{n}." for e, n in enumerate(order.tolist())}
        found = {new.get(head := n[:n.rfind(".") + 1], head) + n[len(head):]: x
                 for n, x in pair.theirs.items()} | {gate: back}
        if at + "chosen" in port:
            found[at + "chosen"] = order[port[at + "chosen"].clamp(0, len(order) - 1)]
        yield text, found


# ------------------------------------------------------------------ testing causes


class Steps:
    """The port's quantities, each computed by our steps from what the port has before it."""

    def __init__(self, pair):
        self.pair, self.limit, self.untested = pair, 8 * pair.rounding, set()
        self.layouts = {}  # the text of each layout by the name of its tensor

    @functools.cached_property
    def wrong(self):
        known = set(map(word, self.layouts))  # later layers have them too
        return [n for n in self.pair.port.tensors if word(n) not in known and self.fails(n)]

    def error(self, name, changes=None, bad=None):
        """The largest error of a quantity, with changes. Raises one of UNFIT.

        With `bad`, it is the first that differs, so what the port lacks before it is equal to ours.
        Rows with NaN are left out: a softmax over nothing gives no number to compare. At least a
        third of the rows of the tokens in `bad` must be left.
        """
        pair, theirs = self.pair, self.pair.port.tensors[name]
        mine = computed(pair.port, name, changes, pair.ours if bad is not None else None)
        if mine.shape != theirs.shape:
            return math.inf
        if word(name) == "chosen":
            return self.choice(name, mine, theirs)
        mine, theirs = (as_rows(x, axes(name)) for x in (mine, theirs))
        tokens = torch.arange(len(pair.real))
        tokens = pair.tokens_of(name, pair.port.tensors) if axes(name)[0] == "R" else tokens
        use = pair.real[tokens] & ~mine.flatten(1).isnan().any(1)
        if bad is not None and (3 * (bad[tokens] & use).sum() < bad[tokens].sum() or not use.any()):
            return math.inf
        default = math.inf if changes else 0.0
        return max(row_errors(mine[use], theirs[use]).tolist(), default=default)

    def choice(self, name, mine, theirs):
        """∞ if experts differ by more than a near tie, otherwise 0."""
        same = (mine.sort(1)[0] == theirs.sort(1)[0]).all(1)
        logits = Run(self.pair.port)[name.replace("chosen", "gate")][~same]
        if max(mine.max(), theirs.max()) >= logits.shape[1]:
            return 0.0 if same.all() else math.inf
        a, b = (logits.gather(1, x[~same].clamp(min=0)).sort(1)[0] for x in (mine, theirs))
        near = (a - b).abs().amax(1) <= self.limit * logits.abs().amax(1)
        return 0.0 if near.all() else math.inf

    def fails(self, name, changes=None):
        """Whether a quantity is certainly wrong."""
        try:
            return word(name) != "tokens" and self.error(name, changes) > self.limit
        except UNFIT:
            return False

    def guesses(self, name):
        """Every guess that can reach a quantity, as (text, changes)."""
        run = Run(without(self.pair.port, name))
        run.port, run.epsilon = self.pair.port, self.pair.epsilon
        reached = {parse(n)[0]: n for n in run.lacking(name)}
        for words, guess in GUESSES:
            words = tuple(words.split())
            reaching = [last for last in words if last in reached]
            if not reaching:
                continue
            here = word(name) in reaching
            place = Place(run, name if here else reached[reaching[0]])
            theirs = self.pair.port.tensors[name] if here else None
            try:
                for text, change in guess.items() if isinstance(guess, dict) else guess(
                        place, theirs):
                    if isinstance(change, dict):
                        yield text, change
                        continue
                    for some in dict.fromkeys([words, *((last,) for last in reaching)]):
                        yield (text + f", in {some[0]} only" * (some != words),
                               dict.fromkeys(some, change))
            except MissingError as error:
                self.untested.add(f"{words}: {error}")
            except (RuntimeError, IndexError):
                continue  # shapes that contradict those before it

    def proved(self, name, bad, limit):
        """The proved causes as (text, remaining error, what else they explain), the best first.

        If some leave a much larger error than others, or explain fewer of the port's other wrong
        steps, only the others are returned.
        """
        found = []
        with contextlib.suppress(*UNFIT, KeyError):  # what is right as it is has no cause
            limit = min(limit, self.error(name, None, bad) / NEARER)
            limit = min(limit, self.error(name) / NEARER)
        for text, changes in self.guesses(name) if name in self.pair.port.tensors else ():
            try:
                found.append((text, self.error(name, changes, bad), changes))
            except MissingError:
                self.untested.add(text)
            except UNFIT:
                continue
        found = [cause for cause in found if cause[1] <= limit]
        least = 16 * max(min((error for _, error, _ in found), default=0.0), self.pair.epsilon)
        ranked = [((error > least, *map(len, after[1:]), READ in text), text, error, after)
                  for text, error, changes in found for after in [self.follow(name, changes)]]
        best = min((cause[0] for cause in ranked), default=None)
        return [cause[1:] for cause in ranked if cause[0] == best]

    def follow(self, name, changes):
        """The other wrong steps that changes explain, those they do not, and those they spoil.

        A step is spoilt if it is right as it is and would be wrong with the changes.
        """
        same, rest, spoilt = [], [], []
        for other in self.pair.shared:
            lacking = Run(without(self.pair.port, other)).lacking(other)
            touched = any({n, parse(n)[0]} & changes.keys() for n in lacking)
            wrong = other in self.wrong
            fits = not self.fails(other, changes) if touched else not wrong
            if other != name and (wrong or not fits):
                (same if fits else rest if wrong else spoilt).append(other)
        return same, rest, spoilt


def computed(trace, name, changes=None, equal=None):
    """A quantity by our steps from what the trace holds before it, with changes.

    What the trace lacks and no change reaches is taken from `equal`, where it is known.
    """
    run, reached = Run(without(trace, name), changes), {name}
    for other, inputs in run.lacking(name).items():
        if {other, parse(other)[0]} & run.changes.keys() or reached & set(inputs):
            reached.add(other)
        elif other in (equal or {}) and other != name:
            run.values[other] = equal[other]
        if word(other) == "layer":  # layer by layer, so that the recursion stays shallow
            run[other]
    return run[name]


# ------------------------------------------------------------------ comparing


def refused(tokens):
    """The change that at these tokens the first refused expert takes the place of the last one."""
    def chosen(p):
        found, A = p.plain().clone(), p.plain().shape[1]
        for token in tokens:
            found[token, -1] = p["gate"][token].sort(descending=True, stable=True)[1][A]
        return found
    return {"chosen": chosen}


class Comparison:
    """Walks through the tensors that both files have, up to the first difference and beyond."""

    def __init__(self, pair, refused=()):
        pair.adopt(pair.file)
        self.pair, self.steps, self.refused = pair, Steps(pair), {*refused}
        self.equal, self.errors, self.flips, self.different = [], {}, [], []
        self.first, self.largest = None, 0.0  # name and sentences; the largest error so far
        self.compared, self.layouts = 0, self.steps.layouts
        self.tainted = torch.zeros_like(pair.real)  # tokens that a routing flip has reached
        self.before = pair.port._replace(tensors=dict(pair.port.tensors))  # in its own layouts

    def walk(self):
        """This comparison, or a new one without a layout that turned out to be an error."""
        layer = None
        for name in self.pair.order:
            if name not in self.pair.shared:
                continue
            if layer_of(name) != layer:  # attention takes a flip to the later tokens of its row
                layer = layer_of(name)
                self.tainted = (self.tainted.view(-1, self.pair.S).cumsum(1) > 0).flatten()
            difference = self.difference(name)
            self.compared += 1
            if difference and self.first is None and self.try_layouts(name):
                difference = self.difference(name)
            if difference is None:
                self.equal += [name] if word(name) != "tokens" else []
                continue
            self.different.append(name)
            if self.first is None:
                if (guilty := self.culprit(name)) in self.layouts:
                    return Comparison(self.pair, self.refused | {guilty}).walk()
                self.first = name, difference()
            if word(name) == "chosen":
                break  # other experts ran: nothing that follows can be compared
        if unused := self.first is None and [n for n in self.layouts if not self.settled(n)]:
            return Comparison(self.pair, self.refused | {self.culprit(unused[0])}).walk()
        return self

    def difference(self, name):
        """None if a tensor is equal, else a function that returns sentences about it."""
        return {"chosen": self.choices, "tokens": self.numbering}.get(
            word(name), self.numbers)(name)

    def numbers(self, name):
        """`difference` for a tensor of numbers."""
        pair, keep = self.pair, self.pair.real & ~self.tainted
        ours, theirs, tokens = pair.rows(name)
        if theirs is None:
            return lambda: self.shapes(name)
        ours, theirs, tokens = ours[keep[tokens]], theirs[keep[tokens]], tokens[keep[tokens]]
        if not len(ours):
            return None
        found, limits = row_errors(ours, theirs), pair.limits(name, self.largest)
        self.errors[name] = found.max().item()
        bad = found > min(limits)
        if not bad.any() or self.hidden_flips(name, tokens[bad]):
            self.largest = max(self.largest, found[~bad].max().item() if (~bad).any() else 0.0)
            return None
        return lambda: [describe_place(pair, name, ours, theirs, tokens),
                        confined(pair, name, ours, theirs, tokens, bad),
                        *self.explain(name, found, bad, tokens, limits)]

    def explain(self, name, found, bad, tokens, limits):
        """Sentences about a tensor whose numbers differ, from the errors of its rows."""
        pair, limit, error = self.pair, min(limits), found.max().item()
        row, first = divmod(int(tokens[bad][0]), pair.S)
        lines = [f"{int(bad.sum())} of {len(bad)} tokens differ, the first at token {first} of row "
                 f"{row}. The largest error of a token is {error:.2g}; rounding explains "
                 f"{limit:.2g}."]
        marked = torch.zeros_like(pair.real).index_fill_(0, tokens[bad], True)
        return lines + self.cause(name, marked, limit, error, error <= limits[1])

    def shapes(self, name):
        """Sentences about a tensor that does not have our shape."""
        theirs, ours = self.pair.theirs[name], self.pair.ours[name]
        lines = [f"Its shape is {list(theirs.shape)}, ours is {list(ours.shape)}."]
        if theirs.numel() * self.pair.S == ours.numel() > 0:
            lines.append("It has one token per row. Write all of them, not only the last.")
        return lines + self.cause(name, torch.ones_like(self.pair.real), self.pair.rounding)

    def numbering(self, name):
        """`difference` for the numbers of the rows of an expert: those that chose it.

        If theirs has no choices, those that chose it in ours; near ties are flips.
        """
        pair, at = self.pair, name.partition("experts")[0]
        known = at + "chosen" in pair.port.tensors
        want = pair.takers(name) if known else pair.ours[name]
        own, numbers = pair.numbered(pair.theirs[name])[0], pair.theirs[name].flatten()
        off = torch.zeros_like(pair.real).index_fill_(0, own, True)
        off ^= torch.zeros_like(pair.real).index_fill_(0, want, True)
        near = self.tainted if known else self.tainted | (
            self.margin(at + "gate") < self.allowed(at + "gate"))
        every = len(own) == pair.real.sum()  # it ran on all tokens
        known = len(own.unique()) == len(own) and ((numbers >= 0) & (numbers < len(off))).all()
        if every or known and not (off & ~near).any():
            self.tainted |= off & (not every)
            return None
        return lambda: [f"It has the tokens {numbers.tolist()}, but those that chose the expert "
                        f"are {want.tolist()}. Number tokens over all calls, from 0; no expert "
                        "drops a token."]

    # -------------------------------------------------------------- layouts

    def excess(self, name, rows=None):
        """The largest error of rows, divided by what rounding explains; by default the port's."""
        ours, theirs, tokens = self.pair.rows(name)
        if theirs is None and rows is None:
            return math.inf
        keep = (self.pair.real & ~self.tainted)[tokens]
        found = row_errors(ours[keep], (theirs if rows is None else rows)[keep])
        return max(found.tolist(), default=0.0) / min(self.pair.limits(name, self.largest))

    def try_layouts(self, name):
        """Whether the port may have another layout; if so, its trace is changed to ours.

        It must bring the tensor nearer by a factor of 8, so that no rounding looks like a layout.
        """
        if word(name) == "tokens" or name in self.refused:
            return False
        pair, error, at = self.pair, self.excess(name), name.removesuffix("gate")
        fits = word(name) == "gate" and name in pair.port.tensors
        for text, found in renumbered(pair, name) if fits else ():
            kept = pair.theirs
            pair.adopt(found, at)
            if all(min(self.excess(n), *(self.excess(n, back) for _, back in maps(pair, n)), 9) <= 1
                   for n in pair.shared if n.startswith(at) and word(n) in (
                       "gate", "chosen", "w1")):
                self.layouts[name] = text
                self.before = pair.port._replace(tensors={
                    n: x if n.startswith(at) else self.before.tensors[n]
                    for n, x in pair.port.tensors.items()})
                return True
            pair.adopt(kept, at)
        for text, back in layouts(pair, name):
            if NEARER * self.excess(name, back) <= min(error, NEARER):
                if axes(name)[-1] == "T":
                    back = back.unflatten(0, (-1, pair.S)).transpose(1, 2)
                pair.port.tensors[name] = back.reshape(pair.ours[name].shape)
                self.layouts[name] = text
                return True
        return False

    def culprit(self, name):
        """The tensor in which the error behind a difference is: it, or what looked like a layout.

        What it is computed from is wrong if our step does not give our numbers from what the port
        has before it, in its own layout, but gives the port's.
        """
        if not self.gives(name, self.pair.ours) and self.gives(name, self.before.tensors):
            for other in self.layouts:
                if name in self.users(other)[1]:
                    return self.culprit(other)
        return name

    def users(self, name):
        """What is computed from a tensor up to the next traced ones without a layout; and those."""
        reached, ends, run = {name}, set(), Run(self.pair.trace)
        for other in self.pair.order[self.pair.order.index(name) + 1:]:
            if word(other) != "margin" and reached & {*Place(run, other).inputs()}:
                is_end = other in self.pair.shared and other not in self.layouts
                (ends if is_end else reached).add(other)
        return reached, ends

    def settled(self, name):
        """Whether traced tensors show that nothing behind a layout is wrong."""
        return self.pair.order[-1] not in self.users(name)[0]

    def gives(self, name, goals):
        """Whether our step gives a number of `goals` from what the port has before it."""
        try:
            mine, goal = computed(self.before, name), goals[name]
        except (*UNFIT, KeyError):
            return False
        if mine.shape != goal.shape or not mine.is_floating_point():
            return mine.equal(goal)
        mine, goal = (as_rows(x, axes(name)) for x in (mine, goal))
        keep = self.pair.real if axes(name)[0] != "R" else slice(None)
        return (row_errors(goal[keep], mine[keep]) <= self.pair.rounding).all().item()

    # -------------------------------------------------------------- routing

    def allowed(self, gate):
        """By how much rounding can change the difference of two router logits of each token."""
        ours, theirs = self.pair.ours[gate], self.pair.port.tensors.get(gate)
        usual = self.pair.rounding * ours.abs().amax(1)
        if theirs is None:
            return usual
        apart = (theirs - ours).abs().amax(1)
        return (16 * usual).minimum(4 * self.pair.epsilon * ours.abs().amax(1) + 2 * apart)

    def margin(self, gate):
        """The logit of the last chosen expert minus that of the first refused one, (N)."""
        A, logits = self.pair.trace.config["num_experts_per_tok"], self.pair.ours[gate]
        best = F.pad(logits.sort(descending=True)[0], (0, 1), value=-math.inf)
        return best[:, A - 1] - best[:, A]

    def hidden_flips(self, name, bad):
        """Whether near ties, in a layer of which theirs has no choices, explain the bad rows."""
        at = name.partition(".block")[0] + ".block_sparse_moe"
        if word(name) not in ("layer", "block_sparse_moe") or f"{at}.chosen" in self.pair.theirs:
            return False
        margin = self.margin(f"{at}.gate")
        if (margin >= self.allowed(f"{at}.gate"))[bad].any() or (
                all(self.steps.fails(name, c) for c in (None, refused(bad.tolist())))):
            return False
        self.flip(f"{at}.chosen", bad, margin)
        return True

    def flip(self, chosen, tokens, gap):
        self.flips += [(chosen, token, gap[token].item()) for token in tokens.tolist()]
        self.tainted[tokens] = True

    def choices(self, chosen):
        """`difference` for the experts: None if they are the same or a flip explains each.

        Experts whose logits are exactly equal on both sides are no flip: the lower index wins.
        """
        gate, port = chosen.replace("chosen", "gate"), self.pair.port.tensors
        mine, other, logits = self.pair.ours[chosen], port.get(chosen), self.pair.ours[gate]
        if other is None or other.shape != mine.shape:
            return lambda: self.shapes(chosen)
        wrong = (mine.sort(-1)[0] != other.sort(-1)[0]).any(1) & self.pair.real & ~self.tainted
        known = other.clamp(0, logits.shape[1] - 1)
        best, new = (logits.gather(1, x).sort(1)[0] for x in (mine.clamp(min=0), known))
        gap = (best[:, 0] - new[:, 0]).masked_fill((known != other).any(1), math.inf)
        tied = (best == new).all(1) & (gate in port)
        if gate in port:
            a, b = (port[gate].gather(1, x).sort(1)[0] for x in (mine.clamp(min=0), known))
            tied &= (a == b).all(1)
        self.flip(chosen, (wrong & (gap <= self.allowed(gate)) & ~tied).nonzero()[:, 0], gap)
        wrong &= ~self.tainted
        return (lambda: self.explain_choices(chosen, wrong, gap, tied)) if wrong.any() else None

    def explain_choices(self, chosen, wrong, gap, tied):
        """Sentences about other experts at the tokens in `wrong`."""
        n = int(wrong.nonzero()[0])
        ours, theirs = (x[n].tolist() for x in (self.pair.ours[chosen],
                                                self.pair.port.tensors[chosen]))
        why = (f"Our logits differ by {gap[n]:.3g}, so this is no near tie." if not tied[n] else
               "The logits of the exchanged experts are equal in both files, so the lower index "
               "must be chosen.")
        return [f"{int(wrong.sum())} of {len(wrong)} tokens have other experts. At token "
                f"{n % self.pair.S} of row {n // self.pair.S} ours chose {ours} and theirs "
                f"{theirs}. {why}", *self.cause(chosen, wrong, self.pair.rounding)]

    # -------------------------------------------------------------- causes

    def cause(self, name, bad, limit, error=math.inf, drift=False):
        """Sentences about the proved causes, or about what to do if there are none."""
        limit = min(limit / 4, error / NEARER) if word(name) != "chosen" else 0.0
        steps = self.steps
        if causes := steps.proved(name, bad, limit):
            return self.found(causes, steps)
        lines = self.not_found(name, steps, drift)
        if others := [n for n in steps.wrong if n != name and not drift]:
            lines.append("Computed from the port's own numbers, other steps differ too: "
                         f"{summary(others)}.")
        return lines

    def found(self, causes, steps):
        """Sentences about a proved cause, those that give the same numbers, and another error."""
        text, remaining, (same, rest, spoilt) = causes[0]
        lines = [f"Cause: {text}. With it, the error that remains is {remaining:.2g}."]
        if same:
            lines.append(f"The port makes the same error in {summary(same)}.")
        if spoilt:
            lines.append(f"It does not make it in {summary(spoilt)}.")
        others = [other for other, *_ in causes[1:] if not other.startswith(text)]
        if others and READ not in text:
            lines.append("The same numbers would follow if "
                         f"{'; or if '.join([*dict.fromkeys(others)][:3])}.")
        if rest:  # numbers that were read in one tensor do not fit others
            lines.append("Computed from the port's own numbers, other steps differ too"
                         f"{', so there is another error' * (READ not in text)}: {summary(rest)}.")
            more = steps.proved(rest[0], None, self.pair.rounding)
            lines += [f"There: {more[0][0]}."] if more else []
        return lines

    def not_found(self, name, steps, drift):
        if drift:
            return ["Cause: no single operation. The error drifts: it grew without a jump, as "
                    "lower precision inside the port makes it grow; --all lists it."]
        lines = [f"Cause: not found. The largest error before it is {self.largest:.2g}."]
        if steps.untested:
            lines.append(f"Causes that could not be tested without the weights: "
                         f"{len(steps.untested)}. Give the directory of the model with --model.")
        if skipped := self.pair.skipped(self.equal[-1] if self.equal else None, name):
            main = [n for n in skipped if ".experts." not in n] or skipped
            lines.append(f"Trace {main[len(main) // 2]} next.")
        return lines


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
    for text in dict.fromkeys(found.layouts.values()):
        names = [name for name, other in found.layouts.items() if other == text]
        yield (f"Your layout differs in {summary(names)}: {text}. All that is computed from it is "
               "equal, so this is no error.")
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
                   help="tokens per call of the port (default: as in the golden file)")
    p.add_argument("--all", action="store_true", help="list the error of every tensor")
    args = p.parse_args(argv)
    if args.chunk < 0:
        p.error(f"--chunk must be at least 0, got {args.chunk}")
    return args


def read_names(path):
    try:
        names = {**json.loads(path.read_text(encoding="utf-8"))} if path else {}
        if len({str.strip(name) for name in names.values()}) < len(names):
            raise ValueError("two names are mapped to one")
        return names
    except (OSError, ValueError, TypeError) as error:
        raise IncomparableError(f"{path}: not readable as a JSON object {{their name: our name}}: "
                                f"{error}") from None


@torch.inference_mode()
def main(argv=None):
    args = arguments(argv)
    try:
        pair = Pair(args, read_names(args.names))
        found = Comparison(pair).walk()
        if found.first is None and not found.errors and not found.equal:
            raise IncomparableError(f"{args.theirs}: no number of it could be compared")
        print("\n".join(verdict(pair, found, args)))
        return 0 if found.first is None else 1
    except IncomparableError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
