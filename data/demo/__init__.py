"""The demo source: long real videos whose content is known, so that a small model can be trained and judged on them.

Over real film (`backdrops`) a seeded script (`script`) lets coloured shapes cross the frame and numbers appear
(`draw`, `film`); captions, questions and texts (`questions`, `language`) follow from the script, and become training
samples (`training`) or an evaluation folder (`evaluation`). See README.md.

    longvila pack demo --out runs/demo/data/short -o split=short -o count=1200
    longvila pack demo --evaluation --out runs/demo/data/evaluation
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longvila.errors import ConfigError
from longvila.shards.sample import SourceSample

from .backdrops import load_backdrops
from .evaluation import write_film, write_needles
from .film import draw_frame
from .language import still_caption, texts
from .script import generator, still_script
from .training import LENGTHS, film_samples, image_samples, text_samples

__all__ = ["captioned_frames", "evaluation", "samples", "texts"]

CACHE = "runs/cache/demo"
SHORTEST_FILM = 4
AHEAD = 64  # items given to the threads at once, so that a slow reader does not fill the memory


def samples(
    split: Literal["images", "short", "medium", "long", "text", "long_text"],
    count: int,
    seed: int = 0,
    cache: str = CACHE,
    shortest: int | None = None,
    longest: int | None = None,
    threads: int = 2,
) -> Iterator[SourceSample]:
    """Training samples of one split, in the order of their index, each pure in (split, seed, index).

    Args:
        split: single pictures, films of three lengths, short conversations and texts, or long texts.
        count: pictures, films or texts. Two films of three give two samples each.
        seed: another seed gives other samples.
        cache: folder of the backdrops, filled on first use.
        shortest, longest: bounds of a film in seconds, or of a long text in words; None takes the split's own.
        threads: how many make films at the same time.

    Raises:
        ConfigError: bounds that leave no film. DataError: the film cannot be fetched.
    """
    low, high = LENGTHS.get(split, (SHORTEST_FILM, SHORTEST_FILM))
    lengths = (low if shortest is None else shortest, high if longest is None else longest)
    if not SHORTEST_FILM <= lengths[0] <= lengths[1]:
        raise ConfigError(
            f"split {split} from shortest={lengths[0]} to longest={lengths[1]}: shortest must be at least "
            f"{SHORTEST_FILM} and no more than longest"
        )
    makers = {"images": image_samples, "text": text_samples, "long_text": text_samples}
    if split not in ("text", "long_text"):
        load_backdrops(cache)  # once, before threads ask for them together
    make = partial(makers.get(split, film_samples), split=split, seed=seed, lengths=lengths, cache=cache)
    for made in _in_threads(make, count, threads):
        yield from made


def evaluation(
    out: Path,
    films: int = 200,
    captions: int = 60,
    needles: int = 48,
    haystack: int = 1500,
    seed: int = 0,
    cache: str = CACHE,
    threads: int = 2,
) -> None:
    """Writes the evaluation folder: videos/, subtitles/, videomme.json, captions.jsonl and needle/.

    Args:
        out: a new or empty folder.
        films: how many; half are short, three of ten medium, two of ten long, with three questions each.
        captions: how many of them, spread over all lengths, are also captioned.
        needles: needle images with a question each.
        haystack: frames of the haystack film, at 1 fps.
        seed, cache, threads: as in `samples`.

    Raises:
        ConfigError: the folder is not empty, or more captions than films are asked for.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give a new folder, or delete it to make the evaluation files again")
    if not 0 < captions <= films:
        raise ConfigError(f"captions is {captions}; it must be at least 1 and at most films, {films}")
    load_backdrops(cache)
    for folder in ("videos", "subtitles"):
        (out / folder).mkdir(parents=True)
    made = list(_in_threads(partial(write_film, out=out, seed=seed, cache=cache), films, threads))
    (out / "videomme.json").write_text(json.dumps([entry for entry, _ in made], indent=1))
    chosen = [made[k * films // captions][1] for k in range(captions)]
    (out / "captions.jsonl").write_text("".join(json.dumps(caption) + "\n" for caption in chosen))
    write_needles(out / "needle", seed, needles, haystack, cache)


def captioned_frames(seed: int, count: int, cache: Path | str = CACHE) -> Iterator[tuple[np.ndarray, str]]:
    """(uint8 (128, 128, 3) RGB picture, caption) pairs over training film, each pure in (seed, index)."""
    training, _ = load_backdrops(cache)
    for index in range(count):
        rng = generator("captioned", seed, index)
        script, time = still_script(rng)
        yield draw_frame(script, training.still(rng), time), still_caption(script, time, rng)


def _in_threads(make: Callable[[int], Any], count: int, threads: int) -> Iterator[Any]:
    """make(0), make(1), ... in order. Threads are enough: most of the time goes to the encoder, outside the GIL."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, AHEAD):
            yield from pool.map(make, range(start, min(start + AHEAD, count)))
