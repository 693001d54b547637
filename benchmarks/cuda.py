"""Our operators and models on a GPU: errors, time, memory, and how far they are from what must be moved.

    python -m benchmarks.cuda [--quick] [--presets mamba-130m ...] [--json cuda.json]
    python -m benchmarks.cuda --table cuda.json     the Markdown tables of docs/gpu.md
    python -m benchmarks.cuda --selfcheck           the whole program on a CPU, in tiny sizes: does it work?

Three routes are compared, those that are there: the kernels of mamba-ssm and causal-conv1d, our kernels in
Triton, and plain PyTorch ("chunks"). For every preset and operator, in float32 and bfloat16: each result's
error against the float64 reference and its limit, which is derived, not chosen (benchmarks/gpu/operators.py);
then time, peak memory and the time of the memory floor, the bytes that must move over the bandwidth of a copy
on the same device. For every preset: tokens/s of a training step and of decoding. Everything is written to
one JSON, with the versions and the device.
Exit status 0; 1 if an error exceeds its limit; 2 without a GPU or for a wrong option.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command, parse
from benchmarks.gpu import measure, operators, presets, table
from benchmarks.gpu.operators import BACKENDS, OPERATORS
from ssm_retrieval import models, ops
from ssm_retrieval.errors import UserError
from ssm_retrieval.training.store import read_json, write_json

PRESETS = [
    *("mamba-130m", "mamba-370m", "mamba-1.4b", "mamba-2.8b"),
    *("mamba2-130m", "mamba2-2.7b", "gated-deltanet-1.3b"),
]
NO_GPU = (
    "error: benchmarks.cuda measures a GPU, but torch.cuda.is_available() is False; run it on a machine with "
    "a GPU and torch's build for it, or try --selfcheck"
)
FULL: dict[str, Any] = dict(
    presets=PRESETS, batches=[1, 8], length=2048, compared=256, new=64, copied=2**30, overrides={},
    least=0.05, repeats=5, dtypes=(torch.float32, torch.bfloat16), json=Path("cuda.json"),
)  # fmt: skip
QUICK = dict(presets=["mamba-130m", "mamba2-130m"], batches=[1], length=256, compared=70, new=8, copied=2**26)
TINY = dict(  # for Triton's interpreter, which takes every number by itself
    presets=["mamba-tiny", "mamba2-tiny", "gated-deltanet-tiny"], batches=[1], length=9, compared=9, new=1,
    copied=2**16, least=0.0, repeats=1, overrides=dict(d_model=8, n_layer=1, vocab_size=16, d_state=2),
)  # fmt: skip
HEADS = dict(headdim=8)  # of tiny models that have some


def config_of(preset: str, sizes: argparse.Namespace) -> Any:
    """A preset's config, in the tiny shape of a self-check."""
    heads = HEADS if sizes.overrides and not preset.startswith("mamba-") else {}
    return models.config(preset, **sizes.overrides, **heads)


def operator_rows(preset: str, name: str, device: str, sizes: argparse.Namespace) -> list[dict[str, Any]]:
    """Errors, time and memory of an operator in a preset's shapes.

    Args:
        preset: The model.
        name: Of the operator.
        device: Where it runs.
        sizes: Of the benchmark.

    Returns:
        A row for each route and batch; `why` in place of numbers where a route cannot run.
    """
    config, rows = config_of(preset, sizes), []
    for route in BACKENDS:
        why = measure.missing(route, OPERATORS[name].package)
        if why is not None:
            rows += [dict(route=route, batch=batch, why=why) for batch in sizes.batches]
            continue
        compared = measure.attempt(partial(compare, name, config, route, device, sizes), device)
        for batch in sizes.batches:
            timed = measure.attempt(partial(time_operator, name, config, route, batch, device, sizes), device)
            rows.append(dict(route=route, batch=batch) | compared | timed)
    for row in rows:
        bytes_ = operators.moved(name, config, row["batch"], sizes.length, torch.bfloat16)
        floor = {part: number / sizes.bandwidth for part, number in bytes_.items()}
        row |= dict(
            preset=preset, operator=name, length=sizes.length, floor_bytes=bytes_, floor_seconds=floor
        )
    return rows


def compare(name: str, config: Any, route: str, device: str, sizes: argparse.Namespace) -> dict[str, Any]:
    """Compare an operator with the float64 reference.

    Args:
        name: Of the operator.
        config: Of the model whose shapes it has.
        route: How it runs.
        device: Where.
        sizes: Of the benchmark.

    Returns:
        In `errors`, by "<dtype> <result>", its `error` and its `limit`; None in place of NaN and infinity.
    """
    found: dict[str, dict[str, float | None]] = {}
    states = route != "mamba-ssm"  # whose kernels return no chosen states
    for dtype in sizes.dtypes:
        given = operators.make_inputs(name, config, 2, sizes.compared, dtype, device, states)
        want, limits = operators.compare(name, given, states, operators.roundoff_of(name, dtype, route))
        with ops.backend(BACKENDS[route]):
            got = operators.errors(operators.forward_and_backward(name, given, states), want)
        for key, error in got.items():
            pair = dict(error=error, limit=limits[key])
            found[f"{str(dtype)[6:]} {key}"] = {k: x if math.isfinite(x) else None for k, x in pair.items()}
    return {"errors": found}


def time_operator(
    name: str, config: Any, route: str, batch: int, device: str, sizes: argparse.Namespace
) -> dict[str, Any]:
    """Time an operator in bfloat16.

    Args:
        name: Of the operator.
        config: Of the model whose shapes it has.
        route: How it runs.
        batch: Sequences.
        device: Where it runs.
        sizes: Of the benchmark.

    Returns:
        `seconds`, "forward" and "both" with the backward pass, and `peak_bytes` of the latter.
    """
    given = operators.make_inputs(name, config, batch, sizes.length, torch.bfloat16, device, states=False)

    def forward() -> None:
        with torch.no_grad():
            OPERATORS[name].call(given, False)

    leaves = [x for x in given.values() if x.requires_grad]
    y = next(iter(OPERATORS[name].outputs(config, batch, sizes.length).values()))
    dy = torch.ones(y, device=device)

    def both() -> None:
        made = next(iter(OPERATORS[name].call(given, False).values()))
        torch.autograd.grad(made, leaves, dy.to(made.dtype))

    with ops.backend(BACKENDS[route]):
        seconds = {
            part: measure.seconds_of(call, device, sizes.least, sizes.repeats)
            for part, call in (("forward", forward), ("both", both))
        }
        return dict(seconds=seconds, peak_bytes=measure.peak_of(both, device))


def model_row(preset: str, route: str, device: str, sizes: argparse.Namespace) -> dict[str, Any]:
    """Training and decoding of a preset by one route.

    Args:
        preset: The model.
        route: How its operators run.
        device: Where.
        sizes: Of the benchmark.

    Returns:
        The row: `training` and `decoding` as in benchmarks/gpu/presets.py, or with `why` in place of numbers.
    """
    row: dict[str, Any] = dict(preset=preset, route=route)
    why = measure.missing(route, "mamba_ssm")
    if why is not None:
        return row | dict(training=dict(why=why), decoding=dict(why=why))
    model = models.from_config(config_of(preset, sizes), dtype=torch.bfloat16, device=device)
    at, repeats = (max(sizes.batches), sizes.length), sizes.repeats
    with ops.backend(BACKENDS[route]):
        # decoding first: the optimizer's moments would stay beside it
        decoded = measure.attempt(partial(presets.decoding, model, *at, sizes.new, device, repeats), device)
        trained = measure.attempt(partial(presets.training, model, *at, device, repeats), device)
    return row | dict(training=trained, decoding=decoded, parameters=model.num_parameters())


def measured(device: str, sizes: argparse.Namespace) -> dict[str, Any]:
    """Everything, printed a line at a time and returned as what the JSON holds."""
    sizes.bandwidth = measure.copy_bandwidth(device, sizes.copied)
    found: dict[str, Any] = dict(
        format=1,
        environment=measure.environment(device),
        bandwidth=sizes.bandwidth,
        sizes={key: getattr(sizes, key) for key in ("presets", "batches", "length", "compared", "new")},
        routes=list(BACKENDS),
        operators=[],
        models=[],
    )
    print(f"torch {torch.__version__}, {found['environment']['device']}, {sizes.bandwidth / 1e9:.1f} GB/s")
    for preset in sizes.presets:
        for name in operators.parts(config_of(preset, sizes)):
            for row in operator_rows(preset, name, device, sizes):
                found["operators"].append(row)
                say_operator(row)
        for route in BACKENDS:
            found["models"].append(model_row(preset, route, device, sizes))
            say_model(found["models"][-1])
    found["exceeded"] = exceeded(found["operators"])
    return found


def exceeded(rows: list[dict[str, Any]]) -> list[str]:
    """The errors beyond their limits, NaN among them, each named once."""
    return sorted(
        {
            f"{row['preset']} {row['operator']} {row['route']} {key}"
            for row in rows
            for key, e in row.get("errors", {}).items()
            if table.share(e) > 1
        }
    )


def say_operator(row: dict[str, Any]) -> None:
    """A line for time and memory, and, once for each preset and route, one for every error."""
    name = f"{row['operator']} {row['preset']} {row['route']}"
    if "why" in row:
        print(f"left out {name} batch {row['batch']}: {row['why']}", flush=True)
        return
    for key, e in row["errors"].items():
        verdict = "  EXCEEDS" if table.share(e) > 1 else ""
        numbers = ["NaN" if number is None else f"{number:.1e}" for number in (e["error"], e["limit"])]
        print(f"error {name} {key} {numbers[0]} limit {numbers[1]}{verdict}")
    for part, seconds in row["seconds"].items():
        ratio = row["floor_seconds"][part] / seconds
        print(f"time {name} batch {row['batch']} {part} {1e3 * seconds:.3f} ms, floor / time {ratio:.2f}")
    if row["peak_bytes"] is not None:
        print(f"peak {name} batch {row['batch']} {row['peak_bytes'] / 2**20:.0f} MiB", flush=True)


def say_model(row: dict[str, Any]) -> None:
    """A line each for training and decoding."""
    for part in ("training", "decoding"):
        name, numbers = f"{part} {row['preset']} {row['route']}", row[part]
        if "why" in numbers:
            print(f"left out {name}: {numbers['why']}", flush=True)
            continue
        peak = numbers.get("peak_bytes")
        memory = "" if peak is None else f", peak {peak / 2**30:.2f} GiB beside the weights"
        print(f"{name} {numbers['tokens_per_second']:.0f} tokens/s{memory}", flush=True)


def print_comparisons(found: dict[str, Any]) -> None:
    """Which of mamba-ssm's kernels and ours is faster, and the ratios of whole models."""
    at: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in found["operators"]:
        if "seconds" in row:
            key = row["operator"], row["preset"], row["batch"] * row["length"]
            at.setdefault(key, {})[row["route"]] = row["seconds"]["both"]
    for (name, preset, tokens), seconds in at.items():
        if {"mamba-ssm", "triton"} <= set(seconds):
            faster = min(("mamba-ssm", "triton"), key=lambda route: seconds[route])
            print(f"faster {name} {preset} from {tokens} tokens: {faster}")
    speed: dict[str, dict[str, float]] = {}
    for row in found["models"]:
        if "why" not in row["training"]:
            speed.setdefault(row["preset"], {})[row["route"]] = row["training"]["tokens_per_second"]
    for preset, routes in speed.items():
        for route, tokens in routes.items():
            if route != "chunks" and "chunks" in routes:
                print(f"ratio train_step_{preset}_{route}_vs_chunks {tokens / routes['chunks']:.2f}")


def selfcheck(sizes: argparse.Namespace) -> list[str]:
    """Run everything on this CPU in tiny sizes, and check what it says against what is known.

    Returns:
        What is wrong, a line each.
    """
    wrong, config = [], config_of(sizes.presets[0], sizes)
    found = measured("cpu", sizes)
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "cuda.json", found)
        again = read_json(Path(folder) / "cuda.json")
    if table.markdown(again) != table.markdown(found) or again != json.loads(json.dumps(found)):
        wrong.append("the JSON does not say what was measured")
    wrong += [f"{name} exceeds its limit" for name in found["exceeded"]]
    for preset in sizes.presets:
        for name in operators.parts(config_of(preset, sizes)):
            wrong += [f"{name}: {line}" for line in check_operator(name, config_of(preset, sizes))]
    ran = [row for row in found["operators"] if row["route"] == "chunks"]
    if not ran or any("why" in row or min(row["seconds"].values()) <= 0 for row in ran):
        wrong.append("the portable route did not run everywhere")
    if any("why" in row[part] for row in found["models"] if row["route"] == "chunks"
           for part in ("training", "decoding")):  # fmt: skip
        wrong.append("the portable route did not train and decode")
    model = models.from_config(config, dtype=torch.bfloat16)
    state = models.state_size(config, 8)
    numbers = presets.decoding(model, 3, 8, 1, "cpu", repeats=1)
    least = sum(p.nbytes for p in model.parameters()) + 2 * 3 * 2 * state
    if not least <= numbers["floor_bytes"] <= 2 * least:
        wrong.append("the floor of decoding is not that of weights and state")
    return wrong


def check_operator(name: str, config: Any) -> list[str]:
    """Whether the floor is what really goes in and out, and whether a planted error is found."""
    wrong, dtype = [], torch.bfloat16
    given = operators.make_inputs(name, config, 2, 9, dtype, "cpu", states=False)
    made = [x for x in OPERATORS[name].call(given, False).values()]
    into, out = (sum(x.nbytes for x in tensors) for tensors in (given.values(), made))
    leaves = [x for x in given.values() if x.requires_grad]
    differentiable = [x for x in made if x.is_floating_point()]
    grads = torch.autograd.grad(differentiable[0], leaves, torch.ones_like(differentiable[0]))
    both = 2 * into + out + sum(x.nbytes for x in (*grads, *differentiable))
    if operators.moved(name, config, 2, 9, dtype) != {"forward": into + out, "both": both}:
        wrong.append("the memory floor is not the bytes that go in and out")
    want, limits = operators.compare(name, given, False, operators.roundoff_of(name, dtype, "triton"))
    with ops.backend("chunks"):
        got = operators.forward_and_backward(name, given, False)
    if any(not error <= limits[key] for key, error in operators.errors(got, want).items()):
        wrong.append("plain PyTorch exceeds the limit that was derived from it")
    for key, x in got.items():
        size = want[key].abs().max()
        planted = got | {key: x + 2 * limits[key] * size}
        if operators.errors(planted, want)[key] <= limits[key]:
            wrong.append(f"an error planted in {key} was not found")
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, and return its exit status."""
    parser = command(__doc__)
    parser.add_argument("--presets", nargs="+", help="models (default: %(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, help="tokens of each (default: %(default)s)")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the tables of a JSON, and no more")
    parser.add_argument("--selfcheck", action="store_true", help="run on this CPU in tiny sizes")
    checked = "--selfcheck" in (sys.argv[1:] if argv is None else argv)
    sizes = parse(parser, FULL | (TINY if checked else {}), QUICK, argv)
    try:
        if sizes.table is not None:
            print(table.markdown(read_json(sizes.table)))
            return 0
        if sizes.selfcheck:
            os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing has done yet
            wrong = selfcheck(sizes)
            print("\n".join(f"wrong: {line}" for line in wrong) or "selfcheck: all is as it should be")
            return 1 if wrong else 0
        for preset in sizes.presets:
            models.config(preset)
        if not torch.cuda.is_available():
            print(NO_GPU, file=sys.stderr)
            return 2
        found = measured("cuda", sizes)
        write_json(sizes.json, found)
        print(f"written to {sizes.json}; `python -m benchmarks.cuda --table {sizes.json}` prints its tables")
        print_comparisons(found)
    except (ImportError, UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if found["exceeded"] else 0


if __name__ == "__main__":
    sys.exit(main())
