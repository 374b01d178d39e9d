"""Make one small change at a time and report which test fails: `python tests/tools/mutants.py`.

Each change ("mutant") is made in a copy of the repository. Then the tests of the changed file run,
the fastest first, until one fails. Only a test failure kills a mutant. A mutant whose tests take
too long, crash or cannot be collected counts as not killed. A mutant with a reason in the table
gives the same results as the original, so no test can kill it; it runs too, but does not count.

All runs are forked from this process, which has imported torch already. Two run at a time.

    python tests/tools/mutants.py --only route      the mutants with `route` in their line
    python tests/tools/mutants.py --answers         the answers in tests/README.md: each change is
                                                    made, and only the named test runs

Exit codes: 0 if at least 97 % are killed, 1 if fewer, 2 if a change no longer fits its file, or if
the tests fail without any change.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # two runs with two threads each would slow each other down
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

# Imported here once, because every forked run needs them.
import hypothesis
import pytest
import safetensors  # noqa: F401
import sentencepiece  # noqa: F401
import torch._dynamo  # noqa: F401
from changes import CHANGES
from readme import ROOT, copy_repository

RANKS = "tests/test_parallel.py::test_"
TESTS = {  # the tests of each subject, as arguments for pytest
    "mixtral.py": ["tests/test_mixtral.py", "tests/oracle/test_golden.py"],
    "tokenizer.py": ["tests/test_tokenizer.py"],
    "generate.py": ["tests/test_generate.py"],
    "generate.py 4 bits": [
        "tests/test_int4.py",
        "tests/test_generate.py::test_a_tuned_4_bit_model_gives_the_logits_of_the_plain_one"],
    "generate.py ranks": [f"{RANKS}every_rank_gives_the_float64_logits_of_one_process",
                          f"{RANKS}ranks_draw_the_tokens_of_one_process_and_without_a_seed_the_same",
                          f"{RANKS}a_rank_with_a_whole_model_of_its_own_draws_its_own_tokens"],
    "convert.py": ["tests/test_convert.py"],
    "convert.py 4 bits": ["tests/test_int4.py"],
    "tests/oracle/trace.py": ["tests/oracle/test_trace.py", "tests/oracle/test_golden.py"],
    "tests/oracle/compare.py": ["tests/oracle/test_compare.py"],
    "tests/oracle/pair.py": ["tests/oracle/test_compare.py", "tests/oracle/test_causes.py"],
    "tests/oracle/causes.py": ["tests/oracle/test_causes.py"],
    "tests/oracle/steps.py": ["tests/oracle/test_causes.py"],
    "tiny/train.py": ["tests/test_train.py"]}
PASSED, FAILED, NOT_RUN = "survived", "killed", "no test ran"


class Mutant(NamedTuple):
    subject: str  # a key of TESTS: the file, perhaps with a topic; without a change, the tests
    change: str  # in words
    old: str  # occurs once in the file
    new: str
    same: str = ""  # the reason, if the results are the same as the original's
    test: str = ""  # the only test to run; "" means all tests of the subject

    @property
    def file(self):
        return self.subject.partition(" ")[0]


# ------------------------------------------------------------------ one run, in a forked process


class Recorder:
    """A plugin for pytest: runs the fast tests of each file first, and records what happens."""

    def __init__(self, seconds):
        self.seconds, self.measured, self.failed, self.count = seconds, {}, "", 0

    def pytest_collection_modifyitems(self, items):
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (files.index(item.path), self.seconds.get(item.nodeid, 0)))

    def pytest_runtest_logreport(self, report):
        self.count += report.when == "call"
        spent = self.measured.get(report.nodeid, 0)
        self.measured[report.nodeid] = spent + report.duration
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def outcome(self, code):
        """What pytest's exit code means: 0 is success, 1 is a failure, but also of collecting."""
        if code == pytest.ExitCode.TESTS_FAILED and self.failed:
            return FAILED
        return PASSED if code == pytest.ExitCode.OK and self.count else NOT_RUN


def isolate(directory, seconds):
    """Prepare this process to run tests in a directory for so much processor time."""
    os.setsid()
    os.chdir(directory)
    sys.path[0] = str(directory)
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
    # The same examples in every run. They are not shrunk, because any failure is enough.
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, deadline=None,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate))


def run_tests(mutant, seconds):
    """Run the tests in this directory and write what happened to `result.json`."""
    recorder = Recorder(seconds)
    files, only = TESTS.get(mutant.subject, [mutant.subject]), []
    if mutant.test:
        files = [file for file in files if f"def {mutant.test}(" in Path(file).read_text("utf-8")]
        only = ["-k", mutant.test]
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=short", *only,
                        "--hypothesis-profile=mutants", *files], [recorder])
    sys.stdout.flush()
    Path("result.json").write_text(json.dumps(
        [recorder.outcome(code), recorder.failed, recorder.measured]))


class Run:
    """The tests of one mutant, in a process of its own."""

    def __init__(self, mutant, directory, seconds, limit):
        self.mutant, self.directory, self.limit = mutant, directory, limit
        self.start = time.monotonic()
        copy_repository(directory)
        path = directory / mutant.file
        if mutant.old:
            path.write_text(path.read_text("utf-8").replace(mutant.old, mutant.new), "utf-8")
        self.process = os.fork()
        if self.process == 0:
            try:
                isolate(directory, limit)
                run_tests(mutant, seconds)
            finally:
                os._exit(0)

    def result(self):
        """None while it runs, then the outcome, the test that failed, and seconds by test."""
        done, status = os.waitpid(self.process, os.WNOHANG)
        late = time.monotonic() - self.start > 3 * self.limit
        if not done and not late:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)  # also the programs that tests have started
        if not done:
            os.waitpid(self.process, 0)
        file = self.directory / "result.json"
        if file.exists():
            return json.loads(file.read_text())
        late = late or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        return ["timed out" if late else "crashed", "", {}]


def run_all(mutants, place, seconds, args):
    """Yield each mutant with its result and its time, two (`--jobs`) at a time."""
    waiting, running = list(enumerate(mutants)), []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            n, mutant = waiting.pop(0)
            running.append(Run(mutant, place / str(n), seconds, args.limit))
        for run in list(running):
            if result := run.result():
                running.remove(run)
                yield run, *result
                shutil.rmtree(run.directory)
        time.sleep(0.02)


# ------------------------------------------------------------------ the report


def misfits(mutants):
    """One line for each change whose old text does not occur exactly once."""
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1 or mutant.old == mutant.new:
            yield (f"{mutant.subject}, {mutant.change}: {mutant.old!r} occurs {count} times, "
                   "not once")


def all_mutants():
    return [Mutant(subject, *change) for subject, changes in CHANGES.items() for change in changes]


def answers():
    """The exercises' changes to mixtral.py, from the table in tests/README.md."""
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| `(.+?)` → `(.*?)` \| `(test_\w+)` \|", text, re.M)
    return [Mutant("mixtral.py", f"exercise {number}", old, new, test=test)
            for number, old, new, test in rows]


def durations(mutants, place, args):
    """Run all tests without any change. Returns the seconds of each test, and what failed."""
    files = dict.fromkeys(test for mutant in mutants for test in TESTS[mutant.subject])
    seconds, failed = {}, []
    originals = [Mutant(file, "no change", "", "") for file in files]
    for run, outcome, test, measured in run_all(originals, place, {}, args):
        print_row(run, outcome, test)
        seconds |= measured
        if outcome != PASSED:
            failed.append(f"{run.mutant.subject}: fails without any change: {test}")
            print((run.directory / "log").read_text(errors="replace")[-3000:], file=sys.stderr)
    return seconds, failed


def print_row(run, outcome, test):
    subject, change = run.mutant.subject.partition("::")[0], run.mutant.change
    spent = time.monotonic() - run.start
    # tests/test_x.py::test_y[1-2] becomes test_x.py::test_y
    result = re.sub(r"^.*?(\w+\.py::\w+).*", r"\1", test) if outcome == FAILED else outcome
    print(f"{subject:29} {change:44} {spent:4.0f} s  {result}", flush=True)


def parse_arguments(argv):
    p = argparse.ArgumentParser(description="Make small changes and report which test fails.")
    p.add_argument("--only", default="", metavar="TEXT", help="mutants with TEXT in their line")
    p.add_argument("--answers", action="store_true", help="the answers to the exercises instead")
    p.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (default 2)")
    p.add_argument("--limit", type=int, default=120, metavar="SECONDS",
                   help="processor time for the tests of one mutant (default 120); three times as "
                        "much time may pass")
    return p.parse_args(argv)


def report(mutants, place, args):
    """Run everything and print the table; returns the exit code."""
    seconds, wrong = ({}, list(misfits(mutants)))
    if not wrong and not args.answers:
        seconds, wrong = durations(mutants, place, args)
    for line in wrong:
        print(f"mutants.py: {line}", file=sys.stderr)
    if wrong:
        return 2
    counted = [mutant for mutant in mutants if not mutant.same]
    killed, start = 0, time.monotonic()
    for run, outcome, test, _ in run_all(mutants, place / "mutants", seconds, args):
        print_row(run, f"{outcome}: {run.mutant.same}" if run.mutant.same else outcome, test)
        killed += outcome == FAILED and not run.mutant.same
    print(f"{len(mutants) - len(counted)} more mutants give the same results as the original; "
          f"{time.monotonic() - start:.0f} s")
    print(f"{killed} of {len(counted)} mutants killed")
    return 0 if killed >= 0.97 * len(counted) else 1


def main(argv=None):
    args = parse_arguments(argv)
    table = answers() if args.answers else all_mutants()
    mutants = [m for m in table if args.only in f"{m.subject}, {m.change}: {m.old} → {m.new}"]
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "mutants").mkdir()
        return report(mutants, place, args)


if __name__ == "__main__":
    sys.exit(main())
