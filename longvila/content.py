"""Content by name or by path: the small files of `data/`, `stages/` and `eval/`, and the options given to them.

A content file is a Python module (or a package, when it needs more than a file) with one entry function, named in
`ENTRIES`. The name of its file is its name on the command line; the path of a `.py` file anywhere serves as well, so
that content of your own needs no change here.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from longvila.errors import ConfigError

Kind = Literal["data", "stages", "eval"]

ENTRIES: dict[str, str] = {"data": "samples", "stages": "config", "eval": "requests"}
"""The function that makes a file content of its kind. A file without it (`stages/base.py`) helps the others."""

GIVEN: dict[str, str] = {"evaluation": "out", "requests": "data"}
"""The one parameter of these functions that the verb passes itself; all others are options."""

NOUNS: dict[str, str] = {"data": "data source", "stages": "stage", "eval": "benchmark"}

PACKAGE = "longvila._content"


def folder(kind: Kind) -> Path:
    """The folder that holds the content of one kind: the checkout's, or the copy inside an installed wheel."""
    return Path(importlib.import_module(PACKAGE).__path__[0]) / kind


def names(kind: Kind) -> list[str]:
    """Names of the content of one kind, sorted. Files are parsed, not imported: this is quick."""
    files = [*folder(kind).glob("*.py"), *folder(kind).glob("*/__init__.py")]
    return sorted(_name(path) for path in files if _defines(path, ENTRIES[kind]))


def load(kind: Kind, name: str) -> ModuleType:
    """The module called `name`, or at the path `name` when it ends in `.py`.

    Raises:
        ConfigError: when there is no such file; the message lists the names there are.
    """
    if name.endswith(".py"):
        return _load_path(kind, Path(name))
    if not any((folder(kind) / path).is_file() for path in (f"{name}.py", f"{name}/__init__.py")):
        raise ConfigError(
            f"there is no {NOUNS[kind]} '{name}' in {folder(kind)}; there are: {', '.join(names(kind)) or 'none'}; "
            "a path that ends in .py is taken as well"
        )
    return importlib.import_module(f"{PACKAGE}.{kind}.{name}")


def entry(kind: Kind, name: str, function: str | None = None) -> Callable[..., Any]:
    """The entry function of one content file, or its `function`. Raises ConfigError when either does not exist."""
    module = load(kind, name)
    function = function or ENTRIES[kind]
    if not hasattr(module, function):
        raise ConfigError(f"the {NOUNS[kind]} {module.__file__} does not define {function}()")
    return getattr(module, function)


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a content function that options may set."""
    hints = typing.get_type_hints(function)
    return {
        name: parameter.replace(annotation=hints.get(name, str))
        for name, parameter in inspect.signature(function).parameters.items()
        if name != GIVEN.get(function.__name__)
    }


def options(function: Callable[..., Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Keyword arguments from `key=value` texts, converted by the annotations of `function`.

    Raises:
        ConfigError: for an unknown or missing option (those there are get named) or a value of another type.
    """
    known = parameters(function)
    listing = ", ".join(known) or "none"
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"option '{assignment}' has no '='; write KEY=VALUE")
        if name not in known:
            raise ConfigError(f"there is no option '{name}'; there are: {listing}")
        values[name] = convert(known[name].annotation, text, name)
    missing = [name for name, p in known.items() if p.default is p.empty and name not in values]
    if missing:
        raise ConfigError(f"option '{missing[0]}' is needed: -o {missing[0]}=...; all options: {listing}")
    return values


def convert(annotation: Any, text: str, name: str) -> Any:
    """The value that `text` stands for under a type annotation; lists and tuples are separated by commas.

    Raises:
        ConfigError: when `text` is not of that type; the message says what the option takes.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in arguments:
            return None
        annotation = next(kind for kind in arguments if kind is not type(None))
        return convert(annotation, text, name)
    if origin in (tuple, list):
        return origin(convert(arguments[0], item, name) for item in text.split(",") if item)
    choices = {"true": True, "false": False} if annotation is bool else {str(value): value for value in arguments}
    if choices:
        if text not in choices:
            raise ConfigError(f"option '{name}' is '{text}'; it must be one of: {', '.join(choices)}")
        return choices[text]
    try:
        return annotation(text)
    except ValueError:
        raise ConfigError(f"option '{name}' is '{text}'; it must be {describe(annotation)}") from None


def describe(annotation: Any) -> str:
    """A type annotation in the words of the command line: `int`, `A | B`, `int,int,...`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (tuple, list):
        return f"{describe(arguments[0])},..."
    if origin in (typing.Union, types.UnionType):
        return " | ".join("none" if kind is type(None) else describe(kind) for kind in arguments)
    return annotation.__name__.lower()


def _load_path(kind: Kind, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; {NOUNS[kind]}s by name are: {', '.join(names(kind))}")
    importlib.import_module(f"{PACKAGE}.{kind}")
    name = f"{PACKAGE}.{kind}.user_{path.stem}"  # a copy of a file finds the helpers beside it, as the file did
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a .py file always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles inside the file look their module up by name
    spec.loader.exec_module(module)
    return module


def _name(path: Path) -> str:
    return path.parent.name if path.stem == "__init__" else path.stem


def _defines(path: Path, function: str) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)
