"""Five ways to grow a context, compared."""
