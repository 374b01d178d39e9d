"""Make everything again that depends on the embedded weights.

    python tiny/card.py --train stories.txt --valid held_out.txt

Measures them for the model card (the parts of README.md here between <!-- name --> and <!-- -->),
draws curve.svg from train.log and routing.svg, measures the tables of rounding in the oracle's
README (install transformers first: its columns stand beside ours), and puts the outputs that the
repository's README shows to what its commands now print. Without the two texts, only what needs
none. The card's numbers are computed in float64, so that every machine gives the same.
"""

import argparse
import contextlib
import html
import io
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
sys.path[:0] = [str(path) for path in (ROOT, TINY, ROOT / "tests", ROOT / "tests" / "oracle")]
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import drift
import picture
import routing
import torch
from train import documents

from generate import steps
from mixtral import Mixtral
from tokenizer import Tokenizer

PROMPT, SAMPLES, LENGTH = "Once upon a time", 200, 300
SHOWN = 10  # samples printed in the card
COMMON = 40  # occurrences from which on a piece counts for what an expert takes


# ---- What the log tells

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
    """One panel: a title, the frame with its two bounds, and lines of {step: value} in colours."""
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
    """The picture of a training run: loss and held-out score, and each layer's load per expert."""
    last, L = max(losses), len(next(iter(loads.values())))
    parts = chart(50, 30, 380, 150, "training loss, nats per piece", [(losses, "#777")],
                  1.5, 4, last)
    parts += chart(490, 30, 380, 150, "held-out bits per byte, first 64 stories",
                   [(scores, "#c0392b")], 0.6, 1, last)
    for layer in range(L):
        lines = [({step: load[layer][e] for step, load in loads.items()},
                  picture.COLOURS[e % len(picture.COLOURS)])
                 for e in range(len(loads[min(loads)][layer]))]
        parts += chart(50 + 140 * layer, 225, 120, 110, f"layer {layer}", lines, 0, 25, last)
    return "\n".join([
        '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="375" viewBox="0 0 900 375" '
        'font-family="sans-serif" font-size="11" role="img" aria-label="Loss, held-out score and '
        'expert load over training">', '<rect width="100%" height="100%" fill="#fff"/>', *parts,
        f'<text x="50" y="195">steps, 0 to {last}</text>',
        '<text x="50" y="355">percent of the visits that each expert takes, over the same '
        'steps</text>', "</svg>"]) + "\n"


# ---- What the weights do

def samples(model, tokenizer, count, length):
    """Rows of new tokens for seeds 0, 1, …: each what `generate.py --seed` gives it alone."""
    rows = [[] for _ in range(count)]
    drawn = steps(model, [tokenizer.encode(PROMPT)], length, 0.7, 0.9, range(count),
                  tokenizer.eos_id)
    for step in drawn:
        for row, token in zip(rows, step, strict=True):
            row += [] if token is None else [token[0]]
    return rows


def longest_shared(tokens, text):
    """Length of the longest run of tokens that occurs in a text, both as strings of one a token."""
    longest = 0
    for start in range(len(tokens)):
        while (start + longest < len(tokens)
               and tokens[start:start + longest + 1] in text):
            longest += 1
    return longest


def as_string(tokens):
    return "".join(chr(0x4E00 + token) for token in tokens)


def words(text):
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))


def specialities(tokens, layers, names, E):
    """The pieces that each expert takes first most often, as rows of a table."""
    ids = torch.tensor(tokens)
    counts = ids.bincount()
    common = (counts >= COMMON).nonzero()[:, 0]
    for layer, chosen in enumerate(layers):
        for e in range(E):
            taken = ids[chosen[:, 0] == e].bincount(minlength=len(counts))
            share = taken[common] / counts[common]
            best = share.argsort(descending=True, stable=True)[:6]
            yield f"| {layer} | {e} | " + ", ".join(
                f"`{names[common[n].item()]}` {100 * share[n]:.0f}" for n in best.tolist()) + " |"


def measured(model, tokenizer, train_texts, valid_texts):
    """The measured parts of the card by name."""
    E, eos = model.config.num_local_experts, tokenizer.eos_id
    stories = [tokenizer.encode(text, eos=True) for text in valid_texts]
    chosen = [torch.cat(layer) for layer in zip(*(routing.choices(model, story)
                                                  for story in stories), strict=True)]
    tokens = [token for story in stories for token in story]

    rows = samples(model, tokenizer, SAMPLES, LENGTH)
    prompt = tokenizer.encode(PROMPT)
    texts = [tokenizer.decode(prompt + row) for row in rows]
    known = {word for text in train_texts for word in words(text)}
    said = [word for text in texts for word in words(text)]
    strange = sorted({word for word in said if word not in known})
    learned = as_string(token for text in train_texts for token in tokenizer.encode(text, eos=True))
    spans = [longest_shared(as_string(prompt[1:] + row), learned) for row in rows]
    likewise = [longest_shared(as_string(story[1:len(prompt) + LENGTH]), learned)
                for story in stories[:SAMPLES]]
    ended = sum(row[-1] == eos for row in rows)
    return {
        "load": fenced("\n".join(routing.table(chosen, E))),
        "specialities": "| layer | expert | pieces, and percent of their occurrences |\n"
                        "|---|---|---|\n"
                        + "\n".join(specialities(tokens, chosen, tokenizer.pieces, E)),
        "memorised": "\n".join([
            "| longest run of pieces shared with the training text | median | 90 % | longest |",
            "|---|---|---|---|",
            spread(f"{len(spans)} samples", spans),
            spread(f"{len(likewise)} held-out stories, cut to the same length", likewise)]),
        "words": f"Of the samples' {len(said)} words, "
                 f"{100 * sum(word in known for word in said) / len(said):.2f} % occur in the "
                 f"training text; the others: {', '.join(strange) or 'none'}. "
                 f"{ended} of {len(rows)} samples end within {LENGTH} pieces.",
        "samples": "\n\n".join(f"Seed {n}:\n\n" + "\n>\n".join(f"> {line}".rstrip()
                                                               for line in text.split("\n"))
                               for n, text in enumerate(texts[:SHOWN]))}


def fenced(text):
    return f"```text\n{text}\n```"


def spread(name, values):
    return (f"| {name} | {statistics.median(values):g} | "
            f"{statistics.quantiles(values, n=10)[-1]:g} | {max(values)} |")


def fill(card, parts):
    """The card with each part put between its marks. Raises ValueError where marks are missing."""
    for name, text in parts.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- -->)", re.S)
        card, count = marks.subn(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", card)
        if count != 1:
            raise ValueError(f"README.md: wanted one <!-- {name} -->, found {count}")
    return card


def refill(path, parts):
    path.write_text(fill(path.read_text(encoding="utf-8"), parts), encoding="utf-8")


def drifts():
    """The tables that tests/oracle/drift.py prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        drift.main()
    return printed.getvalue().rstrip()


# ---- What the repository's README shows

def workplace(directory):
    """A copy of the repository with a raw checkpoint in it, and python as the README calls it."""
    for name in ("mixtral.py", "tokenizer.py", "generate.py", "convert.py", "pyproject.toml"):
        shutil.copy(ROOT / name, directory)
    for name in ("tests", "tiny"):
        shutil.copytree(ROOT / name, directory / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "bin").mkdir()
    (directory / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (directory / "bin" / "python").chmod(0o755)
    run(directory, "python convert.py --input_dir tiny --output_dir RAW --to mistral")
    return directory


def run(place, command):
    """What a command of the README prints. Raises ValueError if it fails."""
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, cwd=place, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PATH": path, "NO_COLOR": "1"})
    if done.returncode:
        raise ValueError(f"{command}: exit {done.returncode}: {done.stderr}")
    return done.stdout.rstrip()


def refreshed(readme, place):
    """The README with each output shown whole put to what its command prints; … stays."""
    def commands(block):
        parts = re.split(r"^\$ ", block[1], flags=re.M)
        for n, part in enumerate(parts[1:], 1):
            command, output = part.split("\n", 1)
            printed = run(place, command)
            ending = output[len(output.rstrip()):]
            parts[n] = f"{command}\n" + (output if "…" in output else printed + ending)
        return f"```console\n{'$ '.join(parts)}```"

    def python(block):
        (place / "block.py").write_text(block[1], encoding="utf-8")
        return f"```python\n{block[1]}```\n\n```text\n{run(place, 'python block.py')}\n```"

    printed = " ".join(run(place, f'python generate.py --prompt "{PROMPT}"').split())
    story = textwrap.wrap(printed, 94)[:2]
    readme = re.sub(rf"^    {PROMPT}, .*?…$", "    " + "\n    ".join(story) + " …", readme,
                    flags=re.M | re.S)
    readme = re.sub(r"^```console\n(.*?)^```$", commands, readme, flags=re.M | re.S)
    return re.sub(r"^```python\n(.*?)```\n\n```text\n.*?^```$", python, readme, flags=re.M | re.S)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--train", type=Path, help="the text it learned from")
    p.add_argument("--valid", type=Path, help="the text held out")
    p.add_argument("--separator", default="<|endoftext|>", help="line between two documents")
    args = p.parse_args()
    if (args.train is None) != (args.valid is None):
        p.error("--train and --valid go together")
    (TINY / "curve.svg").write_text(curve(*read_log((TINY / "train.log").read_text())))
    picture.main()
    if args.train:
        model, tokenizer = Mixtral.from_pretrained(TINY, torch.float64), Tokenizer(TINY)
        texts = [documents(path, args.separator) for path in (args.train, args.valid)]
        refill(TINY / "README.md", measured(model, tokenizer, *texts))
    refill(ROOT / "tests" / "oracle" / "README.md", {"drift": drifts()})
    with tempfile.TemporaryDirectory() as place:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        readme = refreshed(readme, workplace(Path(place)))
        (ROOT / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"card.py: {error}")
