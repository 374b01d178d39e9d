"""Byte-fallback BPE: text to token ids and back, with the same ids as sentencepiece for any text.

`Tokenizer.encode` takes four steps, shown here with the tokenizer of Mixtral 8x7B:

    This is 🦙                        the text
    ▁This▁is▁🦙                       spaces become ▁, and one more ▁ is put in front
    ▁ T h i s ▁ i s ▁ 🦙              one symbol per character
    ▁This ▁is ▁ 🦙                    neighbours are merged, best pair first (see `merge`)
    851 349 28705 243 162 169 156     a piece of the vocabulary becomes its id; 🦙 is not a piece
                                      and becomes one id for each of its four UTF-8 bytes

The vocabulary is a list of pieces, and the index of a piece is its id. There are five kinds:

    ordinary       text; its score says how early it is merged
    byte           <0x00> to <0xFF>, for characters that are not pieces
    control        <s>, </s> and, since v2, [INST]: ids without text, which no text encodes to
    unknown        <unk>; because of the byte pieces, no text encodes to it
    user-defined   matched as a whole before any merge, for example [REFERENCE_DOC_0] in v3

Here v1, v2 and v3 are versions of Mistral's tokenizer.model; Mixtral 8x7B has v1. Fine-tunes add
tokens such as <|im_start|>. No text of a user encodes to one or to a control piece; `encode_chat`
puts them in place. A text is split into words at places that no merge can cross, and the ids of
short words are remembered. Training, unigram models and other normalisers are not supported.
"""

import codecs
import heapq
import json
import re
import struct
from math import copysign
from pathlib import Path

import sentencepiece

SPACE = "▁"  # U+2581, which stands for a space inside pieces
LATIN = "a-zA-ZÀ-ÖØ-öø-ɏ"  # without × and ÷, which are among the accented letters in Unicode
MAX_WORDS, MAX_WORD_LENGTH = 1 << 16, 32  # of the words whose ids are remembered
FILES = (*(f"tokenizer.model{version}" for version in ("", ".v3", ".v2", ".v1")), "tokenizer.json")
ORDINARY, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of pieces in a tokenizer.model
METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
START, END = "<|im_start|>", "<|im_end|>"  # which are around each message in ChatML
GAP = "\x1f"  # white space that no text has; see `_chatml_parts`


def merge(word, scores, gap=""):
    """Merge the neighbours whose union scores highest, leftmost first, until no union has a score.

    Takes O(n log n) time for n characters. In a tokenizer.json pairs such as "ab c" have scores, by
    their order; the `gap` is a space. Here "bc" is merged first, and then "abc":

    >>> merge("abcab", {"bc": 7.5, "ab": -1.0, "abc": -2.0})
    ['abc', 'ab']
    """
    heap = []  # pairs of neighbours: word[start:middle] and word[middle:end], by score
    end_of = [*range(1, len(word) + 1), 0]  # from the start of each symbol to its end
    start_of = [len(word), *range(len(word))]  # from the end of each symbol to its start

    def push(start, middle, end):
        key = word[start:middle] + gap + word[middle:end] if gap else word[start:end]
        if key in scores:  # without a neighbour on this side a half is empty, and key has none
            heapq.heappush(heap, (-scores[key], start, middle, end))

    for start in range(len(word) - 1):
        push(start, start + 1, start + 2)
    while heap:
        _, start, middle, end = heapq.heappop(heap)
        if end_of[start] == middle and end_of[middle] == end:  # both symbols still exist
            end_of[start], end_of[middle], start_of[end] = end, 0, start
            push(start_of[start], start, end)
            push(start, end, end_of[end])
    return [word[start:end] for start, end in enumerate(end_of) if end]


def read_file(path, parse=lambda data: {**json.loads(data)}):
    """What `parse` makes of the bytes of a file. Raises a ValueError that names the file."""
    try:
        data = path.read_bytes()
        if not data or data.startswith(b"version https://git-lfs"):
            raise ValueError("empty, or a Git LFS pointer; get the file with: git lfs pull")
        return parse(data)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = "no " * isinstance(error, KeyError) + (getattr(error, "strerror", 0) or str(error))
        raise ValueError(f"{path}: not usable: {repr(reason)[1:-1]}") from None


def prefix_rule(raw):
    """Whether a tokenizer.json puts a ▁ before a text, after a control token, and before another ▁.
    The result is None if it changes texts in a way that is not known here."""
    normalizer, splitter = raw.get("normalizer"), raw.get("pre_tokenizer")
    if normalizer and not splitter:
        steps = normalizer.get("normalizers", [normalizer])
        return (PREPEND in steps,) * 3 if steps in ([PREPEND, REPLACE], [REPLACE]) else None
    if splitter and not normalizer and splitter == splitter | METASPACE:
        return splitter["prepend_scheme"] != "never", splitter["prepend_scheme"] == "always", False
    return None


def word_pattern(unions):
    """The regular expression of a word, at whose ends no merge crosses.

    In Mistral's models a piece has ▁ only in front, and no Latin letter beside other characters.
    Without the second property a word ends only before a ▁, and without the first nowhere.
    """
    for text in (f"[{LATIN}]+|[^{LATIN}{SPACE}]+", f"[^{SPACE}]+"):
        pattern = re.compile(f"{SPACE}*(?:{text})|{SPACE}+")
        if all(map(pattern.fullmatch, unions)):
            return pattern
    return re.compile("(?s).+")


class Tokenizer:
    """Text to ids and back, from a tokenizer.model, a tokenizer.json or a directory with one.

    In a directory, other files may add tokens, name BOS and EOS, and give a chat template. Raises
    ValueError for a file that is missing, damaged or not byte-fallback BPE.

    vocab_size, pieces, texts   number of pieces, list of them, dict from id to text with added ids
    bos_id, eos_id, unk_id      the ids of <s>, </s>, <unk>; a directory may name other BOS and EOS
    eos_ids                     the set of ids that end a text: those of generation_config.json,
                                else of config.json, else eos_id, and in ChatML also <|im_end|>
    """

    def __init__(self, path):
        path = directory = Path(path)
        if path.is_dir():  # of several files the first of FILES
            path = next((path / name for name in FILES if (path / name).exists()),
                        path / "tokenizer.model or tokenizer.json")

        def extra(name, *parse):
            return read_file(directory / name, *parse) if (directory / name).exists() else {}

        raw = read_file(path) if path.suffix == ".json" else extra("tokenizer.json")
        settings = extra("special_tokens_map.json") | extra("tokenizer_config.json")
        template = extra("chat_template.jinja", bytes.decode) or settings.get("chat_template") or ""
        tokens = {i: {"content": text} for text, i in extra("added_tokens.json").items()}
        ends = [extra(f"{name}config.json").get("eos_token_id") for name in ("generation_", "")]

        def load(data):
            rule = prefix_rule(raw)
            if path.suffix == ".json":
                self._read_json(raw, rule)
            else:
                after_mark = settings.get("legacy") is not False and (rule is None or rule[1])
                self._read_model(data, (True, after_mark, True))
            tokens.update({token["id"]: token for token in raw.get("added_tokens", ())})
            tokens.update({int(i): t for i, t in settings.get("added_tokens_decoder", {}).items()})
            self._add(tokens, settings.get("bos_token"), settings.get("eos_token"))
            self._set_chat_and_ends(template, [*ends, self.eos_id])
            frame = json.dumps(raw.get("post_processor"))  # what is put around a text
            self.adds_bos = settings.get("add_bos_token") is not False and (
                frame == "null" or '"single": [{"SpecialToken"' in frame)

        read_file(path, load)

    def _read_model(self, data, rule):
        sentencepiece.set_min_log_level(2)  # no warnings to standard error; errors are raised
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        every = list(range(model.vocab_size()))
        pieces, scores, kinds, at = model.id_to_piece(every), model.get_score(every), [], 0
        for piece, score in zip(pieces, scores, strict=True):
            # In the file, 0x18 and the kind of a piece follow its score, unless it is ordinary.
            entry = piece.encode() + struct.pack("<Bf", 0x15, score)
            at = data.index(entry, at) + len(entry)
            kinds.append(data[at + 1] if data[at:at + 1] == b"\x18" else ORDINARY)
        # In sentencepiece 0.0 is higher than -0.0, the score of the first merge in training.
        scores = {pieces[i]: scores[i] or copysign(5e-324, scores[i])
                  for i in every if kinds[i] == ORDINARY}
        user_defined = {pieces[i]: i for i in every if kinds[i] == USER_DEFINED}
        self._set(pieces, scores, "", scores, user_defined, rule)
        self._add({i: {"content": pieces[i]} for i in every if kinds[i] == CONTROL})
        # The spaces, the ligature and the tab reveal other normalisers, the pieces other models.
        text = "".join(["  Aﬁ\t ", " ".join(user_defined), *[*scores][:300], *[*scores][-100:]])
        ids = self.encode(text, bos=False)
        more = [*ids, *self.control, self.unk_id, *self.byte_ids]
        if model.encode(text) != ids or model.decode(more) != self.decode(more) or UNUSED in kinds:
            raise ValueError("wanted BPE that keeps spaces, no normaliser and no unused pieces, "
                             "but sentencepiece decodes or encodes a sample differently")

    def _read_json(self, raw, rule):
        model, vocab = raw["model"], raw["model"]["vocab"]
        options = "dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"
        is_bpe = model.get("type") == "BPE" and model.get("byte_fallback")
        if not (is_bpe and rule) or any(map(model.get, options)):
            parts = {name: raw.get(name) for name in ("normalizer", "pre_tokenizer")} | model
            raise ValueError("wanted the byte-fallback BPE of Llama and Mistral, found "
                             f"{parts | {'vocab': '…', 'merges': '…'}}")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        scores = {" ".join(pair): -rank for rank, pair in enumerate(pairs)}
        unions, halves = {"".join(pair) for pair in pairs}, {x for pair in pairs for x in pair}
        if (unions | halves) - vocab.keys() or sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("a merge is not of pieces, or the ids of pieces are not 0, 1, 2, …")
        self._set(sorted(vocab, key=vocab.get), scores, " ", unions, {}, rule)

    def _set(self, pieces, scores, gap, unions, user_defined, rule):
        self.pieces, self.scores, self.gap, self.control = pieces, scores, gap, set()
        self.user_defined = user_defined
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.unk_id = self.ids.pop("<unk>")
        self.byte_ids = [self.ids.pop(f"<0x{byte:02X}>") for byte in range(256)]
        self.byte_of = {i: byte for byte, i in enumerate(self.byte_ids)}
        self.in_front, self.after_mark, self.doubled = rule
        self.vocab_size, self.word_pattern = len(pieces), word_pattern(unions)

    def _add(self, tokens, bos=None, eos=None):
        """Add tokens, {id: {"content": text, "special": …}}, and set BOS and EOS by their names."""
        bos, eos = (name["content"] if isinstance(name, dict) else name for name in (bos, eos))
        known = {"<s>", "</s>", START, END, bos, eos}
        tokens = {self.ids[name]: {"content": name} for name in known & self.ids.keys()} | tokens
        texts = dict(enumerate(self.pieces))
        for i, token in tokens.items():
            text = token["content"]
            if type(i) is not int or i < 0 or texts.setdefault(i, text) != text:
                raise ValueError(f"the added token {text!r} has the id {i}, which is not free")
            if i != self.unk_id and (token.get("special", True) or text in known):
                self.control.add(i)
                self.ids.pop(text, None)
                self.user_defined.pop(text, None)
                for n in range(len(text)):  # so that no merge makes it
                    self.scores.pop(text[:n] + self.gap + text[n:], None)
        self.word_ids, self.texts = {piece: [i] for piece, i in self.user_defined.items()}, texts
        longest_first = sorted(map(re.escape, self.user_defined), key=len, reverse=True)
        self.user_defined_pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self.control_ids = {texts[i]: i for i in sorted(self.control)}
        self.bos_id = self.control_ids[bos if bos in self.control_ids else "<s>"]
        self.eos_id = self.control_ids[eos if eos in self.control_ids else "</s>"]

    def _set_chat_and_ends(self, template, ends):
        if isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}.get("default", "no default")
        marks = [m for m in ("[SYSTEM_PROMPT]", START, END) if m in self.control_ids] or ["[INST]"]
        self.template = template or f"none, but pieces such as {marks[0]}"
        ends = next(ids if isinstance(ids, list) else [ids] for ids in ends if ids is not None)
        chatml = {i for mark, i in self.control_ids.items() if mark == END and END in self.template}
        self.eos_ids = frozenset(map(int.__index__, ends)) | chatml

    def encode(self, text, bos=None, eos=False, first=True):
        """The ids of a text, with first=False of one after a mark. "</s>" in it is only text. With
        bos=None the directory decides about BOS. Raises ValueError for a lone surrogate."""
        try:
            str.encode(text)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"text must be a str without lone surrogates: {error}") from None
        ids = [self.bos_id] * (self.adds_bos if bos is None else bos)
        text = text.replace(" ", SPACE)
        is_prefixed = self.in_front if first else self.after_mark
        if text and is_prefixed and (self.doubled or text[0] != SPACE):
            text = SPACE + text
        for n, part in enumerate(self.user_defined_pattern.split(text)):  # texts, pieces in turn
            for word in [part] if n % 2 else self.word_pattern.findall(part):
                ids += self.word_ids.get(word) or self._encode_word(word)
        return ids + [self.eos_id] * eos

    def _encode_word(self, word):
        ids = []
        for s in merge(word, self.scores, self.gap):
            ids += [self.ids[s]] if s in self.ids else [self.byte_ids[b] for b in s.encode()]
        if len(word) <= MAX_WORD_LENGTH and len(self.word_ids) < MAX_WORDS:
            self.word_ids[word] = ids
        return ids

    def encode_chat(self, messages):
        """The ids of a conversation in the format of Mistral's instruct models, or in ChatML.

            <s> [INST] user [/INST] assistant </s> [INST] user [/INST]

        `messages` is a list of {"role": ..., "content": ...}: an optional "system" message, then
        "user" and "assistant" in turn, ending with "user". The content of an assistant may also be
        the list of ids that it generated, without the last one that ended it. In v1, [INST] and
        [/INST] are text, and the system text is put before the first user text; in v2 and v3 they
        are control ids, and it is put before the last one.
        """
        try:
            form = " ".join(f"{m['role']}:{type(m['content']).__name__}" for m in messages)
        except (KeyError, TypeError):
            form = repr(messages)
        if not re.fullmatch("(system:str )?user:str( assistant:(str|list) user:str)*", form):
            raise ValueError(f"chat: wanted texts of (system,) user, …, user; got {form!r:.99}")
        is_chatml = START in self.template
        parts = self._chatml_parts(messages) if is_chatml else self._inst_parts(messages)
        if parts is None:
            raise ValueError("chat: plain texts work, but the chat template is not Mistral's, nor "
                             f"ChatML that keeps all texts: {self.template!r:.80}")
        return [i for part in parts for i in (
            self.encode(part, bos=False, first=not is_chatml) if isinstance(part, str) else part)]

    def _inst_parts(self, messages):
        if "[INST]" not in self.template or re.search("<<SYS>>|SYSTEM_PROMPT", self.template):
            return None  # such as the formats of Llama 2 and of Mistral's v7
        marks = [[i] for mark, i in self.control_ids.items() if mark in ("[INST]", "[/INST]")]
        texts = [message["content"] for message in messages]
        if messages[0]["role"] == "system" and (system := texts.pop(0)):
            turn = len(texts) - 1 if marks else 0  # v1 has no such ids
            texts[turn] = f"{system}\n\n{texts[turn]}"
        parts = [[self.bos_id]]
        for n, text in enumerate(texts):
            if n % 2 == 0:
                parts += [*marks[:1], text if marks else f"[INST] {text} [/INST]", *marks[1:]]
            else:  # of the assistant
                text = text.rstrip(" ") if marks and isinstance(text, str) else text
                parts += [text, [self.eos_id]]
        return parts

    def _chatml_parts(self, messages):
        """What the chat template writes, as texts and ids; None if it drops or changes a text. It
        is a program. While it runs, GAP is between all characters of the texts, so that no part of
        them becomes a control id. Since it is white space, a template can still strip the texts."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # which comes with torch

        def written(contents):
            shown = [m | {"content": text} for m, text in zip(messages, contents, strict=True)]
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            return environment.from_string(self.template).render(
                messages=shown, tools=None, documents=None, add_generation_prompt=True,
                bos_token=self.texts[self.bos_id], eos_token=self.texts[self.eos_id])

        contents = {f"\ue000{n}\ue001": m["content"] for n, m in enumerate(messages)}
        drawn = {name: ids for name, ids in contents.items() if isinstance(ids, list)}
        try:
            named = written(contents)
            plain = written(name if name in drawn else contents[name] for name in contents)
            text = written(name if name in drawn else GAP.join(contents[name]) for name in contents)
        except Exception:  # of any kind, since the program is a stranger's
            return None
        known = {name: [i] for name, i in self.control_ids.items() if len(name) > 1} | drawn
        either = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
        parts = re.split(f"({either})", text)
        is_complete = {START, END} <= {*parts} and all(name in named for name in contents)
        if not is_complete or text.replace(GAP, "") != plain:
            return None
        return [known[part] if part in known else part.replace(GAP, "") for part in parts]

    def decode(self, ids):
        """The text of ids, without the space that `encode` puts in front: nothing for control ids,
        " ⁇ " for the unknown id, and U+FFFD for a byte that is not part of a UTF-8 character."""
        stream = self.stream()
        return "".join([stream.feed(i) for i in ids]) + stream.flush()

    def stream(self):
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes ids one at a time. The texts it returns, joined, are `decode` of all the ids."""

    def __init__(self, tokenizer):
        self.tokenizer, self.has_begun = tokenizer, False
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # byte b as U+DC00 + b

    def feed(self, i):
        """The text that has become certain with id i: none while a character is unfinished."""
        t = self.tokenizer
        if type(i) is not int or i < 0:  # but a model may have more ids than the tokenizer
            raise ValueError(f"an id is an int from 0 on, got {i!r:.40}")
        if i in t.byte_of:
            self.has_begun = True
            return self.flush(bytes([t.byte_of[i]]), final=False)
        piece = "" if i in t.control else t.texts.get(i, "").replace(SPACE, " ")
        shown = piece.removeprefix(" " * (t.in_front and not self.has_begun))
        self.has_begun = self.has_begun or piece != ""
        return self.flush() + (" ⁇ " if i == t.unk_id else shown)

    def flush(self, data=b"", final=True):
        """The text of unfinished bytes and of more; at the end, U+FFFD for each that is left."""
        return re.sub("[\udc80-\udcff]", "\ufffd", self.utf8.decode(data, final))
