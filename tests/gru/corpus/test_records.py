import gzip
import hashlib
import io
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.config import CorpusConfig
from gru.corpus.documents import documents
from gru.corpus.report import Report
from gru.errors import UserError
from tests.gru.corpus.reading import AWKWARD, PACKERS, examples, read, spans, texts, write


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


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n", "\n---\n", "a\n"])
def test_line_ends_in_a_separator_are_lf_or_crlf_in_the_file(tmp_path: Path, separator: str) -> None:
    rng = random.Random(2)
    lf = separator.replace("\r\n", "\n")
    for trial in range(20):
        pieces = ["a", "b\r", "\n", "\r\n", "\r", "黃", "-", lf, lf.replace("\n", "\r\n")]
        data = "".join(rng.choices(pieces, k=rng.randrange(1, 40))).encode()
        path = write(tmp_path / f"{trial}.txt", data)
        expected = re.split(re.escape(lf).replace("\\\n", "\r?\n"), data.decode())
        expected = expected[:-1] if not expected[-1] else expected
        for size in range(1, len(data) + 2):
            found, report = read(path, separator=separator, partition_bytes=size)
            assert found == [piece for piece in expected if piece]
            assert report.dropped["empty"] == expected.count("")
        packed = write(tmp_path / f"{trial}.txt.gz", gzip.compress(data))
        assert read(packed, separator=separator)[0] == found


def test_a_crlf_separator_is_found_across_the_blocks_that_are_read(tmp_path: Path) -> None:
    for offset in range(-5, 2):
        pieces = ["x" * ((1 << 20) + offset), "y" * (1 << 16), "z\r"]
        path = write(tmp_path / "a.txt", "\r\n\r\n".join(pieces).encode())
        for size in (10**7, 1 << 16, (1 << 20) + 1):
            assert texts(path, separator="\n\n", partition_bytes=size) == pieces


def test_a_run_of_line_ends_is_cut_in_no_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one" + b"\n" * 300_001 + b"two")
    for size in (10**6, 50_000):
        found, report = read(path, separator="\n\n", partition_bytes=size)
        assert (found, report.dropped) == (["one", "\ntwo"], {"empty": 149_999})


@pytest.mark.parametrize("unit", ["anarchism originated as a term ", "黃河入海流", "😀", "x"])
def test_a_line_of_a_megabyte_is_cut_into_pieces_that_join_to_it(tmp_path: Path, unit: str) -> None:
    text = "a short line\n" + unit * (1_000_000 // len(unit.encode()))
    data = text.encode()
    for name, packed in (("a.txt", data), ("a.txt.gz", gzip.compress(data, 1))):
        path = write(tmp_path / name, packed)
        for size in (10**7, 300_000, 99_999, 5000 if name == "a.txt" else 50_000):
            found = texts(path, partition_bytes=size)
            assert "".join(found) == text
            assert all(len(piece.encode()) <= size + 2 * 4096 for piece in found)
            assert unit[-1] != " " or all(piece.endswith((" ", "\n")) for piece in found)
        train, heldout = [], []
        if name == "a.txt":
            corpus = CorpusConfig(sources=[path], heldout="tail", heldout_share=0.1)
            for span in spans(corpus):
                (heldout if span.heldout else train).extend(documents(span, corpus, Report()))
            assert "".join(train + heldout) == text and len(heldout) == 1


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


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    table = pa.table({"title": ["a", None, "c"], "text": [["1", "2"], ["3"], []], "other": [1, 2, 3]})
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path)
    found, report = read(path, template="{title}:{text}")
    assert (found, report.dropped) == (["a:1\n2", ":3", "c:"], {})
    found, report = read(path, template="{body}")
    assert (found, report.dropped) == ([], {"missing_field": 3})
    message = "has no column 'body' of the template; its columns: 'title', 'text', 'other'"
    assert examples(report) == [f"a.parquet: {message}"]
    with pytest.raises(UserError, match=message):
        read(path, template="{body}", on_bad="fail")
    found, report = read(write(tmp_path / "b.parquet", b"not parquet, though long enough to look at"))
    assert (
        not found
        and report.dropped == {"unreadable": 1}
        and report.dropped_bytes == {"unreadable": len("not parquet, though long enough to look at")}
    )
    with pytest.raises(UserError, match=r"b.parquet: cannot be read"):
        read(str(tmp_path / "b.parquet"), on_bad="fail")
    assert read(str(tmp_path / "b.parquet"), partition_bytes=9)[1].dropped == {"unreadable": 1}


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


def test_parquet_of_no_rows_is_nothing(tmp_path: Path) -> None:
    types = [pa.bool_(), pa.string(), pa.list_(pa.string()), pa.struct([("a", pa.int8())]), pa.null()]
    for number, type_ in enumerate(types):
        schema = pa.schema([("flag", type_), ("text", pa.string())])
        pq.write_table(schema.empty_table(), tmp_path / f"{number}.parquet")
    pq.write_table(pa.table({}), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"flag": [True], "text": ["one"]}), tmp_path / "some.parquet")
    assert texts(str(tmp_path)) == ["one"]
    assert texts(str(tmp_path), partition_bytes=10) == ["one"]


@pytest.mark.parametrize(
    "type_",
    [
        *(pa.binary(), pa.large_binary(), pa.binary_view(), pa.string_view(), pa.large_string()),
        *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.binary())),
    ],
    ids=str,
)
def test_text_in_any_kind_of_column(tmp_path: Path, type_: pa.DataType) -> None:
    values = ["one", None, "zwölf", "", "黃河", "one"]
    column = pa.array(values).cast(pa.binary()).cast(type_ if not pa.types.is_dictionary(type_) else pa.binary())
    if pa.types.is_dictionary(type_):
        column = column.cast(type_.value_type).dictionary_encode()
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": column, "n": range(6)}), path)
    found, report = read(path)
    assert found == ["one", "zwölf", "黃河", "one"] and report.dropped.total() == 2


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rng = random.Random(0)
    expected = [f"{i} {rng.getrandbits(400):x}" for i in range(500)]
    pq.write_table(pa.table({"text": expected}), path, row_group_size=100, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + 200] = bytes(200)
    path.write_bytes(data)
    for size in (10**6, 10_000):
        found, report = read(str(path), partition_bytes=size)
        assert found == expected[:200] + expected[300:]
        assert (report.dropped, report.dropped_bytes) == (
            {"unreadable": 100},
            {"unreadable": column.total_compressed_size},
        )
        [example] = examples(report)
        assert example.startswith("a.parquet: row group 2 cannot be read from row 200 on: ") and "100 rows" in example
    with pytest.raises(UserError, match=r"a.parquet: row group 2 cannot be read from row 200 on: "):
        read(str(path), on_bad="fail")


def test_parquet_with_any_damage_gives_rows_or_counts(tmp_path: Path) -> None:
    rng = random.Random(0)
    buffer = io.BytesIO()
    table = pa.table({"n": range(300), "text": [f"{i} 黃河" for i in range(300)]})
    pq.write_table(table, buffer, row_group_size=100, compression="zstd")
    for trial in range(100):
        data = bytearray(buffer.getvalue())
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        found, report = read(write(tmp_path / f"{trial}.parquet", bytes(data)))
        assert len(found) == 300 or report.dropped


def test_values_that_python_cannot_hold_cost_their_rows(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    dates = pa.array([0, 2**60, 86_400], pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["a", "b", "c"], "date": dates}), path)
    assert texts(path) == ["a", "b", "c"]
    found, report = read(path, template="{text} {date}")
    assert "bad_record" in report.dropped and len(found) + report.dropped.total() == 3
