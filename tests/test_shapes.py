"""The shape lines of the docstrings are true: each is read and checked against real runs.

A shape line holds shapes on both sides of `->`, each perhaps behind its argument's name. Letters
are those of the key at the top of mixtral.py, with one size each throughout a run in which all
sizes differ; `...` is any axes, the same throughout its line; d/2 is arithmetic.
"""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from torch import Tensor

import generate
import mixtral
from mixtral import MixtralConfig

SHAPE = r"(?:[a-z]\w* )?\(((?:[\w/]+|\.\.\.)?(?:, (?:[\w/]+|\.\.\.))*)\)"
LINE = re.compile(rf"^\s*({SHAPE}(?:, {SHAPE})*) -> ({SHAPE}(?:, {SHAPE})*)$", re.M)
KEY = re.compile(r"^ {4}(\w) {7}(\S.*?)  +(-|[a-z_]+) +(.*)$", re.M)


def shapes(text):
    return [axes.split(", ") if axes else [] for axes in re.findall(SHAPE, text)]


def line_of(thing):
    """Shapes in and out that a docstring claims, or None."""
    found = LINE.search(thing.__doc__ or "")
    if not found:
        return None
    left, right = re.split(" -> ", found.group(0).strip())
    return shapes(left), shapes(right)


def unify(claimed, actual, sizes):
    """Bind the letters of one shape to the sizes of a tensor. AssertionError where they differ."""
    if "..." in claimed:
        at = claimed.index("...")
        width = len(actual) - len(claimed) + 1
        assert width >= 0, (claimed, actual)
        assert sizes.setdefault("...", tuple(actual[at:at + width])) == tuple(actual[at:at + width])
        claimed = claimed[:at] + claimed[at + 1:]
        actual = [*actual[:at], *actual[at + width:]]
    assert len(claimed) == len(actual), (claimed, actual)
    for letter, size in zip(claimed, actual, strict=True):
        name, _, divisor = letter.partition("/")
        assert sizes.setdefault(name, size * int(divisor or 1)) == size * int(divisor or 1), (
            letter, size, sizes)


def check(line, inputs, outputs, known):
    """Hold one call against its line; letters that `known` lacks are free for this call alone."""
    sizes = dict(known)
    inputs, outputs = ([x for x in values if isinstance(x, Tensor)] for values in (inputs, outputs))
    for claimed, tensors in zip(line, (inputs, outputs), strict=True):
        assert len(claimed) == len(tensors), (claimed, [x.shape for x in tensors])
        for shape, tensor in zip(claimed, tensors, strict=True):
            unify(shape, list(tensor.shape), sizes)


def claims(module):
    """Name, owner and shape line of each function, method and class of a module that has one."""
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        members = [(name, module, thing)]
        if inspect.isclass(thing):
            members += [(f"{name}.{n}", thing, m) for n, m in vars(thing).items()
                        if inspect.isfunction(m)]
        for full, owner, member in members:
            if line_of(member):
                yield full, owner, member


def test_every_letter_of_a_shape_line_is_in_the_key_once_with_8x7bs_size():
    rows = KEY.findall(mixtral.__doc__)
    letters = [row[0] for row in rows]
    assert len(letters) == len(set(letters)) == 15
    for letter, _, field, value in rows:
        if field != "-":
            wanted = getattr(MixtralConfig(), field)
            assert value.strip() == ("null: no end" if wanted is None else str(wanted)), letter
    used = {axis.partition("/")[0] for module in (mixtral, generate)
            for _, _, thing in claims(module) for side in line_of(thing)
            for shape in side for axis in shape}
    assert used - {"..."} <= set(letters)


def watched(monkeypatch, module, seen, known):
    """Wrap all that has a shape line so that each call is checked as it happens."""
    for name, owner, thing in list(claims(module)):
        attribute = "forward" if inspect.isclass(thing) else thing.__name__
        target = thing if inspect.isclass(thing) else owner

        wrapped = checked(vars(target)[attribute], line_of(thing), known, name, seen)
        monkeypatch.setattr(target, attribute, wrapped)


def checked(real, line, known, name, seen):
    def wrapper(*args, **options):
        out = real(*args, **options)
        check(line, args, out if isinstance(out, tuple) else (out,), known)
        seen.add(name)
        return out

    return wrapper


SIZES = {"vocab_size": 37, "hidden_size": 22, "intermediate_size": 26, "num_hidden_layers": 3,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 10, "sliding_window": 6,
         "num_local_experts": 9, "num_experts_per_tok": 5}
FIELDS = {"V": "vocab_size", "D": "hidden_size", "F": "intermediate_size", "L": "num_hidden_layers",
          "H": "num_attention_heads", "K": "num_key_value_heads", "d": "head_dim",
          "W": "sliding_window", "E": "num_local_experts", "k": "num_experts_per_tok"}


def test_every_shape_line_holds_in_real_runs_of_distinct_sizes(monkeypatch):
    assert {row[0]: row[2] for row in KEY.findall(mixtral.__doc__) if row[2] != "-"} == FIELDS
    wanted = {name for module in (mixtral, generate) for name, _, thing in claims(module)}
    model, seen = random_model(**SIZES), set()
    known = {letter: SIZES[field] for letter, field in FIELDS.items()} | {"B": 2}
    assert len(set(known.values())) == len(known)
    watched(monkeypatch, mixtral, seen, known)
    watched(monkeypatch, generate, seen, known)
    with torch.inference_mode():
        model(torch.zeros(2, 7, dtype=torch.int64))
        cache = model.new_cache(2, 40, chunk=7)
        for S in (7, 1, 7, 3):
            model(torch.zeros(2, S, dtype=torch.int64), cache)
        assert cache.keys.shape == (3, 2, 4, 12, 10) and cache.lengths.shape == (2,)
        generate.sample(torch.zeros(2, 37), 1.0)
    assert seen == wanted and len(wanted) >= 14


@pytest.mark.parametrize("wrong", [
    "queries (B, S), keys (B, S) -> (B, S, T)", "queries (B, S), keys (B, T) -> (B, T, S)",
    "queries (B, S, d), keys (B, T) -> (B, S, T)", "queries (B, S) -> (B, S, T)",
    "queries (..., S), keys (..., T) -> (B, S, T/2)", "queries (D, S), keys (D, T) -> (B, S, T)"])
def test_a_wrong_shape_line_would_be_noticed(wrong):
    queries, keys = torch.zeros(2, 3), torch.zeros(2, 5)
    result = (mixtral.visible(queries, keys, None),)
    right = line_of(mixtral.visible)
    check(right, (queries, keys), result, {"B": 2, "D": 22})
    with pytest.raises(AssertionError):
        check(line_of(SimpleNamespace(__doc__=wrong)), (queries, keys), result,
              {"B": 2, "D": 22})
