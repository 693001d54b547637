"""Statistics, curves and figures from the tables that runs leave behind."""

from ssm_retrieval.training.tables import load

__all__ = ["load"]
