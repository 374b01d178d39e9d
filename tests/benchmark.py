"""What it costs, measured side by side in one run: `python tests/benchmark.py [WHAT …]`.

start: `generate.py --prompt x --max-new-tokens 1` beside `python -c "import torch"`.
load: seconds after the imports, and the most memory that no file backs, in a process of its own.
speed: a random Mixtral of 0.79 B parameters: reading a prompt (prefill) and writing 32 more tokens
    a row (decode), greedily; a row of over 1,000 tokens is measured once and not warmed up.
tiny: the same of the embedded checkpoint, which is Python's and PyTorch's overhead per token.
long: a text of 8 times the length under a window of 512; cache and memory; many window wraps.
tokenizer: English (the manual inside Python), with no word remembered and again; hostile text.
convert: convert.py beside `cp -r`; not among the default, for its disk.

Sides take turns, round by round, and medians are shown. `transformers` runs with the faster of its
two expert implementations; where it is not installed its column is empty. The limit of a decoding
row is the measured rate of reading memory over the bytes that a token must read: each weight that
is used, once for all rows; of a prefill row the measured rate of matrix products over its FLOPs, in
the dtype or, if that is faster, in float32. Numbers of a shared machine vary from run to run: the
ratios are what to look at.

convert in detail: a random bfloat16 Mixtral of 1.6 GB in two raw layouts, in shards of 256 MB, in
turns with `cp -r` of the same directory. `disk`: read from the disk and timed until all is written
there, as it must be where a checkpoint does not fit into memory; `cached`: read from the page cache
and written into it. Start is what `convert.py --help` takes, nearly all of it `import torch`; for
the 93 GB of 8x7B the rest is scaled and the start is not. Peak memory is the highest resident
anonymous memory (RssAnon in /proc/PID/status, read every 2 ms: what no file backs).
"""

import argparse
import dataclasses
import html
import importlib.util
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
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sentencepiece

from generate import FORMAT, save_file, steps
from mixtral import Mixtral, MixtralConfig
from tokenizer import Tokenizer

MIDDLE = MixtralConfig(hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, head_dim=64,
                       num_key_value_heads=4, intermediate_size=3584)
FULL = 93_405_585_408  # bytes of 8x7B in bfloat16
PEER = importlib.util.find_spec("transformers") is not None
NEW = 32  # tokens that a decoding row writes


def in_turns(rounds, **sides):
    """Median seconds of each side, run in turns after one run that does not count."""
    taken = {name: [] for name in sides}
    for n in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            taken[name] += [time.perf_counter() - start] * (n > 0)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def row(what, unit, ours, theirs=None, limit=None):
    return {"what": what, "unit": unit, "this": ours, "peer": theirs,
            "ratio": theirs and ours / theirs, "limit": limit,
            "of the limit": limit and ours / limit}


# ---------------------------------------------------------------- the machine

def machine():
    """Its name, cores and PyTorch's kind of kernels for it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path(
        "/proc/cpuinfo").exists() else None
    return (f"{found[1] if found else 'unknown CPU'}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")


def limits():
    """Bytes a second read from memory, and FLOPs a second of a product of 1024 × 4096 × 4096."""
    x = torch.ones(1 << 28)
    read = x.nbytes / in_turns(5, read=x.sum)["read"]
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 4096, dtype=dtype), torch.ones(4096, 4096, dtype=dtype)
        taken = in_turns(2, product=lambda a=a, b=b: a @ b.mT)
        rates[dtype] = 2 * 1024 * 4096**2 / taken["product"]
    rates[torch.bfloat16] = max(rates.values())
    return read, rates


# ---------------------------------------------------------------- models

def random_weights(config, dtype):
    """A model of small random weights, without the start-up values that would be overwritten."""
    with torch.device("meta"):
        model = Mixtral(config).to(dtype)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        weight.fill_(1) if "norm" in name else weight.normal_(std=0.02)
    return model


def saved(config, directory):
    """A random bfloat16 checkpoint as convert.py would write it."""
    directory.mkdir()
    model = random_weights(config, torch.bfloat16)
    save_file(dict(model.named_parameters()), directory / "model.safetensors", FORMAT)
    (directory / "config.json").write_text(json.dumps(
        dataclasses.asdict(config) | {"model_type": "mixtral", "dtype": "bfloat16",
                                      "architectures": ["MixtralForCausalLM"]}))
    return directory


def peer_model(directory, dtype):
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def writer(model, experts=None):
    """A function of prompts (B, S) and n: seconds until the first of n tokens a row, and the rest.

    Of either side: through `steps`, or `generate` of transformers, whose tokens a processor times.
    """
    def ours(tokens, n):
        times = [time.perf_counter()]
        for _ in steps(model, tokens.tolist(), n, seeds=[None] * len(tokens)):
            times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[1]

    def theirs(tokens, n):
        def stamp(ids, scores):
            times.append(time.perf_counter())
            return scores

        model.set_experts_implementation(experts)
        times = [time.perf_counter()]
        with torch.inference_mode():
            model.generate(tokens, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                           attention_mask=torch.ones_like(tokens), pad_token_id=0,
                           logits_processor=[stamp])
        return times[1] - times[0], times[-1] - times[1]

    return ours if isinstance(model, Mixtral) else theirs


def sides(directory, dtype):
    """Each way of running a checkpoint: this project's, and transformers' two if it is there."""
    found = {"this": writer(Mixtral.from_pretrained(directory, dtype))}
    if PEER:
        model = peer_model(directory, dtype)
        found |= {name: writer(model, name) for name in ("eager", "grouped_mm")}
    return found


def rates(running, rounds, tokens, n, read):
    """Tokens a second of this project and of the fastest peer, reading a prompt or writing."""
    seconds = {name: [] for name in running}
    for turn in range(-1, rounds):
        for name, run in running.items():
            reading, writing = run(tokens, n)
            if turn >= 0 or tokens.numel() > 1000:  # the first turn warms up, where it is short
                seconds[name].append(reading if read else writing)
        if tokens.numel() > 1000:
            break
    taken = {name: statistics.median(each) for name, each in seconds.items()}
    count = tokens.numel() if read else (n - 1) * len(tokens)
    peers = [taken[name] for name in taken if name != "this"]
    return count / taken["this"], count / min(peers) if peers else None


def token_weights(config, rows=1):
    """Weights that a step reads: attention, router and head, and of the experts those that are hit.

    Rows choose as if by lot: k of E experts each, so an expert is missed by all with (1 − k/E)^B.
    """
    c, D = config, config.hidden_size
    attention = 2 * D * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    missed = (1 - c.num_experts_per_tok / c.num_local_experts) ** rows
    hit = c.num_local_experts * (1 - missed)
    layer = attention + D * c.num_local_experts + hit * 3 * D * c.intermediate_size
    return c.num_hidden_layers * layer + D * c.vocab_size


def decoding(name, running, config, dtype, read, rounds, rows=1, context=64):
    """One row: tokens a second that all rows together write after a context."""
    tokens = torch.randint(3, config.vocab_size, (rows, context))
    held = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    wanted = (token_weights(config, rows) + rows * context * held) * dtype.itemsize
    return row(f"{name}: decode, {rows} row{'s' * (rows > 1)} after {context}", "tokens/s",
               *rates(running, rounds, tokens, 1 + NEW, False), rows * read / wanted)


def prefill(name, running, config, dtype, flops, rounds, S):
    """One row: tokens a second of reading a prompt."""
    tokens = torch.randint(3, config.vocab_size, (1, S))
    weights = token_weights(config) - config.hidden_size * config.vocab_size
    mixing = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * S / 2
    return row(f"{name}: prefill {S}", "tokens/s", *rates(running, rounds, tokens, 1, True),
               flops[dtype] / (2 * (weights + mixing)))


def speed(rounds, directory, read, flops):
    source = saved(MIDDLE, directory / "middle")
    for dtype in (torch.bfloat16, torch.float32):
        name, running = f"0.79 B {str(dtype)[6:]}", sides(source, dtype)
        for S in (64, 512):
            yield prefill(name, running, MIDDLE, dtype, flops, rounds, S)
        for rows in (1, 4, 16):
            yield decoding(name, running, MIDDLE, dtype, read, rounds, rows)
        one = {side: running[side] for side in ("this", "grouped_mm") if side in running}
        yield prefill(name, one, MIDDLE, dtype, flops, rounds, 4096)
        yield decoding(name, one, MIDDLE, dtype, read, rounds, 1, 4096)


def tiny(rounds, directory, read, flops):
    config = Mixtral.from_pretrained(ROOT / "tiny").config
    for dtype in (torch.float32, torch.bfloat16):
        running = sides(ROOT / "tiny", dtype)
        yield prefill(f"embedded {str(dtype)[6:]}", running, config, dtype, flops, rounds, 64)
        yield decoding(f"embedded {str(dtype)[6:]}", running, config, dtype, read, rounds, 1, 64)


def long(rounds, directory, read, flops):
    config = dataclasses.replace(MIDDLE, sliding_window=512, num_hidden_layers=2)
    model = random_weights(config, torch.float32)
    write, tokens = writer(model), torch.randint(3, config.vocab_size, (1, 8192))
    taken = in_turns(1, short=lambda: write(tokens[:, :1024], 1), long=lambda: write(tokens, 1))
    yield row("read 8,192 tokens under a window of 512, beside 1,024", "s", taken["long"],
              taken["short"])
    caches = [model.new_cache(1, n).keys.nbytes * 2 / 1e6 for n in (8192, 1024)]
    yield row("the cache of both", "MB", *caches)
    config = dataclasses.replace(config, hidden_size=256, intermediate_size=256, sliding_window=32)
    write = writer(random_weights(config, torch.float32))
    start = tokens[:, :8]
    taken = in_turns(rounds, first=lambda: write(start, 200), all=lambda: write(start, 1600))
    yield row("write 1,600 tokens, 5 times round the buffer, beside the first 200", "tokens/s",
              1600 / taken["all"], 200 / taken["first"])


# ---------------------------------------------------------------- start, load, tokenizer

def watched(command):
    """Seconds, and highest bytes of anonymous memory, of a command. RuntimeError if it fails."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            peak = max(peak, int(found[1]) * 1024)
        time.sleep(0.002)
    if process.wait():
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return time.perf_counter() - start, peak


def start(rounds, directory, read, flops):
    ours = [sys.executable, str(ROOT / "generate.py"), "--prompt", "x", "--max-new-tokens", "1"]
    taken = in_turns(max(rounds, 5), this=lambda: watched(ours),
                     torch=lambda: watched([sys.executable, "-c", "import torch"]))
    yield row("one token of the embedded model, beside `import torch`", "s", *taken.values())


LOAD = {
    "this": "from mixtral import Mixtral; load = Mixtral.from_pretrained; options = {}",
    "transformers": "import torch; from transformers import MixtralForCausalLM as M; "
                    "load = M.from_pretrained; options = {'dtype': torch.bfloat16}"}


def load(rounds, directory, read, flops):
    source, found = saved(MIDDLE, directory / "load"), {}
    for _ in range(rounds):
        for side in LOAD if PEER else ["this"]:
            code = (f"import sys, time, torch; sys.path.insert(0, {str(ROOT)!r}); {LOAD[side]}; "
                    f"t = time.perf_counter(); model = load({str(source)!r}, **options); "
                    "took = time.perf_counter() - t\n"
                    "sum(float(w.sum()) for w in model.parameters())\n"
                    "open(sys.argv[1], 'w').write(str(took))")
            _, peak = watched([sys.executable, "-c", code, str(directory / "took")])
            found.setdefault(side, []).append((float((directory / "took").read_text()), peak))
    size = sum(path.stat().st_size for path in source.iterdir())
    for n, (what, unit, scale) in enumerate((("load 1.58 GB of bfloat16", "s", 1), (
            "memory that no file backs, of the checkpoint's", "×", size))):
        yield row(what, unit, *(statistics.median(x[n] for x in taken) / scale
                                for taken in found.values()))
    shutil.rmtree(source)


def manual():
    """Near half a megabyte of English that every Python holds: its language manual."""
    from pydoc_data.topics import topics
    text = "\n".join(topics[name] for name in sorted(topics))
    return re.sub(r"[ \n]+", " ", text)


def tokenizer(rounds, directory, read, flops):
    path, name = ROOT / "tiny/tokenizer.model", "2,048 pieces"
    if spec := importlib.util.find_spec("mistral_common"):
        path = Path(spec.origin).parent / "data/tokenizer.model.v1"
        name = "32,000 pieces of 8x7B"
    peer, text = sentencepiece.SentencePieceProcessor(), manual()
    peer.load(str(path))
    tokenizers = [Tokenizer(path) for _ in range(rounds + 1)]
    fresh = iter(tokenizers)
    taken = in_turns(rounds, this=lambda: next(fresh).encode(text), peer=lambda: peer.encode(text))
    size = len(text.encode()) / 1e6
    yield row(f"encode {size:.1f} MB of English once, {name}", "MB/s",
              *(size / seconds for seconds in taken.values()))
    known = tokenizers[0]
    taken = in_turns(rounds, this=lambda: known.encode(text), peer=lambda: peer.encode(text))
    yield row("the same again", "MB/s", *(size / seconds for seconds in taken.values()))
    for what, letters in (("one letter", "a"), ("spaces", " ")):
        taken = in_turns(1, long=lambda x=letters: known.encode(x * 400_000),
                         short=lambda x=letters: known.encode(x * 100_000))
        yield row(f"400,000 of {what} beside 100,000", "s", *taken.values())


# ---------------------------------------------------------------- conversion

def raw_checkpoints(directory):
    """One file of Mistral's names, and the same weights in eight files with fused experts."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_convert  # its few lines write each layout without the code that is measured

    model = random_weights(MIDDLE, torch.bfloat16)
    yield "consolidated.00.pth", test_convert.single_pickle(model, directory / "single")
    shutil.rmtree(directory / "single")
    yield "8 files, fused experts", test_convert.fused(model, directory / "fused")


def settle(*directories):
    """Write all files back and drop them from the page cache, as if they had not been touched."""
    for path in (path for directory in directories for path in directory.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_copy(command, source, target, disk):
    """Seconds and peak memory of a command that makes target from source."""
    if disk:
        settle(source)
    seconds, peak = watched(command)
    start = time.perf_counter()
    if disk:
        settle(target)
        seconds += time.perf_counter() - start
    shutil.rmtree(target)
    return seconds, peak


def conversion(rounds, place):
    """Rows of layout, bytes, seconds of convert.py and of cp -r, their ratio and peak memory."""
    program = [sys.executable, str(ROOT / "convert.py")]
    start = statistics.median(watched([*program, "--help"])[0] for _ in range(rounds))
    for layout, source in raw_checkpoints(place):
        size = sum(path.stat().st_size for path in source.iterdir())
        ours = [*program, "--input_dir", str(source), "--output_dir", str(place / "out"),
                "--max-shard-size", "256MB"]
        copy = ["cp", "-r", str(source), str(place / "copy")]
        for disk in (True, False):
            turns = [(one_copy(copy, source, place / "copy", disk)[0],
                      *one_copy(ours, source, place / "out", disk)) for _ in range(rounds)]
            copied, converted = (statistics.median(turn[n] for turn in turns) for n in (0, 1))
            yield {"layout": layout, "from and to": "disk" if disk else "cached",
                   "GB": size / 1e9, "start s": start, "convert s": converted,
                   "cp -r s": copied, "ratio": converted / copied,
                   "peak anonymous MB": max(peak for *_, peak in turns) / 1e6,
                   "8x7B min": (start + (converted - start) * FULL / size) / 60,
                   "cp -r of 8x7B min": copied * FULL / size / 60}


# ---------------------------------------------------------------- what is shown

def written(value):
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def show(rows):
    """Print a Markdown table as its rows come, and return them."""
    seen = []
    for row in rows:
        if not seen:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        print("| " + " | ".join(map(written, row.values())), "|", flush=True)
        seen.append(row)
    return seen


def drawn(rows, title):
    """An SVG of two bars a row, this project's and the peer's, as shares of the longer."""
    rows = [row for row in rows if row["peer"] and row["unit"].endswith("/s")]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{60 + 44 * len(rows)}" '
             'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" '
             f'fill="#fff"/><text x="10" y="20">{html.escape(title)}</text><text x="10" y="38">'
             '<tspan fill="#1b6ca8">this project</tspan>, <tspan fill="#777">the peer</tspan>: '
             'longer is faster</text>']
    for n, row in enumerate(rows):
        y, most = 50 + 44 * n, max(row["this"], row["peer"])
        parts.append(f'<text x="10" y="{y + 20}">{html.escape(row["what"])}</text>')
        for at, side, colour in ((y, "this", "#1b6ca8"), (y + 17, "peer", "#999")):
            width = 330 * row[side] / most
            parts.append(f'<rect x="380" y="{at}" width="{width:.1f}" height="15" fill="{colour}"/>'
                         f'<text x="{385 + width:.1f}" y="{at + 12}">{written(row[side])} '
                         f'{row["unit"]}</text>')
    return "\n".join([*parts, "</svg>\n"])


PARTS = {"start": start, "load": load, "tokenizer": tokenizer, "tiny": tiny, "long": long,
         "speed": speed}


def main():
    p = argparse.ArgumentParser(description="Measure time and memory, side by side in one run.")
    p.add_argument("what", nargs="*", metavar="WHAT",
                   help=f"of {', '.join(PARTS)} (together the default), convert")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    p.add_argument("--svg", type=Path, metavar="FILE", help="draw those with a peer as bars there")
    args = p.parse_args()
    if unknown := set(args.what) - {*PARTS, "convert"}:
        p.error(f"unknown: {', '.join(sorted(unknown))}; wanted {', '.join(PARTS)} or convert")
    with tempfile.TemporaryDirectory() as directory:
        rows, place = [], Path(directory)
        if "convert" in args.what:
            rows += show(conversion(args.rounds, place))
        parts = [p for p in args.what or PARTS if p != "convert"]
        if parts:
            read, flops = limits()
            title = (f"{machine()}; reads {read / 1e9:.0f} GB/s, multiplies float32 at "
                     f"{flops[torch.float32] / 1e9:.0f} GFLOP/s")
            print(title + "\n")
            rows += show(row for part in parts
                         for row in PARTS[part](args.rounds, place, read, flops))
            if args.svg:
                args.svg.write_text(drawn(rows, title), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
