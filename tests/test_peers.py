"""The same numbers as Hugging Face transformers, where it is installed (CI installs it)."""

from pathlib import Path

import pytest
import torch

from generate import generate
from mixtral import Mixtral

transformers = pytest.importorskip("transformers")
TINY = Path(__file__).resolve().parent.parent / "tiny"
TEXT = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))


def theirs(directory, **options):
    """transformers' model; its eager experts, since grouped_mm takes no float64."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", **options).eval()


@pytest.fixture(params=[None, 5], ids=["no window", "window 5"])
def directory(tmp_path, request):
    """A random checkpoint that transformers made and saved."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, rope_theta=1e4,
        sliding_window=request.param, initializer_range=0.3)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-4),
    # Its norms, rotation and softmax fall to float32 even in a float64 model.
    (torch.float64, 1e-4)])
def test_logits_agree_with_transformers(directory, dtype, tolerance):
    with torch.inference_mode():
        ours = Mixtral.from_pretrained(directory, dtype)(TEXT)
        assert ours.dtype == dtype
        assert (ours - theirs(directory, dtype=dtype)(TEXT).logits).abs().max() < tolerance


def test_greedy_tokens_are_those_of_transformers(directory):
    model = theirs(directory, dtype=torch.float32)
    for row in TEXT[:, :6]:
        wanted = model.generate(row[None], max_new_tokens=30, do_sample=False, eos_token_id=None,
                                pad_token_id=0)[0, 6:].tolist()
        [ours] = generate(Mixtral.from_pretrained(directory), [row.tolist()], 30)
        assert ours == wanted


def test_the_embedded_checkpoint_loads_in_transformers_and_agrees():
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = torch.randint(3, 2048, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = Mixtral.from_pretrained(TINY, torch.float32)(text)
        assert (ours - model.eval()(text).logits).abs().max() < 1e-4
