"""GroupMixFormer: parameter counts, published names, any image size, agreement with plain PyTorch."""

import pytest
import torch

import lkconv
from bench.models.group_mix_former import CONFIGS, GroupMixFormer, group_mix_former, load_checkpoint


def on_meta(size):
    with torch.device("meta"):
        return group_mix_former(size)


@pytest.mark.parametrize(
    "size,millions", [("M", 5.73), ("T", 10.95), ("S", 22.42), ("B", 45.83), ("L", 71.8)]
)
def test_parameter_counts(size, millions):
    count = sum(p.numel() for p in on_meta(size).parameters()) / 1e6
    assert round(count, 1 if size == "L" else 2) == millions


def test_published_names():
    names = set(on_meta("M").state_dict())
    block = "groupmixformer_backbone.2.gma_stage.11."
    for name in (
        "cpe.proj.weight",
        "norm1.weight",
        "att.qkv.bias",
        "att.proj.weight",
        "att.aggregator.norm3.running_var",
        "att.aggregator.agg3.conv1.weight",
        "att.aggregator.agg0.conv.pointwise_conv.weight",
        "att.aggregator.agg0.norm.bias",
        "att.crpe.conv_list.2.bias",
        "norm2.bias",
        "mlp.fc1.weight",
        "mlp.fc2.bias",
    ):
        assert block + name in names
    for name in (
        "conv_stem.proj1.bias",
        "conv_stem.norm2.weight",
        "patch_embed_layers.0.proj.conv1.weight",
        "patch_embed_layers.3.proj.pointwise_conv.weight",
        "patch_embed_layers.3.norm.bias",
        "norm4.running_mean",
        "head.weight",
    ):
        assert name in names
    prefixes = {n.split(".")[0] for n in names}
    assert prefixes == {"conv_stem", "patch_embed_layers", "groupmixformer_backbone", "norm4", "head"}


def small():
    config = CONFIGS["M"]
    return GroupMixFormer(type(config)(config.channels, (1, 1, 1, 1)), num_classes=10)


def test_checkpoint_loads_strictly():
    source, target = small(), small()
    load_checkpoint(target, {"model": source.state_dict()})
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    state = source.state_dict()
    state.pop("norm4.weight")
    with pytest.raises(RuntimeError, match="norm4"):
        load_checkpoint(target, {"model": state})


@pytest.mark.parametrize("training", [False, True])
def test_equals_plain_pytorch_at_an_odd_size(training):
    """90 x 77 pixels: 23 x 20, 12 x 10, 6 x 5 and 3 x 3 tokens."""
    torch.manual_seed(0)
    model = small().double().train(training)
    for block in model.modules():
        if isinstance(block, torch.nn.Dropout):
            block.p = 0.0
    for m in model.modules():
        if hasattr(m, "rate"):
            m.rate = 0.0
    x = torch.randn(2, 3, 90, 77, dtype=torch.float64)
    out = model(x)
    with lkconv.use_backend("torch"):
        expected = model(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    maps = model.forward_features(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(40, 23, 20), (80, 12, 10), (160, 6, 5), (160, 3, 3)]


def test_dropout_rates():
    """As the published constructor takes them: of the projections and MLPs, and of softmax(k)."""
    with torch.device("meta"):
        model = group_mix_former("M", 10, drop_rate=0.1, attn_drop_rate=0.2)
    for stage in model.groupmixformer_backbone:
        for block in stage.gma_stage:
            assert (block.att.proj_drop.p, block.mlp.drop.p, block.att.attn_drop.p) == (0.1, 0.1, 0.2)
    plain = on_meta("M").groupmixformer_backbone[0].gma_stage[0]
    assert plain.att.proj_drop.p == plain.mlp.drop.p == plain.att.attn_drop.p == 0.0


def test_training_reduces_the_loss():
    model = small()
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
