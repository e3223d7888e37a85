"""Hand-made files to read."""

from __future__ import annotations

import pytest


@pytest.fixture
def write(tmp_path):
    """Write text, or bytes, to a file of this name; gives its path as a string."""

    def writer(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return writer
