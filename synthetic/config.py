"""What a run is: `RunConfig` is what the user asks for, `plan` settles every value of one model's
training.

Defaults are set here and nowhere else; the command line and its help are generated from `RunConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from ssm_retrieval.cli import Imports
from ssm_retrieval.errors import UserError
from ssm_retrieval.registry import ARCHITECTURES
from synthetic.checks import (
    PARTICULAR,
    check,
    check_growth,
    check_names,
    check_optimizer,
    check_values,
    lacks,
)
from synthetic.identity import TRAINING_VERSION, Plan, normal, run_id
from synthetic.options import TaskOptions, chosen
from synthetic.options import settled as settled_options
from synthetic.tasks import TASKS, Task

if TYPE_CHECKING:  # torch takes seconds to import, which a help page can spare
    pass

__all__ = ["TRAINING_VERSION", "Plan", "RunConfig", "check", "check_names", "plan", "run_id"]

# The names of models and tasks are checked in `plan`: a user's own may be among them.
MODELS = tyro.conf.arg(metavar=f"[{{{','.join(ARCHITECTURES)}}} [...]]")
TASK_NAMES = tyro.conf.arg(
    metavar="{" + ",".join(TASKS) + "}",
    help=". ".join(f"{name}: {task.help}" for name, task in TASKS.items()) + ".",
)

# What serves every family best at the tiny preset (docs/learnability.md). The learning rate falls with
# sqrt(width) for wider models.
DEFAULT_LR = 2e-3
RECALL_LR = 4e-3  # of state space models that begin ready to recall
GAP_LR = 1e-3  # of attention with --growth gap: with more, one seed in three is stuck on the way to 1,024
ADAFACTOR_LR = (1e-2, 1e-3)  # torch's own for random weights; less with --init
PRETRAINED_LR = 1e-4  # with --init, at width 768, where pretraining peaks at 6e-4 or more
DEFAULT_CURRICULUM = 2
DEFAULT_STEPS = 4000
PAPER_EXAMPLES = 20_000_000  # training budget, batch and learning rate of Retrievit's position scripts
PAPER_BATCH = 128
PAPER_LR = 5e-5


def unset(metavar: str, default: str) -> Any:
    """How the help page shows a field that is None by default, and what None stands for."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True)
class RunConfig:
    """Train models on an in-context retrieval task and compare how fast they learn it.

    A model reads --seq-len symbols and a query, which is one of them. It must answer at which position that
    symbol stands. By default a Transformer and a Mamba of equal size are trained, one after the other, on the
    same data in the same order.

    Each model is a run of its own. Its folder runs/<id>/ receives configuration, metrics, checkpoints and
    the learning curve; runs/compare-<hash>/ shows all models together. The same command resumes an
    interrupted run and shows a finished one again. With another --model it trains that model only.

    Examples, the fastest first:

        python -m synthetic.run --seq-len 64 --model mamba mamba2 hybrid    which SSM retrieves better?
        python -m synthetic.run --model mamba --layout prefix               does knowing the query help?
        python -m synthetic.run --model transformer --position none         attention without positions?
    """

    seq_len: int = 1024
    """Number of context symbols, N. The goal of a run is accuracy at this length."""
    model: Annotated[tuple[str, ...], MODELS] = ("transformer", "mamba")
    """Architectures to train, one after the other. At the same step and length all see the same batch."""
    preset: str = "tiny"
    """Model size: tiny (about 0.5 M parameters), 14m, 31m and 70m (Transformer only), 130m or 160m, 150m, \
370m or 410m, 790m or 1b, 1.4b, 2.8b. A family that lacks a size lists those it has."""
    task: Annotated[str, TASK_NAMES] = "position"
    layout: Literal["suffix", "prefix", "instruction", "two-pass"] = "suffix"
    """Where the query stands. suffix: after the context. prefix: before it. instruction: after it, and the \
sequence begins with a generic task token. two-pass: after the context, which comes twice."""
    num_symbols: Annotated[
        int | None, unset("INT", "--seq-len if answers are positions, else as in the task's paper")
    ] = None
    """Number of different symbols, V."""
    min_seq_len: Annotated[int | None, unset("INT", "--seq-len")] = None
    """Fewest context symbols in training of ngram and ngram-duplicate, fewest distractors of \
position-varlen. Each batch draws a length up to --seq-len; evaluation always uses --seq-len."""
    query_size: Annotated[int | None, unset("INT", "2")] = None
    """Queried symbols of an n-gram."""
    answer_size: Annotated[int | None, unset("INT", "3")] = None
    """Symbols of an n-gram that are the answer."""
    blocks: Annotated[int | None, unset("INT", "4")] = None
    """Blocks of ngram-duplicate."""
    num_pairs: Annotated[int | None, unset("INT", "8")] = None
    """Key-value pairs of mqar."""
    num_tokens: Annotated[int | None, unset("INT", "16")] = None
    """Symbols that selective-copy copies."""
    task_options: Annotated[TaskOptions, tyro.conf.arg(help_behavior_hint="(default: the task's)")] = field(
        default_factory=dict, hash=False
    )
    """Other options of the task, such as power=1 random_fillers=false for mqar. A wrong name lists them."""
    position: Annotated[
        Literal["learned", "rope", "none"] | None,
        unset("{learned,rope,none}", "learned for every model; --protocol paper: rope, SSMs none"),
    ] = None
    """How a model learns the order of tokens: learned adds vectors to the embedding, rope is attention's."""
    rotary_pct: float = 0.25
    """Share of each head's dimensions that RoPE rotates, 0 to 1 (with --position rope)."""
    init: Annotated[str | None, unset("STR", "random weights")] = None
    """Start from published weights: a folder, or a name on the Hugging Face hub such as \
state-spaces/mamba-130m, with the one --model that it holds. Shape and positions are the checkpoint's; the \
task's tokens are added to its vocabulary."""
    d_model: Annotated[int | None, unset("INT", "the preset's; tiny: 128")] = None
    """Width: channels of the residual stream."""
    layers: Annotated[
        int | None, unset("INT", "the preset's; tiny: Transformer 2, hybrid 3, Mamba and Mamba-2 4, linear 1")
    ] = None
    """Number of blocks."""
    heads: Annotated[int | None, unset("INT", "the preset's; tiny: 4")] = None
    """Heads of attention, or of Mamba-2. They must divide the width, and Mamba-2's the inner one."""
    d_state: Annotated[int | None, unset("INT", "the preset's")] = None
    """State size per channel of Mamba and Mamba-2, 1 to 256."""
    d_conv: Annotated[int | None, unset("INT", "the preset's")] = None
    """Taps of the short convolution before a state space: each token sees this many, itself included."""
    window: Annotated[int | None, unset("INT", "all")] = None
    """Tokens that attention sees, the last one included: sliding windows, whose memory is constant."""
    ssm_init: Annotated[
        str | None, unset("STR", "recall for pure SSMs if answers are learned positions, else default")
    ] = None
    """First weights of state space models. default: as published. recall: a memory that does not fade and \
is read by what it was written with, which helps retrieval. A wrong name lists all, parts of recall too."""
    protocol: Literal["default", "paper"] = "default"
    """default: many queries per sequence, a length curriculum, large steps. paper: one query per sequence, \
fixed length, and the papers' loss, learning rate and budget; too slow for a CPU."""
    queries: Annotated[
        int | None, unset("INT", "64, or as many as the task allows; 1 with --layout prefix")
    ] = None
    """Queries per training sequence, K. Evaluation always uses one (mqar and selective-copy: all). \
position-varlen's default is at most a quarter of its symbols."""
    curriculum: Annotated[int | None, unset("INT", "2, or the shortest that the task allows")] = None
    """Context length at the start of training; it doubles whenever training accuracy passes 0.95. 0: always \
--seq-len."""
    growth: Annotated[
        Literal["prefix", "gap", "window", "filled", "mixed"] | None,
        unset("{prefix,gap,window,filled,mixed}", "gap if answers are learned positions, else prefix"),
    ] = None
    """Where contexts shorter than --seq-len lie. prefix: at the first positions, queries right behind. gap: \
the same, with queries where they stand at --seq-len. window: at a random place. filled: the same, with \
<bos> at all other positions. mixed: as prefix, but half of the batches are shorter than the rest."""
    lr: Annotated[
        float | None,
        unset(
            "FLOAT",
            "1e-3 at width 128, pure SSMs 4e-3 with --ssm-init recall, 2e-3 of hybrids and where neither "
            "that nor --growth gap applies; falling with the square root of width",
        ),
    ] = None
    """Peak learning rate. Other defaults: 1e-4 at width 768 with --init; 1e-2 with adafactor, 1e-3 with \
both; 5e-5 with --protocol paper."""
    steps: Annotated[int | None, unset("INT", "4000")] = None
    """Optimiser steps at most."""
    budget: Annotated[int | None, unset("INT", "none; 20 million with --protocol paper")] = None
    """Training sequences at most, instead of --steps."""
    stop_at: Annotated[float | None, unset("FLOAT", "0.98; 0.95 with --protocol paper")] = None
    """Accuracy on validation sequences of length --seq-len at which training stops. A second, larger set \
must confirm it. 1.01: never stop early."""
    batch_tokens: int = 2048
    """Tokens per batch. The number of sequences follows from their length, but is never less than 8."""
    batch_size: Annotated[int | None, unset("INT", "by --batch-tokens; 128 with --protocol paper")] = None
    """Sequences per batch, whatever their length, instead of --batch-tokens."""
    label_smoothing: float = 0.0
    """Share of each training target that is spread over the whole vocabulary, 0 to below 1. Evaluations \
report the loss without it."""
    betas: Annotated[
        tuple[float, float] | None, unset("FLOAT FLOAT", "0.9 0.98; 0.9 0.999 with --protocol paper")
    ] = None
    """AdamW's decay rates of the mean gradient and of its square."""
    ssm_lr: float = 1.0
    """Factor on the learning rate of a state space's own parameters: A, D, and the bias and projection of \
dt (of Mamba-2 the bias only). S4 uses less than 1. 0: they keep their first values."""
    weight_decay: float = 0.0
    """AdamW's weight decay of matrices; norms, biases, embeddings and SSM parameters have none."""
    warmup: Annotated[
        int | None, unset("INT", "50; --protocol paper: a tenth of all steps, n-grams a twentieth")
    ] = None
    """Steps in which the learning rate rises to its peak."""
    schedule: Annotated[
        Literal["constant", "cosine", "linear"] | None,
        unset("{constant,cosine,linear}", "cosine; --protocol paper: the paper's"),
    ] = None
    """Course of the learning rate until --steps or --budget; cosine and linear fall to 0."""
    flat: Annotated[int | None, unset("INT", "none: the decay begins with the first step")] = None
    """Steps at the peak between the warm-up and the decay, which takes the rest of --steps."""
    grad_clip: float = 1.0
    """Largest norm of the gradient. 0: no clipping."""
    eval_every: Annotated[
        int | None, unset("INT", "100; --protocol paper: a hundredth of all steps, n-grams a thousandth")
    ] = None
    """Steps between evaluations."""
    eval_examples: int = 128
    """Validation sequences per evaluation during training."""
    final_eval_examples: int = 1024
    """Held-out sequences of the final evaluation, which is also reported by position."""
    seed: int = 0
    """Of initial weights and training data. Validation and held-out sequences are the same for all seeds."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU if there is one, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: autocast, with float32 weights. auto: bfloat16 where the hardware multiplies it natively."""
    optimizer: Literal["adamw", "adamw-8bit", "adafactor"] = "adamw"
    """State per parameter: adamw 8 bytes, adamw-8bit 2 (needs bitsandbytes), adafactor almost none. \
adafactor's --lr is relative to the size of the weights."""
    accumulate: int = 1
    """Compute a batch in this many parts, one after the other: same gradient, less memory."""
    checkpointing: bool = False
    """Keep only the inputs of blocks for the backward pass: less memory, about a third more time."""
    lora: int = 0
    """Rank of low-rank adapters, which are trained with the embedding instead of all weights (needs peft). \
0: train all weights."""
    plan: bool = False
    """Print the memory that the run needs and the smallest machine that has it; train nothing."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """What several processes (torchrun, accelerate launch) split: ddp the batch; fsdp also weights and \
optimizer state. auto: as accelerate is configured, else ddp."""
    threads: int = 0
    """CPU threads. 0: PyTorch's default."""
    imports: Imports = ()
    """A Python module of yours that registers models or tasks (docs/extending.md), in this folder or on \
PYTHONPATH. May be given several times."""
    out: str = "runs"
    """Folder that receives <id>/ of every run."""

    def __post_init__(self) -> None:
        if isinstance(self.model, str):  # RunConfig(model="mamba")
            object.__setattr__(self, "model", (self.model,))
        if isinstance(self.betas, list):  # of a file
            object.__setattr__(self, "betas", tuple(self.betas))
        if isinstance(self.task_options, Mapping):
            plain = {n: v.item() if isinstance(v, np.generic) else v for n, v in self.task_options.items()}
            object.__setattr__(self, "task_options", plain)

    def of(self, family: str) -> RunConfig:
        """The configuration for one of the models: without options that it lacks."""
        check_names(self)
        architecture = ARCHITECTURES.find(family)
        lacking = [name for name in PARTICULAR if lacks(architecture, name)]
        lacking += [] if architecture.has("rotary_pct") else ["rotary_pct"]
        own: dict[str, Any] = {name: getattr(RunConfig, name) for name in lacking}
        if not architecture.positions:
            own["position"] = None
        elif self.position == "rope" and architecture.knows_order:
            own["position"] = "none"  # what `checks.position` makes of it
        return replace(self, **own, model=(family,))


def plan(config: RunConfig, family: str, elsewhere: bool = False) -> Plan:
    """Settle every open value for one model.

    Args:
        config: What the user asks for.
        family: The architecture, one of `config.model`.
        elsewhere: The run is for another machine, so its device need not be here.

    Returns:
        The plan; its hash names the run.

    Raises:
        UserError: With one line, for values that are impossible or contradict each other.
    """
    from synthetic import pretrained, shape, tasks
    from synthetic.device import resolve_device, resolve_precision

    check_names(config)
    paper = config.protocol == "paper"
    recipe = TASKS[config.task].paper if paper else None
    check_values(config, paper, recipe.schedule if recipe else "")
    options = chosen(config)
    start = None
    if config.init is not None:
        start = pretrained.find(config, config.init, family)
        options["first_id"] = start.config.vocab_size
    task = tasks.build(config.task, **options)
    most = task.max_queries(config.seq_len)
    check(
        config.queries is None or config.queries <= most,
        f"--queries {config.queries} is more than a context of {config.seq_len} allows; use at most {most}",
    )
    queries = 1 if paper else config.queries or task.dense_queries()
    task.check(config.seq_len, queries)
    name, overrides, width = (
        shape.model(config, ARCHITECTURES.find(family), task, queries) if start is None else start.model(task)
    )
    curriculum = config.curriculum
    if curriculum is None:
        curriculum = first_length(task)
    elif 0 < curriculum < first_length(task):
        raise UserError(
            f"--curriculum {curriculum} leaves too few different contexts, or none, to hold some out; "
            f"use at least {first_length(task)}, or more --num-symbols"
        )
    steps, budget = config.steps, config.budget
    if steps is None and budget is None:
        steps, budget = (None, PAPER_EXAMPLES) if paper else (DEFAULT_STEPS, None)
    batch_size = config.batch_size or (PAPER_BATCH if paper else None)
    total = steps or (budget or 0) // (batch_size or PAPER_BATCH)  # steps of a run by the papers' protocol
    scheme = overrides.get("position", "none")
    growth = config.growth or ("gap" if task.positional and scheme == "learned" and not paper else "prefix")
    check_growth(growth, scheme, task)
    device = resolve_device(config.device, elsewhere)
    at, usual = (128, _usual_lr(family, overrides, growth)) if start is None else (768, PRETRAINED_LR)
    default_lr = PAPER_LR if paper else usual * (at / width) ** 0.5
    if config.optimizer == "adafactor":
        default_lr = ADAFACTOR_LR[start is not None]  # relative to the size of the weights, so of no width
    settled = Plan(
        family=family,
        model=name,
        model_overrides=overrides,
        task=config.task,
        task_options=settled_options(task, config),
        seq_len=config.seq_len,
        queries=queries,
        curriculum=0 if paper else min(curriculum, config.seq_len),
        lr=default_lr if config.lr is None else config.lr,
        steps=steps,
        budget=budget,
        stop_at=config.stop_at or (0.95 if paper else 0.98),
        batch_tokens=config.batch_tokens,
        batch_size=batch_size,
        weight_decay=config.weight_decay,
        warmup=(total // recipe.warmup if recipe else 50) if config.warmup is None else config.warmup,
        schedule=recipe.schedule if recipe else config.schedule or "cosine",
        grad_clip=config.grad_clip,
        eval_every=config.eval_every or (max(1, total // recipe.evaluations) if recipe else 100),
        betas=config.betas or ((0.9, 0.999) if paper else (0.9, 0.98)),
        eval_examples=config.eval_examples,
        final_eval_examples=config.final_eval_examples,
        seed=config.seed,
        device=device,
        precision=resolve_precision(config.precision, device),
        optimizer=config.optimizer,
        accumulate=config.accumulate,
        checkpointing=config.checkpointing,
        lora=config.lora,
        label_smoothing=config.label_smoothing,
        ssm_lr=1.0 if lacks(ARCHITECTURES[family], "ssm_lr") else config.ssm_lr,
        flat=config.flat,
        growth=growth,
        init=None if start is None else start.record,
    )
    check_optimizer(settled)
    return normal(settled)


def _usual_lr(family: str, overrides: Mapping[str, Any], growth: str) -> float:
    """The default learning rate at width 128."""
    architecture = ARCHITECTURES[family]
    if architecture.knows_order:
        return RECALL_LR if overrides.get("ssm_init") == "recall" else DEFAULT_LR
    return GAP_LR if growth == "gap" and not architecture.has("ssm_init") else DEFAULT_LR


def first_length(task: Task) -> int:
    """The shortest context, from DEFAULT_CURRICULUM on, of which the task has enough different ones."""
    for length in range(DEFAULT_CURRICULUM, task.seq_len):
        try:
            task.check(length, task.usual_queries(length))
        except ValueError:
            continue
        return length
    return task.seq_len
