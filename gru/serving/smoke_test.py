"""The smoke test that a model passes before it serves: a short generation with finite log-probabilities."""

import math
from collections.abc import Sequence
from concurrent.futures import Future

from gru.generation.engine import Engine, Finish, Request
from gru.generation.sampling import SamplingParams

PROMPT = "The "
MAX_TOKENS = 16
TIMEOUT_SECONDS = 60


class UnfitModel(Exception):
    """A version that must not serve."""


def smoke_test(engine: Engine, prompt: Sequence[int]) -> None:
    """Let the engine write a few tokens. Raises Unfit if what the model says is no number, or nothing comes."""
    done: Future[None] = Future()

    def on_token(token: int | None, end: Finish | Exception | None) -> None:
        if isinstance(end, Exception):
            done.set_exception(end)
        elif end is not None:
            done.set_result(None)

    params = SamplingParams(seed=0)
    request = Request(prompt, params, MAX_TOKENS, on_token, top_logprobs=1, score_prompt=True)
    engine.submit(request)
    try:
        done.result(TIMEOUT_SECONDS)
    except TimeoutError:
        raise UnfitModel(f"it wrote nothing within {TIMEOUT_SECONDS} s") from None
    said = [*request.prompt_logprobs, *request.logprobs]
    if not all(math.isfinite(each.token) for each in said):
        raise UnfitModel("its probabilities are no numbers")
