"""What every hook name means, and how names, patterns and layers from a user become names of a model."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.hooks import points

_STATE = "B L E N; Mamba-2 B L H P N; delta rule B L H P N"
_HEADS = "B L E; Mamba-2 B L H P; delta rule B L H P"

# Name within a layer: (axes, meaning). B batch, L tokens of this call, S keys, D d_model, E d_inner,
# N d_state, H heads, P width of a head, M width of the MLP, G groups of heads sharing B and C, J = E + 2 G N.
NAMES: dict[str, tuple[str, str]] = {
    "hook_embed": ("B L D", "embeddings, learned positions included"),
    "hook_resid_pre": ("B L D", "residual stream before the block"),
    "hook_resid_mid": (
        "B L D",
        "residual stream between attention (or a user's mixer) and MLP; sequential blocks only",
    ),
    "hook_resid_post": ("B L D", "residual stream after the block"),
    "hook_attn_out": ("B L D", "what attention adds"),
    "hook_mlp_out": ("B L D", "what the MLP adds"),
    "hook_mixer_out": ("B L D", "what the mixer of an SSM, or a user's own, adds"),
    "attn.hook_q": ("B L H P", "queries before rotation"),
    "attn.hook_k": ("B L H P", "keys before rotation"),
    "attn.hook_v": ("B L H P", "values"),
    "attn.hook_rot_q": ("B L H P", "queries after rotation; position='rope' only"),
    "attn.hook_rot_k": ("B L H P", "keys after rotation; position='rope' only"),
    "attn.hook_attn_scores": ("B H L S", "q k^T / sqrt(P), -inf where masked"),
    "attn.hook_pattern": ("B H L S", "softmax of the scores"),
    "attn.hook_z": ("B L H P", "pattern @ v"),
    "mlp.hook_pre": ("B L M", "before the activation"),
    "mlp.hook_post": ("B L M", "after the activation"),
    "mixer.hook_in": (
        "B L E; Mamba-2 B L J; delta rule B L J",
        "input of the convolution: x; Mamba-2 x, B, C in one, the delta rule q, k, v",
    ),
    "mixer.hook_q": (
        "B L H N",
        "read vector of the delta rule, of length N^-1/2; of GLA; of Mamba-3: C, turned",
    ),
    "mixer.hook_k": ("B L H N", "write vector of the delta rule, of length 1; of GLA; of Mamba-3: B, turned"),
    "mixer.hook_v": ("B L H P", "what the delta rule, GLA or Mamba-3 writes"),
    "mixer.hook_beta": ("B L H", "how much of it, and of what is erased; 0 at padding"),
    "mixer.hook_now": ("B L H", "Mamba-3: weight of a token's write at its own step, lam dt; 0 at padding"),
    "mixer.hook_before": (
        "B L H",
        "Mamba-3: weight with which a token adds the write before it again, (1 - lam) dt; 0 at padding",
    ),
    "mixer.hook_conv": (
        "B L E; Mamba-2 B L H P",
        "u = silu(conv(x)), what the recurrence takes in (linear SSM: conv(x))",
    ),
    "mixer.hook_dt": ("B L E; Mamba-2 B L H", "step size, after softplus (linear SSM: 1); 0 at padding"),
    "mixer.hook_B": ("B L N; Mamba-2 B L G N", "write vector"),
    "mixer.hook_C": ("B L N; Mamba-2 B L G N", "read vector"),
    "mixer.hook_A_bar": (
        "B L E N; Mamba-2 B L H; delta rule B L H; KDA and GLA B L H N",
        "decay exp(dt A); an edit changes the decay, not dt B u",
    ),
    "mixer.hook_ssm_state": (_STATE, "h_t after token t; an edit is carried on by the recurrence"),
    "mixer.hook_ssm_readout": (_STATE, "h_t as it is read at token t; an edit changes y_t only"),
    "mixer.hook_y": (_HEADS, "y = C h + D u (delta rule: h q, before the norm), before the gate"),
    "mixer.hook_gate": (_HEADS, "silu(z), or silu of the gate's projection"),
    "ln_final.hook_normalized": ("B L D", "what the head reads"),
}


def layer_of(name: str) -> int | None:
    """The index of the block a name belongs to; None for the embedding and the final norm."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else None


def local_name(name: str) -> str:
    """The key of `NAMES`: the name without its block."""
    return name if layer_of(name) is None else name.split(".", 2)[2]


def resolve(
    model: LanguageModel, names: str | Iterable[str], layers: Sequence[int] | None = None
) -> list[str]:
    """The names of this model that names or patterns stand for, in forward order.

    Args:
        model: The model whose hooks are meant.
        names: Names of `model.hook_names()`, or patterns with `*`, `?` and `[...]`.
        layers: Blocks to keep, negative ones counted from the end; names outside blocks always stay. None:
            all.

    Returns:
        Full names, at least one, each once.

    Raises:
        UserError: A name or pattern matches nothing (the message suggests the closest names), a layer does
            not exist, or nothing is left.
    """
    known = list(points(model))
    wanted = [names] if isinstance(names, str) else list(names)
    found: set[str] = set()
    for name in wanted:
        matches = [name] if name in known else fnmatch.filter(known, name)
        if not matches:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "model.hook_names() lists them"
            raise UserError(f"this model has no hook {name!r}; {hint}")
        found.update(matches)
    if layers is not None:
        n_layer = model.config.n_layer
        wrong = [i for i in layers if not -n_layer <= i < n_layer]
        if wrong:
            raise UserError(f"layers={list(layers)} has {wrong[0]}, but the model has {n_layer} layers")
        kept = {None, *(i % n_layer for i in layers)}
        found = {name for name in found if layer_of(name) in kept}
    if not found:
        raise UserError(f"names={wanted} with layers={layers} means no hook of this model")
    return [name for name in known if name in found]
