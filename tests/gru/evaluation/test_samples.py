from gru.config import EvaluateConfig, TokenizerConfig
from gru.corpus.dataset import Dataset
from gru.corpus.tokenizer import train_tokenizer
from gru.evaluation.samples import sample_and_search
from gru.evaluation.scores import read_heldout
from gru.generation.generate import generate_texts
from tests.gru.evaluation.models import TEXTS, small


def test_samples_begin_with_the_prompt_and_are_reproducible() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), TEXTS)
    model = small(tokenizer)
    first = generate_texts(model, tokenizer, "The", 20, [0.0, 1.0])
    assert all(text.startswith("The") for text in first)
    assert first == generate_texts(model, tokenizer, "The", 20, [0.0, 1.0])


def test_samples_are_searched_for_copies_and_repetition(dataset: Dataset) -> None:
    """The fables repeat the same sentences; an untrained model generates none of them."""
    tokenizer = dataset.tokenizer()
    heldout = read_heldout(tokenizer, dataset.texts("heldout"), 20_000)
    config = EvaluateConfig(prompt="The ", sample_tokens=300, temperatures=[1.0, 0.0, 1.0])
    model = small(tokenizer)
    report = sample_and_search(model, tokenizer, config, dataset, heldout)
    assert report.heldout_shares.copied_share is not None
    assert report.heldout_shares.copied_share > 0.9
    assert report.shares[1.0].copied_share == 0.0
    assert report.searched_bytes == dataset.manifest.train.bytes
    loop, chance = report.shares[0.0].repetition, report.shares[1.0].repetition
    assert loop is not None
    assert chance is not None
    assert loop > 0.5 > 0.1 > chance
    texts = generate_texts(model, tokenizer, "The ", 300, [1.0, 0.0])
    assert texts == ["The " + tokenizer.decode(report.samples[t][0]) for t in (1.0, 0.0)]


def test_texts_shorter_than_a_span_have_no_shares(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer()
    heldout = read_heldout(tokenizer, dataset.texts("heldout"), 1000)
    config = EvaluateConfig(prompt="", sample_tokens=3)
    report = sample_and_search(small(tokenizer), tokenizer, config, dataset, heldout)
    assert report.heldout_shares.measures() == report.shares[1.0].measures() == {}
