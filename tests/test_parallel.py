"""Claims about several devices: the same numbers and texts, and an end whatever happens.

Importing PyTorch takes seconds, so most ranks here are forked from one process that has imported
it. `launch` at the end of this file starts them as torchrun does and, like torchrun, ends all of
them when one fails. Three tests use torchrun itself.
"""

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import random_model, save

import generate as program
from convert import write_safetensors
from generate import TINY, TunedInt4Linear, generate, load
from mixtral import Mixtral, unpack

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 30  # seconds within which all ranks must end after one has


# ------------------------------------------------------------------ checkpoints


def pack(weight, G):
    """Words and scales of a weight rounded to 4 bits, so that `unpack` gives about the weight."""
    groups = weight.unflatten(1, (-1, G))
    scale = groups.abs().amax(-1) / 7
    u = (groups / scale[..., None]).round().flatten(1).long() + 8
    words = sum(u[:, n::8] << 4 * n for n in range(8))  # word j holds the columns 8j … 8j + 7
    return torch.where(words < 2**31, words, words - 2**32).int(), scale


def save_int4(model, directory, G):
    """Write a checkpoint whose experts have 4 bits."""
    scheme = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
            "group_size": G}}}}
    save(model, directory, quantization_config=scheme)
    tensors = model.state_dict()
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors.pop(name)
        tensors[f"{name}_packed"], tensors[f"{name}_scale"] = pack(weight, G)
        tensors[f"{name}_shape"] = torch.tensor(weight.shape)
    write_safetensors(directory / "model.safetensors", tensors)


SIZES = {"vocab_size": 2048, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 4}
CHANGES = {
    "odd heads": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "odd key heads": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "odd width": {"intermediate_size": 63},
    "no window": {"sliding_window": None},
    "nan": {}, "random": {"head_dim": None}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random checkpoints by name. Their head_dim is not hidden_size / heads, except for "random",
    whose config.json does not say it."""
    root = tmp_path_factory.mktemp("models")
    for name, changes in CHANGES.items():
        model = random_model(5, **SIZES | changes)
        if name == "nan":
            model.model.norm.weight[0] = torch.nan
        save(model, root / name, head_dim=(SIZES | changes)["head_dim"])
    save_int4(random_model(5, **SIZES), root / "int4", 16)
    save_int4(random_model(5, **SIZES | {"intermediate_size": 48}), root / "odd groups", 16)
    kernel = SIZES | {"hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}
    save_int4(random_model(5, **kernel), root / "int4 kernel", 32)
    shutil.copytree(root / "random", root / "1")
    data = (root / "random" / "model.safetensors").read_bytes()
    (root / "1" / "model.safetensors").write_bytes(data[:-1])
    for directory in list(root.iterdir()):
        shutil.copy(TINY / "tokenizer.model", directory)
    (root / "0").symlink_to(root / "random")  # so "{rank}" is damaged on rank 1 only
    return root


# ------------------------------------------------------------------ numbers


@torch.inference_mode()
def readings(model):
    """Logits of one pass, of chunks through the rolling buffer, of single and of ragged rows."""
    V = model.config.vocab_size
    text = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(0))
    lengths, more = torch.tensor([12, 5, 9]), torch.tensor([0, 5, 2])
    steps, ragged = model.new_cache(3, 12, chunk=4), model.new_cache(3, 16, chunk=4)
    first, second = model(text, ragged, lengths), model(text[:, :5], ragged, more)
    found = [
        model(text), model(text, model.new_cache(3, 12, chunk=4)),
        torch.cat([model(text[:, t:t + 1], steps) for t in range(12)], dim=1),
        *(row[:n] for row, n in zip(first, lengths, strict=True)),
        *(row[:n] for row, n in zip(second, more, strict=True))]
    return {"logits": found, "cache": steps.keys_and_values.shape}


def dtype_of(directory):
    """float64, but the kernel for 4 bits needs the bfloat16 of its checkpoint."""
    return None if Path(directory).name == "int4 kernel" else torch.float64


def own_text(directory, rank):
    """Tokens that a rank draws with a whole model of its own."""
    model = Mixtral.from_pretrained(directory, dtype_of(directory))
    return generate(model, [[1, 300 + rank]], 8, temperature=2.0, seed=rank)


def measure(directory):
    """Everything that the tests below compare, of a checkpoint loaded on this rank."""
    tokenizer, model = load(directory, dtype_of(directory))
    prompt = tokenizer.encode("Once upon a time")
    storages = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes()
                for w in (*model.parameters(), *model.buffers())}
    return readings(model) | {
        "bytes": sum(storages.values()),
        "shapes": {name: w.shape for name, w in model.state_dict().items()},
        "kernels": sum(isinstance(layer, TunedInt4Linear) for layer in model.modules()),
        "own text": own_text(directory, dist.get_rank() if dist.is_initialized() else 0),
        "unseeded": generate(model, [prompt, prompt[:2]], 8, temperature=2.0),
        "seeded": generate(model, [prompt, prompt[:2]], 8, temperature=1.0, seed=7)}


def measure_in_ranks(directories, folder):
    """`measure` on one of several ranks that the caller connects without torchrun."""
    rank, ranks = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
    del os.environ["TORCHELASTIC_RUN_ID"]
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=ranks)
    torch.save([measure(directory) for directory in directories], f"{folder}/{rank}.pt")
    dist.barrier()


@pytest.fixture(scope="module")
def measured(models, start, tmp_path_factory):
    """The results of `measure` by checkpoint and number of ranks, as a list with one for each rank.

    For 1 rank, the logits are those of the plain model.
    """
    whole = [str(TINY), *(str(models / name) for name in ("random", "int4", "int4 kernel"))]
    found = {(Path(directory).name, 1): [
        measure(directory) | readings(Mixtral.from_pretrained(directory, dtype_of(directory)))]
        for directory in whole}
    for ranks, directories in ((2, whole), (4, whole[1:2])):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        ended = start(ranks, call="measure_in_ranks", args=[directories, str(folder)])
        assert ended["codes"] == [0] * ranks, ended["err"]
        each = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
        for directory, results in zip(directories, zip(*each, strict=True), strict=True):
            found[Path(directory).name, ranks] = results
    return found


SHARED = [("tiny", 2), ("random", 2), ("random", 4), ("int4", 2)]


@pytest.mark.parametrize("name, ranks", SHARED)
def test_every_rank_gives_the_float64_logits_of_one_process(measured, name, ranks):
    """In one pass, in chunks and token by token through a cache, and for ragged rows."""
    whole = measured[name, 1][0]["logits"]
    assert whole[0].dtype == torch.float64 and whole[0].std() > 0.5
    for one in measured[name, ranks]:
        assert all((a - b).abs().max() < 1e-12
                   for a, b in zip(one["logits"], whole, strict=True) if b.numel())


@pytest.mark.parametrize("name, ranks", SHARED)
def test_ranks_draw_the_tokens_of_one_process_and_without_a_seed_the_same(measured, name, ranks):
    for one in measured[name, ranks]:
        assert one["seeded"] == measured[name, 1][0]["seeded"]
        assert one["unseeded"] == measured[name, ranks][0]["unseeded"]
    assert measured[name, ranks][0]["unseeded"] != measured[name, 1][0]["unseeded"]


def test_a_rank_with_a_whole_model_of_its_own_draws_its_own_tokens(measured, models):
    for rank, one in enumerate(measured["random", 4]):
        assert one["own text"] == own_text(models / "random", rank)
    assert len({str(one["own text"]) for one in measured["random", 4]}) == 4


def test_two_ranks_hold_at_most_6_tenths_of_the_embedded_model_each(measured):
    for one in measured["tiny", 2]:
        assert one["bytes"] <= 0.6 * measured["tiny", 1][0]["bytes"]


SPLIT = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "w1": 0, "w3": 0, "w2": 1}


@pytest.mark.parametrize("name, ranks", SHARED)
def test_each_rank_holds_its_share_of_every_divided_weight_and_of_the_cache(measured, name, ranks):
    whole = measured[name, 1][0]["shapes"]
    for one in measured[name, ranks]:
        assert one["shapes"].keys() == whole.keys()
        for weight, shape in whole.items():
            layer, kind = weight.split(".")[-2:]
            wanted = list(shape)
            if layer in SPLIT and kind != "weight_shape":
                wanted[SPLIT[layer]] //= ranks
            assert list(one["shapes"][weight]) == wanted
        cache = list(measured[name, 1][0]["cache"])
        cache[4] //= ranks  # (L, 2, B, C, K, d)
        assert list(one["cache"]) == cache


def test_the_kernel_for_4_bits_runs_on_every_rank(measured):
    """The median, because a rounding error of bfloat16 can change the choice of an expert."""
    whole = measured["int4 kernel", 1][0]
    for one in measured["int4 kernel", 2]:
        assert one["kernels"] == whole["kernels"] == 2 * 8 * 3
        logits, wanted = one["logits"][0], whole["logits"][0]
        assert (logits - wanted).abs().median() < 0.05 * wanted.std()


def test_packing_is_the_inverse_of_unpacking():
    q = torch.randint(-7, 8, (6, 4, 16))
    q[:, :, 3] = 7  # so that the scale is the one given
    scale = 2.0 ** torch.randint(-3, 3, (6, 4))
    weight = (q * scale[..., None]).flatten(1)
    words, found = pack(weight, 16)
    assert torch.equal(found, scale) and torch.equal(unpack(words, found), weight)


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def alone(start):
    """The standard output of a command in one process."""
    def alone(*args, stdin=""):
        ended = start(0, args=args, stdin=stdin)
        assert ended["codes"] == [0], ended["err"]
        return ended["out"][0]

    return alone


def printed_once(ended):
    """Check that all ranks have succeeded and only the first has printed; returns what it did."""
    assert set(ended["codes"]) == {0}, ended["err"]
    assert not any(ended["out"][1:]) and not any(ended["err"][1:])
    return ended["out"][0], ended["err"][0]


@pytest.mark.parametrize("flags", [
    ["--prompt", "Once upon a time", "--max-new-tokens", "16"],
    ["--prompt", "Once upon a time", "--max-new-tokens", "16", "--temperature", "0.8", "--seed",
     "3"],
    ["--prompt", "Once upon", "--prompt", "The", "--temperature", "1", "--top-p", "0.9", "--seed",
     "1", "--stop", "and", "--max-new-tokens", "16"],
    ["--chat", "--prompt", "Hello", "--system", "Be kind.", "--max-new-tokens", "9"]])
def test_two_ranks_print_once_what_one_process_prints(start, alone, flags):
    """The embedded model runs in float32."""
    out, told = printed_once(start(2, args=flags))
    assert out == alone(*flags)
    assert len(re.findall("tokens read", told)) == 1
    assert told.count("\n") == (2 if "--chat" in flags else 1)


def test_json_of_two_ranks_is_that_of_one_process(start, alone):
    flags = ["--prompt", "Once \u2028", "--prompt", "é", "--json", "--temperature", "1", "--seed",
             "2", "--max-new-tokens", "12", "--stop", "th"]
    out, _ = printed_once(start(2, args=flags))
    pairs = zip(out.split("\n")[:-1], alone(*flags).split("\n")[:-1], strict=True)
    for found, wanted in (map(json.loads, pair) for pair in pairs):
        assert found.pop("timings").keys() == wanted.pop("timings").keys()
        assert found.pop("logprobs") == pytest.approx(wanted.pop("logprobs"), abs=1e-4)
        assert found == wanted


CONVERSATION = ("Hello\n\n/system Be kind.\nWho are you?\nAnd you? 🦙\n/nonsense\n/reset\nHello\n"
                "/exit\nnobody reads this\n")


@pytest.mark.parametrize("flags, stdin", [
    (["--chat", "--max-new-tokens", "5"], CONVERSATION), (["--chat"], ""),
    (["--max-new-tokens", "5"], "Once upon\na time, 🦙\n"), (["--max-new-tokens", "5"], "")])
def test_the_first_rank_reads_standard_input_for_all(start, alone, models, flags, stdin):
    flags = ["--model", str(models / "random"), *flags]
    out, told = printed_once(start(2, args=flags, stdin=stdin))
    assert out == alone(*flags, stdin=stdin)
    assert told.count("/nonsense: unknown") == stdin.count("/nonsense")


@pytest.mark.parametrize("name, ranks", [("random", 4), ("int4", 2), ("int4", 4)])
def test_four_ranks_and_4_bit_checkpoints_print_what_one_process_prints(
        start, alone, models, name, ranks):
    flags = ["--model", str(models / name), "--prompt", "Once", "--max-new-tokens", "10",
             "--temperature", "1", "--seed", "5"]
    assert printed_once(start(ranks, args=flags))[0] == alone(*flags)


# ------------------------------------------------------------------ the end


def lines(ended):
    """What all ranks have written to standard error, as one list of lines."""
    return "".join(ended["err"]).splitlines()


def report_slowly(args):
    """The command with {rank} replaced, on ranks that need time for a line, the first rank most."""
    def slow_print(*values, **options):
        time.sleep(0.1 if int(os.environ["RANK"]) else 0.3)
        print(*values, **options)

    program.print = slow_print
    return program.main([arg.replace("{rank}", os.environ["RANK"]) for arg in args])


@pytest.mark.parametrize("name, message", [
    ("odd heads", "2 ranks .*num_attention_heads 3"),
    ("odd key heads", "2 ranks .*num_key_value_heads 3"),
    ("odd width", "2 ranks .*intermediate_size 63"),
    ("odd groups", r"w2\.weight_.*2 ranks must divide its 3 groups"),
    ("{rank}", r"1/model\.safetensors: not a complete safetensors file"),
    ("absent", r"absent: no model\*\.safetensors"),
    ("nan", "the logits are NaN")])
def test_a_model_that_cannot_run_is_refused_in_one_line(start, models, name, message):
    """The damaged file, "{rank}", is one that the first rank never reads.

    The line is printed before any rank ends, because torchrun then ends the others.
    """
    args = ["--model", str(models / name), "--prompt", "x"]
    ended = start(2, call="report_slowly", args=[args])
    [told] = lines(ended)
    assert told.startswith("generate.py: ") and re.search(message, told)
    assert ended["out"] in (["", ""], ["x", ""])
    assert 1 in ended["codes"] and set(ended["codes"]) <= {1, -signal.SIGTERM}


@pytest.mark.parametrize("args, message", [
    (["--bogus"], "unrecognized arguments: --bogus"), (["--top-p", "x"], "invalid float value"),
    (["--temperature", "-1"], "temperature must be"), (["--stop", ""], "--stop needs a string"),
    (["--device", "nonsense"], "device 'nonsense' is not usable here")])
def test_bad_arguments_are_reported_once(start, args, message):
    ended = start(2, call="report_slowly", args=[["--prompt", "x", *args]])
    told = lines(ended)
    assert told and message in told[-1] and "".join(told).count("generate.py: ") == 1
    assert len(told) == 1 or "".join(told).count("usage: ") == 1
    assert ended["out"] == ["", ""] and ended["codes"][0] in (1, 2)


def test_help_is_printed_once(start):
    ended = start(2, args=["--help"])
    assert ended["out"][0].count("usage: generate.py") == 1 and not ended["out"][1]
    assert ended["codes"] == [0, 0]


def test_more_tokens_than_the_memory_holds_are_refused_in_one_line(start, models):
    model = ["--model", str(models / "no window"), "--max-new-tokens", str(10**15)]
    ended = start(2, args=[*model, "--prompt", "x"])
    [told] = lines(ended)
    assert "GB of cache" in told and ended["codes"][0] == 1
    ended = start(2, args=[*model, "--chat"], stdin="x\ny\n")  # a conversation goes on
    told = lines(ended)
    assert ended["codes"] == [0, 0] and len(told) == 2 and all("GB of cache" in t for t in told)


def lack_memory(args):
    """The command on ranks of which only the first has free memory."""
    if os.environ["RANK"] != "0":
        program.free_memory = lambda device: 0
    return program.main(args)


def test_all_ranks_go_by_the_free_memory_of_the_first(start, models):
    args = ["--model", str(models / "random"), "--prompt", "x", "--max-new-tokens", "3"]
    printed_once(start(2, call="lack_memory", args=[args]))


def test_input_that_is_not_text_is_refused_in_one_line(start, models):
    ended = start(2, args=["--model", str(models / "random")], stdin="\udcff")
    [told] = lines(ended)
    assert "not UTF-8" in told and 1 in ended["codes"] and ended["out"] == ["", ""]


def test_a_full_disk_ends_all_ranks_in_one_line(start, models):
    ended = start(2, args=["--model", str(models / "random"), "--prompt", "x"], stdout="/dev/full")
    assert lines(ended) == ["generate.py: standard output: No space left on device"]
    assert 1 in ended["codes"]


def test_a_reader_that_goes_away_is_no_error_on_any_rank(start, models):
    ended = start(2, args=["--model", str(models / "no window"), "--prompt", "Once upon a time",
                           "--max-new-tokens", "100000"], when=["0.out", 10])
    assert ended["out"][0].startswith("Once upon ") and ended["codes"] == [0, 0]
    assert lines(ended) == [] and ended["seconds"] < LIMIT


LONG = ["--prompt", "Once upon a time", "--max-new-tokens", "100000"]


@pytest.mark.parametrize("ranks, killed", [(2, 0), (2, 1), (4, 2)])
def test_when_a_rank_is_killed_the_others_say_so_and_end(start, models, ranks, killed):
    """Nothing else ends them here, as torchrun would."""
    ended = start(ranks, args=["--model", str(models / "no window"), *LONG], kill=signal.SIGKILL,
                  when=["0.out", 30], to=[killed], together=False)
    assert ended["out"][0].startswith("Once upon a time")
    assert ended["seconds"] < LIMIT and ended["codes"].pop(killed) == -signal.SIGKILL
    assert set(ended["codes"]) == {1} and not ended["err"].pop(killed)
    for told in ended["err"]:
        assert re.fullmatch(r"generate\.py: rank \d stops because another rank has ended\n", told)


def fail_on_the_second_rank(error, args):
    """The command on a rank that raises an error while it draws the third token."""
    steps, plain = [], program.draw

    def draw(*given):
        steps.append(given)
        if len(steps) == 3 and dist.get_rank() == 1:
            raise {"RuntimeError": RuntimeError, "KeyError": KeyError}[error]("a defect")
        return plain(*given)

    program.draw = draw
    return program.main(args)


@pytest.mark.parametrize("error", ["RuntimeError", "KeyError"])
def test_when_a_rank_raises_its_reason_is_shown_and_the_others_end(start, models, error):
    """An error that no input explains keeps its traceback; it must not be called a lost rank."""
    args = ["--model", str(models / "no window"), *LONG]
    ended = start(2, call="fail_on_the_second_rank", args=[error, args], together=False)
    assert ended["codes"] == [1, 1] and ended["seconds"] < LIMIT
    assert re.search(f"Traceback.*{error}: .?a defect", ended["err"][1], re.DOTALL)
    assert "has ended" not in ended["err"][1]
    assert ended["err"][0] == "generate.py: rank 0 stops because another rank has ended\n"


def test_ctrl_c_ends_all_ranks(start, models):
    ended = start(2, args=["--model", str(models / "no window"), *LONG], kill=signal.SIGINT,
                  when=["0.out", 30], to=[0, 1], together=False)
    assert ended["codes"] == [130, 130] and ended["seconds"] < LIMIT
    [told] = lines(ended)
    assert "tokens read" in told and ended["out"][0].startswith("Once upon a time")


def interrupted(args):
    """The command on ranks that notice Ctrl-C at different steps."""
    steps, plain = [], program.draw

    def draw(*given):
        steps.append(given)
        if len(steps) == 4 - dist.get_rank():
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*given)

    program.draw = draw
    return program.main(args)


@pytest.mark.parametrize("flags", [[], ["--json"], ["--prompt", "x"]])
def test_an_interrupted_text_is_printed_as_far_as_it_came(start, models, alone, flags):
    model = ["--model", str(models / "random"), "--prompt", "Once upon a time", *flags]
    ended = start(2, call="interrupted", args=[model], together=False)
    assert ended["codes"] == [130, 130] and "tokens read" in lines(ended)[0]
    wanted = alone(*model, "--max-new-tokens", "3")
    if "--json" in flags:
        found, wanted = json.loads(ended["out"][0]), json.loads(wanted)
        assert (found["tokens"], found["finish_reason"]) == (wanted["tokens"], "interrupted")
    else:
        assert ended["out"] == [wanted, ""]


def test_ctrl_c_ends_a_conversation_that_waits_for_its_user(start, models):
    args = ["--model", str(models / "random"), "--chat", "--max-new-tokens", "5"]
    ended = start(2, args=args, stdin="Hello\n", wait=True, kill=signal.SIGINT,
                  when=["0.err", 1], to=[0, 1], together=False)
    assert ended["codes"] == [130, 130] and ended["seconds"] < LIMIT
    [told] = lines(ended)
    assert "tokens read" in told


# ------------------------------------------------------------------ torchrun itself


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@contextlib.contextmanager
def torchrun(*args):
    process = subprocess.Popen([*TORCHRUN, *args], cwd=ROOT, text=True, env=ENVIRONMENT,
                               pipesize=4096, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.terminate()  # torchrun ends its ranks then
        process.communicate()


def run_torchrun(*args):
    """The exit code, standard output and standard error of a command on two ranks."""
    with torchrun(*args) as process:
        out, told = process.communicate(timeout=300)
        return process.returncode, out, told


SHORT = ["--prompt", "Once upon a time", "--max-new-tokens", "16"]
SHORT_RUN = partial(run_torchrun, "generate.py", *SHORT)


@pytest.mark.beside(run=SHORT_RUN)
def test_torchrun_prints_what_one_process_prints_and_one_summary_line(beside, alone):
    code, out, told = beside
    assert out == alone(*SHORT)
    assert code == 0
    assert re.fullmatch(r"\[5 tokens read, .*; 16 written, .*\]\n", told)


def children(pid):
    """The processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended
            if f"PPid:\t{pid}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found


def test_torchrun_ends_when_one_of_its_processes_is_killed(models):
    with torchrun("generate.py", "--model", str(models / "no window"), *LONG) as process:
        assert process.stdout.read(16) == "Once upon a time"
        ranks = children(process.pid)
        assert len(ranks) == 2
        start = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        _, told = process.communicate(timeout=300)
    assert process.returncode != 0 and time.monotonic() - start < LIMIT
    assert "SIGKILL" in told and not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_the_recipe_of_the_readme_prints_the_same_text_with_transformers(alone, tmp_path):
    pytest.importorskip("transformers")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [script] = re.findall("^```python\n([^`]*tp_plan[^`]*)^```", text, re.MULTILINE)
    shutil.copy(ROOT / "tokenizer.py", tmp_path)
    (tmp_path / "serve.py").write_text(script)
    code, out, told = run_torchrun(tmp_path / "serve.py", TINY, "Once upon a time")
    assert code == 0, told
    assert out == alone("--prompt", "Once upon a time", "--max-new-tokens", "20", "--dtype",
                        "bfloat16")


# ------------------------------------------------------------------ processes


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Run a command or a function of this file on some ranks; see `launch` for the options."""
    root = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    server = subprocess.Popen(
        [sys.executable, __file__], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=ENVIRONMENT | {"PYTHONPATH": path})

    def start(ranks, **options):
        folder = Path(root) / str(len(list(root.iterdir())))
        folder.mkdir()
        print(json.dumps([ranks, str(folder), options]), file=server.stdin, flush=True)
        ended = json.loads(server.stdout.readline())
        for name in ("out", "err"):
            files = [folder / f"{rank}.{name}" for rank in range(max(ranks, 1))]
            ended[name] = [file.read_text() if file.exists() else "" for file in files]
        return ended

    yield start
    server.stdin.close()
    server.wait()


def serve():
    """Read one request per line and answer it by one line; see `start` and `launch`."""
    gc.freeze()  # what is imported is then never collected, so that ranks copy less of it
    while request := sys.stdin.readline():
        ranks, folder, options = json.loads(request)
        answer, told = os.pipe()
        if os.fork() == 0:
            result = launch(ranks, folder, **options)
            os.write(told, json.dumps(result).encode())
            os._exit(0)
        os.close(told)
        with open(answer) as file:
            print(file.read(), flush=True)
        os.wait()


def launch(ranks, folder, args, call=None, stdin="", wait=False, stdout=None, when=None,
           kill=None, to=(), together=True):
    """Start ranks and wait for them, as torchrun does; 0 ranks are one process without it.

    `call` names a function of this file, in place of the command. `wait` leaves standard input
    open; that of other ranks than the first is open always, so that reading it would never end.
    `stdout` is a file for the output of rank 0. When a file of the folder has some bytes,
    `when`, the signal `kill` is sent `to` ranks; without a signal, the output is a pipe that is
    closed then. If a rank fails, the others are ended, unless `together` is false. Returns exit
    codes and the seconds from the signal to the end.
    """
    listener = socket.create_server(("localhost", 0))
    text, pipe = os.pipe()
    os.write(pipe, stdin.encode(errors="surrogateescape"))
    if not wait:
        os.close(pipe)
    read, written = os.pipe()
    silence, _ = os.pipe()
    pids = []
    for rank in range(max(ranks, 1)):
        out = stdout if stdout and rank == 0 else f"{folder}/{rank}.out"
        pids.append(os.fork())
        if pids[-1] == 0:
            become(rank, ranks, listener.getsockname()[1], silence if rank else text, out,
                   f"{folder}/{rank}.err", written if when and not kill and rank == 0 else None)
            finish(globals()[call] if call else program.main, args if call else [args])
    for end in (text, written):
        os.close(end)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False,
                          master_listen_fd=listener.detach())
    start, limit, codes = time.monotonic(), 2 * LIMIT, [None] * len(pids)
    while None in codes:
        alive = [rank for rank, code in enumerate(codes) if code is None]
        for rank in alive:
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            codes[rank] = os.waitstatus_to_exitcode(status) if pid else None
        if when and not kill:
            Path(f"{folder}/0.out").write_bytes(os.read(read, when[1]))
            os.close(read)
        if when and os.path.getsize(f"{folder}/{when[0]}") >= when[1]:
            start, limit, when = time.monotonic(), LIMIT, None
            for rank in to:
                os.kill(pids[rank], kill)
        late = time.monotonic() - start > limit
        for rank in alive:
            if codes[rank] is None and (late or together and any(codes)):
                os.kill(pids[rank], signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.01)
    del store
    return {"codes": codes, "seconds": time.monotonic() - start}


def become(rank, ranks, port, stdin, out, err, pipe):
    """Give this forked process the streams and the environment of a rank."""
    flags = os.O_WRONLY | os.O_CREAT
    for number, opened in enumerate(
            (stdin, os.open(out, flags) if pipe is None else pipe, os.open(err, flags))):
        os.dup2(opened, number)
    os.closerange(3, 256)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    if ranks:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def finish(function, args):
    """Call a function and end this process as generate.py does, without Python's slow exit."""
    code = 1
    try:
        code = function(*args) or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
