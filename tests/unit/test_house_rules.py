"""Rules of the house that a reader relies on, kept by a test instead of a wish."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = [path.parent for path in sorted(ROOT.glob("longvila/*/__init__.py")) if path.parent.name != "_content"]
TOP = [ROOT / name for name in ("longvila", "data", "stages", "eval", "scripts", "tests")]
SCRIPTS = [*sorted(ROOT.glob("scripts/*.sh")), ROOT / ".ci" / "run"]
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:home|root|work|mnt|Users|scratch|opt)/\w")


def in_project(path: Path) -> str:
    return str(path.relative_to(ROOT))


def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", TOP, ids=in_project)
def test_every_folder_explains_itself(folder: Path):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) > 30


def test_every_folder_of_the_machinery_is_a_package():
    folders = {path.parent for path in (ROOT / "longvila").rglob("*.py")}
    assert [in_project(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_every_module_opens_with_what_it_is_for():
    modules = [path for folder in ("longvila", "data", "stages", "eval") for path in (ROOT / folder).rglob("*.py")]
    assert [in_project(path) for path in modules if not ast.get_docstring(syntax(path))] == []


def test_every_required_package_is_imported():
    # Through others: TensorBoard by torch.utils.tensorboard, torchvision by open_clip, which takes any version of it.
    used = {"tensorboard", "torchvision"}
    owners = packages_distributions()
    for folder in ("longvila", "data", "stages", "eval"):
        for node in (node for path in (ROOT / folder).rglob("*.py") for node in ast.walk(syntax(path))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
            used.update(package.lower().replace("_", "-") for n in names for package in owners.get(n.split(".")[0], []))
    required = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = [re.split(r"[<>=]", requirement)[0].lower().replace("_", "-") for requirement in required]
    assert [name for name in names if name not in used] == []


def test_the_library_never_prints():
    calls = [
        f"{in_project(path)}:{node.lineno}"
        for path in (ROOT / "longvila").rglob("*.py")
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def test_no_file_holds_the_path_of_a_machine():
    found = []
    files = [path for folder in (*TOP, ROOT / ".ci") for path in folder.rglob("*")]
    for path in [*files, *ROOT.glob("*.md"), *ROOT.glob("*.toml")]:
        if path.suffix in (".py", ".sh", ".md", ".toml", ".html", ".json", ""):
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            found += [f"{in_project(path)}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize("script", SCRIPTS, ids=in_project)
def test_scripts_run_and_parse(script: Path):
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_every_stage_has_its_script():
    numbered = sorted(path.stem for path in (ROOT / "stages").glob("[0-9]_*.py"))
    assert numbered == sorted(path.stem for path in (ROOT / "scripts").glob("[0-9]_*.sh"))
    order = re.findall(r"\d_\w+", (ROOT / "scripts" / "train_all.sh").read_text(encoding="utf-8"))
    assert order == numbered


def test_the_readme_names_every_folder_and_script():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [folder.name for folder in (*TOP, *PACKAGES) if f"{folder.name}/" not in text] == []
    assert [path.name for path in SCRIPTS if path.name not in text and path.stem[0] not in "12345"] == []
