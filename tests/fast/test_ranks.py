"""Claims about several devices: the same numbers and texts, and an end whatever happens.

torchrun starts generate.py here, or this file, which then is a program: `write_texts`.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

ranks = pytest.importorskip("fast.ranks")

import torch
from conftest import random_model, save
from int4_checkpoints import save_int4

import fast
from fast.ranks import shard
from generate import TINY, generate, main
from mixtral import read_json, read_weights

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = {"vocab_size": 2048, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 4}


def checkpoints(folder):
    """Write the same random checkpoints in every process, and return their folder."""
    save(random_model(5, **SIZES), folder / "random", head_dim=4)
    save_int4(random_model(5, **SIZES), folder / "int4", 16)
    for directory in list(folder.iterdir()):
        shutil.copy(TINY / "tokenizer.model", directory)
    return folder


# ------------------------------------------------------------------ shares


@pytest.mark.claim
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("int4", [False, True])
def test_the_outputs_of_all_ranks_add_up_to_those_of_the_whole_model(tmp_path, count, int4):
    """Both sums are taken where `reduce_outputs` puts an all-reduce."""
    model = random_model(num_key_value_heads=6, intermediate_size=48)
    save_int4(model, tmp_path, 8) if int4 else save(model, tmp_path)
    raw, weights = read_json(tmp_path / "config.json") | {"head_dim": None}, read_weights(tmp_path)
    parts = [fast.build(*shard(raw, weights, rank, count)) for rank in range(count)]
    for n, layer in enumerate(parts[0].model.layers):
        for name in ("self_attn", "block_sparse_moe"):
            others = [part.model.layers[n].get_submodule(name) for part in parts[1:]]
            layer.get_submodule(name).register_forward_hook(
                lambda _, inputs, y, others=others: y + sum(other(*inputs) for other in others))
    tokens = torch.arange(24).view(2, 12)
    difference = fast.build(raw, weights)(tokens) - parts[0](tokens)
    assert difference.abs().max() < 1e-12
    part, whole = (m.new_cache(1, 9).keys.numel() for m in (parts[0], model))
    assert part * count == whole


@pytest.mark.parametrize("changes, count, message", [
    ({}, 3, "num_key_value_heads 2"), ({}, 4, "num_attention_heads 6"),
    ({"num_key_value_heads": 3}, 3, "intermediate_size 20")])
def test_ranks_that_cannot_share_the_model_evenly_are_refused(tmp_path, changes, count, message):
    model = random_model(**changes)
    with pytest.raises(ValueError, match=f"{count} ranks do not divide {message}"):
        shard(vars(model.config), model.state_dict(), 0, count)
    save_int4(random_model(intermediate_size=24), tmp_path, 8)
    with pytest.raises(ValueError, match="weight_.*: 2 ranks do not divide its 3 "):
        shard(read_json(tmp_path / "config.json"), read_weights(tmp_path), 0, 2)


# ------------------------------------------------------------------ numbers and texts


CONVERSATION = "Hello\n\n/system Be kind.\nWho are you?\nAnd you? 🦙\n/reset\nHello\n/exit\nno\n"
COMMANDS = [
    ["--prompt", "Once upon", "--prompt", "The", "--temperature", "1", "--top-p", "0.9", "--seed",
     "1", "--stop", "and", "--max-new-tokens", "16"],
    ["--prompt", "Once \u2028", "--prompt", "é", "--json", "--max-new-tokens", "12"],
    ["--model", "{}/random", "--chat", "--max-new-tokens", "5"],
    ["--model", "{}/int4", "--max-new-tokens", "5"],
    ["--prompt", "Once", "--temperature", "1", "--max-new-tokens", "16"]]


def output(command, folder):
    """The exit code and standard output of a command line in this process."""
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())) as out:
        code = main([arg.replace("{}", str(folder)) for arg in command])
        return code, out.buffer.getvalue().decode()


def standard_input():
    return io.TextIOWrapper(io.BytesIO(CONVERSATION.encode()))


def write_texts(root):
    """The program that torchrun starts: every rank writes to a file what it prints."""
    rank, results = int(os.environ["RANK"]), []
    folder = checkpoints(root / str(rank))
    ranks.join("cpu")
    for command in COMMANDS:
        sys.stdin = sys.stdin if rank else standard_input()
        results.append(output(command, folder))
    torch.save(results, root / f"{rank}.pt")
    return 0


def torchrun(*args, stdin=None, act=None):
    """Start two ranks, call act(process, pids of the ranks) after 20 characters, wait for the end.

    Returns exit code, rest of the text, standard error, seconds since `act`, and pids still there.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
                                "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))}
    pipes, pids = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE), []
    process = subprocess.Popen(command, cwd=ROOT, text=True, env=environment, **pipes)
    try:
        if act:
            process.stdin.write(stdin or "")
            process.stdin.flush()
            process.stdout.read(20)
            pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            act(process, [int(pid) for pid in pids])
        start = time.monotonic()
        out, told = process.communicate(None if act else stdin, timeout=100)
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        return process.returncode, out, told, time.monotonic() - start, left
    finally:
        process.terminate()  # torchrun ends its ranks then


def run_texts():
    with tempfile.TemporaryDirectory() as folder:
        code, out, told, *_ = torchrun(__file__, folder)
        assert (code, out) == (0, ""), told
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.beside(run=run_texts)
def test_without_a_seed_every_rank_draws_what_rank_0_draws(beside):
    (code, text), other = beside[0][-1], beside[1][-1]
    assert code == 0 and text.startswith("Once") and (code, text) == other


def test_a_model_that_is_not_divided_asks_no_other_rank(monkeypatch):
    monkeypatch.setattr(ranks, "from_first", None)
    assert len(generate(random_model(), [[1]], 3)[0]) == 3


@pytest.mark.beside(run=run_texts)
@pytest.mark.parametrize("n", range(len(COMMANDS) - 1))
def test_two_ranks_print_what_one_process_prints(beside, folder, monkeypatch, n):
    monkeypatch.setattr(sys, "stdin", standard_input())
    (code, found), (_, wanted) = beside[0][n], output(COMMANDS[n], folder)
    assert code == 0
    if "--json" not in COMMANDS[n]:
        assert found == wanted
        return
    for a, b in zip(found.split("\n")[:-1], wanted.split("\n")[:-1], strict=True):
        a, b = json.loads(a), json.loads(b)
        assert a.pop("logprobs") == pytest.approx(b.pop("logprobs"), abs=1e-4)
        assert a | {"timings": None} == b | {"timings": None}


# ------------------------------------------------------------------ the processes


ENDLESS = ["--prompt", "Once upon a time", "--max-new-tokens", "1000000", "--temperature", "9"]


def ctrl_c(process, pids):
    """Interrupt a text that is written, or a chat that waits, some time after its answer."""
    if "--chat" in process.args:
        process.stdout.readline()
        time.sleep(2)
    process.send_signal(signal.SIGINT)


WRONG = partial(torchrun, "generate.py", "--model", "/nowhere", "--prompt", "x")
KILL = partial(torchrun, "generate.py", *ENDLESS,
               act=lambda process, pids: os.kill(pids[1], signal.SIGKILL))
TEXT = partial(torchrun, "generate.py", *ENDLESS, act=ctrl_c)
CHAT = partial(torchrun, "generate.py", "--chat", "--max-new-tokens", "9", stdin="Hi\n", act=ctrl_c)
GONE = partial(torchrun, "generate.py", *ENDLESS, act=lambda process, pids: process.stdout.close())


@pytest.mark.beside(run=WRONG)
def test_an_error_of_all_ranks_is_printed_once(beside):
    code, out, told, seconds, _ = beside
    assert code != 0 and out == "" and told.count("generate.py: /nowhere") == 1 and seconds < 35


@pytest.mark.beside(run=KILL)
def test_all_ranks_end_when_one_is_killed(beside):
    code, _, told, seconds, left = beside
    assert code != 0 and seconds < 35 and not left
    assert "File" not in told.split("torch/distributed/elastic")[0]  # no traceback of a rank


@pytest.mark.parametrize("flags", [pytest.param([], marks=pytest.mark.beside(run=TEXT)),
                                   pytest.param(["--chat"], marks=pytest.mark.beside(run=CHAT))])
def test_ctrl_c_ends_all_ranks_and_prints_the_summary(beside, flags):
    code, out, told, seconds, left = beside
    assert code != 0 and seconds < 35 and not left and out.endswith("" if flags else "\n")
    assert told.count("tokens read") == 1 and "rank 0 stops" not in told


@pytest.mark.beside(run=GONE)
def test_a_reader_that_goes_away_is_no_error_on_any_rank(beside):
    code, _, told, seconds, left = beside
    assert (code, told, left) == (0, "", []) and seconds < 35


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("code, raised", [(0, False), (1, False), (0, True), (2, True)])
def test_only_rank_0_prints_and_another_rank_reports_a_failure_10_s_later(
        monkeypatch, capsys, rank, code, raised):
    def command():
        print("text")
        print("reason", file=sys.stderr)
        assert rank == "0" or sys.stdin.read() == ""
        return sys.exit(code) if raised else code

    slept = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "stdin", standard_input())
    monkeypatch.setattr(ranks.signal, "signal", lambda *args: None)
    monkeypatch.setattr(ranks.time, "sleep", lambda s: slept.append((s, capsys.readouterr())))
    assert ranks.run(command) == code
    told = capsys.readouterr()
    assert told.out == ("text\n" if rank == "0" else "")
    assert told.err == ("reason\n" if rank == "0" or code else "")
    assert slept == ([(10, ("", ""))] if rank != "0" and code else [])


def test_a_lost_connection_ends_a_rank_and_only_the_first_says_so(monkeypatch, capsys):
    for rank in (0, 1):
        monkeypatch.setattr(ranks.dist, "get_rank", lambda rank=rank: rank)
        with pytest.raises(SystemExit) as end, ranks.ended_by_others():
            raise RuntimeError("Connection closed by peer")
        assert end.value.code == 1 - rank
        assert capsys.readouterr().err.count("\n") == 1 - rank


if __name__ == "__main__":
    sys.exit(ranks.run(lambda: write_texts(Path(sys.argv[1]))))
