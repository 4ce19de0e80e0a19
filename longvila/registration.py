"""Tells transformers about longvila's architecture: after `import longvila`, `AutoModel.from_pretrained` knows it.

Registering needs the model's class, and so torch and transformers, which `import longvila` must not load: the command
line would take seconds to print its help. So it waits for transformers: where that is loaded already, the model is
registered at once; otherwise right after someone loads it. Either way it is there before anybody can ask for it.

(Code beside the weights, `auto_map`, would do without this, but asks everyone who loads for `trust_remote_code=True`.)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_transformers() -> None:
    """Registers the architecture now, or as soon as transformers has been imported."""
    if "transformers" in sys.modules:
        _register()
    elif not any(isinstance(finder, _WaitForTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForTransformers())


def _register() -> None:
    """The module that defines the architecture registers it. Nothing happens where that is being imported already."""
    import_module("longvila.model")


class _WaitForTransformers(MetaPathFinder):
    """Finds transformers as the other finders do, and adds one call behind the execution of its module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        # Being found is not being imported: many only ask whether transformers is there.
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = execute_and_register
        return spec
