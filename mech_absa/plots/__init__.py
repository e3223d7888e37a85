"""plots."""

from .plots import ROLE_STYLES, corruption_words, direction_words, method_words, save_trace_figures

__all__ = [
    "ROLE_STYLES",
    "corruption_words",
    "direction_words",
    "method_words",
    "save_trace_figures",
]
