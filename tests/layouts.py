"""Writes a model in every layout in which Mixtral checkpoints are published.

Each writer takes a model and a directory to create, and returns the directory. LAYOUTS holds those
that convert.py reads. Nothing here uses the tables or the row order of convert.py, which is tested
against these files.
"""

import json

import torch
from conftest import save
from safetensors.torch import load_file

from convert import write_safetensors

MISTRAL_NAMES = {
    "model.embed_tokens": "tok_embeddings", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "block_sparse_moe": "feed_forward",
    "model.norm": "norm", "lm_head": "output", "model.layers": "layers"}


def interleaved(weight, heads):
    """The rows of each head in Mistral's order: row i + d/2 directly after row i.

    (H·d, D) -> (H·d, D)
    """
    d, result = len(weight) // heads, weight.clone()
    for head in range(heads):
        for i in range(d // 2):
            result[head * d + 2 * i] = weight[head * d + i]
            result[head * d + 2 * i + 1] = weight[head * d + d // 2 + i]
    return result


def mistral_tensors(model):
    """The weights of a model with Mistral's names and row order."""
    c, tensors = model.config, {}
    for name, weight in model.state_dict().items():
        if "q_proj" in name:
            weight = interleaved(weight, c.num_attention_heads)
        if "k_proj" in name:
            weight = interleaved(weight, c.num_key_value_heads)
        for huggingface, mistral in MISTRAL_NAMES.items():
            name = name.replace(huggingface, mistral)
        tensors[name] = weight
    return tensors


def mistral_params(c):
    """The params.json that goes with `mistral_tensors`."""
    return {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "head_dim": c.head_dim,
            "hidden_dim": c.intermediate_size, "n_heads": c.num_attention_heads,
            "n_kv_heads": c.num_key_value_heads, "norm_eps": c.rms_norm_eps,
            "vocab_size": c.vocab_size, "rope_theta": c.rope_theta,
            "sliding_window": c.sliding_window,
            "moe": {"num_experts_per_tok": c.num_experts_per_tok,
                    "num_experts": c.num_local_experts}}


def write_json(path, content):
    path.write_text(json.dumps(content))


def change_json(path, **changes):
    write_json(path, json.loads(path.read_text()) | changes)


def save_pickle(path, tensors):
    torch.save(tensors, path)


def mistral_safetensors(model, directory, file="consolidated.safetensors", write=write_safetensors):
    """One safetensors file."""
    directory.mkdir()
    write(directory / file, mistral_tensors(model))
    write_json(directory / "params.json", mistral_params(model.config))
    return directory


def mistral_pickle(model, directory):
    """One file of torch.save."""
    return mistral_safetensors(model, directory, "consolidated.00.pth", save_pickle)


def mistral_fused(model, directory):
    """Eight files with disjoint names. The experts of a layer are one tensor (E·M, D).

    w2 is (D, M) for one expert, so each of its blocks is transposed.
    """
    c, tensors, files = model.config, mistral_tensors(model), [{} for _ in range(8)]
    for n in range(c.num_hidden_layers):
        layer = f"layers.{n}.feed_forward."
        for w in ("w1", "w2", "w3"):
            blocks = [tensors.pop(f"{layer}experts.{e}.{w}.weight")
                      for e in range(c.num_local_experts)]
            tensors[f"layers.{n}.block_sparse_moe.{w}"] = torch.cat(
                [block.T if w == "w2" else block for block in blocks])
        tensors[f"layers.{n}.block_sparse_moe.gate.weight"] = tensors.pop(f"{layer}gate.weight")
    for n, (name, tensor) in enumerate(tensors.items()):
        files[n % 8][name] = tensor
    directory.mkdir()
    for n, content in enumerate(files):
        torch.save(content, directory / f"consolidated.{n:02}.pt")
    write_json(directory / "params.json", {
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "num_local_experts": c.num_local_experts,
        "rms_norm_eps": c.rms_norm_eps, "vocab_size": c.vocab_size, "head_dim": c.head_dim,
        "rope_theta": c.rope_theta, "sliding_window": str(c.sliding_window)})
    return directory


def huggingface_5(model, directory):
    """The config.json of transformers 5, in which rope_theta is inside rope_parameters."""
    path = save(model, directory) / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    write_json(path, config)
    return directory


def in_two_files(directory, stem="model", suffix="safetensors", write=write_safetensors):
    """Replace the model.safetensors of a directory by two files and an index."""
    path = directory / "model.safetensors"
    tensors, weight_map = list(load_file(path).items()), {}
    path.unlink()
    for n in range(2):
        file = f"{stem}-0000{n + 1}-of-00002.{suffix}"
        write(directory / file, dict(tensors[n::2]))
        weight_map |= dict.fromkeys(dict(tensors[n::2]), file)
    write_json(directory / f"{stem}.{suffix}.index.json", {"weight_map": weight_map})
    return directory


def huggingface_sharded(model, directory):
    """Two safetensors files and an index."""
    return in_two_files(save(model, directory))


def huggingface_pickles(model, directory):
    """Two files of torch.save and an index, as before safetensors existed."""
    return in_two_files(save(model, directory), "pytorch_model", "bin", save_pickle)


# `save` writes Hugging Face's layout in one file, with the config.json of transformers 4.
LAYOUTS = [mistral_pickle, mistral_safetensors, mistral_fused, save, huggingface_5,
           huggingface_sharded, huggingface_pickles]
