"""The examples in the documents, which tests/test_readme.py runs.

An example is a ```python block that is followed by a ```text block with its output, or a line
`$ command` in a ```console block that is followed by its output. Only standard output counts. In a
shown output, a line `…` stands for any number of lines, and ` …` at the end of a line stands for
the rest of that line.

The examples of a document run in order, in a copy of the repository. There, `python` is the
interpreter that runs this program, and `pip` does nothing. RAW, which stands for downloaded weights
in the documents, is a directory with the embedded checkpoint in Mistral's layout.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "tests/README.md", "tests/oracle/README.md", "tiny/README.md")
ENVIRONMENT = dict(os.environ)  # a test may change it while an example of a document runs
PROGRAMS = {"python": f'exec "{sys.executable}" "$@"', "pip": ":",
            "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"'}
LINES = r"(?:(?!```).*\n)*"  # up to the end of a block
BLOCK = re.compile(rf"^```(?:(?P<kind>python)\n(?P<code>{LINES})```\n+```text|console)\n"
                   rf"(?P<body>{LINES})```$", re.M)
COMMAND = re.compile(r"^\$ (?P<command>(?:.*\\\n)*.*)\n(?P<output>(?:(?!\$ ).*\n)*)", re.M)


class Example(NamedTuple):
    line: int  # in the document, counted from 1
    command: str  # for the shell
    shown: str  # the output, with its line ends


def examples(document):
    """The examples in the text of a document."""
    found = []
    for block in BLOCK.finditer(document):
        line, body = document.count("\n", 0, block.start("body")), block["body"]
        if block["kind"]:
            found.append(Example(line, f"python - <<'END'\n{block['code']}END", body))
        else:
            found += [Example(line + body.count("\n", 0, part.start("output")), part["command"],
                              part["output"]) for part in COMMAND.finditer(body)]
    return found


def works_here(example):
    """Whether an example can run; some need the folder fast/, which is optional."""
    return (ROOT / "fast").exists() or not re.search("int4|torchrun", example.command)


def matches(shown, output):
    """Whether an output is the shown one; … stands for what was left out."""
    patterns = []
    for line in shown.splitlines():
        if line == "…":
            patterns.append("(?:.*\n)*")
        elif line.endswith(" …"):
            patterns.append(re.escape(line.removesuffix("…").rstrip()) + ".*\n")
        else:
            patterns.append(re.escape(line) + "\n")
    return re.fullmatch("".join(patterns), output) is not None


def copy_repository(directory):
    """Copy the program files, the tests and the embedded checkpoint to a directory."""
    for pattern in ("*.py", "*.md", "*.txt", "*.toml"):
        for path in ROOT.glob(pattern):
            shutil.copy2(path, directory)
    for name in ("tests", "tiny", "fast"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, directory / name,
                            ignore=shutil.ignore_patterns(".*", "__pycache__", "state.p*"))
    return directory


def workplace(directory):
    """A copy of the repository, with the programs that the documents call in `bin`."""
    (copy_repository(directory) / "bin").mkdir()
    for name, body in PROGRAMS.items():
        (directory / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (directory / "bin" / name).chmod(0o755)
    return directory


def run(place, example):
    """Run an example in a workplace; the first that names RAW finds it there.

    Returns its output. Raises ValueError if it fails, unless it prints and its output is shown.
    """
    command = example.command
    if re.search(r"\bRAW\b", command) and not (place / "RAW").exists():
        command = f"python convert.py --input_dir tiny --output_dir RAW --to mistral >&2\n{command}"
    path = f"{place / 'bin'}{os.pathsep}{ENVIRONMENT['PATH']}"
    done = subprocess.run(command, shell=True, cwd=place, capture_output=True, encoding="utf-8",
                          timeout=300, env={**ENVIRONMENT, "PATH": path, "NO_COLOR": "1"})
    if done.returncode and not (done.stdout and example.shown.strip("…\n")):
        raise ValueError(f"line {example.line}: {example.command}\n{done.stderr}")
    return done.stdout + "\n" * (not done.stdout.endswith("\n") and done.stdout != "")
