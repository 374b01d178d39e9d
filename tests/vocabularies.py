"""Small vocabularies that tests generate: as sentencepiece models, as tokenizer.json, and texts."""

import json
import random
import struct

SPACE = "▁"
ORDINARY, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # as in sentencepiece's files
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}


def metaspace(scheme, split=False):
    return {"normalizer": None, "pre_tokenizer": {
        "type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}}


# How a tokenizer.json can say that a text begins with a ▁.
FORMS = {"prepend": {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}},
         "replace": {"normalizer": REPLACE},
         **{scheme: metaspace(scheme) for scheme in ("first", "always", "never")}}

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
          "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def field(number, content):
    """A field of a protobuf message whose content is another message or a text."""
    size, length = len(content), b""
    while size > 127:
        size, length = size >> 7, length + bytes([size & 127 | 128])
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def model_bytes(pieces):
    """A tokenizer.model with these pieces, each (text, score, kind), of BPE with byte fallback."""
    written = [field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
                     + (b"\x18" + bytes([kind])) * (kind != ORDINARY))
               for text, score, kind in pieces]
    trainer = b"\x18\x02" + b"\x98\x02\x01"  # field 3, BPE, and field 35, byte fallback
    normalizer = field(1, b"identity") + b"\x20\x00"  # field 4, which would remove spaces
    return b"".join(written) + field(2, trainer) + field(3, normalizer)


BASE = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL),
        *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256))]


def unions(draw, texts, count):
    """New texts, each of two earlier ones."""
    texts, new = list(texts), []
    while len(new) < count:
        union = "".join(draw.choices(texts, k=2))
        if union not in texts and len(union) < 9:
            texts.append(union)
            new.append(union)
    return new


def vocabulary(seed, extended=True):
    """The pieces of a random vocabulary, of which most can be reached by merges.

    An extended one has, after ordinary pieces with the scores 0, -1, -2, ..., more of them with any
    scores and with equal ones, user-defined and control pieces, in any order.
    """
    draw = random.Random(seed)
    letters = draw.sample("abcdeéß東🦙0.\n", 7)
    merged = [text for text in unions(draw, [SPACE, SPACE, *letters], 40)
              if not extended or seed % 2 or SPACE not in text[1:]]
    pieces = [*BASE, *((text, -float(rank), ORDINARY) for rank, text in enumerate(merged)),
              *((text, -float(len(merged)) - n, ORDINARY) for n, text in enumerate(
                  [SPACE, *letters]))]
    if extended:
        new = unions(draw, [*merged, *letters], 30)
        scores = [0.0, 0.0, 3.5, -2.0, -7.25, -1e9]
        kinds = [ORDINARY] * 20 + [USER_DEFINED] * 7 + [CONTROL] * 3
        draw.shuffle(kinds)
        pieces += [(text, draw.choice(scores), kind) for text, kind in zip(new, kinds, strict=True)]
        pieces += [("<|im_start|>", 0.0, CONTROL), ("[X]", 0.0, USER_DEFINED)]
    return pieces


def texts_of(pieces, seed, count, more=()):
    """Random texts in which pieces, spaces and characters without a piece are frequent."""
    draw = random.Random(seed)
    parts = [text.replace(SPACE, " ") for text, _, kind in pieces if kind != BYTE]
    parts += [" ", "  ", "a", "b", "é", "🦙", "x", "\n", SPACE, "<0x41>", *more, *more]
    return ["".join(draw.choices(parts, k=draw.randrange(12))) for _ in range(count)]


def tokenizer_json(pieces, form="prepend", lists=False, added=()):
    """What transformers saves for these pieces: merges are all splits of a piece, best first.

    `added` are more tokens, each a dict with at least "id" and "content".
    """
    ordinary = {text for text, _, kind in pieces if kind == ORDINARY}
    ids = {text: n for n, (text, _, _) in enumerate(pieces)}
    scores = {text: score for text, score, kind in pieces if kind == ORDINARY}
    pairs = [(text[:n], text[n:]) for text in sorted(scores, key=lambda t: (-scores[t], ids[t]))
             for n in range(1, len(text)) if {text[:n], text[n:]} <= ordinary]
    plain = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    tokens = [{"id": ids[text], "content": text, "special": True} for text, _, kind in pieces
              if kind in (UNKNOWN, CONTROL)]
    return {"version": "1.0", "pre_tokenizer": None, "post_processor": None,
            "added_tokens": [plain | token for token in [*tokens, *added]], **FORMS[form],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
                  if form in ("prepend", "first", "always") else [])]},
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
                      "byte_fallback": True, "ignore_merges": False, "vocab": ids,
                      "merges": [list(pair) if lists else " ".join(pair) for pair in pairs]}}


def write(directory, **files):
    """Write files, which are named as in `tokenizer_json=...`, and return the directory."""
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (directory / name.replace("_model", ".model")).write_bytes(content)
        else:
            (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory
