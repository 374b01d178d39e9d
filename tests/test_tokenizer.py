"""Claims about tokenizer.py. The main one: its ids and texts are those of sentencepiece."""

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from tokenizer import SPACE, Tokenizer, merge

ROOT = Path(__file__).resolve().parent.parent
MISTRAL = {"v1": "tokenizer.model.v1",
           "v2": "mistral_instruct_tokenizer_240216.model.v2",
           "v3": "mistral_instruct_tokenizer_240323.model.v3"}
NO_MISTRAL = "mistral-common, which brings Mistral's tokenizers, is not installed"
WORDS = ("the cat sat on a mat and then ran away from that big dog who had seen it eat bread "
         "naïve façade über straße 東京 привет 12 345 6789 don't well-known end. why?").split()
VIETNAMESE = "tiếng Việt đẹp lắm, tiếng hay".split()  # has Latin letters outside tokenizer.LATIN


def train(path, words=WORDS, **options):
    """A small model of seeded sentences, made by sentencepiece's own trainer."""
    path.parent.mkdir(exist_ok=True)
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(400)]
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

    "marked" has the control pieces [INST] and [/INST], as v2 and v3 do, user-defined pieces, and
    pieces that join letters inside and outside of LATIN.
    """
    folder = tmp_path_factory.mktemp("models")
    found = {"own": train(folder / "own" / "tokenizer.model"),
             "marked": train(folder / "marked" / "tokenizer.model", WORDS + VIETNAMESE,
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
def marked(models):
    return Tokenizer(models["marked"])


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
    st.lists(st.one_of(st.sampled_from(ODD), st.sampled_from(WORDS + VIETNAMESE)),
             max_size=20).map("".join),
    st.text("abet ", max_size=60),
    st.tuples(st.sampled_from(["a", " ", "the ", "\n", SPACE, "=", "aab"]),
              st.integers(1, 200)).map(lambda pair: pair[0] * pair[1]))


@pytest.mark.claim
def test_encode_equals_sentencepiece_for_generated_text(both):
    ours, theirs = both
    pieces = st.lists(st.sampled_from(ours.pieces), max_size=12).map("".join)

    @settings(max_examples=300, deadline=None)
    @given(TEXTS | pieces | pieces.map(lambda text: text.replace(SPACE, " ")))
    def check(text):
        assert ours.encode(text, bos=False) == theirs.encode(text)

    check()


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
    ("This is 🦙.cpp", [851, 349, 28705, 243, 162, 169, 156, 28723, 5222]),
    ("</s>", [1867, 28713, 28767]),
    ("a\nb", [264, 13, 28726]),
    ("1234", [28705, 28740, 28750, 28770, 28781]),
    ("", []),
    (" " * 16, [359, 28705])])
def test_encode_gives_the_published_ids_of_mixtral_8x7b(v1, text, ids):
    assert v1.encode(text, bos=False) == ids


def test_user_defined_pieces_match_as_a_whole_and_longest_first(models, marked):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(models["marked"]))
    for text in ("thecat the", "xthe cat[X][X", "[X] the", "aththecatthe"):
        assert marked.encode(text, bos=False) == theirs.encode(text)
    assert marked.encode("athecat[X]", bos=False)[-2:] == [marked.ids["thecat"], marked.ids["[X]"]]


# ------------------------------------------------------------------ ids to text


def some_ids(tokenizer, draw):
    """Ids in which bytes, control ids, the unknown id and leading spaces are frequent."""
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.ids[SPACE]]
    kinds = (tokenizer.byte_ids, special, range(tokenizer.vocab_size),
             [tokenizer.byte_ids[b] for b in "é🦙".encode()])
    return [draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(12))]


@pytest.mark.claim
def test_decode_and_the_joined_stream_equal_sentencepiece_for_any_ids(both):
    ours, theirs = both
    draw = random.Random(2)
    for ids in [[ours.vocab_size - 1]] + [some_ids(ours, draw) for _ in range(1000)]:
        stream = ours.stream()
        assert "".join([stream.feed(i) for i in ids] + [stream.flush()]) == theirs.decode(ids), ids
        assert ours.decode(ids) == theirs.decode(ids), ids


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


@pytest.mark.claim
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


def test_with_control_pieces_the_marks_are_ids_and_the_system_text_is_in_the_last_turn(marked):
    start, end = (marked.pieces.index(piece) for piece in ("[INST]", "[/INST]"))

    def text(string):
        return marked.encode(string, bos=False)

    assert marked.encode_chat(conversation("a", "b ", "c", system="S")) == [
        marked.bos_id, start, *text("a"), end, *text("b"), marked.eos_id,
        start, *text("S\n\nc"), end]


def test_no_text_and_no_message_encodes_to_a_control_id_or_the_unknown_id(both):
    ours, _ = both
    never = {ours.unk_id, *ours.control}
    hostile = " ".join(2 * ours.pieces[i] for i in sorted(never))
    assert never.isdisjoint(ours.encode(hostile, bos=False))
    ids = ours.encode_chat(conversation(hostile, hostile, hostile, system=hostile))
    marks = [ours.control_ids[name] for name in ("[INST]", "[/INST]") if name in ours.control_ids]
    assert [i for i in ids if i in ours.control] == [ours.bos_id, *marks, ours.eos_id, *marks]


def test_an_answer_can_be_the_ids_that_were_generated(both):
    ours, _ = both
    text, ids = ours.encode("b c", bos=False), [ours.byte_ids[b] for b in b"b c"]
    before, after = [ours.encode_chat(conversation(x)) for x in ("a", "d")]
    expected = [*before, *ids, ours.eos_id, *after[1:]]
    assert ours.encode_chat(conversation("a", ids, "d")) == expected
    assert ours.encode_chat(conversation("a", text, "d")) == ours.encode_chat(
        conversation("a", "b c", "d")) != expected


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


def test_a_word_ends_where_no_piece_goes_on(both, models, marked):
    ours, _ = both
    text = " one, việt".replace(" ", SPACE)
    if ours.pieces == marked.pieces:  # some of its pieces join v, i and ệ
        assert ours.word_pattern.findall(text) == [f"{SPACE}one,", f"{SPACE}việt"]
    else:
        assert ours.word_pattern.findall(text) == [f"{SPACE}one", ",", f"{SPACE}vi", "ệ", "t"]


def test_the_number_and_length_of_remembered_words_are_bounded(models, monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_WORDS", 8)
    ours = Tokenizer(models["own"])
    text = " ".join(f"x{n}" for n in range(100)) + " " + "y" * 1000
    assert ours.encode(text) == Tokenizer(models["own"]).encode(text)
    assert 0 < len(ours.word_ids) <= 8 and max(map(len, ours.word_ids)) <= 32


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("text, words", [
    ("\ud800", "character 0"), ("a\udcffb", "character 1"), (b"a", "bytes"), (None, "NoneType")])
def test_what_is_not_unicode_text_is_refused(own, text, words):
    with pytest.raises(ValueError, match=words):
        own.encode(text)


@pytest.mark.parametrize("wrong", [-1, 420, 10**6, 1.0, "a", True, None])
def test_ids_outside_the_vocabulary_are_refused(own, wrong):
    assert own.vocab_size <= 420
    for use in (own.decode, lambda ids: own.encode_chat(conversation("a", ids, "b"))):
        with pytest.raises(ValueError, match=f"0 … {own.vocab_size - 1}, got {wrong!r}"):
            use([5, wrong])


@pytest.mark.parametrize("messages, words", [
    ("a", "message 0"), (message("user", "a"), "message 0"),
    ([*conversation("a", "b"), "c"], "message 2"), ([{"role": "user"}], "message 0"),
    ([message("user", "a") | {"name\n": "b"}], "message 0"),
    ([message("tool\n", "a")], "roles"), ([], "roles"), (conversation("a", "b"), "roles"),
    ([message("assistant", "a")], "roles"), ([message("system", "a")], "roles"),
    (conversation("a") * 2, "roles"), (conversation("a") * 3, "roles"),
    (conversation("a", system="b") * 2, "roles"),
    ([message("user", None)], "content of message 0"),
    (conversation("a", (5,), "b"), "content of message 1"),
    (conversation("a", system=[5]), "content of message 0"),
    (conversation("a\ud800"), "lone surrogate")])
def test_malformed_conversations_are_refused_in_one_line(own, messages, words):
    with pytest.raises(ValueError, match=words) as caught:
        own.encode_chat(messages)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_a_later_chat_template_is_refused(tmp_path):
    path = train(tmp_path / "tokenizer.model",
                 control_symbols=["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"])
    with pytest.raises(ValueError, match="SYSTEM_PROMPT"):
        Tokenizer(path).encode_chat(conversation("a"))


def refused(path, words="not a usable tokenizer model"):
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.isprintable(), text


@pytest.mark.parametrize("options, words", [
    ({"model_type": "unigram"}, "score"),
    ({"byte_fallback": False}, "byte pieces"),
    ({"bos_id": -1}, "control pieces"),
    ({"normalization_rule_name": "nmt_nfkc"}, "normaliser"),
    ({"remove_extra_whitespaces": True}, "normaliser"),
    ({"add_dummy_prefix": False}, "normaliser"),
    ({"unk_surface": " ? "}, "decodes"),
    ({"split_by_whitespace": False}, "▁ after another character")])
def test_a_model_of_another_kind_is_refused(tmp_path, options, words):
    refused(train(tmp_path / "tokenizer.model", **options), words)


def test_a_damaged_an_empty_a_foreign_and_a_missing_file_are_refused(models, tmp_path, capfd):
    sentencepiece.set_min_log_level(0)  # the default, which the trainer may have changed
    path, whole = tmp_path / "tokenizer.model", models["own"].read_bytes()
    for content in (whole[:2000], whole.replace(b"<0x41>", b"<0x\n1>"), b"", b'{"model": 1}'):
        path.write_bytes(content)
        refused(path)
    path.unlink()
    refused(path, "No such file")
    assert capfd.readouterr().err == ""
