"""The shipped files of the built-in world.

`python -m mech_absa.generate --out DIR --seed 0` rebuilds the files in `assets/world` byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import DataError, choices
from ..examples import Example
from .grammar import SPLITS, examples
from .lexicon import DOMAINS

SIZES = {"train": 1200, "test": 640}
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
    """Write the files `out/{domain}/{train,test}.jsonl`, the same bytes for the same seed.

    Returns:
        the paths of the files.
    """
    written = []
    for domain in DOMAINS:
        taken: set[str] = set()
        for split in SPLITS:
            items = examples(domain, split, SIZES[split], seed, without=taken)
            taken |= {e.sentence for e in items} | {
                c.sentence for e in items for c in e.counterfactuals
            }
            path = out / domain / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                "".join(json.dumps(record(e)) + "\n" for e in items), encoding="utf-8", newline="\n"
            )
            written.append(path)
    return written


def builtin_path(name: str) -> Path:
    """Return the shipped file of a name such as `restaurant/test`.

    Raises:
        DataError: there is no such file; the message lists the names.
    """
    known = [f"{d}/{s}" for d in DOMAINS for s in SPLITS]
    if name.removesuffix(".jsonl") not in known:
        raise DataError(f"no built-in examples {name!r}; there are {choices(known)}")
    return WORLD / f"{name.removesuffix('.jsonl')}.jsonl"
