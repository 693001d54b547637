"""Checks of the values of a `RunConfig`. Every error is one line that says what to do instead."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ssm_retrieval import registry
from ssm_retrieval.errors import UserError
from ssm_retrieval.registry import ARCHITECTURES, Registry
from synthetic.tasks import TASKS

if TYPE_CHECKING:
    from ssm_retrieval.models.architecture import Architecture
    from synthetic.config import RunConfig
    from synthetic.identity import Plan
    from synthetic.tasks import Task

LARGE = 10**12  # steps or sequences: longer than any machine lasts, and far below what files can hold
# Least and largest value of every number; None is always the default. Limits of the task and of the model
# come on top, and whether memory suffices is estimated before any is asked for (`synthetic.memory.require`).
BOUNDS: dict[str, tuple[float, float]] = {
    "seq_len": (1, 2**20),
    "num_symbols": (1, 2**22),
    "min_seq_len": (1, 2**20),
    "query_size": (1, 2**20),
    "answer_size": (1, 2**20),
    "blocks": (1, 2**20),
    "num_pairs": (1, 2**20),
    "num_tokens": (1, 2**20),
    "rotary_pct": (0.0, 1.0),
    "d_model": (1, 2**16),
    "layers": (1, 1024),
    "heads": (1, 2**16),
    "d_state": (1, 2**16),
    "d_conv": (1, 2**10),
    "window": (1, 2**20),
    "queries": (1, 2**20),
    "curriculum": (0, 2**20),
    "steps": (1, LARGE),
    "budget": (1, LARGE),
    "batch_tokens": (1, 2**24),
    "batch_size": (1, 2**20),
    "ssm_lr": (0.0, 1e3),
    "weight_decay": (0.0, 10.0),
    "warmup": (0, LARGE),
    "flat": (0, LARGE),
    "grad_clip": (0.0, 1e6),
    "eval_every": (1, LARGE),
    "eval_examples": (1, 10**7),
    "final_eval_examples": (1, 10**7),
    "seed": (0, 2**63 - 1),
    "accumulate": (1, 2**20),
    "lora": (0, 2**12),
}  # --threads: `cli.use_threads`
# Options of some architectures only: those whose config has one of these fields, and what they are called
PARTICULAR: dict[str, tuple[tuple[str, ...], str]] = {
    "d_state": (("d_state",), "state space models"),
    "d_conv": (("d_conv",), "models with a short convolution"),
    "window": (("window",), "models with attention"),
    "heads": (("n_head", "headdim"), "models with heads"),
    "ssm_init": (("ssm_init",), "state space models with a choice of first weights"),
    "ssm_lr": (("d_state",), "state space models"),
}


def check(condition: bool, message: str) -> None:
    """Raise a one-line error unless `condition` holds.

    Raises:
        UserError: With `message`.
    """
    if not condition:
        raise UserError(message)


def option(name: str) -> str:
    """The flag of a field of `RunConfig`: `seq_len` -> `--seq-len`."""
    return "--" + name.replace("_", "-")


def lacks(architecture: Architecture, name: str) -> bool:
    """Whether an option has no meaning for an architecture, as only those of PARTICULAR can."""
    if name not in PARTICULAR:
        return False
    if name == "d_conv" and not getattr(architecture.config, "short_conv", True):  # off by default
        return True
    return not any(architecture.has(field) for field in PARTICULAR[name][0])


def within(name: str, value: Any) -> None:
    """Check that a number lies within its BOUNDS, as NaN never does.

    Raises:
        UserError: If it does not.
    """
    least, most = BOUNDS[name]
    said = f"{option(name)} {value}"
    check(not math.isnan(value), f"{said} is not a number; give one of {least} .. {most}")
    check(value >= 0 or least < 0, f"{said} is negative; use at least {least}")
    check(value >= least, f"{said} must be at least {least}")
    check(value <= most, f"{said} is too large; use at most {most}")


def check_names(config: RunConfig) -> None:
    """Import the user's modules and check that the models and the task exist.

    Raises:
        UserError: For a name that neither the toolkit nor the user's modules have.
    """
    registry.use(config.imports)
    asked: list[tuple[str, Registry[Any], tuple[str, ...]]] = [
        ("model", ARCHITECTURES, config.model),
        ("task", TASKS, (config.task,)),
    ]
    for kind, registered, names in asked:
        for name in names:
            try:
                registered.find(name)
            except UserError as error:
                raise UserError(f"--{kind} {name}: {error}") from error


def check_values(config: RunConfig, paper: bool, schedule: str) -> None:
    """Check for values that are impossible, or contradict each other, whatever the task.

    Args:
        config: What the user asked for.
        paper: Whether the protocol is the papers'.
        schedule: Schedule of the learning rate in the task's paper.

    Raises:
        UserError: For the first such value.
    """
    for name in BOUNDS:
        value = getattr(config, name)
        if value is not None:
            within(name, value)
    check(config.lr is None or 0 < config.lr < 10, f"--lr {config.lr} must lie between 0 and 10")
    check(
        config.stop_at is None or 0 < config.stop_at < math.inf,
        f"--stop-at {config.stop_at} must be positive",
    )
    smoothing = config.label_smoothing
    check(0 <= smoothing < 1, f"--label-smoothing {smoothing} must be at least 0 and below 1")
    check_betas(config)
    tokens = type(config).batch_tokens
    check(
        config.batch_size is None or config.batch_tokens == tokens,
        f"--batch-size {config.batch_size} and --batch-tokens {config.batch_tokens} exclude each other; give "
        "one of them",
    )
    check(config.out != "", "--out is empty; give a folder, or . for this one")
    check("\0" not in config.out, "--out holds a zero byte, which no path can; give another folder")
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
        not paper or config.schedule in (None, schedule),
        f"--schedule {config.schedule} contradicts --protocol paper, which has {schedule}; leave one out",
    )
    check(
        not paper or config.curriculum in (None, 0),
        f"--curriculum {config.curriculum} contradicts --protocol paper, which has none; leave one out",
    )
    check_particular(config)
    if config.init is None:  # which settles the shape, and refuses these options itself
        check_architecture(config)


def check_betas(config: RunConfig) -> None:
    """Check AdamW's two rates.

    Raises:
        UserError: If they are not two numbers from 0 to below 1, or the optimizer has none.
    """
    betas: Any = config.betas
    if betas is None:
        return
    pair = betas if isinstance(betas, tuple) else (betas,)
    said = "--betas " + " ".join(map(str, pair))
    check(
        len(pair) == 2 and all(0 <= beta < 1 for beta in pair),
        f"{said} must be two numbers, each at least 0 and below 1",
    )
    check(
        config.optimizer != "adafactor",
        f"{said} has no effect with --optimizer adafactor; leave one of them out",
    )


def check_optimizer(plan: Plan) -> None:
    """Check that the plan's learning rates have the effect that was asked for.

    Raises:
        UserError: If there is no decay after --flat, or no parameter that --ssm-lr is for.
    """
    if plan.flat is not None:
        said = f"--flat {plan.flat}"
        check(
            plan.schedule != "constant",
            f"{said} has no effect with --schedule constant; give --schedule cosine or linear",
        )
        check(plan.steps is not None, f"{said} needs a number of steps; give --steps instead of --budget")
        steps = plan.steps or 0
        check(
            plan.warmup + plan.flat < steps,
            f"{said} and --warmup {plan.warmup} leave nothing of --steps {steps} to the decay; give fewer",
        )
    if plan.ssm_lr != 1:
        from ssm_retrieval import models
        from ssm_retrieval.training.optimizers import recurrent, trained

        said = f"--ssm-lr {plan.ssm_lr}"
        check(
            plan.lora == 0,
            f"{said} has no effect with --lora {plan.lora}, which trains no state space; leave one out",
        )
        model = models.build(plan.model, device="meta", **plan.model_overrides)
        check(
            any(recurrent(name) for name, _ in trained(model)),
            f"{said} has no effect: --model {plan.family} trains none of these parameters; leave it out",
        )


def position(config: RunConfig, architecture: Architecture) -> str:
    """The position scheme of a model: the one asked for, or else the protocol's or the model's default.

    Positions are learned by default, so that no model is told more of the order than another; the papers give
    them to attention alone. An SSM beside attention has none with "rope", which `check_architecture` refuses
    for SSMs alone.

    Raises:
        UserError: If the model lacks the scheme asked for.
    """
    schemes = architecture.positions
    usual = "rope" if config.protocol == "paper" else "learned"
    chosen = config.position or (usual if usual in schemes else schemes[0])
    if chosen == "rope" and architecture.knows_order:
        chosen = "none"
    check(
        chosen in schemes,
        f"--position {chosen} is none of --model {architecture.name}'s; use {', '.join(schemes)}",
    )
    return chosen


def check_growth(growth: str, scheme: str, task: Task) -> None:
    """Check that a model can know where its contexts lie, if answers say so.

    Args:
        growth: As in `synthetic.curricula`.
        scheme: The model's position scheme.
        task: What is trained on.

    Raises:
        UserError: If it cannot, or the task's contexts cannot be placed so.
    """
    check(
        growth not in ("gap", "window") or scheme == "learned",
        f"--growth {growth} needs --position learned, and the model has {scheme}; give --growth prefix",
    )
    check(
        growth not in ("gap", "filled") or task.positional,
        f"--growth {growth} is for tasks whose answers are positions, not --task {task.name}; use prefix",
    )


def check_particular(config: RunConfig) -> None:
    """Check that at least one of the models has each option of PARTICULAR that was given.

    Raises:
        UserError: For an option that none has.
    """
    models = " ".join(config.model)
    for name, (_, kind) in PARTICULAR.items():
        value = getattr(config, name)
        having = [model for model in config.model if not lacks(ARCHITECTURES[model], name)]
        check(
            value == getattr(type(config), name) or bool(having),
            f"{option(name)} {value} is for {kind}, which --model {models} lacks; leave it out",
        )


def check_architecture(config: RunConfig) -> None:
    """Check that at least one of the models has the positions that were asked for.

    Raises:
        UserError: For an option that none has.
    """
    models = " ".join(config.model)
    records = [ARCHITECTURES[name] for name in config.model]
    asked = [(record, position(config, record)) for record in records if record.positions]
    usable = sorted({scheme for record in records for scheme in record.positions})
    remedy = f"use {' or '.join(usable)}" if usable else "leave it out"
    check(
        config.position is None or config.position in usable,
        f"--position {config.position} is for attention, which --model {models} lacks; {remedy}",
    )
    default = type(config).rotary_pct
    rotating = {scheme for record, scheme in asked if "rope" in record.positions}
    check(
        config.rotary_pct == default or bool(rotating),
        f"--rotary-pct {config.rotary_pct} is for attention, which --model {models} lacks; leave it out",
    )
    check(
        config.rotary_pct == default or "rope" in rotating,
        f"--rotary-pct {config.rotary_pct} has no effect with --position {', '.join(sorted(rotating))}; "
        "give --position rope",
    )
