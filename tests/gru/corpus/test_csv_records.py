import csv
import gzip
import io
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from gru.config import CorpusConfig
from gru.corpus.csv_dialect import dialect_of
from gru.corpus.listing import SourceFile
from gru.errors import UserError
from tests.gru.corpus.reading import examples, read, spans, texts, write

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
TRIALS = 12
NEVER_CLOSED = "has a quote that is never closed: set corpus.quoting = false, if a quote is an ordinary character"


def split_by_definition(data: bytes, delimiter: bytes, reach: int) -> list[tuple[bytes, list[bytes] | None]]:
    """Return (record, its fields) by the definition, one byte at a time; None if a quote is never closed."""
    records: list[tuple[bytes, list[bytes] | None]] = []
    begin = position = 0
    fields, field_begins = [b""], True
    while position < len(data):
        if field_begins and data[position] == ord('"'):
            closing = position + 1
            while closing < len(data) and (data[closing] != ord('"') or data[closing + 1 : closing + 2] == b'"'):
                closing += 2 if data[closing] == ord('"') else 1
            ends = closing + 1 == len(data) or data.startswith((delimiter, b"\r", b"\n"), closing + 1)
            if closing >= len(data) or (b"\n" in data[position:closing] and (not ends or closing - position > reach)):
                line_end = data.find(b"\n", position) if b"\n" in data[position:] else len(data)
                records.append((data[begin:line_end].rstrip(b"\r"), None))
                begin = position = line_end + 1
                fields, field_begins = [b""], True
            else:
                fields[-1] = data[position + 1 : closing].replace(b'""', b'"')
                position, field_begins = closing + 1, False
        elif data.startswith(delimiter, position):
            fields, position, field_begins = [*fields, b""], position + len(delimiter), True
        elif data[position : position + 1] == b"\n" or not data[position:].strip(b"\r"):
            records.append((data[begin:position], fields))
            begin = position = data.find(b"\n", position) + 1 or len(data)
            fields, field_begins = [b""], True
        elif data[position:].lstrip(b"\r")[:1] == b"\n":  # carriage returns before the line feed
            end = data.index(b"\n", position)
            records.append((data[begin:position], fields))
            begin = position = end + 1
            fields, field_begins = [b""], True
        else:
            fields[-1] += data[position : position + 1]
            position, field_begins = position + 1, False
    if begin < len(data):
        records.append((data[begin:], fields))
    return [(record, fields) for record, fields in records if record]


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
    expected = ["|".join(row) for row in rows if any(row)]  # a row without any text is an empty document
    for size in [*range(1, 60), 128, 1000, len(data) - 1, len(data)]:
        found, report = read(path, template=template, quoting=True, partition_bytes=size)
        assert (found, report.dropped) == (expected, {"empty": 1})
    last = write(tmp_path / "last.csv", b"text\none\ntwo")  # without an end of line
    assert texts(last) == ["one", "two"]
    assert read(write(tmp_path / "head.csv", b"text\n"))[0] == []


@pytest.mark.parametrize("reach", [3, 7, 1 << 28])
@pytest.mark.parametrize("delimiter", [",", "\t", "§", "^"])
def test_random_texts_give_what_the_definition_says_however_they_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delimiter: str, reach: int
) -> None:
    monkeypatch.setattr("gru.corpus.csv_dialect.REACH", reach)
    monkeypatch.setattr("gru.corpus.csv_records._BLOCK", 5)
    rng = random.Random(f"{delimiter}{reach}")
    for trial in range(TRIALS):
        alphabet = ['"', '"', "\n", delimiter, "é", "\r"][: rng.choice([4, 5, 6, 6])]
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 40)))
        data = (rng.choice(["", "\ufeff"]) + text).encode()
        path = write(tmp_path / f"{trial}.csv", data)
        records = split_by_definition(text.encode(), delimiter.encode(), reach)
        good = [fields for _, fields in records if fields and len(fields) == 2]
        bad = [record for record, fields in records if not fields or len(fields) != 2]
        expected = [f"<{a.decode()}|{b.decode()}>" for a, b in good if a or b]
        for size in range(1, len(data) + 2):
            found, report = read(
                path, template="<{a}|{b}>", header=["a", "b"], delimiter=delimiter, partition_bytes=size
            )
            assert found == expected, (data, size)
            assert report.dropped["bad_record"] == len(bad), (data, size)
            assert report.dropped.total() + len(found) == len(records)
            assert report.dropped_bytes["bad_record"] == sum(map(len, bad)), (data, size)


def test_what_python_writes_is_read_as_python_reads_it(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(12):
        end, quoting = rng.choice(["\n", "\r\n"]), rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
        delimiter = rng.choice([",", "\t", ";"])
        buffer = io.StringIO()
        writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=quoting)
        letters = 'a",\t;\n é' if end == "\n" and quoting == csv.QUOTE_MINIMAL else 'a",\t;\n\r é'
        rows = [["".join(rng.choices(letters, k=rng.randrange(1, 6))) for _ in range(3)] for _ in range(6)]
        writer.writerows([["x", "y", "z"], *rows])
        data = buffer.getvalue().encode()
        assert [*csv.reader(io.StringIO(data.decode(), newline=""), delimiter=delimiter)][1:] == rows
        path = write(tmp_path / f"{trial}.csv", data)
        for size in (1, 2, 3, 5, 11, 29):
            assert texts(path, template="{x}\0{y}\0{z}", delimiter=delimiter, partition_bytes=size) == [
                "\0".join(row) for row in rows
            ]


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        ('1,5" nails', ["1", '5" nails']),
        ('1,"abc"def', ["1", "abcdef"]),  # as Python's csv, and pandas
        ('1,"a ""b"" c" ', ["1", 'a "b" c ']),
        ('1,"he said "no" twice"', ["1", 'he said no" twice"']),
        ('1, "a"', ["1", ' "a"']),
        ('"",""""', ["", '"']),
        ("1,a\rb", ["1", "a\rb"]),
        ('"1\r\n2",a\rb', ["1\r\n2", "a\rb"]),
        ('1,"a\nb"\r', ["1", "a\nb"]),
        ("1,a\r\r", ["1", "a"]),  # of CRLF that was converted twice
        (" 1 ,\t", [" 1 ", "\t"]),
    ],
)
def test_a_quote_opens_a_field_only_at_its_beginning(tmp_path: Path, record: str, fields: list[str]) -> None:
    path = write(tmp_path / "a.csv", f"n,text\n0,before\n{record}\n2,after\n".encode())
    for size in range(1, 50):
        found = texts(path, template="<{n}|{text}>", partition_bytes=size)
        assert found == ["<0|before>", f"<{'|'.join(fields)}>", "<2|after>"]


def test_a_quote_that_is_never_closed_costs_its_line(tmp_path: Path) -> None:
    rows = [f"{i},row {i}" for i in range(100)]
    for line, rest in [
        ('50,"row', rows[51:]),
        ('50,"row', ['51,"a, b"', *rows[52:]]),  # a quote that rather opens a field closes none
        ('50,"row', ['51,"two\nlines"', '52,"a ""b"""', '53,"c"', *rows[54:]]),
        ('"two\nlines",fine\n50,"row', rows[51:]),
        ('"row', []),
    ]:
        path = write(tmp_path / "a.csv", "\n".join(["n,text", *rows[:50], line, *rest]).encode())
        found, report = read(path)
        assert len(found) == 50 + len(rest) + line.count("fine")
        assert found[-1] == (rows[99].split(",")[1] if rest else "row 49")
        lost = line.split("\n")[-1]
        assert report.dropped == {"bad_record": 1} and report.dropped_bytes == {"bad_record": len(lost)}
        assert examples(report)[0].endswith(NEVER_CLOSED)
        for size in (1, 2, 3, 5, 17, 300):
            assert read(path, partition_bytes=size)[0] == found


def test_problems_in_csv_are_counted_by_record(tmp_path: Path) -> None:
    data = b'text,n\nok,1\nshort\n\n"long",2,3\nx"y"z,5\n"a"b,6\nfine,4\n"never, closed\nand so,on\n\xff,1\n"b"'
    path = write(tmp_path / "a.csv", data)
    for size in (1000, 20, 7, 1):
        found, report = read(path, partition_bytes=size)
        assert found == ["ok", 'x"y"z', "ab", "fine", "and so"]
        assert report.dropped == {"bad_record": 4, "invalid_utf8": 1}
        assert report.dropped_bytes == {"bad_record": 5 + 10 + 14 + 3, "invalid_utf8": 3}
    remedy = "set corpus.quoting = false, if a quote is an ordinary character"
    assert examples(report) == [
        "a.csv: the record at byte 12 has 1 field, not 2: set corpus.delimiter, if ',' is not what separates fields",
        f"a.csv: the record at byte 19 has 3 fields, not 2: {remedy}",
        f"a.csv: the record at byte 52 {NEVER_CLOSED}",
        f"a.csv: the record at byte 81 has 1 field, not 2: {remedy}",
        "a.csv: not valid UTF-8 at byte 77",
    ]
    for before, message in [(b"", "byte 7 has 1 field, not 2"), (b'"a,1\nb"c,2\n', f"byte 7 {NEVER_CLOSED}")]:
        bad = write(tmp_path / "b.csv", b"text,n\n" + before + b"short\n")
        with pytest.raises(UserError, match=f"b.csv: the record at {message}"):
            read(bad, on_bad="fail")


def test_tabs_separate_the_fields_of_tsv_and_quotes_are_ordinary_there(tmp_path: Path) -> None:
    tabs = b'n\ttext\n1\t"I came,\n2\tand I saw."\n'
    for name in ("a.tsv", "a.TSV.gz", "b.tsv.csv"):
        path = write(tmp_path / name, gzip.compress(tabs) if name.endswith("gz") else tabs)
        for size in (1, 5, 1000):
            assert texts(path, partition_bytes=size) == ['"I came,', 'and I saw."']
    assert texts(str(tmp_path / "a.tsv"), quoting=True, header=["a", "b"], template="{b}") == [
        "text",
        "I came,\n2\tand I saw.",
    ]
    nested = write(tmp_path / "x.tsv" / "a.csv", b'n,text\n1,"a\tb"\n')
    assert texts(nested) == texts(str(tmp_path / "x.tsv")) == ["a\tb"]
    assert texts(nested, quoting=False) == ['"a\tb"']
    found, report = read(write(tmp_path / "c.tsv", b'n\ttext\n1\t"a\tb"\n'))
    assert not found and "set corpus.quoting = true, if fields are enclosed in quotes" in examples(report)[0]


@pytest.mark.parametrize(
    ("path", "name", "delimiter"),
    [
        ("https://host/a.tsv.gz?download=1", "a.tsv.gz?download=1", "\t"),
        ("https://host/a.csv?from=b.tsv", "a.csv?from=b.tsv", ","),
        ("https://host/x.zip?download=1/a.tsv", "x.zip?download=1/a.tsv", "\t"),
        ("/data/what?.tsv", "what?.tsv", "\t"),
        ("/data/x.tsv/a.tab", "x.tsv/a.tab", ","),
    ],
)
def test_the_dialect_is_found_by_the_name_of_the_file_itself(path: str, name: str, delimiter: str) -> None:
    [options] = CorpusConfig(sources=[path]).source_options()
    assert dialect_of(SourceFile(path, 1, "", "csv", "", name, options)).delimiter == delimiter


def test_delimiter_and_header_are_those_of_the_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeff"a;b";c\n1;"2\n3"\n'.encode())
    for size in range(1, 30):
        options: dict[str, Any] = {"delimiter": ";", "template": "{text}", "partition_bytes": size}
        assert texts(path, header=["text", "n"], **options) == ["a;b", "1"]
        assert texts(path, delimiter=";", template="{a;b}-{c}", partition_bytes=size) == ["1-2\n3"]
    assert texts(write(tmp_path / "b.csv", b"a\xc2\xa7b\n"), delimiter="§", header=["x", "text"]) == ["b"]


def test_names_of_fields_stand_without_the_spaces_around_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'\n\r\n n , text,"note "\n1, x,y\n')
    for size in (1, 3, 4, 9, 100):  # empty lines before the header, also as a span of their own
        assert texts(path, template="{n}{text}{note}", partition_bytes=size) == ["1 xy"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xe9\x01,text\n1,2\n", 'not valid UTF-8: set corpus.encoding, as in encoding = "latin-1"'),
        (b'n,"text\n1,2\n', "the header line has a quote that is never closed: set corpus.quoting = false"),
        (b"n,text\r1,2\r", "its lines end with carriage returns only: write line feeds instead"),
        (b"n,text, text\n1,2,3\n", "the header names the field 'text' of corpus.template more than once"),
    ],
)
def test_a_file_whose_header_cannot_be_used_is_left_out(tmp_path: Path, data: bytes, message: str) -> None:
    path, other = write(tmp_path / "a.csv", data), write(tmp_path / "b.csv", b"text\nfine\n")
    for size in (1, 4, 1000):
        found, report = read(path, other, partition_bytes=size)
        assert found == ["fine"]
        assert (report.dropped, report.dropped_bytes) == ({"unreadable": 1}, {"unreadable": len(data)})
        assert message in examples(report)[0] and examples(report)[0].startswith("a.csv: ")
    with pytest.raises(UserError, match=f"a.csv: .*{message}"):
        read(path, on_bad="fail")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1251", "gb18030", "shift_jis"])
def test_a_header_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    name = {"latin-1": "tête", "cp1251": "имя"}.get(encoding, "題目")
    path = write(tmp_path / "a.csv", f"{name},text\n1,{name}\n".encode(encoding))
    for size in (4, 1000):
        with pytest.raises(UserError, match=r"a\.csv: the header line is not valid UTF-8: set corpus.encoding, as in"):
            read(path, partition_bytes=size)


def test_a_name_that_the_template_does_not_use_may_stand_twice(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.csv", b"note,text,note,\n1,2,3,4\n")) == ["2"]


@pytest.mark.parametrize("ending", [b'"\n2,x\n', b"\n2,x\n"])
def test_a_record_that_spans_many_partitions_is_read_once(tmp_path: Path, ending: bytes) -> None:
    field = b'a line of text, with ""quotes""\n' * 20_000
    path = write(tmp_path / "a.csv", b'n,text\n1,"' + field + ending)
    corpus = CorpusConfig(sources=[path], partition_bytes=10_000)
    found, report = read(path, partition_bytes=10_000)
    if ending.startswith(b'"'):
        assert found == [field.decode().replace('""', '"'), "x"] and not report.dropped
        assert [span.records for span in spans(corpus)[1:-2]] == [spans(corpus)[1].records] * (len(spans(corpus)) - 3)
    else:
        assert found[-1] == "x" and found[:-1] == [' with ""quotes""'] * 19_999
        assert report.dropped == {"bad_record": 1}


def test_the_cases_of_stray_quotes_keep_all_rows(tmp_path: Path) -> None:
    for name, separator in [("stray_quote.tsv", "\t"), ("stray_quote.csv", ",")]:
        rows = [f"{i}{separator}{chr(34).join(['5', ' nails']) if i == 1000 else 'row'} {i}" for i in range(1, 10_001)]
        path = write(tmp_path / name, "\n".join([separator.join(["id", "text"]), *rows]).encode())
        for size in (1 << 20, 10_007):
            assert texts(path, partition_bytes=size) == [row.split(separator)[1] for row in rows]
