"""Readers of official data set files; `vlm.data.registry.read(name, folder, split)` yields typed records."""
