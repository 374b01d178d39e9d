"""Claims about the README: what it shows is what its commands and blocks print, word for word."""

import doctest
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from card import run, workplace

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
EXERCISES = re.findall(r"^\| [^|]+ \| `(.+?)` → `(.+?)` \| `(test_\w+)` \|$", README, re.M)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("readme"))


def shown(output):
    """What the README shows as a pattern: … stands for anything."""
    return re.compile(".*".join(map(re.escape, output.rstrip().split("…"))), re.S)


def test_it_is_short_enough_to_be_read():
    assert README.count("\n") <= 200


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "console"])
def test_commands_print_what_is_shown(place, block):
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, output = part.split("\n", 1)
        assert shown(output).fullmatch(run(place, command)), command


@pytest.mark.parametrize("code, output", [
    (code, output) for (kind, code), (_, output) in zip(BLOCKS, BLOCKS[1:], strict=False)
    if kind == "python"])
def test_python_blocks_print_what_is_shown(place, code, output):
    (place / "block.py").write_text(code, encoding="utf-8")
    assert shown(output).fullmatch(run(place, "python block.py"))


def test_every_kind_of_block_was_found():
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds.count("console") >= 3 and kinds.count("python") == kinds.count("text") == 2


def test_the_first_command_prints_the_story_shown(place):
    [story] = re.findall(r"^    (Once upon a time, .*?)…$", README, re.M | re.S)
    printed = run(place, 'python generate.py --prompt "Once upon a time"')
    assert " ".join(printed.split()).startswith(" ".join(story.split()))


def test_there_are_six_exercises():
    assert len(EXERCISES) == 6


@pytest.mark.parametrize("old, new, test", EXERCISES)
def test_an_exercise_fails_the_test_it_names(place, tmp_path, old, new, test):
    source = (ROOT / "mixtral.py").read_text(encoding="utf-8")
    assert source.count(old) == 1
    shutil.copytree(place, tmp_path / "copy", ignore=shutil.ignore_patterns("RAW", "OUT"))
    (tmp_path / "copy" / "mixtral.py").write_text(source.replace(old, new), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pytest", "tests/test_mixtral.py", "-k", test,
                           "-q", "-p", "no:cacheprovider"], cwd=tmp_path / "copy",
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and f"FAILED tests/test_mixtral.py::{test}" in done.stdout


@pytest.mark.parametrize("test", re.findall(r"`(test_\w+)`", README))
def test_every_test_it_names_is_there(test):
    files = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert any(f"def {test}(" in text for text in files)


@pytest.mark.parametrize("module", ["mixtral", "tokenizer", "generate"])
def test_the_examples_in_docstrings_hold(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0 and results.failed == 0


def test_pydoc_reads_as_a_chapter(place):
    text = run(place, "python -m pydoc mixtral")
    for words in ("Key of letters", "Departures from the released code", "class SparseMoE",
                  "Softmax(TopK(x·W_g))"):
        assert words in text


def test_the_picture_is_what_its_script_draws(place):
    before = (ROOT / "tiny" / "routing.svg").read_text(encoding="utf-8")
    run(place, "python tests/picture.py")
    assert (place / "tiny" / "routing.svg").read_text(encoding="utf-8") == before
