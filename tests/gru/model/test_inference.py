"""Tests of inference.c against the model in float64."""

import pytest
import torch

from gru.config import ModelConfig
from gru.model import inference
from gru.model.inference import NativeModel, inference_model
from gru.model.language_model import GRULanguageModel

VOCAB = 301  # a multiple of no vector width
SHAPES = [(32, 32, 1), (64, 96, 2), (96, 32, 3), (512, 512, 2)]


def make(embedding: int, hidden: int, layers: int, seed: int = 0) -> GRULanguageModel:
    torch.manual_seed(seed)
    model = GRULanguageModel(ModelConfig(embedding=embedding, hidden=hidden, layers=layers), VOCAB).eval()
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        if "bias" in name or "norm" in name:
            weight += torch.randn_like(weight) / 2
    model.embedding.weight *= 50
    return model


def rounded(model: GRULanguageModel) -> tuple[GRULanguageModel, torch.Tensor]:
    """Return the model in float64 with the weights of its matrix products rounded to bf16, and its output weights."""
    reference = GRULanguageModel(model.config, VOCAB, torch.float64).eval()
    weights = model.state_dict()
    for name, weight in weights.items():
        if weight.dim() == 2 and name != "embedding.weight":
            weights[name] = weight.bfloat16().float()
    reference.load_state_dict(weights)
    return reference.double(), model.embedding.weight.bfloat16().double()


def native_model(model: GRULanguageModel) -> NativeModel:
    native = inference_model(model)
    assert isinstance(native, NativeModel), "this machine has no compiler"
    return native


@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_the_model_with_weights_rounded_to_bf16(shape: tuple[int, int, int]) -> None:
    model = make(*shape)
    reference, output_VE = rounded(model)
    tokens_TS, state_LSH = torch.randint(VOCAB, (20, 7)), torch.rand(shape[2], 7, shape[1]) * 2 - 1
    before = state_LSH.clone()
    logits_TSV, after_LSH = native_model(model)(tokens_TS, state_LSH)
    with torch.inference_mode():
        x_TSE, expected_LSH = reference.features(tokens_TS, state_LSH.double())
        expected_TSV = x_TSE @ output_VE.t() + reference.output_bias
    assert logits_TSV.shape == (20, 7, VOCAB)
    torch.testing.assert_close(after_LSH.double(), expected_LSH, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits_TSV.double(), expected_TSV, rtol=2e-5, atol=2e-4)
    assert torch.equal(state_LSH, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_depend_neither_on_other_rows_nor_on_how_a_sequence_is_cut(shape: tuple[int, int, int]) -> None:
    run = native_model(make(*shape))
    tokens_TS, state_LSH = torch.randint(VOCAB, (6, 33)), torch.rand(shape[2], 33, shape[1]) * 2 - 1
    expected_TSV, expected_LSH = run(tokens_TS, state_LSH)
    for rows in (range(1), range(5, 7), range(20, 33), [30, 2, 8], range(4, 18)):
        chosen = torch.tensor(list(rows))
        logits, after = run(tokens_TS[:, chosen], state_LSH[:, chosen])
        assert torch.equal(logits, expected_TSV[:, chosen]) and torch.equal(after, expected_LSH[:, chosen])
    first, middle = run(tokens_TS[:2], state_LSH)
    second, end = run(tokens_TS[2:], middle)
    assert torch.equal(torch.cat([first, second]), expected_TSV) and torch.equal(end, expected_LSH)


def test_nan_in_a_weight_stays_nan_in_the_logits() -> None:
    model = make(32, 32, 1)
    model.embedding.weight[5, 0] = torch.nan
    run = native_model(model)
    logits, _ = run(torch.tensor([[5, 6]]), model.initial_state(2))
    assert logits[0, 0].isnan().all() and logits[0, 1].isfinite().sum() == VOCAB - 1  # the logit of token 5 is NaN


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(embedding=37, hidden=64, layers=1),
        ModelConfig(embedding=64, hidden=37, layers=1),
        ModelConfig(embedding=64, hidden=64, layers=1, cell="lstm"),
    ],
)
def test_an_unsuitable_model_is_returned_unchanged(config: ModelConfig) -> None:
    model = GRULanguageModel(config, VOCAB)
    assert inference_model(model) is model


def test_without_a_compiler_torch_computes_inference_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inference.native, "COMPILE", ["no-such-compiler"])
    with caplog.at_level("INFO"):
        assert inference._library.__wrapped__() is None
    assert "torch computes inference" in caplog.text and "no-such-compiler" in caplog.text
