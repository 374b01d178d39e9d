"""Claims about the tools: only a failing test kills a mutant, and the whole benchmark runs."""

import json
import math
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import benchmark
import mutants
import pytest
from readme import ENVIRONMENT

TOOLS = Path(__file__).resolve().parent


# ------------------------------------------------------------------ mutants.py


def test_every_change_fits_its_file_once():
    assert list(mutants.misfits(mutants.all_mutants())) == []


def test_the_changes_cover_every_program_and_have_distinct_names():
    table = mutants.all_mutants()
    assert len({(mutant.subject, mutant.change) for mutant in table}) == len(table) >= 110
    assert {mutant.subject for mutant in table} == set(mutants.TESTS)
    for tests in mutants.TESTS.values():
        for path, _, name in (test.partition("::") for test in tests):
            assert f"def {name}" in (mutants.ROOT / path).read_text(encoding="utf-8")


def test_a_change_that_does_not_fit_is_reported(monkeypatch, tmp_path):
    (tmp_path / "file.py").write_text("x = 1\ny = 1\n")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    absent, twice, fits = (mutants.Mutant("file.py", old, old, "2") for old in ("z", "1", "x"))
    first, second = mutants.misfits([absent, twice, fits])
    assert "0 times" in first and "2 times" in second


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mutants, readme
mutants.ROOT = readme.ROOT = Path(sys.argv[2])
mutants.TESTS = {"double.py": ["tests/test_double.py"]}
mutants.CHANGES = {"double.py": [
    ("wrong", "2 * x", "3 * x"), ("unnoticed", "2 * x", "x + x"),
    ("endless", "return 2 * x", "while True: pass"), ("not collected", "def double", "def triple"),
    ("explained", "2 * x", "x * 2", "the same product")]}
print("exit", mutants.main(["--limit", "4"]))
(mutants.ROOT / "double.py").write_text("def double(x):\\n    return 2 * x + 1\\n")
print("exit", mutants.main(["--limit", "4"]))
"""


def run_driver():
    """Run DRIVER in a repository with one small program and its test."""
    with tempfile.TemporaryDirectory() as directory:
        for name, text in (("double.py", "def double(x):\n    return 2 * x\n"),
                           ("tests/test_double.py", "from double import double\n\n"
                            "def test_it():\n    assert double(3) == 6\n"),
                           ("pyproject.toml", '[tool.pytest.ini_options]\npythonpath = ["."]\n'),
                           ("tiny/config.json", "{}")):
            path = Path(directory) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return subprocess.run([sys.executable, "-c", DRIVER, TOOLS, directory], cwd=TOOLS,
                              env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@pytest.mark.beside(run=run_driver)
def test_only_a_failing_test_kills_a_mutant(beside):
    done = beside
    lines = {name: line for line in done.stdout.splitlines()
             for name in ("wrong", "unnoticed", "endless", "not collected", "explained")
             if f" {name} " in line}
    assert lines["wrong"].endswith("test_double.py::test_it")
    assert lines["unnoticed"].endswith("survived")
    assert lines["endless"].endswith("timed out")
    assert lines["not collected"].endswith("no test ran")
    assert lines["explained"].endswith("survived: the same product")
    assert "1 of 4 mutants killed\nexit 1\n" in done.stdout
    assert done.stdout.endswith("exit 2\n") and "without any change" in done.stderr


# ------------------------------------------------------------------ benchmark.py


def run_benchmark():
    """All parts of the benchmark: the process, and the texts of its JSON file and of its chart."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        llama = place / "llama-bench"
        llama.write_text('#!/bin/sh\necho \'[{"avg_ts": 50.0}]\'\n')
        llama.chmod(0o755)
        stories = place / "stories.txt"
        stories.write_text("Once upon a time, there was a cat.\n<|endoftext|>\nOne day, it ran.\n")
        done = subprocess.run([
            sys.executable, TOOLS / "benchmark.py", *benchmark.PARTS, "--quick", "--rounds", "1",
            "--against", benchmark.ROOT, "--llama-bench", llama, "--gguf", place / "Q8_0.gguf",
            "--json", place / "rows.json", "--svg", place / "chart.svg", "--text", stories],
            cwd=TOOLS, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        return done, *((place / name).read_text() if (place / name).exists() else ""
                       for name in ("rows.json", "chart.svg"))


@pytest.mark.beside(run=run_benchmark)
def test_every_part_of_the_benchmark_runs_and_measures_something(beside):
    done, rows, svg = beside
    assert done.returncode == 0, done.stderr
    rows = json.loads(rows)
    for row in rows:
        assert all(math.isfinite(value) and value > 0 for value in row["values"].values()), row
        assert row["what"] in done.stdout
    words = " ".join(row["what"] for row in rows)
    for part in ("start", "load", "prefill", "decode, batch 1", "tiny decode", "batch 2", "events",
                 "int4 decode", "window", "tokenizer", "convert mistral_fused"):
        assert part in words
    values = {row["what"]: row["values"] for row in rows}
    assert values["prefill 8, bfloat16"]["llama.cpp Q8_0"] == 50  # by the script above
    assert {"this", "before"} <= values["decode, batch 1, bfloat16"].keys()
    assert values["tiny dispatcher events, float32"]["this"] < 3000
    quality = [values[what] for what in values if what.startswith("tiny in 4 bits")]
    assert len(quality) == 4 and all(0.95 < x["this"] / x["bfloat16"] < 1.05 for x in quality)
    assert len({x["this"] for x in quality}) == 4
    chart = ElementTree.fromstring(svg)
    labels = " ".join(text.text for text in chart.iter("{http://www.w3.org/2000/svg}text"))
    assert "prefill 8, bfloat16" in labels and "llama.cpp Q8_0" in labels


def test_the_memory_of_a_short_call_is_watched_too():
    side = benchmark.Side(benchmark.Machine)
    side("read_rate", 64, watch=True)
    side.close()
    assert side.peak > 0


def test_a_ratio_is_how_many_times_as_fast_or_small_this_project_is():
    rate = benchmark.Row("", "tokens/s", {"this": 30, "other": 20})
    seconds = benchmark.Row("", "s", {"this": 2, "other": 3})
    assert rate.ratio("other") == seconds.ratio("other") == 1.5


def test_slow_variants_of_transformers_are_measured_only_once():
    seconds = {"this": 9, "transformers, a": 1, "transformers, b": 1.05, "transformers, c": 1.2}
    assert benchmark.without_slow_variants(seconds) == ["this", "transformers, a",
                                                        "transformers, b"]


def test_the_weights_of_a_token_are_those_of_attention_router_two_experts_and_head():
    config = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
              "vocab_size": 32000}
    norms, embedding = 65 * 4096, 32000 * 4096
    assert benchmark.weights_per_token(config) == 12_879_925_248 - norms - embedding
    every_expert = benchmark.weights_per_token(config, rows=10**6)
    assert round(every_expert) == 46_702_792_704 - norms - embedding
