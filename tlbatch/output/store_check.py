"""Objects of a table -> what the store says of each, where the list of its objects may be older than the table."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pyarrow as pa


class StoreCheck(Protocol):
    """Looks single objects up in the store."""

    def gone(self, missing: pa.Table) -> pa.Table:
        """Of objects of the table that were not listed (uri and key), those that have left the store."""

    def current(self, known: pa.Table) -> np.ndarray:
        """(n,) bool: of which objects of the table (key and etag) the store now has exactly this version."""
