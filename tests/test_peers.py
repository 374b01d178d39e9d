"""The same numbers as Hugging Face transformers. Skipped where it is not installed."""

from pathlib import Path

import pytest
import torch
import vocabularies
from vocabularies import BASE, CHATML

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


@pytest.fixture(params=[None, 5, TINY], ids=["no window", "window 5", "embedded"])
def directory(tmp_path, request):
    """A random checkpoint that transformers has made and saved, or the embedded one."""
    if request.param == TINY:
        return TINY
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


def test_greedy_tokens_are_those_of_transformers(directory):
    peer, prompts = load_peer(directory, dtype=torch.float32), [TEXT[0, :6], TEXT[1, :11]]
    wanted = [peer.generate(prompt[None], max_new_tokens=30, do_sample=False, eos_token_id=None,
                            pad_token_id=0)[0, len(prompt):].tolist() for prompt in prompts]
    ours = generate(Mixtral.from_pretrained(directory, torch.float32),
                    [prompt.tolist() for prompt in prompts], 30)
    assert ours == wanted


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
    "default system": CHATML.replace(
        "{{'<|im", "{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a cat.<|im_end|>\n' }}{% endif %}{{'<|im", 1),
    "one way for each role": "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{'<|im_start|>human\n' + m['content'] + '<|im_end|>\n'}}{% elif m['role'] == 'system' %}"
        "{{'<|im_start|>system\n' + m['content'] + '<|im_end|>\n'}}{% else %}"
        "{{'<|im_start|>gpt\n' + m['content'] + '<|im_end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>gpt\n' }}{% endif %}"}
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
