"""Experiments: each folder holds a config in code, the results it gave, and what follows from them."""
