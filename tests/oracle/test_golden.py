"""Claims about the golden vectors: mixtral.py gives them, and they are what golden.py makes."""

import hashlib
import json

import golden
import pytest
import torch
from safetensors import safe_open

from generate import axes, watching
from mixtral import Mixtral, MixtralConfig

CASES = sorted(golden.CASES)
EXACT = 1e-13  # of a tensor's largest number


def read(path):
    """Metadata, weights and the other tensors of a golden file."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    weights = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".weight")}
    return metadata, weights, tensors


def model_of(metadata, weights, dtype):
    config = MixtralConfig(**json.loads(metadata["config"]))
    model = Mixtral(config).to(dtype).eval().requires_grad_(False)
    model.load_state_dict(weights)
    return model


def fed(metadata, model, tokens):
    """Every intermediate of the prompt, fed to a cache in chunks where the file says so."""
    chunk, lengths = int(metadata["chunk"]), torch.tensor(json.loads(metadata["lengths"]))
    cache = model.new_cache(len(tokens), tokens.shape[1], chunk) if chunk else None
    with torch.inference_mode(), watching(model, scores=not chunk) as seen:
        model(tokens, cache, lengths)
    return seen


def joined(name, pieces):
    """The pieces of a prompt as one, along the axis of its tokens."""
    return torch.cat(pieces, dim=axes(name).index("S") if "S" in axes(name) else 0)


def error(ours, theirs):
    """Largest difference, relative to the tensor's largest finite number."""
    assert ours.shape == theirs.shape
    same = ours.double() == theirs.double()
    if same.all():
        return 0.0
    difference = (ours.double() - theirs.double())[~same].abs().max()
    return (difference / theirs[theirs.isfinite()].abs().max()).item()


def weights_digest(weights):
    """Over the bytes of all weights, in the order of their names."""
    return hashlib.sha256(b"".join(bytes(weights[name].contiguous().view(torch.uint8).flatten()
                                         .tolist()) for name in sorted(weights))).hexdigest()


@pytest.mark.parametrize("case", CASES)
def test_the_architecture_gives_the_golden_vectors(case):
    metadata, weights, tensors = read(golden.HERE / f"{case}.safetensors")
    assert weights_digest(weights) == metadata["weights_sha256"]
    seen = fed(metadata, model_of(metadata, weights, torch.float64), tensors.pop("tokens"))
    lengths, compared = json.loads(metadata["lengths"]), 0
    for name, wanted in tensors.items():
        if name not in seen or name.endswith((".tokens", ".w1", ".w2", ".w3", ".hidden")) and (
                len(seen["model.embed_tokens"]) > 1):
            continue  # of a chunk, expert rows count from the chunk's own start
        ours = joined(name, seen[name])
        assert ours.dtype == wanted.dtype, name
        for row, length in enumerate(lengths if len(lengths) > 1 else []):
            assert error(ours[row, :length], wanted[row, :length]) < EXACT, name
        if len(lengths) == 1:
            assert error(ours, wanted) < EXACT, name
        compared += 1
    assert compared == len(tensors) or metadata["chunk"] != "0" and compared > 30


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_lower_precision_stays_near_the_exact_trace_of_the_same_weights(dtype, tolerance):
    metadata, weights, tensors = read(golden.HERE / "bfloat16.safetensors")
    model = model_of(metadata, weights, dtype)
    assert all(torch.equal(model.state_dict()[name].double(), w.double())
               for name, w in weights.items())
    seen = fed(metadata, model, tensors["tokens"])
    for name in tensors:
        if name.endswith(".chosen"):
            assert torch.equal(seen[name][0].sort()[0], tensors[name].sort()[0])
        elif name.endswith(("lm_head", ".mixed", ".residual", ".block_sparse_moe")):
            difference = seen[name][0].double() - tensors[name]
            assert difference.norm() < tolerance * tensors[name].norm(), name


def test_one_weight_changed_by_one_ulp_is_noticed():
    metadata, weights, _ = read(golden.HERE / "plain.safetensors")
    changed = weights["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    changed[0, 0] = torch.nextafter(changed[0, 0], changed.new_tensor(9.0))
    assert weights_digest(weights) != metadata["weights_sha256"]


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_what_the_script_makes(case, tmp_path):
    (tmp_path / "new").write_bytes(golden.golden(case))
    old, new = read(golden.HERE / f"{case}.safetensors"), read(tmp_path / "new")
    assert old[0] == new[0]
    assert all(torch.equal(new[1][name], weight) for name, weight in old[1].items())
    assert old[2].keys() == new[2].keys()
    assert all(error(new[2][name], x) < 1e-14 for name, x in old[2].items())


def test_all_golden_files_together_are_small():
    assert sum(path.stat().st_size for path in golden.HERE.glob("*.safetensors")) < 4e6
