"""The command: installed and in a process of its own, or in this process."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from unittest import mock

from support.paths import TLBATCH


def run_cli(*arguments: str | Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own.

    A run has one actor, and writes no `report.html`, which reads images again, unless the command says otherwise. Lines that
    say every half minute how far it is, of which a slow machine has more, are left out of stderr.
    """
    command = [TLBATCH, *map(str, arguments)]
    if arguments[0] in ("classify", "extract", "rescore"):
        command[2:2] = ["--set", "report=false", "--set", "concurrency=1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}, check=False
    )
    done.stderr = without_progress(done.stderr)
    return done


#: Code that defines `peak()`, the most memory this program held, in KiB. `ru_maxrss` begins with what its parent held.
PEAK = "def peak(): return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"


def without_progress(said: str) -> str:
    """What a command said on stderr, without the lines that say how far it is."""
    return re.sub(r"^\d\d:\d\d:\d\d (listing|extracting|classifying|rescoring|publishing): .*\n", "", said, flags=re.MULTILINE)


def run_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, without its set-up of logging, signals and descriptors: for messages and exit codes."""
    command_line = import_module("tlbatch.cli.main")
    command = ["tlbatch", *map(str, arguments)]
    if arguments[0] in ("classify", "extract", "rescore"):
        command[2:2] = ["--no-report"]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with ExitStack() as stack:
        for name in ("_prepare", "separate_python_stderr"):
            stack.enter_context(mock.patch.object(command_line, name, return_value=None))
        stack.enter_context(mock.patch.object(command_line.atexit, "register", return_value=None))
        stack.enter_context(mock.patch.object(sys, "argv", command))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        try:
            command_line.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    return subprocess.CompletedProcess(command, code, out.getvalue(), without_progress(err.getvalue()))
