"""A corpus of one partition, which needs no Ray: one short file, one document, one line."""

import gzip
import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from gru.config import CorpusConfig, TokenizerConfig
from gru.config_stages import PrepareResources
from gru.corpus.dataset import Dataset
from gru.corpus.documents import document_hash
from gru.corpus.listing import list_files
from gru.corpus.partitions import plan
from gru.corpus.prepare import prepare, recorded_sources
from gru.corpus.selection import select
from gru.corpus.shards import ShardContext, draft
from gru.corpus.tokenizer import train_tokenizer
from gru.errors import UserError
from tests.gru.corpus.reading import write

BYTES = TokenizerConfig(kind="byte")


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def no_ray() -> None:
    raise AssertionError("this corpus needs no Ray")


def prepared(corpus: CorpusConfig, directory: Path, tokenizer: TokenizerConfig = BYTES) -> tuple[Dataset, list[str]]:
    """Prepare without a Ray; return the dataset, whose files are verified, and the lines of progress."""
    seen: list[str] = []
    dataset = prepare(corpus, tokenizer, str(directory), seen.append, start_ray=no_ray)
    dataset.verify()
    found = {path.name for path in directory.iterdir()}
    assert found == {"manifest.json", "tokenizer.json", *(shard.name for shard in dataset.manifest.shards)}
    texts = {split: list(dataset.texts(split)) for split in ("train", "heldout")}  # type: ignore[arg-type]
    for split, counts in (("train", dataset.manifest.train), ("heldout", dataset.manifest.heldout)):
        size = sum(len(text.encode()) for text in texts[split])
        assert (counts.documents, counts.bytes) == (len(texts[split]), size)
        assert counts.tokens == size + counts.documents
        assert counts.characters == sum(map(len, texts[split]))
    return dataset, seen


# One file


def test_one_partition_starts_no_ray_unless_its_resources_are_set(tmp_path: Path) -> None:
    corpus = CorpusConfig(sources=[write(tmp_path / "a.jsonl", json_lines([f"{i}" for i in range(500)]))])
    prepared(corpus, tmp_path / "d")
    with pytest.raises(AssertionError, match="needs no Ray"):
        prepare(corpus, BYTES, str(tmp_path / "e"), print, PrepareResources(labels={"pool": "big"}), no_ray)
    cut = corpus.model_copy(update={"partition_bytes": 1000})
    with pytest.raises(AssertionError, match="needs no Ray"):
        prepare(cut, BYTES, str(tmp_path / "e"), print, start_ray=no_ray)


def test_a_partition_stopped_in_this_process_is_made_by_the_same_call(tmp_path: Path) -> None:
    corpus = CorpusConfig(sources=[write(tmp_path / "a.jsonl", json_lines([f"{i % 400}" for i in range(500)]))])
    undisturbed, _ = prepared(corpus, tmp_path / "undisturbed")
    stops = ["1 file", "training", "1/1", "looking for duplicates"]

    def stop(line: str) -> None:
        if stops and line.startswith(stops[0]):
            stops.pop(0)
            raise KeyboardInterrupt

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, BYTES, str(tmp_path / "d"), stop, start_ray=no_ray)
    assert prepared(corpus, tmp_path / "d")[0].manifest == undisturbed.manifest


NOTES = "".join(f"# Note {i}\n\nSome words on the matter of {i * i}.\n" for i in range(50))
NOVEL = "".join(f"It was the {i}th of May, and nobody had come.\n" for i in range(22_000))


@pytest.mark.parametrize(
    ("name", "text", "share"),
    [
        ("notes.md", NOTES, 0.01),
        ("novel.txt", NOVEL, 0.01),
        ("novel.txt", NOVEL, 0.2),
        ("text8.txt", "one two three four five " * 1000, 0.01),
        ("characters.txt", "黃河入海流" * 1000, 0.01),
        ("two.txt", "ab", 0.01),
        ("notes.txt.gz", NOTES, 0.05),
        ("one.jsonl", NOTES, 0.05),
    ],
)
def test_of_one_document_the_end_is_held_out(tmp_path: Path, name: str, text: str, share: float) -> None:
    data = json_lines([text]) if name.endswith(".jsonl") else text.encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    corpus = CorpusConfig(sources=[path], heldout_share=share)
    dataset, seen = prepared(corpus, tmp_path / "d")
    [train], [heldout] = dataset.texts("train"), dataset.texts("heldout")
    assert train + heldout == text
    assert len(text) * share <= len(heldout) <= max(len(text) * share * 1.1 + 1000, 1)
    if "\n" in text:
        assert train.endswith("\n")
    said = f"there is one document, and corpus.heldout_share = {share}: holding out the end of the last document"
    assert said in seen
    assert dataset.manifest.heldout_by == "tail"
    again, _ = prepared(corpus, tmp_path / "again")
    assert again.manifest == dataset.manifest
    assert recorded_sources(corpus, dataset.directory) == dataset.manifest.sources


def test_of_a_few_text_files_the_end_of_the_last_is_held_out(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / "c" / f"{i}.txt", f"{i}\n".encode() + NOTES.encode())
    dataset, seen = prepared(CorpusConfig(sources=[str(tmp_path / "c")]), tmp_path / "d")
    train, [heldout] = list(dataset.texts("train")), dataset.texts("heldout")
    assert "".join(train) + heldout == "".join(f"{i}\n{NOTES}" for i in range(3))
    why = "none of the 3 documents is held out by corpus.heldout_share = 0.01"
    assert f"{why}: holding out the end of the last document" in seen
    assert dataset.manifest.heldout_by == "tail"


def test_of_a_few_records_the_one_with_the_lowest_hash_is_held_out(tmp_path: Path) -> None:
    texts = [f"record {i}" for i in range(5)]
    path = write(tmp_path / "a.jsonl", json_lines([*texts, texts[0]]))
    dataset, seen = prepared(CorpusConfig(sources=[path]), tmp_path / "d")
    lowest = min(texts, key=lambda text: document_hash(text.encode()))
    assert list(dataset.texts("heldout")) == [lowest]
    assert list(dataset.texts("train")) == [text for text in texts if text != lowest]
    assert dataset.manifest.heldout_by == "lowest_hash"
    why = "none of the 5 documents is held out by corpus.heldout_share = 0.01"
    assert f"{why}: holding out the document with the lowest hash" in seen
    assert dataset.manifest.dropped == {"duplicate": 1}
    # As if the hash had chosen it.
    share = (document_hash(lowest.encode()) + 1e4) / 2**64
    chosen, _ = prepared(CorpusConfig(sources=[path], heldout_share=share), tmp_path / "chosen")
    assert chosen.manifest.heldout_by == "hash"
    assert chosen.manifest.shards == dataset.manifest.shards
    assert chosen.manifest.heldout_digest == dataset.manifest.heldout_digest


def test_what_is_held_out_does_not_depend_on_how_repeated_documents_are_cut(tmp_path: Path) -> None:
    text = "".join(f"line {i} of the text\n" for i in range(400))
    file = write(tmp_path / "a.jsonl", json_lines([text] * 8))
    digests = set()
    for size in (10_000, 1 << 20):
        corpus = CorpusConfig(sources=[file], partition_bytes=size)
        partitions = plan(list_files(corpus).files, corpus)
        context = ShardContext(str(tmp_path / str(size)), corpus, "", dropped=None)
        tokenizer = train_tokenizer(BYTES, [])
        write(Path(context.directory) / "tokenizer.json", tokenizer.json)
        context = replace(context, tokenizer_digest=tokenizer.digest)
        drafts = [draft(context, index, partition) for index, partition in enumerate(partitions)]
        selection = select(context, drafts, partitions, print)
        digests.add(tuple(hold_out.characters for hold_out in selection.hold_out.values()))
    assert digests == {(math.ceil(len(text) * 0.01),)}


def test_no_copy_of_the_document_with_the_lowest_hash_is_trained_on(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(10)]
    copied = sorted(texts, key=lambda text: document_hash(text.encode()))[:3]
    file = write(tmp_path / "a.jsonl", json_lines(texts + copied))
    corpus = CorpusConfig(sources=[file], deduplicate="none", heldout_share=1e-9)
    dataset, _ = prepared(corpus, tmp_path / "d")
    [heldout] = dataset.texts("heldout")
    assert dataset.manifest.heldout_by == "lowest_hash"
    assert heldout not in [*dataset.texts("train"), *copied]


def test_members_that_are_not_read_are_named_if_there_is_no_document(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.dat", "data")
    with pytest.raises(UserError, match=r"no document to train on.*; files not read: 1 \.dat"):
        prepared(CorpusConfig(sources=[str(tmp_path / "a.zip")]), tmp_path / "d")


def test_text_without_the_mark_that_its_encoding_needs_is_told_with_a_held_out_tail(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", ("a line\n" * 1000).encode("utf-16-le"))
    with pytest.raises(UserError, match="set `encoding` to utf-16-le or utf-16-be"):
        prepared(CorpusConfig(sources=[file], encoding="utf-16", heldout="tail"), tmp_path / "d")
