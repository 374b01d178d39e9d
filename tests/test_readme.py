"""Claims about the documents: they show what their commands print, and what they name exists."""

import doctest
import importlib
import re
import tempfile
from functools import partial
from pathlib import Path

import mutants
import pytest
import readme

ROOT = readme.ROOT
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in readme.DOCUMENTS}
EXAMPLES = [(name, example) for name, text in TEXTS.items() for example in readme.examples(text)]
ANSWERS = re.findall(r"^\| (\d+) \| `(.+?)` → `(.*?)` \| `(test_\w+)` \|", TEXTS["tests/README.md"],
                     re.M)  # exercise, old text of mixtral.py, new text, test
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts)
           for path in [*ROOT.glob("*.py"), *ROOT.glob("fast/*.py")] if ">>> " in path.read_text()]


def run_document(text):
    """Run the examples of a document in a copy of the repository: {line: output}."""
    with tempfile.TemporaryDirectory() as directory:
        place = readme.workplace(Path(directory))
        return {example.line: readme.run(place, example) for example in readme.examples(text)
                if readme.works_here(example)}


RUNS = {name: partial(run_document, text) for name, text in TEXTS.items()}


@pytest.mark.parametrize("example", [
    pytest.param(example, marks=pytest.mark.beside(run=RUNS[name]), id=f"{name}:{example.line}")
    for name, example in EXAMPLES])
def test_an_example_prints_what_the_document_shows(beside, example):
    if not readme.works_here(example):
        pytest.skip("needs the folder fast/")
    output = beside[example.line]
    assert readme.matches(example.shown, output), (example.command, example.shown, output)


def test_the_readme_is_short_and_has_python_and_console_examples():
    commands = [example.command for name, example in EXAMPLES if name == "README.md"]
    assert 0 < sum(command.startswith("python -") for command in commands) < len(commands)
    assert TEXTS["README.md"].count("\n") <= 150


@pytest.mark.parametrize("name", TEXTS)
def test_every_test_and_every_file_that_a_document_names_exists(name):
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for test in re.findall(r"\b(test_\w+)\b(?!\.py)", TEXTS[name]):
        assert f"def {test}(" in source, test
    prose = re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose):
        assert ((ROOT / name).parent / target).exists(), target
    for path in re.findall(r"(?<![\w/(])((?:tests|tiny|fast)/[\w./]*\w)", prose):
        optional = path.startswith("tiny/state") or not (ROOT / "fast").exists()
        assert (ROOT / path).exists() or optional, path


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_hold(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.failed == 0 and results.attempted > 0


def run_answers():
    """Run the test of each answer after its change to mixtral.py. Returns pytest's exit codes."""
    source, codes = (ROOT / "mixtral.py").read_text(encoding="utf-8"), {}
    for exercise, old, new, test in ANSWERS:
        assert source.count(old) == 1, f"exercise {exercise}: {old} must occur once in mixtral.py"
        changed = mutants.Mutant("mixtral.py", 0, old, new, source.replace(old, new))
        codes[exercise], _ = mutants.run_tests(["tests/test_mixtral.py", "-k", test], 300, changed)
    return codes


@pytest.mark.beside(run=run_answers)
def test_the_change_of_every_exercise_fails_the_test_in_its_answer(beside):
    assert len(beside) > 3 and set(beside.values()) == {1}, beside


# ------------------------------------------------------------------ the tool


@pytest.mark.parametrize("shown, output, same", [
    ("a\nb\n", "a\nb\n", True), ("", "", True), ("…\n", "", True), ("a\n…\n", "a\nb\nc\n", True),
    ("…\nc\n", "a\nb\nc\n", True), ("a …\nb\n", "a long line\nb\n", True),
    ("a\n", "a\nb\n", False), ("a\nb\n", "a\n", False), ("a …\n", "a long line\nb\n", False),
    ("…\nc\n", "a\nb\n", False), ("a…b\n", "acb\n", False), ("a.c\n", "abc\n", False)])
def test_an_output_matches_what_is_shown(shown, output, same):
    assert readme.matches(shown, output) == same


@pytest.mark.parametrize("block", ["$ python lost.py\n", "$ echo begun; exit 1\n…\n"])
def test_a_command_that_fails_is_reported(tmp_path, block):
    [example] = readme.examples(f"```console\n{block}```\n")
    with pytest.raises(ValueError, match=re.escape(example.command)):
        readme.run(readme.workplace(tmp_path), example)
