"""Make one small change to the code at a time, and list the changes that no test notices.

    python tests/tools/mutants.py                        a sample from every file
    python tests/tools/mutants.py --file tokenizer.py    from one file; --sample N sets its size

A change, or mutant, swaps a comparison or an operator, exchanges the first two arguments of a call,
adds one to an integer, flips True and False, negates a condition, or drops a statement that is a
call, a `raise`, or an assignment that changes an object. Docstrings, annotations, `if __name__`,
`__all__`, f-strings, the texts of errors, calls about warnings, and the order of the arguments of
`min` and `max` stay as they are, because no test can notice a change there.

The rank of a change is a hash of its line, its new line and a seed (default 0). The changes of
lowest rank are the sample, and FILES gives its size for each file. Therefore an edit of a file
leaves most of its sample as it was.

The tests of a file run in a copy of the repository until one of them fails, for two mutants at a
time. A mutant is killed if they fail, crash, or take three times as long as without a change, plus
10 seconds. EQUIVALENT lists changes that have no effect on any result; they are not made.

Exit codes: 0 if at least 93 % are killed, 1 if fewer, 2 if the tests fail without a change.
"""

import argparse
import ast
import contextlib
import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import readme

FILES = {  # the size of the sample, and the tests, of which those that find most come first
    "mixtral.py": (40, ["tests/test_mixtral.py", "tests/oracle/test_golden.py"]),
    "tokenizer.py": (20, ["tests/test_tokenizer.py", "tests/test_damage.py"]),
    "generate.py": (25, ["tests/test_generate.py", "tests/test_damage.py"]),
    "fast/__init__.py": (4, ["tests/test_generate.py", "tests/fast/test_cpu.py"]),
    "fast/cpu.py": (8, ["tests/fast/test_cpu.py"]),
    "fast/cuda.py": (8, ["tests/fast/test_cuda.py"]),
    "fast/int4.py": (12, ["tests/fast/test_int4.py"]),
    "fast/memory.py": (6, ["tests/fast/test_memory.py", "tests/test_generate.py"]),
    "fast/ranks.py": (6, ["tests/fast/test_ranks.py"])}
EQUIVALENT = {  # {(line, new line): the reason why no result changes}
    ("if top_p < 1:", "if top_p < 2:"): "with top_p 1 the nucleus is everything",
    ("if not self.cache or length > self.cache.max_length or ids[:len(self.ids)] != self.ids:",
     "if not self.cache or length >= self.cache.max_length or ids[:len(self.ids)] != self.ids:"):
        "a new cache gives the same answer",
    ("q = q.reshape(B, S, K, H // K, d).transpose(1, 2).flatten(2, 3) # (B, K, S·H/K, d)",
     "q = q.reshape(B, S, K, H // K, d).transpose(2, 1).flatten(2, 3) # (B, K, S·H/K, d)"): "equal",
    ("for n in range(6, -1, -1):", "for n in range(7, -1, -1):"): "the first u is shifted out",
    ("rows = max(1, PIECE // (8 * packed.shape[1]))",
     "rows = max(1, PIECE * (8 * packed.shape[1]))"): "the weights are the same in one piece",
    ('fits = torch.cuda.is_available() and size_after(weights, dtype) + 3e9 <= free_memory("cuda")',
     'fits = torch.cuda.is_available() and size_after(weights, dtype) - 3000000000.0 <= '
     'free_memory("cuda")'): "runs on a GPU only"}
ENOUGH = 0.93  # of the mutants must be killed

SWAPS = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn,
         ast.And: ast.Or, ast.Add: ast.Sub, ast.Mult: ast.Div, ast.BitAnd: ast.BitOr,
         ast.LShift: ast.RShift}
SWAPS |= {new: old for old, new in SWAPS.items()}
SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
          ast.BitXor: ast.BitAnd}


class Mutant(NamedTuple):
    file: str
    line: int  # counted from 1
    old: str  # the changed lines
    new: str
    source: str  # the whole file with the change


def nodes(node):
    """A node and those inside it, without the parts where no test can notice a change."""
    if isinstance(node, ast.JoinedStr) or isinstance(node, ast.stmt) and re.match(
            r"if __name__|__all__|warnings\.", ast.unparse(node)):
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns") and not isinstance(node, ast.Raise):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from nodes(child)


def changes(node):
    """Pairs of a node and the one that replaces it."""
    def with_other(**fields):
        return node, type(node)(**dict(ast.iter_fields(node)) | fields)

    match node:
        case ast.Compare(ops=ops):
            for n, op in enumerate(ops):
                yield with_other(ops=[*ops[:n], SWAPS[type(op)](), *ops[n + 1:]])
        case ast.BinOp(op=op) | ast.BoolOp(op=op):
            yield with_other(op=SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not()):
            yield node, node.operand
        case ast.Constant(value=bool(value)):
            yield with_other(value=not value)
        case ast.Constant(value=int(value)):
            yield with_other(value=value + 1)
        case ast.Call(func=function, args=[first, second, *rest]):
            if ast.unparse(function) not in ("min", "max"):
                yield with_other(args=[second, first, *rest])
        case (ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test)
              | ast.comprehension(ifs=[test, *_])):
            if not isinstance(test, ast.Compare | ast.UnaryOp | ast.Constant):  # others above
                yield test, ast.UnaryOp(ast.Not(), test)
        case ast.AugAssign(op=op):
            yield with_other(op=SWAPS[type(op)]())
            yield node, ast.Pass()
        case (ast.Expr(value=ast.Call()) | ast.Raise()
              | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])):
            yield node, ast.Pass()


def mutants(file, source):
    """All mutants of a file. Only the text of a changed node is replaced, and no line moves."""
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
    for place, new_node in (pair for node in nodes(ast.parse(source)) for pair in changes(node)):
        first, last = place.lineno - 1, place.end_lineno
        before = lines[first][:place.col_offset].decode()
        after = lines[last - 1][place.end_col_offset:].decode()
        new = ast.unparse(new_node)
        new += " \\\n" * (last - first - 1 - new.count("\n"))
        yield Mutant(file, place.lineno, " ".join(b"".join(lines[first:last]).decode().split()),
                     " ".join((before + new + after).split()),
                     b"".join(lines[:first]).decode() + before + new + after
                     + b"".join(lines[last:]).decode())


def sample(found, size, seed):
    """The mutants of lowest rank, in the order of their lines."""
    def rank(mutant):
        return hashlib.sha256(f"{seed} {mutant.old} {mutant.new}".encode()).digest()

    return sorted(sorted(found, key=rank)[:size], key=lambda mutant: mutant.line)


# ------------------------------------------------------------------ runs

# The same examples in every run. They are not shrunk, because any failure is enough.
RUN = """
import resource, sys, hypothesis, pytest
resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
hypothesis.settings.register_profile("mutants", derandomize=True, database=None, deadline=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate))
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=short", "--basetemp=temporary",
                      "--hypothesis-profile=mutants", *sys.argv[1:]]))
"""


def run_tests(tests, limit, mutant=None):
    """pytest's exit code in a copy of the repository, and the end of its output.

    After `limit` seconds the code is None.
    """
    with tempfile.TemporaryDirectory() as place:
        place, code = readme.copy_repository(Path(place)), None
        if mutant:
            (place / mutant.file).write_text(mutant.source, encoding="utf-8")
        with open(place / "log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", RUN, *tests], cwd=place, stdout=log, stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(limit)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also the programs that tests have started
        process.wait()
        return code, (place / "log").read_text(encoding="utf-8", errors="replace")[-3000:]


def try_file(file, size, seed):
    """Test a sample and print the survivors. Returns the numbers of killed and of all mutants.

    Raises ValueError if the tests fail without a change.
    """
    tests = [test for test in FILES[file][1] if (readme.ROOT / test).exists()]
    start = time.monotonic()
    code, printed = run_tests(tests or [f"(no tests of {file} exist)"], 900)
    if code != 0:
        raise ValueError(f"{printed}\nmutants.py: {file}: its tests fail without a change")
    limit = 10 + 3 * (time.monotonic() - start)
    found = mutants(file, (readme.ROOT / file).read_text(encoding="utf-8"))
    chosen = [mutant for mutant in sample(found, size or FILES[file][0], seed)
              if (mutant.old, mutant.new) not in EQUIVALENT]
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda mutant: run_tests(tests, limit, mutant)[0], chosen))
    for mutant in itertools.compress(chosen, (code == 0 for code in codes)):
        print(f"{file}:{mutant.line} survives\n    {mutant.old}\n    {mutant.new}")
    killed = len(codes) - codes.count(0)
    print(f"{file:20} {killed:3} of {len(codes):3} killed", flush=True)
    return killed, len(codes)


def main(argv=None):
    p = argparse.ArgumentParser(description="Make small changes and list what no test notices.")
    p.add_argument("--file", choices=FILES, help="only changes of this file")
    p.add_argument("--sample", type=int, metavar="N", help="changes of each file")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default 0)")
    args = p.parse_args(argv)
    files = [args.file] if args.file else [f for f in FILES if (readme.ROOT / f).exists()]
    try:
        counts = [try_file(file, args.sample, args.seed) for file in files]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    killed, total = map(sum, zip(*counts, strict=True))
    print(f"{'all':20} {killed:3} of {total:3} killed")
    return 0 if killed >= ENOUGH * total else 1


if __name__ == "__main__":
    sys.exit(main())
