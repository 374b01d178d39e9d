import torch
from fast.int4 import Int4Linear
from mixtral import Mixtral, MixtralConfig

SMALL = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
         "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "rope_theta": 100.0,
         "num_local_experts": 4}


def small_model(device, dtype, group_size=None, **changes):
    """A model whose weights are so large that every term matters, perhaps with 4-bit experts."""
    model = Mixtral(MixtralConfig(**SMALL | changes)).to(dtype).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name
                     else torch.randn_like(weight) * weight.shape[1] ** -0.5)
    for name, layer in list(model.named_modules()):
        if group_size and ".experts." in name and isinstance(layer, torch.nn.Linear):
            model.set_submodule(name, random_int4(layer, group_size, dtype))
    return model.to(device)


def random_int4(layer, G, dtype):
    """A 4-bit layer of the size of a linear layer."""
    (M, D), new = layer.weight.shape, Int4Linear(layer.in_features, layer.out_features, G)
    new.weight_packed = torch.randint(-2**31, 2**31, (M, D // 8)).to(torch.int32)
    new.weight_scale = ((torch.rand(M, D // G) + 0.5) * 0.2 * D**-0.5).to(dtype)
    new.weight_shape = torch.tensor([M, D])
    return new
