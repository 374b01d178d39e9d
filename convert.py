"""Convert a Mixtral checkpoint: `python convert.py --input_dir RAW --output_dir OUT`.

The weights of Mixtral are published in three layouts. The names of the tensors tell them apart:

    layout          files                                      differences from Hugging Face's
    Hugging Face    config.json; model*.safetensors or
                    pytorch_model*.bin                         -
    Mistral         params.json; consolidated.safetensors
                    or consolidated.00.pth                     names; row order of wq and wk
    Mistral, fused  params.json; consolidated.00.pt … .07.pt   also: the experts of a layer are one
                                                               (E·M, D), with w2 transposed

All three can be read, and the first two can be written. `--dtype int4` writes the Hugging Face
layout with experts in 4 bits, which is the subject of fast/int4.py. A checkpoint that has 4-bit
weights already is copied as it is, or turned back into an ordinary one by another --dtype.
generate.py reads checkpoints through `open_checkpoint` too, and so takes the same ones.

The row order differs because of the rotary position embedding. Mistral's code rotates neighbouring
rows of a head together, and Hugging Face's code rotates row i with row i + d/2. The same pairs must
meet, so every head of q and k is reordered. For d = 8:

    Mistral           as (d/2, 2)    transposed     Hugging Face
    0 1 2 3 4 5 6 7      0 1         0 2 4 6       0 2 4 6 1 3 5 7
    └─┘ └─┘ └─┘ └─┘      2 3         1 3 5 7       Row 0 is still rotated with row 1,
                         4 5                       row 2 with row 3, and so on.
                         6 7

A checkpoint need not fit into memory. Its files are mapped, so the system reads a page when it is
needed and may drop it again at any time, and besides these pages a conversion holds one matrix and
its converted copy. Pickled files are opened with weights_only=True and cannot run code. The output
is written to `.OUT.part` beside OUT, and renamed to OUT when it is complete.

Not included: other quantised formats, LoRA weights, pieces that a v3 tokenizer declares as whole.

Exit codes: 0 success, 1 bad input, 2 bad arguments, 130 interrupted.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import fnmatch
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while the following modules are imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from safetensors.torch import load_file
from torch import Tensor

from mixtral import MixtralConfig
from tokenizer import FILES, PREPEND, REPLACE, Tokenizer, read_file

# ------------------------------------------------------------------ names, shapes and row order

HUGGINGFACE, MISTRAL, FUSED = LAYOUTS = range(3)  # the columns of NAMES
TITLES = ("Hugging Face", "Mistral", "Mistral with fused experts")

# For each kind of tensor: its name in Hugging Face's layout, in Mistral's and, where it is another
# one, in the fused layout, and its shape. {n} is the number of a layer and {e} that of an expert.
# For experts it is the shape of one of them.
KINDS = [
    ("model.embed_tokens.weight", "tok_embeddings.weight", "V D"),
    ("model.layers.{n}.input_layernorm.weight", "layers.{n}.attention_norm.weight", "D"),
    ("model.layers.{n}.self_attn.q_proj.weight", "layers.{n}.attention.wq.weight", "H·d D"),
    ("model.layers.{n}.self_attn.k_proj.weight", "layers.{n}.attention.wk.weight", "K·d D"),
    ("model.layers.{n}.self_attn.v_proj.weight", "layers.{n}.attention.wv.weight", "K·d D"),
    ("model.layers.{n}.self_attn.o_proj.weight", "layers.{n}.attention.wo.weight", "D H·d"),
    ("model.layers.{n}.post_attention_layernorm.weight", "layers.{n}.ffn_norm.weight", "D"),
    ("model.layers.{n}.block_sparse_moe.gate.weight",
     "layers.{n}.feed_forward.gate.weight", "layers.{n}.block_sparse_moe.gate.weight", "E D"),
    ("model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight",
     "layers.{n}.feed_forward.experts.{e}.w1.weight", "layers.{n}.block_sparse_moe.w1", "M D"),
    ("model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight",
     "layers.{n}.feed_forward.experts.{e}.w2.weight", "layers.{n}.block_sparse_moe.w2", "D M"),
    ("model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight",
     "layers.{n}.feed_forward.experts.{e}.w3.weight", "layers.{n}.block_sparse_moe.w3", "M D"),
    ("model.norm.weight", "norm.weight", "D"),
    ("lm_head.weight", "output.weight", "V D"),
]
NAMES = [(huggingface, mistral, *(fused or [mistral]), shape)
         for huggingface, mistral, *fused, shape in KINDS]


def regroup(weight, heads, columns):
    """Write the d rows of each head as a matrix with `columns` columns, and transpose the matrix.

    (H·d, D) -> (H·d, D)

    2 columns turn Mistral's row order into Hugging Face's, and d/2 columns turn it back. `heads` is
    H for q and K for k.

    >>> regroup(torch.arange(8)[:, None], heads=1, columns=2).flatten().tolist()
    [0, 2, 4, 6, 1, 3, 5, 7]
    """
    return weight.unflatten(0, (heads, -1, columns)).transpose(1, 2).flatten(0, 2)


class Parameter(NamedTuple):
    """A weight matrix or vector of the model. Each expert has its own."""

    names: tuple[str, ...]  # one for each layout
    shape: tuple[int, ...]
    expert: int | None  # None outside the experts


def parameters(config):
    """Yield the parameters of a model in the order of the forward pass."""
    c, H, K = config, config.num_attention_heads, config.num_key_value_heads
    sizes = {"V": c.vocab_size, "D": c.hidden_size, "M": c.intermediate_size,
             "E": c.num_local_experts, "H·d": H * c.head_dim, "K·d": K * c.head_dim}

    def parameter(row, n=None, e=None):
        *names, letters = row
        shape = tuple(sizes[letter] for letter in letters.split())
        return Parameter(tuple(name.format(n=n, e=e) for name in names), shape, e)

    embedding, *block, norm, head = NAMES
    yield parameter(embedding)
    for n, row in itertools.product(range(c.num_hidden_layers), block):
        for e in range(c.num_local_experts) if "{e}" in row[HUGGINGFACE] else [None]:
            yield parameter(row, n, e)
    yield from (parameter(norm), parameter(head))


# ------------------------------------------------------------------ from one layout to another


class Checkpoint(NamedTuple):
    """A complete and well-formed checkpoint; its tensors are mapped from their files."""

    layout: int
    config: MixtralConfig
    tensors: dict[str, Tensor]
    raw: dict  # the content of config.json or params.json
    files: list[Path]  # which hold the tensors
    notes: list[str]  # what was ignored or assumed, one sentence each


class Target(NamedTuple):
    """What to convert a checkpoint to."""

    layout: int
    dtype: torch.dtype
    scheme: dict | None = None  # the quantization_config to write; None means no 4-bit weights
    group_size: int | None = None  # None unless the experts are to be rounded to 4 bits


def read(checkpoint, parameter):
    """The weight of a parameter that is not in 4 bits, mapped from its file."""
    weight = checkpoint.tensors[parameter.names[checkpoint.layout]]
    if checkpoint.layout == FUSED and parameter.expert is not None:
        weight = weight.chunk(checkpoint.config.num_local_experts)[parameter.expert]
        weight = weight.T if parameter.names[FUSED].endswith("w2") else weight
    return weight


def converted(checkpoint, parameter, target):
    """The weight of a parameter as the target wants it. Raises ValueError for an overflow."""
    name, tensors = parameter.names[checkpoint.layout], checkpoint.tensors
    if f"{name}_packed" in tensors:
        pieces = load_int4().unpacked_exactly(tensors[f"{name}_packed"], tensors[f"{name}_scale"])
        weight = torch.cat([rounded(piece, target.dtype, name) for piece in pieces])
    else:
        weight = rounded(read(checkpoint, parameter), target.dtype, name)
    d, forth = checkpoint.config.head_dim, target.layout == HUGGINGFACE
    moves = parameter.names[HUGGINGFACE].endswith(("q_proj.weight", "k_proj.weight"))
    if moves and forth != (checkpoint.layout == HUGGINGFACE):
        weight = regroup(weight, len(weight) // d, columns=2 if forth else d // 2)
    return weight.contiguous()


def rounded(weight, dtype, name):
    """A weight in another dtype. Raises ValueError if a number would become infinite."""
    if weight.dtype == dtype:
        return weight
    result = weight.to(dtype)
    finite = all(math.isfinite(bound) for bound in result.aminmax())
    if not finite and (result.isinf() & weight.isfinite()).any():
        raise ValueError(f"{name}: holds numbers too large for {dtype}; choose another --dtype")
    return result


def load_int4():
    """The module fast/int4.py. Raises ValueError if it is not there."""
    try:
        from fast import int4
        return int4
    except ImportError as error:
        raise ValueError(f"4-bit weights need fast/int4.py beside convert.py: {error}") from None


def in_4_bits(checkpoint, parameter, target, errors):
    """The three tensors of an expert's matrix in 4 bits, which follow each other in a file.

    The scales are found with the words, and wait in memory until they are written after them.
    `errors` gets Σ(w − q·s)² and Σw² of each layer.
    """
    name, (M, D), G = parameter.names[HUGGINGFACE], parameter.shape, target.group_size
    waiting, sums = [], errors.setdefault(int(name.split(".")[2]), [0.0, 0.0])

    def words():
        weight = read(checkpoint, parameter).contiguous()
        try:
            packed, scale, error, size = load_int4().compress(weight, G, target.dtype)
        except ValueError as problem:
            raise ValueError(f"{parameter.names[checkpoint.layout]}: {problem}") from None
        waiting.append(scale)
        sums[:] = sums[0] + error, sums[1] + size
        return packed

    return {f"{name}_packed": Lazy((M, D // 8), torch.int32, words),
            f"{name}_scale": Lazy((M, D // G), target.dtype, waiting.pop),
            f"{name}_shape": torch.tensor((M, D))}


def output_tensors(checkpoint, target, errors):
    """The tensors to write by name, in the order of the forward pass. Nothing is computed yet."""
    tensors = {}
    for p in parameters(checkpoint.config):
        name = p.names[target.layout]
        if target.group_size and p.expert is not None:
            tensors |= in_4_bits(checkpoint, p, target, errors)
        elif target.scheme and f"{name}_packed" in checkpoint.tensors:
            for part in (f"{name}_packed", f"{name}_scale", f"{name}_shape"):
                old = checkpoint.tensors[part]
                dtype = target.dtype if old.is_floating_point() else old.dtype
                tensors[part] = Lazy(old.shape, dtype, partial(rounded, old, dtype, part))
        else:
            tensors[name] = Lazy(p.shape, target.dtype, partial(converted, checkpoint, p, target))
    return tensors


# ------------------------------------------------------------------ params.json and config.json

# The fields of params.json. The fused layout has a params.json with Hugging Face's field names.
REQUIRED = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
            "hidden_dim": "intermediate_size", "n_kv_heads": "num_key_value_heads",
            "norm_eps": "rms_norm_eps", "vocab_size": "vocab_size",
            "num_experts": "num_local_experts"}
OPTIONAL = {"head_dim": "head_dim", "rope_theta": "rope_theta", "sliding_window": "sliding_window",
            "max_seq_len": "max_position_embeddings", "num_experts_per_tok": "num_experts_per_tok"}
CONTEXT = {4096: 32768, 6144: 65536}  # of 8x7B and 8x22B by hidden_size; rarely in params.json


def read_params(name, raw):
    """The configuration in a params.json. Raises ValueError naming the fields that are missing.

    An optional field that is absent, null or 0 gets its default. For rope_theta that is 1e6.
    """
    raw = raw | (raw.get("moe") or {})
    fields = {(REQUIRED | OPTIONAL).get(name, name): value for name, value in raw.items()}
    fields = {name: value for name, value in fields.items()
              if value is not None and (value != 0 or name not in OPTIONAL.values())}
    if missing := [name for name, field in REQUIRED.items() if field not in fields]:
        raise ValueError(f"missing {', '.join(missing)}, which the {name} of a Mixtral has")
    window = str(fields.get("sliding_window"))  # the fused release writes it as a string
    if window.isdecimal():
        fields["sliding_window"] = int(window)
    elif window.lower() in ("none", "null"):
        fields["sliding_window"] = None
    fields.setdefault("max_position_embeddings", CONTEXT.get(fields["hidden_size"], 32768))
    return MixtralConfig.from_dict(fields)


def params_from_config(config):
    """The params.json of a configuration, without a window or context of the default size."""
    params = {name: getattr(config, field) for name, field in (REQUIRED | OPTIONAL).items()}
    moe = {name: params.pop(name) for name in ("num_experts_per_tok", "num_experts")}
    defaults = {"sliding_window": None, "max_seq_len": CONTEXT.get(config.hidden_size, 32768)}
    return {name: value for name, value in params.items()
            if name not in defaults or value != defaults[name]} | {"moe": moe}


# ------------------------------------------------------------------ the tokenizer for transformers

EXTRAS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "chat_template.jinja", "generation_config.json")


def write_small_files(source, part, config, target):
    """Write the configuration and the tokenizer. Raises ValueError for an unfitting tokenizer.

    The output has a tokenizer.json, without which transformers needs more packages. There, as in
    every tokenizer of transformers, the text `</s>` encodes to the control token.
    """
    found = [source / name for name in FILES if (source / name).exists()]
    if found and found[0].suffix != ".json":  # newer releases call it tokenizer.model.v3
        shutil.copyfile(found[0], part / "tokenizer.model")
    elif not found or target.layout == MISTRAL:
        missing = "tokenizer.model, and Mistral's code reads no other" if found else "tokenizer"
        report(f"{source} has no {missing}; copy the one of this model to the output")
    extras = [name for name in EXTRAS if (source / name).exists()]
    if target.layout == MISTRAL:
        write_json(part / "params.json", params_from_config(config))
        if extras:
            report(f"left out, since Mistral's layout has no place for them: {', '.join(extras)}")
        return
    for name in extras:
        shutil.copyfile(source / name, part / name)
    write_json(part / "config.json", {  # rope_theta as in transformers 4, which version 5 accepts
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        **dataclasses.asdict(config), "torch_dtype": str(target.dtype).removeprefix("torch."),
        **({"quantization_config": target.scheme} if target.scheme else {})})
    if not found:
        return
    t = Tokenizer(source)
    if t.vocab_size > config.vocab_size:
        raise ValueError(f"{source}: the tokenizer has {t.vocab_size} pieces, the model only "
                         f"{config.vocab_size}; they do not belong together")
    if not (part / "tokenizer.json").exists():
        write_json(part / "tokenizer.json", fast_tokenizer(t))
    if not (part / "tokenizer_config.json").exists():
        ids = {"bos_token": t.bos_id, "eos_token": t.eos_id, "unk_token": t.unk_id}
        write_json(part / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            **{name: t.texts[i] for name, i in ids.items()}})


def fast_tokenizer(t):
    """The tokenizer.json of a tokenizer: a ▁ in front, ▁ for each space, BPE, and BOS first."""
    plain = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": t.texts[i], "special": i in t.control or i == t.unk_id} | plain
            for i in sorted(t.texts) if i in t.control or i == t.unk_id or i >= t.vocab_size],
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]},
        "post_processor": bos_template(t) if t.adds_bos else None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": t.pieces[t.unk_id], "fuse_unk": True,
                  "byte_fallback": True, "merges": merges(t),
                  "vocab": {piece: i for i, piece in enumerate(t.pieces)}}}


def bos_template(t):
    """The post-processor that puts BOS in front of a text or of a pair of texts."""
    bos = t.texts[t.bos_id]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {"type": "TemplateProcessing",
            "single": [start, first], "pair": [start, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [t.bos_id], "tokens": [bos]}}}


def merges(t):
    """The merges of a BPE, best first: every split of a piece into two other pieces. A merge ranks
    as its result does, by score, and of equal scores the lower id comes first."""
    ranked = sorted(t.scores, key=lambda piece: (-t.scores[piece], t.ids[piece]))
    return [f"{piece[:n]} {piece[n:]}" for piece in ranked for n in range(1, len(piece))
            if piece[:n] in t.scores and piece[n:] in t.scores]


# ------------------------------------------------------------------ a whole checkpoint


def convert(source, out, to=HUGGINGFACE, dtype=None, limit=4 * 10**9, group_size=None):
    """Convert the checkpoint in the directory `source` to the layout `to` in a new directory.

    `limit` is the size of a file in bytes. With a group_size the experts are stored in 4 bits.
    Raises ValueError or OSError and then writes nothing.
    """
    source, out, errors = Path(source).resolve(), Path(out).resolve(), {}
    check_output(out, directory=True)
    checkpoint = open_checkpoint(source)
    target = choose_target(source, checkpoint, to, dtype, group_size)
    files = shards(output_tensors(checkpoint, target, errors), to, limit)
    announce(source, out, checkpoint, target, files)
    free = shutil.disk_usage(next(path for path in out.parents if path.exists())).free
    if (size := total_size(files)) > free:
        raise ValueError(f"{out}: needs {size / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free")
    with complete_or_absent(out, directory=True) as part:
        write_small_files(source, part, checkpoint.config, target)  # first, since it may refuse
        write_weights(part, files)
    for layer, (error, size) in errors.items():
        report(f"layer {layer}: relative error of the 4-bit weights ‖W − Ŵ‖ / ‖W‖ = "
               f"{100 * math.sqrt(error / (size or 1)):.2f} %")


def choose_target(source, checkpoint, to, dtype, group_size):
    """What to convert a checkpoint to, by default in its dtype. Raises ValueError if it cannot."""
    scheme = checkpoint.raw.get("quantization_config")
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()} & set(FLOATS.values())
    if group_size is not None:
        if scheme is not None:
            raise ValueError(f"{source}: has 4-bit weights already; leave out --dtype to keep them")
        int4 = load_int4()
        int4.check_group_size(group_size, checkpoint.config)
        dtype = torch.float16 if dtypes == {torch.float16} else torch.bfloat16
        if dtypes != {dtype}:
            report(f"weights outside the experts are rounded to {dtype}")
        return Target(to, dtype, int4.scheme_of(group_size), group_size)
    if dtype:
        return Target(to, dtype)
    if scheme is not None and to == MISTRAL:
        raise ValueError(f"{source}: Mistral's layout has no 4-bit weights; add --dtype bfloat16")
    if scheme is not None:
        load_int4().check_embeddings(checkpoint.tensors)
    return Target(to, dtype_of_experts(checkpoint), scheme)


def shards(tensors, to, limit):
    """The tensors of each file: at most `limit` bytes of them, or one larger tensor. The layout of
    Mistral has only one file."""
    groups, free = [{}], math.inf if to == MISTRAL else limit
    for name, tensor in tensors.items():
        if tensor.nbytes > free and groups[-1]:
            groups.append({})
            free = limit
        groups[-1][name] = tensor
        free -= tensor.nbytes
    if len(groups) == 1:
        return {"consolidated.safetensors" if to == MISTRAL else "model.safetensors": groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group
            for n, group in enumerate(groups, 1)}


def total_size(files):
    """The bytes of all tensors in the files that `shards` has planned."""
    return sum(tensor.nbytes for group in files.values() for tensor in group.values())


def announce(source, out, checkpoint, target, files):
    """Print what was found and what will be written."""
    for note in checkpoint.notes:
        report(note)
    config, counts = checkpoint.config, {False: 0, True: 0}
    for parameter in parameters(config):
        counts[parameter.expert is not None] += math.prod(parameter.shape)
    used = counts[False] + counts[True] * config.num_experts_per_tok // config.num_local_experts
    report(f"{source}: {TITLES[checkpoint.layout]}, {len(checkpoint.tensors)} tensors, "
           f"{total_size({'': checkpoint.tensors}) / 1e6:,.1f} MB; {sum(counts.values()):,} "
           f"parameters, {used:,} used per token")
    report(f"{out}: {total_size(files) / 1e6:,.1f} MB of {target.dtype}"
           f"{' and 4-bit weights' if target.scheme else ''} to write, files: {len(files)}")


def write_weights(part, files):
    """Write all files with weights, and an index if there are several."""
    for n, (file, group) in enumerate(files.items(), 1):
        write_safetensors(part / file, group)
        report(f"{n} of {len(files)}: {file}, {total_size({file: group}) / 1e6:,.1f} MB")
    if len(files) > 1:
        write_json(part / "model.safetensors.index.json", {
            "metadata": {"total_size": total_size(files)},
            "weight_map": {name: file for file, group in files.items() for name in group}})


# ------------------------------------------------------------------ opening a checkpoint

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
FORMAT = {"format": "pt"}  # the metadata that transformers expects in a file of weights
WRITABLE = FLOATS | {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
# Beside the weights, other programs store frequencies of the rotation, and scales of 8-bit caches.
NO_WEIGHTS = ("rotary_emb.inv_freq", ".k_scale", ".v_scale", ".kv_scale")
# What the names of files tell about a directory without weights that can be read, and what the
# names of tensors tell about weights with other names than Mixtral's. The first that fits counts.
FOREIGN_FILES = {
    "adapter_config.json": "a LoRA adapter; merge it into its model with merge_and_unload of peft",
    "consolidated.00.pth-split*":
        "join the parts of the file first, with: cd {here} && cat "
        "consolidated.00.pth-split{{0..{last}}} > consolidated.00.pth",
    **dict.fromkeys(("snapshots/*", "models--*/snapshots/*"),
                    "a cache of Hugging Face; the checkpoint is in {found}"),
    "*/model*.safetensors": "no weights here, but there is {found}",
    "*.gguf": "GGUF is the format of llama.cpp and is not read",
    **dict.fromkeys(("zero_to_fp32.py", "global_step*", "mp_rank_*"),
                    "a checkpoint of DeepSpeed; run its zero_to_fp32.py first"),
    "*.distcp": "a checkpoint of FSDP; run first: accelerate merge-weights"}
FOREIGN_TENSORS = {
    **dict.fromkeys(("*.model.layers.0.self_attn.q_proj.weight", "*.layers.0.attention.wq.weight"),
                    "take the prefix {prefix!r} off the names of all tensors"),
    "layers.0.self_attn.q_proj.weight":
        "put the prefix 'model.' in front of the names of all tensors but lm_head.weight",
    "*.qweight": "{found} is in the format of GPTQ or AWQ; of all quantised formats only "
                 "pack-quantized of compressed-tensors loads",
    "*.mlp.experts.gate_up_proj": "joined experts; by default, save_pretrained splits them"}


def open_checkpoint(directory):
    """Find out which layout a directory holds, and check it. Raises ValueError if it is bad."""
    directory = Path(directory)
    tensors, files, notes = open_files(directory)
    if (directory / "adapter_config.json").exists():
        notes.append("the LoRA adapter that lies beside the model is ignored")
    if skipped := [name for name, tensor in tensors.items() if name.endswith(NO_WEIGHTS)
                   or name.endswith(".weight_zero_point") and not tensor.any()]:
        notes.append(f"{len(skipped)} tensors are not weights and ignored, such as {skipped[0]}")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    refuse(directory, FOREIGN_TENSORS, partial(fnmatch.filter, tensors))
    matches = [sum(row[layout].format(n=0, e=0) in tensors for row in NAMES) for layout in LAYOUTS]
    if not any(matches):
        raise ValueError(f"{directory}: no tensor has a name that Mixtral uses; the first of "
                         f"{len(tensors)} is {next(iter(tensors), None)}")
    layout = matches.index(max(matches))
    config, raw = read_configuration(directory, layout, tensors, notes)
    found = {name: f"{'floats' if x.dtype in FLOATS.values() else x.dtype} of shape "
             f"{list(x.shape)}" for name, x in tensors.items()}
    wanted = expected_tensors(layout, config, raw.get("quantization_config"), tensors)
    wrong = [f"{name}: wanted {wanted.get(name, 'no such tensor')}, got {found.get(name, 'none')}"
             for name in dict.fromkeys([*found, *wanted]) if wanted.get(name) != found.get(name)]
    if wrong:
        raise ValueError(f"{directory}: {len(wrong)} tensors are unlike the configuration: "
                         f"{'; '.join(wrong[:9])}")
    return Checkpoint(layout, config, tensors, raw, files, notes)


def refuse(directory, hints, find):
    """Raises ValueError with the first of the hints for whose pattern `find` finds something."""
    for pattern, hint in hints.items():
        if found := sorted(map(str, find(pattern))):
            raise ValueError(f"{directory}: " + hint.format(
                found=" or ".join(found[:3]), prefix=found[0].removesuffix(pattern[2:]),
                here=shlex.quote(str(directory)), last=len(found) - 1))


def dtype_of_experts(checkpoint):
    """The dtype in which a checkpoint is meant to be used. Raises ValueError if it is unclear.

    Some programs keep the router, the norms or the scales of 4-bit weights in float32 beside
    experts of 16 bits. In such a checkpoint all weights take the dtype of the experts, because
    mixtral.py computes in one dtype, and a wider router or norm would need casts there. If the
    experts have 4 bits, the dtype is that of the embedding.
    """
    layout, tensors = checkpoint.layout, checkpoint.tensors
    names = [p.names[layout] for p in parameters(checkpoint.config) if p.expert is not None]
    dtypes = {tensors[x].dtype for x in names if x in tensors} or {tensors[NAMES[0][layout]].dtype}
    if len(dtypes) > 1:
        raise ValueError(f"the experts have the dtypes {' and '.join(sorted(map(str, dtypes)))}; "
                         "choose one with --dtype")
    [dtype] = dtypes
    if others := [name for name, tensor in tensors.items()
                  if tensor.is_floating_point() and tensor.dtype != dtype]:
        checkpoint.notes.append(f"{len(others)} tensors that are not {dtype} are converted to it, "
                                f"such as {others[0]}; --dtype chooses another dtype for all")
    return dtype


def read_configuration(directory, layout, tensors, notes):
    """The configuration in a directory of this layout, and the JSON object that it is read from.

    An output projection that is tied to the embedding, and so not stored, is added to the tensors.
    """
    path = directory / ("config.json" if layout == HUGGINGFACE else "params.json")
    embedding, head = NAMES[0][layout], NAMES[-1][layout]

    def parse(data):
        raw = {**json.loads(data)}
        raw["sliding_window"] = raw.get("sliding_window") or None  # 0 means no window
        if raw.get("tie_word_embeddings") and head not in tensors and embedding in tensors:
            tensors[head], raw["tie_word_embeddings"] = tensors[embedding], False
            notes.append("the embedding is the output projection too, as tie_word_embeddings says")
        config = MixtralConfig.from_dict(raw) if layout == HUGGINGFACE else read_params(
            path.name, raw)
        if config.num_hidden_layers * config.num_local_experts > 2**14:  # too many to list them
            raise ValueError("num_hidden_layers or num_local_experts is too large")
        return config, raw

    return read_file(path, parse)


def expected_tensors(layout, config, scheme, tensors):
    """Map the name of each tensor that a checkpoint must have to its kind and shape, in words. With
    a quantization_config, any matrix may be stored in 4 bits."""
    if scheme is not None:
        load_int4().check_scheme(scheme)
    expected = {}
    for p in parameters(config):
        name, shape = p.names[layout], list(p.shape)
        if layout == FUSED and p.expert is not None:
            shape = [config.num_local_experts * config.intermediate_size, config.hidden_size]
        if scheme is not None and f"{name}_packed" in tensors:
            M, D = shape
            G = load_int4().group_size(name, D, tensors)
            expected |= {f"{name}_packed": f"torch.int32 of shape {[M, D // 8]}",
                         f"{name}_scale": f"floats of shape {[M, D // G]}",
                         f"{name}_shape": "torch.int64 of shape [2]"}
        else:
            expected[name] = f"floats of shape {shape}"
    return expected


def open_files(directory):
    """All tensors of a directory by name, the files that hold them, and a list of notes. Raises
    ValueError naming files that are missing or damaged and names that occur twice."""
    files, weight_map, notes = choose_files(directory)
    tensors, file_of, problems = {}, {}, []
    missing = ", ".join(path.name for path in files if not path.exists())
    for path in filter(Path.exists, files):
        try:
            content = (load_file if path.suffix == ".safetensors" else open_pickle)(path)
        except Exception as error:  # damaged bytes lead the two libraries to errors of any type
            problems.append(f"{path.name}: not readable: {what_is_wrong(path, error)}")
            continue
        for name, tensor in content.items():
            if name not in tensors or weight_map.get(name) == path.name:
                tensors[name], file_of[name] = tensor, path.name
            elif weight_map.get(name) != file_of[name]:
                problems.append(f"{name} is in both {file_of[name]} and {path.name}")
    if missing and weight_map and weight_map.keys() <= tensors.keys():
        notes.append(f"{missing}: missing, but the other files hold every tensor")
    elif missing:  # named by the index, or a link to nothing
        problems.append(f"{missing}: missing; download it again")
    if problems:
        raise ValueError(f"{directory}: {'; '.join(problems[:9])}")
    return tensors, files, notes


def choose_files(directory):
    """The files with the weights, the file of each tensor by its name, and a list of notes.

    If there is an index, it decides, because older shards and other copies may lie beside the files
    that it names. Without one, the map from tensors to files is empty. If none of its files exists,
    it was left over from another upload and is ignored. Raises ValueError if there are no weights.
    """
    if not directory.is_dir():
        kind = FOREIGN_FILES.get(f"*{directory.suffix}", "is a file")
        raise ValueError(f"{directory}: {kind if directory.exists() else 'does not exist'}; wanted "
                         "the directory of a checkpoint")
    notes = []
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin"),
                         ("consolidated", ".safetensors"), ("consolidated.[0-9][0-9]", ".pth"),
                         ("consolidated.[0-9][0-9]", ".pt")):
        index = directory / f"{stem}{suffix}.index.json"
        weight_map = read_file(index, files_of_tensors) if index.exists() else {}
        files = [directory / name for name in sorted(set(weight_map.values()))]
        if any(path.exists() for path in files):
            return files, weight_map, notes
        if weight_map:
            notes.append(f"{index}: ignored, because none of its files is here, such as "
                         f"{files[0].name}")
        whole = directory / f"{stem}{suffix}"
        if files := [whole] if whole.exists() else sorted(directory.glob(f"{stem}*{suffix}")):
            return files, {}, notes
    refuse(directory, FOREIGN_FILES, directory.glob)
    if files := sorted(directory.glob("*.safetensors")):
        return files, {}, notes
    raise ValueError("; ".join([f"{directory}: no weights here; wanted model*.safetensors, "
                                "pytorch_model*.bin or consolidated.*", *notes]))


def files_of_tensors(data):
    """The name of the file of each tensor, from the bytes of an index."""
    return {name: os.path.basename(file) for name, file in json.loads(data)["weight_map"].items()}


def what_is_wrong(path, error):
    """One line about a file that could not be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            return "a Git LFS pointer in place of the file; get the file with: git lfs pull"
        if start.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9"):  # before PyTorch 1.6
            return "the old format of torch.save; load it with torch.load and save it again"
    if isinstance(error, UnpicklingError):
        return "damaged, or holds Python objects other than tensors, which could run code"
    cause = getattr(error, "strerror", None) or reason(error).splitlines()[0]
    return f"{cause}; if it is a download, repeat it"


def open_pickle(path):
    """The tensors in a file of torch.save by name, mapped. Raises an error of any type."""
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type for record in archive.infolist()):
            raise ValueError("compressed, which torch.load would not see; load it without mmap and "
                             "save it again")
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"wanted a dict of tensors, got {type(content).__name__}")
    for name in ("model", "state_dict"):  # as programs for training save it, with their own state
        content = content[name] if isinstance(content.get(name), dict) else content
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_cpu:
            raise ValueError(f"{name} is not a dense tensor")
    return {str(name): tensor for name, tensor in content.items()}


# ------------------------------------------------------------------ writing files

class Lazy(NamedTuple):
    """A tensor for `write_safetensors` that is computed when it is written: `compute()` returns a
    contiguous CPU tensor of this dtype with as many elements."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path, tensors, metadata=FORMAT):
    """Write a safetensors file. It is complete or, after any error, not there.

    It begins with 8 bytes, the length of a JSON text, which follows and says where each tensor
    begins and ends. `tensors` maps names to tensors or `Lazy` tensors, of a dtype in WRITABLE. The
    library's own writer needs NumPy and all tensors at once. Raises ValueError for a tensor or a
    file that cannot be written.
    """
    tensors = in_aligned_order(tensors)
    codes = {dtype: code for code, dtype in WRITABLE.items()}
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors for programs that map the file
    with complete_or_absent(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            write_tensor(file, name, tensor)


def in_aligned_order(tensors):
    """The tensors in their order or, if that leaves one unaligned, by descending item size."""
    begin = 0
    for tensor in tensors.values():
        if begin % tensor.dtype.itemsize:
            return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        begin += tensor.nbytes
    return tensors


def write_tensor(file, name, tensor):
    """Write the numbers of a tensor as they are in memory, which must be contiguous."""
    numbers = tensor.compute() if isinstance(tensor, Lazy) else tensor
    if not numbers.is_cpu or not numbers.is_contiguous() or numbers.dtype != tensor.dtype:
        raise ValueError(f"{name}: is not contiguous {tensor.dtype} in CPU memory; "
                         "call .cpu().contiguous() first")
    if numbers.nbytes != tensor.nbytes:
        raise ValueError(f"{name}: wanted {tensor.nbytes} bytes, got {numbers.nbytes}")
    # PyTorch itself exposes the memory of a tensor as bytes only through NumPy.
    file.write((ctypes.c_char * numbers.nbytes).from_address(numbers.data_ptr()))


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_output(path, directory=False):
    """Raises ValueError unless a file can be written here, or a directory can be created. A device,
    a pipe or the like is never replaced. Call this before expensive work."""
    path = Path(os.path.realpath(path))
    if path.exists() and (directory or not path.is_file()):
        raise ValueError(f"{path}: not written: it exists already; choose another path")
    parent = next(parent for parent in path.parents if parent.exists() or not directory)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: not written: {parent} is not a writable directory")


@contextlib.contextmanager
def complete_or_absent(path, directory=False):
    """A temporary path for a file or a new directory that gets the name `path` at the end.

    After any error, Ctrl-C included, the temporary file is removed and `path` is as it was. If
    `path` is a link, its target is replaced. Raises ValueError if `path` cannot be written.
    """
    place = Path(os.path.realpath(path))
    part = place.with_name(f".{place.name}.part")
    check_output(place, directory)
    try:
        remove(part)
        if directory:
            part.mkdir(parents=True)
        yield part
        part.replace(place)
    except OSError as error:
        raise ValueError(f"{path}: not written: {reason(error)}") from None
    finally:
        remove(part)


def remove(path):
    """Delete a file or a directory with all it holds, if it exists."""
    shutil.rmtree(path, ignore_errors=True)  # does nothing to a file
    path.unlink(missing_ok=True)


# ------------------------------------------------------------------ the command line


def reason(error):
    """The text of an error, without the number of an OSError. If it has no text, its type."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def report(text):
    """Print a line at once. If nobody reads it, the conversion goes on and says nothing more."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def size_in_bytes(text):
    """A number of bytes as people write it.

    >>> size_in_bytes("256MB"), size_in_bytes("1.5GB")
    (256000000, 1500000000)
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([KMG])B", text.upper())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"wanted a size as 256MB or 4GB, got {text!r}")
    return int(float(match[1]) * 1000 ** " KMG".index(match[2]))


def arguments(argv):
    p = argparse.ArgumentParser(
        prog="convert.py", description="Convert a Mixtral checkpoint.", allow_abbrev=False)
    p.add_argument("--input-dir", "--input_dir", type=Path, required=True, metavar="RAW",
                   help="a checkpoint as Mistral or Hugging Face released it")
    p.add_argument("--output-dir", "--output_dir", type=Path, required=True, metavar="OUT",
                   help="the directory to create")
    p.add_argument("--to", choices=("huggingface", "mistral"), default="huggingface",
                   help="the layout to write (default: %(default)s)")
    p.add_argument("--dtype", choices=[*(str(dtype)[6:] for dtype in FLOATS.values()), "int4"],
                   help="convert the numbers (default: keep their dtype); int4 stores the experts "
                        "in 4 bits and everything else in 16")
    p.add_argument("--group-size", type=int, metavar="G",
                   help="weights that share a scale, for int4: 32, 64, 128 or 256 (default: 128)")
    p.add_argument("--max-shard-size", type=size_in_bytes, default="4GB", metavar="SIZE",
                   help="size of a file, as 256MB (default: %(default)s); ignored for mistral")
    args = p.parse_args(argv)
    if args.dtype == "int4" and args.to == "mistral":
        p.error("--dtype int4 needs --to huggingface: Mistral's layout has no 4-bit weights")
    if args.dtype != "int4" and args.group_size is not None:
        p.error("--group-size needs --dtype int4")
    if args.dtype == "int4" and args.group_size is None:
        args.group_size = 128
    return args


def main(argv=None):
    args = arguments(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be valid text
    to = MISTRAL if args.to == "mistral" else HUGGINGFACE
    dtype = getattr(torch, args.dtype) if args.dtype not in (None, "int4") else None
    out = shlex.quote(re.sub("^-", "./-", str(args.output_dir)))  # else it looks like an option
    try:
        convert(args.input_dir, args.output_dir, to, dtype, args.max_shard_size, args.group_size)
        report(f"next: give {out} to Mistral's own code" if to == MISTRAL else
               f'next: python generate.py --model {out} --prompt "..."')
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        text = " ".join(reason(error).split())
        print("convert.py:", "".join(c if c.isprintable() else "?" for c in text), file=sys.stderr)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
