"""How fast the task generators are, beside the models that eat their batches.

    python -m benchmarks.data [--quick]

Prints million tokens/s for lengths 16 to 16,384 in every layout (training split, and held-out split,
whose contexts are redrawn about eight times) and the memory a batch takes at most while it is made;
then the training tokens/s of this project's tiny models, by the loss and optimiser of `synthetic.trainer`,
and of transformers' GPT-NeoX of the same size on the same batches, each in its faster of float32 and bfloat16
autocast; and last one line a ratio. Batches are those of the default run, and freed memory is kept as there.

    ratio data_vs_transformer X         slowest layout at length 1,024 against transformer-tiny
    ratio data_vs_mamba X               ... against mamba-tiny
    ratio data_vs_model X               the smaller of the two above, and of the same at length 16
    ratio data_vs_transformers_lib X    ... against transformers' GPTNeoXForCausalLM
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import machine, numpy_peak, seconds
from ssm_retrieval.ops.memory import keep_freed_memory
from synthetic import tasks
from synthetic.config import RunConfig
from synthetic.evaluate import autocast
from synthetic.tasks import Batch, Task
from synthetic.trainer import MIN_ROWS

SYMBOLS = 1024  # at least; more where the context is longer
PAIRS = 64  # of mqar, or as many as the context has room for
LENGTHS = (16, 64, 256, 1024, 4096, 16384)


def make_task(name: str, length: int, layout: str) -> Task:
    options: dict[str, Any] = dict(seq_len=length, num_symbols=max(SYMBOLS, length), layout=layout, blocks=2)
    if "num_pairs" in tasks.options(name):
        options["num_pairs"] = min(PAIRS, length // 4)
    return tasks.build(name, **{k: v for k, v in options.items() if k in tasks.options(name)})


def batch_size(task: Task) -> int:
    """Sequences in a batch of the default run at full length."""
    return max(MIN_ROWS, RunConfig.batch_tokens // task.max_length(task.dense_queries()))


def kinds() -> list[tuple[str, str, str]]:
    """Every (task, split, layout); tasks without layouts once."""
    return [
        (name, split, layout)
        for name, split in itertools.product(tasks.names(), ("train", "heldout"))
        for layout in (tasks.LAYOUTS if "layout" in tasks.options(name) else ("-",))
    ]


def batches(task: Task, split: str) -> Callable[[], Batch]:
    """Makes another batch, with the default run's number of queries, at every call."""
    rows, queries, index = batch_size(task), task.dense_queries(), itertools.count()
    return lambda: task.batch(rows, seed=0, index=next(index), split=split, queries=queries)


def generator_speed(task: Task, split: str, repeats: int) -> float:
    """Tokens of input_ids made a second, on the thread that calls."""
    make = batches(task, split)
    return make().input_ids.numel() / seconds({"": make}, repeats)[""]


def memory_table(lengths: tuple[int, ...]) -> None:
    """Prints a row for every task and split, suffix layout."""
    print("\npeak memory of one batch, MiB")
    for name, split in itertools.product(tasks.names(), ("train", "heldout")):
        row = [numpy_peak(batches(make_task(name, n, "suffix"), split)) for n in lengths]
        print(f"{name:16} {split:8} {'suffix':12}" + "".join(f"{mib:9.2f}" for mib in row))


def generator_table(lengths: tuple[int, ...], repeats: int) -> dict[tuple[str, int], float]:
    """Prints a row for every task, split and layout; returns the speeds of `position`, train split, by
    (layout, length)."""
    speeds: dict[tuple[str, int], float] = {}
    print("generators, million tokens/s")
    print(f"{'task':16} {'split':8} {'layout':12}" + "".join(f"{n:>9}" for n in lengths))
    for name, split, layout in kinds():
        row = [generator_speed(make_task(name, n, layout), split, repeats) for n in lengths]
        print(f"{name:16} {split:8} {layout:12}" + "".join(f"{speed / 1e6:9.2f}" for speed in row))
        if (name, split) == ("position", "train"):
            speeds |= {(layout, n): speed for n, speed in zip(lengths, row, strict=True)}
    return speeds


Loss = Callable[[Batch], torch.Tensor]


def our_model(name: str, vocab_size: int, table: int) -> tuple[nn.Module, Loss]:
    """This project's model `name` and its loss on a batch, as `synthetic.trainer.update` computes it."""
    from ssm_retrieval import models

    options: dict[str, Any] = dict(vocab_size=vocab_size)
    if name.startswith("transformer"):
        options |= dict(position="learned", max_position_embeddings=table)
    model = models.build(name, **options)
    return model, lambda b: model.loss(b.input_ids, labels=b.labels, logits_at=b.answer_at)[0]


def library_model(vocab_size: int, table: int) -> tuple[nn.Module, Loss]:
    """The same by transformers' GPT-NeoX with the shape of transformer-tiny, its fastest CPU path."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=table,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPTNeoXForCausalLM(config)

    def loss(batch: Batch) -> torch.Tensor:
        logits = model(batch.input_ids).logits[:, batch.answer_at]
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())

    return model, loss


def step_speed(model: nn.Module, loss_of: Loss, batch: Batch, precision: str, repeats: int) -> float:
    """Tokens of input_ids trained on a second, by the optimiser steps of `synthetic.trainer`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        with autocast("cpu", precision):
            loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), RunConfig.grad_clip)
        optimizer.step()
        return loss.item()

    return batch.input_ids.numel() / seconds({"": step}, repeats, warmup=2)[""]


def model_speeds(length: int, repeats: int) -> dict[str, float]:
    """Training tokens/s of each consumer on `position`, suffix layout; prints a row each."""
    task = make_task("position", length, "suffix")
    batch, table = batches(task, "train")(), task.max_length(task.dense_queries())
    builders = {
        "transformer": lambda: our_model("transformer-tiny", task.vocab_size, table),
        "mamba": lambda: our_model("mamba-tiny", task.vocab_size, table),
        "transformers_lib": lambda: library_model(task.vocab_size, table),
    }
    speeds: dict[str, float] = {}
    for name, build in builders.items():
        try:
            model, loss_of = build()
        except ImportError as error:
            print(f"{name:18} skipped: {error}")
            continue
        for precision in ("float32", "bfloat16"):
            speed = step_speed(model, loss_of, batch, precision, repeats)
            print(f"{name:18} length {length:5} {precision:10} {speed / 1e6:9.4f}")
            speeds[name] = max(speed, speeds.get(name, 0.0))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description="Generator tokens/s against the models' tokens/s.")
    parser.add_argument("--quick", action="store_true", help="fewer lengths and repeats")
    quick = parser.parse_args().quick
    lengths = (16, 1024) if quick else LENGTHS
    keep_freed_memory()
    print(machine())
    generated = generator_table(lengths, repeats=5 if quick else 21)
    memory_table(lengths)
    slowest = {n: min(generated[layout, n] for layout in tasks.LAYOUTS) for n in lengths}

    print("\ntraining steps, million tokens/s")
    ratios = {}
    for length in (1024, 16):
        for name, speed in model_speeds(length, repeats=3 if quick else 7).items():
            ratios[name, length] = slowest[length] / speed

    print()
    for name in ("transformer", "mamba", "transformers_lib"):
        if (name, 1024) in ratios:
            print(f"ratio data_vs_{name} {ratios[name, 1024]:.1f}")
    ours = [ratio for (name, _), ratio in ratios.items() if name != "transformers_lib"]
    if ours:
        print(f"ratio data_vs_model {min(ours):.1f}")


if __name__ == "__main__":
    main()
