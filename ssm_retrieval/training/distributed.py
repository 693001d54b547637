"""One run in several processes: `torchrun --nproc-per-node 8 -m synthetic.run ...`, or `accelerate launch`.

The numbers are those of one process up to rounding: every process draws the whole batch (generators are
thousands of times faster than a step), trains on its share of the rows, and gradients are averaged with the
shares' label counts. So data order, curriculum and results do not depend on how many processes there are, and
a run can go on in another number of them.

    ddp    every process holds the whole model, gradients are summed (Li et al. 2020, arXiv 2006.15704)
    fsdp   weights, gradients and moments are sharded by block (FSDP2; Zhao et al. 2023, arXiv 2304.11277) as
           soon as a block is built, so that no process ever holds a whole model

Checkpoints are sharded: each process writes its part as safetensors, through torch.distributed.checkpoint.
Only the first process writes results.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ssm_retrieval.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self

    from ssm_retrieval.models import LanguageModel

Loss = Callable[..., tuple[Tensor, Tensor]]
TIMEOUT = timedelta(minutes=30)  # for the slowest process of a collective call: the first compiles kernels
POINTER = "checkpoint.json"  # names the folder of the last whole checkpoint


@dataclass(frozen=True)
class World:
    """The processes of a training; a single one by default.

    Attributes:
        rank: Number of this process, from 0 on.
        size: How many there are.
        strategy: "ddp" or "fsdp".
    """

    rank: int = 0
    size: int = 1
    strategy: str = "ddp"

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and shows results."""
        return self.rank == 0

    def sums(self, *numbers: float) -> list[float]:
        """Each number summed over the processes: the same on all of them."""
        if self.size == 1:
            return list(numbers)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sums(0.0)

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = World()


class Batch(Protocol):
    """What processes can share: rows, and a way to deal them out."""

    @property
    def input_ids(self) -> Tensor: ...
    def split(self, parts: int) -> list[Self]: ...


Rows = TypeVar("Rows", bound=Batch)


class Sharded(Protocol):
    """What of a run's settings decides how several processes can share it."""

    @property
    def optimizer(self) -> str: ...
    @property
    def lora(self) -> int: ...
    @property
    def device(self) -> str: ...


class Lost(Exception):
    """Another process of the run has ended before its time."""


@contextmanager
def joined(strategy: str, plan: Sharded) -> Iterator[World]:
    """The world that torchrun or accelerate has started this process in; a world of one without them.

    Args:
        strategy: "ddp", "fsdp", or "auto": what accelerate's configuration asks for, else ddp.
        plan: Plan of the run that the processes share.

    Yields:
        The world, until the block ends in all processes.

    Raises:
        UserError: For what cannot be sharded.
        Lost: If the connection to another process breaks.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World()
        return
    if strategy == "auto":
        strategy = "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1") else "ddp"
    if strategy == "fsdp" and plan.optimizer != "adamw":
        raise UserError(f"--optimizer {plan.optimizer} cannot be sharded by --parallel fsdp; use adamw")
    if strategy == "fsdp" and plan.lora:
        raise UserError(f"--lora {plan.lora} cannot be sharded by --parallel fsdp; use --parallel ddp")
    if plan.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if plan.device == "cuda" else "gloo", timeout=TIMEOUT)
    world = World(dist.get_rank(), size, strategy)
    try:
        yield world
        world.barrier()  # who ends first would cut the others' last messages off
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in ("gloo", "NCCL")):
            raise
        raise Lost(
            f"process {world.rank} of {size} lost the connection to another one, which has ended; the same "
            "command resumes from the last checkpoint"
        ) from error
    gc.collect()  # sharded models, which hold the group, before it
    dist.destroy_process_group()


class _Loss(nn.Module):
    """DDP averages the gradients of a module's forward pass."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return self.model.loss(*inputs, **options)


def build(make: Callable[..., LanguageModel], device: str, world: World) -> LanguageModel:
    """A freshly drawn or loaded model for this process, which `spread` then takes.

    With fsdp it consists of shards from the start: its numbers are those that `make` gives in one process,
    but no process ever holds more of them whole than one block and what lies outside of the blocks.

    Args:
        make: Maps `device` to the model, as `functools.partial(models.build, name, seed=seed)` does. It may
            outline the model on the "meta" device and then fill it in place, as `models.load` does.
        device: Where it is to live.
        world: The processes, which all call this.

    Returns:
        The model.
    """
    if world.size == 1 or world.strategy == "ddp":
        return make(device=device)
    with _blocks_as_shards(make(device="meta"), device):
        return make(device=device)


@contextmanager
def _blocks_as_shards(outline: LanguageModel, device: str) -> Iterator[None]:
    """While a model of this outline is built, each block becomes shards as soon as it is in its list.

    The shards of a block without memory get some. A block in a list of another module, such as the experts of
    a layer, has other names and is left alone.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn.modules.module import register_module_module_registration_hook

    waiting, mesh = [_shapes(block) for block in cast(list[nn.Module], outline.blocks)], _mesh()

    def shard(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if not isinstance(parent, nn.ModuleList) or child is None or isinstance(child, FSDPModule):
            return
        if waiting and _shapes(child) == waiting[0]:
            del waiting[0]
            fully_shard(child, mesh=mesh)
            if all(parameter.is_meta for parameter in child.parameters()):
                child.to_empty(device=device)

    handle = register_module_module_registration_hook(shard)
    try:
        with _ChangedWhole():
            yield
    finally:
        handle.remove()


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


class _ChangedWhole(TorchFunctionMode):
    """A function that changes a sharded weight in place gets the whole one, one weight at a time.

    Constructors may draw weights again after their blocks are there, and sharded tensors draw numbers of
    their own. What is copied into a sharded weight is whole: each process keeps its part.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from torch.distributed.tensor import DTensor

        options = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        changes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
        if not (changes and tensors and isinstance(tensors[0], DTensor)):
            return function(*args, **options)
        if name == "copy_" and not isinstance(args[1], DTensor):
            fill(args[0], args[1])
            return args[0]
        with torch.no_grad():
            whole = {id(x): full(x).cpu() for x in tensors if isinstance(x, DTensor)}
            named = {key: whole.get(id(x), x) for key, x in options.items()}
            function(*(whole.get(id(x), x) for x in args), **named)
            fill(tensors[0], whole[id(tensors[0])])
        return tensors[0]


def _mesh() -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (dist.get_world_size(),))


def spread(model: LanguageModel, world: World) -> Loss:
    """`model.loss` with averaged gradients. With fsdp the model's parameters become shards, in place."""
    if world.size == 1:
        return model.loss
    if world.strategy == "ddp":
        return nn.parallel.DistributedDataParallel(_Loss(model))
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = _mesh()
    for block in cast(list[nn.Module], model.blocks):
        if not isinstance(block, FSDPModule):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    return model.loss


def share(batch: Rows, world: World) -> Rows:
    """This process' rows of a batch, of any kind that has `input_ids` and can `split` itself.

    Raises:
        UserError: If there are fewer rows than processes.
    """
    if world.size == 1:
        return batch
    rows = batch.input_ids.shape[0]
    if rows < world.size:
        raise UserError(
            f"batches of {rows} sequences are too few for {world.size} processes; raise --batch-tokens or "
            "--batch-size"
        )
    return batch.split(world.size)[world.rank]


def reshard(model: LanguageModel) -> None:
    """Undo what a forward pass without a backward one leaves behind.

    FSDP keeps the outermost module's weights whole for the backward pass. Until they are shards again, they
    are other tensors than those that the optimizer has, and a checkpoint would miss their moments.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()


def full(parameter: Tensor) -> Tensor:
    """A parameter with its shards put together; every process must ask."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def whole_weights(model: nn.Module, world: World) -> dict[str, Tensor]:
    """All parameters by name, put together on the CPU of the first process. The others must ask, too."""
    found = {}
    for name, parameter in model.named_parameters():
        whole = full(parameter.detach())
        if world.main:
            found[name] = whole.cpu()
    return found


def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        sharded = cast(DTensor, target)
        value = distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)
    target.copy_(value)


# --- checkpoints --------------------------------------------------------------------------------------------


def save(folder: Path, tensors: dict[str, Tensor], header: dict[str, Any], world: World) -> None:
    """Write folder/checkpoint-<step>/ by all processes, and then say that it is the last whole one.

    Args:
        folder: Folder of the training.
        tensors: Tensors by name, sharded or not.
        header: JSON values to keep with them; it has the step.
        world: The processes, which all call this.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    from ssm_retrieval.training import store

    place = folder / f"checkpoint-{header['step']}"
    if world.main:
        shutil.rmtree(place, ignore_errors=True)  # of a process that was killed while it wrote
    world.barrier()
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    save(plain, storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True))
    world.barrier()
    if world.main:
        store.write_json(folder / POINTER, {"folder": place.name, "progress": header})
        for old in folder.glob("checkpoint-*"):
            if old != place:
                shutil.rmtree(old, ignore_errors=True)


def forget(folder: Path) -> None:
    """Remove the sharded checkpoints, first what says that there is one."""
    (folder / POINTER).unlink(missing_ok=True)
    for place in folder.glob("checkpoint-*"):
        shutil.rmtree(place, ignore_errors=True)


def saved(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and header of the last sharded checkpoint, if there is one."""
    from ssm_retrieval.training import store

    path = folder / POINTER
    if not path.exists():
        return None
    found = store.read_json(path)
    return folder / found["folder"], found["progress"]


def load(place: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fill tensors with what any number of processes wrote.

    Args:
        place: The folder of the checkpoint.
        tensors: Tensors by name, sharded or not.
        world: The processes, which all call this.

    Raises:
        UserError: If the checkpoint is damaged.
    """
    import warnings

    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        with warnings.catch_warnings():  # a single process is what may be meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(plain, storage_reader=HuggingFaceStorageReader(str(place)), no_dist=world.size == 1)
    except (CheckpointException, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1:]
        raise UserError(f"{place} is damaged ({reason}); delete it and {POINTER} to start anew") from error
