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

Here v1, v2 and v3 are the versions of Mistral's tokenizer.model, and Mixtral 8x7B has v1. They
differ in their control and user-defined pieces, and so in the format of a chat.

Because the same words occur again and again, a text is split into words, at places that no merge
can cross, and the ids of short words are remembered.

sentencepiece parses the model file. It also encodes and decodes a sample text whenever a model is
loaded, and the model is refused if the results differ from those of this file.

Not included, but available in sentencepiece: training, unigram models, and normalisers other than
the identity.
"""

import codecs
import heapq
import re
from pathlib import Path

import sentencepiece

SPACE = "▁"  # U+2581, which stands for a space inside pieces
RUN_OF_SPACES_SCORE = -1e9  # in Mistral's models, every piece that consists of ▁ has this score
LATIN = "a-zA-ZÀ-ÖØ-öø-ɏ"  # without × and ÷, which are among the accented letters in Unicode
MAX_WORDS, MAX_WORD_LENGTH = 1 << 16, 32  # of the words whose ids are remembered


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
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.load_from_serialized_proto(path.read_bytes())
            self._read_pieces(model)
            self._check_pieces(model)
            self.word_pattern, self.word_ids = self._choose_word_pattern(), {}
            self._compare_with(model)
        except (OSError, RuntimeError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            reason = getattr(error, "strerror", None) or str(error)
            reason = "".join(c if c.isprintable() else "?" for c in reason)
            raise ValueError(f"{path}: not a usable tokenizer model: {reason}") from None

    def _read_pieces(self, model):
        every = range(model.vocab_size())
        self.vocab_size, self.pieces = len(every), model.id_to_piece(list(every))
        self.bos_id, self.eos_id, self.unk_id = model.bos_id(), model.eos_id(), model.unk_id()
        self.eos_ids = frozenset([self.eos_id])
        self.control = {i for i in every if model.is_control(i)}
        self.control_ids = {self.pieces[i]: i for i in sorted(self.control)}
        self.inst_ids = [self.control_ids[name] for name in ("[INST]", "[/INST]")
                         if name in self.control_ids]  # empty in v1
        self.byte_ids = model.piece_to_id([f"<0x{byte:02X}>" for byte in range(256)])
        self.byte_of = {i: byte for byte, i in enumerate(self.byte_ids)}
        special = {self.unk_id, *self.control, *self.byte_ids}
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if i not in special}
        # In Mistral's models, as in all that sentencepiece trains, ordinary pieces come last.
        self.first_ordinary = max(special) + 1
        self.scores = {piece: model.get_score(i) for piece, i in self.ids.items()
                       if i >= self.first_ordinary}
        self.user_defined = sorted(self.ids.keys() - self.scores.keys(), key=len, reverse=True)
        either = "|".join(map(re.escape, self.user_defined)) or "(?!)"  # (?!) matches nothing
        self.user_defined_pattern = re.compile(f"({either})")

    def _check_pieces(self, model):
        if not all(map(model.is_byte, self.byte_ids)):
            raise ValueError("wanted a model with 256 byte pieces")
        if not {self.bos_id, self.eos_id} <= self.control:
            raise ValueError("wanted a model with the control pieces <s> and </s>")
        for piece, score in self.scores.items():
            rank = self.ids[piece] - self.first_ordinary
            if score != -rank and (score != RUN_OF_SPACES_SCORE or piece.strip(SPACE)):
                raise ValueError("wanted a BPE model, in which the score of a piece is minus the "
                                 f"rank of its merge, but {piece!r} has {score} at rank {rank}")

    def _choose_word_pattern(self):
        """The regular expression of a word, at whose ends no merge crosses.

        In Mistral's models no piece has a ▁ after another character, and none has a Latin letter
        next to a character of another kind. So a word is a run of letters or of other characters,
        with the ▁ in front of it. A model for other languages may lack the second property, for
        example because it knows more letters than LATIN, and then a word ends only before a ▁.
        """
        for text in (f"[{LATIN}]+|[^{LATIN}{SPACE}]+", f"[^{SPACE}]+"):
            pattern = re.compile(f"{SPACE}*(?:{text})|{SPACE}+")
            if all(map(pattern.fullmatch, self.scores)):
                return pattern
        raise ValueError("wanted a model without pieces that have a ▁ after another character")

    def _compare_with(self, model):
        """Raise ValueError if sentencepiece encodes or decodes a sample text differently."""
        # The spaces, the ligature and the tab reveal other normalisers, the pieces other models.
        common = "".join(self.pieces[self.first_ordinary:][:300])
        text = "  Aﬁ\t " + " ".join(self.user_defined) + common + "".join(self.pieces[-100:])
        ids = self.encode(text, bos=False)
        more = [*ids, *range(self.first_ordinary), self.byte_ids[0xF0]]
        if model.encode(text) != ids or model.decode(more) != self.decode(more):
            raise ValueError("wanted BPE that keeps all spaces and has the identity normaliser, "
                             "but sentencepiece encodes or decodes a sample text differently")

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
                for word in self.word_pattern.findall(part):
                    ids += self.word_ids.get(word) or self._encode_word(word)
        return ids + [self.eos_id] if eos else ids

    def _encode_word(self, word):
        """The ids of a word, which are remembered if the word is short."""
        ids = []
        for symbol in merge(word, self.scores):
            if symbol in self.scores:
                ids.append(self.ids[symbol])
            else:
                ids += (self.byte_ids[byte] for byte in symbol.encode("utf-8"))
        if len(word) <= MAX_WORD_LENGTH:
            if len(self.word_ids) >= MAX_WORDS:
                self.word_ids.clear()
            self.word_ids[word] = ids
        return ids

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
        self._check_messages(messages)
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        turns = [message for message in messages if message["role"] != "system"]
        system_turn = len(turns) - 1 if self.inst_ids else 0
        ids = [self.bos_id]
        for n, turn in enumerate(turns):
            if turn["role"] == "assistant":
                ids += [*self._answer_ids(turn["content"]), self.eos_id]
            else:
                before = f"{system}\n\n" if system and n == system_turn else ""
                ids += self._user_ids(before + turn["content"])
        return ids

    def _check_messages(self, messages):
        if "[SYSTEM_PROMPT]" in self.control_ids:
            raise ValueError("chat: this tokenizer has [SYSTEM_PROMPT] and needs a later template "
                             "than Mixtral's v1 to v3; encode the conversation with mistral-common")
        for n, message in enumerate(messages):
            if not isinstance(message, dict) or message.keys() != {"role", "content"}:
                raise ValueError(f"chat: message {n} must be a dict with the keys 'role' and "
                                 f"'content', got {message!r:.80}")
            role, content = message["role"], message["content"]
            if role == "assistant" and isinstance(content, list):
                for i in content:
                    self.check_id(i)
            elif not isinstance(content, str):
                raise ValueError(f"chat: the content of message {n} must be a str, "
                                 f"got {type(content).__name__}")
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if len(turns) % 2 == 0 or turns != (["user", "assistant"] * len(turns))[:len(turns)]:
            raise ValueError("chat: the roles must be user and assistant in turn, from user to "
                             f"user, after an optional system; got {roles!r:.80}")

    def _answer_ids(self, content):
        if isinstance(content, list):
            return content
        return self.encode(content.rstrip(" ") if self.inst_ids else content, bos=False)

    def _user_ids(self, text):
        if not self.inst_ids:
            return self.encode(f"[INST] {text} [/INST]", bos=False)
        return [self.inst_ids[0], *self.encode(text, bos=False), self.inst_ids[1]]

    def check_id(self, i):
        """Raise ValueError unless i is the id of a piece."""
        if type(i) is not int or not 0 <= i < self.vocab_size:
            raise ValueError(f"an id is an int in 0 … {self.vocab_size - 1}, got {i!r:.40}")

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
