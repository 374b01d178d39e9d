"""Measure speed beside other programs, in one run: `python tests/tools/benchmark.py`.

    start      generate.py for one token, beside `import torch`
    load       time to load the model
    prefill    a prompt of 512 tokens
    decode     32 more tokens of one text, of 16 texts at once, and of the embedded model
    int4       experts in 4 bits, beside bfloat16
    tokenizer  English text for the first time (cold) and again (warm), beside sentencepiece
    convert    Mistral's layout, beside `cp -r`; only on request, because it needs 5 GB of disk

The model is a random one with 0.79 B parameters, unless a row says "tiny". Every implementation
runs in a process of its own, and the processes take turns in each round. The table shows medians.
A number in brackets says how many times as fast this project is.

The other programs are transformers, if it is installed, in the faster of its implementations of the
experts; llama.cpp, with --llama-bench and --gguf; and another checkout of this project, with
--against. The GGUF files must hold the model that --checkpoint names, which is made if it does not
exist.
"""

import argparse
import html
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from sides import ROOT, LlamaBench, Machine, Ours, Side, Tokenizers, Transformers, seconds

PEER = importlib.util.find_spec("transformers") is not None
NEW = 32  # tokens per row of a decode


class Sizes(NamedTuple):
    """What is measured. With QUICK the numbers mean nothing."""

    config: dict
    prompt: int
    context: int  # before a decode
    rows: int  # of a batch
    text: int  # characters
    dtypes: tuple[str, ...]


MODEL = {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 8, "head_dim": 64,
         "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 3584}
SMALL = {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
FULL = Sizes(MODEL, 512, 64, 16, 10**6, ("bfloat16", "float32"))
QUICK = Sizes(SMALL, 8, 8, 2, 10**3, ("bfloat16",))


class Row(NamedTuple):
    what: str
    unit: str  # higher is better if it is a rate
    values: dict[str, float]  # by program; this project's is "this"

    @property
    def rate(self):
        return self.unit.endswith("/s")

    def ratio(self, other):
        ours, theirs = self.values["this"], self.values[other]
        return ours / theirs if self.rate else theirs / ours


# ------------------------------------------------------------------ a run of the benchmark


class Bench:
    """The options, the sizes and the processes of a run."""

    def __init__(self, args, place):
        self.args, self.place, self.sizes = args, place, QUICK if args.quick else FULL
        self.side = cache(Side)  # a process is started at its first use
        self.machine = Side(Machine)
        self.read_rate = self.machine("read_rate", 2**30)
        self.checkpoint = args.checkpoint or place / "checkpoint"
        if not self.checkpoint.exists():
            self.machine("make_checkpoint", self.checkpoint, self.sizes.config)
        self.roots = {"this": ROOT} | ({"before": args.against} if args.against else {})

    def ours(self, directory, dtype):
        """A function run(rows, context, new) for each checkout."""
        return {name: partial(self.side(Ours, root, directory, getattr(torch, dtype)), "run")
                for name, root in self.roots.items()}

    def llama(self):
        """Such a function for each GGUF file. They take one row only."""
        return {f"llama.cpp {file.stem}": LlamaBench(self.args.llama_bench, file).run
                for file in self.args.gguf}

    def programs(self, directory, dtype, rows=1):
        """All such functions. Of those of one program, the fastest counts."""
        runs = self.ours(directory, dtype)
        for experts in ("grouped_mm", "eager") if PEER else ():
            side = self.side(Transformers, directory, getattr(torch, dtype))
            runs[f"transformers, {experts}"] = partial(side, "run", experts=experts)
        if (directory, dtype, rows) == (self.checkpoint, "bfloat16", 1):
            runs |= self.llama()
        return runs

    def medians(self, runs):
        """The median of the seconds that each function returns. The first round is a warm-up."""
        taken = {name: [] for name in runs}
        for _ in range(1 + self.args.rounds):
            for name, run in runs.items():
                taken[name].append(run())
        return {name: median(times) for name, (_, *times) in taken.items()}

    def rates(self, runs, rows, context, new):
        """Tokens per second of each program, for the prompt or, if new > 1, for the rest."""
        runs, rates = {name: partial(run, rows, context, new) for name, run in runs.items()}, {}
        for name, taken in self.medians(runs).items():
            program, rate = name.partition(",")[0], rows * (new - 1 or context) / taken
            rates[program] = max(rate, rates.get(program, 0))
        return rates


def run(*command):
    """Seconds that a command takes."""
    return seconds(partial(subprocess.run, command, check=True, capture_output=True))


def start(bench):
    runs = {name: partial(run, sys.executable, root / "generate.py", "--prompt", "x",
                          "--max-new-tokens", "1") for name, root in bench.roots.items()}
    runs["import torch"] = partial(run, sys.executable, "-c", "import torch")
    yield Row("start, one token of the tiny model", "s", bench.medians(runs))


def load(bench):
    def in_new_process(*kind):
        side = Side(*kind, bench.checkpoint, torch.bfloat16)
        taken = side("seconds_to_load")
        side.close()
        return taken

    runs = {name: partial(in_new_process, Ours, root) for name, root in bench.roots.items()}
    if PEER:
        runs["transformers"] = partial(in_new_process, Transformers)
    yield Row("load in bfloat16", "s", bench.medians(runs))


def prefill(bench):
    prompt = bench.sizes.prompt
    for dtype in bench.sizes.dtypes:
        yield Row(f"prefill {prompt}, {dtype}", "tokens/s", bench.rates(
            bench.programs(bench.checkpoint, dtype), 1, prompt, 1))


def decode(bench):
    for name, directory, rows in (("", bench.checkpoint, 1), ("", bench.checkpoint,
                                  bench.sizes.rows), ("tiny ", ROOT / "tiny", 1)):
        for dtype in bench.sizes.dtypes:
            yield Row(f"{name}decode, batch {rows}, {dtype}", "tokens/s", bench.rates(
                bench.programs(directory, dtype, rows), rows, bench.sizes.context, 1 + NEW))


def int4(bench):
    directory = bench.place / "int4"
    run(sys.executable, ROOT / "convert.py", "--input_dir", bench.checkpoint, "--output_dir",
        directory, "--dtype", "int4")
    runs = bench.ours(directory, "bfloat16")
    runs["bfloat16"] = bench.ours(bench.checkpoint, "bfloat16")["this"]
    for rows in (1, bench.sizes.rows):
        yield Row(f"int4 decode, batch {rows}", "tokens/s", bench.rates(
            runs | (bench.llama() if rows == 1 else {}), rows, bench.sizes.context, 1 + NEW))


def tokenizer(bench):
    side = bench.side(Tokenizers, bench.sizes.text)
    rounds = [side("run") for _ in range(1 + bench.args.rounds)][1:]
    cold, warm, peer = (median(column) for column in zip(*rounds, strict=True))
    for name, ours in (("cold", cold), ("warm", warm)):
        yield Row(f"tokenizer, {name}", "MB/s", {"this": ours, "sentencepiece": peer})


def convert(bench):
    source, target = bench.place / "raw", bench.place / "converted"
    bench.machine("make_raw", source, bench.sizes.config)

    def once(*command):
        taken = run(*command)
        shutil.rmtree(target)
        return taken

    ours = [sys.executable, ROOT / "convert.py", "--input_dir", source, "--output_dir", target]
    yield Row("convert Mistral's layout", "s", bench.medians({
        "this": partial(once, *ours), "cp -r": partial(once, "cp", "-r", source, target)}))


PARTS = {part.__name__: part
         for part in (start, load, prefill, decode, int4, tokenizer, convert)}
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
    return f"| {row.what} | {row.unit} | {number(row.values['this'])} | {others} |"


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
    p = argparse.ArgumentParser(description="Measure speed beside other programs.")
    p.add_argument("what", nargs="*", metavar="WHAT",
                   help=f"{', '.join(PARTS)} (default: all but convert)")
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="counted rounds (default 3)")
    p.add_argument("--quick", action="store_true", help="a tiny model, to try this program")
    p.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this project")
    p.add_argument("--checkpoint", type=Path, metavar="DIR", help="keep the random model there")
    p.add_argument("--llama-bench", metavar="PATH", help="the program of llama.cpp")
    p.add_argument("--gguf", type=Path, nargs="+", default=[], metavar="FILE", help="its files")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    p.add_argument("--svg", type=Path, metavar="FILE", help="also draw the README's rates there")
    args = p.parse_args(argv)
    if set(args.what) - PARTS.keys():
        p.error(f"WHAT must be some of {', '.join(PARTS)}")
    if bool(args.gguf) != bool(args.llama_bench):
        p.error("--llama-bench and --gguf need each other")
    return args


def main(argv=None):
    args, rows = parse_arguments(argv), []
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(args, Path(directory))
        title = f"{machine_name()}; reads {bench.read_rate / 1e9:.1f} GB/s"
        print(f"{title}\n\n| what | unit | this project | others |\n|---|---|---|---|")
        for part in args.what or DEFAULT:
            for row in PARTS[part](bench):
                rows.append(row)
                print(table_line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps([row._asdict() for row in rows], indent=2))
    if args.svg:
        drawn = [row for row in rows if row.rate and (args.quick or row.what.startswith(CHART))]
        args.svg.write_text(chart(drawn, title), encoding="utf-8")


if __name__ == "__main__":
    main()
