"""Report what a dataset holds: counts, lengths, documents left out and why. Prints a document; verifies digests."""

import argparse
import json
import sys
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

from gru import storage
from gru.corpus.dataset import Dataset, open_dataset
from gru.errors import UserError
from gru.terminal import counted
from jobs import entry


def main() -> None:
    """Print what the command line asks for, and end the process: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m jobs.inspect", description=__doc__)
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="directory or URL of a dataset: `dataset` in the result of jobs.prepare or `gru run`",
    )
    parser.add_argument(
        "--document",
        metavar="HASH",
        help="print the text of one document, by its number in the column `document` of the Parquet files",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every file and compare its digest with the manifest"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a report")
    arguments = parser.parse_args()
    entry.prepare_libraries()
    try:
        print(_answer(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        entry.exit_now(2)
    entry.exit_now(0)


def _answer(arguments: argparse.Namespace) -> str:
    """Return the report, the JSON object or the document that the arguments ask for. Raises UserError."""
    dataset = open_dataset(storage.absolute(arguments.dataset, Path.cwd()))
    if arguments.document is not None:
        source, text = _document(dataset, arguments.document)
        return json.dumps({"source": source, "text": text}, ensure_ascii=False) if arguments.json else text
    if arguments.verify:
        dataset.verify()
    facts = describe(dataset) | ({"verified": True} if arguments.verify else {})
    return json.dumps(facts, ensure_ascii=False) if arguments.json else _report(dataset, facts)


def _document(dataset: Dataset, argument: str) -> tuple[str, str]:
    """Return (source, text) of the document whose hash is `argument`, a decimal or hexadecimal (0x...) number.

    Raises UserError if it is not a number, or if the dataset has no such document.
    """
    try:
        document_hash = int(argument, 0)
    except ValueError:
        raise UserError(
            f"--document {argument}: must be a number from the shards' column `document`, decimal or 0x..."
        ) from None
    document = dataset.document(document_hash) if 0 <= document_hash < 2**64 else None
    if document is None:
        raise UserError(f"--document {argument}: no such document in {dataset.directory}")
    return document


def describe(dataset: Dataset) -> dict[str, Any]:
    """Return the facts of a dataset for programs: what `--json` prints."""
    manifest = dataset.manifest
    lengths: Counter[int] = Counter()
    for shard in manifest.shards:
        lengths.update({2**power: count for power, count in enumerate(shard.lengths) if count})
    counts = manifest.counts
    return {
        "dataset": dataset.directory,
        "digest": manifest.digest,
        "train": manifest.train.model_dump(),
        "heldout": manifest.heldout.model_dump(),
        "heldout_by": manifest.heldout_by,
        "bytes_per_token": round(counts.bytes / counts.tokens, 3),
        "characters_per_token": round(counts.characters / counts.tokens, 3),
        "documents_by_tokens": {f"<={limit}": lengths[limit] for limit in sorted(lengths)},
        "dropped": manifest.dropped,
        "dropped_bytes": manifest.dropped_bytes,
        "passed_over": manifest.passed_over,
        "replaced": manifest.replaced,
        "examples": manifest.examples,
        "vocabulary": manifest.vocab_size,
        "tokenizer_digest": manifest.tokenizer_digest,
        "sources": len(manifest.sources),
        "source_bytes": sum(source.size for source in manifest.sources),
        "shards": len(manifest.shards),
        "shard_bytes": sum(shard.file_bytes for shard in manifest.shards),
        "segments": sum(len(shard.segments) for shard in manifest.shards),
    }


def _report(dataset: Dataset, facts: dict[str, Any]) -> str:
    """Return the facts of a dataset as lines for people."""
    train, heldout = facts["train"], facts["heldout"]
    lines = [
        f"{facts['dataset']}",
        f"digest      {facts['digest']}" + (", and every file matches its digest" if "verified" in facts else ""),
        f"sources     {counted(facts['sources'], 'file')}, {facts['source_bytes'] / 1e6:,.1f} MB",
        f"shards      {counted(facts['shards'], 'file')}, {facts['shard_bytes'] / 1e6:,.1f} MB, "
        f"{counted(facts['segments'], 'segment')}",
        f"tokenizer   {facts['vocabulary']:,} tokens, {facts['tokenizer_digest']}",
        f"            {facts['bytes_per_token']} bytes, {facts['characters_per_token']} characters per token",
        "",
        f"            {'documents':>15} {'bytes':>17} {'characters':>17} {'tokens':>17}",
    ]
    for name, counts in (("train", train), ("held out", heldout)):
        numbers = (counts[key] for key in ("documents", "bytes", "characters", "tokens"))
        lines.append(f"{name:12}" + "{:>15,} {:>17,} {:>17,} {:>17,}".format(*numbers))
    lines += [f"            held out by {facts['heldout_by'].replace('_', ' ')}"]
    lines += ["", "tokens per document, including end of text"]
    lengths: dict[str, int] = facts["documents_by_tokens"]
    total = sum(lengths.values())
    for (limit, count), below in zip(lengths.items(), accumulate(lengths.values()), strict=True):
        bar = "█" * round(40 * count / max(lengths.values()))
        lines.append(f"{'up to ' + format(int(limit[2:]), ','):>18} {count:>13,} {below / total:>7.1%}  {bar}".rstrip())
    return "\n".join([*lines, "", *_report_left_out(facts)])


def _report_left_out(facts: dict[str, Any]) -> list[str]:
    """Return what was left out, by reason, with examples, and the files that were not read."""
    reasons = sorted({**facts["dropped"], **facts["dropped_bytes"]})
    width = max([14, *map(len, reasons)])
    lines = [f"{'documents left out':{width + 14}}{'bytes lost':>17}" if reasons else "documents left out: none"]
    for reason in reasons:
        lost = facts["dropped_bytes"].get(reason)
        lines.append(f"{reason:>{width}} {facts['dropped'].get(reason, 0):>13,}{f' {lost:>16,}' if lost else ''}")
        lines += [f"  {example}" for example in facts["examples"].get(reason, ())]
    if facts["replaced"]:
        lines += ["", f"{counted(facts['replaced'], 'document')} with U+FFFD in place of invalid bytes"]
        lines += [f"  {example}" for example in facts["examples"].get("replaced", ())]
    if facts["passed_over"]:
        lines += ["", "files that were not read, by extension"]
        lines += [f"{name or '(none)':>14} {count:>13,}" for name, count in sorted(facts["passed_over"].items())]
    return lines


if __name__ == "__main__":
    main()
