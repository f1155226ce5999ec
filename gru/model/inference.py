"""The language model for inference on a CPU: inference.c as a function of tokens and states.

Weights of matrix products are rounded once, at construction, because the cost of a step with few streams is that of
reading them. What they are multiplied with is rounded, too, on processors that multiply such numbers at once: to int8
with AVX512-VNNI, as long as the model predicts the same, or to bf16 with AVX512-BF16.
T time steps, S streams, L layers, E embedding width, H hidden width, V vocabulary.
"""

import ctypes
import logging
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gru import native
from gru.model.language_model import Block, GRULanguageModel

SOURCE = Path(__file__).with_name("inference.c")
FROM_TOKEN_BYTES = 1 << 26  # most memory for what the first layer computes from each token

Products = Literal["int8", "bf16", "fp32"]
"""The number type that is multiplied, the fastest first; with fp32, weights are bf16 and widened."""
INSTRUCTIONS: dict[Products, str] = {"int8": "avx512_vnni", "bf16": "avx512_bf16"}
"""The instructions that a processor needs for products, by their name in /proc/cpuinfo."""
INT8_DIVERGENCE = 1e-3  # nats per token from predictions with other products, from which on int8 is not used

log = logging.getLogger(__name__)


class _Linear(ctypes.Structure):
    _fields_ = [
        ("inputs", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [("norm", ctypes.c_void_p), ("from_x", _Linear), ("from_h", _Linear), ("project", _Linear)]


class _Model(ctypes.Structure):
    _fields_ = [
        ("L", ctypes.c_int64),
        ("E", ctypes.c_int64),
        ("H", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("embedding", ctypes.c_void_p),
        ("from_token", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", ctypes.c_void_p),
        ("output", _Linear),
    ]


class NativeModel:
    """A `GRULanguageModel` computed by inference.c, with the same interface, without gradients.

    The sums of each row are added in one order and by one thread, so its bits depend neither on other rows nor on how
    many rows or time steps are computed at once, nor on the number of threads. The model's weights must not change:
    those that are not rounded are shared with it.
    """

    def __init__(self, model: GRULanguageModel, products: Products, library: ctypes.CDLL, threads: int) -> None:
        """`library`: inference.c, compiled for these products."""
        config = model.config
        self.vocab_size = model.vocab_size
        self.products = products
        self.threads = threads
        self.initial_state = model.initial_state
        self._library = library
        self._units, self._depth = (native.constant(library, name) for name in ("units", "depth"))
        self._row_size = config.embedding + native.constant(library, "scale")
        """Factors in a row of E of them, its scale included."""
        self._dtype = {"int8": torch.uint8, "bf16": torch.bfloat16, "fp32": torch.float32}[products]
        """Type of what the weights are multiplied with."""
        self._tensors: list[Tensor] = []  # the memory that C reads, kept alive
        layers = (_Layer * config.layers)(*map(self._layer, model.blocks))  # type: ignore[arg-type]
        self._model = _Model(
            config.layers,
            config.embedding,
            config.hidden,
            threads,
            self._pointer(model.embedding.weight),
            None,
            layers,
            self._pointer(model.norm.weight),
            self._linear(model.embedding.weight, model.output_bias),
        )
        self._reference = ctypes.byref(self._model)
        self.padded_vocab_size = self._model.output.out
        if 4 * model.vocab_size * layers[0].from_x.out <= FROM_TOKEN_BYTES:
            self._model.from_token = self._pointer(self._from_tokens())

    def __call__(self, tokens_TS: Tensor, state_LSH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [T, S, V] and the next state."""
        x_TSE, state_LSH = self.features(tokens_TS, state_LSH)
        return self.logits(x_TSE), state_LSH

    def features(self, tokens_TS: Tensor, state_LSH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the output layer [T, S, E], for int8 with its scales, and the next state."""
        T, S = tokens_TS.shape
        tokens_TS, state_LSH = tokens_TS.contiguous(), state_LSH.clone(memory_format=torch.contiguous_format)
        x_TSE, scratch = self.buffers(T, S)
        self._library.features(
            self._reference,
            ctypes.c_int64(T),
            ctypes.c_int64(S),
            ctypes.c_void_p(tokens_TS.data_ptr()),
            ctypes.c_void_p(state_LSH.data_ptr()),
            ctypes.c_int64(S * self._model.H),
            ctypes.c_void_p(x_TSE.data_ptr()),
            ctypes.c_void_p(scratch.data_ptr()),
        )
        return x_TSE, state_LSH

    def logits(self, x_TSE: Tensor) -> Tensor:
        """Return the logits of the next token [..., V], from the result of `features`."""
        *shape, size = x_TSE.shape
        x_NE = x_TSE.reshape(-1, size).contiguous()
        y_NV = torch.empty(len(x_NE), self.padded_vocab_size)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x_NE, y_NV))
        self._library.logits(self._reference, ctypes.c_int64(len(x_NE)), *pointers)
        return y_NV[:, : self.vocab_size].unflatten(0, shape)

    def read_tokens(self, S: int, *pointers: ctypes.c_void_p | ctypes.c_int64) -> None:
        """Call read_tokens of inference.c."""
        self._library.read_tokens(self._reference, ctypes.c_int64(S), *pointers)

    def buffers(self, T: int, S: int) -> tuple[Tensor, Tensor]:
        """Return memory for the input of the output layer [T, S, E] and for what is computed before it."""
        E, H, gates = self._model.E, self._model.H, self._model.layers[0].from_x.out
        x_TSE = torch.empty(T, S, self._row_size, dtype=self._dtype)
        return x_TSE, torch.empty(T * S * (3 * E + gates) + S * gates + (T + 1) * S * H)

    def _from_tokens(self) -> Tensor:
        """Return the products of the first layer's input for each token [V, 3 H], its padding included."""
        inner_VE = torch.empty(self.vocab_size, self._row_size, dtype=self._dtype)
        y = torch.empty(self.vocab_size, self._model.layers[0].from_x.out)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (inner_VE, y))
        self._library.from_tokens(self._reference, ctypes.c_int64(self.vocab_size), *pointers)
        return y

    def _layer(self, block: Block) -> _Layer:
        gru = block.cell.gru
        project = block.project
        return _Layer(
            self._pointer(block.norm.weight),
            self._linear(gru.weight_ih_l0, gru.bias_ih_l0),
            self._linear(gru.weight_hh_l0, gru.bias_hh_l0),
            self._linear(project.weight) if isinstance(project, torch.nn.Linear) else _Linear(),
        )

    def _linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> _Linear:
        """Return the weights packed as inference.c reads them: [out / UNITS, in, UNITS / PACKED]."""
        (out, inputs), width, padding = weight_OI.shape, self._units // 2, -weight_OI.shape[0] % self._units
        padded = F.pad(weight_OI.detach(), (0, 0, 0, padding))
        bias = None if bias_O is None else self._pointer(F.pad(bias_O.detach(), (0, padding)))
        scale = offset = None
        if self.products == "int8":
            scale_O1 = padded.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
            padded = (padded / scale_O1).round().to(torch.int8)
            scale, offset = self._pointer(scale_O1), self._pointer(-128 * padded.sum(1, dtype=torch.int32))
        else:
            padded = padded.to(torch.bfloat16)
        if self.products == "fp32":
            packed = padded.view(-1, 2, width, inputs).permute(0, 3, 2, 1)
        else:
            packed = padded.view(-1, 2, width, inputs // self._depth, self._depth).permute(0, 3, 1, 2, 4)
        return _Linear(inputs, out + padding, self._pointer(packed), bias, scale, offset)

    def _pointer(self, tensor: Tensor) -> int:
        contiguous = tensor.detach().contiguous()
        self._tensors.append(contiguous)
        return contiguous.data_ptr()


class NativeStreams:
    """Streams whose states stay where they are while a `NativeModel` reads tokens, one in each stream at a time.

    For use by one thread, since all calls share the buffers: with few streams, to allocate them would take as long as
    much of the work.
    """

    def __init__(self, model: NativeModel, state_LSH: Tensor, most: int) -> None:
        """`most`: the largest number of streams that `read` is called with."""
        assert state_LSH.is_contiguous() and state_LSH.dtype == torch.float32
        self._model, self._state_LSH = model, state_LSH
        self._row_bytes = state_LSH.stride(1) * state_LSH.itemsize
        self._tokens = np.zeros(most, np.int64)
        x_TSE, scratch = model.buffers(1, most)
        padded = torch.empty(most, model.padded_vocab_size)
        self._logits_SV = padded[:, : model.vocab_size].numpy()
        self._kept = x_TSE, scratch, padded
        self._stride = ctypes.c_int64(state_LSH.stride(0))
        self._pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x_TSE, scratch, padded)]
        self._tokens_pointer = ctypes.c_void_p(self._tokens.ctypes.data)

    def read(self, first: int, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read a token in each stream from the row `first` on. Return their logits [S, V], valid until the next call.

        The states are replaced by the next ones.
        """
        count = len(tokens)
        self._tokens[:count] = tokens
        states = self._state_LSH.data_ptr() + first * self._row_bytes
        self._model.read_tokens(count, self._tokens_pointer, ctypes.c_void_p(states), self._stride, *self._pointers)
        return self._logits_SV[:count]


def inference_model(
    model: GRULanguageModel, threads: int = 1, products: Products | None = None
) -> NativeModel | GRULanguageModel:
    """Return the fastest form of the model for inference: itself where inference.c does not suit it or the machine.

    threads: number of threads that share the units of each step.
    products: None: int8, unless it changes what the model predicts, and then bf16. Instead of what the processor does
    not have, the next is used.
    """
    config = model.config
    if config.cell != "gru" or model.output_bias.device.type != "cpu":
        return model
    native_model = _native_model(model, products or "int8", threads)
    if native_model is None or products or native_model.products != "int8":
        return native_model or model
    exact = _native_model(model, "bf16", threads) or model
    divergence = _divergence(exact, native_model)
    if divergence < INT8_DIVERGENCE:
        return native_model
    log.info("int8 is not used: it changes the model's predictions by %.4f nats per token", divergence)
    return exact


def _native_model(model: GRULanguageModel, products: Products, threads: int) -> NativeModel | None:
    """Return the model with these products, or else the next; None if inference.c does not suit it or the machine."""
    types: tuple[Products, ...] = get_args(Products)
    for each in types[types.index(products) :]:
        library = _library(each)
        if library is not None:
            units = native.constant(library, "units")
            suits = not (model.config.embedding % units or model.config.hidden % units)
            return NativeModel(model, each, library, threads) if suits else None
    return None


@torch.inference_mode()
def _divergence(one: NativeModel | GRULanguageModel, other: NativeModel, streams: int = 32, steps: int = 32) -> float:
    """Return the mean Kullback-Leibler divergence of predictions, in nats per token, on text that `one` generates.

    It is what the loss on such text grows by. NaN if a prediction is.
    """
    chance = torch.Generator().manual_seed(0)
    tokens_TS = torch.randint(one.vocab_size, (1, streams), generator=chance)
    states = [one.initial_state(streams), other.initial_state(streams)]
    total = 0.0
    for _ in range(steps):
        logits_TSV, states[0] = one(tokens_TS, states[0])
        others_TSV, states[1] = other(tokens_TS, states[1])
        p_SV, q_SV = logits_TSV[0].log_softmax(-1), others_TSV[0].log_softmax(-1)
        total += F.kl_div(q_SV, p_SV, reduction="batchmean", log_target=True).item()
        if math.isnan(total):
            break
        tokens_TS = torch.multinomial(p_SV.exp(), 1, generator=chance).t()
    return total / steps


@cache
def _library(products: Products) -> ctypes.CDLL | None:
    """Return inference.c with these products; None, with the reason in the log, if this machine does not have them."""
    if products != "fp32" and INSTRUCTIONS[products] not in native.instructions().split():
        return None
    try:
        return native.library(SOURCE, *[f"-D{products.upper()}"] * (products != "fp32"))
    except OSError as reason:
        if products == "fp32":
            log.info("torch computes inference, slower than inference.c, which did not compile: %s", reason)
        else:
            log.info("inference.c does not multiply in %s, since it did not compile: %s", products, reason)
        return None
