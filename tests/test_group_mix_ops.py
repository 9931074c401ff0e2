"""The Group-Mix ops under PyTorch's tools: opcheck, compile, export, instruction sets."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import lkconv
from group_mix_cases import aggregate_arguments, attention

ops = torch.ops.lkconv


def op_inputs(dtype=torch.float32):
    module, size = attention(40, dtype), (3, 5)
    a = aggregate_arguments(module.aggregator)
    qkv = torch.randn(2, 15, 120, dtype=dtype)
    dw, pw, nw, nb = (
        [t.detach() for t in a[n]]
        for n in ("depthwise_weights", "pointwise_weights", "norm_weights", "norm_biases")
    )
    lw, lb = a["layer_norm_weight"].detach(), a["layer_norm_bias"].detach()
    premix, prelocal, _, mean, var = ops.group_mix_mix(qkv, *size, dw, pw, lw, lb, 1e-5)
    mixed = ops.group_mix_normalize(qkv, premix, nw, nb, mean, var, 1e-5)
    local = torch.randn(2, 15, 8, dtype=dtype)
    sums = ops.group_mix_backward_reduce([mixed], qkv, premix, nw, nb, mean, var, 1e-5)
    pos_w, pos_b = ([t.detach() for t in ts] for ts in module.crpe.parameter_lists())
    out, log_sum, context = ops.group_mix_attention(mixed, local, *size, pos_w, pos_b, 0.4)
    leaf = qkv.clone().requires_grad_()
    return {
        "group_mix_aggregate": (
            leaf,
            *size,
            dw,
            pw,
            nw,
            nb,
            list(a["running_means"]),
            list(a["running_vars"]),
            lw,
            lb,
            1e-5,
            1e-5,
        ),
        "group_mix_mix": (qkv, *size, dw, pw, lw, lb, 1e-5),
        "group_mix_normalize": (qkv, premix, nw, nb, mean, var, 1e-5),
        "group_mix_backward_reduce": ([mixed], qkv, premix, nw, nb, mean, var, 1e-5),
        "group_mix_backward": (
            [mixed],
            local,
            qkv,
            premix,
            prelocal,
            *size,
            dw,
            pw,
            nw,
            nb,
            mean,
            var,
            lw,
            lb,
            1e-5,
            1e-5,
            sums,
            90.0,
        ),
        "group_mix_attention": (mixed.clone().requires_grad_(), local, *size, pos_w, pos_b, 0.4),
        "group_mix_attention_backward": (out, mixed, log_sum, context, *size, pos_w, pos_b, 0.4),
    }


@pytest.mark.parametrize("name", list(op_inputs()))
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name).default, op_inputs()[name])


BACKWARD_OPS = ("group_mix_backward_reduce", "group_mix_backward")


@pytest.mark.parametrize("name", BACKWARD_OPS)
def test_gradients_of_q_k_and_v_apart(name):
    """Three tensors anywhere in memory, also strided ones, are the same gradient as one."""
    (mixed,), *rest = op_inputs()[name]
    apart = [mixed[0].clone(), mixed[1].clone(), torch.stack([mixed[2]] * 2, -1)[..., 0]]
    op = getattr(ops, name)
    torch.testing.assert_close(op(apart, *rest), op([mixed], *rest), rtol=0, atol=0)
    torch.library.opcheck(op.default, (apart, *rest))


@pytest.mark.parametrize("name", BACKWARD_OPS)
def test_gradients_of_other_numbers_and_shapes_are_refused(name):
    (mixed,), *rest = op_inputs()[name]
    parts = list(mixed)
    for given in ([], parts[:2], [*parts, parts[0]], [*parts[:2], parts[2][:, 1:]], [parts[0]], [mixed] * 3):
        with pytest.raises(RuntimeError, match="grad_mixed has"):
            getattr(ops, name)(given, *rest)


def test_a_training_step_gathers_no_gradients():
    """Those of q, k and v are read where they are."""
    module = attention(40, torch.float32, training=True).aggregator
    qkv = torch.randn(2, 15, 120, requires_grad=True)
    outputs = module(qkv, (3, 5))
    grads = [torch.randn_like(o) for o in outputs]
    with torch.profiler.profile() as profile:
        torch.autograd.grad(outputs, [qkv, *module.parameters()], grads)
    names = {e.name for e in profile.events()}
    assert "lkconv::group_mix_backward" in names
    assert not names & {"aten::cat", "aten::stack", "aten::clone", "aten::contiguous"}


@pytest.mark.parametrize("training", [False, True])
def test_compile_in_one_graph(training):
    module = attention(40, torch.float32, training=training)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 15, 40, requires_grad=True)
    state = {n: t.clone() for n, t in module.state_dict().items()}
    out = compiled(x, (3, 5))
    (grad,) = torch.autograd.grad(out.sum(), x)
    after = {n: t.clone() for n, t in module.state_dict().items()}
    module.load_state_dict(state)
    expected = module(x, (3, 5))
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(after[name], tensor, msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_inductor_with_dynamic_sizes(training):
    """One compilation serves other batches and maps, forward, backward and running statistics."""
    module = attention(40, torch.float32, training=training)
    other = copy.deepcopy(module)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, size in ((2, (3, 5)), (3, (4, 7)), (5, (6, 2))):
            x = torch.randn(batch, size[0] * size[1], 40, requires_grad=True)
            results = []
            for run, own in ((module, module), (compiled, other)):
                out = run(x, size)
                leaves = [x, own.qkv.weight, own.aggregator.agg2.conv1.weight, own.aggregator.norm1.weight]
                results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for (name, a), (_, b) in zip(module.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_aot_inductor_package(tmp_path):
    module = attention(40, torch.float32).requires_grad_(False)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        module, (torch.randn(2, 15, 40), (3, 5)), dynamic_shapes=({0: batch}, (None, None))
    )
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    x = torch.randn(4, 15, 40)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x, (3, 5)), module(x, (3, 5)))


@pytest.mark.parametrize("name", ["group_mix_aggregate", "group_mix_attention"])
def test_autocast_of_the_ops(name):
    """The tokens are cast, parameters are not, float64 stays, and the gradient has the leaf's dtype."""
    leaf, *rest = op_inputs()[name]
    op = getattr(ops, name)
    with torch.autocast("cpu", torch.bfloat16):
        out = op(leaf, *rest)[0]
        wide = op(leaf.detach().double(), *(t.double() if torch.is_tensor(t) else t for t in rest))[0]
    cast = [t.bfloat16() if torch.is_tensor(t) and t.dim() == 3 else t for t in rest]
    assert out.dtype == torch.bfloat16 and wide.dtype == torch.float64
    assert torch.equal(out, op(leaf.bfloat16(), *cast)[0])
    out.float().sum().backward()
    assert leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all()


def test_compile_of_the_function():
    """The aggregation alone: its outputs are views, also under a compiler."""
    module = attention(40, torch.float32, training=True).aggregator
    qkv = torch.randn(2, 15, 120, requires_grad=True)
    results = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        out = run(qkv, (3, 5))
        loss = sum((i + 1) * (t**2).sum() for i, t in enumerate(out))
        results.append((*out, *torch.autograd.grad(loss, [qkv, module.agg2.pointwise_conv.weight])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_export():
    module = attention(40, torch.float32)
    x = torch.randn(2, 15, 40)
    program = torch.export.export(module, (x, (3, 5)))
    torch.testing.assert_close(program.module()(x, (3, 5)), module(x, (3, 5)))


def test_parameters_of_another_dtype():
    """bfloat16 tokens with float32 parameters, as under autocast: the arithmetic is float32 either way."""
    module = attention(40, torch.float32).aggregator
    qkv = torch.randn(1, 15, 120).bfloat16()
    wide = module(qkv.float(), (3, 5))
    for narrow, exact in zip(module(qkv, (3, 5)), wide, strict=True):
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow, exact.bfloat16(), rtol=0.008, atol=1e-6)


SCRIPT = """
import torch
from group_mix_cases import attention, unfused, relative
from lkconv import _C
torch.manual_seed(0)
for dim, size in ((10, (4, 3)), (40, (9, 5)), (80, (6, 7)), (200, (5, 5)), (160, (7, 7))):
    for dtype, limit in ((torch.float64, 1e-11), (torch.float32, 2e-4), (torch.float16, 0.05)):
        module = attention(dim, dtype, training=True)
        other = unfused(module)
        x = torch.randn(2, size[0] * size[1], dim).to(dtype).requires_grad_()
        y = x.detach().double().requires_grad_()
        out, expected = module(x, size), other(y, size)
        out.sum().backward(); expected.sum().backward()
        assert relative(out, expected) < limit, (dim, dtype, relative(out, expected))
        assert relative(x.grad, y.grad) < 4 * limit, (dim, dtype, relative(x.grad, y.grad))
print(_C.active_isa())
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa):
    if isa not in lkconv._C.compiled_isas():
        pytest.skip(f"this build has no {isa} kernels")
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "LKCONV_MAX_CPU_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@pytest.mark.parametrize("products", ["0", "1"])
def test_bfloat16_with_and_without_products_of_pairs(products):
    """Both kernels of processors with AVX512-BF16, on whole and padded vectors, maps and strips of them."""
    script = """
    import torch
    from group_mix_cases import attention, relative, unfused
    torch.manual_seed(0)
    for dim, size in ((80, (150, 21)), (120, (3, 5)), (200, (6, 5)), (240, (7, 7)), (480, (2, 9))):
        for training in (False, True):
            module = attention(dim, torch.bfloat16, training)
            qkv = torch.randn(2, size[0] * size[1], 3 * dim).bfloat16()
            mixed, local = unfused(module).aggregation(qkv.double(), size)
            eager_mixed, eager_local = unfused(module, torch.bfloat16).aggregation(qkv, size)
            *heads, own_local = module.aggregator(qkv, size)
            again = module.aggregator(qkv, size)
            assert all(map(torch.equal, again, [*heads, own_local])) or training  # statistics moved on
            assert relative(torch.stack(heads), mixed) <= 2 * relative(eager_mixed, mixed), dim
            assert relative(own_local, local) <= 2 * relative(eager_local, local), dim
    """
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "LKCONV_BF16_PRODUCTS": products, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(context):
    """Where nothing is recorded the ops are called past their registered gradients: same values, no graph."""
    module = attention(80, torch.float32)
    x = torch.randn(2, 15, 80)
    recorded = module(x, (3, 5))
    heads = module.aggregator(module.qkv(x), (3, 5))
    with context():
        out = module(x, (3, 5))
        plain_heads = module.aggregator(module.qkv(x), (3, 5))
        mapped = torch.vmap(lambda t: module.aggregator(module.qkv(t), (3, 5))[0])(torch.stack([x, 2 * x]))
        with torch.autocast("cpu", torch.bfloat16):
            assert module.aggregator(module.qkv(x), (3, 5))[0].dtype == torch.bfloat16
    assert recorded.requires_grad and not out.requires_grad
    torch.testing.assert_close(mapped[0], heads[0])
    for a, b in zip((recorded, *heads), (out, *plain_heads), strict=True):
        torch.testing.assert_close(a.detach(), b)
