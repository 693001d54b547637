"""What each token of a position-type sequence is for: the axis along which probes are averaged and compared.

Tasks position, position-varlen and grid, in any layout, with one query. Example, suffix layout, N = 4:

    tokens   <bos> <s5>       <s1>   <s2>       <s4>       <query>      <s1>
    role     bos   distractor target distractor distractor query_marker query
"""

from __future__ import annotations

from torch import Tensor

from ssm_retrieval.errors import UserError
from synthetic.tasks import Batch, Task
from synthetic.tasks.position import Position

ROLES = ("bos", "distractor", "target", "separator", "query_marker", "query", "task", "answer")


def role(name: str) -> int:
    """The number of a role in the tensors of `token_roles`."""
    return ROLES.index(name)


def token_roles(task: Task, batch: Batch) -> Tensor:
    """The role of every token.

    "target" is the context symbol that the query asks for, "distractor" every other one; "separator" are the
    markers of an image's rows and frame (grid); "answer" is a position token that is fed in
    (`supervise_bos`); `<bos>` is "bos" wherever it stands. In layout two-pass a symbol has the same role both
    times.

    Args:
        task: A task of position type.
        batch: Its sequences, with one query each.

    Returns:
        (B, L) int64, indices into `ROLES`.

    Raises:
        UserError: The task has no roles, or the batch has several queries and so no single target.
    """
    if not isinstance(task, Position):
        raise UserError(f"roles are not defined for task {task.name}: use position, position-varlen or grid")
    if batch.target_index.shape[1] != 1:
        raise UserError(
            f"roles are not defined for {batch.target_index.shape[1]} queries a sequence: use queries=1"
        )
    v, ids = task.vocabulary, batch.input_ids
    result = ids.new_full(ids.shape, role("separator"))  # what no line below claims is a marker
    result[ids == v.bos] = role("bos")
    result[ids == v.query] = role("query_marker")
    result[ids == v.task] = role("task")
    result[(ids >= v.first_position) & (ids < v.task)] = role("answer")
    symbol = (ids >= v.first_symbol) & (ids < v.first_position)
    query = (ids == v.query).roll(1, dims=1)  # the queried symbol follows its marker, in every layout
    result[symbol] = role("distractor")
    result[query] = role("query")
    context = symbol & ~query
    place = (context.cumsum(1) - 1) % batch.length  # 0-based number of a context symbol, in either pass
    result[context & (place == batch.target_index)] = role("target")
    return result


def is_context(roles: Tensor) -> Tensor:
    """Which tokens are context symbols, target or distractor: bool, shaped as the roles."""
    return (roles == role("target")) | (roles == role("distractor"))


def target_at(roles: Tensor) -> Tensor:
    """Position at which each sequence first reads its target, (B,) int64, of `token_roles` (B, L)."""
    return (roles == role("target")).int().argmax(1)


def targets_at(roles: Tensor) -> Tensor:
    """All positions of the target in every sequence.

    Args:
        roles: (B, L) from `token_roles`.

    Returns:
        (B, 1) int64, of layout two-pass (B, 2), increasing.
    """
    return (roles == role("target")).nonzero()[:, 1].view(len(roles), -1)
