"""The numbers that the README quotes: each a ratio of two sides measured in one run, on this machine.

python -m tests.benchmarks.overview
"""

import time
from collections.abc import Callable

import torch

from gru.config import CorpusConfig, ModelConfig, TokenizerConfig
from gru.corpus import sources
from gru.corpus.documents import Report, documents
from gru.corpus.tokenizer import Tokenizer, train
from gru.model.language_model import GRULanguageModel
from gru.serving.engine import Engine, Finish, Request
from gru.serving.sampling import SamplingParams

STREAMS = 32
TOKENS = 400


def rate(amount: float, work: Callable[[], object], repeats: int = 3) -> float:
    """Best of a few: amount per second."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return amount / best


def encoding() -> None:
    corpus = CorpusConfig(sources=["python-stdlib"])
    [partition] = sources.plan(sources.list_files(corpus), corpus)
    texts = [text for span in partition for text in documents(span, corpus, Report())]
    tokenizer = train(TokenizerConfig(kind="bpe", vocab_size=4096), texts)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer.encode("")  # loads
    ours = rate(megabytes, lambda: tokenizer.encode_batch(texts), repeats=1)  # once: both remember words
    reference = reference_encoder(tokenizer)
    theirs = rate(megabytes, lambda: reference(texts), repeats=1)
    show("encoding, MB/s", f"{tokenizer.backend}", ours, "tokenizers", theirs)


def reference_encoder(tokenizer: Tokenizer) -> Callable[[list[str]], object]:
    from tokenizers import Tokenizer as Reference

    return Reference.from_str(tokenizer.json.decode()).encode_batch_fast


def streams() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GRULanguageModel(ModelConfig(), 2048).eval()
    with torch.no_grad():
        model.output_bias[0] = -100  # never ends by itself

    def generate(count: int) -> None:
        engine = Engine(model, 0, STREAMS, 0)
        left = [count]

        def receive(token: int | None, end: Finish | Exception | None) -> None:
            left[0] -= end is not None

        for seed in range(count):
            engine.submit(Request([1], SamplingParams(seed=seed), TOKENS, receive))
        engine.close()
        engine.join()
        assert left == [0]

    many, one = rate(STREAMS * TOKENS, lambda: generate(STREAMS)), rate(TOKENS, lambda: generate(1))
    show("generation, tokens/s", f"{STREAMS} streams", many, "1 stream", one)


def show(what: str, first: str, first_rate: float, second: str, second_rate: float, digits: int = 1) -> None:
    print(
        f"{what:28} {first} {first_rate:,.1f}, {second} {second_rate:,.1f}: {first_rate / second_rate:.{digits}f} x",
        flush=True,
    )


if __name__ == "__main__":
    encoding()
    streams()
