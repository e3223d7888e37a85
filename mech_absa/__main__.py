"""`mech-absa COMMAND ...` is `python -m mech_absa.COMMAND ...`."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "patch": "trace: find the layers, tokens and components that carry the sentiment of an aspect",
    "train": "train a low-rank edit at chosen sites",
    "train.matrix": "train on each domain and test on all, for a list of methods and seeds",
    "evaluate": "score a model with an edit or without, and what the edit changed elsewhere",
    "verify": "the largest logit difference to Hugging Face",
    "report": "one page from the folders of several runs",
    "evaluate.card": "what the bundled model can do",
    "generate": "write the built-in reviews",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return (
        "usage: mech-absa COMMAND [FLAGS]\n\n"
        + "\n".join(lines)
        + "\n\nmech-absa COMMAND --help tells more."
    )


def main() -> int:
    """Run the command that the first argument names."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        print(
            f"mech-absa: unknown command {argv[0]!r}; accepted: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    name = f"mech_absa.{argv[0]}"
    sys.argv = [f"mech-absa {argv[0]}", *argv[1:]]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
