"""Training with batch statistics as one node: sum_b gamma_b (y_b - mean_b) / sigma_b + beta_b, y_b = x * W_b.

The gradient is the full one. With M values per channel, g = sum dy, y^_b = (y_b - mean_b) / sigma_b and
dgamma_b = sum dy y^_b, the gradient at the output of branch b is

    dz_b = s_b (dy - g / M - y^_b dgamma_b / M),    s_b = gamma_b / sigma_b,

then dW_b = corr(x, dz_b) and dx = sum_b convT(dz_b, W_b). Expanded, dW_b is
s_b gather_b[G - mean(dy) S - mean(dy y^_b) corr(x, y^_b)]: merging the branches' gradients into one G and
gathering, as with frozen statistics, would drop the last two terms.

All convolutions here are depthwise; an identity branch has no weight. What is saved decides time against
memory. ``keep=True`` keeps every y_b; at stride 1, four fused passes (CPU, Triton) then serve all branches
together (:mod:`lkconv.reparam.normalised_branches`), elsewhere they run one after the other. ``keep=False``
keeps the input alone: the forward takes the statistics of one branch after the other and then runs one merged
convolution with the batch-statistics scales; the backward computes each y_b again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lkconv import backends
from lkconv.reparam import convolution, normalised_branches
from lkconv.reparam.algebra import fold_dtype
from lkconv.reparam.geometry import Geometry, place_geometry
from lkconv.reparam.merge_depthwise_kernels import merge_depthwise_kernels
from lkconv.reparam.scaled_channel_sum import scaled_channel_sum


@dataclass(frozen=True)
class SumSpec:
    """What is not a tensor: the branch geometries (None: the identity), their eps, whether the input itself
    is added to their sum (``skip``), and how to run."""

    geometries: tuple[Geometry | None, ...]
    eps: tuple[float, ...]
    target: Geometry
    skip: bool = False
    keep: bool = True
    synchronise: bool = False
    group: dist.ProcessGroup | None = None


def branch_output(input: Tensor, weight: Tensor | None, geometry: Geometry | None) -> Tensor:
    if weight is None or geometry is None:
        return input
    return convolution.forward(input, weight, None, geometry)


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, in float32 or float64; zeros for no values."""
    # Scratch running statistics make PyTorch's kernel accumulate and answer in their dtype.
    scratch = torch.zeros(2, y.shape[1], dtype=fold_dtype(y), device=y.device)
    if y.numel() == 0:
        return scratch[0], scratch[1]
    mean, var = torch.ops.aten.batch_norm_update_stats(y, scratch[0], scratch[1], 0.0)
    return mean, var


def synchronised_moments(
    means: Tensor, variances: Tensor, count: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, int]:
    """Statistics of all processes together, for all branches (B, C), through one all-reduce.

    Sums of squares cancel against squared means: they are formed and subtracted in float64.
    """
    mean, var = means.double(), variances.double()
    packed = torch.cat(
        [(mean * count).flatten(), ((var + mean * mean) * count).flatten(), mean.new_tensor([count])]
    )
    dist.all_reduce(packed, group=group)
    total = packed[-1]
    first, second = (packed[:-1] / total).reshape(2, *means.shape)
    variance = (second - first * first).clamp_min_(0)
    return first.to(means.dtype), variance.to(means.dtype), int(total)


def plain_sum(
    input: Tensor,
    weights: Sequence[Tensor | None],
    gammas: Sequence[Tensor | None],
    betas: Sequence[Tensor | None],
    spec: SumSpec,
) -> Tensor:
    """The same sum as a composition of differentiable operations: the definition, and the double backward."""
    out = None
    for b, weight in enumerate(weights):
        y = branch_output(input, weight, spec.geometries[b])
        y = F.batch_norm(y, None, None, gammas[b], betas[b], True, 0.0, spec.eps[b])
        out = y if out is None else out + y
    assert out is not None
    return out + input if spec.skip else out


def _merged_output(
    input: Tensor, weights: Sequence[Tensor | None], scales: Tensor, shift: Tensor, spec: SumSpec
) -> Tensor:
    """One convolution with the kernel sum_b place_b(s_b W_b)."""
    kernels, placements = [], []
    for b, (weight, geometry) in enumerate(zip(weights, spec.geometries, strict=True)):
        if weight is None or geometry is None:
            weight = scales.new_ones(scales.shape[1], 1, 1, 1)
            geometry = Geometry((1, 1), groups=spec.target.groups)
        kernels.append(weight)
        placements.append(place_geometry(geometry, spec.target, f"branch {b}"))
    size = spec.target.kernel_size
    kernel, bias = merge_depthwise_kernels(kernels, scales.unbind(), [shift], size, placements, input.dtype)
    return convolution.forward(input, kernel, bias, spec.target)


class BatchStatisticsSum(torch.autograd.Function):
    """(input, spec, weights..., gammas..., betas...) -> (output, means (B, C), variances (B, C), count)."""

    @staticmethod
    @backends.retried
    def forward(ctx, input: Tensor, spec: SumSpec, *tensors: Tensor | None):
        branches = len(spec.geometries)
        weights, gammas, betas = (tensors[i * branches : (i + 1) * branches] for i in range(3))
        how = _arrangement(input, weights, spec)
        if how is not None:
            kept, means, variances = normalised_branches.outputs(input, weights, spec.geometries, how)
            outputs, count = [kept.outputs, *kept.given], how.values_per_channel
        else:
            outputs, means, variances, count = _outputs(input, weights, spec)
        if spec.synchronise:
            means, variances, count = synchronised_moments(means, variances, count, spec.group)
        if count < 2:  # after the reduction, so that all processes raise or none
            raise ValueError(
                f"batch statistics need more than 1 value per channel, got input {tuple(input.shape)}"
            )
        inverse = torch.rsqrt(variances + _eps(spec, means))
        scales = _scales(gammas, inverse)
        shift = -(means * scales).sum(0)
        for beta in betas:
            if beta is not None:
                shift = shift + beta.to(shift.dtype)
        if how is not None:
            scales = _with_skip(scales, spec)
            out = normalised_branches.normalised_sum(input, kept, how, scales, shift)
        elif spec.keep:
            out = scaled_channel_sum(outputs, scales, shift)
        else:
            out = _merged_output(input, weights, scales, shift, spec)
        if spec.skip and not (how and how.identity):
            out += input
        ctx.save_for_backward(input, means, inverse, *weights, *gammas, *betas, *outputs)
        ctx.spec, ctx.count, ctx.how = spec, count, how
        ctx.mark_non_differentiable(means, variances)
        return out, means, variances, count

    @staticmethod
    def backward(ctx, grad: Tensor, *unused):
        input, means, inverse, *rest = ctx.saved_tensors
        branches = len(ctx.spec.geometries)
        weights, gammas, betas, outputs = (rest[i * branches : (i + 1) * branches] for i in range(4))
        if torch.is_grad_enabled():
            if ctx.spec.synchronise:
                raise RuntimeError("double backward through synchronised batch statistics is not supported")
            found = _differentiable_gradients(
                input, weights, gammas, betas, ctx.spec, ctx.needs_input_grad, grad
            )
        elif ctx.how is not None:
            kept = normalised_branches.Kept(rest[3 * branches], list(rest[3 * branches + 1 :]))
            found = _gradients_in_place(input, weights, gammas, betas, kept, means, inverse, ctx, grad)
        else:
            found = _gradients(input, weights, gammas, betas, outputs, means, inverse, ctx, grad)
        return found


def _arrangement(
    input: Tensor, weights: Sequence[Tensor | None], spec: SumSpec
) -> normalised_branches.Arrangement | None:
    """How the fused kernels run the sum, or None where one branch runs after the other."""
    channels = next((w.shape[0] for w in weights if w is not None), 0)
    return normalised_branches.arrange(input, spec.geometries, channels) if spec.keep else None


def _outputs(
    input: Tensor, weights: Sequence[Tensor | None], spec: SumSpec
) -> tuple[list[Tensor], Tensor, Tensor, int]:
    """The outputs of one branch after the other (none without ``keep``), their statistics, and how many
    values each channel has."""
    outputs: list[Tensor] = []
    found = []
    count = 0
    for weight, geometry in zip(weights, spec.geometries, strict=True):
        y = branch_output(input, weight, geometry)
        found.append(moments(y))
        if spec.keep:
            outputs.append(y)
        count = y.numel() // y.shape[1]
        del y
    return outputs, torch.stack([m for m, _ in found]), torch.stack([v for _, v in found]), count


def _gradients_in_place(input, weights, gammas, betas, kept, means, inverse, ctx, grad):
    """The full gradient by the fused kernels, from what the forward pass kept."""
    spec, how, count = ctx.spec, ctx.how, ctx.count
    total, dot = normalised_branches.dots(grad, input, kept, how, means)
    dgamma, dbeta = dot * inverse, total
    dot = dgamma
    if spec.synchronise:
        packed = torch.cat([total.unsqueeze(0), dot])
        dist.all_reduce(packed, group=spec.group)
        total, dot = packed[0], packed[1:]
    scale, slope, constant = _normalised_gradient(gammas, means, inverse, total, dot, count)
    coefficients = _with_skip(scale, spec), slope, constant
    grad_input, grad_weights = normalised_branches.backward(
        grad, input, weights, spec.geometries, kept, how, coefficients
    )
    if spec.skip and not how.identity:
        grad_input += grad
    grad_gammas = [None if g is None else dgamma[b].to(g.dtype) for b, g in enumerate(gammas)]
    grad_betas = [None if b is None else dbeta.to(b.dtype) for b in betas]
    return grad_input, None, *grad_weights, *grad_gammas, *grad_betas


def _differentiable_gradients(input, weights, gammas, betas, spec, needs, grad):
    """Gradients that can be differentiated again: through :func:`plain_sum`, computed anew."""
    tensors = [input, None, *weights, *gammas, *betas]
    wanted = [i for i, t in enumerate(tensors) if t is not None and needs[i]]
    out = plain_sum(input, weights, gammas, betas, spec)
    found = torch.autograd.grad(out, [tensors[i] for i in wanted], grad, create_graph=True)
    result: list[Tensor | None] = [None] * len(tensors)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return tuple(result)


def _gradients(input, weights, gammas, betas, outputs, means, inverse, ctx, grad):
    """The full gradient, one branch after the other; ``ctx`` supplies spec, count and needs_input_grad."""
    spec, branches = ctx.spec, len(weights)
    needs_input, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
    reductions = None
    if spec.synchronise:
        reductions = _synchronised_reductions(input, weights, outputs, means, inverse, spec, grad)
    grad_input = None
    grads: list[Tensor | None] = [None] * (3 * branches)
    for b, (weight, geometry) in enumerate(zip(weights, spec.geometries, strict=True)):
        y = outputs[b] if spec.keep else branch_output(input, weight, geometry)
        gamma = None if gammas[b] is None else gammas[b].to(inverse.dtype)
        if reductions is None:
            dz, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
                grad, y, gamma, None, None, means[b], inverse[b], True, spec.eps[b], [True, True, True]
            )
        else:
            local_g, local_dot, total_g, total_dot = reductions
            dgamma, dbeta = local_dot[b], local_g
            one = slice(b, b + 1)
            scale, slope, constant = _normalised_gradient(
                gammas[one], means[one], inverse[one], total_g, total_dot[one], ctx.count
            )
            dz = scaled_channel_sum([grad, y], torch.cat([scale, slope]), constant[0])
        grads[branches + b] = None if gamma is None else dgamma.to(gammas[b].dtype)
        grads[2 * branches + b] = None if betas[b] is None else dbeta.to(betas[b].dtype)
        if weight is not None and needs[b]:
            grads[b] = convolution.backward_weight(dz, input, geometry).to(weight.dtype)
        if needs_input:
            part = (
                dz if weight is None else convolution.backward_input(dz, weight, tuple(input.shape), geometry)
            )
            grad_input = part if grad_input is None else grad_input.add_(part)
        del y, dz
    if grad_input is not None and spec.skip:
        grad_input.add_(grad)
    return grad_input, None, *grads


def _synchronised_reductions(input, weights, outputs, means, inverse, spec, grad):
    """sum dy (C,) and sum dy y^_b (B, C): of this process, and of all of them through one all-reduce."""
    total = grad.sum((0, 2, 3), dtype=inverse.dtype)
    dots = []
    for b, (weight, geometry) in enumerate(zip(weights, spec.geometries, strict=True)):
        y = outputs[b] if spec.keep else branch_output(input, weight, geometry)
        # Centred before the product: sum dy y - mean sum dy would cancel.
        centred = (y.to(inverse.dtype) - means[b].reshape(1, -1, 1, 1)).mul_(grad)
        dots.append(centred.sum((0, 2, 3)) * inverse[b])
    dot = torch.stack(dots)
    packed = torch.cat([total.unsqueeze(0), dot])
    dist.all_reduce(packed, group=spec.group)
    return total, dot, packed[0], packed[1:]


def _normalised_gradient(gammas, means, inverse, total, dot, count):
    """dz_b = s_b (dy - g / M - y^_b dgamma_b / M) as a dy + b y_b + c, with (B, C) numbers a, b, c."""
    scale = _scales(gammas, inverse)
    slope = scale * inverse * dot / -count
    constant = -scale * total / count - slope * means
    return scale, slope, constant


def _eps(spec: SumSpec, like: Tensor) -> Tensor | float:
    """Of every branch, (B, 1); a number where all agree."""
    if len(set(spec.eps)) == 1:
        return spec.eps[0]
    return torch.tensor(spec.eps, dtype=like.dtype, device=like.device).unsqueeze(1)


def _with_skip(scales: Tensor, spec: SumSpec) -> Tensor:
    """scales (B, C) of the branches, and of the input besides where an identity branch reads it anyway."""
    if not spec.skip or None not in spec.geometries:
        return scales
    scales = scales.clone()
    scales[spec.geometries.index(None)] += 1
    return scales


def _scales(gammas: Sequence[Tensor | None], inverse: Tensor) -> Tensor:
    """gamma_b / sigma_b, (B, C)."""
    return torch.stack([i if g is None else i * g.to(i.dtype) for i, g in zip(inverse, gammas, strict=True)])
