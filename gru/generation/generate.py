"""Generate and wait: texts from a model without an endpoint, as the endpoint would write them."""

from collections.abc import Sequence
from concurrent.futures import Future

from gru.corpus.tokenizer import Tokenizer
from gru.generation.engine import Engine, Finish, Request
from gru.generation.sampling import SamplingParams
from gru.model.inference import inference_model
from gru.model.language_model import GRULanguageModel

SLOTS = 32  # texts that are written side by side


def generate_texts(
    model: GRULanguageModel, tokenizer: Tokenizer, prompt: str, tokens: int, temperatures: Sequence[float]
) -> list[str]:
    """A text of at most `tokens` tokens after the prompt at each temperature, as the endpoint gives it for seed 0."""
    params = [SamplingParams(temperature=temperature, seed=0) for temperature in temperatures]
    return [prompt + tokenizer.decode(ids) for ids in generate_ids(model, tokenizer, prompt, tokens, params)]


def generate_ids(
    model: GRULanguageModel, tokenizer: Tokenizer, prompt: str, tokens: int, params: Sequence[SamplingParams]
) -> list[list[int]]:
    """At most `tokens` tokens after the prompt for each of `params`."""
    slots = min(max(1, len(params)), SLOTS)
    engine = Engine(inference_model(model), tokenizer.end_of_text, slots, max_queue=len(params))
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
