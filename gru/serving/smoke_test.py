"""The smoke test that a model must pass before it serves: a short generation with finite log-probabilities."""

import math
from collections.abc import Sequence

from gru.generation.engine import Engine
from gru.generation.generate import Collector
from gru.generation.request import Request
from gru.generation.sampling import SamplingParams

PROMPT = "The "
MAX_TOKENS = 16
TIMEOUT_SECONDS = 60


class UnfitModel(Exception):
    """The model of this version must not serve."""


def smoke_test(engine: Engine, prompt: Sequence[int]) -> None:
    """Generate a few tokens. Raises UnfitModel if the engine returns nothing, or log-probabilities with NaN or inf."""
    collector = Collector()
    request = Request(prompt, SamplingParams(seed=0), MAX_TOKENS, collector, top_logprobs=1, score_prompt=True)
    stream = engine.submit(request)
    try:
        collector.wait(TIMEOUT_SECONDS)
    except TimeoutError:
        raise UnfitModel(f"the smoke test did not end within {TIMEOUT_SECONDS} s") from None
    if not all(math.isfinite(each.token) for each in [*stream.prompt_logprobs, *stream.logprobs]):
        raise UnfitModel("log-probabilities contain NaN or infinity")
