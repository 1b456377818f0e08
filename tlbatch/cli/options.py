"""A configuration class -> the flags of a command. A field's description is its help, so each help text stands once."""

from __future__ import annotations

import inspect
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tlbatch.config import Images, Pretrained, Resources

#: Fields that are set in a file, or with --set: mappings, and what a verb decides.
_WITHOUT_FLAG = frozenset({"storage_options", "other_bundles", "predictions"})
#: Fields of these classes have a panel of their own in the help of a command with many flags.
_PANELS: Sequence[tuple[type[BaseModel], str]] = (
    (Images, "Images"),
    (Pretrained, "Base"),
    (Resources, "Resources (change only the speed)"),
)

#: What every verb takes: name (not that of a field), annotation and default.
COMMON: Sequence[tuple[str, Any, Any]] = (
    (
        "config_file",
        Annotated[Path | None, typer.Option("--config", metavar="FILE.yaml", help="Read settings from a YAML file.")],
        None,
    ),
    (
        "assignments",
        Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any setting by its name; repeatable.")
        ],
        None,
    ),
    ("as_json", Annotated[bool, typer.Option("--json", metavar="", help="Print the result as one JSON object.")], False),
)
VERBOSE: tuple[str, Any, Any] = (
    "verbose",
    Annotated[bool, typer.Option("--verbose", metavar="", help="Show the log of tlbatch and of Ray.")],
    False,
)


def parameters_of(
    config: type[BaseModel], positional: Collection[str], *, repeatable: Collection[str] = (), verbose: bool = False
) -> list[inspect.Parameter]:
    """The parameters of a command: positional ones first, then a flag per field, then those of every verb.

    Args:
        config: the configuration class.
        positional: fields given without a flag.
        repeatable: fields of one value that the command accepts several times.
        verbose: whether the command takes --verbose.
    """
    fields = {name: field for name, field in config.model_fields.items() if _has_flag(name, field)}
    names = [*positional, *(name for name in fields if name not in positional)]
    found = []
    for name in names:
        # What a command reads is always written behind it; the rest may come from a file.
        required = name in positional and name != "model"
        annotation = _annotated(config, name, fields[name], name in positional, name in repeatable)
        found.append(_parameter(name, annotation, inspect.Parameter.empty if required else None))
    return found + [_parameter(*one) for one in (*COMMON, *((VERBOSE,) if verbose else ()))]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _has_flag(name: str, field: FieldInfo) -> bool:
    fixed = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
    return name not in _WITHOUT_FLAG and not fixed


def _annotated(config: type[BaseModel], name: str, field: FieldInfo, positional: bool, repeatable: bool) -> Any:
    plain = list[str] if repeatable else _plain(field.annotation)
    if positional:
        metavar = "URL" if name == "output" else name.upper()
        return Annotated[str | None, typer.Argument(metavar=metavar, help=field.description, show_default=False)]
    flag = name.rstrip("_").replace("_", "-")  # `as_` is Python's way to write `as`
    option = typer.Option(
        f" /--no-{flag}" if field.default is True else f"--{flag}",
        metavar=_METAVARS.get(plain, "TEXT"),
        help=_help(field),
        show_default=False,
        rich_help_panel=_panel(config, name),
    )
    return Annotated[plain | None, option]


#: What stands for a value in the help.
_METAVARS: Mapping[Any, str] = {bool: "", int: "N", float: "X"}


def _help(field: FieldInfo) -> str:
    """The field's description, its choices, and its default unless the description says it."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    words = [field.description or ""]
    if choices and not any(str(choice) in words[0] for choice in choices[1:]):
        words.append(f"One of {', '.join(map(str, choices))}.")
    if isinstance(field.default, str | int | float) and not isinstance(field.default, bool) and field.default != "":
        words.append(f"Default: {field.default}.")
    return " ".join(words)


def _panel(config: type[BaseModel], name: str) -> str | None:
    return next((panel for owner, panel in _PANELS if issubclass(config, owner) and name in owner.model_fields), None)


def _plain(annotation: Any) -> type:
    """The type that the command line parses; the configuration checks the rest."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(arguments[0])
    if origin in (Union, types.UnionType):
        return _plain(next(one for one in arguments if one is not type(None)))
    if origin is Literal:
        return str
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return list[str]
    return annotation if annotation in (bool, int, float) else str
