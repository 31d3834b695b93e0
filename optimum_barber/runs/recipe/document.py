"""A YAML file read strictly: YAML 1.2's plain values, line numbers, no aliases, no tags, no duplicate keys."""

import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ...base.errors import BarberError, unknown_name

LARGEST = 2**20  # bytes; a recipe is a page, not a data set
Path_ = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core schema: `2:4` is a string, not 124; `on` and `no` are strings too."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass
class Document:
    """The content of a YAML file, and the line of every value in it.

    Attributes:
        content: mappings, lists and plain values.
        lines: line, from 1, of each value by its path of keys and positions.
    """

    content: Any = None
    lines: dict[Path_, int] = field(default_factory=dict)

    def line(self, path: Path_) -> int | None:
        """The line of the value at `path`, or of the nearest value around it; None for what no line holds."""
        while path not in self.lines and path:
            path = path[:-1]
        return self.lines.get(path)


def read_document(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        BarberError: it is missing, too large, not UTF-8, not YAML, or uses what is refused; names the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BarberError(f"recipe {path} cannot be read: {error.strerror}") from None
    if len(raw) > LARGEST:
        raise BarberError(f"recipe {path} is {len(raw):,} bytes large; at most {LARGEST:,} are read")
    try:
        return parse_document(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise BarberError(f"recipe {path} is not UTF-8 (byte {error.start})") from None


def parse_document(text: str, name: str) -> Document:
    """Parse YAML text; see `read_document`."""
    document = Document()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            document.content = _value(loader, node, (), document.lines, set(), name)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BarberError(f"{name}:{line}: no YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise BarberError(f"{name}: no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise BarberError(f"{name}: nested too deeply") from None
    return document


def parse_value(text: str) -> Any:
    """One plain value as it would be read out of a recipe; raises BarberError where it is no YAML."""
    return parse_document(text, repr(text)).content


def _value(loader: _Loader, node: yaml.Node, path: Path_, lines: dict[Path_, int], seen: set[int], name: str) -> Any:
    line = lines[path] = node.start_mark.line + 1
    if id(node) in seen:
        raise BarberError(f"{name}:{line}: aliases are not allowed in a recipe; use variables")
    seen.add(id(node))
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in ("map", "seq", "str", "null", "bool", "int", "float"):
        raise BarberError(f"{name}:{line}: tag {node.tag!r} is not allowed in a recipe")
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path, lines, seen, name)
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*path, i), lines, seen, name) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


def _mapping(
    loader: _Loader, node: yaml.MappingNode, path: Path_, lines: dict[Path_, int], seen: set[int], name: str
) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise BarberError(f"{name}:{line}: a key must be a plain word")
        if key in mapping:
            raise BarberError(f"{name}:{line}: {key!r} is given twice")
        mapping[key] = _value(loader, value_node, (*path, key), lines, seen, name)
        lines[(*path, key)] = line
    return mapping


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that ships with the package.

    Raises:
        BarberError: neither; names the nearest shipped ones.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise BarberError(f"{unknown_name('recipe', name, shipped)}, or a YAML file")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    folder = Path(str(files("optimum_barber.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
