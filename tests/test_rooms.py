"""The layout: one room per op, imports that point one way, and documents that name what exists."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastres.ops import native

ROOT = Path(__file__).parent.parent
ROOMS = sorted(p.name for p in ROOT.glob("csrc/*") if p.is_dir() and p.name != "common")
MODULES = sorted(p for p in ROOT.glob("fastres/**/*.py"))
SOURCES = sorted(p for p in ROOT.glob("csrc/**/*") if p.is_file())
DOCUMENTS = [p for p in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if p.exists()]
# From the ground up. Other modules are helpers: they stand as high as the lowest that needs them.
FLOORS = [
    {"ops"},
    {"sites"},
    {"nn", "fuse"},
    {"record", "gates", "paths"},  # the policies
    {"analysis"},
    {"studies"},
    {"cli", "__main__"},
]
TORCH_FREE = ("kernel.h", "cpu.cpp", "cuda.cu")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """fastres/record.py -> record, fastres/ops/layout.py -> ops."""
    return path.relative_to(ROOT / "fastres").parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether on import of the file itself."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        for inner in ast.walk(node):
            on_import = isinstance(node, ast.Import | ast.ImportFrom)
            if isinstance(inner, ast.Import):
                yield from ((alias.name, on_import) for alias in inner.names)
            elif isinstance(inner, ast.ImportFrom):
                assert inner.level == 0, f"{name_of(path)}: imports must be absolute"
                for alias in inner.names:  # of `from fastres import report` the module is report
                    whole = f"{inner.module}.{alias.name}" if inner.module == "fastres" else ""
                    yield whole or str(inner.module), on_import


def code_of(path: Path) -> str:
    """The names that a file's expressions read, such as fastres.__version__, one a line."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return "\n".join(ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute))


def rooms_within() -> dict[str, set[str]]:
    """Room of fastres -> the rooms that it imports; the surface fastres/__init__.py is none."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        if path != ROOT / "fastres/__init__.py":
            wanted = {
                name.split(".")[1] for name, _ in imports(path) if name.startswith("fastres.")
            }
            found.setdefault(room_of(path), set()).update(wanted - {room_of(path)})
    return found


def reached(room: str, graph: dict[str, set[str]]) -> set[str]:
    found, left = set(), [room]
    while left:
        for next_room in graph.get(left.pop(), set()) - found:
            found.add(next_room)
            left.append(next_room)
    return found


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("op", ROOMS)
@pytest.mark.parametrize(
    "place",
    [
        *("csrc/{}/kernel.h", "csrc/{}/cpu.cpp", "csrc/{}/cuda.cu", "csrc/{}/op.cpp"),
        *("fastres/ops/{}.py", "tests/test_{}.py", "benchmarks/{}.py"),
    ],
)
def test_an_op_is_found_by_its_name_in_every_place(op: str, place: str) -> None:
    assert (ROOT / place.format(op)).exists()


@pytest.mark.skipif(native.C is None, reason="_C is not built")
def test_every_operator_and_every_entry_for_numpy_has_a_room() -> None:
    every = torch._C._dispatch_get_all_op_names()
    operators = {name.removeprefix("fastres::") for name in every if name.startswith("fastres::")}
    assert operators
    assert not [name for name in operators if not name.lstrip("_").startswith(tuple(ROOMS))]
    entries = {name for name in vars(native.C) if not name.startswith("_")} - {"build_info"}
    assert not [name for name in entries if not name.startswith(tuple(ROOMS))]


def test_imports_point_down() -> None:
    graph = rooms_within()
    for height, floor in enumerate(FLOORS):
        above = set().union(*FLOORS[height + 1 :])
        for room in floor & graph.keys():
            assert not reached(room, graph) & above, f"{room} reaches what stands above it"


def test_imports_make_no_circle() -> None:
    graph = rooms_within()
    assert not [room for room in graph if room in reached(room, graph)]


def test_nothing_inside_imports_the_surface() -> None:
    inside = {room_of(path) for path in MODULES} | {"__version__"}
    for path in MODULES:
        used = {name.split(".")[1] for name, _ in imports(path) if name.startswith("fastres.")}
        used |= set(re.findall(r"^fastres\.(\w+)", code_of(path), re.MULTILINE))
        assert used <= inside, f"{name_of(path)} takes {used - inside} from the surface"


def test_ops_import_torch_only() -> None:
    for path in ROOT.glob("fastres/ops/*.py"):
        names = {name.split(".")[0] for name, _ in imports(path)}
        others = names - sys.stdlib_module_names - {"torch", "fastres"}
        assert not others, f"{name_of(path)} imports {others}"


def test_what_is_an_extra_is_imported_where_it_is_used() -> None:
    for path in MODULES:
        names = {name.split(".")[0] for name, on_import in imports(path) if on_import}
        extras = names - sys.stdlib_module_names - {"torch", "numpy", "fastres"}
        assert not extras, f"{name_of(path)} imports {extras} at its top"


def test_rooms_of_csrc_include_themselves_and_common() -> None:
    for path in SOURCES:
        room = path.relative_to(ROOT / "csrc").parts[0]
        for name in includes(path):
            inside = path.parent / name if (path.parent / name).exists() else ROOT / "csrc" / name
            if inside.exists():
                to = inside.resolve().relative_to(ROOT / "csrc").parts[0]
                assert to in {room, "common"}, f"{name_of(path)} includes {name}"


@pytest.mark.parametrize("op", ROOMS)
def test_kernels_see_no_header_of_torch(op: str) -> None:
    left, seen = [ROOT / "csrc" / op / name for name in TORCH_FREE], set()
    while left:
        path = left.pop().resolve()
        seen.add(path)
        for name in includes(path):
            assert not name.startswith(("torch/", "ATen/", "c10/")), f"{path.name} includes {name}"
            if (path.parent / name).exists() and (path.parent / name).resolve() not in seen:
                left.append(path.parent / name)


@pytest.mark.parametrize("path", MODULES + SOURCES, ids=name_of)
def test_a_file_begins_with_its_name_and_what_it_computes(path: Path) -> None:
    stem = path.parent.name if path.stem in ("__init__", *TORCH_FREE) else path.stem
    names = {stem, path.parent.name} if path in SOURCES else {stem}
    first = path.read_text().split("\n")[0]
    assert re.match(rf'(//|""") ?({"|".join(names)})( [^:]+)?: ', first), first


def test_files_of_csrc_are_below_100_columns() -> None:
    long = [f"{name_of(p)}:{i}" for p in SOURCES for i, line in enumerate(p.open(), 1)
            if len(line) > 101]  # fmt: skip
    assert not long


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_documents_name_what_exists(path: Path) -> None:
    text = path.read_text()
    named = re.findall(
        r"(?<![\w/.-])(?:csrc|fastres|tests|benchmarks|docs|tools)/[\w./*<>-]*", text
    )
    for name in {name.rstrip(".").replace("<op>", "*") for name in named}:
        assert "<" in name or list(ROOT.glob(name.rstrip("/"))), f"{name} does not exist"
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / link).exists(), f"the link {link} leads nowhere"


def test_make_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    listed = re.findall(r"^([a-z]+):.*  ## .", text, re.MULTILINE)
    assert sorted(listed) == sorted(set(phony.split()) - {"again"})
