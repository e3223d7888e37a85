"""Write the tables of `figures/`, ours beside the paper's, as Markdown and as LaTeX.

`published.csv` holds the paper's Tables 2 and 3: Li, Wang, Zhao, Zhang and Li, "Exploring Model
Editing for LLM-based Aspect-Based Sentiment Classification", AAAI 2025 (arXiv 2503.15117). They are
accuracies in percent, means of three runs without a spread. The model is Llama-2-7b unless another
is named; the data are four domains of reviews. The row `average` is copied as printed.

Our numbers are means over seeds with the standard deviation over seeds, of the accuracy in a cell
and of the average in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

PUBLISHED = Path(__file__).parent / "published.csv"
NONE = "–"

DOMAINS = ("device", "laptop", "rest", "service")
"""The paper's names of the domains. Its `rest` is `restaurant` among the built-in reviews."""
PRINTED = tuple(
    (a, b) for a in DOMAINS for b in DOMAINS if a != b and {a, b} != {"device", "laptop"}
)
"""The ten (train, test) of the paper's Table 3, in its order."""
UNPRINTED = (("device", "laptop"), ("laptop", "device"))

PRESETS = {
    "both": "both parts", "lora_o": "weight part (LoRA on W_O)", "loreft": "LoReFT", "lora": "LoRA", "dora": "DoRA", "prefix": "PrefixFT",
    "adapter": "Adapter", "bitfit": "BitFit", "red": "RED", "full": "full fine-tuning", "noreft": "NoReFT", "direft": "DiReFT",
}  # fmt: skip
PLACES = {
    "sites": "traced layers", "first": "first layers", "last": "last layers", "middle": "middle layers", "random": "random layers",
    "all": "all layers",
}  # fmt: skip


def name_of(method: str) -> str:
    """`both@sites` in words: `both parts, traced layers`."""
    if method == "zero_shot":
        return "zero-shot"
    preset, _, where = method.partition("@")
    return f"{PRESETS.get(preset, preset)}, {PLACES.get(where, f'layers {where}')}"


# ---- a table -------------------------------------------------------------------------------------

_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "ρ": r"$\rho$", "≥": r"$\geq$", "<": r"$<$", ">": r"$>$", "·": r"$\cdot$",
        "→": r"$\rightarrow$",
    }
)  # fmt: skip


def tex(text: str) -> str:
    """Escape text so that LaTeX prints it unchanged."""
    return text.translate(_TEX)


@dataclass(frozen=True)
class Table:
    """A table of texts, in blocks with one title each.

    Attributes:
        caption: what it shows and where it comes from.
        label: of the LaTeX table.
        header: of the columns; the first is of the row names.
        blocks: (title, rows); an empty title is not printed.
    """

    caption: str
    label: str
    header: tuple[str, ...]
    blocks: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

        lines = [line(self.header), line(["---", *["---:"] * (len(self.header) - 1)])]
        for title, rows in self.blocks:
            lines += [line([f"**{title}**", *[""] * (len(self.header) - 1)])] * bool(title)
            lines += [line(row) for row in rows]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """Return the table in LaTeX; the document needs the package `booktabs`."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(map(tex, cells)) + r" \\"

        lines = [
            r"\begin{table}",
            r"\centering",
            r"\small",
            rf"\caption{{{tex(self.caption)}}}",
            rf"\label{{{self.label}}}",
        ]
        lines += [
            rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}",
            r"\toprule",
            line(self.header),
        ]
        for title, rows in self.blocks:
            lines.append(r"\midrule")
            lines += [
                rf"\multicolumn{{{len(self.header)}}}{{l}}{{\emph{{{tex(title)}}}}} \\"
            ] * bool(title)
            lines += [line(row) for row in rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


# ---- Tables 2 and 3 ------------------------------------------------------------------------------


def ours(matrix: pd.DataFrame) -> pd.DataFrame:
    """Return rows of a matrix.csv with the paper's names of the domains."""
    return matrix.replace({"train": {"restaurant": "rest"}, "test": {"restaurant": "rest"}})


def over_seeds(rows: pd.DataFrame, metric: str = "accuracy") -> tuple[float, float]:
    """Return mean and standard deviation over seeds of each seed's mean; NaN if there is one seed."""
    by_seed = rows.groupby("seed")[metric].mean()
    return float(by_seed.mean()), float(by_seed.std(ddof=1)) if len(by_seed) > 1 else float("nan")


def spelled(mean: float, sd: float) -> str:
    """Format shares as percent with one decimal, such as `98.7 ± 0.4`."""
    if np.isnan(mean):
        return NONE
    return f"{100 * mean:.1f}" + ("" if np.isnan(sd) else f" ± {100 * sd:.1f}")


def _cells(rows: pd.DataFrame, groups: Sequence[pd.Series]) -> list[str]:
    return [spelled(*over_seeds(rows[chosen])) if chosen.any() else NONE for chosen in groups]


def _own_block(
    matrix: pd.DataFrame, cells: Callable[[pd.DataFrame], list[str]]
) -> tuple[tuple[str, ...], ...]:
    """Return one row per method, in the table's order: name, trained share, cells."""
    made = []
    for method, rows in ours(matrix).groupby("method", sort=False):
        share = float(rows["share"].max())
        made.append((name_of(str(method)), f"{100 * share:.3f}" if share else NONE, *cells(rows)))
    return tuple(made)


def published(table: int) -> pd.DataFrame:
    """Return the paper's Table 2 or 3."""
    rows = pd.read_csv(PUBLISHED, keep_default_na=False)
    return rows[rows["table"] == table]


def _printed_block(table: int, wanted: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    made = []
    for method, rows in published(table).groupby("method", sort=False):
        found = {(r["train"], r["test"]): f"{float(r['accuracy']):.1f}" for _, r in rows.iterrows()}
        made.append(
            (
                str(method),
                rows["trained_percent"].iloc[0] or NONE,
                *(found.get(pair, NONE) for pair in wanted),
            )
        )
    return tuple(made)


PAPER_BLOCK = "Published (Li et al. 2025): Llama-2-7b unless named, the paper's data"


def table_2(sources: Sequence[tuple[str, pd.DataFrame]], caption: str) -> Table:
    """Make the table of in-domain accuracy, the paper's rows first.

    Args:
        sources: (title, rows of a matrix.csv). Edits count on the domain they were trained on, the
            unedited model on every domain.
        caption: describes the runs.
    """

    def cells(rows: pd.DataFrame) -> list[str]:
        inside = rows[rows["in_domain"].astype(bool) | (rows["method"] == "zero_shot")]
        return _cells(
            inside, [inside["test"] == d for d in DOMAINS] + [inside["test"].isin(DOMAINS)]
        )

    blocks = [
        (PAPER_BLOCK, _printed_block(2, [*((d, d) for d in DOMAINS), ("average", "average")]))
    ]
    blocks += [(title, _own_block(matrix, cells)) for title, matrix in sources]
    header = ("method", "% trained", "Device", "Laptop", "Rest", "Service", "avg")
    return Table(caption, "tab:in-domain", header, tuple(blocks))


def table_3(sources: Sequence[tuple[str, pd.DataFrame]], caption: str) -> Table:
    """Make the table of out-of-domain accuracy.

    The ten pairs that the paper printed come first, with their average, then the other two.
    """

    def cells(rows: pd.DataFrame) -> list[str]:
        pairs = pd.Series(
            list(zip(rows["train"], rows["test"], strict=True)), index=rows.index, dtype=object
        )
        return _cells(
            rows,
            [
                *(pairs == pair for pair in PRINTED),
                pairs.isin(PRINTED),
                *(pairs == pair for pair in UNPRINTED),
            ],
        )

    blocks = [(PAPER_BLOCK, _printed_block(3, [*PRINTED, ("average", "average"), *UNPRINTED]))]
    blocks += [
        (title, _own_block(matrix[matrix["method"] != "zero_shot"], cells))
        for title, matrix in sources
    ]

    def letters(pair: tuple[str, str]) -> str:
        return f"{pair[0][0].upper()},{pair[1][0].upper()}"

    header = ("method", "% trained", *map(letters, PRINTED), "avg of 10", *map(letters, UNPRINTED))
    return Table(caption, "tab:out-of-domain", header, tuple(blocks))


# ---- tables that the paper lacks -----------------------------------------------------------------


def significance(
    maps: Sequence[tuple[str, pd.DataFrame]], caption: str, level: float = 0.05
) -> Table:
    """Count the cells of each map that differ from 0 after correction, one row per kind of state.

    Args:
        maps: (title, an importance.csv).
    """
    blocks = []
    for title, table in maps:
        rows = []
        for kind, cells in table.groupby("kind", sort=False):
            tested = cells[cells["p"].notna()]
            clear, apart = (
                tested["p_adjusted"] < level,
                (tested["ci_low"] > 0) | (tested["ci_high"] < 0),
            )
            positive = tested[clear]["aie"] > 0
            rows.append(
                (
                    str(kind),
                    *map(
                        str,
                        (
                            len(cells),
                            len(tested),
                            int(apart.sum()),
                            int(clear.sum()),
                            int(positive.sum()),
                        ),
                    ),
                )
            )
        blocks.append((title, tuple(rows)))
    header = (
        "kind",
        "cells",
        "tested",
        "interval excludes 0",
        f"adjusted p < {level:g}",
        "of these positive",
    )
    return Table(caption, "tab:significance", header, tuple(blocks))
