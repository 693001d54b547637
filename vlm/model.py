"""Mamba-VL and Pythia-VL: a language model that reads an image's patches among its tokens.

    features   frozen vision encoder, last norm, class token dropped      (B, P, F)
    patches    connector: linear, exact GELU, linear                      (B, P, D)
    sequence   token vectors with patches in place of the placeholders    (B, L, D)
    answer     any language model of `models`

Parameters have the names of the released checkpoints, which `load` reads.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.errors import UserError
from ssm_retrieval.models import LanguageModel, from_config, generate, hub, hub_configs
from ssm_retrieval.models.checkpoints import fill
from ssm_retrieval.ops.cross_entropy import linear_cross_entropy
from vlm.layout import IGNORE, splice
from vlm.near import Near

CONNECTOR, ENCODER = "vision_embed_tokens.", "vision_encoder."  # prefixes of names in released checkpoints
# fields of their config.json; not needed: the width equals d_model, and the encoder is a module of its own
VISION_FIELDS = ("hidden_size", "vision_encoder_name", "select_layer", "select_feature", "image_size")


def prefix_tokens(encoder: nn.Module) -> int:
    """Return the number of class and register tokens before the patches.

    It is `encoder.num_prefix_tokens` (timm's name), and 1 for an encoder without it.
    """
    return int(getattr(encoder, "num_prefix_tokens", 1))


def connector(features: int, d_model: int) -> nn.Sequential:
    """Build the connector, (..., features) -> (..., d_model): linear, exact GELU, linear."""
    return nn.Sequential(nn.Linear(features, d_model), nn.GELU(), nn.Linear(d_model, d_model))


class VLM(nn.Module):
    """A language model with a connector and, optionally, a frozen vision encoder.

    Args:
        lm: The language model.
        features: F, the width of the encoder's output.
        encoder: Pixels (B, 3, S, S) -> (B, 1 + P, F), class token first (`prefix_tokens`). None if features
            come from elsewhere, such as a cache on disk.
    """

    def __init__(self, lm: LanguageModel, features: int = 1024, encoder: nn.Module | None = None):
        super().__init__()
        self.lm = lm
        self.vision_embed_tokens = connector(features, lm.config.d_model)
        self.vision_encoder = None if encoder is None else encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (B, 3, S, S) as features (B, P, F).

        Raises:
            UserError: If the model has no encoder.
        """
        if self.vision_encoder is None:
            raise UserError("this model has no vision encoder; give VLM(..., encoder=) or features")
        return self.vision_encoder(pixels)[:, prefix_tokens(self.vision_encoder) :]

    def embed(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """Return the vectors (B, L, D) of token ids (B, L) int64 and features (B, P, F)."""
        table = self.lm.embedding.weight
        dtype = next(self.vision_embed_tokens.parameters()).dtype
        return splice(table, input_ids, self.vision_embed_tokens(features.to(dtype)))

    def forward(self, input_ids: Tensor, features: Tensor, **options: Any) -> Tensor:
        """Return next-token logits.

        Args:
            input_ids: (B, L) int64; patches are placeholders.
            features: (B, P, F).
            **options: Options of `LanguageModel.forward`, except input_ids.

        Returns:
            Logits (B, L, V), or (B, A, V) with the option `at`.
        """
        return self.lm(inputs_embeds=self.embed(input_ids, features), **options)

    def loss(self, input_ids: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """Return the mean of `losses`; long answers therefore weigh no more than short ones.

        Args:
            input_ids: As for `losses`.
            features: As for `losses`.
            labels: As for `losses`.

        Returns:
            A scalar.
        """
        return self.losses(input_ids, features, labels).mean()

    def losses(self, input_ids: Tensor, features: Tensor, labels: Tensor, near: Near | None = None) -> Tensor:
        """Return each example's mean cross-entropy, in nats.

        Sequences are padded on the right, where causal models need no mask.

        Args:
            input_ids: (B, L) int64; patches are placeholders.
            features: (B, P, F).
            labels: (B, L) int64, not shifted; -100 = not supervised.
            near: Soft targets of numbers; None = every target is one token.

        Returns:
            (B,) float32.

        Raises:
            UserError: If an example has no supervised token.
        """
        supervised = (labels[:, 1:] != IGNORE).any(1)
        if not bool(supervised.all()):
            row = int(supervised.logical_not().nonzero()[0])
            raise UserError(f"example {row} of the batch has no supervised token; drop it")
        hidden = self.lm.hidden(inputs_embeds=self.embed(input_ids, features))[:, :-1]
        head, targets = self.lm.head.weight, labels[:, 1:]
        # only labelled rows: with a published vocabulary the other rows would be most of the work
        counts = (targets != IGNORE).sum(1).tolist()
        rows, wanted = hidden[targets != IGNORE], targets[targets != IGNORE]
        if near is not None:
            each = near.cross_entropy(F.linear(rows, head), wanted)
            return torch.stack([tokens.mean() for tokens in each.split(counts)])
        pairs = zip(rows.split(counts), wanted.split(counts), strict=True)
        return torch.stack([linear_cross_entropy(x, head, y)[0] for x, y in pairs])

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
        """Generate answers greedily; the image is read once, in the prefill.

        Args:
            input_ids: (B, L) int64; shorter prompts are padded on the left.
            features: (B, P, F).
            max_new_tokens: Length limit n.
            attention_mask: (B, L); non-zero = real token.
            eos_token_id: Ends an answer; None = never.

        Returns:
            (B, n) int64, the new tokens.
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
    """Load a released Mamba-VL or Pythia-VL checkpoint.

    The weights decide whether Mamba has LayerNorm or RMSNorm (`models.hub_configs.read_config`).

    Args:
        folder: A local folder, or a name on the hub.
        encoder: A module, on any device, whose parameters have the names below `vision_encoder.`; the
            checkpoint's weights are loaded into it. None skips them, and the model then needs features.
        dtype: Dtype of the weights; None = as stored.
        device: Device of the weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: If the folder holds no VLM, or as `models.load` raises it.
    """
    place = hub.find_folder(folder)
    parts = _parts(place)
    first = parts[CONNECTOR].get("0.weight")
    if first is None:
        raise UserError(f"{place} has no {CONNECTOR}0.weight, so it is no VLM; use models.load for it")
    lm = from_config(_config(place, parts[""]), device="meta")
    lm.accept_hub_spellings(parts[""])
    with torch.device("meta"):
        model = VLM(lm, features=first.shape[1])
    fill(lm, parts[""], place, dtype=dtype, device=device)
    fill(model.vision_embed_tokens, parts[CONNECTOR], place, dtype=dtype, device=device)
    if encoder is not None:
        fill(encoder, parts[ENCODER], place, dtype=dtype, device=device)
        model.vision_encoder = encoder.eval().requires_grad_(False)
    return model.eval()


def language_config(folder: str | Path) -> Any:
    """Return the config of a released checkpoint's language model; folder and errors are those of `load`."""
    place = hub.find_folder(folder)
    return _config(place, _parts(place)[""])


def encoder_folder(folder: str | Path) -> Path | None:
    """Return the local folder of a checkpoint with the weights of its vision encoder, None for others."""
    place = hub.find_folder(folder)
    return place if _parts(place)[ENCODER] else None


def load_encoder(folder: Path, encoder: nn.Module) -> None:
    """Copy the vision encoder's weights of a released checkpoint into a module, in float32.

    Args:
        folder: The checkpoint.
        encoder: As for `load`.

    Raises:
        UserError: If the weights are not exactly those of the module.
    """
    fill(encoder, _parts(folder)[ENCODER], folder, dtype=torch.float32)


def state(folder: str | Path) -> str:
    """Identify the weights of a released checkpoint by sizes and times of its files.

    Args:
        folder: As for `load`.

    Returns:
        A short hash; a copy that keeps the times has the same.
    """
    files = hub.weight_files(hub.find_folder(folder)).files
    listed = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(sorted(listed)).encode()).hexdigest()[:10]


def _parts(place: Path) -> dict[str, dict[str, hub.Stored]]:
    """What a checkpoint stores of connector, encoder and language model, by names without the prefix."""
    parts: dict[str, dict[str, hub.Stored]] = {CONNECTOR: {}, ENCODER: {}, "": {}}
    for key, found in hub.contents(hub.weight_files(place)).items():
        prefix = next(prefix for prefix in parts if key.startswith(prefix))
        parts[prefix][key.removeprefix(prefix)] = found
    return parts


def _config(place: Path, stored: dict[str, hub.Stored]) -> Any:
    path = place / "config.json"
    return hub_configs.read_config(hub.read_json(path), stored, str(path), beside=VISION_FIELDS)
