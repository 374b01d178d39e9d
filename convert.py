"""Convert a Mixtral checkpoint: `python convert.py --input_dir RAW --output_dir OUT`.

The weights of Mixtral are published in three layouts. The names of the tensors tell them apart:

    layout          files                                      differences from Hugging Face's
    Hugging Face    config.json; model*.safetensors or
                    pytorch_model*.bin                         -
    Mistral         params.json; consolidated.safetensors,     names; row order of wq and wk
                    consolidated.00.pth or its -splitN parts
    Mistral, fused  params.json; consolidated.00.pt … .07.pt   also: the experts of a layer are one
                                                               (E·M, D), with w2 transposed

All three can be read. The Hugging Face layout and the first Mistral layout can be written.
`--dtype int4` stores the experts in 4 bits, in the Hugging Face layout and in the format that
`Int4Linear` in mixtral.py describes. A checkpoint with 4-bit weights is copied as it is, or with
--dtype bfloat16 turned back into an ordinary one.

The row order differs because of the rotary position embedding. Mistral's code rotates neighbouring
rows of a head together, and Hugging Face's code rotates row i with row i + d/2. The same pairs must
meet, so every head of q and k is reordered. For d = 8:

    Mistral           as (d/2, 2)    transposed     Hugging Face
    0 1 2 3 4 5 6 7      0 1         0 2 4 6       0 2 4 6 1 3 5 7
    └─┘ └─┘ └─┘ └─┘      2 3         1 3 5 7       Row 0 is still rotated with row 1,
                         4 5                       row 2 with row 3, and so on.
                         6 7

Memory: at first, only names, shapes and file offsets are read. The numbers of a tensor are read
when it is written, so memory holds at most one tensor and its converted copy.

Safety: pickles are opened with weights_only=True, so they cannot run code. The output is written to
`.OUT.part` beside OUT and renamed when it is complete.

Not included: other quantised formats, LoRA weights, non-contiguous tensors in pickles, new chat
templates (existing ones are copied), pieces that a v3 tokenizer declares as whole (its
tokenizer.json spells them out), and two runs that write the same output at the same time.

Exit codes: 0 success, 1 bad input, 2 bad arguments, 130 interrupted. If nobody reads standard
output any more, the conversion continues without progress.
"""

import argparse
import bisect
import contextlib
import ctypes
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from safetensors import safe_open

from fast.int4 import int4_group_size, unpack
from mixtral import MixtralConfig, read_json
from tokenizer import Tokenizer

# ------------------------------------------------------------------ names, shapes and row order

HUGGINGFACE, MISTRAL, FUSED = LAYOUTS = range(3)  # the columns of NAMES
TITLES = ("Hugging Face", "Mistral", "Mistral with fused experts")

# Each row gives the name of a tensor in the three layouts, and its shape. For experts it is the
# shape of one expert. A leading dot stands for `model.layers.N.` in the first column and for
# `layers.N.` in the others, and `e` for the number of an expert. Every name except those of fused
# experts ends in `.weight`.
NAMES = [line.split() for line in """
    model.embed_tokens              tok_embeddings              tok_embeddings          V    D
    .input_layernorm                .attention_norm             .attention_norm         D
    .self_attn.q_proj               .attention.wq               .attention.wq           H·d  D
    .self_attn.k_proj               .attention.wk               .attention.wk           K·d  D
    .self_attn.v_proj               .attention.wv               .attention.wv           K·d  D
    .self_attn.o_proj               .attention.wo               .attention.wo           D    H·d
    .post_attention_layernorm       .ffn_norm                   .ffn_norm               D
    .block_sparse_moe.gate          .feed_forward.gate          .block_sparse_moe.gate  E    D
    .block_sparse_moe.experts.e.w1  .feed_forward.experts.e.w1  .block_sparse_moe.w1    M    D
    .block_sparse_moe.experts.e.w2  .feed_forward.experts.e.w2  .block_sparse_moe.w2    D    M
    .block_sparse_moe.experts.e.w3  .feed_forward.experts.e.w3  .block_sparse_moe.w3    M    D
    model.norm                      norm                        norm                    D
    lm_head                         output                      output                  V    D
""".strip().splitlines()]


def regroup(weight, heads, columns):
    """Write the d rows of each head as a matrix with `columns` columns, and transpose the matrix.

    (H·d, D) -> (H·d, D)

    2 columns turn Mistral's row order into Hugging Face's, and d/2 columns turn it back. `heads` is
    H for q and K for k.

    >>> rows = torch.arange(8)[:, None]
    >>> reordered = regroup(rows, heads=1, columns=2)
    >>> reordered.flatten().tolist()
    [0, 2, 4, 6, 1, 3, 5, 7]
    >>> regroup(reordered, heads=1, columns=4).flatten().tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return weight.unflatten(0, (heads, -1, columns)).transpose(1, 2).flatten(0, 2)


def full_name(row, layout, layer=0, expert=0):
    """The name of a tensor: a row of NAMES in one layout, for one layer and one expert."""
    name = row[layout]
    if name.startswith("."):
        name = f"{'model.layers.' if layout == HUGGINGFACE else 'layers.'}{layer}{name}"
    if ".e." in row[HUGGINGFACE] and ".e." not in name:
        return name
    return name.replace(".e.", f".{expert}.") + ".weight"


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

    def parameter(row, layer=0, expert=None):
        names = tuple(full_name(row, layout, layer, expert) for layout in LAYOUTS)
        shape = tuple(sizes[letter] for letter in row[3:])
        return Parameter(names, shape, expert)

    embedding, *block, norm, head = NAMES
    yield parameter(embedding)
    for layer, row in itertools.product(range(c.num_hidden_layers), block):
        for expert in range(c.num_local_experts) if ".e." in row[HUGGINGFACE] else [None]:
            yield parameter(row, layer, expert)
    yield parameter(norm)
    yield parameter(head)


# ------------------------------------------------------------------ from one layout to another


class Stored(NamedTuple):
    """A tensor in a file. `read(first, count)` reads these rows, or all by default."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a str describes something that cannot be read
    read: Callable[..., torch.Tensor]

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(NamedTuple):
    """A complete and well-formed checkpoint, and what to convert its weights to."""

    layout: int
    config: MixtralConfig
    stored: dict[str, Stored]
    dtype: torch.dtype  # to convert to
    scheme: dict | None = None  # the quantization_config to write; None means no 4-bit weights
    group_size: int | None = None  # None unless the experts are to be stored in 4 bits


BLOCK = 2**17  # weights converted at a time, so that they stay in the CPU's cache


def read_rows(stored, name, first, count):
    """Some rows of a matrix. Those of a 4-bit matrix are in float64, which makes them exact."""
    if f"{name}_packed" not in stored:
        return stored[name].read(first, count)
    words, scale = (stored[name + end].read(first, count) for end in ("_packed", "_scale"))
    return unpack(words, scale.double())


def read_parameter(checkpoint, parameter, to):
    """Yield some rows of a parameter after another, in the order of the layout `to`."""
    layout, config, stored = checkpoint.layout, checkpoint.config, checkpoint.stored
    name, rows, first = parameter.names[layout], parameter.shape[0], 0
    step = max(1, BLOCK * rows // math.prod(parameter.shape))
    if layout == FUSED and parameter.expert is not None:
        M = config.intermediate_size
        first = parameter.expert * M
        if name.endswith("w2"):
            yield from read_rows(stored, name, first, M).T.contiguous().split(step)
            return
    reordered = parameter.names[MISTRAL].endswith((".wq.weight", ".wk.weight"))
    if reordered and (layout == HUGGINGFACE) != (to == HUGGINGFACE):
        columns = 2 if to == HUGGINGFACE else config.head_dim // 2
        weight = read_rows(stored, name, 0, rows)
        yield from regroup(weight, rows // config.head_dim, columns).split(step)
        return
    for n in range(0, rows, step):
        yield read_rows(stored, name, first + n, min(step, rows - n))


def converted(checkpoint, parameter, to):
    """Yield what `read_parameter` does in the dtype to convert to.

    Raises ValueError if a number would become infinite.
    """
    name, dtype = parameter.names[checkpoint.layout], checkpoint.dtype
    for weight in read_parameter(checkpoint, parameter, to):
        result = weight.to(dtype)
        if dtype != weight.dtype and (result.isinf() & weight.isfinite()).any():
            raise ValueError(f"{name}: holds numbers too large for {dtype}; choose another --dtype")
        yield result


def output_tensors(checkpoint, to, errors=None):
    """The tensors to write by name, in the order of the forward pass. Nothing is read yet.

    `errors` is a dict to which `quantised` adds.
    """
    tensors = {}
    for p in parameters(checkpoint.config):
        name = p.names[to]
        if checkpoint.group_size and p.expert is not None:
            tensors |= quantised(checkpoint, p, errors)
        elif checkpoint.scheme and f"{name}_packed" in checkpoint.stored:
            for part in (f"{name}_packed", f"{name}_scale", f"{name}_shape"):
                stored = checkpoint.stored[part]
                tensors[part] = Lazy(stored.shape, stored.dtype, lambda t=stored: [t.read()])
        else:
            tensors[name] = Lazy(p.shape, checkpoint.dtype, partial(converted, checkpoint, p, to))
    return tensors


# ------------------------------------------------------------------ params.json and config.json

# The fields of params.json. The fused layout has a params.json with Hugging Face's field names.
PARAMS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "head_dim": "head_dim",
          "hidden_dim": "intermediate_size", "n_heads": "num_attention_heads",
          "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps",
          "vocab_size": "vocab_size", "rope_theta": "rope_theta",
          "sliding_window": "sliding_window", "max_seq_len": "max_position_embeddings",
          "num_experts_per_tok": "num_experts_per_tok", "num_experts": "num_local_experts"}
OPTIONAL = {"head_dim", "rope_theta", "sliding_window", "max_position_embeddings",
            "num_experts_per_tok"}


def context_length(hidden_size):
    """The context length of 8x22B or of 8x7B, as released. params.json rarely holds it."""
    return 65536 if hidden_size == 6144 else 32768


def read_params(path):
    """The configuration in a params.json. Raises ValueError naming the fields that are missing.

    An optional field that is absent, null or 0 gets its default. For rope_theta that is 1e6.
    """
    raw = read_json(path)
    raw |= raw["moe"] if isinstance(raw.get("moe"), dict) else {}
    fields = {PARAMS.get(name, name): value for name, value in raw.items()}
    fields = {name: value for name, value in fields.items()
              if value is not None and (value != 0 or name not in OPTIONAL)}
    required = {field: name for name, field in PARAMS.items() if field not in OPTIONAL}
    if missing := [name for field, name in required.items() if field not in fields]:
        raise ValueError(f"{path}: not the params.json of a Mixtral: missing {', '.join(missing)}")
    window = str(fields.get("sliding_window")).lower()
    if window in ("none", "null") or window.isdecimal():  # the fused release writes it as a string
        fields["sliding_window"] = int(window) if window.isdecimal() else None
    fields.setdefault("max_position_embeddings", context_length(fields["hidden_size"]))
    return MixtralConfig.from_dict(fields)


def params_from_config(config):
    """The params.json of a configuration, without a window or context of the default size."""
    params = {name: getattr(config, field) for name, field in PARAMS.items()}
    moe = {name: params.pop(name) for name in ("num_experts_per_tok", "num_experts")}
    defaults = {"sliding_window": None, "max_seq_len": context_length(config.hidden_size)}
    return {name: value for name, value in params.items()
            if name not in defaults or value != defaults[name]} | {"moe": moe}


def write_config(part, checkpoint):
    """Write config.json, with rope_theta where transformers 4 has it and version 5 accepts it."""
    config, scheme = checkpoint.config, checkpoint.scheme
    write_json(part / "config.json", {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        **dataclasses.asdict(config), "torch_dtype": str(checkpoint.dtype).removeprefix("torch."),
        **({"quantization_config": scheme} if scheme else {})})
    if not (part / "generation_config.json").exists():
        write_json(part / "generation_config.json", {
            "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id})


# ------------------------------------------------------------------ 4-bit weights

GROUP_SIZES = (32, 64, 128, 256)  # those that other programs have fast kernels for
# The values of c in the equation of `quantise`. On the embedded model in groups of 32 they leave a
# relative error of the weights of 8.8 %; c = 7.5 alone leaves 9.6 %, and steps of 0.5 leave 8.9 %.
DIVISORS = [n / 4 for n in range(27, 37)]


def quantise(weight, G, dtype, divisors=DIVISORS):
    """Round every group of G weights of a row to multiples q·s of a scale s, with −8 ≤ q ≤ 7.

    weight (M, D) -> (M, D), (M, D/G)

        s = max|w| / c, rounded to dtype        q = clamp(round(w / s), −8, 7)

    Each group takes the c with the least squared error Σ(w − q·s)². A larger c clips the largest
    weights and rounds all others more finely. The second result holds the scales.
    """
    groups = weight.unflatten(1, (-1, G))  # (M, D/G, G)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    best = least = None
    for divisor in divisors:
        scale = (largest / divisor).to(dtype).to(weight.dtype)
        scale.masked_fill_(scale == 0, 1)  # a group of zeros
        q = (groups / scale).round_().clamp_(-8, 7)
        error = (groups - q * scale).square_().sum(dim=-1, keepdim=True)
        best, least = (scale, error) if best is None else (
            torch.where(error < least, scale, best), torch.minimum(error, least))
    q = (groups / best).round_().clamp_(-8, 7)
    return q.flatten(1), best[:, :, 0].to(dtype)


def pack(q):
    """Store eight neighbouring integers in −8 … 7 in each 32-bit word; `unpack` reads them.

    (M, D) -> (M, D/8)

    >>> f"{pack(torch.arange(-8, 0)[None]).item():x}"
    '76543210'
    """
    u = (q + 8).to(torch.int32).unflatten(1, (-1, 8))
    words = u[:, :, 7]
    for n in range(6, -1, -1):
        words = words << 4 | u[:, :, n]
    return words


def quantised(checkpoint, parameter, errors):
    """The three tensors of an expert's matrix in 4 bits.

    The scales are found with the words, and wait in memory until they are written after them.
    `errors` gets Σ(w − q·s)² and Σw² of each layer.
    """
    name, (M, D), G = parameter.names[HUGGINGFACE], parameter.shape, checkpoint.group_size
    scales, sums = [], errors.setdefault(int(name.split(".")[2]), [0.0, 0.0])

    def words():
        for weight in read_parameter(checkpoint, parameter, HUGGINGFACE):
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            q, scale = quantise(weight, G, checkpoint.dtype)
            if not scale.isfinite().all():
                raise ValueError(f"{parameter.names[checkpoint.layout]}: holds NaN or numbers too "
                                 f"large for 4 bits with scales of {checkpoint.dtype}")
            yield pack(q)
            scales.append(scale)
            rounded = (q.unflatten(1, (-1, G)) * scale[:, :, None]).flatten(1)
            sums[0] += (weight - rounded).square().sum().item()
            sums[1] += weight.square().sum().item()

    def release():
        yield torch.cat(scales)
        scales.clear()

    return {f"{name}_packed": Lazy((M, D // 8), torch.int32, words),
            f"{name}_scale": Lazy((M, D // G), checkpoint.dtype, release),
            f"{name}_shape": torch.tensor((M, D))}


def int4_scheme(G):
    """The quantization_config with which transformers and vLLM read 4-bit experts."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": G}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"]}


def check_group_size(place, config, scheme, G):
    """Raises ValueError unless experts of these widths can be stored in groups of G."""
    if scheme is not None:
        raise ValueError(f"{place}: has 4-bit weights already; leave out --dtype to keep them, or "
                         "convert the original weights")
    widths = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    if odd := [f"{name} {width}" for name, width in widths.items() if width % G]:
        fitting = [str(size) for size in GROUP_SIZES if not math.gcd(*widths.values()) % size]
        raise ValueError(f"{place}: groups of {G} do not divide {' and '.join(odd)}; "
                         f"--group-size can be {' or '.join(fitting) or 'nothing'} here")


def report_errors(errors):
    """Print ‖W − Ŵ‖ / ‖W‖ for the 4-bit weights Ŵ of each layer."""
    for layer, (error, size) in errors.items():
        report(f"layer {layer}: relative error of the 4-bit weights "
               f"{100 * math.sqrt(error / (size or 1)):.2f} %")


# ------------------------------------------------------------------ the tokenizer for transformers

EXTRAS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "chat_template.jinja", "generation_config.json")


def write_small_files(source, part, checkpoint, to):
    """Write the configuration and the tokenizer. Raises ValueError for an unfitting tokenizer."""
    models = list(source.glob("tokenizer.model")) or list(source.glob("tokenizer.model.v*"))
    if len(models) == 1:  # newer releases of 8x22B call it tokenizer.model.v3
        shutil.copyfile(models[0], part / "tokenizer.model")
    else:
        report(f"{source} has no tokenizer.model; copy the one of this model to the output")
    if to == MISTRAL:
        write_json(part / "params.json", params_from_config(checkpoint.config))
        return
    for name in EXTRAS:
        if (source / name).exists():
            shutil.copyfile(source / name, part / name)
    write_config(part, checkpoint)
    if len(models) == 1 and not (part / "tokenizer.json").exists():
        write_tokenizer(models[0], part, checkpoint.config)


def write_tokenizer(model, part, config):
    """Write tokenizer.json, because transformers needs more packages to read a tokenizer.model.

    As in every tokenizer of transformers, the text `</s>` encodes to the control token. Raises
    ValueError if the tokenizer.model cannot belong to this model.
    """
    t = Tokenizer(model)
    if t.vocab_size > config.vocab_size:
        raise ValueError(f"{model}: has {t.vocab_size} pieces, but the model's vocabulary has only "
                         f"{config.vocab_size}; they do not belong together")
    write_json(part / "tokenizer.json", fast_tokenizer(t))
    if not (part / "tokenizer_config.json").exists():
        ids = {"bos_token": t.bos_id, "eos_token": t.eos_id, "unk_token": t.unk_id}
        write_json(part / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            **{name: t.pieces[i] for name, i in ids.items()}})


def fast_tokenizer(t):
    """The tokenizer.json of a tokenizer: a ▁ in front, ▁ for each space, BPE, and BOS first."""
    plain = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t.pieces[i], "special": True} | plain
                         for i in sorted({t.unk_id, *t.control})],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "post_processor": bos_template(t),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": t.pieces[t.unk_id], "fuse_unk": True,
                  "byte_fallback": True, "merges": merges(t),
                  "vocab": {piece: i for i, piece in enumerate(t.pieces)}}}


def bos_template(t):
    """The post-processor that puts BOS in front of a text or of a pair of texts."""
    bos = t.pieces[t.bos_id]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {"type": "TemplateProcessing",
            "single": [start, first], "pair": [start, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [t.bos_id], "tokens": [bos]}}}


def merges(t):
    """The merges of a BPE, best first: every split of a piece into two other pieces.

    A merge ranks as its result does, by score. Equal scores rank by id; only runs of spaces have
    them, and the shorter run comes first.
    """
    ranked = sorted(t.scores, key=lambda piece: (-t.scores[piece], t.ids[piece]))
    return [f"{piece[:n]} {piece[n:]}" for piece in ranked for n in range(1, len(piece))
            if piece[:n] in t.scores and piece[n:] in t.scores]


# ------------------------------------------------------------------ a whole checkpoint


def convert(source, out, to=HUGGINGFACE, dtype=None, limit=4 * 10**9, overwrite=False,
            group_size=None):
    """Convert the checkpoint in the directory `source` to the layout `to` in the directory `out`.

    `limit` is the size of a file in bytes. With a group_size the experts are stored in 4 bits.
    Raises ValueError or OSError and then writes nothing.
    """
    source, out, errors = Path(source).resolve(), Path(out).resolve(), {}
    check_places(source, out, overwrite)
    checkpoint = open_checkpoint(source, dtype, group_size)
    if checkpoint.scheme and to == MISTRAL:
        raise ValueError(f"{source}: Mistral's layout has no 4-bit weights; add --dtype bfloat16")
    files = shards(output_tensors(checkpoint, to, errors), to, limit)
    announce(source, out, checkpoint, files)
    check_space(out, total_size(files))
    with complete_or_absent(out, directory=True) as part:
        write_small_files(source, part, checkpoint, to)  # first, since it may refuse
        write_weights(part, files)
    if group_size:
        report_errors(errors)
        before = total_size({"": checkpoint.stored})
        report(f"{human_size(before)} of weights before, {human_size(total_size(files))} after")


def shards(tensors, to, limit):
    """The tensors of each file. A file has at most `limit` bytes of tensors, or one larger tensor.

    The Mistral layout has only one file.
    """
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


def write_weights(part, files):
    """Write all files with weights, and an index if there are several."""
    progress = Progress(total_size(files))
    for file, group in files.items():
        write_safetensors(part / file, group, FORMAT, progress.add)
    if len(files) > 1:
        write_json(part / "model.safetensors.index.json", {
            "metadata": {"total_size": total_size(files)},
            "weight_map": {name: file for file, group in files.items() for name in group}})


# ------------------------------------------------------------------ opening a checkpoint

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
WRITABLE = FLOATS | {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}


def open_checkpoint(directory, dtype=None, group_size=None):
    """Find out which layout a directory holds and check it against its configuration.

    `dtype` is the one to convert to; None keeps the checkpoint's. With a group_size the experts are
    to be stored in 4 bits. Raises ValueError listing what is wrong.
    """
    stored = open_all(directory)
    matches = [sum(full_name(row, layout) in stored for row in NAMES) for layout in LAYOUTS]
    if not any(matches):
        raise ValueError(f"{directory}: no tensor has a name that Mixtral uses; the first of "
                         f"{len(stored)} is {next(iter(stored), None)}")
    layout = matches.index(max(matches))
    config, scheme = read_configuration(directory, layout)
    check_tensors(stored, expected_tensors(stored, layout, config, scheme), directory)
    dtypes = {tensor.dtype for tensor in stored.values()} & set(FLOATS.values())
    if group_size:
        check_group_size(directory, config, scheme, group_size)
        dtype = torch.float16 if dtypes == {torch.float16} else torch.bfloat16
        return Checkpoint(layout, config, stored, dtype, int4_scheme(group_size), group_size)
    if not dtype and len(dtypes) > 1:
        raise ValueError(f"{directory}: the weights have the dtypes "
                         f"{' and '.join(sorted(map(str, dtypes)))}; choose one with --dtype")
    return Checkpoint(layout, config, stored, dtype or dtypes.pop(), None if dtype else scheme)


def read_configuration(directory, layout):
    """The configuration in a directory of this layout and its quantization_config, if any."""
    if layout != HUGGINGFACE:
        return read_params(directory / "params.json"), None
    raw = read_json(directory / "config.json")
    return MixtralConfig.from_dict(raw), raw.get("quantization_config")


def expected_tensors(stored, layout, config, scheme):
    """Map the name of each tensor to its shape and its dtype, or to None for any of FLOATS.

    With a quantization_config, any matrix may be stored in 4 bits.
    """
    G, expected = None if scheme is None else int4_group_size(scheme), {}
    for p in parameters(config):
        name, shape = p.names[layout], p.shape
        if layout == FUSED and p.expert is not None:
            shape = config.num_local_experts * config.intermediate_size, config.hidden_size
        if G and f"{name}_packed" in stored and len(shape) == 2 and shape[1] % G == 0:
            M, D = shape
            expected |= {f"{name}_packed": ((M, D // 8), torch.int32),
                         f"{name}_scale": ((M, D // G), None),
                         f"{name}_shape": ((2,), torch.int64)}
        else:
            expected[name] = shape, None
    return expected


def check_tensors(stored, expected, place):
    """Raises ValueError listing the tensors that are missing, unknown or of a wrong form."""
    problems = [f"missing {name}" for name in expected if name not in stored]
    for name, tensor in stored.items():
        shape, dtype = expected.get(name, (None, None))
        if shape is None:
            problems.append(f"unknown {name}")
        elif tensor.dtype not in ([dtype] if dtype else FLOATS.values()):
            wanted = dtype or "a contiguous tensor of floats"
            problems.append(f"{name} is {tensor.dtype}, not {wanted}")
        elif tensor.shape != shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
        elif dtype == torch.int64:
            rows, words = expected[name.removesuffix("_shape") + "_packed"][0]
            if (found := tensor.read().tolist()) != [rows, 8 * words]:
                problems.append(f"{name} must hold {[rows, 8 * words]}, got {found}")
    refuse_if(problems, f"{place}: the weights do not fit the configuration")


def open_all(directory):
    """All tensors of a directory by name. Raises ValueError naming bad files and repeated names."""
    stored, files, problems = {}, {}, []
    for paths in weight_files(directory):
        file = paths[0].name
        try:
            opened = open_safetensors if file.endswith(".safetensors") else open_pickle
            for name, tensor in opened(paths):
                if name in stored:
                    problems.append(f"{name} is in both {files[name]} and {file}")
                stored[name], files[name] = tensor, file
        except Exception as error:  # damaged bytes lead the two libraries to errors of any type
            problems.append(f"{file}: {damage(error)}")
    refuse_if(problems, directory)
    return stored


def damage(error):
    """What is wrong with a file, from the error that opening it raised."""
    if isinstance(error, UnpicklingError):
        code = re.search(r"GLOBAL (\S+)", str(error))
        return f"refused, because it would run {code[1]}" if code else "incomplete or damaged"
    text = reason(error).splitlines()[0]
    return text if type(error) is ValueError else f"incomplete or damaged: {text}"


def refuse_if(problems, place):
    """Raise a ValueError that lists the problems found in a place, if there are any."""
    if problems:
        more = [f"and {len(problems) - 20} more problems"] if len(problems) > 20 else []
        raise ValueError(f"{place}: {'; '.join(problems[:20] + more)}")


def weight_files(directory):
    """The files with the weights. Each is a tuple of its parts, which has one item unless split.

    Of several sets of files, the first in the order below is read. Raises ValueError if there are
    none, or if a file or part is missing.
    """
    for stem in ("model.safetensors", "pytorch_model.bin", "consolidated.safetensors"):
        if (index := directory / f"{stem}.index.json").exists():
            return [(file,) for file in read_index(index)]
        if (directory / stem).exists():
            return [(directory / stem,)]
    if whole := sorted([*directory.glob("consolidated.[0-9][0-9].pt"),
                        *directory.glob("consolidated.[0-9][0-9].pth")]):
        return [(path,) for path in whole]
    parts = {int(match[1]): path for path in directory.iterdir()
             if (match := re.fullmatch(r"consolidated\.00\.pth-split([0-9]{1,3})", path.name))}
    if not parts:
        raise ValueError(f"{directory}: no weights here; wanted model*.safetensors, "
                         "pytorch_model*.bin or consolidated.*")
    refuse_if([f"missing consolidated.00.pth-split{n}" for n in range(max(parts))
               if n not in parts], directory)
    return [tuple(parts[n] for n in sorted(parts))]


def read_index(path):
    """The files that a shard index (*.index.json) names. Raises ValueError if one is missing."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: wanted a weight_map from names to files")
    names = sorted({os.path.basename(str(name)) for name in weight_map.values()})
    refuse_if([f"missing {name:.80}" for name in names if not os.path.isfile(path.parent / name)],
              path.parent)
    return [path.parent / name for name in names]


# ------------------------------------------------------------------ reading files


class ConcatenatedFiles(io.RawIOBase):
    """Several files read as if they were one, so that a split checkpoint need not be joined."""

    def __init__(self, paths):
        self.files = [open(path, "rb", buffering=0) for path in paths]
        self.starts = [0, *itertools.accumulate(os.path.getsize(path) for path in paths)]
        self.position = 0

    def close(self):
        for file in self.files:
            file.close()
        super().close()

    def seek(self, offset, whence=os.SEEK_SET):
        self.position = offset + (0, self.position, self.starts[-1])[whence]
        return self.position

    def readinto(self, buffer):
        """Fill the buffer unless the last file ends before. Returns the number of bytes read."""
        free = memoryview(buffer)
        while len(free) and self.position < self.starts[-1]:
            n = bisect.bisect(self.starts, self.position) - 1
            self.files[n].seek(self.position - self.starts[n])
            count = self.files[n].readinto(free)
            if not count:
                break
            self.position, free = self.position + count, free[count:]
        return len(buffer) - len(free)


def as_buffer(tensor):
    """The memory of a contiguous CPU tensor. PyTorch itself exposes it only through NumPy."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def in_file(paths, offset, shape, dtype):
    """A tensor that lies at this offset of a file, which may be split."""

    def read(first=0, count=None):
        tensor = torch.empty(count or shape[0], *shape[1:], dtype=dtype)
        try:
            with ConcatenatedFiles(paths) as file:
                file.seek(offset + first * tensor[0].nbytes)
                complete = file.readinto(as_buffer(tensor)) == tensor.nbytes
        except OSError as error:
            raise ValueError(f"{paths[0]}: not readable: {error.strerror}") from None
        if not complete:
            raise ValueError(f"{paths[0]}: the file ends before its tensors do")
        return tensor

    return Stored(tuple(shape), dtype, read)


def open_safetensors(paths):
    """Yield the name of each tensor in a safetensors file, and the tensor."""
    with safe_open(paths[0], framework="pt"):
        pass  # the library has now checked that the header is sound and the file complete
    with open(paths[0], "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        dtype, offset = entry["dtype"], 8 + length + entry["data_offsets"][0]
        yield name, in_file(paths, offset, entry["shape"], WRITABLE.get(dtype, dtype))


def open_pickle(paths):
    """Yield the name of each tensor in a file of torch.save, and the tensor."""
    with ConcatenatedFiles(paths) as file:
        sizes = record_sizes(zipfile.ZipFile(file))
        file.seek(0)
        content = torch.load(file, map_location="meta", weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"wanted a dict of tensors, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor) or not value.is_contiguous():
            yield str(name), Stored((), type(value).__name__, None)
            continue
        storage = value.untyped_storage()
        start = storage._checkpoint_offset  # set by torch.load: where the storage's bytes begin
        if storage.nbytes() and sizes.get(start) != storage.nbytes():
            raise ValueError(f"{name} is not where torch.save puts it; the file is damaged or was "
                             "repacked; load it and save it again")
        offset = start + value.storage_offset() * value.itemsize
        yield str(name), in_file(paths, offset, value.shape, value.dtype)


def record_sizes(archive):
    """Map the offset of each record of torch.save, which writes a zip archive, to its size.

    The list at the end of the archive gives the size of a record and where the next one begins.
    The header in front of a record, whose lengths no checksum protects, is not needed.
    """
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    ends, sizes = [*(entry.header_offset for entry in entries), archive.start_dir][1:], {}
    for entry, end in zip(entries, ends, strict=True):
        if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
            raise ValueError("big-endian; load and save it again on a little-endian machine")
        large = max(entry.header_offset, entry.file_size) >= 2**32 - 1
        descriptor = (24 if large else 16) if entry.flag_bits & 8 else 0  # bytes after the content
        if not entry.compress_type:
            sizes[end - descriptor - entry.file_size] = entry.file_size
    return sizes


# ------------------------------------------------------------------ writing files

FORMAT = {"format": "pt"}  # the metadata that transformers expects in a file of weights


class Lazy(NamedTuple):
    """A tensor for `write_safetensors` whose numbers are computed when they are written.

    `pieces()` yields contiguous CPU tensors of this dtype. Joined in order, their elements are
    those of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[torch.Tensor]]

    nbytes = Stored.nbytes


def write_safetensors(path, tensors, metadata=FORMAT, progress=None):
    """Write a safetensors file. It is complete or, after any error, not there.

    `tensors` maps names to tensors or `Lazy` tensors, of a dtype in WRITABLE. After each one,
    `progress` is called with its size. The library's own writer needs NumPy. Raises ValueError for
    a tensor that cannot be written and for a file that cannot be written.
    """
    tensors = in_aligned_order(tensors)
    header = safetensors_header(tensors, metadata)
    with complete_or_absent(path) as part, open(part, "wb") as file:
        file.write(header)
        for name, tensor in tensors.items():
            write_tensor(file, name, tensor)
            if progress:
                progress(tensor.nbytes)


def in_aligned_order(tensors):
    """The tensors in an order in which each begins at a multiple of its item size.

    That is the given order where possible, and otherwise one by descending item size.
    """
    begin = 0
    for tensor in tensors.values():
        if begin % tensor.dtype.itemsize:
            return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        begin += tensor.nbytes
    return tensors


def safetensors_header(tensors, metadata):
    """The first bytes of a safetensors file: the length of the JSON text, and the JSON text."""
    codes = {dtype: code for code, dtype in WRITABLE.items()}
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in codes:
            raise ValueError(f"{name}: cannot write {tensor.dtype}; convert it to one of "
                             f"{', '.join(map(str, codes))}")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors for programs that map the file
    return len(text).to_bytes(8, "little") + text


def write_tensor(file, name, tensor):
    """Write the numbers of a tensor as they are in memory."""
    size = 0
    for piece in tensor.pieces() if isinstance(tensor, Lazy) else [tensor]:
        if piece.device.type != "cpu" or not piece.is_contiguous() or piece.dtype != tensor.dtype:
            raise ValueError(f"{name}: is not contiguous {tensor.dtype} in CPU memory; "
                             "call .cpu().contiguous() first")
        file.write(as_buffer(piece))
        size += piece.nbytes
    if size != tensor.nbytes:
        raise ValueError(f"{name}: wanted {tensor.nbytes} bytes, got {size}")


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------ complete outputs


def check_output(path, directory=False):
    """Raises ValueError unless a file or a directory can be created or replaced at this path.

    A device, a pipe or the like is never replaced. Call this before expensive work.
    """
    real = Path(os.path.realpath(path))
    if real.exists() and not (real.is_dir() if directory else real.is_file()):
        kind = "a directory" if directory else "a regular file"
        raise ValueError(f"{path}: not written: it exists and is not {kind}; choose another path")
    parent = real.parent
    while directory and not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: not written: {parent} is not a writable directory")


@contextlib.contextmanager
def complete_or_absent(path, directory=False):
    """A temporary path for a file or a directory that takes the place of `path` at the end.

    After any error, Ctrl-C included, the temporary file is removed and `path` is as it was. If
    `path` is a link, its target is replaced. Raises ValueError if `path` cannot be written.
    """
    check_output(path, directory)
    place = Path(os.path.realpath(path))
    part, _ = temporary_places(place)
    try:
        remove(part)
        if directory:
            part.mkdir(parents=True)
        yield part
        put_in_place(part, place)
    except OSError as error:
        raise ValueError(f"{path}: not written: {reason(error)}") from None
    finally:
        remove(part)


def temporary_places(place):
    """Where an output is until it is complete, and where a directory that it replaces waits."""
    return place.with_name(f".{place.name}.part"), place.with_name(f".{place.name}.old")


def put_in_place(part, place):
    """Rename `part` to `place`. A directory that is there already is moved aside meanwhile."""
    if not place.is_dir():
        part.replace(place)
        return
    _, old = temporary_places(place)
    remove(old)
    try:
        place.rename(old)
        part.rename(place)
    except BaseException:
        if not place.exists():
            old.rename(place)
        raise
    remove(old)


def remove(path):
    """Delete a file or a directory with all it holds, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_places(source, out, overwrite):
    """Raises ValueError unless the output can be written without harm to any other files."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such directory")
    if any(place in (source, *source.parents) for place in (out, *temporary_places(out))):
        raise ValueError(f"{out}: the output may neither be nor contain the input {source}")
    check_output(out, directory=True)
    content = list(out.iterdir()) if out.exists() else []
    if content and not overwrite:
        raise ValueError(f"{out}: is not empty; choose another directory or add --overwrite")
    checkpoint = any(path.name in ("config.json", "params.json") for path in content)
    if content and not checkpoint or any(path.is_dir() for path in content):
        raise ValueError(f"{out}: --overwrite replaces only a directory that holds a checkpoint "
                         "and no other directory")


def check_space(out, size):
    """Raises ValueError if so many bytes do not fit on the disk."""
    free = shutil.disk_usage(next(path for path in out.parents if path.exists())).free
    if size > free:
        raise ValueError(f"{out}: needs {human_size(size)}, the disk has {human_size(free)} free")


# ------------------------------------------------------------------ the command line


def reason(error):
    """The text of an error, without the number of an OSError. If it has no text, its type."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def report(text):
    """Print a line at once. If nobody reads it (a broken pipe), later lines go nowhere."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # none fails again at exit
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, "standard output") from None


def human_size(count):
    """A number of bytes in powers of 1000.

    >>> human_size(999), human_size(93_405_585_408)
    ('999 B', '93.4 GB')
    """
    power = min(int(math.log(max(count, 1), 1000)), 4)
    return f"{count / 1000**power:.{int(power > 0)}f} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


class Progress:
    """Prints bytes, rate and remaining time every ten seconds and at the end."""

    def __init__(self, total):
        self.total, self.done = total, 0
        self.start = self.shown = time.monotonic()

    def add(self, count):
        self.done += count
        now = time.monotonic()
        if self.done < self.total and now - self.shown < 10:
            return
        self.shown, rate = now, self.done / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate
        report(f"{human_size(self.done)} of {human_size(self.total)}, {human_size(rate)}/s, "
               f"{left // 60:.0f} min {left % 60:02.0f} s left")


def announce(source, out, checkpoint, files):
    """Print what was found and what will be written."""
    config, counts = checkpoint.config, {False: 0, True: 0}
    for parameter in parameters(config):
        counts[parameter.expert is not None] += math.prod(parameter.shape)
    used = counts[False] + counts[True] * config.num_experts_per_tok // config.num_local_experts
    report(f"{source}: {TITLES[checkpoint.layout]}, {len(checkpoint.stored)} tensors; "
           f"{sum(counts.values()):,} parameters, {used:,} used per token")
    numbers = f"{checkpoint.dtype}" + (" and 4-bit weights" if checkpoint.scheme else "")
    report(f"{out}: {human_size(total_size(files))} of {numbers} to write, files: {len(files)}")
    if checkpoint.group_size and any(
            tensor.dtype != checkpoint.dtype for tensor in checkpoint.stored.values()):
        report(f"weights outside the experts are rounded to {checkpoint.dtype}")


def size_in_bytes(text):
    """A number of bytes as people write it.

    >>> size_in_bytes("256MB"), size_in_bytes("1.5GiB"), size_in_bytes("1000")
    (256000000, 1610612736, 1000)
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*(?:([KMGT])(i?)B)?B?", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"wanted a size as 256MB or 4GB, got {text!r}")
    power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


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
    p.add_argument("--group-size", type=int, choices=GROUP_SIZES, metavar="G",
                   help="weights that share a scale, for int4: "
                        f"{', '.join(map(str, GROUP_SIZES))} (default: 128)")
    p.add_argument("--max-shard-size", type=size_in_bytes, default="4GB", metavar="SIZE",
                   help="size of a file, as 256MB (default: %(default)s); ignored for mistral")
    p.add_argument("--overwrite", action="store_true",
                   help="replace a checkpoint in OUT when the new one is complete")
    args = p.parse_args(argv)
    if args.dtype == "int4" and args.to == "mistral":
        p.error("--dtype int4 needs --to huggingface: Mistral's layout has no 4-bit weights")
    if args.group_size and args.dtype != "int4":
        p.error("--group-size needs --dtype int4")
    return args


def run(args):
    to = MISTRAL if args.to == "mistral" else HUGGINGFACE
    group_size = (args.group_size or 128) if args.dtype == "int4" else None
    dtype = getattr(torch, args.dtype) if args.dtype and not group_size else None
    convert(args.input_dir, args.output_dir, to, dtype, args.max_shard_size, args.overwrite,
            group_size)
    out = str(args.output_dir)
    out = shlex.quote(f"./{out}" if out.startswith("-") else out)
    report(f"next: give {out} to Mistral's own code" if to == MISTRAL else
           f'next: python generate.py --model {out} --prompt "..."')


def main(argv=None):
    args = arguments(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        run(args)
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        print("convert.py:", " ".join(reason(error).splitlines()), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
