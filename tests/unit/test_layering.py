"""The shape of the package: imports point one way, few rooms know the heavy libraries, nothing has a long tail."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "tlbatch"
MODULES = sorted(PACKAGE.rglob("*.py"))

#: The floors, the lowest first. A room imports only from floors below its own.
FLOORS = [
    {"errors", "schema", "signals", "stdio"},
    {"config", "storage"},
    {"images", "model", "output"},
    {"execution"},
    {"report"},
    {"commands", "web"},
    {"api", "cli"},
    {"__init__", "__main__"},
]
#: Library -> the rooms that may import it.
ONLY_IN = {
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "obstore": {"storage"},
    "ray": {"execution"},
    "tensorflow": {"model"},
    "openvino": {"model"},
    "jax": {"model"},
    "deltalake": {"output"},
    "mlflow": {"cli"},
    "starlette": {"web"},
    "uvicorn": {"web"},
    "duckdb": {"commands", "web"},
    "nncf": {"model"},
    "pyiceberg": {"output"},
    "keras": {"model", "commands"},  # commands name Keras in types only
    "PIL": {"images"},
    "cykooz_resizer": {"images"},
    "imagecodecs": {"images"},
    "tifffile": {"images"},
}
#: The files that may touch Ray's private API, and what counts as a touch.
PRIVATE_RAY = {"execution/local_ray.py", "execution/resources.py"}
PRIVATE_NAMES = {"map_batches_internal", "iter_internal_ref_bundles", "_logical_plan"}
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 500, 60


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def own_modules(path: Path) -> set[Path]:
    """The files of tlbatch that a file imports."""
    names = (PACKAGE.parent / Path(*name.split(".")) for name in imported(path) if name.startswith("tlbatch."))
    found = {name.with_suffix(".py") for name in names} | {name / "__init__.py" for name in names}
    return {file for file in found if file.exists()} - {path}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    above = {name_of(file) for file in own_modules(path) if room(file) != room(path) and floor[room(file)] >= floor[room(path)]}
    assert above == set()


def test_there_are_few_rooms_and_no_circle_between_files():
    assert {room(path) for path in MODULES} == set().union(*FLOORS)
    assert sum(path.name == "__init__.py" and path.parent != PACKAGE for path in MODULES) <= 10
    assert len(set().union(*FLOORS)) <= 17
    assert len(FLOORS) <= 8
    try:
        TopologicalSorter({path: own_modules(path) for path in MODULES if path.name != "__init__.py"}).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(name_of(path) for path in circle.args[1]))


@pytest.mark.parametrize("library", ONLY_IN)
def test_few_rooms_know_the_heavy_libraries(library):
    users = {room(path) for path in MODULES if any(name.split(".")[0] == library for name in imported(path))}
    assert users <= ONLY_IN[library]


def test_rays_private_api_is_touched_in_two_files():
    touches = set()
    for path in MODULES:
        private = any("ray._" in name or ("ray." in name and "._internal" in name) for name in imported(path))
        named = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if private or named & PRIVATE_NAMES:
            touches.add(name_of(path))
    assert touches <= PRIVATE_RAY


def test_a_packages_init_only_re_exports():
    for path in MODULES:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            body = ast.parse(path.read_text()).body
            assert all(isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign) for node in body), name_of(path)


def test_no_public_class_has_a_namesake():
    seen: dict[str, Path] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in seen, f"{node.name} in {name_of(path)} and {name_of(seen[node.name])}"
                seen[node.name] = path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_and_nothing_has_a_long_tail(path):
    text = path.read_text()
    parsed = ast.parse(text)
    assert ast.get_docstring(parsed)
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, f"{name_of(path)}: {node.name}"
