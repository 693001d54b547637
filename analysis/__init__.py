"""Statistics, curves and figures from the tables that runs leave behind."""
