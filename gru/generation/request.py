"""Requests to the engine, the receivers of their tokens, and the engine's record of each request.

T time, L layers, H state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from gru.generation.sampling import Draw, History, Logprobs, SamplingParams
from gru.generation.state_cache import session_key, turn_key

Finish = Literal["stop", "length"]


class Receiver(Protocol):
    """Takes the tokens of one request. The engine's thread makes all calls, so they must be quick.

    A receiver that raises an exception loses its place in the engine; no other request is affected.
    """

    def token(self, token: int, logprobs: Logprobs | None) -> bool:
        """Take the next token of the text. Return whether the text ends with it, because a stop string is complete.

        `logprobs` is None unless the request has `top_logprobs`. The token that ends a document is not passed here.
        """

    def notify(self, end: Finish | Exception | None) -> None:
        """Pass on the tokens taken so far: the engine's step is over, and requests that have ended hold no place.

        `end` is None until the last call; then it is "length" (`max_tokens` is reached), "stop" (the document or the
        text has ended) or the error that ended the request. A cancelled request gets no last call.
        """


class HeldText(Protocol):
    """The text that a request of a session holds back at its end, since the next one may complete it: part of a
    character, or the beginning of a stop string. The engine's thread makes all calls."""

    def resume(self, held: bytes) -> None:
        """Begin the text with what the request before held back; called before the first token."""

    def hold(self) -> bytes:
        """Return the text to hold back, in UTF-8; called after the last token, if `max_tokens` is reached."""


class Turn(NamedTuple):
    """A request's place in a conversation. The state after each turn has a name of its own and never changes, so that
    a conversation may continue from any of its turns, more than once."""

    previous: str | None
    """Name of the state to resume from, without an end of text that it ends with. If it is no longer cached, the
    request ends with StateNotCached. None begins a document."""
    name: str | None
    """Name under which the state after the request is saved, if it ends without error; None saves none."""


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """A request to continue a document that begins with `prompt`, which may be empty."""

    prompt: Sequence[int]
    params: SamplingParams
    max_tokens: int
    """Most tokens to generate; 0 only reads the prompt."""
    receiver: Receiver
    top_logprobs: int | None = None
    """Number of likeliest tokens to report with each token's log-probability; None reports no log-probabilities."""
    score_prompt: bool = False
    """Whether to compute the log-probability of each prompt token, too."""
    deadline: float = math.inf
    """Value of time.monotonic() at which the request ends with Expired."""
    owner: str = ""
    """Owner of the request. Cached states are never shared between owners."""
    session: str | None = None
    """Name of a session. The request resumes from the state after the session's last request, if that state is still
    cached, instead of from the beginning of a document. Its own last state is saved if it ends without error."""
    held_text: HeldText | None = None
    """What holds text back between the requests of the session; a request with a prompt does not resume from it."""
    turn: Turn | None = None
    """Its place in a conversation; not together with `session`."""

    @property
    def token_budget(self) -> int:
        """Most tokens that the request can need: its prompt and `max_tokens`."""
        return len(self.prompt) + self.max_tokens


@dataclass(eq=False, slots=True)
class TokenStream:
    """A submitted request with its progress: the engine's own record. Callers read it and change nothing."""

    request: Request
    session_epoch: int
    """Number of times that the engine had forgotten its sessions when the request was submitted."""

    logprobs: list[Logprobs] = field(default_factory=list)
    """Log-probabilities of each generated token, that of a document's end included."""
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """Log-probabilities of each prompt token; complete before the first token is generated."""
    resumed: int = 0
    """Number of tokens of the session that led to the state it resumed from."""
    cached: int = 0
    """Number of input tokens that were skipped, since the state after them was cached."""
    read: int = 0
    """Number of input tokens read or skipped."""
    generated: int = 0
    """Number of tokens generated."""
    position: int = 0
    """Number of tokens generated in this and earlier requests of the session, which draws of later ones depend on."""
    over: bool = False
    """Whether it has finished, failed or been cancelled."""
    finish: Finish | None = None
    """How it has ended; None until then, and after an error or a cancellation."""

    inputs: list[int] = field(default_factory=list)
    """Token ids to read: the one before the prompt, and the prompt."""
    prefix_keys: list[bytes] = field(default_factory=list)
    """Cache keys of the states after each chunk of the inputs."""
    state_L1H: Tensor | None = None
    """Its hidden state while the inputs are read; later the state is a row of the engine's."""
    last_token: int = 0
    """Newest token: the input of the next step."""
    history: History | None = None
    """Tokens read and generated, if the sampling has penalties or the last state is saved."""

    @property
    def draw(self) -> Draw:
        """What determines the next token besides its logits."""
        return Draw(self.request.params, self.position, self.history, self.position - self.generated)

    @property
    def held(self) -> bytes:
        """Text that it holds back for the next request of its session."""
        held_text = self.request.held_text
        return held_text.hold() if held_text and self.finish == "length" else b""

    @property
    def cached_prompt_tokens(self) -> int:
        """Number of prompt tokens that were skipped; the inputs may have an end of text before the prompt."""
        return max(self.cached - (len(self.inputs) - len(self.request.prompt)), 0) if self.cached else 0

    @property
    def resume_key(self) -> bytes | None:
        """The cache key of the state that it resumes from."""
        turn = self.request.turn
        return self._key(turn.previous) if turn else self._key(self.request.session)

    @property
    def save_key(self) -> bytes | None:
        """The cache key under which its last state is saved."""
        turn = self.request.turn
        return self._key(turn.name) if turn else self._key(self.request.session)

    def _key(self, name: str | None) -> bytes | None:
        key = turn_key if self.request.turn else session_key
        return None if name is None else key(self.request.owner, f"{self.session_epoch} {name}")
