"""List the licences of everything that an installation holds: `python scripts/licences.py`.

Prints a Markdown table of the package's dependencies, direct and indirect, from the metadata that lies
beside each installed package. Nothing is fetched.
"""

from __future__ import annotations

import importlib.metadata as metadata
import re
import sys

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def normal(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(root: str) -> dict[str, metadata.Distribution]:
    """Return the installed packages that `root` needs without its extras, by name.

    Raises:
        PackageNotFoundError: `root` is not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    todo = [root]
    while todo:
        name = normal(todo.pop())
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if name == normal(root):
                raise
            continue  # for another system or version of Python
        for line in found[name].requires or ():
            requirement, _, marker = line.partition(";")
            if "extra" not in marker and (match := NAME.match(requirement.strip())):
                todo.append(match[0])
    return found


def licence(package: metadata.Distribution) -> str:
    """Return what a package says of its licence: the expression, the classifier, or the first line."""
    about = package.metadata
    classified = [
        c.rpartition(" :: ")[2]
        for c in about.get_all("Classifier") or []
        if c.startswith("License ::")
    ]
    free = (about.get("License") or "").strip().splitlines()
    return (
        about.get("License-Expression") or ", ".join(classified) or (free or ["not said"])[0][:60]
    )


def main() -> int:
    """Print the table."""
    print("| package | version | licence |\n|---|---|---|")
    rows = [
        f"| {name} | {package.version} | {licence(package)} |"
        for name, package in sorted(needed("mech-absa").items())
    ]
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
