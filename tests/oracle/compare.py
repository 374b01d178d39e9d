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
from causes import GUESSES, READ, listed, spans
from pair import SLACK, IncomparableError, Pair, as_rows, row_errors
from reference import axes, word
from steps import STEPS, Place, Run, calls_of, experts_in, parse, without
from torch.nn import functional as F

NEARER = 8
LABELS = {"H": "head", "K": "key head", "d": "feature", "D": "feature", "M": "feature",
          "E": "expert", "A": "choice", "V": "token id", "T": "key"}
# What every layout leaves as it is, for quantities in which what follows may not show an error. In
# bfloat16 the stream hides what is small beside it; nothing is computed from router logits that
# lose; and no score shows a shift of all positions.
UNCHANGED = dict.fromkeys(("embed_tokens", "o_proj", "residual", "block_sparse_moe", "layer"),
                          lambda x: x) | dict.fromkeys(
    ("q_rotated", "k_rotated"), lambda x: F.normalize(x.flatten(1)).sort()[0]) | {
    "gate": lambda x: (x - x.amax(1, keepdim=True)).sort()[0]}
UNFIT = (LookupError, RuntimeError)  # what a step raises if it cannot be computed


# ------------------------------------------------------------------ where a tensor differs


def parts(pair, name, x):
    """Rows (n, …) with the heads and their features apart, and a letter for each later axis."""
    letters = [a for a in axes(name) if a not in ("B", "S", "N", "R")] or ["taken"]
    if "·" in letters[-1]:
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
    a, b = (parts(pair, name, x)[0][place] for x in (ours, theirs))
    row, token = divmod(int(tokens[place[0]]), pair.S)
    words = [f"row {row}, token {token}", *(
        f"{LABELS[letter]} {n}" for letter, n in zip(letters, place[1:], strict=True)
        if letter in LABELS)]
    return (f"The largest difference is {difference[place]:.3g}, at {', '.join(words)}: ours "
            f"{a:.6g}, theirs {b:.6g}.")


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
            # what is left after whole vectors of 8 numbers
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
    chosen = pair.ours.get(f"model.layers.{parse(name)[1]}.block_sparse_moe.chosen")
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


# ------------------------------------------------------------------ proving causes


class Prover:
    """The port's quantities, each computed by our steps from what the port has before it."""

    def __init__(self, pair):
        self.pair, self.port, self.limit = pair, pair.port, 8 * pair.rounding

    @functools.cached_property
    def wrong(self):
        return [name for name in self.port.tensors if word(name) in STEPS and not self.fits(name)]

    def leave_out(self, last):
        """Compute a quantity by our steps in all layers, because the port has another layout."""
        self.port = self.port._replace(tensors={
            name: x for name, x in self.port.tensors.items() if word(name) != last})

    def error(self, name, changes=None, bad=None):
        """The largest error of a quantity, with changes. Raises one of UNFIT.

        With `bad`, it is the first that differs, so what the port lacks before it is equal to ours.
        Rows with NaN are left out: a softmax over nothing gives no number to compare. At least a
        third of the rows of the tokens in `bad` must be left.
        """
        theirs, use = self.pair.port.tensors[name], self.pair.tokens(name)
        mine = computed(self.port, name, changes, self.pair.ours if bad is not None else None)
        if mine.shape != theirs.shape:
            return math.inf
        if word(name) == "chosen":
            return self.choice(name, mine, theirs)
        mine, theirs = (as_rows(x, axes(name)) for x in (mine, theirs))
        clear = use & ~mine.flatten(1).isnan().any(1)
        if bad is not None and 3 * (bad & clear).sum() < (bad & use).sum() or (
                changes and not clear.any()):
            return math.inf
        return max(row_errors(mine[clear], theirs[clear]).tolist(), default=0.0)

    def choice(self, name, mine, theirs):
        """∞ if experts differ by more than a near tie, otherwise 0."""
        logits = Run(self.port)[name.replace("chosen", "gate")]
        near = gap(logits, mine, theirs) <= self.limit * logits.abs().amax(1)
        return 0.0 if near[self.pair.real].all() else math.inf

    def fits(self, name, changes=None, unknown=True):
        """Whether the changes give a quantity; `unknown` is the answer if they cannot be tested."""
        try:
            return self.error(name, changes) <= self.limit
        except UNFIT:
            return unknown

    def guesses(self, name):
        """Every guess that can reach a quantity, as (text, changes)."""
        run = Run(without(self.port, name))
        reached = {parse(n)[0]: n for n in run.lacking(name)}
        for words, guess in GUESSES:
            words = tuple(words.split())
            reaching = [last for last in words if last in reached]
            if not reaching:
                continue
            here = word(name) in reaching
            place = Place(run, name if here else reached[reaching[0]])
            theirs = self.pair.port.tensors[name] if here else None
            with contextlib.suppress(*UNFIT):  # shapes that contradict those before it
                for text, change in guess.items() if isinstance(guess, dict) else guess(
                        place, theirs):
                    if isinstance(change, dict):
                        yield text, change
                        continue
                    for some in dict.fromkeys([words, *((last,) for last in reaching)]):
                        yield (text + f", in {some[0]} only" * (some != words),
                               dict.fromkeys(some, change))

    def causes(self, name, bad, limit):
        """The guesses that explain a quantity, as (text, remaining error, changes)."""
        with contextlib.suppress(*UNFIT):  # what is right as it is has no cause
            limit = min(limit, self.error(name, None, bad) / NEARER)
        known = word(name) in STEPS and name in self.pair.port.tensors
        for text, changes in self.guesses(name) if known else ():
            with contextlib.suppress(*UNFIT):
                if (error := self.error(name, changes, bad)) <= limit:
                    yield text, error, changes

    def proved(self, name, bad, limit):
        """The causes as (text, remaining error, what else they explain), the best ones only.

        Others leave a much larger error, or explain fewer of the port's other wrong steps.
        """
        found = [*self.causes(name, bad, limit)]
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
        for other in self.port.tensors.keys() - {name}:
            if word(other) not in STEPS:
                continue
            lacking = Run(without(self.port, other)).lacking(other)
            touched = any({n, parse(n)[0]} & changes.keys() for n in lacking)
            wrong = other in self.wrong
            fits = self.fits(other, changes) if touched else not wrong
            if wrong or not fits:
                (same if fits else rest if wrong else spoilt).append(other)
        return [sorted(found, key=self.pair.order.index) for found in (same, rest, spoilt)]


def computed(trace, name, changes=None, equal=None):
    """A quantity by our steps from what the trace holds before it, with changes.

    What the trace lacks and no change reaches is taken from `equal`, where it is known.
    """
    run, reached = Run(without(trace, name), changes), set()
    for other, inputs in run.lacking(name).items():
        if {other, parse(other)[0]} & run.changes.keys() or reached & set(inputs):
            reached.add(other)
        elif other in (equal or {}) and other != name:
            run.values[other] = equal[other]
        if word(other) == "layer":  # layer by layer, so that the recursion stays shallow
            run[other]
    return run[name]


def gap(logits, a, b):
    """By how much the logits of two choices of experts differ, for each token."""
    a, b = (logits.gather(1, x.clamp(min=0)).sort(1)[0] for x in (a, b))
    return (a - b).abs().amax(1)


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

    def __init__(self, pair):
        self.pair, self.prover = pair, Prover(pair)
        self.equal, self.errors, self.flips, self.different = [], {}, [], []
        self.first, self.largest = None, 0.0  # name and sentences; the largest error so far
        self.layouts = {}  # what is known of a layout, by the name of its tensor
        self.tainted = torch.zeros_like(pair.real)  # tokens that a routing flip has reached
        start = pair.trace._replace(tensors={"tokens": pair.ours["tokens"]})
        self.graph = Run(start).lacking(pair.order[-1])  # all quantities with their inputs

    def walk(self):
        layer = None
        for name in self.pair.shared:
            if parse(name)[1] != layer:  # attention takes a flip to the later tokens of its row
                layer = parse(name)[1]
                self.tainted = (self.tainted.view(-1, self.pair.S).cumsum(1) > 0).flatten()
            explain = self.choices(name) if word(name) == "chosen" else self.numbers(name)
            if explain is None:
                self.equal.append(name)
            elif self.first is None and self.is_layout(name):
                self.layouts[name] = self.described(name)
            else:
                self.different.append(name)
                self.first = self.first or (name, explain())
                if word(name) == "chosen":
                    break  # other experts ran: nothing that follows can be compared
        return self

    def numbers(self, name):
        """None if a tensor is equal, else a function that returns sentences about it."""
        pair = self.pair
        ours, theirs, tokens = pair.rows(name)
        if theirs is None:
            return lambda: self.shapes(name)
        ours, theirs, tokens = (x[~self.tainted[tokens]] for x in (ours, theirs, tokens))
        if not len(ours):
            return None
        found, limits = row_errors(ours, theirs), pair.limits(name, self.largest)
        bad = found > min(limits)
        equal = not bad.any() or self.hidden_flips(name, tokens[bad])
        self.errors[name] = max(found[~bad if equal else slice(None)].tolist(), default=0.0)
        if equal:
            self.largest = max(self.largest, self.errors[name])
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
        theirs, ours, real = self.pair.theirs[name], self.pair.ours[name], self.pair.real
        rows = len(ours) if axes(name)[0] != "R" else len(
            self.pair.ours[name.rpartition(".")[0] + ".tokens"])
        lines = [f"Its shape is {list(theirs.shape)}, ours is {[rows, *ours.shape[1:]]}."]
        if theirs.numel() * self.pair.S == ours.numel() > 0:
            lines.append("It has one token per row. Write all of them, not only the last.")
        elif theirs.numel() * len(real) == ours.numel() * real.sum() and not real.all():
            lines.append("It lacks the padding. Write rows of the same length.")
        return lines + self.cause(name, torch.ones_like(self.pair.real), self.pair.rounding)

    # -------------------------------------------------------------- layouts

    def is_layout(self, name):
        """Whether all that is computed from a tensor is equal to ours.

        If the port has an error right behind the tensor, our steps must give our numbers from the
        port's.
        """
        ours, theirs, tokens = self.pair.rows(name) if word(name) in STEPS else (None,) * 3
        if theirs is None:
            return False
        ours, theirs = (x[~self.tainted[tokens]] for x in (ours, theirs))
        limit = min(self.pair.limits(name, self.largest))
        form = UNCHANGED.get(word(name), torch.zeros_like)
        if row_errors(form(ours), form(theirs)).max() > limit:
            return False
        reached = {name}
        for other, inputs in self.graph.items():
            if reached & {*inputs} and not self.is_ours(other):
                reached.add(other)
        return self.pair.order[-1] not in reached

    def is_ours(self, name):
        """Whether the port has our numbers, or our steps give them from what it has before."""
        if name not in self.pair.port.tensors or self.near(name):
            return name in self.pair.port.tensors
        with contextlib.suppress(*UNFIT):
            return self.near(name, computed(self.pair.port, name))
        return False

    def near(self, name, theirs=None):
        """Whether numbers, by default the port's, are ours within rounding."""
        ours, theirs, tokens = self.pair.rows(name, theirs)
        keep = ~self.tainted[tokens]
        return theirs is not None and max(row_errors(ours[keep], theirs[keep]).tolist(), default=0.0
                                          ) <= self.pair.limits(name, 0.0)[0]

    def described(self, name):
        """The cause that explains a layout, or nothing; the proofs then do without the tensor."""
        known = {word(other): text for other, text in self.layouts.items()}
        if word(name) in known:
            return known[word(name)]
        found = self.prover.causes(name, None, self.pair.rounding)
        text = min(found, key=lambda cause: cause[1], default=("",))[0]
        self.prover.leave_out(word(name))
        return text

    # -------------------------------------------------------------- routing

    def allowed(self, gate):
        """By how much rounding can change the difference of two router logits of each token."""
        ours, theirs = self.pair.ours[gate], self.pair.port.tensors.get(gate)
        usual = self.pair.rounding * ours.abs().amax(1)
        if theirs is None:
            return usual
        apart = (theirs - ours).abs().amax(1)
        return (16 * usual).minimum(4 * self.pair.epsilon * ours.abs().amax(1) + 2 * apart)

    def hidden_flips(self, name, bad):
        """Whether near ties, in a layer of which theirs has no choices, explain the bad rows."""
        at = name.partition(".block")[0] + ".block_sparse_moe"
        known = f"{at}.chosen" in self.pair.theirs
        if known or word(name) not in ("layer", "block_sparse_moe", "tokens"):
            return False
        margin = self.pair.ours.get(f"{at}.margin")  # there is none if all experts are chosen
        if margin is None or (margin >= self.allowed(f"{at}.gate"))[bad].any():
            return False
        if word(name) != "tokens" and not any(self.prover.fits(name, changes, unknown=False)
                                              for changes in (None, refused(bad.tolist()))):
            return False
        self.flip(f"{at}.chosen", bad, margin)
        return True

    def flip(self, chosen, tokens, apart):
        self.flips += [(chosen, token, apart[token].item()) for token in tokens.tolist()]
        self.tainted[tokens] = True

    def choices(self, chosen):
        """`numbers` for the experts: None if they are the same or a flip explains each.

        Experts whose logits are exactly equal on both sides are no flip: the lower index wins.
        """
        gate, port = chosen.replace("chosen", "gate"), self.pair.port.tensors
        mine, other, logits = self.pair.ours[chosen], port.get(chosen), self.pair.ours[gate]
        if other is None or other.shape != mine.shape:
            return lambda: self.shapes(chosen)
        wrong = (mine.sort(-1)[0] != other.sort(-1)[0]).any(1) & self.pair.real & ~self.tainted
        apart, exact = gap(logits, mine, other), gate in port and (
            self.pair.theirs[gate].dtype not in SLACK)
        tied = (apart == 0) & (gap(port[gate], mine, other) == 0 if exact else False)
        self.flip(chosen, (wrong & (apart <= self.allowed(gate)) & ~tied).nonzero()[:, 0], apart)
        wrong &= ~self.tainted
        return (lambda: self.explain_choices(chosen, wrong, apart, tied)) if wrong.any() else None

    def explain_choices(self, chosen, wrong, apart, tied):
        """Sentences about other experts at the tokens in `wrong`."""
        n = int(wrong.nonzero()[0])
        ours, theirs = (x[n].tolist() for x in (self.pair.ours[chosen],
                                                self.pair.port.tensors[chosen]))
        why = (f"Our logits differ by {apart[n]:.3g}, so this is no near tie." if not tied[n] else
               "The logits of the exchanged experts are equal in both files, so the lower index "
               "must be chosen.")
        return [f"{int(wrong.sum())} of {len(wrong)} tokens have other experts. At token "
                f"{n % self.pair.S} of row {n // self.pair.S} ours chose {ours} and theirs "
                f"{theirs}. {why}", *self.cause(chosen, wrong, self.pair.rounding)]

    # -------------------------------------------------------------- causes

    def cause(self, name, bad, limit, error=math.inf, drift=False):
        """Sentences about the proved causes, or about what to do if there are none."""
        limit = min(limit / 4, error / NEARER) if word(name) != "chosen" else 0.0
        if causes := self.prover.proved(name, bad, limit):
            return self.found(causes)
        if drift:
            return ["Cause: no single operation. The error drifts: it grew without a jump, as "
                    "lower precision inside the port makes it grow; --all lists it."]
        lines = [f"Cause: not found. The largest error before it is {self.largest:.2g}."]
        if word(name) == "tokens":
            lines.append("Number tokens over all calls, from 0; no expert drops a token.")
        if not self.pair.trace.weights:
            lines.append("Most causes need the weights. Give the directory of the model with "
                         "--model.")
        if skipped := self.pair.skipped(self.equal[-1] if self.equal else None, name):
            main = [n for n in skipped if ".experts." not in n] or skipped
            lines.append(f"Trace {main[len(main) // 2]} next.")
        if others := [n for n in self.prover.wrong if n != name]:
            lines.append("Computed from the port's own numbers, other steps differ too: "
                         f"{summary(others)}.")
        return lines

    def found(self, causes):
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
            more = self.prover.proved(rest[0], None, self.pair.rounding)
            lines += [f"There: {more[0][0]}."] if more else []
        return lines


# ------------------------------------------------------------------ the command


def verdict(pair, found, args):
    """All sentences of the output."""
    dtype = str(pair.dtype)[6:]
    compared = len(found.equal) + len(found.layouts) + len(found.different)
    yield f"Compared {compared} of {len(pair.shared)} tensors with {dtype} rounding."
    if compared < len(pair.shared):
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
        alone = f"Taken alone, {text}. But all" if text else "All"
        yield (f"Your layout differs in {summary(names)}. {alone} that is computed from it is "
               "equal, so this is no error.")
    for chosen, token, apart in found.flips[:9]:
        why = "the logits are equal, and here the lower index is chosen" if apart == 0 else (
            f"the margin is {apart:.2g}")
        yield (f"Routing flip, no error: {chosen}, row {token // pair.S}, token {token % pair.S}; "
               f"{why}.")
    if found.first is not None:
        yield from describe_difference(pair, found)
        return
    name, error = max(((n, e) for n, e in found.errors.items() if n not in found.layouts),
                      key=lambda x: x[1], default=("none", 0.0))
    left = (f", which leave {int((pair.real & ~found.tainted).sum())} of {int(pair.real.sum())} "
            "tokens to compare at the end")
    yield (f"Equal within {dtype} rounding. The largest error is {error:.2g}, in {name}. "
           f"Routing flips: {len(found.flips)}{left * bool(found.flips)}.")


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
    p.add_argument("--interleaved", action="store_true", help="the port rotates neighbouring "
                   "features, and has the rows of q and k in Mistral's order")
    p.add_argument("--all", action="store_true", help="list the error of every tensor")
    return p.parse_args(argv)


def read_names(path):
    try:
        names = {**json.loads(path.read_text(encoding="utf-8"))} if path else {}
        if not all(isinstance(name, str) for name in names.values()):
            raise ValueError("a value is no string")
        return names
    except (OSError, ValueError, TypeError) as error:
        raise IncomparableError(f"{path}: not readable as a JSON object {{their name: our name}}: "
                                f"{error}") from None


@torch.inference_mode()
def main(argv=None):
    args = arguments(argv)
    try:
        pair = Pair(args.ours, args.theirs, read_names(args.names), args.model, args.interleaved)
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
