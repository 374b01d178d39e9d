"""Claims about fast/memory.py: what does not fit into memory is refused before it is made."""

import pytest

memory = pytest.importorskip("fast.memory")

import torch
from conftest import random_model

import fast
from fast.memory import check_cache, check_weights, free_memory

MEGABYTE = {"weight": torch.zeros(1000, 250), "norm": torch.zeros(0)}
INT4 = {"weight_packed": torch.zeros(1000, 125, dtype=torch.int32),
        "weight_scale": torch.zeros(1000, 125), "weight_shape": torch.zeros(0).long()}


@pytest.mark.parametrize("weights, free, dtype, device, fits", [
    (MEGABYTE, 1_000_000, None, "cpu", True), (MEGABYTE, 999_999, None, "cpu:0", None),
    (MEGABYTE, 999_999, torch.float32, "cpu", None), (MEGABYTE, 999_999, None, "cuda", False),
    (MEGABYTE, 2_000_000, torch.float64, "cpu", True),
    (MEGABYTE, 1_999_999, torch.float64, "cpu", False), (MEGABYTE, None, None, "cuda", True),
    (MEGABYTE, 500_000, torch.bfloat16, "cuda", True),
    (MEGABYTE, 499_999, torch.bfloat16, "cuda", False),
    # Of 4-bit weights only the scales change and take new memory, 1,000,000 bytes in float64.
    (INT4, 1_000_000, torch.float64, "cpu", None), (INT4, 999_999, torch.float64, "cpu", False),
    # The 500,000 bytes of packed integers stay, and the scales take 250,000 in bfloat16.
    (INT4, 750_000, torch.bfloat16, "cuda", True), (INT4, 749_999, torch.bfloat16, "cuda", False)])
def test_weights_must_fit_into_the_free_memory_unless_they_stay_on_disk(
        monkeypatch, capsys, weights, free, dtype, device, fits):
    """`fits` is None where the weights are mapped: that is slow, so a warning says it."""
    monkeypatch.setattr(memory, "free_memory", lambda where: free if where == device else -1)
    if fits is False:
        with pytest.raises(ValueError, match=r"^[01]\.\d GB of weights, but 0\.0 GB of memory are"):
            check_weights(weights, dtype, device)
        return
    assert check_weights(weights, dtype, device) is bool(fits)
    told = capsys.readouterr().err
    assert (told.count("\n") == 1 and "stay on disk" in told) if fits is None else told == ""


def test_a_model_that_does_not_fit_is_refused_before_it_is_converted(monkeypatch):
    model = random_model(dtype=torch.float32)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    monkeypatch.setattr(fast, "converted", None)  # calling it would be a TypeError
    with pytest.raises(ValueError, match="GB of weights"):
        fast.build(vars(model.config), model.state_dict(), torch.float64)


@pytest.mark.parametrize("window, rows, length", [(None, 1, 1000), (5, 3, 1000), (5, 1, 10)])
def test_a_cache_must_fit_into_the_free_memory(monkeypatch, window, rows, length):
    model = random_model(sliding_window=window)
    cache = model.new_cache(rows, length, 64)
    size = cache.keys.nbytes + cache.values.nbytes
    for free in (None, size):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        check_cache(model, rows, length, 64)
    monkeypatch.setattr(memory, "free_memory", lambda device: size - 1)
    with pytest.raises(ValueError, match=f"{rows} rows of {length} tokens need 0.0 GB of cache"):
        check_cache(model, rows, length, 64)


def group(path, limit, used, version=2):
    """The files of a control group in which 300 of the bytes used are files that can be dropped."""
    names = ("memory.max", "memory.current") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes")
    stat = "file 9\ninactive_file 300\n" if version == 2 else (
        "inactive_file 9\ntotal_inactive_file 300\n")
    contents = {names[0]: limit, names[1]: used, "memory.stat": "anon 7\n" + stat}
    return {f"sys/fs/cgroup{path}/{name}": f"{text}\n" for name, text in contents.items()}


@pytest.mark.parametrize("groups, files, wanted", [
    ("", {}, 5_120_000),
    ("0::/\n", group("", "max", 1000), 5_120_000), ("0::/\n", group("", 99000000, 9), 5_120_000),
    ("0::/\n", group("", 9000, 1000), 8300),
    # Slurm and systemd-run give the limit to the group itself or to one of its parents.
    ("0::/job/step\n", group("/job/step", 9000, 1000) | group("/job", "max", 5000), 8300),
    ("0::/job/step\n", group("/job/step", "max", 1000) | group("/job", 9000, 5000), 4300),
    ("0::/job/step\n", group("/job/step", 9000, 1000) | group("/job", 9000, 5000), 4300),
    ("0::/elsewhere\n", group("", 9000, 1000), 8300),  # a container that sees only its own group
    ("2:cpu:/\n1:memory,hugetlb:/job/step\n0::/\n",
     group("/memory/job", 9000, 5000, version=1)
     | group("/memory", 9223372036854771712, 5000, version=1), 4300),
    ("1:cpu:/job\n", group("/memory/job", 9000, 5000, version=1), 5_120_000)])
def test_free_memory_is_the_least_that_the_system_and_the_control_groups_leave(
        monkeypatch, tmp_path, groups, files, wanted):
    """5,120,000 bytes are available here. Each rank of a machine gets an equal share."""
    assert free_memory("cpu", tmp_path) is None  # a system that does not say
    system = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    5000 kB\n",
              "proc/self/cgroup": groups}
    for name, content in (system | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory("cpu", tmp_path) == wanted
    monkeypatch.setattr(memory.dist, "is_initialized", lambda: True)
    assert free_memory("cpu", tmp_path) == wanted // 2
