"""Claims about generate.py: sampling, batches, stop strings, chats, loading, the command line."""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import random_model, save
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import generate as program
from generate import DTYPES, TINY, Chat, Completion, generate, generate_steps, load, main, sample
from mixtral import Mixtral, route
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def random_source(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return random_model(1)


@pytest.fixture(scope="module")
def embedded():
    return load(TINY, torch.float64)


@contextlib.contextmanager
def tokens_read(model):
    """Yield a list that collects the number of tokens of every call of the model."""
    widths = []
    with model.model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1])):
        yield widths


@contextlib.contextmanager
def interruption(model, call):
    """Raise KeyboardInterrupt inside the given call of the last layer, after keys were stored."""
    calls = itertools.count(1)

    def interrupt(*_):
        if next(calls) == call:
            raise KeyboardInterrupt

    last = model.model.layers[-1].post_attention_layernorm
    with last.register_forward_pre_hook(interrupt):
        yield


# ------------------------------------------------------------------ sampling and generation


@pytest.mark.parametrize("window", [None, 5])
def test_greedy_generation_is_the_argmax_of_full_passes_without_a_cache(window):
    model = random_model(1, sliding_window=window)
    prompts = [[1, 2, 3], [n * n % 37 for n in range(290)]]
    for prompt, new in zip(prompts, generate(model, prompts, 12), strict=True):
        tokens = list(prompt)
        for _ in range(12):
            with torch.inference_mode():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert new == tokens[len(prompt):]
        assert len(set(new)) > 2  # a model that repeats one token would prove little


rows_of_tokens = st.lists(st.integers(0, 36), min_size=1, max_size=9)


@settings(max_examples=15, deadline=None)
@given(prompts=st.lists(rows_of_tokens, min_size=2, max_size=4), eos=st.integers(0, 36),
       temperature=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 2**63 - 1))
def test_a_row_gives_with_neighbours_what_it_gives_alone(model, prompts, eos, temperature, seed):
    options = {"temperature": temperature, "top_p": 0.9, "seed": seed, "eos_id": eos}
    together = generate(model, prompts, 8, **options)
    assert together == [generate(model, [prompt], 8, **options)[0] for prompt in prompts]


@pytest.mark.claim
@settings(max_examples=80, deadline=None)
@given(quarters=st.lists(st.integers(0, 8), min_size=1, max_size=7), top_p=st.floats(0.001, 1),
       temperature=st.floats(0.5, 3), seed=st.integers(0, 2**63 - 1))
def test_the_nucleus_is_exactly_the_smallest_set_whose_mass_reaches_top_p(
        quarters, top_p, temperature, seed):
    """Every token has a mass of at least 0.002, so 20,000 draws miss none of the nucleus."""
    logits = torch.tensor(quarters, dtype=torch.float64) / 4
    mass = (logits / temperature).softmax(-1).tolist()
    nucleus, total = set(), 0.0
    for token in sorted(range(len(mass)), key=lambda t: (-quarters[t], t)):
        assume(abs(total - top_p) > 1e-9)
        if total < top_p:
            nucleus.add(token)
        total += mass[token]
    drawn = sample(logits.expand(20_000, -1), temperature, top_p, random_source(seed))
    assert set(drawn.tolist()) == nucleus


def test_a_tiny_temperature_overflows_nothing():
    logits = torch.tensor([1e4, 2e4, -1e4, -torch.inf])
    assert sample(logits, 1e-300, 1.0, random_source(0)) == 1
    assert sample(logits.to(torch.float16), 5e-324, 0.5, random_source(0)) == 1


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.6)])
def test_draws_are_distributed_as_the_renormalised_nucleus(temperature, top_p):
    """χ² of 40,000 draws over at most five tokens exceeds 24 by chance once in 10⁴ seeds."""
    logits, n = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]), 40_000
    wanted = (logits.double() / temperature).softmax(-1)
    wanted[wanted.cumsum(-1) - wanted >= top_p] = 0
    wanted = n * wanted / wanted.sum()
    shuffled = torch.tensor([3, 0, 4, 1, 2])  # so the likeliest token is not the first
    rows = logits[shuffled].expand(n, 5)
    seen = sample(rows, temperature, top_p, random_source(1)).bincount(minlength=5).double()
    wanted = wanted[shuffled]
    assert seen[wanted == 0].sum() == 0
    possible = wanted > 0
    assert ((seen - wanted)[possible] ** 2 / wanted[possible]).sum() < 24


class Elsewhere:
    """Logits on a device without float64. All that can be done with them is to move them."""

    def __init__(self, logits):
        self.logits = logits

    def __getitem__(self, index):
        return Elsewhere(self.logits[index])

    def to(self, device):
        assert device == "cpu"
        return self.logits


def test_logits_are_moved_to_the_cpu_before_anything_is_computed_from_them(model):
    assert sample(Elsewhere(torch.tensor([1.0, 2.0]))) == 1
    for temperature in (0.0, 1.0):
        options = {"temperature": temperature, "top_p": 0.9, "seed": 3, "logprobs": True}
        wanted = list(generate_steps(model, [[1, 2], [3]], 5, **options))
        with model.register_forward_hook(lambda model, args, logits: Elsewhere(logits)):
            assert list(generate_steps(model, [[1, 2], [3]], 5, **options)) == wanted


class MakersOfFloat64(TorchDispatchMode):
    """Collects the functions of generate.py and mixtral.py that make float64 tensors."""

    def __enter__(self):
        self.found = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, frame = function(*args, **kwargs or {}), sys._getframe()
        while Path(frame.f_code.co_filename).name not in ("generate.py", "mixtral.py"):
            frame = frame.f_back
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.found.add(frame.f_code.co_name)
        return result


def test_a_float32_model_makes_float64_only_for_angles_and_for_drawing():
    model = random_model(1, torch.float32)
    for options, wanted in (({}, set()), ({"temperature": 1.0}, {"sample"}),
                            ({"logprobs": True}, {"generate_steps"})):
        with MakersOfFloat64() as makers:
            list(generate_steps(model, [[1, 2, 3]], 3, **options))
        assert makers.found == {"rotation", *wanted}


def test_a_seed_repeats_its_draws_and_no_seed_does_not(model):
    def text(seed):
        return generate(model, [[1]], 30, temperature=1.0, seed=seed)[0]

    assert text(0) == text(0) != text(1)
    assert text(2**63 - 1) != text(0)
    assert text(None) != text(None)
    first, second = generate(model, [[1], [1]], 30, temperature=1.0)
    assert first != second  # without a seed, equal prompts do not give equal texts


def test_eos_is_the_last_token_of_its_row_and_other_rows_go_on(model):
    prompts = [[1, 2, 3], [4], list(range(1, 30))]
    endless = generate(model, prompts, 30, temperature=1.0, seed=3)
    eos = endless[0][10]
    ended = generate(model, prompts, 30, temperature=1.0, seed=3, eos_id=eos)
    for row, whole in zip(ended, endless, strict=True):
        assert row == whole[:whole.index(eos) + 1 if eos in whole else 30]
    assert len({len(row) for row in ended}) > 1


def test_a_row_that_has_ended_reads_no_more_tokens_and_the_last_end_stops_all(model):
    prompts = [[1, 2, 3], [4]]
    eos, cache = generate(model, prompts, 30)[0][4], model.new_cache(2, 100)
    rows = list(zip(*generate_steps(model, prompts, 30, eos_id=eos, cache=cache), strict=True))
    written = [sum(pair is not None for pair in row) for row in rows]
    assert written[0] != written[1]
    assert cache.tokens_read.tolist() == [3 + written[0] - 1, 1 + written[1] - 1]
    steps = list(generate_steps(model, [[1, 2, 3]] * 2, 30, eos_id=eos))
    assert len(steps) == written[0] < 30


def test_log_probabilities_are_those_of_full_passes_before_temperature_and_top_p(model):
    prompts = [[1, 2, 3], [4]]
    steps = list(generate_steps(model, prompts, 12, 0.7, 0.8, 4, logprobs=True))
    for n, prompt in enumerate(prompts):
        tokens, logprobs = zip(*(step[n] for step in steps), strict=True)
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1:-1]
        wanted = logits.log_softmax(-1)[torch.arange(12), torch.tensor(tokens)]
        assert (torch.tensor(logprobs, dtype=torch.float64) - wanted).abs().max() < 1e-12


# ------------------------------------------------------------------ stop strings


class Pieces(list):
    """A tokenizer, which is also its decoder; token n is the n-th of some strings."""

    eos_ids = frozenset()

    def stream(self):
        return self

    def feed(self, token):
        return self[token]

    def flush(self):
        return ""


def ended_by(text, stops):
    """The text up to the stop string that ends first, of several the longest; by characters."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if stop and text[:end].endswith(stop)]:
            return text[:end - max(map(len, found))], "stop"
    return text, "length"


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("ab", max_size=4), max_size=12),
       stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_a_text_ends_before_the_first_stop_string_wherever_tokens_are_cut(pieces, stops):
    """And until then, all but the last characters, which could begin one, are released."""
    completion, released = Completion(Pieces(pieces), stops), ""
    held = max(map(len, stops), default=1) - 1
    for n in range(len(pieces)):
        released += completion.feed(n)
        if completion.finish_reason:
            break
        text = "".join(pieces[:n + 1])
        assert released == text[:max(len(text) - held, 0)]
    released += completion.finish("length")
    assert (released, completion.finish_reason) == ended_by("".join(pieces), stops)
    assert completion.text == released and completion.finish("length") == ""


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab\n é🦙", max_size=30), stop=st.text("ab\n é🦙", min_size=1, max_size=4),
       cut=st.integers(1, 60), ended=st.booleans())
def test_a_text_is_that_of_decoding_all_tokens_up_to_a_stop_string(
        embedded, text, stop, cut, ended):
    """Characters and stop strings lie across tokens, and the last character can be incomplete."""
    tokenizer, _ = embedded
    tokens = tokenizer.encode(text, bos=False)[:cut] + [tokenizer.eos_id] * ended
    for stops in ([], [stop], ["\ufffd", stop]):
        completion = Completion(tokenizer, stops, [tokenizer.bos_id])
        released = completion.beginning
        for token in tokens:
            if completion.finish_reason != "stop":
                released += completion.feed(token, -0.5)
        released += completion.finish("length")
        wanted, reason = ended_by(tokenizer.decode(tokens), stops)
        assert released == completion.text == wanted
        assert completion.finish_reason == ("eos" if ended and reason == "length" else reason)
        assert completion.logprobs == [-0.5] * len(completion.tokens)


# ------------------------------------------------------------------ chat


class Letters:
    """A tokenizer of the small model. With `moves`, the system text is put before the last message
    as in v2 and v3 templates, otherwise before the first."""

    def __init__(self, moves=False):
        self.moves, self.eos_ids = moves, frozenset([2])

    def encode_chat(self, messages):
        first = messages[0]["role"] == "system"
        system, turns = messages[0]["content"] if first else "", messages[first:]
        ids, place = [1], len(turns) - 1 if self.moves else 0
        for n, turn in enumerate(turns):
            text = system * (n == place) + str(turn["content"])
            ids += ([*turn["content"], 2] if turn["role"] == "assistant" else
                    [3, *(5 + ord(letter) % 32 for letter in text), 4])
        return ids


def whole_conversation(chat, text):
    """The ids of a conversation and its next message."""
    return chat.tokenizer.encode_chat([*chat.messages, {"role": "user", "content": text}])


turns = st.lists(st.tuples(st.text("abc", max_size=8), st.integers(1, 10), st.integers(0, 10)),
                 min_size=1, max_size=4)


@pytest.mark.claim
@example([("abcabcabcabc", 6, 6), ("b", 6, 6)], True, None, 0.0, "xyz")
@settings(max_examples=20, deadline=None)
@given(turns=turns, moves=st.booleans(), window=st.sampled_from([None, 3]),
       temperature=st.sampled_from([0.0, 1.0]), system=st.sampled_from(["", "xyz"]))
def test_every_answer_of_a_chat_is_that_of_reading_the_whole_conversation(
        turns, moves, window, temperature, system):
    """Some answers are given up early, some caches are outgrown, some system texts move."""
    model = random_model(num_hidden_layers=1, sliding_window=window)
    options = {"temperature": temperature, "top_p": 0.9, "seed": 7}
    chat = Chat(model, Letters(moves), system, **options)
    for text, most, taken in turns:
        [wanted] = generate(model, [whole_conversation(chat, text)], most, eos_id=2, **options)
        answer, before = chat.answer(text, most), list(chat.messages)
        tokens = list(itertools.islice(answer, taken))
        answer.close()
        assert tokens == wanted[:taken]
        if tokens:
            assert chat.messages[-1]["content"] == [token for token in tokens if token != 2]
        else:
            assert chat.messages == before


def test_a_turn_reads_only_what_is_new(embedded):
    tokenizer, model = embedded
    chat = Chat(model, tokenizer, "Be kind.")
    for n, text in enumerate(["Who are you?", "Why " * 100, "</s> [INST] <s>", "And then?"]):
        ids, known = whole_conversation(chat, text), len(chat.ids)
        with tokens_read(model) as widths:
            tokens = list(chat.answer(text, 8))
        room = chat.cache.max_length
        if n != 1:  # the second turn outgrows the cache of the first
            assert sum(widths) == len(ids) - known + len(tokens) - 1
        else:
            assert sum(widths) == len(ids) + len(tokens) - 1 and room == 2 * (len(ids) + 8)
        assert [tokens] == generate(model, [ids], 8, eos_id=tokenizer.eos_id)
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 4]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("room", [4, 40])
@pytest.mark.parametrize("call, drawn", [(1, 0), (2, 1), (6, 5)])
def test_an_interrupted_answer_is_what_was_drawn_and_the_chat_goes_on(window, room, call, drawn):
    """The cache of the first answer has room for the second one, or is replaced."""
    model = random_model(1, sliding_window=window)
    chat = Chat(model, Letters())
    list(chat.answer("ab", room))
    before, tokens = list(chat.messages), []
    with interruption(model, call), pytest.raises(KeyboardInterrupt):
        tokens += chat.answer("cd", 20)
    assert chat.cache.tokens_read.item() == len(chat.ids)
    if drawn:
        assert len(chat.messages[-1]["content"]) == drawn and chat.messages[:2] == before
    else:
        assert chat.messages == before
    [wanted] = generate(model, [whole_conversation(chat, "ef")], 9, eos_id=2)
    assert list(chat.answer("ef", 9)) == wanted


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("dtype", [None, *DTYPES.values()])
def test_a_loaded_model_is_the_checkpoint_in_the_asked_dtype(dtype):
    tokenizer, model = load(TINY, dtype)
    plain = Mixtral.from_pretrained(TINY, dtype).state_dict()
    assert model.lm_head.weight.dtype == (dtype or torch.bfloat16) and not model.training
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(weight, plain[name]) for name, weight in model.state_dict().items())
    assert tokenizer.encode("Hello") == Tokenizer(TINY).encode("Hello")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of 70,000 float32 weights with the tokenizer of the embedded model."""
    directory = tmp_path_factory.mktemp("small")
    save(random_model(dtype=torch.float32, vocab_size=2048, hidden_size=8, intermediate_size=8,
                      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                      num_local_experts=12, sliding_window=None), directory)
    shutil.copy(TINY / "tokenizer.model", directory)
    return directory


def with_config(checkpoint, tmp_path, **changes):
    """A copy of a checkpoint with these changes of its config.json."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def test_a_tokenizer_with_more_pieces_than_the_model_has_is_refused(tmp_path):
    shutil.copy(TINY / "tokenizer.model", save(random_model(vocab_size=2047), tmp_path / "less"))
    with pytest.raises(ValueError, match="has 2048 pieces, the model only 2047"):
        load(tmp_path / "less")


@pytest.mark.parametrize("changes", [{"vocab_size": 2**70}, {"head_dim": "x"}, {"rope_theta": []}])
def test_a_config_json_with_damaged_values_is_refused_in_a_line(run, tmp_path, small, changes):
    copy = with_config(small, tmp_path, **changes)
    code, out, told = run("--model", copy, "--prompt", "x", "--json")
    assert (code, out) == (1, "") and one_line(told)


# ------------------------------------------------------------------ the command line


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line in this process: its exit code, standard output and standard error."""
    def run(*args, stdin=""):
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="\n")
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(SystemExit) as end:
            sys.exit(main([*map(str, args)]))
        told = capsys.readouterr()
        return end.value.code or 0, told.out, told.err

    return run


@pytest.fixture
def loaded(embedded, monkeypatch):
    """The embedded model in float64, which the command line then uses without loading it."""
    monkeypatch.setattr(program, "load", lambda *_: embedded)
    return embedded


def one_line(told):
    return told.startswith("generate.py: ") and told.count("\n") == 1 and told.endswith("\n")


def objects(out):
    return [json.loads(line) for line in out.split("\n")[:-1]]


def text_after(tokenizer, model, prompt, n, **options):
    """A prompt and its continuation by the functions of the module."""
    ids = tokenizer.encode(prompt)
    [new] = generate(model, [ids], n, eos_id=tokenizer.eos_id, **options)
    return tokenizer.decode(ids + new)


def test_the_command_prints_the_prompt_and_its_continuation(run, embedded):
    code, out, told = run("--prompt", "Once upon a time", "--max-new-tokens", "20", "--dtype",
                          "float64")
    assert (code, out) == (0, text_after(*embedded, "Once upon a time", 20) + "\n")
    assert re.fullmatch(r"\[5 tokens read in [\d.]+ s; 20 written, [\d.]+ tokens/s on \w+\]\n",
                        told)
    code, out, told = run("--prompt", "Hello", "--max-new-tokens", "0")
    assert (code, out) == (0, "Hello\n") and "; 0 written, 0 tokens/s on " in told


@pytest.mark.parametrize("data, prompt", [
    ("Once upon", "Once upon"), ("Once upon\n", "Once upon"), ("", ""), ("🦙 é", "🦙 é"),
    ("Once\r\nupon\n\n", "Once\r\nupon\n")])
def test_without_a_prompt_standard_input_is_the_prompt(run, loaded, data, prompt):
    options = ["--max-new-tokens", "4", "--json"]
    code, out, _ = run(*options, stdin=data)
    [found] = objects(out)
    assert (code, found["prompt"]) == (0, prompt)
    assert found["text"] == objects(run("--prompt", prompt, *options)[1])[0]["text"]


def test_every_sampling_flag_reaches_the_sampler(run, loaded):
    flags = ["--temperature", "1.3", "--top-p", "0.7", "--seed", "11", "--max-new-tokens", "20"]
    options = {"temperature": 1.3, "top_p": 0.7, "seed": 11}
    whole = run("--prompt", "One day", *flags)[1]
    assert whole == text_after(*loaded, "One day", 20, **options) + "\n"
    for n in (0, 2, 4):
        assert run("--prompt", "One day", *flags[:n], *flags[n + 2:])[1] != whole


def test_a_checkpoint_keeps_its_dtype_but_the_embedded_one_runs_in_float32(run, small, monkeypatch):
    asked = []
    monkeypatch.setattr(program, "load", lambda *args: asked.append(args[1:]) or load(*args))
    for flags in (["--model", small], ["--model", small, "--dtype", "float16"], [],
                  ["--model", os.path.relpath(TINY)], ["--device", "cpu:0", "--dtype", "bfloat16"]):
        assert run("--prompt", "x", "--max-new-tokens", "1", *flags)[0] == 0
    assert asked == [(None, "auto"), (torch.float16, "auto"), (torch.float32, "auto"),
                     (torch.float32, "auto"), (torch.bfloat16, "cpu:0")]


def test_a_text_ends_before_any_of_its_stop_strings(run, loaded):
    common = ["--prompt", "Once upon a time", "--max-new-tokens", "30"]
    whole = run(*common)[1]
    new = whole.removeprefix("Once upon a time").rstrip("\n")
    early, late = new[12:16], new[20:25]
    for stops in ([early], [late], [late, early], ["zzz"], ["Once"]):  # "Once" is in the prompt
        flags = [flag for stop in stops for flag in ("--stop", stop)]
        wanted = ended_by(new, stops)
        assert run(*common, *flags)[1] == f"Once upon a time{wanted[0]}\n"
        [found] = objects(run(*common, *flags, "--json")[1])
        assert (found["text"], found["finish_reason"]) == wanted


def test_json_is_one_object_a_line_whatever_the_text(run, loaded):
    tokenizer, model = loaded
    prompts = ["Once \"upon\" \\ a\ttime", "🦙\u2028é\u0007", "<b>", ""]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    code, out, told = run(*flags, "--json", "--max-new-tokens", "9", "--temperature", "1.5",
                          "--seed", "1")
    found = objects(out)
    assert code == 0 and told.count("\n") == 1 and "🦙" in out
    assert [each["prompt"] for each in found] == prompts
    assert [each["index"] for each in found] == [0, 1, 2, 3]
    for each in found:
        assert list(each) == ["index", "prompt", "text", "tokens", "logprobs", "finish_reason",
                              "timings"]
        ids = tokenizer.encode(each["prompt"])
        steps = list(generate_steps(model, [ids], 9, 1.5, 1.0, 1, tokenizer.eos_id, None, True))
        assert each["tokens"] == [token for [(token, _)] in steps]
        assert each["logprobs"] == pytest.approx([p for [(_, p)] in steps], abs=1e-12)
        assert tokenizer.decode(ids) + each["text"] == tokenizer.decode(ids + each["tokens"])
        assert each["finish_reason"] == "length" and each["timings"]["prompt_tokens"] == len(ids)
        assert 0 < each["timings"]["prefill_seconds"] < each["timings"]["decode_seconds"] * 100


def test_several_prompts_form_one_batch_in_which_each_text_is_as_alone(run, loaded):
    prompts = ["Once upon a time", "The dog", "Once upon a time there was a big"]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    options = ["--max-new-tokens", "8", "--stop", "the"]
    alone = [run("--prompt", prompt, *options)[1] for prompt in prompts]
    code, out, told = run(*flags, *options)
    assert code == 0 and told.startswith("[17 tokens read in ") and told.count("\n") == 1
    assert out == "".join(f"=== {n} of 3\n{text}" for n, text in enumerate(alone, 1))
    together = objects(run(*flags, *options, "--json")[1])
    assert [prompt + each["text"] + "\n"
            for prompt, each in zip(prompts, together, strict=True)] == alone


def test_an_interrupted_text_is_printed_as_far_as_it_came(run, loaded):
    whole = text_after(*loaded, "Once upon a time", 5)
    for flags in ([], ["--json"], ["--prompt", "Two"]):
        with interruption(loaded[1], 6):
            code, out, told = run("--prompt", "Once upon a time", *flags)
        assert code == 130 and "written" in told and told.count("\n") == 1
        if "--json" in flags:
            [found] = objects(out)
            assert found["finish_reason"] == "interrupted" and len(found["tokens"]) == 5
        else:
            assert f"{whole}\n" in out and out.startswith("===" if flags else whole)


# ------------------------------------------------------------------ experts


def experts_of(model, tokens, layer):
    """The strongest expert of each token in a layer, by one pass over the whole text."""
    found = []
    gate = model.model.layers[layer].block_sparse_moe.gate
    with gate.register_forward_hook(lambda gate, args, logits: found.append(logits)):
        model(torch.tensor([tokens]))
    return route(found[0], 1)[1][:, 0].tolist()


@pytest.mark.parametrize("flags, layer", [(["--experts"], 3), (["--experts", "0"], 0),
                                          (["--experts", "5"], 5)])
def test_the_strongest_expert_of_each_token_is_shown(run, loaded, monkeypatch, flags, layer):
    """Those of the prompt, which is read in chunks, and that of the last token are shown too."""
    tokenizer, model = loaded
    ids = tokenizer.encode("One day\n🦙")
    [new] = generate(model, [ids], 30)
    if layer == 5:  # end the text before 30 tokens
        monkeypatch.setattr(tokenizer, "eos_ids", frozenset(new[20:22]))
        new = list(itertools.takewhile(lambda token: token not in tokenizer.eos_ids, new))
    marked, decoder = "", tokenizer.stream()
    for token, expert in zip(ids + new, experts_of(model, ids + new, layer), strict=True):
        text = decoder.feed(token)
        marked += text + "₀₁₂₃₄₅₆₇"[expert] * (text.strip("\n") != "")
    monkeypatch.setattr(program, "CHUNK", 2)
    for terminal, no_color in ((False, ""), (True, "1")):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("NO_COLOR", no_color)
        code, out, told = run("--prompt", "One day\n🦙", "--max-new-tokens", "30", *flags)
        assert (code, told) == (0, "")
        assert out == f"{marked}\nexperts of layer {layer}: ₀ ₁ ₂ ₃ ₄ ₅ ₆ ₇\n"


def test_on_a_terminal_the_experts_are_colours_with_a_legend(run, loaded, monkeypatch):
    flags = ["--prompt", "One\nday", "--max-new-tokens", "20"]
    plain, marked = run(*flags)[1], run(*flags, "--experts")[1]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    coloured = run(*flags, "--experts")[1]
    pieces = re.findall("\x1b\\[30;48;5;(\\d+)m([^\n\x1b]+)\x1b\\[0m", coloured)
    numbers = {colour: text.strip() for colour, text in pieces[-8:]}  # the legend
    assert sorted(numbers.values()) == list("01234567")
    assert re.sub("\x1b\\[[\\d;]*m", "", coloured).startswith(plain)
    digits = [str("₀₁₂₃₄₅₆₇".index(c)) for c in marked if c in "₀₁₂₃₄₅₆₇"][:-8]
    assert [numbers[colour] for colour, _ in pieces[:-8]] == digits


@pytest.mark.parametrize("layer", ["-1", "6"])
def test_a_layer_that_is_not_there_is_refused(run, loaded, layer):
    code, out, told = run("--prompt", "x", "--experts", layer)
    assert (code, out) == (1, "") and one_line(told) and f"0 … 5, got {layer}" in told


# ------------------------------------------------------------------ chat on the command line


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_a_chat_with_a_prompt_answers_it_and_ends(run, loaded, system):
    tokenizer, model = loaded
    ids = whole_conversation(Chat(model, tokenizer, system), "Hello")
    [new] = generate(model, [ids], 6, eos_id=tokenizer.eos_id)
    options = ["--chat", "--max-new-tokens", "6", "--system", system]
    code, out, told = run(*options, "--prompt", "Hello")
    assert (code, out) == (0, tokenizer.decode(new) + "\n")
    assert "not trained to chat" in told and told.count("\n") == 2
    assert run(*options, stdin="Hello\n")[1] == out
    [found] = objects(run(*options, "--prompt", "Hello", "--json")[1])
    assert found["tokens"] == new and found["prompt"] == "Hello"


def test_a_conversation_has_commands_and_remembers_its_messages(run, loaded):
    tokenizer, model = loaded
    code, out, told = run("--chat", "--max-new-tokens", "6", "--system", "Be kind.", stdin=(
        "Hello\nAnd?\n\n/nothing at all\n/reset\nHello\n/system  Be rude. \nHello\n/system\nHello\n"
        "/exit\nnever\n"))
    chats = [Chat(model, tokenizer, system) for system in ("Be kind.", "Be kind.", "Be rude.", "")]
    asked = [["Hello", "And?"], ["Hello"], ["Hello"], ["Hello"]]
    answers = [tokenizer.decode(list(chat.answer(text, 6)))
               for chat, texts in zip(chats, asked, strict=True) for text in texts]
    assert (code, out) == (0, "".join(answer + "\n" for answer in answers))
    assert "/nothing: unknown; " in told and told.count("\n") == 1 + 1 + 5
    counts = [int(count) for count in re.findall(r"\[(\d+) tokens read .*; 6 written", told)]
    assert len(counts) == 5 and counts[1] < counts[0] == counts[2]  # what a turn reads is counted


def test_what_a_stop_string_hides_does_not_enter_the_next_turn(run, loaded):
    tokenizer, model = loaded
    options = ["--chat", "--max-new-tokens", "20"]
    [whole] = [tokenizer.decode(list(Chat(model, tokenizer).answer("Hello", 20)))]
    stop = whole[7:10]  # which tokens are cut there does not matter
    kept = whole[:whole.index(stop)]
    conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": kept},
                    {"role": "user", "content": "And?"}]
    [new] = generate(model, [tokenizer.encode_chat(conversation)], 20)
    second = tokenizer.decode(new).partition(stop)[0]
    code, out, _ = run(*options, "--stop", stop, stdin="Hello\nAnd?\n")
    assert (code, out) == (0, f"{kept}\n{second}\n") and kept != whole


@pytest.mark.parametrize("typed, message", [
    ("\ufeffHello\r\n", "Hello"), ("Hello\r\r\n", "Hello\r"), ("//tmp//a\n", "/tmp//a"),
    ("  // \n", "  / "), ("a // b\n", "a // b")])
def test_a_line_is_a_message_without_the_marks_of_other_systems(run, loaded, typed, message):
    """A byte order mark and one carriage return are dropped, and // stands for a / in front."""
    tokenizer, model = loaded
    wanted = tokenizer.decode(list(Chat(model, tokenizer).answer(message, 6)))
    assert run("--chat", "--max-new-tokens", "6", stdin=typed)[:2] == (0, f"{wanted}\n")
    if "//" not in typed and message == "Hello":
        story = run("--prompt", message, "--max-new-tokens", "6")[1]
        assert run("--max-new-tokens", "6", stdin=typed)[:2] == (0, story)


def test_an_interrupted_answer_ends_and_the_conversation_goes_on(run, loaded):
    tokenizer, model = loaded
    with interruption(model, 4):
        code, out, told = run("--chat", "--max-new-tokens", "9", stdin="Hello\nAnd?\n")
    [first] = generate(model, [whole_conversation(Chat(model, tokenizer), "Hello")], 3)
    assert code == 0 and out.startswith(tokenizer.decode(first) + "\n") and out.count("\n") == 2
    assert "; 3 written" in told and "; 9 written" in told


def test_ctrl_c_at_the_prompt_asks_again(run, loaded, monkeypatch):
    def answer(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    lines = iter([KeyboardInterrupt, "Hello", EOFError])
    monkeypatch.setattr("builtins.input", answer)
    code, out, _ = run("--chat", "--max-new-tokens", "2")
    assert code == 0 and out.startswith("\n") and out.count("\n") == 2


def test_a_message_that_cannot_be_read_is_refused_and_the_conversation_goes_on(run, loaded):
    code, out, told = run("--chat", "--max-new-tokens", "2", stdin=b"\xff\nHello\n")
    assert code == 0 and out.count("\n") == 1
    assert re.search("^generate.py: .*lone surrogate", told, re.MULTILINE)
    code, out, told = run(stdin=b"\xff\xfe")
    assert (code, out) == (1, "") and one_line(told) and "lone surrogate" in told


# ------------------------------------------------------------------ without the folder fast/


STORY = ["--prompt", "Once upon a time", "--max-new-tokens", "20"]


def run_without_fast():
    """The results of a story, and of a 4-bit checkpoint with only an empty folder fast/."""
    with tempfile.TemporaryDirectory() as directory:
        for name in ("convert.py", "generate.py", "mixtral.py", "tokenizer.py"):
            shutil.copy(ROOT / name, directory)
        shutil.copytree(TINY, Path(directory, "tiny"), ignore=shutil.ignore_patterns("study"))
        tell = partial(subprocess.run, [sys.executable, "generate.py", *STORY], cwd=directory,
                       capture_output=True, text=True)
        story = tell()
        Path(directory, "fast").mkdir()
        config = Path(directory, "tiny", "config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {}}))
        return story, tell()


@pytest.mark.beside(run=run_without_fast)
def test_without_fast_the_story_is_the_same_and_4_bits_are_refused(run, beside):
    story, refused = beside
    assert (story.returncode, story.stdout) == (0, run(*STORY)[1])
    assert (refused.returncode, refused.stdout) == (1, "")
    assert one_line(refused.stderr) and "fast/int4.py" in refused.stderr


def test_without_fast_what_needs_it_is_refused_in_one_line(run, small, monkeypatch):
    flags = ["--model", small, "--prompt", "x", "--max-new-tokens"]
    monkeypatch.setattr(program, "fast", None)
    assert run("--chat", "--model", small, "--max-new-tokens", "2", stdin="Hello\n")[0] == 0
    code, out, told = run(*flags, 2**62)
    assert (code, out) == (1, "") and one_line(told) and "no memory" in told
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    code, out, told = run(*flags, 20)
    assert (code, out) == (1, "") and one_line(told) and "folder fast/" in told


# ------------------------------------------------------------------ the process


def start(*args, name="generate.py", **environment):
    """Start a program that can be interrupted, even if the tests run in a shell's background."""
    return subprocess.Popen(
        [sys.executable, ROOT / name, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


ENDLESS = ["--prompt", "Once upon a time", "--max-new-tokens", "1000000", "--temperature", "9"]


def run_until_ctrl_c():
    """The exit code, the text before Ctrl-C and after it, and standard error."""
    process = start(*ENDLESS)
    out = [os.read(process.stdout.fileno(), 2**16) for _ in range(3)]
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=600)
    return process.returncode, out, rest, told


@pytest.mark.beside(run=run_until_ctrl_c)
def test_ctrl_c_ends_a_running_process_with_the_text_so_far(beside):
    code, out, rest, told = beside
    text = b"".join(out) + rest
    assert len(out[0]) < 2000  # text is printed as it is drawn, not when a buffer of 8192 is full
    assert code == 130 and text.startswith(b"Once upon a time")
    assert text.endswith(b"\n") and told.count(b"\n") == 1 and b"written" in told


@pytest.mark.parametrize("name", ["generate.py", "convert.py"])
def test_ctrl_c_during_the_imports_ends_without_a_traceback(name, tmp_path):
    """A file that takes the place of torch makes the import last until the signal."""
    (tmp_path / "torch.py").write_text("import time\nprint(1, flush=True)\ntime.sleep(600)\n")
    with start(name=name, PYTHONPATH=str(tmp_path)) as process:
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGINT)
        assert (process.wait(timeout=60), process.stderr.read()) == (130, b"")


def run_with_a_reader_that_goes_away():
    """The exit code and standard error."""
    with start(*ENDLESS) as process:
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        return process.wait(timeout=600), process.stderr.read()


@pytest.mark.beside(run=run_with_a_reader_that_goes_away)
def test_a_reader_that_goes_away_is_no_error(beside):
    assert beside == (0, b"")


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("args, named", [
    (["--model", "/nowhere"], "/nowhere"), (["--model", "no\0name"], "null"),
    (["--temperature", "inf"], "temperature"), (["--top-p", "1.1"], "top_p"),
    (["--max-new-tokens", "-3"], "max_new_tokens"), (["--seed", str(2**63)], "seed"),
    (["--device", "abacus"], "abacus"), (["--device", ""], "evice"),
    *[(["--device", name], name) for name in ("meta", "cuda:99") if program.fast],
    (["--prompt", "\udcff"], "lone surrogate")])
def test_bad_input_gets_one_line_and_exit_code_1(run, args, named):
    code, out, told = run(*args, *([] if "--prompt" in args else ["--prompt", "a"]))
    assert (code, out) == (1, "") and one_line(told) and named in told


@pytest.mark.parametrize("args, named", [
    (["--max-new-tokens", "many"], "--max-new-tokens"), (["--temperature", "hot"], "--temperature"),
    (["--dtype", "int3"], "--dtype"), (["--system", "x"], "--system"),
    (["--chat", "--json"], "--json"), (["--stop", ""], "--stop"), (["--temp", "1"], "--temp 1"),
    (["--experts", "x"], "--experts"), (["--experts", "--json"], "--experts"),
    (["--experts", "--chat"], "--experts"), (["--experts", "--stop", "x"], "--experts"),
    (["--experts", "--prompt", "a", "--prompt", "b"], "--experts")])
def test_bad_arguments_get_exit_code_2_and_their_reason_last(run, args, named):
    code, out, told = run(*args)
    assert (code, out) == (2, "") and "Traceback" not in told
    assert told.splitlines()[-1].startswith("generate.py: error: ")
    assert named in told.splitlines()[-1]


def test_more_tokens_than_the_memory_holds_are_refused(run, small):
    pytest.importorskip("fast.memory")
    for flags in ([], ["--json"], ["--experts"]):
        code, out, told = run("--model", small, "--prompt", "x", "--max-new-tokens", 10**15, *flags)
        assert (code, out) == (1, "") and one_line(told) and "GB of cache" in told
    code, out, told = run("--model", small, "--chat", "--max-new-tokens", 10**15, stdin="x\n")
    assert (code, out) == (0, "") and one_line(told) and "GB of cache" in told


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [
    [0.0, float("nan")], [0.0, float("inf")], [-float("inf"), -float("inf")],
    [[0.0, 1.0], [float("nan"), 0.0]]])
def test_logits_from_which_nothing_can_be_drawn_are_refused(logits, temperature):
    with pytest.raises(ValueError, match="logits"):
        sample(torch.tensor(logits), temperature)
