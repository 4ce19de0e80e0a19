"""Where the content folders `data/`, `stages/` and `eval/` are found, as one package.

An installed wheel carries them inside this folder; in a checkout they lie at its top, and this package looks there.
Machinery never imports from here: `longvila/content.py` loads one file by name when the user asks for it.
"""

from pathlib import Path

_folder = Path(__file__).parent
if not (_folder / "stages").is_dir():
    __path__ = [str(_folder.parents[1])]
