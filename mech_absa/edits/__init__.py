"""Low-rank edits of a frozen model, and everything they are compared with."""

from .base import LLAMA_2_7B, Block, Intervention, Matrix, Part, Shape, parse_place
from .edit import FAMILIES, Edit, count
from .merge import export_peft, merge
from .record import HeadChoice, TrainingRecord
from .store import load_edit, save_edit

__all__ = [
    "FAMILIES",
    "LLAMA_2_7B",
    "Block",
    "Edit",
    "HeadChoice",
    "Intervention",
    "Matrix",
    "Part",
    "Shape",
    "TrainingRecord",
    "count",
    "export_peft",
    "load_edit",
    "merge",
    "parse_place",
    "save_edit",
]
