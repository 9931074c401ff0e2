"""The algebra: placing, folding, composing, merging, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lkconv.reparam import (
    Branch,
    Geometry,
    compose_1x1,
    fold_batch_norm,
    fold_compactor,
    identity_kernel,
    merge_kernels,
    place,
)
from lkconv.reparam.repmlp import toeplitz_matrix
from reparam_cases import randomise, relative_error


def run(x, weight, geometry):
    """F.conv2d of a geometry; negative padding crops the input first."""
    crop_h, crop_w = (min(p, 0) for p in geometry.padding)
    x = F.pad(x, (crop_w, crop_w, crop_h, crop_h))
    padding = tuple(max(p, 0) for p in geometry.padding)
    return F.conv2d(x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def placements(draw):
    """A target and a branch that fits: per axis, choose offset and step, and derive the padding."""
    axes = []
    for _ in range(2):
        grid = draw(st.integers(1, 2))
        branch_size = draw(st.integers(1, 4))
        step = draw(st.integers(1, 3))
        offset = draw(st.integers(0, 3))
        # Equal output sizes need the same number of taps before and after the branch.
        size = 2 * offset + step * (branch_size - 1) + 1
        padding = draw(st.integers(0, 4))
        axes.append((size, padding, grid, branch_size, padding - offset * grid, step * grid))
    stride = tuple(draw(st.integers(1, 2)) for _ in axes)
    groups = draw(st.sampled_from([1, 2, 4]))
    (size, padding, grid, k, p, r) = zip(*axes, strict=True)
    return Geometry(size, stride, padding, grid, groups), Geometry(k, stride, p, r, groups)


@settings(max_examples=150)
@given(placements())
def test_placed_kernel_computes_what_the_branch_does(geometries):
    target, branch = geometries
    weight = random(4, 4 // target.groups, *branch.kernel_size)
    x = random(2, 4, 40, 37, seed=1)
    placed = place(weight, branch, target)
    assert placed.shape[2:] == torch.Size(target.kernel_size)
    assert torch.allclose(run(x, placed, target), run(x, weight, branch), rtol=1e-12, atol=1e-12)


TARGET = Geometry.make(7, 1, 3, 1, 4)
IMPOSSIBLE = [
    (Geometry.make(5, 2, 2, 1, 4), "stride"),
    (Geometry.make(5, 1, 2, 1, 2), "groups"),
    (Geometry.make(5, 1, 2, 1, 4, "reflect"), "padding_mode"),
    (Geometry.make(5, 1, 4, 1, 4), "exceeds the target padding"),
    (Geometry.make(9, 1, 3, 1, 4), "outside the 7-tap"),
    (Geometry.make(3, 1, 3, 4, 4), "outside the 7-tap"),
    (Geometry.make(4, 1, 2, 1, 4), "output height differs"),
    (Geometry.make((5, 3), 1, (2, 2), 1, 4), "output width differs"),
]


@pytest.mark.parametrize(("branch", "words"), IMPOSSIBLE, ids=[w for _, w in IMPOSSIBLE])
def test_impossible_geometries_name_the_branch_and_the_condition(branch, words):
    weight = random(4, 4 // branch.groups, *branch.kernel_size)
    with pytest.raises(ValueError, match=words) as error:
        place(weight, branch, TARGET, "small_conv")
    assert "small_conv" in str(error.value)


def test_other_refusals():
    with pytest.raises(ValueError, match="target dilation 2"):
        place(random(4, 1, 3, 3), Geometry.make(3, 1, 1, 1, 4), Geometry.make(3, 1, 2, 2, 4))
    with pytest.raises(ValueError, match="weight must be"):
        place(random(4, 1, 3, 3), Geometry.make(5, 1, 2, 1, 4), TARGET)
    with pytest.raises(ValueError, match="at least one branch"):
        merge_kernels([], TARGET)
    small = Geometry.make(3, 1, 1, 1, 4)
    with pytest.raises(ValueError, match="b: scale"):
        merge_kernels([Branch(random(4, 1, 3, 3), small, random(3), None, "b")], TARGET)
    with pytest.raises(ValueError, match=r"c: \(O, I / groups\)"):
        merge_kernels(
            [Branch(random(4, 1, 3, 3), small), Branch(random(8, 1, 3, 3), small, None, None, "c")], TARGET
        )
    with pytest.raises(ValueError, match="odd sizes"):
        identity_kernel(4, 4, 2)
    with pytest.raises(ValueError, match="divisible"):
        identity_kernel(4, 3)
    with pytest.raises(ValueError, match="1x1"):
        compose_1x1(random(4, 4, 3, 3), None, random(4, 4, 3, 3), None)
    with pytest.raises(ValueError, match="second must be"):
        compose_1x1(random(6, 4, 1, 1), None, random(4, 4, 3, 3), None)
    with pytest.raises(ValueError, match="compactor"):
        fold_compactor(random(4, 4, 3, 3), None, random(4, 5, 1, 1))
    with pytest.raises(ValueError, match="running statistics"):
        fold_batch_norm(random(4, 1, 3, 3), None, nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="channels"):
        fold_batch_norm(random(4, 1, 3, 3), None, nn.BatchNorm2d(5))
    with pytest.raises(ValueError, match="kernel_size must be positive"):
        Geometry.make(0)
    with pytest.raises(TypeError, match="stride"):
        Geometry.make(3, "2")
    with pytest.raises(ValueError, match="asymmetric"):
        Geometry.of(nn.Conv2d(4, 4, 4, padding="same", groups=4))


def test_strided_branches_may_agree_for_one_input_size_only():
    from lkconv.reparam.geometry import place_geometry

    target, branch = Geometry.make(2, 2, 0), Geometry.make(1, 2, 0)
    with pytest.raises(ValueError, match="output height differs"):
        place_geometry(branch, target)
    assert place_geometry(branch, target, input_size=(8, 6)).offset == (0, 0)
    with pytest.raises(ValueError, match="for an input of 7"):
        place_geometry(branch, target, input_size=(7, 6))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fold_batch_norm(affine, bias):
    conv = nn.Conv2d(4, 6, 3, bias=bias).double()
    bn = randomise(nn.BatchNorm2d(6, affine=affine)).double().eval()
    x = random(2, 4, 8, 8)
    weight, shift = fold_batch_norm(conv.weight, conv.bias, bn)
    assert relative_error(F.conv2d(x, weight, shift), bn(conv(x))) <= 1e-12


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_identity_kernel_is_the_identity(groups):
    x = random(2, 4, 6, 5)
    kernel = identity_kernel(4, groups, (3, 5), dtype=torch.float64)
    assert torch.equal(F.conv2d(x, kernel, padding=(1, 2), groups=groups), x)


@pytest.mark.parametrize("groups", [1, 2])
def test_compose_equals_padding_with_the_first_bias(groups):
    first, first_bias = random(8, 6 // groups, 1, 1), random(8, seed=1)
    second, second_bias = random(4, 8 // groups, 3, 5, seed=2), random(4, seed=3)
    x = random(2, 6, 7, 8, seed=4)
    inner = F.conv2d(x, first, None, groups=groups)
    inner = F.pad(inner, (2, 2, 1, 1)) + first_bias.reshape(1, -1, 1, 1)
    expected = F.conv2d(inner, second, second_bias, groups=groups)
    weight, bias = compose_1x1(first, first_bias, second, second_bias, groups)
    assert relative_error(F.conv2d(x, weight, bias, padding=(1, 2), groups=groups), expected) <= 1e-12


def test_toeplitz_matrix_equals_the_convolution():
    kernel, x = random(3, 1, 5, 5), random(2, 3, 4, 6, seed=1)
    matrix = toeplitz_matrix(kernel, 4, 6)
    dense = F.conv2d(x.reshape(2, -1, 1, 1), matrix, groups=3).reshape(x.shape)
    assert relative_error(dense, F.conv2d(x, kernel, padding=2, groups=3)) <= 1e-12


def _leaves():
    return [random(4, 1, k, k, seed=k).requires_grad_() for k in (7, 3)] + [
        random(4, seed=s).requires_grad_() for s in range(4)
    ]


def _merged(w7, w3, s7, s3, b7, b3):
    small = Geometry.make(3, 1, 2, 2, 4)
    return merge_kernels([Branch(w7, TARGET, s7, b7), Branch(w3, small, s3, b3)], TARGET)


def test_merging_is_twice_differentiable():
    assert torch.autograd.gradcheck(_merged, _leaves())
    assert torch.autograd.gradgradcheck(_merged, _leaves())


def test_composition_is_differentiable():
    leaves = [t.requires_grad_() for t in (random(4, 2, 1, 1), random(4), random(4, 2, 3, 3), random(4))]
    assert torch.autograd.gradcheck(lambda *t: compose_1x1(*t, groups=2), leaves)


def test_half_precision_is_cast_last():
    """One rounding at the end beats rounding every branch."""
    weights = [random(4, 1, k, k, seed=k).to(torch.bfloat16) for k in (7, 5, 3)]
    geometries = [Geometry.make(k, 1, k // 2, 1, 4) for k in (7, 5, 3)]
    scales = [random(4, seed=9 + i).to(torch.bfloat16) for i in range(3)]
    branches = [Branch(w, g, s) for w, g, s in zip(weights, geometries, scales, strict=True)]
    exact, _ = merge_kernels(
        [Branch(b.weight.double(), b.geometry, b.scale.double()) for b in branches], TARGET
    )
    merged, _ = merge_kernels(branches, TARGET)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.to(torch.float32).to(torch.bfloat16))
