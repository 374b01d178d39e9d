"""Claims about 4-bit weights: what is written, what it costs, and what others make of it.

A matrix W of M rows and D columns is stored as integers q in −8 … 7, eight in a 32-bit word, and
one scale for each group of G neighbours in a row: W[r, c] = q[r, c] · scale[r, c // G].
"""

import json
import random
import re
import shutil
import sys
from pathlib import Path

import layouts
import pytest
import torch
from conftest import random_model, save
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, interleaved
from test_convert import (
    contents,
    damage_json,
    damage_safetensors,
    growth,
    large_model,
    loaded,
    refused,
    run,
)
from torch.nn.functional import linear

import convert
import generate as program
from convert import int4_scheme, pack, quantise, write_safetensors
from mixtral import Int4Linear, Mixtral, int4_group_size, unpack

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16,
         "num_local_experts": 3}
INT4 = ("--dtype", "int4", "--group-size", "32")
TOKENS = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(0))
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def small_model(dtype=torch.bfloat16, **changes):
    return random_model(dtype=dtype, **SIZES | changes)


def dequantised(tensors):
    """The float64 weights that a 4-bit checkpoint stands for, read bit by bit."""
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith("_packed"):
            base = name.removesuffix("_packed")
            rows = [[(word >> 4 * i) % 16 - 8 for word in row for i in range(8)]
                    for row in tensor.tolist()]
            scale = tensors[f"{base}_scale"].double()
            G = len(rows[0]) // scale.shape[1]
            weights[base] = torch.tensor(rows).double() * scale.repeat_interleave(G, dim=1)
        elif not name.endswith(("_scale", "_shape")):
            weights[name] = tensor.double()
    return weights


def dequantised_model(config, directory):
    """The float64 model of the weights that a 4-bit checkpoint stands for."""
    model = Mixtral(config).double().eval().requires_grad_(False)
    model.load_state_dict(dequantised(loaded(directory)))
    return model


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    """A 4-bit checkpoint that convert.py wrote, in groups of 32."""
    place = tmp_path_factory.mktemp("int4")
    assert run(save(small_model(), place / "whole"), place / "int4", *INT4) == 0
    return place / "int4"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def changed_config(directory, path, value):
    """Set the field of config.json at a path such as "a.b"; an ellipsis as value deletes it."""
    file = directory / "config.json"
    raw = place = json.loads(file.read_text())
    *parents, last = path.split(".")
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    file.write_text(json.dumps(raw))


# ------------------------------------------------------------------ words


def test_a_word_packed_by_hand():
    """The first number is in the lowest four bits, and u = q + 8 is stored."""
    q = torch.tensor([[7, -8, 0, 1, -1, 2, -2, -5]])
    words = torch.tensor([[0x36A7980F]], dtype=torch.int32)  # u is f, 0, 8, 9, 7, a, 6, 3
    assert pack(q).dtype == torch.int32 and torch.equal(pack(q), words)
    assert unpack(words, torch.ones(1, 1)).tolist() == q.tolist()
    assert pack(torch.full((1, 8), 7)).item() == -1  # the bits of 0xFFFFFFFF with a sign


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32))
def test_unpacking_what_was_packed_gives_the_same_numbers(M, words, seed):
    q = torch.randint(-8, 8, (M, 8 * words), generator=torch.Generator().manual_seed(seed))
    for G in (8, 8 * words):
        assert torch.equal(unpack(pack(q), torch.ones(M, 8 * words // G).double()), q.double())


def test_a_4_bit_layer_is_an_explicit_loop():
    torch.manual_seed(0)
    M, D, G = 3, 48, 16
    q, scale = torch.randint(-8, 8, (M, D)), torch.rand(M, D // G).double()
    layer = Int4Linear(D, M, G)
    layer.weight_packed, layer.weight_scale = pack(q), scale
    x = torch.randn(2, 5, D).double()
    wanted = torch.zeros(2, 5, M).double()
    for b in range(2):
        for n in range(5):
            for r in range(M):
                for c in range(D):
                    wanted[b, n, r] += q[r, c] * scale[r, c // G] * x[b, n, c]
    assert (layer(x) - wanted).abs().max() < 1e-12


def test_float64_logits_are_those_of_the_weights_that_the_words_stand_for(int4):
    model = Mixtral.from_pretrained(int4, torch.float64)
    plain, tokens = dequantised_model(model.config, int4), torch.arange(34).view(2, 17)
    kinds = [type(layer) for layer in model.modules()]
    assert kinds.count(Int4Linear) == 2 * 3 * SIZES["num_local_experts"]
    wanted = plain(tokens)
    assert (model(tokens) - wanted).abs().max() < 1e-12
    for chunk in (1, 4):
        cache = model.new_cache(2, 17, chunk)
        got = torch.cat([model(tokens[:, a:b], cache) for a, b in ((0, 9), (9, 10), (10, 17))], 1)
        assert (got - wanted).abs().max() < 1e-12


# ------------------------------------------------------------------ quantising


def round_by_hand(row, G, dtype, divisors):
    """The integers and scales of one row, one number at a time."""
    qs, scales = [], []
    for at in range(0, len(row), G):
        group, found = row[at:at + G], []
        for c in divisors:
            s = torch.tensor(max(map(abs, group)) / c).to(dtype).double().item() or 1.0
            q = [min(7, max(-8, round(w / s))) for w in group]
            found.append((sum((w - n * s) ** 2 for w, n in zip(group, q, strict=True)), s, q))
        error, s, q = min(found, key=lambda candidate: candidate[0])
        qs += q
        scales.append(s)
    return qs, scales


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([8, 16, 32]), st.sampled_from(
    [torch.bfloat16, torch.float16]), st.sampled_from([1e-3, 1.0, 50.0]))
def test_quantising_is_a_loop_over_groups_and_scales(seed, G, dtype, size):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 32, generator=generator).double().pow(3) * size
    weight[1, :G] = 0
    q, scale = quantise(weight, G, dtype)
    assert scale.dtype == dtype and scale.shape == (3, 32 // G)
    for row, got, scales in zip(weight.tolist(), q.tolist(), scale.tolist(), strict=True):
        assert (got, scales) == round_by_hand(row, G, dtype, convert.DIVISORS)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([8, 64]), st.sampled_from([1, 3, 7]))
def test_a_weight_is_off_by_half_a_scale_and_the_best_scale_is_never_worse(seed, G, power):
    generator = torch.Generator().manual_seed(seed)
    weight, errors = torch.randn(4, 64, generator=generator).pow(power), {}
    for name, divisors in (("best", convert.DIVISORS), ("plain", [7.5]), ("unclipped", [7])):
        q, scale = quantise(weight, G, torch.bfloat16, divisors)
        assert q.min() >= -8 and q.max() <= 7 and torch.equal(q, q.round())
        wide = scale.float().repeat_interleave(G, dim=1)
        error = (weight - q * wide).abs()
        inside = (weight / wide > -8.5) & (weight / wide < 7.5)
        assert (error <= wide * 0.500001)[inside].all()
        errors[name] = error.double().square().unflatten(1, (-1, G)).sum(dim=-1)
        assert inside.all() or name != "unclipped"
    assert (errors["best"] <= errors["plain"] * (1 + 1e-5)).all()
    assert 7.5 in convert.DIVISORS


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_gives_the_same_4_bit_checkpoint(write, int4, tmp_path, out):
    """Small pieces and small files: words and scales of a matrix can be in different files."""
    source = write(small_model(), tmp_path / "raw")
    assert run(source, out, *INT4, "--max-shard-size", "3KB") == 0
    whole, split, plain = loaded(int4), loaded(out), small_model().state_dict()
    assert len(contents(out)) > 20 and split.keys() == whole.keys()
    assert all(torch.equal(split[name], tensor) for name, tensor in whole.items())
    for name, weight in plain.items():
        if ".experts." not in name:
            assert torch.equal(whole[name], weight)
            continue
        q, scale = quantise(weight.float(), 32, torch.bfloat16)
        assert torch.equal(whole[f"{name}_packed"], pack(q))
        assert torch.equal(whole[f"{name}_scale"], scale)
        assert whole[f"{name}_shape"].tolist() == list(weight.shape) and name not in whole
    raw = json.loads((out / "config.json").read_text())
    assert raw["quantization_config"] == int4_scheme(32) and raw["torch_dtype"] == "bfloat16"
    assert Mixtral.from_pretrained(out).config == small_model().config


@pytest.mark.parametrize("source, rest", [
    (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16), (torch.float64, torch.bfloat16)])
def test_what_is_not_an_expert_gets_16_bits_and_a_change_is_told(
        source, rest, tmp_path, out, capsys):
    model = small_model(source)
    assert run(save(model, tmp_path / "raw"), out, *INT4) == 0
    tensors, told = loaded(out), capsys.readouterr().out
    assert ("outside the experts are rounded to torch.bfloat16" in told) == (source != rest)
    for name, weight in model.state_dict().items():
        if ".experts." in name:  # the scales are found for the unrounded weights
            wide = weight if source == torch.float64 else weight.float()
            q, scale = quantise(wide, 32, rest)
            assert torch.equal(tensors[f"{name}_packed"], pack(q))
            assert torch.equal(tensors[f"{name}_scale"], scale) and scale.dtype == rest
        else:
            assert torch.equal(tensors[name], weight.to(rest))


def test_the_errors_of_the_layers_and_the_bytes_are_reported(tmp_path, out, capsys):
    model = small_model()
    model.model.layers[1].block_sparse_moe.experts[0].w1.weight.mul_(30)
    assert run(save(model, tmp_path / "raw"), out, *INT4) == 0
    told, after = capsys.readouterr().out, dequantised(loaded(out))
    for layer in range(2):
        pairs = [(weight.double(), after[name]) for name, weight in model.state_dict().items()
                 if f"layers.{layer}." in name and ".experts." in name]
        error, size = (sum(part.square().sum() for part in parts)
                       for parts in ([a - b for a, b in pairs], [a for a, _ in pairs]))
        percent = 100 * (error / size).sqrt()
        assert 5 < percent < 15
        assert f"layer {layer}: relative error of the 4-bit weights {percent:.2f} %\n" in told
    before = sum(weight.nbytes for weight in model.state_dict().values())
    size = sum(tensor.nbytes for tensor in loaded(out).values())
    assert (f"{convert.human_size(before)} of weights before, {convert.human_size(size)} after\n"
            in told)


def test_a_group_size_that_does_not_divide_the_widths_is_refused_naming_those_that_do(
        tmp_path, out, capsys):
    source = save(random_model(dtype=torch.bfloat16, hidden_size=192, intermediate_size=384,
                               num_hidden_layers=1, num_local_experts=2), tmp_path / "raw")
    refused("groups of 128 do not divide hidden_size 192; --group-size can be 32 or 64", capsys,
            source, out, "--dtype", "int4")
    refused("groups of 256 do not divide hidden_size 192 and intermediate_size 384", capsys,
            source, out, "--dtype", "int4", "--group-size", "256")
    refused("--group-size can be nothing here", capsys,
            save(random_model(dtype=torch.bfloat16), tmp_path / "odd"), out, *INT4)
    assert contents(tmp_path) == ["odd", "raw"]
    assert run(source, out, "--dtype", "int4", "--group-size", "64") == 0
    assert int4_group_size(int4_scheme(64)) == 64


def test_the_default_is_a_group_of_128(tmp_path, out):
    source = save(small_model(hidden_size=128, intermediate_size=256), tmp_path / "raw")
    assert run(source, out, "--dtype", "int4") == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"] == int4_scheme(128)
    assert loaded(out)[W1 + "_scale"].shape == (256, 1)


@pytest.mark.parametrize("options, words", [
    (["--dtype", "int4", "--to", "mistral"], "needs --to huggingface"),
    (["--group-size", "64"], "--group-size needs --dtype int4"),
    (["--group-size", "64", "--dtype", "bfloat16"], "--group-size needs --dtype int4"),
    ([*INT4[:3], "24"], "invalid choice: 24")])
def test_arguments_without_a_meaning_are_refused(options, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tmp_path / "out", *options)
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("number, dtype", [
    (float("nan"), "bfloat16"), (float("-inf"), "bfloat16"), (float("inf"), "float16"),
    (float("nan"), "float32")])
def test_weights_that_have_no_scale_are_refused(number, dtype, tmp_path, out, capsys):
    model = small_model(getattr(torch, dtype))
    model.get_parameter(W1)[0, 3] = number
    refused(f"{W1}: holds NaN or numbers too large for 4 bits", capsys,
            save(model, tmp_path / "raw"), out, *INT4)
    assert contents(tmp_path) == ["raw"]


def test_a_block_is_quantised_at_a_time_and_scales_are_released_when_they_are_written(
        tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "BLOCK", 256)
    checkpoint = convert.open_checkpoint(
        layouts.mistral_fused(small_model(), tmp_path / "raw"), group_size=32)
    tensors = convert.output_tensors(checkpoint, convert.HUGGINGFACE, {})
    for w in ("w1", "w2"):
        packed, scale = (tensors[W1.replace("w1", w) + end] for end in ("_packed", "_scale"))
        assert {words.numel() * 8 for words in packed.pieces()} == {256 if w == "w1" else 192}
        assert sum(len(part) for part in scale.pieces()) == scale.shape[0]
        with pytest.raises((RuntimeError, ValueError)):
            list(scale.pieces())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")
def test_memory_holds_one_matrix_and_not_the_checkpoint(tmp_path, out):
    source, codes = layouts.mistral_fused(large_model(), tmp_path / "raw"), []
    grown = growth(lambda: codes.append(run(source, out, "--dtype", "int4")))
    assert codes == [0] and 0 < grown < 20_000, grown


# ------------------------------------------------------------------ converting 4-bit checkpoints


def test_without_a_dtype_a_4_bit_checkpoint_is_copied_bit_by_bit(int4, out):
    assert run(int4, out, "--max-shard-size", "3KB") == 0
    before, after = loaded(int4), loaded(out)
    assert before.keys() == after.keys() and len(contents(out)) > 20
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (int4 / "config.json").read_text())


def test_4_bits_are_not_rounded_to_4_bits_again_and_do_not_fit_mistral(int4, out, capsys):
    for group in ("32", "64"):
        refused("has 4-bit weights already", capsys, int4, out, *INT4[:3], group)
    refused("Mistral's layout has no 4-bit weights; add --dtype", capsys, int4, out, "--to",
            "mistral")
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_4_bit_checkpoint_converts_back_to_the_rounded_weights(dtype, int4, out, tmp_path):
    assert run(int4, out, "--dtype", str(dtype)[6:]) == 0
    exact, tensors = dequantised(loaded(int4)), loaded(out)
    assert exact.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], weight.to(dtype)) for name, weight in exact.items())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    Mixtral.from_pretrained(out)
    assert run(int4, tmp_path / "mistral", "--dtype", str(dtype)[6:], "--to", "mistral") == 0
    model = Mixtral(Mixtral.from_pretrained(out).config).to(dtype)
    model.load_state_dict(tensors)
    wanted, written = layouts.mistral_tensors(model), loaded(tmp_path / "mistral")
    assert wanted.keys() == written.keys()
    assert all(torch.equal(written[name], weight) for name, weight in wanted.items())


def with_4_bit_attention(int4, place):
    """A copy of a 4-bit checkpoint whose q_proj has 4 bits too, and one expert's matrix has not."""
    directory, tensors = shutil.copytree(int4, place), loaded(int4)
    weight = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    q, scale = quantise(weight.float(), 32, torch.bfloat16)
    tensors |= {"model.layers.0.self_attn.q_proj.weight_packed": pack(q),
                "model.layers.0.self_attn.q_proj.weight_scale": scale,
                "model.layers.0.self_attn.q_proj.weight_shape": torch.tensor(weight.shape)}
    tensors[W1] = dequantised(tensors)[W1].bfloat16()
    for end in ("_packed", "_scale", "_shape"):
        del tensors[W1 + end]
    write_safetensors(directory / "model.safetensors", tensors)
    changed_config(directory, "quantization_config.ignore", ["lm_head", W1.removesuffix(".weight")])
    return directory


def test_any_layers_can_have_4_bits(int4, tmp_path, out):
    source = with_4_bit_attention(int4, tmp_path / "source")
    model, tensors = Mixtral.from_pretrained(source, torch.float64), loaded(source)
    plain = dequantised_model(model.config, source)
    assert isinstance(model.model.layers[0].self_attn.q_proj, Int4Linear)
    assert (model(TOKENS) - plain(TOKENS)).abs().max() < 1e-12
    assert run(source, out) == 0
    copied = loaded(out)
    assert copied.keys() == tensors.keys()
    assert all(torch.equal(copied[name], tensor) for name, tensor in tensors.items())
    assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == [
        "lm_head", W1.removesuffix(".weight")]
    assert run(source, tmp_path / "mistral", "--to", "mistral", "--dtype", "float64") == 0
    weight = plain.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(loaded(tmp_path / "mistral")["layers.0.attention.wq.weight"],
                       interleaved(weight, 4))


# ------------------------------------------------------------------ the fast layer


@pytest.mark.parametrize("M, D, G", [(16, 64, 32), (48, 128, 64), (32, 256, 256)])
def test_the_tuned_layer_is_the_plain_one_but_for_rounding(M, D, G):
    torch.manual_seed(0)
    q, scale = torch.randint(-8, 8, (M, D)), (torch.rand(M, D // G) + 0.1).bfloat16()
    layer = Int4Linear(D, M, G)
    layer.weight_packed, layer.weight_scale = pack(q), scale
    assert program.TunedInt4Linear.fits(layer)
    tuned, exact = program.TunedInt4Linear(layer), q.double() * scale.double().repeat_interleave(
        G, dim=1)
    x = torch.randn(300, D).bfloat16()
    for rows in [*range(1, 34), 63, 64, 65, 127, 128, 129, 255, 256, 257, 300]:
        wanted = linear(x[:rows].double(), exact)
        bound = linear(x[:rows].double().abs(), exact.abs())
        for y in (tuned(x[:rows]), layer(x[:rows])):
            assert y.dtype == torch.bfloat16 and y.shape == (rows, M)
            assert ((y.double() - wanted).abs() <= bound * 2**-8 + wanted.abs() * 2**-8).all()
    assert tuned(x.view(3, 100, D)).shape == (3, 100, M)
    assert torch.equal(tuned(x.mT.contiguous().mT), tuned(x))  # any memory layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_in_other_dtypes_the_plain_layer_is_kept(dtype, int4):
    model = Mixtral.from_pretrained(int4, dtype)
    wanted = model(TOKENS)
    program.tune(model)
    assert sum(type(layer) is Int4Linear for layer in model.modules()) == 18
    assert (model(TOKENS) - wanted).abs().max() < 50 * torch.finfo(dtype).eps * wanted.abs().max()


# ------------------------------------------------------------------ other programs


def test_transformers_loads_the_output_and_gives_the_same_logits(int4, tmp_path):
    """transformers rounds q · scale to the dtype of the scales, as `--dtype bfloat16` does.

    It also keeps these weights in that dtype, whatever dtype is asked for, so they are widened.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("accelerate")
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        int4, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert run(int4, tmp_path / "back", "--dtype", "bfloat16") == 0
    with torch.inference_mode():
        theirs = torch.nn.Module.float(peer)(TOKENS).logits  # its own float() refuses
        ours = Mixtral.from_pretrained(tmp_path / "back", torch.float32)(TOKENS)
        unrounded = Mixtral.from_pretrained(int4, torch.float32)(TOKENS)
    assert (theirs - ours).abs().max() < 1e-4
    assert (theirs - unrounded).abs().max() < 2**-6 * unrounded.abs().max()


def compress(model, directory):
    """Write a model with the compressor of compressed-tensors. Returns its logits for TOKENS."""
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    save(model, directory)
    scheme = {key: value for key, value in int4_scheme(32).items() if key != "quantization_status"}
    apply_quantization_config(model, QuantizationConfig(**scheme))
    for layer in model.modules():
        if hasattr(layer, "quantization_scheme"):
            groups = layer.weight.unflatten(1, (-1, 32))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1),
                                         layer.quantization_scheme.weights)
            layer.weight_scale.data.copy_(scale)
    logits = model(TOKENS)  # it rounds the weights in each call
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    compressor.update_config(directory)
    write_safetensors(directory / "model.safetensors", model.state_dict())
    return logits


def test_a_checkpoint_of_the_compressor_of_compressed_tensors_gives_its_logits(tmp_path, out):
    """transformers also reads our copy of it. The scales are float32, so nothing is rounded."""
    pytest.importorskip("compressed_tensors")
    with torch.inference_mode():
        theirs = compress(small_model(torch.float32), tmp_path / "theirs")
    assert run(tmp_path / "theirs", out) == 0
    for place in (tmp_path / "theirs", out):
        ours = Mixtral.from_pretrained(place)
        assert isinstance(ours.get_submodule(W1.removesuffix(".weight")), Int4Linear)
        assert (ours(TOKENS) - theirs).abs().max() < 1e-5
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    peer = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.inference_mode():
        assert (peer(TOKENS).logits - theirs).abs().max() < 1e-4


# ------------------------------------------------------------------ refusals

GROUP, WEIGHTS = "config_groups.group_0", "config_groups.group_0.weights"


@pytest.mark.parametrize("path, value, words", [
    ("quant_method", "gptq", "quant_method must be 'compressed-tensors', got 'gptq'"),
    ("quant_method", "awq", "got 'awq'"), ("quant_method", "bitsandbytes", "got 'bitsandbytes'"),
    ("quant_method", ..., "quantization_config: quant_method must be"),
    ("format", "marlin-24", "format must be 'pack-quantized', got 'marlin-24'"),
    ("format", "int-quantized", "got 'int-quantized'"),
    ("format", "nvfp4-pack-quantized", "got 'nvfp4-pack-quantized'"),
    ("config_groups", {}, "quant"), ("config_groups", None, "quant"),
    ("config_groups.group_1", {"weights": {}}, "config_groups must be 1, got 2"),
    (f"{WEIGHTS}.num_bits", 8, "num_bits must be 4, got 8"),
    (f"{WEIGHTS}.num_bits", 3, "num_bits must be 4, got 3"),
    (f"{WEIGHTS}.type", "float", "type must be 'int', got 'float'"),
    (f"{WEIGHTS}.symmetric", False, "symmetric must be True, got False"),
    (f"{WEIGHTS}.strategy", "channel", "strategy must be 'group', got 'channel'"),
    (f"{WEIGHTS}.actorder", "weight", "actorder must be None, got 'weight'"),
    (f"{WEIGHTS}.group_size", -1, "group_size must be a multiple of 8, got -1"),
    (f"{WEIGHTS}.group_size", "32", "group_size must be a multiple of 8, got '32'"),
    (f"{GROUP}.input_activations", {"num_bits": 8, "type": "int"}, "activations must be None"),
    (f"{GROUP}.output_activations", {"num_bits": 8}, "activations must be None"),
    ("transform_config", {"config_groups": {"R1": {}}}, "transform_config must be None")])
def test_other_formats_are_refused_by_name_in_one_line(
        path, value, words, int4, tmp_path, out, capsys):
    source = shutil.copytree(int4, tmp_path / "source")
    changed_config(source, f"quantization_config.{path}", value)
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        Mixtral.from_pretrained(source)
    assert "\n" not in str(raised.value)
    refused(words, capsys, source, out, "--dtype", "bfloat16")
    refused(words, capsys, source, out)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, change):
    return lambda tensors: tensors.__setitem__(name, change(tensors.get(name)))


@pytest.mark.parametrize("spoil", [
    put(f"{W1}_packed", lambda x: x[:, :7].contiguous()), put(f"{W1}_packed", lambda x: x[:95]),
    put(f"{W1}_packed", lambda x: x.flatten()), put(f"{W1}_packed", lambda x: x.float()),
    put(f"{W1}_packed", lambda x: x.long()), drop(f"{W1}_packed"),
    put(f"{W1}_scale", lambda x: x[:, :1].contiguous()), put(f"{W1}_scale", lambda x: x[:95]),
    put(f"{W1}_scale", lambda x: x.int()), drop(f"{W1}_scale"),
    put(f"{W1}_shape", lambda x: x.flip(0)), put(f"{W1}_shape", lambda x: x[:1]),
    put(f"{W1}_shape", lambda x: x.reshape(2, 1)), drop(f"{W1}_shape"),
    put(W1, lambda x: torch.zeros(96, 64).bfloat16()),
    put(f"{W1}_zero_point", lambda x: torch.zeros(96, 2).bfloat16()),
    put(f"{W1}_g_idx", lambda x: torch.zeros(64, dtype=torch.int32))])
def test_tensors_that_do_not_fit_are_named(spoil, int4, tmp_path, out, capsys):
    source, tensors = shutil.copytree(int4, tmp_path / "source"), loaded(int4)
    spoil(tensors)
    write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=re.escape(W1.removesuffix(".weight"))) as raised:
        Mixtral.from_pretrained(source)
    assert "\n" not in str(raised.value)
    for options in ([], ["--dtype", "bfloat16"], ["--dtype", "float32", "--to", "mistral"]):
        refused(W1, capsys, source, out, *options)
    assert contents(tmp_path) == ["source"]


def test_another_group_size_and_4_bits_that_are_not_announced_are_refused(
        int4, tmp_path, out, capsys):
    source = shutil.copytree(int4, tmp_path / "source")
    for field, value in (("quantization_config.config_groups.group_0.weights.group_size", 64),
                         ("quantization_config.config_groups.group_0.weights.group_size", 24),
                         ("quantization_config", ...)):
        changed_config(source, field, value)
        with pytest.raises(ValueError, match="experts"):
            Mixtral.from_pretrained(source)
        refused("layers.0.block_sparse_moe.experts.0.w1.weight", capsys, source, out)
        refused("layers.0.block_sparse_moe.experts.0.w1.weight", capsys, source, out, "--dtype",
                "float32")


@pytest.mark.parametrize("cut", [1, 1000, 200_000])
def test_a_truncated_file_is_named(cut, int4, tmp_path, out, capsys):
    source = shutil.copytree(int4, tmp_path / "source")
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-cut])
    with pytest.raises(ValueError, match="model.safetensors: not a complete"):
        Mixtral.from_pretrained(source)
    refused("model.safetensors: incomplete or damaged", capsys, source, out)


def test_a_damaged_4_bit_checkpoint_is_read_or_refused_in_one_line(tmp_path, capsys):
    assert run(save(small_model(num_hidden_layers=1, num_local_experts=2), tmp_path / "whole"),
               tmp_path / "int4", *INT4) == 0
    shutil.rmtree(tmp_path / "whole")
    for n in range(50):
        r, source, out = random.Random(n), tmp_path / "source", tmp_path / "out"
        shutil.copytree(tmp_path / "int4", source)
        if r.random() < 0.5:
            damage_json(source / "config.json", r)
        else:
            damage_safetensors(source / "model.safetensors", r)
        capsys.readouterr()
        options = r.choice([[], ["--dtype", "bfloat16"], ["--dtype", "float32", "--to", "mistral"]])
        code, error = run(source, out, *options), capsys.readouterr().err
        assert code == 0 or error.startswith("convert.py: ") and error.count("\n") == 1, (n, error)
        assert (code == 0) == out.exists() == (not error), (n, error)
        try:
            Mixtral.from_pretrained(source)(torch.tensor([[1, 2]]))
        except ValueError as refusal:
            assert "\n" not in str(refusal), n
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(source)
        assert contents(tmp_path) == ["int4"], n


def test_the_reference_says_nothing_about_4_bits_before_its_last_section():
    text = Path(convert.__file__).with_name("mixtral.py").read_text()
    before = text[:text.index("def read_json")]
    assert not re.findall(r"int4|4[- ]bit|four[- ]bit|quanti[sz]|packed", before, re.IGNORECASE)
