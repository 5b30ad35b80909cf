"""Attention per document: a batch is one row of documents that see only themselves, without padding and without a mask.

A dense mask over a packed row costs the square of its length; documents alone cost the sum of their squares. On CUDA in
half precision this is one kernel (`torch.nn.attention.varlen`); on a CPU products of matrices, block by block
(`attend`), in float32 if no document is long; elsewhere torch's own attention document by document.
Registered with transformers by name; the library makes no mask for a name that it has no mask function for
(transformers/masking_utils.py, `_preprocess_mask_arguments`), and hands the boundaries through to each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import library
from torch.nn.functional import scaled_dot_product_attention

DOCUMENTS = "documents"
_LONGEST = 1024  # of float32 by blocks: torch's own attention is faster from somewhere above this on
_BLOCK = 128  # queries at once: fewer skip more of the causal square, and multiply smaller matrices


def register() -> None:
    """Make the name known to transformers in this process."""
    from transformers import AttentionInterface

    AttentionInterface.register(DOCUMENTS, documents)


def serves(model: Any) -> bool:
    """Whether a model, storage or not, has nothing in its attention that this one would leave out."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return (
        bool(model._supports_attention_backend)
        and not softcap
        and not any(
            hasattr(module, name) for module in model.modules() for name in ("sinks", "relative_attention_bias")
        )
    )


def documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a row, as transformers calls it.

    `query` is [1, heads, length, size], `key` and `value` have as many heads or a divisor of them; returns [1, length,
    heads, size]. Documents are told by `cu_seq_lens_q`, [documents + 1] (0, ends), with the longest in `max_length_q`;
    without them by `position_ids` that begin at 0 again. Rows of a batch are taken one by one.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("attention per document has no soft cap, sinks or position bias; choose another")
    if query.shape[2] != key.shape[2]:
        raise ValueError("attention per document is for training; load the model with sdpa to generate")
    if len(query) > 1:
        rows = [
            documents(
                module, query[i : i + 1], key[i : i + 1], value[i : i + 1], None, dropout, scaling, sliding_window,
                position_ids=None if position_ids is None else position_ids[i % len(position_ids)][None],
            )[0]
            for i in range(len(query))
        ]  # fmt: skip
        return torch.cat(rows), None
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = boundaries(position_ids, query.shape[2], query.device)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return _varlen(query, key, value, scaling, sliding_window, cu_seq_lens_q, int(max_length_q or 0)), None
    unlimited = sliding_window is None or sliding_window >= query.shape[2]
    # Under autocast some models' queries are float32 beside values in bfloat16, which torch itself casts alike.
    by_blocks = query.dtype == torch.bfloat16 or (
        query.dtype == torch.float32 and int(max_length_q or 0) <= _LONGEST and not torch.is_autocast_enabled("cpu")
    )
    if query.device.type == "cpu" and by_blocks and unlimited and not dropout:
        return attend(query, key, value, cu_seq_lens_q, scaling or query.shape[3] ** -0.5), None
    ends = cu_seq_lens_q.tolist()
    parts = [
        _one(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], dropout, scaling, sliding_window)
        for a, b in pairwise(ends)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def boundaries(position_ids: torch.Tensor | None, length: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """Where the documents of one row begin and end, int32 [documents + 1], and how long the longest is."""
    if position_ids is None:
        return torch.tensor([0, length], dtype=torch.int32, device=device), length
    starts = (position_ids.flatten() == 0).nonzero().flatten().to(torch.int32)
    ends = torch.cat([starts, torch.tensor([length], dtype=torch.int32, device=starts.device)])
    return ends, int(ends.diff().max())


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    ends: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))  # [length, heads, size]
    seen = (-1 if window is None else window - 1, 0)
    found: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=seen, enable_gqa=True)
    return found[None]


def _one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One document, [1, heads, length, size]."""
    length = query.shape[2]
    mask = None
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=key.shape[1] < query.shape[1],
    )


@library.custom_op("manta::attend", mutates_args=(), device_types="cpu")
def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Causal attention within documents, of products of matrices: in bfloat16 half the time of torch's own on a CPU
    where a row has several documents (benchmarks/micro.py), most of it saved in the backward pass.

    [1, heads, length, size], keys and values with as many heads or a divisor of them, `ends` as in `documents`; returns
    [1, length, heads, size]. The weights of a block are made again in the backward pass, so that nothing is kept but
    the arguments. One operator, so that compilers and estimates of memory look at shapes alone.
    """
    _, heads, length, size = query.shape
    found = query.new_empty(1, length, heads, size)
    for first, begin, end in _blocks(ends):
        _, weights = _weights(query[0, :, begin:end], key[0, :, first:end], scaling)
        part = torch.bmm(weights, value[0, :, first:end])
        found[0, begin:end] = part.view(heads, end - begin, size).transpose(0, 1)
    return found


@attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, scaling: float) -> torch.Tensor:
    _, heads, length, size = query.shape
    return query.new_empty(1, length, heads, size)


@library.custom_op("manta::attend_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_query = torch.empty_like(query)
    of_key, of_value = (torch.zeros_like(each[0], dtype=torch.float32) for each in (key, value))  # sums over blocks
    for first, begin, end in _blocks(ends):
        keys, values = key[0, :, first:end], value[0, :, first:end]
        queries, weights = _weights(query[0, :, begin:end], keys, scaling)
        given = gradient[0, begin:end].transpose(0, 1).reshape(queries.shape)
        of_value[:, first:end] += torch.bmm(weights.transpose(1, 2), given)
        of_weights = torch.bmm(given, values.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query[0, :, begin:end] = torch.bmm(of_scores, keys).mul_(scaling).view(query[0, :, begin:end].shape)
        of_key[:, first:end] += torch.bmm(of_scores.transpose(1, 2), queries)
    return of_query, of_key.mul_(scaling).to(key.dtype)[None], of_value.to(value.dtype)[None]


@_attend_backward.register_fake
def _(gradient: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.empty_like, inputs[:3]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _go_back(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    return (*_attend_backward(gradient, *ctx.saved_tensors, ctx.scaling), None, None)


attend.register_autograd(_go_back, setup_context=_keep)


def _blocks(ends: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Where a document begins, and where some of its queries begin and end."""
    for first, last in pairwise(ends.tolist()):
        for begin in range(first, last, _BLOCK):
            yield first, begin, min(begin + _BLOCK, last)


def _weights(query: torch.Tensor, key: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of all heads that share keys, [key heads, rows, size], and their weights, [key heads, rows, keys]; the
    last queries are those of the last keys."""
    heads, queries, size = query.shape
    shared, keys, _ = key.shape
    rows = query.reshape(shared, heads // shared * queries, size)
    scores = torch.baddbmm(rows.new_empty(()), rows, key.transpose(1, 2), beta=0, alpha=scaling)
    later = torch.full((queries, queries), float("-inf"), dtype=scores.dtype).triu_(1)
    scores.view(heads, queries, keys)[..., keys - queries :] += later
    return rows, scores.softmax(-1)
