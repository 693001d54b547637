"""Prefill and recurrent decoding on a CPU, against llama.cpp and transformers with the same weights.

    python -m benchmarks.inference [--quick] [--models mamba-130m pythia-160m] [--peers llama.cpp]
                                   [--length 1024] [--tokens 128] [--pairs 5]

Weights are random and the same on both sides. Peers, each at its best setting here:

    transformers    the hub's classes: Mamba on its path for CPUs, GPT-NeoX with sdpa, with their caches
    compiled        the same under torch.compile (of Mamba an associative scan), up to 800 M
    llama.cpp       through llama-cpp-python, built for this processor; a GGUF file of our weights

Each side has a process of its own; sides take turns (benchmarks.turns). Matrices are in bfloat16 on all
sides. "8bit" is our `models.quantize` against llama.cpp's Q8_0, and against our bfloat16. Before anything is
timed, the logits after the context are compared. Peaks are those of the processes. The last lines are ratios:
how many times as fast this project is. A peer that fails or is not installed is left out, and a line says so:

    pip install transformers gguf llama-cpp-python    # the last compiles for minutes
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Ratio, command, finish, machine, parse
from benchmarks.gguf_file import LlamaCpp, write
from benchmarks.peers import hollow, library
from benchmarks.turns import Calls, Failed, Side, race
from ssm_retrieval import models

MODELS = ("mamba-130m", "mamba2-130m", "pythia-160m", "mamba-2.8b", "pythia-2.8b")
PEERS = ("transformers", "compiled", "llama.cpp")
NEEDED = {"llama.cpp": "llama_cpp", "transformers": "transformers", "compiled": "transformers"}
COMPILED = 800e6  # weights; beyond that torch.compile takes longer than the benchmark
CALLS = ("prefill", "decode")


def build(name: str) -> models.LanguageModel:
    """A model with random weights in bfloat16."""
    model = hollow(name).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if key.endswith("A_log"):  # decay rates 1 .. d_state (Mamba), 1 .. 16 (Mamba-2), as initialised
            rates = torch.linspace(1, 16, len(parameter)) if parameter.ndim == 1 else None
            steps = torch.arange(1.0, parameter.shape[-1] + 1) if rates is None else rates
            parameter.copy_(steps.log().expand_as(parameter))
        elif ("norm" in key and key.endswith("weight")) or key.endswith(".D"):
            parameter.fill_(1)
        elif key.endswith(("dt_proj.bias", "dt_bias")):  # softplus of it is 0.001 .. 0.01
            parameter.uniform_(-6.9, -4.6, generator=generator)
        else:
            parameter.normal_(0, 0.02, generator=generator)
    return model


def context(vocab_size: int, length: int) -> Tensor:
    """(1, L) int64, random tokens."""
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


# --- sides: calls "logits", "prefill" (until the first token) and "decode" (the tokens after it) -----------


def ours(name: str, length: int, tokens: int, bits: int = 16) -> Calls:
    """This project's model, in bfloat16 or with matrices of 8 bits."""
    model = build(name) if bits == 16 else models.quantize(build(name))
    ids = context(model.config.vocab_size, length)
    going: list[Iterator[Tensor]] = []

    @torch.inference_mode()
    def prefill() -> int:
        going[:] = [model.stream(ids, 1 + tokens)]
        return int(next(going[0]))

    @torch.inference_mode()
    def decode() -> list[int]:
        return [int(token) for token in going[0]]

    @torch.inference_mode()
    def logits() -> Any:
        return model(ids)[0, -1].float().numpy()

    return {"logits": logits, "prefill": prefill, "decode": decode}


def transformers_calls(name: str, length: int, tokens: int, compiled: bool = False) -> Calls:
    """transformers' model, with its forward pass and cache."""
    model = library(build(name)).eval().requires_grad_(False)
    ids = context(model.config.vocab_size, length)
    forward: Callable[..., Any] = torch.compile(model) if compiled else model
    key = "cache_params" if "Mamba" in type(model).__name__ else "past_key_values"
    state: dict[str, Any] = {}

    def begin() -> dict[str, Any]:
        if not compiled or key == "cache_params":
            return {}
        from transformers import StaticCache

        return {key: StaticCache(config=model.config, max_cache_len=length + tokens + 1)}

    @torch.inference_mode()
    def prefill() -> int:
        out = forward(ids, use_cache=True, logits_to_keep=1, **begin())
        state.update(cache=out[key], token=out.logits[:, -1].argmax(-1))
        return int(state["token"])

    @torch.inference_mode()
    def decode() -> list[int]:
        found = []
        for _ in range(tokens):
            out = forward(state["token"][:, None], use_cache=True, **{key: state["cache"]})
            state.update(cache=out[key], token=out.logits[:, -1].argmax(-1))
            found.append(int(state["token"]))
        return found

    @torch.inference_mode()
    def logits() -> Any:
        return model(ids, logits_to_keep=1).logits[0, -1].float().numpy()

    return {"logits": logits, "prefill": prefill, "decode": decode}


def llama_calls(path: str, vocab_size: int, length: int, tokens: int, threads: int) -> Calls:
    """llama.cpp, on a GGUF file."""
    model = LlamaCpp(Path(path), threads, length + tokens + 1)
    ids = context(vocab_size, length)[0].tolist()
    state: dict[str, int] = {}

    def logits() -> Any:
        model.start()
        return model.step(ids)

    def prefill() -> int:
        state["token"] = int(logits().argmax())
        return state["token"]

    def decode() -> list[int]:
        found = []
        for _ in range(tokens):
            state["token"] = int(model.step([state["token"]]).argmax())
            found.append(state["token"])
        return found

    return {"logits": logits, "prefill": prefill, "decode": decode}


# --- rows -------------------------------------------------------------------------------------------------


def distance(a: Any, b: Any) -> float:
    """KL divergence of the next token's distribution b from a, in nats, from logits (V,)."""
    p, q = (torch.from_numpy(np.array(x)).double().log_softmax(-1) for x in (a, b))
    return float((p.exp() * (p - q)).sum())


def compare(title: str, sides: Sequence[Side], sizes: Any) -> tuple[dict[str, Ratio], dict[str, Any]]:
    """Race two sides, ours first, and print what was measured.

    Args:
        title: Of the comparison.
        sides: Ours and the peer.
        sizes: Options of the command.

    Returns:
        Ratio by call; and seconds, peaks and the distance of our logits from the peer's.

    Raises:
        Failed: If a side could not be made or called.
    """
    raced = race(sides, CALLS, sizes.pairs, threads=torch.get_num_threads(), checked=("logits",))
    mine, peer = (side.name for side in sides)
    kl = distance(*(raced.answers[name]["logits"] for name in (peer, mine)))
    print(f"{title}: KL of the next token {kl:.1e}")
    work = {"prefill": sizes.length, "decode": sizes.tokens}
    for name in (mine, peer):
        speeds = ", ".join(
            f"{call} {work[call] / np.median(raced.seconds[name][call]):.2f} tokens/s" for call in CALLS
        )
        print(f"  {name:20} {speeds}, peak {raced.peak_mib[name] / 1024:.2f} GiB")
    ratios = {call: raced.ratio(call, mine, peer) for call in CALLS}
    return ratios, {"seconds": raced.seconds, "peak_mib": raced.peak_mib, "kl": kl, "work": work}


def rows(name: str, sizes: Any, folder: Path) -> Iterator[tuple[str, Sequence[Side]]]:
    """Yield every comparison of a model: the end of its ratio's name, and its sides."""
    config: Any = models.config(name)
    shape = {"length": sizes.length, "tokens": sizes.tokens}
    mine = {bits: Side(f"ours, {bits} bits", ours, {"name": name, "bits": bits, **shape}) for bits in (16, 8)}
    for peer in (peer for peer in sizes.peers if importlib.util.find_spec(NEEDED[peer])):
        if peer == "llama.cpp":
            for kind, bits in (("BF16", 16), ("Q8_0", 8)):
                path = write(build(name), folder / f"{name}-{kind}.gguf", kind)
                options = {"path": str(path), "vocab_size": config.vocab_size, **shape}
                options["threads"] = torch.get_num_threads()
                end = "llama_cpp" if bits == 16 else "llama_cpp_8bit"
                yield f"{name}_vs_{end}", (mine[bits], Side(f"llama.cpp, {kind}", llama_calls, options))
                path.unlink()
        else:
            compiled = peer == "compiled"
            if compiled and models.build(name, device="meta").num_parameters() > COMPILED:
                continue
            options = {"name": name, "compiled": compiled, **shape}
            yield f"{name}_vs_{peer}", (mine[16], Side(peer, transformers_calls, options))
    yield f"{name}_8bit_vs_bfloat16", (mine[8], mine[16])


def main() -> None:
    """Run the benchmark."""
    parser = command(__doc__)
    parser.add_argument("--models", nargs="+", help="presets")
    parser.add_argument("--peers", nargs="+", choices=PEERS)
    parser.add_argument("--length", type=int, help="tokens of context")
    parser.add_argument("--tokens", type=int, help="tokens to decode")
    parser.add_argument("--pairs", type=int, help="turns of each side")
    full = dict(models=MODELS, peers=PEERS, length=1024, tokens=128, pairs=5)
    quick = dict(models=("mamba-tiny", "transformer-tiny"), length=32, tokens=4, pairs=1)
    sizes = parse(parser, full, quick)
    print(machine())
    print(f"batch 1, {sizes.length} tokens of context, {sizes.tokens} generated, {sizes.pairs} pairs")
    for peer in sizes.peers:
        if importlib.util.find_spec(NEEDED[peer]) is None:
            print(f"{peer} is not installed and left out")
    ratios: dict[str, float | Ratio] = {}
    facts: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sizes.models:
            for end, sides in rows(name, sizes, Path(folder)):
                try:
                    found, facts[end] = compare(end.replace("_", " "), sides, sizes)
                except Failed as error:
                    left_out[end] = error.reason()
                    print(f"{end.replace('_', ' ')}: left out, {left_out[end]}", flush=True)
                    continue
                ratios |= {f"{call}_{end}": ratio for call, ratio in found.items()}
                if end.endswith("8bit_vs_bfloat16"):
                    print(f"  perplexity of bfloat16's tokens: +{100 * math.expm1(facts[end]['kl']):.3f} %")
    finish(sizes, ratios, facts=facts, left_out=left_out)


if __name__ == "__main__":
    main()
