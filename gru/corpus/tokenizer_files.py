"""The meaning of a Hugging Face `tokenizer.json`: which bytes each token stands for, and which files are refused.

The bytes of a text are the bytes of its tokens, end to end. What a file says beyond that is left out: special tokens
are not looked for in texts, no text is cut, padded or given a space at its beginning, and no merge is left to chance.
This module does not encode: see token_encoders.py.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from gru.config_corpus import Normalization
from gru.corpus.tokenizer_probes import first_difference, normalized_probes
from gru.errors import UserError, first_line

END_OF_TEXT = "<|endoftext|>"
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")  # of other projects' tokenizers
WORD_PATTERN = r" ?[^ \t\r\n]+| ?\r?\n|[ \t\r]"
"""The words of kind `word`: each with the space before it, and line ends. A piece starts wherever a space is."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_KINDS = "bpe (byte-level or with byte_fallback), Unigram, WordPiece, WordLevel, char, byte or word"
_REMEDY = "use a byte-level tokenizer or one with byte_fallback, or leave out tokenizer.path to train one"
_Json = dict[str, Any]


@dataclass(frozen=True)
class TokenizerFile:
    """What a tokenizer.json means.

    kind: `table` (characters, and bytes for the others), `words` (kind `word`), or `pieces` (encoded by a library).
    plain: the JSON for the libraries, without what finds special tokens, cuts, pads, or adds to a text.
    token_bytes: [vocabulary] the bytes of each token; empty for special tokens and unused ids.
    byte_ids: [256] the token of each single byte.
    special: contents of the added tokens.
    reserved: strings that a library would not take for text, and which are encoded as bytes instead.
    """

    kind: Literal["table", "words", "pieces"]
    plain: str
    token_bytes: list[bytes]
    byte_ids: list[int]
    end_of_text: int
    special: list[str]
    reserved: re.Pattern[str] | None


def read_tokenizer_file(json_bytes: bytes) -> TokenizerFile:
    """Return the meaning of a tokenizer.json. Raises UserError if decoding cannot return every text."""
    try:
        config = json.loads(json_bytes)
        return _read(config, config.get("added_tokens") or [], _model(config["model"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"not a tokenizer.json of kind {_KINDS}") from None


def _read(config: _Json, added_tokens: list[_Json], model: _Json) -> TokenizerFile:
    vocab = _vocabulary(model)
    added = {token["content"]: token["id"] for token in added_tokens}
    end = next((name for name in (END_OF_TEXT, *_OTHER_ENDS) if name in added), None)
    if end is None:
        raise UserError(f"has no {END_OF_TEXT} token, which must end each document")
    special = {token["content"] for token in added_tokens if token.get("special", True)} | {end}
    _check_ids(vocab, {name: added[name] for name in special})
    unknown = _unknown_token(model)
    special |= {unknown} if unknown is not None else set()
    plain, mark = _plain(config, model)
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(plain["pre_tokenizer"]))
    kind = _kind(plain)
    bytes_of = _table_bytes if kind == "table" else _spelling(model, byte_level, mark)
    token_bytes = [b""] * (max([*vocab.values(), *added.values()]) + 1)
    for token, index in vocab.items():
        if token not in special:
            token_bytes[index] = bytes_of(token)
    words = [] if kind == "table" else _special_words(model, vocab.keys() & special)
    fallback = bool(model.get("byte_fallback")) and not byte_level
    return TokenizerFile(
        kind,
        json.dumps(plain),
        token_bytes,
        _byte_ids(vocab, token_bytes, fallback),
        added[end],
        list(added),
        _reserved([*map(bytes_of, words), (mark or "").encode()], fallback and _matches_whole_words(model)),
    )


def _model(model: _Json) -> _Json:
    """Return the model with its type, which older files (GPT-2's) do not name, and without chance."""
    if isinstance(model["vocab"], list):
        guess = "Unigram"
    elif "merges" in model:
        guess = "BPE"
    else:
        guess = "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"
    kind = model.get("type") or guess
    if kind not in ("BPE", "Unigram", "WordPiece", "WordLevel"):
        raise UserError(f"model type {kind} is not supported: {_REMEDY}")
    if kind != "BPE":
        return model | {"type": kind}
    affixes = {name: model.get(name) or None for name in ("continuing_subword_prefix", "end_of_word_suffix")}
    for name, affix in affixes.items():
        if affix:
            raise UserError(f"its {name} {affix!r} loses the spaces between words: {_REMEDY}")
    return model | affixes | {"type": kind, "unk_token": model.get("unk_token") or None, "dropout": None}


def _vocabulary(model: _Json) -> dict[str, int]:
    """Return the id of each token."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return vocab
    pieces = {piece: index for index, (piece, _) in enumerate(vocab)}
    if len(pieces) < len(vocab):
        raise UserError("its vocabulary has a token twice")
    return pieces


def _check_ids(vocab: dict[str, int], special: dict[str, int]) -> None:
    """Raise UserError unless each id stands for one token."""
    ids = {index: token for token, index in vocab.items()}
    for index in (*ids, *special.values()):
        if type(index) is not int or index < 0:
            raise UserError(f"token id {index!r} must be an integer >= 0")
    if len(ids) < len(vocab):
        raise UserError("two tokens of its vocabulary have the same id")
    for token, index in special.items():
        if ids.get(index, token) != token:
            raise UserError(f"the tokens {token!r} and {ids[index]!r} have the same id {index}")


def _unknown_token(model: _Json) -> str | None:
    """Return the token for what the vocabulary cannot spell, if there is one."""
    if model["type"] != "Unigram":
        return model.get("unk_token")
    index = model.get("unk_id")
    return None if index is None else model["vocab"][index][0]


def _plain(config: _Json, model: _Json) -> tuple[_Json, str | None]:
    """Return the JSON for the libraries, and the character that stands for a space, if there is one."""
    mark, normalizer = None, None
    for step in _steps(config.get("normalizer")):
        if space := _space_mark(step):
            mark, normalizer = space, step
        elif not _is_prefix(step):
            raise UserError(f"its normalizer {step['type']} changes text, so decoding does not return the same text")
    before = []
    for step in _steps(config.get("pre_tokenizer")):
        if step["type"] == "Metaspace":
            mark = step.get("replacement", "\u2581")
            split = {"split": step.get("split", True)}
            step = {"type": "Metaspace", "replacement": mark, "prepend_scheme": "never"} | split
        elif step["type"] == "ByteLevel":
            step = step | {"add_prefix_space": False}
        before.append(step)
    pre_tokenizer = before[0] if len(before) == 1 else {"type": "Sequence", "pretokenizers": before}
    nothing: _Json = {"truncation": None, "padding": None, "added_tokens": [], "post_processor": None}
    parts = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer if before else None, "model": model}
    return {"version": "1.0", "decoder": None} | config | nothing | parts, mark


def _steps(part: _Json | None) -> list[_Json]:
    """Return the steps of a normalizer or pre-tokenizer, which may be sequences of sequences."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part.get("normalizers") or part.get("pretokenizers") or [] for step in _steps(inner)]


def _space_mark(step: _Json) -> str | None:
    """Return the character that a normalizer's step writes for a space, if it does that."""
    replaces = step["type"] == "Replace" and step["pattern"] == {"String": " "} and len(step["content"]) == 1
    return step["content"] if replaces else None


def _is_prefix(step: _Json) -> bool:
    """Whether a normalizer's step puts a space before a text, which is left out."""
    return step["type"] == "Prepend" and step["prepend"] == "\u2581"


def _kind(plain: _Json) -> Literal["table", "words", "pieces"]:
    model = plain["model"]
    if model["type"] != "BPE" or model["merges"] or plain["normalizer"]:
        return "pieces"
    if model.get("ignore_merges"):
        split, *_ = _steps(plain["pre_tokenizer"]) or [{}]
        return "words" if split.get("pattern") == {"Regex": WORD_PATTERN} else "pieces"
    return "table" if model.get("byte_fallback") and plain["pre_tokenizer"] is None else "pieces"


def _table_bytes(token: str) -> bytes:
    """Return the bytes of a token of a table: a character, or a byte written <0xNN>."""
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    if len(token) != 1:
        raise UserError(f"token {token!r} must be one character or a byte such as <0x0A>")
    return token.encode()


def _spelling(model: _Json, byte_level: bool, mark: str | None) -> Callable[[str], bytes]:
    """Return the function from a token to its bytes."""
    values = {char: byte for byte, char in enumerate(byte_characters())}
    prefix = model.get("continuing_subword_prefix") or ""

    def bytes_of(token: str) -> bytes:
        if prefix and token != prefix:
            token = token.removeprefix(prefix)
        if byte_level:  # other characters are in special tokens only, which no text becomes
            return bytes(values[char] for char in token) if all(char in values for char in token) else b""
        if model.get("byte_fallback") and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return (token.replace(mark, " ") if mark else token).encode()

    return bytes_of


def byte_characters() -> list[str]:
    """Return the printable character for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _matches_whole_words(model: _Json) -> bool:
    """Whether a word of a text becomes the token spelled like it, even one that no merge makes."""
    return model["type"] != "BPE" or bool(model.get("ignore_merges"))


def _special_words(model: _Json, special: set[str]) -> list[str]:
    """Return the special tokens of the vocabulary that a text could become. Raises UserError if a merge makes one."""
    if not special or _matches_whole_words(model):
        return sorted(special)
    merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    made = {"".join(pair) for pair in merges}
    for token in sorted(special):
        if token in made or len(token) == 1:
            raise UserError(f"its special token {token!r} is also a word: a text that has it would become that token")
    return []


def _reserved(pieces: list[bytes], byte_tokens: bool) -> re.Pattern[str] | None:
    """Return the pattern of these strings, and of the names of bytes if `byte_tokens`; None if there is nothing."""
    words = {word for piece in pieces if (word := piece.decode(errors="ignore"))}
    patterns = [re.escape(word) for word in sorted(words, key=lambda word: (-len(word), word))]
    patterns += [_BYTE_TOKEN.pattern] if byte_tokens else []
    return re.compile("|".join(patterns)) if patterns else None


def _byte_ids(vocab: dict[str, int], token_bytes: list[bytes], fallback: bool) -> list[int]:
    """Return the token of each byte [256]. Raises UserError if one is absent."""
    single: dict[bytes, int | None] = {piece: index for index, piece in enumerate(token_bytes) if len(piece) == 1}
    if fallback:
        single = {bytes([byte]): vocab.get(f"<0x{byte:02X}>") for byte in range(256)}
    ids = [index for byte in range(256) if (index := single.get(bytes([byte]))) is not None]
    if len(ids) < 256:
        raise UserError(
            f"its vocabulary must contain all 256 bytes, or it cannot encode every text; it has {len(ids)}: {_REMEDY}"
        )
    return ids


def with_end_of_text(json_bytes: bytes) -> bytes:
    """Return the tokenizer.json, with an end-of-text token added if it has none."""
    try:
        config = json.loads(json_bytes)
        added = config.get("added_tokens") or []
        if not {token["content"] for token in added}.isdisjoint({END_OF_TEXT, *_OTHER_ENDS}):
            return json_bytes
        ids = [*_vocabulary(config["model"]).values(), *(token["id"] for token in added)]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": max(ids) + 1, "content": END_OF_TEXT} | flags | {"special": True}
        return json.dumps(config | {"added_tokens": [*added, token]}).encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        return json_bytes  # not a tokenizer.json, which the caller reports


def without_normalizer(json_bytes: bytes, normalization: Normalization) -> bytes:
    """Return the tokenizer.json without the normalizer's steps that change no text of the corpus.

    Raises UserError naming a step that changes the probes in that form.
    """
    try:
        config = json.loads(json_bytes)
        steps = _steps(config.get("normalizer"))
        kept = [step for step in steps if _space_mark(step) or _is_prefix(step)]
        others = [step for step in steps if step not in kept]
    except (ValueError, KeyError, TypeError, AttributeError):
        return json_bytes  # not a tokenizer.json, which the caller reports
    if not others:
        return json_bytes
    for step in others:
        if change := _change(step, normalization):
            choices: tuple[Normalization, ...] = ("NFC", "NFKC")
            forms = [form for form in choices if not _change(step, form)]
            remedy = f'set corpus.normalization = "{forms[0]}"' if forms else _REMEDY
            raise UserError(f"its normalizer {step['type']} changes text ({change}): {remedy}")
    return json.dumps(config | {"normalizer": {"type": "Sequence", "normalizers": kept} if kept else None}).encode()


def _change(step: _Json, normalization: Normalization) -> str | None:
    """Return how a normalizer's step changes a probe of the corpus' form, or None if it changes none."""
    import tokenizers

    nothing = dict.fromkeys(("truncation", "padding", "pre_tokenizer", "post_processor", "decoder"))
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    library = nothing | {"version": "1.0", "added_tokens": [], "normalizer": step, "model": model}
    try:
        normalizer = tokenizers.Tokenizer.from_str(json.dumps(library)).normalizer
        return first_difference(normalized_probes(normalization).items(), normalizer.normalize_str)
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"its normalizer {step['type']} cannot be read: {first_line(error)}") from None
