"""Carries out the commands that stand in docs/benchmarks.md, and puts there what they print.

    .venv/bin/python benchmarks/document.py [WORD …]     all of them take hours; with words, those that hold every word

A place in the page is a comment with a command, what the command printed, when and where, and a comment with `end`. A command
that fails leaves its place as it was. Sentences between the places are a person's: read them again afterwards.
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
    """Carry out what is asked for, the page's order; the page is written after each."""
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
    """The page's commands, in its order."""
    return [place["command"] for place in PLACE.finditer(page)]


def filled(page: str, command: str, printed: str) -> str:
    """The page with what a command printed in its place, and below it the command, the day and the machine."""
    told = f"<!-- {command} -->\n\n{printed}\n\n*`{command.partition(' ')[2]}`; {here()}*\n\n<!-- end -->"
    return PLACE.sub(lambda place: told if place["command"] == command else place[0], page)


def here() -> str:
    """The day, the machine and the versions, in a line."""
    versions = ", ".join(f"{name} {version(package)}" for name, package in VERSIONS.items())
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    machine = f"{os.cpu_count()} CPUs of {processor()}, {memory}"
    return f"{date.today()}; {machine}; Python {platform.python_version()}, {versions}"


def processor() -> str:
    """What the CPUs call themselves."""
    told = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", told.read_text(), re.MULTILINE) if told.exists() else []
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
