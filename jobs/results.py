"""The results of the stages and workflows: JSON objects that jobs print and that lie on storage, as typed records.

They are plain dictionaries, so that files, DBOS records and printed lines have the same keys.
"""

from collections.abc import Mapping
from typing import Any, NotRequired, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # the standard library's is not validated by pydantic before Python 3.12

from gru.terminal import counted

R = TypeVar("R", bound=Mapping[str, object])


class Counts(TypedDict):
    """Sizes of a dataset."""

    documents: int
    bytes: int
    tokens: int
    dropped: int
    """Number of documents that were left out."""
    vocabulary: int
    """Number of tokens that the tokenizer knows."""
    shards: int


class PrepareResult(Counts):
    stage: str
    key: str
    dataset: str
    """Directory of the dataset."""
    digest: str
    """Digest of the dataset's manifest."""
    heldout_digest: str
    """Digest of the held-out texts, which does not depend on the tokenizer."""
    heldout_by: str
    """How the held-out text was chosen: `hash`, `tail` or `lowest_hash`."""
    reasons: dict[str, int]
    """Number of documents that were left out, by reason."""
    dropped_bytes: dict[str, int]
    """Bytes of the sources that were lost with them, by reason, as far as known."""
    passed_over: dict[str, int]
    """Number of files in the sources' directories and archives that are not read, by extension."""
    seconds: float


class TrainResult(TypedDict):
    stage: str
    key: str
    bundle: str
    """Directory of the bundle."""
    run: str
    """Id of the MLflow run."""
    steps: int
    initial: NotRequired[str]
    """What training started from. Absent in older results."""
    heldout_loss: float
    """Nats per token."""
    seconds: float


class Measures(TypedDict):
    """Losses on the held-out text, of the model and of the n-gram baseline."""

    bits_per_byte: float
    bits_per_character: float
    bits_per_token: float
    nats_per_character: float
    perplexity_per_character: float
    perplexity_per_token: float
    ngram_bits_per_byte: float
    ngram_bits_per_character: float
    ngram_bits_per_token: float
    ngram_nats_per_character: float
    ngram_perplexity_per_character: float
    ngram_perplexity_per_token: float


class EvaluateResult(Measures):
    stage: str
    key: str
    context: list[dict[str, Any]]
    """Loss by the number of tokens read since the state was reset."""
    copied: dict[str, float]
    """Shares of copied and of repeated text, by sample."""
    searched_bytes: int
    """Size of the training text that was searched for copies."""
    text: str
    """Digest of the held-out text."""
    samples: list[str]
    """One text for each of `evaluate.temperatures`."""
    run: str
    """Id of the MLflow run."""
    seconds: float


class PromoteResult(TypedDict):
    stage: str
    key: str
    model: str
    version: str
    bundle: str
    """Digest of the bundle that was registered."""
    promoted: bool
    """Whether the version is the champion."""
    reason: str
    run: str
    """Id of the MLflow run."""


class ServeResult(TypedDict):
    stage: str
    endpoint: str
    """URL of the endpoint."""
    model: str
    version: str


class StageResults(TypedDict, total=False):
    """The results of the stages of one workflow that are done."""

    prepare: PrepareResult
    train: TrainResult
    evaluate: EvaluateResult
    promote: PromoteResult
    serve: ServeResult


class ScoreSummary(TypedDict):
    """The measures that a workflow reports."""

    bits_per_byte: float
    nats_per_character: float
    perplexity_per_token: float
    ngram_bits_per_byte: float


class RunResult(ScoreSummary):
    """The result of the workflow over all stages."""

    model: str
    version: str
    """The version that this workflow registered."""
    promoted: bool
    serving: str
    """The version that is served."""
    endpoint: str
    tracking: str
    """MLflow run over all stages: its id in the workflow's record, its URL where it is printed."""
    dataset: str
    sample: str


class TrialFailure(TypedDict):
    error: str


class SweepResult(TypedDict):
    """The result of a sweep."""

    best: str
    """Label of the best trial."""
    bits_per_byte: float
    trials: dict[str, ScoreSummary | TrialFailure]
    """The result of each trial by its label."""
    tracking: str
    """MLflow run over all trials: its id in the workflow's record, its URL where it is printed."""


def parse(kind: type[R], value: object) -> R | None:
    """Return `value` if it is a result of this kind; None if it is not, such as one of an older version."""
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return None
    return cast(R, value)


def score_summary(evaluated: EvaluateResult) -> ScoreSummary:
    """The measures that a workflow reports, from the result of its stage `evaluate`."""
    return {
        "bits_per_byte": evaluated["bits_per_byte"],
        "nats_per_character": evaluated["nats_per_character"],
        "perplexity_per_token": evaluated["perplexity_per_token"],
        "ngram_bits_per_byte": evaluated["ngram_bits_per_byte"],
    }


def describe(stage: str, result: Mapping[str, Any]) -> str:
    """Return a stage's result in a few words."""
    match stage:
        case "prepare":
            documents, tokens = counted(result["documents"], "document"), counted(result["tokens"], "token")
            return f"{documents}, {result['bytes'] / 1e6:,.1f} MB, {tokens}"
        case "train":
            start = f" from {result['initial']}" if "initial" in result else ""
            return f"{counted(result['steps'], 'step')}{start}, held-out {result['heldout_loss']:.3f} nats per token"
        case "evaluate":
            return f"{result['bits_per_byte']:.3f} bits per byte"
        case "promote":
            state = "is @champion" if result["promoted"] else "is not @champion"
            return f"{result['model']} version {result['version']} {state}: {result['reason']}"
        case _:
            return f"version {result['version']} at {result['endpoint']}"
