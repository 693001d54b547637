"""Every task through the trainer, the evaluation and the command line's configuration."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from task_solvers import SOLVERS, answers_by_block, kinds, small

from ssm_retrieval import models
from ssm_retrieval.statistics import wilson
from synthetic import curricula, run, tasks, trainer
from synthetic.config import RunConfig, plan, run_id
from synthetic.evaluate import evaluate, evaluate_blocks, extrapolate, heldout, score

HOW = dict(device="cpu", precision="float32")
CPU = dict(
    steps=4,
    eval_every=2,
    eval_examples=6,
    final_eval_examples=12,
    batch_tokens=256,
    layers=2,
    d_state=4,
    device="cpu",
    precision="float32",
)
CONFIGS = {
    "position": dict(seq_len=16, num_symbols=40),
    "position-varlen": dict(seq_len=16, num_symbols=40, min_seq_len=12),
    "grid": dict(seq_len=16, num_symbols=40),
    "ngram": dict(seq_len=16, min_seq_len=12),
    "ngram-duplicate": dict(seq_len=32, blocks=3),
    "mqar": dict(seq_len=20, num_symbols=64, num_pairs=3),
    "selective-copy": dict(seq_len=16, num_tokens=5),
    "induction": dict(seq_len=16),
}


@pytest.mark.parametrize("family", ["transformer", "mamba"])
@pytest.mark.parametrize("name, layout", kinds())
def test_a_few_steps_of_every_task(tmp_path, name, layout, family):
    chosen = CONFIGS[name] | ({} if layout is None else dict(layout=layout))
    p = plan(RunConfig(task=name, **chosen, **CPU), family)
    result = trainer.train(p, tmp_path)
    task = tasks.build(name, **p.task_options)
    asked = task.usual_queries(p.seq_len)
    assert result["step"] == 4 and result["count"] == 12 * asked
    assert np.isfinite(result["loss"]) and 0 <= result["accuracy"] <= 1
    assert result["chance"] == task.batch(1, seed=0, index=0, length=p.seq_len).chance
    assert p.curriculum == 0 or task.shortest <= p.curriculum <= p.seq_len
    assert set(p.task_options) <= set(tasks.options(name))


class Oracle:
    """A model that gives each row the labels its solver finds: a perfect one."""

    def __init__(self, task):
        self.task = task

    def __call__(self, input_ids, logits_at):
        logits = torch.zeros(len(input_ids), logits_at.shape[-1], self.task.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            tokens = self.task.vocabulary.decode(ids)
            labels = self.labels(tokens)
            places = logits_at if logits_at.dim() == 1 else logits_at[row]
            for j, at in enumerate((places % len(tokens)).tolist()):
                logits[row, j, self.task.vocabulary.ids[labels[at]]] = 1.0
        return logits

    def labels(self, tokens):
        return SOLVERS[self.task.name](tokens, self.task)


@pytest.mark.parametrize("name, layout", kinds())
def test_a_perfect_model_is_right_and_a_wrong_token_is_seen(name, layout):
    task = small(name, layout)
    result = evaluate(Oracle(task), task, examples=20, length=task.seq_len, **HOW)
    assert result.accuracy == 1.0 and len(result.correct) == 20 * task.usual_queries()
    batch = task.batch(4, seed=0, index=0)
    for wrong in range(batch.retrieved):
        predicted = batch.labels.clone()
        predicted[2, wrong] += 1
        right = batch.right(predicted)
        assert right.sum() == right.numel() - 1 and not right[2, wrong // batch.answer_tokens]


def test_several_answers_of_a_sequence_count_one_by_one():
    """Half of the pairs right: accuracy 1/2, and the loss is the mean over all answers."""
    task = small("selective-copy", num_tokens=4)
    batch = task.batch(6, seed=0, index=0)
    logits = torch.nn.functional.one_hot(batch.labels, task.vocab_size).float()
    logits[:, 1::2] = 0.0  # all equal: arg-max is <pad>, never an answer
    result = score(lambda ids, logits_at: logits, [batch], **HOW)
    assert result.accuracy == 0.5 and result.target.tolist() == batch.target_index.flatten().tolist()
    v = task.vocab_size
    assert result.loss == pytest.approx((np.log(np.e + v - 1) - 1 + np.log(v)) / 2, rel=1e-5)
    assert sum(row["count"] for row in result.by_position()) == 24


def test_answers_at_other_places_in_every_row():
    """Logits at (B, A) places are those of the full forward pass, and gradients flow through them."""
    task = small("mqar")
    batch = task.batch(5, seed=0, index=0)
    assert batch.answer_at.shape == batch.labels.shape == (5, 3)
    assert not (batch.answer_at == batch.answer_at[0]).all()
    for name in ("transformer-tiny", "mamba-tiny"):
        model = models.build(name, vocab_size=task.vocab_size, n_layer=1)
        everywhere = model(batch.input_ids)
        chosen = model(batch.input_ids, logits_at=batch.answer_at)
        expected = torch.stack([everywhere[i, at] for i, at in enumerate(batch.answer_at)])
        torch.testing.assert_close(chosen, expected)
        loss, predicted = model.loss(batch.input_ids, labels=batch.labels, logits_at=batch.answer_at)
        reference = torch.nn.functional.cross_entropy(expected.flatten(0, 1), batch.labels.flatten())
        torch.testing.assert_close(loss, reference)
        assert torch.equal(predicted, expected.argmax(-1))
        gradients = [
            torch.autograd.grad(x, model.embedding.weight, retain_graph=True)[0] for x in (loss, reference)
        ]
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


# --- duplicated queries ------------------------------------------------------------------------------


class Chooser(Oracle):
    """Gives the answer of one block, as listed in `known`; with `miss` its last token is wrong."""

    def __init__(self, task, known, block, miss):
        super().__init__(task)
        self.known, self.block, self.miss = known, block, miss

    def labels(self, tokens):
        last = max(i for i, token in enumerate(tokens) if token == "<query>")
        answer = self.known[tuple(tokens[: last + 1])][self.block]
        assert answer in answers_by_block(tokens, self.task)[self.block]
        if self.miss:
            answer = [*answer[:-1], "<bos>"]
        return {last + i: token for i, token in enumerate(answer)}

    def init_cache(self):
        return []

    def __call__(self, input_ids, logits_at, inputs_embeds=None, attention_mask=None, cache=None):
        cache.append(input_ids)  # all tokens so far are what it remembers
        return super().__call__(input_ids, logits_at)

    def step(self, token, cache):
        ids = torch.cat([cache.pop(), token[:, None]], dim=1)
        return self(ids, torch.tensor([ids.shape[1] - 1]), cache=cache)[:, -1]


@pytest.mark.parametrize("block, precision", [(0, "float32"), (1, "float32"), (2, "bfloat16")])
def test_which_block_was_answered(block, precision):
    task = small("ngram-duplicate")
    known = {}
    for batch in heldout(task, 30, 32):
        for ids, answers in zip(batch.input_ids.tolist(), batch.alternatives.tolist(), strict=True):
            question = tuple(task.vocabulary.decode(ids[: int(batch.answer_at[0]) + 1]))
            known[question] = [task.vocabulary.decode(answer) for answer in answers]
    for miss in (False, True):
        how = HOW | dict(precision=precision)
        rows = evaluate_blocks(Chooser(task, known, block, miss), task, examples=30, length=32, **how)
        expected = "missed" if miss else str(block)
        assert [row["block"] for row in rows] == ["0", "1", "2", "missed"]
        assert [row["answers"] for row in rows] == [30 * (row["block"] == expected) for row in rows]
        assert all((row["count"], row["rate"]) == (30, row["answers"] / 30) for row in rows)
        assert all((row["ci_low"], row["ci_high"]) == wilson(row["answers"], 30) for row in rows)


def test_blocks_of_a_task_with_one_answer_are_refused():
    task = small("ngram")
    with pytest.raises(ValueError, match="evaluate_blocks is for ngram-duplicate"):
        evaluate_blocks(Oracle(task), task, examples=2, length=16, **HOW)


# --- longer contexts than in training ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, precision",
    [
        ("ngram", "float32"),
        ("ngram-duplicate", "float32"),
        ("mqar", "bfloat16"),
        ("selective-copy", "float32"),
        ("induction", "float32"),
    ],
)
def test_extrapolation_is_the_same_task_with_longer_contexts(name, precision):
    task = small(name)
    model = models.build("mamba-tiny", vocab_size=task.vocab_size, n_layer=1)
    lengths = [task.seq_len, 40, 64]
    how = HOW | dict(precision=precision)
    results = extrapolate(model, task, lengths, examples=10, **how)
    for n, result in zip(lengths, results, strict=True):
        longer = dataclasses.replace(task, seq_len=n)
        assert longer.vocabulary == task.vocabulary
        direct = evaluate(model, longer, examples=10, length=n, **how)
        assert result.loss == direct.loss and (result.target == direct.target).all()
        assert result.target.max() < n
    assert results[-1].length == (63 if name == "ngram-duplicate" else 64)


def test_ngram_trained_on_50_to_100_is_tested_up_to_400():
    """Facts 1.6: min_seq_len is for training, the test length is fixed."""
    task = tasks.build("ngram", seq_len=100, min_seq_len=50)
    lengths = [100, 125, 150, 175, 200, 300, 400]
    results = extrapolate(Oracle(task), task, lengths, examples=3, **HOW)
    assert [r.length for r in results] == lengths and all(r.accuracy == 1 for r in results)


@pytest.mark.parametrize("name", ["position", "position-varlen", "grid"])
def test_positions_extrapolate_within_their_vocabulary(name):
    task = small(name)
    assert task.at(9) is task
    with pytest.raises(ValueError, match=r"seq_len 16 has no answer tokens for length 25: .*seq_len=25"):
        task.at(25)
    wide = small(name, seq_len=25)  # trained at length 16, tested at 25
    results = extrapolate(Oracle(wide), wide, [16, 25], examples=5, **HOW)
    assert [r.length for r in results] == [16, 25] and all(r.accuracy == 1 for r in results)


def test_learned_positions_end_with_one_line():
    task = small("ngram")
    options = dict(vocab_size=task.vocab_size, n_layer=1, position="learned")
    model = models.build("transformer-tiny", max_position_embeddings=task.max_length(), **options)
    with pytest.raises(ValueError, match="max_position_embeddings") as error:
        extrapolate(model, task, [32], examples=2, **HOW)
    assert "\n" not in str(error.value)


# --- the command line --------------------------------------------------------------------------------


def test_lengths_vary_at_full_length_only():
    p = plan(RunConfig(task="ngram", seq_len=24, min_seq_len=18, curriculum=8, **CPU), "mamba")
    task = tasks.build(p.task, **p.task_options)
    lengths = {
        n: {curricula.next_batch(task, p, trainer.Progress(step=i, length=n)).length for i in range(60)}
        for n in (8, 16, 24)
    }
    assert lengths == {8: {8}, 16: {16}, 24: set(range(18, 25))}


def test_queries_and_curriculum_follow_the_task():
    def settled(name, family="mamba", **changes):
        return plan(RunConfig(**(dict(task=name) | CONFIGS[name] | CPU | changes)), family)

    assert settled("mqar").queries == 3 and settled("mqar", queries=2).queries == 2
    assert settled("mqar", seq_len=400, num_pairs=100, num_symbols=None).queries == 100
    assert settled("selective-copy").queries == 5 and settled("ngram").queries == 1
    assert settled("mqar").curriculum == 4 and settled("ngram").curriculum == 5
    assert settled("ngram-duplicate").curriculum == 18 and settled("position").curriculum == 2
    assert settled("selective-copy", "transformer").curriculum == 2


def test_position_plans_name_no_option_of_other_tasks():
    """But all of their own options are settled: asking for a default gives the run of not asking."""
    config = RunConfig(seq_len=16, num_symbols=40, device="cpu", precision="float32")
    p = plan(config, "mamba")
    assert p.task_options == dict(seq_len=16, num_symbols=40, layout="suffix", supervise_bos=False)
    assert run_id(p).startswith("position-suffix-L16-mamba-s0-")
    default = plan(dataclasses.replace(config, num_symbols=None), "mamba")
    assert json.dumps(default.task_options) == (
        '{"seq_len": 16, "num_symbols": 16, "layout": "suffix", "supervise_bos": false}'
    )
    other = plan(RunConfig(task="induction", seq_len=16, device="cpu", precision="float32"), "mamba")
    assert run_id(other).startswith("induction-L16-mamba-s0-")
    assert other.task_options == dict(seq_len=16, num_symbols=16)
    twice = plan(dataclasses.replace(config, task="induction", num_symbols=None, layout="two-pass"), "mamba")
    assert twice.task_options == dict(seq_len=16, num_symbols=16, layout="two-pass")
    assert run_id(twice).startswith("induction-two-pass-L16-mamba-s0-")


BAD = [
    (
        ["--task", "mqar", "--seq-len", "64", "--layout", "prefix"],
        "unknown layout 'prefix' of task mqar; valid: suffix, two-pass",
    ),
    (["--task", "position", "--min-seq-len", "8"], "--min-seq-len 8 is no option of --task position"),
    (["--task", "ngram", "--blocks", "3"], "--blocks 3 is no option of --task ngram"),
    (["--task", "induction", "--num-pairs", "3"], "--num-pairs 3 is no option of --task induction"),
    (["--task", "grid", "--seq-len", "1000"], "seq_len 1000 is no square"),
    (["--task", "mqar", "--protocol", "paper"], "ngram-duplicate; leave it out for --task mqar"),
    (["--task", "ngram", "--protocol", "paper", "--schedule", "cosine"], "which has linear"),
    (
        ["--task", "ngram", "--queries", "2"],
        "--queries 2 is more than a context of 1024 allows; use at most 1",
    ),
    (["--task", "selective-copy", "--queries", "2"], "queries 2: task selective-copy asks for all 16"),
    (["--task", "ngram", "--curriculum", "4"], "--curriculum 4 leaves too few .*, or none, .* at least 5"),
    (["--task", "mqar", "--seq-len", "16"], "num_pairs 8 and their queries do not fit in seq_len 16"),
]


@pytest.mark.parametrize("words, message", BAD)
def test_bad_input_gives_one_line_and_status_2(words, message, tmp_path, capsys):
    assert run.main([*words, "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error)
    assert not (tmp_path / "runs").exists()


def test_a_run_through_the_command_line(tmp_path):
    words = "--task mqar --seq-len 20 --num-symbols 64 --num-pairs 3 --model mamba --steps 2 --device cpu"
    few = "--eval-examples 4 --final-eval-examples 4 --batch-tokens 64 --precision float32 --layers 1"
    assert run.main([*words.split(), *few.split(), "--out", str(tmp_path)]) == 0
    (folder,) = (path.parent for path in tmp_path.glob("*/config.json"))
    assert folder.name.startswith("mqar-L20-mamba-s0-")
    rows = [json.loads(line) for line in (folder / "by_position.jsonl").read_text().splitlines()]
    assert [row["position"] for row in rows] == [0, 2, 4] and sum(row["count"] for row in rows) == 12


def test_paper_protocol_of_ngrams():
    """Retrievit's n-gram scripts: linear decay, 5 % warm-up, an evaluation every 0.1 % of 20 M sequences."""
    config = RunConfig(task="ngram", seq_len=100, min_seq_len=50, protocol="paper", device="cpu")
    p = plan(config, "mamba")
    assert (p.schedule, p.warmup, p.eval_every) == ("linear", 156_250 // 20, 156)
    assert (p.budget, p.batch_size, p.queries, p.curriculum, p.stop_at) == (20_000_000, 128, 1, 0, 0.95)
    assert p.task_options["min_seq_len"] == 50 and "supervise_bos" not in p.task_options
    task = tasks.build(p.task, **p.task_options)
    assert (task.vocabulary.num_symbols, task.query_size, task.answer_size) == (30, 2, 3)
