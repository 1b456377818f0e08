"""`make bench` writes docs/benchmarks.md: what a command prints lands in its place, and nowhere else."""

import os
import re
import shutil
import subprocess
import sys
from datetime import date

import pytest
from support.paths import ROOT

PAGE = """# Figures

Before.

<!-- {python} one.py -->
old
<!-- end -->

Between.

<!-- {python} broken.py -->

measured last year

<!-- end -->

<!-- {python} two.py few -->

old

<!-- end -->

After.
"""


@pytest.fixture
def project(tmp_path):
    for folder in ("benchmarks", "docs"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "benchmarks" / "document.py", tmp_path / "benchmarks")
    (tmp_path / "one.py").write_text(r"print('| a |\n| --- |\n| \\1 |')")
    (tmp_path / "two.py").write_text("import sys; print(sys.argv[1], 'words')")
    (tmp_path / "broken.py").write_text("print('half a table'); raise SystemExit(3)")
    (tmp_path / "docs" / "benchmarks.md").write_text(PAGE.format(python=sys.executable))
    return tmp_path


def document(project, *words):
    command = [sys.executable, "benchmarks/document.py", *words]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    return done, (project / "docs" / "benchmarks.md").read_text()


def test_the_page_gets_what_commands_print_and_keeps_the_rest(project):
    done, page = document(project)
    assert done.returncode == 1
    assert done.stderr == f"failed: {sys.executable} broken.py\n"
    assert f"one.py -->\n\n| a |\n| --- |\n| \\1 |\n\n*`one.py`; {date.today()}; " in page
    assert "two.py few -->\n\nfew words\n\n*`two.py few`; " in page
    assert "broken.py -->\n\nmeasured last year\n\n<!-- end -->" in page
    assert page.count("old") == 0
    assert [word in page for word in ("Before.", "Between.", "After.")] == [True] * 3
    assert document(project)[1] == page


def test_words_choose_commands(project):
    before = (project / "docs" / "benchmarks.md").read_text()
    done, page = document(project, "two", "few")
    assert done.returncode == 0
    assert page.split("two.py few -->")[0] == before.split("two.py few -->")[0]
    assert "few words" in page
    done, _ = document(project, "three.py")
    assert (done.returncode, done.stderr) == (1, "No command of the page holds these words.\n")


def test_a_python_that_is_not_there_stops_no_other_command(project):
    location = project / "docs" / "benchmarks.md"
    location.write_text(PAGE.format(python=sys.executable).replace(f"{sys.executable} one.py", "nowhere/bin/python one.py"))
    done, page = document(project)
    assert "failed: nowhere/bin/python one.py\n" in done.stderr
    assert "few words" in page


def test_every_benchmark_has_its_place_in_the_page():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    commands = re.findall(r"^<!-- \S+/python benchmarks/(\S+\.py)(?: (\w+))?", page, re.MULTILINE)
    helpers = {
        "document.py",
        "generated.py",
        "image_sets.py",
        "peers.py",
        "photographs.py",
        "gpu.py",
    }  # gpu.py runs on another machine
    assert {script for script, _ in commands} == {path.name for path in (ROOT / "benchmarks").glob("*.py")} - helpers
    assert page.count("<!-- end -->") == len(commands)
    source = (ROOT / "benchmarks" / "compare.py").read_text()
    sections = re.search(r"for section in \((.+?)\)", source)
    assert {section for script, section in commands if script == "compare.py"} == set(sections[1].split(", "))


#: Imports what a run on a GPU imports, where no other packages are installed than those that are named.
IMPORTING = """
import re, sys
from importlib.metadata import packages_distributions

owners = {top: {re.sub(r"[-_.]+", "-", one).lower() for one in names} for top, names in packages_distributions().items()}

class Bare:
    def find_spec(self, name, path=None, target=None):
        if path is None and name in owners and not owners[name] & {"tlbatch", *sys.argv[1:]}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Bare())
import jax, keras, ray.data
import tlbatch.commands.classify, tlbatch.execution.actors, tlbatch.images.decode, tlbatch.model.jax_engine
"""


def test_the_archive_for_a_bare_machine_has_all_that_a_run_imports():
    source = (ROOT / "benchmarks" / "gpu.py").read_text()
    blocks = re.findall(r"^(?:BARE|PACKAGES) = \(\n(.*?)^\)", source, re.MULTILINE | re.DOTALL)
    named = [name for block in blocks for name in re.findall(r'"([a-z0-9-]+)"', block)]
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    command = [sys.executable, "-c", IMPORTING, *named]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
