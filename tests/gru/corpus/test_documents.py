import bz2
import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.config import CorpusConfig
from gru.corpus.documents import Report, documents
from gru.errors import UserError
from tests.gru.corpus.reading import read, spans, texts, write

AWKWARD = "one\r\ntwo\u2028still two\x0cand\n\n\n😀 emoji\n黃河入海流\r\n\u2029x\ry\n\x00NUL\x00\nno end of line"


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": partial(gzip.compress, compresslevel=1),
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": partial(lzma.compress, preset=0),
}


# Text


@pytest.mark.parametrize("size", range(1, len(AWKWARD.encode()) + 2))
def test_ranges_of_text_join_to_the_file_for_every_cut(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a.txt", AWKWARD.encode())
    found = texts(path, partition_bytes=size)
    assert "".join(found) == AWKWARD
    assert all(text.endswith("\n") for text in found[:-1])


def test_ranges_of_random_lines_join_to_the_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(30):
        text = "".join(rng.choices("a\n\r\u2028é黃😀\0", k=rng.randrange(1, 300)))
        path = write(tmp_path / f"{trial}.txt", text.encode())
        for _ in range(10):
            assert "".join(texts(path, partition_bytes=rng.randrange(1, 400))) == text


@pytest.mark.parametrize("separator", ["\n\n", "<|>", "\n---\n", "。", "aba", "<|endoftext|>", "\0"])
def test_a_separator_cuts_the_same_documents_out_of_every_partition_size(tmp_path: Path, separator: str) -> None:
    rng = random.Random(1)
    for trial in range(20):
        pieces = ["a", "b", "\n", "黃", "-", "|", separator, separator, separator[:1], separator[-1:], "😀"]
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 40)))
        path = write(tmp_path / f"{trial}.txt", text.encode())
        expected = text.split(separator)
        expected = expected[:-1] if not expected[-1] else expected
        for size in range(1, len(text.encode()) + 2):
            found, report = read(path, separator=separator, partition_bytes=size)
            assert found == [piece for piece in expected if piece]
            assert report.dropped["empty"] == expected.count("")


def test_a_separator_is_found_across_the_blocks_that_are_read(tmp_path: Path) -> None:
    separator, block = "<|endoftext|>", 1 << 20
    for offset in range(-len(separator) - 1, 2):
        pieces = ["x" * (block + offset), "y" * (3 * block), "z"]
        path = write(tmp_path / "a.txt", separator.join(pieces).encode())
        assert texts(path, separator=separator) == pieces
    packed = write(tmp_path / "b.txt.gz", gzip.compress(separator.join(pieces).encode(), 1))
    assert texts(packed, separator=separator, partition_bytes=1000) == pieces


def test_compressed_text_larger_than_a_partition_is_cut_at_lines(tmp_path: Path) -> None:
    text = "".join(f"{i} 黃河\n" for i in range(500))
    for suffix, pack in PACKERS.items():
        found = texts(write(tmp_path / f"a.txt{suffix}", pack(text.encode())), partition_bytes=1000)
        assert len(found) > 5 and "".join(found) == text
        assert all(document.endswith("\n") for document in found)


def test_the_digests_are_of_the_bytes_that_were_read(tmp_path: Path) -> None:
    data = AWKWARD.encode()
    path = write(tmp_path / "a.txt", data)
    for size in (1000, 20):
        found, report = read(path, partition_bytes=size)
        pieces = [text.encode() for text in found]
        assert [d for d in report.digests if d != hashlib.sha256(b"").hexdigest()] == [
            hashlib.sha256(piece).hexdigest() for piece in pieces
        ]
    for suffix, pack in PACKERS.items():
        packed = pack(data) + (b"trailing garbage" if suffix in (".bz2",) else b"")
        _, report = read(write(tmp_path / f"a.txt{suffix}", packed))
        assert report.digests == [hashlib.sha256(packed).hexdigest()]


# Records


def test_ranges_of_json_lines_have_every_record_once(tmp_path: Path) -> None:
    records = [{"text": f"{i} \u2028 黃😀\x00"} for i in range(40)]
    data = "\r\n".join(json.dumps(r, ensure_ascii=i % 2 == 0) for i, r in enumerate(records)).encode()
    path = write(tmp_path / "a.jsonl", data)
    for size in [*range(1, 80), 1000, 10**6]:
        assert texts(path, partition_bytes=size) == [record["text"] for record in records]


@pytest.mark.parametrize("suffix", ["", *PACKERS])
def test_json_arrays_are_read_record_by_record(tmp_path: Path, suffix: str) -> None:
    expected = [f"{i} 黃😀\n" for i in range(5000)]
    data = json.dumps([{"text": text, "n": {"deep": [1.5, None]}} for text in expected], indent=1).encode()
    pack = PACKERS.get(suffix, bytes)
    assert texts(write(tmp_path / f"a.json{suffix}", pack(data)), partition_bytes=1000) == expected
    assert texts(write(tmp_path / f"b.json{suffix}", pack(b"\xef\xbb\xbf \n" + data))) == expected
    assert read(write(tmp_path / f"c.json{suffix}", pack(b" [ ] ")))[0] == []
    for other in (b'{"text": "x"}', b"", b"text"):
        found, report = read(write(tmp_path / f"d.json{suffix}", pack(other)))
        assert not found and report.dropped == {"unreadable": 1}
        assert report.examples == [f"d.json{suffix}: is not a JSON array of records"]
    found, report = read(write(tmp_path / f"e.json{suffix}", pack(b'[{"text": "x"}, 3, {"a": 1}, {"text": "y"}]')))
    assert found == ["x", "y"] and report.dropped == {"bad_record": 1, "missing_field": 1}
    assert report.examples == [f"e.json{suffix}: item 2 of the array is not a JSON object"]
    found, report = read(write(tmp_path / f"f.json{suffix}", pack(data[:-1000])))
    assert expected[: len(found)] == found and len(found) > 4000 and report.dropped == {"unreadable": 1}


FIELDS = [
    "plain",
    "a, b",
    'he said "no"',
    "two\nlines",
    "two\r\nlines",
    "",
    '"',
    "\n",
    "黃河\u2028流",
    "😀",
    " x ",
    "\x00",
]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.tsv.gz", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_gives_the_same_records_for_every_partition_size(
    tmp_path: Path, name: str, delimiter: str, end: str
) -> None:
    rows = [list(pair) for pair in itertools.product(FIELDS, FIELDS[:9])]
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end)
    writer.writerows([["ti\ntle", "text"], *rows])
    data = ("\ufeff" + buffer.getvalue()).encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    template = "{ti\ntle}|{text}"
    for size in [*range(1, 60), 128, 1000, len(data) - 1, len(data)]:
        assert texts(path, template=template, partition_bytes=size) == ["|".join(row) for row in rows]
    last = write(tmp_path / "last.csv", b"text\none\ntwo")  # without an end of line
    assert texts(last) == ["one", "two"]
    assert read(write(tmp_path / "head.csv", b"text\n"))[0] == []


def test_what_is_wrong_in_csv_is_counted_by_record(tmp_path: Path) -> None:
    data = b'text,n\nok,1\nshort\n\n"long",2,3\nx"y"z,5\n"a"b,6\nfine,4\n"never, closed\nand so\non'
    path = write(tmp_path / "a.csv", data)
    for size in (1000, 20, 7):
        found, report = read(path, partition_bytes=size)
        assert found == ["ok", 'x"y"z', "fine"]
        assert report.dropped == {"bad_record": 4}
    assert report.examples == [
        "a.csv: the record at byte 12 has 1 fields, not 2",
        "a.csv: the record at byte 19 has 3 fields, not 2",
        "a.csv: the record at byte 38 is not valid CSV: ',' expected after '\"'",
        "a.csv: the record at byte 52 has a quote that is never closed",
    ]
    with pytest.raises(UserError, match=r"a.csv: the record at byte 12 has 1 fields, not 2"):
        read(path, on_bad="fail")


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    table = pa.table({"title": ["a", None, "c"], "text": [["1", "2"], ["3"], []], "other": [1, 2, 3]})
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path)
    found, report = read(path, template="{title}:{text}")
    assert (found, report.dropped) == (["a:1\n2", "c:"], {"missing_field": 1})
    for on_bad in ("drop", "fail"):
        found, report = read(path, template="{body}", on_bad=on_bad)
        assert (found, report.dropped) == ([], {"missing_field": 3})
    found, report = read(write(tmp_path / "b.parquet", b"not parquet, though long enough to look at"))
    assert not found and report.dropped == {"unreadable": 1}
    with pytest.raises(UserError, match=r"b.parquet: cannot be read"):
        read(str(tmp_path / "b.parquet"), on_bad="fail")


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    expected = [f"{i} 黃河" for i in range(500)]
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": range(500), "text": expected}), path, row_group_size=37)
    size = Path(path).stat().st_size
    for pieces in [*range(1, 60), size // 7]:
        assert texts(path, partition_bytes=max(1, size // pieces)) == expected
    report = Report()
    corpus = CorpusConfig(sources=[path], partition_bytes=1000)
    counts = [len(list(documents(span, corpus, report))) for span in spans(corpus)]
    assert max(counts) < 200 and sum(counts) == 500
    whole = Path(path).read_bytes()
    pieces = [whole[span.start : span.end] for span in spans(corpus)]
    assert report.digests == [hashlib.sha256(piece).hexdigest() for piece in pieces]


def test_template_fills_fields_and_counts_what_is_dropped(tmp_path: Path) -> None:
    records = [
        {"title": "t", "lines": ["a", "b"], "n": 3},
        {"title": "t", "n": 1},
        {"title": None, "lines": [], "n": 1},
        {"title": "{n}", "lines": [], "n": 0.5},
    ]
    path = write(tmp_path / "a.ndjson", "\n\n".join(map(json.dumps, records)).encode())
    found, report = read(path, template="{{{title}}}\n{n}: {lines}")
    assert found == ["{t}\n3: a\nb", "{{n}}\n0.5: "]
    assert report.dropped == {"missing_field": 2}
    for template in ["no field", "{", "{a:>3}", "{a!r}"]:
        with pytest.raises(UserError, match=r"corpus\.template"):
            read(path, template=template)


# Compression


@pytest.mark.parametrize("suffix", ["", *PACKERS])
def test_compressed_files_of_several_frames_are_read_whole(tmp_path: Path, suffix: str) -> None:
    pack = PACKERS.get(suffix, bytes)
    lines = [json.dumps({"text": f"{i} 黃"}).encode() + b"\n" for i in range(5000)]
    data = pack(b"".join(lines[:2500])) + pack(b"") + pack(b"".join(lines[2500:]))
    path = write(tmp_path / f"a.jsonl{suffix}", data)
    assert texts(path, partition_bytes=1000) == [f"{i} 黃" for i in range(5000)]
    assert texts(write(tmp_path / f"b.txt{suffix}", pack(AWKWARD.encode()))) == [AWKWARD]
    rows = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "黃"]}), rows)
    assert texts(write(tmp_path / f"c.parquet{suffix}", pack(rows.getvalue()))) == ["one", "黃"]
    found, report = read(write(tmp_path / f"d.txt{suffix}", pack(b"")))
    assert not found and report.dropped == {"empty": 1}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_of_a_truncated_file_stays_what_could_be_read(tmp_path: Path, suffix: str, kind: str) -> None:
    rng = random.Random(0)
    expected = [f"{i} {rng.getrandbits(800):x}" for i in range(9000)]
    if kind == "jsonl":
        data = "".join(json.dumps({"text": text}) + "\n" for text in expected).encode()
    elif kind == "csv":
        data = "".join(f"{text}\n" for text in ["text", *expected]).encode()
    else:
        data = "\n\n".join(expected).encode()
    packed = PACKERS[suffix](data)
    path = write(tmp_path / f"cut.{kind}{suffix}", packed[: len(packed) * 7 // 10])
    separator = "\n\n" if kind == "txt" else None
    found, report = read(path, separator=separator)
    assert found == expected[: len(found)]
    lost = 0.7 * len(expected) - len(found)  # bzip2 has blocks of 900 kB, Zstandard of 128 kB
    assert lost < {".bz2": 4500, ".zst": 800}.get(suffix, 50)
    assert report.dropped == {"unreadable": 1}
    [example] = report.examples
    assert example.startswith(f"cut.{kind}{suffix}: cannot be read to its end: ") and "\n" not in example
    assert report.digests == [hashlib.sha256(Path(path).read_bytes()).hexdigest()]
    with pytest.raises(UserError, match=f"cut.{kind}{suffix}: cannot be read to its end: "):
        read(path, separator=separator, on_bad="fail")
    found, report = read(write(tmp_path / f"not.{kind}{suffix}", b"plain text all along, and no magic number"))
    assert not found and report.dropped == {"unreadable": 1}


# Cleaning


def test_text_that_is_not_utf8_is_dropped_replaced_or_refused_with_its_place(tmp_path: Path) -> None:
    data = "黃\n".encode() * 50
    data = data[:120] + b"\xff" + data[120:]
    good = "黃\n" * 50
    path, packed = write(tmp_path / "a.txt", data), write(tmp_path / "b.txt.gz", gzip.compress(data))

    whole, report = read(path)
    assert not whole and report.dropped == {"invalid_utf8": 1}
    assert report.examples == ["a.txt: not valid UTF-8 at byte 120"]
    for size in (7, 100):  # cut, only the line goes
        cut, report = read(path, partition_bytes=size)
        assert "".join(cut) == good[:60] + good[62:] and report.dropped == {"invalid_utf8": 1}
        assert report.examples == ["a.txt: not valid UTF-8 at byte 120"]
    unpacked, report = read(packed)
    assert unpacked == [good[:60] + good[62:]] and report.dropped == {"invalid_utf8": 1}

    for size in (7, 1000):
        found, report = read(path, on_bad="replace", partition_bytes=size)
        assert "".join(found) == good[:60] + "\ufffd" + good[60:]
        assert (report.replaced, report.dropped) == (1, {})
        assert report.examples == ["a.txt: not valid UTF-8 at byte 120"]
        with pytest.raises(UserError, match=r"a.txt: not valid UTF-8 at byte 120$"):
            read(path, on_bad="fail", partition_bytes=size)
    with pytest.raises(UserError, match=r"b.txt.gz: not valid UTF-8 at byte 120 of the unpacked text"):
        read(packed, on_bad="fail")

    pieces = write(tmp_path / "c.txt", b"one--tw\xffo--three")
    assert read(pieces, separator="--")[0] == ["one", "three"]
    assert read(pieces, separator="--", on_bad="replace")[0] == ["one", "tw\ufffdo", "three"]
    with pytest.raises(UserError, match=r"c.txt: not valid UTF-8 at byte 7$"):
        read(pieces, separator="--", on_bad="fail", partition_bytes=3)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "lists.parquet"])
def test_records_that_are_not_utf8_are_dropped_replaced_or_refused_with_their_place(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    place = "byte 25"
    if name == "a.jsonl":
        write(tmp_path / name, b'{"text": "ok"}\n{"text": "\xffx"}\n{"text": "fine"}\n')
    elif name == "a.csv":
        write(tmp_path / name, b'"text"\n"ok"\n"and so on"\n"\xffx"\n"fine"\n')
        place = "byte 25"
    elif name == "a.json":
        write(tmp_path / name, b'[{"text": "ok"}, {"text": "\xffx"}, {"text": "fine"}]')
        place = "byte 27"
    else:
        values = pa.Array.from_buffers(
            pa.string(),
            3,
            [None, pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 4, 8))), pa.py_buffer(b"ok\xffxfine")],
        )
        if name == "lists.parquet":
            values = pa.ListArray.from_arrays([0, 1, 2, 3], values)
        pq.write_table(pa.table({"text": values}), path)
        place = "row 1 is not valid UTF-8 at byte 0 of a field"
    expected = ["ok", "fine"] if name != "a.csv" else ["ok", "and so on", "fine"]
    found, report = read(path)
    assert (found, report.dropped) == (expected, {"invalid_utf8": 1})
    assert place in report.examples[0] and report.examples[0].startswith(f"{name}: ")
    found, report = read(path, on_bad="replace")
    assert (found, report.replaced, report.dropped) == ([*expected[:-1], "\ufffdx", "fine"], 1, {})
    with pytest.raises(UserError, match=f"{name}: .*{place}"):
        read(path, on_bad="fail")


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "the line at byte 14 is not valid JSON"),
        ("[1]", "the line at byte 14 is not a JSON object"),
        ('{"text": {}}', "field 'text' is dict, not a string"),
        ('{"text": [1]}', "field 'text' is list, not a string"),
        (r'{"text": "\ud83d"}', "surrogate in string"),
        ('{"text": "cut o', "not valid JSON"),
    ],
)
def test_a_bad_record_is_left_out_or_refused_with_its_place(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n'.encode())
    for on_bad in ("drop", "replace"):
        found, report = read(path, on_bad=on_bad)
        assert (found, report.dropped) == (["a", "b"], {"bad_record": 1})
        assert report.replaced == 0
    with pytest.raises(UserError, match=f"a.jsonl: .*{message}"):
        read(path, on_bad="fail")


def test_normalization_comes_before_the_length_is_looked_at(tmp_path: Path) -> None:
    composed, split, ligature = "\u00e9", "e\u0301", "\ufb01"
    path = write(tmp_path / "a.txt", f"{composed}|{split}|{ligature}|plain".encode())
    assert texts(path, separator="|") == [composed, split, ligature, "plain"]
    assert texts(path, separator="|", normalization="NFC") == [composed, composed, ligature, "plain"]
    assert texts(path, separator="|", normalization="NFKC") == [composed, composed, "fi", "plain"]
    found, report = read(path, separator="|", normalization="NFKC", min_characters=2, max_characters=4)
    assert found == ["fi"] and report.dropped == {"too_short": 2, "too_long": 1}


def test_lengths_are_of_characters_and_empty_documents_are_counted_apart(tmp_path: Path) -> None:
    given = ["", "黃", "黃河", "黃河入", "黃河入海", "😀😀", ""]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in given).encode())
    found, report = read(path, min_characters=2, max_characters=3)
    assert found == ["黃河", "黃河入", "😀😀"]
    assert report.dropped == {"empty": 2, "too_short": 1, "too_long": 1}
    assert len(found) + report.dropped.total() == len(given)


# Files that change or go


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    for name, pack in [("a.txt", bytes), ("b.txt.gz", gzip.compress)]:
        path = Path(write(tmp_path / name, pack(b"one\ntwo\nthree\n" * 100)))
        corpus = CorpusConfig(sources=[str(path)], partition_bytes=300)
        found = spans(corpus)
        assert list(documents(found[0], corpus, Report()))
        reading = documents(found[-1], corpus, Report())
        next(reading)
        with path.open("ab") as file:
            file.write(b"more\n")
        with pytest.raises(UserError, match=rf"{name}: changed while it was read; run the same again"):
            list(reading)
        path.unlink()
        with pytest.raises(UserError, match=f"{name}: cannot be read: No such file"):
            list(documents(found[0], corpus, Report()))
