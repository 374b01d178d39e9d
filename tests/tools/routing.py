"""Show which experts the tokens of a text are routed to: `python tests/tools/routing.py --help`.

    python tests/tools/routing.py --prompt "Once upon a time" --max-new-tokens 40
    python tests/tools/routing.py --html routing.html < story.txt

It prints a table of all layers. An assignment is a pair of a token and an expert chosen for it, so
a text of N tokens has A·N of them in each layer. The load of an expert is its share of the
assignments. The last two columns are the measure of Table 5 in the paper: the share of tokens with
the same first expert as the token before, and with any expert in common with it. The row `random`
holds what random routing gives: 1/E, 1/E and 1 − C(E−A, A)/C(E, A).

--html writes a page with every layer, weight and margin, and with the window and the rolling buffer
of every token. --svg draws the first, middle and last layer, as Figure 8 of the paper does. These
commands make the picture of the README, in float64 so that it does not depend on the machine:

    python tests/tools/routing.py --prompt "Once upon a time" --max-new-tokens 70 \\
        --svg tiny/routing.svg

`generate.py --experts` colours the text on the terminal.

Exit codes: 0 success, 1 bad input, 2 bad arguments, 130 interrupted.
"""

import argparse
import html
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "oracle"), str(ROOT), str(ROOT / "tiny")]
from trace import add_model_arguments, exit_code, load_model, recording

import torch
from card import COLOURS, routing_table

from convert import check_output, complete_or_absent
from generate import check_options, generate, new_cache
from tokenizer import Tokenizer

PAGE = Path(__file__).with_name("routing.html")
CHUNK = 256  # tokens per chunk of a cache
WIDTH, LETTER, LINE = 860, 7.8, 22  # of the picture, a character and a line, in pixels


@torch.inference_mode()
def record(model, tokens):
    """The routing of a text, which is read in chunks.

    tokens, a list of N ids -> weights (L, N, A), experts (L, N, A), margins (L, N)

    The margin is the logit of the last chosen expert minus that of the best other expert. If it is
    close to 0, rounding can change the choice. It is infinite if all experts are chosen.
    """
    ids = torch.tensor([tokens], device=model.lm_head.weight.device)
    cache = model.new_cache(1, len(tokens), CHUNK)
    with recording(model, only=("weights", "chosen", "margin")) as seen:
        model(ids, cache, last_only=True)

    def joined(word):
        return torch.stack([torch.cat(parts) for name, parts in seen.items()
                            if name.endswith(f".{word}")])

    weights, c = joined("weights"), model.config
    some = c.num_experts_per_tok < c.num_local_experts
    return weights, joined("chosen"), joined("margin") if some else weights[..., 0] + math.inf


def token_texts(tokenizer, tokens):
    """The text of each token, for display.

    A control token shows its piece, as <s>. A character of several byte tokens is shown at the
    last of them.
    """
    decoder, control = tokenizer.stream(), tokenizer.control
    texts = [decoder.feed(t) + (tokenizer.pieces[t] if t in control else "") for t in tokens]
    return [*texts[:-1], texts[-1] + decoder.flush()]


# ------------------------------------------------------------------ page and picture


def page(name, config, tokens, texts, prompt_length, routing):
    """The HTML page of a routing, which is the result of `record`."""
    weights, experts, margins = routing
    data = {"model": name, "prompt": prompt_length, "window": config.sliding_window,
            "chunk": CHUNK, "experts": config.num_local_experts, "tokens": texts,
            "ids": tokens, "chosen": experts.tolist(),
            "weights": [[[round(w, 4) for w in token] for token in layer]
                        for layer in weights.tolist()],
            "margins": [[round(m, 4) if m < math.inf else None for m in layer]
                        for layer in margins.tolist()]}
    text = json.dumps(data).replace("<", "\\u003c")  # so that no </script> can end the data
    return PAGE.read_text(encoding="utf-8").replace("/*DATA*/null", text)


def rectangle(x, y, width, height, expert, text=""):
    """The SVG of a text on the colour of an expert."""
    # XML has no way to write most control characters.
    text = re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
    return (f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" '
            f'fill="{COLOURS[expert % len(COLOURS)]}"/>'
            f'<text x="{x:.1f}" y="{y + 14}" textLength="{width:.1f}" '
            f'xml:space="preserve">{html.escape(text)}</text>')


def drawn_layer(texts, experts, y):
    """The SVG parts of a text in one layer, wrapped, from height y on; and the height below it."""
    parts, x = [], 10.0
    for text, e in zip(texts, experts[:, 0].tolist(), strict=True):
        for n, line in enumerate(text.split("\n")):
            width = LETTER * len(line)
            if n or x + width > WIDTH - 10:
                x, y = 10.0, y + LINE
            if line:
                parts.append(rectangle(x, y, width, LINE - 3, e, line))
            x += width
    return parts, y + LINE


def picture(texts, experts, E):
    """The SVG picture of experts (L, N, A) in the first, middle and last layer."""
    parts, y, L = [], 4, len(experts)
    for layer in sorted({0, L // 2, L - 1}):
        y += 24
        parts.append(f'<text x="10" y="{y}" font-weight="bold">layer {layer}</text>')
        more, y = drawn_layer(texts, experts[layer], y + 8)
        parts += more
    y += 14
    for e in range(E):
        name = f"expert {e}"
        parts.append(rectangle(10 + 100 * (e % 8), y + 26 * (e // 8), LETTER * len(name), LINE, e,
                               name))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" '
        f'height="{y + 26 * math.ceil(E / 8) + 6}" font-family="monospace" font-size="13" '
        'role="img">', "<title>The first expert of each token in three layers</title>",
        '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


# ------------------------------------------------------------------ the command


def read_tokens(args, tokenizer, model):
    """The tokens of the text, and all tokens, with those that the model writes after it."""
    if args.prompt is None:
        sys.stdin.reconfigure(encoding="utf-8-sig")
        args.prompt = sys.stdin.read()
    prompt = tokenizer.encode(args.prompt)
    new_cache(model, 1, len(prompt) + args.max_new_tokens)  # raises ValueError if it is too large
    [new] = generate(model, [prompt], args.max_new_tokens, eos_id=tokenizer.eos_ids)
    if len(prompt + new) < 2:
        raise ValueError("the text is empty; its statistics need at least one token after <s>")
    return prompt, prompt + new


def write_text(path, text):
    with complete_or_absent(path) as part:
        part.write_text(text, encoding="utf-8")
    print(f"[routing in {path}]", file=sys.stderr)


def run(args):
    check_options(max_new_tokens=args.max_new_tokens)
    for path in filter(None, (args.html, args.svg)):
        check_output(path)
    tokenizer, model = Tokenizer(args.model), load_model(args)
    prompt, tokens = read_tokens(args, tokenizer, model)
    texts, routing = token_texts(tokenizer, tokens), record(model, tokens)
    experts, E = routing[1], model.config.num_local_experts
    print("\n".join(routing_table(experts, E)))
    if args.html:
        name = args.model.resolve().name
        write_text(args.html, page(name, model.config, tokens, texts, len(prompt), routing))
    if args.svg:
        write_text(args.svg, picture(texts[1:], experts[:, 1:], E))  # without <s>


def main(argv=None):
    p = argparse.ArgumentParser(prog="routing.py", allow_abbrev=False,
                                description="Show which experts the tokens of a text use.")
    p.add_argument("--prompt", metavar="TEXT", help="the text (default: that of standard input)")
    add_model_arguments(p)
    p.add_argument("--max-new-tokens", type=int, default=0, metavar="N",
                   help="continue the text by up to N tokens (default: 0)")
    p.add_argument("--html", type=Path, metavar="FILE", help="write a page of all layers")
    p.add_argument("--svg", type=Path, metavar="FILE", help="write a picture of three layers")
    return exit_code("routing.py", run, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
