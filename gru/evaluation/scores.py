"""Scores on held-out text: bits per byte and related measures, of models and of the n-gram baseline.

Measures per byte and per character do not depend on the tokenizer, so they compare models with different tokenizers on
the same text. The loss is computed on the model's device, in fp32.

N tokens of the text; T time, B lanes, L layers, E embedding, H hidden.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from gru.corpus.batches import stream_batches
from gru.corpus.dataset import Dataset, first_texts
from gru.corpus.tokenizer import Tokenizer
from gru.evaluation.ngram import NGramModel
from gru.model.language_model import GRULanguageModel
from gru.model.precision import without_tf32

SEQUENCE_LENGTH = 256
MAX_LOGITS = 1 << 24  # in memory at a time
NGRAM_ORDER = 5
NGRAM_TOKENS = 10_000_000  # takes 1 GB of memory and 15 seconds

Tokens = np.ndarray[Any, np.dtype[Any]]
Losses = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Scores:
    """The loss of a text, and its size."""

    nats: float
    """Loss summed over all tokens, end-of-text tokens included."""
    tokens: int
    bytes: int
    """Number of UTF-8 bytes of the documents."""
    characters: int
    text_digest: str
    """Digest of the text and of how it was read: scores with the same digest can be compared."""

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
        """Perplexity per token; it compares models with the same tokenizer only."""
        return math.exp(self.nats / self.tokens)

    def measures(self) -> dict[str, float]:
        """Return all measures, by name."""
        names = ("bits_per_byte", "bits_per_character", "bits_per_token", "nats_per_character")
        return {name: getattr(self, name) for name in (*names, "perplexity_per_character", "perplexity_per_token")}


@dataclass(frozen=True)
class HeldoutText:
    """Held-out documents as one stream of tokens."""

    tokens: Tokens
    """Token ids [N], an end-of-text token after each document."""
    end_of_text: int
    bytes: int
    """Number of UTF-8 bytes of the documents."""
    characters: int
    digest: str
    """Digest of the documents' texts."""

    def scores(self, nats: float, lanes: int) -> Scores:
        """Return the scores of a model. nats: its loss, summed over the tokens. lanes: the number of lanes in which it
        read the text, each from a reset state."""
        text_digest = hashlib.sha256(f"{lanes} lanes of {self.digest}".encode()).hexdigest()
        return Scores(nats, len(self.tokens), self.bytes, self.characters, text_digest)


def read_heldout(tokenizer: Tokenizer, texts: Iterable[str], max_bytes: int) -> HeldoutText:
    """Tokenize the first documents, `max_bytes` of them at most: the last one may be cut."""
    parts: list[np.ndarray] = []
    size = characters = 0
    digest = hashlib.sha256()
    for text in first_texts(texts, max_bytes):
        data = text.encode()
        parts.append(np.append(tokenizer.encode(text), np.uint32(tokenizer.end_of_text)))
        digest.update(hashlib.sha256(data).digest())
        size, characters = size + len(data), characters + len(text)
    return HeldoutText(np.concatenate(parts), tokenizer.end_of_text, size, characters, digest.hexdigest())


def score(model: GRULanguageModel, heldout: HeldoutText, lanes: int) -> Scores:
    """Return the scores of a model that reads the text in `lanes` lanes."""
    return heldout.scores(float(token_losses(model, heldout, lanes).sum(dtype=np.float64)), lanes)


@torch.inference_mode()
def token_losses(model: GRULanguageModel, heldout: HeldoutText, lanes: int) -> Losses:
    """Return the loss of each token [N], in nats; the state is carried from each document to the next."""
    state_LBH = model.initial_state(lanes)
    # A small tensor of each window that stays would keep malloc from reusing the megabytes that were freed beside it.
    losses_NB = np.empty((-(-len(heldout.tokens) // lanes), lanes), dtype=np.float32)
    first = 0
    for inputs_TB, targets_TB, _ in stream_batches(heldout.tokens, lanes, SEQUENCE_LENGTH, heldout.end_of_text):
        losses_TB, state_LBH = window_losses(model, inputs_TB, targets_TB, state_LBH)
        losses_NB[first : first + len(losses_TB)] = losses_TB.cpu()
        first += len(losses_TB)
    return losses_NB.T.reshape(-1)[: len(heldout.tokens)]  # the last lane ends in padding


def score_ngrams(dataset: Dataset, heldout: HeldoutText) -> Scores:
    """Return the scores of an n-gram model of the training tokens, or of NGRAM_TOKENS from evenly spaced segments."""
    manifest = dataset.manifest
    model = NGramModel(_training_tokens(dataset, NGRAM_TOKENS), manifest.vocab_size, manifest.end_of_text, NGRAM_ORDER)
    return heldout.scores(float(model.losses(heldout.tokens).sum()), lanes=1)


def _training_tokens(dataset: Dataset, limit: int) -> Tokens:
    """Return at most `limit` training tokens, from all segments or from evenly spaced ones."""
    segments = dataset.segments("train")
    stride = max(1.0, dataset.manifest.train.tokens / limit)
    chosen = [segments[int(i * stride)] for i in range(math.ceil(len(segments) / stride))]
    return np.concatenate([dataset.read_segment(segment) for segment in chosen])[:limit]


def window_losses(
    model: GRULanguageModel, inputs_TB: Tokens, targets_TB: Tokens, state_LBH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each target [T, B], in nats, and the next state, both on the device of the state.

    The logits are computed a part at a time.
    """
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(a)).to(state_LBH.device) for a in (inputs_TB, targets_TB))
    with without_tf32():
        x_TBE, state_LBH = model.features(inputs, state_LBH)
    rows = max(1, MAX_LOGITS // model.vocab_size)
    losses = [
        F.cross_entropy(model.logits(x), row_targets, reduction="none")
        for x, row_targets in zip(x_TBE.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    ]
    return torch.cat(losses).view(targets.shape).float(), state_LBH
