"""Attention of packed rows, which stand one after another in one sequence and do not see each other.

On a GPU it is torch's varlen_attn, on a CPU one scaled_dot_product_attention per row. transformers calls it by NAME and
passes the bounds of the rows down to it (bilevel.model.masks).
"""

import importlib.util
import inspect
import itertools
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bilevel.errors import UserError, short

NAME = "packed_rows"  # among transformers' attention implementations
WIDEST = 256  # head of the flash kernels
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what transformers can ask of attention and varlen_attn cannot do
NEAR = 3e-2  # of rounding in bf16, relative


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of packed rows, (1, T, heads, width), or of padded ones as by sdpa if there are no bounds.

    query (1, heads, T, width), key and value with as many heads or fewer. cu_seq_lens_q (B + 1,): the bounds of the
    rows. An implementation of transformers' AttentionInterface. Raises UserError if the model wants of packed rows what
    varlen_attn cannot do, which check_rows_stay_apart finds at the start.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    assert attention_mask is None, "a model has made a mask for packed rows"
    if wanted := [name for name in UNKNOWN if others.get(name) is not None]:
        raise UserError(f"packing: this model's attention has {' and '.join(wanted)}; use packing=false")
    if query.device.type == "cuda":
        assert dropout == 0.0, "varlen_attn has no dropout"
        return _varlen(query, key, value, scaling, cu_seq_lens_q, max_length_q), None
    found = []
    for start, end in itertools.pairwise(cu_seq_lens_q.tolist()):
        row = (tensor[:, :, start:end] for tensor in (query, key, value))
        found.append(sdpa_attention_forward(module, *row, None, dropout=dropout, scaling=scaling, **others)[0])
    return torch.cat(found, 1), None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    cu_seq_lens: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """The same by torch's varlen_attn, which is for GPUs and 16 bits."""
    from torch.nn.attention.varlen import varlen_attn

    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    width, full = value.shape[-1], -(-query.shape[-1] // 8) * 8  # the kernel wants equal widths, in eights
    query, key, value = (
        functional.pad(tensor[0].transpose(0, 1).to(dtype), (0, full - tensor.shape[-1]))
        for tensor in (query, key, value)
    )
    out = varlen_attn(
        *(query, key, value, cu_seq_lens, cu_seq_lens, longest, longest),
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None, ..., :width]


def why_no_varlen(device: torch.device, width: int) -> str | None:
    """Why torch's varlen_attn cannot be used on this GPU for heads of this width; None if it can.

    Tried with two rows, forward and backward, beside each row's own attention.
    """
    if width > WIDEST:
        return f"the model's heads are {width} wide, and flash attention takes {WIDEST}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen_attn"
    from torch.nn.attention.varlen import varlen_attn

    if missing := {"window_size", "enable_gqa", "scale"} - set(inspect.signature(varlen_attn).parameters):
        return f"varlen_attn of torch {torch.__version__} lacks {', '.join(sorted(missing))}"
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(3, 1, 2, 8, width, generator=generator).to(device, torch.bfloat16)
    query, key, value = (tensor.requires_grad_() for tensor in sample)
    try:
        found = _varlen(query, key, value, None, torch.tensor([0, 3, 8], dtype=torch.int32, device=device), 5)
        (slope,) = torch.autograd.grad(found.float().square().sum(), query)
    except Exception as error:  # a kernel may fail in any way, and rows can be padded instead
        return f"varlen_attn fails here ({short(str(error))})"
    rows = [[tensor[:, :, at] for tensor in (query, key, value)] for at in (slice(3), slice(3, 8))]
    parts = [functional.scaled_dot_product_attention(*row, is_causal=True) for row in rows]
    wanted = torch.cat(parts, 2).transpose(1, 2)
    (same,) = torch.autograd.grad(wanted.float().square().sum(), query)
    pairs = (found, wanted), (slope, same)
    if not all((a - b).float().norm() <= NEAR * b.float().norm() for a, b in pairs):
        return "varlen_attn gives other results here than attention of each row"
    return None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)  # for padded rows, which evaluations have
