"""What one layer moves from an image's patches to the positions of the answer.

attention   layers with attention: softmax(q k^T) from a position of the answer to the patches. SSM layers:
            hidden attention |alpha| with normalised rows (`probes.retention`), per head in Mamba-2, the
            mean over channels in Mamba, as in the probe "attention"
write       ||dt_i x_i B_i^T||, what patch i writes into the state (`probes.updates.write_norm`)
kept        ||c(i -> t)|| / ||c(i -> i)||, the part of that write that the decays in between leave at the
            answer's position t (`probes.retention.retention`)
share       ||c(i -> t)|| / ||h_t||, what is left, in units of the state it is in
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probes import record
from probes.retention import attention_pattern, retention
from probes.scan import Scan, layers_with, scan_names, scan_of
from probes.updates import write_norm
from vlm.layout import IGNORE
from vlm.model import VLM


@dataclass(frozen=True)
class Flow:
    """What one layer moves from the P patches of B images to A positions.

    Attributes:
        attention: (B, A, H, P); over all tokens of the sequence, patches or not, it sums to 1. An SSM layer
            of Mamba counts as one head.
        write: (B, P); None in layers with attention.
        kept: (B, A, P); None in layers with attention.
        share: (B, A, P); None in layers with attention.
    """

    attention: Tensor
    write: Tensor | None = None
    kept: Tensor | None = None
    share: Tensor | None = None

    def quantities(self) -> dict[str, Tensor]:
        """Return the quantities (B, A, P) by name: attention's mean over heads, `write` with A = 1."""
        write = None if self.write is None else self.write[:, None]
        named = dict(attention=self.attention.mean(2), write=write, kept=self.kept, share=self.share)
        return {name: value for name, value in named.items() if value is not None}


def patch_places(input_ids: Tensor) -> Tensor:
    """Return the positions (B, P) int64 of the patches in sequences (B, L), in raster order.

    An image that stands twice has 2 P places.
    """
    return (input_ids < 0).nonzero()[:, 1].view(len(input_ids), -1)


def answer_places(labels: Sequence[int]) -> list[int]:
    """Return the positions that predict a sequence's supervised tokens, from its unshifted labels (L,)."""
    return [i - 1 for i, label in enumerate(labels) if label != IGNORE]


@torch.no_grad()
def layer_flows(model: VLM, input_ids: Tensor, features: Tensor, at: Sequence[int]) -> dict[int, Flow]:
    """Measure every layer's flow of information from patches to positions, in one precision (no autocast).

    Args:
        model: The model.
        input_ids: (B, L) int64 without padding, as `vlm.layout.sequence` makes them.
        features: (B, P, F).
        at: A positions that read, the same in all sequences. The last one of a prompt predicts its answer.

    Returns:
        Flow by layer.
    """
    lm, places, at = model.lm, patch_places(input_ids), list(at)
    attending, scanning = layers_with(lm, "attn.hook_pattern"), layers_with(lm, "mixer.hook_dt")
    vectors = model.embed(input_ids, features)
    found = {}
    if attending:
        with record(lm, [f"blocks.{i}.attn.hook_pattern" for i in attending], positions=at) as cache:
            _run(model, vectors)
        for i in attending:
            rows = cache[f"blocks.{i}.attn.hook_pattern"].transpose(1, 2)  # (B, A, H, L)
            found[i] = Flow(_of_patches(rows, places))
    if scanning:
        states = [f"blocks.{i}.mixer.hook_ssm_state" for i in scanning]
        with record(lm, scan_names(scanning)) as cache, record(lm, states, positions=at) as last:
            _run(model, vectors)
        for i, name in zip(scanning, states, strict=True):
            norm = last[name].flatten(2).norm(dim=2)  # (B, A)
            found[i] = scan_flow(scan_of(lm, cache, i), norm, places, at)
    return dict(sorted(found.items()))


def scan_flow(scan: Scan, norm: Tensor, places: Tensor, at: Sequence[int]) -> Flow:
    """Return the flow of an SSM layer.

    Args:
        scan: The inputs of its recurrence.
        norm: (B, A), of its state at the A positions.
        places: (B, P) int64, of the patches.
        at: The A positions.

    Returns:
        All four quantities.
    """
    (B, L), positions = scan.x.shape[:2], torch.as_tensor(at, device=places.device)
    norms = norm.new_zeros(B, L)
    norms[:, positions] = norm
    left = retention(scan, places[:, None], positions[None, :, None], state_norm=norms)
    return Flow(
        _of_patches(attention_pattern(scan, positions).transpose(1, 2), places),
        write_norm(scan).gather(1, places),
        left.kept,
        left.share,
    )


def _run(model: VLM, vectors: Tensor) -> None:
    """Run a forward pass without logits, for the recording."""
    model.lm.hidden(inputs_embeds=vectors, at=torch.zeros(0, dtype=torch.int64, device=vectors.device))


def _of_patches(rows: Tensor, places: Tensor) -> Tensor:
    """(B, A, H, L) at the places (B, P): (B, A, H, P)."""
    B, A, H, _ = rows.shape
    return rows.gather(3, places[:, None, None].expand(B, A, H, -1))
