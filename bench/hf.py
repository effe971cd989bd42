"""The same model in `transformers`, for comparison: SmolLM3 compiled, or with Liger's kernels.

Float32 weights under autocast; flash-attn-4 over `cu_seqlens` where transformers can use it, else
SDPA with the mask that transformers makes of restarting positions. Rows are flattened into one, as
transformers packs them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.packing import IGNORE, Batch
from export_hf import hf_config, hf_weights
from models.config import ModelConfig

NO_SPECIALS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def build(
    config: ModelConfig, weights: dict, device: torch.device, dtype: torch.dtype, liger: bool
) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """The model and its summed loss of a batch."""
    from transformers import SmolLM3ForCausalLM

    settings = hf_config(config, NO_SPECIALS, torch.float32)
    settings._attn_implementation = _attention(device)
    settings.use_cache = False
    fused_loss = None
    if liger:
        from liger_kernel.transformers import (
            LigerFusedLinearCrossEntropyLoss,
            apply_liger_kernel_to_smollm3,
        )

        apply_liger_kernel_to_smollm3()
        fused_loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum")
    model = SmolLM3ForCausalLM(settings).to(device)
    state = hf_weights(weights, config.d_model, torch.float32)
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    varlen = settings._attn_implementation.startswith("flash")

    def loss(batch: Batch) -> Tensor:
        bounds = batch.cu_seqlens
        lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        lengths |= {"max_length_q": batch.max_seqlen, "max_length_k": batch.max_seqlen}
        tokens, positions = batch.tokens, batch.positions
        if varlen:
            tokens, positions = tokens.view(1, -1), positions.view(1, -1)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = model.model(
                tokens, position_ids=positions, **(lengths if varlen else {})
            ).last_hidden_state.flatten(0, 1)
            targets = batch.targets.flatten()
            if fused_loss is not None:
                return fused_loss(model.lm_head.weight, hidden.to(dtype), targets)
            logits = model.lm_head(hidden).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    if device.type == "cuda" and not liger:
        model.model.compile()
    return model, loss


def _attention(device: torch.device) -> str:
    try:
        from flash_attn.cute.interface import flash_attn_varlen_func  # noqa: F401
    except Exception:
        return "sdpa"
    return "flash_attention_4" if device.type == "cuda" else "sdpa"
