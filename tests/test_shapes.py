"""Every documented shape holds in real runs, in which all letters have different sizes.

Shapes are documented in three ways. A shape line in a docstring gives what goes in and what comes
out, by parameter name or for the first parameters in order; a class means its `forward`. A line
without an arrow gives the fields of a class. A comment at the end of an assignment gives the
targets. To check the comments, the modules run with a call of `check` after each such assignment.

The letters are those of the table at the top of mixtral.py. `...` stands for any axes, the same
throughout a line.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import re
import sys
import tokenize
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mixtral

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
FREE = {"rotate": "H"}  # the keys, which have K heads, are rotated too


def entries(text):
    """The names (None if there is none) and axes of the shapes in a text."""
    found = re.findall(rf"(?:([A-Za-z_]\w*) )?\(((?:{AXIS}(?:, {AXIS})*)?)\)", text)
    return [(name or None, axes.split(", ") if axes else []) for name, axes in found]


def size_of(axis, sizes):
    """The size of an axis such as `H·d`, or None if one of its letters has no size yet."""
    size = 1
    for operator, item in re.findall(r"([·/]?)(\w+)", axis):
        value = int(item) if item.isdecimal() else sizes.get(item)
        if value is None:
            return None
        assert operator != "/" or size % value == 0, (axis, sizes)
        size = size // value if operator == "/" else size * value
    return size


def unify(axes, shape, sizes):
    """Compare one documented shape with a real one; a letter without a size gets one."""
    axes, shape = list(axes), tuple(shape)
    if "..." in axes:
        at, width = axes.index("..."), len(shape) - len(axes) + 1
        assert width >= 0, (axes, shape)
        middle = shape[at:at + width]
        assert sizes.setdefault("...", middle) == middle, (axes, shape, sizes)
        axes, shape = axes[:at] + axes[at + 1:], shape[:at] + shape[at + width:]
    assert len(axes) == len(shape), (axes, shape)
    for axis, size in zip(axes, shape, strict=True):
        assert set(re.findall("[A-Za-z]", axis)) <= {*SIZES, "R"}, f"{axis} is not in the table"
        known = size_of(axis, sizes)
        if known is None and len(axis) > 1 and set(axis) & set(OF_A_CALL):
            continue  # it is compared in the calls for which all sizes are given
        if known is None:
            assert axis in sizes or len(axis) == 1, f"{axis} cannot be computed"
            sizes[axis] = known = size
        assert known == size, (axis, shape, sizes)


def unify_all(claimed, tensors, sizes):
    """Compare shapes with tensors: one each, or one shape for all tensors."""
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    if len(claimed) == 1 < len(tensors):
        claimed = claimed * len(tensors)
    assert len(claimed) == len(tensors), (claimed, [x.shape for x in tensors])
    for (_, axes), tensor in zip(claimed, tensors, strict=True):
        unify(axes, tensor.shape, sizes)


# ---------------------------------------------------------------- modules that check themselves


def comment_shapes(source):
    """The shapes in comments, by line number. Words can follow only after a semicolon."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and LOOSE.search(token.string):
            match = COMMENT.fullmatch(token.string)
            assert match, f"line {token.start[0]}: the shapes must come first, then a semicolon"
            found[token.start[0]] = entries(match[1])
    return found


def with_checks(source):
    """The syntax tree of a module, in which a call of `check` follows each commented assignment."""
    tree, comments, placed = ast.parse(source), comment_shapes(source), set()
    for node in ast.walk(tree):
        for body in (getattr(node, field, None) for field in ("body", "orelse")):
            if not isinstance(body, list):
                continue
            for n, statement in reversed(list(enumerate(body))):
                if isinstance(statement, ast.Assign) and statement.end_lineno in comments:
                    target, line = ast.unparse(statement.targets[0]), statement.end_lineno
                    body.insert(n + 1, ast.parse(f"check_shapes({line}, ({target},))").body[0])
                    placed.add(line)
    assert placed == set(comments), f"lines {set(comments) - placed}: no assignment ends there"
    return ast.fix_missing_locations(tree)


def name_of(path):
    """The name under which a file is imported."""
    return f"fast.{path.stem}" if path in FAST else path.stem


def load_with_checks(path, sizes, seen, monkeypatch):
    """Import a module from its file; its comments are compared with `sizes` while it runs."""
    source = path.read_text(encoding="utf-8")
    comments, name = comment_shapes(source), name_of(path)

    def check_shapes(line, values):
        values = [x for value in values for x in (value if isinstance(value, tuple) else [value])]
        unify_all(comments[line], values, dict(sizes))
        seen.add((name, line))

    module = types.ModuleType(name)
    module.__dict__.update(__file__=str(path), check_shapes=check_shapes)
    if path in FAST:
        monkeypatch.setattr(importlib.import_module("fast"), path.stem, module)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(with_checks(source), str(path), "exec"), module.__dict__)
    return module


# ---------------------------------------------------------------- docstrings


def documented(module):
    """Name, owner and object of each function, class and method of a module with a docstring."""
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        members = [(name, module, thing)]
        if inspect.isclass(thing):
            members += [(f"{name}.{n}", thing, getattr(m, "fget", m)) for n, m in
                        vars(thing).items() if inspect.isfunction(getattr(m, "fget", m))]
        yield from (member for member in members if isinstance(member[2].__doc__, str))


def lines(module):
    """Name, owner, object and shape line (inputs, outputs) of all that has one."""
    for name, owner, thing in documented(module):
        if match := LINE.search(thing.__doc__):
            yield name, owner, thing, tuple(map(entries, match.groups()))


def check_call(line, signature, args, options, output, sizes):
    """Compare one call with a shape line."""
    sizes, (inputs, outputs) = dict(sizes), line
    bound = signature.bind(*args, **options).arguments
    if inputs[0][0] is None:
        tensors = [x for x in bound.values() if isinstance(x, Tensor)][:len(inputs)]
    else:
        tensors = [bound[name] for name, _ in inputs]
    unify_all(inputs, tensors, sizes)
    unify_all(outputs, output if isinstance(output, tuple) else (output,), sizes)


def wrap(module, sizes, seen, monkeypatch):
    """Replace all that has a shape line, so that each call is checked when it returns."""
    for name, owner, thing, line in list(lines(module)):
        attribute = "forward" if inspect.isclass(thing) else thing.__name__
        target = thing if inspect.isclass(thing) else owner
        wrapped = checked(vars(target)[attribute], line, (module.__name__, name), sizes, seen)
        monkeypatch.setattr(target, attribute, wrapped)


def checked(real, line, name, sizes, seen):
    """A function that does what `real` does and compares each call with its shape line."""
    free = FREE.get(name[1], "")

    @functools.wraps(real)
    def wrapper(*args, **options):
        output = real(*args, **options)
        known = {letter: size for letter, size in sizes.items() if letter not in free}
        check_call(line, inspect.signature(real), args, options, output, known)
        seen.add(name)
        return output

    return wrapper


def fields(module):
    """Name and shapes of each class with a line that gives the shapes of its fields."""
    for name, _, thing in documented(module):
        if match := FIELDS.search(thing.__doc__):
            yield name, entries(match[1])


def prose_shapes(module):
    """The shapes in sentences of docstrings, outside of shape lines: {(name, shape)}."""
    found = set()
    for name, _, thing in documented(module):
        text = FIELDS.sub("", LINE.sub("", thing.__doc__))
        found |= {(name, match[0]) for match in LOOSE.finditer(text)}
    return found


# ---------------------------------------------------------------- the claims


class Run:
    """The modules with their checks, the sizes to compare with, and what has been compared."""

    def __init__(self, monkeypatch):
        self.sizes, self.seen = dict(SIZES), set()
        self.modules = {name_of(path): load_with_checks(path, self.sizes, self.seen, monkeypatch)
                        for path in FILES}
        for module in self.modules.values():
            wrap(module, self.sizes, self.seen, monkeypatch)
        self.mixtral, self.convert, self.generate = (
            self.modules[name] for name in ("mixtral", "convert", "generate"))
        monkeypatch.setattr(self.mixtral.Attention, "attend", staticmethod(self.mixtral.attend))

    def compare(self, module, name, shape, tensor):
        """Compare a shape in a sentence of a docstring with a tensor."""
        unify(entries(shape)[0][1], tensor.shape, dict(self.sizes))
        self.seen.add((module.__name__, name, shape))

    def documented(self):
        """All that has to be compared."""
        found = {(name_of(path), line) for path in FILES
                 for line in comment_shapes(path.read_text(encoding="utf-8"))}
        for name, module in self.modules.items():
            found |= {(name, line[0]) for line in [*lines(module), *fields(module)]}
            found |= {(name, *shape) for shape in prose_shapes(module)}
        return found


@pytest.fixture
def run(monkeypatch):
    return Run(monkeypatch)


def prepared_model(mixtral):
    """A float64 model of the sizes above."""
    torch.manual_seed(0)
    config = mixtral.MixtralConfig(**{field: SIZES[letter] for letter, _, field, _ in
                                      ROW.findall(mixtral.__doc__) if field != "-"})
    return mixtral.Mixtral(config).double()


TOKENS, LENGTHS = torch.zeros(SIZES["B"], SIZES["S"], dtype=torch.int64), torch.tensor([3, 1])


def run_with_cache(run, model):
    """Fill a cache. Then compare one more call, in which all letters have different sizes."""
    cache = model.new_cache(SIZES["B"], 40, chunk=SIZES["C"] - SIZES["W"] + 1)
    for letter in OF_A_CALL:
        del run.sizes[letter]
    for lengths in ([3, 1], [3, 0], [3, 3]):
        model(TOKENS, cache, torch.tensor(lengths))
    run.sizes.update(SIZES)
    logits = model(TOKENS, cache)
    unify(["B", "S", "V"], logits.shape, dict(run.sizes))
    for field, axes in dict(fields(run.mixtral))["Cache"]:
        unify(axes, getattr(cache, field).shape, dict(run.sizes))
    run.seen.add(("mixtral", "Cache"))
    run.compare(run.mixtral, "Cache.tokens_read", "(B)", cache.tokens_read)


def run_without_cache(run, model):
    """One pass in which the keys are those of the call, so that T equals S."""
    run.sizes["T"] = run.sizes["S"]
    model(TOKENS)
    forward = type(model).forward.__wrapped__  # its shape line does not hold with last_only
    last = forward(model, TOKENS, lengths=LENGTHS, last_only=True)
    run.compare(run.mixtral, "Mixtral", "(B, 1, V)", last)
    run.compare(run.mixtral, "Mixtral", "(B)", LENGTHS)
    run.sizes.update(SIZES)


def run_fast(run, model):
    """One token of a model whose experts in layer 0 have 4 bits in w1 and w3, made quick."""
    int4, cpu = run.modules["fast.int4"], run.modules["fast.cpu"]
    for expert in model.model.layers[0].block_sparse_moe.experts:
        for name in ("w1", "w3"):
            words, scales, *_ = int4.compress(
                getattr(expert, name).weight, SIZES["G"], torch.float64)
            layer = int4.Int4Linear(SIZES["D"], SIZES["M"], SIZES["G"])
            layer.weight_packed, layer.weight_scale = words, scales
            setattr(expert, name, layer)
    cpu.tune(model)
    for letter in OF_A_CALL:
        del run.sizes[letter]
    model(TOKENS[:, :1])
    run.sizes.clear()
    run.sizes.update({"D": 64, "M": 32, "G": 32})  # sizes that PyTorch's kernel takes
    layer = int4.Int4Linear(64, 32, 32)
    layer.weight_packed.zero_()
    layer.weight_scale = torch.ones(32, 2).bfloat16()
    int4.TunedInt4Linear(layer)(torch.ones(2, 3, 64).bfloat16())
    run.sizes.update(SIZES)


def run_generate(run, model):
    """Prompts of one token, so that S is 1 in all calls."""
    tokens, lengths = run.generate.pad([[1, 2, 3], [4]], SIZES["V"], "cpu")
    run.compare(run.generate, "pad", "(B, S)", tokens)
    run.compare(run.generate, "pad", "(B)", lengths)
    for letter in OF_A_CALL:
        del run.sizes[letter]
    run.generate.generate(model, [[1], [2]], 2, temperature=1.0)
    run.sizes.update(SIZES)


@pytest.mark.claim
@torch.inference_mode()
def test_every_documented_shape_holds_in_real_runs_of_different_sizes(run):
    model = prepared_model(run.mixtral)
    run_with_cache(run, model)
    run_without_cache(run, model)
    run_generate(run, model)
    if FAST:
        run_fast(run, model)
    run.convert.regroup(torch.zeros(SIZES["H"] * SIZES["d"], SIZES["D"]), SIZES["H"], 2)
    assert run.seen == run.documented() and len(run.seen) > 35


def test_every_letter_has_one_meaning_and_the_size_of_8x7b():
    rows, defaults = ROW.findall(mixtral.__doc__), mixtral.MixtralConfig()
    used = [field for *_, field, _ in rows if field != "-"]
    assert sorted(letter for letter, *_ in rows) == sorted([*SIZES, "R"])
    assert len(set(used)) == len(used) and len(set(SIZES.values())) == len(SIZES)
    for letter, _, field, value in rows:
        if field != "-":
            wanted = getattr(defaults, field)
            assert value == ("null" if wanted is None else str(wanted)), letter


@pytest.mark.parametrize("wrong", [
    "queries (B, S), keys (B, S) -> (B, S, T)", "queries (B, S), keys (B, T) -> (B, T, S)",
    "queries (B, S, d), keys (B, T) -> (B, S, T)", "queries (B, S) -> (B, S)",
    "queries (..., S), keys (..., T) -> (B, S, T/2)", "queries (D, S), keys (D, T) -> (B, S, T)",
    "queries (B, S), keys (B, Z) -> (B, S, Z)",
    "(B, S), (B, T) -> (B, S·T)", "(B, S), (B, T) -> (B, S, T), (B)", "keys (B, S) -> (B, S, T)"])
def test_a_wrong_shape_line_would_be_noticed(wrong):
    def compare(line):
        match = LINE.fullmatch(line)
        check_call(tuple(map(entries, match.groups())), inspect.signature(mixtral.visible),
                   call, {}, mixtral.visible(*call), {"B": 2, "S": 3, "D": 22})

    call = torch.zeros(2, 3), torch.zeros(2, 5), None
    compare(LINE.search(mixtral.visible.__doc__)[0])
    with pytest.raises(AssertionError):
        compare(wrong)


@pytest.mark.parametrize("assignment, holds", [
    ("y = x  # (B, S, D)", True), ("a, y = x[0], x  # (S, D), (B, S, D)", True),
    ("y = x, x  # (B, S, D)", True), ("y = torch.cat([\n    x], dim=1)  # (B, S, D); all", True),
    ("y = x.flatten(0, 1)  # (N, D)", False), ("a, y = x[0], x  # (S, D), (S, D)", False),
    ("y = torch.cat([\n    x, x], dim=1)  # (B, S, D)", False), ("y = x  # (B, S, D) here", False),
    ("torch.cos(x)  # (B, S, D)", False), ("for y in [x]:\n    y = y[0]  # (B, D)", False)])
def test_a_wrong_comment_would_be_noticed(assignment, holds, tmp_path, monkeypatch):
    file, sizes = tmp_path / "example.py", {"B": 2, "S": 3, "D": 4, "N": 7}
    file.write_text(f"import torch\nx = torch.zeros(2, 3, 4)\n{assignment}\n")
    with contextlib.nullcontext() if holds else pytest.raises(AssertionError):
        load_with_checks(file, sizes, set(), monkeypatch)
