"""tlbatch classifies millions of stored images with a transfer-learned Keras model on Ray, and accounts for every image.

    import tlbatch
    tlbatch.classify(images="s3://bucket/photos", bundle="s3://bucket/model", output="s3://bucket/table")
    table = tlbatch.read_predictions("s3://bucket/table")

The names below are loaded on first use: importing tlbatch imports neither TensorFlow nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlbatch.api import (
        browse,
        classify,
        compact,
        demo,
        export_model,
        extract,
        import_model,
        load_report,
        plan,
        rescore,
        review,
        rollback,
        run,
        schedule,
        sql,
        submit,
        sync,
        train,
    )
    from tlbatch.commands.read import read_errors, read_predictions
    from tlbatch.errors import TlbatchError
    from tlbatch.model.bundle import load_bundle
    from tlbatch.output.gc import gc
    from tlbatch.output.status import status
    from tlbatch.output.verify import verify
    from tlbatch.report.compare import compare
    from tlbatch.report.evaluate import evaluate

_HOME = {
    "TlbatchError": "tlbatch.errors",
    "browse": "tlbatch.api",
    "classify": "tlbatch.api",
    "compact": "tlbatch.api",
    "compare": "tlbatch.report.compare",
    "demo": "tlbatch.api",
    "evaluate": "tlbatch.report.evaluate",
    "export_model": "tlbatch.api",
    "extract": "tlbatch.api",
    "gc": "tlbatch.output.gc",
    "import_model": "tlbatch.api",
    "load_bundle": "tlbatch.model.bundle",
    "load_report": "tlbatch.api",
    "plan": "tlbatch.api",
    "read_errors": "tlbatch.commands.read",
    "read_predictions": "tlbatch.commands.read",
    "rescore": "tlbatch.api",
    "review": "tlbatch.api",
    "rollback": "tlbatch.api",
    "run": "tlbatch.api",
    "schedule": "tlbatch.api",
    "sql": "tlbatch.api",
    "status": "tlbatch.output.status",
    "submit": "tlbatch.api",
    "sync": "tlbatch.api",
    "train": "tlbatch.api",
    "verify": "tlbatch.output.verify",
}

__all__ = [
    "TlbatchError",
    "browse",
    "classify",
    "compact",
    "compare",
    "demo",
    "evaluate",
    "export_model",
    "extract",
    "gc",
    "import_model",
    "load_bundle",
    "load_report",
    "plan",
    "read_errors",
    "read_predictions",
    "rescore",
    "review",
    "rollback",
    "run",
    "schedule",
    "sql",
    "status",
    "submit",
    "sync",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
