"""Claims about tokenizer.py. The main one: its ids and texts are those of sentencepiece."""

import os
import random
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from tokenizer import SPACE, Tokenizer, connected_characters, merge

ROOT = Path(__file__).resolve().parent.parent
MISTRAL = {"v1": "tokenizer.model.v1",
           "v2": "mistral_instruct_tokenizer_240216.model.v2",
           "v3": "mistral_instruct_tokenizer_240323.model.v3"}
NO_MISTRAL = "mistral-common, which brings Mistral's tokenizers, is not installed"
WORDS = ("the cat sat on a mat and then ran away from that big dog who had seen it eat bread "
         "naïve façade über straße 東京 привет 12 345 6789 don't well-known end. why?").split()


def train(path, **options):
    """A small model of seeded sentences, made by sentencepiece's own trainer."""
    path.parent.mkdir(exist_ok=True)
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=12)) for _ in range(400)]
    defaults = {
        "model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "pad_id": -1,
        "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path.with_suffix("")),
        **defaults | options)
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Paths of model files: two trained here, the embedded one and, if installed, Mistral's.

    "marked" has the control pieces [INST] and [/INST], as v2 and v3 do, and user-defined pieces.
    """
    folder = tmp_path_factory.mktemp("models")
    found = {"own": train(folder / "own" / "tokenizer.model"),
             "marked": train(folder / "marked" / "tokenizer.model",
                             control_symbols=["[INST]", "[/INST]"],
                             user_defined_symbols=["the", "thecat", "[X]"]),
             "tiny": ROOT / "tiny" / "tokenizer.model"}
    if spec := find_spec("mistral_common"):
        data = Path(spec.origin).parent / "data"
        found |= {name: data / file for name, file in MISTRAL.items()}
    return found


@pytest.fixture(scope="session", params=["own", "marked", "tiny", "v1", "v2", "v3"])
def both(request, models):
    """Our tokenizer and sentencepiece's, of the same model file."""
    if request.param not in models:
        pytest.skip(NO_MISTRAL)
    path = models[request.param]
    return Tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="session")
def own(models):
    return Tokenizer(models["own"])


@pytest.fixture(scope="session")
def v1(models):
    if "v1" not in models:
        pytest.skip(NO_MISTRAL)
    return Tokenizer(models["v1"])


# ------------------------------------------------------------------ text to ids


ODD = [" ", "  ", "\n", "\t", "\r", "\0", SPACE, "\ufffd", "\u0301", "<s>", "</s>", "<unk>",
       "[INST]", "<0x41>", "[REFERENCE_DOC_1]", "[REFERENCE_DOC_10]", "[REFERENCE_DOC_", "é", "🦙"]
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.one_of(st.sampled_from(ODD), st.sampled_from(WORDS)), max_size=20).map("".join),
    st.text("abet ", max_size=60),
    st.tuples(st.sampled_from(["a", " ", "the ", "\n", SPACE, "=", "aab"]),
              st.integers(1, 200)).map(lambda pair: pair[0] * pair[1]))


def test_encode_equals_sentencepiece_for_generated_text(both):
    ours, theirs = both

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(text):
        assert ours.encode(text, bos=False) == theirs.encode(text)

    check()


def test_encode_equals_sentencepiece_for_strings_of_its_own_pieces(both):
    ours, theirs = both
    draw = random.Random(1)
    for _ in range(500):
        text = "".join(draw.choices(ours.pieces, k=draw.randrange(1, 12)))
        text = text.replace(SPACE, " ") if draw.random() < 0.7 else text
        assert ours.encode(text, bos=False) == theirs.encode(text), text


@pytest.mark.parametrize("unit", ["a", " ", "ab", "\n", "é"])
def test_encode_equals_sentencepiece_for_long_runs(both, unit):
    ours, theirs = both
    assert ours.encode(unit * 20_000, bos=False) == theirs.encode(unit * 20_000)


def test_bos_and_eos_are_added_on_request_only(both):
    ours, theirs = both
    for text in ("", "the cat"):
        ids = theirs.encode(text)
        assert ours.encode(text) == [theirs.bos_id(), *ids]
        assert ours.encode(text, eos=True) == [theirs.bos_id(), *ids, theirs.eos_id()]
        assert ours.encode(text, bos=False, eos=True) == [*ids, theirs.eos_id()]


@pytest.mark.parametrize("text, ids", [
    ("Hello my name is", [22557, 586, 1141, 349]),
    ("My favourite condiment is ", [1984, 16020, 2076, 2487, 349, 28705]),
    ("This is 🦙", [851, 349, 28705, 243, 162, 169, 156]),
    ("This is 🦙.cpp", [851, 349, 28705, 243, 162, 169, 156, 28723, 5222]),
    ("</s>", [1867, 28713, 28767]),
    ("a\nb", [264, 13, 28726]),
    ("1234", [28705, 28740, 28750, 28770, 28781]),
    ("", []),
    (" " * 16, [359, 28705])])
def test_encode_gives_the_published_ids_of_mixtral_8x7b(v1, text, ids):
    assert v1.encode(text, bos=False) == ids
    assert v1.encode(text, eos=True) == [1, *ids, 2]


def test_the_example_of_the_module_docstring_holds(v1):
    [text, framed, symbols, merged, ids] = [
        line.split("  ")[2].strip() for line in tokenizer.__doc__.splitlines()[4:9]]
    assert framed == SPACE + text.replace(" ", SPACE) and symbols.split() == list(framed)
    assert merge(framed, v1.scores) == merged.split()
    assert v1.encode(text, bos=False) == [int(i) for i in ids.split()]


def test_no_text_encodes_to_a_control_id_or_the_unknown_id(both):
    ours, _ = both
    for piece in [ours.pieces[i] for i in sorted(ours.control)[:40]] + ["<unk>", "<0x0A>"]:
        ids = ours.encode(f"a {piece}{piece} b", bos=False)
        assert not {ours.unk_id, *ours.control} & set(ids)


def test_user_defined_pieces_match_as_a_whole_and_longest_first(models):
    path = models["marked"]
    ours, theirs = Tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("thecat the", "xthe cat[X][X", "[X] the", "aththecatthe"):
        assert ours.encode(text, bos=False) == theirs.encode(text)
    assert ours.encode("athecat[X]", bos=False)[-2:] == [ours.ids["thecat"], ours.ids["[X]"]]


# ------------------------------------------------------------------ ids to text


def some_ids(tokenizer, draw):
    """Ids in which bytes, control ids, the unknown id and leading spaces are frequent."""
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.ids[SPACE]]
    kinds = (tokenizer.byte_ids, special, range(tokenizer.vocab_size),
             [tokenizer.byte_ids[b] for b in "é🦙".encode()])
    return [draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(12))]


def test_decode_equals_sentencepiece_for_any_ids(both):
    ours, theirs = both
    draw = random.Random(2)
    for _ in range(1000):
        ids = some_ids(ours, draw)
        assert ours.decode(ids) == theirs.decode(ids), ids


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: SPACE not in text))
def test_decoding_gives_the_text_back(own, text):
    assert own.decode(own.encode(text, eos=True)) == text


def test_decoding_gives_all_leading_spaces_back(both):
    ours, _ = both
    for n in range(1, 20):
        assert ours.decode(ours.encode(" " * n + "a")) == " " * n + "a"


def test_the_space_piece_decodes_as_a_space(both):
    ours, _ = both
    assert ours.decode(ours.encode(f"a{SPACE}b")) == "a b"


def test_each_undecodable_byte_gives_one_replacement_character(both):
    ours, _ = both
    assert ours.decode([ours.byte_ids[b] for b in b"\xe2\x82A\xff"]) == "\ufffd\ufffdA\ufffd"


def test_the_joined_stream_is_the_decoded_whole(both):
    ours, theirs = both
    draw = random.Random(3)
    for ids in [some_ids(ours, draw) for _ in range(300)] + [ours.encode(" naïve 🦙  a\n")]:
        stream = ours.stream()
        assert "".join([stream.feed(i) for i in ids] + [stream.flush()]) == theirs.decode(ids)


def test_a_stream_holds_back_an_unfinished_character_and_no_more(both):
    ours, _ = both
    stream = ours.stream()
    space, *llama = [ours.ids[SPACE], *(ours.byte_ids[b] for b in "🦙".encode())]
    assert [stream.feed(i) for i in (space, *llama)] == ["", "", "", "", "🦙"]
    assert stream.feed(llama[0]) == ""
    assert stream.feed(llama[0]) == "\ufffd", "the first byte can no longer become a character"
    assert stream.feed(space) == "\ufffd " and stream.flush() == ""
    assert stream.feed(llama[0]) == "" and stream.flush() == "\ufffd"


# ------------------------------------------------------------------ conversations


def message(role, content):
    return {"role": role, "content": content}


def conversation(*texts, system=None):
    """User and assistant in turn, after a system text if there is one."""
    turns = [message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    return ([] if system is None else [message("system", system)]) + turns


@pytest.mark.parametrize("messages, ids", [
    (conversation("a"), [1, 733, 16289, 28793, 264, 733, 28748, 16289, 28793]),
    (conversation("a", "b", "c"), [
        1, 733, 16289, 28793, 264, 733, 28748, 16289, 28793, 287, 2, 733, 16289, 28793, 277, 733,
        28748, 16289, 28793]),
    (conversation("a", system="SYSTEM"), [
        1, 733, 16289, 28793, 17121, 22526, 13, 13, 28708, 733, 28748, 16289, 28793])])
def test_encode_chat_gives_the_published_ids_of_mixtral_8x7b(v1, messages, ids):
    assert v1.encode_chat(messages) == ids


HOSTILE = st.one_of(
    st.sampled_from(["[INST]", "[/INST] ", "</s>", "<s>", " </s>[INST] x", "<<SYS>>", "\n\n", " "]),
    st.text("ab [/INST]<>s\n🦙é", max_size=20))


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_encode_chat_equals_mistral_common(models, version):
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    from mistral_common.protocol.instruct import messages as kinds
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    kind = {"user": kinds.UserMessage, "assistant": kinds.AssistantMessage,
            "system": kinds.SystemMessage}
    ours, theirs = Tokenizer(models[version]), getattr(mistral.MistralTokenizer, version)()

    @settings(max_examples=150, deadline=None)
    @given(turns=st.lists(HOSTILE.filter(bool), min_size=1, max_size=11),
           system=st.none() | HOSTILE)
    def check(turns, system):
        messages = conversation(*turns[:len(turns) - 1 + len(turns) % 2], system=system)
        request = ChatCompletionRequest(
            messages=[kind[m["role"]](content=m["content"]) for m in messages])
        assert ours.encode_chat(messages) == theirs.encode_chat_completion(request).tokens

    check()


def test_without_control_pieces_the_marks_are_text_and_the_system_text_is_in_the_first_turn(own):
    def text(string):
        return own.encode(string, bos=False)

    assert own.encode_chat(conversation("a", "b ", "c", system="S")) == [
        own.bos_id, *text("[INST] S\n\na [/INST]"), *text("b "), own.eos_id,
        *text("[INST] c [/INST]")]


def test_with_control_pieces_the_marks_are_ids_and_the_system_text_is_in_the_last_turn(models):
    ours = Tokenizer(models["marked"])
    start, end = (ours.pieces.index(piece) for piece in ("[INST]", "[/INST]"))

    def text(string):
        return ours.encode(string, bos=False)

    assert ours.encode_chat(conversation("a", "b ", "c", system="S")) == [
        ours.bos_id, start, *text("a"), end, *text("b"), ours.eos_id, start, *text("S\n\nc"), end]


def test_no_message_encodes_to_a_control_id(both):
    ours, _ = both
    hostile = "<s> </s> <unk> [INST] [/INST] [AVAILABLE_TOOLS]"
    ids = ours.encode_chat(conversation(hostile, hostile, hostile, system=hostile))
    marks = [ours.control_ids[name] for name in ("[INST]", "[/INST]") if name in ours.control_ids]
    assert [i for i in ids if i in ours.control] == [ours.bos_id, *marks, ours.eos_id, *marks]


def test_an_answer_can_be_the_ids_that_were_generated(both):
    ours, _ = both
    whole = ours.encode_chat(conversation("a", "b c", "d"))
    ids = ours.encode("b c", bos=False)
    assert ours.encode_chat(conversation("a", ids, "d")) == whole
    letters = [i for letter in "b c" for i in ours.encode(letter, bos=False)]
    other = ours.encode_chat(conversation("a", letters, "d"))
    assert letters != ids and len(other) == len(whole) - len(ids) + len(letters)
    assert any(other[n:n + len(letters)] == letters for n in range(len(other)))


# ------------------------------------------------------------------ merging and words


@given(symbols=st.text("abc", max_size=12), data=st.data())
def test_merge_equals_a_scan_of_all_pairs_for_the_best(symbols, data):
    pieces = data.draw(st.lists(st.text("abc", min_size=2, max_size=4), unique=True, max_size=12))
    scores = {piece: -float(data.draw(st.integers(0, 5))) for piece in pieces}
    slow = list(symbols)
    while True:
        pairs = [(scores[slow[i] + slow[i + 1]], -i) for i in range(len(slow) - 1)
                 if slow[i] + slow[i + 1] in scores]
        if not pairs:
            break
        i = -max(pairs)[1]
        slow[i:i + 2] = [slow[i] + slow[i + 1]]
    assert merge(symbols, scores) == slow


def test_equal_scores_merge_leftmost_first():
    assert merge("aaaaa", {"aa": -1.0}) == ["aa", "aa", "a"]
    assert merge("aba", {"ab": -1.0, "ba": -1.0}) == ["ab", "a"]


def test_the_higher_score_merges_first_wherever_it_stands():
    assert merge("abc", {"ab": -2.0, "bc": -1.0}) == ["a", "bc"]


def test_merge_looks_at_no_more_than_three_pairs_per_character():
    class Counted(dict):
        looked_up = 0

        def __contains__(self, piece):
            self.looked_up += 1
            return super().__contains__(piece)

    for n in (10, 1000, 20_000):
        scores = Counted({"a" * 2 ** k: -float(k) for k in range(1, 8)})
        assert "".join(merge("a" * n, scores)) == "a" * n
        assert scores.looked_up <= 3 * n


def test_connected_characters_equal_the_closure_of_the_neighbour_relation(both):
    pieces = both[0].scores
    neighbours = {}
    for piece in pieces:
        text = piece.lstrip(SPACE)
        for left, right in zip(text, text[1:], strict=False):
            neighbours.setdefault(left, set()).add(right)
            neighbours.setdefault(right, set()).add(left)
    for start in "e1т,":
        found, waiting = {start}, [start]
        while waiting:
            new = neighbours.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        assert connected_characters(start, pieces) == found


def test_a_text_is_split_into_words_that_no_piece_crosses(both):
    ours, _ = both
    assert all(ours.word_pattern.findall(piece) == [piece] for piece in ours.scores)
    text = " one, 2".replace(" ", SPACE)
    assert ours.word_pattern.findall(text) == [f"{SPACE}one", ",", f"{SPACE}2"]


def test_remembered_words_do_not_change_the_ids(both):
    ours, theirs = both
    ours.word_ids.clear()
    for text in ("the cat  sat", "the  cat sat", "cat the", "the cat  sat") * 2:
        assert ours.encode(text, bos=False) == theirs.encode(text)


def test_a_remembered_word_is_not_merged_again(models, monkeypatch):
    ours = Tokenizer(models["own"])
    ids = ours.encode("the naïve cat")
    monkeypatch.delattr(tokenizer, "merge")
    assert ours.encode("the naïve cat") == ids


def test_the_number_and_length_of_remembered_words_are_bounded(models):
    ours = Tokenizer(models["own"])
    ours.word_ids.max_words = 8
    text = " ".join(f"x{n}" for n in range(100)) + " " + "y" * 1000
    assert ours.encode(text) == Tokenizer(models["own"]).encode(text)
    assert 0 < len(ours.word_ids) <= 8 and max(map(len, ours.word_ids)) <= 32


def test_a_directory_stands_for_the_model_inside_it(models):
    by_directory = Tokenizer(models["marked"].parent)
    assert by_directory.pieces == Tokenizer(str(models["marked"])).pieces


# ------------------------------------------------------------------ errors: arguments


@pytest.mark.parametrize("text, character", [("\ud800", 0), ("a\udcffb", 1)])
def test_lone_surrogates_are_refused(own, text, character):
    with pytest.raises(ValueError, match=f"lone surrogate at character {character}"):
        own.encode(text)


@pytest.mark.parametrize("text", [b"a", None, 1, ["a"]])
def test_what_is_not_a_str_is_refused_as_text(own, text):
    with pytest.raises(ValueError, match=f"must be a str, got {type(text).__name__}"):
        own.encode(text)


@pytest.mark.parametrize("wrong", [-1, 10**6, 1.0, "a", True, None])
def test_ids_outside_the_vocabulary_are_refused(own, wrong):
    words = f"in 0 … {own.vocab_size - 1}, got" if type(wrong) is int else "must be of type int"
    with pytest.raises(ValueError, match=words):
        own.decode([5, wrong])
    with pytest.raises(ValueError, match=words):
        own.encode_chat(conversation("a", [5, wrong], "b"))


def test_the_last_id_decodes_and_the_one_after_it_is_refused(both):
    ours, theirs = both
    assert ours.decode([ours.vocab_size - 1]) == theirs.decode([ours.vocab_size - 1])
    with pytest.raises(ValueError, match=f"in 0 … {ours.vocab_size - 1}, got {ours.vocab_size}"):
        ours.decode([ours.vocab_size])


@pytest.mark.parametrize("messages, words", [
    (None, "messages must be a list, got NoneType"),
    (message("user", "a"), "messages must be a list, got dict"),
    ("a", "messages must be a list, got str"),
    (["a"], "message 0 must be a dict, got str"),
    ([*conversation("a", "b"), None], "message 2 must be a dict, got NoneType"),
    ([{}], "keys 'role' and 'content', got none"),
    ([{"role": "user"}], "keys 'role' and 'content', got 'role'"),
    ([{"content": "a"}], "keys 'role' and 'content', got 'content'"),
    ([message("user", "a") | {"name\n": "b"}], r"got 'role', 'content', 'name\\n'"),
    ([message("tool\n", "a")], r"role must be 'system', 'user' or 'assistant', got 'tool\\n'"),
    ([message(["user"], "a")], "role must be .*, got list"),
    ([message("user", None)], "message 0: content must be a str, got NoneType"),
    ([message("user", [5])], "message 0: content must be a str, got list"),
    (conversation("a", (5,), "b"), "message 1: content must be a str, got tuple"),
    (conversation("a", system=3), "message 0: content must be a str, got int"),
    (conversation("a", system=[5]), "message 0: content must be a str, got list"),
    (conversation("a\ud800"), "lone surrogate"),
    ([], "got none"), (conversation("a", "b"), "got user, assistant$"),
    ([message("assistant", "a")], "got assistant"), ([message("system", "a")], "got none"),
    (conversation("a") * 3, "got user, user, user"),
    (conversation("a", system="b") * 2, "got user, system, user")])
def test_malformed_conversations_are_refused_in_one_line(own, messages, words):
    with pytest.raises(ValueError, match=words) as caught:
        own.encode_chat(messages)
    assert "\n" not in str(caught.value)


JUNK = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
                    | st.sampled_from(["role", "content", "user", "assistant", "system"]),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["role", "content", "name"]), inner),
                    max_leaves=6)


@settings(max_examples=200, deadline=None)
@given(messages=JUNK | st.lists(st.fixed_dictionaries({
    "role": st.sampled_from(["user", "assistant", "system"]) | JUNK, "content": JUNK})))
def test_any_messages_give_ids_or_a_value_error(own, messages):
    try:
        ids = own.encode_chat(messages)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert all(type(i) is int and 0 <= i < own.vocab_size for i in ids)


def test_a_tokenizer_with_a_later_chat_template_is_refused(tmp_path):
    path = train(tmp_path / "tokenizer.model",
                 control_symbols=["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"])
    with pytest.raises(ValueError, match="SYSTEM_PROMPT"):
        Tokenizer(path).encode_chat(conversation("a"))


# ------------------------------------------------------------------ errors: model files


def refused(path, words="not a usable tokenizer model"):
    sentencepiece.set_min_log_level(0)  # the default, which the trainer may have changed
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer(path)
    text = str(caught.value)
    assert text.startswith(f"{path}") and text.isprintable(), text


@pytest.mark.parametrize("options, words", [
    ({"model_type": "unigram"}, "minus the rank as score"),
    ({"byte_fallback": False}, "256 byte pieces"),
    ({"normalization_rule_name": "nmt_nfkc"}, "identity normaliser"),
    ({"remove_extra_whitespaces": True}, "identity normaliser"),
    ({"add_dummy_prefix": False}, "identity normaliser"),
    ({"unk_surface": " ? "}, "decodes the ids of a sample text differently"),
    ({"split_by_whitespace": False}, "no ordinary piece with a ▁ after another character")])
def test_a_model_of_another_kind_is_refused(tmp_path, options, words):
    refused(train(tmp_path / "tokenizer.model", **options), words)


NORMAL, CONTROL, UNUSED = 1, 3, 5


def record(piece, score, kind=None):
    """The bytes of one piece in a model file."""
    text = piece if isinstance(piece, bytes) else piece.encode()
    body = b"\n%c%b\x15%b" % (len(text), text, struct.pack("<f", score))
    body += b"\x18%c" % kind if kind else b""
    return b"\n%c%b" % (len(body), body)


def with_pieces(data, *changes):
    """The bytes of a model with some pieces replaced: pairs of the arguments of `record`."""
    for old, new in changes:
        assert data.count(record(*old)) == 1, old
        data = data.replace(record(*old), record(*new))
    return data


@pytest.mark.parametrize("old, new, words", [
    *[((5,), (5, score), "minus the rank as score")
      for score in (float("nan"), float("inf"), -float("inf"), 0.0, 7.0, -4.0, -5.5, -1e9)],
    ((5,), (6,), "already defined"),
    ((5,), (b"", -5.0), "must not be empty"),
    ((5,), (b"\0", -5.0), "no unused piece"),
    ((5,), (b"a\xff", -5.0), "codec can't decode"),
    ((5,), ("a▁b", -5.0), "no ordinary piece with a ▁"),
    ((5,), (5, -5.0, UNUSED), "no unused piece"),
    (("<s>", 0.0, CONTROL), ("<s>", 0.0, NORMAL), "control pieces <s> and </s>"),
    (("<s>", 0.0, CONTROL), ("<x>", 0.0, CONTROL), "control pieces <s> and </s>"),
    (("</s>", 0.0, CONTROL), ("</S>", 0.0, CONTROL), "control pieces <s> and </s>"),
    (("[INST]", 0.0, CONTROL), ("[INSU]", 0.0, CONTROL), "both .INST. and ./INST. or neither"),
    (("[/INST]", 0.0, CONTROL), ("[/INST]", 0.0, NORMAL), "both .INST. and ./INST. or neither"),
    (("<0x41>", 0.0, 6), ("<0x4G>", 0.0, 6), "is invalid"),
    (("<0x41>", 0.0, 6), ("<0x41>", 0.0, NORMAL), "256 byte pieces"),
    (("<0x41>", 0.0, 6), ("<0x42>", 0.0, 6), "already defined")])
def test_a_model_with_an_impossible_piece_is_refused(models, tmp_path, capfd, old, new, words):
    """A number stands for the ordinary piece of that rank."""
    ours = Tokenizer(models["marked"])
    by_rank = {-ours.scores[piece]: piece for piece in ours.scores}

    def complete(piece, *rest):
        return (by_rank[piece], *(rest or [-float(piece)])) if piece in by_rank else (piece, *rest)

    path = tmp_path / "tokenizer.model"
    path.write_bytes(with_pieces(models["marked"].read_bytes(), (complete(*old), complete(*new))))
    refused(path, words)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["own", "marked", "tiny"])
def test_bpe_pieces_in_a_model_of_another_type_are_refused(models, tmp_path, name):
    data = models[name].read_bytes()
    bpe = b"\x18\x02 "  # the trainer's model_type, BPE, and the tag of the next field
    assert data.count(bpe) == 1
    (tmp_path / "tokenizer.model").write_bytes(data.replace(bpe, b"\x18\x01 "))  # unigram
    refused(tmp_path / "tokenizer.model", "encodes a sample text differently")


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 100, b'{"model": 1}', b"\n" * 10**6])
def test_a_file_that_is_no_model_is_refused(tmp_path, content, capfd):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    refused(path)
    assert capfd.readouterr().err == ""


def test_what_is_not_a_small_regular_file_is_refused_without_being_read(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: .* No such file")
    path = tmp_path / "tokenizer.model"
    path.touch()
    os.truncate(path, (1 << 26) + 1)  # a sparse file
    refused(path, "a regular file of at most")
    refused(Path(os.devnull), "a regular file of at most")


def damaged(data, draw):
    """A model with one byte changed, most often near one of the ends, or cut off."""
    at = draw.choice([draw.randrange(len(data)), draw.randrange(300), -1 - draw.randrange(100)])
    if draw.random() < 0.1:
        return data[:at]
    return data[:at] + bytes([draw.randrange(256)]) + data[at:][1:]


@pytest.mark.parametrize("name", ["own", "marked", "tiny"])
def test_a_damaged_model_is_refused_in_one_line_or_works_as_in_sentencepiece(
        models, name, tmp_path, capfd):
    whole, draw, works = models[name].read_bytes(), random.Random(4), 0
    path = tmp_path / "tokenizer.model"
    sentencepiece.set_min_log_level(0)  # the default, which the trainer may have changed
    for _ in range(100):
        path.write_bytes(damaged(whole, draw))
        try:
            ours = Tokenizer(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: not a usable") and str(error).isprintable()
            continue
        theirs, works = sentencepiece.SentencePieceProcessor(model_file=str(path)), works + 1
        for text in [*ODD, " ".join(WORDS), "".join(draw.choices(ours.pieces, k=20))]:
            assert ours.encode(text, bos=False) == theirs.encode(text)
            ids = some_ids(ours, draw)
            assert ours.decode(ids) == theirs.decode(ids)
    assert 5 < works < 60
    assert capfd.readouterr().err == ""
