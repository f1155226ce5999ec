import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus import shards, sources
from gru.corpus.shards import Dataset, dataset_key, open_dataset, prepare
from gru.errors import UserError

pytestmark = pytest.mark.usefixtures("ray_local")

BYTES = TokenizerConfig(kind="byte")


def silent(_: str) -> None: ...


def records(count: int, path: Path) -> list[str]:
    """Write JSON Lines of short and long texts, and return the texts."""
    texts = [f"poem {i} 黃河\n" + "入海流。😀 " * (i % 17) ** 2 for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    path = tmp_path_factory.mktemp("corpus") / "poems.jsonl"
    records(400, path)
    return CorpusConfig(sources=[str(path)], partition_bytes=40_000, segment_tokens=1000, heldout_share=0.1)


@pytest.fixture(scope="module")
def dataset(corpus: CorpusConfig, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Dataset:
    return prepare(corpus, BYTES, str(tmp_path_factory.mktemp("store") / "d"), silent)


def test_dataset_holds_the_corpus(corpus: CorpusConfig, dataset: Dataset) -> None:
    (file,) = sources.list_files(corpus)
    texts = [json.loads(line)["text"] for line in Path(file.path).read_text().split("\n")[:-1]]
    manifest = dataset.manifest

    def is_heldout(text: str) -> bool:
        return sources.document_hash(text.encode()) / 2**64 < 0.1

    assert list(dataset.texts("train")) == [text for text in texts if not is_heldout(text)]
    assert list(dataset.texts("heldout")) == [text for text in texts if is_heldout(text)]
    size = sum(len(text.encode()) for text in texts)
    assert (manifest.documents, manifest.bytes, manifest.tokens) == (400, size, size + 400)
    assert manifest.characters == sum(map(len, texts))
    assert manifest.heldout.documents == sum(map(is_heldout, texts))
    assert len({shard.name for shard in manifest.shards}) > 5
    assert manifest.sources[0].name == "poems.jsonl"
    dataset.verify()
    assert sorted(path.name for path in Path(dataset.directory).iterdir()) == sorted(
        ["manifest.json", "tokenizer.json", *(shard.name for shard in manifest.shards)]
    )


def test_segments_are_row_groups_of_about_segment_tokens(corpus: CorpusConfig, dataset: Dataset) -> None:
    segments = dataset.segments("train")
    assert sum(segment.tokens for segment in segments) == dataset.manifest.train.tokens
    last = {segment.shard: segment for segment in segments}
    for segment in segments:
        tokens = dataset.read_segment(segment)
        assert len(tokens) == segment.tokens < 2 * corpus.segment_tokens
        assert segment.tokens >= corpus.segment_tokens or segment is last[segment.shard]
    shard = dataset.manifest.shards[0]
    table = pq.read_table(Path(dataset.directory) / shard.name)
    assert [str(field.type) for field in table.schema] == ["uint64", "string", "list<element: uint16>"]
    rows = table.to_pylist()
    assert len(rows) > len({row["document"] for row in rows})  # long documents have several rows
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        goes_on = after is not None and after["document"] == row["document"]
        assert (row["tokens"][-1] == dataset.manifest.end_of_text) != goes_on


def test_digest_is_the_same_in_any_place_and_with_any_number_of_workers(
    corpus: CorpusConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copy(corpus.sources[0], tmp_path)
    other = corpus.model_copy(update={"sources": [moved]})
    many = ray.data.from_items
    monkeypatch.setattr(ray.data, "from_items", lambda items, override_num_blocks: many(items, override_num_blocks=1))
    again = prepare(other, BYTES, str(tmp_path / "d"), silent)
    assert again.manifest.digest == dataset.manifest.digest
    assert dataset_key(other, BYTES) != dataset_key(corpus, BYTES)
    for shard in dataset.manifest.shards:
        assert (tmp_path / "d" / shard.name).read_bytes() == (Path(dataset.directory) / shard.name).read_bytes()


def test_preparing_goes_on_where_it_was_killed(
    corpus: CorpusConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "d"
    seen: list[str] = []

    def stop_at_three(message: str) -> None:
        seen.append(message)
        if message.startswith("3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, BYTES, str(directory), stop_at_three)
    assert not (directory / "manifest.json").exists()
    with pytest.raises(UserError, match=r"no dataset here"):
        open_dataset(str(directory))
    markers = sorted((directory / "parts").glob("0*.json"))
    assert len(markers) >= 3
    markers[0].unlink()
    stale = json.loads(markers[1].read_text()) | {"key": "of another plan", "shards": []}
    markers[1].write_text(json.dumps(stale))
    (directory / "train-00000.parquet").write_bytes(b"half a fi")
    (directory / "parts" / ".train-00001.parquet.abc").write_bytes(b"half")
    left = len(markers) - 2
    seen.clear()
    again = prepare(corpus, BYTES, str(directory), seen.append)
    assert again.manifest == dataset.manifest
    again.verify()
    assert not (directory / "parts").exists()
    made = [message for message in seen if "partitions" in message]
    assert made[0].startswith(f"{left + 1}/")
    # And once it is whole, nothing is made again.
    seen.clear()
    assert prepare(corpus, BYTES, str(directory), seen.append).manifest == dataset.manifest
    assert not seen


def test_two_at_once_make_one_dataset(corpus: CorpusConfig, dataset: Dataset, tmp_path: Path) -> None:
    @ray.remote(num_cpus=1)
    def run() -> str:
        return prepare(corpus, BYTES, str(tmp_path / "d"), silent).manifest.digest

    assert ray.get([run.remote(), run.remote()]) == [dataset.manifest.digest] * 2
    open_dataset(str(tmp_path / "d")).verify()


def test_the_held_out_digest_knows_the_same_text(corpus: CorpusConfig, dataset: Dataset, tmp_path: Path) -> None:
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
    (tmp_path / "code.py").write_text("".join(lines))
    corpus = CorpusConfig(
        sources=[str(tmp_path / "code.py")], heldout="tail", heldout_share=0.1, partition_bytes=30_000
    )
    config = TokenizerConfig(kind="bpe", vocab_size=300, sample_bytes=20_000)
    dataset = prepare(corpus, config, str(tmp_path / "d"), silent)
    train, heldout = ("".join(dataset.texts(split)) for split in ("train", "heldout"))
    assert train + heldout == "".join(lines)
    assert 0.09 < len(heldout) / len(train + heldout) < 0.11
    assert dataset.manifest.vocab_size == 300
    assert dataset.manifest.tokens < dataset.manifest.bytes / 3
    given = TokenizerConfig(path=f"{dataset.directory}/tokenizer.json")
    again = prepare(corpus, given, str(tmp_path / "again"), silent)
    assert again.manifest.tokenizer_digest == dataset.manifest.tokenizer_digest
    assert [shard.digest for shard in again.manifest.shards] == [shard.digest for shard in dataset.manifest.shards]


def test_the_sample_comes_from_all_over_the_corpus_but_not_from_what_is_held_out(tmp_path: Path) -> None:
    for i in range(10):
        lines = (json.dumps({"text": f"{i} {j}" + "x" * 90}) + "\n" for j in range(1000))
        with gzip.open(tmp_path / f"{i}.jsonl.gz", "wt", compresslevel=1) as file:
            file.writelines(lines)
    corpus = CorpusConfig(sources=[str(tmp_path)], heldout_share=0.5)
    sample = list(shards._sample(corpus, 20_000))
    assert len({text.split()[0] for text in sample}) >= 5
    assert sample == list(shards._sample(corpus, 20_000))
    assert all(sources.document_hash(text.encode()) >= 2**63 for text in shards._sample(corpus, 10**9))
    assert len(list(shards._sample(corpus, 10**9))) == pytest.approx(5000, rel=0.1)


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (b"", {}, r"corpus\.sources: no document to train on in .*a.jsonl; 0 dropped|no document to train on"),
        (b'{"title": "x"}\n' * 3, {}, "no document to train on in .*; 3 dropped: missing_field"),
        (b'{"text": "x"}\n', {}, r"corpus\.heldout_share = 0.01: none of the 1 documents is held out"),
        (b'{"text": "x"}\n' * 900 + b"{", {}, "a.jsonl: the line at byte 12600 is not valid JSON"),
        (b'{"text": "x"}\n', {"template": "{"}, r"corpus\.template"),
    ],
)
def test_what_the_user_got_wrong_reaches_the_caller(
    tmp_path: Path, data: bytes, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    corpus = CorpusConfig(sources=[str(tmp_path / "a.jsonl")], **changes)
    with pytest.raises(UserError, match=message):
        prepare(corpus, BYTES, str(tmp_path / "d"), silent)
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_a_bad_file_is_reported_while_the_tokenizer_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"a.txt: not valid UTF-8 at byte 3"):
        prepare(CorpusConfig(sources=[str(tmp_path)]), TokenizerConfig(), str(tmp_path / "d"), silent)


def test_damage_is_reported(dataset: Dataset, tmp_path: Path) -> None:
    def damaged(name: str, change: object) -> str:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(dataset.directory, tmp_path / "d")
        path = tmp_path / "d" / name
        path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
        return str(tmp_path / "d")

    name = dataset.segments("train")[0].shard
    for change in (lambda data: data[:-1], lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:]):
        with pytest.raises(UserError, match=f"{name}: damaged"):
            open_dataset(damaged(name, change)).verify()
    with pytest.raises(UserError, match=f"{name}: damaged: not of the size"):
        copy = open_dataset(damaged(name, lambda data: data + b"x"))
        copy.read_segment(copy.segments("train")[0])
    with pytest.raises(UserError, match=r"manifest.json: damaged"):
        open_dataset(damaged("manifest.json", lambda data: data.replace(b'"documents": ', b'"documents": 1', 1)))
    with pytest.raises(UserError, match=r"tokenizer.json: damaged"):
        open_dataset(damaged("tokenizer.json", lambda data: data + b" "))


def test_reading_needs_no_more_than_a_url(dataset: Dataset) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(dataset.directory, "/store/d", recursive=True)
    copy = open_dataset("memory://store/d")
    assert list(copy.texts("heldout")) == list(dataset.texts("heldout"))
    segment = dataset.segments("train")[3]
    assert np.array_equal(copy.read_segment(segment), dataset.read_segment(segment))
