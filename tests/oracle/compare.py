"""Find where and why a port differs: `python tests/oracle/compare.py OURS THEIRS`.

OURS is a golden file or a file of trace.py. THEIRS is any safetensors file in which the port has
written some of the same quantities, in any floating-point dtype, with or without the axis B, with
heads and features as one axis or two. Tensors are compared in the order of computation.

The section Tolerances of tests/oracle/README.md says which errors count as rounding. A cause is
proved if our numbers, computed anew with that error in the port (see causes.py), are equal to
theirs: the error that remains is at most a quarter of what counts as rounding and at most an eighth
of the error without it. Nothing else is called a cause. A tensor that differs although everything
computed from it is equal is a layout and no error, if the difference follows a rule.

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
from causes import GUESSES, READ, Moved, factor_names, listed, spans
from pair import IncomparableError, Pair, as_rows, layer_of, reshaped, row_errors
from reference import axes, word
from steps import MissingError, Place, Run, calls_of, experts_in, parse

NEARER = 8
LABELS = {"H": "head", "K": "key head", "d": "feature", "D": "feature", "M": "feature",
          "E": "expert", "A": "choice", "V": "token id", "T": "key"}
UNFIT = (MissingError, RuntimeError, IndexError)  # what a guess raises where it cannot be tested


# ------------------------------------------------------------------ where a tensor differs


def parts(pair, name, x):
    """Rows (n, …) with the heads and their features apart, and a letter for each later axis."""
    letters = [a for a in axes(name) if a not in ("B", "S", "N", "R")]
    if letters and "·" in letters[-1]:
        x = x.unflatten(-1, (-1, pair.trace.config["head_dim"]))
        letters = letters[-1].split("·")
    return x, letters


def apart(ours, theirs):
    """|theirs − ours|; −∞ on both sides is equal, and NaN is infinitely far from a number."""
    difference = (ours - theirs).abs().masked_fill(ours == theirs, 0.0)
    return difference.nan_to_num(math.inf, math.inf)


def describe_place(pair, name, ours, theirs, tokens):
    """One sentence about the largest difference of some rows."""
    split = [parts(pair, name, x) for x in (ours, theirs, apart(ours, theirs))]
    place = torch.unravel_index(split[2][0].argmax(), split[2][0].shape)
    a, b, size = (x[place].item() for x, _ in split)
    token = int(tokens[place[0]])
    words = [f"row {token // pair.S}", f"token {token % pair.S}", *(
        f"{LABELS[letter]} {n}" for letter, n in zip(split[0][1], place[1:], strict=True))]
    if parse(name)[2] is not None:
        words.append(f"expert {parse(name)[2]}")
    how = ""
    if a and math.isfinite(size):
        ulps = size / (pair.epsilon * 2.0 ** math.floor(math.log2(abs(a))))
        how = (f" ({ulps:.3g} ulps of {str(pair.dtype)[6:]})" if ulps < 1e6 else
               f" ({size / abs(a):.2g} times |ours|)")
    return (f"The largest difference is {size:.3g}{how} at {', '.join(words)}: ours {a:.6g}, "
            f"theirs {b:.6g}.")


def confined(pair, name, ours, theirs, tokens, bad):
    """One sentence that confines the difference along each axis; `bad` marks rows."""
    difference, letters = parts(pair, name, apart(ours, theirs)[bad])
    sizes = ours.masked_fill(ours.isinf(), 0.0).flatten(1).norm(dim=1)
    floor = pair.rounding * sizes.maximum(sizes.median())[bad] / math.sqrt(ours[0].numel())
    wrong = difference > floor.view(-1, *[1] * len(letters))
    if difference.isinf().any():  # NaN and infinity hide what is only wrong
        wrong = difference.isinf()
    words = token_words(pair, name, tokens, tokens[bad][wrong.flatten(1).any(1)])
    for axis, letter in enumerate(letters, 1):
        found = wrong.movedim(axis, 0).flatten(1).any(1)
        first = int(found.int().argmax())
        if not found.all():
            words.append(f"{LABELS[letter]}s {spans(found.nonzero()[:, 0].tolist())}" + (
                ", from the last multiple of 8 on" if found[first:].all() and
                first == len(found) // 8 * 8 else ""))
    return f"It is confined to {'; '.join(words)}." if words else (
        "It concerns all tokens and all numbers of each.")


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
    S, last = pair.S, {n // pair.S: n for n in own}
    yield "the first token of each row", {n for n in own if n % S == 0}
    yield "all tokens but the first of each row", {n for n in own if n % S}
    yield "the last token of each row", set(last.values())
    for calls in calls_of(pair.trace) if pair.trace.chunk or pair.trace.calls else ():
        number, start, end = (x.flatten() for x in (calls.number, calls.start, calls.end))
        yield "the first token of each call", {n for n in own if start[n] == n % S}
        yield "the last token of each call", {n for n in own if end[n] == n % S + 1}
        for at in range(1, int(number.max()) + 1):
            yield f"the tokens from call {at} on", {n for n in own if number[n] >= at}
            yield f"the tokens of call {at}", {n for n in own if number[n] == at}
    chosen = pair.ours.get(f"model.layers.{layer_of(name)}.block_sparse_moe.chosen")
    if chosen is not None and word(name) in ("block_sparse_moe", "layer"):
        takers = {e: (chosen == e).any(1).nonzero()[:, 0].tolist() for e in experts_in(chosen)}
        for e, found in takers.items():
            yield f"the tokens of expert {e}", set(found)
        yield "the last token of each expert", {found[-1] for found in takers.values()}


def summary(names):
    """Names as text, those of one kind together: w1 of experts 0 and 2 in layer 1."""
    kinds = {}
    for last, layer, expert in map(parse, names):
        kinds.setdefault(last, (set(), set()))
        for found, n in zip(kinds[last], (layer, expert), strict=True):
            found.update([] if n is None else [n])
    def plural(what, numbers):
        return f"{what}{'s' * (len(numbers) > 1)} {spans(sorted(numbers))}" * bool(numbers)
    return listed((f"{last} of {plural('layer', layers)}{', ' * bool(experts)}"
                   f"{plural('expert', experts)}" if layers else last
                   for last, (layers, experts) in kinds.items()), 8, "; ")


# ------------------------------------------------------------------ maps between ours and theirs


def matched(ours, theirs, axis):
    """For each slice of theirs along an axis, the number of the nearest slice of ours."""
    a, b = (x.nan_to_num(0, 0, 0).movedim(axis, 0).flatten(1) for x in (ours, theirs))
    return torch.cdist(b, a, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def reordered(ours, theirs, axis, what):
    """Theirs after slices in another order were moved back, as (text, theirs)."""
    order = matched(ours, theirs, axis)
    moved = (order != torch.arange(len(order))).nonzero()[:, 0].tolist()
    if moved and len(set(order.tolist())) == len(order):
        text = f"{what}s {moved[0]} and {moved[1]} are exchanged" if len(moved) == 2 else (
            f"its {what}s are ours in the order {listed(order.tolist(), 12)}")
        yield text, theirs.index_select(axis, order.argsort())


def rescaled(ours, theirs, dims, text, c):
    """Theirs without a factor that is constant along `dims`, as (text, theirs)."""
    clear = ours.isfinite() & theirs.isfinite() & (ours != 0)
    a, b = (x.where(clear, 0.0) for x in (ours, theirs))
    factor = (a * b).sum(dims, keepdim=True) / a.square().sum(dims, keepdim=True)
    if len(dims) == ours.ndim:
        named = [name for name, x in factor_names(c).items() if abs(factor.item() / x - 1) < 1e-5]
        digits = 6 if abs(factor.item() - 1) > 1e-5 else 15
        text += f" {factor.item():.{digits}g}" + f", which is {' or '.join(named)}" * bool(named)
    if ours.numel() >= 3 * factor.numel():  # fewer numbers would prove nothing
        yield text, theirs / factor.where(factor.isfinite() & (factor != 0), 1.0)


def maps(pair, name):
    """What may have happened to any tensor, as (text, theirs undone, whether it can be a layout).
    """
    for text, back in other_axes(pair, name):
        yield text, back, True
    ours, theirs, tokens = pair.aligned(name, pair.ours[name].double())
    if theirs is None or word(name) == "chosen":
        return
    shape, letters = ours.shape, parts(pair, name, ours)[1]
    ours, theirs = (parts(pair, name, x)[0] for x in (ours, theirs))
    found = [(*f, True) for axis, letter in enumerate(letters, 1) if letter not in "DVAT"
             for f in reordered(ours, theirs, axis, LABELS[letter])]
    found += [(*f, False) for axis, letter in ((0, None), (len(letters), letters[-1:]))
              if letter is None or letter[0] in "DVAT"
              for f in reordered(ours, theirs, axis, LABELS[letter[0]] if letter else "token")]
    every = range(ours.ndim)
    for dims, text in ((every, "it is multiplied by"),
                       (every[:-1], "each feature has its own factor"),
                       (every[1:], "each token has its own factor")):
        found += [(*f, True) for f in rescaled(ours, theirs, tuple(dims), text,
                                               pair.trace.config) if ours.ndim > 1]
    if word(name) in ("scores", "gate"):
        clear = ours.isfinite() & theirs.isfinite()
        added = (theirs - ours).where(clear, math.nan).nanmedian(-1, keepdim=True)[0]
        found.append(("a number is added to each row", theirs - added.nan_to_num(), True))
    for by in (1, -1) if axes(name)[0] != "R" else ():
        moved = theirs.roll(-by, 0)
        edge = tokens % pair.S == (pair.S - 1 if by > 0 else 0)  # anything can fall free there
        moved[edge] = ours[edge]
        found.append((f"it is shifted by {by:+} token", moved, False))
    for text, back, layout in found:
        yield text, back.reshape(shape), layout
    for held, x in pair.ours.items():
        if x.is_floating_point() and held != name and x.shape == pair.ours[name].shape:
            other = as_rows(x.double(), axes(name)).reshape(shape)
            yield f"it holds our {held}", (theirs.reshape(shape) - other) + ours.reshape(shape), 0


def other_axes(pair, name):
    """Theirs as it is if its axes are in another order, as (text, rows)."""
    ours, theirs = pair.ours[name].double(), pair.theirs[name].double()
    letters = [part for letter in axes(name) for part in letter.split("·")]
    if len(letters) > ours.ndim:
        ours = ours.unflatten(-1, (-1, pair.trace.config["head_dim"]))
    for how in itertools.permutations(range(ours.ndim)):
        moved = [n for n in how if ours.shape[n] > 1]
        if theirs.numel() == ours.numel() and moved != sorted(moved):
            back = theirs.reshape([ours.shape[n] for n in how]).permute(
                [how.index(n) for n in range(len(how))])
            yield (f"its axes are in the order {' '.join(letters[n] for n in how)} instead of "
                   f"{' '.join(letters)}", as_rows(back.reshape(pair.ours[name].shape), axes(name)))


def renumbered(pair, gate):
    """A layer of theirs with the experts in our order, as (text, tensors), from the logits."""
    ours, theirs = pair.ours[gate].double(), reshaped(pair.theirs[gate].double(), pair.ours[gate])
    for text, back in () if theirs is None else reordered(ours, theirs, 1, "expert"):
        order, at, found = matched(ours, theirs, 1), gate.removesuffix("gate"), {gate: back}
        for name, x in pair.theirs.items():
            if name == at + "chosen":
                found[name] = order[x.long().clamp(0, len(order) - 1)]
            elif name.startswith(at + "experts."):
                e = parse(name)[2]
                found[name.replace(f"experts.{e}.", f"experts.{order[e]}.")] = x
        yield text, found


def rounded(ours, theirs):
    """The dtype to which theirs was rounded, or None. Nearly all numbers must be equal then."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if theirs.to(dtype).double().equal(theirs.double()):
            near = (ours.to(dtype).double() == theirs.double()).double().mean()
            return dtype if theirs.dtype.itemsize > dtype.itemsize and near > 0.9 else None
    return None


# ------------------------------------------------------------------ testing causes


class Steps:
    """Which steps of the port agree with ours if they start from the port's own numbers."""

    def __init__(self, pair):
        self.pair, self.port, self.limit = pair, pair.port(), 8 * pair.rounding
        self.names = [n for n in pair.shared if n in self.port.tensors and word(n) != "tokens"]
        self.wrong = [n for n in self.names if self.error(n) > self.limit]

    def error(self, name, changes=None):
        """The largest error of one step, with changes; 0 if it cannot be computed."""
        try:
            mine, theirs = Run(self.port, changes).local(name), self.port.tensors[name]
            if mine.shape != theirs.shape:
                return math.inf
            if word(name) == "chosen":
                return self.choice(name, mine, theirs)
        except UNFIT:
            return 0.0
        if axes(name)[0] != "R":
            mine, theirs = (as_rows(x, axes(name))[self.pair.real] for x in (mine, theirs))
        kept = ~mine.flatten(1).isnan().any(1)
        return max(row_errors(mine[kept], theirs[kept]).tolist(), default=0.0)

    def choice(self, name, mine, theirs):
        """∞ if experts differ by more than a near tie, otherwise 0."""
        logits = Run(self.port)[name.replace("chosen", "gate")]
        a, b = (logits.gather(1, x.clamp(min=0)).sort(1)[0] for x in (mine, theirs))
        near = (a - b).abs().amax(1) <= self.limit * logits.abs().amax(1)
        return 0.0 if (near | (mine.sort(1)[0] == theirs.sort(1)[0]).all(1)).all() else math.inf

    def follow(self, name, changes):
        """The other wrong steps that changes explain, those they do not, and those they spoil."""
        same, rest, spoilt = [], [], []
        for other in self.names:
            run = Run(self.port, changes)
            if run.change(other) is not None or any(
                    n not in self.port.tensors for n in Place(run, other).inputs()):
                fits = self.error(other, changes) <= self.limit
            else:
                fits = other not in self.wrong
            if other != name and not (fits and other not in self.wrong):
                (spoilt if other not in self.wrong else same if fits else rest).append(other)
        return same, rest, spoilt


class Diagnosis:
    """Tests all guesses about a difference.

    `equal` has the names of the tensors that are equal, `bad` marks the tokens that differ, `keep`
    those that can be compared. What was not tested for lack of weights is in `untested`.
    """

    def __init__(self, pair, name, equal, bad, keep, limit):
        self.pair, self.name, self.equal = pair, name, frozenset(equal)
        self.bad, self.keep, self.limit = bad, keep, limit
        self.untested, self.reach = set(), {}
        theirs = pair.theirs[name]
        self.theirs = theirs if word(name) == "chosen" else reshaped(
            theirs.double(), pair.ours[name])

    def remaining(self, name, mine, run=None, theirs=None):
        """The largest error of theirs against `mine`, or ∞ if they have too few numbers.

        Rows with NaN are left out: a softmax over nothing gives no number to compare. At least a
        third of the rows that differ must be left.
        """
        if theirs is None:
            mine, theirs, tokens = self.pair.aligned(name, mine, run)
        else:
            mine, _, tokens = self.pair.aligned(name, mine)
        if theirs is None or not len(mine):
            return math.inf
        bad, use = self.bad[tokens] & self.keep[tokens], ~mine.flatten(1).isnan().any(1)
        if not (bad & use).any() or 3 * (bad & use).sum() < bad.sum():
            return math.inf
        use &= self.keep[tokens]
        return row_errors(mine[use], theirs[use]).max().item()

    def runs(self, port):
        """Every guess that can reach the difference: in all its quantities, and in each alone."""
        for words, guesses in GUESSES:
            words = tuple(words.split())
            reaching = list(filter(self.reaches, words))
            if not reaching:
                continue
            here, run = word(self.name) in reaching, Run(self.pair.trace)
            run.port = port
            place = run.place_of(word(self.name) if here else reaching[0], self.name)
            try:
                for text, change in guesses(place, self.theirs if here else None):
                    if isinstance(change, Run):
                        yield text, change
                    elif isinstance(change, dict):
                        yield text, Run(self.pair.trace, change, self.equal)
                    else:
                        for part in dict.fromkeys([words, *((w,) for w in reaching)]):
                            yield text + f", in {part[0]} only" * (part != words), Run(
                                self.pair.trace, dict.fromkeys(part, change), self.equal)
            except MissingError as error:
                self.untested.add(f"{words}: {error}")
            except (RuntimeError, IndexError):
                continue  # shapes that contradict those of a tensor that is equal

    def reaches(self, last):
        """Whether an error in quantities of this kind can change the tensor."""
        if last not in self.reach:
            run = Run(self.pair.trace, {last: lambda p: None}, self.equal)
            self.reach[last] = run.affected(self.name)
        return self.reach[last]

    def proved(self, steps):
        """The proved causes as (text, remaining error, what else they explain), the best first.

        If some leave a much larger error than others, or explain fewer of the port's other wrong
        steps, only the others are returned.
        """
        found = []
        for text, run in self.runs(steps.port):
            try:
                error = self.remaining(self.name, run.reach(self.name), run)
            except MissingError:
                self.untested.add(text)
                continue
            except UNFIT:
                continue  # its shapes contradict those of a tensor that is equal
            found.append((text, error, run))
        ours = self.pair.ours[self.name].double()
        if word(self.name) == "chosen":
            found.append(("the ids of experts are counted from 1", self.remaining(
                self.name, ours + 1), None))
        undone = ((text, self.remaining(self.name, ours, theirs=back), None)
                  for text, back, _ in maps(self.pair, self.name))
        found = [cause for cause in found if cause[1] <= self.limit] or list(itertools.islice(
            (cause for cause in undone if cause[1] <= self.limit), 1))
        least = 4 * max(min((error for _, error, _ in found), default=0.0), self.pair.epsilon)
        ranked = [((error > least, *map(len, after[1:])), text, error, after)
                  for text, error, run in found for after in [self.follow(steps, run)]]
        best = min((cause[0] for cause in ranked), default=None)
        return [cause[1:] for cause in ranked if cause[0] == best]


    def follow(self, steps, run):
        """What else a cause explains; a Run over other rows of tokens explains all or nothing."""
        if not isinstance(run, Moved):
            return steps.follow(self.name, run.changes if run else {})
        last, others = self.pair.shared[-1], [n for n in steps.wrong if n != self.name]
        mine, theirs, _ = self.pair.aligned(last, run.reach(last))
        same = row_errors(mine[self.pair.real], theirs[self.pair.real]).max() <= steps.limit
        return (others, [], []) if same else ([], others, [])


# ------------------------------------------------------------------ comparing


def flip(tokens):
    """The change that at these tokens the first refused expert takes the place of the last one."""
    def refused(p):
        chosen, A = p.plain().clone(), p.plain().shape[1]
        for token in tokens:
            chosen[token, -1] = p["gate"][token].sort(descending=True, stable=True)[1][A]
        return chosen
    return {"chosen": refused}


class Comparison:
    """Walks through the tensors that both files have, up to the first difference and beyond."""

    def __init__(self, pair, args):
        self.pair, self.args = pair, args
        self.tolerances = args.rtol is not None or args.atol is not None
        self.equal, self.errors, self.flips, self.different = [], {}, [], []
        self.first, self.largest = None, 0.0  # name and sentences; the largest error so far
        self.compared, self.layouts = 0, {}  # a description of each layout, and its tensors
        self.tainted = torch.zeros_like(pair.real)  # tokens that a routing flip has reached

    def walk(self):
        layer = None
        for name in self.pair.shared:
            if layer_of(name) != layer:  # attention takes a flip to the later tokens of its row
                layer = layer_of(name)
                self.tainted = (self.tainted.view(-1, self.pair.S).cumsum(1) > 0).flatten()
            difference = self.difference(name)
            self.compared += 1
            if difference and self.first is None and not self.tolerances and self.layout(name):
                difference = self.difference(name)
            if difference is None:
                self.equal += [name] if word(name) != "tokens" else []
                continue
            self.different.append(name)
            if self.first is None:
                self.first = name, difference()
            if word(name) == "chosen":
                break  # other experts ran: nothing that follows can be compared
        return self

    def difference(self, name):
        """None if a tensor is equal, else a function that returns sentences about it."""
        return {"chosen": self.choices, "tokens": self.numbering}.get(
            word(name), self.numbers)(name)

    def same(self, name, theirs=None, ours=None):
        """Whether theirs, or the rows given in its place, are equal to ours."""
        mine, other, tokens = self.pair.aligned(
            name, self.pair.ours[name].double() if ours is None else ours)
        other = other if theirs is None else theirs
        keep = (self.pair.real & ~self.tainted)[tokens]
        return other is not None and max(row_errors(mine[keep], other[keep]).tolist(), default=0.0
                                         ) <= min(self.pair.limits(name, self.largest))

    def layout(self, name):
        """Whether a difference is a layout: all that the port computes from it is equal to ours."""
        kept, undone, pair = dict(self.pair.theirs), set(self.pair.undone), self.pair
        if word(name) == "gate":
            for text, found in renumbered(pair, name):
                pair.theirs |= found
                if all(self.settled(n, None, []) for n in found if n in pair.shared):
                    self.layouts.setdefault(text, []).append(name)
                    return True
                pair.theirs = dict(kept)
        texts = []
        if self.settled(name, None, texts):
            for text, other in texts:
                self.layouts.setdefault(text, []).append(other)
            return True
        pair.theirs, pair.undone = kept, undone
        return False

    def settled(self, name, port, texts):
        """Whether a tensor is equal, or differs by a layout only; then theirs gets ours."""
        if word(name) == "tokens" or self.same(name):
            return True
        for text, back, layout in maps(self.pair, name):
            if layout and self.same(name, back):
                port = port or Run(self.pair.port())  # before anything is undone
                self.pair.undo(name, back)
                texts.append((text, name))
                users = self.users(name)
                return bool(users) and all(
                    self.own_step(n, port) or self.settled(n, port, texts) for n in users)
        return False

    def users(self, name):
        """The next traced tensors that are computed from a tensor."""
        pair, dirty, found, run = self.pair, {name}, [], Run(self.pair.trace)
        for other in pair.order[pair.order.index(name) + 1:]:
            if word(other) not in ("margin", "tokens") and dirty & set(Place(run, other).inputs()):
                if other in pair.shared:
                    found.append(other)
                else:
                    dirty.add(other)
        return found

    def own_step(self, name, port):
        """Whether our step gives our numbers from what the port computed in its own layout."""
        try:
            mine = port.local(name)
        except UNFIT:
            return False
        ours = self.pair.ours[name]
        if mine.shape != ours.shape or word(name) == "chosen":
            return mine.shape == ours.shape and mine.equal(ours)
        mine, ours = (as_rows(x.double(), axes(name)) for x in (mine, ours))
        keep = self.pair.real if axes(name)[0] != "R" else slice(None)
        return (row_errors(ours[keep], mine[keep]) <= 8 * self.pair.rounding).all().item()

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
        return lambda: [describe_place(pair, name, ours, theirs, tokens),
                        confined(pair, name, ours, theirs, tokens, bad),
                        *self.explain(name, found, bad, tokens, limits)]

    def hidden_flips(self, name, bad, limits):
        """Whether near ties, in a layer of which theirs has no choices, explain the bad rows."""
        chosen = name.partition(".block")[0] + ".block_sparse_moe.chosen"
        if word(name) not in ("layer", "block_sparse_moe") or chosen in self.pair.theirs or (
                not all(self.margin(chosen, t) < self.allowed(chosen, t) for t in bad.tolist())):
            return False
        marked = torch.zeros_like(self.tainted).index_fill_(0, bad, True)
        run = Run(self.pair.trace, flip(bad.tolist()), self.equal)
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
        known = own is not None and 0 <= min(changed) and max(changed) < own.shape[1]
        return known and all(len({x[e].item() for e in changed}) == 1
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
        lines = [f"Its shape is {list(pair.theirs[name].shape)}, ours is "
                 f"{list(pair.ours[name].shape)}."]
        if pair.theirs[name].numel() * pair.S == pair.ours[name].numel() > 0:
            lines.append("It has one token per row. Write all of them, not only the last.")
        return lines + self.cause(name, torch.ones_like(pair.real), pair.rounding)

    def explain(self, name, found, bad, tokens, limits):
        """Sentences about a tensor whose numbers differ, from the errors of its rows."""
        pair, limit, error = self.pair, min(limits), found.max().item()
        first = int(tokens[bad][0]) % pair.S
        lines = [f"{int(bad.sum())} of {len(bad)} rows differ, the first at token {first}. The "
                 f"largest error of a row is {error:.2g}; rounding explains {limit:.2g}."]
        if not pair.theirs[name].isfinite().all() and pair.ours[name].isfinite().all():
            lines.append("Theirs has infinite numbers or NaN.")
        if pair.trace.chunk and first and first % pair.trace.chunk == 0 and not pair.trace.calls:
            lines.append(f"Token {first} is the first of a call of {pair.trace.chunk} tokens, "
                         "which points to the cache.")
        marked = torch.zeros_like(pair.real).index_fill_(0, tokens[bad], True)
        drift = not self.tolerances and error <= limits[1]
        return lines + self.cause(name, marked, limit, error, drift)

    def cause(self, name, bad, limit, error=math.inf, drift=False):
        """Sentences about the proved causes, or about what to do if there are none."""
        limit = min(limit / 4, error / NEARER) if word(name) != "chosen" else 0.0
        test = Diagnosis(self.pair, name, self.equal, bad, self.pair.real & ~self.tainted, limit)
        steps = Steps(self.pair)
        causes = test.proved(steps)
        if causes:
            return self.found(causes, steps)
        dtype = None if test.theirs is None else rounded(
            self.pair.ours[name], self.pair.theirs[name])
        if dtype and error < 4 * torch.finfo(dtype).eps:
            return [f"Cause: the numbers are rounded to {str(dtype)[6:]}."]
        lines = self.not_found(name, test, drift)
        if others := [n for n in steps.wrong if n != name and not drift]:
            lines.append("Computed from the port's own numbers, other steps differ too: "
                         f"{summary(others)}.")
        return lines

    def found(self, causes, steps):
        """Sentences about a proved cause and about those that give the same numbers."""
        text, remaining, (same, rest, spoilt) = causes[0]
        lines = [f"Cause: {text}. With it, the error that remains is {remaining:.2g}."]
        if same:
            lines.append(f"The port makes the same error in {summary(same)}.")
        if spoilt:
            lines.append(f"It does not make it in {summary(spoilt)}.")
        if rest:
            lines.append("Computed from the port's own numbers, other steps differ too, so there "
                         f"is another error: {summary(rest)}.")
        others = list(dict.fromkeys(other for other, *_ in causes[1:] if READ not in other))
        if others and READ not in text:
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
    for text, names in found.layouts.items():
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


@torch.inference_mode()
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
