"""A small run, its command line, and the numbers in its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ssm_retrieval.training import store
from synthetic.config import RunConfig

JSON_LINES = ("metrics.jsonl", "by_position.jsonl", "by_length.jsonl")
SMALL = RunConfig(
    seq_len=16,
    num_symbols=40,
    queries=8,
    curriculum=4,
    steps=24,
    eval_every=5,
    eval_examples=20,
    final_eval_examples=50,
    batch_tokens=256,
    precision="float32",
    d_state=4,
)


def command(config: RunConfig) -> list[str]:
    """The command line that says what differs from the defaults."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, dict):
            value = tuple(f"{name}={one}" for name, one in value.items())
        if value not in (field.default, ()):
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + field.name.replace("_", "-"), *map(str, values)]
    return words


def numbers(folder: Path) -> dict:
    """Everything a run reports except what the clock decides."""
    found = {name: store.read_rows(folder / name) for name in JSON_LINES}
    found["result"] = [store.read_json(folder / "result.json")]
    for rows in found.values():
        for row in rows:
            row.pop("seconds", None)
    found["weights"] = (folder / "model.safetensors").read_bytes()
    return found
