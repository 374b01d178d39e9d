"""Draw the routing of a story of the embedded model: `python tests/picture.py` → tiny/routing.svg.

Each token is coloured by its first expert in the first, the middle and the last layer, as in the
paper's Figure 8. Computed in float64, so that every machine draws the same picture.
"""

import html
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch

from generate import generate, pieces, routing
from mixtral import Mixtral
from tokenizer import Tokenizer

COLOURS = ("#f4a6a6", "#f2c48d", "#e8dc7a", "#a8d98a", "#86d4c8", "#92bdf0", "#c3aaf0", "#f0a6d8")
WIDTH, LETTER, LINE = 860, 7.8, 22


def story(prompt="Once upon a time", count=70):
    """The texts of a story's tokens, and the experts of each (L, N, k)."""
    tokenizer, model = Tokenizer(ROOT / "tiny"), Mixtral.from_pretrained(ROOT / "tiny",
                                                                         torch.float64)
    tokens = tokenizer.encode(prompt)
    tokens += generate(model, [tokens], count, eos_id=tokenizer.eos_id)[0]
    return pieces(tokenizer, tokens)[1:], routing(model, tokens)[1][:, 1:]


def drawn(texts, experts):
    """The picture: three layers, each its name and the text, wrapped; below them the colours."""
    parts, y = [], 4
    for layer in (0, len(experts) // 2, len(experts) - 1):
        y += 24
        parts.append(f'<text x="10" y="{y}" font-weight="bold">layer {layer}</text>')
        x, y = 10.0, y + 8
        for text, e in zip(texts, experts[layer, :, 0].tolist(), strict=True):
            for n, piece in enumerate(text.split("\n")):
                width = LETTER * len(piece)
                if n or x + width > WIDTH - 10:
                    x, y = 10.0, y + LINE
                if piece:
                    parts += [
                        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LINE - 3}" '
                        f'fill="{COLOURS[e % len(COLOURS)]}"/>',
                        f'<text x="{x:.1f}" y="{y + 14}" textLength="{width:.1f}" '
                        f'xml:space="preserve">{html.escape(piece)}</text>']
                x += width
        y += LINE
    y += 14
    for e in range(8):
        x = 10 + 100 * e
        parts.append(f'<rect x="{x}" y="{y}" width="92" height="{LINE}" fill="{COLOURS[e]}"/>'
                     f'<text x="{x + 8}" y="{y + 15}">expert {e}</text>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + LINE + 10}" '
        'font-family="monospace" font-size="13" role="img">',
        "<title>The first expert of each token of a story, in three layers</title>",
        '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


def main():
    (ROOT / "tiny" / "routing.svg").write_text(drawn(*story()), encoding="utf-8")


if __name__ == "__main__":
    main()
