"""A traced ranking of heads and MLPs, judged on other reviews: `python -m figures.circuit
--importance DIR/sites.json --out DIR`.

The ranking is that of a trace's `importance.csv`. For `faithfulness.csv` its cells are kept apart
by role (the first head of layer 3 at the aspect in the question is one component, the same head
elsewhere another); for `pruning.csv` a head or an MLP is as important as its best role, and is
removed at all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mech_absa.commands.cli import command
from mech_absa.edits import load_edit
from mech_absa.errors import DataError
from mech_absa.evaluate.faithfulness import faithfulness
from mech_absa.evaluate.pruning import prune
from mech_absa.model import load_model
from mech_absa.patch.pairs import Counterfactual, make_pairs
from mech_absa.patch.traced import cell_site
from mech_absa.readers import load_examples
from mech_absa.records import RunFolder
from mech_absa.sites import Site

KINDS = ("head", "mlp_out")


@dataclass(frozen=True)
class Config:
    """Judge a traced ranking: the answer that its best components give alone, and what is left
    without its worst.
    """

    importance: Path
    """The importance.csv of a trace with heads and MLPs (or its sites.json, beside which it lies)."""
    data: str = "builtin:laptop/test"
    """Other reviews than those that were traced."""
    limit: int | None = 100
    """Pairs that are run with parts of the ranking."""
    examples: int | None = 320
    """Examples that are answered with components removed."""
    randoms: int = 5
    """Random orders, for comparison."""
    seed: int = 0
    """Of the random orders and the bootstrap."""
    out: Path = Path("runs/circuit")
    """A new or empty folder."""
    resume: bool = False
    """Take up the killed run that --out holds."""
    quiet: bool = False
    """Print nothing but errors."""


def ranking(table: pd.DataFrame, by_role: bool) -> list[tuple[Site, float]]:
    """(component, AIE) of all heads and MLPs, with their roles or at their best.

    Args:
        table: an importance.csv.
    """
    table = table[table["kind"].isin(KINDS)]
    if not by_role:
        table = table.groupby(["kind", "layer", "head"], sort=False)["aie"].max().reset_index()
    roles = table["role"] if by_role else [None] * len(table)
    return [
        (cell_site(kind, layer, head, role), float(aie))
        for kind, layer, head, role, aie in zip(
            table["kind"], table["layer"], table["head"], roles, table["aie"], strict=True
        )
    ]


def main(config: Config) -> None:
    path = config.importance.with_name("importance.csv")
    if not path.exists():
        raise DataError(
            f"{path}: there is no such file; the importance.csv of a trace with heads and MLPs is needed"
        )
    table = pd.read_csv(path)
    said = {k: v for k, v in vars(config).items() if k not in ("resume", "quiet", "out")}
    folder = RunFolder(config.out, said, resume=config.resume)
    if folder.finished:
        return
    base = load_model()
    model = load_edit("bundled", base).merged(base)
    examples = load_examples(config.data)
    pairs = make_pairs(model, examples, Counterfactual(), limit=config.limit)
    folder.open()
    curve = faithfulness(
        model, pairs, ranking(table, by_role=True), randoms=config.randoms, seed=config.seed
    )
    drawn = examples if config.examples is None else examples.sample(config.examples)
    pruned = prune(
        model, list(drawn), ranking(table, by_role=False), randoms=config.randoms, seed=config.seed
    )
    folder.write("faithfulness.csv", lambda p: curve.to_pandas().to_csv(p, index=False))
    folder.write("pruning.csv", lambda p: pruned.to_pandas().to_csv(p, index=False))
    areas = {name: vars(getattr(curve, name)) for name in ("cpr", "cmd")}
    folder.finish(
        {
            "model": {"name": model.name, "sha256": model.sha256, "adapter": "bundled"},
            "data": examples.account(),
            "pairs": {"considered": pairs.considered, "kept": len(pairs), "dropped": pairs.dropped},
            "components": {"by_role": len(curve.sites), "removable": len(pruned.removed)},
            "faithfulness": {
                "protocol": curve.protocol,
                "mode": curve.mode,
                "metric": curve.metric,
                **areas,
                "random_cpr": curve.random_cpr.tolist(),
            },
            "pruning": {"how": pruned.how, "examples": len(drawn)},
        }
    )


if __name__ == "__main__":
    raise SystemExit(command(Config, main, "python -m figures.circuit"))
