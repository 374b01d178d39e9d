"""Claims about tiny/train.py: it trains a Mixtral from text, resumes exactly and balances loads."""

import itertools
import math
import random
import re
from argparse import Namespace

import pytest
import torch
import train
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st

from mixtral import Mixtral
from tokenizer import Tokenizer


def options(directory, output, *more):
    """Arguments for a small run. Its texts are written first."""
    draw, words = random.Random(0), "the cat sat on a mat and then ran away from that dog".split()
    for name, count in (("train.txt", 300), ("valid.txt", 5)):
        (directory / name).write_text("\n<|endoftext|>\n".join(
            " ".join(draw.choices(words, k=30)) for _ in range(count)))
    return [f"--train={directory / 'train.txt'}", f"--valid={directory / 'valid.txt'}",
            f"--output={directory / output}", "--vocab=300", "--hidden=16", "--layers=2",
            "--heads=2", "--kv-heads=1", "--expert-hidden=8", "--context=16", "--window=5",
            "--batch=2", *more]


def test_one_command_makes_a_checkpoint_that_loads_and_has_learned(tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(options(tmp_path, "out", "--steps=60", "--check-every=20")) == 0
    log = (out / "train.log").read_text()
    assert log == capsys.readouterr().out
    scores = [float(x) for x in re.findall(r"^step .* bits per byte (\S+)", log, re.M)]
    assert len(scores) == 3 and scores[2] < scores[1] < scores[0]
    model = Mixtral.from_pretrained(out)
    assert Tokenizer(out).vocab_size == model.config.vocab_size == 300
    trained = torch.load(out / "state.pt", weights_only=True)["model"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained[name].bfloat16()), name


@pytest.mark.parametrize("more", [[], ["--optimiser=adamw", "--precision=bfloat16"]])
def test_an_interrupted_run_continues_to_the_same_weights(more, tmp_path, monkeypatch):
    more, rates, one_step = [*more, "--steps=6", "--save-every=3"], [], train.one_step

    def interrupted(model, optimisers, *rest):
        rates.append({group["lr"] for o in optimisers for group in o.param_groups})
        if len(rates) == 6 + 5:
            raise KeyboardInterrupt
        return one_step(model, optimisers, *rest)

    monkeypatch.setattr(train, "one_step", interrupted)
    assert train.main(options(tmp_path, "whole", *more)) == 0
    assert train.main(options(tmp_path, "cut", *more)) == 130
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert train.main(options(tmp_path, "cut", *more)) == 0
    args = train.arguments(options(tmp_path, "whole", *more))
    wanted = [{train.rate_at(step, args)} for step in range(6)]
    assert rates == wanted + wanted[:5] + wanted[3:]
    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.parametrize("alpha, clipped", [(0.0, False), (0.1, False), (40.0, True)])
def test_a_step_takes_the_clipped_gradient_of_the_loss_plus_alpha_times_balance(alpha, clipped):
    model, tokens, found = random_model().requires_grad_(True), torch.arange(18).view(2, 9), []
    model.model.norm.weight.data /= 9
    batch = tokens[:, :-1], tokens[:, 1:]
    with train.router_logits(model) as layers:
        logits = model(batch[0])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
    balance = train.balance_loss(layers, 2)
    wanted = torch.autograd.grad(loss + alpha * balance, list(model.parameters()),
                                 allow_unused=True, materialize_grads=True)
    size = torch.stack([gradient.square().sum() for gradient in wanted]).sum().sqrt()
    assert (size > 1) == clipped
    recorder = Namespace(step=lambda: found.extend(p.grad for p in model.parameters()))
    args = Namespace(balance=alpha, device="cpu", precision="float32")
    result = train.one_step(model, [recorder], batch, args)
    assert result[:2] == pytest.approx((loss.item(), balance.item()))
    assert len(layers) == 2  # the second pass was outside the block
    for gradient, unclipped in zip(found, wanted, strict=True):
        assert gradient is not None or not unclipped.any()
        assert gradient is None or torch.allclose(gradient, unclipped / max(1, size), rtol=1e-5)


@given(st.integers(1, 5).flatmap(lambda E: st.lists(
    st.lists(st.integers(-8, 8), min_size=E, max_size=E), min_size=1, max_size=6)), st.data())
def test_the_balance_loss_is_that_of_plain_loops(logits, data):
    N, E = len(logits), len(logits[0])
    A = data.draw(st.integers(1, E))
    f, P = [0.0] * E, [0.0] * E
    for row in logits:
        for e in sorted(range(E), key=lambda e: (-row[e], e))[:A]:
            f[e] += 1 / (N * A)
        for e in range(E):
            P[e] += math.exp(row[e]) / sum(map(math.exp, row)) / N
    x = torch.tensor(logits, dtype=torch.float64)
    assert train.expert_load(x, A).tolist() == pytest.approx(f, rel=1e-12)
    wanted = E * sum(a * b for a, b in zip(f, P, strict=True))
    assert train.balance_loss([x, x], A).item() == pytest.approx(wanted, rel=1e-12)


def test_documents_are_the_texts_between_lines_that_hold_the_separator(tmp_path):
    (tmp_path / "t").write_text("--\none -- two\n--\nthree--\n\nmore\n--\n\n--\nfour\n--\n--\n")
    assert train.documents(tmp_path / "t", "--") == ["one -- two", "three--\n\nmore", "four"]


def test_the_tokenizer_is_trained_with_the_settings_of_mixtrals(tmp_path):
    train.train_tokenizer(["x 1212  y", "ﬁ 1212 12"] * 20, tmp_path / "tokenizer.model", 268)
    tokenizer = Tokenizer(tmp_path)  # refuses another kind of model
    assert tokenizer.vocab_size == 268 and tokenizer.control_ids.keys() == {"<s>", "</s>"}
    assert [tokenizer.pieces[i] for i in tokenizer.encode("1212")] == ["<s>", *"▁1212"]


def test_every_epoch_reads_whole_documents_in_an_order_that_depends_on_the_seed():
    stories = [[1, *range(10 * n, 10 * n + 5 + n), 2] for n in range(1, 9)]
    first, other = (train.Batches(stories, Namespace(batch=3, context=4, seed=seed, device="cpu"))
                    for seed in (0, 1))
    steps, orders = first.rows_per_epoch // 3, []
    assert steps == (sum(map(len, stories)) - 1) // 4 // 3
    for batches, epoch in ((first, 0), (first, 1), (other, 0), (first, 0)):
        parts = [batches[epoch * steps + step] for step in range(steps)]
        tokens, targets = (torch.cat(part).flatten().tolist() for part in zip(*parts, strict=True))
        starts = [at for at, token in enumerate(tokens) if token == 1]
        orders.append([stories.index(tokens[a:b]) for a, b in itertools.pairwise(starts)])
        assert targets[:-1] == tokens[1:] and parts[0][0].shape == (3, 4)
        assert len(set(orders[-1])) == len(orders[-1]) >= 5
    assert orders[0] == orders[3] and orders[0] != orders[1] and orders[0] != orders[2]


def test_the_score_is_that_of_one_token_at_a_time():
    model, bits, counts = random_model(), 0.0, torch.zeros(2, 8)
    tokenizer = Namespace(encode=lambda text, eos: [1, *(3 + b % 29 for b in text.encode()), 2])
    for text in (texts := ["hällo", "once upon a time"]):
        tokens = tokenizer.encode(text, eos=True)
        for at in range(1, len(tokens)):
            with train.router_logits(model) as layers:
                logits = model(torch.tensor([tokens[:at]]))[0, -1]
            bits -= logits.softmax(-1)[tokens[at]].log2().item()
            for layer, router in enumerate(layers):
                counts[layer, router[-1].topk(2).indices] += 1
    score, loads = train.evaluate(model, tokenizer, texts)
    assert score == pytest.approx(bits / (6 + 16), rel=1e-9)
    assert torch.allclose(loads, counts.double() / counts.sum(1, keepdim=True), atol=1e-6)


def test_initial_weights_have_the_documented_spread():
    model = random_model(vocab_size=500, hidden_size=60, intermediate_size=96, num_hidden_layers=3)
    train.initialise(model, seed=0)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            wanted = 0.02 if "lm_head" in name else weight.shape[1] ** -0.5
            wanted /= math.sqrt(2 * 3) if re.search("o_proj|w2", name) else 1
            assert weight.std().item() == pytest.approx(wanted, rel=0.15), name


def test_muon_steps_by_hand_and_an_expert_without_tokens_stays():
    weight, idle = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimiser = train.Muon([weight, idle], lr=0.1, weight_decay=0.5)
    wanted, mean = torch.ones(2, 3), torch.zeros(2, 3)
    for gradient in (2 * torch.eye(3)[:2], torch.eye(3)[1:]):
        weight.grad, mean = gradient, 0.95 * mean + 0.05 * gradient
        optimiser.step()
        update = train.orthogonal(0.95 * mean + 0.05 * gradient)
        assert (torch.linalg.svdvals(update) - 1).abs().max() < 0.35
        wanted = 0.95 * wanted - 0.1 * 0.2 * 3**0.5 * update
        assert torch.allclose(weight, wanted, atol=1e-5)
    assert torch.equal(idle, torch.ones(2, 3))


def test_muon_has_the_matrices_of_the_layers_and_adamw_decays_all_others_but_embeddings_and_norms():
    model = random_model()
    names = {id(p): name for name, p in model.named_parameters()}
    made = train.make_optimisers(model, Namespace(optimiser="muon", rate=0.01, weight_decay=0.1))
    found = {names[id(p)]: (type(o).__name__, group["weight_decay"])
             for o in made for group in o.param_groups for p in group["params"]}
    assert found == {name: (
        "Muon" if re.search(r"_proj|\.w[123]", name) else "AdamW",
        0 if "norm" in name or "embed" in name else 0.1) for name in names.values()}


def test_the_rate_rises_linearly_stays_and_falls_linearly_towards_the_step_after_the_last(tmp_path):
    args = train.arguments(options(tmp_path, "", "--steps=100", "--warmup=0.1", "--decay=0.4"))
    rates = [train.rate_at(step, args) / args.rate for step in range(101)]
    rise, fall = [n / 10 for n in range(1, 11)], [n / 41 for n in range(40, -1, -1)]
    assert rates == pytest.approx(rise + [1] * 50 + fall)


@pytest.mark.parametrize("more, word", [
    (["--vocab=5000"], "--vocab"), (["--batch=10000"], "--batch"),
    (["--heads=3"], "head_dim"), (["--device=nowhere"], "nowhere"),
    (["--valid=/dev/null"], "/dev/null"), (["--train=/nowhere"], "/nowhere"), ([], "state.pt")])
def test_bad_input_is_refused_in_one_line(more, word, tmp_path, capsys):
    command = options(tmp_path, "out", *more)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state.pt").write_bytes(b"not a state")
    assert train.main(command) == 1
    assert re.fullmatch(f"train.py: .*{word}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "out" / "model.safetensors").exists()
