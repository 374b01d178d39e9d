"""Claims about the tools: changes are those listed, survivors are told, and the benchmark runs."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import benchmark
import mutants
import pytest
import readme


@pytest.mark.parametrize("line, changed", [
    ("x = a <= b == c", ["x = a < b == c", "x = a <= b != c"]),
    ("x = a is not b", ["x = a is b"]), ("x = a in b", ["x = a not in b"]),
    ("x = a * (b)", ["x = a / b"]), ("x = a and b", ["x = a or b"]), ("x = not a", ["x = a"]),
    ("x = a ^ b @ c", ["x = a & b @ c", "x = a ^ b * c"]),
    ("x = -1, True", ["x = -2, True", "x = -1, False"]),
    ("x = f(a, b, c)", ["x = f(b, a, c)"]), ("x = min(a, b)", []),
    ("if a(): b = c", ["if not a(): b = c"]),
    ("x = [a for a in b if a]", ["x = [a for a in b if not a]"]),
    ("a += b", ["a -= b", "pass"]), ("a(b)", ["pass"]), ("a.b = c", ["pass"]),
    ("a[b] = c", ["pass"]), ("raise a(1 + 2)", ["pass"]), ("'1 == 2'", []),
    ("a: f(1, 2) = b", []), ("def f(a: 1) -> 2: return a", []), ("warnings.a(1, 2)", []),
    ("if __name__ == 'a': b(1)", []), ("__all__ = [a + b]", []), ("x = f'{a + 1}'", [])])
def test_a_line_has_these_changes_and_no_others(line, changed):
    found = [mutant.new for mutant in mutants.mutants("a.py", line)]
    assert sorted(found) == sorted(changed)


def test_a_change_moves_no_other_line():
    source = "é = 'ä'; x = f(é,  # a comment\n        x)\ny = 1  # é\n"
    found = [mutant.source for mutant in mutants.mutants("a.py", source)]
    assert found == [source.replace("f(é,  # a comment\n        x)", "f(x, é) \\\n"),
                     source.replace("1", "2")]


DOUBLE = "def double(x):\n    return 2 * x\n\n\ndef unused(x):\n    return x + 1\n"


def test_survivors_are_told_and_a_test_that_fails_without_a_change_ends_the_run(
        tmp_path, monkeypatch, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "double.py").write_text(DOUBLE)
    test = tmp_path / "tests" / "test_double.py"
    test.write_text("from double import double\n\ndef test_it():\n    assert double(3) == 6\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "FILES", {"double.py": (9, ["tests/test_double.py"])})
    monkeypatch.setattr(mutants, "EQUIVALENT", {("return x + 1", "return x - 1"): "not called"})
    assert mutants.main([]) == 1
    assert capsys.readouterr().out == (
        "double.py:6 survives\n    return x + 1\n    return x + 2\n"
        f"{'double.py':20}   2 of   3 killed\n{'all':20}   2 of   3 killed\n")
    assert (tmp_path / "double.py").read_text() == DOUBLE
    test.write_text("def test_it():\n    while True: pass\n")
    assert mutants.run_tests(["tests"], limit=1)[0] is None
    test.write_text("def test_it():\n    assert 0\n")
    assert mutants.main([]) == 2 and "fail without a change" in capsys.readouterr().err


def run_benchmark():
    """Run all parts of the benchmark that can run; returns the process and the chart."""
    parts = [part for part in benchmark.PARTS if part != "int4" or (readme.ROOT / "fast").exists()]
    with tempfile.TemporaryDirectory() as directory:
        chart = Path(directory, "chart.svg")
        done = subprocess.run(
            [sys.executable, benchmark.__file__, *parts, "--quick", "--rounds=1", "--svg", chart],
            env=readme.ENVIRONMENT, capture_output=True, text=True, timeout=300)
        return done, chart.read_text() if chart.exists() else ""


@pytest.mark.beside(run=run_benchmark)
def test_every_part_of_the_benchmark_runs_and_measures_something(beside):
    done, chart = beside
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (.*) \| (.*/)?s \| ([\d.,]+) \|.*\|$", done.stdout, re.M)
    assert len(rows) == done.stdout.count("\n") - 4 > 10 and "inf" not in done.stdout
    assert all(float(number.replace(",", "")) > 0 for *_, number in rows), done.stdout
    assert all(what in chart for what, unit, _ in rows if unit)
