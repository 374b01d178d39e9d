"""Claims about traces: they hold what the model computed, and recording changes nothing."""

import json
import math
import os
import subprocess
import sys
import tempfile
import trace
from functools import partial
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


@settings(max_examples=12, deadline=None)
@given(W=st.sampled_from([None, 1, 3, 20]), K=st.sampled_from([1, 2, 6]), A=st.integers(1, 5),
       S=st.integers(1, 13), seed=st.integers(0, 99))
@example(W=3, K=2, A=2, S=13, seed=0)
@example(W=None, K=1, A=5, S=3, seed=0)
def test_every_quantity_is_that_of_the_second_implementation(W, K, A, S, seed):
    """The golden files show the same for calls with a cache and for padded batches."""
    model = random_model(seed, sliding_window=W, num_key_value_heads=K, num_local_experts=5,
                         num_experts_per_tok=A)
    tokens = torch.randint(0, 37, (1, S))
    weights = {name: weight.tolist() for name, weight in model.state_dict().items()}
    exact = reference.trace(vars(model.config), weights, tokens[0].tolist())
    whole = {word: torch.int64 for word in ("chosen", "tokens")}
    wanted = {name: torch.tensor(x, dtype=whole.get(reference.word(name), torch.float64))
              for name, x in exact.items()}
    found = {name: x[0] if trace.axes(name)[0] == "B" else x
             for name, x in trace.record(model, tokens, scores=True).items()}
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_scores_and_their_softmax_are_in_float32_also_if_the_model_is_not(dtype, tolerance):
    seen = trace.record(random_model().to(dtype), torch.randint(0, 37, (2, 9)), scores=True)
    for at in ("model.layers.0.self_attn.", "model.layers.1.self_attn."):
        scores, shares = seen[at + "scores"], seen[at + "probabilities"]
        assert scores.dtype == shares.dtype == torch.float32
        q, k = (seen[at + word].double() for word in ("q_rotated", "k_rotated"))
        exact = torch.einsum("bihd, bjhd -> bhij", q, k.repeat_interleave(3, dim=2)) / 2
        exact = exact.where(scores.isfinite(), -math.inf)
        torch.testing.assert_close(scores.double(), exact, rtol=0, atol=10 * tolerance)
        torch.testing.assert_close(shares.double(), exact.softmax(-1), rtol=0, atol=tolerance)


def assert_untouched(model):
    """Neither hooks nor replaced functions are left."""
    assert not any(isinstance(f, partial) for f in (mixtral.route, mixtral.rotate))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all("attend" not in vars(layer.self_attn) for layer in model.model.layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_recording_changes_no_bit_of_the_output_and_ends_with_its_block(dtype):
    model, tokens = random_model().to(dtype), torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.inference_mode():
        before, cached = model(tokens), model(tokens, model.new_cache(1, 6, 2))
        with trace.recording(model, scores=True) as seen:
            assert torch.equal(model(tokens), before)
            assert torch.equal(model(tokens, model.new_cache(1, 6, 2)), cached)
        assert len(seen["lm_head"]) == 2 and len(seen["model.layers.0"]) == 1 + 3
        assert torch.equal(mixtral.at_least_float32(seen["lm_head"][0]), before)
    whole, *_, chunk = seen["model.layers.0.self_attn.scores"]
    torch.testing.assert_close(chunk, whole[:, :, 4:], rtol=0, atol=1e-6)
    assert_untouched(model)


def test_an_error_inside_the_block_leaves_the_model_as_it_was():
    model = random_model()
    model.model.layers[1].self_attn.o_proj.forward = None
    with pytest.raises(TypeError), trace.recording(model):  # in the middle of a pass
        model(torch.tensor([[1, 2]]))
    assert_untouched(model)


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


def test_a_file_lists_every_quantity_with_true_axes_in_the_order_of_computation(tmp_path):
    """All sizes differ, except B = 1 and those that are equal by definition."""
    model, path = random_model(intermediate_size=21), tmp_path / "trace"
    count = trace.write_trace(model, torch.tensor([[1, 5, 9]]), path, scores=True)
    metadata, tensors = stored(path)
    assert (metadata["format"], metadata["version"], metadata["dtype"]) == (
        "mixtral-trace", "1", "float64")
    assert MixtralConfig(**json.loads(metadata["config"])) == model.config
    order = json.loads(metadata["order"])
    assert {name for name, *_ in order} == set(tensors) and count == len(tensors) == len(order)
    size = {"B": 1, "S": 3, "T": 3, "N": 3, "V": 37, "D": 24, "M": 21, "d": 4, "H": 6, "K": 2,
            "E": 8, "A": 2, "H·d": 24, "K·d": 8}
    for name, letters, shape in order:
        if letters[0] == "R":
            size["R"] = len(tensors[name.rpartition(".")[0] + ".tokens"])
        assert list(tensors[name].shape) == shape == [size[letter] for letter in letters], name
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


# ------------------------------------------------------------------ the command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the command; the trace goes to `trace` in the current directory, which is empty."""
    monkeypatch.chdir(tmp_path)
    return lambda *options: trace.main(["--output", "trace", *options])


def test_the_command_traces_a_prompt_with_the_embedded_model_in_float64(command, capsys):
    assert command("--prompt", "Once upon", "--layers", "0,5", "--scores") == 0
    printed = capsys.readouterr()
    metadata, tensors = stored("trace")
    assert printed.out == "" and printed.err == f"[{len(tensors)} tensors of 3 tokens in trace]\n"
    assert metadata["dtype"] == "float64" and tensors["tokens"].tolist() == [[1, 429, 440]]
    assert "model.layers.5.self_attn.scores" in tensors and "model.layers.4" not in tensors
    assert os.listdir() == ["trace"]


def test_token_ids_need_no_tokenizer_and_a_checkpoint_keeps_its_dtype(command):
    save(random_model(dtype=torch.float32), Path("model"))
    options = "--tokens", "1,0,36", "--model", "model"
    assert command(*options) == 0
    metadata, tensors = stored("trace")
    assert metadata["dtype"] == "float32" and tensors["tokens"].tolist() == [[1, 0, 36]]
    assert not any("scores" in name or "probabilities" in name for name in tensors)
    assert command(*options, "--dtype", "bfloat16") == 0
    assert stored("trace")[0]["dtype"] == "bfloat16"


@pytest.mark.parametrize("options, words", [
    (["--prompt", "x", "--layers", "0,6"], "layers must be in 0 … 5, got 6"),
    (["--prompt", "x", "--output", "absent/trace"], "absent/trace: not written"),
    (["--prompt", "x", "--model", "absent"], "absent"),
    (["--prompt", "x", "--model", "absent", "--output", "."], "not written"),  # checked first
    (["--prompt", "\udcff"], "lone surrogate"), (["--tokens", "1,2048"], "0 … 2047, got [1, 20")])
def test_what_cannot_be_traced_is_refused_in_one_line(options, words, command, capsys):
    assert command(*options) == 1
    error = capsys.readouterr().err
    assert error.startswith("trace.py: ") and words in error and error.count("\n") == 1
    assert not os.listdir()


@pytest.mark.parametrize("options", [
    [], ["--prompt", "x", "--tokens", "1"], ["--tokens", "1,,2"], ["--tokens", ""],
    ["--tokens", "9" * 30], ["--prompt", "x", "--layers", "-1"]])
def test_wrong_arguments_exit_with_2(options, command):
    with pytest.raises(SystemExit, match="2"):
        command(*options)


def run_the_command():
    """The process, which runs in another directory, and the files that it leaves there."""
    command = [sys.executable, trace.__file__, "--tokens", "1,429", "--layers", "0"]
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run([*command, "--output", "t"], cwd=directory, capture_output=True,
                              text=True, timeout=120)
        return done, os.listdir(directory)


@pytest.mark.beside(run=run_the_command)
def test_the_command_runs_as_a_program_from_any_directory(beside):
    done, files = beside
    assert (done.returncode, done.stdout, files) == (0, "", ["t"]) and done.stderr.count("\n") == 1
