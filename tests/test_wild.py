"""Claims about checkpoints as other programs write them and as downloads leave them."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_model, save
from layouts import change_json, in_two_files, mistral_pickle, write_json
from safetensors.torch import load_file
from test_convert import same
from vocabularies import CHATML

import convert
import generate
from convert import open_checkpoint, write_safetensors
from mixtral import Mixtral
from tokenizer import Tokenizer

TINY = Path(__file__).resolve().parent.parent / "tiny"
INDEX, SECOND = "model.safetensors.index.json", "model-00002-of-00002.safetensors"
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


def changed(change):
    """A change of a directory: its tensors become what `change` makes of the dict of them."""
    def write(source):
        tensors = {name: tensor.clone() for name, tensor in load_file(
            source / "model.safetensors").items()}
        write_safetensors(source / "model.safetensors", change(tensors))
    return write


def renamed(edit):
    return changed(lambda tensors: {edit(name): tensor for name, tensor in tensors.items()})


def with_more(**more):
    """A change of a directory that adds tensors; a double underscore in a name means a dot."""
    more = {PREFIX + name.replace("__", "."): tensor for name, tensor in more.items()}
    return changed(lambda tensors: tensors | more)


def in_config(**changes):
    return lambda source: change_json(source / "config.json", **changes)


def text_in(name, text):
    """A change of a directory that writes this text into a file."""
    return lambda source: (source / name).write_text(text)


# ------------------------------------------------------------------ which files count


def instead(name):
    """A change of a directory that has something else in place of the file with its weights."""
    return lambda source: (source / "model.safetensors").rename(source / name)


def odd_names(source):
    """The index gives a directory too, which does not count."""
    index = in_two_files(source) / INDEX
    index.write_text(index.read_text().replace("model-", "../odd-"))
    for path in source.glob("model-*"):
        path.rename(source / path.name.replace("model-", "odd-"))


def other_files_beside(source):
    """Every tensor is in more files with another value. The index decides."""
    wrong = {name: tensor + 1 for name, tensor in load_file(source / "model.safetensors").items()}
    in_two_files(source)
    for name in "model-00001-of-00001.safetensors", "model-00001-of-00002 (1).safetensors":
        write_safetensors(source / name, wrong)
    write_safetensors(source / SECOND, wrong | load_file(source / SECOND))
    write_safetensors(source / "consolidated.safetensors", {"norm.weight": torch.ones(24)})
    (source / "params.json").write_text("{}")


def byte_order_marks(source):
    in_two_files(source)
    for path in source / "config.json", source / INDEX:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def index_of_more_files(source):
    """The index puts a tensor into a file that is missing, but another file has it."""
    in_two_files(source)
    raw = json.loads((source / INDEX).read_text())
    raw["weight_map"]["lm_head.weight"] = "model-3-of-2.safetensors"
    write_json(source / INDEX, raw)


def adapter_beside(source):
    write_safetensors(source / "adapter_model.safetensors", {"lora_A.weight": torch.ones(2, 2)})
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')


tensors_that_are_no_weights = with_more(
    self_attn__k_scale=torch.ones(1), self_attn__v_scale=torch.ones(1),
    self_attn__kv_scale=torch.ones(()), self_attn__rotary_emb__inv_freq=torch.ones(2),
    self_attn__q_proj__weight_zero_point=torch.zeros(2).int())


@pytest.mark.claim
@pytest.mark.parametrize("change, notes", [
    (in_two_files, 0), (odd_names, 0), (instead("Mixtral.safetensors"), 0),
    (lambda source: (in_two_files(source) / INDEX).unlink(), 0),
    (other_files_beside, 0), (byte_order_marks, 0), (in_config(sliding_window=0), 0),
    (text_in(INDEX, '{"weight_map": {"lm_head.weight": "model-1-of-9.safetensors"}}'), 1),
    (index_of_more_files, 1), (adapter_beside, 1), (tensors_that_are_no_weights, 1)])
def test_a_checkpoint_has_its_weights_whatever_lies_beside_them(
        change, notes, model, source, tmp_path, capsys):
    """Both programs read it; what was ignored is said in so many lines."""
    change(source)
    loaded = generate.load(source)[1]
    assert capsys.readouterr().err.count("\n") == notes
    assert convert.main([f"--input_dir={source}", f"--output_dir={tmp_path / 'out'}"]) == 0
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert same(loaded.state_dict(), model.state_dict()) and same(converted, model.state_dict())


def test_an_output_projection_that_is_tied_and_not_stored_is_the_embedding(
        model, source, tmp_path, capsys):
    change_json(source / "config.json", tie_word_embeddings=True)
    changed(lambda tensors: {
        name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})(source)
    assert convert.main([f"--input_dir={source}", f"--output_dir={tmp_path / 'out'}"]) == 0
    assert "tie_word_embeddings" in capsys.readouterr().out
    for loaded in (generate.load(source)[1], Mixtral.from_pretrained(tmp_path / "out")):
        assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


# ------------------------------------------------------------------ several dtypes


def test_weights_in_several_dtypes_take_that_of_the_experts_and_a_note_says_so(
        model, source, tmp_path, capsys):
    """Weights that cannot be rounded to bfloat16 without a loss show that --dtype keeps them."""
    ends = ("gate.weight", "norm.weight", "lm_head.weight")  # the router, all norms and the output
    changed(lambda tensors: {
        name: tensor.float() * (1 + 2**-20) if name.endswith(ends) else tensor
        for name, tensor in tensors.items()})(source)
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
        write_json(source / "generation_config.json", generation)
    assert Tokenizer(source).eos_ids == wanted


# ------------------------------------------------------------------ a fine-tune with ChatML


END, START = 2048, 2049


@pytest.fixture
def fine_tune(tmp_path):
    """Whatever it reads, it writes the ids 400, 500, <|im_end|> and then 600 for ever."""
    model = random_model(dtype=torch.bfloat16, vocab_size=2112, sliding_window=None)
    for name, weight in model.named_parameters():
        weight.fill_(1 if "norm" in name else 0)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    embedding[:, 0], head[600, 4] = 1, 1
    for n, token in enumerate([400, 500, END, 600]):
        head[token, n] = 1
        embedding[token] = torch.eye(24)[n + 1]
    source = save(model, tmp_path / "chatml", eos_token_id=END)
    shutil.copy(TINY / "tokenizer.model", source)
    write_json(source / "added_tokens.json", {"<|im_end|>": END, "<|im_start|>": START})
    write_json(source / "tokenizer_config.json", {
        "eos_token": "<|im_end|>", "chat_template": CHATML})
    return source


def test_a_text_ends_at_an_added_token_which_is_not_shown(fine_tune, capsys):
    assert generate.main([f"--model={fine_tune}", "--prompt=Once", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == [400, 500, END] and found["finish_reason"] == "eos"
    plain = Tokenizer(TINY)
    text = plain.decode([*plain.encode("Once"), 400, 500]).removeprefix("Once")
    assert found["text"] == text
    change_json(fine_tune / "config.json", eos_token_id=[2, 600])  # 600 comes next
    change_json(fine_tune / "tokenizer_config.json", chat_template="x")
    assert generate.main([f"--model={fine_tune}", "--prompt=Once", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == [400, 500, END, 600] and found["finish_reason"] == "eos"


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
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hi\nHi\n")))
    capsys.readouterr()
    assert generate.main([f"--model={fine_tune}", "--chat"]) == 1  # before the first message
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "chat template" in told and "<|user|>" in told


# ------------------------------------------------------------------ refusals


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064x}\nsize 4892809584\n"


def pointer(name):
    """A change of a directory that puts a Git LFS pointer in place of a file."""
    return lambda source: (in_two_files(source), (source / name).write_text(POINTER))


def adapter(source):
    for path in source.iterdir():
        path.unlink()
    adapter_beside(source)


def pickled(source, inside=lambda tensors: tensors, **options):
    path = source / "model.safetensors"
    torch.save(inside(load_file(path)), source / "pytorch_model.bin", **options)
    path.unlink()


def link_to_nothing(source):
    (source / "model.safetensors").rename(source / "blob")
    (source / "model.safetensors").symlink_to("blobs/missing")


def truncated(source):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("program", ["convert", "generate"])
@pytest.mark.parametrize("change, word", [
    (lambda source: (in_two_files(source) / SECOND).unlink(), SECOND), (adapter, "LoRA"),
    (pointer(SECOND), "git lfs pull"), (pointer("config.json"), "git lfs pull"),
    (pointer(INDEX), "git lfs pull"), (pointer("tokenizer.model"), "git lfs pull"),
    (renamed("module.{}".format), "'module.'"), (renamed("_orig_mod.{}".format), "'_orig_mod.'"),
    (renamed("base_model.model.{}".format), "'base_model.model.'"),
    (renamed(lambda name: name.removeprefix("model.")), "'model.'"),
    (renamed("{}.a".format), "no tensor has a name"),
    (with_more(mlp__odd=torch.ones(1)), PREFIX + "mlp.odd"),
    (text_in(INDEX, '{"weight_map": []}'), INDEX),
    (lambda source: pickled(source, _use_new_zipfile_serialization=False), "old format"),
    (link_to_nothing, "download it again"), (truncated, "repeat it"),
    (with_more(mlp__experts__gate_up_proj=torch.ones(1)), "save_pretrained"),
    (with_more(block_sparse_moe__experts__0__w1__weight=torch.ones(20, 24)), "--dtype"),
    (in_config(quantization_config={"quant_method": "gptq", "bits": 8}),
     "gptq" if generate.fast else "fast/int4.py"), (shutil.rmtree, "does not exist"),
    (text_in("generation_config.json", '{"eos_token_id": "</s>"}'), "'int' object"),
    (lambda source: shutil.move(source.rename(source.parent / "b"), source / "snapshots" / "a0b1"),
     "raw/snapshots/a0b1"),
    (instead("a.gguf"), "llama.cpp"), (instead("zero_to_fp32.py"), "run its zero_to_fp32.py first"),
    (instead("global_step9"), "DeepSpeed"), (instead("__0_0.distcp"), "FSDP"),
    (with_more(mlp__qweight=torch.ones(1)), "mlp.qweight is in"),
    (in_config(model_type="llama"), "got llama"),
    (in_config(rope_scaling={"type": "x"}), "got mixtral, x"),
    (lambda source: (source / "model.safetensors").unlink(), "no weights")])
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


def in_mistrals_layout(source):
    shutil.rmtree(source)
    mistral_pickle(random_model(dtype=torch.float32, vocab_size=2048), source)


@pytest.mark.parametrize("change", [
    pickled, lambda source: pickled(source, lambda tensors: {"model": tensors, "step": 3}),
    lambda source: pickled(source, lambda tensors: {"state_dict": tensors, "step": 3}),
    in_mistrals_layout])
def test_generate_names_convert_for_layouts_that_it_cannot_map(change, source, tmp_path, capsys):
    change(source)
    out = tmp_path / "out"
    assert generate.main([f"--model={source}", "--prompt=a"]) == 1
    assert f"python convert.py --input_dir {source}" in capsys.readouterr().err
    assert convert.main([f"--input_dir={source}", f"--output_dir={out}"]) == 0
    shutil.copy(TINY / "tokenizer.model", out)
    assert generate.main([f"--model={out}", "--prompt=a", "--max-new-tokens=1"]) == 0
