import gzip
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.dataset import Dataset, open_dataset
from gru.corpus.documents import document_hash
from gru.corpus.prepare import dataset_key, prepare
from gru.errors import UserError
from tests.gru.corpus.reading import write

pytestmark = pytest.mark.usefixtures("ray_local")

BYTES = TokenizerConfig(kind="byte")


def silent(_: str) -> None: ...


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def files(dataset: Dataset) -> dict[str, bytes]:
    """Return the files of a finished dataset, and assert that no other file is there."""
    found = {path.name: path.read_bytes() for path in Path(dataset.directory).iterdir()}
    assert set(found) == {"manifest.json", "tokenizer.json", *(shard.name for shard in dataset.manifest.shards)}
    dataset.verify()
    return found


def shards(dataset: Dataset) -> dict[str, bytes]:
    return {name: data for name, data in files(dataset).items() if name != "manifest.json"}


def kept(dataset: Dataset) -> list[str]:
    return [*dataset.texts("train"), *dataset.texts("heldout")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    """400 texts, short and long, in some nine partitions."""
    path = tmp_path_factory.mktemp("corpus") / "poems.jsonl"
    path.write_bytes(json_lines([f"poem {i} 黃河\n" + "入海流。😀 " * (i % 17) ** 2 for i in range(400)]))
    return CorpusConfig(sources=[str(path)], partition_bytes=40_000, segment_tokens=1000, heldout_share=0.1)


@pytest.fixture(scope="module")
def dataset(corpus: CorpusConfig, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Dataset:
    return prepare(corpus, BYTES, str(tmp_path_factory.mktemp("store") / "d"), silent)


def test_dataset_holds_the_corpus(corpus: CorpusConfig, dataset: Dataset) -> None:
    texts = [json.loads(line)["text"] for line in Path(corpus.sources[0]).read_text().split("\n")[:-1]]
    manifest = dataset.manifest

    def is_heldout(text: str) -> bool:
        return document_hash(text.encode()) / 2**64 < 0.1

    assert list(dataset.texts("train")) == [text for text in texts if not is_heldout(text)]
    assert list(dataset.texts("heldout")) == [text for text in texts if is_heldout(text)]
    size = sum(len(text.encode()) for text in texts)
    assert (manifest.counts.documents, manifest.counts.bytes, manifest.counts.tokens) == (400, size, size + 400)
    assert manifest.counts.characters == sum(map(len, texts))
    assert manifest.heldout.documents == sum(map(is_heldout, texts))
    assert len({shard.name for shard in manifest.shards}) > 5
    assert manifest.sources[0].name == "poems.jsonl"
    assert not manifest.dropped and not manifest.replaced and not manifest.examples
    files(dataset)


def test_a_dataset_has_its_own_digest_wherever_the_sources_lie(
    corpus: CorpusConfig, dataset: Dataset, tmp_path: Path
) -> None:
    moved = corpus.model_copy(update={"sources": [shutil.copy(corpus.sources[0], tmp_path)]})
    again = prepare(moved, BYTES, str(tmp_path / "d"), silent)
    assert again.manifest.digest == dataset.manifest.digest
    assert dataset_key(moved, BYTES) != dataset_key(corpus, BYTES)
    assert shards(again) == shards(dataset)


def test_the_held_out_digest_depends_on_held_out_text_only(
    corpus: CorpusConfig, dataset: Dataset, tmp_path: Path
) -> None:
    other = corpus.model_copy(update={"partition_bytes": 10**6})
    char = prepare(other, TokenizerConfig(kind="char"), str(tmp_path / "char"), silent)
    assert char.manifest.digest != dataset.manifest.digest
    assert char.manifest.heldout_digest == dataset.manifest.heldout_digest
    assert list(char.texts("heldout")) == list(dataset.texts("heldout"))
    more = corpus.model_copy(update={"heldout_share": 0.2})
    heldout_digest = prepare(more, BYTES, str(tmp_path / "more"), silent).manifest.heldout_digest
    assert heldout_digest != dataset.manifest.heldout_digest


def test_bpe_is_trained_on_the_corpus_and_tail_is_held_out(tmp_path: Path) -> None:
    lines = [f"    return self.value + {i}\n" for i in range(5000)]
    corpus = CorpusConfig(
        sources=[write(tmp_path / "code.py", "".join(lines).encode())],
        heldout="tail",
        heldout_share=0.1,
        partition_bytes=30_000,
    )
    config = TokenizerConfig(kind="bpe", vocab_size=300, sample_bytes=20_000)
    dataset = prepare(corpus, config, str(tmp_path / "d"), silent)
    train, heldout = ("".join(dataset.texts(split)) for split in ("train", "heldout"))
    assert train + heldout == "".join(lines)
    assert 0.09 < len(heldout) / len(train + heldout) < 0.11
    assert dataset.manifest.vocab_size == 300
    assert dataset.manifest.counts.tokens < dataset.manifest.counts.bytes / 3
    given = TokenizerConfig(path=f"{dataset.directory}/tokenizer.json")
    again = prepare(corpus, given, str(tmp_path / "again"), silent)
    assert again.manifest.tokenizer_digest == dataset.manifest.tokenizer_digest
    assert shards(again) == shards(dataset)


# Duplicates


def repetitive(count: int) -> list[str]:
    rng = random.Random(2)
    different = [f"text {i} " + "黃河 " * (i % 40) for i in range(count // 2)]
    return different[: count // 3] + rng.choices(different, k=count - count // 3)


@pytest.mark.parametrize("heldout", ["hash", "tail"])
def test_the_first_of_equal_documents_stays_whatever_the_partitions(tmp_path: Path, heldout: str) -> None:
    texts = repetitive(600)
    third = len(texts) // 3
    for i in range(3):
        write(tmp_path / "corpus" / f"{i}.jsonl", json_lines(texts[i * third : (i + 1) * third]))
    base = CorpusConfig(sources=[str(tmp_path / "corpus")], heldout=heldout, heldout_share=0.2, segment_tokens=500)
    expected = list(dict.fromkeys(texts))
    heldout_digests = set()
    for size in (5000, 30_000, 10**6):
        corpus = base.model_copy(update={"partition_bytes": size})
        dataset = prepare(corpus, BYTES, str(tmp_path / f"{size}"), silent)
        files(dataset)
        found = kept(dataset)
        if heldout == "tail":
            assert found == expected
        else:
            train = list(dataset.texts("train"))
            assert train == [text for text in expected if text in train]
            assert sorted(found) == sorted(expected)
            heldout_digests.add(dataset.manifest.heldout_digest)
        manifest = dataset.manifest
        assert manifest.dropped == {"duplicate": len(texts) - len(expected)}
        assert manifest.counts.documents == len(expected)
        assert manifest.counts.bytes == sum(len(text.encode()) for text in expected)
        assert manifest.counts.characters == sum(map(len, expected))
        assert manifest.counts.tokens == manifest.counts.bytes + len(expected)
        assert sum(sum(shard.lengths) for shard in manifest.shards) == len(expected)
        first = {text: index // third for index, text in reversed(list(enumerate(texts)))}
        rows = [
            row for shard in manifest.shards for row in pq.read_table(f"{dataset.directory}/{shard.name}").to_pylist()
        ]
        origins = {row["document"]: row["source"] for row in rows}
        assert all(origins[document_hash(text.encode())] == f"{first[text]}.jsonl" for text in expected)
    assert len(heldout_digests) <= 1


def test_all_equal_documents_may_be_kept(tmp_path: Path) -> None:
    texts = repetitive(300)
    path = write(tmp_path / "a.jsonl", json_lines(texts))
    corpus = CorpusConfig(sources=[path], deduplicate="none", heldout="tail", heldout_share=0.2, partition_bytes=3000)
    dataset = prepare(corpus, BYTES, str(tmp_path / "d"), silent)
    assert kept(dataset) == texts and not dataset.manifest.dropped
    files(dataset)


def test_near_duplicates_are_left_out_and_counted_apart(tmp_path: Path) -> None:
    rng = random.Random(0)

    def text() -> str:
        return " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(100))

    originals = [text() for _ in range(60)]
    changed = [original.replace(" ", " and ", 1) for original in originals[:20]]
    given = originals + originals[:10] + changed
    path = write(tmp_path / "a.jsonl", json_lines(given))
    for size in (4000, 10**6):
        corpus = CorpusConfig(sources=[path], deduplicate="near", heldout_share=0.3, partition_bytes=size)
        dataset = prepare(corpus, BYTES, str(tmp_path / f"{size}"), silent)
        files(dataset)
        assert sorted(kept(dataset)) == sorted(originals)
        assert dataset.manifest.dropped == {"duplicate": 10, "near_duplicate": 20}
    exact = corpus.model_copy(update={"deduplicate": "exact"})
    assert sorted(kept(prepare(exact, BYTES, str(tmp_path / "exact"), silent))) == sorted(originals + changed)


def test_partitions_without_a_document_do_no_harm(tmp_path: Path) -> None:
    texts = ["x" * 50_000, *(f"short {i}" for i in range(50)), "y" * 30_000, "x" * 50_000]
    path = write(tmp_path / "a.jsonl", json_lines(texts))
    for deduplicate in ("exact", "near"):
        corpus = CorpusConfig(sources=[path], deduplicate=deduplicate, partition_bytes=4000, heldout_share=0.3)
        dataset = prepare(corpus, BYTES, str(tmp_path / deduplicate), silent)
        files(dataset)
        assert dataset.manifest.dropped["duplicate"] == 1
    exact = open_dataset(str(tmp_path / "exact"))
    assert sorted(kept(exact)) == sorted(texts[:-1])


# Documents left out


def test_every_document_is_kept_or_dropped_with_a_reason(tmp_path: Path) -> None:
    rng = random.Random(3)
    bad = {
        "invalid_utf8": b'{"text": "\xff"}',
        "bad_record": b"{",
        "missing_field": b'{"title": "x"}',
        "empty": b'{"text": ""}',
        "too_short": b'{"text": "x"}',
        "too_long": b'{"text": "' + b"x" * 200 + b'"}',
        "duplicate": b'{"text": "first of all"}',
    }
    lines = [json.dumps({"text": f"number {i} 黃"}).encode() for i in range(600)] + rng.choices([*bad.values()], k=300)
    rng.shuffle(lines)
    lines.insert(0, bad["duplicate"])
    write(tmp_path / "c" / "a.jsonl", b"\n".join(lines))
    write(tmp_path / "c" / "b.jsonl.gz", gzip.compress(json_lines([f"packed {i}" for i in range(9999)]))[:20_000])
    write(tmp_path / "c" / "c.txt", b"")
    pq.write_table(pa.table({"title": ["a", "b"]}), tmp_path / "c" / "d.parquet")
    expected = Counter(reason for line in lines[1:] for reason, value in bad.items() if line == value)
    expected += Counter({"unreadable": 1, "empty": 1, "missing_field": 2})
    settings = {"min_characters": 2, "max_characters": 150, "heldout_share": 0.1, "partition_bytes": 3000}
    corpus = CorpusConfig(sources=[str(tmp_path / "c")], **settings)
    manifest = prepare(corpus, BYTES, str(tmp_path / "d"), silent).manifest
    assert manifest.dropped == expected
    texts = kept(open_dataset(str(tmp_path / "d")))
    packed = sum(text.startswith("packed") for text in texts)
    assert packed > 1000
    assert manifest.counts.documents == len(texts) == 601 + packed
    assert set(manifest.examples) == {"invalid_utf8", "bad_record", "missing_field", "unreadable"}
    for reason, found in manifest.examples.items():
        assert len(found) == min(20, expected[reason]) or (reason == "missing_field" and 1 <= len(found) <= 20)
        assert all(example.startswith(("a.jsonl: ", "b.jsonl.gz: ", "d.parquet: ")) for example in found)
    assert all("not valid UTF-8 at byte " in example for example in manifest.examples["invalid_utf8"])
    assert [source.name for source in manifest.sources] == ["a.jsonl", "b.jsonl.gz", "c.txt", "d.parquet"]

    replaced = corpus.model_copy(update={"on_bad": "replace"})
    manifest = prepare(replaced, BYTES, str(tmp_path / "replaced"), silent).manifest
    # The text is one replacement character, and so too short.
    assert manifest.replaced == expected["invalid_utf8"]
    assert manifest.dropped == expected - Counter(invalid_utf8=10**6) + Counter(too_short=expected["invalid_utf8"])


def test_a_bad_record_stops_the_run_and_what_is_finished_is_kept(
    corpus: CorpusConfig, dataset: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "poems.jsonl"
    good = Path(corpus.sources[0]).read_bytes()
    lines = good.split(b"\n")
    lines[200] = b"x" * len(lines[200])
    path.write_bytes(b"\n".join(lines))
    failing = corpus.model_copy(update={"sources": [str(path)], "on_bad": "fail"})
    directory = tmp_path / "d"
    partitions = len({int(shard.name[-13:-8]) for shard in dataset.manifest.shards})
    finished: set[Path] = set()
    for _ in range(partitions):
        seen: list[str] = []
        with pytest.raises(UserError, match=r"poems.jsonl: the line at byte \d+ is not valid JSON") as caught:
            prepare(failing, BYTES, str(directory), seen.append)
        assert "\n" not in str(caught.value)
        made = [line for line in seen if "partitions, " in line and "documents" in line]
        assert seen[-1].startswith(f"stopping; {len(finished) + len(made)} of {partitions} partitions are finished")
        now = set((directory / "parts").glob("draft-*.json"))
        assert finished <= now  # nothing of it is made again
        finished = now
    assert not (directory / "manifest.json").exists()


# User mistakes


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (b"", {}, r"corpus\.sources: no document to train on in .*a.jsonl$"),
        (b'{"title": "x"}\n' * 3, {}, "no document to train on in .*; 3 dropped: missing_field"),
        (b'{"text": "x"}\n' * 3, {"min_characters": 2}, "no document to train on in .*; 3 dropped: too_short"),
        (b"{\n", {}, "no document to train on in .*; 1 dropped: bad_record; a.jsonl: the line at byte 0 is not valid"),
        (b'{"text": "x"}\n', {}, r"corpus\.heldout_share = 0.01: of 1 document, none is held out"),
        (
            b'{"text": "x"}\n' * 3,
            {"deduplicate": "exact"},
            r"corpus\.heldout_share = 0.01: of 1 document, none is held",
        ),
        (b'{"text": "x"}\n' * 900 + b"{", {"on_bad": "fail"}, "a.jsonl: the line at byte 12600 is not valid JSON"),
        (b'{"text": "x"}\n', {"template": "{"}, r"corpus\.template"),
    ],
)
def test_a_user_mistake_reaches_the_caller(tmp_path: Path, data: bytes, changes: dict[str, Any], message: str) -> None:
    corpus = CorpusConfig(sources=[write(tmp_path / "a.jsonl", data)], **changes)
    with pytest.raises(UserError, match=message):
        prepare(corpus, BYTES, str(tmp_path / "d"), silent)
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_a_bad_file_is_reported_while_the_tokenizer_is_made(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"abc\xff")
    corpus = CorpusConfig(sources=[str(tmp_path)], on_bad="fail")
    with pytest.raises(UserError, match=r"a.txt: not valid UTF-8 at byte 3"):
        prepare(corpus, TokenizerConfig(), str(tmp_path / "d"), silent)


# Stopped and started again


def test_preparing_resumes_where_it_stopped(corpus: CorpusConfig, dataset: Dataset, tmp_path: Path) -> None:
    directory = tmp_path / "d"
    seen: list[str] = []

    def stop_at_three(message: str) -> None:
        seen.append(message)
        if message.startswith("3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, BYTES, str(directory), stop_at_three)
    assert not (directory / "manifest.json").exists()
    with pytest.raises(UserError, match=r"not a dataset"):
        open_dataset(str(directory))
    markers = sorted((directory / "parts").glob("draft-*.json"))
    assert len(markers) >= 3
    markers[0].unlink()
    stale = json.loads(markers[1].read_text()) | {"key": "of another plan"}
    stale["part"]["shards"] = []
    markers[1].write_text(json.dumps(stale))
    number = "0" * 32
    for name in ("train-00000.parquet", "train-99999.parquet", f".train-00001.parquet.{number}.tmp"):
        (directory / name).write_bytes(b"half a fi")
        (directory / "parts" / name).write_bytes(b"half")
    (directory / f".manifest.json.{number}.tmp").write_bytes(b"{")
    (directory / "result.json").write_bytes(b"not of this")
    left = len(markers) - 2
    seen.clear()
    again = prepare(corpus, BYTES, str(directory), seen.append)
    (directory / "result.json").unlink()
    assert files(again) == files(dataset)
    made = [message for message in seen if "partitions, " in message and "documents" in message]
    assert made[0].startswith(f"{left + 1}/")
    # Once it is whole, nothing is made again; what a kill at the last moment left is cleared away.
    shutil.copytree(directory, directory / "parts")
    seen.clear()
    assert prepare(corpus, BYTES, str(directory), seen.append).manifest == dataset.manifest
    assert not seen
    assert files(again) == files(dataset)


def test_stopped_anywhere_the_result_is_the_same(tmp_path: Path) -> None:
    texts = repetitive(500)
    path = write(tmp_path / "a.jsonl", json_lines(texts))
    corpus = CorpusConfig(sources=[path], partition_bytes=6000, heldout_share=0.2, segment_tokens=500)
    config = TokenizerConfig(kind="bpe", vocab_size=280)
    undisturbed = files(prepare(corpus, config, str(tmp_path / "undisturbed"), silent))
    directory = str(tmp_path / "d")
    seen: set[str] = set()

    def stop_at_what_is_new(message: str) -> None:
        step = message.lstrip("0123456789/").split(",")[0]
        if step not in seen:
            seen.add(step)
            raise KeyboardInterrupt

    for _ in range(10):
        try:
            dataset = prepare(corpus, config, directory, stop_at_what_is_new)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "d" / "manifest.json").exists()
    assert len(seen) == 5  # the plan, the tokenizer, drafts, duplicates, partitions without them
    assert files(dataset) == undisturbed


def test_two_processes_at_once_prepare_one_dataset(corpus: CorpusConfig, dataset: Dataset, tmp_path: Path) -> None:
    @ray.remote(num_cpus=1)
    def run() -> str:
        return prepare(corpus, BYTES, str(tmp_path / "d"), silent).manifest.digest

    assert ray.get([run.remote(), run.remote()]) == [dataset.manifest.digest] * 2
    assert files(open_dataset(str(tmp_path / "d"))) == files(dataset)
