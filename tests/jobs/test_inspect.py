import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Dataset:
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
    assert [rows[reason] for reason in ("bad_record", "duplicate", "missing_field")] == [["1"]] * 3
    assert "a.jsonl: the line at byte " in done.stdout


def test_json_has_the_same_counts_for_programs(dataset: Dataset) -> None:
    facts = json.loads(inspect(dataset.directory, "--json").stdout)
    assert facts["digest"] == dataset.manifest.digest
    assert sum(facts["documents_by_tokens"].values()) == 60
    tokens = [len(text.encode()) + 1 for split in ("train", "heldout") for text in dataset.texts(split)]
    for limit, count in facts["documents_by_tokens"].items():
        assert sum(int(limit[2:]) // 2 < n <= int(limit[2:]) for n in tokens) == count
    assert facts["dropped"] == {"bad_record": 1, "duplicate": 1, "missing_field": 1}


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


def test_a_command_that_ends_early_is_never_aborted_by_a_native_thread(dataset: Dataset) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: inspect(dataset.directory, "--document", "1"), range(20)))
    assert [done.returncode for done in runs] == [2] * 20, {done.stderr for done in runs}


def test_a_mistake_is_one_line(dataset: Dataset, tmp_path: Path) -> None:
    done = inspect(str(tmp_path))
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}: not a dataset: it has no manifest.json\n")
