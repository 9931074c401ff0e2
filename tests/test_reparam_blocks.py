"""Every block against its oracle: values, gradients, names, checkpoints, copies."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from lkconv import reparam
from lkconv.reparam import use_training_path
from reparam_cases import CASES, flag_of, random_input, randomise, relative_error, state_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def build(case, dtype=torch.float64, **flags):
    torch.manual_seed(0)
    return randomise(case.make(**flags)).to(dtype)


def oracle_gradients(case, block, x, training):
    """Oracle output, and its gradient at the input and at every parameter."""
    state = state_of(block)
    names = [n for n, p in block.named_parameters() if p.requires_grad]
    for name in names:
        state[name] = state[name].clone().requires_grad_()
    x = x.double().clone().requires_grad_()
    y = case.oracle(state, x, training)
    wanted = [x, *(state[n] for n in names)]
    return y, names, torch.autograd.grad(objective(y), wanted)


def objective(y):
    """A scalar whose gradient differs from element to element."""
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return (weight * y + 0.1 * y**2).sum()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_case
def test_merged_equals_oracle(case, dtype):
    block = build(case, dtype).eval()
    x = random_input(case, dtype)
    with torch.no_grad():
        expected = case.oracle(state_of(block), x.double(), False)
        unmerged = case.oracle(block.state_dict(), x, False)
        evaluated = block(x)
        block.reparameterize()
        merged = block(x)
    assert relative_error(merged, expected) <= TOLERANCE[dtype]
    assert relative_error(evaluated, expected) <= TOLERANCE[dtype]
    if dtype == torch.float64:
        return  # the oracle itself is the unmerged computation
    floor = torch.finfo(dtype).eps * expected.norm()  # an unmerged error may happen to be nearly zero
    assert (merged - expected).norm() <= 1.5 * (unmerged - expected).norm() + floor


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_case
def test_value_and_gradient_of_every_parameter(case, training):
    block = build(case).train(training)
    x = random_input(case)
    expected, names, gradients = oracle_gradients(case, block, x, training)
    for path in ("branches", "fused", "fused-recompute"):
        one = copy.deepcopy(block)
        leaf = x.clone().requires_grad_()
        with use_training_path(path):
            y = one(leaf)
        found = torch.autograd.grad(objective(y), [leaf, *(p for p in one.parameters() if p.requires_grad)])
        assert relative_error(y, expected) <= 1e-12
        for name, got, want in zip(["input", *names], found, gradients, strict=True):
            scale = max(want.abs().max().item(), 1.0)  # a weight before a batch norm may have gradient zero
            assert (got - want).abs().max().item() <= 1e-10 * scale, name


@every_case
def test_running_statistics_advance_as_with_plain_batch_norm(case):
    block = build(case).train()
    x = random_input(case)
    buffers = {}
    for path in ("branches", "fused", "fused-recompute"):
        one = copy.deepcopy(block)
        with use_training_path(path):
            one(x), one(2 * x + 1)
        buffers[path] = dict(one.named_buffers())
    for path in ("fused", "fused-recompute"):
        for name, want in buffers["branches"].items():
            assert torch.allclose(buffers[path][name].double(), want.double(), rtol=1e-12, atol=1e-12), name


@every_case
def test_equivalent_kernel_is_differentiable(case):
    block = build(case).eval()
    weight, bias = block.get_equivalent_kernel_bias()
    weights = [p for n, p in block.named_parameters() if p.requires_grad and not n.startswith(("gp.", "se."))]
    gradients = torch.autograd.grad(weight.square().sum() + bias.square().sum(), weights)
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


@every_case
def test_state_dict_names(case):
    assert set(build(case).state_dict()) == set(case.train_keys)
    assert set(build(case, **flag_of(build(case))).state_dict()) == set(case.merged_keys)
    block = build(case).eval()
    block.reparameterize()
    assert set(block.state_dict()) == set(case.merged_keys)


@every_case
def test_both_checkpoint_forms_load_strictly(case):
    source = build(case).eval()
    x = random_input(case)
    expected = source(x)
    again = build(case).eval()
    again.load_state_dict(source.state_dict())
    assert torch.equal(again(x), expected)
    merged = copy.deepcopy(source)
    merged.reparameterize()
    flags = flag_of(source)
    for state in (source.state_dict(), merged.state_dict()):
        deployed = case.make(**flags).double().eval()
        keys = list(state)
        deployed.load_state_dict(state)
        assert relative_error(deployed(x), expected) <= 1e-10
        assert list(state) == keys  # the caller's dictionary is not touched
    nested = nn.ModuleDict({"a": nn.Sequential(case.make(**flags))}).double().eval()
    nested.load_state_dict(nn.ModuleDict({"a": nn.Sequential(source)}).state_dict())
    assert relative_error(nested["a"](x), expected) <= 1e-10


@every_case
def test_half_precision_checkpoint_is_folded_in_float32(case):
    source = build(case, torch.float16).eval()
    deployed = case.make(**flag_of(source)).eval()
    deployed.load_state_dict(source.state_dict())
    x = random_input(case, torch.float32)
    expected = case.oracle(state_of(source), x.double(), False)
    assert relative_error(deployed(x), expected) <= 1e-5


@every_case
def test_loading_does_not_consume_random_numbers(case):
    deployed = case.make(**flag_of(build(case)))
    state = build(case, torch.float32).state_dict()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    deployed.load_state_dict(state)
    assert torch.equal(torch.rand(1), expected)


def test_incomplete_and_misshapen_training_checkpoints_are_refused():
    case = next(c for c in CASES if c.name == "replknet")
    state = build(case, torch.float32).state_dict()
    deployed = case.make(small_kernel_merged=True)
    lacking = {k: v for k, v in state.items() if k != "small_conv.bn.running_var"}
    with pytest.raises(RuntimeError, match=r"small_conv\.bn\.running_var"):
        deployed.load_state_dict(lacking)
    state["lkb_origin.conv.weight"] = torch.zeros(6, 1, 11, 11)
    with pytest.raises(RuntimeError, match="size mismatch"):
        deployed.load_state_dict(state)
    extra = {**build(case, torch.float32).state_dict(), "other.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"other\.weight"):
        deployed.load_state_dict(extra)


@every_case
def test_merging_is_idempotent_and_aliases_are_one(case):
    x = random_input(case)
    results = []
    for name in ("reparameterize", "merge_kernel", "merge_dilated_branches", "switch_to_deploy"):
        block = build(case).eval()
        getattr(block, name)()
        state = {k: v.clone() for k, v in block.state_dict().items()}
        block.reparameterize()
        assert all(torch.equal(state[k], v) for k, v in block.state_dict().items())
        results.append(block(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


@every_case
def test_merging_in_training_mode_warns(case):
    block = build(case).train()
    has_norm = any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        block.reparameterize()
    assert any("evaluation mode" in str(w.message) for w in caught) == has_norm


@every_case
def test_merged_layer_keeps_device_dtype_mode_and_trainability(case):
    block = build(case, torch.float32).eval().requires_grad_(False)
    block.reparameterize()
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in block.parameters())
    assert not any(m.training for m in block.modules())
    assert not any(p.is_meta for p in block.parameters())


@every_case
def test_copies_pickles_and_averages(case):
    block = build(case).train()
    x = random_input(case)
    objective(block(x)).backward()  # whatever a forward pass might have cached must not get in the way
    block.eval()
    expected = block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), expected)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    average = torch.optim.swa_utils.AveragedModel(block, use_buffers=True)
    average.update_parameters(block)
    assert relative_error(average.eval()(x), expected) <= 1e-12


@every_case
def test_channels_last_stays(case):
    block = build(case, torch.float32).eval()
    x = random_input(case, torch.float32).to(memory_format=torch.channels_last)
    expected = block(x)
    block.reparameterize()
    merged = block(x)
    assert relative_error(merged, expected) <= 1e-5
    if case.name != "repmlp":  # it permutes patches itself
        assert merged.is_contiguous(memory_format=torch.channels_last)


@every_case
def test_autocast_gives_the_low_precision_output(case):
    block = build(case, torch.float32).eval()
    x = random_input(case, torch.float32)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        evaluated = block(x)
        block.reparameterize()
        merged = block(x)
    assert merged.dtype == torch.bfloat16 or case.name == "repmlp"
    assert relative_error(evaluated, expected) <= 2e-2
    assert relative_error(merged, expected) <= 2e-2
    assert all(p.dtype == torch.float32 for p in block.parameters())


def training_modules(block):
    """Names of everything inside the training form's branches that a user could hook or replace."""
    inside = ("convmap",) if isinstance(block, reparam.RefConv) else tuple(block._training_children())
    return [
        name
        for name, m in block.named_modules()
        if name.startswith(inside) and not isinstance(m, nn.ModuleList | nn.Identity)
    ]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_case
def test_hooks_on_branches_still_run(case, training):
    """On every module, one after the other: a hook on any of them is called, and what it returns counts."""
    block = build(case).train(training)
    x = random_input(case)
    expected = case.oracle(state_of(block), x, training)
    for name in training_modules(block):
        calls = []
        one = copy.deepcopy(block)
        one.get_submodule(name).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert relative_error(one(x), expected) <= 1e-10, name
        assert calls, name
        changed = copy.deepcopy(block)
        changed.get_submodule(name).register_forward_hook(lambda m, i, y: y * y)
        assert relative_error(changed(x), expected) > 1e-3, name


def counting_subclass(base, calls):
    def forward(self, *args):
        calls.append(1)
        return base.forward(self, *args)

    return type("Rounded", (base,), {"forward": forward})


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_case
def test_modules_of_other_types_are_called(case, training):
    """A subclass with its own forward, such as a layer that rounds its weight, is not bypassed."""
    block = build(case).train(training)
    x = random_input(case)
    for name in training_modules(block):
        one, calls = copy.deepcopy(block), []
        module = one.get_submodule(name)
        module.__class__ = counting_subclass(type(module), calls)
        assert relative_error(one(x), case.oracle(state_of(block), x, training)) <= 1e-10, name
        assert calls, name
        patched, calls = copy.deepcopy(block), []
        module = patched.get_submodule(name)
        module.forward = lambda *a, f=module.forward, calls=calls: calls.append(1) or f(*a)
        patched(x)
        assert calls, name


def test_merging_a_branch_that_is_no_convolution_names_it():
    block = build(next(c for c in CASES if c.name == "replknet")).eval()
    block.small_conv.conv = nn.Sequential(block.small_conv.conv)
    x = random_input(next(c for c in CASES if c.name == "replknet"))
    assert block(x).shape == x.shape
    with pytest.raises(ValueError, match=r"small_conv: a Sequential cannot be merged"):
        block.reparameterize()
    mixer = build(next(c for c in CASES if c.name == "repmixer")).eval()
    mixer.layer_scale = nn.Hardtanh()
    with pytest.raises(ValueError, match="layer_scale: a Hardtanh cannot be merged"):
        mixer.reparameterize()
