"""Claims about 4-bit weights: what is written, what it costs, and what others make of it."""

import json
import re
import shutil

import pytest

int4 = pytest.importorskip("fast.int4")

import layouts
import torch
from conftest import random_model, save
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_checkpoints import dequantised, dequantised_model, in_4_bits, load, save_int4
from layouts import interleaved, mistral_tensors
from test_convert import TOKENS, contents, growth, large_model, loaded, refused, run, same
from torch.nn.functional import linear

import fast
from convert import dtype_of_experts, open_checkpoint, write_safetensors
from fast.int4 import Int4Linear, TunedInt4Linear, pack, quantise, repack, scheme_of, unpack
from mixtral import Mixtral, read_json

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16,
         "num_local_experts": 3}
INT4 = ("--dtype", "int4", "--group-size", "32")
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def small_model(dtype=torch.bfloat16, **changes):
    return random_model(dtype=dtype, **SIZES | changes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A 4-bit checkpoint that convert.py wrote, in groups of 32. Tests must not change it."""
    place = tmp_path_factory.mktemp("int4")
    assert run(save(small_model(), place / "whole"), place / "int4", *INT4) == 0
    return place / "int4"


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "source")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# ------------------------------------------------------------------ words


def test_a_word_packed_by_hand():
    """The first number is in the lowest four bits, and u = q + 8 is stored."""
    q = torch.tensor([[7, -8, 0, 1, -1, 2, -2, -5]])
    words = torch.tensor([[0x36A7980F]], dtype=torch.int32)  # u is f, 0, 8, 9, 7, a, 6, 3
    assert pack(q).dtype == torch.int32 and torch.equal(pack(q), words)
    assert unpack(words, torch.ones(1, 1)).tolist() == q.tolist()
    assert pack(torch.full((1, 8), 7)).item() == -1  # the bits of 0xFFFFFFFF with a sign


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32),
       st.sampled_from([torch.float64, torch.bfloat16]))
def test_unpacked_weights_are_the_packed_integers_times_the_scales_of_their_groups(
        M, words, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (M, 8 * words), generator=generator)
    for G in (8, 8 * words):
        scale = torch.randn(M, 8 * words // G, generator=generator).to(dtype)
        exact = q * scale.double().repeat_interleave(G, dim=1)
        assert torch.equal(unpack(pack(q), scale), exact.to(dtype))
        assert torch.equal(torch.cat([*int4.unpacked_exactly(pack(q), scale)]), exact)


@pytest.mark.claim
def test_float64_logits_are_those_of_the_weights_that_the_words_stand_for(checkpoint):
    model, plain = load(checkpoint, torch.float64), dequantised_model(checkpoint)
    kinds = [type(layer) for layer in model.modules()]
    assert kinds.count(Int4Linear) == 2 * 3 * SIZES["num_local_experts"]
    assert (model(TOKENS) - plain(TOKENS)).abs().max() < 1e-12


# ------------------------------------------------------------------ quantising


def round_by_hand(group, dtype):
    """The integers and the scale of a group, one number at a time."""
    found = []
    for c in int4.DIVISORS:
        s = torch.tensor(max(map(abs, group)) / c).to(dtype).double().item() or 1.0
        q = [min(7, max(-8, round(w / s))) for w in group]
        found.append((sum((w - n * s) ** 2 for w, n in zip(group, q, strict=True)), q, s))
    _, q, s = min(found, key=lambda candidate: candidate[0])
    return q, s


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([8, 16, 32]), st.sampled_from(
    [torch.bfloat16, torch.float16]), st.sampled_from([1e-3, 1.0, 50.0]))
def test_quantising_is_a_loop_over_groups_and_scales(seed, G, dtype, size):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 32, generator=generator).double().pow(3) * size
    weight[1, :G] = 0
    q, scale = quantise(weight, G, dtype)
    assert scale.dtype == dtype and scale.shape == (3, 32 // G)
    for group, integers, s in zip(weight.view(-1, G).tolist(), q.view(-1, G).tolist(),
                                  scale.flatten().tolist(), strict=True):
        assert (integers, s) == round_by_hand(group, dtype)
    assert 7.5 in int4.DIVISORS  # so no group is worse than with the plain scale


@pytest.mark.parametrize("source, rest", [
    (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16), (torch.float64, torch.bfloat16)])
def test_experts_are_quantised_in_float32_and_the_rest_gets_16_bits(
        source, rest, tmp_path, out, capsys, monkeypatch):
    monkeypatch.setattr(int4, "PIECE", 256)  # several pieces of each matrix
    model = small_model(source)
    assert run(save(model, tmp_path / "raw"), out, *INT4) == 0
    tensors, told = loaded(out), capsys.readouterr().out
    assert ("outside the experts are rounded to torch.bfloat16" in told) == (source != rest)
    wanted = {}
    for name, weight in model.state_dict().items():
        wanted |= in_4_bits(name, weight, 32, rest) if ".experts." in name else {
            name: weight.to(rest)}
    assert same(tensors, wanted)
    assert all(tensors[name].dtype == tensor.dtype for name, tensor in wanted.items())
    raw = read_json(out / "config.json")
    assert raw["quantization_config"] == scheme_of(32) and raw["torch_dtype"] == str(rest)[6:]


def test_the_error_of_each_layer_is_reported(tmp_path, out, capsys, monkeypatch):
    monkeypatch.setattr(int4, "PIECE", 256)
    model = small_model()
    model.get_parameter(W1).mul_(30)
    assert run(save(model, tmp_path / "raw"), out, *INT4) == 0
    told, after = capsys.readouterr().out, dequantised(out)
    for layer in range(2):
        names = [name for name in after if f"layers.{layer}." in name and ".experts." in name]
        exact, rounded = (torch.cat([weights[name].double().flatten() for name in names])
                          for weights in (model.state_dict(), after))
        percent = 100 * (exact - rounded).norm() / exact.norm()
        assert 5 < percent < 15
        assert re.search(f"layer {layer}: relative error .* = {percent:.2f} %\n", told)


def test_a_group_size_that_does_not_divide_the_widths_is_refused_naming_those_that_do(
        tmp_path, out, capsys):
    source = save(random_model(dtype=torch.bfloat16, hidden_size=256, intermediate_size=192,
                               num_hidden_layers=1, num_local_experts=2), tmp_path / "raw")
    for G in ([], ["--group-size", "256"], ["--group-size", "24"], ["--group-size", "0"]):
        refused("can be 32 or 64 here", capsys, source, out, "--dtype", "int4", *G)
    refused("can be nothing here", capsys,
            save(random_model(dtype=torch.bfloat16), tmp_path / "odd"), out, *INT4)
    assert contents(tmp_path) == ["odd", "raw"]


@pytest.mark.parametrize("number, dtype", [
    (float("nan"), "bfloat16"), (float("-inf"), "bfloat16"), (float("inf"), "float16"),
    (float("nan"), "float32")])
def test_weights_that_have_no_scale_are_refused(number, dtype, tmp_path, out, capsys):
    model = small_model(getattr(torch, dtype))
    model.get_parameter(W1)[0, 3] = number
    refused(W1, capsys, save(model, tmp_path / "raw"), out, *INT4)
    assert contents(tmp_path) == ["raw"]


def test_memory_holds_one_matrix_and_not_the_checkpoint(tmp_path, out):
    source, codes = layouts.mistral_fused(large_model(), tmp_path / "raw"), []
    grown = growth(lambda: codes.append(run(source, out, "--dtype", "int4")))
    back = growth(lambda: codes.append(run(out, tmp_path / "back", "--dtype", "float32")))
    assert codes == [0, 0] and max(grown, back) < 20_000, (grown, back)
    assert read_json(out / "config.json")["quantization_config"] == scheme_of(128)  # the default


# ------------------------------------------------------------------ converting 4-bit checkpoints


def test_without_a_dtype_a_4_bit_checkpoint_is_copied_bit_by_bit(checkpoint, out):
    assert run(checkpoint, out, "--max-shard-size", "0.003MB") == 0
    assert same(loaded(out), loaded(checkpoint)) and len(contents(out)) > 20
    assert read_json(out / "config.json") == read_json(checkpoint / "config.json")


def test_4_bits_are_not_rounded_to_4_bits_again_and_do_not_fit_mistral(checkpoint, out, capsys):
    refused("4-bit weights already", capsys, checkpoint, out, *INT4)
    refused("add --dtype", capsys, checkpoint, out, "--to", "mistral")
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_4_bit_checkpoint_converts_back_to_the_rounded_weights(
        dtype, checkpoint, out, tmp_path, monkeypatch):
    monkeypatch.setattr(int4, "PIECE", 256)
    assert run(checkpoint, out, "--dtype", str(dtype)[6:]) == 0
    exact = {name: weight.to(dtype) for name, weight in dequantised(checkpoint).items()}
    assert same(loaded(out), exact)
    model = Mixtral.from_pretrained(out)
    assert "quantization_config" not in read_json(out / "config.json")
    assert run(checkpoint, tmp_path / "mistral", "--dtype", str(dtype)[6:], "--to", "mistral") == 0
    assert same(loaded(tmp_path / "mistral"), mistral_tensors(model))


def test_a_scale_that_is_too_large_for_the_dtype_is_refused(copied, out, capsys):
    tensors = loaded(copied)
    tensors[f"{W1}_scale"][5, 1] = 1e5
    write_safetensors(copied / "model.safetensors", tensors)
    refused(W1, capsys, copied, out, "--dtype", "float16")
    assert run(copied, out, "--dtype", "bfloat16") == 0


def test_any_layers_can_have_4_bits(tmp_path, out):
    """Here q_proj has 4 bits too, and one expert's matrix has not."""
    source = save_int4(small_model(), tmp_path / "source", 32)
    tensors, q_proj = loaded(source), "model.layers.0.self_attn.q_proj.weight"
    tensors |= in_4_bits(q_proj, tensors.pop(q_proj), 16, torch.bfloat16)
    tensors[W1] = dequantised(source)[W1].bfloat16()
    for end in ("_packed", "_scale", "_shape"):
        del tensors[W1 + end]
    write_safetensors(source / "model.safetensors", tensors)
    model, plain = load(source, torch.float64), dequantised_model(source)
    assert (model(TOKENS) - plain(TOKENS)).abs().max() < 1e-12
    assert run(source, out) == 0 and same(loaded(out), tensors)
    assert run(source, tmp_path / "mistral", "--to", "mistral", "--dtype", "float64") == 0
    assert torch.equal(loaded(tmp_path / "mistral")["layers.0.attention.wq.weight"],
                       interleaved(plain.get_parameter(q_proj), 4))


# ------------------------------------------------------------------ the fast layer


@pytest.mark.parametrize("M, D, G", [(16, 64, 32), (48, 128, 64), (32, 256, 256)])
def test_the_tuned_layer_is_the_plain_one_but_for_rounding(M, D, G):
    torch.manual_seed(0)
    q, scale = torch.randint(-8, 8, (M, D)), (torch.rand(M, D // G) + 0.1).bfloat16()
    layer = Int4Linear(D, M, G)
    layer.weight_packed, layer.weight_scale = pack(q), scale
    assert TunedInt4Linear.fits(layer) and not TunedInt4Linear.fits(Int4Linear(D, 40, G).bfloat16())
    tuned, exact = TunedInt4Linear(layer), q.double() * scale.double().repeat_interleave(G, dim=1)
    x = torch.randn(300, D).bfloat16()
    for rows in [*range(1, 34), 64, 65, 129, 256, 300]:
        wanted = linear(x[:rows].double(), exact)
        bound = linear(x[:rows].double().abs(), exact.abs())
        for y in (tuned(x[:rows]), layer(x[:rows])):
            assert y.dtype == torch.bfloat16 and y.shape == (rows, M)
            assert ((y.double() - wanted).abs() <= bound * 2**-8 + wanted.abs() * 2**-8).all()
    assert tuned(x.view(3, 100, D)).shape == (3, 100, M)
    assert torch.equal(tuned(x.mT.contiguous().mT), tuned(x))  # any memory layout


def test_a_repacked_model_gives_the_plain_logits_and_no_weight_stays_mapped(checkpoint):
    model = load(checkpoint)
    wanted, mapped = model(TOKENS), model.lm_head.weight.data_ptr()
    repack(model)
    kinds = [type(layer) for layer in model.modules()]
    assert Int4Linear not in kinds and kinds.count(TunedInt4Linear) == 18
    assert model.lm_head.weight.data_ptr() != mapped
    assert (model(TOKENS) - wanted).abs().max() < 2**-4 * wanted.abs().max()


# ------------------------------------------------------------------ other programs


def test_transformers_loads_the_output_and_gives_the_same_logits(checkpoint, tmp_path):
    """transformers rounds q · scale to the dtype of the scales, as `--dtype bfloat16` does.

    It also keeps these weights in that dtype, whatever dtype is asked for, so they are widened.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("accelerate")
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert run(checkpoint, tmp_path / "back", "--dtype", "bfloat16") == 0
    with torch.inference_mode():
        theirs = torch.nn.Module.float(peer)(TOKENS).logits  # its own float() refuses
        ours = Mixtral.from_pretrained(tmp_path / "back", torch.float32)(TOKENS)
    assert (theirs - ours).abs().max() < 1e-4


# ------------------------------------------------------------------ refusals

GROUP, WEIGHTS = "config_groups.group_0", "config_groups.group_0.weights"


def change_config(directory, path, value):
    """Set the field of config.json at a path such as "a.b"."""
    raw = place = read_json(directory / "config.json")
    *parents, last = path.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = value
    (directory / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("path, value", [
    ("quant_method", "gptq"), ("quant_method", None), ("format", "int-quantized"),
    ("config_groups", None), ("config_groups.group_1", {"weights": None}),
    (f"{WEIGHTS}.type", "float"), (f"{WEIGHTS}.symmetric", False), (f"{WEIGHTS}.actorder", "group"),
    (f"{WEIGHTS}.num_bits", 8), (f"{WEIGHTS}.strategy", "channel"),
    (f"{GROUP}.input_activations", {"num_bits": 8}), (f"{GROUP}.output_activations", {"a": 1}),
    ("transform_config", {"R1": {}})])
def test_other_formats_are_refused_naming_the_field(path, value, copied, out, capsys):
    change_config(copied, f"quantization_config.{path}", value)
    field = path.split(".")[0 if value == {"weights": None} else -1]
    with pytest.raises(ValueError, match=f"quantization_config: {field}"):
        load(copied)
    refused(field, capsys, copied, out)


@pytest.mark.parametrize("path, value", [
    (f"{WEIGHTS}.actorder", "static"), (f"{WEIGHTS}.actorder", "weight"),
    (f"{WEIGHTS}.observer", "minmax"), (f"{WEIGHTS}.dynamic", False), ("transform_config", {}),
    (f"{GROUP}.format", "pack-quantized"), ("kv_cache_scheme", None), ("sparsity_config", {})])
def test_fields_that_change_nothing_are_accepted(path, value, copied):
    wanted = load(copied)(TOKENS)
    change_config(copied, f"quantization_config.{path}", value)
    assert torch.equal(load(copied)(TOKENS), wanted)


def test_scales_in_float32_take_the_dtype_of_the_other_weights(copied, out, capsys):
    wanted = load(copied)(TOKENS)
    assert wanted.dtype == torch.float32  # the logits; the weights are bfloat16
    tensors = {name: x.float() if name.endswith("_scale") else x
               for name, x in loaded(copied).items()}
    write_safetensors(copied / "model.safetensors", tensors)
    checkpoint = open_checkpoint(copied)
    assert dtype_of_experts(checkpoint) == torch.bfloat16 and len(checkpoint.notes) == 1
    model = fast.build(checkpoint.raw, checkpoint.tensors, torch.bfloat16)
    assert (model(TOKENS) - wanted).abs().max() < 2**-4 * wanted.abs().max()
    assert run(copied, out) == 0
    assert torch.equal(load(out)(TOKENS), wanted)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_an_output_projection_and_an_embedding_in_4_bits_are_refused_but_converted_back(
        name, copied, out, capsys):
    tensors = loaded(copied)
    tensors |= in_4_bits(f"{name}.weight", tensors.pop(f"{name}.weight"), 32, torch.bfloat16)
    write_safetensors(copied / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=f"^{name} in 4 bits") as caught:
        fast.build(read_json(copied / "config.json"), tensors)
    refused(str(caught.value), capsys, copied, out)
    assert run(copied, out, "--dtype", "bfloat16") == 0
    wanted = {name: weight.bfloat16() for name, weight in dequantised(copied).items()}
    assert same(loaded(out), wanted)


def test_4_bits_that_config_json_does_not_announce_are_refused(copied, out, capsys):
    change_config(copied, "quantization_config", None)
    with pytest.raises(ValueError, match="experts"):
        Mixtral.from_pretrained(copied)
    refused("experts.0.w1.weight", capsys, copied, out, "--dtype", "float32")


@pytest.mark.parametrize("end, change", [
    ("_packed", lambda x: x[:, :7].contiguous()), ("_packed", lambda x: x.long()),
    ("_packed", None), ("_scale", lambda x: x[:, :1].repeat(1, 3)), ("_scale", lambda x: x.int()),
    ("_scale", lambda x: x[:, :0]), ("_scale", None), ("_shape", lambda x: x[:1]), ("_shape", None),
    ("", lambda x: torch.zeros(96, 64).bfloat16()), ("_g_idx", lambda x: torch.zeros(64).int()),
    ("_zero_point", lambda x: torch.eye(96, 2).int())])
def test_tensors_that_do_not_fit_are_named(end, change, copied, tmp_path, out, capsys):
    tensors = loaded(copied)
    old = tensors.pop(W1 + end, None)
    if change:
        tensors[W1 + end] = change(old)
    write_safetensors(copied / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=re.escape(W1.removesuffix(".weight"))) as raised:
        load(copied)
    assert "\n" not in str(raised.value)
    for options in ([], ["--dtype", "float32", "--to", "mistral"]):
        refused(W1, capsys, copied, out, *options)
    assert contents(tmp_path) == ["source"]
