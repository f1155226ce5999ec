import pytest
import torch

from gru.comparison.contenders import DEFAULTS, Contender, count_parameters, parse_contender
from gru.config import CorpusConfig, ModelConfig, PipelineConfig, TrainConfig
from gru.errors import UserError

VOCAB = 60


def config(**model: object) -> PipelineConfig:
    return PipelineConfig(
        corpus=CorpusConfig(sources=["corpus.txt"]),
        model=ModelConfig.model_validate({"embedding": 96, "hidden": 96, **model}),
        train=TrainConfig(workers=2, batch_size=32, sequence_length=64),
    )


@pytest.mark.parametrize("layers", [1, 3])
def test_default_contenders_have_about_as_many_parameters(layers: int) -> None:
    base = config(layers=layers)
    contenders = [parse_contender(name, base, VOCAB) for name in DEFAULTS]
    expected = count_parameters(base.model, VOCAB)
    for each in contenders:
        model = each.build(each.model, VOCAB, torch.float32)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=0.05), each.name
        assert each.model.layers == layers
    assert contenders[0].model == base.model
    transformer = contenders[-1].train
    assert transformer.sequence_length >= 256
    assert transformer.sequence_length * transformer.batch_size == 32 * 64


def test_contenders_are_names_and_overrides() -> None:
    base = config()
    careful = parse_contender("careful:train.learning_rate=0.002,model.dropout=0.3", base, VOCAB)
    assert (careful.train.learning_rate, careful.model.dropout, careful.model.cell) == (0.002, 0.3, "gru")
    wide = parse_contender("lstm-wide:model.hidden=200", base, VOCAB)
    assert (wide.model.cell, wide.model.hidden) == ("lstm", 200)
    slow = parse_contender("transformer:train.learning_rate=1e-4,model.dropout=0.2", base, VOCAB)
    assert slow.transformer is not None
    assert (slow.train.learning_rate, slow.transformer.dropout) == (1e-4, 0.2)
    keys = {each.key for each in (careful, wide, slow, parse_contender("gru", base, VOCAB))}
    assert len(keys) == 4
    assert isinstance(careful, Contender)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt", r"--contender gpt: unknown: expected one of gru, lstm"),
        ("a:train.stpes=1", r"--contender a: train\.stpes: unknown key"),
        ("a:model.hidden=soon", r"--contender a: model\.hidden: "),
        ("a:hidden", r"--contender a: hidden: a contender can override keys of \[model\] and \[train\] only"),
        ("a:model.hidden", r"--contender a: model\.hidden: must be section\.key=value"),
        ("a:corpus.format=text", r"keys of \[model\] and \[train\] only"),
        ("a:train.steps=5", r"train\.steps has no effect"),
        ("transformer:model.hidden=5", r"model\.hidden has no effect"),
    ],
)
def test_a_mistake_is_named_in_the_error(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_contender(spec, config(), VOCAB)
