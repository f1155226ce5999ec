"""The rules of the house, as tests: imports go downwards, the core is plain, importing does nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["gru", "jobs", "pipelines"]  # lower layers first
PLAIN = [
    "gru/copies.py",
    "gru/model",
    "gru/corpus/dataset.py",
    "gru/corpus/documents.py",
    "gru/corpus/duplicates.py",
    "gru/corpus/lanes.py",
    "gru/corpus/shards.py",
    "gru/corpus/sources.py",
    "gru/corpus/tokenizer.py",
    "gru/ngram.py",
    "gru/serving/engine.py",
    "gru/serving/sampling.py",
    "gru/serving/states.py",
    "gru/serving/text.py",
    "gru/training/learner.py",
    "gru/training/checkpoint.py",
]


def imports(file: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_downwards_only(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | {"tests"}
    for file in (ROOT / layer).rglob("*.py"):
        assert not imports(file) & above, f"{file} imports from a layer above"


@pytest.mark.parametrize("part", PLAIN)
def test_the_core_knows_neither_ray_nor_mlflow_nor_http(part: str) -> None:
    path = ROOT / part
    assert path.exists()
    for file in [path] if path.suffix else path.rglob("*.py"):
        assert not imports(file) & {"ray", "mlflow", "fastapi", "starlette", "dbos"}, file


def test_help_needs_no_heavy_module() -> None:
    script = "import pipelines.cli, sys; print([m for m in ('torch', 'ray', 'mlflow', 'dbos') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_top_level_holds_only_what_belongs_there() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    customary = {
        ".ci", ".gitignore", ".rayignore", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml",
    }  # fmt: skip
    assert top <= customary | {"gru", "jobs", "pipelines", "tests", "infra"}
