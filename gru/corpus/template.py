"""The template that turns a record of JSON, CSV or Parquet into the text of a document.

A field in braces is a name (`{title}`), a path to a nested field (`{meta.title}`), or alternatives of them, of which
the last one is also the text that stands for a record without any (`{author|Anonymous}`, `{title|}`).
"""

import string
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gru.corpus.field_text import field_text
from gru.corpus.report import ProblemLog
from gru.errors import UserError

_MOST_FIELDS = 20  # names of fields in a message
_ABSENT: Any = object()
_KINDS = {str: "a string", list: "a list", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}


class Field(NamedTuple):
    """A field in braces."""

    names: tuple[str, ...]
    """The names or paths to try, in order."""
    default: str | None
    """The text if none of them has any; None if there are no alternatives."""


Template = list[tuple[str, Field | None]]


def parse_template(template: str, key: str = "corpus.template") -> Template:
    """Return the template as pairs of literal text and the field after it, if any.

    Raises UserError if it is not a template with at least one field.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key} = {template!r}: {error}; write a literal brace as {{{{ or }}}}") from None
    if all(name is None for _, name, _, _ in parts):
        raise UserError(f"{key} = {template!r}: must name fields in braces, as in '{{title}}: {{text}}'")
    for _, name, spec, conversion in parts:
        if spec or conversion:
            raise UserError(
                f"{key} = {template!r}: {{{name}...}} has a format (after ':' or '!'), which fields cannot have here"
            )
    return [(literal, None if name is None else _field(name, template, key)) for literal, name, _, _ in parts]


def column_names(template: Template) -> set[str]:
    """Return the names of the columns of a table that the fields may be in."""
    paths = [name.split(".") for _, field in template if field for name in field.names]
    return {".".join(path[: end + 1]) for path in paths for end in range(len(path))}


def fill_template(template: Template, records: Iterable[Any], problems: ProblemLog) -> Iterator[str]:
    """Yield the text of each record, an object or, if the template has one field only, its text.

    A record that lacks a field, or has something else than text there, is left out and counted; the text of one all of
    whose fields are empty is empty.
    """
    fields = [field for _, field in template if field]
    names = [field.names[0] for field in fields]
    pattern = "".join(literal.replace("%", "%%") + ("%s" if field else "") for literal, field in template)
    for record in records:
        if type(record) is not dict and (record := _as_object(record, fields, problems)) is None:
            continue
        if problems.on_record:
            problems.on_record(record)
        values = [record.get(name) for name in names]
        for value in values:
            if type(value) is not str or not value:
                texts = _texts(fields, record, problems)
                if texts is not None:
                    yield pattern % tuple(texts) if texts else ""
                break
        else:
            yield pattern % tuple(values)


def _field(text: str, template: str, key: str) -> Field:
    names = [name.strip() for name in text.split("|")]
    required = names[:-1] if len(names) > 1 else names
    if not all(required):
        raise UserError(f"{key} = {template!r}: {{{text}}} does not name a field, as in '{{title}}: {{text}}'")
    if any(name.isdecimal() for name in required):
        raise UserError(f"{key} = {template!r}: {{{text}}} is a number: name the fields, as in '{{title}}: {{text}}'")
    return Field(tuple(filter(None, names)), names[-1] if len(names) > 1 else None)


def _as_object(record: Any, fields: list[Field], problems: ProblemLog) -> dict[str, Any] | None:
    """Return a record that is not an object as one, if it is a text for the only field; None if it is left out."""
    if isinstance(record, str) and len(fields) == 1:
        return {fields[0].names[0]: record}
    if isinstance(record, str):
        names = ", ".join(repr(field.names[0]) for field in fields)
        problems.drop_record(
            "bad_record", f"is a string, which cannot fill the several fields of the template: {names}"
        )
    else:
        kind = _KINDS.get(type(record), type(record).__name__)
        problems.drop_record("bad_record", f"is not a JSON object or string, but {kind}")
    return None


def _texts(fields: list[Field], record: dict[str, Any], problems: ProblemLog) -> list[str] | None:
    """Return the text of each field; nothing if all of them are empty, and None if the record is left out."""
    texts, present, has_text = [], False, False
    for field in fields:
        text = None
        for name in field.names:
            value = _lookup(record, name)
            if value is _ABSENT:
                continue
            present = True
            if (text := _value_text(name, value, problems)) is None:
                return None
            if text:
                has_text = True
                break
        if text is None and field.default is None:
            _drop_without_field(field.names, record, problems)
            return None
        texts.append(text or field.default or "")
    if not present:
        _drop_without_field([name for field in fields for name in field.names], record, problems)
        return None
    return texts if has_text else []


def _lookup(record: dict[str, Any], name: str) -> Any:
    """Return the value of a field, or of the field at a path; `_ABSENT` if there is none.

    A name that the record has counts more than a path with the same dots. A path goes through a list of objects to the
    list of their values.
    """
    if name in record:
        return record[name]
    for end in (index for index, character in enumerate(name) if character == "."):
        value, rest = record.get(name[:end]), name[end + 1 :]
        if isinstance(value, dict) and (found := _lookup(value, rest)) is not _ABSENT:
            return found
        if isinstance(value, list):
            items = [_lookup(item, rest) for item in value if isinstance(item, dict)]
            if items := [item for item in items if item is not _ABSENT]:
                return items
    return _ABSENT


def _value_text(name: str, value: Any, problems: ProblemLog) -> str | None:
    """Return the text of a value, or None if its record is left out."""
    chat_template = problems.corpus.chat_template
    try:
        return field_text(value, chat_template)
    except UnicodeDecodeError as error:
        pattern, numbers, size = problems.place
        message = f"field {name!r} of {pattern % numbers} is not valid UTF-8 at its byte {error.start}"
        if problems.replaces("invalid_utf8", message, size):
            return field_text(value, chat_template, errors="replace")
    except ValueError as error:
        problems.drop_record("bad_record", f"has a field {name!r} that {str(error).replace('FIELD', name)}")
    return None


def _drop_without_field(names: Iterable[str], record: dict[str, Any], problems: ProblemLog) -> None:
    """Count a record without any field of these names."""
    wanted = " or ".join(map(repr, names))
    present = [*(problems.fields if problems.fields is not None else record)]
    for name in names:  # a path leads to the fields beside the one that is absent
        inner, prefix = record, ""
        while "." in name and isinstance(inner.get(head := name.split(".")[0]), dict):
            inner, prefix, name = inner[head], f"{prefix}{head}.", name.split(".", 1)[1]
        present += [prefix + other for other in inner if prefix]
    same = [other for other in present for name in names if other.casefold() == name.casefold()]
    hint = f" (write {{{same[0]}}})" if same else ""
    shown = ", ".join(map(repr, present[:_MOST_FIELDS])) + (", ..." if len(present) > _MOST_FIELDS else "")
    fields = f"its fields: {shown}" if present else "it has no fields"
    problems.drop_record("missing_field", f"has no field {wanted} of the template{hint}; {fields}")
