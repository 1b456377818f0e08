"""Asks whether a pinned package has a known weakness; part of `make lint`, which goes on where nobody answers.

.venv/bin/python .ci/audit.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PINNED = [Path(__file__).with_name(name) for name in ("requirements.txt", "requirements-nodeps.txt")]


def main() -> int:
    """1 if there is a known weakness that an upgrade mends; 0 if there is none, or if that cannot be found out here."""
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--format", "json"]
    command += ["--progress-spinner", "off", *(word for path in PINNED for word in ("-r", str(path)))]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        packages = json.loads(asked.stdout)["dependencies"]
    except (ValueError, KeyError, subprocess.TimeoutExpired) as error:
        print(f"audit: not done, pip-audit gave no answer: {error!r}", file=sys.stderr)
        return 0
    known = [(package, weakness) for package in packages for weakness in package.get("vulns", ())]
    for package, weakness in known:
        fixed = " or ".join(weakness["fix_versions"]) or "no version"
        print(f"audit: {package['name']} {package['version']} has {weakness['id']}; {fixed} mends it.", file=sys.stderr)
    answered = sum("skip_reason" not in package for package in packages)
    print(f"audit: {answered} of {len(packages)} pinned packages are known where pip-audit asks, {len(known)} weaknesses")
    return int(any(weakness["fix_versions"] for _, weakness in known))


if __name__ == "__main__":
    sys.exit(main())
