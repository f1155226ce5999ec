"""Tests of inference.c against the model in float64."""

import numpy as np
import pytest
import torch

from gru.config import ModelConfig
from gru.model import inference
from gru.model.inference import NativeModel, NativeStreams, Products, inference_model
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


def rounded_weight(weight_OI: torch.Tensor, products: Products) -> torch.Tensor:
    """Return the weights of a matrix product, rounded as they are for these products, in float64."""
    if products != "int8":
        return weight_OI.bfloat16().double()
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
    return (weight_OI / scale_O1).round().double() * scale_O1.double()


def rounded(model: GRULanguageModel, products: Products) -> tuple[GRULanguageModel, torch.Tensor]:
    """Return the model in float64 with the weights of its matrix products rounded, and its output weights."""
    reference = GRULanguageModel(model.config, VOCAB, torch.float64).double().eval()
    weights = model.state_dict()
    for name, weight in weights.items():
        if weight.dim() == 2 and name != "embedding.weight":
            weights[name] = rounded_weight(weight, products)
    reference.load_state_dict(weights)
    return reference, rounded_weight(model.embedding.weight, products)


def native_model(model: GRULanguageModel, threads: int = 1, products: Products | None = None) -> NativeModel:
    """Return the model with these products, or with what this machine has instead."""
    native = inference_model(model, threads, products)
    assert isinstance(native, NativeModel), "this machine has no compiler"
    return native


def random_inputs(shape: tuple[int, int, int], steps: int, streams: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    _, hidden, layers = shape
    return torch.randint(VOCAB, (steps, streams)), torch.rand(layers, streams, hidden) * 2 - 1


@pytest.mark.parametrize("products", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_the_model_with_rounded_weights(shape: tuple[int, int, int], products: Products) -> None:
    model = make(*shape)
    run = native_model(model, products=products)
    reference, output_VE = rounded(model, run.products)
    tokens_TS, state_LSH = random_inputs(shape, 20, 7)
    before = state_LSH.clone()
    logits_TSV, after_LSH = run(tokens_TS, state_LSH)
    with torch.inference_mode():
        x_TSE, expected_LSH = reference.features(tokens_TS, state_LSH.double())
        expected_TSV = x_TSE @ output_VE.t() + reference.output_bias
    assert logits_TSV.shape == (20, 7, VOCAB)
    # A factor is off by up to 2^-9 of itself (bf16) or 2^-8 of the row's largest (int8); most of the errors cancel.
    error = {"int8": 2.0**-3, "bf16": 2.0**-6, "fp32": 2e-5}[run.products]
    torch.testing.assert_close(after_LSH.double(), expected_LSH, rtol=0, atol=error)
    torch.testing.assert_close(logits_TSV.double(), expected_TSV, rtol=0, atol=error * expected_TSV.std().item())
    assert torch.equal(state_LSH, before)


@pytest.mark.parametrize("products", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_sums_of_products_are_exact_to_fp32_for_any_number_of_rows(
    shape: tuple[int, int, int], products: Products
) -> None:
    model = make(*shape)
    run = native_model(model, products=products)
    torch.manual_seed(1)
    if run.products == "int8":
        whole_NE, scale_N1 = torch.randint(-127, 128, (70, shape[0])), torch.rand(70, 1) / 50
        values_NE = whole_NE * scale_N1.double()
        x_NE = torch.cat([(whole_NE + 128).byte(), scale_N1.view(torch.uint8)], 1)
    else:
        x_NE = torch.randn(70, shape[0]).to(torch.bfloat16 if run.products == "bf16" else torch.float32)
        values_NE = x_NE.double()
    expected_NV = values_NE @ rounded(model, run.products)[1].t() + model.output_bias
    logits_NV = run.logits(x_NE)
    torch.testing.assert_close(logits_NV.double(), expected_NV, rtol=0, atol=1e-6 * shape[0])
    for rows in range(1, 70):
        assert torch.equal(run.logits(x_NE[70 - rows :]), logits_NV[70 - rows :])


@pytest.mark.parametrize("products", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_bits_depend_neither_on_other_rows_nor_on_how_a_sequence_is_cut(
    shape: tuple[int, int, int], products: Products
) -> None:
    run = native_model(make(*shape), products=products)
    tokens_TS, state_LSH = random_inputs(shape, 6, 70)
    expected_TSV, expected_LSH = run(tokens_TS, state_LSH)
    for rows in (*map(range, range(1, 70)), range(5, 7), range(20, 33), [30, 2, 8], range(4, 18), range(69, 70)):
        chosen = torch.tensor(list(rows))
        logits, after = run(tokens_TS[:, chosen], state_LSH[:, chosen])
        assert torch.equal(logits, expected_TSV[:, chosen]) and torch.equal(after, expected_LSH[:, chosen])
    first, middle = run(tokens_TS[:2], state_LSH)
    second, end = run(tokens_TS[2:], middle)
    assert torch.equal(torch.cat([first, second]), expected_TSV) and torch.equal(end, expected_LSH)


@pytest.mark.parametrize("products", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_bits_do_not_depend_on_the_number_of_threads(shape: tuple[int, int, int], products: Products) -> None:
    model = make(*shape)
    for steps, streams in [(5, 1), (1, 37)]:
        tokens_TS, state_LSH = random_inputs(shape, steps, streams)
        expected_TSV, expected_LSH = native_model(model, 1, products)(tokens_TS, state_LSH)
        logits_TSV, after_LSH = native_model(model, 3, products)(tokens_TS, state_LSH)
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


def test_int8_is_used_only_where_the_model_predicts_the_same() -> None:
    model = make(64, 96, 2)
    model.embedding.weight /= 50
    expected = native_model(model, products="int8").products  # on a machine without, the next
    assert native_model(model).products == expected
    gru = model.blocks[0].cell.gru
    gru.weight_hh_l0 *= 4
    gru.weight_ih_l0[:, 0] = gru.weight_hh_l0[:, 0] = 1000.0  # beside it, other weights are rounded to zero
    model.blocks[0].norm.weight[0] = 0.0
    gru.bias_ih_l0[96] = 100.0  # an update gate that stays open keeps this unit's state at zero
    assert native_model(model).products == native_model(model, products="bf16").products


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
        assert inference._library.__wrapped__("fp32") is None
    assert "torch computes inference" in caplog.text and "no-such-compiler" in caplog.text
