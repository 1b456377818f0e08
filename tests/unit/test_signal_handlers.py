"""SIGTERM and SIGINT become one KeyboardInterrupt in the main thread, where and when it can be answered. No Ray is started."""

import signal
import subprocess
import sys
import time

import pytest

BEGIN = """
import os, signal, subprocess, sys, threading, time
from tlbatch import signals
signals.take()

def hit(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.2)  # it comes from another thread
"""
#: What a process does, its exit code, and what it says.
STORIES = {
    "before it is ready, a signal is noted": ("hit(); print('noted')\nsignals.ready()", 1, "noted"),
    "it interrupts a wait": ("signals.ready()\nthreading.Timer(0.2, hit, [signal.SIGINT]).start()\ntime.sleep(20)", 1, ""),
    "a block that is held back goes on": (
        "signals.ready()\nwith signals.held_back(): hit(); print('whole')\nprint('too far')",
        1,
        "whole",
    ),
    "after the outcome is certain nothing changes": ("signals.ready(); signals.finished(); hit(); print('done')", 0, "done"),
    "a child can be ended": (
        "child = subprocess.Popen(['sleep', '20'], preexec_fn=lambda: None); child.terminate(); print(child.wait(5))",
        0,
        "-15",
    ),
    "an interruption that Python drops is raised again": (
        "class Last:\n def __del__(self): hit()\nsignals.ready()\nlast = Last()\ndel last\ntime.sleep(20)",
        1,
        "",
    ),
    "a block that takes too long is left": (
        "signals._SECONDS = 0.2\nsignals.ready(); signals.before_a_forced_end(lambda: print('posted', flush=True))\n"
        "with signals.held_back(): hit(); time.sleep(20)",
        4,
        "posted",
    ),
    "the fourth ends it": ("for _ in range(5): hit()", 4, ""),
}


@pytest.mark.parametrize("story", STORIES)
def test_what_a_signal_does(story):
    code, expected, said = STORIES[story]
    began = time.monotonic()
    words = [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{BEGIN}{code}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert time.monotonic() - began < 10
    assert done.returncode in ({1: (1, 130, -signal.SIGINT)}.get(expected) or (expected,)), done.stderr
    assert done.stdout.strip() == said
    assert ("KeyboardInterrupt" in done.stderr) == (expected == 1), done.stderr
    assert ("interrupted; run the same command again" in done.stderr) == (expected == 4), done.stderr
