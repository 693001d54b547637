"""Mamba-VL and Pythia-VL: a language model that reads an image's patches between its tokens.

    features   frozen vision encoder, last norm, class token dropped      (B, P, F)
    patches    connector: linear, exact GELU, linear                      (B, P, D)
    sequence   token vectors with patches in the placeholders             (B, L, D)
    answer     any language model of `models`

Parameter names below `vision_embed_tokens` and of the language model are those of the released checkpoints,
which `load` reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssm_retrieval.errors import UserError
from ssm_retrieval.models import LanguageModel, from_config, generate, hub, hub_configs
from ssm_retrieval.models.checkpoints import fill
from ssm_retrieval.ops.cross_entropy import linear_cross_entropy
from vlm.layout import IGNORE, splice

CONNECTOR, ENCODER = "vision_embed_tokens.", "vision_encoder."  # of the names in released checkpoints
# of their config.json; the width repeats d_model, and what the encoder is comes with its module
VISION_FIELDS = ("hidden_size", "vision_encoder_name", "select_layer", "select_feature", "image_size")


def prefix_tokens(encoder: nn.Module) -> int:
    """Class and register tokens before the patches: 1 unless the encoder says otherwise, as timm's do."""
    return int(getattr(encoder, "num_prefix_tokens", 1))


def connector(features: int, d_model: int) -> nn.Sequential:
    """(..., features) -> (..., d_model): linear, exact GELU, linear."""
    return nn.Sequential(nn.Linear(features, d_model), nn.GELU(), nn.Linear(d_model, d_model))


class VLM(nn.Module):
    """lm: the language model. features: width F of the vision encoder's output.

    encoder: maps (B, 3, S, S) pixels to (B, 1 + P, F), class token first (`prefix_tokens`); it is
    frozen. None where features come from elsewhere, such as a cache on disk.
    """

    def __init__(self, lm: LanguageModel, features: int = 1024, encoder: nn.Module | None = None):
        super().__init__()
        self.lm = lm
        self.vision_embed_tokens = connector(features, lm.config.d_model)
        self.vision_encoder = None if encoder is None else encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pixels -> (B, P, F). Raises UserError without an encoder."""
        if self.vision_encoder is None:
            raise UserError("this model has no vision encoder; give VLM(..., encoder=) or features")
        return self.vision_encoder(pixels)[:, prefix_tokens(self.vision_encoder) :]

    def embed(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """Vectors of a sequence with placeholders: (B, L) int64 and (B, P, F) -> (B, L, D)."""
        table = self.lm.embedding.weight
        return splice(table, input_ids, self.vision_embed_tokens(features.to(self.connector_dtype)))

    @property
    def connector_dtype(self) -> torch.dtype:
        return next(self.vision_embed_tokens.parameters()).dtype

    def forward(self, input_ids: Tensor, features: Tensor, **options: Any) -> Tensor:
        """Next-token logits (B, L or A, V); options as in `LanguageModel.forward`, without its input_ids."""
        return self.lm(inputs_embeds=self.embed(input_ids, features), **options)

    def loss(self, input_ids: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """Mean over examples of each one's mean cross-entropy, in nats: long answers weigh no more.

        input_ids, labels: (B, L) int64, labels not shifted, -100 = not supervised. Sequences are padded on
        the right, where causal models need no mask. Raises UserError for an example without answers.
        """
        supervised = (labels[:, 1:] != IGNORE).any(1)
        if not bool(supervised.all()):
            row = int(supervised.logical_not().nonzero()[0])
            raise UserError(f"example {row} of the batch has no supervised token; drop it")
        hidden = self.lm.hidden(inputs_embeds=self.embed(input_ids, features))[:, :-1]
        head, targets = self.lm.head.weight, labels[:, 1:]
        # only labelled rows meet the head: at a published vocabulary the others are most of all products
        counts = (targets != IGNORE).sum(1).tolist()
        rows, wanted = hidden[targets != IGNORE], targets[targets != IGNORE]
        each = [
            linear_cross_entropy(x, head, y)[0]
            for x, y in zip(rows.split(counts), wanted.split(counts), strict=True)
        ]
        return torch.stack(each).mean()

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        features: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        eos_token_id: int | None = 0,
    ) -> Tensor:
        """Greedy answer, (B, n) int64; the image is read once, in the prefill.

        attention_mask: (B, L), non-zero = real token; shorter prompts are padded on the left.
        """
        return generate(
            self.lm,
            None,
            max_new_tokens,
            inputs_embeds=self.embed(input_ids, features),
            attention_mask=attention_mask,
            eos_token_id=eos_token_id,
        )


def load(
    folder: str | Path,
    encoder: nn.Module | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> VLM:
    """A released Mamba-VL or Pythia-VL checkpoint: a local folder, or a name on the hub.

    encoder: a module whose parameters have the names below `vision_encoder.`, made on any device; it gets the
    checkpoint's weights. None leaves them out: the model then wants features.
    Whether Mamba has LayerNorm or RMSNorm is decided by the weights (`models.hub_configs.read_config`).
    Raises UserError, in one line, as `models.load`.
    """
    place = hub.find_folder(folder)
    stored = hub.contents(hub.weight_files(place))
    parts: dict[str, dict[str, hub.Stored]] = {CONNECTOR: {}, ENCODER: {}, "": {}}
    for key, found in stored.items():
        prefix = next(prefix for prefix in parts if key.startswith(prefix))
        parts[prefix][key.removeprefix(prefix)] = found
    first = parts[CONNECTOR].get("0.weight")
    if first is None:
        raise UserError(f"{place} has no {CONNECTOR}0.weight, so it is no VLM; use models.load for it")
    raw = hub.read_json(place / "config.json")
    config = hub_configs.read_config(raw, parts[""], str(place / "config.json"), beside=VISION_FIELDS)
    lm = from_config(config, device="meta")
    lm.accept_hub_spellings(parts[""])
    with torch.device("meta"):
        model = VLM(lm, features=first.shape[1])
    fill(lm, parts[""], place, dtype=dtype, device=device)
    fill(model.vision_embed_tokens, parts[CONNECTOR], place, dtype=dtype, device=device)
    if encoder is not None:
        fill(encoder, parts[ENCODER], place, dtype=dtype, device=device)
        model.vision_encoder = encoder.eval().requires_grad_(False)
    return model.eval()
