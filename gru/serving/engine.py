"""Continuous batching over recurrent state: token ids in, token ids out. No Ray, no HTTP, no text.

One thread owns the state [L, S, H]. The requests in progress fill its first rows and are stepped together;
requests join and leave between steps. A prompt is read in chunks on a state of its own, at most one chunk
between two steps, so a long one never stalls the others.

A token depends on (weights, prompt, seed, position) and on nothing else, bit for bit: a prompt is read alone,
sampling looks at one row, and steps are computed only at widths (rows, some unused) whose rows come out as
they do at the full width. Which widths do is tried when an engine is made.
T time, L layers, S rows (slots), H state, V vocabulary.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gru.model.language_model import GRULanguageModel
from gru.serving.sampling import SamplingParams, sample

CHUNK = 64  # prompt tokens read between two steps: about as long as a few steps
SMALLEST_WIDTH = 4  # matrix products over fewer rows take another path and round differently

log = logging.getLogger(__name__)

Finish = Literal["stop", "length"]
Receiver = Callable[[int | None, Finish | Exception | None], None]


class Overloaded(RuntimeError):
    """All slots and all places in the queue are taken."""


class Closed(RuntimeError):
    """The engine takes no requests: it is closing, or it has failed."""


@dataclass(eq=False, slots=True)
class Request:
    """A request's handle; its fields belong to the engine."""

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    on_token: Receiver
    read: int = 0  # prompt tokens read
    made: int = 0  # tokens generated: the position of the next one
    last: int = 0  # newest token, the next step's input
    over: bool = False  # finished or cancelled


class Engine:
    """Generates for up to `slots` requests at a time; `max_queue` more wait.

    The model is used as it is (eval mode, one device) and must not change.
    """

    def __init__(self, model: GRULanguageModel, end_of_text: int, slots: int, max_queue: int) -> None:
        self.heartbeat = math.inf
        """time.monotonic() at the loop's last turn; inf while it has nothing to do, -inf once ended."""
        self._model = model
        self._end_of_text = end_of_text
        self._slots = slots
        self.capacity = slots + max_queue
        """Requests that it takes at a time."""
        full_width = max(SMALLEST_WIDTH, 1 << (slots - 1).bit_length())
        with torch.inference_mode():
            self._widths = reproducible_widths(model, full_width)
            self._state_LSH = model.initial_state(full_width)
            self._tokens_TS = torch.full((1, full_width), end_of_text, device=self._state_LSH.device)
        self._rows: list[Request] = []  # row i of the state belongs to the i-th
        self._reading: Request | None = None  # will be the next row
        self._read_state_LSH = self._state_LSH
        self._queue: deque[Request] = deque()
        self._closing = self._aborting = False
        self._condition = threading.Condition()  # guards who is where: _rows, _reading, _queue and the flags
        self._thread = threading.Thread(target=self._run, name="gru-engine", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Requests in a slot."""
        return len(self._rows) + (self._reading is not None)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def submit(self, prompt: Sequence[int], params: SamplingParams, max_tokens: int, on_token: Receiver) -> Request:
        """Generate from the beginning of a document that goes on with `prompt`, which may be empty.

        The engine's thread calls on_token(token, end) for each token. `end` is None until the last call;
        then it is "length" (with the last token), "stop" (with None: the document ended) or an error.
        Raises Overloaded, or Closed.
        """
        assert max_tokens > 0
        # In training every document follows the end of another one.
        request = Request([self._end_of_text, *prompt], params, max_tokens, on_token)
        with self._condition:
            if self._closing:
                raise Closed("the engine is closed")
            if self.active + self.waiting >= self.capacity:
                raise Overloaded(f"{self.active} requests are running and {self.waiting} are waiting")
            self._queue.append(request)
            self._condition.notify()
        return request

    def cancel(self, request: Request) -> None:
        """Free the request's place. A token that is on its way may still arrive."""
        request.over = True
        with self._condition:
            if request in self._queue:
                self._queue.remove(request)

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
            left = [*self._rows, *([self._reading] if self._reading else []), *self._queue]
            self._rows, self._reading = [], None
            self._queue.clear()
        for request in left:
            deliver(request, None, error)

    def _turn(self) -> bool:
        """Step all rows, read a chunk of one prompt, hand the tokens over. False when it is time to end."""
        with self._condition:
            while not (self.active or self._queue or self._closing):
                self.heartbeat = math.inf
                self._condition.wait()
            if self._aborting or not (self.active or self._queue):
                return False
            self.heartbeat = time.monotonic()
            if self._reading is None and self._queue and len(self._rows) < self._slots:
                self._reading = self._queue.popleft()
                self._read_state_LSH = self._model.initial_state(1)
        news: list[tuple[Request, int | None, Finish | None]] = []
        if self._rows:
            news += self._step(self._rows)
        if self._reading is not None:
            news += self._read(self._reading)
        with self._condition:
            self._settle()
        for request, token, end in news:  # when places are free again, for those who hear of an end
            deliver(request, token, end)
        return True

    def _step(self, rows: list[Request]) -> list[tuple[Request, int | None, Finish | None]]:
        """One token for each row."""
        width = next(width for width in self._widths if width >= len(rows))
        self._tokens_TS[0, : len(rows)] = torch.tensor([request.last for request in rows])
        logits_TSV, state_LSH = self._model(self._tokens_TS[:, :width], self._state_LSH[:, :width])
        self._state_LSH[:, :width] = state_LSH
        return accept(rows, logits_TSV[0, : len(rows)].float().cpu().numpy(), self._end_of_text)

    def _read(self, request: Request) -> list[tuple[Request, int | None, Finish | None]]:
        """The next chunk of the prompt; at its end, the first token."""
        chunk = request.prompt[request.read : request.read + CHUNK]
        tokens_TS = torch.tensor(chunk, device=self._state_LSH.device).unsqueeze(1)
        logits_TSV, self._read_state_LSH = self._model(tokens_TS, self._read_state_LSH)
        request.read += len(chunk)
        if request.read < len(request.prompt):
            return []
        return accept([request], logits_TSV[-1].float().cpu().numpy(), self._end_of_text)

    def _settle(self) -> None:
        """Give up the places of requests that are over, and make a row of one whose prompt is read."""
        for row in reversed(range(len(self._rows))):
            if self._rows[row].over:
                last = self._rows.pop()
                if row < len(self._rows):  # the last row moves into the gap
                    self._rows[row] = last
                    self._state_LSH[:, row] = self._state_LSH[:, len(self._rows)]
        if self._reading is not None and (self._reading.over or self._reading.made):
            if not self._reading.over:
                self._state_LSH[:, len(self._rows)] = self._read_state_LSH[:, 0]
                self._rows.append(self._reading)
            self._reading = None


def accept(
    requests: list[Request], logits_SV: NDArray[np.float32], end_of_text: int
) -> list[tuple[Request, int | None, Finish | None]]:
    """Sample a token for each request, note it there, and return what to tell its receiver."""
    tokens = sample(logits_SV, [r.params for r in requests], [r.made for r in requests])
    news: list[tuple[Request, int | None, Finish | None]] = []
    for request, token in zip(requests, tokens.tolist(), strict=True):
        if request.over:
            continue  # cancelled meanwhile
        request.made += 1
        request.last = token
        end: Finish | None = None
        if token == end_of_text:
            end = "stop"
        elif request.made == request.max_tokens:
            end = "length"
        request.over = end is not None
        news.append((request, None if end == "stop" else token, end))
    return news


def deliver(request: Request, token: int | None, end: Finish | Exception | None) -> None:
    """Call the receiver; one that fails loses its place, and the others do not notice."""
    try:
        request.on_token(token, end)
    except Exception:
        log.exception("a receiver of tokens failed; its request is dropped")
        request.over = True


def reproducible_widths(model: GRULanguageModel, full_width: int) -> list[int]:
    """The powers of two from 4 up that give each row, wherever it is, the bits that full_width gives it.

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

    powers = [1 << n for n in range(2, full_width.bit_length())]
    widths = [width for width in powers if all(same(width) for _ in range(3))]
    if full_width not in widths:
        log.warning("rows of a batch of %d depend on their place here: seeds may not reproduce", full_width)
        widths.append(full_width)
    return widths
