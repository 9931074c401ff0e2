"""lkconv::scaled_channel_sum: a per-channel combination of branch outputs in one pass."""

import itertools

import pytest
import torch

from lkconv import reference, reparam, use_backend

OP = torch.ops.lkconv.scaled_channel_sum.default
# One rounding of the result.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
SIZES = (
    (2, 3, 5, 7),
    (1, 70, 3, 3),
    (3, 16, 1, 33),
    (2, 133, 2, 1),
    (0, 4, 3, 3),
    (2, 4, 0, 3),
    (1, 1, 40, 40),
)


def arguments(size, count, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [torch.randn(size, dtype=torch.float64).to(dtype) for _ in range(count)]
    return inputs, torch.randn(count, size[1], dtype=wide), torch.randn(size[1], dtype=wide)


def exact(inputs, scales, shift):
    total = shift.double().reshape(1, -1, 1, 1).expand(inputs[0].shape).clone()
    for t, s in zip(inputs, scales, strict=True):
        total += t.double() * s.double().reshape(1, -1, 1, 1)
    return total


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def lay_out(tensor, layout):
    if layout == "nhwc":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full([n + 2 for n in tensor.shape], float("nan"), dtype=tensor.dtype)
        view = wide[1:-1, 2:, 1:-1, 2:]
        return view.copy_(tensor)
    if layout == "misaligned":
        flat = torch.full((tensor.numel() + 1,), float("nan"), dtype=tensor.dtype)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    return tensor


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size, count, dtype):
    inputs, scales, shift = arguments(size, count, dtype)
    wanted = exact(inputs, scales, shift)
    for layout in ("dense", "nhwc", "sliced", "misaligned"):
        laid = [lay_out(t, layout) for t in inputs]
        got = OP(laid, scales, shift)
        suggested = torch._prims_common.suggest_memory_format(laid[0])
        assert got.dtype == dtype and got.is_contiguous(memory_format=suggested)
        assert error(got, wanted) <= TOLERANCE[dtype]


def test_every_input_has_a_layout_of_its_own():
    inputs, scales, shift = arguments((2, 20, 6, 5), 4, torch.float32)
    layouts = ("dense", "nhwc", "sliced", "misaligned")
    wanted = exact(inputs, scales, shift)
    for order in itertools.permutations(layouts):
        laid = [lay_out(t, layout) for t, layout in zip(inputs, order, strict=True)]
        assert error(OP(laid, scales.t().contiguous().t(), shift), wanted) <= 1e-6


def test_threads_do_not_change_bits():
    for layout in ("dense", "nhwc"):
        inputs, scales, shift = arguments((4, 96, 33, 31), 3, torch.bfloat16)
        inputs = [lay_out(t, layout) for t in inputs]
        threads = torch.get_num_threads()
        try:
            found = []
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(OP(inputs, scales, shift))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*found)
        assert error(found[0], exact(inputs, scales, shift)) <= TOLERANCE[torch.bfloat16]


def test_half_precision_rounds_once():
    """A chain of addcmul rounds after every input."""
    given = arguments((2, 8, 16, 16), 6, torch.bfloat16)
    wanted = exact(*given)
    rounded = error(wanted.to(torch.bfloat16), wanted)
    assert error(OP(*given), wanted) <= 1.01 * rounded
    assert error(reference.scaled_channel_sum(*given), wanted) > 1.5 * rounded


def test_derivatives_and_opcheck():
    inputs, scales, shift = arguments((2, 3, 2, 3), 2, torch.float64)
    leaves = [t.requires_grad_() for t in (*inputs, scales, shift)]

    def call(a, b, scales, shift):
        return OP([a, b], scales, shift)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("dense", "nhwc"):
            inputs, scales, shift = arguments((2, 3, 4, 5), 2, dtype)
            inputs = [lay_out(t, layout).requires_grad_() for t in inputs]
            torch.library.opcheck(OP, (inputs, scales.requires_grad_(), shift.requires_grad_()))


@pytest.mark.parametrize("layout", ["dense", "nhwc"])
def test_training_uses_it_once(layout):
    """Strided branches, which fused run one after the other, give what the chain in plain PyTorch gives."""
    block = reparam.MobileOneBlock(8, 8, 3, 2, 1, groups=8, num_conv_branches=2).double().train()
    block.activation = torch.nn.Identity()
    x = lay_out(torch.randn(2, 8, 9, 10, dtype=torch.float64), layout)

    def run():
        with torch.profiler.profile() as profile, reparam.use_training_path("fused"):
            y = block(x)
            grads = torch.autograd.grad(y.pow(3).sum(), list(block.parameters()))
        counts = {e.key: e.count for e in profile.key_averages()}
        return [y, *grads], counts.get("lkconv::scaled_channel_sum", 0)

    got, count = run()
    with use_backend("torch"):
        wanted, none = run()
    assert (count, none) == (1, 0)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(got, wanted, strict=True))


def test_memory_safety_checks():
    inputs, scales, shift = arguments((2, 3, 4, 5), 2, torch.float32)
    wrong = [
        ([], scales, shift),
        ([inputs[0], inputs[1][:1]], scales, shift),
        ([inputs[0], inputs[1].double()], scales, shift),
        (inputs, scales[:1], shift),
        (inputs, scales, shift[:2]),
        (inputs, scales.double(), shift),
        ([inputs[0][0], inputs[1][0]], scales, shift),
        ([t.int() for t in inputs], scales, shift),
    ]
    for given in wrong:
        with pytest.raises(RuntimeError, match="lkconv"):
            OP(*given)
