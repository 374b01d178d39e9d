"""Byte-fallback BPE: text to token ids and back, with the same ids as sentencepiece for any text.

`Tokenizer.encode` takes four steps, shown here with the tokenizer of Mixtral 8x7B:

    This is 🦙                        the text
    ▁This▁is▁🦙                       spaces become ▁, and one more ▁ is put in front
    ▁ T h i s ▁ i s ▁ 🦙              one symbol per character
    ▁This ▁is ▁ 🦙                    neighbours are merged, best pair first (see `merge`)
    851 349 28705 243 162 169 156     a piece of the vocabulary becomes its id; 🦙 is not a piece
                                      and becomes one id for each of its four UTF-8 bytes

The vocabulary is a list of pieces, and the index of a piece is its id. There are five kinds:

    ordinary       text; its score is minus the rank of the merge that made it in training
    byte           <0x00> to <0xFF>, for characters that are not pieces
    control        <s>, </s> and, since v2, [INST]: ids without text, which no text encodes to
    unknown        <unk>; because of the byte pieces, no text encodes to it
    user-defined   matched as a whole before any merge, for example [REFERENCE_DOC_0] in v3

v1, v2 and v3 are the versions of Mistral's tokenizer.model; Mixtral 8x7B has v1.

Encoding takes nearly linear time. A text is first split into words, at places that no merge can
cross, and the ids of short words are remembered.

sentencepiece parses the model file. At every load it also encodes and decodes a sample text, and a
model is refused if the results differ from those of this file.

Not included, but available in sentencepiece: training, unigram models, and normalisers other than
the identity.
"""

import codecs
import heapq
import re
from itertools import chain
from pathlib import Path

import sentencepiece

SPACE = "▁"  # U+2581, which stands for a space inside pieces
MAX_MODEL_BYTES = 1 << 26  # the models of Mixtral have less than 1 MB
RUN_OF_SPACES_SCORE = -1e9  # in Mistral's models, every piece that consists of ▁ has this score


def merge(word, scores):
    """Merge the neighbours whose union scores highest, leftmost first, until no union is a piece.

    Takes O(n log n) time for n characters. Here "bc" is merged first, and then "abc":

    >>> merge("abcab", {"bc": -0.0, "ab": -1.0, "abc": -2.0})
    ['abc', 'ab']
    """
    heap = []  # pairs of neighbours: word[start:middle] and word[middle:end], by rank
    end_of = [*range(1, len(word) + 1), 0]  # from the start of each symbol to its end
    start_of = [len(word), *range(len(word))]  # from the end of each symbol to its start

    def push(start, middle, end):
        if (union := word[start:end]) in scores:  # empty if there is no such neighbour
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


def connected_characters(start, pieces):
    """All characters reachable from `start` through neighbours inside some piece.

    From "e" these are the Latin letters. A ▁ at the start of a piece does not count.

    >>> sorted(connected_characters("e", ["he", "▁th", "12", "▁,"]))
    ['e', 'h', 't']
    """
    found, size_before = {start}, 0
    while len(found) > size_before:
        size_before = len(found)
        for piece in pieces:
            text = piece.lstrip(SPACE)
            if not found.isdisjoint(text):
                found.update(text)
    return found


class WordIds(dict):
    """The ids of each word. Those of short words are remembered, at most `max_words` at a time."""

    def __init__(self, tokenizer, max_words=1 << 16, max_length=32):
        super().__init__()
        self.tokenizer, self.max_words, self.max_length = tokenizer, max_words, max_length

    def __missing__(self, word):
        t, ids = self.tokenizer, []
        for symbol in merge(word, t.scores):
            if symbol in t.scores:
                ids.append(t.ids[symbol])
            else:
                ids += (t.byte_ids[byte] for byte in symbol.encode("utf-8"))
        if len(word) <= self.max_length:
            if len(self) >= self.max_words:
                self.clear()
            self[word] = ids
        return ids


def parse_model(path):
    """Load a model file into sentencepiece. Raises OSError, RuntimeError or ValueError."""
    size = path.stat().st_size
    if not path.is_file() or size > MAX_MODEL_BYTES:  # reading a device or a pipe might never end
        raise ValueError(f"wanted a regular file of at most {MAX_MODEL_BYTES} bytes")
    sentencepiece.set_min_log_level(2)  # without this, damaged files print warnings to stderr
    model = sentencepiece.SentencePieceProcessor()
    model.load_from_serialized_proto(path.read_bytes())
    return model


class Tokenizer:
    """Text to ids and back, from a tokenizer.model file or the directory that holds it.

    Raises ValueError if the file is missing or damaged, or is not a byte-fallback BPE model with
    the identity normaliser. All versions of Mistral's tokenizer.model are.

    vocab_size               the number of pieces
    bos_id, eos_id, unk_id   the ids of <s>, </s> and <unk>
    pieces                   a list with the piece of each id
    ids                      a dict with the id of each ordinary or user-defined piece
    scores                   a dict with the score of each ordinary piece
    byte_ids                 a list with the id of each of the 256 bytes
    control, control_ids     the set of control ids, and a dict with the id of each control piece
    """

    def __init__(self, path):
        path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        try:
            model = parse_model(path)
            self._read_pieces(model)
            self._check_pieces(model)
            self._prepare_words()
            self._compare_with(model)
        except (OSError, RuntimeError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            reason = getattr(error, "strerror", None) or str(error)
            reason = "".join(c if c.isprintable() else "?" for c in reason)
            raise ValueError(f"{path}: not a usable tokenizer model: {reason}") from None

    def _read_pieces(self, model):
        every = range(model.vocab_size())
        self.vocab_size, self.pieces = len(every), model.id_to_piece(list(every))
        self.bos_id, self.eos_id, self.unk_id = model.bos_id(), model.eos_id(), model.unk_id()
        self.control = {i for i in every if model.is_control(i)}
        self.control_ids = {self.pieces[i]: i for i in sorted(self.control)}
        self.inst_ids = [self.control_ids[name] for name in ("[INST]", "[/INST]")
                         if name in self.control_ids]  # empty in v1
        self.byte_of = {i: int(self.pieces[i][3:5], 16) for i in every if model.is_byte(i)}
        self.byte_ids = sorted(self.byte_of, key=self.byte_of.get)
        special = {self.unk_id, *self.control, *self.byte_of}
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if i not in special}
        # In Mistral's models, as in all that sentencepiece trains, ordinary pieces come last.
        self.first_ordinary = max(special) + 1
        self.scores = {piece: model.get_score(i) for piece, i in self.ids.items()
                       if i >= self.first_ordinary}
        self.user_defined = sorted(self.ids.keys() - self.scores.keys(), key=len, reverse=True)

    def _check_pieces(self, model):
        ranked = all(score == self.first_ordinary - self.ids[piece]
                     or score == RUN_OF_SPACES_SCORE and not piece.strip(SPACE)
                     for piece, score in self.scores.items())
        satisfied = {
            "256 byte pieces": len(self.byte_ids) == 256,
            "control pieces <s> and </s>": self.bos_id != self.eos_id
            and {self.bos_id, self.eos_id} <= self.control,
            "both [INST] and [/INST] or neither": len(self.inst_ids) != 1,
            "ordinary pieces in the order of their merges, with minus the rank as score": ranked,
            "no ordinary piece with a ▁ after another character":
                not any(SPACE in piece.lstrip(SPACE) for piece in self.scores),
            "no unused piece": not any(map(model.is_unused, range(self.vocab_size)))}
        for what, holds in satisfied.items():
            if not holds:
                raise ValueError(f"wanted a byte-fallback BPE model like Mistral's, with {what}")

    def _prepare_words(self):
        """Prepare the regular expressions that split a text into user-defined pieces and words.

        A word is a run of letters or a run of other characters, with the ▁ in front of it. No piece
        has a letter next to a character that is not a letter, and none has a ▁ after another
        character. Therefore no merge joins two words, and each can be encoded by itself.
        """
        either = "|".join(map(re.escape, self.user_defined)) or "(?!)"  # (?!) matches nothing
        self.user_defined_pattern = re.compile(f"({either})")
        letters = "".join(map(re.escape, sorted(connected_characters("e", self.scores))))
        self.word_pattern = re.compile(
            f"{SPACE}*(?:[{letters}]+|[^{letters}{SPACE}]+)|{SPACE}+")
        self.word_ids = WordIds(self)

    def _compare_with(self, model):
        """Raise ValueError if sentencepiece encodes or decodes a sample text differently."""
        # The spaces, the ligature and the tab reveal other normalisers, the pieces other models.
        common = "".join(self.pieces[self.first_ordinary:][:300])
        text = "  Aﬁ\t " + " ".join(self.user_defined) + common + "".join(self.pieces[-100:])
        ids = self.encode(text)
        if model.encode(text) != ids[1:]:
            raise ValueError("wanted BPE with the identity normaliser, a dummy prefix and all "
                             "spaces kept, but sentencepiece encodes a sample text differently")
        ids += [*range(self.first_ordinary), self.byte_ids[0xF0]]
        if model.decode(ids) != self.decode(ids):
            raise ValueError("sentencepiece decodes the ids of a sample text differently")

    def encode(self, text, bos=True, eos=False):
        """The ids of a text. Only `bos` and `eos` add control ids; "</s>" in the text does not.

        Raises ValueError if the text is not a str or has a lone surrogate.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text has a lone surrogate at character {error.start}, which is not "
                             "Unicode text; decode the original bytes as UTF-8") from None
        ids = [self.bos_id] if bos else []
        text = text and SPACE + text.replace(" ", SPACE)  # an empty text has no ids
        for n, part in enumerate(self.user_defined_pattern.split(text)):
            if n % 2:  # re.split returns text and matches of the group in turn
                ids.append(self.ids[part])
            else:
                words = self.word_pattern.findall(part)
                ids.extend(chain.from_iterable(map(self.word_ids.__getitem__, words)))
        return ids + [self.eos_id] if eos else ids

    def encode_chat(self, messages):
        """The ids of a conversation in the format of Mistral's instruct models.

            <s> [INST] user [/INST] assistant </s> [INST] user [/INST]

        `messages` is a list of {"role": ..., "content": ...}: an optional "system" message, then
        "user" and "assistant" in turn, ending with "user". The content of an assistant may also be
        the list of ids that it generated, since these can differ from the ids of their text.

        In v1 (Mixtral 8x7B), [INST] and [/INST] are plain text, and the system text is put before
        the first user text. One user message "a" gives 1 733 16289 28793 264 733 28748 16289 28793.
        In v2 and v3 they are control ids, and the system text is put before the last user text.
        Raises ValueError for any other `messages`.
        """
        system, turns = self._check_messages(messages)
        system_turn = len(turns) - 1 if self.inst_ids else 0
        ids = [self.bos_id]
        for n, (role, content) in enumerate(turns):
            if role == "assistant":
                ids += [*self._answer_ids(content), self.eos_id]
            else:
                ids += self._user_ids(f"{system}\n\n{content}" if system and n == system_turn
                                      else content)
        return ids

    def _answer_ids(self, content):
        if isinstance(content, list):
            return content
        return self.encode(content.rstrip(" ") if self.inst_ids else content, bos=False)

    def _user_ids(self, text):
        if not self.inst_ids:
            return self.encode(f"[INST] {text} [/INST]", bos=False)
        return [self.inst_ids[0], *self.encode(text, bos=False), self.inst_ids[1]]

    def _check_messages(self, messages):
        """The system text, perhaps empty, and the other messages as pairs (role, content)."""
        if any("SYSTEM_PROMPT" in name for name in self.control_ids):
            raise ValueError("chat: this tokenizer has [SYSTEM_PROMPT] and needs a later template "
                             "than Mixtral's v1 to v3; encode the conversation with mistral-common")
        if not isinstance(messages, list):
            raise ValueError(f"chat: messages must be a list, got {type(messages).__name__}")
        turns = [self._check_message(n, message) for n, message in enumerate(messages)]
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
        roles = [role for role, _ in turns]
        if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[:len(roles)]:
            raise ValueError("chat: wanted an optional system message, then user, assistant, …, "
                             f"user, got {', '.join(roles) or 'none'}")
        return system, turns

    def _check_message(self, n, message):
        """Role and content of message n. Raises ValueError if one of them is missing or wrong."""
        where = f"chat: message {n}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} must be a dict, got {type(message).__name__}")
        if message.keys() != {"role", "content"}:
            keys = ", ".join(ascii(key) for key in message) or "none"
            raise ValueError(f"{where} must have the keys 'role' and 'content', got {keys:.80}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ("system", "user", "assistant"):
            got = ascii(role) if isinstance(role, str) else type(role).__name__
            raise ValueError(f"{where}: role must be 'system', 'user' or 'assistant', "
                             f"got {got:.40}")
        if role == "assistant" and isinstance(content, list):
            for i in content:
                self.check_id(i)
        elif not isinstance(content, str):
            raise ValueError(f"{where}: content must be a str, got {type(content).__name__}")
        return role, content

    def check_id(self, i):
        """Raise ValueError unless i is the id of a piece."""
        if type(i) is not int:
            raise ValueError(f"ids must be of type int, got {type(i).__name__}")
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"ids must be in 0 … {self.vocab_size - 1}, got {i}")

    def decode(self, ids):
        """The text of ids, without the space that `encode` puts in front.

        Control ids have no text, and the unknown id has the text " ⁇ ". Each byte that is not part
        of a UTF-8 character gives one U+FFFD. Raises ValueError for an id outside the vocabulary.
        """
        stream = self.stream()
        return "".join([stream.feed(i) for i in ids]) + stream.flush()

    def stream(self):
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes ids one at a time. The texts it returns, joined, are `decode` of all the ids.

    Bytes of an unfinished UTF-8 character are held back until the character is complete or can no
    longer be completed.
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
        if i in t.control:
            return text
        piece = " ⁇ " if i == t.unk_id else t.pieces[i].replace(SPACE, " ")
        if not self.has_begun and i != t.unk_id:
            piece = piece.removeprefix(" ")
        self.has_begun = True
        return text + piece

    def flush(self):
        """The text of the bytes that were held back: one U+FFFD for each."""
        return self._decode_bytes(b"", final=True)

    def _decode_bytes(self, data, final=False):
        return re.sub("[\udc80-\udcff]", "\ufffd", self.utf8.decode(data, final))
