"""The BatchNorms of Group-Mix attention: every state they can be in, and what is noted of a batch when."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lkconv
from group_mix_cases import aggregate_arguments, attention
from lkconv import backends
from lkconv.attention import aggregate

SIZE = (3, 4)
ops = torch.ops.lkconv


def one_frozen(norms):
    norms[2].eval()


def all_frozen(norms):
    for norm in norms:
        norm.eval()


def untracked(norms):
    """As a user does to live norms: the buffers stay, and BatchNorm leaves them alone."""
    for norm in norms:
        norm.track_running_stats = False


def untracked_and_frozen(norms):
    untracked(norms)
    all_frozen(norms)


def one_untracked(norms):
    norms[1].track_running_stats = False


def without_buffers(norms):
    for norm in norms:
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def uncounted(norms):
    for norm in norms:
        norm.num_batches_tracked = None


def cumulative(norms):
    for norm in norms:
        norm.momentum = None


def cumulative_and_uncounted(norms):
    cumulative(norms)
    uncounted(norms)


STATES = (
    one_frozen, all_frozen, untracked, untracked_and_frozen, one_untracked, without_buffers, uncounted,
    cumulative, cumulative_and_uncounted,
)  # fmt: skip


def check_against_submodules(module):
    """Fused or not, outputs and buffers are those of the submodules run one after another."""
    other = copy.deepcopy(module)
    qkv = torch.randn(2, 12, 120, dtype=torch.float64)
    for _ in range(3):
        ours, expected = module(qkv, SIZE), other.composed(qkv, SIZE)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    for (name, a), (_, b) in zip(module.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_every_state_of_the_norms(state):
    module = attention(40, training=True).aggregator
    state(module.norms())
    check_against_submodules(module)


def test_another_kind_of_norm():
    module = attention(40, training=True).aggregator
    module.norm1 = nn.GroupNorm(1, 8).double()
    check_against_submodules(module)


def test_norms_made_without_statistics():
    module = attention(40, training=True).aggregator
    for i in range(4):
        setattr(module, f"norm{i}", nn.BatchNorm2d(8, track_running_stats=False).double())
    check_against_submodules(module)


# ---- a backend that gives up ------------------------------------------------------------------------------
@pytest.fixture
def failing(monkeypatch):
    """The first backend that is asked fails in the given op, as Triton does where it cannot compile."""

    def arrange(name):
        def fail(*_):
            raise backends.GaveUp(name)

        fail.default = fail
        names = ("group_mix_mix", "group_mix_normalize", "group_mix_attention")
        namespace = SimpleNamespace(**{n: getattr(ops, n) for n in names})
        setattr(namespace, name, fail)
        monkeypatch.setattr(torch.ops, "failing", namespace, raising=False)
        answers = iter(["failing"])
        monkeypatch.setattr(aggregate, "namespace", lambda *_, **__: next(answers, "lkconv"))

    return arrange


@pytest.mark.parametrize("name", ["group_mix_mix", "group_mix_normalize", "group_mix_attention"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_is_noted_once(name, momentum, failing):
    module = attention(40, training=True)
    for norm in module.aggregator.norms():
        norm.momentum = momentum
    other = copy.deepcopy(module)
    x = torch.randn(2, 12, 40, dtype=torch.float64)
    expected = other(x, SIZE)
    failing(name)
    torch.testing.assert_close(module(x, SIZE), expected)
    assert module.aggregator.norm3.num_batches_tracked == 1
    for (key, a), (_, b) in zip(module.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


@pytest.mark.parametrize("name", ["group_mix_mix", "group_mix_normalize"])
def test_the_function_notes_a_batch_once(name, failing):
    module = attention(40).aggregator
    other = copy.deepcopy(module)
    qkv = torch.randn(2, 12, 120, dtype=torch.float64)
    lkconv.group_mix_aggregate(qkv, SIZE, **aggregate_arguments(other), training=True)
    failing(name)
    lkconv.group_mix_aggregate(qkv, SIZE, **aggregate_arguments(module), training=True)
    for a, b in zip(module.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
