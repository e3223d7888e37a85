"""Reports of run folders as one page, and the same maps in notebooks.

write_report(folder)                 report.html, self-contained; several folders give a comparison
leave_report(folder)                 the same at the end of a command: a page that fails loses no run
importance_html  effects_html  selection_html      what notebooks show
"""

from .embed import effects_html, importance_html, selection_html
from .page import leave_report, write_report

__all__ = ["effects_html", "importance_html", "leave_report", "selection_html", "write_report"]
