"""The variants that a sweep compares."""

import pytest

from gru import config as configuration
from gru.errors import UserError
from pipelines import sweep

CONFIG = configuration.load('{"corpus": {"sources": ["a.txt"]}}')


def test_variants_are_those_of_the_grid_and_those_listed() -> None:
    over = ["model.hidden=[256, 512]", 'model.cell=["gru", "lstm"]']
    trials = [["model.hidden=1024", "train.learning_rate=2e-3"], ["train.steps=7"]]
    variants = sweep.variants(CONFIG, over, trials)
    assert [sweep.label(changes) for changes in variants] == [
        "model.hidden=256 model.cell='gru'",
        "model.hidden=256 model.cell='lstm'",
        "model.hidden=512 model.cell='gru'",
        "model.hidden=512 model.cell='lstm'",
        "model.hidden=1024 train.learning_rate=2e-3",
        "train.steps=7",
    ]
    listed = variants["model.hidden=1024", "train.learning_rate=2e-3"]
    assert (listed.model.hidden, listed.train.learning_rate) == (1024, 2e-3)
    assert list(sweep.variants(CONFIG, [], trials[1:]).values()) == [configuration.changed(CONFIG, trials[1], "")]


@pytest.mark.parametrize(
    ("over", "trials", "message"),
    [
        ([], [], r"no variants to compare: expected --over KEY=\[...\] or --trial KEY=VALUE"),
        ([], [["model.hiden=1"]], r"--trial: model\.hiden: unknown key; known here: "),
        ([], [["model.hidden"]], r"--trial model\.hidden: must be section\.key=value"),
        (["model.hidden=256"], [], r"--over model\.hidden=256: expected a key and its values"),
    ],
)
def test_a_mistake_is_reported_in_a_line(over: list[str], trials: list[list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep.variants(CONFIG, over, trials)
