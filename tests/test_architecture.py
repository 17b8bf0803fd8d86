"""The rooms of the house: which may import which, read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from conftest import ROOT

LEVELS = [
    *({"base"}, {"storage"}, {"runtime"}, {"data"}, {"model"}, {"objectives"}, {"features"}),
    *(
        {"embeddings"},
        {"ranking"},
        {"mining"},
        {"training", "evaluation", "search"},
        {"preferences"},
        {"report"},
        {"job", "serve"},
    ),
]
"""From the bottom up: a room imports those below it, and itself."""
PURE = [
    *("base", "objectives", "ranking.order", "mining.rules", "mining.engines.keys"),
    *("evaluation.metrics", "evaluation.paired", "training.schedule", "model.relevance"),
]
"""Mathematics, schema and errors: whatever they import, no Ray and no I/O is among it."""
IMPURE = {
    *("ray", "fsspec", "s3fs", "pyarrow", "requests", "socket", "subprocess", "shutil", "io"),
    *("pathlib", "os", "PIL", "matplotlib", "tensorboardX"),
}


@cache
def modules() -> dict[str, Path]:
    """Files by module name, without the package's own."""
    files = (ROOT / "qure_core").rglob("*.py")
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All below ``tree``, without what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from _nodes(node)


@cache
def imports(name: str) -> frozenset[str]:
    """What a module imports, anywhere in it, by full name; ``from a import b`` is a.b if that is a
    module of ours."""
    found = set()
    for node in _nodes(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            whole = {f"{node.module}.{alias.name}": str(node.module) for alias in node.names}
            found |= {full if full in modules() else part for full, part in whole.items()}
    return frozenset(found)


def ours(name: str) -> list[str]:
    return sorted(found for found in imports(name) if found in modules())


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def level(name: str) -> int:
    return next(i for i, rooms in enumerate(LEVELS) if room(name) in rooms)


def test_every_module_is_in_a_room() -> None:
    rooms = {room(name) for name in modules()} - {""}
    assert rooms == set().union(*LEVELS)


def test_arrows_point_one_way() -> None:
    wrong = [
        f"{name} imports {other}"
        for name in modules()
        if room(name)
        for other in ours(name)
        if room(other) != room(name) and level(other) >= level(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_modules() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in ours(name):
                # A package imports its parts, and its parts may name it.
                if not (other.startswith(f"{name}.") or name.startswith(f"{other}.")):
                    visit(other, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def _packages(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def closure(name: str) -> Iterator[tuple[str, str]]:
    """Modules of ours that ``name`` needs, itself too, and the way to each."""
    seen, left = set(), [(name, name)]
    while left:
        module, way = left.pop()
        if module not in seen:
            seen.add(module)
            yield module, way
            # To import a module is to import the packages that it lies in.
            parents = _packages(module)
            left += [(other, f"{way} -> {other}") for other in ours(module) + parents]


def test_pure_modules_need_no_ray_and_no_files() -> None:
    wrong = []
    for name in modules():
        if any(f"{name}.".startswith(f"qure_core.{pure}.") for pure in PURE):
            for module, way in closure(name):
                used = {found.split(".")[0] for found in imports(module)} & IMPURE
                wrong += [f"{way}: {', '.join(sorted(used))}"] if used else []
    assert not wrong, "\n".join(wrong)


def test_what_is_checked_is_there() -> None:
    """The lists above name what exists, and the reading of imports finds what it should."""
    for pure in PURE:
        assert any(f"{name}.".startswith(f"qure_core.{pure}.") for name in modules()), pure
    assert "qure_core.storage" in imports("qure_core.data.schema")
    assert "ray.train" in imports("qure_core.training.trainer")
