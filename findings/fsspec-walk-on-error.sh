#!/usr/bin/env bash
# fsspec's walk forgets `on_error` below the first level: a folder that cannot be listed is an empty one, whatever was asked for.
#
# Seen with fsspec 2026.9.0 on Python 3.11. `AbstractFileSystem.walk(path, on_error="raise")` raises if the folder itself cannot
# be listed. It calls itself for each folder below without `on_error`, so there the default `omit` holds: a folder whose listing
# is refused, or breaks off with a connection, has no files and nobody is told. `find` has no other way. All file systems
# without a search of their own walk so (sftp, smb, ftp, webhdfs). Whoever compares two listings takes the folder's files for
# deleted.
#
# Takes ten seconds. PYTHON: a Python 3.11 or newer (default: python3).
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check fsspec==2026.9.0
mkdir -p "$folder/store/open/inner" "$folder/store/open/refused"
touch "$folder/store/open/1" "$folder/store/open/inner/2" "$folder/store/open/refused/3"
"$folder/venv/bin/python" - "$folder/store" <<'PYTHON'
import sys

from fsspec.implementations.local import LocalFileSystem


class Refusing(LocalFileSystem):
    """A file system one folder of which may not be listed, as a server says it."""

    def ls(self, path, detail=False, **kwargs):
        if str(path).rstrip("/").endswith("/refused"):
            raise PermissionError(13, "Permission denied", path)
        return super().ls(path, detail=detail, **kwargs)


files, store, told = Refusing(), sys.argv[1], []
try:
    list(files.walk(f"{store}/open/refused", on_error="raise"))
    raise SystemExit("changed: the folder itself raises nothing")
except PermissionError:
    print("the refused folder itself:  PermissionError")
found = [name for _, _, names in files.walk(store, on_error="raise") for name in names]
found_too = [name for _, _, names in files.walk(store, on_error=told.append) for name in names]
assert sorted(found) == sorted(found_too) == ["1", "2"], f"changed: {found}, {found_too}"
assert not told, f"changed: on_error was called with {told}"
print("two levels above it:        no error, no call of on_error, its file is missing:", found)
PYTHON
