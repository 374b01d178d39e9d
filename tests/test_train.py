"""Claims about tiny/train.py: it trains a Mixtral from text, resumes exactly and balances loads."""

import itertools
import math
import random
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import sentencepiece
import torch
import train
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral import Mixtral, MixtralConfig
from tokenizer import Tokenizer

WORDS = "the cat sat on a mat and then ran away from that big dog who had seen it eat".split()
SIZES = ["--vocab", "320", "--hidden", "16", "--layers", "2", "--heads", "2", "--kv-heads", "1",
         "--expert-hidden", "8", "--context", "16", "--window", "5", "--batch", "2"]


def write_texts(directory):
    draw = random.Random(0)
    for name, count in (("train.txt", 300), ("valid.txt", 5)):
        (directory / name).write_text("\n<|endoftext|>\n".join(
            " ".join(draw.choices(WORDS, k=30)) + "." for _ in range(count)))
    return directory


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path)


def options(texts, output, *more):
    return ["--train", str(texts / "train.txt"), "--valid", str(texts / "valid.txt"), "--output",
            str(texts / output), *SIZES, *more]


def small_model(dtype=torch.float64, **changes):
    model = Mixtral(MixtralConfig(**{
        "vocab_size": 32, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4,
        "sliding_window": 5} | changes)).to(dtype)
    train.initialise(model, seed=0)
    return model


# ---- a training run


def run_the_command():
    """The process, and the directory with its texts and its output."""
    place = tempfile.TemporaryDirectory()
    texts = write_texts(Path(place.name))
    more = options(texts, "out", "--steps", "60", "--check-every", "20")
    return subprocess.run([sys.executable, Path(train.__file__), *more], capture_output=True,
                          text=True, timeout=300), place


@pytest.mark.beside(run=run_the_command)
def test_one_command_makes_a_checkpoint_that_loads_and_has_learned(beside):
    done, place = beside
    texts = Path(place.name)
    assert done.returncode == 0, done.stderr
    assert (texts / "out" / "train.log").read_text() == done.stdout
    scores = [float(line.split()[6]) for line in done.stdout.splitlines()
              if line.startswith("step") and "held-out" in line]
    assert len(scores) == 3 and scores[2] < scores[1] < scores[0]
    assert "layer 1 expert load:" in done.stdout
    model, tokenizer = Mixtral.from_pretrained(texts / "out"), Tokenizer(texts / "out")
    assert model.config.sliding_window == 5
    assert tokenizer.vocab_size == model.config.vocab_size == 320
    trained = torch.load(texts / "out" / "state.pt", weights_only=True)["model"]
    assert trained.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained[name].bfloat16()), name


def test_an_interrupted_run_continues_to_the_same_weights(texts, monkeypatch, capsys):
    more = "--steps", "6", "--save-every", "3"
    assert train.main(options(texts, "whole", *more)) == 0
    one_step, made = train.one_step, itertools.count()

    def interrupted(*args):
        if next(made) == 4:
            raise KeyboardInterrupt
        return one_step(*args)

    monkeypatch.setattr(train, "one_step", interrupted)
    assert train.main(options(texts, "cut", *more)) == 130
    assert not (texts / "cut" / "model.safetensors").exists()
    capsys.readouterr()
    assert train.main(options(texts, "cut", *more)) == 0
    assert "continuing after step 3" in capsys.readouterr().out and next(made) == 8
    whole, cut = ((texts / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.parametrize("part", ["gate", "experts.1.w1", "experts.2.w2", "q_proj", "norm"])
def test_gradients_of_the_whole_loss_are_finite_differences(part):
    model, tokens = small_model(), torch.arange(18).view(2, 9) * 7 % 32

    def loss():
        with train.router_logits(model) as layers:
            logits = model(tokens[:, :-1])
        return (torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                + 0.5 * train.balance_loss(layers, 2))

    loss().backward()
    weight = next(p for name, p in model.named_parameters() if part in name)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ahead = (weight.add_(1e-5 * direction), loss())[1]
        behind = (weight.sub_(2e-5 * direction), loss())[1]
    found = (weight.grad * direction).sum()
    assert abs(found) > 1e-4
    assert torch.isclose(found, (ahead - behind) / 2e-5, rtol=1e-6)


def test_every_step_has_its_own_learning_rate(texts, monkeypatch):
    rates, one_step = [], train.one_step

    def recorded(model, optimisers, batch, args):
        rates.append({group["lr"] for o in optimisers for group in o.param_groups})
        return one_step(model, optimisers, batch, args)

    monkeypatch.setattr(train, "one_step", recorded)
    command = options(texts, "out", "--steps", "5", "--warmup", "0.4", "--decay", "0.4")
    assert train.main(command) == 0
    assert rates == [{train.rate_at(step, train.arguments(command))} for step in range(5)]
    assert [round(rate / 5e-3, 3) for (rate,) in rates] == [0.5, 1, 1, 0.667, 0.333]


@pytest.mark.parametrize("alpha, clipped", [(0.0, False), (0.1, False), (40.0, True)])
def test_a_step_takes_the_clipped_gradient_of_cross_entropy_plus_alpha_times_balance(
        alpha, clipped):
    model, tokens, found = small_model(), torch.arange(18).view(2, 9) * 7 % 32, []
    with train.router_logits(model) as layers:
        logits = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    balance = train.balance_loss(layers, 2)
    wanted = torch.autograd.grad(loss + alpha * balance, list(model.parameters()),
                                 allow_unused=True)
    size = torch.stack([g.square().sum() for g in wanted if g is not None]).sum().sqrt()
    assert (size > 1) == clipped
    recorder = Namespace(step=lambda: found.extend(p.grad for p in model.parameters()))
    args = Namespace(balance=alpha, device="cpu", precision="float32")
    given = train.one_step(model, [recorder], (tokens[:, :-1], tokens[:, 1:]), args)
    assert given[:2] == pytest.approx((loss.item(), balance.item()))
    assert torch.allclose(given[2], torch.stack([train.expert_load(x, 2) for x in layers]))
    for gradient, unclipped in zip(found, wanted, strict=True):
        assert (gradient is None) == (unclipped is None)
        if gradient is not None:
            assert torch.allclose(gradient, unclipped / max(1, size), rtol=1e-5)


def test_autocast_computes_the_logits_in_bfloat16_and_keeps_float32_weights():
    batch, losses = (torch.arange(32).view(2, 16), torch.arange(32).view(2, 16).roll(1)), {}
    for precision in ("float32", "bfloat16"):
        model = small_model(torch.float32)
        args = Namespace(balance=0.02, device="cpu", precision=precision, optimiser="muon",
                         rate=0.01, weight_decay=0.1)
        losses[precision] = train.one_step(model, train.make_optimisers(model, args), batch, args)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert 0 < abs(losses["float32"][0] - losses["bfloat16"][0]) < 0.02


# ---- the load-balancing loss


logits_st = st.integers(1, 5).flatmap(lambda E: st.lists(
    st.lists(st.integers(-8, 8).map(lambda n: n / 2), min_size=E, max_size=E),
    min_size=1, max_size=6))


@given(logits_st, st.data())
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
    wanted = E * sum(map(math.prod, zip(f, P, strict=True)))
    assert train.balance_loss([x], A).item() == pytest.approx(wanted, rel=1e-12)


def test_the_balance_loss_is_one_at_equal_load_and_largest_if_all_tokens_share_their_experts():
    even = torch.eye(4) * 50
    assert torch.isclose(train.balance_loss([even], 1), torch.tensor(1.0))
    assert torch.isclose(train.balance_loss([even[:1].expand(4, 4)], 1), torch.tensor(4.0))
    two = torch.tensor([[50.0, 50.0, 0.0, 0.0]]).expand(4, 4)
    assert torch.isclose(train.balance_loss([two], 2), torch.tensor(2.0))
    assert torch.isclose(train.balance_loss([even, two], 1), torch.tensor(1.5))


def test_the_balance_loss_can_fall_below_one():
    """f = (2/3, 1/3). P is near (1/3, 2/3), so the loss is near 2 · (2/9 + 2/9) = 8/9."""
    logits = torch.tensor([[1e-4, 0.0], [1e-4, 0.0], [0.0, 50.0]])
    assert torch.isclose(train.balance_loss([logits], 1), torch.tensor(8 / 9), atol=1e-4)


def test_only_the_probabilities_have_a_gradient():
    """E · Σₑ fₑ · Pₑ has the derivative E/N · pₑ · (fₑ − Σⱼ fⱼ·pⱼ) by the logit e of a token."""
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.5, 3.0, 0.0], [1.0, 0.0, 0.5]], requires_grad=True)
    train.balance_loss([logits], 2).backward()
    p, f = logits.detach().softmax(-1), torch.tensor([3 / 6, 2 / 6, 1 / 6])
    assert torch.allclose(logits.grad, 3 / 3 * p * (f - (p @ f)[:, None]), atol=1e-6)


def test_router_logits_are_those_of_every_layer_inside_the_block_only():
    model, tokens, inputs = small_model(), torch.arange(6).view(2, 3), []
    gates = [layer.block_sparse_moe.gate for layer in model.model.layers]
    for gate in gates:
        gate.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with train.router_logits(model) as layers:
        model(tokens)
    model(tokens)
    assert len(layers) == 2 and len(inputs) == 4
    for logits, hidden, gate in zip(layers, inputs, gates, strict=False):
        assert torch.equal(logits, hidden @ gate.weight.T)


# ---- text, batches and scores


documents_st = st.lists(st.text("ab \n", min_size=1).map(lambda text: text.strip("\n")).filter(
    str.strip), min_size=1, max_size=5)


@settings(max_examples=50)
@given(documents_st, st.data())
def test_documents_are_the_texts_between_separators_and_none_is_empty(stored, data):
    line, counts = "<|endoftext|>\n", st.integers(1, 3)
    text = line * data.draw(st.integers(0, 2)) + "".join(
        f"{document}\n{line * data.draw(counts)}" for document in stored)
    path = Namespace(read_text=lambda encoding: text[:-1] if data.draw(st.booleans()) else text)
    assert train.documents(path, "<|endoftext|>") == stored


def test_a_separator_inside_a_line_separates_nothing(tmp_path):
    (tmp_path / "t").write_text("one -- two\n--\nthree--\n--\n\n--\nfour")
    assert train.documents(tmp_path / "t", "--") == ["one -- two", "three--", "four"]


def test_the_tokenizer_is_trained_with_the_settings_of_mixtrals(tmp_path):
    train.train_tokenizer(["x 1212  y", "ﬁ 1212 12"] * 20, tmp_path / "tokenizer.model", 268)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer.piece_size() == 268 and tokenizer.pad_id() == -1
    assert [tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()] == [0, 1, 2]
    assert [tokenizer.id_to_piece(3 + b) for b in range(256)] == [
        f"<0x{b:02X}>" for b in range(256)]
    assert tokenizer.decode(tokenizer.encode(" ﬁ  é\n x ")) == " ﬁ  é\n x "
    assert tokenizer.encode("1212", out_type=str) == ["▁", "1", "2", "1", "2"]


STORIES = [[1, *range(10 * n, 10 * n + 5 + n), 2] for n in range(1, 9)]


def batches(stories=STORIES, batch=3, context=4, seed=0):
    return train.Batches(stories, Namespace(batch=batch, context=context, seed=seed, device="cpu"))


def test_an_epoch_reads_whole_shuffled_documents_in_a_row():
    found, epochs = batches(), []
    steps = found.rows_per_epoch // 3
    assert steps == (sum(map(len, STORIES)) - 1) // 4 // 3
    for epoch in range(2):
        parts = [found[epoch * steps + step] for step in range(steps)]
        tokens = torch.cat([part[0].flatten() for part in parts]).tolist()
        assert [token for part in parts for token in part[1].flatten().tolist()][:-1] == tokens[1:]
        assert all(tokens_.shape == targets.shape == (3, 4) for tokens_, targets in parts)
        starts = [at for at, token in enumerate(tokens) if token == 1]
        read = [tokens[a:b] for a, b in itertools.pairwise(starts)]
        assert all(story in STORIES for story in read) and len(read) >= 5
        assert len(set(map(tuple, read))) == len(read)
        epochs.append(read)
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_its_step_and_the_seed_alone():
    forwards, shuffled = batches(), batches()
    wanted = [forwards[step] for step in range(12)]
    for step in random.Random(1).sample(range(12), 12):
        assert all(map(torch.equal, shuffled[step], wanted[step]))
    other = batches(seed=1)
    assert any(not torch.equal(other[step][0], wanted[step][0]) for step in range(3))


class Characters:
    """A tokenizer with one token per byte, from 3 on."""

    def encode(self, text, eos=False):
        return [1, *(3 + byte % 29 for byte in text.encode()), *([2] if eos else [])]


def test_the_score_is_that_of_one_token_at_a_time():
    model, texts, bits = small_model(), ["hällo", "a", "once upon a time"], 0.0
    counts = torch.zeros(2, 4)
    for text in texts:
        tokens = Characters().encode(text, eos=True)
        for at in range(1, len(tokens)):
            with train.router_logits(model) as layers:
                logits = model(torch.tensor([tokens[:at]]))[0, -1]
            bits -= logits.softmax(-1)[tokens[at]].log2().item()
            for layer, router in enumerate(layers):
                counts[layer, router[-1].topk(2).indices] += 1
    score, loads = train.evaluate(model, Characters(), texts)
    assert score == pytest.approx(bits / (6 + 1 + 16), rel=1e-9)
    assert torch.allclose(loads, counts.double() / counts.sum(1, keepdim=True), atol=1e-6)


# ---- initial weights and optimisers


def test_initial_weights_have_the_documented_spread():
    model = small_model(torch.float32, vocab_size=500, hidden_size=64, intermediate_size=96,
                        num_hidden_layers=3)
    for name, weight in model.named_parameters():
        wanted = weight.shape[-1] ** -0.5
        if "o_proj" in name or "w2" in name:
            wanted /= math.sqrt(2 * 3)
        if "lm_head" in name:
            wanted = 0.02
        if "norm" in name:
            assert (weight == 1).all()
        else:
            assert weight.std().item() == pytest.approx(wanted, rel=0.15), name
            assert abs(weight.mean().item()) < 0.2 * wanted


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_an_orthogonal_update_keeps_directions_and_evens_out_singular_values(shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.linspace(1, 0.1, len(s))
    sizes = u.T @ train.orthogonal(u @ s.diag() @ v) @ v.T
    assert (sizes - sizes.diag().diag()).abs().max() < 1e-4
    assert 0.6 < sizes.diag().min() and sizes.diag().max() < 1.25


def test_muon_steps_by_hand_and_an_expert_without_tokens_stays():
    """The size is 0.2 · √3 · rate. The first mean is 0.05 · g, so the direction is that of g."""
    weight, idle = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    first = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    second = torch.tensor([[0.0, 0.0, 3.0], [1.0, 0.0, 0.0]])
    optimiser = train.Muon([weight, idle], lr=0.1, weight_decay=0.5)
    weight.grad = first
    optimiser.step()
    wanted = 0.95 * torch.ones(2, 3) - 0.1 * 0.2 * 3**0.5 * train.orthogonal(first)
    assert torch.allclose(weight, wanted, atol=1e-6)
    weight.grad = second
    optimiser.step()
    momentum = 0.05 * second + 0.95 * (0.95 * 0.05 * first + 0.05 * second)
    wanted = 0.95 * wanted - 0.1 * 0.2 * 3**0.5 * train.orthogonal(momentum)
    assert torch.allclose(weight, wanted, atol=1e-5)
    assert torch.equal(idle, torch.ones(2, 3))


def test_muon_has_the_matrices_of_the_layers_and_adamw_everything_else():
    model = small_model(torch.float32)
    names = {id(p): name for name, p in model.named_parameters()}
    for optimiser in ("muon", "adamw"):
        made = train.make_optimisers(model, Namespace(optimiser=optimiser, rate=0.01,
                                                      weight_decay=0.1))
        groups = [(type(o).__name__, group["weight_decay"], sorted(names[id(p)]
                  for p in group["params"])) for o in made for group in o.param_groups]
        assert sorted(name for *_, group in groups for name in group) == sorted(names.values())
        for kind, decay, group in groups:
            for name in group:
                inner = any(x in name for x in ("_proj", ".w1.", ".w2.", ".w3."))
                assert kind == ("Muon" if inner and optimiser == "muon" else "AdamW"), name
                assert decay == (0 if "norm" in name or "embed" in name else 0.1), name


def test_the_rate_rises_linearly_stays_and_falls_linearly_towards_the_step_after_the_last():
    args = train.arguments(["--train", "a", "--valid", "b", "--output", "c", "--steps", "100",
                            "--warmup", "0.1", "--decay", "0.4"])
    rates = [train.rate_at(step, args) / args.rate for step in range(101)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert set(rates[10:60]) == {1}
    assert rates[60:] == pytest.approx([n / 41 for n in range(40, -1, -1)])


def test_the_last_default_step_has_1_of_451_parts_of_the_rate():
    args = train.arguments(["--train", "a", "--valid", "b", "--output", "c"])
    assert train.rate_at(args.steps - 1, args) == pytest.approx(args.rate / 451)


# ---- bad input


def refused(capsys, arguments, *words):
    """Main prints one line with these words to standard error and returns 1."""
    assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


def test_text_that_does_not_suffice_is_refused(texts, capsys):
    refused(capsys, options(texts, "out", "--vocab", "5000"), "--vocab 5000")
    assert not list((texts / "out").glob("tokenizer*"))
    refused(capsys, options(texts, "out", "--batch", "10000"), "10000", "--batch")
    (texts / "valid.txt").write_text("<|endoftext|>\n\n<|endoftext|>\n")
    refused(capsys, options(texts, "new"), "valid.txt")
    (texts / "train.txt").unlink()
    refused(capsys, options(texts, "new"), "train.txt")
    assert not (texts / "new").exists()


def test_options_that_make_no_model_are_refused(texts, capsys):
    refused(capsys, options(texts, "out", "--heads", "3"), "num_attention_heads")
    refused(capsys, options(texts, "out", "--device", "nowhere"), "nowhere")
    for wrong in (["--steps", "0"], ["--batch", "-1"], ["--context", "x"]):
        with pytest.raises(SystemExit) as exit_:
            train.main(options(texts, "out", *wrong))
        assert exit_.value.code == 2 and wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize("damage", [
    lambda state: b"", lambda state: state[:-100], lambda state: b"not a state"])
def test_a_damaged_state_is_refused(texts, capsys, damage):
    assert train.main(options(texts, "out", "--steps", "1")) == 0
    (texts / "out" / "state.pt").write_bytes(damage((texts / "out" / "state.pt").read_bytes()))
    capsys.readouterr()
    refused(capsys, options(texts, "out", "--steps", "2"), "state.pt")


@pytest.mark.parametrize("change", [["--hidden", "32"], ["--optimiser", "adamw"]])
def test_the_state_of_a_run_with_other_sizes_or_optimisers_is_refused(texts, capsys, change):
    assert train.main(options(texts, "out", "--steps", "1")) == 0
    capsys.readouterr()
    refused(capsys, options(texts, "out", "--steps", "2", *change), "state.pt", "--output")
