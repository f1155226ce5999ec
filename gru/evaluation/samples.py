"""What a model writes at each temperature, and how much of it is copied from the training text or repeats itself."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gru.config import EvaluateConfig
from gru.corpus.dataset import Dataset, first_texts
from gru.corpus.tokenizer import Tokenizer
from gru.evaluation import memorization
from gru.evaluation.scores import HeldoutText, Tokens
from gru.generation.generate import generate_ids
from gru.generation.sampling import GREEDY, SamplingParams
from gru.model.language_model import GRULanguageModel

SAMPLES = 16  # texts at each temperature
SEARCHED_BYTES = 200_000_000  # of training text, 20 seconds


@dataclass(frozen=True)
class CopyShares:
    """How much of some texts is copied. A share is None where no text is long enough."""

    copied_share: float | None
    """Of all spans of 32 characters, those that stand verbatim in the training text."""
    repetition: float | None
    """Of a text's 4-grams of tokens, those that stand in it before; the mean over the texts."""

    def measures(self) -> dict[str, float]:
        shares = {"copied_share": self.copied_share, "repetition": self.repetition}
        return {name: share for name, share in shares.items() if share is not None}


@dataclass(frozen=True)
class SampleReport:
    """What a model writes at each temperature, and held-out text of the same length as the scale."""

    samples: dict[float, list[list[int]]]
    """Token ids after the prompt; the first text at a temperature is that of seed 0."""
    copied: dict[float, CopyShares]
    heldout: CopyShares
    searched_bytes: int
    """How much of the training text was searched at least; where that is not all, more may be copied."""


def sample_and_search(
    model: GRULanguageModel, tokenizer: Tokenizer, settings: EvaluateConfig, dataset: Dataset, heldout: HeldoutText
) -> SampleReport:
    """Let the model write SAMPLES texts at each temperature, and see what of them is copied."""
    params = [
        SamplingParams(seed=seed, temperature=temperature)
        for temperature in dict.fromkeys(settings.temperatures)
        for seed in range(SAMPLES if temperature >= GREEDY else 1)  # the likeliest text is always the same
    ]
    samples: dict[float, list[list[int]]] = {}
    written = generate_ids(model, tokenizer, settings.prompt, settings.sample_tokens, params)
    for each, ids in zip(params, written, strict=True):
        samples.setdefault(each.temperature, []).append(ids)
    scale = list(_excerpts(heldout, SAMPLES, settings.sample_tokens))
    # Excerpts may begin and end within a character.
    scale_texts = [tokenizer.decode_bytes(ids).decode(errors="ignore") for ids in scale]
    texts = {temperature: [tokenizer.decode(ids) for ids in these] for temperature, these in samples.items()}
    others = first_texts(dataset.texts("train"), SEARCHED_BYTES)
    found = memorization.copied_spans([text for these in (scale_texts, *texts.values()) for text in these], others)
    return SampleReport(
        samples,
        {
            t: CopyShares(memorization.copied_share(texts[t], found), memorization.repetition(samples[t]))
            for t in samples
        },
        CopyShares(memorization.copied_share(scale_texts, found), memorization.repetition(scale)),
        min(dataset.manifest.train.bytes, SEARCHED_BYTES),
    )


def _excerpts(heldout: HeldoutText, count: int, tokens: int) -> Iterator[Tokens]:
    """Pieces of at most `tokens` tokens from all over the text, each of one document."""
    for start in np.linspace(0, len(heldout.tokens), count, endpoint=False).astype(int).tolist():
        piece = heldout.tokens[start : start + tokens]
        ends = np.flatnonzero(piece == heldout.end_of_text)
        yield piece[: ends[0]] if len(ends) else piece
