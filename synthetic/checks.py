"""What the values of a `RunConfig` must satisfy, in one line that says what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.errors import UserError

if TYPE_CHECKING:
    from synthetic.config import RunConfig


def check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_values(config: RunConfig, paper: bool, schedule: str) -> None:
    """Raise UserError for values that are impossible, or contradict each other, whatever the task."""
    for name in ("seq_len", "batch_tokens", "eval_examples", "final_eval_examples", "accumulate"):
        value = getattr(config, name)
        check(value >= 1, f"--{name.replace('_', '-')} {value} must be at least 1")
    for name in ("queries", "steps", "budget", "eval_every"):
        value = getattr(config, name)
        check(value is None or value >= 1, f"--{name.replace('_', '-')} {value} must be at least 1")
    for name in ("seed", "warmup", "threads", "grad_clip", "weight_decay", "lora"):
        value = getattr(config, name)
        check(value is None or value >= 0, f"--{name.replace('_', '-')} {value} must not be negative")
    check(
        config.curriculum is None or config.curriculum >= 0, f"--curriculum {config.curriculum} is negative"
    )
    check(config.lr is None or 0 < config.lr < 10, f"--lr {config.lr} must lie between 0 and 10")
    check(config.seed < 2**63, f"--seed {config.seed} must be less than 2**63")
    for name, most in (("seq_len", 2**20), ("batch_tokens", 2**24)):
        value = getattr(config, name)
        check(value <= most, f"--{name.replace('_', '-')} {value} is too large; use at most {most}")
    check(config.stop_at is None or config.stop_at > 0, f"--stop-at {config.stop_at} must be positive")
    check(len(set(config.model)) == len(config.model), f"--model {' '.join(config.model)} names one twice")
    check(
        config.steps is None or config.budget is None,
        f"--steps {config.steps} and --budget {config.budget} exclude each other; give one of them",
    )
    check(
        not paper or config.queries in (None, 1),
        f"--queries {config.queries} contradicts --protocol paper, which has 1; leave one of them out",
    )
    check(
        not paper or config.schedule in ("constant", schedule),
        f"--schedule {config.schedule} contradicts --protocol paper, which has {schedule}; leave one out",
    )
    check(
        not paper or config.curriculum in (None, 0),
        f"--curriculum {config.curriculum} contradicts --protocol paper, which has none; leave one out",
    )
