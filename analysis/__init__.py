"""Statistics, curves and figures from the tables that runs leave behind."""

from analysis.tables import load

__all__ = ["load"]
