"""What the public functions refuse, and in which words; ``impl`` never falls back silently."""

from __future__ import annotations

import re

import pytest
import torch

import fastbeit_kernels as kernels

Q = torch.zeros(2, 4, 3, 8)
KV = torch.zeros(2, 5, 3, 8)
QKV = torch.zeros(2, 4, 3, 3, 8)
TABLE, INDEX = torch.zeros(12, 3), torch.zeros(4, 4, dtype=torch.int64)
X, W, B = torch.zeros(2, 4, 8), torch.zeros(8), torch.zeros(8)
HEAD = torch.zeros(16, 8)
SLOTS = torch.zeros(2, 3, dtype=torch.int32)

CALLS = {
    "attention": lambda **a: kernels.attention(Q, KV, KV, **a),
    "attention_packed": lambda **a: kernels.attention_packed(QKV, **a),
    "rel_pos_attention": lambda **a: kernels.rel_pos_attention(*QKV.unbind(2), TABLE, INDEX, **a),
    "rel_pos_attention_packed": lambda **a: kernels.rel_pos_attention_packed(
        QKV, TABLE, INDEX, **a
    ),
    "scale_residual_layer_norm": lambda **a: kernels.scale_residual_layer_norm(
        X, weight=W, bias=B, **a
    ),
    "bias_gelu": lambda **a: kernels.bias_gelu(X, B, **a),
    "scale_residual": lambda **a: kernels.scale_residual(X, X, **a),
    "masked_linear_cross_entropy": lambda **a: kernels.masked_linear_cross_entropy(
        X, SLOTS, HEAD, None, SLOTS.long(), **a
    ),
    "linear_argmax": lambda **a: kernels.linear_argmax(X[0], HEAD, **a),
}


@pytest.mark.parametrize("name", CALLS)
def test_impl_is_obeyed_or_refused(name, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert name in kernels.__all__
    auto, reference = CALLS[name](), CALLS[name](impl="reference")
    for a, b in zip(auto, reference, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=f"{name}: impl='triton' was asked for"):
        CALLS[name](impl="triton")
    with pytest.raises(ValueError, match="impl must be one of auto, triton, reference, got 'cuda'"):
        CALLS[name](impl="cuda")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.attention(Q[0], KV, KV), "q must be [B, Tq, H, d], got [4, 3, 8]"),
        (lambda: kernels.attention(Q, KV[:1], KV), "k must be [2, Tk, 3, 8], got [1, 5, 3, 8]"),
        (lambda: kernels.attention(Q, KV, Q), "v must be [2, 5, 3, 8], got [2, 4, 3, 8]"),
        (lambda: kernels.attention(Q.long(), KV, KV), "q must have one of the dtypes float32"),
        (lambda: kernels.attention(Q, KV.half(), KV.half()), "q, k, v must have one dtype"),
        (lambda: kernels.attention(Q, KV.to("meta"), KV), "k is on meta, the other arguments"),
        (
            lambda: kernels.attention(Q, KV, KV, torch.zeros(2, 4, 5)),
            "bias must be broadcastable to [B, H, Tq, Tk] = [2, 3, 4, 5], got [2, 4, 5]",
        ),
        (
            lambda: kernels.attention(Q, KV, KV, torch.zeros(4, 5, dtype=torch.bool)),
            "bias must be floating point on cpu, got torch.bool",
        ),
        (
            lambda: kernels.attention(Q, KV, KV, query_positions=SLOTS),
            "query_positions must be [2, 4], got [2, 3]",
        ),
        (
            lambda: kernels.attention(
                Q, KV, KV, torch.zeros(4, 5), query_positions=torch.zeros(2, 4).long()
            ),
            "bias (with query_positions) must be [3, T, 5], got [4, 5]",
        ),
        (
            lambda: kernels.attention(Q, KV, KV, query_positions=torch.zeros(2, 4)),
            "query_positions must have one of the dtypes int32",
        ),
        (lambda: kernels.attention_packed(Q), "qkv must be [B, T, 3, H, d], got [2, 4, 3, 8]"),
        (
            lambda: kernels.expand_rel_pos_bias(TABLE[0], INDEX),
            "table must be [R, any], got [3]",
        ),
        (
            lambda: kernels.expand_rel_pos_bias(TABLE, INDEX[:3]),
            "index must be square [T, T], got [3, 4]",
        ),
        (
            lambda: kernels.expand_rel_pos_bias(TABLE, INDEX, grid=(2, 2)),
            "grid 2x2 has 5 tokens with CLS, but index is for 4",
        ),
        (
            lambda: kernels.rel_pos_attention_packed(QKV, TABLE[:, :2], INDEX),
            "table must be [R, 3], got [12, 2]",
        ),
        (
            lambda: kernels.scale_residual_layer_norm(X, weight=HEAD[:, 0], bias=None),
            "weight must be [8], got [16]",
        ),
        (
            lambda: kernels.scale_residual_layer_norm(X, weight=W, bias=None, gamma=W),
            "gamma and drop_scale scale the branch, but branch is None",
        ),
        (
            lambda: kernels.scale_residual(X, X, drop_scale=torch.zeros(3)),
            "drop_scale must be [2], got [3]",
        ),
        (lambda: kernels.scale_residual(X, X[:, :3]), "branch must be [2, 4, 8], got [2, 3, 8]"),
        (
            lambda: kernels.masked_linear_cross_entropy(X, None, HEAD, None, SLOTS),
            "targets must be [2, 4], got [2, 3]",
        ),
        (
            lambda: kernels.masked_linear_cross_entropy(X, SLOTS, HEAD[:, :4], None, SLOTS),
            "weight must be [V, 8], got [16, 4]",
        ),
        (
            lambda: kernels.masked_linear_cross_entropy(X, SLOTS.bool(), HEAD, None, SLOTS),
            "positions must have one of the dtypes int32",
        ),
        (
            lambda: kernels.linear_argmax(X, HEAD),
            "x must be [R, D], got [2, 4, 8]",
        ),
        (lambda: kernels.linear_argmax(X[0], HEAD, B), "bias must be [16], got [8]"),
    ],
)
def test_refusals_say_what_was_expected_and_what_came(call, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
