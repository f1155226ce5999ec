"""Samples of a model at each temperature, and how much of them is copied from the training text or repeated."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gru.config import EvaluateConfig
from gru.corpus.dataset import Dataset, first_texts
from gru.corpus.tokenizer import Tokenizer
from gru.evaluation.memorization import copied_share, copied_spans, repetition
from gru.evaluation.scores import HeldoutText, Tokens
from gru.generation.generate import generate_ids
from gru.generation.sampling import GREEDY, SamplingParams
from gru.model.language_model import GRULanguageModel

SAMPLES = 16  # texts at each temperature
SEARCHED_BYTES = 200_000_000  # of training text; takes 20 seconds


@dataclass(frozen=True)
class CopyShares:
    """How much of a set of texts is copied. A share is None if every text is too short for it."""

    copied_share: float | None
    """Share of the spans of 32 characters that occur verbatim in the training text."""
    repetition: float | None
    """Share of a text's 4-grams of tokens that occur earlier in the same text; mean over the texts."""

    def measures(self) -> dict[str, float]:
        """Return the shares that are not None, by name."""
        shares = {"copied_share": self.copied_share, "repetition": self.repetition}
        return {name: share for name, share in shares.items() if share is not None}


@dataclass(frozen=True)
class SampleReport:
    """The samples at each temperature, and their copy shares beside those of held-out text of the same length."""

    samples: dict[float, list[list[int]]]
    """Token ids after the prompt, by temperature; the first sample of each temperature has seed 0."""
    shares: dict[float, CopyShares]
    """Copy shares of the samples, by temperature."""
    heldout_shares: CopyShares
    searched_bytes: int
    """Number of bytes of training text that were searched, at least; if that is not all of it, more may be copied."""


def sample_and_search(
    model: GRULanguageModel, tokenizer: Tokenizer, config: EvaluateConfig, dataset: Dataset, heldout: HeldoutText
) -> SampleReport:
    """Generate SAMPLES texts at each temperature, and search the training text for copies of their spans."""
    samples = _generate(model, tokenizer, config)
    texts = {temperature: [tokenizer.decode(ids) for ids in group] for temperature, group in samples.items()}
    excerpts = list(_excerpts(heldout, SAMPLES, config.sample_tokens))
    # Excerpts may begin and end within a character.
    excerpt_texts = [tokenizer.decode_bytes(ids).decode(errors="ignore") for ids in excerpts]
    training_texts = first_texts(dataset.texts("train"), SEARCHED_BYTES)
    copied = copied_spans([text for group in (excerpt_texts, *texts.values()) for text in group], training_texts)
    return SampleReport(
        samples,
        {t: CopyShares(copied_share(texts[t], copied), repetition(samples[t])) for t in samples},
        CopyShares(copied_share(excerpt_texts, copied), repetition(excerpts)),
        min(dataset.manifest.train.bytes, SEARCHED_BYTES),
    )


def _generate(model: GRULanguageModel, tokenizer: Tokenizer, config: EvaluateConfig) -> dict[float, list[list[int]]]:
    """Return the token ids of SAMPLES samples at each temperature."""
    params = [
        SamplingParams(seed=seed, temperature=temperature)
        for temperature in dict.fromkeys(config.temperatures)
        for seed in range(SAMPLES if temperature >= GREEDY else 1)  # greedy decoding always gives the same text
    ]
    samples: dict[float, list[list[int]]] = {}
    generated = generate_ids(model, tokenizer, config.prompt, config.sample_tokens, params)
    for each, ids in zip(params, generated, strict=True):
        samples.setdefault(each.temperature, []).append(ids)
    return samples


def _excerpts(heldout: HeldoutText, count: int, length: int) -> Iterator[Tokens]:
    """Yield excerpts of at most `length` tokens, evenly spaced over the text, each within one document."""
    for start in np.linspace(0, len(heldout.tokens), count, endpoint=False).astype(int).tolist():
        excerpt = heldout.tokens[start : start + length]
        ends = np.flatnonzero(excerpt == heldout.end_of_text)
        yield excerpt[: ends[0]] if len(ends) else excerpt
