import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from gru.errors import UserError
from tests.gru.corpus.reading import PACKERS, examples, read, texts, write


@pytest.mark.parametrize("suffix", ["", *PACKERS])
def test_json_arrays_are_read_record_by_record(tmp_path: Path, suffix: str) -> None:
    expected = [f"{i} 黃😀\n" for i in range(5000)]
    data = json.dumps([{"text": text, "n": {"deep": [1.5, None]}} for text in expected], indent=1).encode()
    pack = PACKERS.get(suffix, bytes)
    assert texts(write(tmp_path / f"a.json{suffix}", pack(data)), partition_bytes=1000) == expected
    assert texts(write(tmp_path / f"b.json{suffix}", pack(b"\xef\xbb\xbf \n" + data))) == expected
    assert read(write(tmp_path / f"c.json{suffix}", pack(b" [ ] ")))[0] == []
    forms = "not with JSON: an array of objects or strings, JSON Lines, or an object"
    for other, message in (
        (b"", "is empty"),
        (b"text", f"begins with 'text', {forms}"),
        (b"3", f"begins with '3', {forms}"),
    ):
        found, report = read(write(tmp_path / f"d.json{suffix}", pack(other)))
        assert not found and report.dropped == {"unreadable": 1}
        assert examples(report) == [f"d.json{suffix}: {message}"]
    found, report = read(write(tmp_path / f"e.json{suffix}", pack(b'[{"text": "x"}, 3, {"a": 1}, {"text": "y"}]')))
    assert found == ["x", "y"] and report.dropped == {"bad_record": 1, "missing_field": 1}
    assert report.dropped_bytes == {"bad_record": 1, "missing_field": 8}
    assert examples(report) == [
        f"e.json{suffix}: item 2 of the array, at byte 16, is not a JSON object or string, but a number",
        f"e.json{suffix}: item 3 of the array, at byte 19, has no field 'text' of the template; its fields: 'a'",
    ]
    found, report = read(write(tmp_path / f"f.json{suffix}", pack(data[:-1000])))
    assert expected[: len(found)] == found and len(found) > 4000 and report.dropped == {"unreadable": 1}
    assert f"is cut off: the file ends at byte {len(data) - 1000}" in examples(report)[0]


def test_a_json_array_that_is_not_utf8_reads_as_the_same_lines_do(tmp_path: Path) -> None:
    rng = random.Random(0)
    bad = [b"\xff", b"\xe9\xbb", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\xc3\x28", b"\x80\x80"]
    records = [
        b'{"title": "%d", "text": "%s"}'
        % (i, b"".join(rng.choices([*bad, "黃".encode(), "😀".encode(), b"a"], [*[0.001] * 6, 1, 1, 1], k=400)))
        for i in range(3000)
    ]
    array = write(tmp_path / "a.json", b"\xef\xbb\xbf[" + b",\n".join(records) + b"]")
    packed = write(tmp_path / "b.json.gz", gzip.compress(b"[" + b", ".join(records) + b"]", 1))
    lines = write(tmp_path / "c.jsonl", b"\n".join(records))
    for settings in ({}, {"on_bad": "replace"}):
        expected, report = read(lines, template="{title} {text}", **settings)
        assert report.dropped["invalid_utf8"] > 1000 or report.replaced > 1000
        for path in (array, packed):
            found, other = read(path, template="{title} {text}", **settings)
            assert found == expected
            assert (other.dropped, other.replaced) == (report.dropped, report.replaced)
    first = next(i for i, data in enumerate(records) if any(piece in data for piece in bad))
    before = len(b"\xef\xbb\xbf[") + sum(len(data) + 2 for data in records[:first])
    with pytest.raises(UnicodeDecodeError) as error:
        records[first].decode()
    place = before + error.value.start
    with pytest.raises(UserError, match=rf"a.json: not valid UTF-8 at byte {place}$"):
        read(array, template="{title} {text}", on_bad="fail")


GOOD = [{"text": f"good record {i}"} for i in range(99)]
TEXTS = [record["text"] for record in GOOD]


def forms(tmp_path: Path, records: list[str]) -> list[str]:
    """Write the records as an array in several layouts and as JSON Lines under two names, and return the paths."""
    joined = {"a.json": ",", "b.json": ", ", "c.json": " ,\n ", "d.jsonl": "\n", "e.json": "\n"}
    return [
        write(tmp_path / name, (between.join(records) if name[0] in "de" else f"[{between.join(records)}]").encode())
        for name, between in joined.items()
    ]


@pytest.mark.parametrize(
    ("value", "template", "first"),
    [
        ("NaN", "{text}", "first"),
        ("-Infinity", "{text}{s}", "first"),
        ("1e400", "{text} {s}", "first 1e400"),
        (str(2**63), "{text} {s}", f"first {2**63}"),
        ("1" * 5000, "{text} {s}", "first " + "1" * 5000),
        ('"a\tb\x01"', "{text} {s}", "first a\tb\x01"),
        ("[NaN, 1]", "{text} {s}", "first \n1"),
        ('"\\ud83d\\ude00"', "{text} {s}", "first \U0001f600"),
    ],
)
def test_what_programs_write_beyond_json_costs_nothing(tmp_path: Path, value: str, template: str, first: str) -> None:
    records = [f'{{"text": "first", "s": {value}}}', *(json.dumps({**record, "s": ""}) for record in GOOD)]
    for path in forms(tmp_path, records):
        found = texts(path, template=template)
        assert [found[0], *map(str.strip, found[1:])] == [first, *TEXTS]


@pytest.mark.parametrize("escape", ["\\udc00", "\\ud83d", "\\ud83d\\ud83d", "\\uD83Dx", "\\\\\\ud83d"])
def test_half_a_surrogate_pair_costs_its_record_or_is_mended(tmp_path: Path, escape: str) -> None:
    records = ['{"text": "a"}', f'{{"text": "x {escape}"}}', *map(json.dumps, GOOD)]
    mended = re.sub(r"\\u[dD]...", "\ufffd", escape).replace("\\\\", "\\")
    for path in forms(tmp_path, records):
        found, report = read(path)
        assert found == ["a", *TEXTS] and report.dropped == {"bad_record": 1}
        assert report.dropped_bytes["bad_record"] in (len(records[1]), len(records[1]) + 1)
        assert "has half of a surrogate pair, \\u" in examples(report)[0]
        found, report = read(path, on_bad="replace")
        assert found == ["a", f"x {mended}", *TEXTS] and (report.replaced, report.dropped) == (1, {})
        with pytest.raises(UserError, match="has half of a surrogate pair"):
            read(path, on_bad="fail")


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ("[" * 30_000 + "]" * 30_000, "is nested too deeply"),
        ('{"text": ' * 30_000 + '"x"' + "}" * 30_000, "is nested too deeply"),
        ('{"text": "x",}', "is not valid JSON: Expecting property name enclosed in double quotes at its byte 13"),
        ('{"text": tru}', "is not valid JSON: Expecting value at its byte 9"),
        ('{"text": "\\x"}', "is not valid JSON: Invalid \\escape at its byte 10"),
        ('{"text" "x"}', "is not valid JSON: Expecting ':' delimiter at its byte 8"),
        ("{'text': 'x'}", "is not valid JSON"),
        ("nul", "is not valid JSON"),
        ("12", "is not a JSON object or string, but a number"),
        ("[1]", "is not a JSON object or string, but a list"),
        ("null", "is not a JSON object or string, but null"),
        ("NaN", "is not a JSON object or string, but null"),
    ],
)
def test_a_bad_record_costs_itself_in_an_array_as_in_lines(tmp_path: Path, record: str, what: str) -> None:
    for path in forms(tmp_path, ['{"text": "a"}', record, *map(json.dumps, GOOD)]):
        found, report = read(path)
        assert found == ["a", *TEXTS] and report.dropped == {"bad_record": 1}
        assert report.dropped_bytes["bad_record"] in (len(record), len(record) + 1)
        place = "the line at byte 14 " if path[-6] in "de" or path.endswith("l") else "item 2 of the array, at byte 1"
        assert place in examples(report)[0] and what in examples(report)[0]
        with pytest.raises(UserError, match=re.escape(what)):
            read(path, on_bad="fail")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('["one", "two"]', ["one", "two"]),
        ('["a \\", \\"b", "two, \\"", "]"]', ['a ", "b', 'two, "', "]"]),
        ('{"text": "one"}', ["one"]),
        ('\n{\n "text": "one",\n "list": [\n{"a": 1}\n]\n}\n', ["one"]),
        ('{\n "text": "one"\n}\n{\n "text": "two"\n}\n', ["one", "two"]),
        ('"one"\n"two"\n', ["one", "two"]),
        ('[{"text": "one"}]\n[{"text": "two"}]', ["one", "two"]),
        ('[{"text": "one"} {"text": "two"},, {"text": "three"},]', ["one", "two", "three"]),
        (
            '[{"text": "one"},\n\n{"text": "}, {"}, {"text": "three"}  ,{"text": "four"}]',
            ["one", "}, {", "three", "four"],
        ),
        ("[]", []),
        ("\ufeff[]", []),
    ],
)
def test_what_a_json_file_may_hold(tmp_path: Path, data: str, expected: list[str]) -> None:
    assert texts(write(tmp_path / "a.json", data.encode())) == expected
    assert texts(write(tmp_path / "a.json.gz", gzip.compress(data.encode()))) == expected


ELEMENTS: dict[str, tuple[str | None, str]] = {
    '{"text": "an object"}': ("an object", ""),
    '{"text": "b", "more": [{"text": "no"}, "no"]}': ("b", ""),
    '{"x": 1, "text": "other key"}': ("other key", ""),
    '"a string"': ("a string", ""),
    '"with }, { and ], [ in it"': ("with }, { and ], [ in it", ""),
    '["a list"]': (None, "is not a JSON object or string, but a list"),
    '[{"text": "in a list"}]': (None, "is not a JSON object or string, but a list"),
    '[["x"], {"text": "y"}]': (None, "is not a JSON object or string, but a list"),
    "12": (None, "is not a JSON object or string, but a number"),
    "null": (None, "is not a JSON object or string, but null"),
    '{"other": "x"}': (None, "has no field 'text' of the template"),
    '{"text" "x"}': (None, "is not valid JSON"),
    '["x",]': (None, "is not valid JSON"),
}


@pytest.mark.parametrize("between", [",", ", ", " ,\n "])
def test_each_element_of_a_mixed_array_is_judged_alone(tmp_path: Path, between: str) -> None:
    rng = random.Random(0)
    for trial in range(300):
        elements = rng.choices([*ELEMENTS], k=rng.randrange(1, 12))
        found, report = read(write(tmp_path / "a.json", f"[{between.join(elements)}]".encode()))
        assert found == [text for element in elements if (text := ELEMENTS[element][0]) is not None], elements
        bad = [(number, element) for number, element in enumerate(elements, 1) if ELEMENTS[element][0] is None]
        assert report.dropped.total() == len(bad), (trial, elements)
        assert report.dropped_bytes.total() == sum(len(element) for _, element in bad), elements
        shown = sorted(examples(report), key=lambda example: int(re.findall(r"item (\d+) ", example)[0]))
        for (number, element), example in zip(bad[:5], shown, strict=False):
            at = 1 + sum(len(before) + len(between) for before in elements[: number - 1])
            assert f"item {number} of the array, at byte {at}, {ELEMENTS[element][1]}" in example


def test_json_lines_under_the_name_json_may_begin_with_a_bad_line(tmp_path: Path) -> None:
    lines = ['{"text": "cut o', *map(json.dumps, GOOD)]
    found, report = read(write(tmp_path / "a.json", "\n".join(lines).encode()))
    assert found == TEXTS and report.dropped == {"bad_record": 1}


@pytest.mark.parametrize("nested", [False, True])
def test_objects_within_records_are_no_records(tmp_path: Path, nested: bool) -> None:
    records = [
        {"text": str(i), "a": [{"text": "no"}, {"text": "no"}]}
        if nested or i % 3
        else {"id": [{"b": 1}, {}], "text": str(i)}
        for i in range(200)
    ]
    for path in forms(tmp_path, [*map(json.dumps, records)]):
        assert texts(path) == [str(i) for i in range(200)]
    indented = write(tmp_path / "f.json", json.dumps(records, indent=1).encode())
    assert texts(indented) == [str(i) for i in range(200)]


@pytest.mark.parametrize(
    ("data", "expected", "dropped", "message"),
    [
        ('[{"text": "a"}, {"text": "b', ["a"], {"unreadable": 11}, "item 2 of the array, at byte 16, is cut off"),
        ('[{"text": "a"}, ', ["a"], {"unreadable": 0}, "the array has no end, so the file may be cut off at byte 16"),
        ('[{"text": "a"}] and so on', ["a"], {"unreadable": 9}, "what begins at byte 16 is not JSON, up to byte 25"),
        (
            '[{"text": "a"}, {"text": "b, {"text": "c"}, {"text": "d"}]',
            ["a", "c", "d"],
            {"bad_record": 13},
            "item 2 of the array, at byte 16, is damaged",
        ),
        (
            '[{"text": "a"}, {"text": {"b": "c"}, {"text": "c"}, {"text": "d"}]',
            ["a", "c", "d"],
            {"bad_record": 21},
            "item 2 of the array, at byte 16, is damaged: its brackets or quotes do not match; reading resumes at byte "
            "37",
        ),
        ('[{"text": ["b"}, {"text": "c"}]', ["c"], {"bad_record": 16}, "reading resumes at byte 17"),
        ('["a", "b, "c", "d"]', ["a", "d"], {"bad_record": 9}, "item 2 of the array, at byte 6,"),
    ],
)
def test_damage_to_an_array_costs_the_damaged_record(
    tmp_path: Path, data: str, expected: list[str], dropped: dict[str, int], message: str
) -> None:
    path = write(tmp_path / "a.json", data.encode())
    found, report = read(path)
    assert (found, report.dropped_bytes) == (expected, dropped)
    assert report.dropped == dict.fromkeys(dropped, 1)
    assert message in examples(report)[0]
    with pytest.raises(UserError, match=r"a\.json: "):
        read(path, on_bad="fail")


def test_json_lines_cut_anywhere_have_the_same_records(tmp_path: Path) -> None:
    bad = ['{"text": "\\ud83d"}', '{"text": "x\ty", "s": NaN}', "[1]", '"string"', "{", "", '{"t": 1}', '{"text": ""}']
    lines = "\r\n".join(bad + [json.dumps({"text": f"\u9ec3 {i}"}, ensure_ascii=False) for i in range(5)]).encode()
    path = write(tmp_path / "a.jsonl", lines[:60] + b"\xff" + lines[60:])
    for settings in ({}, {"on_bad": "replace"}):
        whole, expected = read(path, **settings)
        for size in range(1, len(lines) + 2):
            found, report = read(path, partition_bytes=size, **settings)
            assert found == whole
            assert (report.dropped, report.dropped_bytes) == (expected.dropped, expected.dropped_bytes)
            assert report.replaced == expected.replaced


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}])
def test_random_damage_to_an_array_costs_the_records_that_it_hits(tmp_path: Path, layout: dict[str, Any]) -> None:
    rng = random.Random(3)
    records = [
        {"id": i, "text": f'{i}: "quotes", [brackets], {{braces}}, \u9ec3', "tags": [{"t": 1}, {"u": [2]}]}
        for i in range(60)
    ]
    data = json.dumps(records, **layout).encode()
    expected = [str(record["text"]) for record in records]
    longest = max(len(json.dumps(record, **layout)) for record in records)
    for _ in range(400):
        at, size = rng.randrange(2, len(data)), rng.choice([1, 1, 1, 5, 30])
        other = bytes(rng.choices(b'"\\[]{},:x0\xff\n', k=rng.choice([0, 1, 1, size])))
        path = write(tmp_path / "a.json", data[:at] + other + data[at + size :])
        found, report = read(path)
        lost = [text for text in expected if text not in found]
        assert len(lost) <= 3, (at, size, other, lost)
        # What is found beside the records is a record whose text itself was changed.
        assert len([text for text in found if text not in expected]) <= 3, (at, size, other)
        assert sum(report.dropped_bytes.values()) <= 4 * longest, (at, size, other)


def test_an_element_longer_than_the_blocks_that_are_read(tmp_path: Path) -> None:
    long = ["x" * (3 << 20), '"\\ud83d'[0] * 1000, "y\n" * (1 << 20), "z"]
    array = json.dumps([{"text": text, "more": [{"a": 1}, {"b": 2}]} for text in long])
    assert texts(write(tmp_path / "a.json", array.encode())) == long
    assert texts(write(tmp_path / "a.json.gz", gzip.compress(array.encode(), 1))) == long
    unclosed = array.replace('"more": [', '"more": [{"c":', 1).encode()
    found, report = read(write(tmp_path / "b.json", unclosed))
    assert found == long[1:] and report.dropped == {"bad_record": 1}
    assert report.dropped_bytes["bad_record"] < len(long[0]) + 100
