"""Train a small Mixtral on a text file and write it as a Hugging Face checkpoint.

    python tiny/train.py --train stories.txt --valid held_out.txt --output my_model

The loss is the cross-entropy of the next token plus α times the load-balancing loss of the Switch
Transformer (https://arxiv.org/abs/2101.03961, equations 4 to 6), averaged over the layers:

    E · Σₑ fₑ · Pₑ        fₑ: the load of expert e
                          Pₑ: the mean over tokens of the softmax probability of expert e

A token is assigned to A of the E experts. The load of an expert is the fraction of all these
assignments that it receives, so the loads of a layer sum to one. Only P has a gradient, which
lowers the probability of the experts whose load is high. The load-balancing loss is 1 if all loads
are equal, and E/A if all tokens are assigned to the same A experts with certainty. It can fall
below 1, because f counts choices while P averages probabilities.

Weights and optimiser state are float32. The linear layers run in bfloat16 (autocast) on a machine
that computes in bfloat16. The finished weights are rounded to bfloat16 once. A run depends only on
its texts, settings and seed. If it is interrupted, the same command continues from the last saved
state.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import pickle
import random
import re
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import sentencepiece
import torch
from torch.nn import functional as F

from convert import complete_or_absent, write_safetensors
from mixtral import Mixtral, MixtralConfig, at_least_float32, route
from tokenizer import Tokenizer

# ------------------------------------------------------------------ the load-balancing loss


@contextlib.contextmanager
def router_logits(model):
    """Collect the router logits of the forward passes made inside the `with` block.

    The list receives one tensor (N, E) per layer and pass, in the order of computation.
    """
    logits = []
    hooks = [layer.block_sparse_moe.gate.register_forward_hook(
        lambda module, inputs, output: logits.append(output)) for layer in model.model.layers]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def expert_load(logits, A):
    """The fraction of the assignments that each expert receives: logits (N, E) -> (E)."""
    _, chosen = route(logits, A)
    return chosen.flatten().bincount(minlength=logits.shape[-1]).double() / chosen.numel()


def balance_loss(layers, A):
    """E · Σₑ fₑ · Pₑ, averaged over the layers, each given by its router logits (N, E)."""
    terms = []
    for logits in layers:
        P = at_least_float32(logits).softmax(dim=-1).mean(dim=0)
        terms.append(logits.shape[-1] * (expert_load(logits, A).to(P.dtype) @ P))
    return torch.stack(terms).mean()


# ------------------------------------------------------------------ text


def documents(path, separator):
    """The texts between the lines that hold only the separator. Empty texts are left out."""
    parts = re.split(rf"^{re.escape(separator)}$", path.read_text(encoding="utf-8"), flags=re.M)
    return [part.strip("\n") for part in parts if part.strip()]


def train_tokenizer(texts, path, vocab):
    """Train a BPE model with byte fallback and the settings of Mixtral's tokenizer.

    Text is not normalised, a space is put in front of it, white space is kept, and there is no
    padding token.
    """
    lines = (line for text in texts for line in text.split("\n") if line)
    with complete_or_absent(path) as part:
        try:
            with open(part, "wb") as file:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=lines, model_writer=file, vocab_size=vocab,
                    model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                    remove_extra_whitespaces=False, split_digits=True, character_coverage=1.0,
                    pad_id=-1, minloglevel=2)
        except RuntimeError as error:
            raise ValueError(f"--vocab {vocab} does not suit the training text: {error}") from None


class Batches:
    """Batches of training rows. In every epoch the documents are shuffled, joined and cut.

    `batches[step]` depends on the step alone, so a resumed run reads what an unbroken one reads.
    """

    def __init__(self, stories, args):
        self.stories, self.rows, self.length = stories, args.batch, args.context
        self.seed, self.device, self.epoch = args.seed, args.device, None
        rows = (sum(map(len, stories)) - 1) // self.length
        self.rows_per_epoch = rows - rows % self.rows
        if not self.rows_per_epoch:
            raise ValueError(f"--train: the text gives {max(rows, 0)} rows of {self.length} tokens,"
                             f" but one step needs {self.rows}; use a longer text or a smaller"
                             " --batch or --context")

    def __getitem__(self, step):
        """The tokens of a step and the tokens that follow them, each (B, S)."""
        epoch, first = divmod(step * self.rows, self.rows_per_epoch)
        if self.epoch != epoch:
            order = random.Random(self.seed * 1000 + epoch).sample(self.stories, len(self.stories))
            self.text = torch.tensor([token for story in order for token in story])
            self.epoch = epoch
        start, count = first * self.length, self.rows * self.length
        text = self.text[start:start + count + 1]
        return tuple(part.view(self.rows, -1).to(self.device) for part in (text[:-1], text[1:]))


@torch.inference_mode()
def evaluate(model, tokenizer, texts):
    """Score held-out texts. Returns bits per byte and the expert loads (L, E).

    bits per byte = Σ −log₂ p(token | tokens before it) / number of UTF-8 bytes

    Each text is scored alone. BOS is given; the tokens of the text and EOS are scored. Unlike a
    loss per token, bits per byte can be compared between vocabularies.
    """
    bits, config, device = 0.0, model.config, model.lm_head.weight.device
    loads = torch.zeros(config.num_hidden_layers, config.num_local_experts, dtype=torch.float64)
    for text in texts:
        tokens = torch.tensor([tokenizer.encode(text, eos=True)], device=device)
        with router_logits(model) as layers:
            logits = model(tokens[:, :-1])[0]
        bits += F.cross_entropy(logits, tokens[0, 1:], reduction="sum").item() / math.log(2)
        load = torch.stack([expert_load(x, config.num_experts_per_tok) for x in layers])
        loads += load.cpu() * len(logits)
    size = sum(len(text.encode()) for text in texts)
    return bits / size, loads / loads.sum(dim=1, keepdim=True)


# ------------------------------------------------------------------ optimisers


def orthogonal(x, steps=5):
    """Replace the singular values of a matrix by values near 1: of U·S·Vᵀ, nearly U·Vᵀ remains.

    Each step of this Newton–Schulz iteration, x ← a·x + b·(x·xᵀ)·x + c·(x·xᵀ)²·x, maps every
    singular value s to a·s + b·s³ + c·s⁵. After five steps the values lie between about 0.7 and
    1.2, unless they were very small. The coefficients are those of Keller Jordan's Muon (2024).
    """
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T, steps).T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x,
                        beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Muon: the update of a matrix is its gradient with momentum, made orthogonal.

    The update's root mean square is 0.2 · rate, as is usual for AdamW, so both optimisers can use
    the same learning rate (https://arxiv.org/abs/2502.16982).
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:  # no token of the batch was assigned to this expert
                    continue
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"].lerp_(weight.grad, 1 - momentum)
                size = 0.2 * math.sqrt(max(weight.shape)) * rate
                weight.mul_(1 - rate * group["weight_decay"])
                weight.sub_(orthogonal(weight.grad.lerp(mean, momentum)), alpha=size)


def make_optimisers(model, args):
    """Muon for the matrices inside the layers except the routers; AdamW for everything else.

    The routers and lm_head use AdamW with weight decay. Norms and embeddings are not decayed.
    """
    inner, decayed, others = [], [], []
    for name, weight in model.named_parameters():
        if weight.ndim != 2 or "embed" in name:
            others.append(weight)
        elif args.optimiser == "adamw" or "gate" in name or "lm_head" in name:
            decayed.append(weight)
        else:
            inner.append(weight)
    groups = [{"params": decayed, "weight_decay": args.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=True)
    return [Muon(inner, args.rate, args.weight_decay), adamw] if inner else [adamw]


def rate_at(step, args):
    """The learning rate: a linear rise to the peak, a constant part, then a linear decay.

    The decay would reach zero one step after the last. With the default settings the last step has
    1/451 of the peak rate.
    """
    rise, decay = (max(1, round(share * args.steps)) for share in (args.warmup, args.decay))
    return args.rate * min(1, (step + 1) / rise, (args.steps - step) / (decay + 1))


# ------------------------------------------------------------------ training


def initialise(model, seed):
    """Draw normal weights with variance 1 / fan-in, except in the norms.

    The matrices that write to the residual stream, o_proj and w2, are smaller by 1/√(2L), because
    2L of them add up there. lm_head has a standard deviation of 0.02.
    """
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            scale = weight.shape[1] ** -0.5
            if "o_proj" in name or "w2" in name:
                scale /= math.sqrt(2 * model.config.num_hidden_layers)
            torch.nn.init.normal_(weight, std=0.02 if "lm_head" in name else scale)


def autocast(args):
    """Mixed precision, if bfloat16 products are faster than those in float32."""
    fast = args.device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    on = args.precision == "bfloat16" or (args.precision == "auto" and fast)
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=on)


def one_step(model, optimisers, batch, args):
    """Update the weights once, with the gradient clipped to norm 1.

    Returns the cross-entropy, the load-balancing loss and the expert loads (L, E) of the batch.
    """
    (tokens, targets), A = batch, model.config.num_experts_per_tok
    with router_logits(model) as layers, autocast(args):
        logits = model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    balance = balance_loss(layers, A)
    model.zero_grad()
    (loss + args.balance * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
    return loss.item(), balance.item(), torch.stack([expert_load(x, A) for x in layers])


def train(model, batches, score, args, log):
    """Make all steps that follow the last saved state. `score()` returns what `evaluate` does."""
    optimisers, state_file = make_optimisers(model, args), args.output / "state.pt"
    first = restore_state(state_file, model, optimisers)
    if first:
        log(f"continuing after step {first}")
    clock = time.perf_counter()
    for step in range(first, args.steps):
        for group in [group for optimiser in optimisers for group in optimiser.param_groups]:
            group["lr"] = rate_at(step, args)
        loss, balance, load = one_step(model, optimisers, batches[step], args)
        done = step + 1
        if done % 20 == 0:
            speed = 20 * args.batch * args.context / (time.perf_counter() - clock)
            log(f"step {done}/{args.steps}  loss {loss:.4f}  balance {balance:.3f}  "
                f"expert load {load.min():.3f} to {load.max():.3f}  {speed:.0f} tokens/s")
        if done % args.check_every == 0:
            log_score(*score(), done, args, log)
        if 0 in (done % 20, done % args.check_every):
            clock = time.perf_counter()
        if done % args.save_every == 0 or done == args.steps:
            save_state(state_file, model, optimisers, done)


def log_score(bits, loads, done, args, log):
    layers = (" ".join(f"{100 * load:.0f}" for load in layer) for layer in loads.tolist())
    log(f"step {done}/{args.steps}  held-out bits per byte {bits:.4f}  "
        f"expert load by layer, percent: {' | '.join(layers)}")


def save_state(path, model, optimisers, done):
    """Write everything that the steps after `done` depend on."""
    with complete_or_absent(path) as part:
        torch.save({"model": model.state_dict(), "step": done,
                    "optimisers": [optimiser.state_dict() for optimiser in optimisers]}, part)


def restore_state(path, model, optimisers):
    """Load a saved state, if there is one, and return the number of steps that it has made."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        return state["step"]
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError,
            pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not the state of a run with these settings; choose another "
                         f"--output, or delete the file to start again: {reason:.200}") from None


def export(model, directory):
    """Write the weights in bfloat16, and a config.json that transformers reads too."""
    write_safetensors(directory / "model.safetensors", {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.named_parameters()}, {"format": "pt"})
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
              "torch_dtype": "bfloat16"} | dataclasses.asdict(model.config)
    with complete_or_absent(directory / "config.json") as part:
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def run(args, texts, held_out, log):
    """Train the tokenizer, if there is none, and the model; write the checkpoint; score it."""
    if not (args.output / "tokenizer.model").exists():
        train_tokenizer(texts, args.output / "tokenizer.model", args.vocab)
    tokenizer = Tokenizer(args.output)
    stories, valid = ([tokenizer.encode(text, eos=True) for text in part]
                      for part in (texts, held_out))
    log(f"{len(stories)} documents, {sum(map(len, stories))} tokens; "
        f"held out {len(valid)}, {sum(map(len, valid))}")
    model = Mixtral(configuration(args)).to(args.device)
    initialise(model, args.seed)
    log(f"{sum(p.numel() for p in model.parameters())} parameters; "
        + " ".join(f"{name}={getattr(value, 'name', value)}" for name, value in vars(args).items()))
    train(model, Batches(stories, args), lambda: evaluate(model, tokenizer, held_out[:64]), args,
          log)
    export(model, args.output)
    for scored in (model, Mixtral.from_pretrained(args.output)):
        bits, loads = evaluate(scored, tokenizer, held_out)
        log(f"held-out bits per byte, {scored.lm_head.weight.dtype}: {bits:.4f}")
    for n, load in enumerate(loads.tolist()):
        log(f"layer {n} expert load: " + " ".join(f"{100 * x:.1f}" for x in load))


# ------------------------------------------------------------------ command line


def configuration(args):
    return MixtralConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.expert_hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads, sliding_window=args.window, rope_theta=1e4,
        max_position_embeddings=args.context)


def positive(text):
    """An integer of at least 1. argparse turns the ValueError into its own message."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def add_text_options(p):
    p.add_argument("--train", type=Path, required=True, help="text to learn from")
    p.add_argument("--valid", type=Path, required=True, help="held-out text for the scores")
    p.add_argument("--output", type=Path, required=True, help="directory for the checkpoint")
    p.add_argument("--separator", default="<|endoftext|>", help="line between two documents")


def add_size_options(p):
    p.add_argument("--vocab", type=positive, default=2048,
                   help="vocab_size; a small one leaves the parameters to the experts")
    p.add_argument("--hidden", type=positive, default=192,
                   help="hidden_size; with the other defaults it gives 12 M parameters, 24 MB")
    p.add_argument("--layers", type=positive, default=6,
                   help="num_hidden_layers; enough to see the routing change with depth")
    p.add_argument("--heads", type=positive, default=6, help="num_attention_heads")
    p.add_argument("--kv-heads", type=positive, default=2,
                   help="num_key_value_heads; fewer than --heads gives grouped queries")
    p.add_argument("--expert-hidden", type=positive, default=384,
                   help="intermediate_size; two experts together are as wide as a dense "
                        "feed-forward layer of 4 times hidden_size")
    p.add_argument("--window", type=positive, default=128,
                   help="sliding_window; training rows are longer, so that training uses it")
    p.add_argument("--context", type=positive, default=256,
                   help="tokens per training row; a document of the embedded model's data has 226")


def add_optimiser_options(p):
    p.add_argument("--batch", type=positive, default=32,
                   help="rows per step; the cost of Muon itself does not depend on their number")
    p.add_argument("--steps", type=positive, default=1500,
                   help="optimiser steps; with the embedded model's data 1500 are 2.8 epochs")
    p.add_argument("--warmup", type=float, default=0.06,
                   help="fraction of the steps, at the start, in which the learning rate rises")
    p.add_argument("--decay", type=float, default=0.3,
                   help="fraction of the steps, at the end, in which the learning rate falls; the "
                        "steps before do not depend on the number of steps")
    p.add_argument("--rate", type=float, default=5e-3, help="peak learning rate of all weights")
    p.add_argument("--weight-decay", type=float, default=0.1,
                   help="applied to all matrices except the embeddings")
    p.add_argument("--optimiser", choices=("muon", "adamw"), default="muon",
                   help="for the matrices inside the layers; all other weights use AdamW")
    p.add_argument("--balance", type=float, default=0.02,
                   help="α, the weight of the load-balancing loss; 0.01 in the Switch Transformer")
    p.add_argument("--seed", type=int, default=0,
                   help="for the initial weights and the order of the documents")


def add_machine_options(p):
    p.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="of the linear layers; auto is bfloat16 if the hardware computes in it")
    p.add_argument("--device", default="cpu", help="torch device")
    p.add_argument("--save-every", type=positive, default=100,
                   help="steps between two saved states")
    p.add_argument("--check-every", type=positive, default=100,
                   help="steps between two scores of the first 64 held-out documents; if these "
                        "rise while the training loss falls, the model is overfitting")


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for add_options in (add_text_options, add_size_options, add_optimiser_options,
                        add_machine_options):
        add_options(p)
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    try:
        torch.zeros(1, device=args.device)  # raises a RuntimeError if there is none
        texts, held_out = (documents(path, args.separator) for path in (args.train, args.valid))
        if not held_out:
            raise ValueError(f"{args.valid}: holds no document")
        args.output.mkdir(parents=True, exist_ok=True)
        with open(args.output / "train.log", "a", encoding="utf-8") as file:
            def log(line):
                for target in (sys.stdout, file):
                    print(line, file=target, flush=True)

            run(args, texts, held_out, log)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        print("train.py:", *str(error).splitlines()[:1], file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command continues from the last saved state",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
