"""Claims about traces: they hold what the model computed, and recording changes nothing."""

import json
import math
import os
import subprocess
import sys
import tempfile
import trace
from pathlib import Path

import pytest
import reference
import torch
from conftest import random_model, save
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import mixtral
from mixtral import MixtralConfig


def stored(path):
    """The metadata and the tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}


def of_one_row(seen, row, S):
    """The quantities of one row of a batch, without the axis B."""
    found = {}
    for name, x in seen.items():
        kind = trace.axes(name)[0]
        if kind == "B":
            found[name] = x[row]
        elif kind == "N":
            found[name] = x[row * S:(row + 1) * S]
        else:
            tokens = seen[name.rpartition(".")[0] + ".tokens"]
            mine = x[tokens // S == row]
            if len(mine):
                found[name] = mine - row * S if name.endswith(".tokens") else mine
    return found


def of_some_tokens(exact, at, S, slots):
    """What a trace of a whole row says about its tokens at … at + S − 1.

    `slots` are the positions of the keys in the order of the axis T, −1 for an empty slot.
    """
    found = {}
    for name, x in exact.items():
        kind = trace.axes(name)[1 if trace.axes(name)[0] == "B" else 0]
        if kind == "H":
            keys = x[:, at:at + S, slots.clamp(min=0)]
            empty = -math.inf if name.endswith(".scores") else 0.0
            found[name] = torch.where(slots >= 0, keys, keys.new_tensor(empty))
        elif kind == "R":
            tokens = exact[name.rpartition(".")[0] + ".tokens"]
            mine = (tokens >= at) & (tokens < at + S)
            if mine.any():
                found[name] = x[mine] - at if name.endswith(".tokens") else x[mine]
        else:
            found[name] = x[at:at + S]
    return found


def assert_near(found, wanted, tolerance=1e-12):
    """The same names, and values within the tolerance of the largest number of a tensor."""
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        y = wanted[name]
        assert x.shape == y.shape and x.dtype == y.dtype, name
        if x.dtype == torch.int64:
            assert torch.equal(x, y), name
            continue
        finite = y.isfinite()
        assert torch.equal(x[~finite], y[~finite]), name  # scores of masked keys
        difference = (x - y)[finite].abs().max()
        # A margin is a difference of router logits, so its error does not shrink with it.
        assert difference <= tolerance * y[finite].abs().max().clamp(min=1), name


@settings(max_examples=12, deadline=None)
@given(W=st.sampled_from([None, 1, 3, 20]), K=st.sampled_from([1, 2, 6]), A=st.integers(1, 5),
       lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 99))
@example(W=3, K=2, A=2, lengths=[4, 1, 4, 4], seed=0)  # the rolling buffer wraps twice
@example(W=None, K=1, A=5, lengths=[1, 1, 1], seed=0)
def test_every_quantity_is_that_of_the_second_implementation(W, K, A, lengths, seed):
    """In one pass without a cache, and call by call with one, for a batch of two rows."""
    model = random_model(seed, sliding_window=W, num_key_value_heads=K, num_local_experts=5,
                         num_experts_per_tok=A)
    S = sum(lengths)
    tokens = torch.randint(0, 37, (2, S))
    config = vars(model.config)
    weights = {name: weight.tolist() for name, weight in model.state_dict().items()}
    exact = [{name: torch.tensor(x, dtype=torch.int64 if name.endswith((".chosen", ".tokens"))
                                 else torch.float64)
              for name, x in reference.trace(config, weights, row.tolist()).items()}
             for row in tokens]
    whole = trace.record(model, tokens, scores=True)
    for row in range(2):
        assert_near(of_one_row(whole, row, S), exact[row])

    cache, at = model.new_cache(2, S, chunk=4), 0
    for length in lengths:
        with torch.inference_mode(), trace.recording(model, scores=True) as seen:
            model(tokens[:, at:at + length], cache)
        call = {name: x for name, [x] in seen.items()}
        T = call["model.layers.0.self_attn.scores"].shape[-1]
        for row in range(2):
            assert_near(of_one_row(call, row, length),
                        of_some_tokens(exact[row], at, length, cache.positions[row, :T]))
        at += length


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_probabilities_are_the_softmax_of_scores_and_mix_the_values(dtype, tolerance):
    """scores = q·kᵀ/√d where the key is visible, and mixed = probabilities·v, spelled out."""
    model = random_model().to(dtype)
    seen = trace.record(model, torch.randint(0, 37, (2, 9)), scores=True)
    H, K, d, W = 6, 2, 4, 5
    for at in ("model.layers.0.self_attn.", "model.layers.1.self_attn."):
        scores, shares = seen[at + "scores"], seen[at + "probabilities"]
        assert scores.dtype == shares.dtype == max(
            dtype, torch.float32, key=lambda kind: kind.itemsize)
        q, k = seen[at + "q_rotated"].double(), seen[at + "k_rotated"].double()
        v = seen[at + "v_proj"].double().view(2, 9, K, d)
        wanted = torch.full((2, H, 9, 9), -math.inf, dtype=torch.float64)
        for h in range(H):
            for i in range(9):
                for j in range(max(0, i - W + 1), i + 1):
                    wanted[:, h, i, j] = (q[:, i, h] * k[:, j, h // 3]).sum(-1) / 2
        assert torch.equal(scores.isfinite(), wanted.isfinite())
        assert (scores - wanted)[wanted.isfinite()].abs().max() < 10 * tolerance
        assert (shares - wanted.softmax(dim=-1)).abs().max() < tolerance
        mixed = torch.stack([wanted.softmax(dim=-1)[:, h] @ v[:, :, h // 3] for h in range(H)], 2)
        assert (seen[at + "mixed"] - mixed).abs().max() < 4 * tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_recording_changes_no_bit_of_the_output_and_ends_with_its_block(dtype):
    model, tokens = random_model().to(dtype), torch.tensor([[3, 1, 4, 1, 5, 9]])
    functions = mixtral.route, mixtral.rotate
    with torch.inference_mode():
        before, cached = model(tokens), model(tokens, model.new_cache(1, 6, 2))
        with trace.recording(model, scores=True) as seen:
            assert torch.equal(model(tokens), before)
            count = sum(map(len, seen.values()))
            assert torch.equal(model(tokens, model.new_cache(1, 6, 2)), cached)
        assert torch.equal(mixtral.at_least_float32(seen["lm_head"][0]), before)
        recorded = sum(map(len, seen.values()))
        assert recorded > count and torch.equal(model(tokens), before)
    assert sum(map(len, seen.values())) == recorded
    assert (mixtral.route, mixtral.rotate) == functions
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all("attend" not in vars(layer.self_attn) for layer in model.model.layers)


def test_an_error_inside_the_block_leaves_the_model_as_it_was():
    model, functions = random_model(), (mixtral.route, mixtral.rotate)
    with pytest.raises(IndexError), trace.recording(model):
        model(torch.tensor([[1, 99]]))
    model.model.layers[1].self_attn.o_proj.forward = None
    with pytest.raises(TypeError), trace.recording(model):  # in the middle of a pass
        model(torch.tensor([[1, 2]]))
    assert (mixtral.route, mixtral.rotate) == functions
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all("attend" not in vars(layer.self_attn) for layer in model.model.layers)


def test_another_model_inside_the_block_is_not_recorded():
    model, other, tokens = random_model(), random_model(1), torch.tensor([[1, 2, 3]])
    wanted = trace.record(model, tokens)
    with torch.inference_mode(), trace.recording(model) as seen:
        other(tokens)
        model(tokens)
        other(tokens)
    assert {name: len(parts) for name, parts in seen.items()} == dict.fromkeys(wanted, 1)
    assert all(torch.equal(seen[name][0], x) for name, x in wanted.items())


def test_a_file_names_every_quantity_in_the_order_of_computation(tmp_path):
    model, path = random_model(), tmp_path / "trace"
    count = trace.write_trace(model, torch.tensor([[1, 5, 9, 2]]), path, scores=True)
    metadata, tensors = stored(path)
    assert count == len(tensors)
    assert (metadata["format"], metadata["version"]) == ("mixtral-trace", "1")
    assert metadata["dtype"] == "float64"
    assert MixtralConfig(**json.loads(metadata["config"])) == model.config
    order = json.loads(metadata["order"])
    assert {name for name, *_ in order} == set(tensors)
    assert tensors["tokens"].tolist() == [[1, 5, 9, 2]]
    words = [name.removeprefix("model.layers.0.") for name, *_ in order
             if ".experts." not in name and ".1" not in name]
    assert words == ["tokens", "model.embed_tokens", "input_layernorm"] + [
        f"self_attn.{word}" for word in (
            "q_proj", "k_proj", "q_rotated", "k_rotated", "v_proj", "scores", "probabilities",
            "mixed", "o_proj")] + ["residual", "post_attention_layernorm"] + [
        f"block_sparse_moe.{word}" for word in ("gate", "margin", "chosen", "weights")] + [
        "block_sparse_moe", "model.layers.0", "model.norm", "lm_head"]
    first = tensors["model.layers.0.block_sparse_moe.chosen"].min()
    expert = f"model.layers.0.block_sparse_moe.experts.{first}."
    assert [name for name, *_ in order if name.startswith(expert)] == [
        expert + word for word in ("tokens", "w1", "w3", "hidden", "w2")]


def test_the_axes_in_a_file_are_true(tmp_path):
    """All sizes differ, except B = 1 and the sizes that are equal by definition."""
    model = random_model(intermediate_size=21)
    trace.write_trace(model, torch.tensor([[1, 5, 9]]), tmp_path / "trace", scores=True)
    metadata, tensors = stored(tmp_path / "trace")
    size = {"B": 1, "S": 3, "T": 3, "N": 3, "V": 37, "D": 24, "M": 21, "d": 4, "H": 6, "K": 2,
            "E": 8, "A": 2, "H·d": 24, "K·d": 8}
    for name, letters, shape in json.loads(metadata["order"]):
        assert list(tensors[name].shape) == shape and letters == trace.axes(name)
        if letters[0] == "R":
            size["R"] = len(tensors[name.rpartition(".")[0] + ".tokens"])
        assert [size[letter] for letter in letters] == shape, name
        whole = name == "tokens" or name.endswith((".tokens", ".chosen"))
        assert tensors[name].dtype == (torch.int64 if whole else torch.float64)


def test_the_experts_of_a_trace_sum_up_to_the_mixture():
    seen = trace.record(random_model(), torch.tensor([[7, 8, 9, 10, 11]]))
    for at in (f"model.layers.{n}.block_sparse_moe." for n in range(2)):
        best = seen[at + "gate"].sort(descending=True)[0]
        assert torch.equal(seen[at + "margin"], best[:, 1] - best[:, 2])
        y = torch.zeros(5, 24, dtype=torch.float64)
        for e in range(8):
            for n, row in zip(seen.get(f"{at}experts.{e}.tokens", []),
                              seen.get(f"{at}experts.{e}.w2", []), strict=True):
                [rank] = (seen[at + "chosen"][n] == e).nonzero()[:, 0].tolist()
                y[n] += row * seen[at + "weights"][n, rank]
        assert (y - seen[at.removesuffix(".")][0]).abs().max() < 1e-13


def test_a_trace_of_some_layers_or_words_is_part_of_the_whole():
    model, tokens = random_model(num_hidden_layers=12), torch.tensor([[1, 2, 3]])
    whole = trace.record(model, tokens)
    some = trace.record(model, tokens, layers=[1, 10])
    assert list(some) == [name for name in whole if not name.startswith("model.layers.")
                          or name.split(".")[2] in ("1", "10")]
    with torch.inference_mode(), trace.recording(model, only=("gate", "weights")) as seen:
        model(tokens)
    assert list(seen) == [name for name in whole if name.endswith((".gate", ".weights"))]
    assert all(torch.equal(x, whole[name]) for name, x in some.items())
    assert all(torch.equal(x, whole[name]) for name, [x] in seen.items())


def test_an_unknown_name_has_no_axes():
    assert trace.axes("model.layers.3") == ["B", "S", "D"]
    assert trace.axes("x.experts.0.w1") == ["R", "M"]
    with pytest.raises(KeyError):
        trace.axes("model.layers.3.unheard_of")


# ------------------------------------------------------------------ the command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the command; the trace goes to `trace` in an empty current directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda *options: trace.main([*options, "--output", "trace"])


def test_the_command_traces_a_prompt_with_the_embedded_model_in_float64(command, capsys):
    assert command("--prompt", "Once upon", "--layers", "0,5", "--scores") == 0
    printed = capsys.readouterr()
    metadata, tensors = stored("trace")
    assert printed.out == "" and printed.err == f"[{len(tensors)} tensors of 3 tokens in trace]\n"
    assert metadata["dtype"] == "float64" and tensors["tokens"].tolist() == [[1, 429, 440]]
    assert "model.layers.5.self_attn.scores" in tensors and "model.layers.4" not in tensors
    assert os.listdir() == ["trace"]


def test_token_ids_need_no_tokenizer_and_a_checkpoint_keeps_its_dtype(command, tmp_path):
    save(random_model(dtype=torch.float32), tmp_path / "model")
    options = "--tokens", "1,0,36", "--model", str(tmp_path / "model")
    assert command(*options) == 0
    metadata, tensors = stored("trace")
    assert metadata["dtype"] == "float32" and tensors["tokens"].tolist() == [[1, 0, 36]]
    assert not any("scores" in name or "probabilities" in name for name in tensors)
    assert command(*options, "--dtype", "bfloat16") == 0
    assert stored("trace")[0]["dtype"] == "bfloat16"


@pytest.mark.parametrize("options, words", [
    (["--layers", "0,6"], "layers must be in 0 … 5, got 6"),
    (["--output", "absent/trace"], "absent/trace: not written"),
    (["--output", "."], "not written"),
    (["--model", "absent"], "absent"),
    (["--prompt", "\udcff"], "lone surrogate")])
def test_what_cannot_be_traced_is_refused_in_one_line(options, words, tmp_path, monkeypatch,
                                                      capsys):
    monkeypatch.chdir(tmp_path)
    assert trace.main(["--prompt", "x", "--output", "trace", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("trace.py: ") and words in error and error.count("\n") == 1
    assert not os.listdir()


def test_ids_outside_the_vocabulary_are_refused_in_one_line(command, capsys):
    assert command("--tokens", "1,2048") == 1
    error = capsys.readouterr().err
    assert "0 … 2047" in error and "2048" in error and error.count("\n") == 1
    assert not os.listdir()


def test_the_output_is_checked_before_the_model_is_read(tmp_path, capsys):
    """Both are wrong; the message is about the output."""
    assert trace.main(["--tokens", "1", "--model", str(tmp_path / "absent"), "--output",
                       str(tmp_path)]) == 1
    assert "not written" in capsys.readouterr().err


@pytest.mark.parametrize("options", [
    [], ["--prompt", "x", "--tokens", "1"], ["--tokens", "1,,2"], ["--tokens", ""],
    ["--tokens", "9" * 30], ["--prompt", "x", "--layers", "-1"]])
def test_wrong_arguments_exit_with_2(options, capsys):
    with pytest.raises(SystemExit) as stop:
        trace.main([*options, "--output", "trace"])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def run_the_command():
    """The process and the tokens in its output, from another directory."""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [sys.executable, trace.__file__, "--tokens", "1,429", "--layers", "0", "--output", "t"],
            cwd=directory, capture_output=True, text=True, timeout=120)
        return done, stored(Path(directory) / "t")[1]["tokens"].tolist()


@pytest.mark.beside(run=run_the_command)
def test_the_command_runs_as_a_program_from_any_directory(beside):
    done, tokens = beside
    assert (done.returncode, done.stdout) == (0, "") and done.stderr.count("\n") == 1
    assert tokens == [[1, 429]]
