"""Check and measure fast/cuda.py on one GPU: `python tests/tools/gpu.py --json gpu.json`.

    tests      the tests of fast/cuda.py and fast/kernels.py, compiled for this card
    tiny       the embedded model on the card beside the CPU, and two runs beside each other
    layers     two layers of the size of 8x7B in 16 and 4 bits beside float32
    bfloat16   8x7B, or as many of its layers as fit: decode, batches, prefill, memory
    int4       the same with experts in 4 bits
    peer       8 layers, beside transformers if it is installed

The weights are random and made on the card. Results are printed as they come, and the JSON file is
written again after every section, so that nothing is lost if the time runs out.

The limit of a decode step is the time in which the card copies as many bytes, counting both reading
and writing, as the step reads of weights, keys and values. Prefill is compared with the rate of a
bfloat16 product of 8192 × 8192 × 8192.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch
from torch import nn

from fast import cuda
from fast.int4 import Int4Linear, unpack
from mixtral import Mixtral, MixtralConfig, assemble
from tokenizer import Tokenizer

SMALL = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
         "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "rope_theta": 100.0,
         "num_local_experts": 4}


# ------------------------------------------------------------------ random models


def small_model(device, dtype, group_size=None, **changes):
    """A model whose weights are so large that every term matters, perhaps with 4-bit experts."""
    model = Mixtral(MixtralConfig(**SMALL | changes)).to(dtype).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name
                     else torch.randn_like(weight) * weight.shape[1] ** -0.5)
    model.to(device)
    return with_int4_experts(model, group_size) if group_size else model


def large_model(device, config, dtype=torch.bfloat16, group_size=None):
    """A model of any size with random weights, made on the device and prepared."""
    with torch.device("meta"):
        model = Mixtral(config).to(dtype).eval().requires_grad_(False)
    if group_size:
        with_int4_experts(model, group_size, device)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            random = torch.empty(weight.shape, dtype=dtype, device=device)
            random = random.normal_(0, 0.02) if weight.ndim > 1 else random.fill_(1)
            setattr(module, name, nn.Parameter(random, requires_grad=False))
    return cuda.prepare(model)


def with_int4_experts(model, G, device=None):
    """Replace the linear layers of the experts by random ones in 4 bits."""
    device = device or model.lm_head.weight.device
    for name, layer in list(model.named_modules()):
        if ".experts." in name and isinstance(layer, nn.Linear):
            (M, D), dtype = layer.weight.shape, layer.weight.dtype
            new = Int4Linear(8, 8, 8)
            new.weight_packed = torch.randint(
                -2**31, 2**31 - 1, (M, D // 8), dtype=torch.int32, device=device)
            scale = (torch.rand(M, D // G, device=device) + 0.5) * 0.2 * D**-0.5
            new.weight_scale, new.weight_shape = scale.to(dtype), torch.tensor([M, D])
            model.set_submodule(name, new)
    return model


def in_float32(model):
    """The model of mixtral.py with the same weights, unpacked and in float32."""
    stored, weights = model.state_dict(), {}
    for name, weight in stored.items():
        if name.endswith("_packed"):
            scale = stored[name.replace("_packed", "_scale")].float()
            weights[name.removesuffix("_packed")] = unpack(weight, scale)
        elif not name.endswith(("_scale", "_shape")):
            weights[name] = weight.float()
    return assemble(model.config, weights)


# ------------------------------------------------------------------ the report


class Report:
    def __init__(self, args):
        self.args, self.rows, self.start = args, [], time.perf_counter()
        self.copy_rate = self.product_rate = None  # bytes and operations per second

    def add(self, what, value, unit, limit=None, good=None, note=""):
        """Print and keep a row; `good` tells whether a check succeeded."""
        share = None if limit is None else value / limit
        self.rows.append({"what": what, "value": value, "unit": unit, "limit": limit,
                          "share": share, "good": good, "note": note})
        verdict = {None: "", True: " ok", False: " WRONG"}[good]
        value = f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"
        print(f"[{time.perf_counter() - self.start:5.1f} s] {what}: {value} {unit}"
              + ("" if share is None else f", {share:.2f} of the limit") + verdict
              + (f" ({note})" if note else ""), flush=True)

    def check(self, what, error, largest, note=""):
        self.add(what, error, "error", good=error <= largest, note=note)

    def save(self):
        if self.args.json:
            facts = {"device": device_name(self.args.device), "torch": torch.__version__,
                     "copy_rate": self.copy_rate, "product_rate": self.product_rate}
            self.args.json.write_text(json.dumps(facts | {"rows": self.rows}, indent=1))


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def forget():
    """Free what the last section held."""
    gc.collect()
    torch.cuda.empty_cache()


def seconds(device, f, times=5):
    """The median time of f() after one call to warm up."""
    taken = []
    for _ in range(times + 1):
        synchronize(device)
        start = time.perf_counter()
        f()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def measure_rates(report):
    """The rates of copying and of multiplying, beside which the rest is reported."""
    size, n = (2**32, 8192) if report.args.device == "cuda" else (2**26, 512)
    device = report.args.device
    x = torch.empty(2, size, dtype=torch.uint8, device=device).random_()
    report.copy_rate = 2 * size / seconds(device, partial(x[0].copy_, x[1]), 10)
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    report.product_rate = 2 * n**3 / seconds(device, partial(torch.matmul, a, b), 10)
    x = a = b = None
    report.add("copy", report.copy_rate / 1e9, "GB/s", note=device_name(report.args.device))
    report.add("bfloat16 product", report.product_rate / 1e12, "TFLOP/s")
    forget()


# ------------------------------------------------------------------ correctness


def tests(report):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               "tests/fast/test_kernels.py", "tests/fast/test_cuda.py"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print("\n".join(lines[-60:]), done.stderr[-2000:], flush=True)
    report.add("tests", done.returncode, "exit code", good=done.returncode == 0, note=lines[-1])


def greedy(model, prompt, count):
    """Token ids, drawn as generate.py does with temperature 0."""
    device = model.lm_head.weight.device
    cache = model.new_cache(1, len(prompt) + count, cuda.CHUNK)
    read = cuda.reader(model, cache)
    tokens, drawn = torch.tensor([prompt], device=device), []
    for _ in range(count):
        tokens = read(tokens, torch.tensor([tokens.shape[1]])).argmax(dim=-1)[:, None]
        drawn.append(tokens.item())
    return drawn


def tiny(report):
    """The embedded model; in bfloat16 the median counts, as rounding can change the experts."""
    device, lengths = report.args.device, [300, 171]
    tokens = torch.randint(3, 2000, (2, 300))
    for dtype, largest in (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2):
        expected = Mixtral.from_pretrained(ROOT / "tiny", dtype)(tokens)
        model = cuda.prepare(Mixtral.from_pretrained(ROOT / "tiny", dtype, device))
        for what, cache in ("at once", None), ("in chunks", model.new_cache(2, 300, 64)):
            logits = model(tokens.to(device), cache, torch.tensor(lengths)).cpu()
            pairs = zip(logits, expected, lengths, strict=True)
            found = torch.cat([distances(a[:n], b[:n]) for a, b, n in pairs])
            found = (found.median() if dtype == torch.bfloat16 else found.max()).item()
            report.check(f"tiny, {dtype}, {what}, beside the CPU", found, largest)
    prompt = Tokenizer(ROOT / "tiny").encode("Once upon a time")
    count = 20 if report.args.tiny else 200
    expected = greedy(Mixtral.from_pretrained(ROOT / "tiny", torch.float32), prompt, count)
    for dtype in torch.float32, torch.bfloat16:
        model = cuda.prepare(Mixtral.from_pretrained(ROOT / "tiny", dtype, device))
        found = greedy(model, prompt, count)
        if dtype == torch.float32:
            same_tokens(report, f"tiny, {count} greedy tokens, other than on the CPU", found,
                        expected)
        same_tokens(report, f"tiny, {dtype}, other in a second run", found,
                    greedy(model, prompt, count))


def distances(logits, expected):
    """The relative distance of the logits of each token: (..., V), (..., V) -> (...)."""
    return (logits.double() - expected).norm(dim=-1) / expected.double().norm(dim=-1)


def same_tokens(report, what, found, expected):
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    report.add(what, wrong, "tokens", good=wrong == 0)


def layers(report):
    """A text by the kernels, by the batch path and by mixtral.py, all beside float32."""
    config = model_config(report.args, 2)
    for G in None, 128, 32:
        model = large_model(report.args.device, config, group_size=G)
        name = "2 layers, " + ("bfloat16" if G is None else f"int4 in groups of {G}")
        tokens = torch.randint(3, config.vocab_size, (3, 40), device=report.args.device)
        expected = in_float32(model)(tokens)[:, 7:]
        whole = distances(model(tokens)[:, 7:], expected)
        for rows in 1, 3:
            runs = [steps(model, tokens[:rows]) for _ in range(2)]
            found = distances(runs[0][0], expected[:rows]).median().item()
            report.check(f"{name}, {rows} texts step by step by the {runs[0][1]}", found, 0.1,
                         note=f"the whole text at once: {whole[:rows].median().item():.3g}")
            report.check("its difference between two runs",
                         (runs[0][0] - runs[1][0]).abs().max().item(), 0)
        del model
        forget()


def steps(model, tokens):
    """The logits after a prompt of 8 tokens and after each token behind it, and who made them."""
    B, S = tokens.shape
    cache = model.new_cache(B, S, cuda.CHUNK)
    read, one = cuda.reader(model, cache), torch.ones(B, dtype=torch.int64)
    logits = [read(tokens[:, :8], 8 * one)]
    logits += [read(tokens[:, n:n + 1], one) for n in range(8, S)]
    return torch.stack(logits, dim=1), "kernels" if cache.step.kernels else "batch path"


# ------------------------------------------------------------------ speed


def model_config(args, count):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
             "num_key_value_heads": 2, "vocab_size": 3200} if args.tiny else {}
    return MixtralConfig(num_hidden_layers=min(count, args.layers or count), **sizes)


def weight_bytes(model):
    return sum(t.nbytes for t in model.state_dict().values())


def bytes_of_a_step(model, rows, slots):
    """Weights, keys and values that a step of so many texts with full caches must read."""
    c, weights = model.config, dict(model.state_dict())
    embedding = weights.pop("model.embed_tokens.weight").nbytes
    experts = sum(t.nbytes for name, t in weights.items() if ".experts." in name)
    share = c.num_experts_per_tok / c.num_local_experts if rows == 1 else 1
    entry = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return (weight_bytes(model) - embedding - experts * (1 - share)
            + rows * slots * entry * model.lm_head.weight.itemsize)


def decode(report, model, name, rows, slots, steps=30):
    """Tokens per second of steps at the end of full caches, with a greedy choice of the token."""
    device = report.args.device
    steps, slots = (6, min(slots, 100)) if report.args.tiny else (steps, slots)
    cache = model.new_cache(rows, slots, cuda.CHUNK)
    for tensor in cache.keys, cache.values:
        for layer in tensor:
            layer.normal_()
    cache.positions[:] = torch.arange(slots)
    cache.positions[:, slots - steps:] = -1
    read, tokens = cuda.reader(model, cache), torch.ones(rows, 1, dtype=torch.int64, device=device)
    taken, lengths = [], torch.ones(rows, dtype=torch.int64)
    for _ in range(steps):
        start = time.perf_counter()
        tokens = read(tokens, lengths).argmax(dim=-1)[:, None]
        tokens.tolist()
        taken.append(time.perf_counter() - start)
    taken = statistics.median(taken[3:])
    limit = rows * report.copy_rate / bytes_of_a_step(model, rows, slots)
    texts = "1 text" if rows == 1 else f"{rows} texts"
    report.add(f"{name}, decode of {texts}, {slots:,} slots", rows / taken, "tokens/s", limit,
               note=f"{taken * 1e3:.2f} ms a step")


def prefill(report, model, name, length):
    device, c = report.args.device, model.config
    length = min(length, 300) if report.args.tiny else length
    tokens = torch.randint(3, c.vocab_size, (1, length), device=device)

    def run():
        read = cuda.reader(model, model.new_cache(1, length, cuda.CHUNK))
        read(tokens, torch.tensor([length]))

    taken = seconds(device, run, 1 if length > 10000 else 3)
    weights = c.num_hidden_layers * (
        2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        + 3 * c.num_experts_per_tok * c.hidden_size * c.intermediate_size)
    report.add(f"{name}, prefill of {length:,} tokens", length / taken, "tokens/s",
               report.product_rate / (2 * weights), note=f"{taken:.3f} s")


def first_token(report, model, name):
    tokens = torch.randint(3, model.config.vocab_size, (1, 16), device=report.args.device)

    def run():
        read = cuda.reader(model, model.new_cache(1, 1024, cuda.CHUNK))
        read(tokens, torch.tensor([16])).argmax().item()

    taken = seconds(report.args.device, run)
    report.add(f"{name}, first token after a prompt of 16", taken * 1e3, "ms")


def peak_memory(report, name, weights):
    if report.args.device == "cuda":
        more = torch.cuda.max_memory_allocated() - weights
        report.add(f"{name}, peak memory besides the weights", more / 1e9, "GB", good=more <= 3e9,
                   note=f"weights {weights / 1e9:.1f} GB")
        torch.cuda.reset_peak_memory_stats()


def measure(report, name, dtype, group_size, per_layer, contexts, batches, lengths):
    count = 32
    if report.args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        count = min(count, int((torch.cuda.mem_get_info()[0] - 14e9) / per_layer))
    start = time.perf_counter()
    model = large_model(report.args.device, model_config(report.args, count), dtype, group_size)
    name, weights = f"{model.config.num_hidden_layers} layers, {name}", weight_bytes(model)
    report.add(f"{name}, weights made", time.perf_counter() - start, "s")
    peak_memory(report, f"{name}, preparation", weights)
    decode(report, model, name, 1, contexts[0], 60)
    prefill(report, model, name, 4096)
    peak_memory(report, name, weights)
    for slots in contexts[1:]:
        decode(report, model, name, 1, slots)
    for rows in batches:
        decode(report, model, name, rows, 1024, 15)
    for length in lengths:
        prefill(report, model, name, length)
    first_token(report, model, name)


def bfloat16(report):
    measure(report, "bfloat16", torch.bfloat16, None, 2.91e9, (1024, 8192, 32768), (4, 16, 64),
            (512, 32768))


def int4(report):
    measure(report, "int4", torch.bfloat16, 128, 0.83e9, (1024, 32768), (4, 16), (512,))


def peer(report):
    """The best of the implementations of transformers, which are told to ignore the end."""
    args, config = report.args, model_config(report.args, 8)
    ours = large_model(args.device, config)
    decode(report, ours, "8 layers, this project", 1, 1024, 60)
    decode(report, ours, "8 layers, this project", 16, 1024, 20)
    prefill(report, ours, "8 layers, this project", 4096)
    del ours
    forget()
    if not importlib.util.find_spec("transformers"):
        return
    from transformers import MixtralConfig as TheirConfig
    from transformers import MixtralForCausalLM
    fields = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
              "vocab_size", "num_hidden_layers")
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        theirs = MixtralForCausalLM(TheirConfig(
            sliding_window=None, **{f: getattr(config, f) for f in fields})).eval()
    torch.set_default_dtype(old)
    for how in "batched_mm", "grouped_mm", "eager":
        try:
            theirs.set_experts_implementation(how)
            for rows in 1, 16:
                their_decode(report, theirs, how, rows)
            ids = torch.randint(3, config.vocab_size, (1, 300 if args.tiny else 4096),
                                device=args.device)
            taken = seconds(args.device, lambda: theirs(ids, logits_to_keep=1), 2)  # noqa: B023
            report.add(f"8 layers, transformers {how}, prefill of {ids.shape[1]:,} tokens",
                       ids.shape[1] / taken, "tokens/s")
        except (RuntimeError, ValueError) as error:
            print(f"transformers {how}: {str(error).splitlines()[0]:.150}", flush=True)


def their_decode(report, theirs, how, rows):
    ids = torch.randint(3, 3000, (rows, 16), device=report.args.device)

    def run(n):
        synchronize(report.args.device)
        start = time.perf_counter()
        theirs.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0,
                        attention_mask=torch.ones_like(ids))
        synchronize(report.args.device)
        return time.perf_counter() - start

    run(3)
    taken = (run(24) - run(4)) / 20
    texts = "1 text" if rows == 1 else f"{rows} texts"
    report.add(f"8 layers, transformers {how}, decode of {texts}", rows / taken, "tokens/s",
               note=f"{taken * 1e3:.2f} ms a step")


# ------------------------------------------------------------------ the program

SECTIONS = {f.__name__: f for f in (tests, tiny, layers, bfloat16, int4, peer)}


def bars(report):
    """An SVG with the rates in tokens/s, and for each its limit or the best of transformers."""
    from benchmark import Row, chart
    rows = []
    for row in report.rows:
        if row["unit"] != "tokens/s" or "transformers" in row["what"]:
            continue
        name, _, what = row["what"].partition(", this project, ")
        values = {"this": row["value"]}
        theirs = [other["value"] for other in report.rows
                  if what and other["what"].startswith(f"{name}, transformers")
                  and other["what"].split(", ")[2].split(",")[0] == what.split(", ")[0]]
        values |= {"transformers, best of three": max(theirs)} if theirs else {}
        values |= {"limit": row["limit"]} if not what else {}
        rows.append(Row(row["what"].replace(", this project", ""), "tokens/s", values))
    return chart(rows, f"{device_name(report.args.device)}, torch {torch.__version__}; copies "
                 f"{report.copy_rate / 1e12:.1f} TB/s, multiplies bfloat16 at "
                 f"{report.product_rate / 1e12:.0f} TFLOP/s")


def main(argv=None):
    p = argparse.ArgumentParser(description="Check and measure fast/cuda.py on one GPU.")
    p.add_argument("--sections", default=",".join(SECTIONS),
                   help="some of %(default)s (default: all)")
    p.add_argument("--layers", type=int, help="at most so many layers (default: all that fit)")
    p.add_argument("--tiny", action="store_true", help="small sizes, to try this program")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--limit", type=float, default=600, help="start no section after so many s")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--svg", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    if unknown := set(args.sections.split(",")) - SECTIONS.keys():
        p.error(f"--sections: {min(unknown)} is none of {', '.join(SECTIONS)}")
    report = Report(args)
    torch.manual_seed(0)
    with torch.inference_mode():
        measure_rates(report)
        for name in args.sections.split(","):
            if time.perf_counter() - report.start > args.limit:
                print(f"no time left for {name}", flush=True)
                continue
            try:
                SECTIONS[name](report)
            except Exception:
                report.add(name, 0, "", good=False, note="stopped by an error")
                traceback.print_exc()
            forget()
            report.save()
    if args.svg:
        args.svg.write_text(bars(report))
    return 1 if any(row["good"] is False for row in report.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
