"""`gru look` and `jobs.prepare --dry-run`: the report on a sample of the corpus, and its result for programs."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gru.config import PipelineConfig
from gru.corpus.preview import Estimate, Preview, ShownDocument, SourcePreview
from gru.errors import UserError
from jobs import look
from pipelines import cli

RECORDS = [{"text": f"A crow met fox {i}.", "title": None if i % 4 else "Crow"} for i in range(40)]
CONFIG = """
storage = "store"
[corpus]
sources = ["notes"]
[tokenizer]
kind = "byte"
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + "{broken\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gru(*arguments: str) -> None:
    parsed = cli.build_parser().parse_args(["look", "config.toml", *arguments])
    parsed.command(parsed)


def test_the_report_has_files_fields_documents_drops_and_the_expected_size(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gru()
    out = capsys.readouterr().out
    size = sum(len(record["text"] or "") for record in RECORDS)
    tokens = size + 40
    lines = [
        rf"{directory}/notes: 1 file \(1 jsonl\), \d\.\d KB",
        r"  sample: 40 documents, all of it",
        r"  fields: text, title \(75% empty\)",
        r"  template: '\{text\}'",
        *[r"  a document of a\.jsonl, 1\d characters:", r"    \| A crow met fox \d\."] * 5,
        r"  left out: 1 bad_record, 2\.4% of the sample",
        r"    a\.jsonl: the line at byte \d+ is not valid JSON: .+",
        rf"expected: about 40 documents, {size} bytes of text, {round(tokens, -1)} tokens \(0\.9\d bytes each\), "
        r"in \d+ s on \d+ cores?$",
    ]
    found = out.splitlines()
    assert len(found) == len(lines)
    for line, pattern in zip(found, lines, strict=True):
        assert re.fullmatch(pattern, line), line
    assert not (directory / "store").exists()


def test_a_wrong_template_is_reported_after_the_report(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"no document to train on in .*notes; 1 dropped: bad_record; 40 dropped: miss"):
        gru("--set", "corpus.template={Text}")
    out = capsys.readouterr().out
    assert "fields: text, title (75% empty)" in out
    assert "left out: 40 missing_field, 1 bad_record, 100.0% of the sample" in out


def preview(*sources: SourcePreview, **settings: object) -> Preview:
    return Preview([*sources], {}, Estimate(), 0.0, 2, 1.0, **settings)  # type: ignore[arg-type]


def source(**settings: object) -> SourcePreview:
    return SourcePreview("corpus.sources", ("a",), None, 1.0, {"text": 1}, 9, **settings)  # type: ignore[arg-type]


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    shown = [ShownDocument("\x1b[2J.txt", 9, "\x1b]0;title\x07 red\u202e\r\n\ttab 黃河 é")]
    report = look.report(preview(source(shown=shown, examples={"bad_record": ["\x1b.txt: bad"]})))
    assert "\x1b" not in report
    assert r"\x1b[2J.txt" in report
    assert "    | \\x1b]0;title\\x07 red\\u202e\\x0d\n    | \ttab 黃河 é" in report


def test_a_long_document_is_cut() -> None:
    shown = [ShownDocument("a", 10**6, "\n".join(["x" * 500] * 9))]
    lines = look.report(preview(source(shown=shown))).splitlines()
    assert [line for line in lines if line.startswith("    |")][-1] == "    | ..."
    assert max(map(len, lines)) < 140


def test_a_part_of_a_document_is_called_so() -> None:
    shown = [ShownDocument("novel.txt", None, "It was")]
    assert "  a part of a document of novel.txt:\n    | It was" in look.report(preview(source(shown=shown)))


def test_many_fields_are_cut() -> None:
    [line] = [
        line
        for line in look.report(preview(source(empty_fields={f"f{i:02}": 0.0 for i in range(40)}))).splitlines()
        if "fields" in line
    ]
    assert line.endswith("f23 and 16 more")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 documents"),
        (1.2, "1 document"),
        (7, "7 documents"),
        (99.6, "100 documents"),
        (1058, "1,100 documents"),
        (9149, "9,100 documents"),
        (123_456_789, "120,000,000 documents"),
    ],
)
def test_estimates_have_two_digits(number: float, text: str) -> None:
    report = look.report(Preview([], {".jpg": 2, "": 1}, Estimate(documents=number), 0.0, 1, 7300.0))
    assert f"expected: about {text}, 0 bytes of text, in 2.0 h on 1 core" in report
    assert "not read, for their extension or by corpus.exclude: 2 .jpg, 1 without extension" in report


def test_the_start_of_ray_counts_where_there_are_several_partitions() -> None:
    reports = [look.report(Preview([], {}, Estimate(), 0.0, 2, 3.0, partitions)) for partitions in (1, 2)]
    assert reports[0].endswith("in 3 s on 2 cores") and reports[1].endswith("2 cores, besides the start of Ray")


def test_cores_are_those_that_the_tasks_can_use() -> None:
    def cores(cpus: float) -> int:
        config = {"name": "a", "corpus": {"sources": [__file__]}, "resources": {"prepare": {"cpus": cpus}}}
        return look.look(PipelineConfig.model_validate(config)).cores

    assert cores(10_000) == 1
    assert cores(1) >= 1


def test_a_dry_run_ends_with_its_result_and_needs_no_heavy_module(directory: Path) -> None:
    script = (
        "import runpy, sys; sys.argv = ['jobs.prepare', 'config.toml', '--dry-run']; from jobs import entry\n"
        "end = entry.exit_now\n"
        "entry.exit_now = lambda status: (print([m for m in ('torch', 'ray', 'mlflow', 'dbos') if m in sys.modules], "
        "file=sys.stderr), end(status))\n"
        "runpy.run_module('jobs.prepare', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    result = json.loads(line)
    assert result["stage"] == "look"
    assert result["expected"]["documents"] == 40
    [found] = result["sources"]
    assert found["dropped"] == {"bad_record": 1}
    assert found["files"] == {"jsonl": 1}
    assert "sample: 40 documents, all of it" in done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert not list(directory.glob("store/*"))


def test_bytes_behind_compressed_data_are_told_though_no_document_is_left_out(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "notes" / "a.jsonl").unlink()
    packed = directory / "notes" / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "a crow"}\n') + b"garbage")
    gru()
    out = capsys.readouterr().out
    assert "has 7 bytes behind the end of the compressed data" in out
    assert "left out" not in out
    packed.write_bytes(gzip.compress(b"") + b"garbage")
    with pytest.raises(UserError, match="no document to train on"):
        gru()
