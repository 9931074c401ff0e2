"""Whole models: merging, other libraries' conversions, compilers, processes."""

import copy
import importlib
import warnings
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lkconv import reparam
from reparam_cases import CASES, flag_of, random_input, randomise, relative_error
from two_processes import run_in_two_processes

every_case = pytest.mark.parametrize("case", CASES, ids=str)
BY_NAME = {case.name: case for case in CASES}


class Network(nn.Module):
    """Several families in one model, with layers between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.body = nn.Sequential(
            reparam.ReparamLargeKernelConv(6, 6, 9, 1, 6, 5),
            nn.ReLU(),
            reparam.DilatedReparamBlock(6, 7),
            reparam.RepVGGBlock(6, 6, 3, padding=1),
            reparam.RepMixer(6),
            reparam.RefConv(6, 6, 5, groups=6),
            nn.BatchNorm2d(6),
        )

    def forward(self, x):
        return self.body(self.stem(x))


class GRN(nn.Module):
    """Global response normalisation over (N, H, W, C), with the official attribute names."""

    def __init__(self, dim, use_bias=True):
        super().__init__()
        self.use_bias = use_bias
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        y = (self.gamma * norm / (norm.mean(-1, keepdim=True) + 1e-6) + 1) * x
        return y + self.beta if self.use_bias else y


class Permute(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


class UniRepLKNetBlock(nn.Module):
    """The official block's structure and names, without squeeze-and-excitation and drop path."""

    def __init__(self, dim, dwconv, scaled=True):
        super().__init__()
        self.dwconv = dwconv
        self.norm = nn.BatchNorm2d(dim)
        self.pwconv1 = nn.Sequential(Permute(0, 2, 3, 1), nn.Linear(dim, 4 * dim))
        self.act = nn.Sequential(nn.GELU(), GRN(4 * dim))
        self.pwconv2 = nn.Sequential(
            nn.Linear(4 * dim, dim, bias=False), Permute(0, 3, 1, 2), nn.BatchNorm2d(dim)
        )
        self.gamma = nn.Parameter(torch.ones(dim)) if scaled else None

    def forward(self, x):
        y = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + (y if self.gamma is None else self.gamma.view(1, -1, 1, 1) * y)


def network():
    torch.manual_seed(0)
    return randomise(Network()).double().eval()


def image(dtype=torch.float64):
    return torch.randn(2, 3, 12, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def test_merge_copies_and_merges_everything():
    model, x = network(), image()
    expected = model(x)
    names = set(model.state_dict())
    merged = reparam.merge(model)
    assert set(model.state_dict()) == names and torch.equal(model(x), expected)
    assert relative_error(merged(x), expected) <= 1e-10
    blocks = [m for m in merged.modules() if isinstance(m, reparam.ReparamBlock)]
    assert len(blocks) == 5 and all(b.is_merged for b in blocks)
    assert isinstance(merged.body[6], nn.Identity)  # the norm behind RefConv moved into it
    assert relative_error(reparam.merge(merged)(x), expected) <= 1e-10
    assert reparam.merge(model, inplace=True) is model
    assert relative_error(model(x), expected) <= 1e-10


def test_merge_warns_in_training_mode_only():
    with pytest.warns(UserWarning, match="training mode"):
        reparam.merge(network().train())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reparam.merge(network())


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("kernel", [13, 7, 3])
def test_whole_unireplknet_block(kernel, scaled):
    torch.manual_seed(0)
    dwconv = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    if kernel > 3:
        dwconv = reparam.DilatedReparamBlock(6, kernel)
    block = randomise(UniRepLKNetBlock(6, dwconv, scaled)).double().eval()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    expected = block(x)
    for merged in (
        reparam.merge(nn.Sequential(block))[0],
        reparam.fold_unireplknet_block(copy.deepcopy(block)),
    ):
        assert relative_error(merged(x), expected) <= 1e-10
        assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
        names = set(merged.state_dict())
        assert "pwconv2.0.bias" in names and "gamma" not in names and "act.1.beta" not in names
        assert relative_error(reparam.fold_unireplknet_block(merged)(x), expected) <= 1e-10
    with pytest.raises(ValueError, match="not a UniRepLKNet block"):
        reparam.fold_unireplknet_block(nn.Sequential())


def test_timm_reparameterize_model():
    timm = pytest.importorskip("timm")
    model, x = network(), image()
    merged = timm.utils.reparameterize_model(model)
    assert all(m.is_merged for m in merged.modules() if isinstance(m, reparam.ReparamBlock))
    assert relative_error(merged(x), model(x)) <= 1e-10
    holder = nn.Sequential(randomise(reparam.RepVGGDW(6)).double().eval())
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    fused = timm.utils.reparameterize_model(holder)
    assert type(fused[0]).__name__ == "DepthwiseConv2d"
    assert relative_error(fused(x), holder(x)) <= 1e-10


def test_checkpoints_of_timm_load():
    """Names and values agree with the library that FastViT's users have."""
    fastvit = pytest.importorskip("timm.models.fastvit")
    byobnet, repvit = (importlib.import_module(f"timm.models.{name}") for name in ("byobnet", "repvit"))
    gated = byobnet.LayerFn(attn=importlib.import_module("timm.layers").SEModule)
    torch.manual_seed(0)
    rows = [
        (byobnet.RepVggBlock(6, 6), reparam.TimmRepVGGBlock(6, 6)),
        (byobnet.RepVggBlock(6, 12, stride=2, group_size=3),
         reparam.TimmRepVGGBlock(6, 12, stride=2, group_size=3)),
        (byobnet.RepVggBlock(6, 6, dilation=(2, 2), group_size=1, layers=gated),
         reparam.TimmRepVGGBlock(6, 6, dilation=(2, 2), group_size=1, layers=gated)),
        (repvit.RepVggDw(6, 3), reparam.RepVGGDW(6, 3)),
        (repvit.RepVggDw(6, 3, legacy=True), reparam.RepVGGDW(6, 3, legacy=True)),
        (fastvit.RepMixer(6, 3, 0.5), reparam.RepMixer(6, 3)),
        (fastvit.MobileOneBlock(6, 6, 3, group_size=1), reparam.FastViTMobileOneBlock(6, 6, 3, group_size=1)),
        (fastvit.MobileOneBlock(6, 8, 3, 2, use_se=True),
         reparam.FastViTMobileOneBlock(6, 8, 3, 2, use_se=True)),
        (fastvit.RepConditionalPosEnc(6), reparam.RepConditionalPosEnc(6)),
        (fastvit.ReparamLargeKernelConv(6, 12, 7, 2, 1, 3),
         reparam.FastViTReparamLargeKernelConv(6, 12, 7, 2, 1, 3)),
    ]  # fmt: skip
    x = torch.randn(2, 6, 9, 8)
    for theirs, ours in rows:
        randomise(theirs).eval()
        ours.load_state_dict(theirs.state_dict())
        expected = theirs(x)
        assert relative_error(ours.eval()(x), expected) <= 1e-5
        ours.reparameterize()
        assert relative_error(ours(x), expected) <= 1e-5


def test_official_signatures():
    """Positional arguments mean what they mean in the official code."""
    orepa = reparam.OREPA(6, 6, 3, 1, 1, 1, 6, None, False, None, False, True, 2.0)  # weight_only
    assert "bn" not in dict(orepa.named_children()) and not any(
        k.startswith("bn.") for k in orepa.state_dict()
    )
    kernel = orepa()
    assert torch.equal(kernel, orepa.weight_gen()) and kernel.shape == (6, 1, 3, 3)
    orepa.reparameterize()
    assert torch.equal(orepa(), kernel)
    deployed = reparam.OREPA(6, 6, 3, 1, 1, groups=6, deploy=True, weight_only=True)
    deployed.load_state_dict(orepa.state_dict())
    assert torch.equal(deployed(), kernel)
    with pytest.raises(ValueError, match="weight_only"):
        reparam.OREPA(6, 6, 3, 1, 1)()
    slak = reparam.SLaKReparamLargeKernelConv(6, 6, 13, 1, 6, 5, False, True, True)
    assert slak.Decom and not slak.is_merged
    plain = reparam.SLaKReparamLargeKernelConv(6, 6, 13, 1, 6, None)
    assert not plain.Decom and set(dict(plain.named_children())) == {"lkb_origin"}
    with pytest.raises(ValueError, match="without Decom there are no strips"):
        plain.get_equivalent_strips()


class Stem(nn.Module):
    """A RefConv and a batch norm as attributes, as residual networks write them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = reparam.RefConv(3, 6, 5), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = reparam.RefConv(6, 6, 5, groups=6), nn.BatchNorm2d(6)
        self.kept = []

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return y + self.bn2(self.conv2(y))


class ReadsTheConvolution(Stem):
    def forward(self, x):
        y = self.conv1(x)
        return self.bn1(y) + y


class SharesTheNorm(Stem):
    def forward(self, x):
        return self.bn1(self.conv1(x)) + self.bn1(self.conv1(x + 1))


class ReadsTheWeight(Stem):
    def forward(self, x):
        return self.bn1(self.conv1(x)) + self.bn1.running_mean.sum()


class LooksAtValues(Stem):
    def forward(self, x):
        return self.bn1(self.conv1(x)) if x.mean() < 100 else x


class NormFirst(Stem):
    def forward(self, x):
        return self.conv2(self.bn1(self.conv1(x)))


class InAList(Stem):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([reparam.RefConv(3, 6, 5), nn.BatchNorm2d(6)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("make", "folded"),
    [(Stem, 2), (ReadsTheConvolution, 0), (SharesTheNorm, 0), (ReadsTheWeight, 0), (LooksAtValues, 0),
     (NormFirst, 1), (InAList, 1)],
)  # fmt: skip
def test_merge_folds_the_norm_that_follows_a_refconv(make, folded):
    torch.manual_seed(0)
    model = nn.Sequential(randomise(make()).double()).eval()
    x = image()
    merged = reparam.merge(model)
    assert relative_error(merged(x), model(x)) <= 1e-10
    count = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in merged.modules()) == count - folded
    assert not any(m.training for m in merged.modules())


def test_merge_leaves_norms_that_do_more_alone():
    torch.manual_seed(0)
    x = image()
    hooked = randomise(Stem()).double().eval()
    hooked.bn1.register_forward_hook(lambda m, i, y: 2 * y)
    shared = randomise(Stem()).double().eval()
    shared.again = shared.bn2
    subclass = randomise(Stem()).double().eval()
    subclass.bn1.__class__ = type("Activated", (nn.BatchNorm2d,), {"forward": lambda m, x: x.relu()})
    for model in (hooked, shared, subclass):
        merged = reparam.merge(model)
        assert relative_error(merged(x), model(x)) <= 1e-10
        names = {n for n, m in merged.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert len(names) == 1


def test_merge_in_training_mode_keeps_the_modes():
    model = Stem().train()
    model.conv2.eval()
    with pytest.warns(UserWarning, match="training mode"):
        merged = reparam.merge(model)
    assert merged.training and merged.conv1.training and not merged.conv2.training


def test_slak_accepts_the_other_official_names():
    case = BY_NAME["slak"]
    block = randomise(case.make()).double().eval()
    renamed = {
        k.replace("LoRA1.", "Decom1.").replace("LoRA2.", "Decom2."): v for k, v in block.state_dict().items()
    }
    x = random_input(case)
    for flags in ({}, flag_of(block)):
        other = case.make(**flags).double().eval()
        other.load_state_dict(renamed)
        assert relative_error(other(x), block(x)) <= 1e-10
    dense, bias = block.get_equivalent_kernel_bias()
    expected = nn.functional.conv2d(x, dense, bias, padding=10, groups=5)
    assert relative_error(block(x), expected) <= 1e-10
    block.reparameterize()
    assert sum(p.numel() for p in block.parameters()) == 5 * (2 * 21 * 5 + 2)
    assert torch.allclose(block.get_equivalent_kernel_bias()[0], dense, rtol=1e-12, atol=1e-12)


def test_pruned_rows_disappear():
    block = randomise(reparam.ResRepBlock(6, 8, 3, padding=1, prune_threshold=1e-3)).double().eval()
    with torch.no_grad():
        block.compactor.pwc.weight[[1, 5]] = 0
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    expected, keep = block(x), block.surviving_channels()
    block.reparameterize()
    assert keep.tolist() == [0, 2, 3, 4, 6, 7] and block.reparam_conv.out_channels == 6
    assert relative_error(block(x), expected[:, keep]) <= 1e-10


@every_case
def test_convert_sync_batchnorm(case):
    block = randomise(case.make()).double()
    x = random_input(case)
    expected = block.eval()(x)
    names = set(block.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
    assert set(converted.state_dict()) == names
    assert relative_error(converted.eval()(x), expected) <= 1e-12
    converted.reparameterize()
    assert relative_error(converted(x), expected) <= 1e-10


def compiled_equals_eager(case, training, backend, dtype=torch.float64):
    """Output, gradients and statistics, with one graph."""
    torch._dynamo.reset()
    block = randomise(case.make()).to(dtype).train(training)
    twin = copy.deepcopy(block)
    x, y = random_input(case, dtype).requires_grad_(), random_input(case, dtype).requires_grad_()
    expected = block(x)
    got = torch.compile(twin, fullgraph=True, backend=backend)(y)
    tight = dtype == torch.float64
    assert relative_error(got, expected) <= (1e-12 if tight else 1e-5)
    (got**2).sum().backward(), (expected**2).sum().backward()
    assert relative_error(y.grad, x.grad) <= (1e-10 if tight else 1e-4)
    for (label, a), b in zip(twin.named_buffers(), block.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-12 if tight else 1e-5), label


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_case
def test_compiles_without_graph_breaks(case, training):
    compiled_equals_eager(case, training, "aot_eager")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_inductor(training):
    compiled_equals_eager(BY_NAME["replknet"], training, "inductor", torch.float32)


# Convolutions of the exported graph where there is more than one: strips; the layer and its gate.
CONVOLUTIONS = {
    ("slak", True): 2, ("slak-without-bn", True): 2, ("slak", False): 2, ("slak-without-bn", False): 2,
    ("repmlp", True): 3,
}  # fmt: skip
UNFOLDED = ("dbb", "dbb-depthwise", "repmlp")  # run by their modules while gradients are on


@pytest.mark.parametrize("merged", [False, True])
@every_case
def test_exports_to_one_convolution(case, merged):
    block = randomise(case.make()).eval()
    if merged:
        block.reparameterize()
    x = random_input(case, torch.float32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},))
    bigger = torch.cat([x, x + 1])
    assert relative_error(program.module()(bigger), block(bigger)) <= 1e-6
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    if merged or case.name not in UNFOLDED:
        count = sum("conv2d" in c for c in calls)
        assert count == CONVOLUTIONS.get((case.name, merged), 1), calls


SHARED = ("unireplknet-7", "mobileone", "repmixer")  # families whose statistics two processes share
PARALLEL = tuple(BY_NAME)


def _two_batches(name):
    case = BY_NAME[name]
    return torch.cat([random_input(case), random_input(case, seed=5)])


def _block(name):
    block = randomise(BY_NAME[name].make()).double().train()
    if hasattr(block, "activation"):
        block.activation = nn.Identity()  # rounding decides the sign at a kink
    return block


def _count_all_reduces():
    """A list that grows by one with every all-reduce of this process from now on."""
    calls, plain = [], dist.all_reduce

    def all_reduce(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    dist.all_reduce = all_reduce
    return calls


def _synchronised_step(name, path, x, scale, calls):
    """Gradients of ``scale sum(y^2)`` over both processes, statistics, and all-reduces per pass."""
    block = nn.SyncBatchNorm.convert_sync_batchnorm(_block(name))
    counts = [len(calls)]
    with reparam.use_training_path(path) if path else nullcontext():
        loss = scale * (block(x) ** 2).sum()
        counts.append(len(calls))
        loss.backward()
    counts.append(len(calls))
    for parameter in block.parameters():
        dist.all_reduce(parameter.grad)
    return {
        "gradients": {n: p.grad for n, p in block.named_parameters()},
        "buffers": dict(block.named_buffers()),
        "reductions": [b - a for a, b in pairwise(counts)],
    }


def _work(rank):
    """Synchronised statistics of halves and of an uneven split, then DistributedDataParallel."""
    found, calls = {}, _count_all_reduces()
    for name in SHARED:
        whole = _two_batches(name)
        for path in (None, "fused", "fused-recompute"):
            for split in ([2, 2], [4, 0]):
                x, scale = whole.split(split)[rank], 1 / whole.numel()
                found[name, path, split[0]] = _synchronised_step(name, path, x, scale, calls)
    for name in PARALLEL:
        block = _block(name)
        parallel = nn.parallel.DistributedDataParallel(block)
        (parallel(_two_batches(name).chunk(2)[rank]) ** 2).mean().backward()
        found[name] = {n: p.grad for n, p in block.named_parameters()}
    return found


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What the first of two processes found, by (family, path, images of the first one) and by family."""
    return run_in_two_processes(_work, tmp_path_factory.mktemp("processes"))[0]


@pytest.mark.parametrize("images", [2, 4], ids=["halves", "one-empty"])
@pytest.mark.parametrize("path", [None, "fused", "fused-recompute"])
@pytest.mark.parametrize("name", SHARED)
def test_synchronised_statistics(two_processes, name, path, images):
    """Together they are one process with the whole batch, through one all-reduce per pass."""
    found, x, block = two_processes[name, path, images], _two_batches(name), _block(name)
    with reparam.use_training_path("branches"):
        ((block(x) ** 2).sum() / x.numel()).backward()
    for label, parameter in block.named_parameters():
        assert torch.allclose(found["gradients"][label], parameter.grad, rtol=1e-9, atol=1e-11), label
    for label, buffer in block.named_buffers():
        assert torch.allclose(found["buffers"][label].double(), buffer.double(), rtol=1e-10), label
    assert found["reductions"] == [1, 1]


@pytest.mark.parametrize("name", PARALLEL)
def test_distributed_data_parallel(two_processes, name):
    """Without synchronisation each half has its own statistics."""
    halves = [_block(name) for _ in range(2)]
    for half, part in zip(halves, _two_batches(name).chunk(2), strict=True):
        (half(part) ** 2).mean().backward()
    for (label, a), b in zip(halves[0].named_parameters(), halves[1].parameters(), strict=True):
        want = (a.grad + b.grad) / 2
        assert torch.allclose(two_processes[name][label], want, rtol=1e-9, atol=1e-12), label


def test_constructors_refuse_what_cannot_merge():
    rows = [
        (lambda: reparam.DilatedReparamBlock(4, 19), "kernel_size must be one of"),
        (lambda: reparam.DilatedReparamBlock(4, 7, branches=[(3, 4)]), r"kernel 3, dilation 4"),
        (lambda: reparam.DilatedReparamBlock(4, 7, branches=[(3, 0)]), r"kernel 3, dilation 0"),
        (
            lambda: reparam.DilatedReparamBlock(4, 12, branches=[(5, 1)]),
            r"lk_origin: kernel_size must be odd",
        ),
        (lambda: reparam.DilatedReparamBlock(4, 7, branches=[(3, 1), (3, 1)]), "differ from each other"),
        (lambda: reparam.ReparamLargeKernelConv(4, 4, 5, 1, 4, 7), "small_kernel"),
        (lambda: reparam.ReparamLargeKernelConv(4, 4, 5, 1, 4, 4), "parity"),
        (lambda: reparam.ReparamLargeKernelConv(4, 6, 5, 1, 4, 3), "groups 4"),
        (lambda: reparam.RepVGGBlock(4, 4, 5, padding=2), "kernel_size must be 3"),
        (lambda: reparam.RepVGGBlock(4, 4, 3, padding=0), "padding must equal"),
        (lambda: reparam.RepVGGBlock(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode"),
        (lambda: reparam.ACBlock(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode"),
        (lambda: reparam.DiverseBranchBlock(4, 4, 3, padding=1, dilation=2), "dilation must be 1"),
        (lambda: reparam.DiverseBranchBlock(4, 4, 3), "padding must be"),
        (lambda: reparam.MobileOneBlock(4, 4, 3), "padding must be"),
        (lambda: reparam.RepConditionalPosEnc(4, 8), "dim_out"),
        (lambda: reparam.RepMLPBlock(4, 8, 2, 2), "must equal out_channels"),
        (lambda: reparam.RefConv(4, 4, 3, map_k=5), "map_k"),
        (lambda: reparam.SLaKReparamLargeKernelConv(4, 4, 21, 1, 4, None, Decom=True), "strips' width"),
        (lambda: reparam.TimmRepVGGBlock(4, 4, drop_path_rate=0.1), "drop_path_rate"),
        (lambda: reparam.TimmRepVGGBlock(4, 4, 2), "kernel_size must be odd"),
        (lambda: reparam.FastViTMobileOneBlock(4, 8, 1, num_conv_branches=0), "without any branch"),
    ]
    for make, words in rows:
        with pytest.raises(ValueError, match=words):
            make()
