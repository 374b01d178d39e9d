"""Claims about tiny/train.py: from text to checkpoint, resumable, balanced by its loss."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixtral import Mixtral
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("train", ROOT / "tiny" / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)


@pytest.fixture
def texts(tmp_path):
    draw = random.Random(0)
    words = "the cat sat on a mat and then ran away from that big dog who had seen it eat".split()
    for name, stories in (("train.txt", 300), ("valid.txt", 5)):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(
            " ".join(draw.choices(words, k=30)) + "." for _ in range(stories)))
    return tmp_path


def run(texts, output, *options):
    return subprocess.run(
        [sys.executable, ROOT / "tiny" / "train.py", "--train", texts / "train.txt", "--valid",
         texts / "valid.txt", "--output", texts / output, "--vocab", "320", "--hidden", "16",
         "--layers", "1", "--heads", "2", "--kv-heads", "1", "--expert-hidden", "8", "--context",
         "16", "--window", "5", "--batch", "2", *options],
        capture_output=True, text=True, timeout=300)


def test_one_command_makes_a_checkpoint_that_loads(texts):
    done = run(texts, "out", "--steps", "20")
    assert done.returncode == 0, done.stderr
    assert "held-out bits per byte" in done.stdout and "layer 0 expert load:" in done.stdout
    model, tokenizer = Mixtral.from_pretrained(texts / "out"), Tokenizer(texts / "out")
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.config.sliding_window == 5
    assert tokenizer.vocab_size == model.config.vocab_size == 320


def test_a_stopped_run_continues_to_the_same_weights(texts):
    assert run(texts, "whole", "--steps", "6", "--save-every", "3").returncode == 0
    (texts / "cut").mkdir()
    (texts / "cut" / "tokenizer.model").write_bytes(
        (texts / "whole" / "tokenizer.model").read_bytes())
    state = torch.load(texts / "whole" / "state.pt", weights_only=True)
    assert state["step"] == 6
    killer = ("import sys, importlib.util as u; s = u.spec_from_file_location('t', sys.argv[1]); "
              "t = u.module_from_spec(s); s.loader.exec_module(t); one = t.one_step\n"
              "def stop(m, o, seen, step, *a):\n"
              "    if step == 4: sys.exit(3)\n"
              "    return one(m, o, seen, step, *a)\n"
              "t.one_step = stop; sys.argv = sys.argv[1:]; t.main()")
    options = [str(texts / "train.txt") if x == "T" else x for x in (
        "--train", "T", "--valid", str(texts / "valid.txt"), "--output", str(texts / "cut"),
        "--vocab", "320", "--hidden", "16", "--layers", "1", "--heads", "2", "--kv-heads", "1",
        "--expert-hidden", "8", "--context", "16", "--window", "5", "--batch", "2", "--steps", "6",
        "--save-every", "3")]
    stopped = subprocess.run([sys.executable, "-c", killer, ROOT / "tiny" / "train.py", *options],
                             capture_output=True, text=True, timeout=300)
    assert stopped.returncode == 3, stopped.stderr
    resumed = run(texts, "cut", "--steps", "6", "--save-every", "3")
    assert "continuing after step 3" in resumed.stdout
    for name, weight in torch.load(texts / "cut" / "state.pt", weights_only=True)["model"].items():
        assert torch.equal(weight, state["model"][name]), name


def test_documents_are_what_stands_between_separators(tmp_path):
    (tmp_path / "t").write_text("one\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n")
    assert train.documents(tmp_path / "t", "<|endoftext|>") == ["one\ntwo", "three"]


def test_the_balance_loss_by_hand():
    """Two tokens to expert 0 and 1, of three: f = (½, ½, 0), so E·Σ f·P = 3·(P₀ + P₁)/2."""
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.5, 3.0, 0.0]])
    P = logits.softmax(-1).mean(0)
    assert torch.isclose(train.balance_loss([logits], 2), 3 * (P[0] + P[1]) / 2)


def test_equal_load_has_the_least_balance_loss_and_collapse_the_largest():
    even = torch.eye(4) * 50
    assert torch.isclose(train.balance_loss([even], 1), torch.tensor(1.0))
    assert torch.isclose(train.balance_loss([even[:1].expand(4, 4)], 1), torch.tensor(4.0))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_an_orthogonal_step_keeps_directions_and_evens_out_their_sizes(shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.linspace(1, 0.1, len(s))
    step = train.orthogonal(u @ s.diag() @ v)
    sizes = u.T @ step @ v.T
    assert (sizes - sizes.diag().diag()).abs().max() < 1e-4
    assert 0.6 < sizes.diag().min() and sizes.diag().max() < 1.25


def test_muon_moves_a_weight_by_hand_and_leaves_an_unvisited_one_alone():
    """Size 0.2 · √3 · rate; the first mean is 0.05 · g, a multiple of g: the direction is g's."""
    weight, idle = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    weight.grad = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    train.Muon([weight, idle], lr=0.1, weight_decay=0.5).step()
    moved = 0.1 * 0.2 * 3**0.5 * train.orthogonal(weight.grad)
    assert torch.allclose(weight, 0.95 * torch.ones(2, 3) - moved, atol=1e-6)
    assert torch.equal(idle, torch.ones(2, 3))


def test_the_rate_rises_stays_and_falls_to_almost_nothing(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--train", "a", "--valid", "b", "--output", "c",
                                     "--steps", "100", "--warmup", "0.1", "--decay", "0.4"])
    args = train.arguments()
    rates = [train.rate_at(step, args) / args.rate for step in range(100)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)]) and rates[59] == 1
    assert rates[60:] == pytest.approx([n / 41 for n in range(40, 0, -1)])
