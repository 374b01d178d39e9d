"""Byte-fallback BPE, spelled out: the same ids as sentencepiece's own encode, for every string.

    "Hi 🦙"  →  "▁Hi▁🦙"               spaces become ▁, one ▁ is put in front (the dummy prefix)
             →  ▁ H i ▁ 🦙             one symbol a character
             →  ▁Hi ▁ 🦙               the best-ranked neighbours merge, until none are a piece
             →  ids of ▁Hi and ▁, then of <0xF0> <0x9F> <0xA6> <0x99>: what is no piece is bytes

sentencepiece only opens the `.model` file and tells its pieces, their scores and their types. In
BPE a score is minus the rank of a merge; equal ones (the runs of spaces) merge leftmost first.
Control pieces (<s>, [INST]) are ids without text: no text ever encodes to one. Pieces that the
file's maker declared (v3's [REFERENCE_DOC_0]) are matched whole, the longest first, before merging.

Near-linear: neighbours sit in a heap by rank, and a text is cut into words where no piece reaches
across, which is exact; the ids of short words are remembered.

Departures: none in encode or decode, undecodable bytes included: each prints one U+FFFD.
Leaves out: normalisers other than identity, unigram models, training (sentencepiece does that).
"""

import codecs
import heapq
import math
import re
from itertools import chain, pairwise
from pathlib import Path

import sentencepiece

SPACE = "▁"  # U+2581, which therefore decodes as a space

codecs.register_error("mark_each_byte", lambda e: ("\ufffd" * (e.end - e.start), e.end))


def merge(word, scores):
    """Join, again and again, the neighbours whose union scores highest, the leftmost of equals.

    The heap may hold pairs that a later merge has broken up: a pair is still whole exactly when
    its left symbol lives and its two symbols together have the length they had when it was pushed.

    >>> merge("abcab", {"bc": -0.0, "ab": -1.0, "abc": -2.0})
    ['abc', 'ab']
    """
    symbols, end = list(word), len(word)
    after, before = list(range(1, end + 1)), list(range(-1, end - 1))

    def pair(left):
        union = symbols[left] + symbols[after[left]]
        return (-scores[union], left, len(union)) if union in scores else None

    agenda = [entry for left in range(end - 1) if (entry := pair(left))]
    heapq.heapify(agenda)
    while agenda:
        _, left, length = heapq.heappop(agenda)
        right = after[left]
        if right == end or len(symbols[left]) + len(symbols[right]) != length:
            continue
        symbols[left], symbols[right] = symbols[left] + symbols[right], ""
        after[left], after[right] = after[right], end
        if after[left] < end:
            before[after[left]] = left
        for start in (before[left], left):
            if start >= 0 and after[start] < end and (entry := pair(start)):
                heapq.heappush(agenda, entry)
    return [symbol for symbol in symbols if symbol]


def kin(start, pieces):
    """The characters that pieces join to one, directly or through others: for e the Latin letters.

    No piece holds one of them beside an outsider, but for the space in front: a text can be cut
    between the two, because merges never reach across.
    """
    beside = {}
    for piece in pieces:
        for a, b in pairwise(piece.lstrip(SPACE)):
            beside.setdefault(a, set()).add(b)
            beside.setdefault(b, set()).add(a)
    found, agenda = {start}, [start]
    while agenda:
        new = beside.get(agenda.pop(), set()) - found
        found |= new
        agenda += new
    return found


class Words(dict):
    """The ids of words: those of short ones are remembered until there are too many."""

    def __init__(self, tokenizer, most=1 << 16, longest=32):
        super().__init__()
        self.tokenizer, self.most, self.longest = tokenizer, most, longest

    def __missing__(self, word):
        t, ids = self.tokenizer, []
        for symbol in merge(word, t.scores):
            if symbol in t.scores:
                ids.append(t.ids[symbol])
            else:
                ids += (t.byte_ids[byte] for byte in symbol.encode("utf-8"))
        if len(word) <= self.longest:
            if len(self) >= self.most:
                self.clear()
            self[word] = ids
        return ids


class Tokenizer:
    """Text to ids and back, from a sentencepiece BPE file or the directory that holds one.

    Raises ValueError where there is no such file, or where it is no byte-fallback BPE with the
    identity normaliser, as every Mistral tokenizer.model is.
    """

    def __init__(self, path):
        path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        try:
            model = sentencepiece.SentencePieceProcessor()
            model.load_from_serialized_proto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a readable sentencepiece model: {error}") from None
        self._read(model)
        self._check(model, path)

    def _read(self, model):
        every = range(model.vocab_size())
        self.vocab_size = len(every)
        self.bos_id, self.eos_id, self.unk_id = model.bos_id(), model.eos_id(), model.unk_id()
        self.pieces = [model.id_to_piece(i) for i in every]
        self.control = {i for i in every if model.is_control(i)}
        self.control_ids = {self.pieces[i]: i for i in sorted(self.control)}
        self.marks = [self.control_ids[m] for m in ("[INST]", "[/INST]") if m in self.control_ids]
        self.byte_of = {i: int(self.pieces[i][3:5], 16) for i in every if model.is_byte(i)}
        self.byte_ids = sorted(self.byte_of, key=self.byte_of.get)
        apart = {self.unk_id, *self.control, *self.byte_of}
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if i not in apart}
        self.scores = {piece: model.get_score(i) for piece, i in self.ids.items()}
        # The best merge has score −0.0: a score of +0.0 is no rank but marks a declared piece.
        declared = [piece for piece, score in self.scores.items() if math.copysign(1, score) > 0]
        for piece in declared:
            del self.scores[piece]
        self.declared = sorted(declared, key=len, reverse=True)
        self.cut = re.compile(f"({'|'.join(map(re.escape, self.declared)) or '(?!)'})")
        letters = "".join(map(re.escape, sorted(kin("e", self.scores))))
        self.word = re.compile(f"{SPACE}*(?:[{letters}]+|[^{letters}{SPACE}]+)|{SPACE}+")
        self.words = Words(self)

    def _check(self, model, path):
        crossing = any(re.search(f"[^{SPACE}]{SPACE}", piece) for piece in self.ids)
        ranked = all(score == int(score) for score in self.scores.values())
        unused = any(map(model.is_unused, range(self.vocab_size)))
        named = min(self.bos_id, self.eos_id, self.unk_id) >= 0
        if len(self.byte_ids) != 256 or crossing or unused or not (ranked and named):
            raise ValueError(f"{path}: not a byte-fallback BPE as Mistral's are; wanted 256 byte "
                             "pieces, <s>, </s> and <unk>, scores that are ranks, no unused piece "
                             "and none with a space inside")
        probe = "  Aﬁ\t " + " ".join(self.declared) + "".join(self.pieces[-100:])
        if self.encode(probe, bos=False) != model.encode(probe):
            raise ValueError(f"{path}: wanted the identity normaliser with a dummy prefix and all "
                             "white space kept; this model has another")

    def encode(self, text, bos=True, eos=False):
        """The ids of a text; control ids come from `bos` and `eos` alone, never from the text.

        Raises ValueError for what is not text: lone surrogates.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds a lone surrogate at character {error.start}: it is not "
                             "Unicode text; decode its bytes first") from None
        ids = [self.bos_id] * bos
        text = text and SPACE + text.replace(" ", SPACE)
        for n, part in enumerate(self.cut.split(text)):
            if n % 2:
                ids.append(self.ids[part])
            else:
                words = self.word.findall(part)
                ids.extend(chain.from_iterable(map(self.words.__getitem__, words)))
        return ids + [self.eos_id] * eos

    def encode_chat(self, messages):
        """The ids of a conversation that awaits an answer, as Mistral's instruct models know it.

            <s> [INST] user [/INST] assistant </s> [INST] user [/INST]

        messages: {"role": "system" | "user" | "assistant", "content": str}: maybe a system text,
        then user and assistant in turn, the user last. The marks are control ids where the file has
        them (v2, v3) and plain text where it has not (v1, Mixtral 8x7B); the system text opens the
        last user's message there, the first one's here. An assistant's content may be the ids it
        drew, for they need not be those of their text. Raises ValueError for other messages.
        """
        system, turns = self._conversation(messages)
        told, ids = len(turns) - 1 if self.marks else 0, [self.bos_id]
        for n, (role, content) in enumerate(turns):
            if role == "assistant":
                if isinstance(content, str):
                    content = self.encode(content.rstrip(" ") if self.marks else content, bos=False)
                ids += [*content, self.eos_id]
                continue
            content = f"{system}\n\n{content}" if system and n == told else content
            if self.marks:
                ids += [self.marks[0], *self.encode(content, bos=False), self.marks[1]]
            else:
                ids += self.encode(f"[INST] {content} [/INST]", bos=False)
        return ids

    def _conversation(self, messages):
        if "[SYSTEM_PROMPT]" in self.control_ids:
            raise ValueError("chat: this tokenizer knows [SYSTEM_PROMPT], of a template later than "
                             "Mixtral's (v1 to v3); encode the conversation with mistral-common")
        turns = [(message["role"], message["content"]) for message in messages]
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
        roles = [role for role, _ in turns]
        if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[:len(roles)]:
            raise ValueError("chat: wanted an optional system message, then user, assistant, …, "
                             f"user, got {', '.join(map(str, roles)) or 'none'}")
        for role, content in [("system", system), *turns]:
            if not isinstance(content, str) and not (role == "assistant" and type(content) is list):
                raise ValueError(f"chat: content must be a str, got {type(content).__name__}")
        return system, turns

    def decode(self, ids):
        """The text of ids: control ids print nothing, the unknown id ` ⁇ `, the dummy prefix goes.

        Raises ValueError for an id outside the vocabulary.
        """
        stream = self.stream()
        return "".join([stream.feed(i) for i in ids]) + stream.flush()

    def stream(self):
        """A decoder to be fed one id at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Prints each id's text as soon as it is certain; all it printed is `decode` of all it was fed.

    A run of byte pieces is UTF-8 and may end inside a character, which is then held back until it
    is whole or can no longer become so. Only the first piece with text loses its leading space.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.begun = tokenizer, False
        self.utf8 = codecs.getincrementaldecoder("utf-8")("mark_each_byte")

    def feed(self, i):
        """The text that id i makes certain, often empty. Raises ValueError for an unknown id."""
        t = self.tokenizer
        if type(i) is not int or not 0 <= i < t.vocab_size:
            raise ValueError(f"ids must be integers in 0 … {t.vocab_size - 1}, got {i!r}")
        if i in t.byte_of:
            text = self.utf8.decode(bytes([t.byte_of[i]]))
            self.begun = True
            return text
        text = self.flush()
        if i in t.control:
            return text
        piece = " ⁇ " if i == t.unk_id else t.pieces[i].replace(SPACE, " ")
        if not self.begun and i != t.unk_id:
            piece = piece.removeprefix(" ")
        self.begun = True
        return text + piece

    def flush(self):
        """What is left at the end: one U+FFFD for each byte of an unfinished character."""
        return self.utf8.decode(b"", final=True)
