"""The same numbers as Hugging Face transformers. Skipped where it is not installed."""

from pathlib import Path

import pytest
import torch

from generate import generate
from mixtral import Mixtral

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
