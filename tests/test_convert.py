"""Claims about convert.py: every layout gives the same numbers, and no output is half-written."""

import ctypes
import gc
import itertools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import layouts
import pytest
import torch
from conftest import random_model, save
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, change_json, mistral_pickle, mistral_tensors
from safetensors import safe_open
from safetensors.torch import load_file

import convert
from convert import Lazy, complete_or_absent, write_safetensors
from mixtral import Mixtral, MixtralConfig
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOKENS = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(0))


def run(source, out, *options):
    return convert.main([f"--input_dir={source}", f"--output_dir={out}", *options])


def refused(word, capsys, *call):
    """The one line with which a conversion is refused; it has this word."""
    capsys.readouterr()
    assert run(*call) == 1
    error = capsys.readouterr().err
    assert error.startswith("convert.py: ") and error.count("\n") == 1 and word in error, error
    return error


def loaded(directory):
    """All tensors of the safetensors files in a directory, by name."""
    return {name: tensor for path in sorted(directory.glob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def same(found, wanted):
    """Whether two dicts hold the same tensors under the same names."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in wanted.items())


def contents(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def raw(tmp_path):
    """A small checkpoint as Mistral released them."""
    return mistral_pickle(random_model(dtype=torch.float32), tmp_path / "raw")


# ------------------------------------------------------------------ the numbers


@pytest.mark.claim
@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_gives_the_same_weights_and_float64_logits(write, tmp_path, out):
    """One model has a window and fewer key heads; the other has an odd number of experts."""
    for n, changes in enumerate(({}, {
            "sliding_window": None, "rope_theta": 1e6, "num_local_experts": 5,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 10, "vocab_size": 41})):
        model, place = random_model(**changes), out / str(n)
        assert run(write(model, tmp_path / str(n)), place, "--max-shard-size", "0.009MB") == 0
        weight_map = json.loads((place / "model.safetensors.index.json").read_text())["weight_map"]
        assert all(name in load_file(place / file) for name, file in weight_map.items())
        converted = Mixtral.from_pretrained(place)
        assert converted.config == model.config and len(contents(place)) > 5
        assert same(converted.state_dict(), model.state_dict())
        with torch.inference_mode():
            assert (converted(TOKENS) - model(TOKENS)).abs().max() < 1e-12


@pytest.mark.parametrize("write", LAYOUTS)
def test_to_mistral_gives_the_names_rows_and_sizes_of_mistral(write, tmp_path, out):
    model = random_model(dtype=torch.bfloat16, head_dim=6)
    assert run(write(model, tmp_path / "raw"), out, "--to", "mistral",
               "--max-shard-size", "0.009MB") == 0
    assert contents(out) == ["consolidated.safetensors", "params.json"]
    assert same(loaded(out), mistral_tensors(model))
    assert json.loads((out / "params.json").read_text()) == layouts.mistral_params(model.config)


def test_transformers_loads_the_output_and_gives_the_same_logits(tmp_path, out):
    transformers = pytest.importorskip("transformers")
    for seed, write in enumerate(LAYOUTS):
        model, directory = random_model(seed, torch.float32), out / write.__name__
        assert run(write(model, tmp_path / f"raw{seed}"), directory,
                   "--max-shard-size", "30KB") == 0
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, dtype=torch.float32)
        assert not any(info[kind] for kind in (
            "missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.inference_mode():
            assert (theirs.eval()(TOKENS).logits - model(TOKENS)).abs().max() < 1e-4


def anonymous_memory():
    """In kB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


def growth(function):
    """The peak of the anonymous memory while a function runs, in kB above the level before."""
    if sys.platform != "linux":
        pytest.skip("reads /proc of Linux")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before could hide the growth
    levels = [anonymous_memory()]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(function)
        while not running.done():
            time.sleep(0.001)
            levels.append(anonymous_memory())
    running.result()
    return max(levels) - levels[0]


def large_model():
    """A model of 126 MB, whose largest tensor takes 1 MB, or 8 MB in the fused layout."""
    return random_model(dtype=torch.float32, hidden_size=256, intermediate_size=1024,
                        num_hidden_layers=5, vocab_size=1000)


@pytest.mark.parametrize("write", [mistral_pickle, layouts.mistral_fused])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory_holds_one_tensor_while_a_checkpoint_is_converted_to_a_dtype(
        write, dtype, tmp_path, out):
    """Mapped files do not count, because the system can drop their pages at any time."""
    model, codes = large_model(), []
    source, options = write(model, tmp_path / "raw"), ["--dtype", str(dtype)[6:]] * bool(dtype)
    grown = growth(lambda: codes.append(run(source, out, *options)))
    assert codes == [0] and grown < 20_000, grown
    assert same(loaded(out), model.to(dtype).state_dict())


def test_the_parameters_of_8x7b_are_counted(capsys):
    checkpoint = convert.Checkpoint(convert.MISTRAL, MixtralConfig(), {}, {}, [], [])
    target = convert.Target(convert.HUGGINGFACE, torch.bfloat16)
    plan = convert.output_tensors(checkpoint, target, {})
    files = convert.shards(plan, convert.HUGGINGFACE, 4 * 10**9)
    assert len(plan) == 995 and convert.total_size(files) == 2 * 46_702_792_704
    convert.announce(Path("raw"), Path("/out"), checkpoint, target, files)
    printed = capsys.readouterr().out
    assert all(x in printed for x in ("46,702,792,704", "12,879,925,248", "93,405.6 MB"))


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_a_shard_holds_as_many_tensors_as_its_limit_allows(sizes, limit):
    tensors = {str(n): torch.empty(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
    groups = list(convert.shards(tensors, convert.HUGGINGFACE, limit).values())
    assert [name for group in groups for name in group] == list(tensors)
    totals = [sum(tensor.nbytes for tensor in group.values()) for group in groups]
    for n, group in enumerate(groups):
        assert totals[n] <= limit or len(group) == 1
        if n:
            assert totals[n - 1] + next(iter(group.values())).nbytes > limit
    assert len(convert.shards(tensors, convert.MISTRAL, limit)) == 1


WINDOW, CONTEXT = "sliding_window", "max_position_embeddings"


@pytest.mark.parametrize("raw, field, value", [
    ({WINDOW: "4096"}, WINDOW, 4096), ({WINDOW: "None"}, WINDOW, None), ({WINDOW: 7}, WINDOW, 7),
    ({WINDOW: "null"}, WINDOW, None), ({WINDOW: None}, WINDOW, None), ({WINDOW: 0}, WINDOW, None),
    ({"rope_theta": None}, "rope_theta", 1e6), ({"bos_token_id": 0}, "bos_token_id", 0),
    ({}, CONTEXT, 32768), ({"dim": 6144}, CONTEXT, 65536),
    ({"dim": 6144, "max_seq_len": 1024}, CONTEXT, 1024)])
def test_odd_and_absent_fields_of_params_json(raw, field, value):
    config = convert.read_params("params.json", layouts.mistral_params(MixtralConfig()) | raw)
    assert getattr(config, field) == value
    assert convert.params_from_config(config).get("max_seq_len") == raw.get("max_seq_len")


# ------------------------------------------------------------------ the tokenizer

TEXTS = ["", "Hello my name is", "My favourite condiment is ", "This is 🦙.cpp", "a\nb", "1234",
         " " * 16, "  two  and   three    spaces", "\t\ttabs\r\n", "ünïcödé ▁ 日本語 naïve"]


def test_auto_tokenizer_reads_the_output_and_gives_the_same_ids(tmp_path, out):
    transformers = pytest.importorskip("transformers")
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    v1, v2 = "tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2"
    added = {"bos_token": "<b>", "added_tokens_decoder": {"32000": {"content": "<b>"}}}
    for number, (name, config) in enumerate([
            (v1, {}), (v2, {}), (v1, added), (v1, {"bos_token": "<s>", "add_bos_token": False})]):
        model = random_model(vocab_size=Tokenizer(data / name).vocab_size, dtype=torch.float32)
        source = mistral_pickle(model, tmp_path / f"raw{number}")
        shutil.copy(data / name, source / "tokenizer.model")
        if config:
            layouts.write_json(source / "tokenizer_config.json", config)
        assert run(source, out / str(number)) == 0
        ours = Tokenizer(source)
        theirs = transformers.AutoTokenizer.from_pretrained(out / str(number))
        for text in TEXTS:
            assert theirs(text).input_ids == ours.encode(text), text
            assert theirs(text, "b").input_ids == ours.encode(text) + ours.encode("b", bos=False)
            assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(
                ours.encode(text)), text
        assert ours.bos_id == (32000 if config == added else 1)


def test_files_beside_the_weights_are_copied_and_a_tokenizer_with_a_version_is_found(
        tmp_path, out, capsys):
    model = random_model(vocab_size=2048, dtype=torch.float32)
    source = save(model, tmp_path / "raw")
    shutil.copy(ROOT / "tiny" / "tokenizer.model", source / "tokenizer.model.v3")
    (source / "chat_template.jinja").write_text("a template")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (source / "model.txt").write_text("not copied")
    assert run(source, out) == 0
    assert contents(out) == ["chat_template.jinja", "config.json", "generation_config.json",
                             "model.safetensors", "tokenizer.json", "tokenizer.model",
                             "tokenizer_config.json"]
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": [2, 7]}'
    (out / "tokenizer.model").unlink()
    capsys.readouterr()
    assert run(out, tmp_path / "mistral", "--to", "mistral") == 0
    told = capsys.readouterr().out
    assert "no tokenizer.model, and Mistral's code" in told and "left out" in told


# ------------------------------------------------------------------ write_safetensors


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*convert.WRITABLE.values()]),
                          st.lists(st.integers(0, 3), max_size=3), st.booleans()), max_size=6),
       st.randoms(use_true_random=False))
def test_what_is_written_is_what_the_library_reads_aligned(tmp_path_factory, specs, randoms):
    path, tensors, mixed = tmp_path_factory.getbasetemp() / "written", {}, {}
    for n, (dtype, shape, lazy) in enumerate(specs):
        numbers = [randoms.randrange(256) for _ in range(math.prod(shape))]
        x = tensors[f"tensor {n}"] = torch.tensor(numbers, dtype=dtype).view(shape)
        mixed[f"tensor {n}"] = Lazy(tuple(x.shape), dtype, x.clone) if lazy else x
    write_safetensors(path, mixed, {"key": "välue"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"key": "välue"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    begins = itertools.accumulate((x.nbytes for x in tensors.values()), initial=0)
    if all(at % x.itemsize == 0 for at, x in zip(begins, tensors.values(), strict=False)):
        assert list(header)[1:] == list(tensors)  # the order is kept where alignment allows it
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0
               for name, tensor in tensors.items())


@pytest.mark.parametrize("tensor, words", [
    (torch.ones(2, 3).T, "x: is not contiguous"),
    (torch.ones(2, device="meta"), "x: is not contiguous torch.float32 in CPU memory"),
    (Lazy((2, 2), torch.float32, lambda: torch.ones(2)), "x: wanted 16 bytes, got 8"),
    (Lazy((2,), torch.float32, lambda: torch.ones(2).int()), "x: is not contiguous torch"),
    (Lazy((2, 3), torch.float32, lambda: torch.ones(3, 2).T), "x: is not contiguous")])
def test_a_tensor_that_would_be_written_wrongly_is_refused_by_name(tensor, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        write_safetensors(tmp_path / "file", {"before": torch.ones(1), "x": tensor})
    assert not contents(tmp_path)


# ------------------------------------------------------------------ complete_or_absent


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("full"), ValueError("any other")])
@pytest.mark.parametrize("before", [{}, {"place": "old"}], ids=["new", "old"])
def test_a_file_is_complete_or_as_it_was(before, error, tmp_path):
    def texts():
        return {path.name: path.read_text() for path in tmp_path.iterdir()}

    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((KeyboardInterrupt, ValueError)):
        with complete_or_absent(tmp_path / "place") as part:
            part.write_text("half")
            raise error
    assert texts() == before
    with complete_or_absent(tmp_path / "place") as part:
        part.write_text("new")
    assert texts() == {"place": "new"}


def test_a_device_and_a_place_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    for name, directory in [("/dev/null", False), ("absent/x", False), ("file/x", True),
                            ("file", True), (".", False), (".", True)]:
        with pytest.raises(ValueError, match="not written"):
            with complete_or_absent(tmp_path / name, directory):
                pytest.fail("the work has begun")
    assert not Path("/dev/null").is_file() and contents(tmp_path) == ["file"]


# ------------------------------------------------------------------ the program

def test_ctrl_c_leaves_nothing_and_what_a_kill_has_left_is_no_obstacle(
        raw, tmp_path, out, monkeypatch):
    def interrupted(*arguments):
        write_safetensors(*arguments)
        assert contents(tmp_path) == [".out.part", "raw"]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_safetensors", interrupted)
        assert run(raw, out) == 130 and contents(tmp_path) == ["raw"]
    shutil.copytree(raw, tmp_path / ".out.part")
    assert run(raw, out) == 0 and contents(tmp_path) == ["out", "raw"]
    assert contents(out) == ["config.json", "model.safetensors"]


def test_a_line_is_printed_for_each_file_and_the_last_line_is_the_next_command(tmp_path, capsys):
    source = save(random_model(dtype=torch.float32), tmp_path / "raw")
    assert run(source, tmp_path / "a model", "--max-shard-size", "30KB") == 0
    *_, last, command = capsys.readouterr().out.splitlines()
    count = len(contents(tmp_path / "a model")) - 2  # without config.json and the index
    assert re.fullmatch(rf"{count} of {count}: model-0000{count}-of-0000{count}.*, 0.0 MB", last)
    assert command == f"next: python generate.py --model '{tmp_path}/a model' --prompt \"...\""


# ------------------------------------------------------------------ refusals


def change_pickle(**changes):
    """A function that replaces tensors of consolidated.00.pth, or removes them for None."""
    def change(source):
        path = source / "consolidated.00.pth"
        tensors = torch.load(path, weights_only=True) | {
            name.replace("__", "."): tensor for name, tensor in changes.items()}
        torch.save({name: x for name, x in tensors.items() if x is not None}, path)
    return change


def change_params(**changes):
    return lambda source: change_json(source / "params.json", **changes)


def code_in_pickle(source):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {source / 'ran'}",)

    change_pickle(norm__weight=Evil())(source)


def compressed(source):
    """The same zip archive with compressed records, which torch.load would map as if they were not.

    So the weights would be wrong without an error.
    """
    path = source / "consolidated.00.pth"
    archive = zipfile.ZipFile(path)
    with zipfile.ZipFile(source / "repacked", "w", zipfile.ZIP_DEFLATED) as file:
        for entry in archive.infolist():
            file.writestr(entry.filename, archive.read(entry))
    (source / "repacked").rename(path)


@pytest.mark.parametrize("spoil, word", [
    (change_pickle(norm__weight=None), "norm.weight"),
    (change_pickle(rope__freqs=torch.ones(2)), "rope.freqs"),
    (change_pickle(output__weight=torch.ones(24, 37)), "output.weight"),
    (change_pickle(norm__weight=torch.ones(24, dtype=torch.int8)), "norm.weight"),
    (change_pickle(norm__weight=torch.ones(24).to_sparse()), "norm.weight"),
    (change_pickle(norm__weight=[1]), "norm.weight"),
    (lambda source: torch.save([1], source / "consolidated.00.pth"), "got list"),
    (lambda source: torch.save({"norm.weight": torch.ones(24)}, source / "consolidated.01.pth"),
     "norm.weight is in both"),
    (code_in_pickle, "could run code"), (compressed, "consolidated.00.pth"),
    (lambda source: shutil.copy(ROOT / "tiny" / "tokenizer.model", source), "2048 pieces"),
    (lambda source: (source / "params.json").unlink(), "params.json"),
    (change_params(hidden_dim=None, norm_eps=None), "hidden_dim, norm_eps"),
    (change_params(sliding_window="wide"), "sliding_window"),
    (change_params(n_layers=1), "layers.1."), (change_params(dim="x"), "hidden_size"),
    (change_params(n_layers=10**9), "num_hidden_layers"),
    (change_params(moe={"num_experts": 10**9}), "num_local_experts")])
def test_a_spoilt_input_is_refused_in_one_line_that_names_the_problem(
        spoil, word, raw, tmp_path, out, capsys):
    spoil(raw)
    refused(word, capsys, raw, out)
    assert contents(tmp_path) == ["raw"] and not (raw / "ran").exists()


@pytest.mark.parametrize("options", [["--dtype", "int4"], [], ["--dtype", "bfloat16"]])
def test_4_bits_need_the_folder_fast(options, raw, tmp_path, out, monkeypatch, capsys):
    scheme = {} if options == ["--dtype", "int4"] else {"quantization_config": {"a": 1}}
    source = save(random_model(dtype=torch.float32), tmp_path / "4 bits", **scheme)
    monkeypatch.setitem(sys.modules, "fast", None)
    refused("fast/int4.py", capsys, source, out, *options)
    assert run(raw, out) == 0


def test_the_parts_of_a_split_file_are_joined_by_the_command_that_the_refusal_shows(
        tmp_path, out, capsys):
    """The first torrent has eleven parts. Sorted as text, -split10 comes before -split2."""
    model = random_model(dtype=torch.float32)
    source = mistral_pickle(model, tmp_path / "a raw")
    whole = source / "consolidated.00.pth"
    content, size = whole.read_bytes(), whole.stat().st_size // 10
    whole.unlink()
    for n in range(11):
        (source / f"{whole.name}-split{n}").write_bytes(content[n * size:(n + 1) * size])
    command = refused("cat ", capsys, source, out).partition("with: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    assert run(source, out) == 0 and same(loaded(out), model.state_dict())


def test_what_is_there_already_is_never_touched(raw, tmp_path, out, capsys):
    (raw / "a.gguf").touch()
    before = contents(raw)
    refused("llama.cpp", capsys, raw / "a.gguf", out)
    refused("is a file", capsys, raw / "params.json", out)
    for place in (raw, raw / ".." / "raw", tmp_path, raw / "params.json"):
        refused("exists already", capsys, raw, place)
    assert contents(raw) == before and contents(tmp_path) == ["raw"]


@pytest.mark.parametrize("limit", [500, 20_000])
def test_a_file_that_cannot_be_written_ends_in_one_line(
        limit, raw, tmp_path, out, capsys, monkeypatch):
    """The limit on the size of a file stands for a full disk. It meets small and large files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        refused("not written: File too large", capsys, raw, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: convert.argparse.Namespace(free=limit))
    refused("MB are free", capsys, raw, out)
    assert contents(tmp_path) == ["raw"]


def test_only_a_finite_number_that_is_too_large_for_the_dtype_is_refused(tmp_path, out, capsys):
    model = random_model(dtype=torch.float32)
    model.lm_head.weight[0, :2] = torch.tensor([math.inf, math.nan])
    assert run(mistral_pickle(model, tmp_path / "raw"), out, "--dtype", "float16") == 0
    model.lm_head.weight[0, 0] = 1e6
    large = mistral_pickle(model, tmp_path / "large")
    refused("output.weight", capsys, large, tmp_path / "none", "--dtype", "float16")
    assert contents(tmp_path) == ["large", "out", "raw"]
