"""What one HTTP request has generated: its texts in the making, and when to send what there is of them.

The engine's thread feeds the texts; everything else happens on the event loop. It knows no routes and no formats.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from gru.generation.detokenizer import Detokenizer
from gru.generation.engine import Closed, Expired, Finish, Overloaded, Request
from gru.generation.sampling import Logprobs, SamplingParams, choice_seed
from gru.serving.loaded_model import LoadedModel
from gru.serving.protocol import ApiError

if TYPE_CHECKING:
    pass

CHUNK_SECONDS = (0.05, 1.0)  # between two chunks of a stream, at least and, but for slow tokens, at most
CHUNKS_A_SECOND = (
    300  # of all streams: in Serve and its proxy each costs a millisecond, several times what a token does
)
GRACE_SECONDS = 5  # that the engine has to end a request whose deadline is over


class Prompt(NamedTuple):
    text: str
    tokens: list[int]


@dataclass(frozen=True)
class GenerationSpec:
    """What is asked of the engine, for each of the prompts `n` times."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    """Its seed is that of the first text of each prompt, or of none if `seeded` is false."""
    seeded: bool
    n: int
    max_tokens: int
    stops: Sequence[str]
    echo: bool
    top_logprobs: int | None
    deadline: float
    owner: str
    session: str | None


class TokenEntry(NamedTuple):
    """A token, where its text begins in the choice's, and how likely it was."""

    token: int
    offset: int
    logprobs: Logprobs


class ChoiceDelta(NamedTuple):
    """What is new of a choice."""

    choice: int
    text: str
    entries: list[TokenEntry]
    finish: Finish | None


class LoopBridge:
    """Carries calls from the engine's thread to an event loop: those of a step with one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def call(self, function: Callable[[], None]) -> None:
        self._calls.append(function)
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._woken = False  # first: a call appended from here on either runs below or wakes again
        while self._calls:
            self._calls.popleft()()


class Choice:
    """One text in the making."""

    def __init__(self, index: int, prompt: Prompt, order: GenerationSpec, token_bytes: Sequence[bytes]) -> None:
        self.index = index
        self.finish: Finish | Exception | None = None
        self.sent_finish = False
        self.tokens = 0
        self.request: Request
        self._prompt = prompt
        self._order = order
        self._token_bytes = token_bytes
        self._text = Detokenizer(token_bytes, order.stops)
        self._pieces: deque[str] = deque()  # from one thread to the other
        self._entries: deque[TokenEntry] = deque()
        self._unsent = ""
        self._sent = 0  # characters
        self._begun = False

    def feed(self, token: int) -> bool:
        """Engine's thread: take a token; whether the text ends with it."""
        self.tokens += 1
        if self._order.top_logprobs is not None:
            self._entries.append(TokenEntry(token, self._text.decoded, self.request.logprobs[-1]))
        self._pieces.append(self._text.feed(token))
        return self._text.stopped

    def end(self) -> None:
        """Engine's thread: there is no more."""
        self._pieces.append(self._text.finish())

    @property
    def ready(self) -> bool:
        """Whether there is something to take."""
        while self._pieces:
            self._unsent += self._pieces.popleft()
        return bool(self._unsent or (self.finish and not self.sent_finish))

    def take(self) -> ChoiceDelta:
        """What is ready."""
        assert not isinstance(self.finish, Exception)
        self.sent_finish = self.finish is not None
        text, self._unsent = self._unsent, ""
        self._sent += len(text)
        entries = []
        while self._entries and (self._entries[0].offset < self._sent or (self.finish and not self._text.stopped)):
            entries.append(self._entries.popleft())
        if self._order.echo:
            shift = len(self._prompt.text)
            entries = [entry._replace(offset=entry.offset + shift) for entry in entries]
            if not self._begun:
                text, entries = self._prompt.text + text, self._prompt_entries() + entries
        self._begun = True
        return ChoiceDelta(self.index, text, entries, self.finish)

    def _prompt_entries(self) -> list[TokenEntry]:
        stream, entries = Detokenizer(self._token_bytes), []
        for token, logprobs in zip(self._prompt.tokens, self.request.prompt_logprobs, strict=False):
            entries.append(TokenEntry(token, stream.decoded, logprobs))
            stream.feed(token)
        return entries


class Generation:
    """All texts of one HTTP request."""

    def __init__(self, served: LoadedModel, order: GenerationSpec, relay: LoopBridge) -> None:
        """Submits everything. Raises ApiError (429), or Closed."""
        self.served = served
        self.began = time.monotonic()
        self.first: float | None = None
        """Seconds until the first token."""
        self.choices: list[Choice] = []
        self._engine = served.engine
        self._loop = relay.loop
        self._changed = asyncio.Event()
        self._due = 0.0  # when the next chunk may go
        self._timer: asyncio.TimerHandle | None = None
        self._prompts = order.prompts
        self._until = self._loop.time() + (order.deadline - self.began) + GRACE_SECONDS
        try:
            for prompt in order.prompts:
                seed = order.params.seed if order.seeded else secrets.randbits(63)
                for n in range(order.n):
                    params = replace(order.params, seed=choice_seed(seed, n))
                    self._submit(prompt, params, order, relay)
        except BaseException as error:
            self.cancel()
            if isinstance(error, Overloaded):
                raise ApiError(429, f"overloaded: {error}; try again later", code="overloaded") from None
            raise

    def _submit(self, prompt: Prompt, params: SamplingParams, order: GenerationSpec, relay: LoopBridge) -> None:
        choice = Choice(len(self.choices), prompt, order, self.served.bundle.tokenizer.token_bytes)

        def on_token(token: int | None, end: Finish | Exception | None) -> None:
            if end is not None:
                choice.end()
            relay.call(lambda: self._told(choice, end))

        choice.request = Request(
            prompt.tokens,
            params,
            order.max_tokens,
            on_token,
            ends=choice.feed,
            top_logprobs=order.top_logprobs,
            score_prompt=order.echo and order.top_logprobs is not None,
            deadline=order.deadline,
            owner=order.owner,
            session=order.session,
        )
        self._engine.submit(choice.request)
        self.choices.append(choice)

    def _told(self, choice: Choice, end: Finish | Exception | None) -> None:
        if self.first is None and not isinstance(end, Exception):
            self.first = time.monotonic() - self.began
        if end is not None:
            choice.finish = end
        if end is not None or self._loop.time() >= self._due:
            self._changed.set()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._due, self._changed.set)

    def cancel(self) -> None:
        for choice in self.choices:
            self._engine.cancel(choice.request)

    @property
    def resumed(self) -> int:
        """Tokens of the session that it goes on from; known from the first part on."""
        return sum(choice.request.resumed for choice in self.choices)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self._prompts)

    @property
    def cached_tokens(self) -> int:
        firsts = self.choices[:: len(self.choices) // len(self._prompts)]  # the choices of a prompt stand together
        return sum(max(choice.request.cached - 1, 0) for choice in firsts)  # the mark before a document is none

    @property
    def made_tokens(self) -> int:
        """Up to and with a stop string; marks of a document's ends not counted."""
        return sum(choice.tokens for choice in self.choices)

    @property
    def _pause(self) -> float:
        """Seconds between two chunks."""
        least, most = CHUNK_SECONDS
        return min(max(least, self._engine.active / CHUNKS_A_SECOND), most)

    async def parts(self) -> AsyncIterator[list[ChoiceDelta]]:
        """New parts of choices: at once for the first time, then the less often the more streams there are, except
        that an end does not wait. Raises what ended the engine."""
        while not all(choice.sent_finish for choice in self.choices):
            try:
                async with asyncio.timeout_at(self._until):
                    await self._changed.wait()
            except TimeoutError:  # the engine itself hangs, or it would have said so
                raise Expired("the engine did not answer in the time that the request may take") from None
            self._changed.clear()
            if self._timer:
                self._timer.cancel()
                self._timer = None
            for choice in self.choices:
                if isinstance(choice.finish, Exception):
                    raise choice.finish
            ready = [choice for choice in self.choices if choice.ready]
            if ready:
                self._due = self._loop.time() + self._pause
                yield [choice.take() for choice in ready]

    async def whole(self) -> list[ChoiceDelta]:
        """Each choice in one part."""
        found: dict[int, ChoiceDelta] = {}
        async for parts in self.parts():
            for part in parts:
                before = found.get(part.choice, ChoiceDelta(part.choice, "", [], None))
                found[part.choice] = part._replace(text=before.text + part.text, entries=before.entries + part.entries)
        return [found[index] for index in sorted(found)]


def failure(error: Exception) -> ApiError:
    """How a client is told of what ended a generation."""
    if isinstance(error, Expired):
        return ApiError(503, str(error), code="timeout")
    return ApiError(503 if isinstance(error, Closed) else 500, str(error))
