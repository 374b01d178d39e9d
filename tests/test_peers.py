"""The same numbers as Hugging Face transformers. Skipped where it is not installed."""

from pathlib import Path

import pytest
import torch
import vocabularies
from vocabularies import BASE, CHATML, CONTROL, UNKNOWN

from generate import generate
from mixtral import Mixtral
from tokenizer import SPACE, Tokenizer

transformers = pytest.importorskip("transformers")
TINY = Path(__file__).resolve().parent.parent / "tiny"
TEXT = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))


def load_peer(directory, **options):
    """The model of transformers. Its default for the experts, grouped_mm, refuses float64."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", **options).eval()


@pytest.fixture(params=[None, 5], ids=["no window", "window 5"])
def directory(tmp_path, request):
    """A random checkpoint that transformers has made and saved."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, rope_theta=1e4,
        sliding_window=request.param, initializer_range=0.3)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_agree_with_transformers(directory, dtype):
    """The tolerance is for float32, in which transformers computes norms, rotation and softmax."""
    with torch.inference_mode():
        ours = Mixtral.from_pretrained(directory, dtype)(TEXT)
        assert ours.dtype == dtype
        assert (ours - load_peer(directory, dtype=dtype)(TEXT).logits).abs().max() < 1e-4


def test_rows_of_a_ragged_batch_agree_with_transformers_through_a_cache(directory):
    model, peer = Mixtral.from_pretrained(directory), load_peer(directory, dtype=torch.float32)
    cache, lengths = model.new_cache(2, 24, chunk=4), torch.tensor([24, 9])
    with torch.inference_mode():
        ours = model(TEXT, cache, lengths)
        for row, length in enumerate(lengths.tolist()):
            wanted = peer(TEXT[row:row + 1, :length]).logits[0]
            assert (ours[row, :length] - wanted).abs().max() < 1e-4


def test_greedy_tokens_are_those_of_transformers(directory):
    peer, prompts = load_peer(directory, dtype=torch.float32), [TEXT[0, :6], TEXT[1, :11]]
    wanted = [peer.generate(prompt[None], max_new_tokens=30, do_sample=False, eos_token_id=None,
                            pad_token_id=0)[0, len(prompt):].tolist() for prompt in prompts]
    ours = generate(Mixtral.from_pretrained(directory), [p.tolist() for p in prompts], 30)
    assert ours == wanted


def test_the_embedded_checkpoint_loads_in_transformers_and_gives_the_same_logits():
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = torch.randint(3, 2048, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = Mixtral.from_pretrained(TINY, torch.float32)(text)
        assert (ours - model.eval()(text).logits).abs().max() < 1e-4


# ------------------------------------------------------------------ tokenizers


def added_tokens(size):
    """Tokens as tools add them: ordinary ones and the marks of ChatML, of which one is special."""
    plain = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    return [{"id": size + n, "content": text, "special": special} | plain | more
            for n, (text, special, more) in enumerate([
                ("<x>", False, {}), ("<x>>", False, {}), ("[norm al]", False, {"normalized": True}),
                ("<|im_end|>", True, {}), ("<|im_start|>", False, {})])]


@pytest.mark.parametrize("form", vocabularies.FORMS)
def test_tokenizer_json_gives_the_ids_of_the_tokenizers_library(tmp_path, form):
    """Except that no text becomes a control piece or an added token; such texts are left out."""
    library = pytest.importorskip("tokenizers")
    for seed in range(20):
        pieces = vocabularies.vocabulary(seed, extended=seed % 4)
        raw = vocabularies.tokenizer_json(pieces, form, seed % 2, added_tokens(len(pieces))[:3])
        ours = Tokenizer(vocabularies.write(tmp_path, tokenizer=raw))
        theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text in vocabularies.texts_of(pieces, seed, 500):
            if not any(name in text for name in ["<unk>", *ours.control_ids]):
                wanted = theirs.encode(text, add_special_tokens=False).ids
                assert ours.encode(text, bos=False) == wanted, (seed, text)


LETTERS = [(text, -99.0 - n, 1) for n, text in enumerate([SPACE, *"abcdehstuy .\n"])]
PIECES = [*BASE, *((text, -float(n), 1) for n, text in enumerate(
    ["us", SPACE + "a", "as", "st", SPACE + "us", SPACE + "as", "\n\n", "th", "bc"])), *LETTERS]
IM = "'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
TEMPLATES = {
    "plain": CHATML, "with BOS": "{{ bos_token }}" + CHATML,
    "stripped": CHATML.replace("message['content']", "message['content'] | trim"),
    "system text stripped on the left": CHATML.replace("message['content']", "(message['content']."
        "lstrip() if message['role'] == 'system' else message['content'])"),
    "no newline": CHATML.replace(" + '\n'}}{% endfor", "}}{% endfor"),
    "default system": CHATML.replace(
        "{{'<|im", "{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a cat.<|im_end|>\n' }}{% endif %}{{'<|im", 1),
    "one way for each role": "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{'<|im_start|>human\n' + m['content'] + '<|im_end|>\n'}}{% elif m['role'] == 'system' %}"
        "{{'<|im_start|>system\n' + m['content'] + '<|im_end|>\n'}}{% else %}"
        "{{'<|im_start|>gpt\n' + m['content'] + '<|im_end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>gpt\n' }}{% endif %}",
    "by role": """{%- for message in messages %}
    {%- if message.role in ['system', 'user', 'assistant'] %}
        {{- '<|im_start|>' ~ message.role }}
{{ message.content + '<|im_end|>' }}
    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""}
TEXTS = ["a", "", " the bus ", "a\n\nb", "\ny", "stay  as a {{ bus }}", "é🦙"]


@pytest.mark.parametrize("form", vocabularies.FORMS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("settings", [{}, {"legacy": False, "tokenizer_class": "LlamaTokenizer"}])
def test_encode_chat_in_chatml_equals_apply_chat_template(tmp_path, form, template, settings):
    tokens = added_tokens(len(PIECES))
    vocabularies.write(
        tmp_path, tokenizer=vocabularies.tokenizer_json(PIECES, form, added=tokens),
        config={"model_type": "mixtral"},
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                          "eos_token": "<|im_end|>", "unk_token": "<unk>",
                          "chat_template": TEMPLATES[template]} | settings)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    for n, text in enumerate(TEXTS):
        for system in (None, text):
            for turns in (1, 3, 5):
                messages = [] if system is None else [{"role": "system", "content": system}]
                messages += [{"role": ("user", "assistant")[k % 2],
                              "content": TEXTS[(n + k) % len(TEXTS)]} for k in range(turns)]
                wanted = theirs.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False)
                assert ours.encode_chat(messages) == wanted, messages
    assert ours.eos_id == theirs.eos_token_id and ours.bos_id == theirs.bos_token_id


def test_added_tokens_decode_as_in_transformers(tmp_path):
    """Without skip_special_tokens transformers shows control tokens, which here have no text."""
    tokens = [token | {"special": token["special"] or "im" in token["content"]}
              for token in added_tokens(len(PIECES))]
    vocabularies.write(tmp_path, tokenizer=vocabularies.tokenizer_json(PIECES, added=tokens))
    ours = Tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    special = [n for n, (_, _, kind) in enumerate(PIECES) if kind in (CONTROL, UNKNOWN)]
    ordinary = [ours.ids[SPACE + "us"], ours.ids["b"], tokens[0]["id"]]
    for ids in ([*ordinary, tokens[3]["id"], *ordinary], [special[1], *ordinary[1:], ordinary[0]],
                [*ordinary, ours.vocab_size + 7, *ordinary]):
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
