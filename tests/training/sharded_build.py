"""One process of test_sharded_build.py: builds models in shards, and writes what it saw to a JSON file.

python -m torch.distributed.run --nproc-per-node 2 tests/training/sharded_build.py FOLDER
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from ssm_retrieval import models, ops
from ssm_retrieval.models.architecture import Architecture
from ssm_retrieval.models.mamba import MambaConfig, MambaForCausalLM
from ssm_retrieval.ops._route import BACKENDS
from ssm_retrieval.training import distributed, session, store
from ssm_retrieval.training.optimizers import make_state
from synthetic import pretrained
from synthetic.config import RunConfig
from synthetic.config import plan as plan_of

SHAPE = dict(d_model=32, n_layer=6, vocab_size=48)
MODELS = {
    "transformer": dict(n_head=2, position="learned"),
    "mamba": dict(position="learned"),
    "hybrid": dict(n_head=2, pattern="M A"),
    "late": {},
}


class LateConfig(MambaConfig):
    """The config of `Late`."""


class Late(MambaForCausalLM):
    """A user's model, which draws and changes weights once more after its blocks are there."""

    def __init__(self, config: LateConfig, dtype: torch.dtype | None = None):
        super().__init__(config, dtype)
        for block in self.blocks:
            nn.init.kaiming_uniform_(block.mixer.in_proj.weight, a=1.0)
            nn.init.normal_(block.mixer.conv1d.bias, std=0.5)
            with torch.no_grad():
                block.mixer.out_proj.weight.div_(3.0)
                block.mixer.D.uniform_(0.5, 1.5)


models.register(Architecture(name="late", label="Late", config=LateConfig, model=Late))


@contextmanager
def whole_bytes() -> Iterator[Callable[[], int]]:
    """Says afterwards how many bytes of whole parameters were in this process at once, at most."""
    seen: dict[int, Any] = {}
    most = 0

    def look(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal most
        if parameter is not None and not isinstance(parameter, DTensor) and not parameter.is_meta:
            storage = parameter.untyped_storage()
            seen[id(storage)] = weakref.ref(storage)
        alive = (reference() for reference in seen.values())
        most = max(most, sum(storage.nbytes() for storage in alive if storage is not None))

    handle = register_module_parameter_registration_hook(look)
    yield lambda: most
    handle.remove()


def numbers(parameters: Any) -> int:
    """Bytes of these parameters, tied ones once."""
    return sum(p.nbytes for p in {id(p): p for p in parameters}.values())


def report(make: Callable[..., models.LanguageModel], world: distributed.World) -> dict[str, Any]:
    """What a model's construction took here, and whether its weights are those of one process."""
    with whole_bytes() as most:
        model = distributed.build(make, "cpu", world)
    loss_of = distributed.spread(model, world)
    local = sum(p.to_local().nbytes for p in model.parameters())
    found = distributed.whole_weights(model, world)
    with whole_bytes() as all_at_once:
        alone = make(device="cpu")
    wanted = dict(alone.named_parameters())
    ids = torch.arange(24).view(2, 12)
    losses = [float(of(ids, labels=ids)[0].detach()) for of in (loss_of, alone.loss)]
    blocks = [numbers(block.parameters()) for block in alone.blocks]
    return dict(
        most=most(),
        all_at_once=all_at_once(),
        whole=numbers(alone.parameters()),
        blocks=blocks,
        shards=local,
        kept=sorted(found),
        names=sorted(wanted),
        other=[name for name in found if not torch.equal(found[name], wanted[name])],
        losses=losses,
    )


def resumed(make: Callable[..., models.LanguageModel], folder: Path, world: distributed.World) -> Any:
    """What another seed's model gets from checkpoints that several processes, and one, have written.

    Names of weights and moments that differ, and how many bytes of the single file were here at once.
    """

    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, distributed.Loss]:
        model = distributed.build(partial(make, seed=seed), "cpu", world)
        loss_of = distributed.spread(model, world)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), loss_of

    def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        tensors = store.checkpoint_tensors(model, optimizer)
        return {name: distributed.full(tensor.detach()) for name, tensor in tensors.items()}

    model, optimizer, loss_of = start(seed=3)
    ids = torch.arange(24).view(2, 12) + world.rank
    loss_of(ids, labels=ids)[0].backward()
    optimizer.step()
    wanted = whole(model, optimizer)
    header = dataclasses.asdict(session.Progress(step=1))
    several, single = folder / "several", folder / "single"
    if world.main:
        several.mkdir()
        single.mkdir()
        store.save_tensors(single / store.CHECKPOINT, wanted, header)
    world.barrier()
    distributed.save(several, store.checkpoint_tensors(model, optimizer), header, world)
    found: dict[str, Any] = {}
    for place in (several, single):
        again, other, _ = start(seed=4)
        make_state(again, other, 1)
        before = whole(again, other)
        assert not all(torch.equal(before[name], wanted[name]) for name in wanted)
        with read_bytes() as most:
            assert session.resume(place, again, other, session.Progress, world) is not None
        after = whole(again, other)
        found[place.name] = [name for name in wanted if not torch.equal(after[name], wanted[name])]
    largest = max(tensor.nbytes for tensor in wanted.values())
    return found | {"most": most(), "largest": largest}


@contextmanager
def read_bytes() -> Iterator[Callable[[], int]]:
    """Says afterwards how many bytes of a checkpoint of one process were in memory at once, at most."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, get = 0, store.StoredTensors.__getitem__

    def look(self: store.StoredTensors, name: str) -> torch.Tensor:
        nonlocal most
        tensor = get(self, name)
        alive.add(tensor)
        most = max(most, sum(one.nbytes for one in alive))
        return tensor

    store.StoredTensors.__getitem__ = look  # type: ignore[method-assign]
    yield lambda: most
    store.StoredTensors.__getitem__ = get  # type: ignore[method-assign]


def published(folder: Path, world: distributed.World) -> Callable[..., models.LanguageModel]:
    """The model of a run with --init, as a function of the device."""
    place = folder / "published"
    if world.main:
        models.save(models.build("mamba", seed=7, **SHAPE), place)
    world.barrier()
    wish = RunConfig(seq_len=8, num_symbols=20, model=("mamba",), device="cpu", init=str(place))
    return partial(pretrained.first_model, plan_of(wish, "mamba"))


def by_triton(world: distributed.World) -> list[str] | None:
    """Names of gradients by our kernels in Triton that are not those of the equations in one process.

    None without Triton. All processes have the same rows, so that the mean of their gradients is each one's.
    """
    if "triton" not in BACKENDS or importlib.util.find_spec("triton") is None:
        return None
    make = partial(models.build, "mamba", seed=3, d_model=8, n_layer=1, vocab_size=16, d_state=2)
    ids, far = torch.arange(10).view(2, 5), []
    alone = make(device="cpu")
    with ops.backend("reference"):
        alone.loss(ids, labels=ids)[0].backward()
    wanted = {name: p.grad for name, p in alone.named_parameters()}
    for strategy in ("ddp", "fsdp"):
        part = dataclasses.replace(world, strategy=strategy)
        model = distributed.build(make, "cpu", part)
        with ops.backend("triton"):
            distributed.spread(model, part)(ids, labels=ids)[0].backward()
        for name, p in model.named_parameters():
            if not torch.allclose(distributed.full(p.grad), wanted[name], rtol=1e-3, atol=1e-5):
                far.append(f"{strategy} {name}")
    return far


def main(folder: Path) -> None:
    """Write folder/<rank>.json."""
    plan = SimpleNamespace(optimizer="adamw", lora=0, device="cpu")
    with distributed.joined("fsdp", plan) as world:
        found: dict[str, Any] = {}
        for family, options in MODELS.items():
            make = partial(models.build, family, seed=3, **SHAPE, **options)
            found[family] = report(make, world)
        found["init"] = report(published(folder, world), world)
        make = partial(models.build, "mamba", **SHAPE, **MODELS["mamba"])
        found["resumed"] = resumed(make, folder, world)
        found["triton"] = by_triton(world)
        (folder / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
