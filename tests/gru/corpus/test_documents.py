import gzip
import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.config import CorpusConfig
from gru.corpus.documents import documents
from gru.corpus.report import Report
from gru.errors import UserError
from tests.gru.corpus.reading import AWKWARD, PACKERS, examples, read, spans, texts, write


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


def test_text_that_is_not_utf8_is_dropped_replaced_or_refused_with_its_place(tmp_path: Path) -> None:
    data = "黃\n".encode() * 50
    data = data[:120] + b"\xff" + data[120:]
    good = "黃\n" * 50
    path, packed = write(tmp_path / "a.txt", data), write(tmp_path / "b.txt.gz", gzip.compress(data))

    whole, report = read(path)
    assert not whole and report.dropped == {"invalid_utf8": 1}
    assert examples(report) == ["a.txt: not valid UTF-8 at byte 120"]
    for size in (7, 100):  # cut, only the line goes
        cut, report = read(path, partition_bytes=size)
        assert "".join(cut) == good[:60] + good[62:] and report.dropped == {"invalid_utf8": 1}
        assert examples(report) == ["a.txt: not valid UTF-8 at byte 120"]
    unpacked, report = read(packed)
    assert unpacked == [good[:60] + good[62:]] and report.dropped == {"invalid_utf8": 1}

    for size in (7, 1000):
        found, report = read(path, on_bad="replace", partition_bytes=size)
        assert "".join(found) == good[:60] + "\ufffd" + good[60:]
        assert (report.replaced, report.dropped) == (1, {})
        assert examples(report) == ["a.txt: not valid UTF-8 at byte 120"]
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
    assert place in examples(report)[0] and examples(report)[0].startswith(f"{name}: ")
    found, report = read(path, on_bad="replace")
    assert (found, report.replaced, report.dropped) == ([*expected[:-1], "\ufffdx", "fine"], 1, {})
    with pytest.raises(UserError, match=f"{name}: .*{place}"):
        read(path, on_bad="fail")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "the line at byte 14 is not valid JSON"),
        ("[1]", "the line at byte 14 is not a JSON object"),
        ('{"text": {}}', "has a field 'text' that is an object, not text"),
        ('{"text": [{}]}', "has a field 'text' that is a list with an item that is an object, not text"),
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
        with pytest.raises(UserError, match=rf"{name}: changed while it was read; run the same command again"):
            list(reading)
        path.unlink()
        with pytest.raises(UserError, match=f"{name}: cannot be read: No such file"):
            list(documents(found[0], corpus, Report()))


PAGE = """<!DOCTYPE html><html><head><title>T</title>{head}</head><body>
<nav><a href="/">Home</a> <a href="/b">Blog</a></nav>
<article><h1>The river</h1><p>{text} The river runs to the sea, and nobody has asked it why it does so.</p>
<p>A second paragraph, long enough to be taken for the text of the page and not for a menu.</p></article>
<footer>Imprint</footer></body></html>"""


@pytest.mark.parametrize(
    ("encoding", "head"),
    [
        ("utf-8", ""),
        ("utf-8-sig", '<meta charset="latin-1">'),
        ("utf-16", ""),
        ("gb18030", '<meta http-equiv="Content-Type" content="text/html; charset=gb2312">'),
        ("windows-1251", "<META CHARSET=windows-1251>"),
    ],
)
def test_the_main_text_of_a_web_page_is_a_document(tmp_path: Path, encoding: str, head: str) -> None:
    text = "Вода" if encoding == "windows-1251" else "黃河入海流"
    page = PAGE.format(head=head, text=text).encode(encoding)
    for name, data in (("a.html", page), ("b.htm.gz", gzip.compress(page))):
        [found] = texts(write(tmp_path / name, data), partition_bytes=50)
        assert text in found and "second paragraph" in found
        assert "Home" not in found and "<p>" not in found
    named = PAGE.format(head="", text=text).encode(encoding)
    assert text in texts(write(tmp_path / "c.htm", named), encoding=encoding)[0]


def test_a_web_page_without_text_is_empty(tmp_path: Path) -> None:
    for number, page in enumerate((b"", b"<html></html>", b"\x00\xff\xfe", b"<script>1</script>", b"<" * 5000)):
        found, report = read(write(tmp_path / f"{number}.html", page))
        assert not found and report.dropped.total() == 1 and set(report.dropped) <= {"empty", "unreadable"}


@pytest.mark.parametrize(
    ("encoding", "head", "bad"),
    [
        ("utf-8", "", b"\xff"),
        ("utf-8", "<meta charset=utf-8>", b"\xe9\xbb"),
        ("utf-16", "", b"\x00\xd8"),
        ("gb18030", "<meta charset=gbk>", b"\xff"),
        ("windows-1252", "<meta charset=latin-1>", b"\x81"),
    ],
)
def test_invalid_bytes_of_a_web_page_are_counted(tmp_path: Path, encoding: str, head: str, bad: bytes) -> None:
    text = "na\xefve" if encoding == "windows-1252" else "黃河入海流"
    before, after = (
        PAGE.format(head=head, text=f"{text}|").encode(encoding).split(b"|" if encoding != "utf-16" else b"|\0")
    )
    page = before + bad + after
    path = write(tmp_path / "a.html", page)
    found, report = read(path)
    assert (found, report.dropped, report.dropped_bytes) == ([], {"invalid_utf8": 1}, {"invalid_utf8": len(page)})
    name = {"windows-1252": "CP1252", "utf-16": "UTF-16-LE"}.get(encoding, encoding.upper())
    assert examples(report) == [f"a.html: not valid {name} at byte {len(before)}"]
    [replaced], report = read(path, on_bad="replace")
    assert f"{text}\ufffd" in replaced and (report.dropped, report.replaced) == ({}, 1)
    with pytest.raises(UserError, match=rf"a\.html: not valid {name} at byte {len(before)}$"):
        read(path, on_bad="fail")


def test_a_web_page_in_another_encoding_than_it_declares_is_read(tmp_path: Path) -> None:
    page = PAGE.format(head="<meta charset=gb2312>", text="naïve — so").encode()
    assert "naïve — so" in texts(write(tmp_path / "a.html", page))[0]
    undeclared = PAGE.format(head="", text="Весна приходит, и лёд на реке трещит. " * 9).encode("windows-1251")
    assert "Весна" in texts(write(tmp_path / "b.html", undeclared))[0]


def test_columns_of_the_path_are_fields_of_each_record(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "year": [1, 2]}), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", b'{"text": "c"}\n{"text": "d", "lang": "of the record"}\n')
    template = "{lang} {year} {text}"
    corpus = CorpusConfig(sources=[str(tmp_path)], template=template)
    found = [
        text
        for span in spans(corpus)
        for text in documents(
            replace(span, file=replace(span.file, columns=(("lang", "zh"), ("year", "2020")))), corpus, Report()
        )
    ]
    assert found == ["zh 1 a", "zh 2 b", "zh 2020 c", "of the record 2020 d"]
    only = CorpusConfig(sources=[str(tmp_path / "a.parquet")], template="{lang}")
    [span] = spans(only)
    span = replace(span, file=replace(span.file, columns=(("lang", "zh"),)))
    assert list(documents(span, only, Report())) == ["zh", "zh"]


def test_any_bytes_under_any_name_are_text_or_counted(tmp_path: Path) -> None:
    rng = random.Random(0)
    names = ["a.txt", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.zip", "a.tar", "a.txt.gz", "a.tar.xz", "a.csv.zst"]
    for trial in range(20):
        data = rng.choice([b"", b"PAR1", b"\x1f\x8b\x08", b"PK\x03\x04", b"\xff\xfe", b"[{"]) + rng.randbytes(300)
        for name in names:
            for size in (10**6, 60):
                path = write(tmp_path / str(trial) / name, data)
                corpus, report = CorpusConfig(sources=[path], partition_bytes=size), Report()
                found = spans(corpus)
                for span in found:
                    assert all(isinstance(text, str) for text in documents(span, corpus, report))
                assert len(report.digests) == len(found)
