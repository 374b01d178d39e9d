"""Every documented shape holds in real runs, in which all letters have different sizes.

Shapes are documented in three ways. A shape line in a docstring gives what goes in and what comes
out, by parameter name or for the first parameters in order; a class means its `forward`. A line
without an arrow gives the fields of a class. A comment at the end of an assignment gives the
targets. To check the comments, the modules run with a call of `check` after each such assignment.

The letters are those of the table at the top of mixtral.py. `...` stands for any axes, the same
throughout a line.
"""

import ast
import functools
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

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "mixtral.py", ROOT / "convert.py", ROOT / "generate.py",
         ROOT / "tests" / "layouts.py", ROOT / "tests" / "oracle" / "trace.py"]

ITEM = r"(?:[A-Za-z]|\d+)"
AXIS = rf"(?:\.\.\.|{ITEM}(?:[·/]{ITEM})*)"
SHAPE = rf"\((?:{AXIS}(?:, {AXIS})*)?\)"
ENTRY = rf"(?:[A-Za-z_]\w* )?{SHAPE}"
LINE = re.compile(rf"^ *({ENTRY}(?:, {ENTRY})*) -> ({ENTRY}(?:, {ENTRY})*)$", re.M)
FIELDS = re.compile(rf"^ *(\w+ {SHAPE}(?:, \w+ {SHAPE})*)$", re.M)
COMMENT = re.compile(rf"# ({SHAPE}(?:, {SHAPE})*)")
LOOSE = re.compile(rf"(?<![\w.·(])(?<!// )\((?=[^)]*[A-Z])(?:{AXIS}(?:, {AXIS})*)\)")
ROW = re.compile(r"^ {4}(\w) {7}(\S.*?)  +(-|[a-z_]+)  +(\S+)$", re.M)

# One size for each letter, all different. R, the tokens of one expert, differs between experts.
SIZES = {"B": 2, "S": 3, "T": 12, "N": 6, "V": 37, "D": 48, "L": 4, "H": 10, "K": 5, "d": 14,
         "W": 11, "C": 13, "E": 9, "A": 8, "M": 26, "G": 16}
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
        known = size_of(axis, sizes)
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
    """The shapes in comments, by line number. A comment with a shape must hold nothing else."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and LOOSE.search(token.string):
            match = COMMENT.fullmatch(token.string)
            assert match, f"line {token.start[0]}: a comment with a shape holds only shapes"
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


def load_with_checks(path, sizes, seen, monkeypatch):
    """Import a module from its file; its comments are compared with `sizes` while it runs."""
    source = path.read_text(encoding="utf-8")
    comments = comment_shapes(source)

    def check_shapes(line, values):
        values = [x for value in values for x in (value if isinstance(value, tuple) else [value])]
        unify_all(comments[line], values, dict(sizes))
        seen.add((path.stem, line))

    module = types.ModuleType(path.stem)
    module.__dict__.update(__file__=str(path), check_shapes=check_shapes)
    monkeypatch.setitem(sys.modules, path.stem, module)
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
        real = vars(target)[attribute]

        wrapped = checked(real, line, name, sizes, lambda name=name: seen.add((module.__name__, name)))
        monkeypatch.setattr(target, attribute, wrapped)


def checked(real, line, name, sizes, report):
    """A function that does what `real` does and compares each call with its shape line."""
    @functools.wraps(real)
    def wrapper(*args, **options):
        output = real(*args, **options)
        known = {letter: size for letter, size in sizes.items() if letter not in FREE.get(name, "")}
        check_call(line, inspect.signature(real), args, options, output, known)
        report()
        return output

    return wrapper


def check_fields(module, name, instance, sizes, seen):
    """Compare an object with the line of its class that gives the shapes of its fields."""
    for field, axes in entries(FIELDS.search(vars(module)[name].__doc__)[1]):
        unify(axes, getattr(instance, field).shape, dict(sizes))
    seen.add((module.__name__, name))


def prose_shapes(module):
    """The shapes in sentences of docstrings, outside of shape lines: {(name, shape)}."""
    found = set()
    for name, _, thing in documented(module):
        text = FIELDS.sub("", LINE.sub("", thing.__doc__))
        found |= {(name, match[0]) for match in LOOSE.finditer(text)}
    return found


# ---------------------------------------------------------------- the claims


@pytest.fixture
def run(monkeypatch):
    """The modules with their checks, the sizes to compare with, and what has been checked."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # trace.py extends it
    sizes, seen = dict(SIZES), set()
    modules = {path.stem: load_with_checks(path, sizes, seen, monkeypatch) for path in FILES}
    for module in modules.values():
        wrap(module, sizes, seen, monkeypatch)
    return types.SimpleNamespace(**modules, modules=modules, sizes=sizes, seen=seen)


def prepared_model(mixtral):
    """A float64 model of the sizes above. In layer 0, w1 and w3 of the experts have 4 bits."""
    torch.manual_seed(0)
    fields = {letter: field for letter, _, field, _ in ROW.findall(mixtral.__doc__)}
    config = mixtral.MixtralConfig(
        **{fields[letter]: size for letter, size in SIZES.items() if fields[letter] != "-"})
    model = mixtral.Mixtral(config)
    for expert in model.model.layers[0].block_sparse_moe.experts:
        for name in ("w1", "w3"):
            layer = mixtral.Int4Linear(SIZES["D"], SIZES["M"], SIZES["G"])
            layer.weight_packed.zero_()
            layer.weight_scale.zero_()
            setattr(expert, name, layer)
    return model.double()


def tokens_of(S):
    return torch.zeros(SIZES["B"], S, dtype=torch.int64)


def run_with_cache(run, model):
    """Calls with a cache. In the last one that has no more calls to come, all sizes differ."""
    cache = model.new_cache(SIZES["B"], 40, chunk=SIZES["C"] - SIZES["W"] + 1)
    for letter in OF_A_CALL:
        del run.sizes[letter]
    for lengths in ([3, 1], [3, 0], [3, 3]):
        model(tokens_of(3), cache, torch.tensor(lengths))
    run.sizes.update(SIZES)
    model(tokens_of(3), cache)
    check_fields(run.mixtral, "Cache", cache, run.sizes, run.seen)
    return cache


def run_without_cache(run, model):
    """One pass in which the keys are those of the call, so that T equals S."""
    run.sizes["T"] = run.sizes["S"]
    model(tokens_of(3))
    last = type(model).forward.__wrapped__(model, tokens_of(3), last_only=True)
    for name, x in run.trace.record(model, tokens_of(3), scores=True).items():
        unify(run.trace.axes(name), x.shape, dict(run.sizes))
    run.sizes.update(SIZES)
    return last


@torch.inference_mode()
def test_every_documented_shape_holds_in_real_runs_of_different_sizes(run):
    model = prepared_model(run.mixtral)
    run_with_cache(run, model)
    run_without_cache(run, model)
    rows = torch.zeros(SIZES["H"] * SIZES["d"], SIZES["D"])
    run.convert.regroup(rows, SIZES["H"], 2)
    run.layouts.interleaved(rows, SIZES["H"])
    run.sizes.update(S=1, N=2, T=1)
    for letter in OF_A_CALL:
        del run.sizes[letter]
    run.generate.generate(model, [[1], [2]], 2, temperature=1.0)
    documented_shapes = {
        *((module.__name__, name) for module in run.modules.values()
          for name, *_ in [*lines(module), *fields(module)]),
        *((path.stem, line) for path in FILES
          for line in comment_shapes(path.read_text(encoding="utf-8")))}
    assert run.seen == documented_shapes and len(documented_shapes) > 30
