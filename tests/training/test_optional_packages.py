"""An optional package that is absent is one line with the pip command, and only what needs it stops."""

from __future__ import annotations

import sys

import pytest

from ssm_retrieval.errors import MissingPackage, UserError


def lora():
    from ssm_retrieval import models
    from ssm_retrieval.training.lora import add_adapters

    add_adapters(models.build("mamba-tiny", vocab_size=8, d_model=16, n_layer=1), rank=2, seed=0)


def optimizer():
    import dataclasses

    from ssm_retrieval import models
    from ssm_retrieval.training.optimizers import make_optimizer
    from synthetic.config import RunConfig, plan

    asked = plan(RunConfig(seq_len=8, device="cpu", optimizer="adamw"), "mamba")
    model = models.build("mamba-tiny", vocab_size=8, d_model=16, n_layer=1)
    make_optimizer(model, dataclasses.replace(asked, optimizer="adamw-8bit"))


def ray():
    from ssm_retrieval.training.executors import Ray

    Ray(workers=1, threads=1, address=None, gpu=False)


def slurm():
    from pathlib import Path

    from ssm_retrieval.training.executors import Slurm

    Slurm(Path("."), threads=1, parameters={}, gpu=False)


def words():
    from vlm import tokenizer

    tokenizer.from_words(["a b"])


def digits():
    from vlm.scenes import stamps

    stamps.digit_images.cache_clear()
    stamps.digit_images()


def captions():
    from vlm.metrics import captions

    captions.scores({"a": "a cat"}, {"a": ["a cat"]})


def kernels():
    from ssm_retrieval.ops import _cuda_kernels

    _cuda_kernels.kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")


@pytest.mark.parametrize(
    "package, need",
    [
        ("peft", lora),
        ("bitsandbytes", optimizer),
        ("ray", ray),
        ("submitit", slurm),
        ("tokenizers", words),
        ("sklearn", digits),
        ("pycocoevalcap", captions),
        ("mamba_ssm", kernels),
    ],
)
def test_an_absent_package_is_one_line_with_the_pip_command(package, need, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install") as caught:
        need()
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_package_can_be_caught_as_either_kind():
    assert issubclass(MissingPackage, ImportError) and issubclass(MissingPackage, ValueError)
