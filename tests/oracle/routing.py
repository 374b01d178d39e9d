"""Show which experts the tokens of a text are routed to: `python tests/oracle/routing.py --help`.

    python tests/oracle/routing.py --prompt "Once upon a time" --max-new-tokens 40
    python tests/oracle/routing.py story.txt --html routing.html

The first part of the output is the text with the first expert of each token in one layer: as a
colour on a terminal, unless NO_COLOR is set, and otherwise as a small number after the token.

The second part is a table of all layers. An assignment is a pair of a token and an expert chosen
for it, so a text of N tokens has A·N of them in each layer. The load of an expert is its share of
the assignments. The last two columns are the measure of Table 5 in the paper: the share of tokens
with the same first expert as the token before, and with any expert in common with it. The row
`random` holds what random routing gives: 1/E, 1/E and 1 − C(E−A, A)/C(E, A).

--html writes a page with every layer, weight and margin, and with the window and the rolling buffer
of every token. --svg draws the first, middle and last layer, as Figure 8 of the paper does. These
commands make the picture of the README, in float64 so that it does not depend on the machine:

    python tests/oracle/routing.py --prompt "Once upon a time" --max-new-tokens 70 \\
        --svg tiny/routing.svg

Exit codes: 0 success, 1 bad input, 2 bad arguments, 130 interrupted.
"""

import argparse
import html
import json
import math
import os
import re
import sys
from pathlib import Path
from trace import add_model_arguments, exit_code, load_model, recording  # beside this file

import torch

from convert import check_output, complete_or_absent
from generate import check_options, generate, new_cache
from tokenizer import Tokenizer

PAGE = Path(__file__).with_name("routing.html")
CHUNK = 256  # tokens per chunk of a cache
TERMINAL_COLOURS = (203, 215, 221, 114, 80, 75, 141, 211)  # of the 256 colours of a terminal
COLOURS = ("#f4a6a6", "#f2c48d", "#e8dc7a", "#a8d98a", "#86d4c8", "#92bdf0", "#c3aaf0", "#f0a6d8")
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

    c = model.config
    if c.num_experts_per_tok < c.num_local_experts:
        return joined("weights"), joined("chosen"), joined("margin")
    return joined("weights"), joined("chosen"), joined("weights")[..., 0] + math.inf


def expert_load(experts, E):
    """The share of the assignments of each expert: (N, A) -> (E)."""
    return experts.flatten().bincount(minlength=E).double() / experts.numel()


def repetitions(experts):
    """How often a token shares an expert with the token before: (N, A) -> two fractions.

    The first fraction counts equal first experts, the second any expert in common.
    """
    before, after = experts[:-1], experts[1:]
    same_first = before[:, 0] == after[:, 0]
    any_shared = (before.unsqueeze(2) == after.unsqueeze(1)).any(dim=2).any(dim=1)
    return same_first.double().mean().item(), any_shared.double().mean().item()


def random_repetitions(E, A):
    """The expected `repetitions` if every token gets A of E experts at random."""
    return 1 / E, 1 - math.comb(E - A, A) / math.comb(E, A)


def token_texts(tokenizer, tokens):
    """The text of each token, for display.

    A control token shows its piece, as <s>. A character of several byte tokens is shown at the
    last of them.
    """
    decoder, control = tokenizer.stream(), tokenizer.control
    texts = [decoder.feed(t) + (tokenizer.pieces[t] if t in control else "") for t in tokens]
    return [*texts[:-1], texts[-1] + decoder.flush()]


# ------------------------------------------------------------------ terminal


def painted(text, expert):
    """The text on the background colour of an expert; line ends stay uncoloured."""
    start = f"\x1b[30;48;5;{TERMINAL_COLOURS[expert % len(TERMINAL_COLOURS)]}m"
    return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def marked_text(texts, experts, colour):
    """The texts of tokens with the first expert of each, as a colour or a small number."""
    subscripts = {ord("0") + n: ord("₀") + n for n in range(10)}
    return "".join(painted(text, e) if colour else text + str(e).translate(subscripts)
                   for text, e in zip(texts, experts[:, 0].tolist(), strict=True))


def table(experts, E, colour):
    """The lines of the table of all layers, from experts (L, N, A), in percent."""
    def line(name, shares):
        return f"{name:>6}" + "".join(f"{100 * x:{width}.1f}" for x, width in zip(
            shares, [6] * E + [12, 12], strict=True))

    heads = (f"{e:6}" for e in range(E))
    yield "expert load in percent, and percent of tokens that share an expert with the one before:"
    yield (" layer" + "".join(painted(head, e) if colour else head for e, head in enumerate(heads))
           + "  same first  any shared")
    for n, layer in enumerate(experts):
        yield line(n, [*expert_load(layer, E).tolist(), *repetitions(layer)])
    yield line("random", [1 / E] * E + [*random_repetitions(E, experts.shape[2])])


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
    if args.file is None:
        text = args.prompt
    else:
        try:
            text = args.file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.file}: not UTF-8 text: {error}") from None
    prompt = tokenizer.encode(text)
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
    L, E = model.config.num_hidden_layers, model.config.num_local_experts
    layer = L // 2 if args.layer is None else args.layer
    if not 0 <= layer < L:
        raise ValueError(f"--layer must be in 0 … {L - 1}, got {layer}")
    prompt, tokens = read_tokens(args, tokenizer, model)
    texts, routing = token_texts(tokenizer, tokens), record(model, tokens)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"layer {layer}, first expert of each token:\n")
    print(marked_text(texts, routing[1][layer], colour), end="\n\n")
    print("\n".join(table(routing[1], E, colour)))
    if args.html:
        name = args.model.resolve().name
        write_text(args.html, page(name, model.config, tokens, texts, len(prompt), routing))
    if args.svg:
        write_text(args.svg, picture(texts[1:], routing[1][:, 1:], E))  # without <s>


def main(argv=None):
    p = argparse.ArgumentParser(prog="routing.py", allow_abbrev=False,
                                description="Show which experts the tokens of a text use.")
    text = p.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="the text")
    text.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a file of UTF-8 text")
    add_model_arguments(p)
    p.add_argument("--max-new-tokens", type=int, default=0, metavar="N",
                   help="continue the text by up to N tokens (default: 0)")
    p.add_argument("--layer", type=int, metavar="L",
                   help="the layer of the text (default: the middle one)")
    p.add_argument("--html", type=Path, metavar="FILE", help="write a page of all layers")
    p.add_argument("--svg", type=Path, metavar="FILE", help="write a picture of three layers")
    return exit_code("routing.py", run, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
