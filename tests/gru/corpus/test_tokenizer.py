import json
import random
from pathlib import Path

import numpy as np
import psutil
import pytest
import tokenizers

from gru.config import TokenizerConfig
from gru.corpus.tokenizer import END_OF_TEXT, Tokenizer, load, train_tokenizer
from gru.errors import UserError

TEXTS = [
    "def f(x):\n    return x  # it's\n" * 20,
    "白日依山盡，黃河入海流。\n" * 20,
    "The quick brown fox jumps over the lazy dog. " * 20,
]
AWKWARD = [
    "",
    " ",
    END_OF_TEXT,
    f"a{END_OF_TEXT}b {END_OF_TEXT}\n",
    "\x00\x01\x7f\x80\xff\ufeff",
    "😀👩‍👩‍👧🇩🇪 e\u0301",
    "never seen: ØĦ ﷽ 𒐫 \U0010ffff <0x41> Ġ",
    "tabs\t\t  spaces   \r\n\r\n\u2028\u2029\x0c\x85\u00a0",
    "1234567890 3.14 it's they'll I'VE",
]


@pytest.fixture(scope="module", params=["bpe", "char", "byte", "word"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind=request.param, vocab_size=400), TEXTS)


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    alphabet = "ab \n\r\t'.,0<|>endoftextĠé黃河白日😀\x00\u2028"
    return ["".join(rng.choices(alphabet, k=rng.randrange(0, 60))) for _ in range(count)]


def test_decoding_gives_back_any_text(tokenizer: Tokenizer) -> None:
    texts = [*TEXTS, *AWKWARD, *random_texts(300)]
    all_ids, ends = tokenizer.encode_batch(texts)
    assert all_ids.dtype == np.uint32 and ends.dtype == np.int64 and ends[-1] == len(all_ids)
    for text, ids in zip(texts, np.split(all_ids, ends[:-1]), strict=True):
        assert tokenizer.decode(ids) == text
        assert np.array_equal(ids, tokenizer.encode(text))
        assert tokenizer.end_of_text not in ids
    assert [len(part) for part in tokenizer.encode_batch([])] == [0, 0]
    for part, same in zip(tokenizer.encode_batch(texts, parallel=True), (all_ids, ends), strict=True):
        assert np.array_equal(part, same)


def test_ids_are_those_of_the_tokenizers_library(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer.json)
    library = tokenizers.Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    assert library.token_to_id(END_OF_TEXT) == tokenizer.end_of_text
    assert library.get_vocab_size() == tokenizer.vocab_size == len(tokenizer.token_bytes)
    for text in [*TEXTS, *AWKWARD, *random_texts(200)]:
        ids = tokenizer.encode(text)
        assert library.encode(text).ids == ids.tolist()
        assert library.decode(ids.tolist()) == text


def test_a_saved_tokenizer_loads_and_training_is_deterministic(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer.json)
    loaded = load(str(path))
    assert (loaded.digest, loaded.vocab_size) == (tokenizer.digest, tokenizer.vocab_size)
    assert loaded.token_bytes[loaded.end_of_text] == b""
    kinds = {"table": ["char", "byte"], "gigatoken": ["bpe"], "words": ["word"]}[tokenizer.backend]
    again = [train_tokenizer(TokenizerConfig(kind=kind, vocab_size=400), TEXTS[::-1]).digest for kind in kinds]
    assert tokenizer.digest in again


def test_the_vocabulary_has_the_configured_size() -> None:
    bpe = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXTS)
    assert bpe.vocab_size == 300
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0])
    char = train_tokenizer(TokenizerConfig(kind="char", vocab_size=260), ["aabbbcdd"])
    assert char.vocab_size == 260
    assert [char.decode([i]) for i in range(3)] == ["b", "a", "d"]
    assert char.encode("c").tolist() == [3 + ord("c")]
    assert train_tokenizer(TokenizerConfig(kind="byte"), TEXTS).vocab_size == 257
    assert train_tokenizer(TokenizerConfig(kind="bpe"), []).vocab_size == 257


WIKITEXT = " \n = Robert <unk> = \n \n Robert <unk> is an English film , and Robert @-@ an <unk> . \n"


def test_kind_word_has_words_with_the_space_before_them_and_line_ends() -> None:
    """One token a word and one a line end, as word-level models of PTB and WikiText count; `<unk>` is a word."""
    word = train_tokenizer(TokenizerConfig(kind="word", vocab_size=400), [WIKITEXT])
    pieces = [word.decode([i]) for i in word.encode(WIKITEXT)]
    assert "".join(pieces) == WIKITEXT
    assert len(pieces) == len(WIKITEXT.split()) + WIKITEXT.count("\n")
    assert pieces[:6] == [" \n", " =", " Robert", " <unk>", " =", " \n"]
    assert word.vocab_size == len(set(pieces)) + 257
    small = train_tokenizer(TokenizerConfig(kind="word", vocab_size=259), [WIKITEXT])
    assert [small.decode([i]) for i in range(2)] == [" \n", " <unk>"]  # the most frequent; ties by their text
    assert [small.decode([i]) for i in small.encode(" <unk>  黃\n")] == [" <unk>", " ", " ", *"\ufffd" * 3, "\n"]


def test_kind_word_encodes_long_texts_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [WIKITEXT * 9, "a\n\n \r\nb" * 50, "no-space" * 50, "  ", *AWKWARD, *random_texts(100)]
    word = train_tokenizer(TokenizerConfig(kind="word", vocab_size=300), texts)
    whole = word.encode_batch(texts)
    for size in (1, 2, 7, 50):
        monkeypatch.setattr("gru.corpus.token_encoders._STRETCH", size)
        again = train_tokenizer(TokenizerConfig(kind="word", vocab_size=300), texts)
        assert again.digest == word.digest
        for part, same in zip(word.encode_batch(texts), whole, strict=True):
            assert np.array_equal(part, same)


def test_halves_of_a_character_decode_to_replacements() -> None:
    byte = train_tokenizer(TokenizerConfig(kind="byte"), [])
    assert byte.decode(byte.encode("黃")[:2]) == "\ufffd"


def test_training_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXTS)
    assert capfd.readouterr() == ("", "")


def test_encoding_falls_back_where_gigatoken_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import gigatoken

    bpe = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXTS)
    assert bpe.backend == "gigatoken"
    monkeypatch.setattr(gigatoken, "Tokenizer", None)
    other = Tokenizer(bpe.json)
    assert other.backend == "tokenizers"
    assert "gigatoken cannot be used" in caplog.text
    for text in AWKWARD:
        assert np.array_equal(other.encode(text), bpe.encode(text))


def test_a_foreign_tokenizer_keeps_its_end_of_text_or_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    bpe = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXTS)
    config = json.loads(bpe.json)
    path.write_text(json.dumps(config | {"added_tokens": []}))
    extended = load(str(path))
    assert (extended.end_of_text, extended.vocab_size) == (299, 300)
    assert Tokenizer(extended.json).end_of_text == 299
    end, start = (
        config["added_tokens"][0] | {"content": "</s>"},
        config["added_tokens"][0] | {"content": "<s>", "id": 300},
    )
    path.write_text(json.dumps(config | {"added_tokens": [start, end]}))
    other = load(str(path))
    assert (other.end_of_text, other.vocab_size, other.json) == (299, 301, path.read_bytes())
    for text in AWKWARD:
        assert np.array_equal(other.encode(text), bpe.encode(text))
        assert other.decode(other.encode(text)) == text


def test_an_unsupported_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load(str(path))
    bpe = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXTS)

    def refused(message: str, **changes: object) -> None:
        path.write_text(json.dumps(json.loads(bpe.json) | changes))
        with pytest.raises(UserError, match=f"tokenizer.json: .*{message}"):
            load(str(path))

    refused("normalizer", normalizer={"type": "NFC"})
    refused("byte-level", pre_tokenizer={"type": "Whitespace"})
    refused("of kind bpe", model={"type": "BPE"})
    path.write_bytes(b"\xff{")
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer.json"):
        load(str(path))


def test_encoding_takes_no_more_memory_the_more_it_has_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gru.corpus.token_encoders._RECREATE_TOKENS", 500_000)
    bpe = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), ["黃河入海流"])
    assert bpe.backend == "gigatoken"
    chance = np.random.default_rng(0)

    def batch() -> list[str]:
        """Words of six characters, none of them twice: 3 MB."""
        codes = chance.integers(0x4E00, 0x9000, 1_200_000, dtype=np.uint32)
        codes[::7] = ord(" ")
        return [codes.tobytes().decode("utf-32-le")]

    def encode() -> int:
        bpe.encode_batch(batch())
        return psutil.Process().memory_info().rss

    before = max(encode() for _ in range(3))
    assert max(encode() for _ in range(12)) - before < 60_000_000  # without recreation it is three times as much
    text = batch()[0][:10_000]
    assert bpe.decode(bpe.encode(text)) == text
