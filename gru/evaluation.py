"""How good a model is: its loss on held-out text, how far back it reads, and the texts that it writes.

Bits per byte and what is given per character do not depend on the tokenizer, so models with different ones can be
compared on the same text.

N tokens of the text; T time, B lanes or starting points side by side, L layers, E embedding, H hidden.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from gru import copies
from gru.config import EvaluateConfig
from gru.corpus.dataset import Dataset
from gru.corpus.lanes import stream_batches
from gru.corpus.tokenizer import Tokenizer
from gru.model.decoder import decoder_for
from gru.model.language_model import GRULanguageModel
from gru.model.transformer import Transformer
from gru.ngram import NGramModel
from gru.serving.engine import Engine, Finish, Request
from gru.serving.sampling import GREEDY, SamplingParams

WINDOW = 256
LONGEST_REACH = 2048  # tokens after a reset up to which the loss is measured
MOST_STARTS = 2048
TOKENS_A_REACH = 8192  # most losses that are averaged at each distance
LOGITS = 1 << 24  # in memory at a time
NGRAM_ORDER = 5
NGRAM_TOKENS = 10_000_000  # 1 GB of memory and 15 seconds
SAMPLES = 16  # texts at each temperature
SLOTS = 32  # texts that are written side by side
SEARCHED_BYTES = 200_000_000  # of training text, 20 seconds

Tokens = np.ndarray[Any, np.dtype[Any]]
Losses = np.ndarray[Any, np.dtype[np.floating[Any]]]

LanguageModel = GRULanguageModel | Transformer


@dataclass(frozen=True)
class Scores:
    """Losses over a text: `nats` in all, ends of documents included; bytes and characters without them.

    `text` is a digest of what was scored: scores can be compared where it is the same.
    """

    nats: float
    tokens: int
    bytes: int
    characters: int
    text: str

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def bits_per_character(self) -> float:
        return self.nats / math.log(2) / self.characters

    @property
    def bits_per_token(self) -> float:
        return self.nats / math.log(2) / self.tokens

    @property
    def nats_per_character(self) -> float:
        return self.nats / self.characters

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity_per_character(self) -> float:
        return math.exp(self.nats / self.characters)

    @property
    def perplexity_per_token(self) -> float:
        """To be compared with that of the same tokenizer only."""
        return math.exp(self.nats / self.tokens)

    def measures(self) -> dict[str, float]:
        names = ("bits_per_byte", "bits_per_character", "bits_per_token", "nats_per_character")
        return {name: getattr(self, name) for name in (*names, "perplexity_per_character", "perplexity_per_token")}


@dataclass(frozen=True)
class Heldout:
    """Whole documents as one stream of tokens, an end of text after each. `digest` is that of their texts."""

    tokens: Tokens
    end_of_text: int
    bytes: int
    characters: int
    digest: str

    def scores(self, nats: float, lanes: int) -> Scores:
        """nats: the loss in all. lanes: stretches that were read side by side, a reset before each."""
        text = hashlib.sha256(f"{lanes} lanes of {self.digest}".encode()).hexdigest()
        return Scores(nats, len(self.tokens), self.bytes, self.characters, text)


def read(tokenizer: Tokenizer, texts: Iterable[str], most_bytes: int) -> Heldout:
    """The first documents, until there are `most_bytes`."""
    parts: list[np.ndarray] = []
    size = characters = 0
    digest = hashlib.sha256()
    for text in _first(texts, most_bytes):
        data = text.encode()
        parts.append(np.append(tokenizer.encode(text), np.uint32(tokenizer.end_of_text)))
        digest.update(hashlib.sha256(data).digest())
        size, characters = size + len(data), characters + len(text)
    return Heldout(np.concatenate(parts), tokenizer.end_of_text, size, characters, digest.hexdigest())


def score(model: GRULanguageModel, heldout: Heldout, lanes: int) -> Scores:
    """The model's scores on the text, read in so many lanes."""
    return heldout.scores(float(token_losses(model, heldout, lanes).sum(dtype=np.float64)), lanes)


@torch.inference_mode()
def token_losses(model: GRULanguageModel, heldout: Heldout, lanes: int) -> Losses:
    """The loss of each token in nats [N]; the state is carried from each document to the next."""
    state_LBH = model.initial_state(lanes)
    parts = []
    for inputs_TB, targets_TB, _ in stream_batches(heldout.tokens, lanes, WINDOW, heldout.end_of_text):
        losses_TB, state_LBH = _window_losses(model, inputs_TB, targets_TB, state_LBH)
        parts.append(losses_TB)
    return np.concatenate(parts).T.reshape(-1)[: len(heldout.tokens)]  # the last lane ends in padding


def score_ngrams(dataset: Dataset, heldout: Heldout) -> Scores:
    """An n-gram model of the dataset's training tokens, at most NGRAM_TOKENS from all over it, on the same tokens."""
    manifest = dataset.manifest
    model = NGramModel(_spread(dataset, NGRAM_TOKENS), manifest.vocab_size, manifest.end_of_text, NGRAM_ORDER)
    return heldout.scores(float(model.losses(heldout.tokens).sum()), lanes=1)


def _spread(dataset: Dataset, most: int) -> Tokens:
    """Training tokens, of all segments or of some at equal distances."""
    segments = dataset.segments("train")
    stride = max(1.0, dataset.manifest.train.tokens / most)
    chosen = [segments[int(i * stride)] for i in range(math.ceil(len(segments) / stride))]
    return np.concatenate([dataset.read_segment(segment) for segment in chosen])[:most]


@torch.inference_mode()
def stream_loss(model: LanguageModel, batches: Iterable[tuple[np.ndarray, ...]], lanes: int) -> float:
    """Summed loss in nats over batches of (inputs, targets, weights) [T, lanes], the state carried between them."""
    device = model.output_bias.device
    state_LBH = model.initial_state(lanes)
    total = 0.0
    for batch in batches:
        inputs_TB, targets_TB, weights_TB = (torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in batch)
        loss, state_LBH = model.loss(inputs_TB, targets_TB, state_LBH, weights_TB=weights_TB)
        total += float(loss)
    return total


@dataclass(frozen=True)
class Reach:
    """Loss of tokens before which, since a reset, `first` to `last` tokens were read."""

    first: int
    last: int
    starts: int
    """Points of the text at which the model was reset."""
    nats: float
    """Mean for each token of the text."""
    excess: float
    """What of it goes back to the reset."""
    error: float | None
    """Standard error of both; None where there is one start."""


@torch.inference_mode()
def context_losses(model: GRULanguageModel, heldout: Heldout, carried: Losses) -> list[Reach]:
    """How the loss falls with what was read since the model was reset to the zero state, at points all over the text.

    The distances double: 1, 2, 3-4, 5-8 ... LONGEST_REACH, or less where the text is shorter; the longer, the fewer
    starts. carried: from `token_losses`. Each loss is compared with that of the same token there: how difficult the
    tokens are, which differs more from start to start than contexts do, cancels out.
    """
    longest = min(LONGEST_REACH, 1 << (len(heldout.tokens) - 1).bit_length() >> 1)
    room = len(heldout.tokens) - longest
    places_B = np.linspace(0, room, min(MOST_STARTS, room), endpoint=False).astype(np.int64)
    state_LBH = model.initial_state(len(places_B))
    reaches: list[Reach] = []
    while (before := reaches[-1].last if reaches else 0) < longest:
        last = max(1, 2 * before)
        stride = -(-len(places_B) * (last - before) // min(TOKENS_A_REACH, room))  # starts do not overlap
        places_B, state_LBH = places_B[::stride], state_LBH[:, ::stride].contiguous()
        places_TB = places_B + np.arange(before, last)[:, None]
        inputs_TB, targets_TB = (heldout.tokens[places].astype(np.int64) for places in (places_TB, places_TB + 1))
        losses_TB, state_LBH = _window_losses(model, inputs_TB, targets_TB, state_LBH)
        excess_B = (losses_TB - carried[places_TB + 1]).mean(axis=0, dtype=np.float64)
        excess, starts = float(excess_B.mean()), len(excess_B)
        error = float(excess_B.std(ddof=1)) / math.sqrt(starts) if starts > 1 else None
        reaches.append(Reach(before + 1, last, starts, float(carried.mean()) + excess, excess, error))
    return reaches


def _window_losses(
    model: GRULanguageModel, inputs_TB: Tokens, targets_TB: Tokens, state_LBH: torch.Tensor
) -> tuple[Losses, torch.Tensor]:
    """The loss of each target in nats [T, B], and the next state. The logits are never in memory all at once."""
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(a)).to(state_LBH.device) for a in (inputs_TB, targets_TB))
    x_TBE, state_LBH = model.features(inputs, state_LBH)
    rows = max(1, LOGITS // model.vocab_size)
    losses = [
        F.cross_entropy(model.logits(x), aims, reduction="none")
        for x, aims in zip(x_TBE.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    ]
    return torch.cat(losses).view(targets.shape).float().cpu().numpy(), state_LBH


def sample_texts(
    model: GRULanguageModel, tokenizer: Tokenizer, prompt: str, tokens: int, temperatures: Sequence[float]
) -> list[str]:
    """A text of at most `tokens` tokens after the prompt at each temperature, as the endpoint gives it for seed 0."""
    params = [SamplingParams(temperature=temperature, seed=0) for temperature in temperatures]
    return [prompt + tokenizer.decode(ids) for ids in sample_ids(model, tokenizer, prompt, tokens, params)]


def sample_ids(
    model: GRULanguageModel, tokenizer: Tokenizer, prompt: str, tokens: int, params: Sequence[SamplingParams]
) -> list[list[int]]:
    """At most `tokens` tokens after the prompt for each of `params`."""
    slots = min(max(1, len(params)), SLOTS)
    engine = Engine(decoder_for(model), tokenizer.end_of_text, slots, max_queue=len(params))
    try:
        pending = []
        for each in params:
            ids: list[int] = []
            done: Future[None] = Future()
            engine.submit(Request(tokenizer.encode(prompt).tolist(), each, tokens, _collector(ids, done)))
            pending.append((ids, done))
        for _, done in pending:
            done.result()
        return [ids for ids, _ in pending]
    finally:
        engine.close(drain=False)


def _collector(ids: list[int], done: "Future[None]"):  # type: ignore[no-untyped-def]
    def receive(token: int | None, end: Finish | Exception | None) -> None:
        if token is not None:
            ids.append(token)
        if isinstance(end, Exception):
            done.set_exception(end)
        elif end is not None:
            done.set_result(None)

    return receive


@dataclass(frozen=True)
class Copied:
    """How much of some texts is copied. A share is None where no text is long enough."""

    copied_share: float | None
    """Of all spans of 32 characters, those that stand verbatim in the training text."""
    repetition: float | None
    """Of a text's 4-grams of tokens, those that stand in it before; the mean over the texts."""

    def measures(self) -> dict[str, float]:
        shares = {"copied_share": self.copied_share, "repetition": self.repetition}
        return {name: share for name, share in shares.items() if share is not None}


@dataclass(frozen=True)
class Writing:
    """What a model writes at each temperature, and held-out text of the same length as the scale."""

    samples: dict[float, list[list[int]]]
    """Token ids after the prompt; the first text at a temperature is that of seed 0."""
    copied: dict[float, Copied]
    heldout: Copied
    searched_bytes: int
    """How much of the training text was searched at least; where that is not all, more may be copied."""


def examine_writing(
    model: GRULanguageModel, tokenizer: Tokenizer, settings: EvaluateConfig, dataset: Dataset, heldout: Heldout
) -> Writing:
    """Let the model write SAMPLES texts at each temperature, and see what of them is copied."""
    params = [
        SamplingParams(seed=seed, temperature=temperature)
        for temperature in dict.fromkeys(settings.temperatures)
        for seed in range(SAMPLES if temperature >= GREEDY else 1)  # the likeliest text is always the same
    ]
    samples: dict[float, list[list[int]]] = {}
    written = sample_ids(model, tokenizer, settings.prompt, settings.sample_tokens, params)
    for each, ids in zip(params, written, strict=True):
        samples.setdefault(each.temperature, []).append(ids)
    scale = list(_excerpts(heldout, SAMPLES, settings.sample_tokens))
    # Excerpts may begin and end within a character.
    scale_texts = [tokenizer.decode_bytes(ids).decode(errors="ignore") for ids in scale]
    texts = {temperature: [tokenizer.decode(ids) for ids in these] for temperature, these in samples.items()}
    others = _first(dataset.texts("train"), SEARCHED_BYTES)
    found = copies.copied_spans([text for these in (scale_texts, *texts.values()) for text in these], others)
    return Writing(
        samples,
        {t: Copied(copies.copied_share(texts[t], found), copies.repetition(samples[t])) for t in samples},
        Copied(copies.copied_share(scale_texts, found), copies.repetition(scale)),
        min(dataset.manifest.train.bytes, SEARCHED_BYTES),
    )


def _excerpts(heldout: Heldout, count: int, tokens: int) -> Iterator[Tokens]:
    """Pieces of at most `tokens` tokens from all over the text, each of one document."""
    for start in np.linspace(0, len(heldout.tokens), count, endpoint=False).astype(int).tolist():
        piece = heldout.tokens[start : start + tokens]
        ends = np.flatnonzero(piece == heldout.end_of_text)
        yield piece[: ends[0]] if len(ends) else piece


def _first(texts: Iterable[str], most_bytes: int) -> Iterator[str]:
    """Whole texts, in order, until there are `most_bytes`."""
    size = 0
    for text in texts:
        yield text
        size += len(text.encode())
        if size >= most_bytes:
            return
