"""`gru init`: the configuration that is proposed for texts of different kinds, as a user would have them."""

import gzip
import json
import random
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.config import PipelineConfig, load
from gru.corpus.preview import look as look_at
from gru.errors import UserError
from gru.network import free_port
from jobs import entry, init
from pipelines import cli

WORDS = ["a", "crow", "met", "the", "fox", "under", "an", "old", "oak", "and", "said", "good", "day", "hills"]
VERSE = "白日依山盡黃河入海流欲窮千里目更上一層樓春眠不覺曉處處聞啼鳥夜來風雨聲花落知多少"
WORD_FILE = b"PK\x03\x04\x14\0\0\0word/document.xml"
RANDOM = random.Random(0)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init, "measure_speed", lambda *arguments: 20_000.0)
    monkeypatch.setattr(init, "has_gpu", lambda: False)
    return tmp_path


def sentence(words: int = 12) -> str:
    return " ".join(RANDOM.choices(WORDS, k=words)).capitalize() + "."


def verse() -> str:
    return "".join(RANDOM.choices(VERSE, k=5)) + "," + "".join(RANDOM.choices(VERSE, k=5)) + "。"


def write(path: str, content: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def json_lines(records: list[Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def proposed(*paths: str, **settings: Any) -> tuple[PipelineConfig, dict[str, Any]]:
    """The proposed configuration, which is loaded and has documents, and its table."""
    text = init.init([*paths], settings.pop("minutes", 30), **settings).toml
    Path("my.toml").write_text(text)
    look_at(entry.load_config("my.toml", []).corpus, entry.load_config("my.toml", []).tokenizer, 2).require_documents()
    assert all(
        "  # " in line or line.startswith(("#", "[", "sources", "path")) or not line for line in text.splitlines()
    )
    return load("my.toml"), tomllib.loads(text)


def test_what_is_not_text_beside_text_is_noted() -> None:
    write("Über Käfer (2)/a.md", "\n".join(sentence() for _ in range(100)))
    write("Über Käfer (2)/b.docx", WORD_FILE)
    proposal = init.init(["Über Käfer (2)"], 1)
    assert load_text(proposal.toml).name == "Uber-Kafer-2"
    assert any(note.startswith(".docx files are not read: make text of them") for note in proposal.notes)


def test_a_novel() -> None:
    write("My novel (1869).txt", "\n".join(sentence() for _ in range(5000)))
    config, table = proposed("My novel (1869).txt")
    assert config.name == "My-novel-1869"
    assert table["corpus"] == {"sources": ["My novel (1869).txt"], "heldout": "tail", "heldout_share": 0.1}
    assert table["tokenizer"] == {"kind": "char"}
    assert config.model.dropout > 0.1


def test_a_directory_of_markdown() -> None:
    for number in range(60):
        write(f"notes/{number % 7}/{number}.md", f"# Note {number}\n\n" + "\n".join(sentence() for _ in range(800)))
    write("notes/a.png", b"\x89PNG\0")
    config, table = proposed("notes/")
    assert table["corpus"] == {"sources": ["notes/"], "heldout_share": pytest.approx(0.1, abs=0.03)}
    assert table["tokenizer"] == {"kind": "bpe", "vocab_size": 1024}
    assert config.name == "notes"


def test_chats_in_json_lines() -> None:
    chats = [
        {
            "id": number,
            "messages": [{"role": "user", "content": sentence()}, {"role": "assistant", "content": sentence()}],
        }
        for number in range(300)
    ]
    write("chats.jsonl", json_lines(chats))
    config, table = proposed("chats.jsonl")
    assert table["corpus"]["template"] == "{messages}"
    assert "heldout" not in table["corpus"]
    assert config.evaluate.prompt == "user:\nHello!\n\nassistant:\n"


def test_csv_with_semicolons() -> None:
    rows = "".join(f'{number};"{sentence(4)}";"{sentence()}\n{sentence()}"\n' for number in range(400))
    write("reviews.csv", "id;headline;review\n" + rows)
    table = proposed("reviews.csv")[1]
    assert table["corpus"]["template"] == "{headline}\n{review}"
    assert table["corpus"]["delimiter"] == ";"
    assert table["evaluate"]["prompt"].endswith(".\n")


def test_chinese_verse_in_json() -> None:
    poems = [{"title": verse()[:4], "author": "王之渙", "paragraphs": [verse(), verse()]} for _ in range(2000)]
    write("詩/tang.json", json.dumps(poems, ensure_ascii=False))
    config, table = proposed("詩")
    assert table["corpus"]["template"] == "{title}\n{author}\n{paragraphs}"
    assert table["tokenizer"] == {"kind": "char", "vocab_size": 1024}
    assert config.name == "text"
    assert proposed("詩", name="verse")[0].name == "verse"


def test_source_code() -> None:
    write("project/README.md", "# A project")
    for number in range(80):
        write(f"project/src/m{number}.py", f"def f{number}():\n    return {sentence()!r}\n" * 500)
    write("project/build.lock", "x" * 9_000_000)
    write("project/.git/objects.txt", "hidden\n" * 10)
    table = proposed("project")[1]
    assert table["corpus"]["include"] == ["*.py"]
    assert "format" not in table["corpus"]


def test_a_separator_that_source_code_mentions_does_not_stand_between_documents() -> None:
    for number in range(9):
        mark = 'END = "<|endoftext|>"\n' if number == 3 else ""
        write(f"project/m{number}.py", f"{mark}def f{number}():\n    return {sentence()!r}\n" * 20)
    assert "separator" not in proposed("project")[1]["corpus"]


def test_the_text_of_the_quickstart_gets_nearly_its_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "measure_speed", lambda *arguments: 24_500.0)
    config = proposed("python-stdlib", minutes=2.33)[0]
    preset = load(Path(cli.__file__).with_name("configs") / "quickstart.toml")
    assert config.tokenizer == preset.tokenizer
    assert config.model == preset.model
    assert config.corpus.heldout_share == pytest.approx(preset.corpus.heldout_share, abs=0.01)
    assert config.train.steps == pytest.approx(preset.train.steps, rel=0.05)


def test_the_storage_is_not_read() -> None:
    write("a.txt", "\n".join(sentence() for _ in range(300)))
    write("store/datasets/d.jsonl", json_lines([{"text": sentence()}] * 9))
    assert list(init.init(["."], 1).preview.sources[0].files) == ["text"]


def test_extensions_that_do_not_tell() -> None:
    write("logs/a.log", "\n".join(sentence() for _ in range(300)))
    write("logs/a.bin", b"\0" * 100)
    write("export", json_lines([{"content": sentence()} for _ in range(300)]))
    corpus = proposed("logs")[1]["corpus"]
    assert (corpus["include"], corpus["format"]) == (["*.log"], "text")
    corpus = proposed("export")[1]["corpus"]
    assert (corpus["format"], corpus["template"]) == ("jsonl", "{content}")


def test_columns_of_parquet_and_paths_that_are_read_differently(directory: Path) -> None:
    pq.write_table(pa.table({"id": [*range(200)], "plot": [sentence(40) for _ in range(200)]}), "films.parquet")
    write("a.jsonl.gz", gzip.compress(json_lines([{"text": sentence()} for _ in range(300)]).encode()))
    assert proposed("films.parquet")[1]["corpus"]["template"] == "{plot}"
    config, table = proposed(str(directory / "films.parquet"), "a.jsonl.gz")
    assert "sources" not in table["corpus"]
    assert [(source["path"], source.get("template")) for source in table["corpus"]["source"]] == [
        (str(directory / "films.parquet"), "{plot}"),
        ("a.jsonl.gz", None),
    ]
    assert config.name == "films"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Der Fuchs saß über der Höhle – „schön“.\n"),
        ("gb18030", "白日依山盡,黃河入海流。\n"),
        ("utf-16", "Crow\n"),
    ],
)
def test_other_encodings(encoding: str, text: str) -> None:
    write("a.txt", (text * 4000).encode(encoding))
    config = proposed("a.txt")[0]
    assert config.corpus.encoding == (encoding if encoding != "utf-16" else "utf-8")


def test_documents_of_a_file_with_separators() -> None:
    write("stories.txt", "<|endoftext|>".join(sentence(60) for _ in range(500)))
    corpus = proposed("stories.txt")[1]["corpus"]
    assert corpus["separator"] == "<|endoftext|>"
    assert "heldout" not in corpus


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    write("a.jsonl", json_lines([{"text": f"\x1b[2J\x7f\u202e{sentence()}\r\nB"} for _ in range(99)]))
    text = init.init(["a.jsonl"], 1).toml
    assert not {"\x1b", "\x7f", "\u202e", "\r"} & {*text}
    assert load_text(text)


def load_text(text: str) -> PipelineConfig:
    return PipelineConfig.model_validate(tomllib.loads(text))


@pytest.fixture
def mistakes() -> Iterator[None]:
    Path("empty").mkdir()
    write("images/a.png", b"\x89PNG\0")
    write("numbers.jsonl", json_lines([{"id": 1}, {"id": 2}]))
    write("blank.txt", "")
    write("blanks/a.md", "")
    write("blanks/b.md", "")
    write("white.txt", " \n\n")
    write("tiny.txt", "A crow met a fox. " * 11)
    write("a.bin", b"\0\1\2")
    write("my letters/1.docx", WORD_FILE)
    write("my letters/2.docx", WORD_FILE)
    write("my letters/3.pdf", b"%PDF-1.4\n1 0 obj\n")
    write("unnamed", WORD_FILE)
    yield


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.txt", "^no such file: .*absent.txt"),
        ("empty", "/empty: an empty directory$"),
        ("images", r"/images: none of its files is text: 1 \.png$"),
        ("images/a.png", r"/images/a\.png: an image, which has no text$"),
        ("numbers.jsonl", "numbers.jsonl: no field of its records has text; its fields: id"),
        ("blank.txt", r"^blank\.txt: an empty file$"),
        ("blanks", "^blanks: all of its files are empty$"),
        ("white.txt", r"/white\.txt: nothing but white space$"),
        ("tiny.txt", r"/tiny\.txt: only about 199 tokens of text: training needs 2,000 at least"),
        ("a.bin", "a.bin: neither text"),
        ("my letters/1.docx", r"a Word file, .* with `pandoc -t plain '/.*/my letters/1\.docx' -o 1\.txt`$"),
        ("my letters/3.pdf", r"a PDF file, .* with `pdftotext '/.*/my letters/3\.pdf'`$"),
        ("my letters", r"none of its files is text: 2 \.docx, 1 \.pdf; \.docx files are not read: make text of them"),
        ("unnamed", r"/unnamed: a ZIP archive: give it the extension \.zip$"),
    ],
)
def test_mistakes_are_one_line(path: str, message: str, mistakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "has_gpu", None)  # would take seconds
    with pytest.raises(UserError, match=message) as raised:
        init.init([path], 30)
    assert "\n" not in str(raised.value)


def test_a_wrong_name_is_a_mistake() -> None:
    write("a.txt", sentence())
    with pytest.raises(UserError, match="--name 'a b': must be letters"):
        init.init(["a.txt"], 30, "a b")


def test_the_config_of_a_text_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.txt", "\n".join(sentence() for _ in range(300)))
    write("b/b.txt", "\n".join(sentence() for _ in range(300)))
    shown: list[str] = []
    assert init.find_or_write(["a.txt"], None, None, shown.append) == "a.toml"
    assert shown[-2].startswith("chosen: a char tokenizer; ") and "a.toml, written" in shown[-1]
    first = Path("a.toml").read_bytes()
    assert entry.load_config("a.toml", []).corpus.paths == [str(Path("a.txt").absolute())]
    monkeypatch.setattr(init, "measure_speed", None)  # a slower moment must not lead to another config
    assert init.find_or_write(["./a.txt"], 5, None, shown.append) == "a.toml"
    assert Path("a.toml").read_bytes() == first and "--minutes has no effect" in shown[-1]
    with pytest.raises(UserError, match=r"^a\.toml exists and has other sources"):
        init.find_or_write(["b/"], None, "a", shown.append)
    assert [path.name for path in Path().glob("*.toml")] == ["a.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["c.toml", "a.txt"], "c.toml is a config: give it alone, or give paths of text only"),
        (["c.toml", "--minutes=5"], "--minutes and --name are for text: set train.steps and name in c.toml"),
        (["absent"], "no such file: .*absent"),
    ],
)
def test_run_takes_a_config_or_text(arguments: list[str], message: str) -> None:
    parsed = cli.build_parser().parse_args(["run", *arguments])
    with pytest.raises(UserError, match=message):
        parsed.command(parsed)


def test_run_writes_the_config_and_looks_at_the_machine_before_it_starts_anything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.txt", "\n".join(sentence() for _ in range(300)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = [f"--ray-port={port}", f"--mlflow-port={free_port()}", f"--set=serve.port={free_port()}"]
        parsed = cli.build_parser().parse_args(["run", "a.txt", *ports])
        with pytest.raises(UserError, match=f"port {port} is in use by .* choose another with --ray-port"):
            parsed.command(parsed)
        monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + 40 * "x")
        with pytest.raises(UserError, match="too long for Ray's sockets"):
            parsed.command(parsed)
    assert "config: a.toml, which exists" in capsys.readouterr().err
    assert not [*Path("store").glob("embedded/*.json")]


def test_the_command_prints_the_config_on_stdout_and_a_report_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.txt", "\n".join(sentence() for _ in range(50)))
    parsed = cli.build_parser().parse_args(["init", "a.txt", "--minutes", "2.5", "--name", "crow"])
    parsed.command(parsed)
    out, err = capsys.readouterr()
    assert load_text(out).name == "crow"
    assert "#     | " in out
    assert "a.txt: 1 file (1 text)" in err and "training: about" in err
    assert "note: there are only about" in err
