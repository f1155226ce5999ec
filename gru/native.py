"""C beside the Python: compiled by the machine's compiler when it is first needed, and kept."""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

# OpenMP's threads are then torch's own: one libgomp is loaded.
COMPILE = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-fopenmp"]


def library(source: Path, *flags: str) -> ctypes.CDLL:
    """What that file has. Raises OSError, which says why, where it cannot be had."""
    return ctypes.CDLL(str(_compiled(source, [*COMPILE, *flags])))


def constant(library: ctypes.CDLL, name: str) -> int:
    return ctypes.c_int64.in_dll(library, name).value


def instructions() -> str:
    """The instruction sets that this processor has."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else ""


def _compiled(source: Path, command: list[str]) -> Path:
    digest = hashlib.sha256(f"{command} {instructions()}".encode())  # other processors may share a home directory
    for path in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(path.read_bytes())
    directory = Path.home() / ".cache" / "gru-pipeline"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to
        directory = Path(tempfile.mkdtemp(prefix="gru-pipeline-"))
    path = directory / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        draft = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, str(source), "-o", str(draft), "-lm"], capture_output=True, text=True)
        if done.returncode:
            draft.unlink(missing_ok=True)
            raise OSError(f"{command[0]} ended with status {done.returncode}: {done.stderr.strip()}")
        draft.rename(path)
    return path
