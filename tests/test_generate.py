"""Claims about generate.py: sampling, batches, chats, tuned products, loading, the command line."""

import contextlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, save
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import generate as program
from convert import write_safetensors
from generate import (
    DTYPES,
    TINY,
    Chat,
    Completion,
    check_memory,
    draw,
    free_memory,
    generate,
    generate_steps,
    load,
    main,
    parse_arguments,
    sample,
    shard,
    tune,
    with_progress,
)
from mixtral import Int4Linear, Mixtral, assemble, unpack
from tokenizer import Tokenizer

SCRIPT = Path(__file__).resolve().parent.parent / "generate.py"


def random_source(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return random_model(1)


@pytest.fixture(scope="module")
def embedded():
    return load(TINY, torch.float64)


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


@pytest.mark.parametrize("top_p, nucleus", [(1e-9, 1), (0.25, 1), (0.26, 2), (0.5, 2), (1.0, 4)])
def test_of_equal_logits_the_lower_ids_enter_the_nucleus_first(top_p, nucleus):
    """Each of four tokens has a mass of exactly 1/4, so both sides of every boundary are tested."""
    drawn = sample(torch.zeros(5000, 4), 1.0, top_p, random_source(0))
    assert set(drawn.tolist()) == set(range(nucleus))


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


def test_temperature_zero_takes_the_largest_logit_and_of_equals_the_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -1.0, 5.0, 5.0]])
    assert sample(logits).tolist() == [1, 2]
    assert sample(logits, 0.0, 0.5).tolist() == [1, 2]


def test_a_tiny_temperature_overflows_nothing():
    logits = torch.tensor([1e4, 2e4, -1e4, -torch.inf])
    assert sample(logits, 1e-300, 1.0, random_source(0)) == 1
    assert sample(logits.to(torch.float16), 5e-324, 0.5, random_source(0)) == 1


def test_each_row_draws_from_its_own_generator():
    logits = torch.zeros(3, 1000)
    drawn = draw(logits, 1.0, 1.0, [random_source(seed) for seed in (5, 6, 5)]).tolist()
    alone = [sample(logits[0], 1.0, 1.0, random_source(seed)).item() for seed in (5, 6, 5)]
    assert drawn == alone and drawn[0] == drawn[2] != drawn[1]


def test_a_seed_repeats_its_draws_and_no_seed_does_not(model):
    def text(seed):
        return generate(model, [[1]], 30, temperature=1.0, seed=seed)[0]

    assert text(0) == text(0) != text(1)
    assert text(2**63 - 1) != text(0)
    assert text(None) != text(None)


def test_eos_is_the_last_token_of_its_row_and_other_rows_go_on(model):
    prompts = [[1, 2, 3], [4], list(range(1, 30))]
    endless = generate(model, prompts, 30, temperature=1.0, seed=3)
    eos = endless[0][10]
    ended = generate(model, prompts, 30, temperature=1.0, seed=3, eos_id=eos)
    for row, whole in zip(ended, endless, strict=True):
        assert row == whole[:whole.index(eos) + 1 if eos in whole else 30]
    assert len({len(row) for row in ended}) > 1


def test_a_row_that_has_ended_reads_no_more_tokens(model):
    prompts = [[1, 2, 3], [4]]
    eos, cache = generate(model, prompts, 30)[0][4], model.new_cache(2, 100)
    rows = list(zip(*generate_steps(model, prompts, 30, eos_id=eos, cache=cache), strict=True))
    written = [sum(pair is not None for pair in row) for row in rows]
    assert written[0] != written[1]
    assert cache.lengths.tolist() == [3 + written[0] - 1, 1 + written[1] - 1]


def test_generation_ends_once_every_row_has_ended(model):
    [new] = generate(model, [[1, 2, 3]], 30)
    steps = list(generate_steps(model, [[1, 2, 3]] * 2, 30, eos_id=new[4]))
    assert len(steps) == new.index(new[4]) + 1 < 30


def test_log_probabilities_are_those_of_full_passes_before_temperature_and_top_p(model):
    prompts = [[1, 2, 3], [4]]
    steps = list(generate_steps(model, prompts, 12, 0.7, 0.8, 4, logprobs=True))
    for n, prompt in enumerate(prompts):
        tokens, logprobs = zip(*(step[n] for step in steps), strict=True)
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1:-1]
        wanted = logits.log_softmax(-1)[torch.arange(12), torch.tensor(tokens)]
        assert (torch.tensor(logprobs, dtype=torch.float64) - wanted).abs().max() < 1e-12


def test_a_given_cache_is_continued_and_lacks_only_the_last_token(model):
    cache = model.new_cache(2, 100)
    rows = [[1, 2, 3], [4]]
    first = list(generate_steps(model, rows, 6, cache=cache))
    said = [[step[n][0] for step in first] for n in range(2)]
    assert cache.lengths.tolist() == [3 + 5, 1 + 5]
    more = [[said[0][-1], 9, 8], [said[1][-1]]]
    second = list(generate_steps(model, more, 6, cache=cache))
    whole = [row + new[:-1] + rest for row, new, rest in zip(rows, said, more, strict=True)]
    assert [[step[n][0] for step in second] for n in range(2)] == generate(model, whole, 6)


def test_nothing_to_do_gives_nothing(model):
    assert generate(model, [], 5) == [] and generate(model, [[1], [2]], 0) == [[], []]


# ------------------------------------------------------------------ stop strings


class Pieces:
    """A tokenizer whose token n is the n-th of some strings; −1 is EOS and has no text."""

    eos_id = -1

    def __init__(self, pieces):
        self.pieces = pieces

    def stream(self):
        return self

    def feed(self, token):
        return self.pieces[token] if token >= 0 else ""

    def flush(self):
        return ""


def ended_by(text, stops):
    """The text up to the stop string that ends first, of several the longest; by characters."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if stop and text[:end].endswith(stop)]:
            return text[:end - max(map(len, found))], "stop"
    return text, "length"


def certain(text, stops):
    """The part of a text that no stop string can still take back."""
    begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[:len(text) - max(begun, default=0)]


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("ab", max_size=4), max_size=12),
       stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_a_text_ends_before_the_first_stop_string_wherever_tokens_are_cut(pieces, stops):
    completion, released = Completion(Pieces(pieces), stops), ""
    for n in range(len(pieces)):
        released += completion.feed(n)
        if completion.finish_reason:
            break
        assert released == certain("".join(pieces[:n + 1]), stops)
    released += completion.finish("length")
    assert (released, completion.finish_reason) == ended_by("".join(pieces), stops)
    assert completion.text == released and completion.finish("length") == ""


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab\n é🦙", max_size=30), stop=st.text("ab\n é🦙", min_size=1, max_size=4))
def test_a_stop_string_may_lie_across_bytes_and_pieces(embedded, text, stop):
    tokenizer, _ = embedded
    completion = Completion(tokenizer, [stop])
    released = completion.echo([tokenizer.bos_id])
    for token in tokenizer.encode(text, bos=False):
        if not completion.finish_reason:
            released += completion.feed(token)
    assert released + completion.finish("length") == completion.text == text.split(stop)[0]


def test_text_that_a_stop_string_could_still_take_back_is_held():
    completion = Completion(Pieces("xabab"), ["abc"])
    assert [completion.feed(n) for n in range(5)] == ["x", "", "", "ab", ""]
    assert completion.finish("length") == "ab" and completion.text == "xabab"


def test_a_completion_knows_its_tokens_and_why_it_ended(embedded):
    tokenizer, _ = embedded
    for tokens, reason in ([5, 6], "length"), ([5, tokenizer.eos_id], "eos"):
        completion = Completion(tokenizer)
        for token in tokens:
            completion.feed(token, -0.5)
        completion.finish("length")
        assert (completion.tokens, completion.logprobs) == (tokens, [-0.5] * len(tokens))
        assert completion.finish_reason == reason


@pytest.mark.parametrize("ended", [False, True])
def test_an_unfinished_character_is_one_replacement_mark_for_each_byte(embedded, ended):
    tokenizer, _ = embedded
    for stops, text in ([], "\ufffd\ufffd"), (["\ufffd"], ""):
        completion = Completion(tokenizer, stops)
        for byte in "🦙".encode()[:2]:
            assert completion.feed(tokenizer.byte_ids[byte]) == ""
        released = completion.feed(tokenizer.eos_id) if ended else ""
        released += completion.finish("length")
        assert released == completion.text == text
        assert completion.finish_reason == ("stop" if stops else "eos" if ended else "length")


# ------------------------------------------------------------------ chat


class Letters:
    """A tokenizer of the small model. With `moves`, the system text is put before the last message
    as in v2 and v3 templates, otherwise before the first."""

    eos_id = 2

    def __init__(self, moves=False):
        self.moves = moves

    def encode_chat(self, messages):
        first = messages[0]["role"] == "system"
        system, turns = messages[0]["content"] if first else "", messages[first:]
        ids, place = [1], len(turns) - 1 if self.moves else 0
        for n, turn in enumerate(turns):
            if turn["role"] == "assistant":
                ids += [*turn["content"], 2]
            else:
                text = system * (n == place) + turn["content"]
                ids += [3, *(5 + ord(letter) % 32 for letter in text), 4]
        return ids


@contextlib.contextmanager
def tokens_read(model):
    """Yield a list that collects the number of tokens of every call of the model."""
    widths = []
    hook = model.model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    yield widths
    hook.remove()


def whole_conversation(chat, text):
    """The ids of a conversation and its next message."""
    return chat.tokenizer.encode_chat([*chat.messages, {"role": "user", "content": text}])


turns = st.lists(st.tuples(st.text("abc", max_size=8), st.integers(1, 10), st.integers(1, 10)),
                 min_size=1, max_size=4)


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
        answer = chat.answer(text, most)
        tokens = list(itertools.islice(answer, taken))
        answer.close()
        assert tokens == wanted[:taken]
        assert chat.messages[-1]["content"] == [token for token in tokens if token != 2]


def test_a_turn_reads_only_what_is_new(embedded):
    tokenizer, model = embedded
    chat = Chat(model, tokenizer, "Be kind.")
    for n, text in enumerate(["Who are you?", "Why " * 100, "</s> [INST] <s>", "And then?"]):
        ids, known = whole_conversation(chat, text), len(chat.read)
        with tokens_read(model) as widths:
            tokens = list(chat.answer(text, 8))
        room = chat.cache.max_length
        if n != 1:  # the second turn outgrows the cache of the first
            assert sum(widths) == len(ids) - known + len(tokens) - 1
        else:
            assert sum(widths) == len(ids) + len(tokens) - 1 and room == 2 * (len(ids) + 8)
        assert [tokens] == generate(model, [ids], 8, eos_id=tokenizer.eos_id)
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 4]


@pytest.mark.parametrize("moves", [False, True])
def test_a_conversation_is_read_again_if_its_system_text_moves(model, moves):
    chat = Chat(model, Letters(moves), "xyz")
    list(chat.answer("abcabcabcabc", 6))
    ids = whole_conversation(chat, "b")
    with tokens_read(model) as widths:
        tokens = list(chat.answer("b", 6))
    assert len(ids) + 6 <= chat.cache.max_length and widths[0] == chat.new_tokens
    assert widths[0] == len(ids) if moves else widths[0] < 10
    assert [tokens] == generate(model, [ids], 6, eos_id=2)


def test_a_cache_that_is_outgrown_is_replaced_by_one_with_room_for_twice_the_tokens(model):
    chat, rooms = Chat(model, Letters()), []
    for _ in range(12):
        list(chat.answer("abcabcabc", 10))
        rooms.append(chat.cache.max_length)
    assert rooms == sorted(rooms) and len(set(rooms)) <= 4


@contextlib.contextmanager
def interruption(model, call):
    """Raise KeyboardInterrupt inside the given call of the last layer, after keys were stored."""
    calls = itertools.count(1)

    def interrupt(*_):
        if next(calls) == call:
            raise KeyboardInterrupt

    last = model.model.layers[-1].post_attention_layernorm
    hook = last.register_forward_pre_hook(interrupt)
    yield
    hook.remove()


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
    if drawn:
        kept = chat.messages[-1]["content"]
        assert len(kept) == drawn and chat.messages[:2] == before
        assert chat.cache.lengths.item() == len(chat.read)
    else:
        assert chat.messages == before
    [wanted] = generate(model, [whole_conversation(chat, "ef")], 9, eos_id=2)
    assert list(chat.answer("ef", 9)) == wanted


def test_a_chat_that_was_not_answered_is_as_it_was(embedded):
    tokenizer, model = embedded
    chat = Chat(model, tokenizer)
    with pytest.raises(ValueError, match="lone surrogate"):
        next(chat.answer("\ud800", 5))
    assert list(chat.answer("x", 0)) == [] and chat.messages == [] and chat.read == []


def int4_scheme(G=8):
    """The field of config.json that announces 4-bit weights in groups of G."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": G}
    return {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}}


def with_int4_experts(model, G=8):
    """The weights of a model with random 4-bit experts in groups of G in place of its own."""
    tensors = model.state_dict()
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors.pop(name)
        M, D = weight.shape
        tensors |= {
            f"{name}_packed": torch.randint(-2**31, 2**31, (M, D // 8), dtype=torch.int32),
            f"{name}_scale": torch.rand(M, D // G).to(weight.dtype) / 9,
            f"{name}_shape": torch.tensor([M, D])}
    return tensors


# ------------------------------------------------------------------ products made fast


ROWS = [1, 2, 3, 4, 5, 16, 64, 255, 256, 257]
SHAPES = [(1040, 528), (512, 48), (257, 7), (40, 24), (2048, 5)]


def tuned(layer, requires_grad=False):
    """A copy of a linear layer as `tune` leaves it."""
    holder = nn.Module()
    holder.lm_head = nn.Linear(layer.in_features, layer.out_features, bias=False)
    holder.lm_head.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad)
    return tune(holder).lm_head


@pytest.mark.parametrize("arithmetic, block", [(False, 2**22), (False, 2**19), (True, 2**22)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_tuned_products_are_exact_but_for_one_rounding(
        monkeypatch, outputs, inputs, dtype, arithmetic, block):
    """The error is that of float32 sums (float64 in float64) and of one rounding to the dtype.

    `arithmetic` says whether the CPU has arithmetic for 16-bit floats. `block` is the real one, and
    one that makes two blocks of the largest weight here.
    """
    monkeypatch.setattr(program, "has_arithmetic", lambda dtype: arithmetic)
    monkeypatch.setattr(program, "BLOCK", block)
    torch.manual_seed(0)
    layer = tuned(nn.Linear(inputs, outputs, bias=False, dtype=dtype))
    for rows in ROWS:
        x = torch.randn(rows, inputs).to(dtype)
        y = layer(x)
        exact = x.double() @ layer.weight.double().T
        summed = torch.finfo(torch.float32 if dtype.itemsize < 8 else dtype).eps * inputs
        bound = summed * (x.double().abs() @ layer.weight.double().abs().T)
        bound += torch.finfo(dtype).eps * (0.5 * exact.abs() + bound)
        assert y.dtype == dtype and y.shape == exact.shape
        assert ((y.double() - exact).abs() <= bound).all(), rows


MULTIPLIES_BFLOAT16 = pytest.mark.skipif(
    not program.has_arithmetic(torch.bfloat16), reason="oneDNN does not multiply bfloat16 here")


@MULTIPLIES_BFLOAT16
@pytest.mark.parametrize("outputs, inputs", [(1040, 528), (2048, 144)])
def test_packed_products_are_exact_but_for_one_rounding(outputs, inputs):
    torch.manual_seed(0)
    layer = tuned(nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16))
    with program.packed_weights(layer, 16, 16):
        for shape in ((1,), (2,), (4, 1), (16,), (130,), (2, 257)):
            x = torch.randn(*shape, inputs).bfloat16()
            exact = x.double() @ layer.weight.double().T
            bound = 2.0**-23 * inputs * (x.double().abs() @ layer.weight.double().abs().T)
            y = layer(x)
            assert layer.packed is not None and y.dtype == torch.bfloat16
            assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2 * bound).all(), shape


@pytest.mark.parametrize("rows, steps, free, arithmetic, dtype, packs", [
    (4, 64, 2 * 589_824, True, torch.bfloat16, True),
    (16, 16, 2 * 589_824, True, torch.bfloat16, True),
    (3, 1000, 10**9, True, torch.bfloat16, False), (4, 63, 10**9, True, torch.bfloat16, False),
    (4, 64, 2 * 589_824 - 1, True, torch.bfloat16, False),
    (4, 64, None, True, torch.bfloat16, False), (4, 64, 10**9, False, torch.bfloat16, False),
    (4, 64, 10**9, True, torch.float16, False), (4, 64, 10**9, True, torch.float32, False)])
def test_large_weights_are_packed_for_batches_that_repay_it(
        monkeypatch, rows, steps, free, arithmetic, dtype, packs):
    """And the copies are gone afterwards, also after an error."""
    model = tune(random_model(hidden_size=144, vocab_size=2048, num_hidden_layers=1).to(dtype))
    assert model.lm_head.weight.numel() * 2 == 589_824
    monkeypatch.setattr(program, "free_memory", lambda device: free)
    monkeypatch.setattr(program, "has_arithmetic", lambda dtype: arithmetic)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight",
                        lambda weight, rows: weight.detach())
    with contextlib.suppress(ZeroDivisionError):
        with program.packed_weights(model, rows, steps):
            kept = [m for m in model.modules() if getattr(m, "packed", None) is not None]
            assert kept == [model.lm_head] * packs
            raise ZeroDivisionError
    assert model.lm_head.packed is None


def test_a_batch_of_a_model_without_tuned_layers_does_not_ask_onednn(monkeypatch):
    """On a GPU, or where PyTorch has no oneDNN, its operations may not exist."""
    monkeypatch.setattr(program, "has_arithmetic", None)  # calling it would be a TypeError
    model = random_model(hidden_size=144, vocab_size=2048, num_hidden_layers=1).bfloat16()
    assert [len(row) for row in generate(model, [[1], [2], [3], [4]], 64)] == [64] * 4


@MULTIPLIES_BFLOAT16
def test_a_batch_is_generated_with_packed_weights():
    sizes = {"hidden_size": 144, "vocab_size": 2048, "num_hidden_layers": 1}
    model, prompts, packed = tune(random_model(**sizes).bfloat16()), [[1, 2], [3], [4], [5]], []
    model.lm_head.register_forward_hook(lambda m, args, y: packed.append(m.packed is not None))
    options = {"logprobs": True, "seed": 0}
    steps = list(program.generate_steps(model, prompts, 64, **options))
    wanted = list(program.generate_steps(model, prompts, 3, **options))
    assert packed == [True] * 64 + [False] * 3
    for (_, found), (_, known) in zip(steps[0], wanted[0], strict=True):
        assert abs(found - known) < 0.05


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tuned_products_leave_the_switch_of_onednn_as_it_was(dtype, enabled):
    layer = tuned(nn.Linear(528, 1040, bias=False, dtype=dtype))
    with torch.backends.mkldnn.flags(enabled=enabled):
        layer(torch.ones(1, 528, dtype=dtype))
        with pytest.raises(RuntimeError):
            layer(torch.ones(1, 528, dtype=torch.float64))
        assert torch.backends.mkldnn.enabled == enabled


@pytest.mark.parametrize("shape", [(528,), (1, 528), (3, 1, 528), (1, 7, 528), (2, 130, 528)])
@pytest.mark.parametrize("outputs", [1040, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tuned_products_take_any_leading_shape_and_memory_layout(shape, outputs, dtype):
    layer = tuned(nn.Linear(528, outputs, bias=False, dtype=dtype))
    x = torch.randn(*shape, 2, dtype=dtype)
    for view in (x[..., 0].contiguous(), x[..., 1], x.movedim(-2, 0).contiguous().movedim(0, -1)[
            ..., 0, :]):
        wanted = F.linear(view, layer.weight)
        assert layer(view).shape == wanted.shape
        assert (layer(view) - wanted).abs().max() < 10000 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 6, 300])
@pytest.mark.parametrize("of_input, of_weight", [(True, False), (False, True), (True, True)])
def test_tuned_products_have_the_gradients_of_plain_ones(dtype, rows, of_input, of_weight):
    torch.manual_seed(0)
    plain = nn.Linear(264, 1040, bias=False, dtype=dtype).requires_grad_(of_weight)
    layer, dy = tuned(plain, of_weight), torch.randn(rows, 1040).to(dtype)
    x = torch.randn(rows, 264).to(dtype)
    x, same = (x.clone().requires_grad_(of_input) for _ in range(2))
    layer(x).backward(dy)
    plain(same).backward(dy)
    for found, wanted in ((x, same), (layer.weight, plain.weight)):
        if wanted.requires_grad:
            error = (found.grad.double() - wanted.grad.double()).abs().max()
            assert error <= 8 * torch.finfo(dtype).eps * wanted.grad.double().abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tuned_model_gives_the_logits_of_the_plain_one(dtype):
    sizes = {"vocab_size": 2048, "hidden_size": 144, "intermediate_size": 1856,
             "num_hidden_layers": 1, "num_local_experts": 3}
    plain, same = (random_model(**sizes).to(dtype) for _ in range(2))
    names = list(same.state_dict())
    assert tune(same) is same and list(same.state_dict()) == names
    assert type(same.lm_head) is not nn.Linear
    tokens = torch.randint(2048, (3, 40))
    with torch.inference_mode():
        for S in (1, 2, 40):
            difference = plain(tokens[:, :S]) - same(tokens[:, :S])
            assert difference.abs().max() < 200 * torch.finfo(dtype).eps


@pytest.mark.parametrize("G, dtype, fits", [
    (32, torch.bfloat16, True), (64, torch.bfloat16, True), (8, torch.bfloat16, False),
    (32, torch.float32, False)])
def test_a_tuned_4_bit_model_gives_the_logits_of_the_plain_one(G, dtype, fits):
    model = random_model(hidden_size=128, intermediate_size=192, vocab_size=48).to(dtype)
    raw, weights = vars(model.config) | int4_scheme(G), with_int4_experts(model, G)
    plain, same = (assemble(raw, weights) for _ in range(2))
    tune(same)
    kinds = {type(expert.w1) for expert in same.model.layers[0].block_sparse_moe.experts}
    assert kinds == {program.TunedInt4Linear if fits else Int4Linear}
    assert not fits or same.lm_head.weight.data_ptr() != plain.lm_head.weight.data_ptr()
    torch.manual_seed(0)
    for rows in (1, 2, 5, 70):
        for name in ("w1", "w2"):
            layer, tuned_layer = (m.model.layers[0].block_sparse_moe.experts[1].get_submodule(name)
                                  for m in (plain, same))
            weight = unpack(layer.weight_packed, layer.weight_scale).double()
            x = torch.randn(2, rows, weight.shape[1]).to(dtype)
            y, exact = tuned_layer(x), x.double() @ weight.T
            assert y.dtype == dtype and y.shape == exact.shape
            size = x.double().abs() @ weight.T.abs()
            bound = torch.finfo(torch.float32).eps * weight.shape[1] * size  # of float32 sums
            bound += torch.finfo(dtype).eps * (size / 2 + exact.abs())  # of weights and result
            assert ((y.double() - exact).abs() <= bound).all()


def test_tuning_leaves_a_model_on_another_device_plain():
    model = random_model(vocab_size=48, hidden_size=48, intermediate_size=48).to("meta")
    assert all(type(m) is nn.Linear for m in tune(model).modules() if isinstance(m, nn.Linear))


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("dtype", [None, *DTYPES.values()])
def test_a_loaded_model_is_the_checkpoint_in_the_asked_dtype(dtype):
    tokenizer, model = load(TINY, dtype)
    plain = Mixtral.from_pretrained(TINY, dtype).state_dict()
    assert model.lm_head.weight.dtype == (dtype or torch.bfloat16) and not model.training
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(weight, plain[name]) for name, weight in model.state_dict().items())
    assert tokenizer.encode("Hello") == Tokenizer(TINY).encode("Hello")


SMALL = {"dtype": torch.float32, "vocab_size": 2048, "hidden_size": 8, "intermediate_size": 8,
         "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
         "num_local_experts": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of 70,000 float32 weights with the tokenizer of the embedded model."""
    directory = tmp_path_factory.mktemp("small")
    save(random_model(**SMALL), directory)
    shutil.copy(TINY / "tokenizer.model", directory)
    return directory


@pytest.fixture(scope="module")
def small_int4(tmp_path_factory):
    """The same with experts of 4 bits."""
    directory, model = tmp_path_factory.mktemp("int4"), random_model(**SMALL)
    save(model, directory, **int4_scheme())
    write_safetensors(directory / "model.safetensors", with_int4_experts(model))
    shutil.copy(TINY / "tokenizer.model", directory)
    return directory


def with_config(checkpoint, tmp_path, **changes):
    """A copy of a checkpoint with these changes of its config.json."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def test_a_tokenizer_with_more_pieces_than_the_model_has_is_refused(tmp_path, small):
    with pytest.raises(ValueError, match="has 2048 pieces, the model only 2047"):
        load(with_config(small, tmp_path, vocab_size=2047))


@pytest.mark.parametrize("stored, dtype", [("F32", "I32"), ("F32", "U32")])
def test_weights_that_are_no_floats_are_refused_even_if_a_dtype_is_asked_for(
        tmp_path, small, stored, dtype):
    copy = shutil.copytree(small, tmp_path / "copy")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data.replace(f'"{stored}"'.encode(),
                                                          f'"{dtype}"'.encode()))
    for asked in (None, torch.float32):
        with pytest.raises(ValueError, match="float"):
            load(copy, asked)


@pytest.mark.parametrize("dtype", ["F32", "U32"])
def test_4_bit_weights_must_be_in_words_of_32_bits_with_a_sign(run, tmp_path, small_int4, dtype):
    copy = shutil.copytree(small_int4, tmp_path / "copy")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data.replace(b'"I32"', f'"{dtype}"'.encode()))
    for flags in ([], ["--dtype", "float64"]):
        code, out, told = run("--model", copy, "--prompt", "x", "--max-new-tokens", "1", *flags)
        assert (code, out) == (1, "") and one_line(told) and "weight_packed" in told


MEGABYTE = {"weight": torch.zeros(1000, 250), "norm": torch.zeros(0)}


@pytest.mark.parametrize("free, dtype, device, fits", [
    (1_000_000, None, "cpu", True), (999_999, None, "cpu", None), (999_999, None, "cuda", False),
    (1_000_000, torch.float32, "cpu", True), (999_999, torch.float32, "cpu", False),
    (2_000_000, torch.float64, "cpu", True), (1_999_999, torch.float64, "cpu", False),
    (500_000, torch.bfloat16, "cuda", True), (499_999, torch.bfloat16, "cuda", False),
    (None, torch.float64, "cuda", True)])
def test_weights_must_fit_into_the_free_memory_unless_they_stay_on_disk(
        monkeypatch, capsys, free, dtype, device, fits):
    """`fits` is None where the weights are mapped: that is slow, so a warning says it."""
    monkeypatch.setattr(program, "free_memory", lambda where: free if where == device else -1)
    if fits is False:
        with pytest.raises(ValueError, match=r"DIR: 0\.\d GB of weights, 0\.0 GB of memory free"):
            check_memory("DIR", MEGABYTE, dtype, device)
    else:
        check_memory("DIR", MEGABYTE, dtype, device)
    told = capsys.readouterr().err
    assert (told.count("\n") == 1 and "stay on disk" in told) if fits is None else told == ""


def test_4_bit_weights_are_copied_only_if_they_fit_into_the_free_memory(monkeypatch, tmp_path):
    sizes = {"dtype": torch.bfloat16, "hidden_size": 32, "intermediate_size": 32}
    model = random_model(**SMALL | sizes)
    save(model, tmp_path, **int4_scheme(32))
    write_safetensors(tmp_path / "model.safetensors", with_int4_experts(model, 32))
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    for free, kind in ((None, program.TunedInt4Linear), (1000, Int4Linear)):
        monkeypatch.setattr(program, "free_memory", lambda device, free=free: free)
        _, loaded = load(tmp_path)
        assert type(loaded.model.layers[0].block_sparse_moe.experts[0].w1) is kind


def test_a_model_that_does_not_fit_is_refused_before_it_is_converted(monkeypatch, capsys):
    monkeypatch.setattr(program, "free_memory", lambda device: 30_000_000)
    monkeypatch.setattr(program, "assemble", None)  # calling it would be a TypeError
    assert main(["--prompt", "x", "--dtype", "float64"]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert "0.1 GB of weights, 0.0 GB of memory free on cpu" in told.err


@pytest.mark.parametrize("window, rows, length", [(None, 1, 1000), (5, 3, 1000), (5, 1, 10)])
def test_a_cache_must_fit_into_the_free_memory(monkeypatch, window, rows, length):
    model = random_model(sliding_window=window)
    monkeypatch.setattr(program, "free_memory", lambda device: None)
    cache = program.new_cache(model, rows, length)
    size = cache.keys_and_values.nbytes
    monkeypatch.setattr(program, "free_memory", lambda device: size)
    program.new_cache(model, rows, length)
    monkeypatch.setattr(program, "free_memory", lambda device: size - 1)
    with pytest.raises(ValueError, match=f"{rows} rows of {length} tokens need 0.0 GB of cache"):
        program.new_cache(model, rows, length)


def test_more_tokens_than_the_memory_holds_are_refused(run, small, tmp_path):
    copy = with_config(small, tmp_path, sliding_window=None)
    for flags in ([], ["--json"], ["--chat"]):
        code, out, told = run("--model", copy, "--prompt", "x", "--max-new-tokens", 10**15, *flags)
        assert (code, out) == (1, "") and one_line(told) and "32000000.0 GB of cache" in told


def a_system(root, **files):
    """Files of /proc and /sys/fs/cgroup under another root, as program.Path should find them."""
    for name, content in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    5000 kB\n",
                          "sys/fs/cgroup/memory.stat": "anon 7\nfile 9\ninactive_file 300\n",
                          **{f"sys/fs/cgroup/memory.{n}": c for n, c in files.items()}}.items():
        if content is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
    return lambda path: root / str(path).lstrip("/")


@pytest.mark.parametrize("files, wanted", [
    ({}, 5_120_000),  # no control group
    ({"max": "max\n", "current": "1000\n"}, 5_120_000),
    ({"max": "9000\n", "current": "1000\n"}, 9000 - (1000 - 300)),  # cached files can be dropped
    ({"max": "99000000\n", "current": "1000\n"}, 5_120_000)])
def test_free_memory_is_what_the_system_and_the_control_group_leave(
        monkeypatch, tmp_path, files, wanted):
    monkeypatch.setattr(program, "Path", a_system(tmp_path, **files))
    assert free_memory("cpu") == wanted


def test_the_ranks_of_a_machine_share_its_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(program, "Path", a_system(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory("cpu") == 5_120_000
    monkeypatch.setattr(program.dist, "is_initialized", lambda: True)
    assert free_memory("cpu") == 2_560_000


def test_free_memory_is_unknown_on_a_system_that_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(program, "Path", lambda path: tmp_path / "absent")
    monkeypatch.setattr(program.dist, "is_initialized", lambda: True)
    assert free_memory("cpu") is None


def test_a_terminal_sees_a_progress_bar_that_disappears(monkeypatch, capsys):
    weights = {"a": torch.zeros(3, 10**6), "b": torch.zeros(0), "c": torch.zeros(1, 10**6)}
    for terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        assert [name for name, _ in with_progress(weights)] == ["a", "b", "c"]
        told = capsys.readouterr().err
        if not terminal:
            assert told == ""
            continue
        first, second, third = re.findall(r"\r\[(█*) *\] ([\d.]+) of 0.02 GB", told)
        assert [len(bar) for bar, _ in (first, second, third)] == [22, 22, 30]
        assert [done for _, done in (first, second, third)] == ["0.01", "0.01", "0.02"]
        assert told.endswith("\r\x1b[K")
    assert list(with_progress({"empty": torch.zeros(0)}))


# ------------------------------------------------------------------ several devices


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("int4", [False, True])
def test_the_outputs_of_all_ranks_add_up_to_those_of_the_whole_model(ranks, int4):
    """Both sums are taken where `reduce_outputs` puts an all-reduce."""
    model = random_model(num_key_value_heads=6, intermediate_size=48)
    raw = vars(model.config) | {"head_dim": None} | (int4_scheme() if int4 else {})
    weights = with_int4_experts(model) if int4 else model.state_dict()
    parts = [assemble(*shard(raw, weights, rank, ranks)) for rank in range(ranks)]
    for n, layer in enumerate(parts[0].model.layers):
        for name in ("self_attn", "block_sparse_moe"):
            others = [part.model.layers[n].get_submodule(name) for part in parts[1:]]
            layer.get_submodule(name).register_forward_hook(
                lambda _, inputs, y, others=others: y + sum(other(*inputs) for other in others))
    tokens = torch.arange(24).view(2, 12)
    difference = assemble(raw, weights)(tokens) - parts[0](tokens)
    assert difference.abs().max() < 1e-12
    part, whole = (m.new_cache(1, 9).keys_and_values.numel() for m in (parts[0], model))
    assert part * ranks == whole


@pytest.mark.parametrize("changes, ranks, message", [
    ({}, 3, "num_key_value_heads.* 2"), ({}, 4, "num_attention_heads.* 6"),
    ({"num_key_value_heads": 3}, 3, "intermediate_size.* 20")])
def test_ranks_that_cannot_share_the_model_evenly_are_refused(changes, ranks, message):
    model = random_model(**changes)
    with pytest.raises(ValueError, match=f"{ranks} ranks .*{message}"):
        shard(vars(model.config), model.state_dict(), 0, ranks)


def test_groups_of_4_bit_weights_must_not_be_divided():
    model = random_model(intermediate_size=24)
    with pytest.raises(ValueError, match="weight_.*: 2 ranks must divide its 3"):
        shard(vars(model.config) | int4_scheme(), with_int4_experts(model), 0, 2)


# ------------------------------------------------------------------ the command line


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line in this process: its exit code, standard output and standard error."""
    def run(*args, stdin=""):
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        with pytest.raises(SystemExit) as end:
            sys.exit(main([*map(str, args)]))
        told = capsys.readouterr()
        if isinstance(end.value.code, str):  # Python prints a string and exits with 1
            return 1, told.out, f"{told.err}{end.value.code}\n"
        return end.value.code or 0, told.out, told.err

    return run


@pytest.fixture
def loaded(embedded, monkeypatch):
    """The embedded model in float64, which the command line then uses without loading it."""
    monkeypatch.setattr(program, "load", lambda *_: embedded)
    return embedded


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
    assert told.count("\n") == 1 and re.match(r"\[\d+ tokens read, \d+ tokens/s; 20 written", told)


@pytest.mark.parametrize("data, prompt", [
    ("Once upon", "Once upon"), ("Once upon\n", "Once upon"), ("Once\r\nupon\n\n", "Once\nupon\n"),
    ("", ""), ("🦙 é", "🦙 é")])
def test_without_a_prompt_standard_input_is_the_prompt(run, data, prompt):
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
    seen, plain_load = [], program.load

    def spy(*args):
        seen.append(args[1:])
        return plain_load(*args)

    monkeypatch.setattr(program, "load", spy)
    for flags in (["--model", small], ["--model", small, "--dtype", "float16"], [],
                  ["--model", os.path.relpath(TINY)], ["--device", "cpu:0", "--dtype", "bfloat16"]):
        assert run("--prompt", "x", "--max-new-tokens", "1", *flags)[0] == 0
    assert seen == [(None, "cpu"), (torch.float16, "cpu"), (torch.float32, "cpu"),
                    (torch.float32, "cpu"), (torch.bfloat16, "cpu:0")]


def test_the_default_is_greedy_and_300_tokens(run, small):
    tokenizer, model = load(small)
    assert run("--model", small, "--prompt", "One")[1] == text_after(
        tokenizer, model, "One", 300) + "\n"


def test_a_text_ends_before_any_of_its_stop_strings(run, loaded):
    common = ["--prompt", "Once upon a time", "--max-new-tokens", "30"]
    whole = run(*common)[1]
    new = whole.removeprefix("Once upon a time").rstrip("\n")
    early, late = new[12:16], new[20:25]
    for stops in ([early], [late], [late, early], ["zzz"]):
        flags = [flag for stop in stops for flag in ("--stop", stop)]
        wanted = ended_by(new, stops)
        assert run(*common, *flags)[1] == f"Once upon a time{wanted[0]}\n"
        [found] = objects(run(*common, *flags, "--json")[1])
        assert (found["text"], found["finish_reason"]) == wanted


def test_a_stop_string_in_the_prompt_stops_nothing(run, loaded):
    assert len(run("--prompt", "x", "--stop", "x", "--max-new-tokens", "9")[1]) > 5


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


def test_a_text_that_ends_by_itself_has_the_finish_reason_eos(run, embedded, monkeypatch):
    tokenizer, model = embedded
    [new] = generate(model, [tokenizer.encode("One")], 6)
    monkeypatch.setattr(tokenizer, "eos_id", new[3])
    monkeypatch.setattr(program, "load", lambda *_: (tokenizer, model))
    [found] = objects(run("--prompt", "One", "--json", "--max-new-tokens", "6")[1])
    assert (found["tokens"], found["finish_reason"]) == (new[:new.index(new[3]) + 1], "eos")


def test_several_prompts_form_one_batch_in_which_each_text_is_as_alone(run, loaded):
    prompts = ["Once upon a time", "The dog", "Once upon a time there was a big"]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    options = ["--max-new-tokens", "8", "--stop", "the"]
    alone = [run("--prompt", prompt, *options)[1] for prompt in prompts]
    code, out, _ = run(*flags, *options)
    assert code == 0
    assert out == "".join(f"=== {n} of 3\n{text}" for n, text in enumerate(alone, 1))
    together = objects(run(*flags, *options, "--json")[1])
    assert [prompt + each["text"] + "\n"
            for prompt, each in zip(prompts, together, strict=True)] == alone


def test_a_batch_ends_once_every_text_has_ended(run, loaded):
    with tokens_read(loaded[1]) as widths:
        [first, second] = objects(run("--prompt", "a", "--prompt", "b", "--stop", "e", "--stop",
                                      "a", "--stop", "o", "--json")[1])
    assert first["finish_reason"] == second["finish_reason"] == "stop"
    assert len(widths) == max(len(first["tokens"]), len(second["tokens"])) < 100


def test_a_text_that_has_ended_does_not_grow_while_others_go_on(run, loaded):
    flags = ["--prompt", "Once upon a time", "--prompt", "The dog", "--max-new-tokens", "12",
             "--json"]
    first, second = (each["text"] for each in objects(run(*flags)[1]))
    stop = next(first[n:n + 4] for n in range(len(first)) if first[n:n + 4] not in second)
    stopped, whole = objects(run(*flags, "--stop", stop)[1])
    assert (stopped["text"], stopped["finish_reason"]) == (first[:first.index(stop)], "stop")
    assert whole["text"] == second and len(stopped["tokens"]) < 12 == len(whole["tokens"])
    assert len(stopped["logprobs"]) == len(stopped["tokens"])


def test_the_summary_counts_tokens_and_the_bytes_of_the_cache(run):
    """The cache has 2 (keys and values) · 6 layers · 2 heads · 32 features · 4 bytes a slot."""
    _, _, told = run("--prompt", "x", "--prompt", "Once upon a time", "--max-new-tokens", "99")
    read, written, cache, peak = re.search(
        r"\[(\d+) tokens read, .*; (\d+) written, .*cache ([\d.]+) MB, peak memory (\d+) MB\]\n$",
        told).groups()
    tokenizer = Tokenizer(TINY)
    longest = len(tokenizer.encode("Once upon a time"))
    assert int(read) == len(tokenizer.encode("x")) + longest and int(written) == 2 * 99
    assert float(cache) == round(2 * 2 * 6 * 2 * 32 * 4 * (99 + longest) / 1e6, 1)
    assert int(peak) > 50


def test_the_tokens_of_nothing_are_not_counted_as_read(run):
    code, out, told = run("--prompt", "Hello", "--max-new-tokens", "0")
    assert (code, out) == (0, "Hello\n") and told.startswith("[0 tokens read, 0 tokens/s; 0 writt")


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


def test_an_interruption_while_loading_prints_nothing(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "load", interrupt)
    assert run("--prompt", "x") == (130, "", "")


# ------------------------------------------------------------------ chat on the command line


def chat_ids(tokenizer, text, system=""):
    return tokenizer.encode_chat([{"role": "system", "content": system}] * bool(system)
                                 + [{"role": "user", "content": text}])


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_a_chat_with_a_prompt_answers_it_and_ends(run, embedded, system):
    tokenizer, model = embedded
    [new] = generate(model, [chat_ids(tokenizer, "Hello", system)], 6, eos_id=tokenizer.eos_id)
    options = ["--chat", "--max-new-tokens", "6", "--dtype", "float64", "--system", system]
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
    assert "/nothing: unknown; the commands are /system TEXT, /reset and /exit\n" in told
    assert told.count("\n") == 1 + 1 + 5


def test_a_conversation_draws_with_the_flags_given(run, loaded):
    tokenizer, model = loaded
    flags = ["--temperature", "1.4", "--top-p", "0.8", "--seed", "4", "--max-new-tokens", "12"]
    chat = Chat(model, tokenizer, temperature=1.4, top_p=0.8, seed=4)
    answers = [tokenizer.decode(list(chat.answer(text, 12))) for text in ("Hello", "And?")]
    assert run("--chat", *flags, stdin="Hello\nAnd?\n")[1] == "".join(a + "\n" for a in answers)
    stop = answers[0][4:7]
    out = run("--chat", *flags, "--stop", stop, stdin="Hello\n")[1]
    assert out == answers[0].split(stop)[0] + "\n"


def test_the_summaries_of_a_conversation_count_what_was_read(run, loaded):
    """The second message outgrows the cache, so the whole conversation is read again."""
    tokenizer, model = loaded
    texts = ["Hello", "Why " * 60, "Yes"]
    with tokens_read(model) as widths:
        _, _, told = run("--chat", "--max-new-tokens", "3", stdin="\n".join(texts))
    told = re.findall(r"\[(\d+) tokens read, .*; (\d+) written", told)
    assert [written for _, written in told] == ["3", "3", "3"]
    prompts = [width for width in widths if width > 1]
    assert [int(read) for read, _ in told] == prompts and prompts[1] > 60 > prompts[2]


def test_an_interrupted_answer_ends_and_the_conversation_goes_on(run, loaded):
    tokenizer, model = loaded
    with interruption(model, 4):
        code, out, told = run("--chat", "--max-new-tokens", "9", stdin="Hello\nAnd?\n")
    first = generate(model, [chat_ids(tokenizer, "Hello")], 3)[0]
    assert code == 0 and out.startswith(tokenizer.decode(first) + "\n") and out.count("\n") == 2
    assert "; 3 written" in told and "; 9 written" in told


def test_ctrl_c_at_the_prompt_of_a_terminal_asks_again(run, loaded, monkeypatch):
    lines, asked = iter([KeyboardInterrupt, "Hello", EOFError]), []

    def answer(prompt):
        asked.append(prompt)
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)
    code, out, _ = run("--chat", "--max-new-tokens", "2")
    assert code == 0 and asked == [""] * 3
    assert out.startswith("\n") and out.count("\n") == 2


def test_a_message_that_cannot_be_read_is_refused_and_the_conversation_goes_on(
        run, loaded):
    code, out, told = run("--chat", "--max-new-tokens", "2", stdin=b"\xff\nHello\n")
    assert code == 0 and out.count("\n") == 1
    assert re.search("^generate.py: .*lone surrogate", told, re.MULTILINE)


# ------------------------------------------------------------------ the process


def start(*args, **options):
    """Start a process that can be interrupted, even if the tests run in a shell's background."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *args], stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE, env=environment, **options,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def run_until_ctrl_c():
    """The exit code, the text before Ctrl-C and after it, and standard error."""
    process = start("--prompt", "Once upon a time", "--max-new-tokens", "1000000", "--temperature",
                    "1", "--seed", "0")
    out = [os.read(process.stdout.fileno(), 2**16)]
    while sum(map(len, out)) < 40:
        out.append(os.read(process.stdout.fileno(), 2**16))
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=600)
    return process.returncode, out, rest, told


@pytest.mark.beside(run=run_until_ctrl_c)
def test_ctrl_c_ends_a_running_process_with_the_text_so_far(beside):
    code, out, rest, told = beside
    assert len(out[0]) < 8192  # text is printed as it is drawn, not when a buffer of 8192 is full
    text = b"".join(out) + rest
    assert code == 130 and text.startswith(b"Once upon a time")
    assert text.endswith(b"\n") and told.count(b"\n") == 1 and b"written" in told


def run_with_a_reader_that_goes_away():
    """The exit code and standard error."""
    with start("--prompt", "Once", "--max-new-tokens", "1000000", "--temperature", "1") as process:
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        return process.wait(timeout=600), process.stderr.read()


@pytest.mark.beside(run=run_with_a_reader_that_goes_away)
def test_a_reader_that_goes_away_is_no_error(beside):
    assert beside == (0, b"")


def run_on_a_full_disk():
    """The exit code and standard error."""
    with open("/dev/full", "w") as full:
        process = start("--prompt", "a", "--max-new-tokens", "1", stdout=full)
    _, told = process.communicate(timeout=600)
    return process.returncode, told


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has this device")
@pytest.mark.beside(run=run_on_a_full_disk)
def test_a_full_disk_ends_in_one_line(beside):
    assert beside == (1, b"generate.py: standard output: No space left on device\n")


def converse_on_a_terminal():
    """The exit code, the prompt, the text and standard error; Ctrl-C ends the only answer."""
    import pty

    control, terminal = pty.openpty()
    process = start("--chat", "--temperature", "1", "--max-new-tokens", "1000000", "--seed", "0",
                    stdin=terminal)
    os.close(terminal)
    os.write(control, b"Tell me\n")
    prompt, first = os.read(process.stdout.fileno(), 2), os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    os.write(control, b"/exit\n")
    rest, told = process.communicate(timeout=600)
    os.close(control)
    return process.returncode, prompt, first + rest, told


@pytest.mark.skipif(os.name != "posix", reason="only Unix has such terminals")
@pytest.mark.beside(run=converse_on_a_terminal)
def test_ctrl_c_in_a_conversation_on_a_terminal_ends_the_answer_only(beside):
    code, prompt, text, told = beside
    assert (code, prompt) == (0, b"> ") and text
    assert b"Traceback" not in told and told.count(b"written") == 1


# ------------------------------------------------------------------ bad input


def test_the_help_names_every_flag_and_every_default(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    code, out, told = run("--help")
    entries = dict(re.findall(r"^  (?:-h, )?--([a-z-]+)(.*(?:\n {10}.*)*)", out, re.MULTILINE))
    defaults = {name.replace("_", "-"): value for name, value in vars(parse_arguments([])).items()}
    assert (code, told) == (0, "")
    assert entries.keys() == {"help", "prompt", "dtype", *defaults}
    assert {"model", "max-new-tokens", "temperature", "top-p", "seed", "stop", "json", "chat",
            "system", "device"} <= defaults.keys()
    for name, value in defaults.items():
        assert f"(default: {value})" in entries[name]
    assert "read from standard input" in entries["prompt"]
    assert "default: float32 for the embedded model, else that of the check" in entries["dtype"]


def one_line(told):
    return told.startswith("generate.py: ") and told.count("\n") == 1 and told.endswith("\n")


@pytest.mark.filterwarnings("error")  # a warning would be another line on standard error
@pytest.mark.parametrize("args, message", [
    (["--model", "/nowhere"], "/nowhere: no model*.safetensors there"),
    (["--model", "no\0name"], "null"),
    (["--model", "x" * 5000], "File name too long"),
    (["--temperature", "-1"], "temperature must be a finite number >= 0, got -1.0"),
    (["--temperature", "nan"], "temperature must be"),
    (["--temperature", "inf"], "temperature must be"),
    (["--top-p", "0"], "top_p must be greater than 0 and at most 1, got 0.0"),
    (["--top-p", "1.1"], "top_p must be"),
    (["--top-p", "nan"], "top_p must be"),
    (["--max-new-tokens", "-3"], "--max-new-tokens must be an integer >= 0 and < 2**63, got -3"),
    (["--seed", "-3"], "--seed must be"),
    (["--seed", str(2**63)], "--seed must be"),
    (["--stop", "x", "--stop", ""], "--stop needs a string that is not empty"),
    (["--device", "abacus"], "abacus"),
    (["--device", "meta"], "meta"),
    (["--device", "mkldnn"], "mkldnn"),
    (["--device", "hpu"], "hpu"),
    (["--device", "cpu\n"], "cpu"),
    (["--device", ""], "not usable here"),
    (["--prompt", "\udcff"], "lone surrogate")])
def test_bad_input_gets_one_line_and_exit_code_1(run, args, message):
    code, out, told = run(*args, *([] if "--prompt" in args else ["--prompt", "a"]))
    assert (code, out) == (1, "") and one_line(told) and message in told


@pytest.mark.parametrize("args, message", [
    (["--max-new-tokens", "many"], "argument --max-new-tokens: invalid int value: 'many'"),
    (["--max-new-tokens", "1.5"], "argument --max-new-tokens: invalid int value"),
    (["--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
    (["--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
    (["--system", "x"], "--system needs --chat"),
    (["--chat", "--json"], "--json with --chat needs --prompt"),
    (["--prompt"], "argument --prompt: expected one argument"),
    (["--temp", "1"], "unrecognized arguments: --temp 1"),
    (["--trace", "x"], "unrecognized arguments: --trace x"),
    (["--show-routing"], "unrecognized arguments: --show-routing")])
def test_bad_arguments_get_exit_code_2_and_their_reason_last(run, args, message):
    code, out, told = run(*args)
    assert (code, out) == (2, "") and "Traceback" not in told
    assert told.splitlines()[-1].startswith("generate.py: error: ")
    assert message in told.splitlines()[-1]


def test_standard_input_must_be_text(run):
    code, out, told = run(stdin=b"\xff\xfe")
    assert (code, out) == (1, "") and one_line(told)
    assert "standard input is not UTF-8 text" in told


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_a_closed_standard_stream_ends_in_one_line(monkeypatch, stream):
    """`<&-` and `>&-` close a stream in a shell; Python then sets it to None."""
    monkeypatch.setattr(sys, stream, None)
    with pytest.raises(SystemExit) as end:
        sys.exit(main(["--max-new-tokens", "1"]))
    assert one_line(f"{end.value.code}\n") and "must be open" in end.value.code


@pytest.mark.parametrize("temperature, top_p, message", [
    (-1, 1, "temperature must be"), (float("nan"), 1, "temperature"), (float("inf"), 1, "temper"),
    (1, 0, "top_p must be"), (1, 1.1, "top_p"), (1, float("nan"), "top_p")])
def test_impossible_settings_are_refused(model, temperature, top_p, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(3), temperature, top_p)
    with pytest.raises(ValueError, match=message):
        generate(model, [[1]], 0, temperature, top_p)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [
    [0.0, float("nan")], [0.0, float("inf")], [-float("inf"), -float("inf")],
    [[0.0, 1.0], [float("nan"), 0.0]]])
def test_logits_from_which_nothing_can_be_drawn_are_refused(logits, temperature):
    with pytest.raises(ValueError, match="logits"):
        sample(torch.tensor(logits), temperature)


@pytest.mark.parametrize("prompts, message", [
    ([[1], []], "has no tokens"), ([[37]], "0 … 36, got 37"), ([[-1]], "got -1"),
    ([[1.0]], "got 1.0"), ([[True]], "got True")])
def test_prompts_that_are_not_tokens_are_refused(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, 3)


@pytest.mark.parametrize("options", [
    {"max_new_tokens": -1}, {"max_new_tokens": 2.0}, {"max_new_tokens": 2, "seed": -1},
    {"max_new_tokens": 2, "seed": 2**63}, {"max_new_tokens": 2, "seed": 1.0}])
def test_counts_and_seeds_must_be_integers_from_0(model, options):
    with pytest.raises(ValueError, match="must be an integer >= 0"):
        generate(model, [[1]], **options)


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 2**14, "num_local_experts": 1, "num_experts_per_tok": 1},
    {"num_local_experts": 2**14}, {"num_hidden_layers": 2**20}, {"vocab_size": 2**70},
    {"num_hidden_layers": 10**9}, {"intermediate_size": 2**20, "hidden_size": 2**20}])
def test_a_damaged_size_is_refused_in_a_short_line_before_anything_is_built(
        run, tmp_path, small, changes):
    copy = with_config(small, tmp_path, **changes)
    begun = time.process_time()
    code, out, told = run("--model", copy, "--prompt", "x", "--max-new-tokens", "1")
    assert (code, out) == (1, "") and one_line(told) and len(told) < 2500
    assert time.process_time() - begun < 5


VALUES = [None, True, -1, 0, 1, 3, 2**10, 2**14, 2**20, 2**63, 2**70, 10**400, 0.5, 1e308, 1e-320,
          float("nan"), float("inf"), "", "x", "F64", "F32", "I32", "U32", "I64", "BF16", "F8_E4M3",
          "C64", [], [0], [1, -1], {}, {"rope_type": "yarn"}, {"rope_theta": "x"}]


def with_a_damaged_field(chance, fields):
    """The same JSON object with one of its fields replaced, removed or renamed."""
    name = chance.choice(list(fields))
    value, damage = fields[name], chance.random()
    if isinstance(value, dict) and value and damage < 0.8:
        return fields | {name: with_a_damaged_field(chance, value)}
    if isinstance(value, list) and value and damage < 0.8:
        at = chance.randrange(len(value))
        return fields | {name: [*value[:at], chance.choice(VALUES), *value[at + 1:]]}
    rest = {other: fields[other] for other in fields if other != name}
    if damage < 0.1:
        return rest
    if damage < 0.2:
        return rest | {chance.choice(["x", name.upper(), *rest]): value}
    return fields | {name: chance.choice(VALUES)}


def with_damaged_bytes(chance, data):
    """The same bytes with a few changed, a few missing, or cut short."""
    kind, data = chance.randrange(4), bytearray(data)
    if kind == 0:
        return bytes(data[:chance.randrange(len(data))])
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(max(1, len(data)))
        if kind == 1:
            del data[at:at + chance.randrange(1, 9)]
        else:
            data[at:at + 1] = bytes([chance.randrange(256)])
    return bytes(data)


def damage(chance, directory):
    """Damage one file of a checkpoint."""
    path = directory / chance.choice(["config.json", "model.safetensors", "model.safetensors",
                                      "tokenizer.model"])
    data, field = path.read_bytes(), chance.random() < 0.5
    if path.name == "model.safetensors":
        length = int.from_bytes(data[:8], "little")
        header, weights = data[8:8 + length], data[8 + length:]
        if field:
            header = json.dumps(with_a_damaged_field(chance, json.loads(header))).encode()
        else:
            header = with_damaged_bytes(chance, header)
        length = chance.choice([length, len(header), len(header), chance.randrange(2**64)])
        data = length.to_bytes(8, "little") + header + weights
    elif path.name == "config.json" and field:
        data = json.dumps(with_a_damaged_field(chance, json.loads(data))).encode()
    else:
        data = with_damaged_bytes(chance, data)
    path.write_bytes(data)


def random_flags(chance):
    """Flags that do not ask for standard input."""
    flags = ["--prompt", chance.choice(["Hello", "", "x\n y", "🦙"]),
             "--max-new-tokens", chance.randrange(4)]
    for more in (["--json"], ["--chat"], ["--dtype", chance.choice(list(DTYPES))], ["--seed", 3],
                 ["--temperature", 1], ["--top-p", 0.5], ["--stop", "a"], ["--prompt", "two"]):
        flags += more if chance.random() < 0.35 else []
    return flags


CASES = int(os.environ.get("FUZZ_CASES", 100))


def test_a_damaged_checkpoint_runs_or_is_refused_in_one_line_within_5_seconds(
        run, tmp_path, small, small_int4):
    for seed in range(CASES):
        chance, source = random.Random(seed), small_int4 if seed % 3 == 0 else small
        copy = shutil.copytree(source, tmp_path / str(seed))
        damage(chance, copy)
        flags = random_flags(chance)
        begun = time.process_time()
        code, out, told = run("--model", copy, *flags)
        case = f"seed {seed}, flags {flags}, exit code {code}, stderr {told[:500]!r}"
        assert time.process_time() - begun < 5, case
        if code == 0:
            assert out and all(line.startswith("[") for line in told.splitlines()), case
        else:
            assert code == 1 and one_line(told) and len(told) < 2500, case
        shutil.rmtree(copy)
