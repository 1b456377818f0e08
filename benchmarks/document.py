"""Run the commands in docs/benchmarks.md and insert their output into the page.

    .venv/bin/python benchmarks/document.py [WORD …]     all commands (hours), or those that contain every WORD

A place in the page is a comment with a command, the command's output, the date and the machine, and a comment with `end`. If a
command fails, its place stays unchanged. The sentences between the places are written by hand: check them after each run.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
PLACE = re.compile(r"<!-- (?P<command>\S+/python .+?) -->\n.*?<!-- end -->", re.DOTALL)
VERSIONS = {"Ray": "ray", "TensorFlow": "tensorflow", "Keras": "keras", "OpenVINO": "openvino"}


def main() -> None:
    """Run the requested commands in the page's order; the page is written after each command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    words = parser.parse_args().words
    chosen = [command for command in commands(PAGE.read_text()) if all(word in command for word in words)]
    failed = []
    for command in chosen:
        print(command, flush=True)
        done = subprocess.run(command, shell=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed.append(command)
            continue
        print(done.stdout, flush=True)
        PAGE.write_text(filled(PAGE.read_text(), command, done.stdout.strip()))
    if failed or not chosen:
        sys.exit("\n".join(f"failed: {command}" for command in failed) or "No command of the page holds these words.")


def commands(page: str) -> list[str]:
    """The commands of the page, in its order."""
    return [location["command"] for location in PLACE.finditer(page)]


def filled(page: str, command: str, printed: str) -> str:
    """The page with a command's output in its place, followed by the command, the date and the machine."""
    told = f"<!-- {command} -->\n\n{printed}\n\n*`{command.partition(' ')[2]}`; {here()}*\n\n<!-- end -->"
    return PLACE.sub(lambda location: told if location["command"] == command else location[0], page)


def here() -> str:
    """The date, the machine and the versions in one line."""
    versions = ", ".join(f"{name} {version(package)}" for name, package in VERSIONS.items())
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    machine = f"{os.cpu_count()} CPUs of {processor()}, {memory}"
    return f"{date.today()}; {machine}; Python {platform.python_version()}, {versions}"


def processor() -> str:
    """The model name of the CPUs."""
    told = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", told.read_text(), re.MULTILINE) if told.exists() else []
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
