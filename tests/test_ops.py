"""Registration of the three ops: fake kernels, autograd, vmap, functorch, compilers, DTensor."""

import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import lkconv
from lkconv._fake import memory_format
from lkconv.ops import register_hooks
from two_processes import run_in_two_processes

OPS = torch.ops.lkconv
GEOMETRIES = [
    # input size, weight size, stride, padding, dilation
    ((2, 3, 7, 6), (6, 1, 3, 5), (1, 1), (1, 2), (1, 1)),
    ((1, 2, 6, 9), (2, 1, 2, 4), (2, 3), (0, 3), (2, 1)),
    ((2, 2, 3, 3), (2, 1, 5, 5), (1, 1), (2, 2), (1, 1)),
]


def arguments(geometry, dtype=torch.float64, requires_grad=True):
    """Arguments of the three ops for one convolution."""
    size, weight_size, *rest = geometry
    x, w, b = (
        torch.randn(size, dtype=dtype),
        torch.randn(weight_size, dtype=dtype),
        torch.randn(weight_size[0], dtype=dtype),
    )
    gy = torch.randn_like(F.conv2d(x.double(), w.double(), None, *rest, groups=size[1])).to(dtype)
    made = [t.requires_grad_(requires_grad) for t in (x, w, b, gy)]
    x, w, b, gy = made
    return {
        OPS.depthwise_conv2d.default: (x, w, b, *rest),
        OPS.depthwise_conv2d_backward_input.default: (gy, w, size, *rest),
        OPS.depthwise_conv2d_backward_weight.default: (gy, x, weight_size[2:], *rest),
    }


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_opcheck(geometry, dtype, requires_grad):
    for op, args in arguments(geometry, dtype, requires_grad).items():
        torch.library.opcheck(op, args)


def call_with(op, rest, *tensors):
    return op(*tensors, *rest)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients_of_every_order(geometry):
    for op, args in arguments(geometry).items():
        tensors = [a for a in args if isinstance(a, torch.Tensor)]

        call = partial(call_with, op, args[len(tensors) :])
        assert torch.autograd.gradcheck(call, tensors, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(call, tensors)


def test_optional_bias_has_no_gradient():
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 5, 5), (2, 1, 3, 3)))
    assert torch.autograd.gradgradcheck(lambda x, w: lkconv.depthwise_conv2d(x, w, None, 1, 1), (x, w))


# --- fake kernels -----------------------------------------------------------------------------------------


def strided_inputs():
    for size in itertools.product((0, 1, 3), (1, 2), (1, 4), (1, 5)):
        x = torch.randn(size)
        yield x
        yield x.to(memory_format=torch.channels_last)
        yield x.transpose(2, 3).contiguous().transpose(2, 3)
        yield torch.randn(*size[:3], size[3] * 2)[..., ::2]
        yield torch.randn(size[0], 1, size[2], size[3]).expand(size)
    yield torch.empty_strided((4, 1, 1, 1), (1, 1, 1, 1))
    yield torch.empty_strided((4, 1, 1, 5), (25, 25, 25, 5))


def test_fake_strides_are_the_kernels_strides():
    w_cache = {c: torch.randn(2 * c, 1, 3, 2) for c in (1, 2)}
    rest = ((1, 1), (1, 1), (1, 1))
    mode = torch._subclasses.FakeTensorMode()
    for x in strided_inputs():
        w = w_cache[x.shape[1]]
        calls = [
            (OPS.depthwise_conv2d.default, (x, w, None, *rest)),
            (
                OPS.depthwise_conv2d_backward_input.default,
                (x, w[: x.shape[1]], (*x.shape[:3], x.shape[3] - 1), *rest),
            ),
        ]
        for op, args in calls[: 2 if x.shape[3] > 1 else 1]:
            real = op(*args)
            with mode:
                fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype), (
                x.stride()
            )


@pytest.mark.parametrize("size", list(itertools.product((1, 3), (1, 2), (1, 4), (1, 5))), ids=str)
def test_memory_format_is_the_one_torch_suggests(size):
    for order in itertools.permutations(range(4)):
        x = torch.randn([size[d] for d in order]).permute([order.index(d) for d in range(4)])
        suggested = torch._prims_common.suggest_memory_format(x)
        assert memory_format(x) is suggested, x.stride()


# --- the helper on another namespace ----------------------------------------------------------------------


def test_hooks_serve_a_sibling_namespace():
    """What the Triton ops get: the same schemas in another namespace, with kernels of their own."""
    library = torch.library.Library("lkconv_sibling", "DEF")
    for name in ("depthwise_conv2d", "depthwise_conv2d_backward_input", "depthwise_conv2d_backward_weight"):
        schema = str(getattr(OPS, name).default._schema).removeprefix("lkconv::")
        library.define(schema)
        library.impl(name, getattr(lkconv.reference, name), "CPU")
    sibling = register_hooks("lkconv_sibling")
    assert register_hooks("lkconv_sibling") is sibling
    assert sibling.forward is torch.ops.lkconv_sibling.depthwise_conv2d.default
    x, w, b = sample()
    rest = ((1, 1), (1, 2), (1, 1))
    call = partial(call_with, sibling.forward, rest)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)
    assert_close(hessian(loss(call))(x, w, b), hessian(loss(reference))(x, w, b), rtol=1e-9, atol=1e-9)
    assert_close(vmap(call, (0, None, None))(torch.stack([x, x + 1]), w, b)[0], reference(x, w, b))
    with torch.autocast("cpu", torch.bfloat16):
        assert call(x.float(), w.float(), b.float()).dtype == torch.bfloat16


# --- transforms -------------------------------------------------------------------------------------------


def conv(x, w, b):
    return lkconv.depthwise_conv2d(x, w, b, 1, (1, 2), 1)


def reference(x, w, b):
    return F.conv2d(x, w, b, 1, (1, 2), 1, groups=x.shape[-3])


def sample(*batch):
    torch.manual_seed(3)
    return tuple(torch.randn(*batch, *s, dtype=torch.float64) for s in ((1, 2, 4, 4), (4, 1, 3, 5), (4,)))


def loss(function):
    return lambda *args: function(*args).pow(3).sum()


TRANSFORMS = {
    "grad": lambda f: grad(loss(f), (0, 1, 2)),
    "jacrev": lambda f: jacrev(f, (0, 1, 2)),
    "jacfwd": lambda f: jacfwd(f, (0, 1, 2)),
    "hessian": lambda f: hessian(loss(f), (0, 1, 2)),
    "grad of grad": lambda f: grad(lambda *a: grad(loss(f))(*a).pow(3).sum(), (0, 1, 2)),
    "jvp": lambda f: lambda *a: jvp(f, a, tuple(t.cos() for t in a)),
    "jvp of grad": lambda f: lambda *a: jvp(grad(loss(f), (0, 1, 2)), a, tuple(t.cos() for t in a)),
    "vjp": lambda f: lambda *a: vjp(f, *a)[1](reference(*a).cos()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_functorch(name):
    transform = TRANSFORMS[name]
    args = sample()
    assert_close(transform(conv)(*args), transform(reference)(*args), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "dims",
    [d for d in itertools.product((None, 0, 1), (None, 0), (None, 0, -1)) if any(v is not None for v in d)],
    ids=str,
)
def test_vmap(dims):
    args = [t[0] if d is None else t.movedim(0, d) for t, d in zip(sample(3), dims, strict=True)]

    def each(function):
        picked = (
            [t if d is None else t.select(d, i) for t, d in zip(args, dims, strict=True)] for i in range(3)
        )
        return [function(*p) for p in picked]

    assert_close(vmap(conv, dims)(*args), torch.stack(each(reference)), rtol=1e-9, atol=1e-9)
    ours = vmap(grad(loss(conv), (0, 1, 2)), dims)(*args)
    theirs = [torch.stack(g) for g in zip(*each(grad(loss(reference), (0, 1, 2))), strict=True)]
    assert_close(ours, tuple(theirs), rtol=1e-9, atol=1e-9)


def test_vmap_nested_and_unbatched_image():
    x, w = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64), torch.randn(3, 4, 1, 3, 3, dtype=torch.float64)
    ours = vmap(vmap(lkconv.depthwise_conv2d), in_dims=(0, None))(x, w)
    theirs = torch.stack(
        [torch.stack([F.conv2d(x[i, j], w[j], groups=4) for j in range(3)]) for i in range(2)]
    )
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_per_sample_gradients():
    layer = lkconv.DepthwiseConv2d(3, 5, padding=2, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def one(parameters, image):
        return torch.func.functional_call(layer, parameters, (image[None],)).square().sum()

    ours = vmap(grad(one), (None, 0))(parameters, images)
    for i in range(4):
        assert_close({k: v[i] for k, v in ours.items()}, grad(one)(parameters, images[i]))


def test_forward_mode_without_functorch():
    x, w, b = sample()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w, w.cos())
        tangent = torch.autograd.forward_ad.unpack_dual(conv(x, dual, b)).tangent
    assert_close(tangent, reference(x, w.cos(), None), rtol=1e-10, atol=1e-10)


# --- compilers --------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_whole_graph_without_recompiling(dynamic, dynamo):
    layer = lkconv.DepthwiseConv2d(4, (7, 5), padding="same", channel_multiplier=2)
    torch._dynamo.mark_static  # noqa: B018  (imports the module before the configuration is patched)
    compiled = torch.compile(lambda x: layer(x).relu(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    sizes = [(2, 4, 9, 11), (3, 4, 12, 10), (5, 4, 7, 8)] if dynamic else [(2, 4, 9, 11)] * 2
    with dynamo.config.patch(error_on_recompile=True):
        for size in sizes:
            x = torch.randn(size, requires_grad=True)
            y = compiled(x)
            assert_close(y, layer(x).relu())
            ours = torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))
            assert_close(
                ours, torch.autograd.grad(layer(x).relu().square().sum(), (x, layer.weight, layer.bias))
            )
            lkconv.depthwise_conv2d(torch.randn(1, 1, 3, 3).double(), torch.randn(1, 1, 3, 3).double())


def test_compiled_code_follows_use_backend(dynamo):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    x, w, b = sample()
    compiled = torch.compile(conv, fullgraph=True, backend=backend)
    for name in (None, "torch", None):
        if name is None:
            y = compiled(x, w, b)
        else:
            with lkconv.use_backend(name):
                y = compiled(x, w, b)
        assert_close(y, reference(x, w, b), rtol=1e-10, atol=1e-10)
    assert len(graphs) == 2
    assert "lkconv.depthwise_conv2d" in graphs[0] and "conv2d" in graphs[1] and "lkconv" not in graphs[1]


def test_inductor_with_autocast(dynamo):
    layer = lkconv.DepthwiseConv2d(4, 5, padding=2)
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last).requires_grad_()

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x) * 2

    y = torch.compile(run, fullgraph=True)(x)
    assert y.dtype == torch.bfloat16 and y.stride() == run(x).stride()
    assert_close(y, run(x))
    assert_close(
        torch.autograd.grad(y.float().sum(), (x, layer.weight)),
        torch.autograd.grad(run(x).float().sum(), (x, layer.weight)),
    )


def test_inductor_with_dynamic_sizes(dynamo):
    """One compiled graph and one of its gradients serve every size; nothing is compiled again."""
    layer = lkconv.DepthwiseConv2d(4, (7, 5), stride=(2, 1), padding=(3, 2))
    parameters = (layer.weight, layer.bias)

    def run(x):
        return layer(x).relu() * 2

    torch._dynamo.mark_static  # noqa: B018  (imports the module before the configuration is patched)
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    with dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 4, 9, 11), (3, 4, 12, 10), (5, 4, 7, 8)):
            x = torch.randn(size, requires_grad=True)
            y, expected = compiled(x), run(x)
            assert_close(y, expected)
            assert_close(
                torch.autograd.grad(y.square().sum(), (x, *parameters)),
                torch.autograd.grad(expected.square().sum(), (x, *parameters)),
            )


def test_compiled_autograd(dynamo):
    x, w, b = (t.requires_grad_() for t in sample())
    eager = torch.autograd.grad(conv(x, w, b).square().sum(), (x, w, b))
    y = conv(x, w, b).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        y.backward()
    assert_close((x.grad, w.grad, b.grad), eager)


def test_export_with_dynamic_sizes():
    model = torch.nn.Sequential(lkconv.DepthwiseConv2d(3, 7, padding=3), torch.nn.ReLU()).eval()
    dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    for strict in (False, True):
        program = torch.export.export(
            model, (torch.randn(2, 3, 10, 12),), dynamic_shapes=(dims,), strict=strict
        )
        assert "lkconv.depthwise_conv2d.default" in program.graph_module.code
        x = torch.randn(5, 3, 8, 9)
        assert_close(program.module()(x), model(x))
        assert_close(program.run_decompositions().module()(x), model(x))


def test_aot_inductor_package(tmp_path):
    model = torch.nn.Sequential(lkconv.DepthwiseConv2d(3, 5, padding=2), torch.nn.GELU()).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        x = torch.randn(4, 3, 8, 8)
        assert_close(torch._inductor.aoti_load_package(path)(x), model(x))


# --- processes --------------------------------------------------------------------------------------------


def run_python(code, *args):
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_is_light():
    code = """
import sys, torch
before = set(sys.modules)
import lkconv
heavy = ("torch._inductor", "torch._dynamo", "torch.distributed.tensor", "triton", "sympy")
print([m for m in set(sys.modules) - before if m.startswith(heavy)])
"""
    assert run_python(code).strip() == "[]"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path):
    """DDP, and DTensor sharded over batch and channels, on two gloo processes."""
    run_in_two_processes(_check_distributed, tmp_path)


def _check_distributed(rank):
    _check_ddp(rank)
    _check_dtensor()


def _check_ddp(rank):
    torch.manual_seed(0)
    layer = lkconv.DepthwiseConv2d(4, 5, padding=2, dtype=torch.float64)
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    expected = torch.autograd.grad(layer(x).square().mean(), list(layer.parameters()))
    wrapped = torch.nn.parallel.DistributedDataParallel(layer)
    wrapped(x[rank * 2 : rank * 2 + 2]).square().mean().backward()
    torch.testing.assert_close([p.grad for p in layer.parameters()], list(expected))


def _check_dtensor():
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    sizes = (4, 6, 9, 8), (12, 1, 3, 5), (12,)
    full = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    R, S = Replicate(), Shard
    # placements of input, weight and bias, and of the output and the three gradients
    cases = [
        ((S(0), R, R), (S(0), S(0), Partial(), Partial())),
        ((S(1), S(0), S(0)), (S(1), S(1), S(0), S(0))),
        ((R, R, R), (R, R, R, R)),
        ((S(2), R, R), None),
        ((S(0), S(0), R), None),
    ]
    for stride, padding in ((1, (1, 2)), (1, 0), (2, 1)):
        expected = F.conv2d(*full, stride, padding, groups=6)
        grads = torch.autograd.grad(expected.square().sum(), full)
        for placements, results in cases:
            shards = [
                distribute_tensor(t.detach(), mesh, [p]).requires_grad_()
                for t, p in zip(full, placements, strict=True)
            ]
            y = lkconv.depthwise_conv2d(*shards, stride, padding)
            got = torch.autograd.grad((y * y).sum(), shards)
            torch.testing.assert_close(y.full_tensor(), expected)
            torch.testing.assert_close([g.full_tensor() for g in got], list(grads))
            if results is not None:
                assert y.placements == (results[0],), (placements, y.placements)
                assert [g.placements for g in got] == [(p,) for p in results[1:]], placements
    uneven = [torch.randn(s, dtype=torch.float64) for s in ((3, 3, 9, 8), (6, 1, 3, 3))]
    for placement in (S(0), S(1)):
        x, w = (distribute_tensor(t, mesh, [p]) for t, p in zip(uneven, (placement, R), strict=True))
        y = lkconv.depthwise_conv2d(x, w)
        torch.testing.assert_close(y.full_tensor(), F.conv2d(*uneven, groups=3))
