"""C code beside the Python code: compiled by the machine's own compiler at first use, and cached."""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# -fopenmp uses the libgomp that torch has loaded, so that both share one pool of threads.
COMPILE = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-fopenmp"]


def library(source: Path, *flags: str) -> ctypes.CDLL:
    """Load the library compiled from a C file. Raises OSError with the reason if it cannot be built or loaded."""
    return ctypes.CDLL(str(_compiled(source, [*COMPILE, *flags])))


def constant(library: ctypes.CDLL, name: str) -> int:
    """Return a global `int64_t` of a library."""
    return ctypes.c_int64.in_dll(library, name).value


def instructions() -> str:
    """Return the names of this processor's instruction set extensions, separated by spaces."""
    match = re.search(r"^(?:flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else ""


def _compiled(source: Path, command: list[str]) -> Path:
    """Return the path of the compiled library, and compile it first if no cached one fits."""
    # Machines with other processors may share the home directory.
    digest = hashlib.sha256(f"{command} {instructions()}".encode())
    for path in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(path.read_bytes())

    def build(draft: Path) -> None:
        compiler = subprocess.run([*command, str(source), "-o", str(draft), "-lm"], capture_output=True, text=True)
        if compiler.returncode:
            raise OSError(f"{command[0]} ended with status {compiler.returncode}: {compiler.stderr.strip()}")

    return cached(f"{source.stem}-{digest.hexdigest()[:16]}.so", build)


def cache_directory() -> Path:
    """Return the directory of this user's cache, which may not exist."""
    return Path.home() / ".cache" / "gru-pipeline"


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return the path of a file in the user's cache. If it is absent, `build` writes it first.

    Its modification time is that of its last use. Where the home directory is not writable, the file is built for this
    process alone.
    """
    directory = cache_directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        directory = Path(tempfile.mkdtemp(prefix="gru-pipeline-"))
    path = directory / name
    if not path.exists():
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            build(draft)
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)
    with suppress(OSError):
        os.utime(path)
    return path
