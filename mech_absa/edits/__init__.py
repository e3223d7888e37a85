"""Low-rank edits of a frozen model, and everything they are compared with."""

from .base import LLAMA_2_7B, Block, Intervention, Matrix, Part, Shape, parse_place
from .edit import FAMILIES, Edit, count
from .store import load_edit, save_edit

__all__ = [
    "FAMILIES",
    "LLAMA_2_7B",
    "Block",
    "Edit",
    "Intervention",
    "Matrix",
    "Part",
    "Shape",
    "count",
    "load_edit",
    "parse_place",
    "save_edit",
]
