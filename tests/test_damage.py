"""Claims about damaged checkpoints: a program works or says in one line what is wrong."""

import json
import random
import shutil
import time

import damage
import pytest
import reference
import sentencepiece
import torch
from conftest import random_model, save
from layouts import LAYOUTS, huggingface_sharded
from safetensors.torch import load_file

import convert
import generate
from mixtral import Mixtral, MixtralConfig
from tokenizer import Tokenizer


def small_model():
    """A model for the embedded tokenizer, whose weights can be stored in 4 bits."""
    return random_model(dtype=torch.float32, vocab_size=2048, hidden_size=32, intermediate_size=32,
                        num_hidden_layers=1, num_local_experts=2)


def with_tokenizer(directory):
    shutil.copy(generate.TINY / "tokenizer.model", directory)
    return directory


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Directories with one file, with two, and, unless fast/ is missing, with 4-bit weights."""
    place, model = tmp_path_factory.mktemp("sources"), small_model()
    whole = with_tokenizer(save(model, place / "whole"))
    code = convert.main(["--input_dir", str(whole), "--output_dir", str(place / "int4"),
                         "--dtype", "int4", "--group-size", "32"])
    shards = with_tokenizer(huggingface_sharded(model, place / "shards"))
    return [whole, shards, *[place / "int4"] * (code == 0)]


def run(program, arguments, capfd, seed):
    """The exit code: 0, or 1 with one line about the error. Nothing may take over 5 seconds."""
    start = time.process_time()
    code = program.main([*map(str, arguments)])
    assert time.process_time() - start < 5, seed
    told = [line for line in capfd.readouterr().err.split("\n")[:-1] if not line.startswith("[")]
    assert code in (0, 1) and len(told) == code, (seed, told)
    assert all(line.startswith(f"{program.__name__}.py: ") and line.isprintable()
               for line in told), (seed, told)
    return code


def test_generate_runs_or_refuses_a_damaged_checkpoint_in_one_line(sources, tmp_path, capfd):
    codes = []
    for seed in range(150):
        r = random.Random(seed)
        model = damage.damaged_copy(sources[seed % len(sources)], tmp_path / "model", r)
        options = r.choice([[], ["--json"], ["--chat"], ["--dtype", "bfloat16"],
                            ["--temperature", "1", "--seed", "3", "--prompt", "two"]])
        codes.append(run(generate, ["--model", model, "--prompt", "Hello", "--max-new-tokens", "2",
                                    *options], capfd, seed))
    assert 20 < sum(codes) < 130


@pytest.mark.parametrize("write", [*LAYOUTS, "int4"])
def test_convert_works_or_refuses_a_damaged_checkpoint_in_one_line_and_leaves_nothing_unfinished(
        write, sources, tmp_path, capfd):
    source = sources[-1] if write == "int4" else with_tokenizer(
        write(small_model(), tmp_path / "whole"))
    for seed in range(15):
        r = random.Random(seed)
        raw, out = damage.damaged_copy(source, tmp_path / "raw", r), tmp_path / "out"
        options = r.choice([[], [], ["--dtype", "float16"], ["--to", "mistral"]])
        code = run(convert, ["--input_dir", raw, "--output_dir", out, *options], capfd, seed)
        assert (code == 0) == out.exists(), seed
        shutil.rmtree(out, ignore_errors=True)
        assert {path.name for path in tmp_path.iterdir()} <= {"whole", "raw"}, seed


def test_a_damaged_config_or_header_is_refused_or_gives_the_logits_that_it_describes(tmp_path):
    source, tokens, right = save(random_model(), tmp_path / "whole"), [1, 5, 3, 5, 0, 2, 2], 0
    for seed in range(200):
        model = damage.damaged_copy(source, tmp_path / "model", random.Random(seed), True)
        try:
            logits = Mixtral.from_pretrained(model)(torch.tensor([tokens]))
        except Exception:  # generate.py prints it in one line, as the first test shows
            continue
        fields = vars(MixtralConfig()) | json.loads((model / "config.json").read_text())
        weights = {name: weight.tolist()
                   for name, weight in load_file(model / "model.safetensors").items()}
        wanted = torch.tensor(reference.logits(fields, weights, tokens), dtype=torch.float64)
        assert (logits - wanted).abs().max() < 1e-10 * wanted.abs().max(), seed
        right += 1
    assert 10 < right < 150


def test_a_damaged_tokenizer_is_refused_or_has_the_ids_of_sentencepiece(tmp_path):
    path, works = tmp_path / "tokenizer.model", 0
    for seed in range(500):
        damage.change_bytes(with_tokenizer(tmp_path) / path.name, random.Random(seed))
        try:
            ours = Tokenizer(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and str(error).isprintable(), seed
            continue
        theirs, works = sentencepiece.SentencePieceProcessor(model_file=str(path)), works + 1
        text = "  Once upon a time,\tthere was a 🦙. ▁ </s>" + "".join(ours.pieces[-200:])
        assert ours.encode(text, bos=False) == theirs.encode(text), seed
        assert ours.decode(range(2000)) == theirs.decode([*range(2000)]), seed
    assert 20 < works < 250
