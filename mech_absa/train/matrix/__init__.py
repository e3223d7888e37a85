"""Every domain against every domain; see `run.py`."""

from .run import ZERO_SHOT, Domain, Grid, Method, domain_name, run_matrix, summary

__all__ = ["ZERO_SHOT", "Domain", "Grid", "Method", "domain_name", "run_matrix", "summary"]
