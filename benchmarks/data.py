"""How fast the task generators are, beside the models that eat their batches.

    python -m benchmarks.data [--quick]

First it prints million tokens/s for lengths 16 to 16,384 in every layout, of the training split and of the
held-out split, whose contexts are redrawn about eight times, and the most memory that making a batch takes.
Then come the training tokens/s of this project's tiny models, by the loss and optimiser of
`synthetic.trainer`, and of transformers' GPT-NeoX of the same size on the same batches, each in float32 or in
bfloat16 autocast, whichever is faster. Batches are those of the default run, and freed memory is kept as
there. The last lines are ratios; with --quick the longest of a few short lengths stands for 1,024:

    ratio data_vs_transformer X         slowest layout at length 1,024 against transformer-tiny
    ratio data_vs_mamba X               ... against mamba-tiny
    ratio data_vs_model X               the smaller of the two above, and of the same at length 16
    ratio data_vs_transformers_lib X    ... against transformers' GPTNeoXForCausalLM
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import command, finish, machine, numpy_peak, parse, seconds
from ssm_retrieval.ops.memory import keep_freed_memory
from synthetic import tasks
from synthetic.config import RunConfig
from synthetic.curricula import MIN_ROWS
from synthetic.evaluate import autocast
from synthetic.tasks import Batch, Task

SYMBOLS = 1024  # at least; more where the context is longer
PAIRS = 64  # of mqar, or as many as the context has room for
LENGTHS = (16, 64, 256, 1024, 4096, 16384)


def make_task(name: str, length: int, layout: str) -> Task:
    """A task of the registry by its name, length and layout, with as many symbols as it needs."""
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
        for layout in (tasks.TASKS[name].layouts or ("-",))
    ]


def batches(task: Task, split: str) -> Callable[[], Batch]:
    """Makes another batch, with the default run's number of queries, at every call."""
    rows, queries, index = batch_size(task), task.dense_queries(), itertools.count()
    return lambda: task.batch(rows, seed=0, index=next(index), split=split, queries=queries)


def generator_speed(task: Task, split: str, repeats: int) -> float:
    """Time a generator on the thread that calls.

    Args:
        task: What makes the batches.
        split: "train" or "heldout".
        repeats: Batches that are timed.

    Returns:
        Tokens of `input_ids` a second.
    """
    make = batches(task, split)
    return make().input_ids.numel() / seconds({"": make}, repeats)[""]


def memory_table(lengths: tuple[int, ...]) -> None:
    """Print a row for every task and split, in the suffix layout."""
    print("\npeak memory of one batch, MiB")
    for name, split in itertools.product(tasks.names(), ("train", "heldout")):
        row = [numpy_peak(batches(make_task(name, n, "suffix"), split)) for n in lengths]
        print(f"{name:16} {split:8} {'suffix':12}" + "".join(f"{mib:9.2f}" for mib in row))


def generator_table(lengths: tuple[int, ...], repeats: int) -> dict[tuple[str, int], float]:
    """Print a row for every task, split and layout.

    Args:
        lengths: Columns of the table.
        repeats: Batches that are timed for each entry.

    Returns:
        The speeds of the task `position` in the training split, by (layout, length).
    """
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
    """Build a model of this project.

    Args:
        name: Its preset.
        vocab_size: Tokens it knows.
        table: Positions it has to know, if it has a table of them.

    Returns:
        The model, and its loss on a batch as `synthetic.trainer.update` computes it.
    """
    from ssm_retrieval import models

    options: dict[str, Any] = dict(vocab_size=vocab_size)
    if name.startswith("transformer"):
        options |= dict(position="learned", max_position_embeddings=table)
    model = models.build(name, **options)
    return model, lambda b: model.loss(b.input_ids, labels=b.labels, logits_at=b.answer_at)[0]


def library_model(vocab_size: int, table: int) -> tuple[nn.Module, Loss]:
    """The same with transformers' GPT-NeoX in the shape of transformer-tiny, by its fastest path on a CPU."""
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
    """Time training steps like those of `synthetic.trainer`.

    Args:
        model: What is trained.
        loss_of: Its loss on a batch.
        batch: The batch of every step.
        precision: "float32", or "bfloat16" for autocast.
        repeats: Steps that are timed.

    Returns:
        Tokens of `input_ids` a second.
    """
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
    """Print a row of training speeds for each model on `position` in the suffix layout.

    Args:
        length: Context symbols.
        repeats: Steps that are timed.

    Returns:
        Tokens a second by model, each in its faster precision.
    """
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
    """Run the benchmark."""
    full = dict(lengths=LENGTHS, compared=(1024, 16), repeats=21, steps=7)
    quick = dict(lengths=(16, 64), compared=(64, 16), repeats=1, steps=1)
    sizes = parse(command(__doc__), full, quick)
    keep_freed_memory()
    print(machine())
    generated = generator_table(sizes.lengths, sizes.repeats)
    memory_table(sizes.lengths)
    slowest = {n: min(generated[layout, n] for layout in tasks.LAYOUTS) for n in sizes.lengths}

    print("\ntraining steps, million tokens/s")
    ratios = {}
    for length in sizes.compared:
        for name, speed in model_speeds(length, sizes.steps).items():
            ratios[name, length] = slowest[length] / speed

    print()
    long = sizes.compared[0]
    ours = [ratio for (name, _), ratio in ratios.items() if name != "transformers_lib"]
    of_long = {f"data_vs_{name}": ratio for (name, n), ratio in ratios.items() if n == long}
    finish(sizes, of_long | {"data_vs_model": min(ours)})


if __name__ == "__main__":
    main()
