"""Write a model of this project as a GGUF file, for llama.cpp.

`gguf` (PyPI) writes the container. Names and shapes of tensors are those that llama.cpp reads for the
architectures "mamba", "mamba2" and "gptneox". Matrices have the type that is asked for; everything that is no
matrix product (norms, biases, A, D, convolutions) stays in float32, as llama.cpp's own files have it. The
file has no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssm_retrieval import models
from ssm_retrieval.models.mamba import MambaConfig
from ssm_retrieval.models.mamba2 import Mamba2Config
from ssm_retrieval.models.transformer import TransformerConfig

TYPES = ("F32", "F16", "BF16", "Q8_0")
BLOCK = 32  # columns that share a scale in Q8_0
# Of our (the hub's) names, what follows the number of a layer.
SSM = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}
NEOX = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
OUTER = {
    "backbone.embedding.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "gpt_neox.embed_in.weight": "token_embd.weight",
    "gpt_neox.final_layer_norm.weight": "output_norm.weight",
    "gpt_neox.final_layer_norm.bias": "output_norm.bias",
    "embed_out.weight": "output.weight",
    "lm_head.weight": "output.weight",
}


def write(model: models.LanguageModel, path: Path, kind: str) -> Path:
    """Write a model.

    Args:
        model: A Mamba, Mamba-2 or GPT-NeoX on the CPU, in any dtype.
        path: The file.
        kind: One of TYPES, of the matrices.

    Returns:
        The path.

    Raises:
        ValueError: If llama.cpp has no such architecture, or the type is unknown.
    """
    import gguf

    if kind not in TYPES:
        raise ValueError(f"type {kind!r} is none of {', '.join(TYPES)}")
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture(config))
    _describe(writer, config)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    wanted = gguf.GGMLQuantizationType[kind]
    for name, value in tensors(model):
        matrix = value.ndim == 2 and value.shape[1] > 1 and name.endswith("weight") and "conv1d" not in name
        matrix &= "norm" not in name
        data = value.float().contiguous().numpy()
        if matrix and wanted is not gguf.GGMLQuantizationType.F32:
            whole = kind != "Q8_0" or data.shape[1] % BLOCK == 0
            each = wanted if whole else gguf.GGMLQuantizationType.F16  # as llama.cpp does
            writer.add_tensor(name, gguf.quants.quantize(data, each), raw_dtype=each)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def architecture(config: Any) -> str:
    """Return llama.cpp's name of a model's architecture.

    Raises:
        ValueError: If it has none.
    """
    plain = getattr(config, "position", "none") in ("none", "rope")
    for kind, name in ((MambaConfig, "mamba"), (Mamba2Config, "mamba2"), (TransformerConfig, "gptneox")):
        if type(config) is kind and plain:
            return name
    raise ValueError(f"llama.cpp has no {type(config).__name__.removesuffix('Config')} like this one")


def _describe(writer: Any, config: Any) -> None:
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    if isinstance(config, TransformerConfig):
        writer.add_context_length(config.max_position_embeddings)
        writer.add_feed_forward_length(config.d_mlp or 4 * config.d_model)
        writer.add_head_count(config.n_head)
        writer.add_rope_dimension_count(int(config.rotary_pct * config.d_model / config.n_head))
        writer.add_parallel_residual(config.parallel_residual)
        writer.add_layer_norm_eps(config.norm_eps)
        return
    inner = config.expand * config.d_model
    writer.add_context_length(2**20)
    writer.add_feed_forward_length(0)  # read, not used
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config.d_state)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if isinstance(config, Mamba2Config):
        writer.add_ssm_time_step_rank(inner // config.headdim)  # heads
        writer.add_ssm_group_count(config.ngroups)
    else:
        writer.add_ssm_time_step_rank(config.dt_rank or -(-config.d_model // 16))


def tensors(model: models.LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors as llama.cpp names and shapes them; the tied head of an SSM is left out."""
    config: Any = model.config
    tied = config.tie_word_embeddings and not isinstance(config, TransformerConfig)
    for key, value in model.state_dict().items():
        if key in OUTER:
            if not (tied and OUTER[key] == "output.weight"):
                yield OUTER[key], value
            continue
        layer, _, rest = key.partition(".layers.")[2].partition(".")
        if key.startswith("gpt_neox."):
            module, _, what = rest.rpartition(".")
            if "query_key_value" in module:
                value = _by_kind(value, config.n_head)
            yield f"blk.{layer}.{NEOX[module]}.{what}", value
        else:
            yield f"blk.{layer}.{SSM[rest]}", _ssm(rest, value, config)


def _by_kind(value: Tensor, heads: int) -> Tensor:
    """Rows of query, key and value head by head (GPT-NeoX): all queries, then all keys, then all values."""
    rows = value.reshape(heads, 3, -1, *value.shape[1:])
    return rows.transpose(0, 1).reshape(value.shape)


def _ssm(name: str, value: Tensor, config: Any) -> Tensor:
    if name.endswith("A_log"):
        value = -torch.exp(value.float())
    if name.endswith("conv1d.weight"):
        return value.squeeze(1)
    if isinstance(config, Mamba2Config):
        if name.endswith(("A_log", ".D")):
            return value[:, None]
        if name == "mixer.norm.weight":
            return value.reshape(config.ngroups, -1)
    return value


Logits = npt.NDArray[np.float32]


class LlamaCpp:
    """A GGUF file in llama.cpp, through its C functions: no tokenizer, greedy decoding.

    Args:
        path: The file.
        threads: Threads.
        context: Most tokens of a sequence.
        batch: Tokens that it prefills at once (`n_ubatch`).
    """

    def __init__(self, path: Path, threads: int, context: int, batch: int = 512):
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, context, batch
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def start(self) -> None:
        """Forget the sequence."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def step(self, ids: list[int]) -> Logits:
        """Read tokens after those read before.

        Args:
            ids: L tokens.

        Returns:
            (V,) logits after the last.

        Raises:
            RuntimeError: If llama.cpp reports an error.
        """
        tokens = (self.lib.llama_token * len(ids))(*ids)
        if code := self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode returned {code}")
        found = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(found, shape=(self.vocab_size,)).copy()
