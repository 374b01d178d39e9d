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

Here v1, v2 and v3 are the versions of Mistral's tokenizer.model; Mixtral 8x7B has v1. They differ
in their control and user-defined pieces, and so in the format of a chat. Because the same words
occur again and again, a text is split into words, at places that no merge can cross, and the ids of
short words are remembered. sentencepiece parses tokenizer.model; it also has what is not here:
training, unigram models, and normalisers other than the identity.
"""

import codecs
import heapq
import json
import re
import struct
from contextlib import suppress
from math import copysign
from pathlib import Path

import sentencepiece

SPACE = "▁"  # U+2581, which stands for a space inside pieces
LATIN = "a-zA-ZÀ-ÖØ-öø-ɏ"  # without × and ÷, which are among the accented letters in Unicode
MAX_WORDS, MAX_WORD_LENGTH = 1 << 16, 32  # of the words whose ids are remembered
FILES = (*(f"tokenizer.model{version}" for version in ("", ".v3", ".v2", ".v1")), "tokenizer.json")
METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
STAND_IN = " \ue000\\d+\n"  # for the content of a message in a chat template
START, END = "<|im_start|>", "<|im_end|>"  # which are around each message in ChatML


def merge(word, scores, gap=""):
    """Merge the neighbours whose union scores highest, leftmost first, until no union has a score.

    Takes O(n log n) time for n characters. Here "bc" is merged first, and then "abc":

    >>> merge("abcab", {"bc": 7.5, "ab": -1.0, "abc": -2.0})
    ['abc', 'ab']

    With a `gap`, as in a tokenizer.json, not unions but pairs have scores, for example "ab c".
    """
    heap = []  # pairs of neighbours: word[start:middle] and word[middle:end], by score
    end_of = [*range(1, len(word) + 1), 0]  # from the start of each symbol to its end
    start_of = [len(word), *range(len(word))]  # from the end of each symbol to its start

    def push(start, middle, end):
        union = word[start:middle] + gap + word[middle:end] if gap else word[start:end]
        if union in scores:  # without a neighbour on this side it is not
            heapq.heappush(heap, (-scores[union], start, middle, end))

    for start in range(len(word) - 1):
        push(start, start + 1, start + 2)
    while heap:
        _, start, middle, end = heapq.heappop(heap)
        if end_of[start] == middle and end_of[middle] == end:  # both symbols still exist
            end_of[start], end_of[middle], start_of[end] = end, 0, start
            push(start_of[start], start, end)
            push(start, end, end_of[end])
    return [word[start:end] for start, end in enumerate(end_of) if end]


def read(path, parse):
    """What `parse` makes of the bytes of a file. Raises ValueError with its path, in one line."""
    try:
        data = path.read_bytes()
        if data.startswith(b"version https://git-lfs"):
            raise ValueError("this is a Git LFS pointer, not the file; run `git lfs pull`")
        return parse(data)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = "no " * isinstance(error, KeyError) + (getattr(error, "strerror", 0) or str(error))
        reason = "".join(c if c.isprintable() else "?" for c in reason)
        raise ValueError(f"{path}: not a usable tokenizer: {reason}") from None


def prefix_rule(raw):
    """Whether a tokenizer.json puts a ▁ before the text, after each added token, and before another
    ▁; None if it treats spaces in another way.
    """
    normalizer, splitter = raw.get("normalizer"), raw.get("pre_tokenizer")
    if normalizer and not splitter:
        steps = normalizer.get("normalizers", [normalizer])
        return (len(steps) == 2,) * 3 if steps in ([PREPEND, REPLACE], [REPLACE]) else None
    if splitter and not normalizer and splitter == splitter | METASPACE:
        scheme = splitter.get("prepend_scheme", "always")
        return scheme != "never", scheme == "always", False
    return None


def splitter(marks):
    """A function that splits a text into what is between marks, the longest ones, and the marks."""
    if not marks:
        return lambda text: [text]
    return re.compile(f"({'|'.join(map(re.escape, sorted(marks, key=len, reverse=True)))})").split


def word_pattern(unions):
    """The regular expression of a word, at whose ends no merge crosses.

    In Mistral's models no piece has a ▁ after another character, and none has a Latin letter next
    to a character of another kind. So a word is a run of letters or of other characters, with the ▁
    in front of it. Without the second property it ends only before a ▁, and without the first one
    it is the whole text.
    """
    for text in (f"[{LATIN}]+|[^{LATIN}{SPACE}]+", f"[^{SPACE}]+"):
        pattern = re.compile(f"{SPACE}*(?:{text})|{SPACE}+")
        if all(map(pattern.fullmatch, unions)):
            return pattern
    return re.compile("(?s).+")


class Tokenizer:
    """Text to ids and back, from a directory, a tokenizer.model or a tokenizer.json.

    Other files of the directory may add tokens, name BOS and EOS, and give a chat template. Special
    tokens, BOS, EOS and the marks of ChatML become control pieces; other added tokens are matched
    as a whole. Raises ValueError for a file that is missing, damaged or not byte-fallback BPE.

    vocab_size               the largest id + 1; a model may have more ids
    bos_id, eos_id, unk_id   the ids of <s>, </s> and <unk>, or of the BOS and EOS that are named
    eos_ids                  the set of ids that end a text, here {eos_id}
    pieces                   a list with the piece of each id, "" for an id without a piece
    ids, scores              dicts with the id and the score of each ordinary piece
    control, control_ids     the set of control ids, and a dict with the id of each control piece
    """

    def __init__(self, path):
        path = directory = Path(path)
        if path.is_dir():
            path = next((path / name for name in FILES if (path / name).exists()), path / FILES[0])

        def extra(name, parse=lambda data: dict(json.loads(data))):  # which drops a BOM
            return read(directory / name, parse) if (directory / name).exists() else {}

        raw = read(path, json.loads) if path.suffix == ".json" else extra("tokenizer.json")
        settings = extra("special_tokens_map.json") | extra("tokenizer_config.json")
        template = extra("chat_template.jinja", bytes.decode) or settings.get("chat_template") or ""
        if isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}.get("default", "no default")
        added = {i: {"content": piece} for piece, i in extra("added_tokens.json").items()}
        self.template, self.user_defined, self.added = template, {}, {}

        def load(data):
            rule = prefix_rule(raw)
            if path.suffix == ".json":
                self._read_json(raw, rule)
            else:  # sentencepiece puts a ▁ in front of any text
                later = settings.get("legacy", True) and (rule is None or rule[1])
                self.in_front, self.later, self.doubled = True, later, True
                self._read_model(data)
            added.update({token["id"]: token for token in raw.get("added_tokens", ())})
            added.update({int(i): t for i, t in settings.get("added_tokens_decoder", {}).items()})
            names = [settings.get("bos_token"), settings.get("eos_token")]
            self._add_tokens(added, *(n["content"] if isinstance(n, dict) else n for n in names))

        read(path, load)

    def _read_model(self, data):
        model = sentencepiece.SentencePieceProcessor()
        model.load_from_serialized_proto(data)
        every = list(range(model.vocab_size()))
        pack = struct.Struct("<Bf").pack
        pieces, scores, kinds, at = model.id_to_piece(every), model.get_score(every), [], 0
        for piece, score in zip(pieces, scores, strict=True):
            entry = piece.encode() + pack(0x15, score)
            at = data.index(entry, at) + len(entry)
            # The kind of a piece follows its score: 3 is control, 4 user-defined.
            kinds.append(data[at + 1] if data[at:at + 1] == b"\x18" else 1)
        self.user_defined = {pieces[i]: i for i in every if kinds[i] == 4}
        # In sentencepiece 0.0 is higher than -0.0, the score of the first merge in training.
        scores = {pieces[i]: scores[i] or copysign(5e-324, scores[i])
                  for i in every if kinds[i] == 1}
        self._take(dict(zip(pieces, every, strict=True)), scores, "", scores)
        self._add_tokens({i: {"content": pieces[i]} for i in every if kinds[i] == 3})
        # The spaces, the ligature and the tab reveal other normalisers, the pieces other models.
        some = [*scores][:300] + [*scores][-100:]
        text = "  Aﬁ\t " + " ".join(self.user_defined) + "".join(some)
        ids, rest = self.encode(text, bos=False), [*self.control, self.unk_id, *self.byte_ids]
        if model.encode(text) != ids or model.decode(ids + rest) != self.decode(ids + rest):
            raise ValueError("wanted BPE that keeps all spaces and has the identity normaliser, "
                             "but sentencepiece encodes or decodes a sample text differently")

    def _read_json(self, raw, rule):
        model, splitter = raw["model"], raw.get("pre_tokenizer")
        options = "dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"
        byte = "byte-level " * ("ByteLevel" in str(splitter))
        found = [f"{byte}{model.get('type')}", *(name for name in options if model.get(name))]
        if found != ["BPE"] or not rule or not model.get("byte_fallback"):
            raise ValueError("wanted the byte-fallback BPE of Llama and Mistral, found "
                             f"{' with '.join(found)}, byte_fallback {model.get('byte_fallback')}, "
                             f"normalizer {raw.get('normalizer')}, pre_tokenizer {splitter}"[:300])
        self.in_front, self.later, self.doubled = rule
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        unions = {pair.replace(" ", "", 1) for pair in pairs}
        if lost := unions - model["vocab"].keys():
            raise ValueError(f"the merges make {min(lost)!r}, which is not in the vocabulary")
        scores = {pair: -rank for rank, pair in enumerate(pairs)}
        self._take(dict(model["vocab"]), scores, " ", unions)

    def _take(self, ids, scores, gap, unions):
        self.ids, self.scores, self.gap, self.control = ids, scores, gap, set()
        self.word_pattern, self.unk_id = word_pattern(unions), ids["<unk>"]
        self.byte_ids = [ids[f"<0x{byte:02X}>"] for byte in range(256)]
        self.byte_of = {i: byte for byte, i in enumerate(self.byte_ids)}
        self.pieces = [""] * (max(ids.values()) + 1)
        for piece, i in ids.items():
            self.pieces[i] = piece
        for i in (self.unk_id, *self.byte_ids):
            del ids[self.pieces[i]]

    def _add_tokens(self, added, bos=None, eos=None):
        """Add tokens, {id: {"content": text, "special": ...}}, and set BOS and EOS by name."""
        control, taken = {START, END, "<s>", "</s>", bos, eos}, {self.unk_id, *self.control}
        added = {self.ids[name]: {"content": name} for name in control & self.ids.keys()} | added
        for i, token in added.items():
            piece, old = token["content"], self.pieces[i] if 0 <= i < len(self.pieces) else ""
            if i < 0 or old != piece and self.ids.get(old) == i:
                raise ValueError(f"the added token {piece!r} has the id {i}, which is not free")
            self.pieces += [""] * (i + 1 - len(self.pieces))
            self.pieces[i] = piece
            if i in taken:
                continue
            if token.get("special", True) or piece in control:
                self.control.add(i)
                self.ids.pop(piece, None)
                self.user_defined.pop(piece, None)
                for n in range(len(piece)):
                    self.scores.pop(piece[:n] + self.gap + piece[n:], None)
            elif token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise ValueError(f"the added token {piece!r} strips spaces or is a single word")
            elif token.get("normalized") and self.gap and self.doubled:
                self.user_defined[SPACE + piece.replace(" ", SPACE)] = i
            elif piece not in self.user_defined:
                self.added[piece] = i
        self.vocab_size, self.word_ids = len(self.pieces), {}
        self.control_ids = {self.pieces[i]: i for i in sorted(self.control)}
        self.inst_ids = [self.control_ids[name] for name in ("[INST]", "[/INST]")
                         if name in self.control_ids]  # empty in v1
        self.bos_id = self.control_ids[bos if bos in self.control_ids else "<s>"]
        self.eos_id = self.control_ids[eos if eos in self.control_ids else "</s>"]
        self.eos_ids = frozenset({self.eos_id})
        self.splitters = splitter(self.added), splitter(self.user_defined)

    def encode(self, text, bos=True, eos=False, first=True):
        """The ids of a text. Only `bos` and `eos` add control ids; "</s>" in the text does not.

        With first=False it is the text after a control id, which some tokenizers begin without ▁.
        Raises ValueError if the text is not a str or has a lone surrogate.
        """
        try:
            str.encode(text)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"text must be a str without lone surrogates: {error}") from None
        ids, (at_added, at_user_defined) = [self.bos_id] * bos, self.splitters
        for n, part in enumerate(at_added(text)):
            if n % 2:
                ids.append(self.added[part])
                continue
            part = part.replace(" ", SPACE)
            if part and (self.in_front if first and n == 0 else self.later):
                part = SPACE + part if self.doubled or part[0] != SPACE else part
            for m, run in enumerate(at_user_defined(part)):
                if m % 2:
                    ids.append(self.user_defined[run])
                    continue
                for word in self.word_pattern.findall(run):
                    ids += self.word_ids.get(word) or self._encode_word(word)
        return ids + [self.eos_id] * eos

    def _encode_word(self, word):
        """The ids of a word, which are remembered if the word is short."""
        ids = []
        for symbol in merge(word, self.scores, self.gap):
            if (i := self.ids.get(symbol)) is not None:
                ids.append(i)
            else:
                ids += (self.byte_ids[byte] for byte in symbol.encode())
        if len(word) <= MAX_WORD_LENGTH:
            if len(self.word_ids) >= MAX_WORDS:
                self.word_ids.clear()
            self.word_ids[word] = ids
        return ids

    def encode_chat(self, messages):
        """The ids of a conversation in the format of Mistral's instruct models, or in ChatML.

            <s> [INST] user [/INST] assistant </s> [INST] user [/INST]

        `messages` is a list of {"role": ..., "content": ...}: an optional "system" message, then
        "user" and "assistant" in turn, ending with "user". The content of an assistant may also be
        the list of ids that it generated, since these can differ from the ids of their text.

        In v1 (Mixtral 8x7B), [INST] and [/INST] are plain text, and the system text is put before
        the first user text. In v2 and v3 they are control ids, and it is put before the last one.
        Raises ValueError for any other `messages`, and if the checkpoint has another template.
        """
        self._check_messages(messages)
        marks = self.control_ids.keys() & {START, END, "[SYSTEM_PROMPT]"}
        mistral = "[INST]" in self.template if self.template else not marks
        if not mistral or "[SYSTEM_PROMPT]" in marks:
            return self._encode_chatml(messages, marks)
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        turns = [message for message in messages if message["role"] != "system"]
        ids, system_turn = [self.bos_id], len(turns) - 1 if self.inst_ids else 0
        for n, text in enumerate(turn["content"] for turn in turns):
            if n % 2 == 0:
                text = f"{system}\n\n{text}" if system and n == system_turn else text
                text = text if self.inst_ids else f"[INST] {text} [/INST]"
                ids += [*self.inst_ids[:1], *self.encode(text, bos=False), *self.inst_ids[1:]]
                continue
            if isinstance(text, str):
                text = self.encode(text.rstrip(" ") if self.inst_ids else text, bos=False)
            ids += [*text, self.eos_id]
        return ids

    def _encode_chatml(self, messages, marks):
        """The ids of a conversation that the chat template writes in ChatML.

        ChatML is spelt in many ways, and a template is a program. So it is run, and gets stand-ins
        for the contents, because a user's text must not become a control id. They have to come out
        as they are, each once and in turn.
        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # which comes with torch

        stand_ins = {f" \ue000{n}\n": message for n, message in enumerate(messages)}
        bos, eos, text = self.pieces[self.bos_id], self.pieces[self.eos_id], ""
        with suppress(Exception):  # of any kind, since the program is a stranger's
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            text = environment.from_string(self.template).render(
                messages=[m | {"content": each} for each, m in stand_ins.items()],
                add_generation_prompt=True, bos_token=bos, eos_token=eos)
        named = marks.intersection(splitter([START, END])(text))
        if named != {START, END} or re.findall(STAND_IN, text) != [*stand_ins]:
            found = repr(self.template) if self.template else f"none and {min(marks)}"
            raise ValueError("chat: wanted the chat template of Mistral's v1 to v3 or of ChatML, "
                             f"found {found:.80}; plain completion works")
        known = {name: [i] for name, i in self.control_ids.items()}
        known |= {each: m["content"] for each, m in stand_ins.items() if type(m["content"]) is list}
        ids = []
        for part in splitter(known)(text):
            ids += known.get(part) or self.encode(re.sub(
                STAND_IN, lambda match: stand_ins[match[0]]["content"], part), False, first=False)
        return ids

    def _check_messages(self, messages):
        for n, message in enumerate(messages):
            content = message.get("content") if isinstance(message, dict) else None
            is_ids = isinstance(content, list) and message.get("role") == "assistant"
            if not (isinstance(content, str) or is_ids) or message.keys() != {"role", "content"}:
                raise ValueError(f"chat: message {n} must be a dict with the keys 'role' and "
                                 f"'content', which is a text, got {message!r:.80}")
            for i in content if is_ids else ():
                self.check_id(i)
        roles = " ".join(str(message["role"]) for message in messages)
        if not re.fullmatch("(system )?user( assistant user)*", roles):
            raise ValueError("chat: the roles must be user and assistant in turn, from user to "
                             f"user, after an optional system; got {roles!r:.80}")

    def check_id(self, i):
        """Raise ValueError unless i is an id. A model can have more ids than there are pieces."""
        if type(i) is not int or i < 0:
            raise ValueError(f"an id is an int from 0 on, got {i!r:.40}")

    def decode(self, ids):
        """The text of ids, without the space that `encode` puts in front.

        Control ids and ids without a piece have no text, and the unknown id has the text " ⁇ ".
        Each byte that is not part of a UTF-8 character gives one U+FFFD.
        """
        stream = self.stream()
        return "".join([stream.feed(i) for i in ids]) + stream.flush()

    def stream(self):
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes ids one at a time. The texts it returns, joined, are `decode` of all the ids.

    Bytes of an unfinished UTF-8 character are held back until nothing more can complete it.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.has_begun = tokenizer, False
        # surrogateescape turns each undecodable byte into one of U+DC80 to U+DCFF.
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def feed(self, i):
        """The text that has become certain with id i, often empty."""
        t = self.tokenizer
        t.check_id(i)
        if i in t.byte_of:
            self.has_begun = True
            return self._decode_bytes(bytes([t.byte_of[i]]))
        text = self.flush()
        if i in t.control or i >= t.vocab_size or not t.pieces[i]:
            return text
        piece = " ⁇ " if i == t.unk_id else t.pieces[i].replace(SPACE, " ")
        if not self.has_begun and i != t.unk_id and t.in_front:
            piece = piece.removeprefix(" ")
        self.has_begun = True
        return text + piece

    def flush(self):
        """The text of the bytes that were held back: one U+FFFD for each."""
        return self._decode_bytes(b"", final=True)

    def _decode_bytes(self, data, final=False):
        return re.sub("[\udc80-\udcff]", "\ufffd", self.utf8.decode(data, final))
