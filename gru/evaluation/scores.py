"""Scores on held-out text: bits per byte and the measures beside it, for models and for the n-gram baseline.

Bits per byte, and the measures per character, do not depend on the tokenizer, so models with different tokenizers can
be compared on the same text.

N tokens of the text; T time, B lanes side by side, L layers, E embedding, H hidden.
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

SEQUENCE_LENGTH = 256
LOGITS = 1 << 24  # in memory at a time
NGRAM_ORDER = 5
NGRAM_TOKENS = 10_000_000  # 1 GB of memory and 15 seconds

Tokens = np.ndarray[Any, np.dtype[Any]]
Losses = np.ndarray[Any, np.dtype[np.floating[Any]]]


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
class HeldoutText:
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


def read_heldout(tokenizer: Tokenizer, texts: Iterable[str], most_bytes: int) -> HeldoutText:
    """The first documents, until there are `most_bytes`."""
    parts: list[np.ndarray] = []
    size = characters = 0
    digest = hashlib.sha256()
    for text in first_texts(texts, most_bytes):
        data = text.encode()
        parts.append(np.append(tokenizer.encode(text), np.uint32(tokenizer.end_of_text)))
        digest.update(hashlib.sha256(data).digest())
        size, characters = size + len(data), characters + len(text)
    return HeldoutText(np.concatenate(parts), tokenizer.end_of_text, size, characters, digest.hexdigest())


def score(model: GRULanguageModel, heldout: HeldoutText, lanes: int) -> Scores:
    """The model's scores on the text, read in so many lanes."""
    return heldout.scores(float(token_losses(model, heldout, lanes).sum(dtype=np.float64)), lanes)


@torch.inference_mode()
def token_losses(model: GRULanguageModel, heldout: HeldoutText, lanes: int) -> Losses:
    """The loss of each token in nats [N]; the state is carried from each document to the next."""
    state_LBH = model.initial_state(lanes)
    parts = []
    for inputs_TB, targets_TB, _ in stream_batches(heldout.tokens, lanes, SEQUENCE_LENGTH, heldout.end_of_text):
        losses_TB, state_LBH = window_losses(model, inputs_TB, targets_TB, state_LBH)
        parts.append(losses_TB)
    return np.concatenate(parts).T.reshape(-1)[: len(heldout.tokens)]  # the last lane ends in padding


def score_ngrams(dataset: Dataset, heldout: HeldoutText) -> Scores:
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


def window_losses(
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
