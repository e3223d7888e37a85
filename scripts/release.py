"""Prepare a release: `python scripts/release.py 0.2.0`.

Sets the version in mech_absa/__init__.py and CITATION.cff, requires its section in docs/changelog.md, runs `make test`, builds the wheel,
commits, and creates the tag. Uploads and pushes nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r"\d+\.\d+\.\d+")
PLACES = {
    "mech_absa/__init__.py": re.compile(r'(?m)^__version__ = "([^"]+)"$'),
    "CITATION.cff": re.compile(r"(?m)^version: (\S+)$"),
}


def with_version(text: str, pattern: re.Pattern[str], version: str) -> str:
    """Return the text with the one version that `pattern` finds replaced.

    Raises:
        ValueError: the pattern occurs never, or more than once.
    """
    matches = list(pattern.finditer(text))
    if len(matches) != 1:
        raise ValueError(f"{len(matches)} lines name the version; one is needed")
    start, end = matches[0].span(1)
    return text[:start] + version + text[end:]


def check(version: str, changelog: str, status: str) -> str | None:
    """Return why the version cannot be released, or None."""
    if not VERSION.fullmatch(version):
        return f"the version is {version!r}; three numbers such as 0.2.0 are accepted"
    if not re.search(rf"(?m)^## {re.escape(version)}$", changelog):
        return f"docs/changelog.md has no section '## {version}'; write one first"
    if status.strip():
        return "the working tree has changes; commit them first"
    return None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="three numbers, such as 0.2.0")
    version = parser.parse_args(argv).version

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    changelog = (ROOT / "docs/changelog.md").read_text(encoding="utf-8")
    if (problem := check(version, changelog, run("git", "status", "--porcelain"))) is not None:
        print(problem, file=sys.stderr)
        return 2
    for name, pattern in PLACES.items():
        path = ROOT / name
        text = with_version(path.read_text(encoding="utf-8"), pattern, version)
        path.write_text(text, encoding="utf-8")
    run("make", "test")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", "dist", ".")
    if run("git", "status", "--porcelain", *PLACES):
        run("git", "commit", "--message", f"Version {version}", *PLACES)
    run("git", "tag", "--annotate", f"v{version}", "--message", f"Version {version}")
    print(f"dist/ holds version {version}, and the tag v{version} is set; nothing was pushed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
