"""Claims about tokenizer.py, most of them that it is sentencepiece, id for id."""

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer import SPACE, Tokenizer, merge

ROOT = Path(__file__).resolve().parent.parent
MISTRAL = {"v1": "tokenizer.model.v1",
           "v2": "mistral_instruct_tokenizer_240216.model.v2",
           "v3": "mistral_instruct_tokenizer_240323.model.v3"}
WORDS = ("the cat sat on a mat and then ran away from that big dog who had seen it eat bread "
         "naïve façade über straße 東京 привет 12 345 6789 don't well-known end. why?").split()


def train(path, **options):
    """A small model of seeded sentences, made by sentencepiece's own trainer."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=12)) for _ in range(400)]
    settings_of_ours = {
        "model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "pad_id": -1,
        "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path.with_suffix("")),
        **settings_of_ours | options)
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Paths of the models at hand: our own, the embedded one, Mistral's."""
    found = {"own": train(tmp_path_factory.mktemp("own") / "tokenizer.model"),
             "tiny": ROOT / "tiny" / "tokenizer.model"}
    if spec := find_spec("mistral_common"):
        data = Path(spec.origin).parent / "data"
        found |= {name: data / file for name, file in MISTRAL.items()}
    return found


@pytest.fixture(scope="session", params=["own", "tiny", "v1", "v2", "v3"])
def both(request, models):
    """Our tokenizer and sentencepiece's, of one model file."""
    if request.param not in models:
        pytest.skip("mistral-common, which brings Mistral's tokenizers, is not installed")
    path = models[request.param]
    return Tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="session")
def v1(models):
    if "v1" not in models:
        pytest.skip("mistral-common, which brings Mistral's tokenizers, is not installed")
    return Tokenizer(models["v1"])


ODD = [" ", "  ", "\n", "\t", "\r", "\0", SPACE, "\ufffd", "\u0301", "<s>", "</s>", "<unk>",
       "[INST]", "<0x41>", "[REFERENCE_DOC_1]", "[REFERENCE_DOC_10]", "[REFERENCE_DOC_", "é", "🦙"]
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.one_of(st.sampled_from(ODD), st.sampled_from(WORDS)), max_size=20).map("".join),
    st.text("abet ", max_size=60),
    st.tuples(st.sampled_from(["a", " ", "the ", "\n", SPACE, "=", "aab"]),
              st.integers(1, 200)).map(lambda pair: pair[0] * pair[1]))


@given(symbols=st.text("abc", min_size=1, max_size=12), data=st.data())
def test_merging_by_heap_is_scanning_all_pairs_for_the_best(symbols, data):
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


def test_encode_is_sentencepieces_for_generated_text(both):
    ours, theirs = both

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(text):
        assert ours.encode(text, bos=False) == theirs.encode(text)

    check()


def test_encode_is_sentencepieces_for_strings_of_its_own_pieces(both):
    ours, theirs = both
    draw = random.Random(1)
    for _ in range(500):
        text = "".join(draw.choices(ours.pieces, k=draw.randrange(1, 12)))
        text = text.replace(SPACE, " ") if draw.random() < 0.7 else text
        assert ours.encode(text, bos=False) == theirs.encode(text), text


@pytest.mark.parametrize("unit", ["a", " ", "ab", "\n", "é"])
def test_encode_is_sentencepieces_for_long_runs(both, unit):
    ours, theirs = both
    assert ours.encode(unit * 20_000, bos=False) == theirs.encode(unit * 20_000)


def test_remembered_words_do_not_change_what_is_encoded(both):
    ours, theirs = both
    ours.words.clear()
    for text in ("the cat  sat", "the  cat sat", "cat the", "the cat  sat") * 2:
        assert ours.encode(text, bos=False) == theirs.encode(text)


def test_a_text_is_cut_where_no_piece_reaches_across(both):
    ours, _ = both
    assert all(ours.word.findall(piece) == [piece] for piece in ours.scores)
    text = " one, 2".replace(" ", SPACE)
    assert ours.word.findall(text) == [f"{SPACE}one", ",", f"{SPACE}2"]


def test_the_memory_of_words_is_bounded(models):
    ours = Tokenizer(models["own"])
    ours.words.most = 8
    text = " ".join(f"x{n}" for n in range(100)) + " " + "y" * 1000
    assert ours.encode(text) == Tokenizer(models["own"]).encode(text)
    assert len(ours.words) <= 8 and "y" * 1000 not in map(str.strip, ours.words)


@pytest.mark.parametrize("text, ids", [
    ("Hello my name is", [22557, 586, 1141, 349]),
    ("My favourite condiment is ", [1984, 16020, 2076, 2487, 349, 28705]),
    ("This is 🦙.cpp", [851, 349, 28705, 243, 162, 169, 156, 28723, 5222]),
    ("</s>", [1867, 28713, 28767]),
    ("a\nb", [264, 13, 28726]),
    ("1234", [28705, 28740, 28750, 28770, 28781]),
    ("", []),
    (" " * 16, [359, 28705])])
def test_the_published_ids_of_mixtral_8x7b(v1, text, ids):
    assert v1.encode(text, bos=False) == ids
    assert v1.encode(text, eos=True) == [1, *ids, 2]


def test_no_text_encodes_to_a_control_id(both):
    ours, _ = both
    for piece in [ours.pieces[i] for i in sorted(ours.control)[:40]] + ["<unk>", "<0x0A>"]:
        ids = ours.encode(f"a {piece}{piece} b", bos=False)
        assert not {ours.unk_id, *ours.control} & set(ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: SPACE not in text))
def test_decoding_gives_the_text_back(models, text):
    tokenizer = Tokenizer(models["own"])
    assert tokenizer.decode(tokenizer.encode(text, eos=True)) == text


def test_only_the_dummy_prefix_is_lost_of_leading_spaces(both):
    ours, _ = both
    for n in range(1, 20):
        assert ours.decode(ours.encode(" " * n + "a")) == " " * n + "a"


def test_the_space_piece_decodes_as_a_space(both):
    ours, _ = both
    assert ours.decode(ours.encode(f"a{SPACE}b")) == "a b"


def some_ids(tokenizer, draw):
    """Ids in which bytes, control ids, the unknown id and leading spaces are frequent."""
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.ids[SPACE]]
    kinds = (tokenizer.byte_ids, special, range(tokenizer.vocab_size),
             [tokenizer.byte_ids[b] for b in "é🦙".encode()])
    return [draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(12))]


def test_decode_is_sentencepieces_for_any_ids(both):
    ours, theirs = both
    draw = random.Random(2)
    for _ in range(1000):
        ids = some_ids(ours, draw)
        assert ours.decode(ids) == theirs.decode(ids), ids


def test_the_joined_stream_is_the_decoded_whole(both):
    ours, _ = both
    draw = random.Random(3)
    for ids in [some_ids(ours, draw) for _ in range(300)] + [ours.encode(" naïve 🦙  a\n")]:
        stream = ours.stream()
        assert "".join([stream.feed(i) for i in ids] + [stream.flush()]) == ours.decode(ids)


def test_a_stream_holds_back_half_a_character_and_no_more(both):
    ours, _ = both
    stream = ours.stream()
    a, *llama = [ours.ids[SPACE], *(ours.byte_ids[b] for b in "🦙".encode())]
    assert [stream.feed(i) for i in (a, *llama)] == ["", "", "", "", "🦙"]
    assert stream.feed(llama[0]) == "" and stream.flush() == "\ufffd"


def test_each_undecodable_byte_prints_one_replacement_character(both):
    ours, _ = both
    assert ours.decode([ours.byte_ids[b] for b in b"\xe2\x82A\xff"]) == "\ufffd\ufffdA\ufffd"


def test_a_directory_stands_for_the_model_inside_it(models):
    assert Tokenizer(models["own"].parent).pieces == Tokenizer(str(models["own"])).pieces


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb"])
def test_lone_surrogates_are_refused(models, text):
    with pytest.raises(ValueError, match="lone surrogate at character"):
        Tokenizer(models["own"]).encode(text)


def test_only_str_is_text(models):
    with pytest.raises(ValueError, match="must be a str, got bytes"):
        Tokenizer(models["own"]).encode(b"a")


@pytest.mark.parametrize("wrong", [-1, 10**6, 1.0, "a", True, None])
def test_ids_out_of_range_are_refused(models, wrong):
    with pytest.raises(ValueError, match="ids must be integers in 0 …"):
        Tokenizer(models["own"]).decode([5, wrong])


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 100, b'{"model": 1}'])
def test_a_file_that_is_no_model_is_refused(tmp_path, content, capfd):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable sentencepiece model"):
        Tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.model: not a readable sentencepiece model"):
        Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="nowhere: not a readable"):
        Tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("options, message", [
    ({"model_type": "unigram"}, "not a byte-fallback BPE"),
    ({"byte_fallback": False}, "not a byte-fallback BPE"),
    ({"normalization_rule_name": "nmt_nfkc"}, "identity normaliser"),
    ({"remove_extra_whitespaces": True}, "identity normaliser"),
    ({"add_dummy_prefix": False}, "identity normaliser"),
    ({"split_by_whitespace": False}, "none with a space inside")])
def test_a_model_of_another_kind_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(train(tmp_path / "tokenizer.model", **options))


def test_declared_pieces_match_whole_and_longest_first(tmp_path):
    path = train(tmp_path / "tokenizer.model", user_defined_symbols=["the", "thecat", "[X]"])
    ours, theirs = Tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("thecat the", "xthe cat[X][X", "[X] the", "aththecatthe"):
        assert ours.encode(text, bos=False) == theirs.encode(text)
    assert ours.ids["thecat"] in ours.encode("a thecat")


def message(role, content):
    return {"role": role, "content": content}


def conversation(*texts, system=None):
    """User and assistant in turn, after a system text if there is one."""
    turns = [message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    return ([] if system is None else [message("system", system)]) + turns


@pytest.mark.parametrize("messages, ids", [
    (conversation("a", "b", "c", "d"), None),
    (conversation("a"), [1, 733, 16289, 28793, 264, 733, 28748, 16289, 28793]),
    (conversation("a", "b", "c"), [
        1, 733, 16289, 28793, 264, 733, 28748, 16289, 28793, 287, 2, 733, 16289, 28793, 277, 733,
        28748, 16289, 28793]),
    (conversation("a", system="SYSTEM"), [
        1, 733, 16289, 28793, 17121, 22526, 13, 13, 28708, 733, 28748, 16289, 28793])])
def test_the_published_chat_of_mixtral_8x7b(v1, messages, ids):
    if ids is None:
        with pytest.raises(ValueError, match="got user, assistant, user, assistant"):
            v1.encode_chat(messages)
    else:
        assert v1.encode_chat(messages) == ids


HOSTILE = st.one_of(
    st.sampled_from(["[INST]", "[/INST] ", "</s>", "<s>", " </s>[INST] x", "<<SYS>>", "\n\n", " "]),
    st.text("ab [/INST]<>s\n🦙é", max_size=20))


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_chat_ids_are_mistral_commons(models, version):
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


def test_what_users_write_never_becomes_a_control_id(both):
    ours, _ = both
    hostile = "<s> </s> <unk> [INST] [/INST] [AVAILABLE_TOOLS]"
    ids = ours.encode_chat(conversation(hostile, hostile, hostile, system=hostile))
    control = [i for i in ids if i in ours.control]
    around = ours.marks or [[], []]
    turn = [i for mark in around for i in ([mark] if mark else [])]
    assert control == [ours.bos_id, *turn, ours.eos_id, *turn]


def test_an_answers_own_ids_stand_for_its_text(both):
    ours, _ = both
    whole = ours.encode_chat(conversation("a", "b c", "d"))
    ids = ours.encode("b c", bos=False)
    assert ours.encode_chat(conversation("a", ids, "d")) == whole
    apart = [i for letter in "b c" for i in ours.encode(letter, bos=False)]
    assert apart != ids and ours.encode_chat(conversation("a", apart, "d")) != whole


@pytest.mark.parametrize("messages, words", [
    ([], "got none"), (conversation("a", "b"), "got user, assistant"),
    ([message("assistant", "a")], "got assistant"), ([message("system", "a")], "got none"),
    ([message("user", "a"), message("user", "b"), message("user", "c")], "got user, user, user"),
    ([message("tool", "a")], "got tool"), ([message("user", 1)], "a str, got int"),
    ([message("user", [1])], "a str, got list"), (conversation("a", system=3), "a str, got int")])
def test_conversations_that_cannot_be_are_refused(models, messages, words):
    with pytest.raises(ValueError, match=words):
        Tokenizer(models["own"]).encode_chat(messages)


def test_a_later_template_is_refused_and_named(models):
    if "v3" not in models:
        pytest.skip("mistral-common, which brings Mistral's tokenizers, is not installed")
    v7 = Tokenizer(models["v3"].with_name("mistral_instruct_tokenizer_241114.model.v7"))
    with pytest.raises(ValueError, match="SYSTEM_PROMPT"):
        v7.encode_chat(conversation("a"))
