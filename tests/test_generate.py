"""Claims about generate.py: the sampler against theory, rows against themselves alone, the CLI."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import mixtral
from generate import (
    COLOURS,
    Answer,
    Chat,
    available,
    axes,
    generate,
    main,
    roomy,
    routing,
    routing_text,
    sample,
    save_file,
    steps,
    stream,
    watching,
    write_trace,
)
from mixtral import Mixtral, MixtralConfig
from tokenizer import Tokenizer

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


def traced(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}


def test_a_trace_names_every_quantity_in_the_order_of_computation(model, tmp_path):
    path = tmp_path / "trace"
    assert write_trace(model, [1, 5, 9, 2], path, scores=True) == len(traced(path)[1])
    metadata, tensors = traced(path)
    assert (metadata["format"], metadata["version"]) == ("mixtral-trace", "1")
    assert metadata["dtype"] == "float64"
    assert MixtralConfig(**json.loads(metadata["config"])) == model.config
    order = json.loads(metadata["order"])
    assert [name for name, *_ in order[:2]] == ["tokens", "model.embed_tokens"]
    assert order[-1][0] == "lm_head" and {name for name, *_ in order} == set(tensors)
    assert tensors["tokens"].tolist() == [[1, 5, 9, 2]]
    c = model.config
    size = {"B": 1, "S": 4, "T": 4, "N": 4, "V": c.vocab_size, "D": c.hidden_size, "d": c.head_dim,
            "H": c.num_attention_heads, "K": c.num_key_value_heads, "E": c.num_local_experts,
            "k": c.num_experts_per_tok, "F": c.intermediate_size}
    size |= {"H·d": size["H"] * size["d"], "K·d": size["K"] * size["d"]}
    for name, letters, shape in order:
        assert list(tensors[name].shape) == shape
        assert [size.get(letter, n) for letter, n in zip(letters, shape, strict=True)] == shape
        assert tensors[name].dtype == (
            torch.int64 if name.endswith(("tokens", "chosen")) and "embed" not in name
            else torch.float64)


def test_watching_changes_no_bit_and_ends_with_its_block(model):
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.inference_mode():
        before = model(tokens)
        with watching(model, scores=True) as seen:
            during = model(tokens)
        count = len(seen)
        assert torch.equal(before, during) and torch.equal(model(tokens), before)
    assert torch.equal(seen["lm_head"][0], before)
    assert len(seen) == count and mixtral.watch is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_trace_of_some_layers_holds_those_alone(model, tmp_path):
    write_trace(model, [1, 2, 3], tmp_path / "trace", layers=[1])
    _, tensors = traced(tmp_path / "trace")
    assert "model.layers.1" in tensors and "lm_head" in tensors
    assert not any(name.startswith("model.layers.0") or "scores" in name for name in tensors)


def test_margin_and_expert_rows_follow_from_the_router(model, tmp_path):
    write_trace(model, [7, 8, 9, 10, 11], tmp_path / "trace")
    _, seen = traced(tmp_path / "trace")
    for at in (f"model.layers.{n}.block_sparse_moe." for n in range(2)):
        best = seen[at + "gate"].sort(descending=True)[0]
        assert torch.equal(seen[at + "margin"], best[:, 1] - best[:, 2])
        y = torch.zeros(5, 24, dtype=torch.float64)
        for e in range(8):
            if f"{at}experts.{e}.tokens" in seen:
                for n, row in zip(seen[f"{at}experts.{e}.tokens"].tolist(),
                                  seen[f"{at}experts.{e}.w2"], strict=True):
                    [slot] = (seen[at + "chosen"][n] == e).nonzero()[:, 0].tolist()
                    y[n] += row * seen[at + "weights"][n, slot]
        assert (y - seen[at.removesuffix(".")][0]).abs().max() < 1e-13


def test_every_name_of_a_trace_has_axes_and_an_unknown_one_is_an_error():
    assert axes("model.layers.3") == ["B", "S", "D"] and axes("x.experts.0.w1") == ["visits", "F"]
    with pytest.raises(KeyError):
        axes("model.layers.3.unheard_of")


def test_the_command_writes_a_trace_and_generates_nothing(tmp_path, capsys):
    path = tmp_path / "trace.safetensors"
    assert main(["--prompt", "Once upon", "--trace", str(path), "--trace-layers", "0,5",
                 "--trace-scores", "--dtype", "float64"]) == 0
    told = capsys.readouterr()
    metadata, tensors = traced(path)
    assert told.out == "" and f"[{len(tensors)} tensors of 3 tokens in {path}]" in told.err
    assert "model.layers.5.self_attn.scores" in tensors and "model.layers.4" not in tensors
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("options, words", [
    (["--trace-layers", "0,6"], "layers are 0 … 5, got 6"),
    (["--trace", "absent/trace"], "absent/trace: not written")])
def test_a_trace_that_cannot_be_is_refused_in_one_line(options, words, tmp_path, capsys):
    assert main(["--prompt", "x", "--trace", str(tmp_path / "t"), *options]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not os.listdir(tmp_path)


def test_saving_is_all_or_nothing_and_heeds_the_umask(tmp_path):
    save_file({"a": torch.arange(3)}, tmp_path / "a")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "held").touch()
    with pytest.raises(ValueError, match="not written"):
        save_file({"a": torch.arange(3)}, tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_a_link_is_written_through_and_a_pipe_or_directory_is_left_as_it_is(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    save_file({"a": torch.arange(3)}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").stat().st_size
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "file/x"):
        with pytest.raises(ValueError, match="not written"):
            save_file({"a": torch.arange(3)}, tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux alone")
def test_output_that_cannot_be_written_ends_in_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "generate.py", "--prompt", "a",
                               "--max-new-tokens", "1"], stdout=full, stderr=subprocess.PIPE,
                              text=True)
    assert done.returncode == 1
    assert done.stderr == "generate.py: standard output: No space left on device\n"


def ended(args, capsys):
    """Exit code and output of a command line, run in this process."""
    try:
        code = main(args)
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr()


@pytest.fixture(scope="module")
def embedded():
    return Tokenizer(TINY), Mixtral.from_pretrained(TINY, torch.float32)


def said(tokenizer, text, stops):
    """The text that an Answer prints when fed a text's tokens, and the Answer."""
    answer = Answer(tokenizer, [tokenizer.bos_id], stops)
    printed = ""
    for token in tokenizer.encode(text, bos=False):
        if not answer.ended:
            printed += answer.feed(token)
    return printed + answer.flush(), answer


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab\n é", max_size=30), stop=st.text("ab\n é", min_size=1, max_size=5))
def test_a_text_ends_before_its_stop_string_wherever_tokens_are_cut(embedded, text, stop):
    printed, answer = said(embedded[0], text, [stop])
    assert printed == answer.text == text.split(stop)[0]
    assert answer.finish == ("stop" if stop in text else "length")


def test_of_several_stop_strings_the_first_to_be_whole_ends_the_text(embedded):
    assert said(embedded[0], "one two three", ["three", "two t", "twice"])[0] == "one "
    assert said(embedded[0], "one two three", ["two", "e t"])[0] == "on"
    assert said(embedded[0], "one two three", ["threes", "tw0"])[0] == "one two three"


def test_no_text_is_printed_that_a_stop_string_might_take_back(embedded):
    answer = Answer(embedded[0], [embedded[0].bos_id], ["abc"])
    tokens = [embedded[0].byte_ids[ord(c)] for c in "xab"]
    assert "".join(map(answer.feed, tokens)) == "x" and answer.flush() == "ab"


def test_log_probabilities_are_those_of_a_full_pass_before_temperature(model):
    rows = list(steps(model, [[1, 2, 3]], 12, 0.7, 0.8, [4], logprobs=True))
    tokens, logprobs = zip(*(row for [row] in rows), strict=True)
    with torch.inference_mode():
        whole = model(torch.tensor([[1, 2, 3, *tokens]]))[0, 2:-1].log_softmax(-1)
    wanted = whole[torch.arange(12), torch.tensor(tokens)]
    assert torch.allclose(torch.tensor(logprobs, dtype=torch.float64), wanted, rtol=0, atol=1e-12)


def test_samples_share_one_prefill_and_are_what_each_seed_gives_alone(model):
    widths = []
    hook = model.model.register_forward_pre_hook(lambda m, args: widths.append(args[0].shape))
    together = list(steps(model, [[1, 2, 3]], 20, 1.0, 0.9, [7, 8, 9]))
    hook.remove()
    assert widths[0] == (1, 3) and set(widths[1:]) == {(3, 1)}
    for n, seed in enumerate((7, 8, 9)):
        [alone] = generate(model, [[1, 2, 3]], 20, 1.0, 0.9, seed)
        assert [step[n][0] for step in together] == alone


def chatting(embedded, new=12, **options):
    """A chat of the embedded model which counts the tokens that it reads."""
    tokenizer, model = embedded
    widths = []
    hook = model.model.register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
    chat = Chat(model, tokenizer, **options)

    def ask(text):
        widths.clear()
        tokens = list(chat.answer(text, new))
        return tokens, sum(widths) - len(tokens) + 1

    return chat, ask, hook


def test_a_turn_reads_only_what_is_new_and_answers_as_if_it_read_all(embedded):
    tokenizer, model = embedded
    chat, ask, hook = chatting(embedded, system="Be kind.")
    texts = ["Who are you?", "Why " * 300, "</s> [INST] <s>", "And then?"]
    for n, text in enumerate(texts):
        known = len(chat.read)
        asked = [*chat.messages, {"role": "user", "content": text}]
        ids = tokenizer.encode_chat(asked)
        tokens, read = ask(text)
        assert read == len(ids) - known and (n == 0 or known > 0)
        assert [tokens] == generate(model, [ids], 12, eos_id=tokenizer.eos_id)
    hook.remove()
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 4]


def test_an_answer_given_up_halfway_is_what_was_said(embedded):
    tokenizer, model = embedded
    chat, ask, hook = chatting(embedded)
    tokens = chat.answer("Tell me", 50)
    half = [next(tokens) for _ in range(5)]
    chat.cache.lengths += 1  # as a step leaves them that is cut before its token is drawn
    chat.cache.fed += 1
    tokens.close()
    assert chat.messages[-1] == {"role": "assistant", "content": half}
    assert chat.cache.fed == chat.cache.lengths.item() == len(chat.read)
    ids = tokenizer.encode_chat([*chat.messages, {"role": "user", "content": "More"}])
    assert [ask("More")[0]] == generate(model, [ids], 12, eos_id=tokenizer.eos_id)
    hook.remove()


def test_a_chat_that_was_not_answered_at_all_is_as_it_was(embedded):
    chat, _, hook = chatting(embedded)
    hook.remove()
    with pytest.raises(ValueError, match="lone surrogate"):
        next(chat.answer("\ud800", 5))
    tokens = chat.answer("x", 0)
    assert list(tokens) == [] and chat.messages == [] and chat.read == []


def test_the_window_wraps_under_a_chat_as_under_one_pass(model, embedded):
    """A cache that has wrapped, or has grown, is continued exactly."""
    cache, tokens, all_ids = None, [1, 2, 3], []
    for n in (5, 400, 30, 900):
        cache = roomy(model, cache, len(all_ids) + len(tokens) + n)
        new = list(stream(model, tokens, n, cache=cache))
        all_ids, tokens = all_ids + tokens + new[:-1], [new[-1], 7, 9]
        [alone] = generate(model, [all_ids + tokens], 3)
        again = dataclasses.replace(cache, keys=cache.keys.clone(), values=cache.values.clone(),
                                    lengths=cache.lengths.clone())
        again = roomy(model, again, len(all_ids) + 6)
        assert list(stream(model, tokens, 3, cache=again)) == alone


def objects(text):
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_json_is_one_object_a_line_whatever_the_text(tmp_path, capsys):
    texts = ["Once \"upon\" \\ a\ttime", "🦙\u2028é\u0007", "<b>", ""]
    file = tmp_path / "prompts"
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    assert main(["--prompts", str(file), "--json", "--logprobs", "--max-new-tokens", "9",
                 "--temperature", "1.5", "--seed", "1"]) == 0
    found = objects(capsys.readouterr().out)
    assert [x["prompt"] for x in found] == texts and [x["index"] for x in found] == [0, 1, 2, 3]
    for x in found:
        assert set(x) == {"index", "sample", "prompt", "text", "tokens", "logprobs",
                          "finish_reason", "timings"}
        assert len(x["tokens"]) == len(x["logprobs"]) <= 9 and max(x["logprobs"]) <= 0
        assert x["finish_reason"] in ("length", "eos") and x["timings"]["prefill_seconds"] > 0


def test_a_batch_gives_each_prompt_what_it_gets_alone(tmp_path, capsys):
    file = tmp_path / "prompts"
    file.write_text("Once upon a time\r\nThe dog", encoding="utf-8")
    options = ["--max-new-tokens", "8", "--stop", "the", "--json"]
    assert main(["--prompts", str(file), *options]) == 0
    together = [x["text"] for x in objects(capsys.readouterr().out)]
    for text, alone in zip(("Once upon a time", "The dog"), together, strict=True):
        assert main(["--prompt", text, *options]) == 0
        assert objects(capsys.readouterr().out)[0]["text"] == alone
    assert main(["--prompts", str(file), "--max-new-tokens", "8", "--stop", "the"]) == 0
    one, two = together
    assert capsys.readouterr().out == (
        f"=== 1 of 2\nOnce upon a time{one}\n=== 2 of 2\nThe dog{two}\n")


def test_samples_differ_by_seed_and_say_why_they_ended(capsys):
    options = ["--prompt", "One day", "--temperature", "1", "--max-new-tokens", "12", "--json"]
    assert main([*options, "--seed", "5", "--num-samples", "3"]) == 0
    found = objects(capsys.readouterr().out)
    assert [x["sample"] for x in found] == [0, 1, 2] and len({x["text"] for x in found}) == 3
    assert main([*options, "--seed", "7"]) == 0
    [alone] = objects(capsys.readouterr().out)
    assert alone["tokens"] == found[2]["tokens"] and alone["logprobs"] is None
    assert main([*options, "--seed", "7", "--stop", alone["text"][3:6]]) == 0
    [stopped] = objects(capsys.readouterr().out)
    assert stopped["finish_reason"] == "stop" and alone["text"].startswith(stopped["text"])
    assert len(stopped["text"]) <= 3 < len(alone["text"])


def test_logprobs_in_text_are_a_token_a_line(capsys):
    assert main(["--prompt", "Once", "--logprobs", "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line in lines:
        logprob, token, piece = line.split(maxsplit=2)
        assert float(logprob) <= 0 and int(token) > 0 and isinstance(json.loads(piece), str)


@pytest.mark.parametrize("args, message", [
    (["--num-samples", "0"], "--num-samples must be at least 1"),
    (["--stop", ""], "--stop: wanted a string that is not empty"),
    (["--show-routing", "6"], "--show-routing: layers are 0 … 5, got 6"),
    (["--show-routing", "--json"], "--json does not go with --show-routing"),
    (["--trace", "x", "--chat"], "--trace does not go with --chat"),
    (["--trace-layers", "1"], "--trace-layers goes with --trace alone"),
    (["--trace-scores"], "--trace-scores goes with --trace alone"),
    (["--system", "x"], "--system goes with --chat alone"),
    (["--device", "meta"], "--device meta: not usable here"),
    (["--num-samples", "9" * 12], "9" * 12 + " × 3 tokens need"),
    (["--num-samples", "2", "--routing-html", "x"], "does not go with --routing-html"),
    (["--routing-html", "/nowhere/x"], "/nowhere/x: not written")])
def test_flags_that_cannot_be_meant_are_refused(args, message, capsys):
    code, told = ended(["--prompt", "a", "--max-new-tokens", "1", *args], capsys)
    assert code in (1, 2) and message in told.err and told.err.count("\n") == 1


@pytest.mark.parametrize("content, message", [
    (b"", "no prompt in it"), (b"\xff", "is not UTF-8"), (None, "not readable")])
def test_a_file_of_prompts_must_hold_some(tmp_path, capsys, content, message):
    file = tmp_path / "prompts"
    if content is not None:
        file.write_bytes(content)
    assert main(["--prompts", str(file)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_model_that_does_not_fit_is_said_before_it_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("generate.available", lambda device: 30_000_000)
    monkeypatch.setattr(Mixtral, "from_pretrained", None)  # a load would raise TypeError
    assert main(["--prompt", "x", "--dtype", "float64"]) == 1
    error = capsys.readouterr().err
    assert "0.1 GB of weights, 0.0 GB of memory free on cpu" in error and error.count("\n") == 1


def test_a_mapped_model_larger_than_memory_is_warned_of_and_runs(monkeypatch, capsys, tmp_path):
    shutil.copytree(TINY, tmp_path / "m")
    monkeypatch.setattr("generate.available", lambda device: 1_000_000)
    assert main(["--prompt", "x", "--model", str(tmp_path / "m"), "--max-new-tokens", "1"]) == 0
    assert "they stay on disk and are read again" in capsys.readouterr().err


def test_this_machine_tells_its_memory():
    assert available("cpu") is None or 10**8 < available("cpu") < 10**14


def test_a_terminal_sees_the_weights_being_loaded(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["--prompt", "x", "--max-new-tokens", "1"]) == 0
    error = capsys.readouterr().err
    assert "0.02 of 0.02 GB" in error and "\r\x1b[K[" in error


def test_the_summary_tells_memory_and_the_size_of_the_cache(capsys):
    """2 · 6 layers · 2 heads · 32 features · 4 bytes · 102 positions."""
    assert main(["--prompt", "x", "--max-new-tokens", "99"]) == 0
    cache, peak = re.search(r"cache ([\d.]+) MB, peak memory (\d+) MB",
                            capsys.readouterr().err).groups()
    assert float(cache) == round(2 * 6 * 2 * 32 * 4 * (99 + 2) / 1e6, 1) and int(peak) > 50


def test_routing_is_what_a_trace_of_the_text_holds(embedded):
    tokenizer, model = embedded
    tokens = tokenizer.encode("Once upon a time there was a 🦙. " * 20)
    weights, experts, margins = routing(model, tokens)
    with torch.inference_mode(), watching(model) as seen:
        model(torch.tensor([tokens]))
    for n in range(6):
        at = f"model.layers.{n}.block_sparse_moe."
        assert torch.equal(experts[n], seen[at + "chosen"][0])
        assert torch.allclose(weights[n], seen[at + "weights"][0], atol=1e-4)
        assert torch.allclose(margins[n], seen[at + "margin"][0], atol=1e-3)


def test_routing_on_a_terminal_is_coloured_and_elsewhere_numbered(embedded, monkeypatch, capsys):
    tokenizer, model = embedded
    tokens = tokenizer.encode("Once upon\na time 🦙")
    _, experts, _ = routing(model, tokens)
    coloured, plain = (routing_text(tokenizer, tokens, experts[2], c) for c in (True, False))
    first = experts[2, :, 0].tolist()
    assert [int(d) for d in re.findall("[₀-₉]", plain)
            for d in [ord(d) - 0x2080]] == first
    assert re.sub("\x1b[^m]*m", "", coloured).split("\n\n")[0] == "<s>Once upon\na time 🦙"
    assert re.sub("[₀-₉]", "", plain).split("\n\n")[0] == "<s>Once upon\na time 🦙"
    assert f"48;5;{COLOURS[first[1]]}mOnce" in coloured
    options = ["--prompt", "One", "--max-new-tokens", "3", "--show-routing", "1"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for variable, wanted in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", variable)
        assert main(options) == 0
        assert ("\x1b[" in capsys.readouterr().out) == wanted


def test_the_page_of_a_run_is_written_whole_beside_its_text(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["--prompt", "Once </script>", "--max-new-tokens", "5", "--routing-html",
                 str(page)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("Once </script>") and f"in {page}]" in told.err
    text = page.read_text(encoding="utf-8")
    data = json.loads(re.search('id="data" type="application/json">(.*?)</script>', text)[1])
    assert data["window"] == 128 and len(data["chosen"]) == 6 and data["experts"] == 8
    assert "".join(data["tokens"]) == "<s>" + told.out.rstrip("\n")
    assert os.listdir(tmp_path) == [page.name]


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


def test_seeded_draws_on_the_command_line_repeat(capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["--prompt", "One day", "--temperature", "0.8", "--top-p", "0.9",
                     "--max-new-tokens", "8", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
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
    (["--prompt", "\udcff"], "lone surrogate"),
    (["--max-new-tokens", "many"], "invalid int value: 'many'"),
    (["--dtype", "int3"], "invalid choice: 'int3'"),
    (["--colour"], "unrecognized arguments: --colour")])
def test_bad_input_gets_one_line_and_a_non_zero_exit(args, message, capsys):
    code, told = ended([*args, *([] if "--prompt" in args else ["--prompt", "a"])], capsys)
    assert code in (1, 2) and told.out == ""
    assert told.err.startswith("generate.py: ") and told.err.count("\n") == 1
    assert message in told.err


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


def test_a_conversation_on_standard_input(tmp_path):
    done = cli("--chat", "--max-new-tokens", "6", "--system", "Be kind.",
               text="Hello\n\n/nothing\n/reset\nHello\n/system Be rude.\nHello\n/exit\nnever\n")
    first, again, rude = done.stdout.splitlines()
    assert done.returncode == 0 and first == again and "Traceback" not in done.stderr
    assert "/nothing: no such command" in done.stderr
    read = [int(n) for n in re.findall(r"\[(\d+) tokens read", done.stderr)]
    assert len(read) == 3 and read[0] == read[1]
    assert cli("--chat", text="").returncode == 0


def test_one_answer_and_out(capsys):
    assert main(["--chat", "--prompt", "Hello", "--max-new-tokens", "6"]) == 0
    told = capsys.readouterr()
    done = cli("--chat", "--max-new-tokens", "6", text="Hello\n")
    assert told.out == done.stdout


def test_interrupting_an_answer_does_not_end_the_chat():
    process = subprocess.Popen(
        [sys.executable, ROOT / "generate.py", "--chat", "--temperature", "1", "--max-new-tokens",
         "100000", "--seed", "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    process.stdin.write(b"Tell me\n")
    process.stdin.flush()
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(b"/exit\n", timeout=60)
    assert process.returncode == 0 and first + rest and b"Traceback" not in errors
    assert b"written" in errors


def test_a_head_that_closes_the_pipe_is_silent():
    done = subprocess.run(
        f"{sys.executable} {ROOT / 'generate.py'} --prompt 'One day' --json --num-samples 40 "
        "--max-new-tokens 3 --temperature 1 | head -1", shell=True, capture_output=True,
        text=True, timeout=120)
    assert len(objects(done.stdout)) == 1 and "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


def test_every_flag_is_in_the_help():
    text = cli("--help").stdout
    for name in ("chat", "system", "stop", "num-samples", "logprobs", "json", "prompts",
                 "show-routing", "routing-html", "trace", "trace-layers", "trace-scores"):
        assert f"--{name}" in text
