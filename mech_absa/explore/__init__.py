"""The explorer: a page on this machine that traces a review while you look, and trains small edits.

    mech-absa explore            from a terminal
    ma.explore(model)            from a notebook

| file | what |
|---|---|
| `state` | what the page shows, as a link that opens it again |
| `ask` | a state -> the clean and the corrupted run, and the probability of every label |
| `live` | the exact map, told in parts as the engine finishes them |
| `edits` | sites by the written rule, a small edit trained while you look, base against edited |
| `again` | the command, the Python code and the data that make a map again |
| `session` | one thread that owns the model; browsers take turns |
| `guard` | who may use it |
| `routes` | what is served |
| `server` | the explorer as an object |
| `page` | the page; its maps are those of the report |
"""

import sys
from types import ModuleType
from typing import Any

from .server import Explorer, explore

__all__ = ["Explorer", "explore"]


class _Callable(ModuleType):
    """`ma.explore(model)` is the function, `python -m mech_absa.explore` the command, and both have one name."""

    def __call__(self, *args: Any, **options: Any) -> Explorer:
        return explore(*args, **options)


sys.modules[__name__].__class__ = _Callable
