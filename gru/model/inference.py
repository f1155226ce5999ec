"""The language model for inference on a CPU: inference.c as a function of tokens and states.

Weights of matrix products are rounded to bf16 once, at construction, because the cost of a step is that of reading
them. T time steps, S streams, L layers, E embedding width, H hidden width, V vocabulary.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gru import native
from gru.model.language_model import Block, GRULanguageModel

SOURCE = Path(__file__).with_name("inference.c")

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
        ("embedding", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", ctypes.c_void_p),
        ("output", _Linear),
    ]


class NativeModel:
    """A `GRULanguageModel` computed by inference.c, with the same interface, without gradients.

    The sums of each row are added in one order, so its bits depend neither on other rows nor on how many rows or time
    steps are computed at once. The model's weights must not change: those that are not rounded are shared with it.
    """

    def __init__(self, model: GRULanguageModel, library: ctypes.CDLL) -> None:
        config = model.config
        self.vocab_size = model.vocab_size
        self.initial_state = model.initial_state
        self._library = library
        self._tensors: list[Tensor] = []  # the memory that C reads, kept alive
        layers = (_Layer * config.layers)(*map(self._layer, model.blocks))  # type: ignore[arg-type]
        self._model = _Model(
            config.layers,
            config.embedding,
            config.hidden,
            self._pointer(model.embedding.weight),
            layers,
            self._pointer(model.norm.weight),
            self._linear(model.embedding.weight, model.output_bias),
        )

    def __call__(self, tokens_TS: Tensor, state_LSH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [T, S, V] and the next state."""
        x_TSE, state_LSH = self.features(tokens_TS, state_LSH)
        return self.logits(x_TSE), state_LSH

    def features(self, tokens_TS: Tensor, state_LSH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the output layer [T, S, E], and the next state."""
        (T, S), E, H = tokens_TS.shape, self._model.E, self._model.H
        tokens_TS, state_LSH = tokens_TS.contiguous(), state_LSH.clone(memory_format=torch.contiguous_format)
        x_TSE = torch.empty(T, S, E)
        gates_width = self._model.layers[0].from_x.out
        scratch = torch.empty(T * S * (E + H + gates_width) + S * gates_width)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (tokens_TS, state_LSH, x_TSE, scratch))
        self._library.features(ctypes.byref(self._model), ctypes.c_int64(T), ctypes.c_int64(S), *pointers)
        return x_TSE, state_LSH

    def logits(self, x_TSE: Tensor) -> Tensor:
        """Return the logits of the next token [..., V], from the result of `features`."""
        *shape, E = x_TSE.shape
        x_NE = x_TSE.reshape(-1, E).contiguous()
        y_NV = torch.empty(len(x_NE), self._model.output.out)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x_NE, y_NV))
        self._library.logits(ctypes.byref(self._model), ctypes.c_int64(len(x_NE)), *pointers)
        return y_NV[:, : self.vocab_size].unflatten(0, shape)

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
        units, (out, inputs) = native.constant(self._library, "units"), weight_OI.shape
        padding = -out % units
        padded = F.pad(weight_OI.detach(), (0, 0, 0, padding)).to(torch.bfloat16)
        packed = padded.view(-1, 2, units // 2, inputs).permute(0, 3, 2, 1).contiguous()
        bias = None if bias_O is None else self._pointer(F.pad(bias_O.detach(), (0, padding)))
        return _Linear(inputs, out + padding, self._pointer(packed), bias)

    def _pointer(self, tensor: Tensor) -> int:
        contiguous = tensor.detach().contiguous()
        self._tensors.append(contiguous)
        return contiguous.data_ptr()


def inference_model(model: GRULanguageModel) -> NativeModel | GRULanguageModel:
    """Return the fastest form of the model for inference: itself where inference.c does not suit it or the machine."""
    config = model.config
    library = _library() if config.cell == "gru" and model.output_bias.device.type == "cpu" else None
    if library is None:
        return model
    units = native.constant(library, "units")
    return model if config.embedding % units or config.hidden % units else NativeModel(model, library)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return native.library(SOURCE)
    except OSError as reason:
        log.info("torch computes inference, slower than inference.c, which did not compile: %s", reason)
        return None
