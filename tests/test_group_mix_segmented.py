"""segmented_depthwise_conv2d against one F.conv2d per segment."""

import itertools
import warnings

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

import accuracy
import cases
import lkconv
from bench import measure, segmented
from lkconv import reference
from two_processes import run_in_two_processes

OP = torch.ops.lkconv.segmented_depthwise_conv2d.default
FORMATS = (torch.contiguous_format, torch.channels_last)
# Input's size without channels; channels and window, None for an identity, of every segment.
ARRANGEMENTS = {
    "InceptionNeXt": ((2, 14, 13), [(22, None), (6, (3, 3)), (6, (1, 11)), (6, (11, 1))]),
    "windows first": ((2, 9, 10), [(3, (11, 1)), (17, (3, 3)), (1, None), (5, (1, 11))]),
    "neighbours of every width": ((1, 7, 9), [(n, (3, 3 + 2 * (n % 3))) for n in (1, 2, 8, 15, 16, 17, 33)]),
    "two identities": ((3, 6, 6), [(3, None), (4, (5, 5)), (3, None)]),
    "large windows": ((2, 24, 26), [(5, (25, 25)), (2, None), (18, (31, 31)), (3, (13, 5))]),
    "bands of rows": ((2, 70, 66), [(22, None), (8, (3, 3)), (8, (1, 11)), (8, (11, 1)), (16, (7, 7))]),
    "blocks of images": ((5, 16, 16), [(64, None), (12, (3, 3)), (12, (1, 11)), (12, (11, 1))]),
    "windows larger than the image": ((2, 3, 4), [(4, (9, 9)), (4, (1, 21)), (4, (7, 3))]),
    "one row": ((2, 1, 19), [(5, (1, 11)), (3, None), (4, (3, 3))]),
    "one column": ((2, 19, 1), [(5, (11, 1)), (3, None), (4, (3, 3))]),
    "one segment": ((2, 8, 8), [(8, (5, 5))]),
    "identity alone": ((2, 8, 8), [(8, None)]),
    "empty segments": ((2, 6, 7), [(0, None), (4, (3, 3)), (0, (5, 5)), (2, None), (0, None)]),
    "no channels": ((2, 6, 7), [(0, None), (0, (3, 3))]),
    "no images": ((0, 6, 7), [(3, None), (4, (3, 3))]),
}  # fmt: skip
arrangements = pytest.mark.parametrize("arrangement", ARRANGEMENTS)


def arguments(arrangement, dtype=torch.float64, layout="contiguous"):
    """Arguments of the op; every other convolved segment has a bias."""
    (batch, height, width), segments = ARRANGEMENTS[arrangement]
    splits = [channels for channels, _ in segments]
    # Made in float64, so that every dtype rounds the same numbers.
    x = torch.randn(batch, sum(splits), height, width, dtype=torch.float64).to(dtype)
    weights = [
        None if k is None else (torch.randn(c, 1, *k, dtype=torch.float64) / (k[0] * k[1]) ** 0.5).to(dtype)
        for c, k in segments
    ]
    biases = [
        None if w is None or i % 2 else torch.randn(c, dtype=torch.float64).to(dtype)
        for i, (c, w) in enumerate(zip(splits, weights, strict=True))
    ]
    return cases.place(x, layout), weights, biases, splits


def converted(tensors, dtype):
    return [None if t is None else t.to(dtype) for t in tensors]


def expected(x, weights, biases, splits, dtype):
    """By PyTorch in ``dtype``; in float16 by its own kernel, as in accuracy.torch_result."""
    with warnings.catch_warnings(), torch.backends.mkldnn.flags(enabled=dtype != torch.float16):
        warnings.simplefilter("ignore", UserWarning)  # the switch speaks of TF32 on other devices
        given = converted(weights, dtype), converted(biases, dtype)
        return reference.segmented_depthwise_conv2d(x.to(dtype).contiguous(), *given, splits)


def check_values(got, x, weights, biases, splits):
    """Identities to the bit, and every convolved segment within the limits of all kernels."""
    exact, peer = (expected(x, weights, biases, splits, d) for d in (torch.float64, x.dtype))
    pieces = (t.split(splits, dim=1) for t in (got, x, exact, peer))
    for y, own, e, p, w in zip(*pieces, weights, strict=True):
        if w is None:
            assert torch.equal(y, own)
        elif y.numel():
            limit = accuracy.limit_for(x.dtype, w[0].numel(), accuracy.relative_error(p, e))
            assert accuracy.relative_error(y, e) <= limit


def inception_weights(gate=6, dtype=torch.float64):
    """The splits of InceptionNeXt: identity, 3 x 3, 1 x 11, 11 x 1."""
    kernels = [(3, 3), (1, 11), (11, 1)]
    weights = [torch.randn(gate, 1, *k, dtype=dtype, requires_grad=True) for k in kernels]
    return [None, *weights], [None, *(torch.randn(gate, dtype=dtype, requires_grad=True) for _ in kernels)]


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@arrangements
def test_values(arrangement, layout, dtype):
    x, *rest = arguments(arrangement, dtype, layout)
    got = lkconv.segmented_depthwise_conv2d(x, *rest)
    format = torch._prims_common.suggest_memory_format(x)
    assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous(memory_format=format)
    check_values(got, x, *rest)


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("arrangement", ["windows first", "neighbours of every width", "bands of rows"])
def test_input_layouts(arrangement, layout, dtype):
    x, *rest = arguments(arrangement, dtype, layout)
    check_values(lkconv.segmented_depthwise_conv2d(x, *rest), x, *rest)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@arrangements
def test_a_segment_is_what_the_convolution_of_its_slice_is(arrangement, layout):
    """To the bit, and in any order of the segments: no kernel writes past its slice."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weights, biases, splits = arguments(arrangement, dtype, layout)
        for order in (range(len(splits)), range(len(splits) - 1, -1, -1)):
            slices = x.split(splits, dim=1)
            turned = torch.cat([slices[i] for i in order], dim=1)
            turned = turned.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
            lists = [[values[i] for i in order] for values in (weights, biases, splits)]
            outputs = OP(turned, *lists).split(lists[2], dim=1)
            for y, s, w, b in zip(outputs, turned.split(lists[2], dim=1), *lists[:2], strict=True):
                if w is not None and y.numel():
                    s = torch.ops.lkconv.depthwise_conv2d(
                        s, w, b, (1, 1), [k // 2 for k in w.shape[2:]], (1, 1)
                    )
                assert_close(y, s, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for layout in ("contiguous", "channels_last"):
            for arrangement in ("neighbours of every width", "bands of rows", "blocks of images"):
                x, *rest = arguments(arrangement, torch.float32, layout)
                check_values(OP(x, *rest), x, *rest)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("format", FORMATS)
def test_equals_reference(format):
    weights, biases = inception_weights()
    x = torch.randn(2, 40, 9, 13, dtype=torch.float64).to(memory_format=format).requires_grad_()
    leaves = [x, *weights[1:], *biases[1:]]
    results = []
    for function in (lkconv.segmented_depthwise_conv2d, reference.segmented_depthwise_conv2d):
        out = function(x, weights, biases)
        results.append(
            (
                out,
                torch.autograd.grad((out * torch.linspace(0, 1, out.numel()).view(out.shape)).sum(), leaves),
            )
        )
    (out, grads), (expected, expected_grads) = results
    assert_close(out, expected)
    assert torch.equal(out[:, :22], x[:, :22])
    for a, b in zip(grads, expected_grads, strict=True):
        assert_close(a, b)


def test_explicit_splits_with_two_identities():
    w = torch.randn(4, 1, 5, 5)
    x = torch.randn(1, 10, 6, 6)
    out = lkconv.segmented_depthwise_conv2d(x, [None, w, None], splits=[3, 4, 3])
    expected = torch.nn.functional.conv2d(x[:, 3:7], w, padding=2, groups=4)
    assert_close(out, torch.cat([x[:, :3], expected, x[:, 7:]], 1))


def test_other_dtypes_and_the_plain_backend_are_pytorchs():
    x, *rest = arguments("two identities", torch.complex64)
    assert_close(lkconv.segmented_depthwise_conv2d(x, *rest), reference.segmented_depthwise_conv2d(x, *rest))
    x, *rest = arguments("empty segments")
    with lkconv.use_backend("torch"), torch.profiler.profile() as profile:
        got = lkconv.segmented_depthwise_conv2d(x, *rest)
    assert_close(got, OP(x, *rest))
    assert not [e.name for e in profile.events() if e.name.startswith("lkconv")]


# --- what it copies ---------------------------------------------------------------------------------------


# What PyTorch copies into the output: identities. In channels_last the op does so itself, block by block.
COPIED = {torch.contiguous_format: [[2, 22, 9, 13]], torch.channels_last: []}


@pytest.mark.parametrize("format", FORMATS)
def test_one_op_that_copies_identities_alone(format):
    weights, biases = inception_weights(dtype=torch.float32)
    x = torch.randn(2, 40, 9, 13).to(memory_format=format)
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        lkconv.segmented_depthwise_conv2d(x, weights, biases)
    events = profile.events()
    names = [e.name for e in events]
    assert [n for n in names if n.startswith("lkconv")] == ["lkconv::segmented_depthwise_conv2d"]
    assert not {"aten::contiguous", "aten::clone", "aten::cat"} & set(names)
    assert [e.input_shapes[0] for e in events if e.name == "aten::copy_"] == COPIED[format]


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_by_the_same_op_and_slices_in_place(format):
    weights, biases = inception_weights(dtype=torch.float32)
    x = torch.randn(2, 40, 9, 13).to(memory_format=format).requires_grad_()
    y = lkconv.segmented_depthwise_conv2d(x, weights, biases)
    seed = torch.randn_like(y)
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.autograd.grad(y, [x, *weights[1:], *biases[1:]], seed)
    events = profile.events()
    names = [e.name for e in events if e.name.startswith("lkconv")]
    assert sorted(names) == [
        *["lkconv::depthwise_conv2d_backward_weight"] * 3, "lkconv::segmented_depthwise_conv2d",
    ]  # fmt: skip
    copied = [e.input_shapes[0] for e in events if e.name in ("aten::copy_", "aten::cat", "aten::clone")]
    assert [size for size in copied if size[0:1] == [2]] == COPIED[format]


@pytest.mark.parametrize("format", FORMATS)
def test_memory_of_a_call_is_its_output(format):
    weights, biases = inception_weights(dtype=torch.float32)
    x = torch.randn(2, 40, 30, 31).to(memory_format=format)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        y = lkconv.segmented_depthwise_conv2d(x, weights, biases)
    changes = [e.self_cpu_memory_usage for e in profile.events() if e.name == "[memory]"]
    changes += [e.self_cpu_memory_usage for e in profile.events() if e.name != "[memory]"]
    allocated = sum(change for change in changes if change > 0)
    assert y.nbytes <= allocated <= 1.1 * y.nbytes


def test_only_the_wanted_gradients_and_what_is_kept_for_them():
    x, weights, biases, splits = arguments("InceptionNeXt")
    weights[1].requires_grad_()
    with torch.profiler.profile() as profile:
        lkconv.segmented_depthwise_conv2d(x, weights, biases, splits).sum().backward()
    names = [e.name for e in profile.events() if e.name.startswith("lkconv")]
    assert names == ["lkconv::segmented_depthwise_conv2d", "lkconv::depthwise_conv2d_backward_weight"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        OP(x.requires_grad_(), [None if w is None else w.detach() for w in weights], biases, splits)
    assert kept == [w.shape for w in weights if w is not None]


# --- derivatives and transforms ---------------------------------------------------------------------------

SMALL = {
    "mixed": ((2, 3, 4), [(2, None), (2, (3, 1)), (1, (1, 3)), (1, (3, 5))]),
    "empty": ((1, 3, 3), [(0, None), (2, (3, 3)), (0, (1, 3)), (1, None)]),
}
ARRANGEMENTS |= {f"small {name}": value for name, value in SMALL.items()}


def flat_call(function, arrangement, format=torch.contiguous_format):
    """``function`` of the tensors alone, and those tensors."""
    x, weights, biases, splits = arguments(arrangement)
    given = [t for t in (*weights, *biases) if t is not None]

    def call(x, *tensors):
        left = iter(tensors)
        lists = [[None if t is None else next(left) for t in ts] for ts in (weights, biases)]
        return function(x, *lists, splits)

    return call, (x.to(memory_format=format), *given)


def public(x, weights, biases, splits):
    return lkconv.segmented_depthwise_conv2d(x, weights, biases, splits)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("arrangement", ["small mixed", "small empty"])
def test_gradients_of_every_order(arrangement, format):
    call, tensors = flat_call(public, arrangement, format)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_expanded_gradient():
    call, tensors = flat_call(public, "InceptionNeXt")
    plain, same = flat_call(reference.segmented_depthwise_conv2d, "InceptionNeXt")
    leaves = [t.requires_grad_() for t in tensors]
    ours = torch.autograd.grad(call(*leaves).sum(), leaves)
    assert_close(ours, torch.autograd.grad(plain(*leaves).sum(), leaves), rtol=1e-9, atol=1e-9)
    assert len(same) == len(tensors)


def loss(function):
    return lambda *args: function(*args).pow(3).sum()


def every(count):
    return tuple(range(count))


TRANSFORMS = {
    "grad": lambda f, n: grad(loss(f), every(n)),
    "jacrev": lambda f, n: jacrev(f, every(n)),
    "jacfwd": lambda f, n: jacfwd(f, every(n)),
    "hessian": lambda f, n: hessian(loss(f), (0, 1)),
    "jvp": lambda f, n: lambda *a: jvp(f, a, tuple(t.cos() for t in a)),
    "jvp of grad": lambda f, n: lambda *a: jvp(grad(loss(f), every(n)), a, tuple(t.cos() for t in a)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_functorch(name):
    ours, tensors = flat_call(public, "small mixed")
    theirs, _ = flat_call(reference.segmented_depthwise_conv2d, "small mixed")
    transform = TRANSFORMS[name]
    n = len(tensors)
    assert_close(transform(ours, n)(*tensors), transform(theirs, n)(*tensors), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 2), (3, 4), (0, 1, 2, 3, 4, 5)], ids=str)
def test_vmap(which):
    """Over the input, over some weights and biases, over everything; and of gradients."""
    ours, tensors = flat_call(public, "small mixed")
    theirs, _ = flat_call(reference.segmented_depthwise_conv2d, "small mixed")
    dims = tuple((1 if i else 0) if i in which else None for i in range(len(tensors)))
    args = [
        t if d is None else torch.stack([t, t.sin(), t.cos()], d) for t, d in zip(tensors, dims, strict=True)
    ]
    samples = [
        [t if d is None else t.select(d, i) for t, d in zip(args, dims, strict=True)] for i in range(3)
    ]
    assert_close(vmap(ours, dims)(*args), torch.stack([theirs(*s) for s in samples]), rtol=1e-9, atol=1e-9)
    wanted = every(len(tensors))
    got = vmap(grad(loss(ours), wanted), dims)(*args)
    each = zip(*(grad(loss(theirs), wanted)(*s) for s in samples), strict=True)
    assert_close(got, tuple(map(torch.stack, each)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, weights, biases, splits = arguments("InceptionNeXt", torch.float32)
    low = [x.to(dtype), converted(weights, dtype), converted(biases, dtype), splits]
    with torch.autocast("cpu", dtype):
        got = lkconv.segmented_depthwise_conv2d(x, weights, biases, splits)
        mixed = lkconv.segmented_depthwise_conv2d(x, weights, converted(biases, dtype), splits)
        with lkconv.use_backend("torch"):
            plain = lkconv.segmented_depthwise_conv2d(x, weights, biases, splits)
        double = lkconv.segmented_depthwise_conv2d(*arguments("InceptionNeXt"))
    assert got.dtype == plain.dtype == dtype and double.dtype == torch.float64
    assert torch.equal(got, OP(*low)) and torch.equal(mixed, got)
    assert_close(plain, got)


# --- registration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    ("arrangement", "layout"),
    [
        *itertools.product(("small mixed", "small empty", "one row"), ("contiguous", "channels_last")),
        ("small mixed", "channel_slice_channels_last"),
        ("no images", "contiguous"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_opcheck(arrangement, layout, requires_grad):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, weights, biases, splits = arguments(arrangement, dtype, layout)
        for t in (x, *weights, *biases):
            if t is not None:
                t.requires_grad_(requires_grad)
        torch.library.opcheck(OP, (x, weights, biases, splits))


class Mixer(torch.nn.Module):
    """InceptionNeXt's, of 16 channels."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.randn(2, 1, *k) for k in ((3, 3), (1, 11), (11, 1)))
        self.biases = torch.nn.ParameterList(torch.randn(2) for _ in range(3))

    def forward(self, x):
        return lkconv.segmented_depthwise_conv2d(x, [None, *self.weights], [None, *self.biases]).relu() * 2


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_whole_graph_without_recompiling(dynamic, backend, dynamo):
    mixer = Mixer()
    torch._dynamo.mark_static  # noqa: B018  (imports the module before the configuration is patched)
    compiled = torch.compile(mixer, fullgraph=True, dynamic=dynamic, backend=backend)
    sizes = [(2, 16, 9, 11), (3, 16, 12, 10), (5, 16, 7, 8)] if dynamic else [(2, 16, 9, 11)] * 2
    with dynamo.config.patch(error_on_recompile=True):
        for size in sizes:
            x = torch.randn(size, requires_grad=True)
            y, eager = compiled(x), mixer(x)
            assert_close(y, eager)
            leaves = [x, *mixer.parameters()]
            ours = torch.autograd.grad(y.square().sum(), leaves)
            assert_close(ours, torch.autograd.grad(eager.square().sum(), leaves), rtol=1e-4, atol=1e-4)


def test_inductor_with_autocast_and_channels_last(dynamo):
    mixer = Mixer()
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return mixer(x)

    y = torch.compile(run, fullgraph=True)(x)
    assert y.dtype == torch.bfloat16 and y.stride() == run(x).stride()
    assert_close(y, run(x))
    assert_close(torch.autograd.grad(y.float().sum(), x), torch.autograd.grad(run(x).float().sum(), x))


def test_compiled_code_follows_use_backend(dynamo):
    codes = []

    def backend(graph, inputs):
        codes.append(graph.code)
        return graph

    mixer, x = Mixer(), torch.randn(1, 16, 5, 5)
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    ours = compiled(x)
    with lkconv.use_backend("torch"):
        assert_close(compiled(x), ours)
    assert "lkconv.segmented_depthwise_conv2d" in codes[0] and "lkconv" not in codes[1]


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes(strict):
    mixer = Mixer().eval()
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(mixer, (torch.randn(2, 16, 10, 12),), dynamic_shapes=(dims,), strict=strict)
    assert "lkconv.segmented_depthwise_conv2d.default" in program.graph_module.code
    x = torch.randn(5, 16, 8, 9)
    assert_close(program.module()(x), mixer(x))
    assert_close(program.run_decompositions().module()(x), mixer(x))


def test_aot_inductor_package(tmp_path):
    mixer = Mixer().eval()
    with torch.no_grad():
        program = torch.export.export(mixer, (torch.randn(2, 16, 8, 8),))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "mixer.pt2"))
        x = torch.randn(2, 16, 8, 8)
        assert_close(torch._inductor.aoti_load_package(path)(x), mixer(x))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path):
    """DTensors sharded over the batch, with and without gradients."""
    run_in_two_processes(_check_dtensor, tmp_path)


def _check_dtensor(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    call, tensors = flat_call(public, "two identities")
    full = [t.requires_grad_() for t in tensors]
    grads = torch.autograd.grad(call(*full).square().sum(), full)
    placements = [Shard(0), *[Replicate()] * (len(full) - 1)]
    shards = [
        distribute_tensor(t.detach(), mesh, [p]).requires_grad_()
        for t, p in zip(full, placements, strict=True)
    ]
    y = call(*shards)
    assert_close(y.full_tensor(), call(*full))
    assert y.placements == (Shard(0),)
    assert_close([g.full_tensor() for g in torch.autograd.grad(y.square().sum(), shards)], list(grads))
    with torch.no_grad():
        assert_close(call(*shards).full_tensor(), call(*full))


# --- wrong arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights,biases,splits,message",
    [
        ([None, None], None, None, "splits must be given"),
        ([torch.zeros(4, 1, 3, 3)], None, None, "sum to"),
        ([None, torch.zeros(4, 1, 3, 3)], [None], None, "biases must have"),
        ([None, torch.zeros(4, 1, 4, 3)], None, None, "odd"),
        ([None, torch.zeros(4, 2, 3, 3)], None, None, "weights\\[1\\] must be"),
        ([None, torch.zeros(4, 1, 3, 3)], [torch.zeros(6), None], None, "biases\\[0\\] must be None"),
        ([None, torch.zeros(4, 1, 3, 3)], [None, torch.zeros(3)], None, "biases\\[1\\]"),
        ([None, torch.zeros(4, 1, 3, 3)], None, [5, 5], "weights\\[1\\] must be"),
        ([None, torch.zeros(4, 1, 3, 3)], None, [12, -2], "non-negative"),
        ([None, torch.zeros(4, 1, 3, 3)], None, [10], "splits must have"),
        ([None, torch.zeros(4, 1, 3, 3, device="meta")], None, None, "on input's device"),
    ],
)  # fmt: skip
def test_errors(weights, biases, splits, message):
    with pytest.raises(ValueError, match=message):
        lkconv.segmented_depthwise_conv2d(torch.zeros(1, 10, 4, 4), weights, biases, splits)


def test_errors_of_input_and_dtypes():
    weights = [None, torch.zeros(4, 1, 3, 3)]
    with pytest.raises(ValueError, match="must be \\(N, C, H, W\\)"):
        lkconv.segmented_depthwise_conv2d(torch.zeros(10, 4, 4), weights)
    for size in ((1, 10, 0, 4), (0, 10, 4, 0)):
        with pytest.raises(ValueError, match="positive height and width"):
            lkconv.segmented_depthwise_conv2d(torch.zeros(size), weights)
    with pytest.raises(TypeError, match="weights\\[1\\] must have input's dtype"):
        lkconv.segmented_depthwise_conv2d(torch.zeros(1, 10, 4, 4).double(), weights)
    with pytest.raises(TypeError, match="biases\\[1\\] must have input's dtype"):
        lkconv.segmented_depthwise_conv2d(torch.zeros(1, 10, 4, 4), weights, [None, torch.zeros(4).half()])
    with pytest.raises(TypeError, match="input must be float64"):
        lkconv.segmented_depthwise_conv2d(torch.zeros(1, 10, 4, 4) > 0, [None, weights[1] > 0])


# --- the benchmark ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", segmented.MODES)
def test_benchmark_of_a_mixer(mode):
    """The four stages of InceptionNeXt-T; one is measured, in both layouts of both sides."""
    assert [(c, side, len(w)) for c, side, w in segmented.mixers().values()] == [
        (96, 56, 3), (192, 28, 3), (384, 14, 3), (768, 7, 3),
    ]  # fmt: skip
    name = list(segmented.mixers())[3]
    rows = segmented.measure_mixer(name, 1, "float32", mode, "cpu", measure.Budget(seconds=0.01, turns=1))
    assert len(rows) == 4 and all(r["median"] and r["error"] < 1e-5 for r in rows)
    assert "x" in segmented.show(rows)
