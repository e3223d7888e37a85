"""The shipped files of the built-in world.

`python -m mech_absa.generate --out DIR --seed 0` rebuilds the files in `assets/world` byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import DataError, choices
from ..examples import Example
from .grammar import SPLITS, examples
from .harder import harder_examples
from .lexicon import DOMAINS

SIZES = {"train": 1200, "test": 640}
VERSIONS = {"": examples, "v2": harder_examples}
"""Version -> what writes its examples; the first has no name, so that its files keep theirs."""
WORLD = Path(__file__).parents[1] / "assets" / "world"


def record(example: Example) -> dict[str, object]:
    """Return an example as the record of one JSON line of the shipped files."""

    def bare(e: Example) -> dict[str, object]:
        assert e.span is not None and e.opinion is not None
        return {
            "from": e.span[0],
            "to": e.span[1],
            "polarity": e.polarity.value,
            "opinion": list(e.opinion),
        }

    return {
        "text": example.sentence, "aspect": example.aspect, **bare(example), "domain": example.domain, "id": example.id,
        "counterfactuals": [{"text": c.sentence, **bare(c)} for c in example.counterfactuals],
    }  # fmt: skip


def write_world(out: Path, seed: int = 0) -> list[Path]:
    """Write `out/{domain}/{train,test}.jsonl` and `out/v2/...`, the same bytes for the same seed.

    Returns:
        the paths of the files.
    """
    written = []
    for version, write in VERSIONS.items():
        for domain in DOMAINS:
            taken: set[str] = set()
            for split in SPLITS:
                items = write(domain, split, SIZES[split], seed, without=taken)
                taken |= {e.sentence for x in items for e in (x, *x.counterfactuals)}
                path = out / version / domain / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = "".join(json.dumps(record(e)) + "\n" for e in items)
                path.write_text(lines, encoding="utf-8", newline="\n")
                written.append(path)
    return written


def builtin_path(name: str) -> Path:
    """Return the shipped file of a name such as `restaurant/test` or `v2/restaurant/test`.

    Raises:
        DataError: there is no such file; the message lists the names.
    """
    bare = name.removesuffix(".jsonl")
    known = [f"{d}/{s}" for d in DOMAINS for s in SPLITS]
    if bare.removeprefix("v2/") not in known:
        also = "; with v2/ before it, of the second version"
        raise DataError(f"no built-in examples {name!r}; there are {choices(known)}{also}")
    return WORLD / f"{bare}.jsonl"
