"""Inputs that people really have, each of which once lost documents, or stopped the run, or was read as what it is not.

The rule over all: bad input costs no more than itself, and what is not a document is counted, with an example that
names the file and the place.
"""

import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.errors import UserError
from tests.gru.corpus.reading import examples, read, texts, write

SIZES = [1 << 25, 4096, 999]  # partition_bytes: the whole file, and pieces of it
RECORDS = [{"text": f"good record {i}"} for i in range(99)]
GOOD = [record["text"] for record in RECORDS]
MANY = [f"document number {i}" for i in range(20_000)]
MANY_LINES = "".join(json.dumps({"text": text}) + "\n" for text in MANY).encode()


# CSV


@pytest.mark.parametrize("size", [1 << 25, 40_000, 9_999])
@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ",")])
def test_a_quote_inside_a_field_is_a_character(tmp_path: Path, name: str, delimiter: str, size: int) -> None:
    expected = ['5" nails 1000' if i == 1000 else f"row number {i}" for i in range(1, 10_001)]
    rows = ["id", *map(str, range(1, 10_001))], ["text", *expected]
    path = write(tmp_path / name, "".join(f"{i}{delimiter}{text}\n" for i, text in zip(*rows, strict=True)).encode())
    assert texts(path, partition_bytes=size) == expected


@pytest.mark.parametrize("size", SIZES)
def test_a_quotation_that_spans_two_rows_of_tsv_is_text(tmp_path: Path, size: int) -> None:
    expected = [{8: f'"I came {i}', 9: f'and I saw {i}."'}.get(i % 10, f"plain {i}") for i in range(1000)]
    rows = "".join(f"{i}\t{text}\n" for i, text in enumerate(expected))
    path = write(tmp_path / "speech.tsv", f"id\ttext\n{rows}".encode())
    assert texts(path, partition_bytes=size) == expected


@pytest.mark.parametrize("size", SIZES)
def test_a_quote_that_is_never_closed_costs_its_record(tmp_path: Path, size: int) -> None:
    rows = [f"{i},row number {i}\n" for i in range(1000)]
    rows[500] = '500,"never closed\n'
    path = write(tmp_path / "a.csv", f"id,text\n{''.join(rows)}".encode())
    found, report = read(path, partition_bytes=size)
    assert found == [f"row number {i}" for i in range(1000) if i != 500]
    assert report.dropped == {"bad_record": 1}
    place = len("id,text\n" + "".join(rows[:500]))
    assert examples(report)[0].startswith("a.csv: ") and str(place) in examples(report)[0]
    with pytest.raises(UserError, match=f"a.csv: .*{place}"):
        read(path, partition_bytes=size, on_bad="fail")


def test_a_header_in_latin_1_is_read_by_its_encoding_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "t\u00eate,text\n1,bonjour\n2,\u00e9t\u00e9\n".encode("latin-1"))
    assert texts(path, encoding="latin-1", template="{t\u00eate}: {text}") == ["1: bonjour", "2: \u00e9t\u00e9"]
    with pytest.raises(UserError, match=r"a\.csv: .*encoding"):
        read(path)


# JSON


@pytest.mark.parametrize("value", [r'"x \udc00"', r'"50 \ud83d"'])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_half_a_surrogate_pair_costs_its_record_or_is_replaced(tmp_path: Path, name: str, value: str) -> None:
    records = ['{"text":"a"}', '{"text":' + value + "}", '{"text":"b"}']
    data = f"[{','.join(records)}]" if name == "a.json" else "\n".join(records)
    path = write(tmp_path / name, data.encode())
    found, report = read(path)
    assert found == ["a", "b"] and report.dropped.total() == 1
    assert examples(report)[0].startswith(f"{name}: ")
    found, report = read(path, on_bad="replace")
    assert found in (["a", "b"], ["a", json.loads(value)[:-1] + "\ufffd", "b"])
    assert len(found) + report.dropped.total() == 3 and len(examples(report)) == 1
    with pytest.raises(UserError, match=name):
        read(path, on_bad="fail")


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "1e400", str(2**63), str(-(2**70)), '"a\tb"', "01", "'x'", "[1,]"]
)
def test_a_value_that_is_not_json_costs_at_most_its_record(tmp_path: Path, value: str) -> None:
    """As in JSON Lines, so in an array."""
    first = '{"text":"first","s":' + value + "}"
    rest = [json.dumps(record) for record in RECORDS]
    found, report = read(write(tmp_path / "a.json", f"[{', '.join([first, *rest])}]".encode()))
    assert found in (GOOD, ["first", *GOOD])
    assert len(found) + report.dropped.total() == 100 and len(examples(report)) == report.dropped.total()
    by_line, _ = read(write(tmp_path / "a.jsonl", "\n".join([first, *rest]).encode()))
    assert found == by_line


def test_thirty_thousand_brackets_cost_one_record(tmp_path: Path) -> None:
    brackets = "[" * 30_000 + "]" * 30_000
    found, report = read(write(tmp_path / "nested.json", brackets.encode()))
    assert (found, report.dropped.total(), len(examples(report))) == ([], 1, 1)
    found, report = read(write(tmp_path / "b.json", f'[{{"text": "a"}}, {brackets}, {{"text": "b"}}]'.encode()))
    assert found == ["a", "b"] and report.dropped.total() == 1
    found, report = read(write(tmp_path / "c.jsonl", f'{{"text": "a"}}\n{brackets}\n{{"text": "b"}}'.encode()))
    assert found == ["a", "b"] and report.dropped.total() == 1


@pytest.mark.parametrize("size", SIZES)
def test_json_lines_under_the_name_json_are_read_as_such(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "lines.json", "".join(json.dumps(record) + "\n" for record in RECORDS).encode())
    assert texts(path, partition_bytes=size) == GOOD


def test_strings_in_an_array_are_documents(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "strings.json", b'["one", "two"]')) == ["one", "two"]


# Fields


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("template", ["{text}", "{Body}", "{meta.title}"])
def test_a_record_without_the_field_is_told_with_its_place_and_fields(tmp_path: Path, name: str, template: str) -> None:
    path = table(tmp_path / name, [{"body": "one", "title": "two"}])
    found, report = read(path, template=template)
    assert (found, report.dropped) == ([], {"missing_field": 1})
    [example] = examples(report)
    assert example.startswith(f"{name}: ")
    assert template[1:-1] in example and "body" in example and "title" in example
    assert name == "a.parquet" or any(character.isdigit() for character in example)  # the byte or the item
    with pytest.raises(UserError, match=f"{name}: .*{template[1:-1]}"):
        read(path, template=template, on_bad="fail")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_null_is_an_empty_text_and_a_record_of_empty_fields_is_empty(tmp_path: Path, name: str) -> None:
    records = [{"author": None, "text": "good"}, {"author": "Li Bai", "text": None}, {"author": None, "text": ""}]
    found, report = read(table(tmp_path / name, records), template="{author}: {text}")
    assert found == [": good", "Li Bai: "] and report.dropped == {"empty": 1}


def test_a_template_may_have_spaces_and_nested_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"meta": {"title": "t"}, "text": "x"}')
    assert texts(path, template="{ text }") == ["x"]
    assert texts(path, template="{meta.title}/{text}") == ["t/x"]


def table(path: Path, records: list[dict[str, str | None]]) -> str:
    """Write records in the format of the path's extension."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return str(path)
    lines = [json.dumps(record) for record in records]
    if path.suffix == ".csv":
        lines = [",".join(records[0]), *(",".join(value or "" for value in record.values()) for record in records)]
    return write(path, (f"[{','.join(lines)}]" if path.suffix == ".json" else "\n".join(lines)).encode())


# Parquet


def test_a_part_without_rows_changes_nothing(tmp_path: Path) -> None:
    schema = pa.schema([("flag", pa.bool_()), ("text", pa.string())])
    (tmp_path / "parts").mkdir()
    pq.write_table(schema.empty_table(), tmp_path / "parts" / "0.parquet")
    pq.write_table(pa.table({"flag": [True, False], "text": ["one", "two"]}, schema), tmp_path / "parts" / "1.parquet")
    for size in SIZES:
        assert texts(str(tmp_path / "parts"), partition_bytes=size) == ["one", "two"]
    assert texts(str(tmp_path / "parts" / "0.parquet")) == []


def test_text_in_a_binary_column_is_text(tmp_path: Path) -> None:
    values = pa.array([b"one", "zw\u00f6lf".encode(), b"\xff"], pa.binary())
    pq.write_table(pa.table({"text": values}), tmp_path / "binary.parquet")
    found, report = read(str(tmp_path / "binary.parquet"))
    assert found == ["one", "zw\u00f6lf"] and report.dropped == {"invalid_utf8": 1}


def test_a_damaged_row_group_is_counted_by_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": MANY[:3000]}), path, row_group_size=1000, compression="zstd")
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    data[start + 40 : start + group.total_compressed_size - 40] = b"\xff" * (group.total_compressed_size - 80)
    path.write_bytes(data)
    found, report = read(str(path))
    assert found == MANY[:1000] + MANY[2000:3000]
    assert report.dropped.total() == 1000 and report.dropped_bytes.total() > 0
    assert "a.parquet: " in examples(report)[0]


# Compressed files and containers


def zstd_with_window(data: bytes, log: int) -> bytes:
    """Return a Zstandard frame of uncompressed blocks, whose header asks for a window of 2**log bytes (RFC 8878)."""
    blocks = [data[start : start + 100_000] for start in range(0, len(data), 100_000)]
    headers = [
        (len(block) << 3 | (index == len(blocks) - 1)).to_bytes(3, "little") for index, block in enumerate(blocks)
    ]
    body = b"".join(header + block for header, block in zip(headers, blocks, strict=True))
    return b"\x28\xb5\x2f\xfd" + bytes([0, (log - 10) << 3]) + body


@pytest.mark.parametrize("log", [27, 31])
def test_zstandard_with_a_long_window_is_read(tmp_path: Path, log: int) -> None:
    assert texts(write(tmp_path / "a.jsonl.zst", zstd_with_window(MANY_LINES, log))) == MANY


@pytest.mark.parametrize(
    "padding", [bytes(512), bytes(4), b"garbage behind the end"], ids=["NULs", "4 NULs", "garbage"]
)
@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_what_is_behind_the_end_of_a_compressed_file_costs_nothing(tmp_path: Path, suffix: str, padding: bytes) -> None:
    packed = gzip.compress(MANY_LINES, 1) if suffix == ".gz" else lzma.compress(MANY_LINES, preset=0)
    assert read(write(tmp_path / f"a.jsonl{suffix}", packed + padding))[0] == MANY
    text = "\n".join(MANY).encode()
    packed = gzip.compress(text, 1) if suffix == ".gz" else lzma.compress(text, preset=0)
    assert read(write(tmp_path / f"a.txt{suffix}", packed + padding), separator="\n")[0] == MANY


def test_a_truncated_file_says_how_much_was_lost(tmp_path: Path) -> None:
    packed = gzip.compress(MANY_LINES, 1)
    found, report = read(write(tmp_path / "a.jsonl.gz", packed[: len(packed) // 2]))
    assert found == MANY[: len(found)] and len(found) > 5000
    assert report.dropped == {"unreadable": 1}  # how much came after the end of the file, nobody knows
    assert f"at byte {len(packed) // 2:,}: it ends in the middle" in examples(report)[0]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_the_members_of_an_archive_are_read(tmp_path: Path, kind: str) -> None:
    members = {"x/a.jsonl": b'{"text": "one"}\n{"text": "two"}\n', "x/b.txt": b"three", "x/photo.jpg": b"\xff\xd8"}
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for size in (1 << 25, 20):
        assert texts(str(path), partition_bytes=size) == ["one", "two", "three"]


# Text and encodings


@pytest.mark.parametrize("size", [1 << 25, 5])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, size: int) -> None:
    text = "The first line.\nThe second.\n"
    data = f"\ufeff{text}".encode()
    assert "".join(texts(write(tmp_path / "a.txt", data), partition_bytes=size)) == text
    assert "".join(texts(write(tmp_path / "a.txt.gz", gzip.compress(data)), partition_bytes=size)) == text
    assert texts(write(tmp_path / "b.txt", data), separator="\n", partition_bytes=size) == text.splitlines()
    assert texts(write(tmp_path / "a.csv", "\ufefftext\none\n".encode()), partition_bytes=size) == ["one"]
    assert texts(write(tmp_path / "a.json", '\ufeff["one"]'.encode())) == ["one"]
    assert texts(write(tmp_path / "a.jsonl", '\ufeff{"text": "one"}\n'.encode()), partition_bytes=size) == ["one"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_utf_16_with_a_byte_order_mark_is_decoded(tmp_path: Path, encoding: str) -> None:
    text = "One line.\nAnother line. \u9ec3\u6cb3 \U0001f600\n"
    path = write(tmp_path / "a.txt", text.encode(encoding))
    assert "".join(texts(path)) == "".join(texts(path, partition_bytes=20)) == text
    assert "".join(texts(write(tmp_path / "a.txt.gz", gzip.compress(text.encode(encoding))))) == text
    path = write(tmp_path / "a.jsonl", '{"text": "One."}\n{"text": "Two."}\n'.encode(encoding))
    assert texts(path) == texts(path, partition_bytes=20) == ["One.", "Two."]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_utf_16_without_a_mark_is_never_trained_on_with_its_nuls(tmp_path: Path, name: str) -> None:
    text = '{"text": "One."}\n{"text": "Two."}\n' if name == "a.jsonl" else "One line.\nAnother line.\n"
    data = text.encode("utf-16-le")
    path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    try:
        found, report = read(path)
    except UserError as error:
        assert name in str(error) and "UTF-16" in str(error).upper()
    else:
        assert "\0" not in "".join(found)
        assert "".join(found) in (text, "One.Two.") or "UTF-16" in "".join(examples(report)).upper()
    decoded = texts(path, encoding="utf-16-le")
    assert decoded == ["One.", "Two."] if name == "a.jsonl" else "".join(decoded) == text


@pytest.mark.parametrize("size", [1 << 25, 16, 7, 3])
def test_lines_that_end_with_crlf_are_separated_as_others(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a.txt", b"one\r\n\r\ntwo\r\nmore\r\n\r\nthree\r\n")
    found = texts(path, separator="\n\n", partition_bytes=size)
    assert [text.replace("\r\n", "\n").rstrip() for text in found] == ["one", "two\nmore", "three"]


def test_one_line_and_one_file_are_text(tmp_path: Path) -> None:
    words = "anarchism originated as a term of abuse " * 5000
    path = write(tmp_path / "text8", words.encode())
    for size in (1 << 25, 20_000):
        assert "".join(texts(path, format="text", partition_bytes=size)) == words
    assert texts(write(tmp_path / "notes.md", b"# Notes\n\nA short file.\n")) == ["# Notes\n\nA short file.\n"]


# Folders


def test_files_that_a_shell_does_not_match_are_left_out(tmp_path: Path) -> None:
    for name, data in {"a.jsonl": b'{"text": "one"}', ".DS_Store": b"\0\0", "._a.jsonl": b"\0\5\x16\7"}.items():
        write(tmp_path / "data" / name, data)
    assert texts(str(tmp_path / "data" / "*")) == texts(str(tmp_path / "data")) == ["one"]


def test_a_path_that_exists_is_not_a_pattern(tmp_path: Path) -> None:
    path = write(tmp_path / "d[v1]" / "a.txt", b"one")
    assert texts(path) == texts(str(tmp_path / "d[v1]")) == ["one"]
    assert texts(str(tmp_path / "d[[]v1]" / "*.txt")) == ["one"]


def test_the_delimiter_is_that_of_the_files_own_extension(tmp_path: Path) -> None:
    rows = b'id,text\n1,one\n2,"two, three"\n'
    path = write(tmp_path / "x.tsv" / "a.csv", rows)
    assert texts(path) == texts(str(tmp_path / "x.tsv")) == ["one", "two, three"]
    packed = write(tmp_path / "y.tsv.d" / "a.csv.gz", gzip.compress(rows))
    assert texts(packed) == ["one", "two, three"]
