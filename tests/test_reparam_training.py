"""Batch statistics in one node, the planner's choice, and RepOptimizers."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lkconv import reparam
from lkconv.reparam.block import conv_bn
from lkconv.reparam.planner import Situation, plan
from lkconv.reparam.repoptimizer import block_multiplier
from reparam_cases import CASES, random_input, randomise, relative_error

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("path", ["fused", "fused-recompute"])
@pytest.mark.parametrize("name", ["replknet", "unireplknet-7", "mobileone", "repmixer", "slak"])
def test_twice_differentiable_with_batch_statistics(name, path):
    case = BY_NAME[name]
    block = randomise(case.make()).double().train()
    if hasattr(block, "activation"):
        block.activation = nn.Identity()  # a kink has no numerical derivative
    names = [n for n, _ in block.named_parameters()]
    x = random_input(case)[:, :, :5, :4].clone().requires_grad_()

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), x)

    arguments = (x, *block.parameters())
    with reparam.use_training_path(path):
        assert torch.autograd.gradcheck(run, arguments, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True)


def _nodes(block, x, path=None):
    """Autograd nodes of sums with batch statistics in a forward pass."""
    with reparam.use_training_path(path) if path else nullcontext(), torch.profiler.profile() as profile:
        block(x)
    return sum(e.count for e in profile.key_averages() if e.key == "BatchStatisticsSum")


def test_the_planner_trains_a_mixer_in_place():
    """By its costs, without being asked to: in float32, as trained."""
    block = reparam.RepMixer(64, 3).train()
    assert _nodes(block, torch.randn(2, 64, 56, 56)) == 1


@pytest.mark.parametrize(
    ("name", "nodes"),
    [("repmixer", {None: 1, "fused-recompute": 1}), ("slak", {None: 1, "fused-recompute": 2})],
)
def test_families_of_several_sums_train_as_one(name, nodes):
    """Strips are one sum unless branches are merged, which strips never are into a dense kernel."""
    case = BY_NAME[name]
    block, x = randomise(case.make()).double().train(), random_input(case)
    for path, count in nodes.items():
        assert _nodes(block, x, path) == count
    assert _nodes(block, x, "branches") == 0


def _mixer(**options):
    torch.manual_seed(1)
    return randomise(reparam.RepMixer(6, 3, **options)).double().train()


def _other_eps(block):
    block.norm.identity.eps = 0.25


def _no_affine(block):
    block.norm.identity = nn.BatchNorm2d(6, affine=False).double()


def _momentum(block):
    block.norm.identity.momentum = None


def test_two_norms_without_parameters_or_statistics():
    norms = [nn.BatchNorm2d(4, affine=False, track_running_stats=False) for _ in range(2)]
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
    parts = [reparam.ConvBN("conv", conv, nn.BatchNorm2d(4, affine=False, track_running_stats=False))]
    parts += [reparam.ConvBN(f"norm{i}", None, norm) for i, norm in enumerate(norms)]
    x, target = torch.randn(2, 4, 6, 5), reparam.Geometry((3, 3), padding=(1, 1), groups=4)
    found = {}
    for path in ("fused", "branches"):
        with reparam.use_training_path(path):
            found[path] = reparam.run_branches(x, parts, target, 4)
    torch.testing.assert_close(found["fused"], found["branches"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_scale", [0.5, None])
@pytest.mark.parametrize("change", [lambda block: None, _other_eps, _no_affine, _momentum])
@pytest.mark.parametrize("path", ["fused", "fused-recompute"])
def test_two_norms_of_the_input_in_one_sum(path, change, layer_scale):
    """Also with another eps, without parameters, or with another momentum: values, gradients, statistics."""
    block = _mixer(layer_scale_init_value=layer_scale)
    change(block)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    found = {}
    for way in (path, "branches"):
        one, leaf = copy.deepcopy(block), x.clone().requires_grad_()
        with reparam.use_training_path(way):
            assert _nodes(copy.deepcopy(one), x, way) == (way == path)
            y = one(leaf)
        y.square().sum().backward()
        found[way] = [y, leaf.grad, *(p.grad for p in one.parameters()), *one.buffers()]
    for a, b in zip(found[path], found["branches"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_hooks_keep_the_parts_of_a_mixer_apart():
    block, seen = _mixer(), []
    block.norm.register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    y = block(x)
    expected = x + block.layer_scale(block.mixer(x) - 2 * seen[0])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    assert len(seen) == 1


def test_a_plain_gather_would_be_wrong():
    """The gradient with batch statistics differs from the frozen one's by far more than rounding."""
    case = BY_NAME["unireplknet-13"]
    block = randomise(case.make()).double()
    x = random_input(case)
    gradients = []
    for training in (True, False):
        one = copy.deepcopy(block).train(training)
        (gradient,) = torch.autograd.grad((one(x) ** 3).sum(), [one.dil_conv_k5_1.weight])
        gradients.append(gradient)
    assert relative_error(*gradients) > 0.1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_options(momentum, affine):
    block = randomise(reparam.ReparamLargeKernelConv(4, 4, 7, 1, 4, 3)).double().train()
    for branch in (block.lkb_origin, block.small_conv):
        branch.bn = nn.BatchNorm2d(4, momentum=momentum, affine=affine, eps=1e-3).double()
    x = torch.randn(3, 4, 8, 7, dtype=torch.float64)
    found = {}
    for path in ("branches", "fused", "fused-recompute"):
        one = copy.deepcopy(block)
        with reparam.use_training_path(path):
            y = [one(x * i) for i in (1, 2, 3)]
        found[path] = [*y, *one.buffers(), *torch.autograd.grad((y[-1] ** 3).sum(), list(one.parameters()))]
    for path in ("fused", "fused-recompute"):
        for got, want in zip(found[path], found["branches"], strict=True):
            assert torch.allclose(got.double(), want.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_training_is_as_accurate_as_branches(dtype):
    case = BY_NAME["unireplknet-7"]
    block = randomise(case.make()).to(dtype).train()
    x = random_input(case, dtype)
    exact = copy.deepcopy(block).double()(x.double())
    errors = {}
    for path in ("branches", "fused", "fused-recompute"):
        with reparam.use_training_path(path):
            y = copy.deepcopy(block)(x)
        assert y.dtype == dtype
        errors[path] = (y.double() - exact).norm().item()
    assert errors["fused"] <= 1.5 * errors["branches"]
    assert errors["fused-recompute"] <= 1.5 * errors["branches"]


def test_autocast_training_keeps_parameters_and_statistics_in_float32():
    case = BY_NAME["unireplknet-7"]
    block = randomise(case.make()).float().train()
    x = random_input(case, torch.float32)
    expected = copy.deepcopy(block)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and relative_error(y, expected) <= 3e-2
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())
    assert all(b.dtype in (torch.float32, torch.int64) for b in block.buffers())


def test_recompute_keeps_the_input_alone():
    block = randomise(reparam.DilatedReparamBlock(8, 7)).double().train()
    saved = {}
    for path in ("branches", "fused", "fused-recompute"):
        x = torch.randn(4, 8, 24, 24, dtype=torch.float64, requires_grad=True)
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with reparam.use_training_path(path), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(x)
        saved[path] = sum(n for n in sizes.values() if n >= x.numel()) // x.numel()
    # The input and four outputs: whole vectors of channels in the fused path.
    assert saved == {"branches": 5, "fused": 5, "fused-recompute": 1}


def test_a_single_value_per_channel_is_refused():
    block = reparam.ReparamLargeKernelConv(4, 4, 7, 1, 4, 3).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.zeros(1, 4, 1, 1))


def test_frozen_branches_run_merged_inside_a_training_model():
    block = randomise(reparam.ReparamLargeKernelConv(4, 4, 7, 1, 4, 3)).double().train()
    for branch in (block.lkb_origin, block.small_conv):
        branch.bn.eval()
    x = torch.randn(3, 4, 8, 7, dtype=torch.float64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = block(x)
    assert [e.count for e in profile.key_averages() if e.key == "lkconv::merged_depthwise_conv2d"] == [1]
    block.small_conv.bn.train()  # half frozen: branch by branch, still right
    expected = block.lkb_origin(x) + copy.deepcopy(block.small_conv)(x)
    assert relative_error(block(x), expected) <= 1e-12
    assert y.shape == expected.shape


@pytest.mark.parametrize("name", ["unireplknet-7", "slak"])
def test_forward_mode_with_batch_statistics(name):
    """A directional derivative agrees with the gradient of the fused path."""
    case = BY_NAME[name]
    block = randomise(case.make()).double().train()
    x = random_input(case).requires_grad_()
    direction = torch.randn_like(x)
    cotangent = torch.randn_like(block(x))
    (gradient,) = torch.autograd.grad(block(x), x, cotangent)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), direction)
        tangent = torch.autograd.forward_ad.unpack_dual(block(dual)).tangent
    assert torch.allclose((tangent * cotangent).sum(), (gradient * direction).sum(), rtol=1e-10)


PLANS = [
    (Situation(False, (False,), True), "branches"),
    (Situation(True, (False, False), True), "merged"),
    (Situation(True, (False, False), False), "merged"),
    (Situation(True, (True, False), True), "branches"),
    (Situation(True, (True, True), False), "branches"),
    (Situation(True, (True, True), True, cropped=True), "branches"),
    (Situation(True, (True, True), True, traced=True), "branches"),
    (Situation(True, (True, True), True), "fused"),
    (Situation(True, (True, True), True, synchronised=True), "fused"),
    (Situation(True, (True, True), True, in_place=(25,)), "fused"),
    (Situation(True, (True,), True, in_place=(49,)), "fused"),
    (Situation(True, (True,), True, in_place=(169,)), "branches"),
    (Situation(True, (True, True), True, in_place=()), "branches"),
    (Situation(True, (True, True), True, in_place=(), synchronised=True), "fused"),
]


@pytest.mark.parametrize(("situation", "path"), PLANS)
def test_planner(situation, path):
    chosen = plan(situation)
    assert chosen.path == path and chosen.reason


@pytest.mark.parametrize(
    ("kernels", "size", "fused"),
    [
        (((31, 31), (5, 5)), (128, 56), True),
        (((31, 31),), (128, 56), False),
        (((13, 13), (5, 5), (3, 3)), (160, 28), True),
        (((51, 5), (5, 5)), (124, 56), True),
        (((5, 51),), (124, 56), False),
        (((3, 3), (1, 1)), (96, 56), True),
        (((3, 3),), (96, 56), True),
    ],
)
def test_what_runs_apart_trains_branch_by_branch(kernels, size, fused):
    channels, side = size
    target = reparam.Geometry(kernels[0], padding=(kernels[0][0] // 2, kernels[0][1] // 2), groups=channels)
    parts = []
    for k in kernels:
        geometry = reparam.Geometry(k, padding=(k[0] // 2, k[1] // 2), groups=channels)
        parts.append(reparam.ConvBN.of("branch", conv_bn(channels, channels, geometry).train()))
    x = torch.randn(1, channels, side, side)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        reparam.run_branches(x, parts, target, channels)
    assert any(e.key == "BatchStatisticsSum" for e in profile.key_averages()) == fused


def test_planner_takes_wishes_where_possible():
    trains = Situation(True, (True, True), True)
    assert plan(Situation(True, (True,), True, in_place=()), "fused").path == "fused"
    for path in ("fused", "fused-recompute", "branches"):
        assert plan(trains, path).path == path
    assert plan(Situation(True, (True, True), False), "fused").path == "branches"
    with pytest.raises(ValueError, match="path must be"), reparam.use_training_path("merged"):
        pass


# --- RepOptimizers ----------------------------------------------------------------------------------------


def two_models(groups, rule):
    """A sum of constant-scale branches, and the plain kernel that equals it with its multiplier."""
    torch.manual_seed(0)
    block = reparam.LinearAddBlock(4, 4, 3, 1, 1, groups=groups, is_csla=True).double()
    with torch.no_grad():
        for scale in (block.scale_conv, block.scale_1x1):
            scale.weight.copy_(torch.rand(4) + 0.5)
        block.scale_conv.weight[1] *= -1
        block.scale_identity.weight.fill_(1.0)
    plain = nn.Parameter(branches_kernel(block).detach().clone())
    return block, plain, block_multiplier(block, rule)


def branches_kernel(block):
    weight, _ = reparam.merge_kernels(block._branches(), block._target)
    return weight


def identity_as_trained_kernel(block):
    """The identity's scale trains as a diagonal 1x1 kernel with constant scale 1 does: it is that kernel."""
    return [block.conv.weight, block.conv_1x1.weight, block.scale_identity.weight]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
    ids=["plain", "momentum", "nesterov-decay"],
)
def test_sgd_equals_training_the_branches(groups, options):
    block, plain, multiplier = two_models(groups, "sgd")
    trained = torch.optim.SGD(identity_as_trained_kernel(block), lr=0.05, **options)
    ours = reparam.RepSGD([plain], {plain: multiplier}, lr=0.05, **options)
    follow(block, plain, trained, ours, groups)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_training_the_branches(groups, decay):
    block, plain, multiplier = two_models(groups, "adamw")
    options = {"lr": 0.01, "weight_decay": decay, "eps": 1e-30}
    trained = torch.optim.AdamW(identity_as_trained_kernel(block), **options)
    ours = reparam.RepAdamW([plain], {plain: multiplier}, **options)
    follow(block, plain, trained, ours, groups)


def follow(block, plain, trained, ours, groups):
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        x = torch.randn(2, 4, 6, 5, generator=generator, dtype=torch.float64)
        for optimiser, kernel in ((trained, branches_kernel(block)), (ours, plain)):
            optimiser.zero_grad()
            y = nn.functional.conv2d(x, kernel, padding=1, groups=groups)
            (y.sin() + y**2).mean().backward()
            optimiser.step()
        assert relative_error(plain, branches_kernel(block)) <= 1e-10


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_skipped_by_a_gradient_scaler_changes_nothing(fused):
    weight = nn.Parameter(torch.rand(2, 2, 3, 3) + 1)
    for make in (reparam.RepSGD, reparam.RepAdamW):
        ours = make([weight], {weight: torch.full_like(weight, 4.0)}, lr=0.1, weight_decay=0.5, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        before = weight.detach().clone()
        scaler.scale((weight * float("inf")).sum()).backward()
        scaler.step(ours)
        scaler.update()
        assert torch.equal(weight, before), make.__name__
        weight.grad = None
        scaler.scale(weight.sum()).backward()
        scaler.step(ours)
        assert not torch.equal(weight, before), make.__name__
        weight.grad = None


def test_gradient_multipliers_of_repvgg():
    geometry = reparam.Geometry.make
    found = reparam.gradient_multipliers(
        (4, 4, 3, 3),
        [torch.full((4,), 2.0), 3.0, 1.0],
        [geometry(3, 1, 1), geometry(1), geometry(1)],
        geometry(3, 1, 1),
        [False, False, True],
    )
    expected = torch.full((4, 4, 3, 3), 4.0)
    expected[:, :, 1, 1] += 9
    expected[range(4), range(4), 1, 1] += 1
    assert torch.equal(found, expected)


def test_repoptimizer_refusals():
    geometry = reparam.Geometry.make(3, 1, 1)
    with pytest.raises(ValueError, match="rule"):
        reparam.gradient_multipliers((4, 4, 3, 3), [1.0], [geometry], geometry, rule="lion")
    with pytest.raises(ValueError, match="equally long"):
        reparam.gradient_multipliers((4, 4, 3, 3), [1.0], [], geometry)
    with pytest.raises(ValueError, match=r"scales\[0\]"):
        reparam.gradient_multipliers((4, 4, 3, 3), [torch.ones(3)], [geometry], geometry)
    with pytest.raises(ValueError, match="at least one"):
        reparam.gradient_multipliers((4, 4, 3, 3), [], [], geometry)
    with pytest.raises(ValueError, match="weight_shape"):
        reparam.gradient_multipliers((4, 4, 5, 5), [1.0], [geometry], geometry)
    weight = nn.Parameter(torch.zeros(4, 4, 3, 3))
    with pytest.raises(ValueError, match="shape"):
        reparam.RepSGD([weight], {weight: torch.ones(4, 1, 3, 3)}, lr=0.1)


def test_optimizers_leave_gradients_and_other_parameters_alone():
    weight, other = nn.Parameter(torch.ones(2, 2, 3, 3)), nn.Parameter(torch.ones(3))
    ours = reparam.RepSGD([weight, other], {weight: torch.full_like(weight, 4.0)}, lr=0.5)

    def closure():
        ours.zero_grad()
        loss = weight.sum() + other.sum()
        loss.backward()
        return loss

    assert ours.step(closure).item() == 39
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(weight, torch.full_like(weight, -1.0)) and torch.equal(
        other, torch.full_like(other, 0.5)
    )
