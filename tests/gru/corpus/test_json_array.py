import gzip
import json
import random
from pathlib import Path

import pytest

from gru.errors import UserError
from tests.gru.corpus.reading import PACKERS, read, texts, write


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
