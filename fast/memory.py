"""Do the weights and the cache fit into the memory of this machine?"""

import contextlib
import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fast.ranks import from_first, is_sharded


def free_memory(device):
    """Bytes of memory that this process can still take, or None if the system does not say.

    On Linux this is what the system has available, and not more than what the limit of the control
    group, in which a container runs, leaves. The ranks of a machine get equal shares of it.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free, group = None, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, TypeError, ValueError):
        text = Path("/proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1])
        limit = int((group / "memory.max").read_text())  # "max" is no limit: a ValueError
        cached = int(re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())[1])
        used = int((group / "memory.current").read_text()) - cached
        free = min(free, limit - used)
    if free is not None and dist.is_initialized():
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return free


def check_weights(weights, dtype, device):
    """Whether the weights fit into the free memory. Raises ValueError if they do not but must.

    Weights that keep their dtype on a CPU stay mapped from disk, so they need not fit; then a
    warning says how slow that is. Integers, such as packed 4-bit weights, keep theirs always.
    """
    mapped = torch.device(device).type == "cpu" and all(
        result_dtype(weight, dtype) == weight.dtype for weight in weights.values())
    needed, free = size_after(weights, dtype), free_memory(device)
    if free is None or needed <= free:
        return True
    facts = f"{needed / 1e9:.1f} GB of weights, but {free / 1e9:.1f} GB of memory are free"
    if not mapped:
        raise ValueError(f"{facts} on {device}; on a CPU without --dtype, weights can stay on disk")
    print(f"[{facts}; the weights stay on disk and are read again for every token, which is slow]",
          file=sys.stderr)
    return False


def choose_device(weights, dtype):
    """CUDA if there is a GPU into which the weights fit, with 3 GB for all else, or the CPU."""
    fits = torch.cuda.is_available() and size_after(weights, dtype) + 3e9 <= free_memory("cuda")
    return "cuda" if fits else "cpu"


def size_after(weights, dtype):
    """The bytes of weights after a conversion to `dtype`."""
    return sum(w.numel() * result_dtype(w, dtype).itemsize for w in weights.values())


def result_dtype(weight, dtype):
    """The dtype of a weight after a conversion to `dtype`, where None keeps all dtypes."""
    return dtype if dtype is not None and weight.is_floating_point() else weight.dtype


def check_cache(model, rows, length, chunk):
    """Raises ValueError unless a cache for rows of that length fits into the free memory."""
    one = model.new_cache(1, 1, 1)
    slots = min(length, (model.config.sliding_window or length) + chunk - 1)
    needed = rows * slots * (one.keys.nbytes + one.values.nbytes)
    free = free_memory(one.keys.device)
    free = from_first(free) if is_sharded(model) else free  # all ranks must decide alike
    if free is not None and needed > free:
        raise ValueError(f"{rows} rows of {length} tokens need {needed / 1e9:.1f} GB of cache, but "
                         f"{free / 1e9:.1f} GB of memory are free; ask for fewer tokens")
