"""Texts from a model without an endpoint, the same as the endpoint would generate: whole, or piece by piece."""

import secrets
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from queue import SimpleQueue
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, overload

from typing_extensions import TypedDict, Unpack

from gru.corpus.tokenizer import Tokenizer
from gru.errors import UserError
from gru.generation.detokenizer import Detokenizer
from gru.generation.engine import Engine, StateNotCached
from gru.generation.request import Finish, Request
from gru.generation.sampling import Logprobs, SamplingParams
from gru.model.inference import inference_model
from gru.model.language_model import GRULanguageModel

SLOTS = 32  # texts that are generated side by side
SESSION_BYTES = 16 << 20  # memory for the states of a generator's sessions


class TextModel(Protocol):
    """A model with its tokenizer, such as a bundle."""

    @property
    def model(self) -> GRULanguageModel: ...

    @property
    def tokenizer(self) -> Tokenizer: ...


class Piece(NamedTuple):
    """A piece of a text; the last one has the reason for which the text ends there."""

    text: str
    finish: Finish | None


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


class PieceQueue:
    """A receiver that turns a request's tokens into pieces of text, for another thread.

    Of a session, a character may span two texts. What may begin a stop string is in the first of them.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str], in_session: bool = False) -> None:
        self._detokenizer = Detokenizer(token_bytes, stops)
        self._in_session = in_session
        self._text = ""
        self._repeated = 0  # characters to come that the session's last text had already
        self._pieces: SimpleQueue[Piece | Exception] = SimpleQueue()

    def resume(self, held: bytes) -> None:
        self._detokenizer.resume(held)
        self._repeated = len(held.decode(errors="ignore"))

    def hold(self) -> bytes:
        return self._detokenizer.hold()

    def token(self, token: int, logprobs: Logprobs | None) -> bool:
        self._text += self._detokenizer.feed(token)
        return self._detokenizer.stopped

    def notify(self, end: Finish | Exception | None) -> None:
        if isinstance(end, Exception):
            self._pieces.put(end)
            return
        text, self._text = self._text, ""
        if end == "length" and self._in_session:
            text += self.hold().decode(errors="ignore")  # without an incomplete character
        elif end:
            text += self._detokenizer.finish()
        text, self._repeated = text[self._repeated :], max(0, self._repeated - len(text))
        if text or end:
            self._pieces.put(Piece(text, end))

    def take(self) -> Piece:
        """Wait for the next piece. Raises the error that ended the request."""
        piece = self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        return piece


class TextGenerator:
    """A model with an engine of its own, for one text at a time. It is for use in a `with` statement."""

    def __init__(self, bundle: TextModel) -> None:
        self._tokenizer = bundle.tokenizer
        model = inference_model(bundle.model)
        # The queue is for a text that begins while the engine still ends the one before it.
        self._engine = Engine(model, self._tokenizer.end_of_text, slots=1, max_queue=1, cache_bytes=SESSION_BYTES)

    def stream(
        self,
        prompt: str,
        params: SamplingParams,
        max_tokens: int,
        stops: Sequence[str] = (),
        session: str | None = None,
        resume: bool = False,
    ) -> Generator[Piece, None, None]:
        """Yield the continuation of the prompt, piece by piece. It ends where the document ends, before a stop string,
        or after `max_tokens` tokens; closing the iterator ends it, too.

        session: the name under which the state after the text is kept, for a prompt that continues it. resume: whether
        the prompt continues it. Raises StateNotCached if that state is not there, as after a text that was closed.
        """
        receiver = PieceQueue(self._tokenizer.token_bytes, stops, session is not None)
        prompt_tokens = self._tokenizer.encode(prompt).tolist()
        held_text = None if session is None else receiver
        request = Request(prompt_tokens, params, max_tokens, receiver, session=session, held_text=held_text)
        stream = self._engine.submit(request)
        try:
            while True:
                piece = receiver.take()
                if resume and not stream.resumed:
                    raise StateNotCached(f"the state of session {session!r} is not cached")
                yield piece
                if piece.finish:
                    return
        finally:
            self._engine.cancel(stream)

    def close(self) -> None:
        """End the engine, and the texts that it generates."""
        self._engine.close(drain=False)

    def __enter__(self) -> "TextGenerator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TextOptions(TypedDict, total=False):
    """The options of `generate`, for type checkers."""

    tokens: int
    temperature: float
    seed: int | None
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: str | Sequence[str]


@overload
def generate(
    bundle: TextModel, prompt: str = ..., *, stream: Literal[False] = ..., **options: Unpack[TextOptions]
) -> str: ...


@overload
def generate(
    bundle: TextModel, prompt: str = ..., *, stream: Literal[True], **options: Unpack[TextOptions]
) -> Iterator[str]: ...


def generate(
    bundle: TextModel,
    prompt: str = "",
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    seed: int | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    stream: bool = False,
) -> str | Iterator[str]:
    """Return the text with which the model continues the prompt, at most `tokens` tokens of it.

    With `stream`, return an iterator that yields the text as it is generated. The sampling parameters are those of the
    endpoint (see SamplingParams), and the same seed gives the same text; None is a random seed. stop: text, or several,
    before which the continuation ends. Raises UserError for an option that is out of range.
    """
    stops = [stop] if isinstance(stop, str) else stop
    if tokens < 1:
        raise UserError(f"tokens: must be an integer >= 1, not {tokens}")
    if not all(stops):
        raise UserError("stop: must not be empty")
    seed = secrets.randbits(63) if seed is None else seed
    params = SamplingParams(seed, temperature, top_k, top_p, min_p, repetition_penalty)
    texts = _texts(bundle, prompt, params, tokens, stops)
    return texts if stream else "".join(texts)


def _texts(bundle: TextModel, prompt: str, params: SamplingParams, tokens: int, stops: Sequence[str]) -> Iterator[str]:
    with TextGenerator(bundle) as generator, closing(generator.stream(prompt, params, tokens, stops)) as pieces:
        for piece in pieces:
            yield piece.text


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
