import hashlib
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.errors import UserError
from tests.gru.corpus.reading import AWKWARD, PACKERS, read, texts, write


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
def test_the_readable_part_of_a_truncated_file_is_kept(tmp_path: Path, suffix: str, kind: str) -> None:
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
