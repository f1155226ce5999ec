"""Continuous batching over recurrent state: token ids in, token ids out. The engine knows no Ray, no HTTP and no text.

One thread owns the state [L, S, H]. The requests in progress occupy its first rows and are stepped together; requests
join and leave between steps. Prompts are read in chunks, each prompt on a state of its own and in rotation, about one
chunk between two steps, so that a long prompt delays neither the streams that generate nor other prompts (chunked
prefill).

A token depends on (weights, prompt, seed, position) and on nothing else, bit for bit: a prompt is read alone and
always in the same chunks, sampling looks at one row, and a row has the same bits in a step of any width (number of
rows): inference.c sees to that, and with torch those widths are used (some rows unused) at which it was measured when
the engine was created. A session resumes from its own state, and its texts are as if they had been one.
T time, L layers, S rows (slots), H state, V vocabulary.
"""

import logging
import math
import threading
import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gru.generation.request import Finish, Request, TokenStream
from gru.generation.sampling import History, logprobs, sample
from gru.generation.state_cache import CachedState, StateCache, prefix_keys, turn_key
from gru.generation.widths import reproducible_widths
from gru.model.inference import NativeModel, NativeStreams
from gru.model.language_model import GRULanguageModel

CHUNK = 64  # prompt tokens read between two steps: they take about as long as a few steps
CACHED_CHUNKS = 64  # the states after a prompt's first chunks are cached, and the one after its last chunk
LARGEST_WIDTH = 256  # rows computed at once; more would gain no speed and take memory
SMALLEST_FULL_WIDTH = 4  # libraries multiply fewer rows with other kernels, and would round differently with few slots

log = logging.getLogger(__name__)


class Overloaded(RuntimeError):
    """The engine has no room for the request now."""


class Closed(RuntimeError):
    """The engine takes no requests: it is closing, or it has failed."""


class Expired(RuntimeError):
    """The request's deadline passed before the request had finished."""


class StateNotCached(LookupError):
    """The state that the request resumes from is no longer cached."""


class Notification(NamedTuple):
    """A call of a receiver's `notify` that is due after the step."""

    stream: TokenStream
    end: Finish | Exception | None


class Engine:
    """Generates for up to `slots` requests at a time; up to `max_queue` more wait. The token budgets of all of them
    together are limited to `max_tokens`. States of sessions and of prompt prefixes are cached in `cache_bytes`.

    The model must be in eval mode, on one device, and must not change.
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
        """Value of time.monotonic() at the loop's last iteration; inf while it is idle, -inf once it has ended."""
        self.steps = self.tokens_read = self.tokens_generated = 0
        """Totals since the engine was created."""
        self._session_epoch = 0  # number of times that sessions were forgotten
        self.cache = StateCache(cache_bytes)
        self.capacity = slots + max_queue
        """Most requests that the engine holds at a time."""
        self.max_tokens = max_tokens
        self._model = model
        self._end_of_text = end_of_text
        self._slots = slots
        full_width = min(max(SMALLEST_FULL_WIDTH, 1 << (slots - 1).bit_length()), LARGEST_WIDTH)
        with torch.inference_mode():
            self._state_LSH = model.initial_state(math.ceil(slots / full_width) * full_width)
            self._native = NativeStreams(model, self._state_LSH, full_width) if isinstance(model, NativeModel) else None
            self._widths = [full_width] if self._native else reproducible_widths(model, full_width)
            self._tokens_TS = torch.full_like(self._state_LSH[:1, :, 0], end_of_text, dtype=torch.int64)
        self._rows: list[TokenStream] = []  # the i-th owns row i of the state
        self._reading: deque[TokenStream] = deque()  # streams in a slot whose prompt is being read
        self._queue: deque[TokenStream] = deque()
        self._closing = self._aborting = False
        self._condition = threading.Condition()  # guards membership in _rows, _reading and _queue, and the flags
        self._thread = threading.Thread(target=self._run, name="gru-engine", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """The number of requests in a slot."""
        return len(self._rows) + len(self._reading)

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return len(self._queue)

    @property
    def tokens_in_flight(self) -> int:
        """The sum of the token budgets of all requests in the engine."""
        with self._condition:
            return self._budget()

    def submit(self, request: Request) -> TokenStream:
        """Queue the request. Raises Overloaded, or Closed."""
        assert request.max_tokens > 0 or (request.session is None and request.turn is None)
        assert request.session is None or request.turn is None
        with self._condition:
            if self._closing:
                raise Closed("the engine is closed")
            if self.active + self.waiting >= self.capacity:
                raise Overloaded(f"{self.active} requests are running and {self.waiting} are waiting")
            in_flight = self._budget()
            if in_flight + request.token_budget > self.max_tokens:
                raise Overloaded(
                    f"{in_flight:,} tokens are in flight; {request.token_budget:,} more would exceed "
                    f"the limit of {self.max_tokens:,}"
                )
            stream = TokenStream(request, self._session_epoch)
            self._queue.append(stream)
            self._condition.notify()
            return stream

    def cancel(self, stream: TokenStream) -> None:
        """Free the stream's place. A token that was already sampled may still be delivered."""
        stream.over = True
        with self._condition:
            if stream in self._queue:
                self._queue.remove(stream)

    def forget_sessions(self) -> None:
        """Let later requests resume from no session state saved so far: sessions may have continued elsewhere."""
        self._session_epoch += 1

    def turn_state(self, owner: str, name: str) -> CachedState | None:
        """Return the state after a turn of the owner's conversation, or None if it is not cached."""
        return self.cache.peek(turn_key(owner, f"{self._session_epoch} {name}"))

    def close(self, drain: bool = True) -> None:
        """Take no more requests and end when all have finished; without `drain`, end them now with Closed.

        Returns at once; `join` waits for the end.
        """
        with self._condition:
            self._closing = True
            self._aborting = self._aborting or not drain
            self._condition.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds for a closed engine to end. Return whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _all_streams(self) -> list[TokenStream]:
        return [*self._rows, *self._reading, *self._queue]

    def _budget(self) -> int:
        return sum(stream.request.token_budget for stream in self._all_streams())

    def _run(self) -> None:
        error: Exception = Closed("the engine was closed")
        try:
            with torch.inference_mode():
                while self._iterate():
                    pass
        except Exception as failure:
            log.exception("generation failed")
            error = RuntimeError(f"generation failed: {failure!r}")
            error.__cause__ = failure
        with self._condition:
            self._closing = True
            self.heartbeat = -math.inf
            unfinished = self._all_streams()
            self._rows = []
            self._reading.clear()
            self._queue.clear()
        for stream in unfinished:
            notify(stream, error)

    def _iterate(self) -> bool:
        """Step all rows, read about a chunk of prompts, notify the receivers. Return False when the loop must end."""
        with self._condition:
            while not (self.active or self._queue or self._closing):
                self.heartbeat = math.inf
                self._condition.wait()
            if self._aborting or not (self.active or self._queue):
                return False
            self.heartbeat = time.monotonic()
            notifications = self._expire(self.heartbeat)
            admitted: list[TokenStream] = []
            while self._queue and self.active < self._slots:
                admitted.append(self._queue.popleft())
                self._reading.append(admitted[-1])
        for stream in admitted:
            notifications += self._begin(stream)
        for start in range(0, len(self._rows), self._widths[-1]):
            notifications += self._step(start, self._rows[start : start + self._widths[-1]])
        self.steps += bool(self._rows)
        notifications += self._read()
        with self._condition:
            self._update_rows()
        for stream, end in notifications:  # only now: who hears of an end may count on the free place
            notify(stream, end)
        return True

    def _expire(self, now: float) -> list[Notification]:
        """End the streams whose deadline has passed."""
        late = [stream for stream in self._all_streams() if stream.request.deadline <= now and not stream.over]
        for stream in late:
            stream.over = True
            if stream in self._queue:
                self._queue.remove(stream)
        return [Notification(stream, Expired("the request exceeded its time limit")) for stream in late]

    def _begin(self, stream: TokenStream) -> list[Notification]:
        """Set what the stream reads, and the state from which it starts: a cached one, or an empty one. End a stream
        whose state is required and not cached."""
        request, resume_key = stream.request, stream.resume_key
        resumed = None if resume_key is None else self.cache.get(resume_key)
        # In training a document follows the end of another one, with which a prompt of token ids may begin.
        begins = not resumed and request.prompt[:1] == [self._end_of_text]
        stream.inputs = [*request.prompt] if begins else [self._end_of_text, *request.prompt]
        if self.cache.max_bytes and resume_key is None and not request.score_prompt:
            stream.prefix_keys = prefix_keys(request.owner, stream.inputs, CHUNK)
        cached = resumed
        keys = stream.prefix_keys
        if resumed:
            assert resumed.unread_token is not None
            stream.resumed, stream.position = resumed.tokens, resumed.position
            stream.inputs[0] = resumed.unread_token
            if request.held_text and resumed.held and not request.prompt:
                request.held_text.resume(resumed.held)
            if request.turn and request.prompt and resumed.unread_token == self._end_of_text:
                del stream.inputs[0]
        elif longest := next((n for n in range(len(keys), 0, -1) if keys[n - 1] in self.cache), 0):
            cached = self.cache.get(keys[longest - 1])
            stream.read = stream.cached = longest * CHUNK
        stream.state_L1H = cached.state_L1H if cached else self._model.initial_state(1)
        if request.params.has_penalties or stream.save_key is not None:  # the next request may have penalties
            stream.history = History(request.prompt, self._model.vocab_size, cached.history if cached else None)
        if request.turn and request.turn.previous is not None and cached is None:
            stream.over = True
            return [Notification(stream, StateNotCached("the state of the previous turn is no longer cached"))]
        return []

    def _step(self, start: int, streams: list[TokenStream]) -> list[Notification]:
        """Generate one token for each of these streams, whose rows begin at `start`."""
        tokens = [stream.last_token for stream in streams]
        if self._native:
            return self._accept(streams, self._native.read(start, tokens))
        width = next(width for width in self._widths if width >= len(streams))
        tokens_TS = self._tokens_TS[:, start : start + width]
        state_LSH = self._state_LSH[:, start : start + width]
        tokens_TS[0, : len(streams)] = torch.tensor(tokens)
        x_TSE, after_LSH = self._model.features(tokens_TS, state_LSH)
        state_LSH.copy_(after_LSH)
        return self._accept(streams, to_numpy(self._model.logits(x_TSE)[0, : len(streams)]))

    def _read(self) -> list[Notification]:
        """Read about a chunk of prompts, in rotation. Where a prompt ends, generate the first token."""
        notifications: list[Notification] = []
        budget, visited = CHUNK, 0
        while budget > 0 and visited < len(self._reading):
            stream = self._reading[visited]
            visited += 1
            if stream.over:
                continue
            assert stream.state_L1H is not None
            chunk = stream.inputs[stream.read : stream.read + CHUNK]
            tokens_TS = torch.tensor(chunk, device=self._state_LSH.device).unsqueeze(1)
            x_TSE, stream.state_L1H = self._model.features(tokens_TS, stream.state_L1H)
            stream.read += len(chunk)
            budget -= len(chunk)
            self.tokens_read += len(chunk)
            if stream.request.score_prompt:
                self._score(stream, len(chunk), x_TSE)
            if stream.read < len(stream.inputs):
                self._save_prefix(stream)
            elif stream.request.max_tokens:
                notifications += self._accept([stream], to_numpy(self._model.logits(x_TSE[-1])))
            else:
                stream.over, stream.finish = True, "length"
                notifications.append(Notification(stream, "length"))
        with self._condition:
            self._reading.rotate(-visited)
        return notifications

    def _score(self, stream: TokenStream, count: int, x_TSE: Tensor) -> None:
        """Compute the log-probabilities of the prompt tokens that follow the `count` tokens just read."""
        following = stream.inputs[stream.read - count + 1 : stream.read + 1]
        logits_TV = to_numpy(self._model.logits(x_TSE)[: len(following), 0])
        top = stream.request.top_logprobs or 0
        stream.prompt_logprobs += [logprobs(row, token, top) for row, token in zip(logits_TV, following, strict=True)]

    def _save_prefix(self, stream: TokenStream) -> None:
        chunks = stream.read // CHUNK
        if stream.prefix_keys and (chunks <= CACHED_CHUNKS or chunks == len(stream.prefix_keys)):
            assert stream.state_L1H is not None
            self.cache.put(stream.prefix_keys[chunks - 1], CachedState(stream.state_L1H))

    def _accept(self, streams: list[TokenStream], logits_SV: NDArray[np.float32]) -> list[Notification]:
        """Sample a token for each stream, record it there, and pass it to the receiver."""
        tokens = sample(logits_SV, [stream.draw for stream in streams])
        notifications: list[Notification] = []
        for stream, token, logits_V in zip(streams, tokens.tolist(), logits_SV, strict=True):
            if stream.over:
                continue  # cancelled during the step
            request = stream.request
            stream.generated += 1
            stream.position += 1
            stream.last_token = token
            self.tokens_generated += 1
            if stream.history:
                stream.history.add(token)
            token_logprobs = None
            if request.top_logprobs is not None:
                token_logprobs = logprobs(logits_V, token, request.top_logprobs)
                stream.logprobs.append(token_logprobs)
            end: Finish | None = None
            if token == self._end_of_text:
                end = "stop"
            else:
                try:
                    if request.receiver.token(token, token_logprobs):
                        end = "stop"
                except Exception:
                    drop(stream)
                    continue
            if end is None and stream.generated == request.max_tokens:
                end = "length"
            if end is not None:  # `over` is never reset to false: the stream may have been cancelled by now
                stream.over, stream.finish = True, end
            notifications.append(Notification(stream, end))
        return notifications

    def _update_rows(self) -> None:
        """Free the places of streams that are over, and give a row to those whose prompt has been read."""
        for row in reversed(range(len(self._rows))):
            if self._rows[row].over:
                self._save_session(self._rows[row], self._state_LSH[:, row : row + 1])
                last = self._rows.pop()
                if row < len(self._rows):  # the last row moves into the gap
                    self._rows[row] = last
                    self._state_LSH[:, row] = self._state_LSH[:, len(self._rows)]
        for _ in range(len(self._reading)):
            stream = self._reading.popleft()
            assert stream.state_L1H is not None
            if stream.over:
                self._save_session(stream, stream.state_L1H)
            elif stream.generated:
                self._state_LSH[:, len(self._rows)] = stream.state_L1H[:, 0]
                self._rows.append(stream)
                stream.state_L1H = None
            else:
                self._reading.append(stream)

    def _save_session(self, stream: TokenStream, state_L1H: Tensor) -> None:
        if stream.save_key is not None and stream.finish:
            tokens = stream.resumed + len(stream.request.prompt) + stream.generated
            stopped = stream.finish == "stop" and stream.last_token != self._end_of_text
            history = stream.history.save() if stream.history else None
            state = CachedState(state_L1H, stream.last_token, tokens, stream.position, history, stopped, stream.held)
            self.cache.put(stream.save_key, state)


def to_numpy(logits: Tensor) -> NDArray[np.float32]:
    return logits.float().cpu().numpy()


def notify(stream: TokenStream, end: Finish | Exception | None) -> None:
    """Call the receiver's `notify`; drop the stream if that fails."""
    try:
        stream.request.receiver.notify(end)
    except Exception:
        drop(stream)


def drop(stream: TokenStream) -> None:
    """Give up a stream whose receiver has just raised an exception. Other streams are not affected."""
    log.exception("a receiver of tokens failed; its request is dropped")
    stream.over = True
