"""The architecture, as tests: imports go downwards, the core is plain, importing is light, files are short."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.import_graph import ImportGraph, attribute_paths, imported_names

ROOT = Path(__file__).parent.parent
GROUND = [
    "config",
    "config_corpus",
    "config_fields",
    "config_stages",
    "errors",
    "chat",
    "storage",
    "digests",
    "cluster",
    "network",
    "machine",
    "native",
    "preflight",
    "terminal",
    "nvrtc",
    "ray_internals",
]
PACKAGES = ["model", "corpus", "generation", "registry", "training", "proposal", "evaluation", "serving", "comparison"]
LAYERS = [
    [f"gru.{module}" for module in GROUND],
    *([f"gru.{package}"] for package in PACKAGES),
    ["gru"],
    ["jobs"],
    ["pipelines"],
    ["tests"],
]
"""Modules and packages by layer, lower layers first. `gru` itself is the front of the library: its names, imported when
they are used."""
HEAVY = {"ray", "mlflow", "fastapi", "starlette", "dbos"}
PLAIN = [
    "gru.model",
    "gru.generation",
    "gru.corpus.batches",
    "gru.corpus.dataset",
    "gru.corpus.documents",
    "gru.corpus.dropped",
    "gru.corpus.duplicates",
    "gru.corpus.leftovers",
    "gru.corpus.rewrite",
    "gru.corpus.selection",
    "gru.corpus.shards",
    "gru.corpus.listing",
    "gru.corpus.partitions",
    "gru.corpus.preview",
    "gru.corpus.tokenizer",
    "gru.corpus.tokenizer_sample",
    "gru.evaluation.memorization",
    "gru.evaluation.ngram",
    "gru.proposal",
    "gru.training.checkpoint",
    "gru.training.learner",
    "gru.training.progress",
    "gru.training.sampler",
]
"""Modules and packages that reach none of HEAVY."""
RAY_INTERNALS = "gru/ray_internals.py"
MOST_LINES, MOST_FUNCTION_LINES = 400, 60
CUSTOMARY = {
    *{".ci", ".editorconfig", ".gitattributes", ".github", ".gitignore", ".pre-commit-config.yaml", ".rayignore"},
    *{"CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "LICENSE", "NOTICE", "README.md", "SECURITY.md"},
    *{"Makefile", "constraints.txt", "pyproject.toml"},
}


def layer_of(module: str) -> int | None:
    """The number of a module's layer, 0 for the lowest; None if it is in none."""
    for number, names in enumerate(LAYERS):
        if any(module == name or (name != "gru" and module.startswith(f"{name}.")) for name in names):
            return number
    return None


def is_upward(start: str, target: str) -> bool:
    first, last = layer_of(start), layer_of(target)
    return first is not None and last is not None and last > first


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def sources() -> Iterator[tuple[str, Path]]:
    """The Python files, by their paths in the repository."""
    for top in ("gru", "jobs", "pipelines", "tests"):
        for file in sorted((ROOT / top).rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), file


@pytest.fixture(scope="module")
def graph() -> ImportGraph:
    return ImportGraph(ROOT)


def test_every_module_has_a_layer(graph: ImportGraph) -> None:
    assert [module for module in graph.modules if layer_of(module) is None] == []


def test_imports_go_downwards_only(graph: ImportGraph) -> None:
    assert graph.chains(graph.modules, is_upward) == []


def test_an_upward_import_two_hops_away_is_found_with_its_chain(tmp_path: Path) -> None:
    files = {
        "gru/model/cells.py": "from gru.digests import digest",
        "gru/digests.py": "def digest():\n    from gru.serving import api",
        "gru/serving/api.py": "import gru.model.cells",
        "jobs/serve.py": "from gru.serving.api import create_app",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert ImportGraph(tmp_path).chains(["gru.model.cells", "gru.serving.api", "jobs.serve"], is_upward) == [
        "gru.model.cells -> gru.digests -> gru.serving.api"
    ]


@pytest.mark.parametrize("plain", PLAIN)
def test_the_core_reaches_neither_ray_nor_mlflow_nor_http(graph: ImportGraph, plain: str) -> None:
    modules = [module for module in graph.modules if is_in(module, plain)]
    assert modules, f"{plain} does not exist"
    assert graph.chains(modules, lambda start, target: target in HEAVY) == []


def test_comparisons_reach_no_ray(graph: ImportGraph) -> None:
    modules = [module for module in graph.modules if is_in(module, "gru.comparison")]
    assert graph.chains(modules, lambda start, target: target == "ray") == []


def is_private_in_ray(name: str) -> bool:
    package, *parts = name.split(".")
    is_private = any(re.match("_[^_]", part) for part in parts) or parts[:2] == ["serve", "context"]
    return package == "ray" and is_private


def test_only_ray_internals_imports_rays_private_modules() -> None:
    users = {
        path
        for path, file in sources()
        if not path.startswith("tests/")
        and any(is_private_in_ray(name) for name in (*imported_names(file), *attribute_paths(file)))
    }
    assert users <= {RAY_INTERNALS}


@pytest.mark.parametrize(
    ("name", "is_private"),
    [
        ("ray._private.state.state", True),
        ("ray.train.v2._internal.callbacks", True),
        ("ray.serve._private.replica", True),
        ("ray.serve.context.get_replica_context", True),
        ("ray.serve.get_replica_context", False),
        ("ray.train.Checkpoint", False),
        ("ray.__version__", False),
        ("gru._private", False),
    ],
)
def test_rays_private_modules_are_recognized(name: str, is_private: bool) -> None:
    assert is_private_in_ray(name) == is_private


def test_no_file_is_too_long() -> None:
    lengths = {path: len(file.read_text().splitlines()) for path, file in sources()}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{path}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path, file in sources()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > MOST_FUNCTION_LINES} == {}


def test_help_needs_no_heavy_module() -> None:
    script = "import pipelines.cli, sys; print([m for m in ('torch', 'ray', 'mlflow', 'dbos') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_top_level_holds_customary_files_only() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert top <= CUSTOMARY | {"gru", "jobs", "pipelines", "tests", "infra"}
