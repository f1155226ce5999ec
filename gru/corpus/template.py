"""The template that turns a record of JSON, CSV or Parquet into the text of a document."""

import string
from collections.abc import Iterable, Iterator
from typing import Any

from gru.corpus.report import ProblemLog
from gru.errors import UserError

Template = list[tuple[str, str | None]]


def parse_template(template: str) -> Template:
    """Return the template as pairs of literal text and the name of the field after it, if any.

    Raises UserError if it is not a template with at least one field.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"corpus.template: {error}; write a literal brace as {{{{ or }}}}") from None
    if any(spec or conversion for _, _, spec, conversion in parts) or not any(name for _, name, _, _ in parts):
        raise UserError(
            f"corpus.template = {template!r}: must name fields in braces, as in '{{title}}: {{text}}', without formats"
        )
    return [(literal, name) for literal, name, _, _ in parts]


def fill_template(template: Template, records: Iterable[dict[str, Any]], problems: ProblemLog) -> Iterator[str]:
    """Yield the text of each record; one that lacks a field, or has no text there, is left out and counted."""
    names = [name for _, name in template if name is not None]
    pattern = "".join(literal.replace("%", "%%") + ("" if name is None else "%s") for literal, name in template)
    for record in records:
        values = [record.get(name) for name in names]
        for index, value in enumerate(values):
            if type(value) is not str:
                if value is None:
                    problems.drop_missing_field()
                    break
                if (text := _as_text(value)) is None:
                    kind = type(value).__name__
                    problems.drop("bad_record", f"field {names[index]!r} is {kind}, not a string or a list of strings")
                    break
                values[index] = text
        else:
            yield pattern % tuple(values)


def _as_text(value: Any) -> str | None:
    """Return a list of strings as lines and a number as digits; None for any other value."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return str(value) if isinstance(value, int | float) else None
