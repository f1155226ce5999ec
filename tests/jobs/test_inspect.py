import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("inspect")
    lines = [json.dumps({"text": f"poem {i} " + "黃河" * i}) for i in range(60)]
    (folder / "a.jsonl").write_text("\n".join([*lines, lines[3], '{"title": "none"}', "{"]))
    corpus = CorpusConfig(sources=[str(folder)], heldout_share=0.2)
    return prepare(corpus, TokenizerConfig(kind="byte"), str(folder / "d"), lambda _: None)


def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jobs.inspect", *arguments], capture_output=True, text=True)


def test_the_report_counts_documents_and_those_left_out(dataset: Dataset) -> None:
    done = inspect(dataset.directory, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    manifest = dataset.manifest
    assert f"{manifest.digest}, and every file matches its digest" in done.stdout
    rows = {words[0]: words[1:] for line in done.stdout.splitlines() if (words := line.split())}
    counts = manifest.train
    assert rows["train"] == [f"{n:,}" for n in (counts.documents, counts.bytes, counts.characters, counts.tokens)]
    for reason in ("bad_record", "duplicate", "missing_field"):
        lost = manifest.dropped_bytes.get(reason)
        assert rows[reason] == (["1", f"{lost:,}"] if lost else ["1"])
    lines = done.stdout.splitlines()
    [place] = [index for index, line in enumerate(lines) if line.split()[:1] == ["bad_record"]]
    assert lines[place + 1].strip().startswith("a.jsonl: the line at byte ")


def test_json_has_the_same_counts_for_programs(dataset: Dataset) -> None:
    facts = json.loads(inspect(dataset.directory, "--json").stdout)
    assert facts["digest"] == dataset.manifest.digest
    assert sum(facts["documents_by_tokens"].values()) == 60
    tokens = [len(text.encode()) + 1 for split in ("train", "heldout") for text in dataset.texts(split)]
    for limit, count in facts["documents_by_tokens"].items():
        assert sum(int(limit[2:]) // 2 < n <= int(limit[2:]) for n in tokens) == count
    assert facts["dropped"] == {"bad_record": 1, "duplicate": 1, "missing_field": 1}
    assert facts["dropped_bytes"] == dataset.manifest.dropped_bytes
    assert facts["examples"] == dataset.manifest.examples
    assert facts["heldout_by"] == "hash"


def test_bytes_lost_and_files_passed_over_are_in_the_report(dataset: Dataset, tmp_path: Path) -> None:
    changes = {
        "dropped": {"unreadable": 2},
        "dropped_bytes": {"unreadable": 12_345_678},
        "passed_over": {".png": 1234, "": 1},
        "examples": {"unreadable": ["a.jsonl: cannot be read to its end", "b.jsonl: neither"]},
    }
    manifest = dataset.manifest.model_copy(update=changes)
    manifest = manifest.model_copy(update={"digest": manifest.content_digest()})
    copy = tmp_path / "d"
    shutil.copytree(dataset.directory, copy)
    (copy / "manifest.json").write_text(manifest.model_dump_json())
    report = inspect(str(copy)).stdout
    assert report.splitlines()[-8:] == [
        "documents left out                 bytes lost",
        "    unreadable             2       12,345,678",
        "  a.jsonl: cannot be read to its end",
        "  b.jsonl: neither",
        "",
        "files that were not read, by extension",
        "        (none)             1",
        "          .png         1,234",
    ]
    facts = json.loads(inspect(str(copy), "--json").stdout)
    assert facts["passed_over"] == changes["passed_over"] and facts["dropped_bytes"] == changes["dropped_bytes"]


def test_any_document_is_printed_by_its_hash(dataset: Dataset) -> None:
    from gru.corpus.documents import document_hash

    for text in dataset.texts("heldout"):
        name = document_hash(text.encode())
        assert inspect(dataset.directory, "--document", hex(name), "--json").stdout == (
            json.dumps({"source": "a.jsonl", "text": text}, ensure_ascii=False) + "\n"
        )
        break
    for name, message in (("1", "no such document"), ("x", "must be a number from the shards' column `document`")):
        done = inspect(dataset.directory, "--document", name)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: --document {name}: {message}")


@pytest.mark.slow
def test_a_command_that_ends_early_is_never_aborted_by_a_native_thread(dataset: Dataset) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: inspect(dataset.directory, "--document", "1"), range(20)))
    assert [done.returncode for done in runs] == [2] * 20, {done.stderr for done in runs}


def test_a_mistake_is_one_line(dataset: Dataset, tmp_path: Path) -> None:
    done = inspect(str(tmp_path))
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}: not a dataset: it has no manifest.json\n")
