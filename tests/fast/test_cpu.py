"""Claims about fast/cpu.py: every product and the attention of one token give the same numbers."""

import pytest

cpu = pytest.importorskip("fast.cpu")

import torch
from conftest import random_model
from int4_checkpoints import save_int4
from torch import nn

import fast
from fast.cpu import TunedLinear, attend_as_rows, tune
from fast.int4 import Int4Linear, TunedInt4Linear
from generate import DTYPES, generate
from mixtral import attend, read_json, read_weights

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="without oneDNN")
LEADING = [(), (1,), (2,), (3,), (4,), (5,), (16,), (64,), (255,), (256,), (257,), (3, 1), (2, 130)]
SHAPES = [(1040, 528), (512, 48), (257, 7), (40, 24), (2048, 5)]


def tuned(layer, requires_grad=False):
    """A copy of a linear layer as `tune` leaves it."""
    model = random_model(num_hidden_layers=1)
    model.lm_head = nn.Linear(layer.in_features, layer.out_features, bias=False)
    model.lm_head.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad)
    return tune(model).lm_head


@pytest.mark.parametrize("arithmetic, block", [(False, 2**22), (False, 2**19), (True, 2**22)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_tuned_products_are_exact_but_for_one_rounding(
        monkeypatch, outputs, inputs, dtype, arithmetic, block):
    """The error is that of float32 sums (float64 in float64) and of one rounding to the dtype.

    `arithmetic` says whether the CPU multiplies 16-bit floats. `block` is the real number of
    weights that are widened at a time, and one that makes two blocks of the largest weight here.
    Some inputs are not contiguous.
    """
    monkeypatch.setattr(cpu, "has_arithmetic", lambda dtype: arithmetic)
    monkeypatch.setattr(cpu, "WIDENED_WEIGHTS", block)
    torch.manual_seed(0)
    layer = tuned(nn.Linear(inputs, outputs, bias=False, dtype=dtype))
    assert type(layer) is TunedLinear
    for leading in LEADING:
        x = torch.randn(*leading, inputs, 1 + len(leading)).to(dtype)[..., 0]
        y = layer(x)
        exact = x.double() @ layer.weight.double().T
        summed = torch.finfo(torch.float32 if dtype.itemsize < 8 else dtype).eps * inputs
        bound = summed * (x.double().abs() @ layer.weight.double().abs().T)
        bound += torch.finfo(dtype).eps * (0.5 * exact.abs() + bound)
        assert y.dtype == dtype and y.shape == exact.shape
        assert ((y.double() - exact).abs() <= bound).all(), leading


@pytest.mark.parametrize("dtype, rows, outputs, amx, wanted", [
    (torch.bfloat16, 1, 40, False, "mv"), (torch.bfloat16, 4, 1040, False, "F.linear"),
    (torch.bfloat16, 5, 1040, False, "oneDNN"), (torch.bfloat16, 5, 40, False, "F.linear"),
    (torch.float32, 1, 40, False, "sum"), (torch.float32, 1, 1040, False, "oneDNN"),
    (torch.float32, 2, 1040, True, "F.linear"), (torch.float32, 3, 1040, True, "oneDNN"),
    (torch.float32, 9, 40, False, "F.linear"), (torch.float32, 9, 1040, False, "oneDNN"),
    (torch.float64, 1, 40, False, "sum"), (torch.float64, 9, 1040, False, "F.linear")])
def test_each_shape_gets_its_product(monkeypatch, dtype, rows, outputs, amx, wanted):
    """On a CPU that multiplies no 16-bit floats, where these are widened for 5 rows or more."""
    monkeypatch.setattr(cpu, "has_arithmetic", lambda dtype: False)
    monkeypatch.setattr(cpu, "HAS_AMX", amx)
    layer = tuned(nn.Linear(528, outputs, bias=False, dtype=dtype))
    with torch.profiler.profile() as profile:
        layer(torch.ones(rows, 528, dtype=dtype))
    called = {event.key for event in profile.key_averages()}
    names = {"mv": "aten::mv", "sum": "aten::sum", "oneDNN": "mkldnn::_linear_pointwise",
             "F.linear": "aten::linear"}
    assert [name for name, key in names.items() if key in called] == [wanted]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tuned_products_leave_the_switch_of_onednn_as_it_was(dtype, enabled):
    layer = tuned(nn.Linear(528, 1040, bias=False, dtype=dtype))
    with torch.backends.mkldnn.flags(enabled=enabled):
        layer(torch.ones(1, 528, dtype=dtype))
        with pytest.raises(RuntimeError):
            layer(torch.ones(1, 528, dtype=torch.float64))
        assert torch.backends.mkldnn.enabled == enabled


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


@pytest.mark.parametrize("H, K", [(6, 2), (4, 4), (5, 1)])
def test_attention_of_one_token_is_that_of_mixtral_with_any_keys_hidden(H, K):
    """Also if a row sees no key, as a row that reads nothing before its first token."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(3, 1, H, 8).double(), torch.randn(2, 3, 11, K, 8).double()
    mask = torch.rand(3, 1, 1, 11) < 0.5
    mask[2] = False
    found, wanted = attend_as_rows(q, k, v, mask), attend(q, k, v, mask)
    assert found.shape == wanted.shape and (found - wanted).abs().max() < 1e-14
    assert torch.equal(attend_as_rows(q.expand(-1, 4, -1, -1), k, v, mask),
                       attend(q.expand(-1, 4, -1, -1), k, v, mask))


def test_build_tunes_on_the_cpu_only(monkeypatch):
    monkeypatch.setattr(fast, "check_device", lambda device: None)  # "meta" stands for a GPU
    model = random_model(vocab_size=48, hidden_size=48, intermediate_size=48)
    for device, kind in (("cpu", TunedLinear), ("cpu:0", TunedLinear), ("meta", nn.Linear)):
        built = fast.build(vars(model.config), model.state_dict(), None, device)
        assert type(built.lm_head) is kind
        grouped = built.model.layers[0].self_attn.attend is attend_as_rows
        assert grouped == (device != "meta")


@pytest.mark.parametrize("free, G, dtype, kind", [
    (None, 32, torch.bfloat16, TunedInt4Linear), (1000, 32, torch.bfloat16, Int4Linear),
    (None, 16, torch.bfloat16, Int4Linear), (None, 32, torch.float32, Int4Linear)])
def test_4_bit_layers_are_repacked_if_there_is_memory_and_the_kernel_takes_them(
        monkeypatch, tmp_path, free, G, dtype, kind):
    monkeypatch.setattr(fast.memory, "free_memory", lambda device: free)
    model = random_model(dtype=dtype, hidden_size=64, intermediate_size=64)
    save_int4(model, tmp_path, G)
    built = fast.build(read_json(tmp_path / "config.json"), read_weights(tmp_path))
    assert type(built.model.layers[0].block_sparse_moe.experts[0].w1) is kind
    assert len(generate(built, [[1, 2, 3]], 4)[0]) == 4


def test_a_terminal_sees_how_far_loading_has_come(monkeypatch, capsys):
    weights = {"a": torch.zeros(3, 10**8, device="meta"), "b": torch.zeros(10**8, device="meta")}
    assert fast.converted(weights, torch.float16, "meta")["a"].dtype == torch.float16
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fast.converted(weights, None, "meta")
    assert capsys.readouterr().err == "\r[1.2 of 1.6 GB loaded]\r[1.6 of 1.6 GB loaded]\r\x1b[K"
