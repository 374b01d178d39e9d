"""What it costs, measured side by side in one run: `python tests/benchmark.py convert`.

convert: a random bfloat16 Mixtral of 1.6 GB in two raw layouts, converted by convert.py in shards
of 256 MB, in turns with `cp -r` of the same directory; medians. `disk`: read from the disk and
timed until all is written there, as it must be where a checkpoint does not fit into memory;
`cached`: read from the page cache and written into it. Start is what `convert.py --help` takes,
nearly all of it `import torch`; for the 93 GB of 8x7B the rest is scaled and the start is not.
Peak memory is the highest resident anonymous memory (RssAnon in /proc/PID/status, read every 2 ms:
what no file backs).
"""

import argparse
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

from mixtral import Mixtral, MixtralConfig

MIDDLE = MixtralConfig(hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, head_dim=64,
                       num_key_value_heads=4, intermediate_size=3584)
FULL = 93_405_585_408  # bytes of 8x7B in bfloat16


def watched(command):
    """Seconds, and highest bytes of anonymous memory, of a command. RuntimeError if it fails."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
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


def random_weights(config, dtype):
    """A model of small random weights, without the start-up values that would be overwritten."""
    with torch.device("meta"):
        model = Mixtral(config).to(dtype)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        weight.fill_(1) if "norm" in name else weight.normal_(std=0.02)
    return model


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


def conversion(rounds):
    """Rows of layout, bytes, seconds of convert.py and of cp -r, their ratio and peak memory."""
    program = [sys.executable, str(ROOT / "convert.py")]
    start = statistics.median(watched([*program, "--help"])[0] for _ in range(rounds))
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
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


def show(rows):
    """A table in Markdown."""
    for n, row in enumerate(rows):
        if not n:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        print("| " + " | ".join(v if isinstance(v, str) else f"{v:.2f}" for v in row.values()),
              "|", flush=True)


def main():
    p = argparse.ArgumentParser(description="Measure time and memory, side by side in one run.")
    p.add_argument("what", choices=["convert"])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", action="store_true", help="rows as JSON instead of a table")
    args = p.parse_args()
    rows = conversion(args.rounds)
    if args.json:
        print(json.dumps(list(rows), indent=2))
    else:
        show(rows)


if __name__ == "__main__":
    main()
