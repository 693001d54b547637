"""What a model's training needs in memory, without training it: `python -m synthetic.run --plan`, and a check
before every run that the machine has it."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from rich import box
from rich.table import Table

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.planning import (
    Memory,
    Step,
    device_peak,
    evaluation_memory,
    smallest_machine,
    step_memory,
)
from ssm_retrieval.registry import ARCHITECTURES
from ssm_retrieval.style import NAMES
from ssm_retrieval.training.lora import add_adapters
from synthetic import tasks
from synthetic.config import Plan
from synthetic.curricula import batch_shape, lengths, place
from synthetic.evaluate import rows_at_once

MODELS_A_TABLE = 4  # so that no number is cut in a terminal of 80 columns
REMEDY = "try --checkpointing, --accumulate or --optimizer adafactor"


def meta_model(plan: Plan) -> models.LanguageModel:
    """The model that a plan trains, adapters included, with shapes only."""
    model = models.build(plan.model, device="meta", **plan.model_overrides)
    if plan.lora:
        add_adapters(model, plan.lora, plan.seed)
    return model


def training_steps(plan: Plan) -> list[Step]:
    """The training step at every length of the curriculum, the longest last."""
    task = tasks.build(plan.task, **plan.task_options)
    steps = []
    for at in lengths(plan):
        rows, queries, length = batch_shape(task, plan, at)
        where = place(plan, length)
        row = task.batch(1, seed=plan.seed, index=0, queries=queries, length=length, place=where)
        steps.append(
            Step(
                rows=rows,
                length=row.input_ids.shape[1],
                answers=row.answer_at.shape[-1],
                bfloat16=plan.precision == "bfloat16",
                optimizer=plan.optimizer,
                accumulate=plan.accumulate,
                checkpointing=plan.checkpointing,
                device=plan.device,
            )
        )
    return steps


def evaluation_step(plan: Plan) -> Step:
    """The largest forward pass of an evaluation."""
    task = tasks.build(plan.task, **plan.task_options)
    examples = max(plan.eval_examples, plan.final_eval_examples)
    row = task.batch(1, seed=plan.seed, index=0, queries=task.usual_queries(plan.seq_len))
    rows = rows_at_once(task, examples, plan.seq_len)
    at = row.answer_at[..., : row.retrieved]
    bfloat16 = plan.precision == "bfloat16"
    return Step(rows, row.input_ids.shape[1], at.shape[-1], bfloat16=bfloat16, device=plan.device)


def require(plan: Plan) -> None:
    """Refuse a training that needs more memory than the device has, before it asks for any.

    A user's own model passes if its needs are not known.

    Raises:
        UserError: Naming what is needed, what there is, and what helps.
    """
    there = available(plan.device)
    if there is None or ARCHITECTURES[plan.family].memory is None:
        return
    largest = max(training_steps(plan), key=lambda step: step.at_once * step.length)
    needed = device_peak(meta_model(plan), largest, evaluation_step(plan), devices=1)
    if needed > there:
        raise UserError(
            f"{NAMES[plan.family]} needs about {size(needed)} of memory and --device {plan.device} has "
            f"{size(there)}: choose a smaller model, context, batch or vocabulary, or {REMEDY}"
        )


def available(device: str) -> int | None:
    """Bytes of all memory of a device; None where it cannot be asked."""
    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    names = getattr(os, "sysconf_names", {})
    if device == "cpu" and "SC_PHYS_PAGES" in names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def table(plans: list[Plan]) -> Table:
    """A column a model: numbers of its parameters, bytes by purpose at the largest step, and the machine."""
    found = Table(title="Memory of training", box=box.SIMPLE_HEAD, padding=0)
    found.add_column("", no_wrap=True)
    rows: dict[str, list[str]] = {}
    for plan in plans:
        found.add_column(
            f"{NAMES[plan.family]} {plan.model.removeprefix(f'{plan.family}-')}", justify="right"
        )
        for name, value in column(plan).items():
            rows.setdefault(name, []).append(value)
    for name, values in rows.items():
        found.add_row(name, *values, end_section=name in ("parameters", "tokens at once", "evaluation"))
    return found


def column(plan: Plan) -> dict[str, str]:
    """What `table` says about one model."""
    model, evaluation = meta_model(plan), evaluation_step(plan)
    steps = training_steps(plan)

    def largest(checkpointing: bool) -> tuple[Memory, Step]:
        each = [replace(step, checkpointing=checkpointing) for step in steps]
        return max(((step_memory(model, s), s) for s in each), key=lambda pair: pair[0].peak)

    memory, step = largest(plan.checkpointing)
    kept = {c: largest(c)[0].activations for c in (False, True)}
    always = memory.weights + memory.optimizer
    machine = smallest_machine(model, step, evaluation)
    return {
        "parameters": f"{memory.parameters:,}",
        "trained": f"{memory.gradients // 4:,}",
        "tokens at once": f"{step.at_once} x {step.length:,}",
        "weights, float32": size(memory.weights),
        "gradients, float32": size(memory.gradients),
        f"optimizer ({plan.optimizer})": size(memory.optimizer),
        f"activations ({plan.precision})": size(kept[False]),
        "  with --checkpointing": size(kept[True]),
        "final norm and loss": size(memory.head),
        "a block's backward pass": size(memory.working),
        "peak of a step": size(memory.peak),
        "peak of an evaluation": size(always + evaluation_memory(model, evaluation)),
        "smallest machine": machine.name if machine else f"none of these; {REMEDY}",
    }


def size(number: int) -> str:
    """Bytes in words, in MiB or GiB."""
    return f"{number / 2**20:,.1f} MiB" if number < 2**30 else f"{number / 2**30:,.1f} GiB"
