"""The choice of a template by a sample of records: which fields are the text, and which stand before it.

Pure functions. This module does not know where the records come from.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gru.chat import is_chat

BODY_NAMES = (
    *("messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
    *("text", "content", "body", "paragraphs", "article", "story", "poem", "lyrics", "message", "review", "comment"),
    *("description", "abstract", "summary", "code"),
)
"""Usual names of the field with the text, the likeliest first."""

_TITLES = ("title", "headline", "subject", "heading", "name")
_AUTHORS = ("author", "poet", "artist", "writer", "byline")
_SPEAKERS = ("user", "username", "speaker", "sender", "from", "nick", "role")
_PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "context", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "answer"),
)
_LONGEST_TITLE = 150  # characters on average
_MOST_ALTERNATIVES = 5
_FEW = 0.01  # share of records that another field need not be looked for
_PREFERENCE = 0.2  # length, relative to that of the longest field, at which a usual name is taken for the text
_LEVELS = 4  # objects in objects

Record = dict[str, str]
"""The text of each field of a record, also of nested ones by their paths; fields that cannot be text are absent."""


class TemplateChoice(NamedTuple):
    """A template and why it was chosen."""

    template: str
    reason: str
    chat: bool = False


def flatten(record: Any) -> tuple[Record, set[str]]:
    """Return the fields of a record that hold text, and the names of the fields that hold a chat."""
    fields: Record = {}
    chats: set[str] = set()
    if isinstance(record, dict):
        _flatten(record, "", fields, chats, _LEVELS)
    return fields, chats


def _flatten(value: dict[Any, Any], prefix: str, fields: Record, chats: set[str], levels: int) -> None:
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or re.search(r"[{}|!:\[\]]|^\s|\s$|^\d+$|^$", key):
            continue  # such a name cannot stand in a template
        if isinstance(inner, dict) and levels:
            _flatten(inner, f"{name}.", fields, chats, levels - 1)
        elif isinstance(inner, str):
            fields[name] = inner
        elif is_chat(inner):
            fields[name] = "\n".join(str(message.get("content") or message.get("value") or "") for message in inner)
            chats.add(name)
        elif isinstance(inner, list) and all(isinstance(item, str) for item in inner):
            fields[name] = "\n".join(inner)
        elif isinstance(inner, list) and levels and all(isinstance(item, dict) for item in inner):
            parts: dict[str, list[str]] = {}
            for item in inner:
                nested: Record = {}
                _flatten(item, f"{name}.", nested, set(), levels - 1)
                for path, text in nested.items():
                    parts.setdefault(path, []).append(text)
            fields |= {path: "\n".join(texts) for path, texts in parts.items()}


def choose_template(records: Iterable[Any]) -> TemplateChoice | None:
    """Return the template for records like these; None if none of their fields holds text."""
    flat = [flatten(record) for record in records]
    rows = [fields for fields, _ in flat]
    chats = Counter(name for _, names in flat for name in names)
    if not rows:
        return None
    if pair := _pair(rows):
        return pair
    bodies = _bodies(rows, {name for name, count in chats.items() if count > len(rows) / 100})
    if not bodies:
        return None
    body = f"{{{bodies[0]}}}" if len(bodies) == 1 else f"{{{'|'.join(bodies)}|}}"
    named = " or ".join(f"`{name}`" for name in bodies)
    if bodies[0] in chats:
        return TemplateChoice(body, f"{named} holds the messages of a chat", True)
    heads = [found for names in (_TITLES, _AUTHORS) if (found := _short_field(rows, names, bodies)) is not None]
    usual = bodies[0].rsplit(".", 1)[-1].casefold() in BODY_NAMES
    reason = f"{named} holds the text" if usual else f"{named} is the longest field"
    if len(bodies) > 1:
        reason += ", whichever a record has"
    if not heads and (speaker := _short_field(rows, _SPEAKERS, bodies)):
        return TemplateChoice(f"{_optional(rows, speaker)}: {body}", f"{reason}, `{speaker}` is who says it")
    if heads:
        reason += f", after {' and '.join(f'`{name}`' for name in heads)}"
    return TemplateChoice("\n".join([*(_optional(rows, name) for name in heads), body]), reason)


def _pair(rows: list[Record]) -> TemplateChoice | None:
    """Return the template of questions with answers, if the records are such."""
    filled = Counter(name for row in rows for name, text in row.items() if text)
    for names in _PAIRS:
        if filled[names[0]] > 0.9 * len(rows) and filled[names[-1]] > 0.9 * len(rows) and all(map(filled.get, names)):
            template = "\n".join(_optional(rows, name) for name in names)
            return TemplateChoice(template, f"`{names[0]}` comes before `{names[-1]}`, which answers it")
    return None


def _bodies(rows: list[Record], chats: set[str]) -> list[str]:
    """Return the fields with the text, the second for records without the first, and so on."""
    bodies: list[str] = []
    left = rows
    while len(bodies) < _MOST_ALTERNATIVES and len(left) > _FEW * len(rows):
        if (name := _body(left, chats, len(rows))) is None:
            break
        bodies.append(name)
        left = [row for row in left if not row.get(name)]
    return bodies


def _body(rows: Sequence[Record], chats: set[str], total: int) -> str | None:
    """Return the field of these records that is most likely their text."""
    lengths: Counter[str] = Counter()
    filled: Counter[str] = Counter()
    prose: Counter[str] = Counter()
    for row in rows:
        for name, text in row.items():
            if text:
                lengths[name] += len(text)
                filled[name] += 1
                prose[name] += _is_prose(text)
    found = [name for name in lengths if name in chats or prose[name] > filled[name] / 2]
    # A field of a few records only, such as a remark, is not their text.
    found = [name for name in found if filled[name] > min(0.05 * total, 0.5 * len(rows))]
    if not found:
        return None
    if talks := [name for name in found if name in chats]:
        return min(talks, key=_rank)
    longest = max(found, key=lambda name: lengths[name])
    usual = [name for name in found if _rank(name) < len(BODY_NAMES)]
    usual = [name for name in usual if lengths[name] >= _PREFERENCE * lengths[longest]]
    return min(usual, key=lambda name: (_rank(name), name.count("."))) if usual else longest


def _rank(name: str) -> int:
    last = name.rsplit(".", 1)[-1].casefold()
    return BODY_NAMES.index(last) if last in BODY_NAMES else len(BODY_NAMES)


def _is_prose(text: str) -> bool:
    """Whether a text is more than an id, a date or an address: it has words, or characters of a script without them."""
    return bool(re.search(r"[^\W\d_]\S*\s+\S*[^\W\d_]|[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]", text[:2000]))


def _short_field(rows: list[Record], names: Sequence[str], bodies: list[str]) -> str | None:
    """Return the field with one of these names that can stand before the text."""
    prefix = bodies[0].rpartition(".")[0]
    for wanted in names:
        for name in sorted({name for row in rows for name in row}, key=lambda name: (name.count("."), name)):
            path, _, last = name.rpartition(".")
            texts = [row[name] for row in rows if row.get(name)] if last.casefold() == wanted else []
            if len(texts) < len(rows) / 4 or name in bodies or path not in ("", prefix):
                continue
            length = sum(map(len, texts)) / len(texts)
            if length <= _LONGEST_TITLE and not any("\n" in text.strip() for text in texts):
                return name
    return None


def _optional(rows: list[Record], name: str) -> str:
    """Return the field in braces; without need for it if a record of the sample has nothing there."""
    return f"{{{name}}}" if all(row.get(name) for row in rows) else f"{{{name}|}}"
