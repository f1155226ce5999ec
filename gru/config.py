"""The one TOML file: a record for each section, `PipelineConfig` over them.

Each part of the library takes its own section and sees no other. The descriptions here are the
documentation: `gru run --help` prints them.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gru.errors import UserError

BUILT_IN_SOURCES = ("python-stdlib",)

PositiveInt = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Share = Annotated[float, Field(ge=0, lt=1)]
Cell = Literal["gru", "lstm", "rnn", "mingru"]


def _check_label(text: str) -> str:
    if not re.fullmatch(rf"([A-Za-z0-9.-]+/)?{_LABEL}", text):
        raise ValueError("expected the name of a label, as in pool or ray.io/market-type")
    return text


def _check_selector(text: str) -> str:
    if not re.fullmatch(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))", text):
        raise ValueError("expected a label's value, as in gpu, !gpu, in(a, b) or !in(a, b)")
    return text


_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"  # as Kubernetes has it, and Ray
Labels = dict[Annotated[str, AfterValidator(_check_label)], Annotated[str, AfterValidator(_check_selector)]]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class CorpusConfig(Section):
    sources: list[str] = Field(
        min_length=1,
        description="Files, directories, globs or URLs (https://, s3://) to read; `python-stdlib` is the Python source "
        "code of the running interpreter's standard library.",
    )
    include: list[str] = Field(
        [],
        description="What to read of a directory, as in .gitignore (`*.c`, `src/**/*.py`), whatever its extension.",
    )
    exclude: list[str] = Field([], description="What to leave out of a directory or glob, as in .gitignore (`tests/`).")
    format: Literal["auto", "text", "jsonl", "json", "csv", "parquet"] = Field(
        "auto",
        description="How to read the sources; `auto` goes by extension (.txt, .jsonl, .json, .csv, .tsv, .parquet; "
        "with .gz, .zst, .bz2 or .xz behind it).",
    )
    separator: str | None = Field(
        None, min_length=1, description="What stands between the documents of a text file; none: the file is one."
    )
    template: str = Field(
        "{text}",
        min_length=1,
        description="How a record of JSON, CSV or Parquet becomes text; names its fields.",
    )
    on_bad: Literal["drop", "replace", "fail"] = Field(
        "drop",
        description="What to do with a document that is not valid UTF-8: leave it out, put U+FFFD in place of the "
        "bytes, or stop. Broken records and files are left out unless it is `fail`. All is counted.",
    )
    normalization: Literal["none", "NFC", "NFKC"] = Field("none", description="Unicode normalization of documents.")
    min_characters: Annotated[int, Field(ge=1)] = Field(1, description="Shorter documents are left out.")
    max_characters: PositiveInt | None = Field(None, description="Longer documents are left out.")
    deduplicate: Literal["none", "exact", "near"] = Field(
        "exact",
        description="Of equal documents in the whole corpus keep the first; `near`: of similar ones as well, for which "
        "one process keeps 3 KB in memory for each document.",
    )
    near_similarity: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.8, description="Jaccard similarity of the 5-character shingles from which documents are `near` duplicates."
    )
    heldout: Literal["hash", "tail"] = Field(
        "hash",
        description="Which text is held out: documents chosen by a hash of their content, or the corpus' end.",
    )
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.01, description="Share of the corpus held out.")
    partition_bytes: PositiveInt = Field(
        32 << 20,
        description="Bytes of input in one unit of work; larger files are cut, but for compressed ones and .json.",
    )
    segment_tokens: PositiveInt = Field(65_536, description="Tokens in one Parquet row group, or a little more.")


class TokenizerConfig(Section):
    kind: Literal["bpe", "char", "byte"] = Field(
        "bpe",
        description="`bpe` (byte-level), `char` (characters, with bytes for those never seen) or `byte`.",
    )
    path: str | None = Field(None, description="An existing tokenizer.json to use instead of making one.")
    vocab_size: Annotated[int, Field(ge=257)] = Field(4096, description="Largest vocabulary of `bpe` and `char`.")
    sample_bytes: PositiveInt = Field(
        50_000_000, description="Text that the tokenizer is made from, sampled from all over the corpus."
    )


class ModelConfig(Section):
    embedding: PositiveInt = Field(384, description="Width of the token embedding, shared with the output layer.")
    hidden: PositiveInt = Field(
        384, description="Width of the hidden state of each recurrent layer; multiples of 32 are fastest on CPUs."
    )
    layers: PositiveInt = Field(1, description="Number of residual recurrent blocks.")
    cell: Cell = Field(
        "gru",
        description="What a block recurs with: `gru`, `lstm`, `rnn` (tanh), or `mingru`, whose gates read no state.",
    )
    dropout: Share = Field(0.0, description="Share of each block's input and of the output dropped in training.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="What training rounds the factors of matrix products to; `auto` is bf16 where that is faster.",
    )


class TrainConfig(Section):
    # Where and how training runs: another choice leaves what is trained the same, up to rounding.
    PLACEMENT: ClassVar = (
        "workers",
        "min_workers",
        "threads",
        "checkpoint_seconds",
        "checkpoint_steps",
        "keep",
        "max_failures",
        "stall_seconds",
    )

    steps: PositiveInt = Field(1000, description="Optimizer steps in all.")
    batch_size: PositiveInt = Field(32, description="Parallel streams of text: the global batch, whatever the workers.")
    sequence_length: PositiveInt = Field(
        64, description="Tokens that a lane reads in one step: the reach of backpropagation."
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(4e-3, description="Peak learning rate of AdamW.")
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="Learning rate at the end of the cosine, as a share of the peak."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(50, description="Steps of linear warm-up.")
    beta2: Annotated[float, Field(gt=0, lt=1)] = Field(0.99, description="AdamW's second-moment decay.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.05, description="AdamW's weight decay, on matrices only.")
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="Largest norm of the gradient.")
    ema_decay: Share = Field(0.995, description="Decay of the moving average of the weights, which is what is served.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of weights, order of text and dropout.")
    workers: PositiveInt = Field(1, description="Processes that train together (DDP); it must not exceed `batch_size`.")
    min_workers: PositiveInt | None = Field(
        None,
        description="Fewest workers to train with where the cluster has no room for all of `workers`: the run takes "
        "as many as it can, and follows the cluster as it grows and shrinks. Absent: all or none.",
    )
    bitwise_elastic: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Parts that the lanes are computed in, one after the other, with gradients summed in a fixed "
        "order: up to this many workers give bit-identical weights on CPUs. 0: plain DDP, the same up to rounding.",
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        0,
        description="CPU threads of each worker; 0 shares the machine's cores between the workers on it, or is one "
        "with `bitwise_elastic`, since other threads may round otherwise.",
    )
    log_steps: PositiveInt = Field(10, description="Steps between two logged points.")
    heldout_steps: PositiveInt = Field(250, description="Steps between two measurements of the held-out loss.")
    heldout_tokens: PositiveInt = Field(100_000, description="Most held-out tokens read by such a measurement.")
    checkpoint_seconds: Annotated[float, Field(gt=0)] = Field(30, description="Time between two checkpoints.")
    checkpoint_steps: PositiveInt | None = Field(None, description="Steps between two checkpoints, instead of time.")
    keep: PositiveInt = Field(
        2, description="Newest checkpoints that are kept; the one with the lowest held-out loss always is."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3,
        description="Worker failures to recover from before giving up. A drained node is not one, and the count begins "
        "anew with the group that takes over.",
    )
    stall_seconds: Annotated[float, Field(ge=5)] = Field(
        45, description="A worker that finishes no step for this long counts as failed, and is started again."
    )

    @model_validator(mode="after")
    def check(self) -> "TrainConfig":
        if self.workers > self.batch_size:
            raise ValueError(
                f"workers = {self.workers} exceeds batch_size = {self.batch_size}: each worker needs a lane"
            )
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers = {self.min_workers} exceeds workers = {self.workers}")
        if self.bitwise_elastic > self.batch_size:
            raise ValueError(
                f"bitwise_elastic = {self.bitwise_elastic} exceeds batch_size = {self.batch_size}: no empty parts"
            )
        if self.bitwise_elastic and self.workers > self.bitwise_elastic:
            raise ValueError(
                f"workers = {self.workers} exceeds bitwise_elastic = {self.bitwise_elastic}: each worker needs a part"
            )
        return self


class EvaluateConfig(Section):
    batch_size: PositiveInt = Field(16, description="Stretches of held-out text read side by side.")
    heldout_bytes: PositiveInt = Field(4_000_000, description="Most held-out text that is scored.")
    prompt: str = Field("\n", description="What the sampled texts begin with.")
    sample_tokens: PositiveInt = Field(200, description="Tokens in each sampled text.")
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(
        [0.5, 0.8, 1.0], min_length=1, description="A text is sampled at each of these."
    )


class RegistryConfig(Section):
    model: Name | None = Field(None, description="Name of the registered model; the pipeline's name where absent.")
    experiment: Name | None = Field(None, description="MLflow experiment; the pipeline's name where absent.")


class CanaryConfig(Section):
    alias: Name = Field("challenger", description="Which other version of the model takes a share of the requests.")
    share: Share = Field(
        0.0, description="Share of the requests that it takes, those of a session always or never; 0: it is not loaded."
    )


class ServeConfig(Section):
    host: str = Field("127.0.0.1", description="Address that the endpoint binds to.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="Port of the endpoint.")
    replicas: PositiveInt = Field(1, description="Processes that serve; with `max_replicas` the fewest.")
    max_replicas: PositiveInt | None = Field(
        None, description="Most processes that serve, where their number follows the tokens in flight."
    )
    tokens_per_replica: PositiveInt = Field(
        20_000, description="Tokens in flight, asked for and not made yet, from which there is another replica."
    )
    slots: Annotated[int, Field(ge=4)] = Field(32, description="Streams that one replica steps together.")
    max_queue: PositiveInt = Field(256, description="Requests that wait for a slot before others are refused (429).")
    max_tokens_in_flight: PositiveInt = Field(
        4_000_000, description="Tokens that the requests of a replica may come to before others are refused (429)."
    )
    max_tokens: PositiveInt = Field(4096, description="Most tokens that one request may ask for.")
    max_prompt_tokens: PositiveInt = Field(200_000, description="Most tokens of a prompt.")
    max_body_bytes: PositiveInt = Field(
        8 << 20, description="Largest body of a request; larger ones are refused (413)."
    )
    request_seconds: Annotated[float, Field(gt=0)] = Field(
        600, description="Longest time that a request may take; then it ends with an error (503)."
    )
    cache_bytes: Annotated[int, Field(ge=0)] = Field(
        64 << 20, description="Memory of a replica for states of sessions and of beginnings of prompts."
    )
    keys: str | None = Field(
        None, description="File of API keys, made by `gru key`, without one of which nothing is generated."
    )
    chat_template: Annotated[str, Field(pattern=r"^[^{}]*(\{role\}[^{}]*)?\{content\}[^{}]*$")] = Field(
        "{role}:\n{content}\n\n",
        description="How each message of a chat becomes text. The answer is written where the next `content` would be, "
        "and ends with what comes after it.",
    )
    poll_seconds: Annotated[float, Field(gt=0)] = Field(5, description="Time between two looks at `@champion`.")
    canary: CanaryConfig = CanaryConfig()

    @model_validator(mode="after")
    def check(self) -> "ServeConfig":
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is below replicas = {self.replicas}")
        return self


class Resources(Section):
    """What of the cluster each process of a stage is given. What a stage makes is the same wherever it is made."""

    cpus: Annotated[float, Field(ge=0)]
    memory: PositiveInt | None = Field(None, description="Bytes of memory that Ray reserves for it. Absent: none.")
    labels: Labels = Field(
        {},
        description='Labels of the nodes that it may be on: `{ pool = "gpu" }`, and for a value `!gpu`, `in(a, b)` or '
        "`!in(a, b)`.",
    )

    def amounts(self) -> dict[str, float]:
        """What is reserved, by Ray's names."""
        return {"CPU": self.cpus, "memory": self.memory or 0}


class PrepareResources(Resources):
    cpus: Annotated[float, Field(gt=0)] = Field(1, description="CPUs that Ray reserves for each task.")


class TrainResources(Resources):
    cpus: Annotated[float, Field(gt=0)] = Field(1, description="CPUs that Ray reserves for each worker.")
    gpus: Annotated[int, Field(ge=0, le=1)] = Field(
        0, description="GPUs of each worker: with one, it trains on that, and NCCL is used between workers."
    )

    def amounts(self) -> dict[str, float]:
        return {**super().amounts(), "GPU": self.gpus}


class EvaluateResources(Resources):
    cpus: Annotated[float, Field(ge=0)] = Field(
        0,
        description="CPUs that Ray reserves for the job, and for that of `promote`, which scores the present champion. "
        "Where nothing is reserved and no label is named, they are on the head.",
    )


class ServeResources(Resources):
    cpus: Annotated[float, Field(ge=0)] = Field(
        0.5, description="CPUs that Ray reserves for each replica; what is left of a small machine is for other stages."
    )


class ResourcesConfig(Section):
    prepare: PrepareResources = PrepareResources()
    train: TrainResources = TrainResources()
    evaluate: EvaluateResources = EvaluateResources()
    serve: ServeResources = ServeResources()


class PipelineConfig(Section):
    name: Name = Field("gru", description="Name of the pipeline, its experiment and model.")
    storage: str = Field("./store", description="Path or URL where everything is kept.")
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


def load(source: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a TOML file (or a JSON object given as text), apply `section.key=value` overrides and validate.

    Raises UserError naming the file and the key that is wrong.
    """
    inline = str(source).lstrip().startswith("{")
    path = "configuration" if inline else source
    try:
        table = json.loads(str(source)) if inline else tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except ValueError as error:  # of TOML, JSON or UTF-8
        raise UserError(f"{path}: not valid {'JSON' if inline else 'TOML'}: {error}") from None
    for override in overrides:
        _apply(table, override, "--set ")
    return _validated(table, str(path))


def changed(config: PipelineConfig, overrides: Sequence[str], option: str) -> PipelineConfig:
    """The configuration with `section.key=value` overrides that `option` gave, which is named if they are wrong."""
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
        raise UserError(f"{option}{override}: expected section.key=value, as in train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set name=mine
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"{option}{override}: {part} is a value, not a section")
    table[parts[-1]] = value


def _explain(error: dict[str, Any]) -> str:
    """One of pydantic's errors in words: `train.stpes: unknown key (known: ...)`."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "configuration"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; known here: {', '.join(_keys_at(location[:-1]))}"
    if error["type"] == "missing":
        return f"{key}: required, but absent"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f", not {given!r}" if not isinstance(given, dict) else ""
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"


def _keys_at(location: list[str]) -> list[str]:
    record: type[BaseModel] = PipelineConfig
    for part in location:
        annotation = record.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        record = annotation
    return list(record.model_fields)


def describe() -> str:
    """Every key with its type, default and description, laid out as the TOML file is."""
    return "\n".join(_describe(PipelineConfig, ""))


def _describe(record: type[BaseModel], section: str) -> Iterator[str]:
    sections: list[tuple[str, type[BaseModel]]] = []
    for name, field in record.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append((f"{section}{name}", field.annotation))
            continue
        default = "required" if field.is_required() else f"default {_toml(field.default)}"
        yield f"  {section}{name}: {_type_name(field.annotation)} ({default})"
        yield f"      {field.description}"
    for name, inner in sections:
        yield f"[{name}]"
        yield from _describe(inner, f"{name}.")


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
    """A short name for what went into something: 16 hexadecimal digits of the SHA-256 of `parts` as JSON."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
