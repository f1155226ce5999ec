"""A setting of a proposed configuration: a key, its value and the reason for it."""

from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A line of the proposed TOML file."""

    key: str  # within its section, such as `vocab_size`
    value: Any
    reason: str
