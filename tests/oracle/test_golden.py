"""Claims about the golden files: mixtral.py gives their numbers, and golden.py makes them."""

import hashlib
import json
import math
import struct
import subprocess
import sys
import trace
from pathlib import Path

import golden
import pair
import port
import pytest
import torch
from reference import axes, word

import mixtral

CASES = sorted(golden.CASES)
EXACT = 1e-13  # of the largest number of a tensor


def read(path):
    """The metadata, the weights and the other tensors of a golden file."""
    metadata, tensors = pair.read_file(path)
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


@pytest.mark.claim
@pytest.mark.parametrize("case", CASES)
def test_the_architecture_gives_every_golden_number(case):
    """Read as the file says: in calls, padded, from a position. `margin` is not compared."""
    ours = port.known(golden.HERE / f"{case}.safetensors")
    seen, compared = port.run(ours), 0
    real = torch.cat([torch.arange(max(ours.lengths)) < n for n in ours.lengths])
    for name, wanted in ours.tensors.items():
        if name == "tokens" or word(name) == "margin" or ours.calls and "T" in axes(name):
            continue  # with a cache, T counts slots
        found = seen[name]
        if axes(name)[0] != "R":
            found, wanted = (pair.as_rows(x, axes(name))[real] for x in (found, wanted))
        elif word(name) != "tokens":  # an expert has rows of its own tokens only
            wanted = wanted[ours.tensors[name.rpartition(".")[0] + ".tokens"]]
        assert found.dtype == wanted.dtype, name
        assert error(found, wanted) < EXACT, name
        compared += 1
    assert compared > 0.8 * len(ours.tensors)


# ------------------------------------------------------------------ what the cases are for


def test_a_tie_decides_the_choice_of_many_tokens_in_the_tied_case():
    tensors = read(golden.HERE / "tied.safetensors")[2]
    for n in range(2):
        at = f"model.layers.{n}.block_sparse_moe."
        first, *others = tensors[at + "gate"][:, [1, 4, 6]].T
        assert all(torch.equal(first, other) for other in others)
        assert (tensors[at + "margin"] == 0).sum() >= 3


def test_angles_in_float32_are_far_off_in_the_far_case_and_not_in_the_others():
    for case, least, most in (("far", 1e-4, 1.0), ("plain", 0.0, 1e-6), ("chunked", 0.0, 1e-6)):
        ours, at = port.known(golden.HERE / f"{case}.safetensors"), "model.layers.0.self_attn."
        d, theta = ours.config["head_dim"], ours.config["rope_theta"]
        positions = torch.arange(max(ours.lengths))[:, None, None].float() + ours.first_position
        angles = positions / theta ** (torch.arange(0, d, 2).float() / d)
        assert angles.dtype == torch.float32
        q = ours.tensors[at + "q_proj"].unflatten(-1, (-1, d))
        wrong = mixtral.rotate(q, angles.double().cos(), angles.double().sin())
        assert least <= error(wrong, ours.tensors[at + "q_rotated"]) < most


def test_the_ragged_case_has_every_intermediate_and_marks_padding():
    """With 0, with −1 in `chosen`, and with −∞ in the scores of a padded key."""
    ragged = read(golden.HERE / "ragged.safetensors")[2]
    plain = read(golden.HERE / "plain.safetensors")[2]
    assert {word(name) for name in ragged} == {word(name) for name in plain}
    padded = torch.arange(9) >= torch.tensor([[9], [4], [1]])
    hidden = padded[:, None] & ~padded[:, :, None]  # (B, S, T): a padded key, a real query
    for name, x in ragged.items():
        if "T" in axes(name):
            x = x.movedim(1, 3)  # (B, S, T, H)
            assert (x[hidden] == (-math.inf if word(name) == "scores" else 0)).all(), name
        if axes(name)[0] != "R":
            padding = x.reshape(3, 9, -1)[padded]
            assert (padding == (-1 if word(name) == "chosen" else 0)).all(), name


# ------------------------------------------------------------------ the files


def test_the_script_makes_the_same_bytes_again_and_needs_no_package(tmp_path):
    program = ("import sys; sys.path[:0] = [sys.argv[1]]; import golden; golden.main(sys.argv[2]); "
               "print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program, golden.HERE, tmp_path],
                          capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    old, new = ({path.name: path.read_bytes() for path in directory.glob("*.safetensors")}
                for directory in (golden.HERE, tmp_path))
    assert old == new and sum(map(len, old.values())) < 4e6


@pytest.mark.parametrize("case", ["plain", "bfloat16"])
def test_the_digest_is_that_of_the_stored_weights_in_the_order_of_their_names(case):
    metadata, weights, _ = read(golden.HERE / f"{case}.safetensors")
    stored = b"".join(bytes(weights[name].view(torch.uint8).flatten().tolist())
                      for name in sorted(weights))
    assert hashlib.sha256(stored).hexdigest() == metadata["weights_sha256"]


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


@pytest.mark.parametrize("source", ["plain", "bfloat16", "ragged", "trace.py"])
def test_a_reader_that_knows_only_the_format_reads_every_tensor(source, tmp_path):
    path = golden.HERE / f"{source}.safetensors"
    if source == "trace.py":
        path = tmp_path / "trace"
        ours = port.known(golden.HERE / "plain.safetensors")
        trace.write_trace(port.model_of(ours, torch.bfloat16), ours.tensors["tokens"], path)
    metadata, weights, tensors = read(path)
    plain_metadata, plain = read_plainly(path)
    assert plain_metadata == metadata and plain.keys() == (tensors | weights).keys()
    for name, x in (tensors | weights).items():
        shape, numbers = plain[name]
        assert torch.equal(torch.tensor(numbers, dtype=x.dtype).view(shape), x), name
    assert all(plain[name][0] == shape for name, _, shape in json.loads(metadata["order"]))
