"""The sections of the configuration for what follows the dataset: [model] to [serve], and the [resources] of stages.

This module does not know the corpus, or where the values come from.
"""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from gru.config_fields import ChatTemplate, Name, PositiveInt, Section, Share, with_pattern

NO_MODEL = "none"  # train.init_digest if train.init_from was looked up, and there is no such model yet
GpuCount = Annotated[int, Field(ge=0, le=1)]
Cell = Literal["gru", "lstm", "rnn", "mingru"]


def _check_label(text: str) -> str:
    if not re.fullmatch(rf"([A-Za-z0-9.-]+/)?{_LABEL}", text):
        raise ValueError("must be the name of a label, as in pool or ray.io/market-type")
    return text


def _check_selector(text: str) -> str:
    if not re.fullmatch(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))", text):
        raise ValueError("must be a label's value, as in gpu, !gpu, in(a, b) or !in(a, b)")
    return text


_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"  # the syntax of Kubernetes and Ray
Labels = dict[Annotated[str, AfterValidator(_check_label)], Annotated[str, AfterValidator(_check_selector)]]
_ORIGIN = r"\*|[a-z][a-z0-9+.-]*://[^/\sA-Z]+"


def _check_origin(text: str) -> str:
    if not re.fullmatch(_ORIGIN, text):
        raise ValueError("must be as browsers send it, as in https://app.example.org: no path, no capitals; or *")
    return text


Origin = Annotated[str, with_pattern(f"({_ORIGIN})"), AfterValidator(_check_origin)]


class ModelConfig(Section):
    """The architecture of the language model."""

    embedding: PositiveInt = Field(384, description="Width of the token embedding, shared with the output layer.")
    hidden: PositiveInt = Field(
        384, description="Width of the hidden state of each recurrent layer; multiples of 32 are fastest on CPUs."
    )
    layers: PositiveInt = Field(1, description="Number of residual recurrent blocks.")
    cell: Cell = Field(
        "gru",
        description="Recurrent cell of each block: `gru`, `lstm`, `rnn` (tanh), or `mingru`, whose gates do not read "
        "the hidden state.",
    )
    dropout: Share = Field(
        0.0, description="Dropout rate in training, on the inputs of each block and of the output layer."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Number type of the factors of matrix products in training; `auto`: bf16 where it is faster.",
    )


class TrainConfig(Section):
    """Training: optimizer, batches, workers and checkpoints."""

    # The keys for where and how training runs, which change the trained weights by rounding at most.
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
    # The keys for the initial weights, which are the same whatever their name is.
    INITIAL: ClassVar = ("init_from", "init_digest")

    steps: PositiveInt = Field(1000, description="Number of optimizer steps.")
    batch_size: PositiveInt = Field(
        32, description="Number of lanes: the streams of text that all workers together read in parallel."
    )
    sequence_length: PositiveInt = Field(
        64, description="Tokens that each lane reads per step: the length of truncated backpropagation through time."
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(4e-3, description="Peak learning rate of AdamW.")
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05,
        description="Learning rate at the end of the cosine schedule, as a ratio to `learning_rate`: 0.05 is a "
        "twentieth.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(50, description="Number of steps of linear warm-up.")
    beta2: Annotated[float, Field(gt=0, lt=1)] = Field(0.99, description="Decay of AdamW's second moment.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.05, description="Weight decay of AdamW, on matrices only.")
    clip: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Maximum norm of the gradient; a larger gradient is scaled down to it."
    )
    ema_decay: Share = Field(
        0.995, description="Decay of the moving average of the weights; this average is evaluated and served."
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="Random seed of the initial weights, the order of the text and dropout."
    )
    init_from: str | None = Field(
        None,
        min_length=1,
        description="Model to start from instead of random weights: `NAME@ALIAS` or `NAME:VERSION` of the registry, "
        "`@champion` for this pipeline's own (random weights while it has none), or the path or URL of a bundle or "
        "checkpoint. Its averaged weights and its tokenizer are used: the shape in [model] must be the same, and keys "
        "of [tokenizer] must fit it or have their defaults. Schedule, optimizer and hidden states start anew. An alias "
        "is looked up once, when a run starts.",
    )
    init_digest: Annotated[str, Field(pattern=f"^([0-9a-f]{{64}}|{NO_MODEL})$")] | None = Field(
        None,
        description="Digest of the bundle that `init_from` must name, as `gru lineage` shows it; `none`: there is none "
        "yet. A run sets it when it looks up `init_from`. Absent: any.",
    )
    workers: PositiveInt = Field(
        1, description="Number of training processes (data parallelism), at most `batch_size`."
    )
    min_workers: PositiveInt | None = Field(
        None,
        description="Minimum workers to train with if the cluster has no room for all `workers`: the run uses as many "
        "as fit, and adapts while the cluster grows and shrinks. Absent: all `workers` or none.",
    )
    bitwise_elastic: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Maximum workers that give bit-identical weights on CPUs, whatever their number: the lanes are "
        "computed in this many parts, with gradients summed in a fixed order. 0: plain data parallelism, where weights "
        "differ by rounding if the number of workers differs.",
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        0,
        description="CPU threads of each worker. 0: the machine's cores, divided among its workers, or 1 thread with "
        "`bitwise_elastic`, because the number of threads changes rounding.",
    )
    log_steps: PositiveInt = Field(10, description="Steps between two logged points.")
    heldout_steps: PositiveInt = Field(250, description="Steps between two measurements of the held-out loss.")
    heldout_tokens: PositiveInt = Field(100_000, description="Maximum held-out tokens that one measurement reads.")
    checkpoint_seconds: Annotated[float, Field(gt=0)] = Field(30, description="Seconds between two checkpoints.")
    checkpoint_steps: PositiveInt | None = Field(
        None, description="Steps between two checkpoints. Absent: `checkpoint_seconds` decides."
    )
    keep: PositiveInt = Field(
        2, description="Number of newest checkpoints to keep, besides the one with the lowest held-out loss."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3,
        description="Maximum worker failures to recover from before giving up. A drained node does not count; after "
        "it, and after a crash of Ray Train's controller, the count restarts.",
    )
    stall_seconds: Annotated[float, Field(ge=5)] = Field(
        45, description="Seconds without a finished step after which a worker counts as failed and is restarted."
    )

    @model_validator(mode="after")
    def check(self) -> "TrainConfig":
        """Check the keys that depend on each other."""
        if self.init_digest and not self.init_from:
            raise ValueError("init_digest needs init_from")
        if self.workers > self.batch_size:
            raise ValueError(
                f"workers = {self.workers} exceeds batch_size = {self.batch_size}: each worker needs a lane"
            )
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers = {self.min_workers} exceeds workers = {self.workers}")
        if self.bitwise_elastic > self.batch_size:
            raise ValueError(
                f"bitwise_elastic = {self.bitwise_elastic} exceeds batch_size = {self.batch_size}: each part needs a "
                "lane"
            )
        if self.bitwise_elastic and self.workers > self.bitwise_elastic:
            raise ValueError(
                f"workers = {self.workers} exceeds bitwise_elastic = {self.bitwise_elastic}: each worker needs a part"
            )
        return self


class EvaluateConfig(Section):
    """Evaluation: scores on held-out text, and sampled texts."""

    batch_size: PositiveInt = Field(16, description="Number of streams of held-out text that are read in parallel.")
    heldout_bytes: PositiveInt = Field(4_000_000, description="Maximum bytes of held-out text that are scored.")
    prompt: str = Field("\n", description="Prompt of the sampled texts.")
    sample_tokens: PositiveInt = Field(200, description="Number of tokens in each sampled text.")
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(
        [0.5, 0.8, 1.0], min_length=1, description="Temperatures, at each of which one text is sampled."
    )


class RegistryConfig(Section):
    """Names in MLflow."""

    model: Name | None = Field(None, description="Name of the registered model. Absent: the pipeline's name.")
    experiment: Name | None = Field(None, description="Name of the MLflow experiment. Absent: the pipeline's name.")


class CanaryConfig(Section):
    """A second version of the model that answers a share of the requests."""

    alias: Name = Field("challenger", description="Alias of the version that answers a share of the requests.")
    share: Share = Field(
        0.0,
        description="Share of the requests that this version answers; all requests of a session go to the same "
        "version. 0: it is not loaded.",
    )


class ServeConfig(Section):
    """The HTTP endpoint."""

    host: str = Field("127.0.0.1", description="Address that the endpoint listens on.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="Port of the endpoint.")
    replicas: PositiveInt = Field(
        1, description="Number of replicas (serving processes); with `max_replicas` the minimum."
    )
    max_replicas: PositiveInt | None = Field(
        None,
        description="Maximum replicas; their number follows the tokens in flight. Absent: always `replicas`.",
    )
    tokens_per_replica: PositiveInt = Field(
        20_000,
        description="Tokens in flight (prompts and `max_tokens` of unfinished requests) per replica above which "
        "another one starts.",
    )
    slots: Annotated[int, Field(ge=4)] = Field(
        32, description="Number of texts that a replica generates together; other requests wait."
    )
    threads: PositiveInt = Field(
        1,
        description='Threads that compute each step of a model with `cell = "gru"`; use more than 1 only where each '
        "replica has that many idle cores. The texts do not depend on it.",
    )
    max_queue: PositiveInt = Field(256, description="Maximum requests that wait for a slot; more are refused (429).")
    max_tokens_in_flight: PositiveInt = Field(
        4_000_000, description="Maximum tokens in flight in a replica; further requests are refused (429)."
    )
    max_tokens: PositiveInt = Field(4096, description="Maximum tokens that one request may ask for.")
    max_prompt_tokens: PositiveInt = Field(200_000, description="Maximum tokens in a prompt.")
    max_body_bytes: PositiveInt = Field(
        8 << 20, description="Maximum bytes in the body of a request; larger ones are refused (413)."
    )
    request_seconds: Annotated[float, Field(gt=0)] = Field(
        600, description="Maximum seconds that a request may take; then it ends with an error (503)."
    )
    cache_bytes: Annotated[int, Field(ge=0)] = Field(
        64 << 20, description="Bytes of memory in each replica for the hidden states of sessions and the prefix cache."
    )
    keys: str | None = Field(
        None,
        description="Path of a file of lines from `gru key`; each request needs the key of one of them. Absent: none "
        "is needed.",
    )
    cors_origins: list[Origin] = Field(
        [],
        description="Origins of web pages that may send requests from a browser, such as `https://app.example.org`; "
        "`*`: all. Empty: none.",
    )
    chat_template: ChatTemplate | None = Field(
        None,
        description="Text to make from each message of a chat. The answer takes the place of the next `{content}`, and "
        "ends at the text after it. Absent: `corpus.chat_template`.",
    )
    poll_seconds: Annotated[float, Field(gt=0)] = Field(5, description="Seconds between two looks at `@champion`.")
    canary: CanaryConfig = CanaryConfig()

    @model_validator(mode="after")
    def check(self) -> "ServeConfig":
        """Check the keys that depend on each other."""
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is below replicas = {self.replicas}")
        return self


class Resources(Section):
    """The resources of the cluster that each process of a stage gets. They change results by rounding at most."""

    cpus: Annotated[float, Field(ge=0)] = Field(description="CPUs that Ray reserves for each process.")
    memory: PositiveInt | None = Field(
        None,
        description="Bytes of memory that Ray reserves for each process, without limiting it. Absent: none.",
    )
    labels: Labels = Field(
        {},
        description='Labels of nodes to run on: `{ pool = "gpu" }`, or as the value `!gpu` (not), `in(a, b)` (one of) '
        "or `!in(a, b)` (none of).",
    )

    def amounts(self) -> dict[str, float]:
        """Return the reserved amounts by Ray's names."""
        return {"CPU": self.cpus, "memory": self.memory or 0}


class PrepareResources(Resources):
    """The resources of each task of prepare."""

    cpus: Annotated[float, Field(gt=0)] = Field(1, description="CPUs that Ray reserves for each task.")


class GpuResources(Resources):
    """The resources of a stage whose processes can each compute on a GPU."""

    gpus: GpuCount = Field(0, description="GPUs of each process.")

    def amounts(self) -> dict[str, float]:
        return {**super().amounts(), "GPU": self.gpus}


class TrainResources(GpuResources):
    """The resources of each training worker."""

    cpus: Annotated[float, Field(gt=0)] = Field(1, description="CPUs that Ray reserves for each worker.")
    gpus: GpuCount = Field(
        0, description="GPUs of each worker: with 1 it trains on the GPU, and workers communicate through NCCL."
    )


class EvaluateResources(GpuResources):
    """The resources of the evaluate job, and of the promote job, which scores the current champion."""

    cpus: Annotated[float, Field(ge=0)] = Field(
        0,
        description="CPUs that Ray reserves for the evaluate job, and for the promote job. Without CPUs, GPU, memory "
        "and labels, they run on the head node.",
    )
    gpus: GpuCount = Field(
        0,
        description="GPUs of the evaluate job, and of the promote job: with 1 they score held-out text on the GPU. "
        "Texts are sampled on the CPU.",
    )


class ServeResources(Resources):
    """The resources of each serving replica."""

    cpus: Annotated[float, Field(ge=0)] = Field(
        0.5,
        description="CPUs that Ray reserves for each replica; fewer than 1 leaves room for other stages on a small "
        "machine.",
    )


class ResourcesConfig(Section):
    """The resources that Ray reserves for each stage. They change results by rounding at most."""

    prepare: PrepareResources = PrepareResources()
    train: TrainResources = TrainResources()
    evaluate: EvaluateResources = EvaluateResources()
    serve: ServeResources = ServeResources()
