"""A whole training step (forward, loss, backward, AdamW) against transformers' models of the same config.

    python -m benchmarks.train_step [--quick]

The peers are GPTNeoXForCausalLM with sdpa attention and MambaForCausalLM, once with `use_mambapy=True`, its
fastest path on a CPU, and once with its default loop over time. Shapes, dtype, optimiser and the next-token
loss at every position are the same; ours keeps no logits in memory (`LanguageModel.loss`), theirs is computed
by the library.

The last lines are ratios. The headline ratios are float32 in a process as PyTorch leaves it; "_kept_memory"
is measured after `ops.memory.keep_freed_memory()`, which `synthetic.run` calls, and which helps the peers
more, because they allocate more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.common import command, machine, parse, peak_memory, print_ratios, seconds
from ssm_retrieval import models
from ssm_retrieval.ops.memory import keep_freed_memory

HIDDEN, LAYERS, HEADS, VOCAB = 128, 2, 4, 2052
LENGTHS = (256, 1024, 4096, 16384)

Step = Callable[[], Any]


def _step(
    model: torch.nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    batch: int,
    length: int,
    bf16: bool,
) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))

    def step() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _ours(model: models.LanguageModel, batch: int, length: int, bf16: bool) -> Step:
    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model.loss(ids, labels=F.pad(ids[:, 1:], (0, 1), value=-100))[0]

    return _step(model, loss, batch, length, bf16)


def _library(model: torch.nn.Module, batch: int, length: int, bf16: bool) -> Step:
    """With the library's own loss (labels are shifted inside)."""
    return _step(model, lambda ids: model(ids, labels=ids).loss, batch, length, bf16)


# Each makes a step on `batch` sequences of `length` tokens, in bfloat16 autocast if `bf16`, else in float32.


def our_transformer(batch: int, length: int, bf16: bool) -> Step:
    """This project's GPT-NeoX."""
    shape: dict[str, Any] = dict(vocab_size=VOCAB, d_model=HIDDEN, n_layer=LAYERS, n_head=HEADS)
    model = models.build("pythia-160m", **shape, max_position_embeddings=length)
    return _ours(model, batch, length, bf16)


def library_transformer(batch: int, length: int, bf16: bool) -> Step:
    """transformers' GPT-NeoX."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=length,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return _library(GPTNeoXForCausalLM(config), batch, length, bf16)


def our_mamba(batch: int, length: int, bf16: bool) -> Step:
    """This project's Mamba."""
    model = models.build("mamba-130m", vocab_size=VOCAB, d_model=HIDDEN, n_layer=LAYERS)
    return _ours(model, batch, length, bf16)


def library_mamba(batch: int, length: int, bf16: bool, use_mambapy: bool = True) -> Step:
    """transformers' Mamba, with mambapy's scan or with the default loop."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        use_cache=False,
        use_mambapy=use_mambapy,
    )
    return _library(MambaForCausalLM(config), batch, length, bf16)


def compare(title: str, steps: dict[str, Step], repeats: int, tokens: int) -> dict[str, float]:
    """Time steps and print a row for each.

    Args:
        title: The line above them.
        steps: What to time, by name.
        repeats: Times of each, of which the median counts.
        tokens: How many each step trains on.

    Returns:
        Seconds by name.
    """
    times = seconds(steps, repeats)
    print(title)
    for name, t in times.items():
        print(f"  {name:28} {t * 1e3:9.1f} ms {tokens / t / 1e3:9.1f} thousand tokens/s")
    return times


def main() -> None:
    """Run the benchmark."""
    full = dict(batch=8, length=1024, transformer_steps=9, mamba_steps=5, repeats=3, lengths=LENGTHS)
    quick = dict(batch=2, length=256, transformer_steps=1, mamba_steps=1, repeats=1, lengths=(64, 128))
    sizes = parse(command(__doc__), full, quick)
    print(machine())
    shape, tokens, ratios = (sizes.batch, sizes.length), sizes.batch * sizes.length, {}
    print(f"batch {shape[0]}, length {shape[1]}, hidden {HIDDEN}, {LAYERS} layers, vocabulary {VOCAB}")
    for allocator, kept in (("default", ""), ("kept", "_kept_memory")):
        if kept:
            keep_freed_memory()
        for bf16, suffix in ((False, ""), (True, "_bf16")):
            title = f"{'bfloat16 autocast' if bf16 else 'float32'}, allocator {allocator}"
            pair = {"ours": our_transformer(*shape, bf16), "transformers": library_transformer(*shape, bf16)}
            t = compare(f"Transformer, {title}", pair, sizes.transformer_steps, tokens)
            ratios[f"transformer_step_vs_transformers{suffix}{kept}"] = t["transformers"] / t["ours"]
            pair = {"ours": our_mamba(*shape, bf16), "use_mambapy": library_mamba(*shape, bf16)}
            t = compare(f"Mamba, {title}", pair, sizes.mamba_steps, tokens)
            ratios[f"mamba_step_vs_transformers{suffix}{kept}"] = t["use_mambapy"] / t["ours"]
        if not kept:
            pair = {"ours": our_mamba(*shape, False)}
            pair["default path"] = library_mamba(*shape, False, use_mambapy=False)
            t = compare("Mamba, float32, allocator default", pair, 1, tokens)
            ratios["mamba_step_vs_transformers_default"] = t["default path"] / t["ours"]

    for make, peer in ((our_transformer, library_transformer), (our_mamba, library_mamba)):
        peaks = [peak_memory(f, (1, 64, False), (*shape, False)) for f in (make, peer)]
        print(f"peak memory of a step, {make.__name__}: {peaks[0]:.0f} MiB, transformers {peaks[1]:.0f} MiB")
        ratios[f"{make.__name__[4:]}_memory_vs_transformers"] = peaks[1] / peaks[0]

    print("scaling with length, one sequence, bfloat16 autocast: microseconds per token")
    for n in sizes.lengths:
        pair = {"Transformer": our_transformer(1, n, True), "Mamba": our_mamba(1, n, True)}
        times = seconds(pair, sizes.repeats)
        print(f"  {n:6}" + "".join(f"   {name} {t / n * 1e6:8.2f}" for name, t in times.items()))
    print_ratios(ratios)


if __name__ == "__main__":
    main()
