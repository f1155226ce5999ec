import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.config import CorpusConfig
from gru.corpus.documents import documents
from gru.corpus.report import Report
from gru.errors import UserError
from tests.gru.corpus.reading import AWKWARD, PACKERS, read, spans, texts, write


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
