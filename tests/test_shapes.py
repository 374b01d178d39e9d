"""Every documented shape holds in real runs, in which all letters have different sizes.

Shapes are documented in three ways. A shape line in a docstring gives what goes in and what comes
out, by parameter name or for the first parameters in order; a class means its `forward`. A line
without an arrow gives the fields of a class. A comment at the end of an assignment gives the
targets. While the code runs, `sys.settrace` shows every call and every line of it.

The letters are those of the table at the top of mixtral.py. `...` stands for any axes, the same
throughout a line.
"""

import ast
import contextlib
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import convert
import generate
import mixtral
from mixtral import Mixtral, MixtralConfig

ROOT = Path(__file__).resolve().parent.parent
FAST = [path for path in (ROOT / "fast" / "int4.py", ROOT / "fast" / "cpu.py") if path.exists()]
FILES = [ROOT / "mixtral.py", *FAST, ROOT / "convert.py", ROOT / "generate.py"]

ITEM = r"(?:[A-Za-z]|\d+)"
AXIS = rf"(?:\.\.\.|{ITEM}(?:[·/]{ITEM})*)"
SHAPE = rf"\((?:{AXIS}(?:, {AXIS})*)?\)"
ENTRY = rf"(?:[A-Za-z_]\w* )?{SHAPE}"
LINE = re.compile(rf"^ *({ENTRY}(?:, {ENTRY})*) -> ({ENTRY}(?:, {ENTRY})*)$", re.M)
FIELDS = re.compile(rf"^ *(\w+ {SHAPE}(?:, \w+ {SHAPE})*)$", re.M)
COMMENT = re.compile(rf"# ({SHAPE}(?:, {SHAPE})*)(?:; [^()]*)?")
LOOSE = re.compile(rf"(?<![\w.·(])(?<!// )\((?=[^)]*[A-Z])(?:{AXIS}(?:, {AXIS})*)\)")
ROW = re.compile(r"^ {4}(\w) {7}(\S.*?) +(-|[a-z_]+)  +(\S+)$", re.M)

# One size for each letter. All are different, also from d/2, D/8 and D/G. R, the tokens of one
# expert, differs between experts.
SIZES = {"B": 2, "S": 3, "T": 12, "N": 6, "V": 37, "D": 112, "L": 4, "H": 15, "K": 5, "d": 36,
         "W": 11, "C": 13, "E": 19, "A": 17, "M": 26, "G": 16}
OF_A_CALL = "STN"  # these letters can differ from call to call
IN_ANY_CALL = {letter: size for letter, size in SIZES.items() if letter not in OF_A_CALL}
FREE = {"rotate": "H"}  # the keys, which have K heads, are rotated too


def entries(text):
    """The names (None if there is none) and axes of the shapes in a text."""
    found = re.findall(rf"(?:([A-Za-z_]\w*) )?\(((?:{AXIS}(?:, {AXIS})*)?)\)", text)
    return [(name or None, axes.split(", ") if axes else []) for name, axes in found]


def size_of(axis, sizes):
    """The size of an axis such as `H·d`, or None if one of its letters has no size yet."""
    letters = set(re.findall("[A-Za-z]", axis))
    assert letters <= {*SIZES, "R"}, f"{axis} is not in the table"
    return eval(axis.replace("·", "*"), dict(sizes)) if letters <= sizes.keys() else None


def unify(axes, shape, sizes):
    """Compare one documented shape with a real one; a letter without a size gets one."""
    axes, shape = list(axes), tuple(shape)
    if "..." in axes:
        at, width = axes.index("..."), len(shape) - len(axes) + 1
        middle = shape[at:at + width]
        assert sizes.setdefault("...", middle) == middle, (axes, shape, sizes)
        axes, shape = axes[:at] + axes[at + 1:], shape[:at] + shape[at + width:]
    assert len(axes) == len(shape), (axes, shape)
    for axis, size in zip(axes, shape, strict=True):
        known = size_of(axis, sizes)
        if known is None and len(axis) == 1:
            sizes[axis] = size
        elif known is None:  # it is compared in the calls for which all sizes are given
            assert set(axis) & set(OF_A_CALL), f"{axis} cannot be computed"
        else:
            assert known == size, (axis, shape, sizes)


def unify_all(claimed, values, sizes):
    """Compare shapes with the tensors among some values: one each, or one shape for all."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    if len(claimed) == 1 < len(tensors):
        claimed = claimed * len(tensors)
    assert len(claimed) == len(tensors), (claimed, [x.shape for x in tensors])
    for (_, axes), tensor in zip(claimed, tensors, strict=True):
        unify(axes, tensor.shape, sizes)


# ---------------------------------------------------------------- what a file documents


def docstrings(tree):
    """Qualified name, node and docstring of each function, class and method of a module."""
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else []
        for prefix, thing in [("", node), *((f"{node.name}.", member) for member in members)]:
            if isinstance(thing, ast.ClassDef | ast.FunctionDef):
                yield prefix + thing.name, thing, ast.get_docstring(thing) or ""


def comment_shapes(source):
    """The shapes in comments, by line number. Words can follow only after a semicolon."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and LOOSE.search(token.string):
            match = COMMENT.fullmatch(token.string)
            assert match, f"line {token.start[0]}: the shapes must come first, then a semicolon"
            found[token.start[0]] = entries(match[1])
    return found


class Assignment(NamedTuple):
    """An assignment with a comment."""

    lines: range
    target: str
    shapes: list


class Documented:
    """The shapes in a file: of functions and classes by name, of assignments by their first line,
    and those in sentences of docstrings as pairs of a name and a shape."""

    def __init__(self, path):
        source = path.read_text(encoding="utf-8")
        self.lines, self.fields, self.prose, self.assignments = {}, {}, set(), {}
        tree, comments = ast.parse(source), comment_shapes(source)
        for name, node, text in docstrings(tree):
            if match := LINE.search(text):
                function = f"{name}.forward" if isinstance(node, ast.ClassDef) else name
                self.lines[function] = tuple(map(entries, match.groups()))
            if match := FIELDS.search(text):
                self.fields[name] = entries(match[1])
            sentences = FIELDS.sub("", LINE.sub("", text))
            self.prose |= {(name, match[0]) for match in LOOSE.finditer(sentences)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and node.end_lineno in comments:
                lines = range(node.lineno, node.end_lineno + 1)
                self.assignments[node.lineno] = Assignment(
                    lines, ast.unparse(node.targets[0]), comments.pop(node.end_lineno))
        assert not comments, f"lines {[*comments]}: no assignment ends there"

    def all(self):
        return {*self.lines, *self.fields, *self.prose, *self.assignments}


# ---------------------------------------------------------------- what runs


class Watch:
    """Compares what runs with what some files document; `seen` is what has been compared."""

    def __init__(self, *paths):
        self.files = {str(path): Documented(path) for path in paths}
        self.seen = {path: set() for path in self.files}

    @contextlib.contextmanager
    def during(self, sizes):
        """Compare what runs in a block with these sizes."""
        self.sizes = sizes
        sys.settrace(self.call)
        try:
            yield
        finally:
            sys.settrace(None)

    def compare(self, path, name, shapes, values):
        """Compare documented shapes with the tensors among some values."""
        unify_all(shapes, values, dict(self.sizes))
        self.seen[str(path)].add(name)

    def call(self, frame, event, result):
        """Python calls this when a function starts, and what it returns at each of its lines."""
        path, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if path not in self.files or "<" in name:  # a comprehension is part of its line
            return None
        documented, given, begun = self.files[path], dict(frame.f_locals), None

        def line(frame, event, result):
            nonlocal begun
            if begun and (event == "return" or frame.f_lineno not in begun.lines):
                value = eval(begun.target, frame.f_globals, frame.f_locals)
                self.compare(path, begun.lines.start, begun.shapes, flat(value))
                begun = None
            if event == "line":
                begun = begun or documented.assignments.get(frame.f_lineno)
            if event == "return" and name in documented.lines:
                self.compare_call(path, name, given, result)
            return line

        return line

    def compare_call(self, path, name, given, result):
        """Compare the arguments and the result of a call with its shape line."""
        inputs, outputs = self.files[path].lines[name]
        sizes = {letter: n for letter, n in self.sizes.items() if letter not in FREE.get(name, "")}
        if inputs[0][0]:
            tensors = [given[name] for name, _ in inputs]
        else:
            tensors = [x for x in given.values() if isinstance(x, Tensor)][:len(inputs)]
        unify_all(inputs, tensors, sizes)
        unify_all(outputs, flat(result), sizes)
        self.seen[path].add(name)


def flat(value):
    """The values of nested tuples."""
    return [x for part in value for x in flat(part)] if isinstance(value, tuple) else [value]


# ---------------------------------------------------------------- the claims


TOKENS, LENGTHS = torch.arange(6).view(SIZES["B"], SIZES["S"]), torch.tensor([3, 1])


def prepared_model():
    """A float64 model of the sizes above."""
    torch.manual_seed(0)
    config = MixtralConfig(**{field: SIZES[letter] for letter, _, field, _ in
                              ROW.findall(mixtral.__doc__) if field != "-"})
    return Mixtral(config).double()


def run_with_cache(watch, model):
    """Fill a cache. Then compare one more call, in which all letters have different sizes."""
    cache = model.new_cache(SIZES["B"], 40, chunk=SIZES["C"] - SIZES["W"] + 1)
    with watch.during(IN_ANY_CALL):
        for lengths in ([3, 1], [3, 0], [3, 3]):
            model(TOKENS, cache, torch.tensor(lengths))
    with watch.during(SIZES):
        model(TOKENS, cache)
    path = ROOT / "mixtral.py"
    shapes = watch.files[str(path)].fields["Cache"]
    watch.compare(path, "Cache", shapes, [getattr(cache, field) for field, _ in shapes])
    watch.compare(path, ("Cache.tokens_read", "(B)"), entries("(B)"), [cache.tokens_read])


def run_without_cache(watch, model):
    """One pass in which the keys are those of the call, so that T equals S."""
    with watch.during(SIZES | {"T": SIZES["S"]}):
        model(TOKENS)
    last = model(TOKENS, lengths=LENGTHS, last_only=True)  # for which the shape line does not hold
    for shape, tensor in (("(B, 1, V)", last), ("(B)", LENGTHS)):
        watch.compare(ROOT / "mixtral.py", ("Mixtral", shape), entries(shape), [tensor])


def run_generate(watch, model):
    """Prompts of one token, so that S is 1 in all calls."""
    tokens, lengths = generate.pad([[1, 2, 3], [4]], SIZES["V"], "cpu")
    for shape, tensor in (("(B, S)", tokens), ("(B)", lengths)):
        watch.compare(ROOT / "generate.py", ("pad", shape), entries(shape), [tensor])
    with watch.during(IN_ANY_CALL | {"S": 1, "N": 2}):
        generate.generate(model, [[1], [2]], 2, temperature=1.0)


def run_fast(watch, model):
    """One token of a model whose experts in layer 0 have 4 bits in w1 and w3, made quick."""
    from fast import cpu, int4
    with watch.during(IN_ANY_CALL):
        for expert in model.model.layers[0].block_sparse_moe.experts:
            for name in ("w1", "w3"):
                words, scales, *_ = int4.compress(
                    getattr(expert, name).weight, SIZES["G"], torch.float64)
                layer = int4.Int4Linear(SIZES["D"], SIZES["M"], SIZES["G"])
                layer.weight_packed, layer.weight_scale = words, scales
                setattr(expert, name, layer)
        cpu.tune(model)
        model(TOKENS[:, :1])
    with watch.during({"D": 64, "M": 32, "G": 32}):  # sizes that PyTorch's kernel takes
        layer = int4.Int4Linear(64, 32, 32)
        layer.weight_packed.zero_()
        layer.weight_scale = torch.ones(32, 2).bfloat16()
        int4.TunedInt4Linear(layer)(torch.ones(2, 3, 64).bfloat16())


@pytest.mark.claim
@torch.inference_mode()
def test_every_documented_shape_holds_in_real_runs_of_different_sizes():
    watch, model = Watch(*FILES), prepared_model()
    run_with_cache(watch, model)
    run_without_cache(watch, model)
    run_generate(watch, model)
    if FAST:
        run_fast(watch, model)
    with watch.during(SIZES):
        convert.regroup(torch.zeros(SIZES["H"] * SIZES["d"], SIZES["D"]), SIZES["H"], 2)
    assert watch.seen == {path: documented.all() for path, documented in watch.files.items()}
    assert sum(map(len, watch.seen.values())) > 35


def test_every_letter_has_one_meaning_and_the_size_of_8x7b():
    rows, defaults = ROW.findall(mixtral.__doc__), MixtralConfig()
    used = [field for *_, field, _ in rows if field != "-"]
    assert sorted(letter for letter, *_ in rows) == sorted([*SIZES, "R"])
    assert len(set(used)) == len(used) and len(set(SIZES.values())) == len(SIZES)
    for letter, _, field, value in rows:
        if field != "-":
            wanted = getattr(defaults, field)
            assert value == ("null" if wanted is None else str(wanted)), letter


EXAMPLE = '''
def visible(queries, keys):
    """queries (B, S), keys (B, T) -> (B, S, T)"""
    mask = queries[:, :, None] <= keys[:, None]  # (B, S, T); all of them
    rows, twice = mask.flatten(0, 1), torch.cat([
        mask, mask], dim=1)  # (N, T), (B, N, T)
    for row in rows:
        last = row, row  # (T)
    return mask
'''


@pytest.mark.parametrize("right, wrong", [
    ("", ""), ("queries (B, S), keys (B, T) ->", "(B, S), (B, T) ->"),  # these two hold
    ("-> (B, S, T)", "-> (B, T, S)"), ("-> (B, S, T)", "-> (B, S, T), (B)"),
    ("queries (B, S)", "queries (B, S, d)"), ("queries (B, S)", "queries (D, S)"),
    ("queries (B, S), keys (B, T) -> (B, S, T)", "queries (..., S), keys (..., T) -> (B, S, T/2)"),
    ("keys (B, T) -> (B, S, T)", "keys (B, Z) -> (B, S, Z)"), ("# (B, S, T);", "# (B, S);"),
    ("; all of them", " for all"), ("(N, T), (B, N, T)", "(N, T), (N, T)"), ("# (T)", "# (S)"),
    ("return mask", "mask.any()  # (B)")])
def test_a_wrong_shape_would_be_noticed(right, wrong, tmp_path):
    file, names = tmp_path / "example.py", {"torch": torch}
    file.write_text(EXAMPLE.replace(right, wrong))
    exec(compile(file.read_text(), str(file), "exec"), names)
    holds = not right or right.endswith("->")
    with contextlib.nullcontext() if holds else pytest.raises(AssertionError):
        watch = Watch(file)
        with watch.during({"B": 2, "S": 3, "D": 22, "N": 6}):
            names["visible"](torch.zeros(2, 3), torch.zeros(2, 5))
        assert watch.seen[str(file)] == watch.files[str(file)].all() and len(watch.seen) == 1
