"""Prefill and recurrent decoding in bfloat16 on a CPU, against transformers with the same weights.

    python -m benchmarks.inference [--quick] [--preset 2.8b] [--family mamba transformer]
                                   [--length 1024] [--tokens 32]

Weights are random and shared: both models read the same tensors, so that two of 2.8 B fit into 24 GiB. The
peers are MambaForCausalLM on its path for CPUs, a loop over time, and GPTNeoXForCausalLM with sdpa, both with
their cache. Peak memory is that of a fresh process that has only our model. Then our model decodes in 8 bits
(`models.quantize`) as well. The last lines are ratios.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import command, fresh, machine, parse, peak, print_ratios
from ssm_retrieval import models
from ssm_retrieval.models.hub_configs import write_config

DTYPE = torch.bfloat16


def ours(name: str) -> models.LanguageModel:
    """A model with random weights in bfloat16, made without a float32 copy."""
    model = models.build(name, device="meta", dtype=DTYPE)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if key.endswith("A_log"):  # decay rates 1 .. d_state, as initialised
            parameter.copy_(torch.arange(1.0, parameter.shape[-1] + 1).log().expand_as(parameter))
        elif ("norm" in key and key.endswith("weight")) or key.endswith(".D"):
            parameter.fill_(1)
        elif key.endswith("dt_proj.bias"):  # softplus of it is 0.001 .. 0.01
            parameter.uniform_(-6.9, -4.6, generator=generator)
        else:
            parameter.normal_(0, 0.02, generator=generator)
    return model


def library(model: models.LanguageModel) -> torch.nn.Module:
    """The same architecture in transformers, on the same storage."""
    import transformers

    fields = write_config(model.config, "bfloat16")
    (name,) = fields["architectures"]
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**fields)
    with torch.device("meta"):
        peer = getattr(transformers, name)(config).to(DTYPE)
    state = {
        key.replace("backbone.embedding.", "backbone.embeddings."): p for key, p in model.state_dict().items()
    }
    known = peer.state_dict()
    if "embed_out.weight" not in known and "embed_out.weight" in state:
        state["lm_head.weight"] = state.pop("embed_out.weight")
    peer.load_state_dict(state, strict=True, assign=True)
    for module in peer.modules():  # constants that no checkpoint has
        if hasattr(module, "rotary_emb"):
            module.rotary_emb = type(module.rotary_emb)(config)
    return peer.eval().requires_grad_(False)


def our_run(model: models.LanguageModel, ids: Tensor, tokens: int) -> tuple[float, float, Tensor]:
    """Generate greedily with our model.

    Args:
        model: From `ours`.
        ids: (1, L) int64, the context.
        tokens: How many to decode after the first.

    Returns:
        Prefill: Seconds until the first token.
        decoding: Seconds of the others.
        found: (1, 1 + tokens) int64, the tokens.
    """
    stream = model.stream(ids, 1 + tokens)
    started = time.perf_counter()
    found = [next(stream)]
    filled = time.perf_counter()
    found += stream
    return filled - started, time.perf_counter() - filled, torch.stack(found, 1)


def their_run(model: Any, ids: Tensor, tokens: int) -> tuple[float, float, Tensor]:
    """Generate greedily with the library's forward pass and cache.

    Args:
        model: From `library`.
        ids: (1, L) int64, the context.
        tokens: How many to decode after the first.

    Returns:
        What `our_run` returns.
    """
    mamba = "Mamba" in type(model).__name__
    name = "cache_params" if mamba else "past_key_values"
    started = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1)
    filled = time.perf_counter()
    found = [token]
    for _ in range(tokens):
        out = model(token[:, None], use_cache=True, **{name: out[name]})
        token = out.logits[:, -1].argmax(-1)
        found.append(token)
    return filled - started, time.perf_counter() - filled, torch.stack(found, 1)


@torch.inference_mode()
def alone(name: str, length: int, tokens: int) -> tuple[float, float]:
    """Generate in a process that has only our model.

    Args:
        name: A preset.
        length: Tokens of context.
        tokens: How many to decode.

    Returns:
        The peak of the process and the size of the weights, in MiB.
    """
    model = ours(name)
    our_run(model, _ids(model, length), tokens)
    return peak(), sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def _ids(model: models.LanguageModel, length: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def compare(name: str, length: int, tokens: int, repeats: int) -> dict[str, float]:
    """Print the median speeds of both, which take turns.

    Args:
        name: A preset.
        length: Tokens of context.
        tokens: How many to decode.
        repeats: Runs of each.

    Returns:
        How many times as fast ours is, by "prefill" and "decode".
    """
    model = ours(name)
    peer, ids = library(model), _ids(model, length)
    runs: dict[str, list[tuple[float, float]]] = {"ours": [], "transformers": []}
    our_run(model, ids[:, :16], 2)  # compiles
    same = 0.0
    for _ in range(repeats):
        *ours_took, mine = our_run(model, ids, tokens)
        *theirs_took, other = their_run(peer, ids, tokens)
        runs["ours"].append((ours_took[0], ours_took[1]))
        runs["transformers"].append((theirs_took[0], theirs_took[1]))
        same = float((mine == other).float().mean())
    median = {
        side: [sorted(t)[len(t) // 2] for t in zip(*times, strict=True)] for side, times in runs.items()
    }
    for side, (prefill, decode) in median.items():
        print(
            f"  {side:14} prefill {prefill:8.2f} s {length / prefill:9.1f} tokens/s"
            f"   decoding {decode:8.2f} s {tokens / decode:8.2f} tokens/s"
        )
    print(f"  share of equal greedy tokens {same:.2f} (bfloat16 rounds differently in each)")
    (ours_prefill, ours_decode), (their_prefill, their_decode) = median["ours"], median["transformers"]
    return {"prefill": their_prefill / ours_prefill, "decode": their_decode / ours_decode}


@torch.inference_mode()
def in_8_bits(name: str, length: int, tokens: int, repeats: int) -> float:
    """Print the speed of decoding in 8 bits beside bfloat16, and how far the answers are from each other.

    Args:
        name: A preset.
        length: Tokens of context.
        tokens: How many to decode.
        repeats: Runs of each, which take turns; the median counts.

    Returns:
        How many times as fast decoding is.
    """
    wide, narrow = ours(name), models.quantize(ours(name))
    ids = _ids(wide, length)
    was, now = (model(ids).float().log_softmax(-1) for model in (wide, narrow))
    kl = float((was.exp() * (was - now)).sum(-1).mean())
    print(f"  8 bits: KL from bfloat16 {kl:.2e}, perplexity of its tokens +{100 * math.expm1(kl):.3f} %")
    took: list[list[float]] = [[], []]
    for _ in range(1 + repeats):
        for model, seconds in zip((wide, narrow), took, strict=True):
            seconds.append(our_run(model, ids, tokens)[1])
    bfloat16, bits = (sorted(seconds[1:])[repeats // 2] for seconds in took)
    print(
        f"  decoding in bfloat16 {tokens / bfloat16:8.2f} tokens/s, in 8 bits {tokens / bits:8.2f} tokens/s"
    )
    return bfloat16 / bits


def main() -> None:
    """Run the benchmark."""
    parser = command(__doc__)
    parser.add_argument("--preset", help="size of the models")
    parser.add_argument("--family", nargs="+", choices=["mamba", "mamba2", "transformer"])
    parser.add_argument("--length", type=int, help="tokens of context")
    parser.add_argument("--tokens", type=int, help="tokens to decode")
    parser.add_argument("--repeats", type=int, help="runs of each model, of which the median counts")
    full = dict(preset="2.8b", family=["mamba", "transformer"], length=1024, tokens=32, repeats=1)
    options = parse(parser, full, quick=dict(preset="tiny", length=32, tokens=4))
    print(machine())
    ratios = {}
    for family in options.family:
        name = f"{family}-{options.preset}"
        print(f"{name}, bfloat16, batch 1, {options.length} tokens of context, {options.tokens} generated")
        most, weights = fresh(alone, name, options.length, options.tokens)
        print(f"  peak memory of our process {most / 1024:.2f} GiB, weights {weights / 1024:.2f} GiB")
        for what, ratio in compare(name, options.length, options.tokens, options.repeats).items():
            ratios[f"{what}_{family}_{options.preset}_vs_transformers"] = ratio
        bits = in_8_bits(name, options.length, options.tokens, options.repeats)
        ratios[f"decode_{family}_{options.preset}_8bit_vs_bfloat16"] = bits
    print_ratios(ratios)


if __name__ == "__main__":
    main()
