"""Tokenizers that other projects save: those that return every text are read, the others are refused when loaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from gru.config import TokenizerConfig
from gru.corpus.tokenizer import END_OF_TEXT, Tokenizer, load, train_tokenizer
from gru.corpus.tokenizer_probes import PROBES, normalized_probes
from gru.errors import UserError
from tests.gru.corpus.test_tokenizer import AWKWARD, TEXTS, random_texts

SAMPLE = [*TEXTS, *PROBES.values()]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
MARK = "\u2581"
SPECIAL = ["<unk>", "<s>", "</s>"]


def save(library: tokenizers.Tokenizer, path: Path, **changes: Any) -> str:
    """Write a tokenizer.json, with some of its keys changed."""
    path.write_text(json.dumps(json.loads(library.to_str()) | changes))
    return str(path)


def with_parts(library: tokenizers.Tokenizer, **parts: Any) -> tokenizers.Tokenizer:
    for name, part in parts.items():
        setattr(library, name, part)
    return library


def byte_level_bpe(vocab_size: int = 400) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=ALPHABET, show_progress=False)
    library.train_from_iterator(SAMPLE, trainer)
    library.add_special_tokens([END_OF_TEXT])
    return library


def byte_fallback_bpe() -> tokenizers.Tokenizer:
    """As Llama's: spaces are written ▁, one is put before each text, and other characters are bytes."""
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    strip = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(strip)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*SPECIAL, *BYTES], show_progress=False, limit_alphabet=60, max_token_length=12
    )
    library.train_from_iterator(["the quick brown fox jumps over lazy dogs\n\t"] * 9, trainer)
    config = json.loads(library.to_str())
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] in SPECIAL]
    return tokenizers.Tokenizer.from_str(json.dumps(config))


def literal_bpe() -> tokenizers.Tokenizer:
    """Spaces are written as they are, and nothing is split before the merges."""
    return with_parts(byte_fallback_bpe(), normalizer=None)


def whole_words_bpe() -> tokenizers.Tokenizer:
    """As Llama 3's, which takes a word of the vocabulary without merges; one of the words is a special token here."""
    config = json.loads(byte_level_bpe().to_str())
    config["model"]["ignore_merges"] = True
    index = config["model"]["vocab"].setdefault("Ġquick", 900)
    config["added_tokens"].append(config["added_tokens"][0] | {"content": "Ġquick", "id": index})
    return tokenizers.Tokenizer.from_str(json.dumps(config))


def metaspace_bpe() -> tokenizers.Tokenizer:
    library = byte_fallback_bpe()
    library.normalizer = None
    library.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="always", split=True)
    library.decoder = decoders.Metaspace(MARK)
    return library


def unigram(byte_fallback: bool = True, before: Any = None) -> tokenizers.Tokenizer:
    """As SentencePiece's: pieces with scores, spaces written ▁, bytes for characters outside the vocabulary."""
    words = ["the", MARK + "the", MARK, "q", "u", "i", "c", "k", MARK + "quick", "e", "t", "h", "<", ">", "0", "x"]
    pieces = [(token, 0.0) for token in [*SPECIAL, *(BYTES if byte_fallback else [])]]
    pieces += [(word, -2.0 - 0.1 * i) for i, word in enumerate(words)]
    library = tokenizers.Tokenizer(models.Unigram(pieces, 0, byte_fallback))
    library.pre_tokenizer = before or pre_tokenizers.Metaspace(MARK, prepend_scheme="first")
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(MARK)])
    library.add_special_tokens(SPECIAL)
    return library


def byte_level_unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), *((char, -9.0) for char in ALPHABET), ("Ġthe", -2.0), ("quick", -3.0)]
    library = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return library


def word_piece(prefix: str = "##", limit: int = 1 << 20) -> tokenizers.Tokenizer:
    words = ["[UNK]", *ALPHABET, *(prefix + char for char in ALPHABET), "the", "Ġquick", prefix + "ing"]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    library = tokenizers.Tokenizer(
        models.WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix=prefix, max_input_chars_per_word=limit)
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["[UNK]"])
    return library


def word_level(before: Any, words: list[str]) -> tokenizers.Tokenizer:
    vocab = {word: index for index, word in enumerate(words)}
    library = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    library.pre_tokenizer = before
    return library


def single_bytes() -> tokenizers.Tokenizer:
    each = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    before = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), each])
    return word_level(before, ["<unk>", *ALPHABET])


EXACT = {
    "byte-level BPE": byte_level_bpe,
    "byte-fallback BPE": byte_fallback_bpe,
    "Metaspace BPE": metaspace_bpe,
    "BPE of the text as it is": literal_bpe,
    "BPE of whole words": whole_words_bpe,
    "Unigram": unigram,
    "byte-level Unigram": byte_level_unigram,
    "WordPiece": lambda: word_piece("\u2581"),
    "WordLevel of bytes": single_bytes,
}


def assert_exact(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Assert that the bytes of each text are the bytes of its tokens, and that no text becomes a special token."""
    ids, ends = tokenizer.encode_batch(texts)
    for text, part in zip(texts, np.split(ids, ends[:-1]), strict=True):
        assert b"".join(tokenizer.token_bytes[index] for index in part.tolist()) == text.encode()
        assert all(tokenizer.token_bytes[index] for index in part.tolist())
        assert np.array_equal(tokenizer.encode(text), part)


@pytest.mark.parametrize("kind", EXACT)
def test_a_tokenizer_that_returns_every_text_is_read(kind: str, tmp_path: Path) -> None:
    tokenizer = load(save(EXACT[kind](), tmp_path / "tokenizer.json"))
    assert_exact(tokenizer, [*SAMPLE, *AWKWARD, *random_texts(100)])
    again = Tokenizer(tokenizer.json)
    assert (again.digest, again.end_of_text) == (tokenizer.digest, tokenizer.end_of_text)
    assert tokenizer.token_bytes[tokenizer.end_of_text] == b""


@pytest.mark.parametrize("kind", EXACT)
def test_saved_truncation_and_padding_are_ignored(kind: str, tmp_path: Path) -> None:
    library = EXACT[kind]()
    expected = load(save(library, tmp_path / "plain.json"))
    library.enable_truncation(5)
    library.enable_padding(length=70, pad_token="!", pad_id=3)
    tokenizer = load(save(library, tmp_path / "tokenizer.json"))
    assert_exact(tokenizer, SAMPLE)
    for mine, plain in zip(tokenizer.encode_batch(SAMPLE), expected.encode_batch(SAMPLE), strict=True):
        assert np.array_equal(mine, plain)


def test_byte_fallback_tokenizers_encode_as_the_library_does_but_for_the_space_before(tmp_path: Path) -> None:
    library = byte_fallback_bpe()
    tokenizer = load(save(library, tmp_path / "tokenizer.json"))
    assert tokenizer.end_of_text == library.token_to_id("</s>")
    for text in ("the quick brown fox", "lazy\n dogs 黃河", "<0x0A>"):
        assert tokenizer.encode(" " + text).tolist() == library.encode(text, add_special_tokens=False).ids
    unigrams = load(save(unigram(), tmp_path / "unigram.json"))
    assert [unigrams.decode([i]) for i in unigrams.encode("the the quick")] == ["the", " the", " quick"]


def test_a_file_without_the_type_of_its_model_is_read(tmp_path: Path) -> None:
    """GPT-2's tokenizer.json is such a file, with empty prefixes and merges as strings."""
    library = byte_level_bpe()
    config = json.loads(library.to_str())
    model = {key: config["model"][key] for key in ("vocab", "dropout", "fuse_unk")}
    merges = [" ".join(pair) for pair in config["model"]["merges"]]
    model |= {"merges": merges, "unk_token": "", "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    del config["padding"], config["truncation"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(config | {"model": model}))
    tokenizer = load(str(path))
    assert tokenizer.backend == "gigatoken"
    library.encode_special_tokens = True
    for text in SAMPLE:
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    for other in (unigram(), word_piece(MARK), single_bytes()):
        parts = json.loads(other.to_str())["model"]
        kind = parts.pop("type")
        assert load(save(other, path, model=parts)).json, kind


def test_dropout_is_off(tmp_path: Path) -> None:
    library = byte_level_bpe()
    model = json.loads(library.to_str())["model"]
    tokenizer = load(save(library, tmp_path / "tokenizer.json", model=model | {"dropout": 0.9}))
    assert tokenizer.encode(TEXTS[0]).tolist() == library.encode(TEXTS[0]).ids


def sequence(*steps: Any) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(list(steps))


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
LOSSY = {
    "Whitespace before ByteLevel": (
        lambda: with_parts(byte_level_bpe(), pre_tokenizer=sequence(pre_tokenizers.Whitespace(), BYTE_LEVEL)),
        r"\(code: '.*' becomes",
    ),
    "BERT": (
        lambda: with_parts(word_piece(), normalizer=normalizers.BertNormalizer()),
        r"normalizer BertNormalizer changes text \(code",
    ),
    "WordPiece with words that look like continuations": (word_piece, "repeated punctuation: .*#.* becomes"),
    "WordPiece of short words": (lambda: word_piece(MARK, 100), r"'xxxx.*' becomes"),
    "WordLevel": (
        lambda: word_level(pre_tokenizers.WhitespaceSplit(), ["<unk>", "the", "quick"]),
        "must contain all 256 bytes.*it has 0: use a byte-level",
    ),
    "WordLevel with bytes for nothing": (lambda: word_level(BYTE_LEVEL, ["<unk>", *ALPHABET]), "code: 'def f"),
    "SentencePiece without bytes": (lambda: unigram(byte_fallback=False), "must contain all 256 bytes"),
    "T5": (
        lambda: unigram(before=sequence(pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(MARK))),
        r"\(code: '.*\\n.*' becomes",
    ),
    "lower case": (lambda: with_parts(byte_level_bpe(), normalizer=normalizers.Lowercase()), "Lowercase changes"),
    "stripped": (lambda: with_parts(byte_fallback_bpe(), normalizer=normalizers.Strip()), "Strip changes text"),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_a_tokenizer_that_loses_text_is_refused_when_loaded(kind: str, tmp_path: Path) -> None:
    make, reason = LOSSY[kind]
    path = save(make(), tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=reason) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_suffix_at_word_ends_is_refused(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=ALPHABET, end_of_word_suffix="</w>")
    library.train_from_iterator(SAMPLE, trainer)
    with pytest.raises(UserError, match=r"tokenizer.json: its end_of_word_suffix '</w>'"):
        load(save(library, tmp_path / "tokenizer.json"))


def test_an_added_token_that_is_also_a_word(tmp_path: Path) -> None:
    """A special one of BPE is refused; an ordinary one is a word; in others, texts have its bytes instead."""
    path = tmp_path / "tokenizer.json"
    config = json.loads(byte_level_bpe().to_str())
    word = AddedToken("Ġthe", special=True, normalized=False).content
    token = config["added_tokens"][0] | {"content": word, "id": config["model"]["vocab"].get(word)}
    assert token["id"] is not None

    def added(special: bool) -> str:
        path.write_text(json.dumps(config | {"added_tokens": [*config["added_tokens"], token | {"special": special}]}))
        return str(path)

    with pytest.raises(UserError, match=r"its special token 'Ġthe' is also a word: a text that has it would become"):
        load(added(special=True))
    assert_exact(load(added(special=False)), ["over the lazy dog", *SAMPLE])
    library = unigram()
    library.add_special_tokens([MARK + "quick"])
    tokenizer = load(save(library, path))
    assert_exact(tokenizer, ["the quick", "</s><unk> quick<s>", *SAMPLE])


def test_a_file_with_ids_in_disorder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    library = byte_level_bpe()
    config = json.loads(library.to_str())
    [end], vocab = config["added_tokens"], config["model"]["vocab"]
    for changes, reason in (
        ({"added_tokens": [end | {"id": vocab["a"]}]}, f"'{re_escaped(END_OF_TEXT)}' and 'a' have the same id"),
        ({"model": config["model"] | {"vocab": vocab | {"a": vocab["b"]}}}, "two tokens .* the same id"),
        ({"model": config["model"] | {"vocab": vocab | {"a": -1}}}, "must be an integer >= 0"),
        ({"model": config["model"] | {"type": "Wav2Vec"}}, "model type Wav2Vec is not supported"),
    ):
        with pytest.raises(UserError, match=f"tokenizer.json: .*{reason}"):
            load(save(library, path, **changes))


def re_escaped(text: str) -> str:
    return text.replace("|", r"\|")


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_a_normalizer_is_accepted_where_the_corpus_has_that_form(form: str, tmp_path: Path) -> None:
    library = byte_level_bpe()
    library.normalizer = normalizers.NFC() if form == "NFC" else normalizers.NFKC()
    path = save(library, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=rf'normalizer {form} changes text .*: set corpus.normalization = "{form}"'):
        load(path)
    tokenizer = load(path, form)  # type: ignore[arg-type]
    assert_exact(tokenizer, SAMPLE)  # in any form: the endpoint's prompts are not normalized
    library.encode_special_tokens = True
    for text in normalized_probes(form).values():  # type: ignore[arg-type]
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert load(save(tokenizers.Tokenizer.from_str(tokenizer.json.decode()), tmp_path / "again.json")).vocab_size


def test_a_normalizer_that_changes_nothing_is_left_out(tmp_path: Path) -> None:
    library = byte_fallback_bpe()
    strip = normalizers.Strip(left=False, right=False)
    library.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), strip, normalizers.Replace(" ", MARK)])
    assert_exact(load(save(library, tmp_path / "tokenizer.json")), SAMPLE)


def test_no_batch_loses_text_silently(tmp_path: Path) -> None:
    """Words of more characters than any probe has are beyond what the file can encode."""
    tokenizer = load(save(word_piece(MARK, limit=700), tmp_path / "tokenizer.json"))
    assert_exact(tokenizer, ["a" * 700])
    with pytest.raises(UserError, match=r"loses text: the tokens of 'aaa.* have 0 bytes, the text has 800;"):
        tokenizer.encode_batch(["the", "a" * 800, "b" * 900])


@pytest.mark.parametrize(
    "sample",
    [
        ["0000000 000 00000 000000000 0000"],
        ["0" * n for n in range(1, 90, 7)],
        ["aaaa aaaaaaa bbbb aabb -- ----\n\n\n"],
    ],
)
@pytest.mark.parametrize("vocab_size", [262, 300, 2000])
def test_training_on_repeated_characters(sample: list[str], vocab_size: int) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=vocab_size), sample)
    pieces = [piece for piece in tokenizer.token_bytes if piece]
    assert len(pieces) == len(set(pieces)) == tokenizer.vocab_size - 1  # all but the end of text
    merges = json.loads(tokenizer.json)["model"]["merges"]
    assert len(merges) == len(set(map(tuple, merges)))
    assert tokenizer.backend == "gigatoken"
    library = tokenizers.Tokenizer.from_str(tokenizer.json.decode())
    texts = [*sample, *(char * n for char in "0ab-" for n in range(40)), *SAMPLE]
    assert_exact(tokenizer, texts)
    for text in texts:
        if END_OF_TEXT not in text:
            assert tokenizer.encode(text).tolist() == library.encode(text).ids
