"""Reading states and patching against transformer-lens (PyPI), which wraps models of `transformers`.

    pip install --no-deps transformer-lens==4.3.0 transformers==5.9.0    # in an environment of its own
    python -m benchmarks.probes [--quick] [--memory-gib 8]

The peer's `compute_ssm_state` reads the output of a convolution module that transformers 5.24 no longer
calls, so it needs an older version. (`pip` names further packages that transformer-lens imports, such as
jaxtyping.)

Both have the same random weights, of Mamba and GPT-NeoX in the size of the `tiny` presets. First their
states, hidden attention, edited logits and patching effects are compared on short sequences. Then every state
of every layer is recorded by

    ours         probes.record(model, "*.mixer.hook_ssm_state")
    compute      run_with_cache and compute_ssm_state, the peer's call for states, which makes a tensor
                 channels x d_state x length x length; up to the longest length within --memory-gib
    at 64        ours at 64 positions, the way states of long sequences are recorded
    eager_scan   run_with_cache with the peer's opt-in loop over time, whose hook_ssm_state has the states,
                 every one of them

and the grid of residual patches, layers x positions, is measured with the peer's `get_act_patch_resid_pre`
and with `probes.patching.trace`, on the same sequences, cells and metric. Both keep freed memory, as
`probes.run` does. Peaks of memory are those of fresh processes; model and inputs are not counted. The last
lines are ratios: how many times faster ours is, or how many times smaller ("_memory_"). Exit status 2 if
transformer-lens is missing.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import probes
from benchmarks.common import Ratio, command, finish, machine, paired, parse, peak_memory, take_turns
from probes import patching
from probes.contrast_pairs import Pairs, contrast_pairs
from probes.patch_cells import Cell
from probes.retention import hidden_attention
from probes.scan import Scan
from ssm_retrieval import models
from ssm_retrieval.ops.memory import keep_freed_memory
from synthetic import tasks

D_MODEL, N_LAYER, N_HEAD, D_STATE = 128, 4, 4, 16
SHORT, LENGTHS = 48, (64, 128, 256, 512, 1024, 2048)
GRID_LENGTH, GRID_PAIRS = 1024, 4
SEQ_LEN = 2048


def task() -> Any:
    """The task that the tokens and pairs come from."""
    return tasks.build("position", seq_len=SEQ_LEN, num_symbols=SEQ_LEN)


def library_model(family: str) -> Any:
    """A random model of transformers."""
    import transformers

    torch.manual_seed(0)
    size: dict[str, Any] = dict(hidden_size=D_MODEL, num_hidden_layers=N_LAYER, vocab_size=task().vocab_size)
    if family == "mamba":
        config = transformers.MambaConfig(state_size=D_STATE, use_cache=False, **size)
        model = transformers.MambaForCausalLM(config)
    else:
        config = transformers.GPTNeoXConfig(
            num_attention_heads=N_HEAD, intermediate_size=4 * D_MODEL, use_cache=False,
            max_position_embeddings=2 * SEQ_LEN, hidden_dropout=0.0, attention_dropout=0.0, **size,
        )  # fmt: skip
        model = transformers.GPTNeoXForCausalLM(config)
    return model.eval()


def our_model(family: str) -> Any:
    """A model of this project with the weights of `library_model`."""
    options: dict[str, Any] = dict(d_model=D_MODEL, n_layer=N_LAYER, vocab_size=task().vocab_size)
    options |= dict(d_state=D_STATE) if family == "mamba" else dict(n_head=N_HEAD)
    model = models.build("mamba-130m" if family == "mamba" else "pythia-160m", **options)
    model.load_state_dict(library_model(family).state_dict())
    return model.eval()


def bridge(family: str) -> Any:
    """The peer's wrapper of `library_model`."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = library_model(family)
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config).eval()


def tokens(length: int) -> Tensor:
    """(1, L) int64, random tokens."""
    return torch.randint(0, task().vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


# --- every state of every layer -----------------------------------------------------------------------------


def our_states(length: int, positions: list[int] | None = None) -> Callable[[], list[Tensor]]:
    """(1, L or positions, E, N) of each layer."""
    model, ids = our_model("mamba"), tokens(length)

    @torch.no_grad()
    def call() -> list[Tensor]:
        with probes.record(model, "*.mixer.hook_ssm_state", positions=positions, budget=2**40) as cache:
            model(ids)
        return [cache[f"blocks.{i}.mixer.hook_ssm_state"] for i in range(N_LAYER)]

    return call


def our_states_at_64(length: int) -> Callable[[], list[Tensor]]:
    """(1, 64, E, N) of each layer, at equally spaced positions."""
    return our_states(length, torch.linspace(0, length - 1, min(64, length)).round().long().tolist())


def peer_states(length: int) -> Callable[[], list[Tensor]]:
    """(1, E, L, N) of each layer, by `compute_ssm_state`."""
    peer, ids = bridge("mamba"), tokens(length)
    wanted = ("x_proj.hook_out", "dt_proj.hook_out", "conv1d.hook_out")

    @torch.no_grad()
    def call() -> list[Tensor]:
        _, cache = peer.run_with_cache(ids, names_filter=lambda name: name.endswith(wanted))
        return [peer.blocks[i].mixer.compute_ssm_state(cache, i) for i in range(N_LAYER)]

    return call


def eager_states(length: int) -> Callable[[], list[Tensor]]:
    """(1, E, L, N) of each layer, by the opt-in loop over time."""
    peer, ids = bridge("mamba"), tokens(length)
    set_eager(peer, True)

    @torch.no_grad()
    def call() -> list[Tensor]:
        _, cache = peer.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_ssm_state"))
        return [cache[f"blocks.{i}.mixer.hook_ssm_state"] for i in range(N_LAYER)]

    return call


def set_eager(peer: Any, eager: bool) -> None:
    """Switch the peer's loop over time on or off."""
    for block in peer.blocks:
        block.mixer.eager_scan = eager


# --- the grid of residual patches ---------------------------------------------------------------------------


def grid(length: int, positions: int) -> tuple[Pairs, list[int]]:
    """Pairs of about `length` tokens, and equally spaced positions in them, the last one included."""
    made = contrast_pairs(task(), GRID_PAIRS, length - 3, "target")
    places = torch.linspace(0, made.answer_at, positions).round().long().unique()
    return made, places.tolist()


def our_grid(family: str, length: int, positions: int) -> Callable[[], Tensor]:
    """Prepare the grid of patches.

    Args:
        family: "mamba" or "neox".
        length: Tokens of a sequence.
        positions: How many columns the grid has.

    Returns:
        A call that measures it: (layers, positions, pairs) logit differences.
    """
    model, (made, places) = our_model(family), grid(length, positions)
    where = torch.zeros(len(places), len(made), made.answer_at + 1, dtype=torch.bool)
    for i, place in enumerate(places):
        where[i, :, place] = True
    what = [Cell("", place, place + 1, where[i]) for i, place in enumerate(places)]

    def call() -> Tensor:
        traced = patching.trace(model, made, what, ["residual"], layers=range(N_LAYER), controls=False)
        return traced.difference.unflatten(0, (N_LAYER, -1))

    return call


def peer_grid(family: str, length: int, positions: int) -> Callable[[], Tensor]:
    """Prepare the same with the peer, which runs the whole model once per layer and position.

    Args:
        family: "mamba" or "neox".
        length: Tokens of a sequence.
        positions: How many columns the grid has.

    Returns:
        A call that measures it: (layers, positions, pairs) logit differences.
    """
    from transformer_lens.patching import get_act_patch_resid_pre

    peer, (made, places) = bridge(family), grid(length, positions)
    index = pd.DataFrame(
        [(layer, place) for layer in range(N_LAYER) for place in places], columns=["layer", "pos"]
    )
    rows = torch.arange(len(made))

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, made.answer_at]
        return last[rows, made.answer] - last[rows, made.corrupted_answer]

    @torch.no_grad()
    def call() -> Tensor:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            _, cache = peer.run_with_cache(
                made.clean.input_ids, names_filter=lambda name: name.endswith("hook_resid_pre")
            )
            found = get_act_patch_resid_pre(
                peer,
                made.corrupted.input_ids,
                cache,
                metric,
                index_df=index,
                index_axis_names=None,
                reduce="none",
            )
        return found.values.reshape(N_LAYER, len(places), -1)

    return call


# --- equal numbers ------------------------------------------------------------------------------------------


def deviation(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return float((a - b).abs().max())


@torch.no_grad()
def compare() -> None:
    """Print the largest absolute deviations on short sequences."""
    ours, compute, eager = (f(SHORT)() for f in (our_states, peer_states, eager_states))
    scale = max(float(h.abs().max()) for h in ours)
    print(f"largest absolute deviation at length {SHORT}, one sequence")
    for name, theirs in (("compute_ssm_state", compute), ("eager_scan", eager)):
        worst = max(deviation(a, b.transpose(1, 2)) for a, b in zip(ours, theirs, strict=True))
        print(f"  states, {name:18} {worst:.1e}  (largest state {scale:.2g})")
    model, peer, ids = our_model("mamba"), bridge("mamba"), tokens(SHORT)
    _, cache = peer.run_with_cache(ids)
    names = ("dt", "B", "C", "conv")
    with probes.record(model, [f"blocks.*.mixer.hook_{name}" for name in names]) as record:
        model(ids)
    worst = scale = 0.0
    for i, block in enumerate(model.blocks):
        dt, B, C, u = (record[f"blocks.{i}.mixer.hook_{name}"] for name in names)
        mixer: Any = block.mixer
        alpha = hidden_attention(Scan.mamba(-mixer.A_log.exp(), dt, B, C, u))
        theirs = peer.blocks[i].mixer.compute_effective_attention(cache, i, include_dt_scaling=True)
        worst, scale = max(worst, deviation(alpha, theirs)), max(scale, float(alpha.abs().max()))
    print(f"  hidden attention           {worst:.1e}  (largest weight {scale:.2g})")
    set_eager(peer, True)
    name, place = "blocks.1.mixer.hook_ssm_state", SHORT // 2

    def zero(state: Tensor, hook: Any) -> Tensor:
        state[:, :, place] = 0
        return state

    theirs = peer.run_with_hooks(ids, fwd_hooks=[(name, zero)])
    edit = probes.at(place, torch.zeros_like)
    with probes.intervene(model, {name.replace("state", "readout"): edit}):
        edited = model(ids)
    print(f"  logits, readout edited     {deviation(edited, theirs):.1e}  (edit moves them by "
          f"{deviation(edited, model(ids)):.2g})")  # fmt: skip
    for family in ("mamba", "neox"):
        a, b = (f(family, SHORT, SHORT)() for f in (our_grid, peer_grid))
        largest = float(a.abs().max())
        print(f"  patched logit differences, {family:6} {deviation(a, b):.1e}  (largest {largest:.2g})")


def longest(limit_mib: float, lengths: Sequence[int]) -> dict[int, float]:
    """MiB of the peer's `compute_ssm_state` by length, up to the longest that stays within the limit."""
    found: dict[int, float] = {}
    for length in lengths:
        if found and 4.5 * list(found.values())[-1] > limit_mib:  # it grows with the square
            break
        found[length] = peak_memory(peer_states, (16,), (length,))
    return {length: mib for length, mib in found.items() if mib <= limit_mib}


def main() -> int:
    """Run the benchmark, and return its exit status."""
    parser = command(__doc__)
    parser.add_argument("--memory-gib", type=float, help="what the peer may use (default: %(default)s)")
    full = dict(memory_gib=8.0, lengths=LENGTHS, grid_length=GRID_LENGTH, grid_positions=16, repeats=5)
    quick = dict(lengths=LENGTHS[:1], grid_length=64, grid_positions=4, repeats=1)
    options = parse(parser, full, quick)
    try:
        import transformer_lens  # noqa: F401
    except ImportError as error:
        print(
            f"error: benchmarks.probes needs transformer-lens ({error}); python -m benchmarks.probes --help "
            "says how to install it",
            file=sys.stderr,
        )
        return 2
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("transformer-lens", "transformers"))
    print(f"{machine()}, {versions}")
    compare()
    ratios: dict[str, float | Ratio] = {}

    length = max(longest(options.memory_gib * 1024, options.lengths))
    print(f"states of {N_LAYER} layers, d_inner {2 * D_MODEL}, d_state {D_STATE}, one sequence")
    for n in sorted({length, options.grid_length}):
        makers = {"ours": our_states, "at 64": our_states_at_64, "eager_scan": eager_states}
        makers |= {"compute": peer_states} if n == length else {}
        times = take_turns({name: make(n) for name, make in makers.items()}, options.repeats)
        memory = {name: peak_memory(make, (16,), (n,)) for name, make in makers.items()}
        for name, took in times.items():
            print(f"  length {n:5}  {name:11} {median(took) * 1e3:9.1f} ms  peak {memory[name]:7.0f} MiB")
        for name in times.keys() - {"ours", "at 64"}:
            suffix = "" if name == "compute" else f"_eager_scan_{n}"
            ratios[f"record_states_vs_transformer_lens{suffix}"] = paired(times[name], times["ours"])
            ratios[f"record_states_memory_vs_transformer_lens{suffix}"] = memory[name] / memory["ours"]
        ratios[f"states_at_64_vs_transformer_lens_eager_scan_{n}"] = paired(
            times["eager_scan"], times["at 64"]
        )

    shape = (options.grid_length, options.grid_positions)
    print(f"grid of {N_LAYER} x {shape[1]} residual patches, {GRID_PAIRS} pairs of length {shape[0]}")
    for family, suffix in (("mamba", ""), ("neox", "_neox")):
        makers_of = {"ours": our_grid, "transformer-lens": peer_grid}
        calls = {name: make(family, *shape) for name, make in makers_of.items()}
        times = take_turns(calls, options.repeats)
        memory = {
            name: peak_memory(make, (family, 32, 2), (family, *shape)) for name, make in makers_of.items()
        }
        for name, took in times.items():
            print(f"  {family:6} {name:17} {median(took):8.2f} s  peak {memory[name]:6.0f} MiB")
        ratios[f"patch_grid_vs_transformer_lens{suffix}"] = paired(times["transformer-lens"], times["ours"])
    finish(options, dict(sorted(ratios.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
