"""Break the code one small way at a time and see the tests notice: `python tests/mutants.py`.

Each row of MUTANTS changes one place of one file in a copy of the repository, in which the tests of
that file then run until the first fails. A mutant that no test can tell from the original carries
the reason; it is run all the same, and does not count. A run over the limit is no kill: a test
that hangs has not failed.

Exit codes: 0 at least 95 % killed, 1 fewer, 2 a row that no longer fits, or red tests unbroken.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two jobs with two threads each slow one another many times
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

# Imported once, before each run is forked: torch alone takes longer than most kills.
import hypothesis
import pytest
import safetensors  # noqa: F401
import sentencepiece  # noqa: F401
import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "mixtral.py": ["tests/oracle/test_golden.py", "tests/test_mixtral.py"],
    "tokenizer.py": ["tests/test_tokenizer.py"],
    "generate.py": ["tests/test_generate.py"]}
MUTANTS = [
    ("mixtral.py", "window one too wide",
     "causal & (j > i - window)", "causal & (j >= i - window)"),
    ("mixtral.py", "window one too narrow", "(j > i - window)", "(j > i - window + 1)"),
    ("mixtral.py", "a token does not see itself", "(j <= i)", "(j < i)"),
    ("mixtral.py", "later tokens are seen", "(j >= 0) & (j <= i)", "(j >= 0)"),
    ("mixtral.py", "empty slots are seen", "(j >= 0) & (j <= i)", "(j <= i)"),
    ("mixtral.py", "neighbours rotated together",
     "partner = wide.roll(x.shape[-1] // 2, dims=-1)",
     "partner = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)"),
    ("mixtral.py", "rotated the other way",
     "torch.cat((-sin, sin), dim=-1)", "torch.cat((sin, -sin), dim=-1)"),
    ("mixtral.py", "sine and cosine swapped", "sin = angle.sin()\n    return angle.cos()",
     "sin = angle.cos()\n    return angle.sin()"),
    ("mixtral.py", "a pair's sines alike", "torch.cat((-sin, sin), dim=-1)",
     "torch.cat((sin, sin), dim=-1)"),
    ("mixtral.py", "theta's exponent halved", "theta ** (-pair / d)", "theta ** (-pair / d / 2)"),
    ("mixtral.py", "theta's exponent positive", "theta ** (-pair / d)", "theta ** (pair / d)"),
    ("mixtral.py", "angles in float32", "torch.arange(0, d, 2, dtype=torch.float64",
     "torch.arange(0, d, 2, dtype=torch.float32"),
    ("mixtral.py", "scores not scaled", " / math.sqrt(d))", ")"),
    ("mixtral.py", "query heads dealt out to key heads", ".transpose(1, 2).reshape(B, K, -1, d)",
     ".unflatten(2, (-1, K)).transpose(2, 3).flatten(2, 3).transpose(1, 2).reshape(B, K, -1, d)"),
    ("mixtral.py", "softmax over queries", "scores.softmax(dim=-1)", "scores.softmax(dim=-2)"),
    ("mixtral.py", "masked scores are zero", "-math.inf))", "0.0))"),
    ("mixtral.py", "nothing widens", "return x if x.dtype.itemsize >= 4 else",
     "return x if True else"),
    ("mixtral.py", "always float32",
     "return x if x.dtype.itemsize >= 4 else", "return"),
    ("mixtral.py", "a widened product is not rounded", "F.linear(wide, weight).to(x.dtype)",
     "F.linear(wide, weight)"),
    ("mixtral.py", "slices of a product in another order",
     "y.transpose(0, 1).reshape(*x.shape[:-1], -1)", "y.reshape(*x.shape[:-1], -1)"),
    ("mixtral.py", "values stored as keys",
     "((self.keys[layer], k), (self.values[layer], v))",
     "((self.keys[layer], v), (self.values[layer], k))"),
    ("mixtral.py", "norm without epsilon", "keepdim=True) + self.eps)", "keepdim=True))"),
    ("mixtral.py", "norm of the sum", "wide.square().mean(", "wide.square().sum("),
    ("mixtral.py", "norm without weight", "self.weight * (wide * scale)", "(wide * scale)"),
    ("mixtral.py", "worst experts chosen", "descending=True, stable=True", "stable=True"),
    ("mixtral.py", "ties by luck", "descending=True, stable=True", "descending=True",
     "the sort of a few values on the CPU is stable in any case"),
    ("mixtral.py", "weights not renormalised",
     "at_least_float32(chosen[:, :k]).softmax(dim=-1)",
     "at_least_float32(chosen).softmax(dim=-1)[:, :k]"),
    ("mixtral.py", "weights of the next best", "at_least_float32(chosen[:, :k])",
     "at_least_float32(chosen[:, 1:k + 1] if chosen.shape[1] > k else chosen)"),
    ("mixtral.py", "w1 and w3 swapped", "F.silu(self.w1(x)) * self.w3(x)",
     "F.silu(self.w3(x)) * self.w1(x)"),
    ("mixtral.py", "gelu for silu", "F.silu(self.w1(x))", "F.gelu(self.w1(x))"),
    ("mixtral.py", "experts unweighted", " * weights[..., None]", ""),
    ("mixtral.py", "one token's weights for another", "weights[..., None]",
     "weights.t().reshape(weights.shape)[..., None]"),
    ("mixtral.py", "visits given to the wrong token", "tokens[order // self.k]",
     "tokens[order % len(tokens)]"),
    ("mixtral.py", "visits in another order", "visits = experts.flatten()",
     "visits = experts.t().flatten()"),
    ("mixtral.py", "the first expert of a token alone", "return y.sum(dim=1)", "return y[:, 0]"),
    ("mixtral.py", "results not put back in order", "y[order.argsort()]", "y[order]"),
    ("mixtral.py", "attention without its stream",
     'probe("residual", x + self', 'probe("residual", self'),
    ("mixtral.py", "mixture without its stream", "return x + self.block_sparse_moe",
     "return self.block_sparse_moe"),
    ("mixtral.py", "norms exchanged", "self.block_sparse_moe(self.post_attention_layernorm(x))",
     "self.block_sparse_moe(self.input_layernorm(x))"),
    ("mixtral.py", "keys not rotated",
     "q, k = rotate(qk, place.cos, place.sin).split((H, K), dim=2)",
     "q, k = rotate(qk, place.cos, place.sin)[:, :, :H], qk[:, :, H:]"),
    ("mixtral.py", "slot off by one", "positions % cache.keys.shape[3]",
     "(positions + 1) % cache.keys.shape[3]"),
    ("mixtral.py", "held positions off by one",
     "return last - (last - torch", "return last - 1 - (last - torch"),
    ("mixtral.py", "buffer a slot too small", "(c.sliding_window or max_length) + chunk - 1)",
     "(c.sliding_window or max_length) + chunk - 2)"),
    ("mixtral.py", "buffer a slot too large", "(c.sliding_window or max_length) + chunk - 1)",
     "(c.sliding_window or max_length) + chunk)"),
    ("mixtral.py", "padding counted as tokens", "S if lengths is None else lengths", "S"),
    ("mixtral.py", "lengths never grow",
     "            cache.lengths +=", "            cache.lengths + "),
    ("mixtral.py", "positions start anew", "positions = positions + cache.lengths[:, None]",
     "positions = positions + 0 * cache.lengths[:, None]"),
    ("mixtral.py", "last logits of another token",
     "lengths.clamp(1) - 1]", "lengths.clamp(1) - 2]"),
    ("mixtral.py", "real tokens of later chunks", "(lengths - at).clamp(0, chunk)",
     "lengths.clamp(0, chunk)"),
    ("mixtral.py", "final norm missing", "return self.norm(x)", "return x"),
    ("mixtral.py", "logits of one bit less", "return at_least_float32(self.lm_head(hidden))",
     "return self.lm_head(hidden).float()"),
    ("mixtral.py", "missing tensors forgiven",
     'return wrong + [f"missing {name}" for name in wanted]', "return wrong"),
    ("mixtral.py", "unknown tensors forgiven",
     'wrong.append(f"unknown or repeated {name}")', "pass"),
    ("mixtral.py", "shapes forgiven", "if shape != expected:", "if False:"),
    ("mixtral.py", "theta of Llama", "rope_theta: float = 1e6", "rope_theta: float = 1e4"),
    ("mixtral.py", "ids beyond the vocabulary taken", "most >= V:", "most > V:"),
    ("mixtral.py", "a full cache written over", "cache.fed + S > cache.max_length",
     "cache.fed > cache.max_length"),
    ("tokenizer.py", "worst pair first",
     "return (-scores[union], left", "return (scores[union], left"),
    ("tokenizer.py", "rightmost of equals", "(-scores[union], left, len(union))",
     "(-scores[union], -left, len(union))"),
    ("tokenizer.py", "stale pairs merged",
     "or len(symbols[left]) + len(symbols[right]) != length", ""),
    ("tokenizer.py", "no pair to the left anew", "for start in (before[left], left):",
     "for start in (left,):"),
    ("tokenizer.py", "byte in decimal",
     "int(self.pieces[i][3:5], 16)", "int(self.pieces[i][4:5], 16)"),
    ("tokenizer.py", "no dummy prefix", "text and SPACE + text.replace", "text and text.replace"),
    ("tokenizer.py", "a prefix for nothing", "text = text and SPACE + ", "text = SPACE + "),
    ("tokenizer.py", "BOS missing", "ids = [self.bos_id] * bos", "ids = []"),
    ("tokenizer.py", "BOS at the end", "return ids + [self.eos_id] * eos",
     "return ids + [self.bos_id] * eos"),
    ("tokenizer.py", "control ids from text", "apart = {self.unk_id, *self.control, *self.byte_of}",
     "apart = {self.unk_id, *self.byte_of}"),
    ("tokenizer.py", "shortest declared piece first", "sorted(declared, key=len, reverse=True)",
     "sorted(declared, key=len)"),
    ("tokenizer.py", "every leading space lost", "if not self.begun and i != t.unk_id:",
     "if i != t.unk_id:"),
    ("tokenizer.py", "bytes do not begin a text",
     "            self.begun = True\n            return text",
     "            return text"),
    ("tokenizer.py", "unfinished bytes forgotten", 'self.utf8.decode(b"", final=True)', '""'),
    ("tokenizer.py", "memory without bound",
     "if len(self) >= self.most:", "if False:"),
    ("tokenizer.py", "letters joined to e alone", "        agenda += new\n", ""),
    ("tokenizer.py", "letters joined backwards alone",
     "            beside.setdefault(a, set()).add(b)\n", ""),
    ("tokenizer.py", "system text in the wrong turn", "len(turns) - 1 if self.marks else 0",
     "0 if self.marks else len(turns) - 1"),
    ("tokenizer.py", "an answer without its end", "ids += [*content, self.eos_id]",
     "ids += [*content]"),
    ("tokenizer.py", "an answer's last spaces kept", 'content.rstrip(" ") if self.marks else',
     "content if True else"),
    ("generate.py", "temperature upside down", "keepdim=True)) / temperature)",
     "keepdim=True)) * temperature)"),
    ("generate.py", "greedy takes the worst",
     "return logits.argmax(dim=-1)", "return logits.argmin(dim=-1)"),
    ("generate.py", "nucleus without its last token", "mass.cumsum(-1) - mass >= top_p",
     "mass.cumsum(-1) >= top_p"),
    ("generate.py", "nucleus one token too many", "mass.cumsum(-1) - mass >= top_p",
     "mass.cumsum(-1) - mass > top_p + 0.05"),
    ("generate.py", "nucleus of the unlikely", "mass.sort(dim=-1, descending=True, stable=True)",
     "mass.sort(dim=-1, stable=True)"),
    ("generate.py", "ranks taken for ids",
     "return ids.gather(-1, drawn.view(*ids.shape[:-1], 1)).squeeze(-1)",
     "return drawn.view(*ids.shape[:-1])"),
    ("generate.py", "NaN drawn from", "if logits.isnan().any():", "if False:"),
    ("generate.py", "rows share a generator",
     "generators = [seeded(seed, device) for seed in seeds]",
     "generators = [seeded(seeds[0], device)] * len(seeds)"),
    ("generate.py", "the seed forgotten", "generator.manual_seed(seed)", "generator.seed()"),
    ("generate.py", "EOS not sticky", "lengths = alive = alive * (drawn",
     "lengths = alive = 1 * (drawn"),
    ("generate.py", "EOS ignored", "-1 if eos_id is None else eos_id", "-1"),
    ("generate.py", "one token too many", "for _ in range(max_new_tokens):",
     "for _ in range(max_new_tokens and max_new_tokens + 1):"),
    ("generate.py", "padding on the left", "[[*prompt] + [0] * (S - len(prompt)) for",
     "[[0] * (S - len(prompt)) + [*prompt] for"),
    ("generate.py", "top_p of zero taken", "if not 0 < top_p <= 1:", "if not 0 <= top_p <= 1:"),
    ("generate.py", "negative temperatures taken", "if not 0 <= temperature < math.inf:",
     "if not temperature < math.inf:"),
    ("generate.py", "errors end with 0",
     'print(f"generate.py: {error}", file=sys.stderr)\n        return 1',
     'print(f"generate.py: {error}", file=sys.stderr)\n        return 0'),
    ("generate.py", "the prompt is not shown",
     'print(answers[0].prompt, end="", flush=True)', "pass"),
    ("generate.py", "margin to the chosen itself",
     "best[:, k - 1] - best[:, k]", "best[:, 0] - best[:, k]"),
    ("generate.py", "a trace of all layers", "int(inside[1]) in layers", "True"),
    ("generate.py", "the watcher stays", "        mixtral.watch = None\n", "        pass\n"),
    ("generate.py", "a stop string begun is printed", "for n in range(1, len(stop))",
     "for n in range(2, len(stop))"),
    ("generate.py", "the later stop string counts", "self.held[:min(found)]",
     "self.held[:max(found)]"),
    ("generate.py", "log-probabilities after temperature", "known = logits.double().log_softmax",
     "known = (logits.double() / (temperature or 1)).log_softmax"),
    ("generate.py", "a chat's last token counted as read", "self.read = (ids + drawn)[:-1]",
     "self.read = ids + drawn"),
    ("generate.py", "an interrupted step stays counted",
     "        self.cache.fed = len(self.read)\n", ""),
    ("generate.py", "samples with one seed", "args.seed + n for _, n in rows",
     "args.seed for _, n in rows"),
    ("generate.py", "routing by the second choice", "experts[:, 0].tolist(), 1 +",
     "experts[:, 1].tolist(), 1 +"),
]


def copied(directory, file=None, old=None, new=None):
    """The repository in a directory, one place of it changed."""
    directory.mkdir()
    for name in (*TESTS, "convert.py", "pyproject.toml"):
        shutil.copy(ROOT / name, directory)
    shutil.copytree(ROOT / "tests", directory / "tests")
    (directory / "tiny").symlink_to(ROOT / "tiny")
    if file:
        path = directory / file
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def run_tests(directory, files):
    """In a forked process: run the tests of a copy and end with pytest's exit code."""
    os.setsid()
    os.chdir(directory)
    sys.path.insert(0, str(directory))
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    # Shrinking seeks the smallest counterexample, for minutes; here any will do.
    hypothesis.settings.register_profile(
        "mutants", database=None, deadline=None,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate))
    hypothesis.settings.load_profile("mutants")
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=no", *files])
    sys.stdout.flush()
    os._exit(code)


class Job:
    """One run of a copy's tests, in a process of its own."""

    def __init__(self, row, directory):
        self.row, self.directory, self.start = row, directory, time.monotonic()
        self.process = os.fork()
        if not self.process:
            try:
                run_tests(directory, TESTS[row[0]])
            finally:
                os._exit(99)

    def ended(self, limit):
        """What became of it, or None while it runs."""
        done, status = os.waitpid(self.process, os.WNOHANG)
        if not done and time.monotonic() - self.start > limit:
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            return "timed out"
        if not done:
            return None
        code = os.waitstatus_to_exitcode(status)
        return {0: "survived", 1: "killed", 2: "killed"}.get(code, f"ended with {code}")

    def killer(self):
        found = re.search(r"^(?:FAILED|ERROR) \S*?([\w.]+\.py(?:::\w+)?)",
                          (self.directory / "log").read_text(errors="replace"), re.M)
        return found[1] if found else "-"


def results(rows, place, jobs, limit):
    """Each row with its end, the killing test and seconds, as they come."""
    waiting, running = list(enumerate(rows)), []
    while waiting or running:
        while waiting and len(running) < jobs:
            n, row = waiting.pop(0)
            copied(place / str(n), row[0], *row[2:4])
            running.append(Job(row, place / str(n)))
        for job in list(running):
            if end := job.ended(limit):
                running.remove(job)
                yield job.row, end, job.killer(), time.monotonic() - job.start
                shutil.rmtree(job.directory, ignore_errors=True)
        time.sleep(0.02)


def check(rows, place, jobs, limit):
    """Say what makes the whole run worthless, if anything does."""
    for file, words, old, *_ in rows:
        if (count := (ROOT / file).read_text(encoding="utf-8").count(old)) != 1:
            return f"{file}, {words}: {old!r} is there {count} times, wanted once"
    whole = [(file, "unbroken", "", "") for file in dict.fromkeys(row[0] for row in rows)]
    for row, end, killer, seconds in results(whole, place, jobs, limit):
        print(f"{row[0]:13} {'unbroken':34} {end:10} {seconds:5.0f} s", flush=True)
        if end != "survived":
            return f"the tests of {row[0]} fail unbroken: {killer}"
    return None


def main():
    p = argparse.ArgumentParser(description="See the tests notice each of many small faults.")
    p.add_argument("--only", default="", metavar="TEXT", help="rows that hold this text")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    p.add_argument("--limit", type=float, default=120, help="seconds for one (default: 120)")
    args = p.parse_args()
    rows = [row for row in MUTANTS if args.only in f"{row[0]} {row[1]}"]
    killed, counted, start = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if wrong := check(rows, place, args.jobs, 3 * args.limit):
            print(f"mutants.py: {wrong}", file=sys.stderr)
            return 2
        for (file, words, _, _, *reason), end, killer, seconds in results(
                rows, place, args.jobs, args.limit):
            counted, killed = counted + (not reason), killed + (not reason and end == "killed")
            print(f"{file:13} {words:34} {end:10} {seconds:5.0f} s  "
                  f"{killer if end == 'killed' else ''.join(reason)}", flush=True)
    print(f"{killed} of {counted} killed, {len(rows) - counted} more no test can tell from the "
          f"original; {time.monotonic() - start:.0f} s")
    return 0 if killed >= 0.95 * counted else 1


if __name__ == "__main__":
    sys.exit(main())
