"""Killed processes, full disks, damaged and changed files: the dataset is the same, without leftovers."""

import contextlib
import json
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.dataset import open_dataset
from gru.corpus.prepare import prepare
from gru.errors import UserError
from tests.gru.corpus.reading import write
from tests.waiting import wait_until

ROOT = Path(__file__).parents[3]
BYTES = TokenizerConfig(kind="byte")

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("ray_local")]


def silent(_: str) -> None: ...


def files(directory: str | Path) -> dict[str, bytes]:
    """Return the files of a complete dataset without the job's own, and assert that no other file is there."""
    dataset = open_dataset(str(directory))
    dataset.verify()
    found = {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name != "result.json"}
    assert set(found) == {"manifest.json", "tokenizer.json", *(shard.name for shard in dataset.manifest.shards)}
    return found


def lines(count: int, rng: random.Random) -> bytes:
    """JSON Lines with 10 % repeated and some that are bad."""
    records: list[bytes] = []
    words = ["黃河", "入海流", "the", "river", "😀", "return", "if x:\n    y", "\x00"]
    for i in range(count):
        text = f"{i} " + " ".join(rng.choices(words, k=rng.randrange(1, 120)))
        again = records and rng.random() < 0.1
        records.append(rng.choice(records) if again else json.dumps({"text": text}).encode() + b"\n")
        if rng.random() < 0.01:
            records.append(b"{ bad\n")
    return b"".join(records)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    """Some 30 partitions."""
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_bytes(lines(12_000, random.Random(0)))
    size = path.stat().st_size // 30
    return CorpusConfig(sources=[str(path)], partition_bytes=size, segment_tokens=5000, heldout_share=0.05)


BPE = TokenizerConfig(kind="bpe", vocab_size=400, sample_bytes=200_000)


@pytest.fixture(scope="module")
def undisturbed(corpus: CorpusConfig, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("undisturbed")
    prepare(corpus, BPE, str(directory), silent)
    return files(directory)


def ray_address() -> str:
    """Return the address of the session's running Ray."""
    return ray.get_runtime_context().gcs_address


@dataclass
class Job:
    """A run of `python -m jobs.prepare` with its own storage."""

    directory: Path
    corpus: CorpusConfig
    ray_address: str | None = None  # address of the Ray to join; None: the job starts its own
    process: subprocess.Popen[bytes] | None = None

    @property
    def dataset(self) -> Path:
        [manifest] = self.directory.glob("store/datasets/*")
        return manifest

    @property
    def stderr(self) -> str:
        return (self.directory / "err.txt").read_text()

    def start(self) -> subprocess.Popen[bytes]:
        corpus = self.corpus.model_dump(exclude_none=True)
        config = {
            "storage": str(self.directory / "store"),
            "corpus": corpus,
            "tokenizer": BPE.model_dump(exclude_none=True),
        }
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_ADDRESS", "MLFLOW_TRACKING"))}
        if self.ray_address:
            environment["RAY_ADDRESS"] = self.ray_address
        with (self.directory / "out.txt").open("wb") as out, (self.directory / "err.txt").open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.prepare", json.dumps(config)],
                cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
        return self.process

    def finish(self) -> dict[str, Any]:
        process = self.process or self.start()
        assert process.wait(180) == 0, self.stderr
        return json.loads((self.directory / "out.txt").read_text().splitlines()[-1])

    def wait_for(self, line: str) -> None:
        """Wait until the text is on stderr."""
        assert self.process is not None

        def said() -> bool:
            assert self.process is not None and self.process.poll() is None, self.stderr
            return line in self.stderr

        wait_until(f"{line!r} in {self.stderr}", said, every=0.002)

    def kill(self) -> None:
        """Kill the driver only."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def kill_everything(self) -> None:
        """Kill the driver and all its descendants, including Ray's own processes."""
        assert self.process is not None
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait()
        self.process = None
        psutil.wait_procs(family, timeout=20)

    def drafts(self) -> dict[str, int]:
        """Return the finished partitions, and when each was finished."""
        found = self.directory.glob("store/datasets/*/parts/draft-*.json")
        return {path.name: path.stat().st_mtime_ns for path in found}


def test_the_task_of_a_killed_worker_is_retried(
    corpus: CorpusConfig, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_three() -> None:
        workers = [p for p in psutil.Process().children(recursive=True) if "raylet" in p.name()]
        while len(killed) < 3 and not (tmp_path / "manifest.json").exists():
            for worker in [child for raylet in workers for child in raylet.children()]:
                with contextlib.suppress(psutil.Error):
                    if any(file.path.startswith(str(tmp_path / "parts")) for file in worker.open_files()):
                        worker.kill()
                        killed.append(worker.pid)
                        time.sleep(0.2)
                        break

    killer = threading.Thread(target=kill_three)
    killer.start()
    prepare(corpus, BPE, str(tmp_path), silent)
    killer.join()
    assert killed
    assert files(tmp_path) == undisturbed


def test_the_driver_is_killed_and_started_again_at_once(
    corpus: CorpusConfig, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    job = Job(tmp_path, corpus)
    job.start()
    job.wait_for("8/")
    job.kill()  # what it left of Ray goes by itself, in its own time
    finished = job.drafts()
    job.ray_address = ray_address()
    job.start()
    assert json.loads(undisturbed["manifest.json"])["digest"] == job.finish()["digest"]
    made = [line for line in job.stderr.splitlines() if "partitions, " in line and "documents" in line]
    assert int(made[0].split()[1].split("/")[0]) > len(finished) >= 8
    assert files(job.dataset) == undisturbed


@pytest.mark.parametrize("moments", [2, pytest.param(5, marks=pytest.mark.chaos)])
def test_everything_is_killed_at_random_moments(
    corpus: CorpusConfig, undisturbed: dict[str, bytes], tmp_path: Path, moments: int
) -> None:
    rng = random.Random(4)
    job = Job(tmp_path, corpus)
    said = ["training a bpe tokenizer", *(f" {rng.randrange(first, first + 6)}/" for first in (2, 10, 18))]
    said += ["looking for duplicates"]
    before: dict[str, int] = {}
    for moment in said if moments == len(said) else sorted(rng.sample(said[1:], moments), key=said.index):
        job.start()
        job.wait_for(moment)
        time.sleep(rng.random() * 0.2)
        job.kill_everything()
        now = job.drafts()
        assert before.items() <= now.items(), "what was finished is made again"
        before = now
        assert not list(tmp_path.glob("store/datasets/*/manifest.json"))
    assert len(before) >= 10
    job.ray_address = ray_address()
    assert json.loads(undisturbed["manifest.json"])["digest"] == job.finish()["digest"]
    assert files(job.dataset) == undisturbed


def test_two_jobs_of_one_config_at_once(corpus: CorpusConfig, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    (tmp_path / "store").mkdir()
    for name in ("1", "2"):
        (tmp_path / name / "store").symlink_to(tmp_path / "store")
    jobs = [Job(tmp_path / name, corpus, ray_address()) for name in ("1", "2")]
    for job in jobs:
        job.start()
    digests = {job.finish()["digest"] for job in jobs}
    assert digests == {json.loads(undisturbed["manifest.json"])["digest"]}
    [directory] = (tmp_path / "store" / "datasets").iterdir()
    assert files(directory) == undisturbed


SCRIPT = """
import os, resource, sys
from pathlib import Path
import ray
from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.prepare import prepare
from gru.errors import UserError

def limit():
    if size := int(os.environ.get("LIMIT", 0)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

corpus, tokenizer = CorpusConfig.model_validate_json(sys.argv[1]), TokenizerConfig.model_validate_json(sys.argv[2])
ray.init(address="local", num_cpus=int(sys.argv[4]), include_dashboard=False, log_to_driver=False,
         runtime_env={"worker_process_setup_hook": limit})
try:
    prepare(corpus, tokenizer, sys.argv[3], lambda message: None)
except UserError as error:
    print(error)
"""


def run(corpus: CorpusConfig, directory: Path, cpus: int, limit: int = 0) -> str:
    """Prepare with a Ray of that many CPUs, whose workers write no larger files than `limit`; what went wrong."""
    arguments = [corpus.model_dump_json(), BPE.model_dump_json(), str(directory), str(cpus)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments],
        cwd=ROOT, env={**os.environ, "LIMIT": str(limit)}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("cpus", [1, 8, pytest.param(2, marks=pytest.mark.chaos)])
def test_any_number_of_workers_makes_the_same_bytes(
    corpus: CorpusConfig, undisturbed: dict[str, bytes], tmp_path: Path, cpus: int
) -> None:
    assert run(corpus, tmp_path / "d", cpus) == ""
    assert files(tmp_path / "d") == undisturbed


def test_a_full_disk_is_reported_in_one_line_and_finished_work_is_kept(tmp_path: Path) -> None:
    rng = random.Random(5)
    for i in range(16):  # of every second one the shard is too large
        texts = [f"{i} {j} {rng.getrandbits(500):x}" if i % 2 else f"{i} {j} {'x' * 120}" for j in range(1500)]
        write(tmp_path / "c" / f"{i:02}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    corpus = CorpusConfig(sources=[str(tmp_path / "c")], partition_bytes=250_000, segment_tokens=5000)
    prepare(corpus, BPE, str(tmp_path / "undisturbed"), silent)
    parts = tmp_path / "d" / "parts"
    for cpus in (1, 2):
        [said] = run(corpus, tmp_path / "d", cpus, limit=100_000).splitlines()
        assert said.startswith("storage: cannot write shards: File too large; finished work is kept: free some")
        assert cpus > 1 or not list((tmp_path / "d").rglob("*.tmp"))  # of two tasks, Ray kills the one that goes on
    finished = len(list(parts.glob("draft-*.json")))
    assert 1 <= finished <= 8
    assert not list((tmp_path / "d").glob("*.parquet"))
    stale, young = (parts / f".train-00001.parquet.{digit * 32}.tmp" for digit in "01")
    for path in (stale, young):
        path.write_bytes(b"of a task that was killed")
    os.utime(stale, (time.time() - 4000,) * 2)
    seen: list[str] = []

    def show(message: str) -> None:
        assert (stale.exists(), young.exists()) == (False, True)
        seen.append(message)

    prepare(corpus, BPE, str(tmp_path / "d"), show)
    assert [message.split()[0] for message in seen if " partitions, " in message] == [
        f"{i}/16" for i in range(finished + 1, 17)
    ]
    assert files(tmp_path / "d") == files(tmp_path / "undisturbed")


def test_a_file_that_changes_between_two_tries_is_read_again(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", lines(300, random.Random(1))))
    corpus = CorpusConfig(sources=[str(path)], partition_bytes=8000, heldout_share=0.1)

    def change(message: str) -> None:
        if message.startswith("training") and not changed:
            path.write_bytes(path.read_bytes().replace(b"river", b"RIVER"))
            changed.append(1)

    changed: list[int] = []
    with pytest.raises(UserError, match=r"a.jsonl: changed while it was read; run the same command again") as caught:
        prepare(corpus, BYTES, str(tmp_path / "d"), change)
    assert "\n" not in str(caught.value)
    again = prepare(corpus, BYTES, str(tmp_path / "d"), silent)
    other = prepare(corpus, BYTES, str(tmp_path / "other"), silent)
    assert files(tmp_path / "d") == files(tmp_path / "other")
    assert again.manifest == other.manifest
    assert not any("river" in text for text in again.texts("train"))


def test_damaged_and_empty_files_cost_only_their_own_documents(tmp_path: Path) -> None:
    import gzip

    import pyarrow as pa

    data = lines(3000, random.Random(2))
    write(tmp_path / "c" / "a.jsonl.gz", gzip.compress(data)[:-5000])
    write(tmp_path / "c" / "b.jsonl.zst", pa.compress(data[::-1] + data, "zstd", asbytes=True)[:-50])
    write(tmp_path / "c" / "c.txt", b"")
    write(tmp_path / "c" / "d.parquet", b"PAR1 and nothing more PAR1")
    write(tmp_path / "c" / "e.txt", "whole\r\n\x00😀".encode())
    corpus = CorpusConfig(sources=[str(tmp_path / "c")], heldout_share=0.1)
    dataset = prepare(corpus, BYTES, str(tmp_path / "d"), silent)
    assert dataset.manifest.dropped["unreadable"] == 3
    assert "whole\r\n\x00😀" in [*dataset.texts("train"), *dataset.texts("heldout")]
    assert dataset.manifest.counts.documents > 2000
    files(tmp_path / "d")
    for name in ("a.jsonl.gz", "b.jsonl.zst", "d.parquet"):
        alone = CorpusConfig(sources=[str(tmp_path / "c" / name)], on_bad="fail")
        with pytest.raises(UserError, match=f"{name}: ") as caught:
            prepare(alone, BYTES, str(tmp_path / name), silent)
        assert "\n" not in str(caught.value)


def test_a_hundred_thousand_tiny_files(tmp_path: Path) -> None:
    folders = [tmp_path / "c" / f"{i:03}" for i in range(100)]
    for folder in folders:
        folder.mkdir(parents=True)
        for i in range(1000):
            (folder / f"{i:03}.txt").write_bytes(b"%s %d" % (folder.name.encode(), i))
    corpus = CorpusConfig(sources=[str(tmp_path / "c")], partition_bytes=100_000)
    dataset = prepare(corpus, BYTES, str(tmp_path / "d"), silent)
    manifest = dataset.manifest
    assert manifest.counts.documents == len(manifest.sources) == 100_000
    assert manifest.sources[1001].name == "001/001.txt"
    first = dataset.texts("train")
    assert [next(first) for _ in range(3)] == [f"000 {i}" for i in range(3)]
    files(tmp_path / "d")


def test_one_document_of_200_megabytes_and_one_of_20_repeated(tmp_path: Path) -> None:
    text = "".join(f"{i} 黃河入海流 " for i in range(20_000))
    large, medium = (text * (size // len(text.encode())) for size in (200_000_000, 20_000_000))
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("short", large, medium, medium, "last")]
    path = write(tmp_path / "a.jsonl", "\n".join(lines).encode())
    corpus = CorpusConfig(sources=[path], heldout="tail", heldout_share=0.5)
    dataset = prepare(corpus, BPE, str(tmp_path / "d"), silent)
    found = [*dataset.texts("train"), *dataset.texts("heldout")]
    assert [len(document) for document in found] == [5, len(large), len(medium), 4]
    assert found[1] == large and found[2] == medium
    assert dataset.manifest.dropped == {"duplicate": 1}
    files(tmp_path / "d")
