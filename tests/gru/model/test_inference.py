import pytest
import torch

from gru.config import ModelConfig
from gru.model import inference
from gru.model.inference import NativeModel, inference_model
from gru.model.language_model import GRULanguageModel

VOCAB = 301  # no multiple of anything
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
    """The model in float64 with the weights of its products rounded to bf16, and those of the output."""
    reference = GRULanguageModel(model.config, VOCAB, torch.float64).eval()
    weights = model.state_dict()
    for name, weight in weights.items():
        if weight.dim() == 2 and name != "embedding.weight":
            weights[name] = weight.bfloat16().float()
    reference.load_state_dict(weights)
    return reference.double(), model.embedding.weight.bfloat16().double()


def made(model: GRULanguageModel) -> NativeModel:
    native = inference_model(model)
    assert isinstance(native, NativeModel), "this machine has a compiler"
    return native


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_model_with_weights_rounded_to_bf16(shape: tuple[int, int, int]) -> None:
    model = make(*shape)
    reference, output_VE = rounded(model)
    tokens_TS, state_LSH = torch.randint(VOCAB, (20, 7)), torch.rand(shape[2], 7, shape[1]) * 2 - 1
    before = state_LSH.clone()
    logits_TSV, after_LSH = made(model)(tokens_TS, state_LSH)
    with torch.inference_mode():
        x_TSE, wanted_LSH = reference.features(tokens_TS, state_LSH.double())
        wanted_TSV = x_TSE @ output_VE.t() + reference.output_bias
    assert logits_TSV.shape == (20, 7, VOCAB)
    torch.testing.assert_close(after_LSH.double(), wanted_LSH, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits_TSV.double(), wanted_TSV, rtol=2e-5, atol=2e-4)
    assert torch.equal(state_LSH, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_depend_neither_on_other_rows_nor_on_how_a_sequence_is_cut(shape: tuple[int, int, int]) -> None:
    decode = made(make(*shape))
    tokens_TS, state_LSH = torch.randint(VOCAB, (6, 33)), torch.rand(shape[2], 33, shape[1]) * 2 - 1
    wanted_TSV, wanted_LSH = decode(tokens_TS, state_LSH)
    for rows in (range(1), range(5, 7), range(20, 33), [30, 2, 8], range(4, 18)):
        chosen = torch.tensor(list(rows))
        logits, after = decode(tokens_TS[:, chosen], state_LSH[:, chosen])
        assert torch.equal(logits, wanted_TSV[:, chosen]) and torch.equal(after, wanted_LSH[:, chosen])
    first, middle = decode(tokens_TS[:2], state_LSH)
    second, end = decode(tokens_TS[2:], middle)
    assert torch.equal(torch.cat([first, second]), wanted_TSV) and torch.equal(end, wanted_LSH)


def test_what_is_no_number_stays_so() -> None:
    model = make(32, 32, 1)
    model.embedding.weight[5, 0] = torch.nan
    decode = made(model)
    logits, _ = decode(torch.tensor([[5, 6]]), model.initial_state(2))
    assert logits[0, 0].isnan().all() and logits[0, 1].isfinite().sum() == VOCAB - 1  # that of token 5


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(embedding=37, hidden=64, layers=1),
        ModelConfig(embedding=64, hidden=37, layers=1),
        ModelConfig(embedding=64, hidden=64, layers=1, cell="lstm"),
    ],
)
def test_what_does_not_suit_it_is_left_to_the_model(config: ModelConfig) -> None:
    model = GRULanguageModel(config, VOCAB)
    assert inference_model(model) is model


def test_without_a_compiler_the_model_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(inference.native, "COMPILE", ["no-such-compiler"])
    with caplog.at_level("INFO"):
        assert inference._library.__wrapped__() is None
    assert "torch serves" in caplog.text and "no-such-compiler" in caplog.text
