"""How fast the task generators are, beside the models that eat their batches.

    python -m benchmarks.data [--quick]

Prints million tokens/s for lengths 16 to 16,384 in every layout (training split, and held-out split,
whose contexts are redrawn about eight times) and the memory a batch takes at most while it is made;
then the training tokens/s of this project's tiny models and of transformers' GPT-NeoX of the same size on
the same batches, each in its faster of float32 and bfloat16 autocast; and last one line a ratio:

    ratio data_vs_transformer X         slowest layout at length 1,024 against transformer-tiny
    ratio data_vs_mamba X               ... against mamba-tiny
    ratio data_vs_model X               the smaller of the two above, and of the same at length 16
    ratio data_vs_transformers_lib X    ... against transformers' GPTNeoXForCausalLM
"""

from __future__ import annotations

import argparse
import itertools
import time
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from synthetic import tasks
from synthetic.tasks import Batch, Task

TOKENS = 8192  # context tokens a batch, as in the default job
SYMBOLS = 1024  # at least; more where the context is longer
QUERIES = 64  # as in the default job, or one a context symbol where the context is shorter
LENGTHS = (16, 64, 256, 1024, 4096, 16384)


def make_task(name: str, length: int, layout: str) -> Task:
    options: dict[str, Any] = dict(seq_len=length, num_symbols=max(SYMBOLS, length), layout=layout)
    if "num_pairs" in tasks.options(name):
        options["num_pairs"] = min(QUERIES, length // 4)
    return tasks.build(name, **{k: v for k, v in options.items() if k in tasks.options(name)})


def query_count(task: Task) -> int:
    return max(task.usual_queries(), min(QUERIES, task.max_queries()))


def kinds() -> list[tuple[str, str, str]]:
    """Every (task, split, layout); tasks without layouts once."""
    return [
        (name, split, layout)
        for name, split in itertools.product(tasks.names(), ("train", "heldout"))
        for layout in (tasks.LAYOUTS if "layout" in tasks.options(name) else ("-",))
    ]


def seconds(call: Callable[[int], object], repeats: int, warmup: int = 2) -> float:
    """Median wall time of call(i), i = 0, 1, ..."""
    times = []
    for i in range(warmup + repeats):
        started = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - started)
    return sorted(times[warmup:])[repeats // 2]


def generator_speed(task: Task, length: int, split: str, repeats: int) -> float:
    """Tokens of input_ids made a second, on the thread that calls."""
    rows = max(1, TOKENS // length)
    queries = query_count(task)

    def make(index: int) -> Batch:
        return task.batch(rows, seed=0, index=index, split=split, queries=queries)

    return make(0).input_ids.numel() / seconds(make, repeats)


def peak_memory(task: Task, length: int, split: str) -> float:
    """MiB allocated at most while one batch is made, the batch included (NumPy reports to tracemalloc)."""
    rows, queries = max(1, TOKENS // length), query_count(task)
    tracemalloc.start()
    task.batch(rows, seed=0, index=0, split=split, queries=queries)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def memory_table(lengths: tuple[int, ...]) -> None:
    """Prints a row for every task and split, suffix layout."""
    print("\npeak memory of one batch, MiB")
    for name, split in itertools.product(tasks.names(), ("train", "heldout")):
        row = [peak_memory(make_task(name, n, "suffix"), n, split) for n in lengths]
        print(f"{name:16} {split:8} {'suffix':12}" + "".join(f"{mib:9.2f}" for mib in row))


def generator_table(lengths: tuple[int, ...], repeats: int) -> dict[tuple[str, int], float]:
    """Prints a row for every task, split and layout; returns the speeds of `position`, train split, by
    (layout, length)."""
    speeds: dict[tuple[str, int], float] = {}
    print(f"generators, million tokens/s, {TOKENS} context tokens a batch, up to {QUERIES} queries a row")
    print(f"{'task':16} {'split':8} {'layout':12}" + "".join(f"{n:>9}" for n in lengths))
    for name, split, layout in kinds():
        row = [generator_speed(make_task(name, n, layout), n, split, repeats) for n in lengths]
        print(f"{name:16} {split:8} {layout:12}" + "".join(f"{speed / 1e6:9.2f}" for speed in row))
        if (name, split) == ("position", "train"):
            speeds |= {(layout, n): speed for n, speed in zip(lengths, row, strict=True)}
    return speeds


def our_model(name: str, vocab_size: int, table: int) -> Callable[[Batch], torch.Tensor]:
    """A training step's logits at the scored places, by this project's model `name`."""
    import models

    options: dict[str, Any] = dict(vocab_size=vocab_size)
    if name.startswith("transformer"):
        options |= dict(position="learned", max_position_embeddings=table)
    model = models.build(name, **options)
    return trained(model.parameters(), lambda b: model(b.input_ids, logits_at=b.answer_at))


def library_model(vocab_size: int, table: int) -> Callable[[Batch], torch.Tensor]:
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
    return trained(model.parameters(), lambda b: model(b.input_ids).logits[:, b.answer_at])


def trained(
    parameters: Iterable[nn.Parameter], logits: Callable[[Batch], torch.Tensor]
) -> Callable[[Batch], torch.Tensor]:
    """One AdamW step on a batch; returns its loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step(batch: Batch) -> torch.Tensor:
        loss = F.cross_entropy(logits(batch).flatten(0, 1).float(), batch.labels.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def step_speed(
    step: Callable[[Batch], torch.Tensor], batch: Batch, dtype: torch.dtype, repeats: int
) -> float:
    """Tokens of input_ids trained on a second, bfloat16 meaning autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return batch.input_ids.numel() / seconds(lambda _: step(batch), repeats)


def model_speeds(length: int, repeats: int) -> dict[str, float]:
    """Training tokens/s of each consumer on `position`, suffix layout; prints a row each."""
    task = make_task("position", length, "suffix")
    queries = min(QUERIES, length)
    batch = task.batch(max(1, TOKENS // length), seed=0, index=0, queries=queries)
    table = task.max_length(queries)
    builders = {
        "transformer": lambda: our_model("transformer-tiny", task.vocab_size, table),
        "mamba": lambda: our_model("mamba-tiny", task.vocab_size, table),
        "transformers_lib": lambda: library_model(task.vocab_size, table),
    }
    speeds: dict[str, float] = {}
    for name, build in builders.items():
        try:
            step = build()
        except ImportError as error:
            print(f"{name:18} skipped: {error}")
            continue
        for dtype in (torch.float32, torch.bfloat16):
            speed = step_speed(step, batch, dtype, repeats)
            print(f"{name:18} length {length:5} {str(dtype)[6:]:10} {speed / 1e6:9.4f}")
            speeds[name] = max(speed, speeds.get(name, 0.0))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description="Generator tokens/s against the models' tokens/s.")
    parser.add_argument("--quick", action="store_true", help="fewer lengths and repeats")
    quick = parser.parse_args().quick
    lengths = (16, 1024) if quick else LENGTHS
    generated = generator_table(lengths, repeats=5 if quick else 21)
    memory_table(lengths)
    slowest = {n: min(generated[layout, n] for layout in tasks.LAYOUTS) for n in lengths}

    print(f"\ntraining steps, million tokens/s, {torch.get_num_threads()} threads")
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
