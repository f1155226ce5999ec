"""The language model for inference on a CPU: inference.c as a function of tokens and states.

Weights of matrix products are rounded to bf16 once, at construction, because the cost of a step with few streams is
that of reading them. On processors with AVX512-BF16 what they are multiplied with is rounded to bf16, too.
T time steps, S streams, L layers, E embedding width, H hidden width, V vocabulary.
"""

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gru import native
from gru.model.language_model import Block, GRULanguageModel

SOURCE = Path(__file__).with_name("inference.c")
FROM_TOKEN_BYTES = 1 << 26  # most memory for what the first layer computes from each token

log = logging.getLogger(__name__)


class _Linear(ctypes.Structure):
    _fields_ = [
        ("inputs", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
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

    def __init__(self, model: GRULanguageModel, library: ctypes.CDLL, threads: int) -> None:
        config = model.config
        self.vocab_size = model.vocab_size
        self.threads = threads
        self.initial_state = model.initial_state
        self._library = library
        self._units, self._depth = (native.constant(library, name) for name in ("units", "depth"))
        self._dtype = torch.bfloat16 if self._depth == 2 else torch.float32
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
        """Return the input of the output layer [T, S, E], and the next state."""
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
        *shape, E = x_TSE.shape
        x_NE = x_TSE.reshape(-1, E).contiguous()
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
        x_TSE = torch.empty(T, S, E, dtype=self._dtype)
        return x_TSE, torch.empty(T * S * (3 * E + gates) + S * gates + (T + 1) * S * H)

    def _from_tokens(self) -> Tensor:
        """Return the products of the first layer's input for each token [V, 3 H], its padding included."""
        inner_VE = torch.empty(self.vocab_size, self._model.E, dtype=self._dtype)
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
        """Return the weights packed as inference.c reads them: [out / UNITS, in, WIDTH] pairs of bf16."""
        (out, inputs), width, padding = weight_OI.shape, self._units // 2, -weight_OI.shape[0] % self._units
        padded = F.pad(weight_OI.detach(), (0, 0, 0, padding)).to(torch.bfloat16)
        if self._depth == 2:
            packed = padded.view(-1, 2, width, inputs // 2, 2).permute(0, 3, 1, 2, 4)
        else:
            packed = padded.view(-1, 2, width, inputs).permute(0, 3, 2, 1)
        bias = None if bias_O is None else self._pointer(F.pad(bias_O.detach(), (0, padding)))
        return _Linear(inputs, out + padding, self._pointer(packed), bias)

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
    model: GRULanguageModel, threads: int = 1, bf16_products: bool = True
) -> NativeModel | GRULanguageModel:
    """Return the fastest form of the model for inference: itself where inference.c does not suit it or the machine.

    threads: number of threads that share the units of each step.
    bf16_products: whether to multiply bf16 by bf16 on processors that can; else weights are widened to fp32.
    """
    config = model.config
    if config.cell != "gru" or model.output_bias.device.type != "cpu":
        return model
    library = _library(bf16_products)
    if library is None:
        return model
    units = native.constant(library, "units")
    return model if config.embedding % units or config.hidden % units else NativeModel(model, library, threads)


@cache
def _library(bf16_products: bool) -> ctypes.CDLL | None:
    try:
        bf16_products = bf16_products and "avx512_bf16" in native.instructions().split()
        return native.library(SOURCE, *["-DBF16"] * bf16_products)
    except OSError as reason:
        if bf16_products:
            log.info("inference.c multiplies in fp32, since it did not compile for AVX512-BF16: %s", reason)
            return _library(False)
        log.info("torch computes inference, slower than inference.c, which did not compile: %s", reason)
        return None
