import json
import random
import re
import string
import sys
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import pytest

from gru.config import load
from gru.config_corpus import FilterConfig
from gru.corpus import languages
from gru.corpus.filters import DocumentFilter
from gru.corpus.gopher import quality_problem, repetition_problem
from gru.corpus.masking import mask_emails, mask_ips
from gru.errors import UserError
from tests.gru.corpus.reading import read, texts, write

SENTENCE = "The cat sat down and looked at a bird that sang in one of the old trees behind our house today."
ENGLISH = "It rained all night, and in the morning the road to the village was gone."
GERMAN = "Es regnete die ganze Nacht, und am Morgen war die Straße ins Dorf verschwunden."
FRENCH = "Il a plu toute la nuit, et au matin la route du village avait disparu."
CHINESE = "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。"


def prose(count: int, *others: str) -> str:
    """Return a text of `count` English words, and others."""
    return " ".join([*islice(cycle(SENTENCE.split()), count), *others])


def lines(plain: int, marked: int, before: str = "", behind: str = "") -> str:
    """Return a text of such lines, with blank ones between them."""
    return "\n\n".join([*[SENTENCE] * plain, *[f"  {before}{SENTENCE}{behind}  "] * marked])


def distinct(count: int, length: int = 5) -> list[str]:
    """Return different words."""
    rng = random.Random(0)
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=length))] = None
    return list(words)


def repeating(total: int, n: int, phrases: int, copies: int) -> str:
    """Return a text of `total` words: some phrases of n words, each so many times, and words that occur once."""
    words = iter(distinct(total))
    repeated = [[*islice(words, n)] for _ in range(phrases)]
    text = [word for _ in range(copies) for phrase in repeated for word in [*phrase, next(words)]]
    return " ".join([*text, *islice(words, total - len(text))])


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("gopher_words", prose(50), prose(49)),
        ("gopher_words", prose(100_000), prose(100_001)),
        ("gopher_word_length", "the and " + "xyz " * 98, "the and xy " + "xyz " * 97),
        ("gopher_word_length", f"the and {'x' * 24}" + " ten_letter" * 97, f"the and {'x' * 25}" + " ten_letter" * 97),
        ("gopher_hashes", prose(90, *["#tag"] * 10), prose(89, *["#tag"] * 11)),
        ("gopher_ellipses", prose(89, *["so...", "oh…"] * 5, "no"), prose(88, *["so...", "oh…"] * 5, "so...", "no")),
        ("gopher_bullets", lines(1, 9, before="- "), lines(1, 10, before="• ")),
        ("gopher_ellipsis_lines", lines(7, 3, behind="..."), lines(6, 4, behind=" …")),
        ("gopher_letters", prose(80, *["1,234"] * 20), prose(79, *["1,234"] * 21)),
        ("gopher_stop_words", "word " * 98 + "(The) and.", "word " * 98 + "the The"),
    ],
)
def test_a_text_breaks_a_rule_of_quality_beyond_its_limit(rule: str, good: str, bad: str) -> None:
    assert quality_problem(good) is None
    assert quality_problem(bad) == rule


LONG = distinct(10, length=50)  # lines of one word each, so that no n-gram is repeated
LONGER = [word + "x" for word in LONG]
SHORT_LINES = "\n".join(string.ascii_letters[:30])  # a paragraph


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("gopher_duplicate_lines", "\n".join([*LONG[:6], *["ok"] * 4]), "\n \n".join([*LONG[:6], *["ok"] * 5])),
        ("gopher_duplicate_line_characters", "\n".join(LONG[:8] + LONG[6:8]), "\n".join(LONG[:6] + LONGER[:2] * 2)),
        (
            "gopher_duplicate_paragraphs",
            "\n\n".join(["\n".join(distinct(60, 9)[i::6]) for i in range(6)] + ["ok"] * 4),
            "\r\n \r\n".join(["\n".join(distinct(60, 9)[i::6]) for i in range(6)] + ["ok"] * 5),
        ),
        (
            "gopher_duplicate_paragraph_characters",  # 59 of 298 characters, and of 278
            "\n\n".join([SHORT_LINES, *distinct(36), SHORT_LINES]),
            "\n\n".join([SHORT_LINES, *distinct(40, 4), SHORT_LINES]),
        ),
        ("gopher_top_2_gram", repeating(100, 2, 1, 10), repeating(100, 2, 1, 11)),
        ("gopher_top_3_gram", repeating(100, 3, 1, 6), repeating(100, 3, 1, 7)),
        ("gopher_top_4_gram", repeating(100, 4, 1, 4), repeating(100, 4, 1, 5)),
        ("gopher_duplicate_5_grams", repeating(1000, 5, 30, 2), repeating(1000, 5, 31, 2)),
        ("gopher_duplicate_6_grams", repeating(1000, 6, 23, 2), repeating(1000, 6, 24, 2)),
        ("gopher_duplicate_7_grams", repeating(1000, 7, 18, 2), repeating(1000, 7, 19, 2)),
        ("gopher_duplicate_8_grams", repeating(1000, 8, 15, 2), repeating(1000, 8, 16, 2)),
        ("gopher_duplicate_9_grams", repeating(1000, 9, 12, 2), repeating(1000, 9, 13, 2)),
        ("gopher_duplicate_10_grams", repeating(1000, 10, 10, 2), repeating(1000, 10, 11, 2)),
    ],
)
def test_a_text_breaks_a_rule_of_repetition_beyond_its_limit(rule: str, good: str, bad: str) -> None:
    assert repetition_problem(good) != rule
    assert repetition_problem(bad) == rule


def test_overlapping_duplicates_count_once_and_what_occurs_once_is_no_repetition() -> None:
    assert repetition_problem(repeating(1000, 50, 2, 2)) is None  # a tenth, in 41 duplicate 10-grams each
    assert repetition_problem(repeating(990, 50, 2, 2)) == "gopher_duplicate_10_grams"
    for text in ("word", "two words", "three other words", CHINESE, "\n", " \n\n "):
        assert repetition_problem(text) is None
    assert repetition_problem("na na na na") == "gopher_top_2_gram"


@pytest.mark.parametrize("block", [100, 1 << 20])
def test_repeated_ngrams_are_those_that_a_count_finds(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For random texts the first rule is the same as by counting tuples of words; long texts are read in blocks."""
    monkeypatch.setattr("gru.corpus.gopher._BLOCK", re.compile(rf".{{1,{block}}}\S*", re.DOTALL))
    rng, found = random.Random(1), set()
    for _ in range(100):
        vocabulary = distinct(rng.choice([5, 20, 100, 400]))
        words = rng.choices(vocabulary, k=rng.randrange(1, 200)) + distinct(rng.randrange(300), 6)
        words += words[: rng.randrange(60)] if rng.random() < 0.5 else []
        found.add(repetition_problem(" ".join(words)))
        assert repetition_problem(" ".join(words)) == counted(words)
    assert len(found) > 5


def counted(words: list[str]) -> str | None:
    """Return the rule on n-grams that words break, by counting each n-gram."""
    limits = [0.20, 0.18, 0.16, 0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    for n, limit in zip(range(2, 11), limits, strict=True):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts, seen, inside = Counter(grams), set(), set()
        if n <= 4:
            most = max(counts.values(), default=0)
            top = [len("".join(gram)) for gram, count in counts.items() if count == most > 1]
            characters = max(top, default=0) * most
        else:
            for i, gram in enumerate(grams):
                inside |= {*range(i, i + n)} if gram in seen else set()
                seen.add(gram)
            characters = sum(len(words[i]) for i in inside)
        if characters > limit * len("".join(words)):
            return f"gopher_top_{n}_gram" if n <= 4 else f"gopher_duplicate_{n}_grams"
    return None


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to john.smith+x@mail.example.co.uk.", "Write to <>."),
        ("<a_b@x.org>, 'o'brien@x.ie';c@d.com", "<<>>, '<>';<>"),
        ("聯絡john@a.com謝謝", "聯絡<>謝謝"),
        ("müller@straße.de", "<>"),
        ("https://me:secret@host.net/", "https://me:<>/"),
        ("user@localhost, @name, a@b, x @ y.com, @decorator.method, 5@2.5", None),
        ("a" * 100_000 + "." + "@" * 1000, None),
    ],
)
def test_email_addresses_are_masked(text: str, masked: str | None) -> None:
    expected = text if masked is None else masked.replace("<>", "email@example.com")
    assert mask_emails(text) == expected
    assert mask_emails(expected) == expected


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("From 8.8.8.8, 1.1.1.1:53 (93.184.216.34/24) to 8.8.4.4.", "From {4}, {4}:53 ({4}/24) to {4}."),
        ("在8.8.8.8上 ::ffff:8.8.8.8 ip:8.8.8.8", "在{4}上 ::ffff:{4} ip:{4}"),
        ("127.0.0.1 10.0.0.1 192.168.1.1 172.16.0.1 0.0.0.0 255.255.255.255 169.254.1.1 192.0.2.7", None),
        ("1.2.3 v1.2.3.4 1.2.3.4.5 1.2.3.4567 256.1.1.1 8.8.8 08.8.8.8 1.2.3.4a 3.14159", None),
        ("2001:4860:4860::8888, [2606:4700::1111]:53 2a00:1450:4001:81b:0:0:0:200e/64", "{6}, [{6}]:53 {6}/64"),
        ("at 2001:4860:4860::8888: no route. 2620:FE::FE.", "at {6}: no route. {6}."),
        ("::1 fe80::1 fd00::1 2001:db8::7 dead::beef a::b std::cout ::", None),
        ("2024: 2024:10 2024-10-12T20:10:12 20:10:30 3000:1:2 2001:1:2:3:4:5:6:7:8:9 2001::xyz", None),
        ("00:1b:63:84:45:e6 2000:1b:63:84:45:e6", None),
    ],
)
def test_public_ip_addresses_are_masked(text: str, masked: str | None) -> None:
    expected = (masked or text).replace("{4}", "192.0.2.1").replace("{6}", "2001:db8::1")
    assert mask_ips(text) == expected
    assert mask_ips(expected) == expected


GOOD = " ".join(distinct(45)) + " and the cat with the recipe"  # passes every filter


def jsonl(path: Path, *given: str) -> str:
    """Write the texts as JSON Lines."""
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in given).encode())


def test_by_default_every_document_stays_as_it_is(tmp_path: Path) -> None:
    given = ["x", "na na na na", "### ###", "write to me@example.net at 8.8.8.8", FRENCH, CHINESE]
    assert texts(jsonl(tmp_path / "a.jsonl", *given)) == given
    assert DocumentFilter(FilterConfig()).reason("") is None


def test_patterns_choose_documents_by_what_is_in_them(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "a Recipe\nof cake", "a recipe of\ncopyright 1999", "a poem", "白日")
    keep, drop = "(?i)recipe", r"(?m)^copyright \d+$"
    found, report = read(path, filter={"keep_pattern": keep, "drop_pattern": drop})
    assert found == ["a Recipe\nof cake"] and report.dropped == {"keep_pattern": 2, "drop_pattern": 1}
    assert read(path, filter={"drop_pattern": "[白黑]"})[1].dropped == {"drop_pattern": 1}


def test_what_is_left_out_is_counted_by_reason_for_every_partition_size(tmp_path: Path) -> None:
    given = [
        GOOD,
        prose(30),
        f"{GOOD} #spam# #spam# #spam#",
        "ok",
        " ".join([GOOD] * 2),
        f"{GOOD} private",
        " ".join(["lorem"] * 60) + " and the",
        f"{GOOD} me@example.net",
    ]
    path = jsonl(tmp_path / "a.jsonl", *given)
    settings = {"gopher_quality": True, "gopher_repetition": True, "drop_pattern": "private", "mask_emails": True}
    for size in (50, 300, 10_000):
        found, report = read(path, filter=settings, min_characters=5, partition_bytes=size)
        assert found == [GOOD, f"{GOOD} email@example.com"]
        assert report.dropped == {
            "too_short": 1,
            "drop_pattern": 1,
            "gopher_words": 1,
            "gopher_hashes": 1,
            "gopher_top_2_gram": 1,
            "gopher_duplicate_5_grams": 1,
        }


def test_lengths_and_patterns_are_those_of_the_masked_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "a@bc.de at 8.8.8.8", "secret.name@bc.de")
    found, report = read(path, filter={"mask_emails": True, "mask_ips": True, "drop_pattern": "secret|8.8"})
    assert found == ["email@example.com at 192.0.2.1", "email@example.com"] and not report.dropped
    assert read(path, filter={"mask_emails": True}, max_characters=17)[1].dropped == {"too_long": 1}


def test_documents_in_other_languages_are_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ENGLISH, GERMAN, FRENCH, CHINESE, "12345", "OK.", "?")
    for wanted, expected in [
        (["en"], [ENGLISH]),
        (["fr", "de"], [GERMAN, FRENCH]),
        (["zh"], [CHINESE]),
        (["en", "de", "fr", "zh"], [ENGLISH, GERMAN, FRENCH, CHINESE]),
    ]:
        found, report = read(path, filter={"languages": wanted})
        assert found == expected
        assert report.dropped == Counter({"language": 4 - len(expected), "language_unknown": 3})


def test_a_long_document_is_judged_by_pieces_from_all_over_it(tmp_path: Path) -> None:
    text = f"{ENGLISH}\n" * 100 + f"{GERMAN}\n" * 100_000
    path = write(tmp_path / "a.txt", text.encode())
    assert texts(path, filter={"languages": ["de"]}) == [text]
    assert read(path, filter={"languages": ["en"]})[1].dropped == {"language": 1}


def test_classical_chinese_is_chinese(tmp_path: Path) -> None:
    poems = ["白日依山盡，黃河入海流。", "床前明月光，疑是地上霜。", "欲出未出光辣達，千山萬山如火發。"]
    assert texts(jsonl(tmp_path / "a.jsonl", *poems), filter={"languages": ["zh"]}) == poems


def test_a_language_that_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ENGLISH)
    with pytest.raises(
        UserError, match=r"^corpus.filter.languages: py3langid does not know qq, xx; it knows ace af am "
    ):
        read(path, filter={"languages": ["xx", "en", "qq"]})


def test_without_the_library_of_languages_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    monkeypatch.setattr(languages, "_model", languages._model.__wrapped__)
    path = jsonl(tmp_path / "a.jsonl", ENGLISH)
    with pytest.raises(UserError) as caught:
        read(path, filter={"languages": ["en"]})
    assert str(caught.value) == "corpus.filter.languages needs py3langid: pip install 'gru-pipeline[languages]'"
    assert texts(path) == [ENGLISH]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "corpus.filter.keep_pattern='(a'",
            "corpus.filter.keep_pattern: must be a regular expression (missing ), unterminated subpattern at position 0"
            "), not '(a'",
        ),
        ("corpus.filter.drop_pattern='a{99999999999}'", "corpus.filter.drop_pattern: must be a regular expression ("),
        ('corpus.filter.drop_pattern="a\\n["', "corpus.filter.drop_pattern: must be a regular expression (unterm"),
        ("corpus.filter.drop_pattern=''", "corpus.filter.drop_pattern: must not be empty, not ''"),
        ("corpus.filter.keep_pattern=3", "corpus.filter.keep_pattern: must be a string, not 3"),
        (
            'corpus.filter.languages=["en", "English"]',
            "corpus.filter.languages.1: must be an ISO 639 code, as in \"en\", not 'English'",
        ),
        ("corpus.filter.languages=en", "corpus.filter.languages: must be a list, not 'en'"),
        ("corpus.filter.gopher=true", "corpus.filter.gopher: unknown key; known here: keep_pattern, drop_pattern, "),
    ],
)
def test_a_mistake_in_the_config_is_one_line_that_names_the_key(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path / "c.toml", b'[corpus]\nsources = ["a.txt"]\n')
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(path, [override])
    assert "\n" not in str(caught.value)
