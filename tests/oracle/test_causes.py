"""Claims about the causes that compare.py names: the right one, and never a wrong one.

The errors are those of seeds.py, in the port of port.py. Layouts are tested here too.
"""

import json
import math
import random
import re

import causes
import golden
import pair
import port
import pytest
import torch
from reference import axes, word
from seeds import (
    SEEDS,
    active,
    copied,
    even_odd,
    frequencies,
    interleaved,
    rows_of_heads,
    scaled,
    seen,
    turned,
)
from steps import STEPS, Run, parse
from torch.nn import functional as F

import mixtral
from convert import write_safetensors

AT = "model.layers.0."


def ported(case, wrong=None, weights=None, *rest, dtype=torch.float64):
    """The tensors of a port with an error."""
    ours = port.known(golden.HERE / f"{case}.safetensors")
    return port.run(ours, dtype, wrong, weights and weights(ours.weights), *rest)


def causes_in(text):
    """The causes in a verdict: the first, and the ones that give the same numbers."""
    [first] = re.findall(r"Cause: (.*?)\. With it", text) or [""]
    others = re.findall(r"would follow if (.*)\.", text)
    return first, others[0].split("; or if ") if others else []


def until(tensors, last, case="plain"):
    """What a port writes that stops behind a tensor, so that nothing shows what follows from it."""
    order = pair.read_trace(golden.HERE / f"{case}.safetensors")[1]
    end = max(i for i, n in enumerate(order) if n == last or n.startswith(f"{last}experts"))
    return {n: x for n, x in tensors.items() if n in order[:end + 1]}


def first_difference(text):
    return re.search(r"first tensor that differs is (.*)\.\n", text)[1]


# ------------------------------------------------------------------ causes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("number", range(len(SEEDS)), ids=lambda n: f"{SEEDS[n][1][:40]} {n}")
def test_a_seeded_error_is_named_from_a_full_trace(number, dtype, verdict):
    wrong, cause, place, case, *rest = SEEDS[number]
    code, text = verdict(case, ported(case, wrong, *rest, dtype=dtype))
    assert code == 1 and first_difference(text).endswith(place), text
    assert causes_in(text)[0].startswith(cause), text
    assert "another error" not in text or len(rest) == 3, text  # left padding makes two
    assert "is confined to" in text or "It concerns all" in text or place == "chosen"


def is_layer(name):
    return name == "tokens" or word(name) in ("layer", "embed_tokens")


@pytest.mark.parametrize("kept, seeds", [
    (is_layer, SEEDS[2::20] + [seed for seed in SEEDS if "smallest" in seed[1]]),
    (lambda name: name in ("tokens", "lm_head"), [
        seed for seed in SEEDS if "multiplied by 2" in seed[1]])], ids=["layers", "logits"])
def test_most_errors_are_named_from_coarse_traces(kept, seeds, verdict):
    """From the outputs of layers only or the logits only. Some seeds are enough."""
    named = []
    for wrong, cause, place, case, *rest in seeds:
        tensors = {n: x for n, x in ported(case, wrong, *rest).items() if kept(n)}
        code, text = verdict(case, tensors)
        first, others = causes_in(text)
        named.append(any(found.startswith(cause) for found in [first, *others]))
        assert named[-1] or "Cause: not found" in text or code == 0, (place, text)
    assert 2 * sum(named) >= len(named), named


def test_without_weights_a_coarse_trace_bounds_the_place_and_says_what_to_do(tmp_path, verdict):
    metadata, tensors = pair.read_file(golden.HERE / "plain.safetensors")
    weights = {n: tensors.pop(n) for n in list(tensors) if n.endswith(".weight")}
    write_safetensors(tmp_path / "ours", tensors, metadata)
    theirs = ported("plain", {"score": lambda q, k: q @ k.mT})
    coarse = {n: x for n, x in theirs.items() if is_layer(n)}
    code, text = verdict(tmp_path / "ours", coarse)
    assert code == 1 and "model.embed_tokens, the tensor before it in the trace, is equal." in text
    assert "The error is made between the two. Not traced there: model.layers.0.input_lay" in text
    assert re.search(r"need the weights\. Give .* --model", text)
    [wanted] = re.findall(r"Trace (.*) next", text)
    code, text = verdict(tmp_path / "ours", coarse | {wanted: theirs[wanted]})
    assert causes_in(text)[0].startswith("it is multiplied by 2, which is √d")
    (tmp_path / "model").mkdir()
    write_safetensors(tmp_path / "model" / "model.safetensors", weights)
    code, text = verdict(tmp_path / "ours", coarse, "--model", tmp_path / "model")
    assert causes_in(text)[0].startswith("it is multiplied by 2, which is √d")


@pytest.mark.parametrize("case", ["plain", "window", "ragged"])
def test_the_steps_without_an_error_are_the_second_implementation(case):
    trace, order = pair.read_trace(golden.HERE / f"{case}.safetensors")
    run = Run(trace._replace(tensors={"tokens": trace.tensors["tokens"]}))
    real = torch.cat([torch.arange(len(row)) < n for row, n in zip(
        trace.tensors["tokens"], trace.lengths, strict=True)])
    for name in order[1:]:
        if word(name) in STEPS:
            rows = trace.tensors[name.rpartition(".")[0] + ".tokens"] if axes(name)[0] == "R" else (
                real)
            a, b = (pair.as_rows(x.double(), axes(name))[rows]
                    for x in (run[name], trace.tensors[name]))
            assert torch.allclose(a.nan_to_num(), b.nan_to_num(), rtol=1e-12, atol=1e-13), name


RULES = {(words, text): rule for words, guess in causes.GUESSES if isinstance(guess, dict)
         for text, rule in guess.items()}
EQUAL = ("of equal logits", "pairs (i, i + d/2) are rotated and written")  # no ties, and a layout


@pytest.mark.parametrize("words", sorted({words for words, _ in RULES}))
def test_each_rule_is_named_if_a_port_follows_it(words, verdict):
    """The port is steps.py itself here, so that each line of the tables runs once."""
    ours, order = pair.read_trace(golden.HERE / "plain.safetensors")
    names = [n for n in order if parse(n)[1] in (None, 0) and word(n) in STEPS]
    last = max(names.index(n) for n in names if word(n) in words.split())
    for (own, text), rule in RULES.items():
        if own == words:
            run = Run(ours._replace(tensors={"tokens": ours.tensors["tokens"]}),
                      dict.fromkeys(words.split(), rule))
            tensors = {n: run[n] for n in names[:last + 1]}
            for n in tensors:  # an expert has rows of its own tokens only
                if axes(n)[0] == "R":
                    chosen = tensors[f"{AT}block_sparse_moe.chosen"]
                    tensors[n] = tensors[n][(chosen == parse(n)[2]).any(1)]
            code, found = verdict("plain", tensors)
            first, others = causes_in(found)
            named = any(cause.startswith(text) for cause in (first, *others))
            assert named or code == 0 and text.startswith(EQUAL), (text, found)


def test_two_errors_are_both_named(verdict):
    wrong = {"score": lambda q, k: q @ k.mT} | active(lambda g, u: F.gelu(g) * u)
    text = verdict("plain", ported("plain", wrong))[1]
    assert causes_in(text)[0].startswith("it is multiplied by 2")
    assert re.search(r"The port makes the same error in scores of layer 1", text)
    assert re.search(r"another error: hidden of layers 0 to 1, experts", text), text
    assert "There: gelu takes the place of silu." in text


def test_an_error_in_one_layer_or_expert_only_is_not_told_of_the_others(verdict):
    tensors = {n: x for n, x in ported("plain").items()
               if f"{AT}block_sparse_moe.experts" in n and not n.endswith("w2")}
    name = f"{AT}block_sparse_moe.experts.0.hidden"
    tensors[name] = F.gelu(tensors[name.replace("hidden", "w1")]) * tensors[
        name.replace("hidden", "w3")]
    text = verdict("plain", tensors)[1]
    assert "Cause: gelu takes the place of silu. With it" in text and "another error" not in text
    assert re.search(r"It does not make it in hidden of layer 0, experts 1 to", text), text


@pytest.mark.parametrize("name, factor, spread, named", [
    ("lm_head", 0.5, 0.0, True), ("lm_head", 0.5, 1e-6, False),
    (f"{AT}self_attn.mixed", 0.7, 0.04, False), ("lm_head", 1 + 1e-9, 0.0, True)])
def test_a_factor_is_named_only_if_it_makes_the_tensors_equal(name, factor, spread, named, verdict):
    tensors = ported("plain")
    torch.manual_seed(0)
    x = tensors[name]
    tensors[name] = x * factor * (1 + spread * torch.randn_like(x))
    text = verdict("plain", until(tensors, name))[1]
    assert (f"Cause: it is multiplied by {factor:.10g}" in text) is named, text
    assert ("Cause: not found" in text) is not named


@pytest.mark.parametrize("cause", ["the window is off by one: 6", "angles are multiplied by 2",
                                   "gelu takes the place of silu", "a normalised sigmoid takes"])
def test_a_cause_that_only_nearly_fits_is_not_named(cause, verdict):
    """With another error of one part in a thousand in the same tensor."""
    [(wrong, _, _, case)] = [seed for seed in SEEDS if seed[1].startswith(cause)]
    tensors = ported(case, wrong)
    name = first_difference(verdict(case, tensors)[1])
    x = tensors[name]
    tensors[name] = torch.where(x.isfinite(), x * (1 + 1e-3 * torch.rand_like(x)), x)
    assert "Cause: not found" in verdict(case, tensors)[1]


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min, -math.inf])
def test_a_mask_that_the_softmax_turns_into_zero_is_no_error(fill, verdict):
    wrong = {"hide": lambda scores, mask: torch.where(mask, scores, fill)}
    assert verdict("plain", ported("plain", wrong, dtype=torch.float32))[0] == 0


def test_an_error_that_begins_with_a_call_is_confined_to_the_calls(verdict):
    tensors = ported("chunked")
    tensors[f"{AT}self_attn.mixed"][:, 8:] += 1.0
    text = verdict("chunked", until(tensors, f"{AT}self_attn.mixed", "chunked"))[1]
    assert "confined to the tokens from call 2 on, counted from 0" in text


def prefers_the_higher_index(logits, top_k):
    best = logits.shape[1] - 1 - logits.flip(1).sort(descending=True, stable=True)[1][:, :top_k]
    return logits.gather(1, best).softmax(-1), best


def test_a_port_that_prefers_the_higher_of_its_own_equal_logits_is_wrong(verdict):
    tensors = ported("tied", {"route": prefers_the_higher_index})
    coarse = {n: x for n, x in tensors.items() if is_layer(n)}
    for found in (tensors, coarse):
        code, text = verdict("tied", found)
        assert code == 1 and causes_in(text)[0] == (
            "of equal logits, the expert with the higher index is chosen")
        assert found is coarse or "equal in both files, so the lower index must be chosen" in text
    for rounded in (lambda x: x * (1 + 1e-15 * torch.arange(8).double()), lambda x: x.bfloat16()):
        # Other sums decide about equal logits, and 16 bits do not show it.
        code, text = verdict("tied", {
            n: rounded(x) if n.endswith("gate") else x for n, x in tensors.items()})
        assert code == 0 and "the logits are equal, and here the lower index is chosen" in text


# ------------------------------------------------------------------ no wrong cause


def perturbed(tensors, draw):
    """Moves some numbers of a tensor by 10 to 10⁶ units in the last place, or swaps two parts.

    Returns the tensors, the changed name, and the parts that were swapped: what may be named.
    """
    kind = draw.choice(["element", "row", "feature", "third", "all", "token", "head", "expert"])
    if kind == "expert":
        group = f"model.layers.{draw.choice([0, 1])}.block_sparse_moe."
        a, b = draw.sample(sorted({n.split(".")[5] for n in tensors if group in n[:-6] and (
            "experts" in n)}), 2)
        renamed = {f"{group}experts.{x}": f"{group}experts.{y}" for x, y in ((a, b), (b, a))}
        return {renamed.get(n.rpartition(".")[0], n.rpartition(".")[0]) + n[n.rfind("."):]
                if "." in n else n: x for n, x in tensors.items()}, group, kind
    name = draw.choice([name for name, x in tensors.items() if x.is_floating_point() and (
        word(name) != "margin") and (kind != "head" or {"H", "K"} & set(axes(name)))])
    x = tensors[name].clone()
    if kind in ("token", "head"):
        axis = [n for n, letter in enumerate(axes(name)) if letter in {
            "token": "SNR", "head": "HK"}[kind]][0]
        parts = x.movedim(axis, 0)
        a, b = draw.choices(range(len(parts)), k=2)
        parts[[a, b]] = parts[[b, a]]
        return tensors | {name: x}, name, kind
    bits = x.view({8: torch.int64, 4: torch.int32}[x.itemsize])
    place = tuple(draw.randrange(n) for n in x.shape)
    touched = torch.rand(x.shape) < (0.3 if kind == "third" else 0)
    touched[{"element": place, "row": place[:-1], "feature": (..., place[-1]),
             "third": place, "all": ...}[kind]] = True
    ulps = 10 ** draw.uniform(1, 6) * (torch.randint(0, 2, x.shape) * 2 - 1)
    ulps = ulps * torch.rand(x.shape) if draw.random() < 0.5 else ulps
    bits += (ulps * (touched & x.isfinite())).to(bits.dtype)
    return tensors | {name: x}, name, None


def test_no_cause_is_named_for_random_perturbations_of_a_correct_trace(verdict):
    """Whether the port has also written what follows or not. A swap may be named as what it is."""
    files = {path.stem: pair.read_file(path)[1] for path in sorted(
        golden.HERE.glob("*.safetensors"))}
    for seed in range(200):
        torch.manual_seed(seed)
        draw = random.Random(seed)
        case, dtype = draw.choice([*files]), draw.choice([torch.float64, torch.float32])
        tensors = {name: x.to(dtype) if x.is_floating_point() else x
                   for name, x in files[case].items() if ".weight" not in name[-7:]}
        tensors, name, swapped = perturbed(tensors, draw)
        layer = parse(name)[1]
        tensors = {n: x for n, x in tensors.items() if layer is None or n == "tokens" or (
            parse(n)[1] == layer or word(n) in ("layer", "embed_tokens"))
            if "experts" not in n or "self_attn" not in name}  # fewer tensors, to save time
        for found in tensors, until(tensors, name, case):
            code, text = verdict(case, found)
            assert code == 0 or code == 1 and first_difference(text).startswith(name), (seed, text)
            named = re.search("Cause: (?!not found|no single operation)|Taken alone", text)
            assert not named or swapped == "expert" and "the weight is" in text, (seed, text)
            assert found is tensors or "layout" not in text, (seed, text)


# ------------------------------------------------------------------ layouts


def scaled_queries(weights):
    return {n: w * 0.5 for n, w in weights.items() if "q_proj" in n}  # √d = 2 in `plain`


def folded_norms(weights):
    """The weights of norms in the layers that follow them."""
    found = {}
    for n in range(2):
        at = f"model.layers.{n}."
        for norm, users in (("input_layernorm", ("q_proj", "k_proj", "v_proj")),
                            ("post_attention_layernorm", ("gate", ".w1", ".w3"))):
            w = weights[f"{at}{norm}.weight"]
            found[f"{at}{norm}.weight"] = torch.ones_like(w)
            found |= {name: x * w for name, x in weights.items()
                      if name.startswith(at) and any(f"{user}.weight" in name for user in users)}
    return found


def other_experts(weights):
    """Expert e of the port is ours with the number 7 − e."""
    found = {re.sub(r"experts\.(\d)", lambda m: f"experts.{7 - int(m[1])}", n): w
             for n, w in weights.items() if "experts" in n}
    return found | {n: w.flip(0) for n, w in weights.items() if ".gate." in n}


def other_heads(weights):
    """The groups of heads in reverse order, and o_proj accordingly: 2 groups of 3 heads."""
    found = {}
    for n, w in weights.items():
        if "self_attn" in n:
            side = 1 if "o_proj" in n else 0
            found[n] = w.unflatten(side, (2, -1)).flip(side).reshape(w.shape)
    return found


def other_features(weights):
    """The inner features of experts and of values in reverse order."""
    found = {n: w.flip(1 if ".w2" in n else 0) for n, w in weights.items() if "experts" in n}
    for n, w in weights.items():
        if "v_proj" in n or "o_proj" in n:
            side = 1 if "o_proj" in n else 0
            found[n] = w.unflatten(side, (-1, 4)).flip(side + 1).reshape(w.shape)
    return found


def weights_inside(self, x):
    """SparseMoE.forward with the routing weights in the experts instead of in the sum."""
    tokens = x.flatten(0, 1)
    weights, chosen = mixtral.route(self.gate(tokens), self.top_k)
    y = torch.zeros_like(tokens)
    for e in sorted(set(chosen.flatten().tolist())):
        token, rank = torch.where(chosen == e)
        w, expert, rows = weights[token, rank, None].to(x), self.experts[e], tokens[token]
        y.index_add_(0, token, expert.w2(F.silu(expert.w1(rows)) * expert.w3(rows) * w))
    return y.view(x.shape)


LAYOUTS = [
    (turned(take=even_odd, put=interleaved), rows_of_heads((2, 2)), "q_proj"),
    (turned(put=interleaved), None, "q_rotated"),
    ({"score": lambda q, k: q @ k.mT}, scaled_queries, "q_proj"),
    ({}, folded_norms, "input_layernorm"), ({}, other_experts, "gate"),
    ({}, other_heads, "q_proj"), ({}, other_features, "v_proj"),
    ({"SparseMoE.forward": weights_inside}, None, "hidden"),
    ({"score": lambda q, k: port.score(q, k) + 3.0}, None, "scores"),
    ({"score": lambda q, k: port.score(q, k) / math.log(2),
      "softmax": lambda s: (s * math.log(2)).softmax(-1)}, None, "scores")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_a_layout_is_no_error_and_the_comparison_goes_on_behind_it(number, dtype, verdict):
    wrong, weights, place = LAYOUTS[number]
    tensors = ported("plain", wrong, weights, dtype=dtype)
    code, text = verdict("plain", tensors)
    assert code == 0 and re.search(rf"Your layout differs in .*{place}.*no error", text), text
    tensors["lm_head"] = 2 * tensors["lm_head"]
    code, text = verdict("plain", tensors)
    assert code == 1 and first_difference(text) == "lm_head"
    assert causes_in(text)[0].startswith("it is multiplied by 2")
    assert re.search(rf"Your layout differs in .*{place}", text)


@pytest.mark.parametrize("first, second", [
    (other_heads, scaled_queries), (other_experts, other_features), (other_heads, other_features)])
def test_two_layouts_at_once_are_no_error(first, second, verdict):
    wrong = {"score": lambda q, k: q @ k.mT} if second is scaled_queries else None
    code, text = verdict("plain", ported("plain", wrong, lambda w: (w := w | first(w)) | second(w)))
    assert code == 0 and "Your layout differs" in text, text


def test_the_last_norm_may_be_folded_into_the_logits(verdict):
    code, text = verdict("plain", ported("plain", {}, lambda w: {
        "model.norm.weight": torch.ones(16), "lm_head.weight": w["lm_head.weight"] * w[
            "model.norm.weight"]}))
    assert code == 0 and "differs in model.norm. Taken alone, the weight of the norm" in text
    assert float(re.search(r"largest error is (.*), in", text)[1]) < 1e-13  # of what must be equal


def test_an_error_behind_a_layout_is_not_blamed_on_it(verdict):
    wrong = turned(take=even_odd, put=interleaved) | seen(lambda i, j, W: j <= i)
    text = verdict("window", ported("window", wrong, rows_of_heads((2, 2))))[1]
    assert first_difference(text).endswith("scores") and "layout differs in q_proj" in text
    assert causes_in(text)[0] == "there is no window"
    theta = frequencies(lambda p, i, d, theta: p / 1e4 ** (2 * i / d))
    wrong = turned(take=even_odd, put=interleaved) | theta
    tensors = ported("plain", wrong, rows_of_heads((2, 2)))
    assert "fits a rotation of neighbours" in causes_in(verdict("plain", tensors)[1])[0]
    text = verdict("plain", tensors, "--interleaved")[1]
    assert first_difference(text).endswith("q_rotated") and "rope_theta is 10000" in text
    gate = f"{AT}block_sparse_moe.gate"
    tensors = ported("plain", {}, lambda w: {f"{gate}.weight": 2 * w[f"{gate}.weight"]})
    few = {n: tensors[n] for n in (gate, gate.replace("gate", "chosen"))}
    assert verdict("plain", few)[0] == 1  # nothing shows what became of the weights


def test_what_is_added_to_the_stream_has_no_other_layout(verdict):
    """A sum in low precision would not show it if it is small."""
    name = f"{AT}self_attn.o_proj"
    code, text = verdict("plain", ported("plain") | {name: -ported("plain")[name]})
    assert code == 1 and first_difference(text) == name


def test_a_layout_is_proved_through_steps_that_our_trace_lacks_too(tmp_path, verdict):
    metadata, tensors = pair.read_file(golden.HERE / "plain.safetensors")
    order = [entry for entry in json.loads(metadata["order"]) if "T" not in entry[1]]
    write_safetensors(tmp_path / "ours", tensors, metadata | {"order": json.dumps(order)})
    name = f"{AT}self_attn.q_proj"
    code, text = verdict(tmp_path / "ours", {name: tensors[name].flip(1)})
    assert code == 1 and first_difference(text) == name


def test_in_bfloat16_a_factor_of_the_embedding_is_no_layout(verdict):
    """The stream takes part in sums, which no later factor mends."""
    tensors = ported("plain", {}, scaled("embed_tokens", 2), dtype=torch.bfloat16)
    text = verdict("plain", tensors)[1]
    assert causes_in(text)[0].startswith("it is multiplied by 2.0") and "layout" not in text, text


def test_router_rows_in_another_order_than_the_experts_are_an_error(verdict):
    gate = f"{AT}block_sparse_moe.gate"

    def swapped(weights):
        return {f"{gate}.weight": weights[f"{gate}.weight"][[0, 2, 1, 3]]}
    tensors = ported("one_expert", {}, swapped)
    for kept in (lambda n: True), (lambda n: word(n) != "chosen"):
        code, text = verdict("one_expert", {n: x for n, x in tensors.items() if kept(n)})
        assert code == 1 and first_difference(text) == gate and "layout" not in text, text


def test_a_layout_of_one_layer_is_no_error_in_the_next(verdict):
    wrong = turned(take=even_odd, put=interleaved) | active(lambda g, u: F.gelu(g) * u)
    text = verdict("plain", ported("plain", wrong, rows_of_heads((2, 2))))[1]
    assert causes_in(text)[0].startswith("gelu") and "another error" not in text, text


def test_an_error_that_looks_like_a_layout_is_an_error(verdict):
    """Mistral's order of rows without its rotation, and one expert in the place of another."""
    code, text = verdict("plain", ported("plain", {}, rows_of_heads((2, 2))))
    assert code == 1 and "in Mistral's order" in causes_in(text)[0], text
    code, text = verdict("plain", ported("plain", {}, copied(
        f"{AT}block_sparse_moe.gate", "model.layers.1.block_sparse_moe.gate")))
    assert code == 1 and causes_in(text)[0].endswith("layers.1.block_sparse_moe.gate"), text
