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
from pathlib import Path

import pytest
import torch
from conftest import random_model, save
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import generate as program
from generate import TINY, Chat, Completion, generate, generate_steps, load, main, sample
from mixtral import route

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model():
    return random_model(1)


@pytest.fixture(scope="module")
def embedded():
    return load(TINY, torch.float64)


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
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_and_log_probabilities_are_those_of_full_passes_without_a_cache(window, temperature):
    """With temperature 0, tokens are the argmax. Log-probabilities are those before temperature and
    top-p."""
    model = random_model(1, sliding_window=window)
    prompts = [[1, 2, 3], [n * n % 37 for n in range(290)]]
    steps = list(generate_steps(model, prompts, 12, temperature, 0.8, 4, logprobs=True))
    for prompt, row in zip(prompts, zip(*steps, strict=True), strict=True):
        tokens, logprobs = torch.tensor(row, dtype=torch.float64).unbind(1)
        tokens = tokens.long()
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens.tolist()]]))[0, len(prompt) - 1:-1]
        assert torch.equal(tokens, logits.argmax(-1)) or temperature > 0
        wanted = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert (logprobs - wanted).abs().max() < 1e-12


@settings(max_examples=15, deadline=None)
@given(prompts=st.lists(st.lists(st.integers(0, 36), min_size=1, max_size=9), min_size=2,
                        max_size=4),
       eos=st.integers(0, 36), temperature=st.sampled_from([0.0, 1.0]),
       seed=st.integers(0, 2**63 - 1))
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
    """And draws are distributed as the renormalised nucleus.

    Every token has a mass of at least 0.002, so 20,000 draws miss none of it. Their χ² over at most
    seven tokens exceeds 70 by chance once in 10¹² runs.
    """
    logits = torch.tensor(quarters, dtype=torch.float64) / 4
    mass = (logits / temperature).softmax(-1).tolist()
    nucleus, total = {}, 0.0
    for token in sorted(range(len(mass)), key=lambda t: (-quarters[t], t)):
        assume(abs(total - top_p) > 1e-9)
        if total < top_p:
            nucleus[token] = mass[token]
        total += mass[token]
    generator = torch.Generator().manual_seed(seed)
    drawn = sample(logits.expand(20_000, -1), temperature, top_p, generator).tolist()
    assert set(drawn) == nucleus.keys()
    expected = {token: 20_000 * m / sum(nucleus.values()) for token, m in nucleus.items()}
    assert sum((drawn.count(token) - n) ** 2 / n for token, n in expected.items()) < 70


def test_a_tiny_temperature_overflows_nothing():
    logits = torch.tensor([1e4, 2e4, -1e4, -torch.inf])
    assert sample(logits, 1e-300, 1.0) == 1
    assert sample(logits.to(torch.float16), 5e-324, 0.5) == 1


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


def test_a_seed_repeats_its_draws_and_no_seed_does_not(model):
    def text(seed):
        return generate(model, [[1]], 30, temperature=1.0, seed=seed)[0]

    assert text(0) == text(0) != text(1)
    assert text(2**63 - 1) != text(0)
    assert text(None) != text(None)
    first, second = generate(model, [[1], [1]], 30, temperature=1.0)
    assert first != second  # without a seed, equal prompts do not give equal texts


def test_eos_ends_its_row_which_then_reads_nothing_and_the_last_end_stops_all(model):
    prompts, options = [[1, 2, 3], [4], list(range(1, 30))], {"temperature": 1.0, "seed": 3}
    endless, cache = generate(model, prompts, 30, **options), model.new_cache(3, 100)
    for eos in endless[0][10], endless[2][10], endless[1][2]:
        wanted = [row[:row.index(eos) + 1] if eos in row else row for row in endless]
        cache.positions.fill_(-1)
        steps = list(generate_steps(model, prompts, 30, eos_id=eos, cache=cache, **options))
        rows = zip(*steps, strict=True)
        assert [[pair[0] for pair in row if pair] for row in rows] == wanted
        assert len(steps) == max(map(len, wanted))
        assert cache.tokens_read.tolist() == [len(prompt) + len(row) - 1 for prompt, row in
                                              zip(prompts, wanted, strict=True)]


# ------------------------------------------------------------------ stop strings


def ended_by(text, stops):
    """The text up to the stop string that ends first, of several the longest; by characters."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if stop and text[:end].endswith(stop)]:
            return text[:end - max(map(len, found))], "stop"
    return text, "length"


@settings(max_examples=300, deadline=None)
@given(data=st.data(), ended=st.booleans(),
       stops=st.lists(st.text("the 🦙\ufffd", min_size=1, max_size=5), max_size=3))
def test_a_text_ends_before_the_first_stop_string_wherever_tokens_are_cut(
        embedded, data, ended, stops):
    """Until then, all but the last characters, which could begin one, are released.

    Stop strings and characters lie across tokens, and the last character can be incomplete.
    """
    tokenizer, _ = embedded
    pool = [i for i, piece in enumerate(tokenizer.pieces) if set(piece) <= set("▁the")]
    pool += tokenizer.encode("🦙")[-4:]  # its bytes
    tokens = data.draw(st.lists(st.sampled_from(pool), max_size=12)) + [tokenizer.eos_id] * ended
    completion, decoder = Completion(tokenizer, stops, [tokenizer.bos_id]), tokenizer.stream()
    text = released = completion.beginning + decoder.feed(tokenizer.bos_id)
    for token in tokens:
        released += completion.feed(token, -0.5)
        if completion.finish_reason:
            break
        text += decoder.feed(token)
        assert released == text[:max(0, len(text) + 1 - max(map(len, stops), default=1))]
    released += completion.finish("length")
    wanted, reason = ended_by(tokenizer.decode(tokens), stops)
    assert released == completion.text == wanted and completion.finish("length") == ""
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


turns = st.lists(st.tuples(st.text("abc", max_size=8), st.integers(1, 10), st.integers(0, 10),
                           st.integers(1, 10)), min_size=1, max_size=4)


@pytest.mark.claim
@example([("abcabcabcabc", 6, 6, 9), ("b", 6, 6, 9)], True, None, 0.0, "xyz")
@settings(max_examples=40, deadline=None)
@given(turns=turns, moves=st.booleans(), window=st.sampled_from([None, 3]),
       temperature=st.sampled_from([0.0, 1.0]), system=st.sampled_from(["", "xyz"]))
def test_every_answer_of_a_chat_is_that_of_reading_the_whole_conversation(
        turns, moves, window, temperature, system):
    """Some answers are given up early or interrupted after keys were stored, some caches are
    outgrown, and some system texts move."""
    model = random_model(num_hidden_layers=1, sliding_window=window)
    options = {"temperature": temperature, "top_p": 0.9, "seed": 7}
    chat = Chat(model, Letters(moves), system, **options)
    for text, most, taken, call in turns:
        [wanted] = generate(model, [whole_conversation(chat, text)], most, eos_id=2, **options)
        answer, before, tokens = chat.answer(text, most), list(chat.messages), []
        with interruption(model, call), contextlib.suppress(KeyboardInterrupt):
            tokens += itertools.islice(answer, taken)
        answer.close()
        assert tokens == wanted[:min(taken, call - 1)]
        assert not taken or chat.cache.tokens_read.item() == len(chat.ids)
        if tokens:
            assert chat.messages[-1]["content"] == [token for token in tokens if token != 2]
        else:
            assert chat.messages == before


def test_a_turn_reads_only_what_is_new(embedded):
    tokenizer, model = embedded
    chat = Chat(model, tokenizer, "Be kind.")
    for n, text in enumerate(["Who are you?", "Why " * 100, "</s> [INST] <s>", "And then?"]):
        ids, known, widths = whole_conversation(chat, text), len(chat.ids), []
        with model.model.register_forward_pre_hook(
                lambda _, args, widths=widths: widths.append(args[0].shape[1])):
            tokens = list(chat.answer(text, 8))
        if n == 1:  # it outgrows the cache of the first turn, so all is read again
            assert chat.cache.max_length == 2 * (len(ids) + 8)
            known = 0
        assert sum(widths) == len(ids) - known + len(tokens) - 1
        assert [tokens] == generate(model, [ids], 8, eos_id=tokenizer.eos_id)


# ------------------------------------------------------------------ loading


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of 70,000 float32 weights with the tokenizer of the embedded model."""
    directory = tmp_path_factory.mktemp("small")
    save(random_model(dtype=torch.float32, vocab_size=2048, hidden_size=8, intermediate_size=8,
                      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                      num_local_experts=12, sliding_window=None), directory)
    shutil.copy(TINY / "tokenizer.model", directory)
    return directory


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


def text_after(tokenizer, model, prompt, n):
    """A prompt and its continuation by the functions of the module."""
    ids = tokenizer.encode(prompt)
    [new] = generate(model, [ids], n, eos_id=tokenizer.eos_id)
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
    ("Once\r\nupon\n\n", "Once\r\nupon\n"), ("\ufeffHello\r\n", "Hello")])
def test_without_a_prompt_standard_input_is_the_prompt(run, loaded, data, prompt):
    options = ["--max-new-tokens", "4", "--json"]
    code, out, _ = run(*options, stdin=data)
    [found] = objects(out)
    assert (code, found["prompt"]) == (0, prompt)
    assert found["text"] == objects(run("--prompt", prompt, *options)[1])[0]["text"]


def test_a_checkpoint_keeps_its_dtype_but_the_embedded_one_runs_in_float32(run, small, monkeypatch):
    asked = []
    monkeypatch.setattr(program, "load", lambda *args: asked.append(args[1:]) or load(*args))
    for flags in (["--model", small], ["--model", small, "--dtype", "float16"], [],
                  ["--model", os.path.relpath(TINY)], ["--device", "cpu:0", "--dtype", "bfloat16"]):
        assert run("--prompt", "x", "--max-new-tokens", "1", *flags)[0] == 0
    assert asked == [(None, "auto"), (torch.float16, "auto"), (torch.float32, "auto"),
                     (torch.float32, "auto"), (torch.bfloat16, "cpu:0")]


def test_json_is_one_object_a_line_whatever_the_text(run, loaded):
    tokenizer, model = loaded
    prompts = ["Once \"upon\" \\ a\ttime", "🦙\u2028é\u0007", "<b>", ""]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    code, out, told = run(*flags, "--json", "--max-new-tokens", "9", "--temperature", "1.5",
                          "--top-p", "0.7", "--seed", "1", "--stop", "zzz", "--stop", "an")
    found = objects(out)
    assert code == 0 and told.count("\n") == 1 and "🦙" in out
    assert [each["prompt"] for each in found] == prompts
    assert [each["index"] for each in found] == [0, 1, 2, 3]
    for each in found:
        assert list(each) == ["index", "prompt", "text", "tokens", "logprobs", "finish_reason",
                              "timings"]
        ids, count = tokenizer.encode(each["prompt"]), len(each["tokens"])
        steps = generate_steps(model, [ids], 9, 1.5, 0.7, 1, tokenizer.eos_id, logprobs=True)
        tokens, logprobs = zip(*(step for [step] in steps), strict=True)
        assert each["tokens"] == [*tokens[:count]]
        assert each["logprobs"] == pytest.approx(logprobs[:count], abs=1e-12)
        text = tokenizer.decode([*ids, *tokens]).removeprefix(tokenizer.decode(ids))
        assert (each["text"], each["finish_reason"]) == ended_by(text, ["an"])
        assert each["timings"]["prompt_tokens"] == len(ids)
        assert 0 < each["timings"]["prefill_seconds"] < each["timings"]["decode_seconds"] * 100
    assert {each["finish_reason"] for each in found} == {"stop", "length"}


def test_several_prompts_form_one_batch_in_which_each_text_is_as_alone(run, loaded):
    prompts = ["Once upon a time", "The dog", "Once upon a time there was a big"]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    options = ["--max-new-tokens", "8", "--stop", "the", "--stop", "a"]
    alone = [run("--prompt", prompt, *options)[1] for prompt in prompts]
    for prompt, text in zip(prompts, alone, strict=True):
        whole = text_after(*loaded, prompt, 8).removeprefix(prompt)
        assert text == f"{prompt}{ended_by(whole, ['the', 'a'])[0]}\n"
    code, out, told = run(*flags, *options)
    assert code == 0 and told.startswith("[17 tokens read in ") and told.count("\n") == 1
    assert out == "".join(f"=== {n} of 3\n{text}" for n, text in enumerate(alone, 1))


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


@pytest.mark.parametrize("terminal, no_color", [(False, ""), (True, "1"), (True, "")])
@pytest.mark.parametrize("flags, layer", [(["--experts"], 3), (["--experts", "5"], 5)])
def test_the_strongest_expert_of_each_token_is_its_colour_or_a_number_after_it(
        run, loaded, monkeypatch, flags, layer, terminal, no_color):
    """Those of the prompt, which is read in chunks, and that of the last token are shown too."""
    def mark(text, expert):
        if coloured:
            return f"\x1b[30;48;5;{program.COLOURS[expert]}m{text}\x1b[0m"
        return text + "₀₁₂₃₄₅₆₇"[expert]

    coloured, (tokenizer, model) = terminal and not no_color, loaded
    ids, seen = tokenizer.encode("One day\n🦙"), []
    [new] = generate(model, [ids], 30)
    if layer == 5:  # end the text before 30 tokens
        monkeypatch.setattr(tokenizer, "eos_ids", frozenset(new[20:22]))
        new = list(itertools.takewhile(lambda token: token not in tokenizer.eos_ids, new))
    gate = model.model.layers[layer].block_sparse_moe.gate
    with gate.register_forward_hook(lambda gate, args, logits: seen.append(logits)):
        model(torch.tensor([ids + new]))
    marked, decoder, experts = "", tokenizer.stream(), route(seen[0], 1)[1].flatten().tolist()
    for token, expert in zip(ids + new, experts, strict=True):
        text = decoder.feed(token)
        marked += text if text in ("", "\n") else mark(text, expert)
    monkeypatch.setattr(program, "CHUNK", 2)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    code, out, told = run("--prompt", "One day\n🦙", "--max-new-tokens", "30", *flags)
    legend = " ".join(mark(f" {expert} " * coloured, expert) for expert in range(8))
    assert (code, out, told) == (0, f"{marked}\nexperts of layer {layer}: {legend}\n", "")


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
        b"Hello\nAnd?\n\n/nothing at all\n\xff\n/reset\nHello\n/system  Be rude. \nHello\n/system\n"
        b"Hello\n/exit\nnever\n"))
    chats = [Chat(model, tokenizer, system) for system in ("Be kind.", "Be kind.", "Be rude.", "")]
    asked = [["Hello", "And?"], ["Hello"], ["Hello"], ["Hello"]]
    answers = [tokenizer.decode(list(chat.answer(text, 6)))
               for chat, texts in zip(chats, asked, strict=True) for text in texts]
    assert (code, out) == (0, "".join(answer + "\n" for answer in answers))
    assert "/nothing: unknown; " in told and "\ngenerate.py: text must be" in told
    assert told.count("\n") == 1 + 1 + 1 + 5
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


def test_ctrl_c_ends_an_answer_or_asks_again_and_the_conversation_goes_on(
        run, loaded, monkeypatch):
    def answer(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    tokenizer, model = loaded
    lines = iter([KeyboardInterrupt, "Hello", "And?", EOFError])
    monkeypatch.setattr("builtins.input", answer)
    with interruption(model, 4):
        code, out, told = run("--chat", "--max-new-tokens", "9")
    [first] = generate(model, [whole_conversation(Chat(model, tokenizer), "Hello")], 3)
    assert code == 0 and out.startswith(f"\n{tokenizer.decode(first)}\n") and out.count("\n") == 3
    assert "; 3 written" in told and "; 9 written" in told


# ------------------------------------------------------------------ without the folder fast/


STORY = ["--prompt", "Once upon a time", "--max-new-tokens", "20"]


def run_without_fast():
    """The finished process of a story in a copy of the reference with an empty folder fast/."""
    with tempfile.TemporaryDirectory() as directory:
        for name in ("convert.py", "generate.py", "mixtral.py", "tokenizer.py"):
            shutil.copy(ROOT / name, directory)
        shutil.copytree(TINY, Path(directory, "tiny"), ignore=shutil.ignore_patterns("study"))
        Path(directory, "fast").mkdir()
        return subprocess.run([sys.executable, "generate.py", *STORY], cwd=directory,
                              capture_output=True, text=True)


@pytest.mark.beside(run=run_without_fast)
def test_without_fast_the_story_is_the_same(run, beside):
    assert (beside.returncode, beside.stdout) == (0, run(*STORY)[1])


def test_without_fast_several_ranks_are_refused_and_a_chat_works(run, small, monkeypatch):
    monkeypatch.setattr(program, "fast", None)
    chat = ["--chat", "--model", small, "--max-new-tokens", "2"]
    assert run(*chat, stdin="Hello\n")[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    code, out, told = run(*chat, stdin="Hello\n")
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


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("args, named", [
    (["--model", "/nowhere"], "/nowhere"), (["--model", "no\0name"], "null"),
    (["--temperature", "inf"], "temperature"), (["--top-p", "1.1"], "top_p"),
    (["--max-new-tokens", "-3"], "max_new_tokens"), (["--seed", str(2**63)], "seed"),
    (["--device", "abacus"], "abacus"), (["--device", ""], "evice"),
    *[(["--device", name], name) for name in ("meta", "cuda:99") if program.fast],
    (["--experts", "6"], "0 … 5, got 6"), (["--experts", "-1"], "0 … 5, got -1"),
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


def test_a_tokenizer_with_more_pieces_than_the_model_has_is_refused(run, tmp_path):
    shutil.copy(TINY / "tokenizer.model", save(random_model(vocab_size=2047), tmp_path / "less"))
    code, out, told = run("--model", tmp_path / "less", "--prompt", "x")
    assert (code, out) == (1, "") and one_line(told) and "the model only 2047" in told


def test_an_error_that_nobody_foresaw_is_one_line(run, monkeypatch):
    monkeypatch.setattr(program, "load", lambda *_: 1 / 0)
    code, out, told = run("--prompt", "x")
    assert (code, out) == (1, "") and one_line(told) and "python -X dev shows where" in told


@pytest.mark.parametrize("fast", [None, program.fast])
def test_more_tokens_than_the_memory_holds_are_refused(run, small, monkeypatch, fast):
    monkeypatch.setattr(program, "fast", fast)
    for flags, wanted in (["--prompt", "x"], 1), (["--chat"], 0):
        code, out, told = run("--model", small, "--max-new-tokens", 2**62, *flags, stdin="x\n")
        assert (code, out) == (wanted, "") and one_line(told)
        assert ("GB of cache" if fast else "no memory") in told


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [
    [0.0, float("nan")], [0.0, float("inf")], [-float("inf"), -float("inf")],
    [[0.0, 1.0], [float("nan"), 0.0]]])
def test_logits_from_which_nothing_can_be_drawn_are_refused(logits, temperature):
    with pytest.raises(ValueError, match="logits"):
        sample(torch.tensor(logits), temperature)
