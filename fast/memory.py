"""Do the weights and the cache fit into the memory of this machine?"""

import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fast.ranks import from_first, is_sharded

# The files of a control group: its limit, its use, and in memory.stat the part of its use that is
# cached files, which the system gives back. The first row is version 2, the second version 1.
GROUPS = (("", "memory.max", "memory.current", "inactive_file"),
          ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


def free_memory(device, root=Path("/")):
    """Bytes of memory that this process can still take, or None if the system does not say.

    On Linux this is what the system has available, or less if a control group leaves less, in which
    a container, Slurm or systemd runs the process. The ranks that torchrun starts on a machine get
    equal shares of it. `root` is where the system's files are found.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = re.search(r"MemAvailable:\s+(\d+) kB", text_of(root / "proc/meminfo"))
    if available is None:
        return None
    free = min([1024 * int(available[1]), *left_by_groups(root)])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else free


def left_by_groups(root):
    """Yield what each control group of this process and each of its parents leaves, in bytes.

    A line of /proc/self/cgroup is `number:controllers:path`, with no controllers in version 2.
    """
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limit, use, cached = GROUPS[bool(controllers)]
        top = root / "sys/fs/cgroup" / folder
        group = top / path.lstrip("/")
        for place in (group, *group.parents):
            sizes = [text_of(place / name).strip() for name in (limit, use)]
            if all(size.isdecimal() for size in sizes):  # "max" is no limit
                stat = re.search(rf"^{cached} (\d+)", text_of(place / "memory.stat"), re.MULTILINE)
                yield int(sizes[0]) - int(sizes[1]) + (int(stat[1]) if stat else 0)
            if place == top:
                break


def text_of(path):
    """What a file of the system says, or nothing if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def check_weights(weights, dtype, device):
    """Whether the weights fit into the free memory. Raises ValueError if they must and do not.

    Weights that keep their dtype on a CPU stay mapped from disk and need not fit; if they do not, a
    warning says how slow that is. Integers, such as packed 4-bit weights, always keep their dtype.
    """
    on_cpu, free = torch.device(device).type == "cpu", free_memory(device)
    made = {name: w for name, w in weights.items()
            if not on_cpu or result_dtype(w, dtype) != w.dtype}
    size, needed = size_after(weights, dtype), size_after(made, dtype)
    if free is None or size <= free:
        return True
    facts = f"{size / 1e9:.1f} GB of weights, but {free / 1e9:.1f} GB of memory are free"
    if needed > free:
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
    slots = min(length, (model.config.sliding_window or length) + chunk - 1)  # as in new_cache
    needed = rows * slots * (one.keys.nbytes + one.values.nbytes)
    free = free_memory(one.keys.device)
    free = from_first(free) if is_sharded(model) else free  # all ranks must decide alike
    if free is not None and needed > free:
        raise ValueError(f"{rows} rows of {length} tokens need {needed / 1e9:.1f} GB of cache, but "
                         f"{free / 1e9:.1f} GB of memory are free; ask for fewer tokens")
