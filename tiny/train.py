"""Train a small Mixtral on a text file: tokenizer, model, held-out score, Hugging Face directory.

    python tiny/train.py --train stories.txt --valid held_out.txt --output tiny

The loss is the cross-entropy of the next token plus, per layer, the load-balancing loss

    α · E · Σₑ fₑ · Pₑ        fₑ: share of the visits that went to expert e (Σ fₑ = 1)
                              Pₑ: mean over tokens of the full softmax probability of expert e

of the Switch Transformer (arXiv 2101.03961, equations 4 to 6), whose least value is α, at equal
load. Only P carries a gradient: it lowers the probability of experts that f says are crowded.
Without it the routers collapse: an expert that is good early is chosen more, learns more and is
chosen more still, until the others are never trained.

Weights and the optimiser's moments stay in float32; on a machine that multiplies bfloat16 in
hardware the linear maps run in it (autocast), elsewhere that would be many times slower. The
finished weights are rounded to bfloat16 once. A run is a function of its seed and its settings:
stopped at any time, the same command continues from the last state it saved.
"""

import argparse
import json
import math
import random
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import sentencepiece
import torch
from torch.nn import functional as F

from generate import save_file
from mixtral import Mixtral, MixtralConfig
from tokenizer import Tokenizer


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--train", type=Path, required=True, help="text to learn from")
    p.add_argument("--valid", type=Path, required=True, help="text held out for the score")
    p.add_argument("--output", type=Path, required=True, help="directory of the checkpoint")
    p.add_argument("--separator", default="<|endoftext|>", help="line between two documents")
    p.add_argument("--vocab", type=int, default=2048,
                   help="pieces; small, so that the parameters are experts and not embeddings")
    p.add_argument("--hidden", type=int, default=192,
                   help="hidden_size; with 6 layers of 8 experts 12 M parameters, 24 MB")
    p.add_argument("--layers", type=int, default=6,
                   help="num_hidden_layers: enough to see routing change with depth")
    p.add_argument("--heads", type=int, default=6, help="num_attention_heads, of 32 features each")
    p.add_argument("--kv-heads", type=int, default=2,
                   help="num_key_value_heads: fewer than heads, so that queries share keys")
    p.add_argument("--expert-hidden", type=int, default=384,
                   help="intermediate_size: two experts together are as wide as a dense layer, 4 D")
    p.add_argument("--window", type=int, default=128,
                   help="sliding_window, under the context so that training already rolls past it")
    p.add_argument("--context", type=int, default=256,
                   help="tokens of a training row; a story of the default data has 226")
    p.add_argument("--batch", type=int, default=32,
                   help="rows of a step; Muon's own work is the same for any number of them")
    p.add_argument("--steps", type=int, default=1500,
                   help="optimiser steps; the default reads 4.3 M tokens 2.8 times")
    p.add_argument("--warmup", type=float, default=0.06,
                   help="share of the steps with rising rate, until the moments mean something")
    p.add_argument("--decay", type=float, default=0.3,
                   help="share of the steps, at the end, in which the rate falls to zero; before "
                        "that the steps do not depend on how many there will be")
    p.add_argument("--rate", type=float, default=5e-3, help="peak learning rate, of all weights")
    p.add_argument("--weight-decay", type=float, default=0.1,
                   help="on maps only: norms and embeddings are scales")
    p.add_argument("--optimiser", choices=("muon", "adamw"), default="muon",
                   help="of the matrices inside the layers; all else learns by AdamW")
    p.add_argument("--balance", type=float, default=0.02,
                   help="α of the load-balancing loss; twice the Switch Transformer's, for a run "
                        "too short to wait for balance")
    p.add_argument("--seed", type=int, default=0, help="of the initial weights and the order")
    p.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="of the linear maps; auto: bfloat16 where the hardware multiplies it")
    p.add_argument("--device", default="cpu", help="torch device")
    p.add_argument("--save-every", type=int, default=100, help="steps between two saved states")
    p.add_argument("--check-every", type=int, default=100,
                   help="steps between two scores of the first 64 held-out documents: where these "
                        "rise while the loss falls, the text is being learned by heart")
    return p.parse_args()


def documents(path, separator):
    """The texts between separator lines, each without its final newline."""
    texts = path.read_text(encoding="utf-8").split(f"\n{separator}\n")
    return [text.strip("\n").removesuffix(separator).strip("\n") for text in texts if text.strip()]


def train_tokenizer(texts, path, vocab):
    """Byte-fallback BPE as Mixtral's: identity normaliser, dummy prefix, spaces kept, no pad."""
    lines = (line for text in texts for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(path.with_suffix("")), vocab_size=vocab,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, character_coverage=1.0,
        pad_id=-1, minloglevel=2)
    path.with_suffix(".vocab").unlink()


def batch_of(stories, step, args):
    """Row tokens and next tokens of a step, each (B, S): epochs of shuffled stories, cut in rows.

    It depends on the step alone, so a resumed run sees what an unbroken one would have seen.
    """
    rows_per_epoch = (sum(map(len, stories)) - 1) // args.context
    epoch, first = divmod(step * args.batch, rows_per_epoch - rows_per_epoch % args.batch)
    if batch_of.epoch != epoch:
        order = random.Random(args.seed * 1000 + epoch).sample(stories, len(stories))
        batch_of.text = torch.tensor([token for story in order for token in story])
        batch_of.epoch = epoch
    start, count = first * args.context, args.batch * args.context
    text = batch_of.text[start:start + count + 1]
    return (part.view(args.batch, -1).to(args.device) for part in (text[:-1], text[1:]))


batch_of.epoch = None


def initialise(model, L):
    """Normal weights of variance 1 / fan-in; what writes to the residual stream 1 / √(2L) less."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            scale = weight.shape[1] ** -0.5
            if "o_proj" in name or "w2" in name:
                scale /= math.sqrt(2 * L)
            torch.nn.init.normal_(weight, std=0.02 if "lm_head" in name else scale)


def router_logits(model):
    """A list that every forward pass fills with each layer's router logits, L of (N, E)."""
    seen = []
    for block in model.model.layers:
        block.block_sparse_moe.gate.register_forward_hook(lambda m, x, out: seen.append(out))
    return seen


def shares(logits, k):
    """f of the load-balancing loss: logits (N, E) -> (E), the visits' distribution over experts."""
    visits = logits.topk(k, dim=-1).indices.flatten().bincount(minlength=logits.shape[-1])
    return visits / visits.sum()


def balance_loss(layers, k):
    """E · Σₑ fₑ · Pₑ, averaged over layers: 1 when every expert takes as much as every other."""
    terms = [shares(x, k) @ x.float().softmax(dim=-1).mean(0) * x.shape[-1] for x in layers]
    return torch.stack(terms).mean()


def rate_at(step, args):
    """Linear up to the peak, level, then linear down to zero at the last step."""
    warm, down = (max(1, round(share * args.steps)) for share in (args.warmup, args.decay))
    return args.rate * min(1, (step + 1) / warm, (args.steps - step) / (down + 1))


@torch.inference_mode()
def evaluate(model, stories, texts, seen):
    """Bits per byte of held-out documents, each alone (EOS is scored, BOS given), and loads (L, E).

    bits per byte = Σ −log₂ p(token | before) / UTF-8 bytes: comparable between vocabularies.
    """
    bits, config = 0.0, model.config
    loads = torch.zeros(config.num_hidden_layers, config.num_local_experts, dtype=torch.float64)
    for story in stories:
        tokens = torch.tensor([story], device=model.lm_head.weight.device)
        seen.clear()
        logits = model(tokens[:, :-1])[0].float()
        bits += F.cross_entropy(logits, tokens[0, 1:], reduction="sum").item() / math.log(2)
        share = torch.stack([shares(x, config.num_experts_per_tok) for x in seen])
        loads += share.cpu() * (len(story) - 1)
    seen.clear()
    size = sum(len(text.encode()) for text in texts)
    return bits / size, loads / loads.sum(1, keepdim=True)


def orthogonal(x, steps=5):
    """Nearly U·Vᵀ of a matrix U·S·Vᵀ: every direction of it learns at the same pace.

    Newton–Schulz: x ← a·x + b·(x·xᵀ)x + c·(x·xᵀ)²x pulls each singular value s into 0.7 … 1.2 by
    s ← a·s + b·s³ + c·s⁵, with products alone. The numbers are Keller Jordan's (Muon, 2024).
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
    """For matrices: the gradient with momentum, made orthogonal.

    A step is scaled to AdamW's usual size, 0.2 · rate in the root mean square (arXiv 2502.16982),
    so that both optimisers share a rate.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:  # an expert that no token chose
                    continue
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"].lerp_(weight.grad, 1 - momentum)
                size = 0.2 * math.sqrt(max(weight.shape)) * rate
                weight.mul_(1 - rate * group["weight_decay"])
                weight.sub_(orthogonal(weight.grad.lerp(mean, momentum)), alpha=size)


def make_optimisers(model, args):
    """Muon for the maps inside the layers, AdamW for the rest: a router's rows are not directions.

    Norms and embeddings are scales, not maps, and are not decayed.
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


def autocast(args):
    """Mixed precision where bfloat16 products are faster than float32's."""
    fast = args.device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    on = args.precision == "bfloat16" or (args.precision == "auto" and fast)
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=on)


def train(model, stories, held_out, args, say):
    """All steps from the last saved state on; held_out is (stories, texts) for the checks."""
    state_file = args.output / "state.pt"
    optimisers, seen, first = make_optimisers(model, args), router_logits(model), 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = state["step"]
        say(f"continuing after step {first}")
    clock = time.perf_counter()
    for step in range(first, args.steps):
        for group in [group for optimiser in optimisers for group in optimiser.param_groups]:
            group["lr"] = rate_at(step, args)
        loss, balance = one_step(model, optimisers, seen, step, stories, args)
        if (step + 1) % 20 == 0:
            speed = 20 * args.batch * args.context / (time.perf_counter() - clock)
            load = torch.stack([shares(x, model.config.num_experts_per_tok) for x in seen])
            say(f"step {step + 1}/{args.steps}  loss {loss:.4f}  balance {balance:.3f}  "
                f"expert load {load.min():.3f} to {load.max():.3f}  {speed:.0f} tokens/s")
            clock = time.perf_counter()
        if (step + 1) % args.check_every == 0:
            score, loads = evaluate(model, *(part[:64] for part in held_out), seen)
            say(f"step {step + 1}/{args.steps}  held-out bits per byte {score:.4f}  "
                "expert load by layer, percent: " + " | ".join(
                    " ".join(f"{100 * x:.0f}" for x in layer) for layer in loads.tolist()))
            clock = time.perf_counter()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            part = state_file.with_suffix(".part")
            torch.save({"model": model.state_dict(), "step": step + 1,
                        "optimisers": [optimiser.state_dict() for optimiser in optimisers]}, part)
            part.replace(state_file)
    return seen


def one_step(model, optimisers, seen, step, stories, args):
    """One gradient: cross-entropy plus α times balance, clipped at norm 1. Returns both parts."""
    tokens, targets = batch_of(stories, step, args)
    seen.clear()
    with autocast(args):
        logits = model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    balance = balance_loss(seen, model.config.num_experts_per_tok)
    model.zero_grad()
    (loss + args.balance * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
    return loss.item(), balance.item()


def export(model, directory):
    """Write the Hugging Face layout: bfloat16 weights, and a config that transformers reads too."""
    weights = {n: p.detach().to("cpu", torch.bfloat16).contiguous()
               for n, p in model.named_parameters()}
    save_file(weights, directory / "model.safetensors")
    fields = {name: getattr(model.config, name) for name in model.config.__dataclass_fields__}
    extra = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
             "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(extra | fields, indent=2) + "\n")


def main():
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    log = open(args.output / "train.log", "a", encoding="utf-8")

    def say(line):
        print(line, flush=True)
        print(line, file=log, flush=True)

    texts, held_out = (documents(p, args.separator) for p in (args.train, args.valid))
    if not (args.output / "tokenizer.model").exists():
        train_tokenizer(texts, args.output / "tokenizer.model", args.vocab)
    tokenizer = Tokenizer(args.output)
    stories = [tokenizer.encode(text, eos=True) for text in texts]
    valid = [tokenizer.encode(text, eos=True) for text in held_out]
    say(f"{len(stories)} documents, {sum(map(len, stories))} tokens; "
        f"held out {len(valid)}, {sum(map(len, valid))}")

    config = MixtralConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.expert_hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads, sliding_window=args.window, rope_theta=1e4,
        max_position_embeddings=args.context)
    model = Mixtral(config).to(args.device)
    torch.manual_seed(args.seed)
    initialise(model, config.num_hidden_layers)
    say(f"{sum(p.numel() for p in model.parameters())} parameters; "
        + " ".join(f"{name}={getattr(value, 'name', value)}" for name, value in vars(args).items()))
    seen = train(model, stories, (valid, held_out), args, say)

    export(model, args.output)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = model if dtype == torch.float32 else Mixtral.from_pretrained(args.output)
        seen = seen if dtype == torch.float32 else router_logits(rounded)
        score, loads = evaluate(rounded.eval(), valid, held_out, seen)
        say(f"held-out bits per byte, {dtype}: {score:.4f}")
    for n, load in enumerate(loads):
        say(f"layer {n} expert load: " + " ".join(f"{100 * x:.1f}" for x in load.tolist()))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
