"""Speed of tokenization, compared with the tokenizers library.

python -m tests.benchmarks.encoding
"""

import argparse
import time
from collections.abc import Callable

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.documents import documents
from gru.corpus.listing import list_files
from gru.corpus.partitions import plan
from gru.corpus.report import Report
from gru.corpus.tokenizer import Tokenizer, train_tokenizer


def rate(amount: float, work: Callable[[], object]) -> float:
    """Return the amount per second of one run: there is only one, because both tokenizers cache words."""
    started = time.perf_counter()
    work()
    return amount / (time.perf_counter() - started)


def encoding() -> None:
    corpus = CorpusConfig(sources=["python-stdlib"])
    [partition] = plan(list_files(corpus).files, corpus)
    texts = [text for span in partition for text in documents(span, corpus, Report())]
    tokenizer = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=4096), texts)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer.encode("")  # loads the tokenizer
    ours = rate(megabytes, lambda: tokenizer.encode_batch(texts))
    reference = reference_encoder(tokenizer)
    theirs = rate(megabytes, lambda: reference(texts))
    show("encoding, MB/s", f"{tokenizer.backend}", ours, "tokenizers", theirs)


def reference_encoder(tokenizer: Tokenizer) -> Callable[[list[str]], object]:
    """Return a function that encodes texts with the tokenizers library."""
    from tokenizers import Tokenizer as Reference

    return Reference.from_str(tokenizer.json.decode()).encode_batch_fast


def show(what: str, first: str, first_rate: float, second: str, second_rate: float, digits: int = 1) -> None:
    """Print two rates and their ratio."""
    print(
        f"{what:28} {first} {first_rate:,.1f}, {second} {second_rate:,.1f}: {first_rate / second_rate:.{digits}f} x",
        flush=True,
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    encoding()
