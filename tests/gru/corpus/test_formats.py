import csv
import gzip
import hashlib
import io
import itertools
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.config import CorpusConfig
from gru.corpus.documents import documents
from gru.corpus.report import Report
from gru.errors import UserError
from tests.gru.corpus.reading import AWKWARD, PACKERS, read, spans, texts, write


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


def test_ranges_of_json_lines_have_every_record_once(tmp_path: Path) -> None:
    records = [{"text": f"{i} \u2028 黃😀\x00"} for i in range(40)]
    data = "\r\n".join(json.dumps(r, ensure_ascii=i % 2 == 0) for i, r in enumerate(records)).encode()
    path = write(tmp_path / "a.jsonl", data)
    for size in [*range(1, 80), 1000, 10**6]:
        assert texts(path, partition_bytes=size) == [record["text"] for record in records]


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


def test_problems_in_csv_are_counted_by_record(tmp_path: Path) -> None:
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
