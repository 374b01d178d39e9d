"""Measure speed beside other programs, in one run: `python tests/tools/benchmark.py`.

    start      generate.py for one token, beside `import torch`
    models     loading, a prompt of 512 tokens (prefill), and 32 more tokens of one text and of 16
               at once (decode), with a random model of 0.79 B parameters and the embedded one
    int4       the same for experts in 4 bits, beside bfloat16
    tokenizer  English text for the first time (cold) and again (warm), beside sentencepiece
    convert    Mistral's layout, beside `cp -r`; only on request, because it needs 5 GB of disk

The programs take turns. In each round, each of them runs in a new process, where it loads a model
and does its work twice, of which the faster time counts. The table shows the medians of the rounds.
A number in brackets says how many times as fast this project is.

The other programs are transformers, if it is installed, in the faster of its implementations of the
experts; llama.cpp, with --llama-bench and --gguf; and another checkout of this project, with
--against. The GGUF files must hold the model that --checkpoint names, which is made if it does not
exist.
"""

import argparse
import gc
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tiny"
NEW = 32  # tokens per row of a decode
MODEL = {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 8, "head_dim": 64,
         "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 3584}
SMALL = {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
# `context` is the length of a prompt before a decode. With QUICK the numbers mean nothing.
FULL = argparse.Namespace(config=MODEL, prompt=512, context=64, rows=16, characters=10**6,
                          dtypes=("bfloat16", "float32"))
QUICK = argparse.Namespace(config=SMALL, prompt=8, context=8, rows=2, characters=10**3,
                           dtypes=("bfloat16",))


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


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def run(*command):
    """Seconds that a command takes."""
    return seconds(partial(subprocess.run, command, check=True, capture_output=True))


def in_new_process(function, *args):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def take_turns(programs, rounds):
    """Rows with the medians of what some programs measure.

    A program is a function without arguments that returns {(what, unit): number}.
    """
    found = {}
    for _ in range(rounds):
        for name, program in programs.items():
            for key, number in program().items():
                found.setdefault(key, {}).setdefault(name, []).append(number)
    return [Row(what, unit, {name: median(each) for name, each in numbers.items()})
            for (what, unit), numbers in found.items()]


# ------------------------------------------------------------------ models


def ours(root):
    """How a checkout of this project loads a model, and the ways in which it continues tokens.

    Only interfaces that two checkouts share are used.
    """
    sys.path.insert(0, str(root))
    import generate
    return (lambda directory, dtype: generate.load(directory, dtype, "cpu")[1],
            [lambda model, tokens, new: generate.generate(model, tokens.tolist(), new)])


def transformers():
    """The same of transformers, with two implementations of the experts."""
    from transformers import AutoModelForCausalLM, logging
    logging.disable_progress_bar()

    @torch.inference_mode()
    def write(experts, model, tokens, new):
        model.set_experts_implementation(experts)
        model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                       attention_mask=torch.ones_like(tokens), pad_token_id=0)

    return (lambda directory, dtype: AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype).eval(), [partial(write, "grouped_mm"), partial(write, "eager")])


def work(name, dtype, sizes):
    """What to measure with a model: {what: (rows, tokens of the prompt, new tokens)}."""
    decode = {f"{name}decode, batch {rows}, {dtype}": (rows, sizes.context, 1 + NEW)
              for rows in (1, sizes.rows)}
    return {f"{name}prefill {sizes.prompt}, {dtype}": (1, sizes.prompt, 1)} | decode


def clocked(write, model, tokens, new):
    """Seconds until the first token of each row or, if new > 1, from there to the last."""
    times = [time.perf_counter()]
    with model.register_forward_hook(lambda *_: times.append(time.perf_counter())):
        write(model, tokens, new)
    return times[-1] - times[0 if new == 1 else 1]


def measure(program, directory, name, dtype, sizes):
    """Load a model, and do its work twice in each way, of which the fastest counts."""
    load, ways = program()
    start = time.perf_counter()
    model = load(directory, getattr(torch, dtype))
    found = {(f"{name}load, {dtype}", "s"): time.perf_counter() - start}
    torch.manual_seed(0)
    for what, (rows, context, new) in work(name, dtype, sizes).items():
        tokens = torch.randint(3, model.config.vocab_size, (rows, context))
        taken = min(clocked(write, model, tokens, new) for write in ways for _ in range(2))
        found[what, "tokens/s"] = rows * (new - 1 or context) / taken
    return found


def llama(program, file, name, dtype, sizes):
    """What llama.cpp's own benchmark measures with a GGUF file. It takes one row only."""
    found = {}
    for what, (rows, context, new) in work(name, dtype, sizes).items():
        if rows == 1:
            tokens = ["-p", context, "-n", 0] if new == 1 else ["-p", 0, "-n", NEW, "-d", context]
            command = [program, "-m", file, "-t", torch.get_num_threads(), "-r", 1, "-o", "json"]
            done = subprocess.run([*map(str, command + tokens)], capture_output=True, check=True)
            found[what, "tokens/s"] = json.loads(done.stdout)[0]["avg_ts"]
    return found


def make_checkpoint(directory, fields, mistral=False):
    """Random weights in bfloat16, for Hugging Face with a tokenizer, or as Mistral's file."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import random_model, save
    from layouts import mistral_pickle
    torch.set_default_dtype(torch.bfloat16)  # without it, the weights would be made in float32
    model = random_model(dtype=torch.bfloat16, sliding_window=None, **fields)
    if mistral:
        mistral_pickle(model, directory)
    else:
        save(model, directory, architectures=["MixtralForCausalLM"], torch_dtype="bfloat16")
        shutil.copy(TINY / "tokenizer.model", directory)


def programs(args, directory, name, dtype):
    """What measures a model, for each program."""
    common = directory, name, dtype, args.sizes
    found = {who: partial(in_new_process, measure, partial(ours, root), *common)
             for who, root in args.roots.items()}
    if find_spec("transformers"):
        found["transformers"] = partial(in_new_process, measure, transformers, *common)
    for file in args.gguf if dtype == "bfloat16" and directory != TINY else ():
        found[f"llama.cpp {file.stem}"] = partial(llama, args.llama_bench, file, *common[1:])
    return found


# ------------------------------------------------------------------ what is measured


def start(args):
    what = "start, one token of the tiny model", "s"
    commands = {who: [root / "generate.py", "--prompt", "x", "--max-new-tokens", "1"]
                for who, root in args.roots.items()} | {"import torch": ["-c", "import torch"]}
    yield {who: lambda command=command: {what: run(sys.executable, *command)}
           for who, command in commands.items()}


def models(args):
    for directory, name in (args.checkpoint, ""), (TINY, "tiny "):
        for dtype in args.sizes.dtypes:
            yield programs(args, directory, name, dtype)


def int4(args):
    directory, common = args.place / "int4", ("int4 ", "bfloat16")
    run(sys.executable, ROOT / "convert.py", "--input_dir", args.checkpoint, "--output_dir",
        directory, "--dtype", "int4")
    found = programs(args, directory, *common)
    found["bfloat16"] = programs(args, args.checkpoint, *common)["this"]
    found.pop("transformers", None)
    yield found


def tokenizer(args):
    yield {name: partial(in_new_process, encode_twice, name, args.sizes.characters)
           for name in ("this", "sentencepiece")}


def encode_twice(name, size):
    """MB/s of a new tokenizer for the manual of Python, the first time (cold) and again (warm)."""
    sys.path.insert(0, str(ROOT))
    from pydoc_data.topics import topics

    from sentencepiece import SentencePieceProcessor

    from tokenizer import Tokenizer
    path = TINY / "tokenizer.model"
    if spec := find_spec("mistral_common"):
        path = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
    make = {"this": Tokenizer, "sentencepiece": SentencePieceProcessor}[name]
    text = " ".join(" ".join(topics[name] for name in sorted(topics)).split())[:size]
    make(str(path)).encode(text)
    encode, megabytes = make(str(path)).encode, len(text.encode()) / 1e6
    gc.collect()  # otherwise the objects of PyTorch are searched at some moment below
    return {(f"tokenizer, {state}", "MB/s"): megabytes / seconds(encode, text)
            for state in ("cold", "warm")}


def convert(args):
    source, target = args.place / "raw", args.place / "converted"
    in_new_process(make_checkpoint, source, args.sizes.config, True)

    def once(*command):
        taken = run(*command)
        shutil.rmtree(target)
        return {("convert Mistral's layout", "s"): taken}

    command = [sys.executable, ROOT / "convert.py", "--input_dir", source, "--output_dir", target]
    yield {"this": partial(once, *command), "cp -r": partial(once, "cp", "-r", source, target)}


PARTS = {part.__name__: part for part in (start, models, int4, tokenizer, convert)}


# ------------------------------------------------------------------ the report


def read_rate(size):
    """Bytes per second that a sum reads from memory, in the best of five runs."""
    x = torch.ones(size // 4)
    return x.nbytes / min(seconds(x.sum) for _ in range(5))


def machine_name():
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return (f"{found[1] if found else 'unknown CPU'}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; reads "
            f"{in_new_process(read_rate, 2**30) / 1e9:.1f} GB/s")


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
    p.add_argument("what", nargs="*", metavar="WHAT", default=[*PARTS][:-1],
                   help=f"{', '.join(PARTS)} (default: all but convert)")
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="counted rounds (default 3)")
    p.add_argument("--quick", action="store_true", help="a tiny model, to try this program")
    p.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this project")
    p.add_argument("--checkpoint", type=Path, metavar="DIR", help="keep the random model there")
    p.add_argument("--llama-bench", metavar="PATH", help="the program of llama.cpp")
    p.add_argument("--gguf", type=Path, nargs="+", default=[], metavar="FILE", help="its files")
    p.add_argument("--svg", type=Path, metavar="FILE", help="also draw the README's rates there")
    args = p.parse_args(argv)
    if set(args.what) - PARTS.keys():
        p.error(f"WHAT must be some of {', '.join(PARTS)}")
    if bool(args.gguf) != bool(args.llama_bench):
        p.error("--llama-bench and --gguf need each other")
    return args


def main(argv=None):
    args, rows = parse_arguments(argv), []
    args.sizes = QUICK if args.quick else FULL
    args.roots = {"this": ROOT} | ({"before": args.against} if args.against else {})
    with tempfile.TemporaryDirectory() as directory:
        args.place, title = Path(directory), machine_name()
        args.checkpoint = args.checkpoint or args.place / "checkpoint"
        if not args.checkpoint.exists():
            in_new_process(make_checkpoint, args.checkpoint, args.sizes.config)
        print(f"{title}\n\n| what | unit | this project | others |\n|---|---|---|---|")
        for part in args.what:
            for programs in PARTS[part](args):
                for row in take_turns(programs, args.rounds):
                    rows.append(row)
                    print(table_line(row), flush=True)
    if args.svg:
        drawn = [row for row in rows if row.rate and (args.quick or row.what.startswith(CHART))]
        args.svg.write_text(chart(drawn, title), encoding="utf-8")


if __name__ == "__main__":
    main()
