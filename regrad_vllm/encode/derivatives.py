"""Parts of a decoder with first and second derivatives written by hand. They cost a fraction of what autograd makes.

Autograd derives each elementary operation twice, and each derivative reads and writes whole tensors. Here a part's
derivative is one function, and so is the derivative of this derivative. Frozen weights get no derivative. Sums run in
float32. ``tests/method/test_derivatives.py`` compares each part with autograd.

In a backward pass ``grad`` is the derivative by the output. In a second one, ``by_…`` is the derivative by a gradient.
"""

# torch.autograd.Function passes its arguments untyped.
# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight ⊙ x / √(mean(x²) + epsilon), over the last dimension."""
    return cast(Tensor, _Norm.apply(x, weight, epsilon))


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    return cast(Tensor, _Gated.apply(gate, up))


def lora_linear(x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """x Wᵀ + bias + scaling · x aᵀ bᵀ, with one pair (a, b) for each group of consecutive rows.

    x: (rows, length, in). a: (groups, rank, in). b: (groups, out, rank). Returns (rows, length, out).
    """
    return cast(Tensor, _LoraLinear.apply(x, a, b, weight, bias, scaling))


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(query keyᵀ + bias) value, the softmax in float32.

    query: (rows, heads, length, dim), scaled. key, value: (rows, groups of heads, length, dim). bias broadcasts to
    (rows, heads, length, length). Returns (rows, heads, length, dim).
    """
    rows, groups, length, dim = key.shape
    grouped = query.reshape(rows * groups, -1, dim)
    return cast(Tensor, _Attention.apply(grouped, key.flatten(0, 1), value.flatten(0, 1), bias)).view(query.shape)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(logits)[target] of each row. logits: float32 (rows, vocabulary). targets: int64 (rows,)."""
    return cast(Tensor, _CrossEntropy.apply(logits, targets))


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        rate = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, rate)
        return (wide * rate).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _NormGradient.apply(grad, *ctx.saved_tensors), None, None


class _NormGradient(Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, rate: Tensor) -> Tensor:
        ctx.save_for_backward(grad, x, weight, rate)
        return _by_norm((grad * weight).float(), x.float(), rate).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, by_x: Tensor) -> Any:
        grad, x, weight, rate = ctx.saved_tensors
        seen, wide, scaled = by_x.float(), x.float(), (grad * weight).float()
        by_grad = _by_norm(seen, wide, rate).to(grad.dtype) * weight
        of_both, of_seen, of_scaled = ((one * other).mean(-1, keepdim=True) for one, other in (
            (seen, scaled), (seen, wide), (scaled, wide)
        ))  # fmt: skip
        found = wide * (3 * rate.square() * of_seen * of_scaled - of_both)
        found = found.addcmul_(of_scaled, seen, value=-1).addcmul_(of_seen, scaled, value=-1).mul_(rate**3)
        return by_grad, found.to(x.dtype), None, None


def _by_norm(vector: Tensor, x: Tensor, rate: Tensor) -> Tensor:
    """The derivative of x / rms(x), which is symmetric, times ``vector``."""
    shares = (vector * x).mean(-1, keepdim=True) * rate.square()
    return vector.addcmul(x, shares, value=-1).mul_(rate)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _GatedGradient.apply(grad, *ctx.saved_tensors)


class _GatedGradient(Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, gate: Tensor, up: Tensor) -> Any:
        sigmoid = gate.sigmoid()
        value = gate * sigmoid
        slope = (gate - value).add_(1).mul_(sigmoid)
        ctx.save_for_backward(grad, gate, up, sigmoid, value, slope)
        return (grad * up).mul_(slope), grad * value

    @staticmethod
    def backward(ctx: Any, by_gate: Tensor, by_up: Tensor) -> Any:
        grad, gate, up, sigmoid, value, slope = ctx.saved_tensors
        bend = (gate + 2).sub_(value, alpha=2).mul_(sigmoid).mul_(1 - sigmoid)  # the second derivative of silu
        steep = by_gate * slope
        by_grad = (steep * up).addcmul_(by_up, value)
        of_gate = bend.mul_(by_gate).mul_(up).addcmul_(by_up, slope).mul_(grad)
        return by_grad, of_gate, steep.mul_(grad)


class _LoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        low = torch.bmm(_grouped(x, a), a.mT).mul_(scaling)
        ctx.save_for_backward(x, a, b, weight, low)
        ctx.scaling = scaling
        out = torch.nn.functional.linear(x, weight, bias)
        _grouped(out, a).baddbmm_(low, b.mT)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = _LoraGradient.apply(grad, *ctx.saved_tensors, ctx.scaling, ctx.needs_input_grad[0])
        return *found, None, None, None


class _LoraGradient(Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, low: Tensor, scaling: float,
        of_x: bool,
    ) -> Any:  # fmt: skip
        ctx.set_materialize_grads(False)
        rows, inputs = _grouped(grad, a), _grouped(x, a)
        back = torch.bmm(rows, b).mul_(scaling)
        ctx.save_for_backward(grad, x, a, b, weight, low, back)
        ctx.scaling = scaling
        found = None
        if of_x:
            found = grad @ weight
            _grouped(found, a).baddbmm_(back, a)
        return found, torch.bmm(back.mT, inputs), torch.bmm(rows.mT, low)

    @staticmethod
    def backward(ctx: Any, by_x: Tensor | None, by_a: Tensor | None, by_b: Tensor | None) -> Any:
        grad, x, a, b, weight, low, back = ctx.saved_tensors
        rows, inputs = _grouped(grad, a), _grouped(x, a)
        by_a = torch.zeros_like(a) if by_a is None else by_a
        by_b = torch.zeros_like(b) if by_b is None else by_b
        lower = torch.bmm(inputs, by_a.mT)
        upper = torch.bmm(rows, by_b).mul_(ctx.scaling)
        of_a = torch.bmm(upper.mT, inputs)
        if by_x is None:
            of_grad = torch.zeros_like(grad)
        else:
            seen = _grouped(by_x, a)
            lower.baddbmm_(seen, a.mT)
            of_a.baddbmm_(back.mT, seen)
            of_grad = torch.nn.functional.linear(by_x, weight)
        lower.mul_(ctx.scaling)
        _grouped(of_grad, a).baddbmm_(torch.cat((lower, low), -1), torch.cat((b, by_b), -1).mT)
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = torch.bmm(torch.cat((back, upper), -1), torch.cat((by_a, a), 1)).view(x.shape)
        return of_grad, of_x, of_a, torch.bmm(rows.mT, lower), None, None, None, None


def _grouped(x: Tensor, a: Tensor) -> Tensor:
    """(groups, positions, values): a view of a contiguous tensor."""
    return x.reshape(len(a), -1, x.shape[-1])


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        scores = torch.bmm(query, key.mT).float()
        length = key.shape[1]
        scores.view(len(bias) if len(bias) > 1 else 1, -1, length, length).add_(bias)
        shares = torch.softmax(scores, -1)
        out = torch.bmm(shares.to(value.dtype), value)
        ctx.save_for_backward(query, key, value, shares, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, shares, out = ctx.saved_tensors
        return *_AttentionGradient.apply(grad, query, key, value, shares, out.detach()), None


class _AttentionGradient(Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, shares: Tensor, out: Tensor) -> Any:
        # How far the gain of a key lies above the mean of its row.
        gains = torch.bmm(grad, value.mT).float().sub_((grad * out).float().sum(-1, keepdim=True))
        of_scores = (shares * gains).to(query.dtype)
        ctx.save_for_backward(grad, query, key, value, shares, gains)
        of_value = torch.bmm(shares.to(grad.dtype).mT, grad)
        return torch.bmm(of_scores, key), torch.bmm(of_scores.mT, query), of_value

    @staticmethod
    def backward(ctx: Any, by_query: Tensor, by_key: Tensor, by_value: Tensor) -> Any:
        grad, query, key, value, shares, gains = ctx.saved_tensors
        dtype = query.dtype
        of_scores = (shares * gains).to(dtype)  # the gradient by the scores
        by_scores = torch.bmm(torch.cat((by_query, query), -1), torch.cat((key, by_key), -1).mT).float()
        by_scores.sub_((shares * by_scores).sum(-1, keepdim=True))
        by_gains = (by_scores * shares).to(dtype)
        by_shares = by_scores.mul_(gains).add_(torch.bmm(grad, by_value.mT)).mul_(shares)
        again = by_shares.addcmul_(shares, by_shares.sum(-1, keepdim=True), value=-1).to(dtype)
        return (
            torch.bmm(shares.to(dtype), by_value).baddbmm_(by_gains, value),
            torch.bmm(again, key).baddbmm_(of_scores, by_key),
            torch.bmm(again.mT, query).baddbmm_(of_scores.mT, by_query),
            torch.bmm(by_gains.mT, grad),
            None,
            None,
        )


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logs = torch.log_softmax(logits, -1)
        ctx.save_for_backward(logits, targets, logs)
        return -logs.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _CrossEntropyGradient.apply(grad, *ctx.saved_tensors), None


class _CrossEntropyGradient(Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, _logits: Tensor, targets: Tensor, logs: Tensor) -> Tensor:
        shares = logs.exp()
        ctx.save_for_backward(grad, targets, shares)
        found = shares * grad[:, None]
        return found.scatter_add_(1, targets[:, None], -grad[:, None])

    @staticmethod
    def backward(ctx: Any, by_logits: Tensor) -> Any:
        grad, targets, shares = ctx.saved_tensors
        found = shares * by_logits
        mean = found.sum(-1)
        found.addcmul_(shares, mean[:, None], value=-1).mul_(grad[:, None])
        return mean - by_logits.gather(1, targets[:, None])[:, 0], found, None, None
