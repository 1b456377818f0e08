#!/usr/bin/env bash
# pyarrow does not look at what a Python file says it has written: a raw file that takes a part of the bytes, as Python lets it,
# gets a damaged Parquet file, and nobody is told.
#
# Seen with pyarrow 26.0.1. `io.RawIOBase.write` may write fewer bytes than it is given and returns how many; the caller writes
# the rest. `open(..., "wb", buffering=0)` gives such a file, and the kernel writes a part when a disk fills up or a limit is
# reached. `pyarrow.parquet.ParquetWriter` and `pyarrow.ipc.new_stream` call `write` once for each piece and ignore the number:
# both end without an error, and reading the file back fails, or what was written last is missing. With the same file behind
# `io.BufferedWriter`, which does write the rest, both are whole. So whoever hands Arrow a raw file loses data exactly when a
# disk is nearly full, and a digest that is made of the file afterwards says that all is well.
#
# Takes half a minute and 200 MB. PYTHON: a Python 3.11 or newer (default: python3).
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MOST = 4_096


class InParts(io.RawIOBase):
    """A raw file that takes at most some bytes at a time, and says how many it took."""

    def __init__(self, path):
        super().__init__()
        self.file = open(path, "wb", buffering=0)
        self.taken = self.given = 0

    def writable(self):
        return True

    def write(self, data):
        self.given += len(data)
        count = self.file.write(bytes(data)[:MOST])
        self.taken += count
        return count

    def close(self):
        self.file.close()
        super().close()


def parquet(table, sink):
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)


def stream(table, sink):
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def rows_of(path, form):
    data = pa.BufferReader(Path(path).read_bytes())
    try:
        table = pq.read_table(data) if form == "parquet" else pa.ipc.open_stream(data).read_all()
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        return f"{type(error).__name__}"
    return table.num_rows


table = pa.table({"number": pa.array(range(50_000), pa.int64()), "text": [f"row {number}" for number in range(50_000)]})
for form, write in {"parquet": parquet, "stream": stream}.items():
    raw = InParts(f"{sys.argv[1]}/raw")
    write(table, raw)  # ends without an error
    raw.close()
    found = rows_of(f"{sys.argv[1]}/raw", form)
    print(f"{form}, raw file: {raw.given:,} bytes given, {raw.taken:,} taken; read back: {found}")
    assert raw.taken < raw.given and found != 50_000, "the number of written bytes is looked at"
    behind = InParts(f"{sys.argv[1]}/buffered")
    buffered = io.BufferedWriter(behind)
    write(table, buffered)
    buffered.close()
    found = rows_of(f"{sys.argv[1]}/buffered", form)
    print(f"{form}, buffered file: read back: {found}")
    assert found == 50_000
print("as described")
PYTHON
