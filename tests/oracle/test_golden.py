"""Claims about the golden files: mixtral.py gives their numbers, and golden.py makes them."""

import hashlib
import json
import math
import struct
import subprocess
import sys
import trace
from functools import partial
from pathlib import Path

import golden
import port
import pytest
import reference
import torch
from reference import axes, word
from safetensors import safe_open

import mixtral

CASES = sorted(golden.CASES)
EXACT = 1e-13  # of the largest number of a tensor


def read(path):
    """The metadata, the weights and the other tensors of a golden file."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    weights = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".weight")}
    return metadata, weights, tensors


def error(ours, theirs):
    """The largest difference, relative to the largest finite number of the tensor."""
    assert ours.shape == theirs.shape
    same = ours.double() == theirs.double()
    if same.all():
        return 0.0
    difference = (ours.double() - theirs.double())[~same].abs().max()
    return (difference / theirs[theirs.isfinite()].abs().max()).item()


def real_part(name, x, lengths, tokens):
    """What belongs to real tokens, flattened; `tokens` are those of an expert's rows."""
    S = max(lengths)
    real = torch.cat([torch.arange(S) < length for length in lengths])
    if axes(name)[0] == "R":
        return x[real[tokens]]
    if axes(name)[0] == "N":
        return x[real]
    rows = x.movedim(axes(name).index("S"), 1).flatten(0, 1)
    return rows[real]


@pytest.mark.claim
@pytest.mark.parametrize("case", CASES)
def test_the_architecture_gives_every_golden_number(case):
    """Read as the file says: in calls, padded, from a position. `margin` is not compared."""
    ours = port.known(golden.HERE / f"{case}.safetensors")
    seen, lengths, compared = port.run(ours), ours.lengths, 0
    for name, wanted in ours.tensors.items():
        if name == "tokens" or word(name) == "margin" or ours.chunk and "T" in axes(name):
            continue  # with a cache, T counts slots
        at = name.rpartition(".")[0] + ".tokens" if axes(name)[0] == "R" else None
        found, wanted = (real_part(name, x, lengths, at and side[at]) for x, side in (
            (seen[name], seen), (wanted, ours.tensors)))
        assert found.dtype == wanted.dtype, name
        assert error(found, wanted) < EXACT, name
        compared += 1
    assert compared > 0.8 * len(ours.tensors)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_lower_precision_stays_near_the_exact_trace_of_the_same_weights(dtype, tolerance):
    ours = port.known(golden.HERE / "bfloat16.safetensors")
    model = port.model_of(ours, dtype)
    assert all(torch.equal(model.state_dict()[name].double(), w.double())
               for name, w in ours.weights.items())
    seen = port.run(ours, dtype)
    for name, wanted in ours.tensors.items():
        if name.endswith(".chosen"):
            assert torch.equal(seen[name].sort()[0], wanted.sort()[0])
        elif word(name) in ("lm_head", "mixed", "residual", "block_sparse_moe"):
            difference = seen[name].double() - wanted
            assert difference.norm() < tolerance * wanted.norm(), name


# ------------------------------------------------------------------ what the cases are for


def test_a_tie_decides_the_choice_of_many_tokens_in_the_tied_case():
    tensors = read(golden.HERE / "tied.safetensors")[2]
    for n in range(2):
        at = f"model.layers.{n}.block_sparse_moe."
        logits, margin = tensors[at + "gate"], tensors[at + "margin"]
        assert torch.equal(logits[:, 1], logits[:, 4]) and torch.equal(logits[:, 4], logits[:, 6])
        assert (margin == 0).sum() >= 3
        for row, chosen in zip(logits.tolist(), tensors[at + "chosen"].tolist(), strict=True):
            assert chosen == sorted(range(8), key=lambda e, row=row: (-row[e], e))[:2]


def test_angles_in_float32_are_far_off_in_the_far_case_and_not_in_the_others():
    for case, least, most in (("far", 1e-4, 1.0), ("plain", 0.0, 1e-6), ("chunked", 0.0, 1e-6)):
        metadata, _, tensors = read(golden.HERE / f"{case}.safetensors")
        config, at = json.loads(metadata["config"]), "model.layers.0.self_attn."
        d = config["head_dim"]
        q = tensors[at + "q_proj"].unflatten(-1, (-1, d))[0]
        exponents = torch.arange(0, d, 2).float() / d
        positions = torch.arange(len(q)).float() + int(metadata["first_position"])
        angles = positions[:, None, None] / config["rope_theta"] ** exponents
        assert angles.dtype == torch.float32
        wrong = mixtral.rotate(q[None], angles.double().cos(), angles.double().sin())
        assert least <= error(wrong, tensors[at + "q_rotated"]) < most


def test_the_serving_case_has_ragged_calls_that_wrap_and_square_weights():
    metadata, weights, _ = read(golden.HERE / "serving.safetensors")
    calls, chunk = json.loads(metadata["calls"]), int(metadata["chunk"])
    lengths = json.loads(metadata["lengths"])
    assert [sum(row) for row in zip(*calls, strict=True)] == lengths and 0 in sum(calls, [])
    assert max(map(max, calls)) == chunk and max(lengths) > 5 - 1 + chunk  # slots are used again
    assert any(w.ndim == 2 and w.shape[0] == w.shape[1] for w in weights.values())


def test_the_ragged_case_has_every_intermediate_and_marks_padding():
    metadata, _, ragged = read(golden.HERE / "ragged.safetensors")
    plain = read(golden.HERE / "plain.safetensors")[2]
    assert {word(name) for name in ragged} == {word(name) for name in plain}
    padding = ~torch.cat([torch.arange(9) < n for n in json.loads(metadata["lengths"])])
    for n in range(2):
        at = f"model.layers.{n}.block_sparse_moe."
        assert (ragged[at + "chosen"][padding] == -1).all()
        assert (ragged[at + "weights"][padding] == 0).all()
        chosen, routed = ragged[at + "chosen"], {}
        for e in range(8):
            routed[e] = ragged.get(f"{at}experts.{e}.tokens", torch.empty(0)).tolist()
            assert routed[e] == torch.where(chosen == e)[0].tolist()
        assert sum(map(len, routed.values())) == 2 * (9 + 4 + 1)


# ------------------------------------------------------------------ the files


@pytest.mark.parametrize("case", CASES)
def test_the_script_makes_the_same_bytes_again(case, tmp_path):
    """Up to the last bits of the exp, cos and sin of the machine."""
    (tmp_path / "new").write_bytes(golden.golden(golden.CASES[case], case))
    old, new = read(golden.HERE / f"{case}.safetensors"), read(tmp_path / "new")
    assert old[0] == new[0] and old[2].keys() == new[2].keys()
    assert all(torch.equal(new[1][name], weight) for name, weight in old[1].items())
    assert all(error(new[2][name], x) < 1e-14 for name, x in old[2].items())


def test_the_script_needs_no_package(tmp_path):
    program = ("import sys; sys.path[:0] = [sys.argv[1]]; import golden; golden.main(sys.argv[2]); "
               "print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program, golden.HERE, tmp_path],
                          capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for path in golden.HERE.glob("*.safetensors"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_all_golden_files_together_are_small():
    files = list(golden.HERE.glob("*.safetensors"))
    assert sorted(path.stem for path in files) == CASES
    assert sum(path.stat().st_size for path in files) < 4e6


def weights_digest(weights):
    """Over the bytes of all weights, in the order of their names."""
    return hashlib.sha256(b"".join(bytes(weights[name].contiguous().view(torch.uint8).flatten()
                                         .tolist()) for name in sorted(weights))).hexdigest()


@pytest.mark.parametrize("case", ["plain", "bfloat16"])
def test_the_digest_notices_one_weight_changed_by_one_ulp(case):
    metadata, weights, _ = read(golden.HERE / f"{case}.safetensors")
    assert weights_digest(weights) == metadata["weights_sha256"]
    changed = weights["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    bits = changed.view({8: torch.int64, 2: torch.int16}[changed.itemsize])
    bits[0, 0] += 1
    assert weights_digest(weights) != metadata["weights_sha256"]


def read_plainly(path):
    """A reader that knows only the format of safetensors: (metadata, {name: (axes, numbers)})."""
    content = Path(path).read_bytes()
    [size] = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + size])
    metadata, data = header.pop("__metadata__", {}), content[8 + size:]
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        part, count = data[start:end], math.prod(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            words = struct.unpack(f"<{count}H", part)
            part = struct.pack(f"<{count}I", *(word << 16 for word in words))
        code = {"F64": "d", "F32": "f", "F16": "e", "BF16": "f", "I64": "q"}[entry["dtype"]]
        tensors[name] = entry["shape"], struct.unpack(f"<{count}{code}", part)
    ends = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert ends[0][0] == 0 and ends[-1][1] == len(data)  # no gaps, nothing after the tensors
    assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
    return metadata, tensors


def as_tensor(shape, numbers, dtype):
    return torch.tensor(numbers, dtype=torch.float64).to(dtype).view(shape)


@pytest.mark.parametrize("source", ["plain", "bfloat16", "ragged", "trace.py"])
def test_a_reader_that_knows_only_the_format_reads_every_tensor(source, tmp_path):
    path = golden.HERE / f"{source}.safetensors"
    if source == "trace.py":
        path = tmp_path / "trace"
        ours = port.known(golden.HERE / "plain.safetensors")
        trace.write_trace(port.model_of(ours, torch.bfloat16), ours.tensors["tokens"], path)
    metadata, weights, tensors = read(path)
    plain_metadata, plain = read_plainly(path)
    assert plain_metadata == metadata
    assert plain.keys() == (tensors | weights).keys()
    for name, x in (tensors | weights).items():
        assert torch.equal(as_tensor(*plain[name], x.dtype), x), name
    for name, letters, shape in json.loads(plain_metadata["order"]):
        assert plain[name][0] == shape and len(letters) == len(shape), name


def test_the_reference_gives_a_softmax_and_a_rotation_worked_out_by_hand():
    weights = reference.softmax([0.0, math.log(2.0), -math.inf])
    assert weights == pytest.approx([1 / 3, 2 / 3, 0.0], abs=1e-15)
    quarter = partial(reference.rotate, [1.0, 2.0, 3.0, 4.0])
    assert quarter(0, 1e4) == [1.0, 2.0, 3.0, 4.0]
    a, b = 1 * math.cos(3) - 3 * math.sin(3), 3 * math.cos(3) + 1 * math.sin(3)
    c, d = 2 * math.cos(0.03) - 4 * math.sin(0.03), 4 * math.cos(0.03) + 2 * math.sin(0.03)
    assert quarter(3, 1e4) == pytest.approx([a, c, b, d], abs=1e-15)
    chosen, shares, margin = reference.route([1.0, 3.0, 3.0, 2.0], 2)
    assert (chosen, shares, margin) == ([1, 2], [0.5, 0.5], [1.0])
    assert reference.route([0.0, 1.0], 2)[2] == []
