"""The configuration: `PipelineConfig` for the whole TOML file, how it is read, and what its errors and its help say.

Each part of the library takes its own section and sees no other. The descriptions of the sections, in `config_corpus`
and `config_stages`, are the documentation: `gru run --help` and the JSON Schema for editors show them.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError

from gru.config_corpus import CorpusConfig, TokenizerConfig
from gru.config_fields import NAME, Name, Section
from gru.config_stages import EvaluateConfig, ModelConfig, RegistryConfig, ResourcesConfig, ServeConfig, TrainConfig
from gru.errors import UserError


class PipelineConfig(Section):
    """The configuration of a pipeline, from text to a served model."""

    name: Name = Field("gru", description="Name of the pipeline, and of its experiment and model.")
    storage: str = Field("./store", description="Path or URL of the directory for datasets, runs and models.")
    corpus: CorpusConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    registry: RegistryConfig = RegistryConfig()
    serve: ServeConfig = ServeConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def model_name(self) -> str:
        return self.registry.model or self.name

    @property
    def experiment(self) -> str:
        return self.registry.experiment or self.name


def is_model_reference(text: str) -> bool:
    """Whether `text` names a model of the registry, as NAME@ALIAS, NAME:VERSION, or @ALIAS of the pipeline's own."""
    return re.fullmatch(rf"({NAME})?@{NAME}|{NAME}:\d+", text) is not None


def load(source: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a TOML file, or a JSON object passed as text, apply `section.key=value` overrides, and validate.

    Raises UserError naming the file and the wrong key.
    """
    inline = str(source).lstrip().startswith("{")
    path = "configuration" if inline else source
    try:
        table = json.loads(str(source)) if inline else tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except ValueError as error:  # invalid TOML, JSON or UTF-8
        raise UserError(f"{path}: not valid {'JSON' if inline else 'TOML'}: {error}") from None
    for override in overrides:
        _apply(table, override, "--set ")
    return _validated(table, str(path))


def changed(config: PipelineConfig, overrides: Sequence[str], option: str) -> PipelineConfig:
    """Return the configuration with `section.key=value` overrides.

    option: the command line option that they come from. Raises UserError naming it if an override is wrong.
    """
    table = config.model_dump()
    for override in overrides:
        _apply(table, override, option)
    return _validated(table, option.strip(" :"))


def _validated(table: dict[str, Any], where: str) -> PipelineConfig:
    try:
        return PipelineConfig.model_validate(table)
    except ValidationError as error:
        raise UserError(f"{where}: {'; '.join(_explain(dict(e)) for e in error.errors())}") from None


def _apply(table: dict[str, Any], override: str, option: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"{option}{override}: must be section.key=value, as in train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set name=mine
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"{option}{override}: {part} is a value, not a section")
    table[parts[-1]] = value


# What a value must be, by pydantic's error type.
_TYPE_ERRORS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def _explain(error: dict[str, Any]) -> str:
    """Return one of pydantic's errors in words: `train.steps: must be an integer >= 1, not 0`."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "configuration"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; known here: {', '.join(_keys_at(location[:-1]))}"
    if error["type"] == "missing":
        return f"{key}: required but absent"
    value = error.get("input")
    shown = f", not {value!r}" if not isinstance(value, dict) else ""
    return f"{key}: {_requirement(error, location)}{shown}"


def _requirement(error: dict[str, Any], location: list[str]) -> str:
    """Return what a value must be, from one of pydantic's errors: `must be an integer >= 1`."""
    kind, context = error["type"], error.get("ctx", {})
    match kind:
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return _range(kind, context, isinstance(error.get("input"), int) and "int" in _type_at(location))
        case "string_pattern_mismatch":
            return f"must match the regular expression {context['pattern']}"
        case "literal_error":
            return f"must be {context['expected']}"
        case "too_short" | "string_too_short":
            least = context["min_length"]
            return "must not be empty" if least == 1 else f"must have a length >= {least}"
    if kind in _TYPE_ERRORS:
        return f"must be {_TYPE_ERRORS[kind]}"
    message = error["msg"]
    return f"{message[0].lower()}{message[1:]}"


def _range(kind: str, context: dict[str, Any], integer: bool) -> str:
    """Return the range of a number: `must be an integer >= 1` or `must be a number < 1`."""
    noun = "an integer" if integer else "a number"
    match kind:
        case "greater_than":
            return f"must be {noun} >= {context['gt'] + 1}" if integer else f"must be {noun} > {context['gt']:g}"
        case "greater_than_equal":
            return f"must be {noun} >= {context['ge']:g}"
        case "less_than":
            return f"must be {noun} < {context['lt']:g}"
    return f"must be {noun} <= {context['le']:g}"


def _keys_at(location: list[str]) -> list[str]:
    """Return the keys of the section at this place."""
    record: type[BaseModel] = PipelineConfig
    for part in location:
        if not part.isdigit():
            inner = _record_of(record.model_fields[part].annotation)
            assert inner
            record = inner
    return list(record.model_fields)


def _type_at(location: list[str]) -> str:
    """Return the name of the type of the key at this place, which may be an element of a list."""
    record: type[BaseModel] = PipelineConfig
    annotation: Any = PipelineConfig
    for part in location:
        if part.isdigit():
            continue
        if part not in record.model_fields:
            break
        annotation = record.model_fields[part].annotation
        record = _record_of(annotation) or record
    return _type_name(annotation)


def describe() -> str:
    """Return every key with its type, default and description, in the layout of the TOML file."""
    return "\n".join(_describe(PipelineConfig, ""))


def _describe(record: type[BaseModel], section: str) -> Iterator[str]:
    sections: list[tuple[str, str, type[BaseModel]]] = []
    for name, field in record.model_fields.items():
        if inner := _record_of(field.annotation):
            heading = f"[[{section}{name}]]" if get_origin(field.annotation) is list else f"[{section}{name}]"
            sections.append((heading, f"{section}{name}.", inner))
            continue
        default = "required" if field.is_required() else f"default {_toml(field.default)}"
        yield f"  {section}{name}: {_type_name(field.annotation)} ({default})"
        yield f"      {field.description}"
    for heading, prefix, inner in sections:
        yield heading
        yield from _describe(inner, prefix)


def _record_of(annotation: Any) -> type[BaseModel] | None:
    """Return the record of a section, or of the tables of a list; None for other types."""
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(json.dumps(value) for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return f"list of {_type_name(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return f"table of {_type_name(get_args(annotation)[1])}"
    inner = [_type_name(a) for a in get_args(annotation) if a is not type(None)]
    return " | ".join(inner) if inner else annotation.__name__


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def content_key(*parts: Any) -> str:
    """Return a short name for a result with these inputs: 16 hex digits of the SHA-256 of `parts` as JSON."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
