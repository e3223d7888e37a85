"""Run folders -> one page that opens from disk, and widgets for notebooks.

write_report(folder)        report.html, self-contained       (page.py; the folders are read by runs.py)
leave_report(folder)        the same at the end of a command: what goes wrong with a page loses no run
widgets                     coloured tokens and attention patterns by CircuitsVis, offline
"""

from .page import leave_report, write_report

__all__ = ["leave_report", "write_report"]
