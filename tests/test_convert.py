"""Claims about convert.py: every layout gives the same numbers, and no output is half-written."""

import collections
import contextlib
import copy
import ctypes
import doctest
import gc
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import layouts
import pytest
import torch
from conftest import random_model, save
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, interleaved, mistral_params, mistral_pickle, mistral_tensors
from safetensors import safe_open

import convert
from convert import Lazy, complete_or_absent, write_safetensors
from mixtral import Mixtral, MixtralConfig
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOKENS = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(0))


def run(source, out, *options):
    return convert.main([f"--input_dir={source}", f"--output_dir={out}", *options])


def loaded(directory):
    """All tensors of the safetensors files in a directory, by name."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def contents(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("write", LAYOUTS)
@pytest.mark.parametrize("block, changes", [(convert.BLOCK, {}), (100, {
    "sliding_window": None, "rope_theta": 1e6, "num_local_experts": 5, "num_experts_per_tok": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 10, "vocab_size": 41})],
    ids=["one piece", "many pieces"])
def test_every_layout_gives_the_same_float64_logits(
        write, block, changes, tmp_path, out, monkeypatch):
    monkeypatch.setattr(convert, "BLOCK", block)
    model = random_model(**changes)
    assert run(write(model, tmp_path / "raw"), out, "--max-shard-size", "9KB") == 0
    converted = Mixtral.from_pretrained(out)
    assert converted.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], weight), name
    with torch.inference_mode():
        assert (converted(TOKENS) - model(TOKENS)).abs().max() < 1e-12


@pytest.mark.parametrize("write", LAYOUTS)
def test_to_mistral_gives_the_names_rows_and_sizes_of_mistral(write, tmp_path, out):
    model = random_model(dtype=torch.bfloat16, head_dim=6)
    assert run(write(model, tmp_path / "raw"), out, "--to", "mistral",
               "--max-shard-size", "9KB") == 0
    assert contents(out) == ["consolidated.safetensors", "params.json"]
    written, wanted = loaded(out), mistral_tensors(model)
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], weight) for name, weight in wanted.items())
    assert json.loads((out / "params.json").read_text()) == mistral_params(model.config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_to_mistral_and_back_gives_the_same_bits(dtype, tmp_path, out):
    model = random_model(dtype=dtype)
    source = layouts.huggingface_sharded(model, tmp_path / "source")
    assert run(source, tmp_path / "there", "--to", "mistral") == 0
    assert run(tmp_path / "there", out) == 0
    before, after = loaded(source), loaded(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert Mixtral.from_pretrained(out).config == model.config


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
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before could hide the growth
    start, peak, stop = anonymous_memory(), 0, threading.Event()

    def sample():
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        function()
    finally:
        stop.set()
        watcher.join()
    return peak - start


def large_model():
    """A model of 126 MB, whose largest tensor takes 1 MB, or 8 MB in the fused layout."""
    return random_model(dtype=torch.float32, hidden_size=256, intermediate_size=1024,
                        num_hidden_layers=5, vocab_size=1000)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")
@pytest.mark.parametrize("write", [layouts.mistral_pickle, layouts.mistral_fused])
def test_memory_holds_one_tensor_and_not_the_checkpoint(write, tmp_path, out):
    source, codes = write(large_model(), tmp_path / "raw"), []
    grown = growth(lambda: codes.append(run(source, out, "--max-shard-size", "30MB")))
    assert codes == [0] and 0 < grown < 20_000, grown


def test_tokenizer_json_puts_bos_before_a_text_and_before_a_pair():
    """The peer test compares the ids; this is what they follow from."""
    step = convert.fast_tokenizer(Tokenizer(ROOT / "tiny"))["post_processor"]
    for kind, texts in (("single", "A"), ("pair", "AB")):
        first, *rest = step[kind]
        assert step["special_tokens"][first["SpecialToken"]["id"]]["ids"] == [1]
        assert "".join(part["Sequence"]["id"] for part in rest) == texts


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
def test_regroup_moves_each_row_as_a_loop_over_rows_does_and_back(heads, half, D):
    rows = torch.arange(heads * 2 * half * D).view(heads * 2 * half, D)
    mistral = interleaved(rows, heads)
    assert torch.equal(convert.regroup(mistral, heads, columns=2), rows)
    assert torch.equal(convert.regroup(rows, heads, columns=half), mistral)


def test_rotating_neighbours_gives_the_scores_of_rotating_halves_of_regrouped_rows():
    """This is why rows are regrouped. Both rotations are written out from their definitions."""
    torch.manual_seed(0)
    q, k, d = *torch.randn(2, 8, dtype=torch.float64), 8
    angles = [[position * 1e4 ** (-2 * i / d) for i in range(d // 2)] for position in (5, 3)]

    def score(pairs):
        turned = []
        for x, row in zip((q, k), angles, strict=True):
            y = x.clone()
            for (a, b), angle in zip(pairs, row, strict=True):
                y[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
                y[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
            turned.append(y)
        return turned[0] @ turned[1]

    neighbours = score([(2 * i, 2 * i + 1) for i in range(4)])
    q, k = (convert.regroup(x[:, None], heads=1, columns=2)[:, 0] for x in (q, k))
    assert abs(neighbours - score([(i, i + 4) for i in range(4)])) < 1e-14


def test_the_examples_in_docstrings_hold():
    failed, tried = doctest.testmod(convert)
    assert failed == 0 and tried >= 6


@pytest.mark.parametrize("config, total, active, tensors", [
    (MixtralConfig(), 46_702_792_704, 12_879_925_248, 995),
    (MixtralConfig(hidden_size=6144, num_hidden_layers=56, num_attention_heads=48,
                   intermediate_size=16384), 140_620_634_112, 39_152_031_744, 1739)])
def test_the_parameters_of_the_released_models_are_counted(config, total, active, tensors, capsys):
    checkpoint = convert.Checkpoint(convert.MISTRAL, config, dict.fromkeys(range(tensors)),
                                    torch.bfloat16)
    plan = convert.output_tensors(checkpoint, convert.HUGGINGFACE)
    files = convert.shards(plan, convert.HUGGINGFACE, 4 * 10**9)
    assert [name for group in files.values() for name in group] == list(plan)
    assert len(plan) == tensors and sum(tensor.nbytes for tensor in plan.values()) == 2 * total
    convert.announce(Path("raw"), Path("/out"), checkpoint, files)
    printed = capsys.readouterr().out
    assert f"{tensors} tensors; {total:,} parameters, {active:,} used per token" in printed
    assert f"{convert.human_size(2 * total)} of torch.bfloat16 to write" in printed


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


def test_shards_stay_under_their_limit_and_are_indexed(tmp_path, out):
    model = random_model(dtype=torch.float32)
    assert run(mistral_pickle(model, tmp_path / "raw"), out, "--max-shard-size", "20KB") == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in loaded(out).values())
    assert set(index["weight_map"]) == set(loaded(out))
    for path in out.glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 20_000
            assert {index["weight_map"][name] for name in file.keys()} == {path.name}


def test_a_dtype_is_converted_and_an_absent_rope_theta_is_a_million(tmp_path, out):
    model = random_model(rope_theta=1e6, dtype=torch.float32)
    source = mistral_pickle(model, tmp_path / "raw")
    path = source / "params.json"
    path.write_text(json.dumps({name: value for name, value in mistral_params(model.config).items()
                                if name != "rope_theta"}))
    assert run(source, out, "--dtype", "bfloat16") == 0
    assert Mixtral.from_pretrained(out).config.rope_theta == 1e6
    for name, weight in loaded(out).items():
        assert torch.equal(weight, model.state_dict()[name].bfloat16())


@pytest.mark.parametrize("text, window", [("4096", 4096), ("None", None), ("null", None), (7, 7),
                                          (None, None), (0, None)])
def test_a_window_may_be_text(text, window, tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(
        mistral_params(MixtralConfig()) | {"sliding_window": text}))
    assert convert.read_params(tmp_path / "params.json").sliding_window == window


def test_token_ids_in_params_json_are_kept_even_if_zero(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(
        mistral_params(MixtralConfig()) | {"bos_token_id": 0, "eos_token_id": 5}))
    config = convert.read_params(tmp_path / "params.json")
    assert (config.bos_token_id, config.eos_token_id) == (0, 5)


@pytest.mark.parametrize("dim, said, context", [(4096, None, 32768), (6144, None, 65536),
                                                (6144, 1024, 1024), (2048, None, 32768)])
def test_the_context_length_is_that_of_the_released_model_unless_params_json_has_it(
        dim, said, context, tmp_path):
    raw = mistral_params(MixtralConfig()) | {"dim": dim, "max_seq_len": said, "head_dim": 128}
    (tmp_path / "params.json").write_text(json.dumps(raw))
    config = convert.read_params(tmp_path / "params.json")
    assert config.max_position_embeddings == context
    assert convert.params_from_config(config).get("max_seq_len") == said


def test_a_tensor_of_a_pickle_is_read_from_its_place_in_a_shared_storage(tmp_path, out):
    model = random_model(dtype=torch.float32)
    source, tensors = mistral_pickle(model, tmp_path / "raw"), mistral_tensors(model)
    both = torch.cat([tensors["tok_embeddings.weight"], tensors["output.weight"]])
    tensors["tok_embeddings.weight"], tensors["output.weight"] = both.chunk(2)
    torch.save(tensors, source / "consolidated.00.pth")
    assert run(source, out) == 0
    assert torch.equal(loaded(out)["lm_head.weight"], model.lm_head.weight)


# ------------------------------------------------------------------ the tokenizer

TEXTS = ["", "Hello my name is", "My favourite condiment is ", "This is 🦙.cpp", "a\nb", "1234",
         " " * 16, "  two  and   three    spaces", "\t\ttabs\r\n", "ünïcödé ▁ 日本語 naïve"]


def test_auto_tokenizer_reads_the_output_and_gives_the_same_ids(tmp_path, out):
    transformers = pytest.importorskip("transformers")
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    for number, name in enumerate(("tokenizer.model.v1",
                                   "mistral_instruct_tokenizer_240216.model.v2")):
        ours = Tokenizer(data / name)
        model = random_model(vocab_size=ours.vocab_size, dtype=torch.float32)
        source = mistral_pickle(model, tmp_path / f"raw{number}")
        shutil.copy(data / name, source / "tokenizer.model")
        assert run(source, out / str(number)) == 0
        theirs = transformers.AutoTokenizer.from_pretrained(out / str(number))
        for text in TEXTS:
            assert theirs(text).input_ids == ours.encode(text), text
            assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(
                ours.encode(text)), text
        assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


def test_every_split_of_a_piece_into_two_pieces_is_a_merge_and_better_scores_come_first():
    t = Tokenizer(ROOT / "tiny")
    found = [tuple(merge.split(" ")) for merge in convert.merges(t)]
    assert set(found) == {(a, b) for piece in t.scores for n in range(1, len(piece))
                          if (a := piece[:n]) in t.scores and (b := piece[n:]) in t.scores}
    scores = [t.scores[a + b] for a, b in found]
    assert scores == sorted(scores, reverse=True)


def test_merges_of_equal_score_are_in_the_order_of_ids():
    t = SimpleNamespace(scores={"a": -8, "b": -9, "aba": -1, "ab": -1, "ba": 0},
                        ids={"ba": 4, "aba": 3, "ab": 2, "b": 1, "a": 0})
    assert convert.merges(t) == ["b a", "a b", "a ba", "ab a"]


def test_files_beside_the_weights_are_copied_and_a_tokenizer_with_a_version_is_found(
        tmp_path, out):
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


# ------------------------------------------------------------------ write_safetensors

DTYPES = list(convert.WRITABLE.values())


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3),
                          st.booleans()), max_size=6), st.randoms(use_true_random=False))
def test_what_is_written_is_what_the_library_reads_aligned(tmp_path_factory, specs, randoms):
    path, tensors = tmp_path_factory.getbasetemp() / "written", {}
    for n, (dtype, shape, _) in enumerate(specs):
        numbers = [randoms.randrange(256) for _ in range(math.prod(shape))]
        tensors[f"tensor {n}"] = torch.tensor(numbers, dtype=dtype).view(shape)

    def maybe_lazy(tensor, lazy):
        pieces = lambda: tensor.flatten().split(2)  # noqa: E731
        return Lazy(tuple(tensor.shape), tensor.dtype, pieces) if lazy else tensor

    given_tensors = {name: maybe_lazy(tensor, lazy) for (name, tensor), (*_, lazy)
                     in zip(tensors.items(), specs, strict=True)}
    write_safetensors(path, given_tensors, {"key": "välue"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"key": "välue"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0
               for name, tensor in tensors.items())


def test_the_order_of_tensors_is_kept_where_alignment_allows_it(tmp_path):
    def order(**tensors):
        write_safetensors(tmp_path / "file", tensors)
        text = (tmp_path / "file").read_bytes()[8:].split(b"}}")[0].decode()
        return re.findall(r'"(\w)":', text)

    packed, scale = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.bfloat16)
    assert order(a=packed, b=scale, c=packed) == ["a", "b", "c"]
    assert order(a=scale[:1], b=packed, c=scale) == ["b", "a", "c"]


@pytest.mark.parametrize("tensor, words", [
    (torch.ones(2, 3).T, "x: is not contiguous"),
    (torch.ones(2, device="meta"), "x: is not contiguous torch.float32 in CPU memory"),
    (torch.ones(2, dtype=torch.complex64), "x: cannot write torch.complex64"),
    (Lazy((2, 2), torch.float32, lambda: [torch.ones(2)]), "x: wanted 16 bytes, got 8"),
    (Lazy((2,), torch.float32, lambda: [torch.ones(2)] * 2), "x: wanted 8 bytes, got 16"),
    (Lazy((2,), torch.float32, lambda: [torch.ones(2).int()]), "x: is not contiguous torch"),
    (Lazy((2, 3), torch.float32, lambda: [torch.ones(3, 2).T]), "x: is not contiguous"),
    (Lazy((2,), torch.complex64, None), "x: cannot write torch.complex64")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_a_tensor_that_would_be_written_wrongly_is_refused_by_name(tensor, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)):
        write_safetensors(tmp_path / "file", {"before": torch.ones(1), "x": tensor})
    assert not contents(tmp_path)


# ------------------------------------------------------------------ complete_or_absent


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"),
                                   ValueError("any other")])
@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("existing", [False, True])
def test_an_output_is_complete_or_as_it_was(directory, existing, error, tmp_path):
    def write(path, text):
        (path / "file" if directory else path).write_text(text)

    place = tmp_path / "place"
    if existing:
        with complete_or_absent(place, directory) as part:
            write(part, "old")
    before = contents(tmp_path)
    with pytest.raises((KeyboardInterrupt, ValueError)) as raised:
        with complete_or_absent(place, directory) as part:
            write(part, "half")
            raise error
    if isinstance(error, OSError):
        assert str(raised.value) == f"{place}: not written: No space left on device"
    assert contents(tmp_path) == before == ["place"] * existing
    if existing:
        assert (place / "file" if directory else place).read_text() == "old"
    with complete_or_absent(place, directory) as part:
        write(part, "new")
    assert contents(tmp_path) == ["place"]
    assert (place / "file" if directory else place).read_text() == "new"


def test_a_file_gets_the_mode_that_the_umask_gives_others(tmp_path):
    before = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "a", {"x": torch.arange(3)})
        (tmp_path / "b").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("directory", [False, True])
def test_the_target_of_a_link_is_replaced_and_the_link_is_kept(directory, tmp_path):
    place, link = tmp_path / "place", tmp_path / "link"
    link.symlink_to("place")
    for _ in range(2):
        with complete_or_absent(link, directory) as part:
            if not directory:
                part.write_text("new")
        assert contents(tmp_path) == ["link", "place"]
        assert link.is_symlink() and not place.is_symlink()
        assert place.is_dir() == directory


def test_a_pipe_a_device_and_the_wrong_kind_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, directory in [
            ("pipe", False), ("pipe", True), ("directory", False), (".", False), ("file", True),
            ("file/x", False), ("file/x", True), ("absent/x", False), ("/dev/null", False),
            ("/dev/null", True)]:
        with pytest.raises(ValueError, match="not written"):
            with complete_or_absent(tmp_path / name, directory):
                pytest.fail("the work has begun")
    assert (tmp_path / "pipe").is_fifo() and not Path("/dev/null").is_file()
    assert contents(tmp_path) == ["directory", "file", "pipe"]


def test_only_what_is_replaced_is_touched(tmp_path):
    (tmp_path / ".file.old").write_text("someone else's")
    with complete_or_absent(tmp_path / "file") as part:
        part.touch()
    assert contents(tmp_path) == [".file.old", "file"]


# ------------------------------------------------------------------ the program


def test_overwrite_replaces_a_checkpoint_when_the_new_one_is_complete(
        tmp_path, out, monkeypatch, capsys):
    old, new = (random_model(seed, torch.float32) for seed in (1, 2))
    assert run(mistral_pickle(old, tmp_path / "1"), out, "--max-shard-size", "9KB") == 0
    source, real = layouts.mistral_fused(new, tmp_path / "2"), convert.write_safetensors

    def full(*arguments):
        real(*arguments)
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_safetensors", full)
        refused("No space left on device", capsys, source, out, "--overwrite")
    assert torch.equal(loaded(out)["model.norm.weight"], old.model.norm.weight)
    move = Path.rename

    def stuck(path, target):
        if path.name.endswith(".part"):
            raise OSError(5, "Input/output error", str(path))
        return move(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stuck)
        refused("Input/output error", capsys, source, out, "--overwrite")
    assert torch.equal(loaded(out)["model.norm.weight"], old.model.norm.weight)
    assert run(source, out, "--overwrite") == 0
    assert torch.equal(loaded(out)["model.norm.weight"], new.model.norm.weight)
    assert contents(tmp_path) == ["1", "2", "out"]
    assert contents(out) == ["config.json", "generation_config.json", "model.safetensors"]


DYING = """
import os, signal, sys
import convert
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have ignored it
real = convert.write_safetensors
def dying(*arguments):
    real(*arguments)
    os.kill(os.getpid(), getattr(signal, sys.argv.pop(1)))
convert.write_safetensors = dying
sys.exit(convert.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("name, code", [("SIGKILL", -signal.SIGKILL), ("SIGINT", 130)])
def test_a_kill_in_the_middle_leaves_nothing_that_looks_complete(name, code, tmp_path, out):
    source = mistral_pickle(random_model(dtype=torch.float32), tmp_path / "raw")
    options = ["--input-dir", source, "--output-dir", out, "--max-shard-size", "9KB"]
    done = subprocess.run([sys.executable, "-c", DYING, name, *options], cwd=ROOT, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert contents(tmp_path) == ([".out.part", "raw"] if code < 0 else ["raw"])
    assert run(source, out, "--max-shard-size", "9KB") == 0
    assert contents(tmp_path) == ["out", "raw"]
    assert Mixtral.from_pretrained(out)


def test_the_last_line_is_a_command_that_runs(tmp_path, capsys):
    source = save(Mixtral.from_pretrained(ROOT / "tiny"), tmp_path / "raw")
    shutil.copy(ROOT / "tiny" / "tokenizer.model", source)
    assert run(source, tmp_path / "a model") == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert command == f"next: python generate.py --model '{tmp_path}/a model' --prompt \"...\""
    done = subprocess.run(
        [sys.executable, ROOT / "generate.py", "--model", tmp_path / "a model", "--prompt",
         "Once upon a time", "--max-new-tokens", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("Once upon a time")


@pytest.mark.parametrize("name, quoted", [("-hf", "./-hf"), ("$(x)", "'$(x)'"), ("a b", "'a b'")])
def test_the_directory_in_the_last_line_is_quoted(name, quoted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = save(random_model(dtype=torch.float32), tmp_path / "raw")
    assert run(source, name) == 0
    assert f"--model {quoted} --prompt" in capsys.readouterr().out
    assert run(source, f"{name}.", "--to", "mistral") == 0
    assert "to Mistral's own code" in capsys.readouterr().out


def test_progress_is_a_line_every_ten_seconds_and_at_the_end(monkeypatch, capsys):
    clock = iter([0, 3, 9, 40, 43, 44])
    monkeypatch.setattr(convert.time, "monotonic", lambda: next(clock))
    progress = convert.Progress(5000)
    for _ in range(5):
        progress.add(1000)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "3.0 KB of 5.0 KB, 75 B/s, 0 min 27 s left"
    assert last == "5.0 KB of 5.0 KB, 114 B/s, 0 min 00 s left"


def test_progress_reaches_the_total_that_was_announced(tmp_path, out, capsys):
    model = random_model(dtype=torch.float32)
    assert run(mistral_pickle(model, tmp_path / "raw"), out, "--max-shard-size", "9KB") == 0
    size = convert.human_size(sum(weight.nbytes for weight in model.state_dict().values()))
    printed = capsys.readouterr().out
    assert f"{size} of torch.float32 to write" in printed and f"{size} of {size}, " in printed


def test_the_conversion_continues_if_nobody_reads_its_output(tmp_path, out, monkeypatch, capsys):
    source = mistral_pickle(random_model(dtype=torch.float32), tmp_path / "raw")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert run(source, out) == 0
    assert Mixtral.from_pretrained(out) and not capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_that_cannot_be_printed_ends_in_one_line(tmp_path, out, monkeypatch, capsys):
    source = mistral_pickle(random_model(dtype=torch.float32), tmp_path / "raw")
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert run(source, out) == 1
    assert capsys.readouterr().err == "convert.py: standard output: No space left on device\n"
    assert contents(tmp_path) == ["raw"]


# ------------------------------------------------------------------ refusals


def refused(words, capsys, *call):
    capsys.readouterr()
    assert run(*call) == 1
    error = capsys.readouterr().err
    assert error.startswith("convert.py: ") and error.count("\n") == 1
    for phrase in [words] if isinstance(words, str) else words:
        assert phrase in error


def read_pickle(source):
    return torch.load(source / "consolidated.00.pth", weights_only=True)


def write_pickle(source, content, n=0):
    torch.save(content, source / f"consolidated.{n:02}.pth")


def other_tensors(source):
    tensors = read_pickle(source)
    del tensors["norm.weight"], tensors["layers.1.attention.wq.weight"]
    tensors["rope.freqs"] = tensors["layers.9.ffn_norm.weight"] = torch.ones(2)
    tensors["output.weight"] = tensors["output.weight"].T.contiguous()
    tensors["layers.0.ffn_norm.weight"] = torch.ones(24, dtype=torch.int8)
    tensors["layers.1.ffn_norm.weight"] = torch.ones(48)[::2]
    write_pickle(source, tensors)


def many_missing(source):
    write_pickle(source, {"norm.weight": read_pickle(source)["norm.weight"]})


def repeated_names(source):
    tensors = read_pickle(source)
    write_pickle(source, {name: tensors[name] for name in ("norm.weight", "output.weight")}, 1)


def truncated(source):
    whole = (source / "consolidated.00.pth").read_bytes()
    (source / "consolidated.00.pth").write_bytes(whole[:-1000])
    (source / "consolidated.01.pth").write_bytes(whole[:5000])


def truncated_safetensors(source):
    path = source / "consolidated.safetensors"
    write_safetensors(path, read_pickle(source))
    path.write_bytes(path.read_bytes()[:-10])


def split(source):
    whole = source / "consolidated.00.pth"
    content, size = whole.read_bytes(), whole.stat().st_size // 10
    whole.unlink()
    for n in range(11):
        (source / f"{whole.name}-split{n}").write_bytes(content[n * size:(n + 1) * size])


def truncated_part(source):
    split(source)
    path = source / "consolidated.00.pth-split4"
    path.write_bytes(path.read_bytes()[:-100])


def missing_parts(source):
    split(source)
    for n in (0, 3):
        (source / f"consolidated.00.pth-split{n}").unlink()


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.path}",)


def code_in_pickle(source):
    Evil.path = source / "ran"
    write_pickle(source, {"norm.weight": Evil()})


def code_in_old_pickle(source):
    Evil.path = source / "ran"
    (source / "consolidated.00.pth").write_bytes(pickle.dumps(Evil()))


def repacked(source, compression=zipfile.ZIP_STORED, **changes):
    """The same zip archive written by Python, with other content in some records."""
    path = source / "consolidated.00.pth"
    archive = zipfile.ZipFile(path)
    with zipfile.ZipFile(source / "repacked", "w", compression) as file:
        for entry in archive.infolist():
            name = entry.filename.rpartition("/")[2]
            file.writestr(entry.filename, changes.get(name, archive.read(entry)))
    (source / "repacked").rename(path)


def compressed(source):
    repacked(source, zipfile.ZIP_DEFLATED)


def big_endian(source):
    repacked(source, byteorder=b"big")


def index_outside(source):
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {
        "a": "../elsewhere.bin", "b": "/etc/passwd"}}))


def index_absent(source):
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        "a": "model-1.safetensors", "b": "model-2.safetensors"}}))


def empty_index(source):
    (source / "model.safetensors.index.json").write_text("{}")


def no_weights(source):
    (source / "consolidated.00.pth").unlink()


def other_model(source):
    write_pickle(source, {"transformer.h.0.weight": torch.ones(2)})


def a_list(source):
    write_pickle(source, [torch.ones(2)])


def no_params(source):
    (source / "params.json").unlink()


def half_params(source):
    (source / "params.json").write_text('{"dim": 24, "n_layers": 2, "moe": {"num_experts": 8}}')


def change_params(source, **changes):
    path = source / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def odd_window(source):
    change_params(source, sliding_window="wide")


def zero_layers(source):
    change_params(source, n_layers=0)


def odd_bos(source):
    change_params(source, bos_token_id=-1)


def mixed_dtypes(source):
    tensors = read_pickle(source)
    tensors["norm.weight"] = tensors["norm.weight"].bfloat16()
    write_pickle(source, tensors)


def foreign_tokenizer(source):
    shutil.copy(ROOT / "tiny" / "tokenizer.model", source)


def broken_tokenizer(source):
    (source / "tokenizer.model").write_bytes(b"no tokenizer")


@pytest.mark.parametrize("spoil, words", [
    (other_tensors, [
        "missing norm.weight", "missing layers.1.attention.wq.weight", "unknown rope.freqs",
        "unknown layers.9.ffn_norm.weight", "output.weight has shape [24, 37], not [37, 24]",
        "layers.0.ffn_norm.weight is torch.int8", "layers.1.ffn_norm.weight is Tensor, not a c"]),
    (many_missing, ["missing tok_embeddings.weight", "and 44 more problems"]),
    (repeated_names, ["norm.weight is in both consolidated.00.pth and consolidated.01.pth",
                      "output.weight is in both"]),
    (truncated, ["consolidated.00.pth: incomplete or damaged",
                 "consolidated.01.pth: incomplete or damaged"]),
    (truncated_safetensors, ["consolidated.safetensors: incomplete or damaged"]),
    (truncated_part, ["consolidated.00.pth-split0: incomplete or damaged"]),
    (missing_parts, ["missing consolidated.00.pth-split0; missing consolidated.00.pth-split3"]),
    (code_in_pickle, ["consolidated.00.pth: refused", "posix.system"]),
    (code_in_old_pickle, ["consolidated.00.pth: incomplete or damaged", "not a zip file"]),
    (compressed, ["consolidated.00.pth: tok_embeddings.weight is not where torch.save puts"]),
    (big_endian, ["consolidated.00.pth: big-endian"]),
    (index_outside, ["raw: missing elsewhere.bin; missing passwd"]),
    (index_absent, ["missing model-1.safetensors; missing model-2.safetensors"]),
    (empty_index, ["weight_map"]),
    (no_weights, ["no weights here"]),
    (other_model, ["no tensor has a name that Mixtral uses", "transformer.h.0.weight"]),
    (a_list, ["wanted a dict of tensors, got list"]),
    (no_params, ["params.json: not readable"]),
    (half_params, ["missing hidden_dim, n_heads, n_kv_heads, norm_eps, vocab_size"]),
    (odd_window, ["sliding_window", "'wide'"]),
    (zero_layers, ["num_hidden_layers", "got 0"]),
    (odd_bos, ["bos_token_id", "got -1"]),
    (mixed_dtypes, ["dtypes torch.bfloat16 and torch.float32", "--dtype"]),
    (foreign_tokenizer, ["2048 pieces", "only 37"]),
    (broken_tokenizer, ["raw/tokenizer.model"])], ids=lambda x: getattr(x, "__name__", ""))
def test_a_spoilt_input_is_refused_in_one_line_that_names_the_problems(
        spoil, words, tmp_path, out, capsys):
    source = mistral_pickle(random_model(dtype=torch.float32), tmp_path / "raw")
    spoil(source)
    refused(words, capsys, source, out)
    assert contents(tmp_path) == ["raw"]
    assert not (source / "ran").exists()


def of_an_older_version(path):
    """A file as torch.save wrote it when PyTorch still looked up where each record begins."""
    path.write_bytes(path.read_bytes().replace(b".format_version", b".nothing_here__"))


def test_a_repacked_file_of_torch_save_is_read_if_its_records_can_be_found(
        tmp_path, out, capsys):
    """PyTorch computes the offsets of the records, unless the file is of an older version."""
    model = random_model(dtype=torch.float32)
    source = mistral_pickle(model, tmp_path / "raw")
    repacked(source)
    refused("is not where torch.save puts it", capsys, source, out)
    of_an_older_version(source / "consolidated.00.pth")
    assert run(source, out) == 0
    assert all(torch.equal(weight, model.state_dict()[name])
               for name, weight in loaded(out).items())


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("field", [26, 28])  # the lengths of the name and of the extra field
def test_no_damaged_length_in_a_zip_archive_moves_the_weights(
        field, older, tmp_path, out, capsys):
    """No checksum protects these lengths, from which the offset of a record is computed."""
    model = random_model(dtype=torch.float32, num_hidden_layers=1, num_local_experts=1,
                         num_experts_per_tok=1)
    source = mistral_pickle(model, tmp_path / "raw")
    path = source / "consolidated.00.pth"
    if older:
        of_an_older_version(path)
    whole = path.read_bytes()
    for entry in zipfile.ZipFile(path).infolist()[1:]:
        damaged = bytearray(whole)
        damaged[entry.header_offset + field] ^= 4
        path.write_bytes(damaged)
        if run(source, out, "--overwrite"):
            assert "damaged" in capsys.readouterr().err
        else:
            assert all(torch.equal(weight, model.state_dict()[name])
                       for name, weight in loaded(out).items()), entry.filename
            assert not older or "/data/" not in entry.filename


def test_places_where_writing_would_do_harm_are_refused(tmp_path, out, capsys):
    source = mistral_pickle(random_model(dtype=torch.float32), tmp_path / "raw")
    before = contents(source)
    refused("no such directory", capsys, tmp_path / "absent", out)
    refused("neither be nor contain the input", capsys, source, source)
    refused("neither be nor contain the input", capsys, source, source / ".." / "raw",
            "--overwrite")
    refused("neither be nor contain the input", capsys, source, tmp_path, "--overwrite")
    (tmp_path / "link").symlink_to(source)
    refused("neither be nor contain the input", capsys, source, tmp_path / "link", "--overwrite")
    source.rename(tmp_path / ".out.part")  # the temporary directory, which would be removed
    refused("neither be nor contain the input", capsys, tmp_path / ".out.part", out)
    (tmp_path / ".out.part").rename(source)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused("is not empty; choose another directory or add --overwrite", capsys, source, out)
    refused("--overwrite replaces only a directory that holds a checkpoint", capsys, source, out,
            "--overwrite")
    refused("is not a directory", capsys, source, out / "thesis.txt")
    assert (out / "thesis.txt").read_text() == "years of work" and contents(source) == before


def test_a_disk_that_is_too_small_is_noticed_before_the_start(
        tmp_path, out, monkeypatch, capsys):
    source = mistral_pickle(random_model(dtype=torch.float32), tmp_path / "raw")
    usage = collections.namedtuple("usage", "total used free")(10**6, 10**6 - 9999, 9999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("the disk has 10.0 KB free", capsys, source, out)
    assert contents(tmp_path) == ["raw"]


@pytest.mark.parametrize("limit", [500, 3000, 20_000])
def test_a_file_that_cannot_be_written_ends_in_one_line(limit, tmp_path, out, capsys):
    """The limit on the size of a file stands for a full disk. It meets small and large files."""
    source = mistral_pickle(random_model(dtype=torch.float32), tmp_path / "raw")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        refused("not written: File too large", capsys, source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(tmp_path) == ["raw"]


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path, out, capsys):
    model = random_model(dtype=torch.float32)
    model.lm_head.weight[0, 0] = 1e6
    source = mistral_pickle(model, tmp_path / "raw")
    refused("output.weight: holds numbers too large for torch.float16", capsys, source, out,
            "--dtype", "float16")
    assert contents(tmp_path) == ["raw"]


@pytest.mark.parametrize("options", [
    ["--max-shard-size", "huge"], ["--max-shard-size", "0"], ["--to", "onnx"],
    ["--dtype", "int8"], ["--what"]])
def test_bad_arguments_end_with_exit_code_2(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tmp_path / "out", *options)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("convert.py: error: ")


@pytest.mark.parametrize("text, size", [("256MB", 256e6), ("4GB", 4e9), ("1.5GiB", 1.5 * 2**30),
                                        ("1000", 1000), ("10 kb", 10_000), ("3B", 3)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert convert.size_in_bytes(text) == size


# ------------------------------------------------------------------ random damage

ODD_VALUES = [2**70, -1, 0, 1, 3, 10**9, 2**31, 1.5, 1e300, math.inf, math.nan, "", "x", "\ud800",
              "a\nb", "9" * 5000, True, None, [], {}, [[1]], {"a": {}}, "../x", "\0"]
ODD_TEXTS = [b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"a": NaN}', b'{"a":' * 100_000,
             b"[" * 990 + b"]" * 990, b'{"a": ' + b"9" * 5000 + b"}", b'{"dim": 8, "dim": 9}',
             b'{"weight_map": {"a": "' + b"x" * 5000 + b'"}}']


def damage_bytes(path, r):
    """Change, insert or delete some bytes, more often near the two ends than in the middle."""
    content = bytearray(path.read_bytes())
    length = len(content)
    at = r.choice([r.randrange(min(length, 400)), r.randrange(max(0, length - 4000), length),
                   r.randrange(length)])
    size = r.choice([1, 1, 2, 8, 100])
    new = r.choice([bytes([content[at] ^ 1 << r.randrange(8)]), r.randbytes(size), b"\xff" * size,
                    b"\0" * size])
    kind = r.choice(["change", "change", "insert", "delete", "truncate"])
    content[at:{"change": at + len(new), "insert": at, "delete": at + size}.get(kind)] = (
        new if kind in ("change", "insert") else b"")
    path.write_bytes(content)


def damage_object(content, r):
    """Change, remove or add something at a random depth of an object from JSON."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = r.choice(keys) if keys else None
        if key is None or not isinstance(content[key], (dict, list)) or r.random() < 0.2:
            break
        content = content[key]
    kind = r.choice(["change", "change", "remove", "add"])
    value = copy.deepcopy(r.choice(ODD_VALUES))
    if kind == "add" or key is None:
        if isinstance(content, dict):
            content[r.choice(["a", "", "\ud800", "a\nb", *map(str, keys)])] = value
        else:
            content.append(value)
    elif kind == "remove":
        del content[key]
    else:
        content[key] = value


def damage_json(path, r):
    content = json.loads(path.read_text())
    damage_object(content, r)
    path.write_bytes(r.choice(ODD_TEXTS) if r.random() < 0.2 else json.dumps(content).encode())


def damage_safetensors(path, r):
    """Change the header as an object, or its length."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    damage_object(header, r)
    text = json.dumps(header).encode()
    text = text if r.random() < 0.9 else r.choice(ODD_TEXTS)
    length = len(text) if r.random() < 0.8 else r.choice([0, 1, 2**60, 2**64 - 1, len(text) + 8])
    path.write_bytes(length.to_bytes(8, "little") + text + content[8 + length:])


ODD_THINGS = [lambda x: 1, lambda x: None, lambda x: "text", lambda x: {"a": x}, lambda x: [x],
              lambda x: x.T, lambda x: x.to_sparse(), lambda x: x[:0], lambda x: x[0],
              lambda x: x.int(), lambda x: x.double(), lambda x: x.to(torch.complex64),
              lambda x: x.to(torch.float8_e5m2), lambda x: x.new_empty(()),
              lambda x: x.expand(10**9, *x.shape), lambda x: torch.nn.Parameter(x),
              lambda x: x.to("meta"), lambda x: Evil()]


def damage_pickle(path, r):
    """Change, remove or add an entry of the dict that was saved."""
    content = torch.load(path, weights_only=True)
    name = r.choice(list(content))
    tensor = content.pop(name) if r.random() < 0.8 else content[name]
    name = r.choice([name, name, "a", "", 1, None, (1, 2), "a\nb", "output.weight"])
    content[name] = r.choice(ODD_THINGS)(tensor)
    torch.save(r.choice([content, content, content, [content], tensor]), path)


def damage(directory, r):
    """Damage one random file of a checkpoint."""
    path = r.choice(sorted(directory.iterdir()))
    kinds = {".json": damage_json, ".safetensors": damage_safetensors, ".pt": damage_pickle,
             ".pth": damage_pickle, ".bin": damage_pickle}
    r.choice([damage_bytes, kinds.get(path.suffix, damage_bytes)])(path, r)


def fuzz(write, cases, place, capsys):
    """Damage a checkpoint again and again. Whatever happens, it is converted or refused."""
    Evil.path = place / "ran"
    model = random_model(dtype=torch.float32, vocab_size=11, hidden_size=8, intermediate_size=6,
                         num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                         num_local_experts=2)
    write(model, place / "whole")
    for n in cases:
        r, source, out = random.Random(f"{write.__name__} {n}"), place / "raw", place / "out"
        shutil.copytree(place / "whole", source)
        damage(source, r)
        options = r.choice([[], [], ["--dtype", "float16"], ["--to", "mistral"]])
        capsys.readouterr()
        code, error = run(source, out, *options), capsys.readouterr().err
        assert code == 0 or error.startswith("convert.py: ") and error.count("\n") == 1, (n, error)
        assert (code == 0) == out.exists() == (not error), (n, error)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(out)
        shutil.rmtree(source)
        assert contents(place) == ["whole"], n


@pytest.mark.parametrize("write", LAYOUTS)
def test_a_damaged_checkpoint_is_converted_or_refused_in_one_line(write, tmp_path, capsys):
    fuzz(write, range(20), tmp_path, capsys)
