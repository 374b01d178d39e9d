"""Measure the embedded checkpoint and fill in its model card.

    python tiny/card.py                                                  draws curve.svg
    python tiny/card.py --train stories.txt --valid held_out.txt         measures everything

The first command draws curve.svg from train.log. The second also fills in the parts of README.md,
study/experts.md and study/samples.md that stand between `<!-- name -->` and `<!-- -->`. All
numbers are computed in float64, so that every machine prints the same.
"""

import argparse
import html
import math
import re
import statistics
import sys
import warnings
from pathlib import Path

TINY = Path(__file__).resolve().parent
sys.path[:0] = [str(TINY.parent), str(TINY)]
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from train import documents, router_logits

from generate import generate
from mixtral import Mixtral, route
from tokenizer import Tokenizer

PROMPT, SAMPLES, MAX_NEW_TOKENS = "Once upon a time", 200, 300
SHOWN_SAMPLES = 3  # in README.md; study/samples.md shows those up to LISTED_SAMPLES
LISTED_SAMPLES = 10
MIN_OCCURRENCES = 40  # of a piece in the held-out stories, to be listed with an expert
COLOURS = ("#f4a6a6", "#f2c48d", "#e8dc7a", "#a8d98a", "#86d4c8", "#92bdf0", "#c3aaf0", "#f0a6d8")


# ------------------------------------------------------------------ the training curve


def read_log(log):
    """Losses {step: nats}, held-out scores {step: bits per byte}, loads {step: (L, E) percent}."""
    losses, scores, loads = {}, {}, {}
    for step, loss in re.findall(r"^step (\d+)/\d+  loss (\S+)", log, re.M):
        losses[int(step)] = float(loss)
    checks = r"^step (\d+)/\d+  held-out bits per byte (\S+)  expert load .*: (.*)$"
    for step, score, load in re.findall(checks, log, re.M):
        scores[int(step)] = float(score)
        loads[int(step)] = [[float(x) for x in layer.split()] for layer in load.split("|")]
    return losses, scores, loads


def chart(x, y, width, height, title, lines, low, high, last):
    """One panel: a title, a frame with its two bounds, and lines of ({step: value}, colour)."""
    def at(step, value):
        return (f"{x + width * step / last:.1f},"
                f"{y + height * (high - min(max(value, low), high)) / (high - low):.1f}")

    parts = [f'<text x="{x}" y="{y - 6}" font-weight="bold">{html.escape(title)}</text>',
             f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" '
             'stroke="#888"/>']
    for value, below in ((high, 10), (low, height)):
        parts.append(f'<text x="{x - 4}" y="{y + below}" text-anchor="end">{value:g}</text>')
    for points, colour in lines:
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="'
                     + " ".join(at(*point) for point in sorted(points.items())) + '"/>')
    return parts


def curve(losses, scores, loads):
    """The picture of a training run: loss, held-out score, and the expert loads of each layer."""
    last = max(losses)
    parts = chart(50, 30, 380, 150, "training loss, nats per token", [(losses, "#777")],
                  1.5, 4, last)
    parts += chart(490, 30, 380, 150, "held-out bits per byte, first 64 stories",
                   [(scores, "#c0392b")], 0.6, 1, last)
    for layer, experts in enumerate(loads[min(loads)]):
        lines = [({step: load[layer][e] for step, load in loads.items()},
                  COLOURS[e % len(COLOURS)]) for e in range(len(experts))]
        parts += chart(50 + 140 * layer, 225, 120, 110, f"layer {layer}", lines, 0, 25, last)
    return "\n".join([
        '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="375" viewBox="0 0 900 375" '
        'font-family="sans-serif" font-size="11" role="img" aria-label="Loss, held-out score and '
        'expert load over training">', '<rect width="100%" height="100%" fill="#fff"/>', *parts,
        f'<text x="50" y="195">steps 0 to {last}</text>',
        '<text x="50" y="355">load of each expert in percent, over the same steps</text>',
        "</svg>"]) + "\n"


# ------------------------------------------------------------------ routing


@torch.inference_mode()
def chosen_experts(model, stories):
    """The experts of every token of some texts, one tensor (N, A) per layer."""
    layers = []
    for tokens in stories:
        with router_logits(model) as logits:
            model(torch.tensor([tokens]))
        layers.append([route(x, model.config.num_experts_per_tok)[1] for x in logits])
    return [torch.cat(layer) for layer in zip(*layers, strict=True)]


def repetitions(chosen):
    """How often a token has an expert of the token before: (N, A) -> two fractions.

    The first counts tokens with the same first expert, the second tokens with any expert in common.
    """
    before, after = chosen[:-1], chosen[1:]
    first = before[:, 0] == after[:, 0]
    any_expert = (before[:, :, None] == after[:, None]).flatten(1).any(dim=1)
    return first.double().mean().item(), any_expert.double().mean().item()


def routing_table(layers, E):
    """Loads and repetitions of each layer, and what random choices would give, as lines."""
    def line(name, loads, first, either):
        return (f"{name:>6}  " + "".join(f"{x:7.1%}  " for x in loads)
                + f"{first:6.1%}  {either:6.1%}")

    A = layers[0].shape[1]
    yield " layer  " + "".join(f"load {e:<4}" for e in range(E)) + "first   either"
    for n, chosen in enumerate(layers):
        loads = chosen.flatten().bincount(minlength=E).double() / chosen.numel()
        yield line(n, loads.tolist(), *repetitions(chosen))
    yield line("random", [1 / E] * E, 1 / E, 1 - math.comb(E - A, A) / math.comb(E, A))


def preferred_pieces(tokens, layers, pieces, E):
    """The six pieces that most often have an expert as their first, as {layer: rows}.

    The measure is the share of a piece's occurrences. If shares are equal, lower ids come first.
    """
    ids, table = torch.tensor(tokens), {}
    counts = ids.bincount()
    common = (counts >= MIN_OCCURRENCES).nonzero()[:, 0]
    for layer, chosen in enumerate(layers):
        table[layer] = []
        for e in range(E):
            assigned = ids[chosen[:, 0] == e].bincount(minlength=len(counts))
            share = assigned[common] / counts[common]
            best = share.argsort(descending=True, stable=True)[:6].tolist()
            cells = (f"`{pieces[common[n].item()]}` {100 * share[n]:.0f}" for n in best)
            table[layer].append(f"| {layer} | {e} | {', '.join(cells)} |")
    return table


def measure_routing(model, tokenizer, valid_texts):
    """The parts of the card about routing, by name."""
    E = model.config.num_local_experts
    stories = [tokenizer.encode(text, eos=True) for text in valid_texts]
    layers = chosen_experts(model, stories)
    tokens = [token for story in stories for token in story]
    rows = preferred_pieces(tokens, layers, tokenizer.pieces, E)
    shown = (0, len(layers) // 2, len(layers) - 1)
    head = "| layer | expert | pieces, and percent of their occurrences |\n|---|---|---|\n"
    return {"load": "```text\n" + "\n".join(routing_table(layers, E)) + "\n```",
            "pieces": head + "\n".join(row for layer in shown for row in rows[layer]),
            "all pieces": head + "\n".join(row for layer in rows.values() for row in layer)}


# ------------------------------------------------------------------ samples


def longest_shared(tokens, text):
    """The length of the longest run of tokens that occurs in a text. Both are `as_string`s."""
    longest = 0
    for start in range(len(tokens)):
        while (start + longest < len(tokens)
               and tokens[start:start + longest + 1] in text):
            longest += 1
    return longest


def as_string(tokens):
    """Token ids as a string with one character per token."""
    return "".join(chr(0x4E00 + token) for token in tokens)


def words(text):
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))


def spread(name, values):
    return (f"| {name} | {statistics.median(values):g} | "
            f"{statistics.quantiles(values, n=10)[-1]:g} | {max(values)} |")


def memorisation(rows, stories, train_texts, tokenizer):
    """A table: the longest runs of tokens that rows share with the training text."""
    learned = as_string(token for text in train_texts for token in tokenizer.encode(text, eos=True))
    samples, held_out = ([longest_shared(as_string(row), learned) for row in part]
                         for part in (rows, stories))
    return "\n".join([
        "| longest run of tokens shared with the training text | median | 90 % | longest |",
        "|---|---|---|---|",
        spread(f"{len(samples)} samples", samples),
        spread(f"{len(held_out)} held-out stories, cut to the same length", held_out)])


def word_report(rows, texts, train_texts, eos_id):
    """Sentences about the words of the samples and about how many of them end."""
    known = {word for text in train_texts for word in words(text)}
    written = [word for text in texts for word in words(text)]
    new = sorted({word for word in written if word not in known})
    ended = sum(row[-1] == eos_id for row in rows)
    return (f"The samples contain {len(written)} words, of which "
            f"{100 * sum(word in known for word in written) / len(written):.2f} % occur in the "
            f"training text. The others are: {', '.join(new) or 'none'}. "
            f"{ended} of {len(rows)} samples end within {MAX_NEW_TOKENS} tokens.")


def quoted(texts, first):
    """Samples as Markdown quotations under their seeds, which count from `first`."""
    return "\n\n".join(
        f"Seed {seed}:\n\n" + "\n>\n".join(f"> {line}".rstrip() for line in text.split("\n"))
        for seed, text in enumerate(texts, first))


def measure_samples(model, tokenizer, train_texts, valid_texts):
    """The parts of the card about generated texts, by name."""
    prompt, eos_id = tokenizer.encode(PROMPT), tokenizer.eos_id
    rows = [generate(model, [prompt], MAX_NEW_TOKENS, 0.7, 0.9, seed, eos_id)[0]
            for seed in range(SAMPLES)]
    stories = [tokenizer.encode(text, eos=True)[1:len(prompt) + MAX_NEW_TOKENS]
               for text in valid_texts[:SAMPLES]]
    texts = [tokenizer.decode(prompt + row) for row in rows]
    return {
        "memorised": memorisation([prompt[1:] + row for row in rows], stories, train_texts,
                                  tokenizer),
        "words": word_report(rows, texts, train_texts, eos_id),
        "samples": quoted(texts[:SHOWN_SAMPLES], 0),
        "more samples": quoted(texts[SHOWN_SAMPLES:LISTED_SAMPLES], SHOWN_SAMPLES)}


# ------------------------------------------------------------------ the card


def fill(document, parts):
    """Put each part between its marks. Raises ValueError if its marks are not there once."""
    for name, text in parts.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- -->)", re.S)
        document, count = marks.subn(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", document)
        if count != 1:
            raise ValueError(f"wanted one <!-- {name} --> followed by <!-- -->, found {count}")
    return document


def update(path, parts):
    try:
        document = fill(path.read_text(encoding="utf-8"), parts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    path.write_text(document, encoding="utf-8")


def measure(train_texts, valid_texts):
    """Measure the checkpoint and fill in the three documents."""
    if len(valid_texts) < 2:
        raise ValueError("--valid: the held-out text needs at least two documents")
    model, tokenizer = Mixtral.from_pretrained(TINY, torch.float64), Tokenizer(TINY)
    parts = (measure_routing(model, tokenizer, valid_texts)
             | measure_samples(model, tokenizer, train_texts, valid_texts))
    update(TINY / "study" / "experts.md", {"all pieces": parts.pop("all pieces")})
    update(TINY / "study" / "samples.md", {"more samples": parts.pop("more samples")})
    update(TINY / "README.md", parts)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--train", type=Path, help="the text that the model was trained on")
    p.add_argument("--valid", type=Path, help="the held-out text")
    p.add_argument("--separator", default="<|endoftext|>", help="line between two documents")
    args = p.parse_args(argv)
    if (args.train is None) != (args.valid is None):
        p.error("--train and --valid must be given together")
    try:
        log = (TINY / "train.log").read_text(encoding="utf-8")
        (TINY / "curve.svg").write_text(curve(*read_log(log)), encoding="utf-8")
        if args.train:
            measure(*(documents(path, args.separator) for path in (args.train, args.valid)))
    except (OSError, ValueError) as error:
        print(f"card.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
