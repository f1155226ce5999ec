"""The imports of a source tree, read from its syntax: at the top of files, in functions, and for type checks."""

import ast
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

Chain = tuple[str, ...]
"""Modules, each of which imports the next one."""


class ImportGraph:
    """The modules of the packages `gru`, `jobs` and `pipelines` below `root`, and what each imports directly."""

    def __init__(self, root: Path) -> None:
        files = [file for layer in ("gru", "jobs", "pipelines") for file in sorted((root / layer).rglob("*.py"))]
        self.modules = {_module_name(file.relative_to(root)): file for file in files}
        self.edges = {name: self._targets(file) for name, file in self.modules.items()}

    def shortest_chain(self, start: str, is_wrong: Callable[[str], bool]) -> Chain | None:
        """Return the shortest chain of imports from a module to a wrong one, inside or outside the tree, if any."""
        pending = deque([(start,)])
        seen = {start}
        while pending:
            chain = pending.popleft()
            for target in sorted(self.edges.get(chain[-1], set()) - seen, key=_deepest_first):
                seen.add(target)
                if is_wrong(target):
                    return (*chain, target)
                pending.append((*chain, target))
        return None

    def chains(self, starts: Iterable[str], is_wrong: Callable[[str, str], bool]) -> list[str]:
        """Return the shortest chain from each start to a target that is wrong for it, readable; the shortest first."""
        chains = [self.shortest_chain(start, partial(is_wrong, start)) for start in starts]
        return [" -> ".join(chain) for chain in sorted(filter(None, chains), key=lambda chain: (len(chain), chain))]

    def _targets(self, file: Path) -> set[str]:
        """The modules that a file imports, with the packages that contain those of the tree, except its top packages:
        they import nothing when a module in them is imported."""
        targets: set[str] = set()
        for name in imported_names(file):
            module = name if name in self.modules else name.rpartition(".")[0]
            if module not in self.modules:
                targets.add(name.split(".")[0])  # outside the tree, or a name in it that does not exist
                continue
            parts = module.split(".")
            containing = {".".join(parts[:count]) for count in range(2, len(parts))}
            targets |= {module, *containing} & self.modules.keys()
        return targets


def imported_names(file: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports: `a.b` for `import a.b`, and for `from a import b`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def attribute_paths(file: Path) -> Iterator[str]:
    """Yield the dotted names that a file reads, such as `a.b.c`."""
    for node in ast.walk(ast.parse(file.read_text())):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            yield ".".join([node.id, *reversed(parts)])


def _deepest_first(module: str) -> tuple[int, str]:
    """Sort key: a module before the package that contains it, so that chains name the module."""
    return -module.count("."), module


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
