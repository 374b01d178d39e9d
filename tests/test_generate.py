"""Claims about generate.py: the sampler against theory, rows against themselves alone, the CLI."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generate import generate, sample, stream
from mixtral import Mixtral, MixtralConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"


def source(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=40, hidden_size=24, intermediate_size=20, head_dim=4,
                           num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
                           sliding_window=5)
    return Mixtral(config).double().eval()


def test_temperature_zero_is_the_argmax_and_the_lowest_of_equals():
    assert sample(torch.tensor([1.0, 3.0, 3.0, 2.0]), 0.0, 1.0, None) == 1


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), top_p=st.floats(0.01, 1), temperature=st.floats(0.1, 3))
def test_top_p_keeps_the_smallest_set_whose_mass_reaches_p(seed, top_p, temperature):
    logits = torch.randn(9, generator=source(seed), dtype=torch.float64)
    mass = (logits / temperature).softmax(-1).tolist()
    kept, total = set(), 0.0
    for token in sorted(range(9), key=lambda t: (-mass[t], t)):
        if total < top_p:
            kept.add(token)
        total += mass[token]
    rows = logits.expand(300, 9)
    assert set(sample(rows, temperature, top_p, source(seed)).tolist()) <= kept


def test_top_p_never_keeps_nothing_and_one_keeps_everything():
    logits = torch.zeros(5000, 4)
    assert set(sample(logits, 1.0, 1e-9, source(0)).tolist()) == {0}
    assert set(sample(logits, 1.0, 1.0, source(0)).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_draws_are_distributed_as_the_nucleus_says(temperature, top_p):
    """χ² of 40,000 draws over up to five kinds is under 24, as chance is but once in 10⁴."""
    logits, n = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]), 40_000
    wanted = (logits.double() / temperature).softmax(-1)
    wanted[wanted.cumsum(-1) - wanted >= top_p] = 0
    wanted /= wanted.sum()
    seen = sample(logits.expand(n, 5), temperature, top_p, source(1)).bincount(minlength=5)
    assert seen[wanted == 0].sum() == 0
    alive = wanted > 0
    assert ((seen - n * wanted)[alive] ** 2 / (n * wanted)[alive]).sum() < 24


def test_any_temperature_however_small_is_finite():
    assert sample(torch.tensor([1e4, 2e4, -1e4]), 1e-300, 1.0, source(0)) == 1


@pytest.mark.parametrize("temperature, top_p, message", [
    (-1, 1, "temperature must be"), (float("nan"), 1, "temperature"), (float("inf"), 1, "temper"),
    (1, 0, "top_p must be"), (1, 1.1, "top_p"), (1, float("nan"), "top_p")])
def test_impossible_settings_are_refused(temperature, top_p, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(3), temperature, top_p, None)


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        sample(torch.tensor([0.0, float("nan")]))


def test_greedy_is_the_argmax_of_a_full_pass_at_every_step(model):
    [new] = generate(model, [[1, 2, 3]], 30)
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3, *new]]))[0]
    assert new == logits[2:-1].argmax(-1).tolist()


PROMPTS = [[1, 2, 3], [4], list(range(1, 30)), [1, 2, 3]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_gives_with_neighbours_what_it_gives_alone(model, temperature):
    options = {"temperature": temperature, "top_p": 0.9, "seed": 5}
    together = generate(model, PROMPTS, 25, **options)
    assert together == [generate(model, [p], 25, **options)[0] for p in PROMPTS]
    assert together[0] == together[3]


def test_streaming_gives_the_same_tokens(model):
    options = {"temperature": 1.0, "seed": 9}
    assert list(stream(model, [1, 2], 20, **options)) == generate(model, [[1, 2]], 20, **options)[0]


def test_a_seed_repeats_and_another_differs(model):
    draws = [generate(model, [[1]], 30, temperature=1.0, seed=s)[0] for s in (0, 0, 1, None, None)]
    assert draws[0] == draws[1] != draws[2] and draws[3] != draws[4]


def test_eos_is_the_last_token_and_stays_set(model):
    free = generate(model, PROMPTS, 40, temperature=1.0, seed=3)
    eos = free[0][10]
    ended = generate(model, PROMPTS, 40, temperature=1.0, seed=3, eos_id=eos)
    for row, whole in zip(ended, free, strict=True):
        cut = whole.index(eos) + 1 if eos in whole else 40
        assert row == whole[:cut]


def test_long_generation_keeps_the_cache_of_a_short_one(model, monkeypatch):
    sizes, new_cache = [], Mixtral.new_cache

    def spy(self, *args, **options):
        cache = new_cache(self, *args, **options)
        sizes.append(cache.keys.nbytes + cache.values.nbytes)
        return cache

    monkeypatch.setattr(Mixtral, "new_cache", spy)
    for length in (300, 1200):
        assert len(generate(model, [[1]], length)[0]) == length
    assert sizes[0] == sizes[1]


def test_long_prompts_are_prefilled_in_chunks(model):
    widths = []
    hook = model.model.register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
    generate(model, [[1] * 1000], 1)
    hook.remove()
    assert sum(widths) == 1000 and max(widths) <= 256


@pytest.mark.parametrize("prompts, message", [
    ([[1], []], "has no tokens"), ([[40]], "0 … 39, got 40"), ([[-1]], "got -1"),
    ([[1.0]], "got 1.0")])
def test_prompts_that_are_no_tokens_are_refused(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, 3)


@pytest.mark.parametrize("options", [{"max_new_tokens": -1}, {"max_new_tokens": 2, "seed": -1}])
def test_negative_counts_and_seeds_are_refused(model, options):
    with pytest.raises(ValueError, match="must be an integer >= 0"):
        generate(model, [[1]], **options)


def test_nothing_to_do_gives_nothing(model):
    assert generate(model, [], 5) == [] and generate(model, [[1]], 0) == [[]]


def cli(*args, text="", **options):
    """generate.py in a process of its own, as a user runs it."""
    return subprocess.run([sys.executable, ROOT / "generate.py", *args], capture_output=True,
                          input=text, text=True, timeout=120, **options)


def test_the_embedded_model_tells_a_story_and_sums_up_in_one_line():
    done = cli("--prompt", "Once upon a time", "--max-new-tokens", "40")
    assert done.returncode == 0 and done.stdout.startswith("Once upon a time")
    assert len(done.stdout.split()) > 20 and done.stderr.count("\n") == 1
    assert "tokens/s" in done.stderr
    again = cli(text="Once upon a time\n").stdout
    assert again.startswith(done.stdout.rstrip("\n"))


def test_seeded_draws_on_the_command_line_repeat():
    args = ("--prompt", "One day", "--temperature", "0.8", "--top-p", "0.9",
            "--max-new-tokens", "8")
    texts = [cli(*args, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_help_shows_every_default():
    text = cli("--help").stdout
    for flag in ("--prompt", "--model", "--max-new-tokens", "--temperature", "--top-p", "--seed",
                 "--dtype", "--device"):
        assert flag in text
    assert "default: 300" in text and "default: 0.0" in text and "default: 1.0" in text


@pytest.mark.parametrize("args, message", [
    (["--model", "/nowhere"], "/nowhere: wanted a directory"),
    (["--temperature", "-1"], "temperature must be"),
    (["--top-p", "0"], "top_p must be"),
    (["--max-new-tokens", "-3"], "--max-new-tokens must be"),
    (["--seed", "-3"], "--seed must be"),
    (["--device", "abacus"], "--device abacus: not usable here"),
    (["--prompt", b"\xff"], "lone surrogate"),
    (["--max-new-tokens", "many"], "invalid int value: 'many'"),
    (["--dtype", "int3"], "invalid choice: 'int3'"),
    (["--colour"], "unrecognized arguments: --colour")])
def test_bad_input_gets_one_line_and_a_non_zero_exit(args, message):
    done = cli(*args, *([] if "--prompt" in args else ["--prompt", "a"]))
    assert done.returncode in (1, 2) and done.stdout == ""
    assert done.stderr.startswith("generate.py: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_standard_input_must_be_text():
    done = subprocess.run([sys.executable, ROOT / "generate.py"], input=b"\xff\xfe",
                          capture_output=True, timeout=120)
    assert done.returncode == 1 and b"standard input is not UTF-8" in done.stderr
    assert done.stderr.count(b"\n") == 1


def start(*args):
    return subprocess.Popen([sys.executable, ROOT / "generate.py", "--prompt", "Once upon a time",
                             "--temperature", "1", *args],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_interrupting_ends_cleanly_with_what_was_said():
    process = start("--max-new-tokens", "100000", "--seed", "0")
    said = os.read(process.stdout.fileno(), 100)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert said.startswith(b"Once") and (said + rest).endswith(b"\n")
    assert process.returncode in (0, 130) and b"Traceback" not in errors and b"written" in errors


def test_a_closed_pipe_is_no_error():
    process = start("--max-new-tokens", "60")
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (0, b"")
    process.stderr.close()
