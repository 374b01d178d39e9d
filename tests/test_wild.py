"""Claims about checkpoints as other programs write them and as downloads leave them."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_model, save
from layouts import mistral_pickle
from safetensors.torch import load_file

import convert
import generate
from convert import open_checkpoint, write_safetensors
from mixtral import Mixtral
from tokenizer import Tokenizer

TINY = Path(__file__).resolve().parent.parent / "tiny"
INDEX, ALL_SHARDS = "model.safetensors.index.json", "model-{}-of-2.safetensors"
PREFIX = "model.layers.0."


@pytest.fixture(scope="module")
def model():
    """A model in bfloat16 with as many tokens as the embedded tokenizer has."""
    return random_model(dtype=torch.bfloat16, vocab_size=2048, sliding_window=None)


@pytest.fixture
def source(model, tmp_path):
    """A well-formed directory that generate.py runs, with its weights in one file."""
    shutil.copy(TINY / "tokenizer.model", save(model, tmp_path / "raw"))
    return tmp_path / "raw"


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(source, change):
    """Write model.safetensors again, with what `change` makes of the dict of its tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(
        source / "model.safetensors").items()}
    write_safetensors(source / "model.safetensors", change(tensors))


def renamed(edit):
    """A change of a directory that gives every tensor the name that `edit` makes of it."""
    return lambda source: change_weights(
        source, lambda tensors: {edit(name): tensor for name, tensor in tensors.items()})


def with_more(**more):
    """A change of a directory that adds tensors; a double underscore in a name means a dot."""
    return lambda source: change_weights(source, lambda tensors: tensors | {
        PREFIX + name.replace("__", "."): tensor for name, tensor in more.items()})


def in_dtype(dtype, *ends):
    """A change of a directory that stores the weights whose names end so in another dtype."""
    return lambda source: change_weights(source, lambda tensors: {
        name: tensor.to(dtype) if name.endswith(ends) else tensor
        for name, tensor in tensors.items()})


def in_config(**changes):
    return lambda source: change_json(source / "config.json", **changes)


def in_shards(source, names=ALL_SHARDS, index=True):
    """Replace model.safetensors by two files, and an index unless there shall be none."""
    tensors = load_file(source / "model.safetensors")
    order, weight_map = list(tensors), {}
    for n, part in (1, order[::2]), (2, order[1::2]):
        weight_map |= dict.fromkeys(part, names.format(n))
        write_safetensors(source / names.format(n), {name: tensors[name] for name in part})
    (source / "model.safetensors").unlink()
    if index:
        (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))


# ------------------------------------------------------------------ which files count


def instead(name):
    """A change of a directory that has something else in place of the file with its weights."""
    return lambda source: (source / "model.safetensors").rename(source / name)


def odd_names(source):
    in_shards(source, "pytorch_model ({}).safetensors")


def no_index(source):
    in_shards(source, index=False)


def older_shards_beside(source):
    older = {name: tensor + 1 for name, tensor in load_file(source / "model.safetensors").items()}
    in_shards(source)
    write_safetensors(source / "model-1-of-1.safetensors", older)


def downloaded_twice(source):
    in_shards(source)
    shutil.copy(source / ALL_SHARDS.format(1), source / "model-1-of-2 (1).safetensors")


def mistral_files_beside(source):
    in_shards(source)
    write_safetensors(source / "consolidated.safetensors", {"norm.weight": torch.ones(24)})
    (source / "params.json").write_text("{}")


def in_both_files(source):
    """The index says which of two different tensors of one name counts."""
    in_shards(source)
    path = source / ALL_SHARDS.format(2)
    tensors = load_file(path)
    write_safetensors(path, tensors | {
        name: tensor + 1 for name, tensor in load_file(source / ALL_SHARDS.format(1)).items()})


def byte_order_marks(source):
    in_shards(source)
    for path in source / "config.json", source / INDEX:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def left_over_index(source):
    weight_map = {"lm_head.weight": "model-1-of-9.safetensors"}
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def index_of_more_files(source):
    """The index puts a tensor into a file that is missing, but another file has it."""
    in_shards(source)
    raw = json.loads((source / INDEX).read_text())
    raw["weight_map"]["lm_head.weight"] = "model-3-of-2.safetensors"
    (source / INDEX).write_text(json.dumps(raw))


def adapter_beside(source):
    write_safetensors(source / "adapter_model.safetensors", {"lora_A.weight": torch.ones(2, 2)})
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def scales_of_an_8_bit_cache(source):
    with_more(self_attn__k_scale=torch.ones(1), self_attn__v_scale=torch.ones(1),
              self_attn__kv_scale=torch.ones(()))(source)


@pytest.mark.claim
@pytest.mark.parametrize("change, notes", [
    (in_shards, 0), (odd_names, 0), (no_index, 0), (instead("Mixtral.safetensors"), 0),
    (older_shards_beside, 0), (downloaded_twice, 0), (mistral_files_beside, 0), (in_both_files, 0),
    (byte_order_marks, 0), (in_config(sliding_window=0), 0), (left_over_index, 1),
    (adapter_beside, 1), (index_of_more_files, 1), (scales_of_an_8_bit_cache, 1),
    (with_more(self_attn__rotary_emb__inv_freq=torch.ones(2)), 1),
    (with_more(self_attn__q_proj__weight_zero_point=torch.zeros(2).int()), 1)])
def test_a_checkpoint_has_its_weights_whatever_lies_beside_them(
        change, notes, model, source, tmp_path, capsys):
    """Both programs read it; what was ignored is said in so many lines."""
    change(source)
    loaded = generate.load(source)[1]
    assert capsys.readouterr().err.count("\n") == notes
    assert convert.main([f"--input_dir={source}", f"--output_dir={tmp_path / 'out'}"]) == 0
    converted = load_file(tmp_path / "out" / "model.safetensors")
    for found in loaded.state_dict(), converted:
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], w) for name, w in model.state_dict().items())


def test_an_output_projection_that_is_tied_and_not_stored_is_the_embedding(
        model, source, tmp_path, capsys):
    change_json(source / "config.json", tie_word_embeddings=True)
    change_weights(source, lambda tensors: {
        name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    assert convert.main([f"--input_dir={source}", f"--output_dir={tmp_path / 'out'}"]) == 0
    assert "tie_word_embeddings" in capsys.readouterr().out
    for loaded in (generate.load(source)[1], Mixtral.from_pretrained(tmp_path / "out")):
        assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


# ------------------------------------------------------------------ several dtypes


ROUTER, NORMS = ("gate.weight",), ("norm.weight", "layernorm.weight")


@pytest.mark.parametrize("ends", [ROUTER, NORMS, (*ROUTER, *NORMS, "lm_head.weight")])
def test_weights_in_several_dtypes_take_that_of_the_experts_and_a_note_says_so(
        ends, model, source, tmp_path, capsys):
    """Weights that cannot be rounded to bfloat16 without a loss show that --dtype keeps them."""
    change_weights(source, lambda tensors: {
        name: tensor.float() * (1 + 2**-20) if name.endswith(ends) else tensor
        for name, tensor in tensors.items()})
    [loaded, wide] = [generate.load(source, dtype)[1] for dtype in (None, torch.float32)]
    assert "torch.bfloat16" in capsys.readouterr().err
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
        exact = weight.float() * (1 + 2**-20) if name.endswith(ends) else weight.float()
        assert torch.equal(wide.state_dict()[name], exact)
    assert convert.main([f"--input_dir={source}", f"--output_dir={tmp_path / 'out'}"]) == 0
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.bfloat16}


# ------------------------------------------------------------------ the end of a text


@pytest.mark.parametrize("generation, config, wanted", [
    (None, 2, {2}), (None, None, {2}), (None, [2, 500], {2, 500}), ({}, [2, 500], {2, 500}),
    ({"eos_token_id": None}, 7, {7}), ({"eos_token_id": [3, 4]}, [2, 500], {3, 4}),
    ({"eos_token_id": 0}, 2, {0})])
def test_a_text_ends_at_the_ids_that_the_checkpoint_names(generation, config, wanted, source):
    """generation_config.json comes first, then config.json, and then the tokenizer."""
    change_json(source / "config.json", eos_token_id=config)
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    tokenizer, model = generate.load(source)
    assert tokenizer.eos_ids == wanted
    completion = generate.Completion(tokenizer)
    [row] = generate.generate(model, [[1, 5]], 99, 2.0, seed=1, eos_id=frozenset(range(500)))
    assert len(row) < 99 and row[-1] < 500 and all(token >= 500 for token in row[:-1])
    for token in (600, max(wanted)):
        assert completion.finish_reason is None
        completion.feed(token)
    assert completion.finish_reason == "eos"


# ------------------------------------------------------------------ a fine-tune with ChatML


END, START = 2048, 2049


def writes(model, chain):
    """Make a model write these ids and then the last one for ever, whatever it has read."""
    for name, weight in model.named_parameters():
        weight.fill_(1 if "norm" in name else 0)
    model.model.embed_tokens.weight[:, 0] = 1
    for n, token in enumerate(chain):
        model.lm_head.weight[token, n] = 1
        model.model.embed_tokens.weight[token] = torch.eye(24)[n + 1]
    model.lm_head.weight[chain[-1], len(chain)] = 1
    return model


@pytest.fixture
def fine_tune(tmp_path):
    """Its first answer is the ids 400 and 500 and <|im_end|>."""
    model = random_model(dtype=torch.bfloat16, vocab_size=2112, sliding_window=None)
    source = save(writes(model, [400, 500, END, 600]), tmp_path / "chatml", eos_token_id=END)
    shutil.copy(TINY / "tokenizer.model", source)
    added = {"<|im_end|>": END, "<|im_start|>": START}
    (source / "added_tokens.json").write_text(json.dumps(added))
    (source / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "<|im_end|>", "chat_template":
            "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + "
            "'<|im_end|>' + '\\n'}}{% endfor %}{{ '<|im_start|>assistant\\n' }}"}))
    return source


def test_a_text_ends_at_an_added_token_which_is_not_shown(fine_tune, capsys):
    assert generate.main([f"--model={fine_tune}", "--prompt=Once", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == [400, 500, END] and found["finish_reason"] == "eos"
    plain = Tokenizer(TINY)
    text = plain.decode([*plain.encode("Once"), 400, 500]).removeprefix("Once")
    assert found["text"] == text
    for eos in (2, [2, 600]):  # the next ids are 600, and a row without a piece has no text
        change_json(fine_tune / "config.json", eos_token_id=eos)
        change_json(fine_tune / "tokenizer_config.json", chat_template="x")
        assert generate.main([f"--model={fine_tune}", "--prompt=Once", "--json",
                              "--max-new-tokens=6"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["tokens"] == [400, 500, END, *[600] * (3 if eos == 2 else 1)]
        assert found["text"].startswith(text) and found["finish_reason"] == (
            "length" if eos == 2 else "eos")


def test_a_chat_in_chatml_continues_from_what_was_generated(fine_tune, capsys, monkeypatch):
    tokenizer, model = generate.load(fine_tune)
    chat, messages = generate.Chat(model, tokenizer), []
    for text in ("Hi", "<|im_end|>"):
        messages.append({"role": "user", "content": text})
        ids = tokenizer.encode_chat(messages)
        assert ids[-1] != END and ids.count(START) == len(messages) + 1
        assert list(chat.answer(text, 9)) == [400, 500, END]
        messages.append({"role": "assistant", "content": [400, 500]})
        assert chat.messages == messages and chat.ids == [*ids, 400, 500]
    change_json(fine_tune / "config.json", eos_token_id=2)  # the mark ends an answer all the same
    assert generate.load(fine_tune)[0].eos_ids == {2, END}
    change_json(fine_tune / "tokenizer_config.json", chat_template="{{ '<|user|>' }}")
    capsys.readouterr()
    assert generate.main([f"--model={fine_tune}", "--chat", "--prompt=Hi"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "chat template" in told and "<|user|>" in told
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hi\nHi\n")))
    assert generate.main([f"--model={fine_tune}", "--chat"]) == 1  # before the first message
    assert capsys.readouterr().err.count("\n") == 1
    assert convert.main([f"--input_dir={fine_tune}", f"--output_dir={fine_tune}2",
                         "--to=mistral"]) == 0
    assert "left out" in capsys.readouterr().out


# ------------------------------------------------------------------ refusals


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064x}\nsize 4892809584\n"


def pointer(name):
    """A change of a directory that puts a Git LFS pointer in place of a file."""
    return lambda source: (in_shards(source), (source / name).write_text(POINTER))


def missing_shard(source):
    in_shards(source)
    (source / ALL_SHARDS.format(2)).unlink()


def adapter(source):
    for path in source.iterdir():
        path.unlink()
    write_safetensors(source / "adapter_model.safetensors", {"lora_A.weight": torch.ones(2, 2)})
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def old_torch_save(source):
    path = source / "model.safetensors"
    torch.save(load_file(path), source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    path.unlink()


def pickled(source, inside=lambda tensors: tensors):
    path = source / "model.safetensors"
    torch.save(inside(load_file(path)), source / "pytorch_model.bin")
    path.unlink()


def link_to_nothing(source):
    (source / "model.safetensors").rename(source / "blob")
    (source / "model.safetensors").symlink_to("blobs/missing")


def truncated(source):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def end_that_is_no_id(source):
    (source / "generation_config.json").write_text('{"eos_token_id": "</s>"}')


def a_file(source):
    shutil.rmtree(source)
    source.write_text("")


REFUSALS = [
    (missing_shard, ALL_SHARDS.format(2)), (pointer(ALL_SHARDS.format(1)), "git lfs pull"),
    (pointer("config.json"), "git lfs pull"), (pointer(INDEX), "git lfs pull"),
    (pointer("tokenizer.model"), "git lfs pull"), (adapter, "LoRA"),
    (renamed("module.{}".format), "'module.'"), (renamed("_orig_mod.{}".format), "'_orig_mod.'"),
    (renamed("base_model.model.{}".format), "'base_model.model.'"),
    (renamed(lambda name: name.removeprefix("model.")), "'model.'"),
    (with_more(mlp__odd=torch.ones(1)), PREFIX + "mlp.odd"), (old_torch_save, "old format"),
    (link_to_nothing, "download it again"), (truncated, "repeat it"),
    (with_more(mlp__experts__gate_up_proj=torch.ones(1)), "save_pretrained"),
    (in_dtype(torch.float32, "experts.0.w1.weight"), "--dtype"),
    (in_config(quantization_config={"quant_method": "gptq", "bits": 8}),
     "gptq" if generate.fast else "fast/int4.py"), (shutil.rmtree, "does not exist"),
    (end_that_is_no_id, "'int' object"), (lambda source: shutil.move(
        source.rename(source.parent / "b"), source / "snapshots" / "a0b1"), "raw/snapshots/a0b1"),
    (instead("a.gguf"), "llama.cpp"), (instead("zero_to_fp32.py"), "run its zero_to_fp32.py first"),
    (instead("global_step9"), "DeepSpeed"), (instead("mp_rank_00_model.pt"), "DeepSpeed"),
    (instead("__0_0.distcp"), "FSDP"), (with_more(mlp__qweight=torch.ones(1)), "mlp.qweight is in"),
    (in_config(model_type="llama"), "got llama"),
    (in_config(rope_scaling={"type": "x"}), "got mixtral, x"),
    (a_file, "is a file"), (lambda source: (source / "model.safetensors").unlink(), "no weights")]


@pytest.mark.parametrize("program", ["convert", "generate"])
@pytest.mark.parametrize("change, word", REFUSALS)
def test_what_cannot_be_read_is_called_by_its_name_in_one_line(
        program, change, word, source, tmp_path, capsys):
    """The directory is one that both programs read until it is changed."""
    open_checkpoint(source)
    change(source)
    options = {"convert": [f"--input_dir={source}", f"--output_dir={tmp_path / 'out'}"],
               "generate": [f"--model={source}", "--prompt=a"]}
    assert {"convert": convert, "generate": generate}[program].main(options[program]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{program}.py: ") and word in error, error


@pytest.mark.parametrize("change", [
    pickled, lambda source: pickled(source, lambda tensors: {"model": tensors, "step": 3}),
    lambda source: pickled(source, lambda tensors: {"state_dict": tensors, "step": 3}), None])
def test_generate_names_convert_for_layouts_that_it_cannot_map(change, source, tmp_path, capsys):
    if change:
        change(source)
    else:
        shutil.rmtree(source)
        mistral_pickle(random_model(dtype=torch.float32), source)
    out = tmp_path / "out"
    assert generate.main([f"--model={source}", "--prompt=a"]) == 1
    assert f"python convert.py --input_dir {source}" in capsys.readouterr().err
    assert convert.main([f"--input_dir={source}", f"--output_dir={out}"]) == 0
    shutil.copy(TINY / "tokenizer.model", out)
    if change:
        assert generate.main([f"--model={out}", "--prompt=a", "--max-new-tokens=1"]) == 0
