"""The settings of the verbs that look at an output, or keep it in order."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from tlbatch.config.settings import LABELS, Address, Count, Names, Options, Output, Share, Split, Strict, Strings


class FolderConfig(Strict):
    """An output to read."""

    output: Output
    storage_options: Options = {}  # noqa: RUF012  # pydantic copies it


class CompareConfig(Strict):
    """Two runs to compare."""

    run_a: str = Field(description="A run's folder, or an output, whose newest published run is taken.")
    run_b: str = Field(description="The run or output to compare it with.")
    most: Annotated[int, Field(ge=0)] = Field(default=20, description="How many of the most changed images are named.")
    storage_options: Options = {}  # noqa: RUF012  # pydantic copies it


class CompactConfig(FolderConfig):
    """An output whose runs become one run."""

    address: Address = None


class RollbackConfig(FolderConfig):
    """An output whose table becomes an earlier one."""

    to: str = Field(description="The run after which the table was as it should be again.")


class CleanupConfig(FolderConfig):
    """An output to clean up."""

    older_than: float = Field(default=24.0, ge=0, description="Only objects whose last write is at least this many hours old.")
    keep: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="How many superseded runs to keep for a rollback; all of them by default."
    )
    remove: bool = Field(default=False, description="Remove what was found instead of only showing it.")


class ReviewConfig(FolderConfig):
    """An output of which a person labels a few images."""

    to: str = Field(default="review", description="Folder or URL for the labelling page and the labels file.")
    budget: Count = Field(default=200, description="How many images to choose.")
    labels: Strings = Field(default=(), description="A labels file whose images are not chosen again; repeatable.")
    near_duplicate: Share = Field(default=0.95, description="Cosine similarity from which two images count as one picture.")
    seed: int = Field(default=0, description="Seed of the images that are chosen at random.")


class BrowseConfig(FolderConfig):
    """An output whose images are shown in a browser."""

    labels: str | None = Field(default=None, description=LABELS)
    corrections: str = Field(
        default="corrections.csv", description="Labels file that gets what a person corrects; made by the first correction."
    )
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(default=0, description="Port on this machine; 0 takes a free one.")


class SqlConfig(FolderConfig):
    """An output as SQL views."""

    query: str | None = Field(
        default=None, description="SQL that DuckDB answers, for example select count(*) from predictions."
    )


class SyncConfig(FolderConfig):
    """An output, and a table of another format that holds its predictions."""

    to: str = Field(description="Folder or URL of a Delta table, or CATALOG.NAMESPACE.TABLE of Iceberg.")
    as_: Literal["delta", "iceberg"] = Field(
        default="delta", validation_alias=AliasChoices("as_", "as"), description="The table's format: delta or iceberg."
    )


class StatusConfig(FolderConfig):
    """An output to inspect, once or until no run is active."""

    watch: bool = Field(default=False, description="Repeat until no run is active.")


class ReportConfig(FolderConfig):
    """A run to report on: an output's newest run, or the run of a run's folder."""

    output: str = Field(description="Folder or URL of an output, or of a run.")
    labels: str | None = Field(default=None, description=LABELS)
    split: Split = None


class EvaluateConfig(FolderConfig):
    """An output and the labels of its images."""

    labels: str = Field(description=LABELS)
    labels_columns: Names = Field(
        default=(), description="Columns of the labels file that name the image and its label, if called otherwise: id,breed."
    )
    split: Split = None
