from gru.config import EvaluateConfig
from gru.corpus.dataset import Dataset
from gru.evaluation.samples import sample_and_search
from gru.evaluation.scores import read_heldout
from gru.generation.generate import generate_ids
from gru.generation.sampling import SamplingParams
from tests.gru.evaluation.models import small


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
    params = [SamplingParams(seed=0, temperature=temperature) for temperature in (1.0, 0.0)]
    ids = generate_ids(model, tokenizer, "The ", 300, params)
    assert ids == [report.samples[temperature][0] for temperature in (1.0, 0.0)]


def test_texts_shorter_than_a_span_have_no_shares(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer()
    heldout = read_heldout(tokenizer, dataset.texts("heldout"), 1000)
    config = EvaluateConfig(prompt="", sample_tokens=3)
    report = sample_and_search(small(tokenizer), tokenizer, config, dataset, heldout)
    assert report.heldout_shares.measures() == report.shares[1.0].measures() == {}
