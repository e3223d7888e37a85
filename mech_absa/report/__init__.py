"""Run folders -> one page that opens from disk, and widgets for notebooks.

write_report(folder)        report.html, self-contained       (page.py; the folders are read by runs.py)
widgets                     coloured tokens and attention patterns by CircuitsVis, offline
"""

from .page import write_report

__all__ = ["write_report"]
