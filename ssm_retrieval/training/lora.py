"""Low-rank adapters on a frozen model (Hu et al. 2021, arXiv 2106.09685) by peft: --lora RANK.

    y = W x + (alpha / r) B A x            A: (r, in) random, B: (out, r) zero at the start, W frozen

Adapters stand beside every projection that is called as a module. The exceptions are those whose weight
the fused code reads by itself, past any adapter: dt_proj (its bias goes into the scan), the convolution and
the head. The embedding, and the head where it is not tied, train in full: new symbols have to be learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ssm_retrieval.errors import MissingPackage
from ssm_retrieval.models.seeding import seeded

if TYPE_CHECKING:
    from ssm_retrieval.models import LanguageModel

TARGETS = (
    "in_proj", "x_proj", "out_proj", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    "q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
LORA_HELP = "--lora needs peft: pip install peft (or leave --lora out, which trains every weight)"


def add_adapters(model: LanguageModel, rank: int, seed: int) -> None:
    """Freeze a model but for its embedding and head, and put adapters of `rank` (alpha = 2 * rank) into it.

    The global random state is left untouched.

    Args:
        model: Changed in place.
        rank: r of the adapters.
        seed: Seed of their first weights.

    Raises:
        MissingPackage: If peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from torch import nn
    except ImportError as error:
        raise MissingPackage(LORA_HELP) from error
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    targets = [name for name in layers if name.rpartition(".")[2] in TARGETS]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    with seeded(seed):
        inject_adapter_in_model(config, model)
    for part in (model.embedding, model.head):
        part.requires_grad_(True)


def merge_adapters(model: LanguageModel) -> None:
    """Add every adapter to its weight and take it out: the model has its own layers and names again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            layer = cast(Any, module)
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
