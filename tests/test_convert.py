"""Claims about convert.py: every layout in, the same numbers out, and nothing half-written."""

import collections
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import random_model, save, save_file
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import convert
from mixtral import Mixtral, MixtralConfig
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXT = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(0))
RAW = {"model.embed_tokens": "tok_embeddings", "self_attn.q_proj": "attention.wq",
       "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
       "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm",
       "post_attention_layernorm": "ffn_norm", "block_sparse_moe": "feed_forward",
       "model.norm": "norm", "lm_head": "output", "model.layers": "layers"}


def neighbours(weight, heads):
    """A head's rows i and i + d/2 side by side, moved one at a time: Mistral's order."""
    d, out = len(weight) // heads, weight.clone()
    for head in range(heads):
        for i in range(d // 2):
            out[head * d + 2 * i] = weight[head * d + i]
            out[head * d + 2 * i + 1] = weight[head * d + d // 2 + i]
    return out


def raw(model):
    """The tensors of a model as Mistral names and orders them."""
    c, out = model.config, {}
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight = neighbours(weight, c.num_attention_heads if "q_proj" in name
                                else c.num_key_value_heads)
        for theirs, mistrals in RAW.items():
            name = name.replace(theirs, mistrals)
        out[name] = weight
    return out


def params(c):
    return {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "head_dim": c.head_dim,
            "hidden_dim": c.intermediate_size, "n_heads": c.num_attention_heads,
            "n_kv_heads": c.num_key_value_heads, "norm_eps": c.rms_norm_eps,
            "vocab_size": c.vocab_size, "rope_theta": c.rope_theta,
            "sliding_window": c.sliding_window,
            "moe": {"num_experts_per_tok": c.num_experts_per_tok,
                    "num_experts": c.num_local_experts}}


def single_pickle(model, directory):
    directory.mkdir()
    torch.save(raw(model), directory / "consolidated.00.pth")
    (directory / "params.json").write_text(json.dumps(params(model.config)))
    return directory


def single_safetensors(model, directory):
    directory.mkdir()
    save_file(raw(model), directory / "consolidated.safetensors")
    (directory / "params.json").write_text(json.dumps(params(model.config)))
    return directory


def fused(model, directory):
    """Eight files with disjoint keys; w2's blocks stand transposed among their (E·F, D)."""
    c, files, tensors = model.config, [{} for _ in range(8)], raw(model)
    for n in range(c.num_hidden_layers):
        at = f"layers.{n}.feed_forward."
        for w in ("w1", "w2", "w3"):
            blocks = [tensors.pop(f"{at}experts.{e}.{w}.weight")
                      for e in range(c.num_local_experts)]
            tensors[f"layers.{n}.block_sparse_moe.{w}"] = torch.cat(
                [block.T if w == "w2" else block for block in blocks])
        tensors[f"layers.{n}.block_sparse_moe.gate.weight"] = tensors.pop(f"{at}gate.weight")
    for n, (name, tensor) in enumerate(tensors.items()):
        files[n % 8][name] = tensor
    directory.mkdir()
    for n, content in enumerate(files):
        torch.save(content, directory / f"consolidated.{n:02}.pt")
    (directory / "params.json").write_text(json.dumps({
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "num_local_experts": c.num_local_experts,
        "rms_norm_eps": c.rms_norm_eps, "vocab_size": c.vocab_size, "head_dim": c.head_dim,
        "rope_theta": c.rope_theta, "sliding_window": str(c.sliding_window)}))
    return directory


def split(model, directory):
    """The torrent's parts: eleven, so that -split10 must not be sorted before -split2."""
    whole = single_pickle(model, directory) / "consolidated.00.pth"
    content = whole.read_bytes()
    whole.unlink()
    size = len(content) // 10
    for n in range(11):
        (directory / f"consolidated.00.pth-split{n}").write_bytes(content[n * size:(n + 1) * size])
    return directory


def halves(model):
    tensors = list(model.state_dict().items())
    return dict(tensors[::2]), dict(tensors[1::2])


def sharded(model, directory, stem="model", suffix="safetensors", write=save_file):
    save(model, directory)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for n, part in enumerate(halves(model), 1):
        file = f"{stem}-0000{n}-of-00002.{suffix}"
        write(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def sharded_pickles(model, directory):
    return sharded(model, directory, "pytorch_model", "bin", torch.save)


def version_5(model, directory):
    """The config.json of transformers 5, which keeps rope_theta elsewhere."""
    theta = model.config.rope_theta
    save(model, directory, rope_theta=None, rope_parameters={
        "rope_theta": theta, "rope_type": "default"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["rope_theta"]
    path.write_text(json.dumps(config))
    return directory


LAYOUTS = [single_pickle, single_safetensors, fused, split, save, sharded, sharded_pickles,
           version_5]


def run(source, out, *options):
    return convert.main(["--input_dir", str(source), "--output_dir", str(out), *options])


def loaded(directory):
    """All tensors of a directory's safetensors files."""
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


@pytest.mark.parametrize("write", LAYOUTS)
@pytest.mark.parametrize("changes", [{}, {
    "sliding_window": None, "rope_theta": 1e6, "num_local_experts": 5, "num_experts_per_tok": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 10, "vocab_size": 41}])
def test_every_layout_gives_the_same_logits(write, changes, tmp_path, out):
    model = random_model(**changes)
    assert run(write(model, tmp_path / "raw"), out, "--max-shard-size", "9KB") == 0
    converted = Mixtral.from_pretrained(out)
    assert converted.lm_head.weight.dtype == torch.float64
    assert converted.config == model.config
    with torch.inference_mode():
        assert (converted(TEXT) - model(TEXT)).abs().max() < 1e-12


@pytest.mark.parametrize("write", LAYOUTS)
def test_to_mistral_gives_mistrals_names_rows_and_sizes(write, tmp_path, out):
    model = random_model(dtype=torch.bfloat16, head_dim=6)
    assert run(write(model, tmp_path / "raw"), out, "--to", "mistral",
               "--max-shard-size", "9KB") == 0
    assert contents(out) == ["consolidated.safetensors", "params.json"]
    written, wanted = loaded(out), raw(model)
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], weight) for name, weight in wanted.items())
    assert json.loads((out / "params.json").read_text()) == params(model.config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_to_mistral_and_back_is_bitwise_the_same(dtype, tmp_path, out):
    model = random_model(dtype=dtype)
    source = sharded(model, tmp_path / "source")
    assert run(source, tmp_path / "there", "--to", "mistral") == 0
    assert run(tmp_path / "there", out) == 0
    before, after = loaded(source), loaded(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert Mixtral.from_pretrained(out).config == model.config


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
def test_the_row_permutation_is_the_one_of_single_rows_and_has_its_inverse(heads, half, D):
    rows = torch.arange(heads * 2 * half * D).view(heads * 2 * half, D)
    theirs = neighbours(rows, heads)
    assert torch.equal(convert.regroup(theirs, heads, 2), rows)
    assert torch.equal(convert.regroup(rows, heads, half), theirs)


def test_neighbours_turned_together_score_as_halves_turned_together():
    """The reason for the permutation, from the two definitions of the rotation alone."""
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

    adjacent = score([(2 * i, 2 * i + 1) for i in range(4)])
    q, k = (convert.regroup(x[:, None], 1, 2)[:, 0] for x in (q, k))
    assert abs(adjacent - score([(i, i + 4) for i in range(4)])) < 1e-14


@pytest.mark.parametrize("config, total, active, tensors", [
    (MixtralConfig(), 46_702_792_704, 12_879_925_248, 995),
    (MixtralConfig(hidden_size=6144, num_hidden_layers=56, num_attention_heads=48,
                   intermediate_size=16384), 140_620_634_112, 39_152_031_744, 1739)])
def test_the_released_sizes_are_counted_before_anything_is_written(
        config, total, active, tensors, capsys):
    stored = dict.fromkeys(range(tensors))
    checkpoint = convert.Checkpoint(convert.MISTRAL, config, stored, torch.bfloat16)
    files = convert.shards(checkpoint, convert.HUGGINGFACE, 4 * 10**9)
    assert sum(map(len, files.values())) == tensors
    assert all(sum(size for _, size in group) <= 4e9 for group in files.values())
    try:
        convert.announce(Path("raw"), Path("/out"), checkpoint, files)
    except ValueError as error:
        assert "free" in str(error)
    told = capsys.readouterr().out
    assert f"{total:,} parameters, {active:,} used for a token" in told
    assert f"{convert.amount(2 * total)} of torch.bfloat16 to write" in told


def test_shards_stay_under_their_limit_and_are_indexed(tmp_path, out):
    model = random_model(dtype=torch.float32)
    assert run(single_pickle(model, tmp_path / "raw"), out, "--max-shard-size", "20KB") == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in loaded(out).values())
    assert set(index["weight_map"]) == set(loaded(out))
    for path in out.glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 20_000
            assert {index["weight_map"][name] for name in file.keys()} == {path.name}
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # aligned for mapping


def test_a_dtype_is_converted_and_an_absent_rope_theta_is_a_million(tmp_path, out):
    model = random_model(rope_theta=1e6, dtype=torch.float32)
    source = single_pickle(model, tmp_path / "raw")
    path = source / "params.json"
    path.write_text(json.dumps({name: value for name, value in params(model.config).items()
                                if name != "rope_theta"}))
    assert run(source, out, "--dtype", "bfloat16") == 0
    assert Mixtral.from_pretrained(out).config.rope_theta == 1e6
    for name, weight in loaded(out).items():
        assert torch.equal(weight, model.state_dict()[name].bfloat16())


@pytest.mark.parametrize("text, window", [("4096", 4096), ("None", None), ("null", None), (7, 7),
                                          (None, None)])
def test_a_window_may_be_text(text, window, tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(
        params(MixtralConfig()) | {"sliding_window": text}))
    assert convert.read_params(tmp_path / "params.json").sliding_window == window


def test_a_tensor_of_a_pickle_is_read_where_it_lies_in_a_shared_storage(tmp_path, out):
    model = random_model(dtype=torch.float32)
    source, tensors = single_pickle(model, tmp_path / "raw"), raw(model)
    both = torch.cat([tensors["tok_embeddings.weight"], tensors["output.weight"]])
    tensors["tok_embeddings.weight"], tensors["output.weight"] = both.chunk(2)
    torch.save(tensors, source / "consolidated.00.pth")
    assert run(source, out) == 0
    with torch.inference_mode():
        assert torch.equal(Mixtral.from_pretrained(out)(TEXT), model(TEXT))


# Refusals: each spoils a sound directory, and the one line must hold these words.


def without(source):
    tensors = torch.load(source / "consolidated.00.pth", weights_only=True)
    del tensors["norm.weight"], tensors["layers.1.attention.wq.weight"]
    tensors["rope.freqs"] = torch.ones(2)
    tensors["layers.9.ffn_norm.weight"] = torch.ones(2)
    tensors["output.weight"] = tensors["output.weight"].T.contiguous()
    tensors["layers.0.ffn_norm.weight"] = torch.ones(24, dtype=torch.int8)
    torch.save(tensors, source / "consolidated.00.pth")


def twice(source):
    tensors = torch.load(source / "consolidated.00.pth", weights_only=True)
    torch.save({n: tensors[n] for n in ("norm.weight", "output.weight")},
               source / "consolidated.01.pth")


def cut(source):
    whole = (source / "consolidated.00.pth").read_bytes()
    (source / "consolidated.00.pth").write_bytes(whole[:-1000])
    (source / "consolidated.01.pth").write_bytes(whole[:5000])


def cut_safetensors(source):
    tensors = torch.load(source / "consolidated.00.pth", weights_only=True)
    save_file(tensors, source / "consolidated.safetensors")
    whole = (source / "consolidated.safetensors").read_bytes()
    (source / "consolidated.safetensors").write_bytes(whole[:-10])


def part_cut(source):
    for path in split_up(source):
        if path.name.endswith("split4"):
            path.write_bytes(path.read_bytes()[:-100])


def split_up(source):
    whole = source / "consolidated.00.pth"
    content, size = whole.read_bytes(), whole.stat().st_size // 10
    whole.unlink()
    for n in range(11):
        path = source / f"consolidated.00.pth-split{n}"
        path.write_bytes(content[n * size:(n + 1) * size])
        yield path


def part_missing(source):
    for path in list(split_up(source)):
        if path.name.endswith(("split0", "split3")):
            path.unlink()


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.path}",)


def evil(source):
    Evil.path = source / "ran"
    torch.save({"norm.weight": Evil()}, source / "consolidated.00.pth")


def old_pickle(source):
    Evil.path = source / "ran"
    (source / "consolidated.00.pth").write_bytes(pickle.dumps(Evil()))


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
    torch.save({"transformer.h.0.weight": torch.ones(2)}, source / "consolidated.00.pth")


def a_list(source):
    torch.save([torch.ones(2)], source / "consolidated.00.pth")


def no_params(source):
    (source / "params.json").unlink()


def half_params(source):
    (source / "params.json").write_text('{"dim": 24, "n_layers": 2, "moe": {"num_experts": 8}}')


def odd_window(source):
    path = source / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": "wide"}))


def mixed_dtypes(source):
    tensors = torch.load(source / "consolidated.00.pth", weights_only=True)
    tensors["norm.weight"] = tensors["norm.weight"].bfloat16()
    torch.save(tensors, source / "consolidated.00.pth")


def foreign_tokenizer(source):
    shutil.copy(ROOT / "tiny" / "tokenizer.model", source)


def broken_tokenizer(source):
    (source / "tokenizer.model").write_bytes(b"no tokenizer")


@pytest.mark.parametrize("spoil, words", [
    (without, ["missing norm.weight", "missing layers.1.attention.wq.weight", "unknown rope.freqs",
               "unknown layers.9.ffn_norm.weight", "output.weight has shape [24, 37], not [37, 24]",
               "layers.0.ffn_norm.weight is torch.int8"]),
    (twice, ["norm.weight is in consolidated.00.pth and in consolidated.01.pth",
             "output.weight is in"]),
    (cut, ["consolidated.00.pth: cut short", "consolidated.01.pth: cut short"]),
    (cut_safetensors, ["consolidated.safetensors: cut short"]),
    (part_cut, ["consolidated.00.pth-split0", "cut short"]),
    (part_missing, ["missing consolidated.00.pth-split0, consolidated.00.pth-split3"]),
    (evil, ["consolidated.00.pth: refused", "posix.system"]),
    (old_pickle, ["consolidated.00.pth: wanted a zip"]),
    (index_outside, ["outside its directory: ../elsewhere.bin, /etc/passwd"]),
    (index_absent, ["missing model-1.safetensors, model-2.safetensors"]),
    (empty_index, ["weight_map"]),
    (no_weights, ["no weights here"]),
    (other_model, ["no tensor has a name of Mixtral's", "transformer.h.0.weight"]),
    (a_list, ["wanted a dict of tensors, got list"]),
    (no_params, ["params.json: not readable"]),
    (half_params, ["missing hidden_dim, n_heads, n_kv_heads, norm_eps, vocab_size"]),
    (odd_window, ["sliding_window must be an integer >= 1, got 'wide'"]),
    (mixed_dtypes, ["dtypes torch.bfloat16 and torch.float32", "--dtype"]),
    (foreign_tokenizer, ["2048 pieces", "only 37"]),
    (broken_tokenizer, ["tokenizer.model"])], ids=lambda x: getattr(x, "__name__", ""))
def test_a_spoilt_input_is_refused_in_one_line_that_names_all(spoil, words, tmp_path, out, capsys):
    source = single_pickle(random_model(dtype=torch.float32), tmp_path / "raw")
    result = spoil(source)
    collections.deque(result or (), maxlen=0)
    assert run(source, out) == 1
    error = capsys.readouterr().err
    assert error.startswith("convert.py: ") and error.count("\n") == 1
    for phrase in words:
        assert phrase in error
    assert contents(tmp_path) == ["raw"]
    assert not (source / "ran").exists()


def refused(words, capsys, *call):
    assert run(*call) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_places_that_would_do_harm_are_refused(tmp_path, out, capsys):
    source = single_pickle(random_model(dtype=torch.float32), tmp_path / "raw")
    before = contents(source)
    refused("no such directory", capsys, tmp_path / "absent", out)
    refused("neither be nor hold the input", capsys, source, source)
    refused("neither be nor hold the input", capsys, source, source / ".." / "raw", "--overwrite")
    refused("neither be nor hold the input", capsys, source, tmp_path, "--overwrite")
    (tmp_path / "link").symlink_to(source)
    refused("neither be nor hold the input", capsys, source, tmp_path / "link", "--overwrite")
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused("is not empty; choose another directory or add --overwrite", capsys, source, out)
    refused("--overwrite replaces checkpoints only", capsys, source, out, "--overwrite")
    refused("is a file", capsys, source, out / "thesis.txt")
    assert (out / "thesis.txt").read_text() == "years of work" and contents(source) == before


def test_overwrite_replaces_a_checkpoint_once_the_new_one_is_complete(
        tmp_path, out, monkeypatch, capsys):
    old, new = (random_model(seed, torch.float32) for seed in (1, 2))
    assert run(single_pickle(old, tmp_path / "1"), out) == 0
    source, real = fused(new, tmp_path / "2"), convert.write_safetensors

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


def test_a_disk_too_small_is_noticed_before_the_start(tmp_path, out, monkeypatch, capsys):
    source = single_pickle(random_model(dtype=torch.float32), tmp_path / "raw")
    usage = collections.namedtuple("usage", "total used free")(10**6, 10**6 - 9999, 9999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("the disk has 10.0 KB free", capsys, source, out)
    assert not out.exists()


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path, out, capsys):
    model = random_model(dtype=torch.float32)
    model.lm_head.weight[0, 0] = 1e6
    source = single_pickle(model, tmp_path / "raw")
    refused("output.weight: too large for torch.float16", capsys, source, out, "--dtype", "float16")
    assert contents(tmp_path) == ["raw"]


DYING = """
import os, signal, sys
import convert
real = convert.write_safetensors
def dying(*arguments):
    real(*arguments)
    os.kill(os.getpid(), getattr(signal, sys.argv.pop(1)))
convert.write_safetensors = dying
sys.exit(convert.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("name, code", [("SIGKILL", -signal.SIGKILL), ("SIGINT", 130)])
def test_a_kill_in_the_middle_leaves_nothing_that_looks_finished(name, code, tmp_path, out):
    source = single_pickle(random_model(dtype=torch.float32), tmp_path / "raw")
    options = ["--input-dir", source, "--output-dir", out, "--max-shard-size", "9KB"]
    done = subprocess.run([sys.executable, "-c", DYING, name, *options], cwd=ROOT, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert not out.exists()
    assert contents(tmp_path) == ([".out.part", "raw"] if code < 0 else ["raw"])
    assert run(source, out, "--max-shard-size", "9KB") == 0
    assert contents(tmp_path) == ["out", "raw"]
    assert Mixtral.from_pretrained(out)


@pytest.mark.parametrize("options", [
    ["--max-shard-size", "huge"], ["--max-shard-size", "0"], ["--to", "onnx"],
    ["--dtype", "int4"], ["--what"]])
def test_bad_arguments_end_with_2_in_one_line(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tmp_path / "out", *options)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text, size", [("256MB", 256e6), ("4GB", 4e9), ("1.5GiB", 1.5 * 2**30),
                                        ("1000", 1000), ("10 kb", 10_000), ("3B", 3)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert convert.size_in_bytes(text) == size


def test_progress_is_one_line_on_a_terminal_and_plain_lines_elsewhere(monkeypatch, capsys):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(convert.time, "monotonic", lambda: next(clock))
    for terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda t=terminal: t, raising=False)
        progress = convert.Progress(3000)
        for _ in range(3):
            progress.add(1000)
        told = capsys.readouterr().out
        assert (told.count("\r"), told.count("\n")) == ((3, 1) if terminal else (0, 3))
        assert "1.0 KB of 3.0 KB, 25 B/s, 1 min 20 s left" in told


def test_a_finished_run_says_what_to_run_next_and_that_command_runs(tmp_path, capsys):
    source = save(Mixtral.from_pretrained(ROOT / "tiny"), tmp_path / "raw")
    shutil.copy(ROOT / "tiny" / "tokenizer.model", source)
    assert run(source, tmp_path / "a model") == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert command == (f"next: python generate.py --model '{tmp_path}/a model' --prompt \"...\"")
    done = subprocess.run(
        [sys.executable, ROOT / "generate.py", "--model", tmp_path / "a model", "--prompt",
         "Once upon a time", "--max-new-tokens", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("Once upon a time")


def anonymous(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("write", [single_pickle, fused])
def test_memory_holds_a_tensor_and_not_the_checkpoint(write, tmp_path, out):
    """Peak anonymous memory above its level at the start, of a checkpoint of 126 MB."""
    model = random_model(dtype=torch.float32, hidden_size=256, intermediate_size=1024,
                         num_hidden_layers=5, vocab_size=1000)
    source = write(model, tmp_path / "raw")
    start, peak, stop = anonymous(os.getpid()), 0, threading.Event()

    def sample():
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, anonymous(os.getpid()))

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        assert run(source, out, "--max-shard-size", "30MB") == 0
    finally:
        stop.set()
        watcher.join()
    assert peak - start < 40_000  # kB


def test_what_is_written_loads_in_transformers_and_agrees(tmp_path, out):
    transformers = pytest.importorskip("transformers")
    for number, write in enumerate(LAYOUTS):
        model = random_model(number, torch.float32)
        directory = out / write.__name__
        assert run(write(model, tmp_path / f"raw{number}"), directory,
                   "--max-shard-size", "30KB") == 0
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, dtype=torch.float32)
        assert not any(info[kind] for kind in (
            "missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.inference_mode():
            assert (theirs.eval()(TEXT).logits - model(TEXT)).abs().max() < 1e-4


TEXTS = ["", "Hello my name is", "My favourite condiment is ", "This is 🦙.cpp", "a\nb", "1234",
         " " * 16, "  two  and   three    spaces", "\t\ttabs\r\n", "ünïcödé ▁ 日本語 naïve"]


def test_auto_tokenizer_reads_the_output_and_gives_the_same_ids(tmp_path, out):
    transformers = pytest.importorskip("transformers")
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    for number, name in enumerate(("tokenizer.model.v1",
                                   "mistral_instruct_tokenizer_240216.model.v2")):
        ours = Tokenizer(data / name)
        model = random_model(vocab_size=ours.vocab_size, dtype=torch.float32)
        source = single_pickle(model, tmp_path / f"raw{number}")
        shutil.copy(data / name, source / "tokenizer.model")
        assert run(source, out / str(number)) == 0
        theirs = transformers.AutoTokenizer.from_pretrained(out / str(number))
        for text in TEXTS:
            assert theirs(text).input_ids == ours.encode(text), text
            assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(
                ours.encode(text)), text
        assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
