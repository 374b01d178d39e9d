"""Claims about compare.py: honest runs are equal, and a difference is found where it is.

Which causes it names is tested in test_causes.py.
"""

import itertools
import json
import math
import trace
from pathlib import Path

import compare
import golden
import pair
import port
import pytest
import torch
from conftest import random_model, save
from reference import axes, word
from test_causes import causes_in

import mixtral
from convert import write_safetensors
from mixtral import Mixtral

ROOT = Path(__file__).resolve().parents[2]
TEXT = torch.randint(0, 37, (1, 14), generator=torch.Generator().manual_seed(3))
SIZES = {"rope_theta": 1e4, "head_dim": 8, "num_hidden_layers": 3}
L0, L1 = "model.layers.0.", "model.layers.1."


def theirs_of(model):
    """What a port would write: the tensors of one pass."""
    return {"tokens": TEXT} | trace.record(model, TEXT, scores=True)


@pytest.fixture(scope="session")
def honest(tmp_path_factory):
    """Our trace of a float64 model, and the tensors of the same model in float32."""
    path = tmp_path_factory.mktemp("honest") / "ours"
    trace.write_trace(random_model(**SIZES), TEXT, path, scores=True)
    return path, theirs_of(random_model(**SIZES).float())


@pytest.fixture
def changed(honest, verdict):
    """A function that changes the honest tensors of the port and returns the verdict.

    The port writes those up to `last` only, so that nothing shows that a change has no effect.
    """
    def run(change, *options, last="lm_head"):
        names = list(honest[1])
        tensors = {name: honest[1][name].clone() for name in names[:names.index(last) + 1]}
        change(tensors)
        return verdict(honest[0], tensors, *options)
    return run


def golden_tensors(case, kept=lambda name: True):
    """What a correct port writes for a golden file."""
    found = pair.read_file(golden.HERE / f"{case}.safetensors")[1]
    return {name: x.clone() for name, x in found.items()
            if not name.endswith(".weight") and kept(name)}


# ------------------------------------------------------------------ honest runs


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed, layers", [(0, 3), (1, 8), (2, 8)])
def test_honest_runs_are_equal_within_rounding(dtype, seed, layers, tmp_path, verdict):
    """With weights that the lower precision can hold, as in a checkpoint."""
    lower = random_model(seed, **SIZES | {"num_hidden_layers": layers}).to(getattr(torch, dtype))
    theirs = theirs_of(lower)
    trace.write_trace(lower.double(), TEXT, tmp_path / "ours", scores=True)
    code, text = verdict(tmp_path / "ours", theirs)
    assert code == 0 and f"Equal within {dtype} rounding" in text and "layout" not in text, text


@pytest.mark.parametrize("case, dtype", [("bfloat16", torch.bfloat16), *itertools.product(
    sorted(golden.CASES), [torch.float64, torch.float32, torch.float16])])
def test_an_honest_port_is_equal_on_every_golden_file(case, dtype, verdict):
    """Also if its weights are rounded to float16; bfloat16 needs weights that it can hold."""
    code, text = verdict(case, port.run(port.known(golden.HERE / f"{case}.safetensors"), dtype))
    assert code == 0 and "layout" not in text, text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flips_that_the_port_does_not_write_are_no_error(dtype, tmp_path, verdict):
    """Whether it writes all but the choices and the experts, or only the outputs of the layers."""
    text, flips = torch.randint(0, 37, (2, 20), generator=torch.Generator().manual_seed(9)), 0
    for seed in range(6):
        model = random_model(seed, **SIZES).to(dtype)
        found = {"tokens": text} | trace.record(model, text, scores=True)
        trace.write_trace(model.double(), text, tmp_path / "ours", scores=True)
        directory = save(model, tmp_path / "model")
        for kept in (lambda n: word(n) not in ("chosen", "weights") and "experts" not in n,
                     lambda n: word(n) in ("tokens", "embed_tokens", "layer")):
            tensors = {n: x for n, x in found.items() if kept(n)}
            code, printed = verdict(tmp_path / "ours", tensors, "--model", directory)
            assert code == 0, (seed, printed)
            flips += "Routing flip" in printed
    assert flips


@pytest.mark.parametrize("dtype, step", [("float32", 3), ("bfloat16", 5), ("float16", 7)])
@pytest.mark.parametrize("coarse", [False, True])
def test_the_embedded_model_is_equal_and_its_routing_flips_are_reported(
        dtype, step, coarse, tmp_path, verdict):
    """Whether the port has written its choices, or only the outputs of the layers.

    With these tokens, bfloat16 and float16 flip where this was written.
    """
    tokens = torch.arange(1, 60 * step, step)[None]
    trace.write_trace(Mixtral.from_pretrained(ROOT / "tiny", torch.float64), tokens,
                      tmp_path / "ours")
    model = Mixtral.from_pretrained(ROOT / "tiny", getattr(torch, dtype))
    tensors = {"tokens": tokens} | trace.record(model, tokens)
    exact = pair.read_file(tmp_path / "ours")[1]
    chosen = [name for name in tensors if name.endswith("chosen")]
    flips = any((tensors[n].sort()[0] != exact[n].sort()[0]).any() for n in chosen)
    if coarse:
        tensors = {n: x for n, x in tensors.items() if word(n) in ("tokens", "layer")}
    code, text = verdict(tmp_path / "ours", tensors, "--model", ROOT / "tiny")
    assert code == 0 and f"Equal within {dtype} rounding" in text, text
    reported = "Routing flip, no error: model.layers." in text
    assert reported is flips or coarse and flips  # the effect of a flip can be below rounding


@pytest.mark.parametrize("frequency", [
    lambda x: 1 / 1e4 ** x, lambda x: torch.exp(-x * math.log(1e4))], ids=["1/θ^x", "exp"])
def test_any_correct_formula_for_the_angles_is_equal_at_far_positions(frequency, verdict):
    """Their last bits differ by 1e-12 there, which is more than rounding near position 0."""
    def rotation(positions, d, theta):
        angles = (positions + 32750)[:, :, None, None] * frequency(
            torch.arange(0, d, 2).double() / d)
        return angles.cos(), angles.sin()

    ours = port.known(golden.HERE / "far.safetensors")
    tensors, at = port.run(ours, wrong={"rotation": rotation}), f"{L0}self_attn.q_rotated"
    assert (ours.tensors[at] - tensors[at]).abs().max() > 1e-13
    code, text = verdict("far", tensors)
    assert code == 0 and "Equal within float64 rounding" in text


# ------------------------------------------------------------------ routing flips


def with_gap(layer, token, gap):
    """A model whose second expert at a token leads by `gap`, and the second and third expert."""
    model = random_model(**SIZES)
    seen = trace.record(model, TEXT)
    logits = seen[f"model.layers.{layer}.block_sparse_moe.gate"][token]
    x = seen[f"model.layers.{layer}.post_attention_layernorm"][0, token]
    best = logits.sort(descending=True)[1]
    weight = model.model.layers[layer].block_sparse_moe.gate.weight
    weight[best[2]] += x * (logits[best[1]] - logits[best[2]] - gap) / x.square().sum()
    return model, best[1:3].tolist()


@pytest.mark.parametrize("gap, code", [(1e-8, 0), (0.3, 1)])
def test_a_flip_at_a_near_tie_is_no_error_and_one_by_a_margin_is(
        gap, code, tmp_path, verdict, monkeypatch):
    model, (second, third) = with_gap(1, 6, gap)
    trace.write_trace(model, TEXT, tmp_path / "ours", scores=True)
    calls, original = iter(range(99)), mixtral.route

    def flipped(logits, top_k):
        weights, chosen = original(logits, top_k)
        if next(calls) == 1:
            assert chosen[6, 1] == second or gap < 1e-7  # a tie in float32
            chosen[6, 1] = third
            weights = logits.gather(1, chosen).softmax(-1)
        return weights, chosen

    monkeypatch.setattr(mixtral, "route", flipped)
    found, text = verdict(tmp_path / "ours", theirs_of(model.float()))
    assert found == code, text
    name = f"{L1}block_sparse_moe.chosen"
    assert (f"Routing flip, no error: {name}, row 0, token 6; the margin is" in text) is (code == 0)
    assert (f"first tensor that differs is {name}" in text) is (code == 1)
    assert ("At token 6 of row 0 ours chose" in text and "no near tie" in text) is (code == 1)


def test_a_flip_that_is_not_written_needs_the_weights_as_its_proof(tmp_path, verdict):
    model, _ = with_gap(1, 6, 1e-8)
    trace.write_trace(model, TEXT, tmp_path / "ours")
    theirs = {n: x.clone() for n, x in theirs_of(model.float()).items()
              if n == "tokens" or word(n) == "layer"}
    theirs["model.layers.1"][0, 6] = math.nan
    code, text = verdict(tmp_path / "ours", theirs)
    assert code == 1, text


def test_the_same_experts_in_another_order_are_no_flip(changed):
    def swap(tensors):
        for name in tensors:
            if name.endswith((".weights", ".chosen")):
                tensors[name] = tensors[name].flip(1)
    code, text = changed(swap)
    assert code == 0 and "Routing flips: 0" in text


def test_a_flip_is_no_second_error(verdict):
    tensors = port.run(port.known(golden.HERE / "tied.safetensors"), wrong={
        "score": lambda q, k: q @ k.mT})
    for name in list(tensors):
        if name.endswith("gate"):
            tensors[name] = tensors[name] * (1 + 1e-15 * torch.arange(8).double())  # other sums
    text = verdict("tied", tensors)[1]
    assert causes_in(text)[0].startswith("it is multiplied by 2") and "another error" not in text


# ------------------------------------------------------------------ the place of a difference


def test_an_unexplained_difference_is_described_and_no_cause_is_named(changed):
    name = f"{L1}self_attn.o_proj"
    code, text = changed(lambda tensors: tensors[name][0, 7, 3].add_(5.0), last=name)
    assert code == 1 and f"The first tensor that differs is {name}.\n" in text
    assert f"{L1}self_attn.mixed, the tensor before it in the trace, is equal." in text
    assert "is 5, at row 0, token 7, feature 3: ours " in text and "Cause: not found" in text
    assert "1 of 14 tokens differ, the first at token 7 of row 0." in text
    assert "Later tensors that differ too: 0." in text


def test_a_step_in_lower_precision_is_named(changed):
    name = f"{L0}residual"
    code, text = changed(lambda t: t.update({name: t[name].bfloat16().float()}), last=name)
    assert code == 1 and "Cause: it is rounded to bfloat16; if" in text


CONFINED = [  # the tensor, what is changed in it, and where the verdict finds it
    (f"{L1}self_attn.o_proj", (0, 7), "tokens 7."),
    (f"{L1}self_attn.o_proj", (0, slice(4, 9)), "tokens 4 to 8."),
    (f"{L1}self_attn.o_proj", (..., slice(16, 24)), "features 16 to 23."),
    (f"{L1}self_attn.q_proj", (..., slice(8, 24)), "heads 1 to 2."),
    (f"{L1}self_attn.k_rotated", (0, slice(1, None), 1), "all tokens but the first of each row; "
     "key heads 1."),
    (f"{L1}self_attn.mixed", (0, slice(0, 1)), "the first token of each row."),
    (f"{L0}block_sparse_moe.gate", (..., 5), "experts 5."),
    ("lm_head", (..., slice(32, 37)), "token ids 32 to 36, from the last multiple of 8 on.")]


@pytest.mark.parametrize("number", range(len(CONFINED)))
def test_a_difference_is_confined_along_each_axis(number, changed):
    """NaN and infinity point at their own elements, also beside a small error everywhere."""
    name, place, words = CONFINED[number]
    value = (None, math.nan, math.inf)[number % 3]

    def change(tensors):
        torch.manual_seed(0)
        x = tensors[name]
        if value is not None:
            x *= 1 + 0.1 * torch.rand_like(x)
        x[place] = x[place] + torch.rand_like(x[place]) if value is None else value
    code, text = changed(change, last=name)
    what = "It is" if value is None else "NaN or infinity is"
    assert code == 1 and f"{what} confined to {words}" in text and "Cause: not found" in text, text


def test_smooth_drift_is_told_from_a_jump(changed):
    def noise(tensors):
        torch.manual_seed(0)
        size = 2e-6
        for name, x in tensors.items():
            if name not in ("tokens", "model.embed_tokens") and x.is_floating_point():
                size *= 1.018
                tensors[name] = x * (1 + size * torch.randn_like(x))
    code, text = changed(noise)
    assert code == 1 and "Cause: no single operation. The error drifts" in text


def test_what_is_missing_in_theirs_bounds_the_place(changed):
    def outputs(tensors):
        for name in list(tensors):
            if name[-1] not in "01" or ".w" in name:
                del tensors[name]
        tensors["model.layers.1"] += torch.linspace(0, 1, 14)[:, None].sin()
    code, text = changed(outputs)
    assert code == 1 and "Compared 2 of 2 tensors" in text
    assert "The first tensor that differs is model.layers.1.\n" in text
    assert "model.layers.0, the tensor before it in the trace, is equal." in text
    assert "Not traced there: model.layers.1.input_layernorm, " in text
    assert "Trace model.layers.1." in text


def test_a_score_is_masked_if_it_vanishes_beside_others_of_its_own_head():
    ours = torch.tensor([[[200.0, -math.inf], [0.0, -math.inf]]])
    for score, error in (-150.0, 0.0), (50.0, math.inf):
        theirs = torch.tensor([[[200.0, 0.0], [0.0, score]]])
        assert pair.row_errors(ours, theirs).tolist() == [error]


def test_numbers_that_are_not_finite_prove_nothing():
    name, everything = "model.layers.0", torch.ones(14, dtype=torch.bool)
    steps = compare.Prover(pair.Pair(*[golden.HERE / "plain.safetensors"] * 2, {}))
    for rows, proves in (slice(0), True), (slice(1), True), (slice(10), False):
        def step(p, rows=rows):
            return p.plain().index_fill(1, torch.arange(14)[rows], math.nan)
        assert (steps.error(name, {name: step}, everything) < 1e-12) is proves
    assert steps.error(name, {name: lambda p: p.plain() * math.inf}, everything) == math.inf


# ------------------------------------------------------------------ names and shapes


def test_joined_axes_and_a_missing_batch_axis_are_equal(changed):
    def flatten(tensors):
        for name in list(tensors)[1:]:
            if axes(name)[:2] == ["B", "S"]:
                tensors[name] = tensors[name][0].flatten(1)
    assert changed(flatten)[0] == 0


def test_names_can_be_mapped(changed, tmp_path):
    def renamed(tensors):
        logits = tensors["lm_head"]
        tensors.clear()
        tensors |= {"logits": logits, "extra": torch.ones(1)}
    names = tmp_path / "names"
    names.write_text(json.dumps({"logits": "lm_head"}))
    code, text = changed(renamed, "--names", names)
    assert code == 0 and "Compared 1 of 1 tensors" in text
    assert "It has other names too: extra." in text


def test_all_lists_the_error_of_every_tensor(changed, honest):
    lines = changed(lambda tensors: None, "--all")[1].splitlines()
    listed = {line.split()[1]: float(line.split()[0]) for line in lines if line[:1] == " "}
    assert listed.keys() == {name for name in honest[1] if name != "tokens" and (
        word(name) not in ("margin", "chosen"))}
    assert 0 < max(listed.values()) < 1e-5 and listed["model.embed_tokens"] < 1e-7


def test_what_cannot_be_compared_ends_with_2_and_one_line(honest, tmp_path, verdict):
    ours, one, bad = honest[0], {"lm_head": torch.ones(1)}, tmp_path / "bad"
    bad.write_text("no tensors and no JSON")
    write_safetensors(tmp_path / "port", one)
    for arguments, words in (
            ((ours, one | {"tokens": torch.tensor([[1, 2]])}), "the tokens differ"),
            ((ours, {"model.lm_head": torch.ones(1)}), "has none of our names"),
            ((ours, one | {"norm": torch.ones(1)}), "write `model.` before the names"),
            ((ours, {"lm_head": torch.ones(1).int()}), "F64, F32, F16 or BF16"),
            ((ours, {f"{L0}block_sparse_moe.chosen": torch.ones(14, 2)}), "write it as I64"),
            ((tmp_path / "port", one), "must be a golden file or a file of trace.py"),
            ((ours, one, "--names", bad), "not readable as a JSON object"),
            ((ours, one, "--model", tmp_path / "absent"), "no model*.safetensors"),
            ((ours, bad), "not a safetensors file"),
            ((ours, tmp_path / "absent"), "not a safetensors file")):
        code, text = verdict(*arguments)
        assert code == 2 and words in text and text.count("\n") == 1, text


def test_the_last_token_only_gets_advice(verdict):
    tensors = golden_tensors("plain")
    last = {"lm_head": tensors["lm_head"][:, -1], "model.norm": tensors["model.norm"]}
    for found in last, {f"{L0}block_sparse_moe.gate": tensors[f"{L0}block_sparse_moe.gate"][-1:]}:
        code, text = verdict("plain", found)
        assert code == 1 and "Write all of them, not only the last." in text


# ------------------------------------------------------------------ rows of experts and of batches


def test_rows_of_experts_that_are_numbered_from_the_start_of_a_call_are_found(verdict):
    tensors = golden_tensors("chunked")
    wrong = [n for n in tensors if n.endswith(".tokens") and tensors[n].max() > 3]
    for name in wrong:
        tensors[name] = tensors[name] % 4
    code, text = verdict("chunked", tensors)
    assert code == 1 and f"differs is {L0}block_sparse_moe.experts.0.tokens." in text
    assert "ours -1, theirs 1" in text and "Number tokens over all calls" in text
    assert f"Later tensors that differ too: {len(wrong) - 1}." in text


def test_a_token_that_an_expert_dropped_is_found_also_without_the_choices(verdict):
    tensors = {n: x for n, x in golden_tensors("plain").items() if n == "tokens" or "experts" in n}
    at = f"{L0}block_sparse_moe.experts.0."
    dropped = {n: x[:-1] if n.startswith(at) else x for n, x in tensors.items()}
    code, text = verdict("plain", dropped)
    assert code == 1 and f"{at}tokens" in text and "ours 1, theirs -1" in text
    assert verdict("plain", tensors)[0] == 0


def test_experts_counted_from_1_are_refused_beside_padding(verdict):
    tensors = golden_tensors("ragged")
    tensors[f"{L0}block_sparse_moe.chosen"] += 1
    code, text = verdict("ragged", tensors)
    assert code == 2 and "has experts from 1 to 8; write different ones from 0 to 7" in text
    tensors[f"{L0}block_sparse_moe.chosen"][:] = 3
    assert verdict("ragged", tensors)[0] == 2  # one expert twice


def test_rows_of_experts_can_be_in_any_order(verdict):
    tensors = golden_tensors("plain")
    for name in tensors:
        if ".experts." in name:
            tensors[name] = tensors[name].flip(0)
    assert verdict("plain", tensors)[0] == 0


def test_a_verdict_says_where_it_stopped_and_what_is_lacking(verdict):
    wrong = {"score": lambda q, k: 1.3 * port.score(q, k)}
    tensors = port.run(port.known(golden.HERE / "chunked.safetensors"), wrong=wrong)
    lacking = [f"{L0}self_attn.o_proj", f"{L0}residual"]
    code, text = verdict("chunked", {n: x for n, x in tensors.items() if n not in lacking})
    assert code == 1 and f"stopped at {L0}block_sparse_moe.chosen, because other experts" in text
    assert f"differs is {L0}self_attn.mixed" in text and "Cause: not found" in text
    assert "Trace" not in text and f"The port's file lacks 2 of ours: {', '.join(lacking)}." in text


def test_experts_that_ran_on_all_tokens_are_accepted(verdict):
    """Only the rows of the tokens that chose the expert count."""
    tensors, ours = golden_tensors("ragged"), port.known(golden.HERE / "ragged.safetensors")
    at, x = f"{L0}block_sparse_moe.experts.1.", ours.tensors[f"{L0}post_attention_layernorm"]
    tensors[at + "w1"] = x.flatten(0, 1) @ ours.weights[at + "w1.weight"].T
    taken = ours.tensors[at + "tokens"].tolist()
    tensors = {n: tensors[n] for n in ("tokens", f"{L0}block_sparse_moe.chosen", at + "w1")}
    for token, code in ((None, 0), (next(n for n in range(9) if n not in taken), 0), (taken[0], 1)):
        if token is not None:
            tensors[at + "w1"][token] += 1.0
        assert verdict("ragged", tensors)[0] == code, token


def test_packed_rows_get_advice(verdict):
    tensors = golden_tensors("ragged")
    real = torch.cat([torch.arange(9) < n for n in (9, 4, 1)])
    tensors["lm_head"] = tensors["lm_head"].flatten(0, 1)[real]
    code, text = verdict("ragged", tensors)
    assert code == 1 and "lacks the padding" in text
    name = f"{L0}self_attn.q_rotated"
    text = verdict("plain", {name: golden_tensors("plain")[name].transpose(1, 2)})[1]
    assert "Its shape is [1, 6, 14, 4], ours is [1, 14, 6, 4]." in text and "padding" not in text
