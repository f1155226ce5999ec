"""Tests of inference.c against the model in float64."""

import numpy as np
import pytest
import torch

from gru.config import ModelConfig
from gru.model import inference
from gru.model.inference import NativeModel, NativeStreams, inference_model
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


def native_model(model: GRULanguageModel, threads: int = 1, bf16_products: bool = True) -> NativeModel:
    native = inference_model(model, threads, bf16_products)
    assert isinstance(native, NativeModel), "this machine has no compiler"
    return native


def random_inputs(shape: tuple[int, int, int], steps: int, streams: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    _, hidden, layers = shape
    return torch.randint(VOCAB, (steps, streams)), torch.rand(layers, streams, hidden) * 2 - 1


def in_bf16(run: NativeModel) -> bool:
    """Return whether it rounds what it multiplies the weights with: only some processors can multiply bf16 by bf16."""
    x_TSE, _ = run.features(torch.zeros(1, 1, dtype=torch.int64), run.initial_state(1))
    return x_TSE.dtype == torch.bfloat16


@pytest.mark.parametrize("bf16_products", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_the_model_with_weights_rounded_to_bf16(shape: tuple[int, int, int], bf16_products: bool) -> None:
    model = make(*shape)
    reference, output_VE = rounded(model)
    tokens_TS, state_LSH = random_inputs(shape, 20, 7)
    before = state_LSH.clone()
    run = native_model(model, bf16_products=bf16_products)
    logits_TSV, after_LSH = run(tokens_TS, state_LSH)
    with torch.inference_mode():
        x_TSE, expected_LSH = reference.features(tokens_TS, state_LSH.double())
        expected_TSV = x_TSE @ output_VE.t() + reference.output_bias
    assert logits_TSV.shape == (20, 7, VOCAB)
    # bf16 has 8 bits: each factor is off by up to 2^-9 of itself, and their errors cancel for the most part.
    error = 2.0**-6 if in_bf16(run) else 2e-5
    assert not (in_bf16(run) and not bf16_products)
    torch.testing.assert_close(after_LSH.double(), expected_LSH, rtol=0, atol=error)
    torch.testing.assert_close(logits_TSV.double(), expected_TSV, rtol=0, atol=error * expected_TSV.std().item())
    assert torch.equal(state_LSH, before)


@pytest.mark.parametrize("bf16_products", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_sums_of_products_are_exact_to_fp32_for_any_number_of_rows(
    shape: tuple[int, int, int], bf16_products: bool
) -> None:
    model = make(*shape)
    run = native_model(model, bf16_products=bf16_products)
    torch.manual_seed(1)
    x_NE = torch.randn(70, shape[0]).to(torch.bfloat16 if in_bf16(run) else torch.float32)
    expected_NV = x_NE.double() @ rounded(model)[1].t() + model.output_bias
    logits_NV = run.logits(x_NE)
    torch.testing.assert_close(logits_NV.double(), expected_NV, rtol=0, atol=1e-6 * shape[0])
    for rows in range(1, 70):
        assert torch.equal(run.logits(x_NE[70 - rows :]), logits_NV[70 - rows :])


@pytest.mark.parametrize("bf16_products", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_bits_depend_neither_on_other_rows_nor_on_how_a_sequence_is_cut(
    shape: tuple[int, int, int], bf16_products: bool
) -> None:
    run = native_model(make(*shape), bf16_products=bf16_products)
    tokens_TS, state_LSH = random_inputs(shape, 6, 70)
    expected_TSV, expected_LSH = run(tokens_TS, state_LSH)
    for rows in (*map(range, range(1, 70)), range(5, 7), range(20, 33), [30, 2, 8], range(4, 18), range(69, 70)):
        chosen = torch.tensor(list(rows))
        logits, after = run(tokens_TS[:, chosen], state_LSH[:, chosen])
        assert torch.equal(logits, expected_TSV[:, chosen]) and torch.equal(after, expected_LSH[:, chosen])
    first, middle = run(tokens_TS[:2], state_LSH)
    second, end = run(tokens_TS[2:], middle)
    assert torch.equal(torch.cat([first, second]), expected_TSV) and torch.equal(end, expected_LSH)


@pytest.mark.parametrize("bf16_products", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_bits_do_not_depend_on_the_number_of_threads(shape: tuple[int, int, int], bf16_products: bool) -> None:
    model = make(*shape)
    for steps, streams in [(5, 1), (1, 37)]:
        tokens_TS, state_LSH = random_inputs(shape, steps, streams)
        expected_TSV, expected_LSH = native_model(model, 1, bf16_products)(tokens_TS, state_LSH)
        logits_TSV, after_LSH = native_model(model, 3, bf16_products)(tokens_TS, state_LSH)
        assert torch.equal(logits_TSV, expected_TSV) and torch.equal(after_LSH, expected_LSH)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_bits_are_the_same_where_the_vocabulary_is_too_large_to_keep_products_of_tokens(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(*shape)
    tokens_TS, state_LSH = random_inputs(shape, 4, 5)
    expected_TSV, expected_LSH = native_model(model)(tokens_TS, state_LSH)
    monkeypatch.setattr(inference, "FROM_TOKEN_BYTES", 0)
    logits_TSV, after_LSH = native_model(model)(tokens_TS, state_LSH)
    assert torch.equal(logits_TSV, expected_TSV) and torch.equal(after_LSH, expected_LSH)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_streams_read_tokens_in_place_with_the_same_bits(shape: tuple[int, int, int]) -> None:
    run = native_model(make(*shape))
    tokens_TS, state_LSH = random_inputs(shape, 1, 9)
    streams = NativeStreams(run, state_LSH, 5)
    for first, count in [(3, 4), (0, 5), (4, 5), (8, 1)]:
        before, some = state_LSH.clone(), slice(first, first + count)
        expected_TSV, expected_LSH = run(tokens_TS[:, some], state_LSH[:, some])
        logits_SV = streams.read(first, tokens_TS[0, some].tolist())
        assert np.array_equal(logits_SV, expected_TSV[0]) and torch.equal(state_LSH[:, some], expected_LSH)
        others = [row for row in range(9) if not first <= row < first + count]
        assert torch.equal(state_LSH[:, others], before[:, others])


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
        assert inference._library.__wrapped__(False) is None
    assert "torch computes inference" in caplog.text and "no-such-compiler" in caplog.text
