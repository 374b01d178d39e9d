"""Claims about compare.py: errors seeded by hand are named, honest runs are told equal."""

import json
import math
from pathlib import Path

import compare
import golden
import pytest
import torch
from conftest import random_model
from torch.nn import functional as F

import mixtral
from generate import axes, save_file, watching, write_trace
from mixtral import Mixtral, at_least_float32

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = torch.randint(0, 37, (1, 14), generator=torch.Generator().manual_seed(3)).tolist()[0]
SIZES = {"rope_theta": 1e4, "head_dim": 8, "num_hidden_layers": 3}


def theirs_of(model, path, tokens=TEXT, scores=True, **kept):
    """What a port would dump: tensors of one pass, without metadata."""
    ids = torch.tensor([tokens])
    with torch.inference_mode(), watching(model, scores=scores) as seen:
        model(ids)
    tensors = {"tokens": ids} | {name: x.contiguous() for name, [x] in seen.items()}
    save_file(tensors | kept, path)
    return tensors


@pytest.fixture
def ours(tmp_path):
    write_trace(random_model(**SIZES), TEXT, tmp_path / "ours", scores=True)
    return tmp_path / "ours"


@pytest.fixture
def told(ours, tmp_path, capsys):
    """Compare and give the exit code and what was said."""
    def run(*options, ours=ours, theirs=tmp_path / "theirs"):
        code = compare.main([str(ours), str(theirs), *options])
        out, error = capsys.readouterr()
        return code, out + error
    return run


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed, layers", [(0, 3), (1, 8), (2, 8), (3, 8), (4, 8)])
def test_honest_runs_are_equal_within_rounding(dtype, seed, layers, tmp_path, told):
    """Weights that the lower precision holds, as in a checkpoint, so that rounding is all."""
    changes = SIZES | {"num_hidden_layers": layers}
    lower = random_model(seed, **changes).to(getattr(torch, dtype))
    theirs_of(lower, tmp_path / "theirs")
    write_trace(lower.double(), TEXT, tmp_path / "ours", scores=True)
    code, said = told()
    assert code == 0 and f"equal within {dtype} rounding" in said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_in_lower_precision_is_equal_within_rounding(dtype, tmp_path, told):
    tokens = list(range(1, 200, 3))
    write_trace(Mixtral.from_pretrained(ROOT / "tiny", torch.float64), tokens, tmp_path / "ours")
    theirs_of(Mixtral.from_pretrained(ROOT / "tiny", getattr(torch, dtype)), tmp_path / "theirs",
              tokens, scores=False)
    code, said = told()
    assert code == 0 and f"equal within {dtype} rounding" in said


# Structural errors, each seeded in the functions of mixtral.py.


def neighbours(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = (y[:, :, None].to(x.dtype).chunk(2, -1)[1] for y in (cos, sin))
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def attention(scale=True, tiled=False):
    def attend(q, k, v, mask):
        H, K = q.shape[2], k.shape[1]
        of = torch.arange(H) % K if tiled else torch.arange(H) // (H // K)
        scores = torch.einsum("bshd,bhtd->bhst", q, k[:, of])
        scores = scores / math.sqrt(q.shape[-1]) if scale else scores
        scores = torch.where(mask[:, None], scores, -math.inf)
        mixtral.probe("scores", scores)
        mixtral.probe("probabilities", scores.softmax(-1))
        return mixtral.probe("mixed", torch.einsum("bhst,bhtd->bshd", scores.softmax(-1), v[:, of]))
    return attend


def routed(weigh):
    def route(logits, k):
        chosen, experts = logits.sort(dim=-1, descending=True, stable=True)
        weights = weigh(at_least_float32(logits), at_least_float32(chosen[:, :k]), experts[:, :k])
        experts = mixtral.probe("chosen", experts[:, :k])
        return mixtral.probe("weights", weights), experts
    return route


def windowed(change):
    real = mixtral.visible
    return lambda queries, keys, window: real(queries, keys, change(window))


def angled(offset=0, theta=None, sign=1):
    real = mixtral.rotation

    def rotation(positions, d, ours):
        cos, sin = real(positions + offset, d, theta or ours)
        return cos, sin * sign
    return rotation


def expert(combine):
    def forward(self, x):
        return self.w2(mixtral.probe("hidden", combine(self.w1(x), self.w3(x))))
    return forward


def normed(combine):
    def forward(self, x):
        return combine(at_least_float32(x), self.weight, self.eps).to(x.dtype)
    return forward


def unit(x, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def block(attention_too, mixture_too):
    def forward(self, x, place, cache=None):
        x = mixtral.probe("residual", attention_too * x + self.self_attn(
            self.input_layernorm(x), place, cache))
        return mixture_too * x + self.block_sparse_moe(self.post_attention_layernorm(x))
    return forward


FUNCTIONS = [
    ("rotate", neighbours, "self_attn.q_rotated", "pairs of neighbours"),
    ("rotate", lambda x, cos, sin: x, "self_attn.q_rotated", "not rotated"),
    ("rotation", angled(1), "self_attn.q_rotated", "positions shifted by +1"),
    ("rotation", angled(sign=-1), "self_attn.q_rotated", "the other way"),
    ("rotation", angled(theta=1e6), "self_attn.q_rotated", "rope_theta 1e+06 instead of 10000"),
    ("rotation", angled(theta=3210.0), "self_attn.q_rotated", "rope_theta 3210 instead of 10000"),
    ("visible", windowed(lambda W: W + 1), "self_attn.scores", "off by one: 6 keys instead of 5"),
    ("visible", windowed(lambda W: W - 1), "self_attn.scores", "off by one: 4 keys instead of 5"),
    ("visible", windowed(lambda W: None), "self_attn.scores", "no window"),
    ("visible", lambda q, k, W: torch.ones(1, 14, 14, dtype=torch.bool), "self_attn.scores",
     "every query sees every token"),
    ("attend", attention(scale=False), "self_attn.scores", "not divided by √d"),
    ("attend", attention(tiled=True), "self_attn.scores", "key head h mod K"),
    ("route", routed(lambda logits, raw, e: logits.softmax(-1).gather(1, e)),
     "block_sparse_moe.weights", "missing renormalisation"),
    ("route", routed(lambda logits, raw, e: raw), "block_sparse_moe.weights", "without a softmax"),
    ("route", routed(lambda logits, raw, e: torch.full_like(raw, 0.5)),
     "block_sparse_moe.weights", "equal weights")]
METHODS = [
    ("Expert", expert(lambda g, u: F.silu(u) * g), "hidden", "w1 and w3 swapped"),
    ("Expert", expert(lambda g, u: F.gelu(g) * u), "hidden", "gelu instead of silu"),
    ("Expert", expert(lambda g, u: g * u), "hidden", "no silu"),
    ("RMSNorm", normed(lambda x, w, eps: unit(x, 1e-2) * w), "input_layernorm",
     "rms_norm_eps 0.01 instead of 1e-05"),
    ("RMSNorm", normed(lambda x, w, eps: unit(x, eps)), "input_layernorm", "weight is missing"),
    ("RMSNorm", normed(lambda x, w, eps: unit(x, eps) * (1 + w)), "input_layernorm", "1 + weight"),
    ("RMSNorm", normed(lambda x, w, eps: unit(x - x.mean(-1, keepdim=True), eps) * w),
     "input_layernorm", "LayerNorm"),
    ("Block", block(0, 1), "layers.0.residual", "the residual stream is not added"),
    ("Block", block(1, 0), "model.layers.0;", "the residual stream is not added")]


def seeded(kind, thing, wrong, monkeypatch):
    if kind == "function":
        monkeypatch.setattr(mixtral, thing, wrong)
    else:
        monkeypatch.setattr(getattr(mixtral, thing), "forward", wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind, thing, wrong, place, cause", [
    *(("function", *row) for row in FUNCTIONS), *(("method", *row) for row in METHODS)])
def test_a_structural_error_is_named_where_it_happens(
        kind, thing, wrong, place, cause, dtype, tmp_path, told, monkeypatch):
    model = random_model(**SIZES).to(dtype)
    with monkeypatch.context() as patch:
        seeded(kind, thing, wrong, patch)
        theirs_of(model, tmp_path / "theirs")
    code, said = told()
    [first] = [line for line in said.splitlines() if line.startswith("first difference")]
    assert code == 1 and place in first.partition("before")[0] and cause in said, said


@pytest.mark.parametrize("wrong, cause", [
    (windowed(lambda W: W + 1), "off by one: 6 keys"), (windowed(lambda W: None), "no window")])
def test_a_window_is_named_without_scores_too(wrong, cause, tmp_path, told, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(mixtral, "visible", wrong)
        theirs_of(random_model(**SIZES).float(), tmp_path / "theirs", scores=False)
    code, said = told()
    assert code == 1 and "self_attn.mixed" in said and cause in said


def changed(change, tmp_path, dtype=torch.float32):
    """Theirs with a weight of the model or a tensor of the trace changed."""
    model = random_model(**SIZES).to(dtype)
    with torch.no_grad():
        change(model)
    theirs_of(model, tmp_path / "theirs")


def test_rows_in_mistrals_order_are_named(tmp_path, told):
    def raw(model):
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight.copy_(weight.unflatten(0, (6, 2, 4)).transpose(1, 2).flatten(0, 2))
    changed(raw, tmp_path)
    code, said = told()
    assert code == 1 and "Mistral's order" in said and "self_attn.q_proj" in said


def test_w1_and_w3_swapped_at_loading_is_named(tmp_path, told):
    def swap(model):
        for expert in model.model.layers[0].block_sparse_moe.experts:
            expert.w1, expert.w3 = expert.w3, expert.w1
    changed(swap, tmp_path)
    # The names of hooks follow the modules, so that only what is inside tells.
    code, said = told()
    assert code == 1 and "w1 and w3 swapped" in said


def rewritten(tmp_path, change, dtype=torch.float32):
    """Theirs with its tensors changed after an honest run."""
    found = theirs_of(random_model(**SIZES).to(dtype), tmp_path / "theirs")
    tensors = {name: x.clone() for name, x in found.items()}
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "theirs")


def test_other_shapes_of_the_same_numbers_are_equal(tmp_path, told):
    def flatten(tensors):
        for name in list(tensors)[1:]:
            if axes(name)[:2] == ["B", "S"]:
                tensors[name] = tensors[name][0].flatten(1)
    rewritten(tmp_path, flatten)
    assert told()[0] == 0


@pytest.mark.parametrize("quantity", ["q_rotated", "mixed", "v_proj"])
def test_transposed_axes_are_named(quantity, tmp_path, told):
    name = f"model.layers.0.self_attn.{quantity}"

    def transpose(tensors):
        x = tensors[name]
        tensors[name] = (x if x.ndim == 4 else x.unflatten(-1, (-1, 8))).transpose(1, 2)
    rewritten(tmp_path, transpose)
    code, said = told()
    assert code == 1 and f"first difference: {name}" in said and "transposed" in said


def test_values_shifted_by_one_position_are_named(tmp_path, told):
    name = "model.layers.1.self_attn.v_proj"
    rewritten(tmp_path, lambda t: t.update({name: t[name].roll(1, 1)}))
    code, said = told()
    assert code == 1 and name in said and "shifted by +1 token" in said


def test_a_factor_is_named(tmp_path, told):
    rewritten(tmp_path, lambda t: t.update({"lm_head": t["lm_head"] * 0.5}))
    code, said = told()
    assert code == 1 and "multiplied by 0.5" in said


def test_a_step_in_lower_precision_is_named(tmp_path, told):
    name = "model.layers.0.post_attention_layernorm"
    rewritten(tmp_path, lambda t: t.update({name: t[name].bfloat16().float()}))
    code, said = told()
    assert code == 1 and "rounded to bfloat16 here" in said


def test_smooth_drift_is_told_from_a_jump(tmp_path, told):
    def noise(tensors):
        torch.manual_seed(0)
        size = 1e-6
        for name, x in tensors.items():
            if name not in ("tokens", "model.embed_tokens") and x.is_floating_point():
                size *= 1.12
                tensors[name] = x * (1 + size * torch.randn_like(x))
    rewritten(tmp_path, noise)
    code, said = told()
    assert code == 1 and "drift: it grew without a jump" in said and "0 " in said


def test_an_unexplained_difference_is_called_unexplained(tmp_path, told):
    name = "model.layers.1.self_attn.o_proj"
    rewritten(tmp_path, lambda t: t[name][0, 7, 3].add_(5.0))
    code, said = told()
    assert code == 1 and "cause: not found" in said and "row 0, token 7, feature 3" in said
    assert "at 1 of 14 rows, the first at token 7" in said


def test_where_a_quantity_is_lacking_the_interval_is_told(tmp_path, told):
    def few(tensors):
        for name in list(tensors)[1:]:
            if not (axes(name)[:3] == ["B", "S", "D"] and name[-1].isdigit() or "embed" in name):
                del tensors[name]
        tensors["model.layers.1"] += torch.linspace(0, 1, 14)[:, None].sin()
    rewritten(tmp_path, few)
    code, said = told()
    assert code == 1 and "first difference: model.layers.1; before it model.layers.0" in said
    assert "perhaps the place: model.layers.1.input_layernorm" in said


def router(model, layer, token, gap):
    """Shift the third expert's router row so that the second leads by the gap; return both."""
    with torch.inference_mode(), watching(model) as seen:
        model(torch.tensor([TEXT]))
    at = f"model.layers.{layer}"
    logits = seen[f"{at}.block_sparse_moe.gate"][0][token]
    x = seen[f"{at}.post_attention_layernorm"][0][0, token]
    best = logits.sort(descending=True)[1]
    weight = model.model.layers[layer].block_sparse_moe.gate.weight
    weight[best[2]] += x * (logits[best[1]] - logits[best[2]] - gap) / x.square().sum()
    return best[1:3].tolist()


def test_a_flip_at_a_near_tie_is_no_error_and_one_by_a_margin_is(tmp_path, told, monkeypatch):
    for gap, wanted in ((1e-8, 0), (0.3, 1)):
        model, other = random_model(**SIZES), random_model(**SIZES).float()
        second, third = router(model, 1, 6, gap)
        write_trace(model, TEXT, tmp_path / "ours", scores=True)
        other.load_state_dict(model.state_dict())
        calls = iter(range(99))

        def flipped(logits, raw, experts, calls=calls, second=second, third=third):
            if next(calls) == 1:
                assert experts[6, 1] in (second, third)
                experts[6, 1] = third
            return raw.softmax(-1)

        with monkeypatch.context() as patch:
            patch.setattr(mixtral, "route", routed(flipped))
            theirs_of(other, tmp_path / "theirs")
        code, said = told()
        assert code == wanted, said
        assert ("routing flip, no error: model.layers.1.block_sparse_moe.chosen, token 6" in said
                ) is (wanted == 0)
        assert ("no near tie" in said) is (wanted == 1)


def test_the_same_experts_in_another_order_are_no_flip(tmp_path, told):
    def swap(tensors):
        for name in tensors:
            if name.endswith((".weights", ".chosen")):
                tensors[name] = tensors[name].flip(1)
    rewritten(tmp_path, swap)
    code, said = told()
    assert code == 0 and "routing flips: 0" in said


def test_their_names_may_be_mapped_and_tolerances_given(tmp_path, told):
    tensors = theirs_of(random_model(**SIZES).float(), tmp_path / "x")
    save_file({"logits": tensors["lm_head"], "extra": torch.ones(1)}, tmp_path / "theirs")
    (tmp_path / "names").write_text(json.dumps({"logits": "lm_head"}))
    code, said = told("--names", str(tmp_path / "names"))
    assert code == 0 and "compared 1 tensors" in said and "not ours: extra" in said
    assert told("--names", str(tmp_path / "names"), "--rtol", "0", "--atol", "1e-3")[0] == 0
    assert told("--names", str(tmp_path / "names"), "--rtol", "0", "--atol", "1e-12")[0] == 1


def test_all_lists_every_tensor(tmp_path, told):
    theirs_of(random_model(**SIZES).float(), tmp_path / "theirs")
    said = told("--all")[1]
    assert all(f"  model.layers.{n}.self_attn.mixed" in said for n in range(3))


@pytest.mark.parametrize("case", ["plain", "window", "chunked"])
def test_a_golden_file_is_a_trace_to_compare_with(case, tmp_path, told):
    path = golden.HERE / f"{case}.safetensors"
    code, said = told(ours=path, theirs=path)
    assert code == 0 and "equal within float64 rounding: the largest error is 0" in said


def test_what_cannot_be_compared_ends_with_2_and_one_line(ours, tmp_path, told):
    path = tmp_path / "theirs"
    for content, words in (
            ({"tokens": torch.tensor([[1, 2]])}, "tokens differ"),
            ({"other": torch.ones(1)}, "none of our names")):
        save_file(content, path)
        code, said = told()
        assert code == 2 and words in said and said.count("\n") == 1
    path.write_text("no tensors")
    assert told()[0] == 2
    assert told(theirs=tmp_path / "absent")[0] == 2
    save_file({"x": torch.ones(1)}, path)
    code, said = told(ours=path, theirs=ours)
    assert code == 2 and "wanted a trace of generate.py" in said
    code, said = told("--names", str(path))
    assert code == 2 and "not readable as JSON" in said
