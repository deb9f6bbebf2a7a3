"""A YAML file plus dotted overrides, as plain values that remember where each of them was written.

YAML is read with the rules of YAML 1.2 for plain words (``3e-4`` is a number, ``no`` and ``2024-01-01`` are text),
and without its dangerous or surprising parts: duplicate keys, aliases and tags are refused by line.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from longctx.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""Where a value lies: ``("data", "sources", 0, "path")``."""

_FLOAT = re.compile(
    r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN)$"
)
_PLAIN = "tag:yaml.org,2002:"
_TAGS = {_PLAIN + name for name in ("str", "int", "float", "bool", "null", "map", "seq")}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (yaml's own attribute)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not supported; write the value out", mark
            )
        return super().compose_node(parent, index)


for _name, _pattern, _first in [
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
]:
    _Loader.add_implicit_resolver(_PLAIN + _name, _pattern, _first)


class Dumper(yaml.SafeDumper):
    """Writes YAML that this module reads back to the same values: text that looks like a number is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: Dumper, text: str) -> yaml.Node:
    # Unquoted or in single quotes, YAML reads these as line breaks.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_PLAIN + "str", text, style=style)


Dumper.add_representer(str, _represent_text)
Dumper.add_implicit_resolver(_PLAIN + "float", _FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Document:
    """Plain values and their origins.

    ``origins`` maps a key path to ``file:line`` or ``override 'a.b=c'``.
    """

    name: str
    values: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Origin of a key, or of the innermost section around it that was written, or the file itself."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.name


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a YAML file and apply ``key.sub.0.name=value`` overrides to it, the last one winning.

    Raises:
        ConfigError: the file cannot be read or parsed, or an override is malformed. One line per fault.
    """
    document = _read_file(Path(path))
    faults = []
    for override in overrides:
        try:
            _apply(document, override)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return document


def _read_file(path: Path) -> Document:
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    values, lines = _parse(text, str(path))
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise ConfigError(f"{path}: {found}; a config is a mapping with the keys run, data, sequence, train, ...")
    return Document(str(path), values, {key: f"{path}:{line}" for key, line in lines.items()})


def _parse(text: str, name: str) -> tuple[Any, dict[KeyPath, int]]:
    """Values of one YAML text and the line of each key."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        faults: list[str] = []
        lines = dict(_walk(node, (), name, faults))
        if faults:
            raise ConfigError("\n".join(faults))
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{name}: not valid YAML: nested too deeply") from None


def _walk(node: yaml.Node, path: KeyPath, name: str, faults: list[str]) -> Iterator[tuple[KeyPath, int]]:
    """Yield the line of every key and list item; collect duplicate keys, keys that are no text, and tags."""
    if node.tag not in _TAGS:
        faults.append(f"{name}:{node.start_mark.line + 1}: {dotted(path)}: the YAML tag {node.tag!r} is not supported")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from _walk(item, (*path, index), name, faults)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != _PLAIN + "str":
            text = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            faults.append(f"{name}:{line}: the key {text} must be text; put quotes around it")
            continue
        inner = (*path, key.value)
        if key.value in seen:
            faults.append(f"{name}:{line}: {dotted(inner)} is given twice; first on line {seen[key.value]}")
        seen.setdefault(key.value, line)
        yield inner, line
        yield from _walk(value, inner, name, faults)


def _apply(document: Document, override: str) -> None:
    key, equals, text = override.partition("=")
    name = f"override {override!r}"
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{name}: write it as section.key=value, for example train.lr=3e-4")
    value, _ = _parse(text, name)
    path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    _set(document.values, path, value, name)
    for old in [old for old in document.origins if old[: len(path)] == path]:
        del document.origins[old]
    document.origins[path] = name


def _set(values: dict[str, Any], path: KeyPath, value: Any, name: str) -> None:
    """Put ``value`` at ``path``, making the sections and the next list item on the way."""
    here: Any = values
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        fresh = value if last else ([] if isinstance(path[depth + 1], int) else {})
        if isinstance(here, list) and isinstance(part, int):
            if part > len(here):
                raise ConfigError(f"{name}: {dotted(path[:depth])} has {len(here)} items; the next one is {len(here)}")
            if part == len(here):
                here.append(fresh)
        elif isinstance(here, dict):
            part = str(part)
            if here.get(part) is None:
                here[part] = fresh
        else:
            kind = "a list; give the number of an item" if isinstance(here, list) else f"{here!r}, which has no keys"
            raise ConfigError(f"{name}: {dotted(path[:depth])} is {kind}")
        if last:
            here[part] = value
        here = here[part]


def dotted(path: KeyPath) -> str:
    """``data.sources.0.path``; the empty path is the whole document."""
    return ".".join(map(str, path)) or "the document"
