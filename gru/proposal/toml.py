"""A proposed configuration as the text of a TOML file: each line with its reason, and documents as comments."""

import json
import re
from collections.abc import Iterator
from typing import Any

from gru.config_corpus import BUILT_IN_SOURCES
from gru.corpus.preview import ShownDocument
from gru.proposal.settings import Setting
from gru.proposal.sources import SourceChoice
from gru.terminal import counted

_SHOWN_LINES, _SHOWN_CHARACTERS = 5, 100  # of a document, and of a line
_LINE = 120  # characters, after which a reason stands on a line of its own
_COLUMN = 40  # at which reasons begin, unless the values are longer
# What a terminal would obey, and what a comment of TOML must not contain.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def write_toml(
    head: list[str],
    name: Setting,
    corpus: list[Setting],
    sources: list[SourceChoice],
    sections: dict[str, list[Setting]],
) -> str:
    """Return the text of the file. head: comments at its beginning."""
    lines = [*(f"# {line}".rstrip() for line in head), "", *_setting_lines([name]), "", "[corpus]"]
    relative = any(not source.path.startswith(("/", "~")) and "://" not in source.path for source in sources)
    relative = relative and sources[0].path not in BUILT_IN_SOURCES
    reason = "relative paths start at the directory of `gru run`" if relative else ""
    paths = Setting("sources", [source.path for source in sources], reason)
    if len({json.dumps([setting[:2] for setting in source.settings]) for source in sources}) == 1:
        lines += _setting_lines([paths, *sources[0].settings, *corpus])
    else:
        lines += _setting_lines(corpus)
        for source in sources:
            path = Setting("path", source.path, "")
            lines += ["", "[[corpus.source]]", *_setting_lines([path, *source.settings])]
    for section, settings in sections.items():
        if settings:
            lines += ["", f"[{section}]", *_setting_lines(settings)]
    return "\n".join(lines) + "\n"


def document_lines(documents: list[ShownDocument]) -> Iterator[str]:
    """Yield the beginnings of documents."""
    for document in documents:
        size = "a part" if document.characters is None else counted(document.characters, "character")
        yield f"  {printable(document.file)}, {size}:"
        lines = document.text.split("\n")
        for line in lines[:_SHOWN_LINES]:
            shown = printable(line.removesuffix("\r"))
            yield f"    | {shown[:_SHOWN_CHARACTERS]}{'...' if len(shown) > _SHOWN_CHARACTERS else ''}"
        if len(lines) > _SHOWN_LINES:
            yield "    | ..."


def printable(text: str) -> str:
    """Return a line of text without what a terminal would obey."""
    return _UNPRINTABLE.sub(lambda match: "\t" if match[0] == "\t" else f"\\u{ord(match[0]):04x}", text)


def _setting_lines(settings: list[Setting]) -> Iterator[str]:
    pairs = [(f"{setting.key} = {_value(setting.value)}", printable(setting.reason)) for setting in settings]
    column = max((len(pair) for pair, reason in pairs if reason and len(pair) <= _COLUMN), default=0)
    for pair, reason in pairs:
        if not reason:
            yield pair
        elif len(line := f"{pair:{column}}  # {reason}") <= _LINE:
            yield line
        else:
            yield f"# {reason}:"
            yield pair


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return f"{value:_}" if value >= 10_000 else str(value)
        case float():
            return f"{value:g}"
        case dict():
            return f"{{ {', '.join(f'{key} = {_value(inner)}' for key, inner in value.items())} }}"
        case list():
            return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
