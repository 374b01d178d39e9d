"""Measure speed and memory beside other programs, in one run: `python tests/tools/benchmark.py`.

    start      generate.py for one token, beside `import torch`
    load       time to load the model, and memory that no file backs
    prefill    prompts of 64, 512 and 4,096 tokens
    decode     32 more tokens, also of the embedded model, and its dispatcher events per token
    batch      32 more tokens in 4 and 16 rows at once
    int4       experts in 4 bits, beside bfloat16; with --text also the bits per byte of the
               embedded model for two rules and two sizes of the groups
    long       32,768 tokens with a window of 4,096, as multiples of 8,192 tokens
    tokenizer  English text for the first time (cold) and again (warm), beside sentencepiece
    convert    two layouts, beside `cp -r`; not measured by default, because it needs 5 GB of disk

The model is a random one with 0.79 B parameters, unless a row says "tiny". Every implementation
runs in a process of its own, and the processes take turns in each round. The table shows medians.
A number in brackets says how many times as fast, or as small, this project is.

The other programs are transformers, if it is installed, in the fastest combination of its
implementations of attention and experts; llama.cpp, with --llama-bench and --gguf; and another
checkout of this project, with --against. The GGUF files must hold the model that --checkpoint
names, which is made if it does not exist.

The limit of a decode row is the measured rate of reading memory, divided by the bytes of weights
and cache that a step reads. The limit of a prefill row is the measured rate of matrix products,
divided by the operations per token.
"""

import argparse
import html
import importlib.util
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from sides import (
    ROOT,
    LlamaBench,
    Loader,
    Machine,
    Ours,
    Quality,
    Side,
    Tokenizers,
    Transformers,
    anonymous_memory,
)

PEER = importlib.util.find_spec("transformers") is not None
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NEW = 32  # tokens per row of a decode


class Sizes(NamedTuple):
    """What is measured. With QUICK the numbers mean nothing."""

    config: dict
    prompts: tuple[int, ...]
    context: int  # before a decode
    rows: tuple[int, ...]
    long: tuple[int, int, int]  # window, shorter text, longer text
    memory: int  # bytes that are read to measure the memory
    product: int  # width of the matrices that are multiplied
    text: int  # characters
    dtypes: tuple[str, ...]
    group: int  # weights that share a scale in int4
    conversions: tuple[tuple[str, bool], ...]  # layout, and whether from disk to disk


MODEL = {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 8, "head_dim": 64,
         "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 3584}
SMALL = {"vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
FULL = Sizes(MODEL, (64, 512, 4096), 64, (4, 16), (4096, 8192, 32768), 2**30, 4096, 10**6,
             ("bfloat16", "float32"), 128,
             tuple(itertools.product(("mistral_pickle", "mistral_fused"), (True, False))))
QUICK = Sizes(SMALL, (8,), 8, (2,), (64, 512, 1024), 2**20, 64, 10**3, ("bfloat16",), 32,
              (("mistral_fused", True),))


class Row(NamedTuple):
    what: str
    unit: str  # higher is better if it is a rate
    values: dict[str, float]  # by program; this project's is "this"
    limit: float | None = None

    @property
    def rate(self):
        return self.unit.endswith("/s")

    def ratio(self, other):
        ours, theirs = self.values["this"], self.values[other]
        return ours / theirs if self.rate else theirs / ours


# ------------------------------------------------------------------ a run of the benchmark


class Bench:
    """The options, the sizes, the limits of the machine and the processes of a run."""

    def __init__(self, args, place):
        self.args, self.place, self.sizes = args, place, QUICK if args.quick else FULL
        self.machine, self.sides = Side(Machine), {}
        self.checkpoint = args.checkpoint or place / "checkpoint"
        if not self.checkpoint.exists():
            self.machine("make_checkpoint", self.checkpoint, self.sizes.config)
        self.read_rate = self.machine("read_rate", self.sizes.memory)
        rates = [self.machine("product_rate", dtype, self.sizes.product)
                 for dtype in DTYPES.values()]
        # bfloat16 weights can be widened to float32 first, which is exact.
        self.product_rates = {"bfloat16": max(rates), "float32": rates[1]}

    def side(self, make, *args):
        """A process, which is started at its first use."""
        if (make, *args) not in self.sides:
            self.sides[make, *args] = Side(make, *args)
        return self.sides[make, *args]

    def close(self):
        for side in (self.machine, *self.sides.values()):
            side.close()
        self.sides = {}

    def programs(self, directory, dtype):
        """A function (rows, context, new) for each way of running a model."""
        sides = {"this": self.side(Ours, ROOT, directory, DTYPES[dtype])}
        if self.args.against:
            sides["before"] = self.side(Ours, self.args.against, directory, DTYPES[dtype])
        runs = {name: partial(side, "run") for name, side in sides.items()}
        if PEER:
            side = self.side(Transformers, directory, DTYPES[dtype])
            for variant in itertools.product(("sdpa", "eager"), ("grouped_mm", "eager")):
                runs[", ".join(("transformers", *variant))] = partial(side, "run", *variant)
        for file in self.args.gguf if directory == self.checkpoint and dtype == "bfloat16" else ():
            runs[f"llama.cpp {file.stem}"] = LlamaBench(
                self.args.llama_bench, file, torch.get_num_threads()).run
        return runs

    def rates(self, runs, part, rows, context, new):
        """Tokens per second of each program, for the prompt (part 0) or for the rest (part 1)."""
        seconds = {}
        for turn in range(1 + self.args.rounds):
            times = {name: run(rows, context, new) for name, run in runs.items()}
            times = {name: pair[part] for name, pair in times.items() if pair}
            if turn == 0:  # a warm-up
                runs = {name: runs[name] for name in without_slow_variants(times)}
                continue
            for name, taken in times.items():
                seconds.setdefault(name, []).append(taken)
        count, rates = rows * (new - 1 if part else context), {}
        for name, taken in seconds.items():
            program = name.partition(",")[0]
            rates[program] = max(count / statistics.median(taken), rates.get(program, 0))
        return rates

    def prefill(self, name, directory, config, dtype, S):
        operations = 2 * weights_per_token(config, head=False)
        operations += 4 * config["num_hidden_layers"] * config["num_attention_heads"] * (
            config["head_dim"] * S / 2)  # scores and values of S/2 keys on average
        return Row(f"{name}prefill {S:,}, {dtype}", "tokens/s",
                   self.rates(self.programs(directory, dtype), 0, 1, S, 1),
                   self.product_rates[dtype] / operations)

    def decode(self, name, directory, config, dtype, rows, context):
        cache = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * (
            config["head_dim"] * context)
        size = DTYPES[dtype].itemsize * (weights_per_token(config, rows) + rows * cache)
        return Row(f"{name}decode, batch {rows}, {dtype}", "tokens/s",
                   self.rates(self.programs(directory, dtype), 1, rows, context, 1 + NEW),
                   rows * self.read_rate / size)


def without_slow_variants(seconds):
    """The names without those variants of transformers that take 10 % longer than its fastest."""
    peers = [name for name in seconds if name.startswith("transformers")]
    limit = 1.1 * min((seconds[name] for name in peers), default=0)
    return [name for name in seconds if name not in peers or seconds[name] <= limit]


def weights_per_token(config, rows=1, head=True):
    """The weights that one step reads: attention, router, and the experts that any row chooses.

    If rows choose at random, an expert is not read with probability (1 − A/E)^rows.
    """
    D, A, E = config["hidden_size"], 2, 8
    heads = config["num_attention_heads"] + config["num_key_value_heads"]
    experts = E * (1 - (1 - A / E) ** rows) * 3 * D * config["intermediate_size"]
    layer = 2 * D * config["head_dim"] * heads + D * E + experts
    return config["num_hidden_layers"] * layer + head * D * config["vocab_size"]


def prefill(bench):
    for dtype, S in itertools.product(bench.sizes.dtypes, bench.sizes.prompts):
        yield bench.prefill("", bench.checkpoint, bench.sizes.config, dtype, S)


def decode(bench):
    for dtype in bench.sizes.dtypes:
        yield bench.decode("", bench.checkpoint, bench.sizes.config, dtype, 1, bench.sizes.context)
    tiny = json.loads((ROOT / "tiny" / "config.json").read_text())
    tiny |= {"head_dim": tiny["hidden_size"] // tiny["num_attention_heads"]}
    for dtype in bench.sizes.dtypes:
        yield bench.decode("tiny ", ROOT / "tiny", tiny, dtype, 1, bench.sizes.context)
    roots = {"this": ROOT} | ({"before": bench.args.against} if bench.args.against else {})
    yield Row("tiny dispatcher events, float32", "per token", {
        name: bench.side(Ours, root, ROOT / "tiny", torch.float32)("events", 8, 8)
        for name, root in roots.items()})


def batch(bench):
    for dtype, rows in itertools.product(bench.sizes.dtypes, bench.sizes.rows):
        yield bench.decode("", bench.checkpoint, bench.sizes.config, dtype, rows,
                           bench.sizes.context)


def long(bench):
    window, *lengths = bench.sizes.long
    directory = bench.place / "long"
    bench.machine("make_checkpoint", directory, bench.sizes.config | {"sliding_window": window})
    found = []
    for length in lengths:
        side = Side(Ours, ROOT, directory, torch.float32)
        seconds, _ = side("run", 1, length, 1, watch=True)
        found.append((seconds, side("cache_size", length), side.peak))
        side.close()
    shutil.rmtree(directory)
    for name, short, longer in zip(("time", "cache", "memory"), *found, strict=True):
        yield Row(f"prefill {lengths[1]:,}, window {window:,}: {name}", f"× of {lengths[0]:,}",
                  {"this": longer / max(short, 1e-9)})


def int4(bench):
    """The experts in 4 bits, beside the same model in bfloat16."""
    directory, sizes = bench.place / "int4", bench.sizes
    if not directory.exists():
        subprocess.run([sys.executable, ROOT / "convert.py", "--input_dir", bench.checkpoint,
                        "--output_dir", directory, "--dtype", "int4", "--group-size",
                        str(sizes.group)], check=True, stdout=subprocess.DEVNULL)
    runs = {name: partial(bench.side(Ours, ROOT, source, torch.bfloat16), "run")
            for name, source in (("this", directory), ("bfloat16", bench.checkpoint))}
    for file in bench.args.gguf:
        runs[f"llama.cpp {file.stem}"] = LlamaBench(
            bench.args.llama_bench, file, torch.get_num_threads()).run
    prompt = sizes.prompts[len(sizes.prompts) // 2]
    yield Row(f"int4 prefill {prompt}", "tokens/s", bench.rates(runs, 0, 1, prompt, 1))
    for rows in (1, *sizes.rows):
        yield Row(f"int4 decode, batch {rows}", "tokens/s",
                  bench.rates(runs, 1, rows, sizes.context, 1 + NEW))
    if bench.args.text:
        side = bench.side(Quality, bench.args.text)
        plain = side("bits_per_byte")
        for G, best in itertools.product((32, 64), (False, True)):
            rule = "the best of ten scales" if best else "the scale max/7.5"
            yield Row(f"tiny in 4 bits, groups of {G}, {rule}", "bits per byte",
                      {"this": side("bits_per_byte", G, best), "bfloat16": plain})


def watched(command):
    """Seconds, and the peak of the memory that no file backs, of a command."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.002)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return time.perf_counter() - start, peak


def start(bench):
    roots = {"this": ROOT} | ({"before": bench.args.against} if bench.args.against else {})
    commands = {name: [root / "generate.py", "--prompt", "x", "--max-new-tokens", "1"]
                for name, root in roots.items()} | {"import torch": ["-c", "import torch"]}
    taken = {name: [] for name in commands}
    for turn in range(bench.args.quick, 1 + bench.args.rounds):
        for name, command in commands.items():
            taken[name] = taken[name] * (turn > 1) + [watched([sys.executable, *command])[0]]
    yield Row("start, one token of the tiny model", "s",
              {name: statistics.median(seconds) for name, seconds in taken.items()})


def load(bench):
    kinds = {"this": (Ours, ROOT)} | ({"transformers": (Transformers,)} if PEER else {})
    taken = {name: [] for name in kinds}
    for _ in range(bench.args.rounds):
        for name, kind in kinds.items():
            side = Side(Loader, *kind)
            seconds = side("run", bench.checkpoint, watch=True)
            taken[name].append((seconds, side.peak))
            side.close()
    size = (bench.checkpoint / "model.safetensors").stat().st_size
    for part, what, unit, scale in ((0, f"load {size / 1e9:.1f} GB", "s", 1),
                                    (1, "memory that no file backs", "× of the file", size)):
        yield Row(what, unit, {name: statistics.median(pair[part] for pair in pairs) / scale
                               for name, pairs in taken.items()})


def tokenizer(bench):
    side = bench.side(Tokenizers, bench.sizes.text)
    rounds = [side("run") for _ in range(1 + bench.args.rounds)][1:]
    cold, warm, peer = (statistics.median(column) for column in zip(*rounds, strict=True))
    for name, ours in (("cold", cold), ("warm", warm)):
        yield Row(f"tokenizer, {side('pieces'):,} pieces, {name}", "MB/s",
                  {"this": ours, "sentencepiece": peer})


def settle(directory):
    """Write all files to the disk, and drop them from the page cache."""
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(command, source, target, disk):
    """Seconds and peak memory of a command that makes `target` from `source`."""
    if disk:
        settle(source)
    seconds, peak = watched(command)
    begin = time.perf_counter()
    if disk:
        settle(target)
        seconds += time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds, peak


def convert(bench):
    target = bench.place / "converted"
    for layout, disk in bench.sizes.conversions:
        source = bench.place / layout
        if not source.exists():
            bench.machine("make_raw", layout, source, bench.sizes.config)
        commands = {"this": [sys.executable, ROOT / "convert.py", "--input_dir", source,
                             "--output_dir", target, "--max-shard-size", "256MB"],
                    "cp -r": ["cp", "-r", source, target]}
        taken = {name: [] for name in commands}
        for _ in range(bench.args.rounds):
            for name, command in commands.items():
                taken[name].append(copied(command, source, target, disk))
        where = "disk to disk" if disk else "page cache to page cache"
        yield Row(f"convert {layout}, {where}", "s",
                  {name: statistics.median(s for s, _ in pairs) for name, pairs in taken.items()})
        yield Row("its memory that no file backs", "MB",
                  {"this": max(peak for _, peak in taken["this"]) / 1e6})


PARTS = {part.__name__: part
         for part in (start, load, prefill, decode, batch, int4, long, tokenizer, convert)}
DEFAULT = [name for name in PARTS if name != "convert"]


# ------------------------------------------------------------------ the report


def machine_name():
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return (f"{found[1] if found else 'unknown CPU'}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")


def number(value):
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 4
    return f"{value:,.{digits}f}"


def table_line(row):
    others = "; ".join(f"{name} {number(value)} ({row.ratio(name):.2f} ×)"
                       for name, value in row.values.items() if name != "this")
    share = f"{row.values['this'] / row.limit:.2f}" if row.limit else ""
    return f"| {row.what} | {row.unit} | {number(row.values['this'])} | {others} | {share} |"


# The rows of the chart, and of the table in the README.
CHART = ("prefill 512,", "decode, batch 1,", "decode, batch 16, bfloat16",
         "tiny decode, batch 1, float32")
STYLE = """text { font: 12px sans-serif; fill: #222 } .this { fill: #1b6ca8 } .other { fill: #aaa }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .this { fill: #6db3e8 }
.other { fill: #666 } }"""


def chart(rows, title):
    """An SVG with a group of bars for each row; it follows the light or dark scheme."""
    parts, y = [f'<text x="10" y="20">{html.escape(title)}</text>'], 34
    for row in rows:
        parts.append(f'<text x="10" y="{y + 12}">{html.escape(row.what)}</text>')
        for name, value in row.values.items():
            width = 260 * value / max(row.values.values())
            kind = "this" if name == "this" else "other"
            label = "this project" if name == "this" else name
            parts.append(f'<rect class="{kind}" x="260" y="{y}" width="{width:.1f}" height="15"/>'
                         f'<text x="{266 + width:.1f}" y="{y + 12}">{number(value)} {row.unit}, '
                         f'{html.escape(label)}</text>')
            y += 18
        y += 10
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{y}" '
        f'viewBox="0 0 800 {y}" role="img">', f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def parse_arguments(argv):
    p = argparse.ArgumentParser(description="Measure speed and memory beside other programs.")
    p.add_argument("what", nargs="*", metavar="WHAT",
                   help=f"{', '.join(PARTS)} (default: all but convert)")
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="counted rounds (default 3)")
    p.add_argument("--quick", action="store_true",
                   help="a very small model, to see that the program works")
    p.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this project")
    p.add_argument("--checkpoint", type=Path, metavar="DIR", help="keep the random model there")
    p.add_argument("--llama-bench", metavar="PATH", help="the program of llama.cpp")
    p.add_argument("--gguf", type=Path, nargs="+", default=[], metavar="FILE", help="its files")
    p.add_argument("--text", type=Path, metavar="FILE",
                   help="held-out stories, one after each line <|endoftext|>, for int4")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    p.add_argument("--svg", type=Path, metavar="FILE",
                   help="also draw the rates of the README's table there")
    args = p.parse_args(argv)
    if unknown := set(args.what) - {*PARTS}:
        p.error(f"unknown: {', '.join(sorted(unknown))}; wanted {', '.join(PARTS)}")
    if args.text and not args.text.is_file():
        p.error(f"{args.text}: no such file")
    if bool(args.gguf) != bool(args.llama_bench):
        p.error("--llama-bench and --gguf need each other")
    return args


def main(argv=None):
    args, rows = parse_arguments(argv), []
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(args, Path(directory))
        title = (f"{machine_name()}; reads {bench.read_rate / 1e9:.1f} GB/s, multiplies float32 at "
                 f"{bench.product_rates['float32'] / 1e9:.0f} GFLOP/s")
        print(f"{title}\n\n| what | unit | this project | others | of the limit |\n"
              "|---|---|---|---|---|")
        for part in args.what or DEFAULT:
            for row in PARTS[part](bench):
                rows.append(row)
                print(table_line(row), flush=True)
        bench.close()
    if args.json:
        found = [row._asdict() for row in rows]
        args.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    if args.svg:
        drawn = [row for row in rows if row.rate and (args.quick or row.what.startswith(CHART))]
        args.svg.write_text(chart(drawn, title), encoding="utf-8")


if __name__ == "__main__":
    main()
