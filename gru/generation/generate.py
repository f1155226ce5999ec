"""Generate and wait: texts from a model without an endpoint, the same as the endpoint would generate."""

from collections.abc import Sequence
from concurrent.futures import Future

from gru.corpus.tokenizer import Tokenizer
from gru.generation.engine import Engine
from gru.generation.request import Finish, Request
from gru.generation.sampling import Logprobs, SamplingParams
from gru.model.inference import inference_model
from gru.model.language_model import GRULanguageModel

SLOTS = 32  # texts that are generated side by side


class Collector:
    """A receiver that collects a request's tokens, and lets another thread wait for the end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self._end: Future[None] = Future()

    def token(self, token: int, logprobs: Logprobs | None) -> bool:
        self.tokens.append(token)
        return False

    def notify(self, end: Finish | Exception | None) -> None:
        if isinstance(end, Exception):
            self._end.set_exception(end)
        elif end is not None:
            self.finish = end
            self._end.set_result(None)

    def wait(self, timeout: float | None = None) -> list[int]:
        """Wait for the end and return all tokens. Raises the request's error; TimeoutError after `timeout` seconds."""
        self._end.result(timeout)
        return self.tokens


def generate_texts(
    model: GRULanguageModel, tokenizer: Tokenizer, prompt: str, tokens: int, temperatures: Sequence[float]
) -> list[str]:
    """Return, for each temperature, the prompt with a continuation of at most `tokens` tokens, for seed 0."""
    params = [SamplingParams(temperature=temperature, seed=0) for temperature in temperatures]
    return [prompt + tokenizer.decode(ids) for ids in generate_ids(model, tokenizer, prompt, tokens, params)]


def generate_ids(
    model: GRULanguageModel, tokenizer: Tokenizer, prompt: str, tokens: int, params: Sequence[SamplingParams]
) -> list[list[int]]:
    """Return, for each of `params`, at most `tokens` token ids that continue the prompt."""
    slots = min(max(1, len(params)), SLOTS)
    engine = Engine(inference_model(model), tokenizer.end_of_text, slots, max_queue=len(params))
    collectors = [Collector() for _ in params]
    try:
        for each, collector in zip(params, collectors, strict=True):
            engine.submit(Request(tokenizer.encode(prompt).tolist(), each, tokens, collector))
        return [collector.wait() for collector in collectors]
    finally:
        engine.close(drain=False)
