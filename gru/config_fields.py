"""The base of the sections of the configuration, and the types of keys that several sections have."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"  # regular expression of a name

PositiveInt = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """The base of all sections: immutable, strict about types, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


CHAT_TEMPLATE = "{role}:\n{content}\n\n"
_CHAT_TEMPLATE = r"[^{}]*(\{role\}[^{}]*)?\{content\}[^{}]*"


def _check_chat_template(text: str) -> str:
    if not re.fullmatch(_CHAT_TEMPLATE, text):
        raise ValueError("must have {content} once, perhaps {role} before it, and no other braces")
    return text


def with_pattern(pattern: str) -> Any:
    """Return a field whose pattern editors know; the program's own check says in words what is wrong."""
    return Field(json_schema_extra={"pattern": f"^{pattern}$"})


ChatTemplate = Annotated[str, with_pattern(_CHAT_TEMPLATE), AfterValidator(_check_chat_template)]
