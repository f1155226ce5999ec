"""The texts that one HTTP request generates, and when to send what is new in them.

The engine's thread feeds the texts; everything else happens on the event loop. This module knows no routes and no
response formats.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gru.generation.detokenizer import Detokenizer
from gru.generation.engine import Closed, Expired, Overloaded, StateNotCached
from gru.generation.request import Finish, Request, TokenStream, Turn
from gru.generation.sampling import Logprobs, SamplingParams, choice_seed
from gru.serving.loaded_model import LoadedModel
from gru.serving.protocol import ApiError, previous_not_found

CHUNK_SECONDS = (0.05, 1.0)  # least and most time between two chunks of a stream, if tokens are not slower
CHUNKS_PER_SECOND = 300  # of all streams: in Serve and its proxy each takes 1 ms, several times what a token takes
GRACE_SECONDS = 5  # time that the engine has to end a request after its deadline


class Prompt(NamedTuple):
    """A prompt, as text and as token ids."""

    text: str
    tokens: list[int]


@dataclass(frozen=True)
class GenerationSpec:
    """What to generate: `n` texts for each prompt, all with these settings."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    """Sampling parameters; their seed is that of each prompt's first text, unless `seeded` is false."""
    seeded: bool
    """Whether the client gave a seed; otherwise each prompt gets a random one."""
    n: int
    max_tokens: int
    stops: Sequence[str]
    min_tokens: int
    """Number of tokens before which no stop string ends a text."""
    echo: bool
    top_logprobs: int | None
    deadline: float
    """Value of time.monotonic() at which generation ends with Expired."""
    owner: str
    session: str | None
    turn: Turn | None = None


class TokenEntry(NamedTuple):
    """A token with its log-probabilities, for the client."""

    token: int
    offset: int
    """Position in the choice's text, in characters, at which the token's text begins."""
    logprobs: Logprobs | None
    """None for an end of text that begins a prompt."""


class ChoiceDelta(NamedTuple):
    """The new part of a choice."""

    choice: int
    text: str
    entries: list[TokenEntry]
    finish: Finish | None


class LoopBridge:
    """Carries calls from the engine's thread to an event loop: all calls of a step with one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def call(self, function: Callable[[], None]) -> None:
        """Have the event loop call the function soon."""
        self._calls.append(function)
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._woken = False  # before the loop below, so that a call appended later either runs in it or wakes again
        while self._calls:
            self._calls.popleft()()


class Choice:
    """One text of a generation, and the receiver of its tokens.

    `report` is called on the engine's thread with the choice and the end, which is None until the last call.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        spec: GenerationSpec,
        token_bytes: Sequence[bytes],
        report: Callable[["Choice", Finish | Exception | None], None],
    ) -> None:
        self.index = index
        self.finish: Finish | Exception | None = None
        self.finish_sent = False
        self.tokens = 0
        self.held_text = ""
        """Text that the session's next request will continue, if that has no prompt."""
        self.stream: TokenStream
        self._prompt = prompt
        self._spec = spec
        self._token_bytes = token_bytes
        self._report = report
        self._detokenizer = Detokenizer(token_bytes, spec.stops, spec.min_tokens)
        self._pieces: deque[str] = deque()  # text from the engine's thread to the event loop's
        self._entries: deque[TokenEntry] = deque()
        self._unsent = ""
        self._sent_characters = 0
        self._started = False

    def token(self, token: int, logprobs: Logprobs | None) -> bool:
        """Engine's thread: take a token. Return whether a stop string is complete."""
        self.tokens += 1
        if logprobs is not None:
            self._entries.append(TokenEntry(token, self._detokenizer.decoded, logprobs))
        self._pieces.append(self._detokenizer.feed(token))
        return self._detokenizer.stopped

    def notify(self, end: Finish | Exception | None) -> None:
        """Engine's thread: report that there is something to take."""
        if end == "length" and self._spec.session:
            self.held_text = self.hold().decode(errors="replace")
        elif end is not None:
            self._pieces.append(self._detokenizer.finish())
        self._report(self, end)

    def resume(self, held: bytes) -> None:
        """Engine's thread: begin with text that the session's last request has held back."""
        self._detokenizer.resume(held)

    def hold(self) -> bytes:
        """Engine's thread: return the text to hold back for the session's next request."""
        return self._detokenizer.hold()

    @property
    def ready(self) -> bool:
        """Whether there is a delta to take."""
        while self._pieces:
            self._unsent += self._pieces.popleft()
        return bool(self._unsent or (self.finish and not self.finish_sent))

    def take(self) -> ChoiceDelta:
        """Return what is new since the last call."""
        assert not isinstance(self.finish, Exception)
        self.finish_sent = self.finish is not None
        text, self._unsent = self._unsent, ""
        self._sent_characters += len(text)
        entries = []
        if self.finish == "stop" and not self._detokenizer.stopped and self.stream.logprobs:
            # The token that ended the document has no text. As with OpenAI, it has an entry.
            self._entries.append(
                TokenEntry(self.stream.last_token, self._detokenizer.decoded, self.stream.logprobs[-1])
            )
        everything = self.finish and not self._detokenizer.stopped
        while self._entries and (self._entries[0].offset < self._sent_characters or everything):
            entries.append(self._entries.popleft())
        if self._spec.echo:
            shift = len(self._prompt.text)
            entries = [entry._replace(offset=entry.offset + shift) for entry in entries]
            if not self._started:
                text, entries = self._prompt.text + text, self._prompt_entries() + entries
        self._started = True
        return ChoiceDelta(self.index, text, entries, self.finish)

    def _prompt_entries(self) -> list[TokenEntry]:
        """Return the entries of the prompt's tokens; none without log-probabilities."""
        if self._spec.top_logprobs is None:
            return []
        detokenizer, entries = Detokenizer(self._token_bytes), []
        scores = self.stream.prompt_logprobs
        # An end of text at the beginning is not predicted from anything.
        unscored = [None] * (len(self._prompt.tokens) - len(scores))
        for token, logprobs in zip(self._prompt.tokens, [*unscored, *scores], strict=True):
            entries.append(TokenEntry(token, detokenizer.decoded, logprobs))
            detokenizer.feed(token)
        return entries


class Generation:
    """All choices of one HTTP request."""

    def __init__(self, model: LoadedModel, spec: GenerationSpec, bridge: LoopBridge) -> None:
        """Submit all requests to the engine. Raises ApiError (429), or Closed."""
        self.model = model
        self.start = time.monotonic()
        self.first_token_seconds: float | None = None
        """Seconds from the start to the first token."""
        self.choices: list[Choice] = []
        self._engine = model.engine
        self._bridge = bridge
        self._loop = bridge.loop
        self._changed = asyncio.Event()
        self._next_chunk = 0.0  # earliest time of the next chunk, on the loop's clock
        self._timer: asyncio.TimerHandle | None = None
        self._prompts = spec.prompts
        self._deadline = self._loop.time() + (spec.deadline - self.start) + GRACE_SECONDS
        try:
            for prompt in spec.prompts:
                seed = spec.params.seed if spec.seeded else secrets.randbits(63)
                for n in range(spec.n):
                    self._submit(prompt, replace(spec.params, seed=choice_seed(seed, n)), spec)
        except BaseException as error:
            self.cancel()
            if isinstance(error, Overloaded):
                raise ApiError(429, f"overloaded: {error}; try again later", code="overloaded") from None
            raise

    def _submit(self, prompt: Prompt, params: SamplingParams, spec: GenerationSpec) -> None:
        token_bytes = self.model.bundle.tokenizer.token_bytes
        choice = Choice(len(self.choices), prompt, spec, token_bytes, self._report)
        request = Request(
            prompt.tokens,
            params,
            spec.max_tokens,
            choice,
            top_logprobs=spec.top_logprobs,
            score_prompt=spec.echo and spec.top_logprobs is not None,
            deadline=spec.deadline,
            owner=spec.owner,
            session=spec.session,
            held_text=choice if spec.session else None,
            turn=spec.turn,
        )
        choice.stream = self._engine.submit(request)
        self.choices.append(choice)

    def _report(self, choice: Choice, end: Finish | Exception | None) -> None:
        """Engine's thread: have the event loop see to a choice."""
        self._bridge.call(lambda: self._update(choice, end))

    def _update(self, choice: Choice, end: Finish | Exception | None) -> None:
        if self.first_token_seconds is None and not isinstance(end, Exception):
            self.first_token_seconds = time.monotonic() - self.start
        if end is not None:
            choice.finish = end
        if end is not None or self._loop.time() >= self._next_chunk:
            self._changed.set()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._next_chunk, self._changed.set)

    def cancel(self) -> None:
        """Free the places of all choices in the engine."""
        for choice in self.choices:
            self._engine.cancel(choice.stream)

    @property
    def resumed(self) -> int:
        """The number of tokens of the session that it resumed from; known from the first delta on."""
        return sum(choice.stream.resumed for choice in self.choices)

    @property
    def held_text(self) -> str:
        """The text that the session's next request will continue."""
        return "".join(choice.held_text for choice in self.choices)

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of all prompts."""
        return sum(len(prompt.tokens) for prompt in self._prompts)

    @property
    def cached_tokens(self) -> int:
        """The number of prompt tokens whose state was cached."""
        firsts = self.choices[:: len(self.choices) // len(self._prompts)]  # the choices of a prompt are adjacent
        return sum(choice.stream.cached_prompt_tokens for choice in firsts)

    @property
    def generated_tokens(self) -> int:
        """The number of tokens generated, those of a stop string included, end-of-text tokens not."""
        return sum(choice.tokens for choice in self.choices)

    @property
    def _chunk_interval(self) -> float:
        """The seconds between two chunks, which grow with the number of streams."""
        least, most = CHUNK_SECONDS
        return min(max(least, self._engine.active / CHUNKS_PER_SECOND), most)

    async def deltas(self) -> AsyncIterator[list[ChoiceDelta]]:
        """Yield the deltas of all choices that have one: the first at once, later ones after the chunk interval or at
        the end of a choice. Raises the error that ended a choice."""
        while not all(choice.finish_sent for choice in self.choices):
            try:
                async with asyncio.timeout_at(self._deadline):
                    await self._changed.wait()
            except TimeoutError:  # the engine itself hangs, or it would have reported the deadline
                raise Expired("the engine did not answer within the time limit of the request") from None
            self._changed.clear()
            if self._timer:
                self._timer.cancel()
                self._timer = None
            for choice in self.choices:
                if isinstance(choice.finish, Exception):
                    raise choice.finish
            ready = [choice for choice in self.choices if choice.ready]
            if ready:
                self._next_chunk = self._loop.time() + self._chunk_interval
                yield [choice.take() for choice in ready]

    async def complete(self) -> list[ChoiceDelta]:
        """Wait for the end. Return each choice as one delta."""
        merged: dict[int, ChoiceDelta] = {}
        async for deltas in self.deltas():
            for delta in deltas:
                before = merged.get(delta.choice, ChoiceDelta(delta.choice, "", [], None))
                text, entries = before.text + delta.text, before.entries + delta.entries
                merged[delta.choice] = delta._replace(text=text, entries=entries)
        return [merged[index] for index in sorted(merged)]


def api_error(error: Exception) -> ApiError:
    """Return the HTTP error for an exception that ended a generation."""
    if isinstance(error, Expired):
        return ApiError(503, str(error), code="timeout")
    if isinstance(error, StateNotCached):
        return previous_not_found()
    return ApiError(503 if isinstance(error, Closed) else 500, str(error))
