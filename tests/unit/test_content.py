"""Content by name and by path, and the options given to it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from longvila import content
from longvila.errors import ConfigError


def source(path: Path, text: str = "def samples():\n    yield 1\n") -> str:
    path.write_text(text)
    return str(path)


def test_every_name_loads_and_has_its_entry_function():
    for kind, function in content.ENTRIES.items():
        names = content.names(kind)  # type: ignore[arg-type]
        assert names
        for name in names:
            assert content.entry(kind, name).__name__ == function  # type: ignore[arg-type]


def test_helpers_beside_the_content_are_not_names_of_content():
    assert "scales" not in content.names("stages")
    assert content.load("stages", "scales").SCALES


def test_an_unknown_name_is_answered_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"no stage 'alignment'.*1_alignment, 2_pretraining"):
        content.load("stages", "alignment")


def test_a_file_without_the_entry_function_is_refused_by_name(tmp_path: Path):
    path = source(tmp_path / "empty.py", "x = 1\n")
    with pytest.raises(ConfigError, match=r"data source .*empty\.py does not define samples\(\)"):
        content.entry("data", path)


def test_a_path_loads_a_file_from_anywhere(tmp_path: Path):
    assert list(content.entry("data", source(tmp_path / "mine.py"))()) == [1]


def test_a_copy_of_a_file_finds_the_helpers_of_the_original(tmp_path: Path):
    for name in content.names("stages"):
        path = shutil.copy(content.folder("stages") / f"{name}.py", tmp_path / f"my-{name}.py")
        copy, original = (content.entry("stages", each)("tiny", tmp_path) for each in (str(path), name))
        assert copy == original


def test_a_missing_path_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there is no file .*mine\.py; data sources by name are: .*folder"):
        content.load("data", str(tmp_path / "mine.py"))


def test_a_file_of_ones_own_may_hold_dataclasses_with_postponed_annotations(tmp_path: Path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "@dataclass\nclass Film:\n    name: ClassVar[str] = 'x'\ndef samples():\n    yield Film()\n"
    )
    (film,) = content.entry("data", source(tmp_path / "films.py", text))()
    assert type(film).__module__ in sys.modules


def test_an_installed_wheel_finds_the_content_it_carries(tmp_path: Path):
    root = Path(content.__file__).parents[1]
    installed = tmp_path / "longvila"
    (installed / "_content").mkdir(parents=True)
    for name in ("__init__.py", "registration.py", "content.py", "config.py", "errors.py", "_content/__init__.py"):
        shutil.copy(root / "longvila" / name, installed / name)
    shutil.copytree(root / "eval", installed / "_content" / "eval")
    shutil.copytree(root / "stages", installed / "_content" / "stages")
    program = "from longvila import content; print(content.folder('eval'), *content.names('eval'))"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(installed / "_content" / "eval"), *content.names("eval")]


def options_of(*assignments: str) -> dict[str, Any]:
    def evaluation(
        out: Path,
        videos: Path,
        split: Literal["short", "long"] = "short",
        seed: int = 0,
        rate: float | None = None,
        swap: bool = False,
        depths: tuple[float, ...] = (),
        name: str = "",
    ) -> None: ...

    return content.options(evaluation, assignments)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("split=long", "long"),
        ("seed=7", 7),
        ("rate=0.5", 0.5),
        ("rate=none", None),
        ("swap=true", True),
        ("swap=false", False),
        ("depths=0,0.5,1", (0.0, 0.5, 1.0)),
        ("name=a=b,c", "a=b,c"),
    ],
)
def test_options_are_converted_by_annotation(assignment: str, value: Any):
    given = options_of("videos=films", assignment)
    assert given == {"videos": Path("films"), assignment.partition("=")[0]: value}
    assert type(given[assignment.partition("=")[0]]) is type(value)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["videos=x", "speed=1"], r"no option 'speed'; there are: videos, split, seed, rate, swap, depths, name"),
        (["videos=x", "out=y"], r"no option 'out'"),
        (["videos=x", "seed=one"], r"option 'seed' is 'one'; it must be int"),
        (["videos=x", "split=medium"], r"option 'split' is 'medium'; it must be one of: short, long"),
        (["videos=x", "swap=yes"], r"option 'swap' is 'yes'; it must be one of: true, false"),
        (["videos=x", "depths=0,b"], r"option 'depths' is 'b'; it must be float"),
        (["videos=x", "seed"], r"option 'seed' has no '='"),
        ([], r"option 'videos' is needed"),
    ],
)
def test_a_wrong_option_is_refused_with_the_way_out(assignments: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        options_of(*assignments)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "int"),
        (Path, "path"),
        (float | None, "float | none"),
        (Literal["a", "b"], "a | b"),
        (tuple[int, ...], "int,..."),
    ],
)
def test_annotations_are_described_in_words(annotation: Any, words: str):
    assert content.describe(annotation) == words
