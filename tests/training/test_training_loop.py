"""What training loops share, beside torch's own schedulers and a clock that is set by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from ssm_retrieval.training.loop import SHARE, CheckpointClock, half_cosine, set_rate, warm_up


def rates(make, steps: int) -> list[float]:
    """The rates that a scheduler of torch gives an optimizer whose own is 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_factors_are_those_of_torchs_schedulers(steps):
    # up to 1 in `steps` steps, from 1 / steps on; torch counts the intervals between them
    linear = rates(lambda o: LinearLR(o, 1 / steps, total_iters=max(1, steps - 1)), steps + 3)
    assert [warm_up(k, steps) for k in range(steps + 3)] == pytest.approx(linear)
    cosine = rates(lambda o: CosineAnnealingLR(o, T_max=steps), steps + 1)
    assert [half_cosine(k, steps) for k in range(steps + 1)] == pytest.approx(cosine, abs=1e-12)


def test_no_warm_up_and_no_steps_are_the_peak():
    assert warm_up(0, 0) == half_cosine(0, 0) == 1


def test_all_groups_get_the_rate():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [w], "lr": 0.1 * i} for i, w in enumerate(weights, 1)])
    set_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


@given(
    st.floats(0.5, 60),
    st.lists(st.tuples(st.floats(0.01, 20), st.floats(0, 5)), min_size=1, max_size=60),
)
def test_a_checkpoint_is_due_after_the_interval_and_writing_takes_its_share(least, steps):
    """steps: (seconds of a step, seconds of writing if a checkpoint is due after it)."""
    now, last, wait = 0.0, 0.0, least
    clock = CheckpointClock(least, lambda: now)
    for seconds, cost in steps:
        now += seconds
        assert clock.due() == (now - last > wait)
        if clock.due():
            with clock.writing():
                now += cost
            assert clock.every == pytest.approx(max(wait, cost / SHARE), abs=1e-6)
            last, wait = now, clock.every
