"""How good a model is: bits per byte on held-out text, and texts that it writes.

Bits per byte do not depend on the tokenizer, so models with different ones can be compared on the same text.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from gru.corpus.lanes import stream_batches
from gru.corpus.tokenizer import Tokenizer
from gru.model.language_model import GRULanguageModel
from gru.model.transformer import Transformer
from gru.serving.engine import Engine, Finish
from gru.serving.sampling import SamplingParams

WINDOW = 256

LanguageModel = GRULanguageModel | Transformer
Batches = Callable[[np.ndarray, int, int, int], Iterable[tuple[np.ndarray, ...]]]
"""(tokens, lanes, window, end of text) -> (inputs, targets, weights) [T, lanes]"""


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
    def nats_per_character(self) -> float:
        return self.nats / self.characters

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats / self.tokens)


def score(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    lanes: int,
    most_bytes: int,
    batches: Batches = stream_batches,
    window: int = WINDOW,
) -> Scores:
    """Score whole documents, in order, until there are `most_bytes`; the state is carried from one to the next, or
    what `batches` makes of it."""
    parts: list[np.ndarray] = []
    size = characters = 0
    digest = hashlib.sha256(f"{lanes} lanes".encode())
    for text in texts:
        data = text.encode()
        parts.append(np.append(tokenizer.encode(text), np.uint32(tokenizer.end_of_text)))
        digest.update(hashlib.sha256(data).digest())
        size, characters = size + len(data), characters + len(text)
        if size >= most_bytes:
            break
    tokens = np.concatenate(parts)
    nats = stream_loss(model, batches(tokens, lanes, window, tokenizer.end_of_text), lanes)
    return Scores(nats, len(tokens), size, characters, digest.hexdigest())


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


def sample_texts(
    model: GRULanguageModel, tokenizer: Tokenizer, prompt: str, tokens: int, temperatures: Sequence[float]
) -> list[str]:
    """A text of at most `tokens` tokens after the prompt at each temperature, as the endpoint gives it for seed 0."""
    engine = Engine(model, tokenizer.end_of_text, slots=max(4, len(temperatures)), max_queue=len(temperatures))
    try:
        pending = []
        for temperature in temperatures:
            ids: list[int] = []
            done: Future[None] = Future()
            params = SamplingParams(temperature=temperature, seed=0)
            engine.submit(tokenizer.encode(prompt).tolist(), params, tokens, _collector(ids, done))
            pending.append((ids, done))
        for _, done in pending:
            done.result()
        return [prompt + tokenizer.decode(ids) for ids, _ in pending]
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
