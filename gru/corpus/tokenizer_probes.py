"""Texts that tokenizers change or lose: one for each script and habit, and the comparison of a text with its decoding.

This module knows neither tokenizers nor their files.
"""

import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping

from gru.config_corpus import Normalization

PROBES: Mapping[str, str] = {
    "code": "def f(x):\n\tif x >= 10:\r\n        return  {x[0]: 'it\\'s'}, \"they'll\" # <= `y` ~ $1 @ 2%\n\n\n",
    "spaces": "  two spaces  before,  between and after  ",
    "one space": " ",
    "line ends": "\n\none\n \n\t\t\ntwo \r\n\r\nthree\r",
    "numbers": "3.14159 1234567890 0000000 00 000 1,000,000 0x00FF -----==== 00000000000000000000",
    "repeated punctuation": " ".join(3 * char + "\n" + 4 * char for char in string.punctuation),
    "Latin": "Naïve Ünïcødé ÀÉÇŒß Ångström İıſ ﬁ ½ ² № … “quotes” «ça» e\u0301 o\u0308\u0304 I'VE it’s",
    "Greek": "Ελληνικά πρόοδος ΐ Ω \u2126",
    "Cyrillic": "Привет, мир! Ёлка й и\u0306 Ђурђевак",
    "Arabic": "مرحبا بالعالم، كَتَبَ ﷽ ١٢٣ \u200fا\u0653",
    "Hebrew": "שָׁלוֹם עולם \ufb2a",
    "Devanagari": "नमस्ते दुनिया क्षत्रिय \u0958",
    "Thai": "สวัสดีชาวโลก น้ำ",
    "Chinese": "白日依山盡，黃河入海流。「㊀」　全角ＡＢＣ \uf900 𠮷 𒐫",
    "Kana": "こんにちは、カタカナ ｶﾞ が か\u3099",
    "Hangul": "안녕하세요 \u1112\u1161\u11ab ㈜",
    "emoji": "😀 👩\u200d👩\u200d👧 🇩🇪 👍🏽 ❤\ufe0f \U0001fae0",
    "control characters": "\x00\x01\x08\x0b\x0c\x1b\x1f\x7f\x80\x85\xa0\xad",
    "invisible characters": "\u200b\u200d\u200e\u2028\u2029\u2060\ufeff\ufffd\ufffe\U000e0041\U0010ffff",
    "special tokens": "<|endoftext|><|endoftext|> <s> </s><unk> <pad> <mask> [UNK] [CLS][SEP] [PAD] [MASK] <eos> "
    "<|im_start|> <0x0A><0xE2> \u2581 \u2581\u2581a ##ing a## a@@ b</w> Ġ Ċ <start_of_turn>",
    "a long word": "x" * 300 + "0123456789abcdef" * 20,
}
_SHOWN = 24  # characters of a difference in a message


def normalized_probes(normalization: Normalization) -> dict[str, str]:
    """Return the probes in the form of a corpus' documents."""
    if normalization == "none":
        return dict(PROBES)
    return {name: unicodedata.normalize(normalization, text) for name, text in PROBES.items()}


def first_difference(texts: Iterable[tuple[str, str]], changed: Callable[[str], str]) -> str | None:
    """Return which of the named texts a function changes, and how, in a few words; None if it changes none."""
    for name, text in texts:
        if (other := changed(text)) != text:
            pairs = enumerate(zip(text, other, strict=False))
            start = next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))
            before, after = (part[max(start - 4, 0) :][:_SHOWN] for part in (text, other))
            return f"{name}: {before!r} becomes {after!r}"
    return None
