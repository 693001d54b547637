"""The operations that are slow in plain PyTorch, each with a reference and the fast ways to compute it.

`with ops.backend("reference"):` chooses one way for all of them.
"""

from ssm_retrieval.ops._route import backend as backend

# Sizes of the kernels. They stand here because the kernels' own files import numba
LANES = 16  # channels that fill a vector
CHUNK = 64  # tokens between the states that a scan keeps for its backward pass
TILE = 4  # states that stay in registers while that pass goes through a chunk
GROUP = 5  # most blocks of LANES channels in one task of that pass
TASKS = 16  # of that pass, at least, where there are as many blocks
DELTA_CHUNK = 32  # tokens between the states that the delta rule keeps
WIDE = 4 * LANES  # channels of a value that the delta rule takes at a time, if a head has about as many


def scan_group(batch: int, blocks: int) -> int:
    """Blocks of channels in one task of a scan's backward pass, of `blocks` in each of `batch` sequences.

    It depends on the shape alone, because the order of sums decides the last bits of dB and dC. Many cores
    need many tasks; but each has dB and dC of its own, which cost memory and time.
    """
    most = max(1, min(GROUP, batch * blocks // TASKS))
    return -(-blocks // -(-blocks // most))  # as equal as can be


def value_lanes(headdim: int) -> int:
    """Channels of a value that the delta rule takes at a time: WIDE where that pads by a third at most."""
    blocks, wide = -(-headdim // LANES), -(-headdim // WIDE)
    return WIDE if 3 * wide * WIDE <= 4 * blocks * LANES else LANES


def padded_values(headdim: int) -> int:
    """Channels of a value as the delta rule's kernels have them."""
    lanes = value_lanes(headdim)
    return -(-headdim // lanes) * lanes
