"""train.matrix."""

from .run import ZERO_SHOT, Domain, Method, check, domain_name, n_trainings, run_matrix, summary

__all__ = [
    "ZERO_SHOT",
    "Domain",
    "Method",
    "check",
    "domain_name",
    "n_trainings",
    "run_matrix",
    "summary",
]
