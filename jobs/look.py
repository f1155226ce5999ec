"""The look at a corpus before the long run: a report for people of what `prepare` would make of it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from gru.config import PipelineConfig
from gru.corpus.file_formats import describe_extensions
from gru.corpus.preview import Preview, ShownDocument, SourcePreview
from gru.corpus.preview import look as preview_of
from gru.machine import available_cpus
from gru.terminal import counted

_SHOWN_LINES, _SHOWN_CHARACTERS = 6, 110  # of a document, and of a line
_EXAMPLES = 2  # of each reason
_FIELDS = 24
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def look(config: PipelineConfig) -> Preview:
    """Return the preview of a config's corpus. Raises UserError for a mistake that `prepare` would report."""
    cores = available_cpus()
    parallel = max(1, int(cores / (config.resources.prepare.cpus or 1)))
    return preview_of(config.corpus, config.tokenizer, parallel, config.storage)


def result(preview: Preview) -> Mapping[str, object]:
    """Return the preview for programs, with estimates rounded."""
    return {"stage": "look", **_rounded(asdict(preview))}


def report(preview: Preview) -> str:
    """Return the preview as lines for people."""
    lines = [line for source in preview.sources for line in _source_lines(source)]
    if preview.passed_over:
        listed = describe_extensions(preview.passed_over)
        lines.append(f"not read, for their extension or by corpus.exclude: {listed}")
    expected = preview.expected
    size = f"about {_about(expected.documents, 'document')}, {_bytes(expected.bytes)} of text"
    if expected.tokens:
        size += f", {_about(expected.tokens, 'token')} ({preview.bytes_per_token:.2f} bytes each)"
    time = f"{_duration(preview.seconds)} on {counted(preview.cores, 'core')}"
    time += ", besides the start of Ray" if preview.partitions > 1 else ""
    return "\n".join([*lines, f"expected: {size}, in {time}"])


def _source_lines(source: SourcePreview) -> Iterator[str]:
    files = ", ".join(f"{count:,} {kind}" for kind, count in sorted(source.files.items()))
    number = sum(source.files.values())
    name = ", ".join(source.paths[:3]) + (f" and {len(source.paths) - 3:,} more" if len(source.paths) > 3 else "")
    weight = f", weight {source.weight:g}" if source.weight != 1 else ""
    yield f"{name}: {counted(number, 'file')} ({files}), {_bytes(source.file_bytes)}{weight}"
    part = "all of it" if source.complete else f"in {_bytes(source.sampled_bytes)} of the files"
    yield f"  sample: {counted(source.sampled_documents, 'document')}, {part}"
    if source.empty_fields:
        yield f"  fields: {_fields(source.empty_fields)}"
    if source.template is not None:
        yield f"  template: {source.template!r}"
    for document in source.shown:
        yield from _document_lines(document)
    total = source.sampled_documents + sum(source.dropped.values())
    if source.dropped:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in source.dropped.items())
        yield f"  left out: {counts}, {sum(source.dropped.values()) / total:.1%} of the sample"
    if source.replaced:
        yield f"  {counted(source.replaced, 'document')} with U+FFFD in place of invalid bytes"
    for found in source.examples.values():
        for example in found[:_EXAMPLES]:
            yield f"    {_printable(example)}"


def _document_lines(document: ShownDocument) -> Iterator[str]:
    name = _printable(document.file)
    if document.characters is None:
        yield f"  a part of a document of {name}:"
    else:
        yield f"  a document of {name}, {counted(document.characters, 'character')}:"
    head = document.text.split("\n")
    for line in head[:_SHOWN_LINES]:
        shown = _printable(line)
        yield f"    | {shown[:_SHOWN_CHARACTERS]}{'...' if len(shown) > _SHOWN_CHARACTERS else ''}"
    if len(head) > _SHOWN_LINES:
        yield "    | ..."


def _fields(empty: dict[str, float]) -> str:
    """Return the fields, the fullest first, with the share of records that have nothing there."""
    ordered = sorted(empty.items(), key=lambda item: item[1])
    shown = [f"{_printable(name)} ({share:.0%} empty)" if share >= 0.005 else name for name, share in ordered]
    more = f" and {len(shown) - _FIELDS:,} more" if len(shown) > _FIELDS else ""
    return ", ".join(shown[:_FIELDS]) + more


def _printable(text: str) -> str:
    """Return the text without what a terminal would obey."""
    return _UNPRINTABLE.sub(
        lambda match: f"\\u{ord(match[0]):04x}" if match[0] > "\xff" else f"\\x{ord(match[0]):02x}", text
    )


def _about(number: float, noun: str) -> str:
    """Return a number of things, with two significant digits."""
    digits = max(0, len(str(int(number))) - 2)
    return counted(int(round(number, -digits)), noun)


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return counted(round(number), "byte")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [*map(_rounded, value)] if isinstance(value, list | tuple) else value
