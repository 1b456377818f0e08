"""The configuration of every verb, checked: flags, YAML files and `--set` become one of these classes."""

from tlbatch.config.keras_models import ExportConfig, ImportConfig
from tlbatch.config.outputs import (
    BrowseConfig,
    CleanupConfig,
    CompactConfig,
    CompareConfig,
    EvaluateConfig,
    FolderConfig,
    ReportConfig,
    ReviewConfig,
    RollbackConfig,
    SqlConfig,
    StatusConfig,
    SyncConfig,
)
from tlbatch.config.settings import (
    SECRET_WORDS,
    DemoConfig,
    Images,
    RescoreConfig,
    Resources,
    RunConfig,
    ScheduleConfig,
    Spec,
    SubmitConfig,
)
from tlbatch.config.sources import load
from tlbatch.config.training import ExtractConfig, Pretrained, TrainConfig

__all__ = [
    "SECRET_WORDS",
    "BrowseConfig",
    "CleanupConfig",
    "CompactConfig",
    "CompareConfig",
    "DemoConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExtractConfig",
    "FolderConfig",
    "Images",
    "ImportConfig",
    "Pretrained",
    "ReportConfig",
    "RescoreConfig",
    "Resources",
    "ReviewConfig",
    "RollbackConfig",
    "RunConfig",
    "ScheduleConfig",
    "Spec",
    "SqlConfig",
    "StatusConfig",
    "SubmitConfig",
    "SyncConfig",
    "TrainConfig",
    "load",
]
