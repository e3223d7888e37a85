"""Figures of traces and domain matrices, and the words that explain them.

    heatmap(map)  lines(map)  heads(map)     role x layer, curves over layers, head x layer
    example_map(effects, id)                 one prompt, word by word
    domains(table)                           accuracy for every training and test domain
    save(figure, path)                       PNG and PDF
    save_trace_figures(map, folder)          all figures of a trace

Every figure says what was measured, in which unit, on which model, from how many pairs, how runs
were corrupted and in which direction states were moved. No function here loads a model or imports
torch. Functions of one panel draw on the `ax` they are given, or on a figure of their own; all
return the figure, which shows itself in a notebook.

    style.py    look, colours, saving        words.py   corruption, direction and method in words
    layout.py   frames, titles, legends      cells.py   coloured cells and their marks
    trace.py    figures of a trace           domains.py the domain matrix
"""

from .domains import domains
from .style import (
    COLUMN,
    CYCLE,
    DIVERGING,
    FAINT,
    GRID,
    INK,
    PAGE,
    ROLE_STYLES,
    SOFT,
    Picture,
    save,
    style,
)
from .trace import example_map, heads, heatmap, lines, save_trace_figures
from .words import KIND_WORDS, SEPARATOR, corruption_words, direction_words, method_words, shown

__all__ = [
    "COLUMN",
    "CYCLE",
    "DIVERGING",
    "FAINT",
    "GRID",
    "INK",
    "KIND_WORDS",
    "PAGE",
    "ROLE_STYLES",
    "SEPARATOR",
    "SOFT",
    "Picture",
    "corruption_words",
    "direction_words",
    "domains",
    "example_map",
    "heads",
    "heatmap",
    "lines",
    "method_words",
    "save",
    "save_trace_figures",
    "shown",
    "style",
]
