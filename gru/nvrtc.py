"""CUDA C++ beside the Python code: compiled by NVRTC at first use, cached, and launched through the CUDA driver.

torch's CUDA build brings both libraries, and the Python package `cuda-bindings`. It knows no tensors.
"""

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gru import native

Argument = tuple[Any, Any]
"""A kernel's argument: its value and its type of ctypes."""


class Kernel:
    """A compiled kernel on the current device.

    shared_bytes: dynamic shared memory of a block, which may exceed the 48 KiB that CUDA grants by default.
    """

    def __init__(self, cubin: bytes, name: str, shared_bytes: int = 0) -> None:
        from cuda.bindings import driver

        self._module = _checked(driver.cuModuleLoadData(cubin))
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
        self._shared_bytes = shared_bytes
        if shared_bytes:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))

    def launch(
        self, grid: tuple[int, int], threads: int, stream: int, arguments: Sequence[Argument], cooperative: bool = False
    ) -> None:
        """Launch on a stream. cooperative: all blocks run at the same time, or the launch fails."""
        from cuda.bindings import driver

        launch = driver.cuLaunchCooperativeKernel if cooperative else driver.cuLaunchKernel
        values, types = zip(*arguments, strict=True)
        extra = () if cooperative else (0,)
        _checked(launch(self._function, *grid, 1, threads, 1, 1, self._shared_bytes, stream, (values, types), *extra))


def pointer(address: int | None) -> Argument:
    """Return an address on the device as an argument; None is a null pointer."""
    return address or 0, ctypes.c_void_p


def integer(value: int) -> Argument:
    """Return an `int` as an argument."""
    return value, ctypes.c_int


@cache
def compiled(source: Path, architecture: str, *options: str) -> bytes:
    """Return the machine code of a source for an architecture such as `sm_90a`. Needs no GPU.

    Raises OSError with the compiler's messages if it does not compile, or if there is no compiler.
    """
    try:
        from cuda.bindings import nvrtc

        version = _checked(nvrtc.nvrtcVersion())
    except (ImportError, RuntimeError) as error:
        raise OSError(f"no CUDA compiler: {error}") from None
    text = source.read_bytes()
    flags = [f"--gpu-architecture={architecture}", "-std=c++17", *options]
    digest = hashlib.sha256(f"{flags} {version} ".encode() + text).hexdigest()

    def build(path: Path) -> None:
        path.write_bytes(_compile(text, source.name, flags))

    return native.cached(f"{source.stem}-{digest[:16]}.cubin", build).read_bytes()


def _compile(text: bytes, name: str, flags: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(text, name.encode(), 0, [], []))
    [status] = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise OSError(f"{name} does not compile: {log.decode(errors='replace').strip(chr(0)).strip()}")
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return the value or values of an answer of `cuda.bindings`. Raises RuntimeError if its status is not success."""
    status, *values = answer
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else values
