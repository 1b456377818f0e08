"""Flags, YAML files and `--set` -> one checked configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tlbatch.errors import ConfigError, closest, line_of

Config = TypeVar("Config", bound=BaseModel)


def load(kind: type[Config], flags: Mapping[str, Any], file: Path | None = None, assignments: Sequence[str] = ()) -> Config:
    """Build a configuration from its three sources. Later ones win: the YAML file, the flags, `--set`.

    Raises:
        ConfigError: one sentence with the key, the value found and what to do.
    """
    values = _read_yaml(file) if file is not None else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write --set key=value.")
        values[name.strip().replace("-", "_")] = _parse(value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error, kind)) from None


def _parse(value: str) -> Any:
    """A value in YAML syntax; text that is not YAML, such as `*.jpg`, stays as it is."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} is not YAML: {line_of(error)}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file}: expected `key: value` lines, found a {type(values).__name__}.")
    return values


def _sentence(error: ValidationError, kind: type[BaseModel]) -> str:
    # A misspelled key also leaves the right name missing: report the misspelling.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"There is no configuration key {name!r}{closest(name, kind.model_fields)}."
    if first["type"] == "missing":
        return f"{name} is missing: give --{name.replace('_', '-')}, or {name} in the configuration file."
    reason = first["msg"].removeprefix("Value error, ")
    if name.startswith("storage_options"):
        return f"{name}: {reason}."  # what was found may be the secret itself
    return f"{name}: {reason}; found {first['input']!r}." if name else f"{reason}."
