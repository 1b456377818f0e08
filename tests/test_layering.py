"""Imports point one way; who knows Ray, fsspec and TensorFlow is few. Read from the source, held here."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "tlbatch"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

STAGES = {"listing", "reader", "decode", "model", "writer"}
VERBS = {
    "compacting",
    "config",
    "extraction",
    "forecast",
    "importing",
    "notebook",
    "pipeline",
    "reporting",
    "rescoring",
    "reviewing",
    "training",
}
#: Who may import whom, besides the standard library and others' packages. A room's name stands for all in it.
GROUND = {"errors", "schema", "storage", "shards", "quiet"}
#: What a verb needs that puts stages together on Ray Data.
JOINS = GROUND | {"commit", "config", "execution", "lease", "ledger", "model", "report", "session"}
ALLOWED = {
    "errors": set(),
    "schema": set(),
    "quiet": set(),
    "s3": set(),
    "storage": {"errors", "s3"},
    "shards": {"errors"},
    "config": GROUND,
    "labels": GROUND,
    **dict.fromkeys(STAGES, GROUND),
    "ledger": GROUND,
    "overlay": GROUND | {"ledger"},
    "lease": GROUND,
    "publish": GROUND | {"ledger"},
    "incremental": GROUND | {"commit", "ledger", "overlay", "report"},
    "commit": GROUND | {"lease", "ledger", "publish"},
    "cleanup": GROUND | {"lease", "ledger"},
    "report": GROUND | {"commit", "features", "lease", "ledger", "overlay", "publish", "labels"},
    "guard": GROUND,
    "blocks": GROUND | {"decode"},
    "worker": GROUND | {"blocks", "reader", "decode", "model", "guard"},
    "session": GROUND | {"localray"},
    "localray": set(),
    "execution": GROUND | {"ledger", "publish", "writer"},
    "sizing": GROUND | {"config", "worker", "execution"},
    "pipeline": JOINS | {"features", "incremental", "listing", "sizing", "rescorer", "worker"},
    "features": GROUND | {"ledger", "overlay"},
    "rescorer": GROUND | {"execution", "features", "ledger", "model", "worker"},
    "rescoring": JOINS | {"features", "rescorer"},
    "compacting": JOINS | {"features", "overlay", "publish", "rescorer"},
    "forecast": JOINS | {"pipeline", "sizing", "worker"},
    "cluster": GROUND | {"config"},
    "schedule": GROUND | {"config"},
    "notify": GROUND,
    "extraction": GROUND | {"config", "decode", "execution", "lease", "ledger", "model", "pipeline"},
    "importing": GROUND | {"config", "labels", "model", "report"},
    "pictures": GROUND | {"decode", "ledger", "reader", "report"},
    "reviewing": GROUND | {"config", "features", "labels", "ledger", "pictures", "report"},
    "reporting": GROUND | {"commit", "config", "ledger", "pictures", "report"},
    "notebook": GROUND | {"commit", "config", "pictures", "pipeline", "progress", "report", "reporting"},
    "training": GROUND
    | {"config", "execution", "extraction", "features", "labels", "listing", "model", "pipeline", "report", "session"},
    "show": GROUND,
    "progress": GROUND | {"show"},
    "api": GROUND | VERBS | {"commit", "execution", "report", "session"},
    "demo": GROUND | {"config", "pipeline", "progress", "reporting", "training", "report", "show", "model"},
    "cli": GROUND | VERBS | {"report", "show", "demo", "cleanup", "cluster", "commit", "notify", "progress", "schedule"},
    "__init__": GROUND | {"api", "cleanup", "model", "report"},
    "__main__": {"cli"},
}
ONLY_IN = {
    "fsspec": {"storage", "s3"},
    "s3fs": {"storage", "s3"},
    "obstore": {"s3"},
    "ray": {"cluster", "execution", "localray", "session", "writer"},
    "tensorflow": {"model"},
    "keras": {"model", "training"},  # training names Keras in types only
    "openvino": {"model"},
    "PIL": {"decode"},
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            names = {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "tlbatch" else {node.module}
            found |= names
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = {name.split(".")[1] for name in imported(path) if name.startswith("tlbatch.")}
    assert own - {room(path)} <= ALLOWED[room(path)]


@pytest.mark.parametrize("library", ONLY_IN)
def test_few_know_the_heavy_libraries(library):
    users = {room(path) for path in MODULES if any(name.split(".")[0] == library for name in imported(path))}
    assert users <= ONLY_IN[library]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_and_no_function_has_a_long_tail(path):
    parsed = ast.parse(path.read_text())
    assert ast.get_docstring(parsed)
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
