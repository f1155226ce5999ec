"""Continuous batching over recurrent state: token ids in, token ids out. No Ray, no HTTP, no text.

One thread owns the state [L, S, H]. The requests in progress fill its first rows and are stepped together;
requests join and leave between steps. Prompts are read in chunks, each on a state of its own and by turns, about one
chunk between two steps, so that a long one stalls neither those that write nor other prompts.

A token depends on (weights, prompt, seed, position) and on nothing else, bit for bit: a prompt is read alone and
always in the same chunks, sampling looks at one row, and steps are computed only at widths (rows, some unused) whose
rows come out as they do at the full width. Which widths do is tried when an engine is made. A session goes on from its
state instead.
T time, L layers, S rows (slots), H state, V vocabulary.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gru.generation.sampling import Draw, History, Logprobs, SamplingParams, logprobs, sample
from gru.generation.state_cache import StateCache, prefix_keys, session_key
from gru.model.inference import NativeModel
from gru.model.language_model import GRULanguageModel

CHUNK = 64  # prompt tokens read between two steps: about as long as a few steps
KEPT_CHUNKS = 64  # of a prompt: the states after the first ones are kept, and the one after the last
LARGEST_WIDTH = 256  # rows that are computed at once; more gain nothing, and take memory
SMALLEST_FULL_WIDTH = 4  # libraries multiply fewer rows in another way, and would round differently with fewer slots

log = logging.getLogger(__name__)

Finish = Literal["stop", "length"]
Receiver = Callable[[int | None, Finish | Exception | None], None]


class Overloaded(RuntimeError):
    """There is no room for the request now."""


class Closed(RuntimeError):
    """The engine takes no requests: it is closing, or it has failed."""


class Expired(RuntimeError):
    """The request's deadline came before its end."""


@dataclass(eq=False, slots=True)
class Request:
    """Generate from the beginning of a document that goes on with `prompt`, which may be empty.

    The engine's thread calls on_token(token, end) for each token. `end` is None until the last call; then it is
    "length" (with the last token), "stop" (with None if the document ended) or an error.
    """

    prompt: Sequence[int]
    params: SamplingParams
    max_tokens: int
    """0: only read the prompt."""
    on_token: Receiver
    ends: Callable[[int], bool] | None = None
    """Called by the engine's thread with each token: whether the text ends with it."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens `logprobs` tells; None: it stays empty."""
    score_prompt: bool = False
    """Whether `prompt_logprobs` is wanted."""
    deadline: float = math.inf
    """time.monotonic() at which it ends with Expired."""
    owner: str = ""
    """Whose it is: states are not shared with others."""
    session: str | None = None
    """Go on where the last request of this session ended, if its state is still there, instead of at the beginning of a
    document. Its state is kept when this one has ended by itself."""

    logprobs: list[Logprobs] = field(default_factory=list, init=False)
    """Of each token made; there before the token is told."""
    prompt_logprobs: list[Logprobs] = field(default_factory=list, init=False)
    """Of each token of the prompt; complete before the first token is told."""
    resumed: int = field(default=0, init=False)
    """Tokens of the session that it goes on from."""
    cached: int = field(default=0, init=False)
    """Tokens that need not be read, since the state after them was there."""
    read: int = field(default=0, init=False)
    made: int = field(default=0, init=False)
    """Tokens generated: the position of the next one."""
    over: bool = field(default=False, init=False)
    """Finished or cancelled."""
    _inputs: list[int] = field(default_factory=list, init=False)
    """What is to be read: what stands before the prompt, and the prompt."""
    _keys: list[bytes] = field(default_factory=list, init=False)
    """Of the states after each chunk of it."""
    _state: Tensor | None = field(default=None, init=False)
    """[L, 1, H], while it is read."""
    _last: int = field(default=0, init=False)
    """Newest token, the next step's input."""
    _finished: bool = field(default=False, init=False)
    """Over, and not cancelled."""
    _history: History | None = field(default=None, init=False)
    _service: int = field(default=0, init=False)
    """Of the engine, when it was submitted."""

    @property
    def _session_key(self) -> bytes:
        assert self.session is not None
        return session_key(self.owner, f"{self._service} {self.session}")

    @property
    def tokens(self) -> int:
        """That it may come to."""
        return len(self.prompt) + self.max_tokens


News = tuple[Request, int | None, Finish | Exception | None]


class Engine:
    """Generates for up to `slots` requests at a time; `max_queue` more wait. All of them together may come to
    `max_tokens` tokens. States of sessions and of beginnings of prompts are kept in `cache_bytes`.

    The model is used as it is (eval mode, one device) and must not change.
    """

    def __init__(
        self,
        model: NativeModel | GRULanguageModel,
        end_of_text: int,
        slots: int,
        max_queue: int,
        max_tokens: float = math.inf,
        cache_bytes: int = 0,
    ) -> None:
        self.heartbeat = math.inf
        """time.monotonic() at the loop's last turn; inf while it has nothing to do, -inf once ended."""
        self.steps = self.tokens_read = self.tokens_made = 0
        """Since it was made."""
        self._service = 0  # how often it was taken out of service
        self.cache = StateCache(cache_bytes)
        self.capacity = slots + max_queue
        """Requests that it takes at a time."""
        self.max_tokens = max_tokens
        self._model = model
        self._end_of_text = end_of_text
        self._slots = slots
        full_width = min(max(SMALLEST_FULL_WIDTH, 1 << (slots - 1).bit_length()), LARGEST_WIDTH)
        with torch.inference_mode():
            self._widths = reproducible_widths(model, full_width)
            self._state_LSH = model.initial_state(math.ceil(slots / full_width) * full_width)
            self._tokens_TS = torch.full_like(self._state_LSH[:1, :, 0], end_of_text, dtype=torch.int64)
        self._rows: list[Request] = []  # row i of the state belongs to the i-th
        self._reading: deque[Request] = deque()  # they will be rows
        self._queue: deque[Request] = deque()
        self._closing = self._aborting = False
        self._condition = threading.Condition()  # guards who is where: _rows, _reading, _queue and the flags
        self._thread = threading.Thread(target=self._run, name="gru-engine", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Requests in a slot."""
        return len(self._rows) + len(self._reading)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def tokens_in_flight(self) -> int:
        """Tokens that all requests may come to."""
        with self._condition:
            return sum(request.tokens for request in self._everyone())

    def submit(self, request: Request) -> None:
        """Raises Overloaded, or Closed. A request is submitted once."""
        assert request.max_tokens > 0 or request.session is None
        with self._condition:
            if self._closing:
                raise Closed("the engine is closed")
            if self.active + self.waiting >= self.capacity:
                raise Overloaded(f"{self.active} requests are running and {self.waiting} are waiting")
            ahead = sum(other.tokens for other in self._everyone())
            if ahead + request.tokens > self.max_tokens:
                raise Overloaded(f"{ahead:,} tokens are in flight, and {request.tokens:,} more are too many")
            request._service = self._service
            self._queue.append(request)
            self._condition.notify()

    def cancel(self, request: Request) -> None:
        """Free the request's place. A token that is on its way may still arrive."""
        request.over = True
        with self._condition:
            if request in self._queue:
                self._queue.remove(request)

    def forget_sessions(self) -> None:
        """What is begun from now on goes on with none from before: they may have gone on elsewhere meanwhile."""
        self._service += 1

    def close(self, drain: bool = True) -> None:
        """Take no more requests and end, once all have finished; without `drain` they end now, with Closed.

        Returns at once; `join` waits for the end.
        """
        with self._condition:
            self._closing = True
            self._aborting = self._aborting or not drain
            self._condition.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds for a closed engine to end. Whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _everyone(self) -> list[Request]:
        return [*self._rows, *self._reading, *self._queue]

    def _run(self) -> None:
        error: Exception = Closed("the engine was closed")
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
        except Exception as failure:
            log.exception("generation failed")
            error = RuntimeError(f"generation failed: {failure!r}")
            error.__cause__ = failure
        with self._condition:
            self._closing = True
            self.heartbeat = -math.inf
            left = self._everyone()
            self._rows = []
            self._reading.clear()
            self._queue.clear()
        for request in left:
            deliver(request, None, error)

    def _turn(self) -> bool:
        """Step all rows, read about a chunk of prompts, hand the tokens over. False when it is time to end."""
        with self._condition:
            while not (self.active or self._queue or self._closing):
                self.heartbeat = math.inf
                self._condition.wait()
            if self._aborting or not (self.active or self._queue):
                return False
            self.heartbeat = time.monotonic()
            news = self._expire(self.heartbeat)
            begun: list[Request] = []
            while self._queue and self.active < self._slots:
                begun.append(self._queue.popleft())
                self._reading.append(begun[-1])
        for request in begun:
            self._begin(request)
        for start in range(0, len(self._rows), self._widths[-1]):
            news += self._step(start, self._rows[start : start + self._widths[-1]])
        self.steps += bool(self._rows)
        news += self._read()
        with self._condition:
            self._settle()
        for request, token, end in news:  # when places are free again, for those who hear of an end
            deliver(request, token, end)
        return True

    def _expire(self, now: float) -> list[News]:
        """End what is past its deadline."""
        late = [request for request in self._everyone() if request.deadline <= now and not request.over]
        for request in late:
            request.over = True
            if request in self._queue:
                self._queue.remove(request)
        return [(request, None, Expired("the request took longer than it may")) for request in late]

    def _begin(self, request: Request) -> None:
        """Where reading begins, from which state."""
        request._inputs = [self._end_of_text, *request.prompt]  # in training a document follows the end of another one
        if self.cache.most_bytes and request.session is None and not request.score_prompt:
            request._keys = prefix_keys(request.owner, request._inputs, CHUNK)
        if request.params.remembers:
            request._history = History(request.prompt, self._model.vocab_size)
        saved = None
        if request.session is not None:
            if saved := self.cache.get(request._session_key):
                assert saved.last is not None
                request.resumed = saved.tokens
                request._inputs[0] = saved.last
        elif longest := next((n for n in range(len(request._keys), 0, -1) if request._keys[n - 1] in self.cache), 0):
            saved = self.cache.get(request._keys[longest - 1])
            request.read = request.cached = longest * CHUNK
        request._state = saved.state_L1H if saved else self._model.initial_state(1)

    def _step(self, start: int, requests: list[Request]) -> list[News]:
        """One token for each of these, whose rows begin at `start`."""
        width = next(width for width in self._widths if width >= len(requests))
        tokens_TS = self._tokens_TS[:, start : start + width]
        state_LSH = self._state_LSH[:, start : start + width]
        tokens_TS[0, : len(requests)] = torch.tensor([request._last for request in requests])
        x_TSE, after_LSH = self._model.features(tokens_TS, state_LSH)
        state_LSH.copy_(after_LSH)
        return self._accept(requests, to_numpy(self._model.logits(x_TSE)[0, : len(requests)]))

    def _read(self) -> list[News]:
        """About a chunk of prompts, by turns; where one ends, its first token."""
        news: list[News] = []
        budget = CHUNK
        turns = 0
        while budget > 0 and turns < len(self._reading):
            request = self._reading[turns]
            turns += 1
            if request.over:
                continue
            assert request._state is not None
            chunk = request._inputs[request.read : request.read + CHUNK]
            tokens_TS = torch.tensor(chunk, device=self._state_LSH.device).unsqueeze(1)
            x_TSE, request._state = self._model.features(tokens_TS, request._state)
            request.read += len(chunk)
            budget -= len(chunk)
            self.tokens_read += len(chunk)
            if request.score_prompt:
                self._score(request, len(chunk), x_TSE)
            if request.read < len(request._inputs):
                self._keep_prefix(request)
            elif request.max_tokens:
                news += self._accept([request], to_numpy(self._model.logits(x_TSE[-1])))
            else:
                request.over = request._finished = True
                news.append((request, None, "length"))
        with self._condition:
            self._reading.rotate(-turns)
        return news

    def _score(self, request: Request, count: int, x_TSE: Tensor) -> None:
        """How likely the prompt's tokens are after those that were just read."""
        following = request._inputs[request.read - count + 1 : request.read + 1]
        logits_TV = to_numpy(self._model.logits(x_TSE)[: len(following), 0])
        top = request.top_logprobs or 0
        request.prompt_logprobs += [logprobs(row, token, top) for row, token in zip(logits_TV, following, strict=True)]

    def _keep_prefix(self, request: Request) -> None:
        number = request.read // CHUNK
        if request._keys and (number <= KEPT_CHUNKS or number == len(request._keys)):
            assert request._state is not None
            self.cache.put(request._keys[number - 1], request._state)

    def _accept(self, requests: list[Request], logits_SV: NDArray[np.float32]) -> list[News]:
        """Sample a token for each request, note it there, and return what to tell its receiver."""
        tokens = sample(logits_SV, [Draw(r.params, r.made, r._history) for r in requests])
        news: list[News] = []
        for request, token, logits_V in zip(requests, tokens.tolist(), logits_SV, strict=True):
            if request.over:
                continue  # cancelled meanwhile
            request.made += 1
            request._last = token
            self.tokens_made += 1
            if request._history:
                request._history.add(token)
            if request.top_logprobs is not None:
                request.logprobs.append(logprobs(logits_V, token, request.top_logprobs))
            end: Finish | None = None
            if token == self._end_of_text or (request.ends and request.ends(token)):
                end = "stop"
            elif request.made == request.max_tokens:
                end = "length"
            if end is not None:  # never back to false: it may have been cancelled by now
                request.over = request._finished = True
            news.append((request, None if token == self._end_of_text else token, end))
        return news

    def _settle(self) -> None:
        """Give up the places of requests that are over, and make rows of those whose prompt is read."""
        for row in reversed(range(len(self._rows))):
            if self._rows[row].over:
                self._keep_session(self._rows[row], self._state_LSH[:, row : row + 1])
                last = self._rows.pop()
                if row < len(self._rows):  # the last row moves into the gap
                    self._rows[row] = last
                    self._state_LSH[:, row] = self._state_LSH[:, len(self._rows)]
        for _ in range(len(self._reading)):
            request = self._reading.popleft()
            assert request._state is not None
            if request.over:
                self._keep_session(request, request._state)
            elif request.made:
                self._state_LSH[:, len(self._rows)] = request._state[:, 0]
                self._rows.append(request)
                request._state = None
            else:
                self._reading.append(request)

    def _keep_session(self, request: Request, state_L1H: Tensor) -> None:
        if request.session is not None and request._finished:
            tokens = request.resumed + len(request.prompt) + request.made
            self.cache.put(request._session_key, state_L1H, request._last, tokens)


def to_numpy(logits: Tensor) -> NDArray[np.float32]:
    return logits.float().cpu().numpy()


def deliver(request: Request, token: int | None, end: Finish | Exception | None) -> None:
    """Call the receiver; one that fails loses its place, and the others do not notice."""
    try:
        request.on_token(token, end)
    except Exception:
        log.exception("a receiver of tokens failed; its request is dropped")
        request.over = True


def reproducible_widths(model: NativeModel | GRULanguageModel, full_width: int) -> list[int]:
    """The powers of two that give each row, wherever it is, the bits that full_width gives it.

    Libraries choose kernels by shape, so this differs between machines. full_width is always among them.
    It also warms the model up.
    """
    generator = torch.Generator().manual_seed(0)
    state_LSH = model.initial_state(full_width)
    state_LSH += torch.rand(state_LSH.shape, generator=generator).to(state_LSH) * 2 - 1
    tokens_TS = torch.randint(model.vocab_size, (1, full_width), generator=generator).to(state_LSH.device)
    logits_TSV, after_LSH = model(tokens_TS, state_LSH)

    def same(width: int) -> bool:
        order = torch.randperm(full_width, generator=generator).to(state_LSH.device)
        logits, after = model(tokens_TS[:, order][:, :width], state_LSH[:, order][:, :width])
        rows = order[:width]
        return torch.equal(logits, logits_TSV[:, rows]) and torch.equal(after, after_LSH[:, rows])

    powers = [1 << n for n in range(full_width.bit_length())]
    widths = [width for width in powers if all(same(width) for _ in range(3))]
    if full_width not in widths:
        log.warning("rows of a batch of %d depend on their place here: seeds may not reproduce", full_width)
        widths.append(full_width)
    return widths
