"""Every Mixtral checkpoint in the wild, both ways: `convert.py --input_dir RAW --output_dir OUT`.

The same numbers travel in three layouts, told apart by the names of their tensors:

    layout          files                                      differs from Hugging Face's in
    Hugging Face    config.json, model*.safetensors or
                    pytorch_model*.bin                         -
    Mistral         params.json, consolidated.safetensors,     names, row order of wq and wk
                    consolidated.00.pth or its -splitN parts
    Mistral, fused  params.json, consolidated.00.pt … .07.pt   also: a layer's experts are one
                                                               (E·F, D), w2's blocks transposed

One difference is not plain from the table of names below. Mistral's RoPE turns neighbouring rows
of a head together, Hugging Face's row i with row i + d/2. One head of q, d = 8, is rearranged so:

    Mistral           as d/2 × 2    transposed     Hugging Face
    0 1 2 3 4 5 6 7      0 1         0 2 4 6       0 2 4 6 1 3 5 7
    └─┘ └─┘ └─┘ └─┘      2 3         1 3 5 7       └───────┘          turned together:
                         4 5                                          still 0 with 1, 2 with 3, …
                         6 7

The way back transposes the 2 × d/2. There are H heads in q but K in k.

Memory: a pickle is opened for its names, shapes and offsets alone, a safetensors file is mapped; a
tensor is read when it is written. So memory holds one tensor and its changed copy, not a shard.
Safety: pickles are opened with weights_only=True; until it is complete, the output is `.OUT.part`
beside OUT, which the next run removes.

Departures: tokenizer.json is made here, since transformers cannot read tokenizer.model without
more packages. The text `</s>` is the control id there, as in every tokenizer of transformers.
Leaves out: quantised and LoRA weights, strided or shared storage tricks, making chat templates
(they are copied), pieces declared whole by a v3 tokenizer (spelled out in its tokenizer.json), two
runs at once into one output.

Exit codes: 0 done, 1 bad input, 2 bad arguments, 130 interrupted.
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
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while importing ends the program at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from safetensors import SafetensorError, safe_open

from mixtral import MixtralConfig, read_json
from tokenizer import Tokenizer

HUGGINGFACE, MISTRAL, FUSED = LAYOUTS = range(3)  # columns of the table
TITLES = ("Hugging Face", "Mistral", "Mistral with fused experts")

# A leading dot stands for `model.layers.N.` in the first column, for `layers.N.` in the others, and
# `e` for an expert. Every name but the fused experts' ends in `.weight`. Shapes are of one expert.
NAMES = [line.split() for line in """
    model.embed_tokens              tok_embeddings              tok_embeddings          V    D
    .input_layernorm                .attention_norm             .attention_norm         D
    .self_attn.q_proj               .attention.wq               .attention.wq           H·d  D
    .self_attn.k_proj               .attention.wk               .attention.wk           K·d  D
    .self_attn.v_proj               .attention.wv               .attention.wv           K·d  D
    .self_attn.o_proj               .attention.wo               .attention.wo           D    H·d
    .post_attention_layernorm       .ffn_norm                   .ffn_norm               D
    .block_sparse_moe.gate          .feed_forward.gate          .block_sparse_moe.gate  E    D
    .block_sparse_moe.experts.e.w1  .feed_forward.experts.e.w1  .block_sparse_moe.w1    F    D
    .block_sparse_moe.experts.e.w2  .feed_forward.experts.e.w2  .block_sparse_moe.w2    D    F
    .block_sparse_moe.experts.e.w3  .feed_forward.experts.e.w3  .block_sparse_moe.w3    F    D
    model.norm                      norm                        norm                    D
    lm_head                         output                      output                  V    D
""".strip().splitlines()]

# The names in params.json; its second dialect, that of the fused layout, uses Hugging Face's.
PARAMS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "head_dim": "head_dim",
          "hidden_dim": "intermediate_size", "n_heads": "num_attention_heads",
          "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps",
          "vocab_size": "vocab_size", "rope_theta": "rope_theta",
          "sliding_window": "sliding_window", "max_seq_len": "max_position_embeddings",
          "num_experts_per_tok": "num_experts_per_tok", "num_experts": "num_local_experts"}
OPTIONAL = {"head_dim", "rope_theta", "sliding_window", "max_seq_len", "num_experts_per_tok"}
CONTEXT = {4096: 32768, 6144: 65536}  # max_seq_len by dim, 8x7B's and 8x22B's: it is mostly unsaid

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PIECE = 2**18  # bytes read at once: they stay in the CPU's cache until they are written
EXTRAS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "chat_template.jinja", "generation_config.json")


def regroup(weight, heads, columns):
    """Write each head's d rows as a matrix of so many columns and read it out transposed.

    (H·d, D) -> (H·d, D)

    2 columns turn Mistral's rows into Hugging Face's; d/2 columns turn them back.
    """
    return weight.unflatten(0, (heads, -1, columns)).transpose(1, 2).flatten(0, 2)


def spell(row, layout, n=0, e=0):
    """The full name, in layer n and expert e, of a row of the table."""
    stem = row[layout]
    if stem.startswith("."):
        stem = f"layers.{n}{stem}" if layout else f"model.layers.{n}{stem}"
    if ".e." in row[HUGGINGFACE] and ".e." not in stem:
        return stem
    return stem.replace(".e.", f".{e}.") + ".weight"


class Parameter(NamedTuple):
    """A tensor of the model, one expert's where there are experts."""

    names: tuple[str, ...]  # by layout
    shape: tuple[int, ...]
    heads: int | None  # of q and k alone
    expert: int | None


def parameters(config):
    """Yield the tensors of a model in the order in which a token meets them."""
    c, H, K = config, config.num_attention_heads, config.num_key_value_heads
    size = {"V": c.vocab_size, "D": c.hidden_size, "F": c.intermediate_size,
            "E": c.num_local_experts, "H·d": H * c.head_dim, "K·d": K * c.head_dim}
    heads = {".self_attn.q_proj": H, ".self_attn.k_proj": K}
    for inside, rows in itertools.groupby(NAMES, key=lambda row: row[0].startswith(".")):
        layers = range(c.num_hidden_layers if inside else 1)
        for n, row in itertools.product(layers, list(rows)):
            for e in range(c.num_local_experts) if ".e." in row[0] else [None]:
                names = tuple(spell(row, layout, n, e) for layout in LAYOUTS)
                yield Parameter(names, tuple(map(size.get, row[3:])), heads.get(row[0]), e)


class Stored(NamedTuple):
    """A tensor in a file, unread: `read` takes a slice of its rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a str names what is no plain tensor
    file: str
    read: Callable


class Joined(io.RawIOBase):
    """Files read as if they were one: the torrent's parts, without the disk that `cat` needs."""

    def __init__(self, paths):
        self.files = [open(path, "rb", buffering=0) for path in paths]
        self.starts = [0, *itertools.accumulate(path.stat().st_size for path in paths)]
        self.at = 0

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = offset + (0, self.at, self.starts[-1])[whence]
        return self.at

    def readinto(self, buffer):
        free = memoryview(buffer)
        while len(free) and self.at < self.starts[-1]:
            n = bisect.bisect(self.starts, self.at) - 1
            self.files[n].seek(self.at - self.starts[n])
            count = self.files[n].readinto(free)
            if not count:
                break
            self.at, free = self.at + count, free[count:]
        return len(buffer) - len(free)


def memory(tensor):
    """A contiguous tensor's own bytes as a buffer, which torch gives out only through NumPy."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def read_view(file, view):
    """The numbers that a contiguous tensor on the meta device, or a slice of its rows, stands for.

    torch.load notes in its storage at which byte of the file they begin.
    """
    tensor = torch.empty(view.shape, dtype=view.dtype)
    file.seek(view.untyped_storage()._checkpoint_offset + view.storage_offset() * view.itemsize)
    if file.readinto(memory(tensor)) != tensor.nbytes:
        raise ValueError("a weight file ends early: was it changed while it was read?")
    return tensor


def unpickle(file):
    """What torch.save wrote, on the meta device: names and shapes are read, weights are not."""
    if file.read(2) != b"PK":
        raise ValueError("wanted a zip as torch.save writes since torch 1.6; load and save it anew")
    try:
        if any(entry.compress_type for entry in zipfile.ZipFile(file).infolist()):
            raise ValueError("compressed, wanted it as torch.save writes it")
        file.seek(0)
        content = torch.load(file, map_location="meta", weights_only=True)
    except UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        detail = culprit[1] if culprit else "something unknown"
        raise ValueError(f"refused: it asks for {detail}, wanted tensors alone") from None
    except (zipfile.BadZipFile, RuntimeError) as error:
        raise ValueError(f"cut short or damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"wanted a dict of tensors, got {type(content).__name__}")
    return content


def open_pickle(paths):
    """The tensors in a file of torch.save, or in the parts of one, by name."""
    file = Joined(paths)
    for name, value in unpickle(file).items():
        plain = isinstance(value, torch.Tensor) and value.is_contiguous()
        shape, dtype = (value.shape, value.dtype) if plain else ((), type(value).__name__)
        yield str(name), Stored(tuple(shape), dtype, paths[0].name,
                                lambda rows, value=value: read_view(file, value[rows]))


def open_safetensors(path):
    """The tensors in a safetensors file, mapped, by name."""
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"cut short or damaged: {error}") from None
    for name in file.keys():
        piece = file.get_slice(name)
        dtype = DTYPES.get(piece.get_dtype(), piece.get_dtype())
        yield name, Stored(tuple(piece.get_shape()), dtype, path.name, piece.__getitem__)


def open_all(directory):
    """All tensors of a directory by name. Raises ValueError naming each bad file or repetition."""
    stored, wrong = {}, []
    for paths in weight_files(directory):
        safe = paths[0].suffix == ".safetensors"
        try:
            for name, tensor in open_safetensors(paths[0]) if safe else open_pickle(paths):
                if name in stored:
                    wrong.append(f"{name} is in {stored[name].file} and in {tensor.file}")
                stored[name] = tensor
        except (ValueError, OSError) as error:
            wrong.append(f"{paths[0].name}: {error}")
    if wrong:
        raise ValueError(f"{directory}: {'; '.join(wrong)}")
    return stored


def indexed(directory, index):
    """The files that an index names. Raises ValueError for any that is not directly beside it."""
    entries = read_json(directory / index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{directory / index}: wanted a weight_map of names to files")
    names = sorted(set(map(str, entries.values())))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{directory / index}: names files outside its directory: "
                         f"{', '.join(outside)}")
    if absent := [name for name in names if not (directory / name).is_file()]:
        raise ValueError(f"{directory}: missing {', '.join(absent)}")
    return [[directory / name] for name in names]


def weight_files(directory):
    """The files with the weights, each as a list of its parts; of several sets, the first in order.

    Raises ValueError where there are none, or not all.
    """
    for stem in ("model.safetensors", "pytorch_model.bin", "consolidated.safetensors"):
        if (directory / f"{stem}.index.json").exists():
            return indexed(directory, f"{stem}.index.json")
        if (directory / stem).exists():
            return [[directory / stem]]
    whole, parts = [], {}
    for path in sorted(directory.glob("consolidated.*")):
        if re.fullmatch(r"consolidated\.\d+\.pth?", path.name):
            whole.append([path])
        elif match := re.fullmatch(r"consolidated\.00\.pth-split(\d+)", path.name):
            parts[int(match[1])] = path
    if not whole and not parts:
        raise ValueError(f"{directory}: no weights here; wanted model*.safetensors, "
                         "pytorch_model*.bin or consolidated.*")
    if not whole and (absent := set(range(max(parts))) - set(parts)):
        raise ValueError(f"{directory}: missing "
                         + ", ".join(f"consolidated.00.pth-split{n}" for n in sorted(absent)))
    return whole or [[parts[n] for n in sorted(parts)]]


def read_params(path):
    """The configuration in a params.json of either dialect; what is null or 0 there is unsaid.

    Raises ValueError naming what is missing. An unsaid rope_theta means 1e6, not 1e4.
    """
    raw = read_json(path)
    raw |= raw["moe"] if isinstance(raw.get("moe"), dict) else {}
    fields = {PARAMS.get(name, name): value for name, value in raw.items() if value}
    if absent := [name for name in PARAMS if name not in OPTIONAL and PARAMS[name] not in fields]:
        raise ValueError(f"{path}: not a Mixtral's: missing {', '.join(absent)}")
    if isinstance(window := fields.get("sliding_window"), str):  # the fused release quotes it
        words = {"none": None, "null": None}
        fields["sliding_window"] = (int(window) if window.isdecimal()
                                    else words.get(window.lower(), window))
    context = CONTEXT.get(fields["hidden_size"], MixtralConfig.max_position_embeddings)
    return MixtralConfig.from_dict({"max_position_embeddings": context} | fields)


def params_of(config):
    """The params.json of a configuration, by the same table, without what goes without saying."""
    fields = {name: getattr(config, field) for name, field in PARAMS.items()}
    moe = {name: fields.pop(name) for name in ("num_experts_per_tok", "num_experts")}
    unsaid = {"sliding_window": None, "max_seq_len": CONTEXT.get(
        config.hidden_size, MixtralConfig.max_position_embeddings)}
    return {name: value for name, value in fields.items()
            if name not in unsaid or value != unsaid[name]} | {"moe": moe}


def converted(name, weight, dtype):
    """Contiguous, in a dtype. Raises ValueError where that makes a number infinite."""
    result = weight.to(dtype).contiguous()
    if dtype != weight.dtype and (result.isinf() & weight.isfinite()).any():
        raise ValueError(f"{name}: too large for {dtype}; choose another --dtype")
    return result


class Checkpoint(NamedTuple):
    """A checkpoint found to be whole and well-formed, of which no weight has been read."""

    layout: int
    config: MixtralConfig
    stored: dict[str, Stored]
    dtype: torch.dtype  # to be converted to

    def fetch(self, parameter, to):
        """Yield the rows of one tensor of another layout, the fused one excepted, in pieces."""
        name, F = parameter.names[self.layout], self.config.intermediate_size
        stored, fused = self.stored[name], self.layout == FUSED and parameter.expert is not None
        first, count = (parameter.expert * F, F) if fused else (0, parameter.shape[0])
        transposed = fused and name.endswith("w2")
        permuted = parameter.heads and (self.layout == HUGGINGFACE) != (to == HUGGINGFACE)
        step = count
        if not (transposed or permuted):
            row = math.prod(stored.shape[1:]) * stored.dtype.itemsize
            step = max(1, PIECE // row)
        for at in range(first, first + count, step):
            weight = stored.read(slice(at, min(at + step, first + count)))
            if transposed:
                weight = weight.T
            if permuted:
                columns = 2 if to == HUGGINGFACE else self.config.head_dim // 2
                weight = regroup(weight, parameter.heads, columns)
            yield converted(name, weight, self.dtype)


def misfits(stored, layout, config):
    """A phrase for each tensor that is missing, unknown, mis-shaped or no plain floats."""
    expected = {p.names[layout]: p.shape for p in parameters(config)}
    if layout == FUSED:
        block = config.num_local_experts * config.intermediate_size, config.hidden_size
        expected |= {name: block for name in expected if not name.endswith(".weight")}
    wrong = [f"missing {name}" for name in expected if name not in stored]
    for name, tensor in stored.items():
        if name not in expected:
            wrong.append(f"unknown {name}")
        elif tensor.dtype not in DTYPES.values():
            wrong.append(f"{name} is {tensor.dtype}, not a contiguous tensor of floats")
        elif tensor.shape != expected[name]:
            wrong.append(f"{name} has shape {list(tensor.shape)}, not {list(expected[name])}")
    return wrong


def open_checkpoint(directory, dtype=None):
    """Find out what a directory holds. Raises ValueError naming all that is wrong with it."""
    stored = open_all(directory)
    known = [sum(spell(row, layout) in stored for row in NAMES) for layout in LAYOUTS]
    if not any(known):
        raise ValueError(f"{directory}: no tensor has a name of Mixtral's; the first of "
                         f"{len(stored)} is {next(iter(stored), None)}")
    layout = known.index(max(known))
    if layout == HUGGINGFACE:
        config = MixtralConfig.from_dict(read_json(directory / "config.json"))
    else:
        config = read_params(directory / "params.json")
    wrong = misfits(stored, layout, config)
    dtypes = {tensor.dtype for tensor in stored.values()}
    if not (wrong or dtype) and len(dtypes) > 1:
        wrong = [f"dtypes {' and '.join(sorted(map(str, dtypes)))}: choose one with --dtype"]
    if wrong:
        raise ValueError(f"{directory}: does not fit its configuration: {'; '.join(wrong)}")
    return Checkpoint(layout, config, stored, dtype or dtypes.pop())


def amount(count):
    """Bytes in powers of a thousand, as disks are sold."""
    power = min(int(math.log(max(count, 1), 1000)), 4)
    return f"{count / 1000**power:.{int(power > 0)}f} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


class Progress:
    """Bytes, rate and time left: one line rewritten on a terminal, else a line now and then."""

    def __init__(self, total):
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.shown, self.terminal = self.start, sys.stdout.isatty()

    def add(self, count):
        self.done += count
        now, last = time.monotonic(), self.done == self.total
        if not last and now - self.shown < (0.1 if self.terminal else 30):
            return
        self.shown, rate = now, self.done / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate
        print("\r" * self.terminal + f"{amount(self.done)} of {amount(self.total)}, "
              f"{amount(rate)}/s, {left // 60:.0f} min {left % 60:02.0f} s left".ljust(58),
              end="" if self.terminal and not last else "\n", flush=True)


def write_safetensors(path, group, checkpoint, to, progress):
    """The header's length, the header, then the bytes of each tensor as soon as it is read."""
    code = {dtype: code for code, dtype in DTYPES.items()}[checkpoint.dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for parameter, size in group:
        header[parameter.names[to]] = {"dtype": code, "shape": parameter.shape,
                                       "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors for those who map them
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for parameter, size in group:
            for weight in checkpoint.fetch(parameter, to):
                file.write(memory(weight))
            progress.add(size)


def shards(checkpoint, to, limit):
    """Files by name, each with its parameters and their bytes: `limit` bytes at most, or one."""
    groups, room = [], 0
    for parameter in parameters(checkpoint.config):
        size = math.prod(parameter.shape) * checkpoint.dtype.itemsize
        if not groups or size > room and not to:
            groups.append([])
            room = limit
        groups[-1].append((parameter, size))
        room -= size
    if len(groups) == 1:
        return {"consolidated.safetensors" if to else "model.safetensors": groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group
            for n, group in enumerate(groups, 1)}


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def merges(t):
    """Any split of a piece into two pieces is a merge, ranked by the score of the whole.

    Equal scores rank by id; only the runs of spaces have them, the shorter first.
    """
    ranked = sorted(t.scores, key=lambda piece: (-t.scores[piece], t.ids[piece]))
    return [f"{piece[:at]} {piece[at:]}" for piece in ranked for at in range(1, len(piece))
            if piece[:at] in t.scores and piece[at:] in t.scores]


def fast_tokenizer(t):
    """The tokenizer.json of a tokenizer.model: prefix ▁, spaces to ▁, BPE, and BOS in front."""
    plain = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    bos = t.pieces[t.bos_id]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, more = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    to_text = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
               {"type": "ByteFallback"}, {"type": "Fuse"},
               {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t.pieces[i], "special": True} | plain
                         for i in sorted({t.unk_id, *t.control})],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [start, text], "pair": [start, text, more],
            "special_tokens": {bos: {"id": bos, "ids": [t.bos_id], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": to_text},
        "model": {"type": "BPE", "unk_token": t.pieces[t.unk_id], "fuse_unk": True,
                  "byte_fallback": True, "merges": merges(t),
                  "vocab": {piece: i for i, piece in enumerate(t.pieces)}}}


def write_tokenizer(source, part, config):
    """What transformers needs beside tokenizer.model, if the input has not brought it.

    Raises ValueError for a tokenizer that cannot be this model's.
    """
    if (part / "tokenizer.json").exists():
        return
    t = Tokenizer(part / "tokenizer.model")
    if t.vocab_size > config.vocab_size:
        raise ValueError(f"{source / 'tokenizer.model'}: {t.vocab_size} pieces, but the model has "
                         f"only {config.vocab_size}: they do not belong together")
    write_json(part / "tokenizer.json", fast_tokenizer(t))
    names = {"bos_token": t.bos_id, "eos_token": t.eos_id, "unk_token": t.unk_id}
    if not (part / "tokenizer_config.json").exists():
        write_json(part / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            **{name: t.pieces[i] for name, i in names.items()}})


def write_small_files(source, part, checkpoint, to):
    """All but the weights: configuration and tokenizer."""
    for name in EXTRAS[:1] if to else EXTRAS:
        if (source / name).exists():
            shutil.copyfile(source / name, part / name)
    model, versions = part / "tokenizer.model", sorted(source.glob("tokenizer.model.v*"))
    if not model.exists() and len(versions) == 1:  # 8x22B's newer releases name it .v3
        shutil.copyfile(versions[0], model)
    if not model.exists():
        print(f"{source} has no tokenizer.model: put the model's own into the output")
    elif not to:
        write_tokenizer(source, part, checkpoint.config)
    if to:
        write_json(part / "params.json", params_of(checkpoint.config))
    else:
        write_configs(part, checkpoint.config, checkpoint.dtype)


def write_configs(part, config, dtype):
    """config.json, with rope_theta where transformers 4 wrote it: 5 and `from_dict` read both."""
    write_json(part / "config.json", {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        **dataclasses.asdict(config), "torch_dtype": str(dtype).removeprefix("torch.")})
    if not (part / "generation_config.json").exists():
        write_json(part / "generation_config.json", {
            "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id})


def write_all(source, part, checkpoint, to, files):
    """Small files first, for they can be refused; the index last."""
    write_small_files(source, part, checkpoint, to)
    total = sum(size for group in files.values() for _, size in group)
    progress = Progress(total)
    for name, group in files.items():
        write_safetensors(part / name, group, checkpoint, to, progress)
    if len(files) > 1:
        weight_map = {p.names[to]: name for name, group in files.items() for p, _ in group}
        write_json(part / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": weight_map})


def beside(out):
    """Where an output is while it is not complete, and where what it replaces waits meanwhile."""
    return out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")


def check_places(source, out, overwrite):
    """Raises ValueError unless the output can take its place without harm to anything else."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such directory")
    if any(place in (source, *source.parents) for place in (out, *beside(out))):
        raise ValueError(f"{out}: the output may neither be nor hold the input {source}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, wanted a directory")
    held = list(out.iterdir()) if out.exists() else []
    if held and not overwrite:
        raise ValueError(f"{out}: is not empty; choose another directory or add --overwrite")
    checkpoint = any(path.name in ("config.json", "params.json") for path in held)
    if held and not checkpoint or any(path.is_dir() for path in held):
        raise ValueError(f"{out}: --overwrite replaces checkpoints only, and this is more or none")


@contextlib.contextmanager
def complete_or_absent(out):
    """A directory to write to, which becomes `out` at the end and vanishes on any error."""
    part, old = beside(out)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        part.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def announce(source, out, checkpoint, files):
    """Say what was found and what will be written. Raises ValueError if the disk is too small."""
    config, dtype = checkpoint.config, checkpoint.dtype
    counts = [(math.prod(p.shape), p.expert is not None) for p in parameters(config)]
    total, experts = sum(n for n, _ in counts), sum(n for n, expert in counts if expert)
    unused = experts - experts * config.num_experts_per_tok // config.num_local_experts
    size = total * dtype.itemsize
    free = shutil.disk_usage(next(path for path in out.parents if path.exists())).free
    print(f"{source}: {TITLES[checkpoint.layout]}, {len(checkpoint.stored)} tensors; "
          f"{total:,} parameters, {total - unused:,} used for a token")
    print(f"{out}: {amount(size)} of {dtype} to write, files: {len(files)}; {amount(free)} free",
          flush=True)
    if size > free:
        raise ValueError(f"{out}: needs {amount(size)}, the disk has {amount(free)} free")


def convert(source, out, to=HUGGINGFACE, dtype=None, limit=4 * 10**9, overwrite=False):
    """Convert a directory. Raises ValueError or OSError, and then leaves no output."""
    source, out = source.resolve(), out.resolve()
    check_places(source, out, overwrite)
    checkpoint = open_checkpoint(source, dtype)
    files = shards(checkpoint, to, limit)
    announce(source, out, checkpoint, files)
    with complete_or_absent(out) as part:
        write_all(source, part, checkpoint, to, files)


def size_in_bytes(text):
    """256MB, 4GB, 1.5GiB or a bare number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B)?B?", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"wanted a size as 256MB or 4GB, got {text!r}")
    power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def arguments(argv):
    p = Parser(prog="convert.py", description="Convert a Mixtral checkpoint.", allow_abbrev=False)
    p.add_argument("--input-dir", "--input_dir", type=Path, required=True, metavar="RAW",
                   help="a checkpoint as Mistral or Hugging Face released it")
    p.add_argument("--output-dir", "--output_dir", type=Path, required=True, metavar="OUT",
                   help="a directory to be made")
    p.add_argument("--to", choices=("huggingface", "mistral"), default="huggingface",
                   help="layout to write (default: %(default)s)")
    p.add_argument("--dtype", choices=[str(dtype)[6:] for dtype in DTYPES.values()],
                   help="convert the numbers (default: keep them)")
    p.add_argument("--max-shard-size", type=size_in_bytes, default="4GB", metavar="SIZE",
                   help="of one file, as 256MB (default: %(default)s); mistral's is always one")
    p.add_argument("--overwrite", action="store_true",
                   help="replace a checkpoint in OUT, once the new one is complete")
    return p.parse_args(argv)


def run(args):
    to = MISTRAL if args.to == "mistral" else HUGGINGFACE
    dtype = getattr(torch, args.dtype) if args.dtype else None
    convert(args.input_dir, args.output_dir, to, dtype, args.max_shard_size, args.overwrite)
    out = shlex.quote(str(args.output_dir))
    print(f"next: give {out} to Mistral's own code" if to else
          f'next: python generate.py --model {out} --prompt "..."')


def main(argv=None):
    args = arguments(argv)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(args)
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"convert.py: {reason}", file=sys.stderr)
    except ValueError as error:
        print(f"convert.py: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
