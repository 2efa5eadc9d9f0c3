"""Transformer layers and norms, of many layers at once: plain products and PyTorch's fused attention, no `vmap`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_adapters.layers.parts.dropout import drop
from pdeopt.core.errors import InputError

#: Activations of `nn.TransformerEncoderLayer`: what it makes of "relu" and "gelu".
ENCODER_ACTIVATIONS = (F.relu, F.gelu)


class EncoderBlock(nn.Module):
    """Attention and a dense network, each after a LayerNorm: u + F(u) is a layer of a pre-LN transformer.

    F(u, mask, padding) = layer(u, mask, padding) - u, with `nn.TransformerEncoderLayer(norm_first=True)`. Features are
    (batch, tokens, width). As a block of `LayerParallel` with Tf = number of layers, dt = 1 is the usual transformer
    (pre-LN: R. Xiong et al., On layer normalization in the transformer architecture, ICML 2020).

    Args:
        width, heads: of the features.
        hidden: neurons of the dense network.
        dropout: share of entries, in training.
        causal: whether a token sees those before it alone.

    Called with features, and, where wanted, a mask (tokens, tokens) and a mask of padding (batch, tokens), as
    `nn.TransformerEncoderLayer` has them: true, or minus infinity, for what is not seen.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        words: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True}
        self.layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout, **words)
        self.causal = causal

    def forward(self, u: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        if self.causal:
            later = later_tokens(u.shape[-2], u.device)
            mask = later if mask is None else later | _as_bool(mask)
        out: Tensor = self.layer(u, mask, padding)
        return out - u


def later_tokens(tokens: int, device: torch.device | None = None) -> Tensor:
    """The mask (tokens, tokens), true for what comes later, that a causal network does not see."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)


def _as_bool(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == -torch.inf


def layer_norm(module: nn.LayerNorm) -> Callable[..., Tensor]:
    """`nn.LayerNorm` of features (layers, ...) with parameters (layers, ...)."""

    def call(u: Tensor, theta: Sequence[Tensor], given: Any) -> Tensor:
        return norm(u, theta, module)

    return call


def norm(u: Tensor, theta: Sequence[Tensor], module: nn.LayerNorm) -> Tensor:
    """(u - mean) / deviation * weight + bias, the last two by layers."""
    out = F.layer_norm(u, module.normalized_shape, None, None, module.eps)
    return affine(out, theta, u.dim() - 1 - len(module.normalized_shape))


def affine(u: Tensor, theta: Sequence[Tensor], axes: int) -> Tensor:
    """u times weight plus bias, (layers, ...), with so many axes of u between."""
    shaped = [t.reshape(len(t), *[1] * axes, *t.shape[1:]) for t in theta]
    return u if not shaped else u * shaped[0] if len(shaped) == 1 else torch.addcmul(shaped[1], u, shaped[0])


def group_norm(module: nn.GroupNorm) -> Callable[..., Tensor]:
    """`nn.GroupNorm` of features (layers, batch, channels, ...) with parameters (layers, channels)."""

    def call(u: Tensor, theta: Sequence[Tensor], given: Any) -> Tensor:
        out = F.group_norm(u.flatten(0, 1), module.num_groups, None, None, module.eps).reshape(u.shape)
        shaped = [t.reshape(len(t), 1, -1, *[1] * (u.dim() - 3)) for t in theta]
        return torch.addcmul(shaped[1], out, shaped[0]) if shaped else out

    return call


def is_encoder_layer(module: nn.Module) -> bool:
    """Whether this is a layer that `encoder_layer` knows."""
    layer = module.layer if type(module) is EncoderBlock else module
    if type(layer) is not nn.TransformerEncoderLayer or layer.activation not in ENCODER_ACTIVATIONS:
        return False
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return False
    attention = layer.self_attn
    return attention.in_proj_bias is not None and attention.bias_k is None and not attention.add_zero_attn


def encoder_layer(module: Any) -> Callable[..., Tensor]:
    """`nn.TransformerEncoderLayer`, or `EncoderBlock`, of features (layers, batch, tokens, width)."""
    is_block = type(module) is EncoderBlock
    layer = module.layer if is_block else module
    names = [name for name, _ in layer.named_parameters()]

    def call(u: Tensor, theta: Sequence[Tensor], given: Any) -> Tensor:
        if u.dim() == 3:  # no batch
            mask, padding, *rest = [*given.args, None, None][: max(2, len(given.args))]
            alone = replace(given, args=(mask, None if padding is None else padding[None], *rest))
            return call(u[:, None], theta, alone)[:, 0]
        if not layer.self_attn.batch_first:
            return _encode(layer, u.transpose(1, 2), dict(zip(names, theta)), given).transpose(1, 2)
        out = _encode(layer, u, dict(zip(names, theta)), given, is_block and module.causal)
        return out - u if is_block else out

    return call


def _encode(layer: Any, u: Tensor, theta: dict[str, Tensor], given: Any, causal: bool = False) -> Tensor:
    """The layer's two halves, with its norms before or after them."""
    norms = [[theta[f"norm{k}.{leaf}"] for leaf in ("weight", "bias") if f"norm{k}.{leaf}" in theta] for k in (1, 2)]
    mask = _attention_mask(u, given.args, causal)

    def attend(x: Tensor) -> Tensor:
        return _dropped(_attention(layer.self_attn, x, theta, mask, given), layer.dropout1, given, 1)

    def feed(x: Tensor) -> Tensor:
        inner = _dropped(layer.activation(_product(x, theta, "linear1")), layer.dropout, given, 2)
        return _dropped(_product(inner, theta, "linear2"), layer.dropout2, given, 3)

    if layer.norm_first:
        u = u + attend(norm(u, norms[0], layer.norm1))
        return u + feed(norm(u, norms[1], layer.norm2))
    u = norm(u + attend(u), norms[0], layer.norm1)
    return norm(u + feed(u), norms[1], layer.norm2)


def _dropped(x: Tensor, module: nn.Dropout, given: Any, place: int) -> Tensor:
    is_off = given.keys is None or not given.is_training(module)
    return x if is_off else drop(x, module.p, given.keys, place)


def _product(x: Tensor, theta: dict[str, Tensor], name: str) -> Tensor:
    """W x + b of features (layers, batch, tokens, width)."""
    W, b = theta[f"{name}.weight"], theta.get(f"{name}.bias")
    flat = x.flatten(1, 2)
    out = torch.bmm(flat, W.mT) if b is None else torch.baddbmm(b[:, None], flat, W.mT)
    return out.unflatten(1, x.shape[1:3])


def _attention(attention: nn.MultiheadAttention, x: Tensor, theta: dict[str, Tensor], mask: Any, given: Any) -> Tensor:
    """Attention of a sequence to itself."""
    parts = {"in.weight": theta["self_attn.in_proj_weight"], "in.bias": theta["self_attn.in_proj_bias"]}
    heads, (layers, batch, tokens, width) = attention.num_heads, x.shape
    split = _product(x, parts, "in").reshape(layers * batch, tokens, 3, heads, width // heads)
    q, k, v = split.permute(2, 0, 3, 1, 4)  # (layers * batch, heads, tokens, width of a head)
    if given.keys is None or attention.dropout == 0.0 or not given.is_training(attention):
        out = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.to(q.dtype))
    else:
        scores = q @ k.mT * (width // heads) ** -0.5
        weights = torch.softmax(scores, -1) if mask is None else _masked_softmax(scores, mask.to(q.dtype))
        weights = drop(weights.unflatten(0, (layers, batch)), attention.dropout, given.keys, 4).flatten(0, 1)
        out = weights @ v
    joined = out.transpose(1, 2).reshape(x.shape)
    return _product(joined, theta, "self_attn.out_proj")


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Shares of what is seen; 0 where nothing is, as in a sequence that is padding alone, rather than NaN."""
    blind = mask.isneginf().all(-1, keepdim=True)
    return torch.softmax(scores + mask.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)


def _attention_mask(u: Tensor, args: Sequence[Any], causal: bool) -> Tensor | None:
    """What is added to the scores, (tokens, tokens) or (layers * batch, heads or 1, tokens, tokens); None for nothing.

    The arguments are those of `nn.TransformerEncoderLayer` after the features: a mask (tokens, tokens) or (batch *
    heads, tokens, tokens), a mask of padding (batch, tokens), and the hint is_causal.
    """
    mask, padding, is_causal = [*args, None, None, None][:3]
    if is_causal and mask is None:
        raise InputError("is_causal", "True without a mask, about which it is a hint", "a mask, or False")
    layers, batch, tokens = u.shape[:3]
    found = None if mask is None else _additive(mask, u.dtype)
    if causal:
        later = _additive(later_tokens(tokens, u.device), u.dtype)
        found = later if found is None else found + later
    if found is not None and found.dim() == 3:
        found = found.unflatten(0, (batch, -1)).repeat(layers, 1, 1, 1)
    if padding is None:
        return found
    columns = _additive(padding, u.dtype)[:, None, None].repeat(layers, 1, 1, 1)
    return columns if found is None else columns + found


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
