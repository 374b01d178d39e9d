"""Which matrix is split along which side? Tensor parallelism under torchrun.

`torchrun --nproc-per-node 2 generate.py ...` starts two processes, called ranks. Each of them holds
a share of the heads and of the width of every expert:

              q, k, v, w1, w3: split by rows        o_proj, w2: split by columns
              ┌──────────┐                          ┌─────┬─────┐
    x  ──►    │  rank 0  │  ──► its heads or  ──►   │     │     │  ──►  a partial sum of y;
 (on all      ├──────────┤      its part of         │rank │rank │       all-reduce adds the sums
  ranks)      │  rank 1  │      the expert          │  0  │  1  │       and gives y to all ranks
              └──────────┘                          └─────┴─────┘

Attention mixes values within a head and SwiGLU works on single features, so the ranks exchange
nothing between the two products. One all-reduce after attention and one after the mixture suffice.
The norms, the router, the embedding and the output projection are on every rank, so all ranks
choose the same experts.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from mixtral import MixtralConfig

SIDE = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "w1": 0, "w3": 0, "o_proj": 1, "w2": 1}


def shard(raw, weights, rank, ranks):
    """The config.json and the weights of one rank. Raises ValueError if they cannot be divided."""
    config, local = MixtralConfig.from_dict(raw), {}
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, field)
        if size % ranks:
            raise ValueError(f"{ranks} ranks do not divide {field} {size}")
        local[field] = size // ranks
    parts = {name: part(name, weight, rank, ranks) for name, weight in weights.items()}
    return raw | local | {"head_dim": config.head_dim}, parts


def part(name, weight, rank, ranks):
    """The share of one rank of a weight, or all of it if it is not split."""
    layer, kind = ("." + name).split(".")[-2:]
    side = SIDE.get(layer)
    if side is None or kind == "weight_shape":  # the two sizes of a 4-bit matrix are not used
        return weight
    if weight.shape[side] % ranks:
        unit = "groups" if kind == "weight_scale" else "rows or columns"
        raise ValueError(f"{name}: {ranks} ranks do not divide its {weight.shape[side]} {unit}")
    return weight.chunk(ranks, dim=side)[rank].contiguous()


def reduce_outputs(model):
    """Add an all-reduce to the output of every attention and every mixture; returns the model."""
    def all_reduce(module, inputs, output):
        output = output.contiguous()
        with ended_by_others():
            dist.all_reduce(output)
        return output

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(all_reduce)
        layer.block_sparse_moe.register_forward_hook(all_reduce)
    model.sharded = True
    return model


def is_sharded(model):
    """Whether this rank holds only a share of the model."""
    return getattr(model, "sharded", False)


# ------------------------------------------------------------------ the processes


def join(device):
    """Connect the ranks that torchrun started, if any; returns the device of this rank."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if not dist.is_initialized():
        # The timeout is long because a chat waits for its user. A dead rank is noticed at once.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
                                timeout=timedelta(days=1))
    return f"cuda:{os.environ['LOCAL_RANK']}" if device.startswith("cuda") else device


def from_first(value):
    """The value that rank 0 passed, on every rank; it must have a form in JSON."""
    if not dist.is_initialized():
        return value
    data = torch.tensor(list(json.dumps(value).encode()))
    size = torch.tensor([len(data)])
    with ended_by_others():
        dist.broadcast(size, src=0)
        data = data if dist.get_rank() == 0 else data.new_empty(int(size))
        dist.broadcast(data, src=0)
    return json.loads(bytes(data.tolist()))


@contextlib.contextmanager
def ended_by_others():
    """End this rank if it cannot communicate, because then another rank has ended.

    That rank, or torchrun, says why. If it was killed, only rank 0 knows, so it prints a line.
    """
    try:
        yield
    except RuntimeError as error:
        if dist.get_rank() > 0:
            sys.exit(0)
        reason = str(error).partition("\n")[0]
        print(f"generate.py: rank 0 stops, probably because another rank has ended: {reason:.300}",
              file=sys.stderr)
        sys.exit(1)


def run(command):
    """The exit code of `command()` on this rank; the process ends with it if ranks are connected.

    Only rank 0 reads and prints, and Ctrl-C ends only rank 0; the others then lose their connection
    and end too. When one rank fails, torchrun ends all of them. An error that all ranks have must
    appear once, so the others wait 10 s before they report theirs. By then rank 0 has reported the
    same error, unless it does not have it.
    """
    if os.environ.get("RANK", "0") == "0":
        code = exit_code(command)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdin, told = open(os.devnull), io.StringIO()
        with (open(os.devnull, "w") as null, contextlib.redirect_stdout(null),
              contextlib.redirect_stderr(told)):
            code = exit_code(command)
        if code:
            time.sleep(10)
            print(told.getvalue(), end="", file=sys.stderr)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # at a usual exit, the threads of torch.distributed can abort
    return code


def exit_code(command):
    """The exit code of `command()`. A rank that succeeds ends together with the others."""
    try:
        code = command()
        if code == 0 and dist.is_initialized():
            with ended_by_others():
                dist.barrier()  # no rank ends while another one still receives from it
        return code
    except SystemExit as end:
        return end.code
