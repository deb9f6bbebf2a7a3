"""Reading a config: YAML and overrides in, a validated :class:`Config` out, every fault in one readable line."""

import difflib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from longctx.config.document import Document, Dumper, KeyPath, dotted, read_document
from longctx.config.schema import Config, Section
from longctx.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and validate a config file.

    Args:
        path: a YAML file. Relative paths inside it are relative to the working directory.
        overrides: ``section.key=value`` texts, values read as YAML; the last one of a key wins.

    Raises:
        ConfigError: with one line per fault, each naming the key, where it was written and what is accepted.
    """
    config, faults = find_errors(path, overrides)
    if config is None:
        raise ConfigError("\n".join(faults))
    return config


def find_errors(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config | None, list[str]]:
    """The config, or None and every fault of the file and the overrides, one line each."""
    try:
        return validate(read_document(path, overrides))
    except ConfigError as error:
        return None, str(error).splitlines()


def validate(document: Document) -> tuple[Config | None, list[str]]:
    """The config of a document, or None and its faults, one line each, in the order of the schema."""
    try:
        return Config.model_validate(document.values), []
    except ValidationError as error:
        faults = [dict(fault) for fault in error.errors(include_url=False)]
        return None, [_explain(document, fault) for fault in faults if not _is_echo(fault, faults)]


def dump_config(config: Config) -> str:
    """YAML of the resolved config; :func:`load_config` reads it back to an equal object.

    Defaults without effect (see ``Section.idle``) are left out: they would read as settings that were chosen.
    """
    return yaml.dump(_effective(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> str:
    """JSON schema of a config file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)


def _effective(section: Section) -> dict[str, Any]:
    values = section.model_dump(mode="json", exclude=section.idle().keys() - section.model_fields_set)
    for name in values:
        value = getattr(section, name)
        if isinstance(value, Section):
            values[name] = _effective(value)
        elif isinstance(value, tuple):
            items = zip(value, values[name], strict=True)
            values[name] = [_effective(item) if isinstance(item, Section) else plain for item, plain in items]
    return values


def _is_echo(fault: dict[str, Any], faults: list[dict[str, Any]]) -> bool:
    """A list that is "too short" only because its items are faulty themselves."""
    path: KeyPath = fault["loc"]
    inside = (other["loc"] for other in faults if other is not fault)
    return fault["type"] == "too_short" and any(other[: len(path)] == path for other in inside)


def _explain(document: Document, fault: dict[str, Any]) -> str:
    path: KeyPath = fault["loc"]
    return f"{document.where(path)}: {_reason(path, fault)}"


def _reason(path: KeyPath, fault: dict[str, Any]) -> str:
    kind, key = fault["type"], dotted(path)
    if kind == "extra_forbidden":
        return _unknown(path)
    if kind == "missing":
        field = _section(path[:-1]).model_fields.get(str(path[-1]))
        about = f" ({field.description})" if field and field.description else ""
        return f"{key} is missing{about}"
    if kind == "model_type":
        keys = ", ".join(_section(path).model_fields)
        return f"{key} is {_short(fault['input'])} but should be a section with keys: {keys}"
    if kind == "literal_error":
        return f"{key} is {fault['input']!r}; choices: {fault['ctx']['expected']}"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "value_error":
        return f"{key}: {message}"
    return f"{key} is {_short(fault['input'])} but {message}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(path: KeyPath) -> str:
    """An unknown key with the nearest valid one: first in its own section, then anywhere by the same name."""
    key, name = dotted(path), str(path[-1])
    siblings = list(_section(path[:-1]).model_fields)
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        return f"{key} is no valid key; did you mean {dotted((*path[:-1], near[0]))}?"
    elsewhere = [dotted(other) for other in _all_keys(Config, ()) if other[-1] == name]
    if elsewhere:
        return f"{key} is no valid key; did you mean {' or '.join(elsewhere)}?"
    return f"{key} is no valid key; valid here: {', '.join(siblings)}"


def _section(path: KeyPath) -> type[BaseModel]:
    """The schema class at a path."""
    here: type[BaseModel] = Config
    for part in path:
        if isinstance(part, str):
            inner = _model_in(here.model_fields[part].annotation)
            assert inner is not None, path
            here = inner
    return here


def _all_keys(section: type[BaseModel], prefix: KeyPath) -> typing.Iterator[KeyPath]:
    for name, field in section.model_fields.items():
        inner = _model_in(field.annotation)
        index = (0,) if typing.get_origin(field.annotation) is tuple else ()
        yield (*prefix, name)
        if inner is not None:
            yield from _all_keys(inner, (*prefix, name, *index))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section class inside ``X``, ``X | None`` or ``tuple[X, ...]``, if there is one."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    found = (_model_in(part) for part in typing.get_args(annotation))
    return next((section for section in found if section is not None), None)
