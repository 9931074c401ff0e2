"""One table of blocks for all tests: how to build each, its inputs, its names, and what it must compute.

The oracles read a block's training state dict and use ``F.conv2d`` and ``F.batch_norm`` alone: nothing of the
package takes part in the value it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lkconv import reparam

State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[..., nn.Module]
    oracle: Callable[[State, Tensor, bool], Tensor]
    shape: tuple[int, int, int, int]
    merged_keys: tuple[str, ...]
    train_keys: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def bn_keys(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{key}" for name in names for key in BN)


def pair_keys(*names: str) -> tuple[str, ...]:
    return tuple(k for name in names for k in (f"{name}.conv.weight", *bn_keys(f"{name}.bn")))


def norm(state: State, name: str, y: Tensor, training: bool) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    affine = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    if training:
        return F.batch_norm(y, None, None, *affine, True, 0.0, 1e-5)
    return F.batch_norm(y, mean, var, *affine, False, 0.0, 1e-5)


def conv(state: State, name: str, x: Tensor, **geometry) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **geometry)


def pair(state: State, name: str, x: Tensor, training: bool, **geometry) -> Tensor:
    return norm(state, f"{name}.bn", conv(state, f"{name}.conv", x, **geometry), training)


# --- depthwise families -----------------------------------------------------------------------------------


def replknet(kernel: int, small: int | None, stride: int = 1, groups: int = 6, out: int = 6):
    def oracle(s: State, x: Tensor, t: bool) -> Tensor:
        y = pair(s, "lkb_origin", x, t, stride=stride, padding=kernel // 2, groups=groups)
        if small is None:
            return y
        return y + pair(s, "small_conv", x, t, stride=stride, padding=small // 2, groups=groups)

    return oracle


def unireplknet(kernel: int, branches):
    def oracle(s: State, x: Tensor, t: bool) -> Tensor:
        channels = x.shape[1]
        y = norm(s, "origin_bn", conv(s, "lk_origin", x, padding=kernel // 2, groups=channels), t)
        for k, r in branches:
            z = conv(s, f"dil_conv_k{k}_{r}", x, padding=r * (k - 1) // 2, dilation=r, groups=channels)
            y = y + norm(s, f"dil_bn_k{k}_{r}", z, t)
        return y

    return oracle


def unireplknet_keys(branches) -> tuple[str, ...]:
    keys = ("lk_origin.weight", *bn_keys("origin_bn"))
    for k, r in branches:
        keys += (f"dil_conv_k{k}_{r}.weight", *bn_keys(f"dil_bn_k{k}_{r}"))
    return keys


def repvgg(stride: int, dilation: int, groups: int, identity: bool):
    def oracle(s: State, x: Tensor, t: bool) -> Tensor:
        y = pair(s, "rbr_dense", x, t, stride=stride, padding=dilation, dilation=dilation, groups=groups)
        y = y + pair(s, "rbr_1x1", x, t, stride=stride, groups=groups)
        return F.relu(y + norm(s, "rbr_identity", x, t) if identity else y)

    return oracle


def mobileone(names, count: int, kernel: int, groups: int, act, scale: bool, skip: bool):
    kxk, one, same = names

    def oracle(s: State, x: Tensor, t: bool) -> Tensor:
        y = 0
        for i in range(count):
            y = y + pair(s, f"{kxk}.{i}", x, t, padding=kernel // 2, groups=groups)
        if scale:
            y = y + pair(s, one, x, t, groups=groups)
        if skip:
            y = y + norm(s, same, x, t)
        return act(y)

    return oracle


def timm_repvgg(groups: int):
    def oracle(s: State, x: Tensor, t: bool) -> Tensor:
        y = pair(s, "conv_kxk", x, t, padding=1, groups=groups) + pair(s, "conv_1x1", x, t, groups=groups)
        return F.relu(y + norm(s, "identity", x, t))

    return oracle


def fastvit_embedding(s: State, x: Tensor, t: bool) -> Tensor:
    groups = x.shape[1]
    y = pair(s, "large_conv", x, t, stride=2, padding=3, groups=groups)
    return y + pair(s, "small_conv", x, t, stride=2, padding=1, groups=groups)


def repmixer(s: State, x: Tensor, t: bool) -> Tensor:
    groups = x.shape[1]
    mixed = pair(s, "mixer.conv_kxk.0", x, t, padding=1, groups=groups)
    mixed = mixed + pair(s, "mixer.conv_scale", x, t, groups=groups) + norm(s, "mixer.identity", x, t)
    return x + s["layer_scale.gamma"] * (mixed - norm(s, "norm.identity", x, t))


def repcpe(s: State, x: Tensor, t: bool) -> Tensor:
    return x + conv(s, "pos_enc", x, padding=3, groups=x.shape[1])


def repvit(legacy: bool):
    def oracle(s: State, x: Tensor, t: bool) -> Tensor:
        groups = x.shape[1]
        y = norm(s, "conv.bn", conv(s, "conv.c", x, padding=1, groups=groups), t)
        if legacy:
            return y + norm(s, "conv1.bn", conv(s, "conv1.c", x, groups=groups), t) + x
        return norm(s, "bn", y + conv(s, "conv1", x, groups=groups) + x, t)

    return oracle


def slak(s: State, x: Tensor, t: bool) -> Tensor:
    groups = x.shape[1]
    y = pair(s, "LoRA1", x, t, padding=(10, 2), groups=groups)
    y = y + pair(s, "LoRA2", x, t, padding=(2, 10), groups=groups)
    return y + pair(s, "small_conv", x, t, padding=2, groups=groups)


def slak_without_bn(s: State, x: Tensor, t: bool) -> Tensor:
    groups = x.shape[1]
    y = conv(s, "LoRA1.conv", x, padding=(10, 2), groups=groups)
    y = y + conv(s, "LoRA2.conv", x, padding=(2, 10), groups=groups)
    return y + conv(s, "small_conv.conv", x, padding=2, groups=groups)


# --- families for any groups ------------------------------------------------------------------------------


def acnet(kernel: int, padding: int, stride: int, groups: int):
    def oracle(s: State, x: Tensor, t: bool) -> Tensor:
        across = padding - kernel // 2
        crop = max(-across, 0)
        inner = slice(crop, -crop if crop else None)
        y = conv(s, "square_conv", x, stride=stride, padding=padding, groups=groups)
        y = norm(s, "square_bn", y, t)
        v = conv(
            s, "ver_conv", x[..., inner], stride=stride, padding=(padding, max(across, 0)), groups=groups
        )
        h = conv(
            s, "hor_conv", x[:, :, inner], stride=stride, padding=(max(across, 0), padding), groups=groups
        )
        return y + norm(s, "ver_bn", v, t) + norm(s, "hor_bn", h, t)

    return oracle


def padded_norm(s: State, name: str, y: Tensor, t: bool, padding: int) -> Tensor:
    """Batch norm, then a border of what running statistics (updated first, in training) make of zero."""
    z = norm(s, name, y, t)
    if t:
        s = {k: v.detach().clone() for k, v in s.items()}
        F.batch_norm(y.detach(), s[f"{name}.running_mean"], s[f"{name}.running_var"], None, None, True, 0.1)
    out = z.new_empty(z.shape[0], z.shape[1], z.shape[2] + 2 * padding, z.shape[3] + 2 * padding)
    zero = torch.zeros(1, z.shape[1], 1, 1, dtype=z.dtype)
    out = out.copy_(norm({k: v.detach() for k, v in s.items()}, name, zero, False).expand_as(out))
    return torch.slice_scatter(
        out,
        torch.slice_scatter(out[:, :, padding:-padding], z, 3, padding, -padding),
        2,
        padding,
        -padding,
    )


def dbb(kernel: int, stride: int, groups: int, depthwise: bool, identity_based: bool):
    p = kernel // 2

    def oracle(s: State, x: Tensor, t: bool) -> Tensor:
        y = pair(s, "dbb_origin", x, t, stride=stride, padding=p, groups=groups)
        if identity_based:
            per_group = x.shape[1] // groups
            eye = torch.eye(per_group, dtype=x.dtype).repeat(groups, 1)[:, :, None, None]
            z = F.conv2d(x, s["dbb_1x1_kxk.idconv1.weight"] + eye, groups=groups)
        else:
            z = conv(s, "dbb_1x1_kxk.conv1", x, groups=groups)
        z = padded_norm(s, "dbb_1x1_kxk.bn1.bn", z, t, p)
        z = conv(s, "dbb_1x1_kxk.conv2", z, stride=stride, groups=groups)
        y = y + norm(s, "dbb_1x1_kxk.bn2", z, t)
        if depthwise:
            return y + norm(s, "dbb_avg.avgbn", F.avg_pool2d(x, kernel, stride, p), t)
        y = y + pair(s, "dbb_1x1", x, t, stride=stride, groups=groups)
        z = padded_norm(s, "dbb_avg.bn.bn", conv(s, "dbb_avg.conv", x, groups=groups), t, p)
        return y + norm(s, "dbb_avg.avgbn", F.avg_pool2d(z, kernel, stride), t)

    return oracle


def dbb_keys(depthwise: bool) -> tuple[str, ...]:
    chain = (*bn_keys("dbb_1x1_kxk.bn1.bn"), "dbb_1x1_kxk.conv2.weight", *bn_keys("dbb_1x1_kxk.bn2"))
    keys = (*pair_keys("dbb_origin"), *bn_keys("dbb_avg.avgbn"), *chain)
    if depthwise:
        return (*keys, "dbb_1x1_kxk.conv1.weight")
    extra = (*pair_keys("dbb_1x1"), "dbb_avg.conv.weight", *bn_keys("dbb_avg.bn.bn"))
    return (*keys, *extra, "dbb_1x1_kxk.idconv1.weight")


def resrep(s: State, x: Tensor, t: bool) -> Tensor:
    return conv(s, "compactor.pwc", norm(s, "bn", conv(s, "conv", x, padding=1), t))


def refconv(groups: int):
    def oracle(s: State, x: Tensor, t: bool) -> Tensor:
        base = s["weight"]
        kernels = base.shape[0] * base.shape[1]
        map_groups = x.shape[1] * base.shape[0] // groups**2
        delta = F.conv2d(base.reshape(1, kernels, 5, 5), s["convmap.weight"], padding=1, groups=map_groups)
        return F.conv2d(x, base + delta.reshape(base.shape), padding=2, groups=groups)

    return oracle


def repmlp(s: State, x: Tensor, t: bool) -> Tensor:
    n, c, height, width = x.shape
    shares, h, w = 2, 4, 3
    parts = x.reshape(n, c, height // h, h, width // w, w).permute(0, 2, 4, 1, 3, 5).reshape(-1, shares, h, w)
    y = conv(s, "fc3", parts.reshape(-1, shares * h * w, 1, 1), groups=shares).reshape(parts.shape)
    y = norm(s, "fc3_bn", y, t)
    for k in (1, 3):
        y = y + pair(s, f"repconv{k}", parts, t, padding=k // 2, groups=shares)
    y = y.reshape(n, height // h, width // w, c, h, w).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    gate = F.relu(conv(s, "gp.fc1", x.mean((2, 3), keepdim=True)))
    return y * torch.sigmoid(conv(s, "gp.fc2", gate))


def linear_add(s: State, x: Tensor, t: bool) -> Tensor:
    def scale(name: str) -> Tensor:
        return s[f"{name}.weight"].reshape(1, -1, 1, 1)

    groups = x.shape[1]
    y = scale("scale_conv") * conv(s, "conv", x, padding=1, groups=groups)
    y = y + scale("scale_1x1") * conv(s, "conv_1x1", x, groups=groups) + scale("scale_identity") * x
    return F.relu(norm(s, "bn", y, t))


def orepa(s: State, x: Tensor, t: bool) -> Tensor:
    """Six scaled convolutions, then the norm; depthwise, so every branch acts on one channel."""
    g = x.shape[1]
    w = {k.removeprefix("weight_orepa_"): v for k, v in s.items()}
    v = s["vector"][:, None, :, None, None]
    y = v[0] * F.conv2d(x, w["origin"], padding=1, groups=g)
    one = F.conv2d(x, w["avg_conv"], groups=g)
    y = y + v[1] * F.conv2d(one, w["avg_avg"].expand(g, 1, 3, 3), padding=1, groups=g)
    y = y + v[2] * F.conv2d(F.conv2d(x, w["pfir_conv"], groups=g), w["prior"][:, None], padding=1, groups=g)
    inner = F.conv2d(x, w["1x1_kxk_idconv1"] + s["id_tensor"], groups=g)
    y = y + v[3] * F.conv2d(inner, w["1x1_kxk_conv2"], padding=1, groups=g)
    y = y + v[4] * F.conv2d(x, w["1x1"], groups=g)
    wide = F.conv2d(x, w["gconv_dw"], padding=1, groups=g)
    y = y + v[5] * F.conv2d(wide, w["gconv_pw"], groups=g)
    return norm(s, "bn", y, t)


OREPA_KEYS = tuple(
    f"weight_orepa_{name}"
    for name in (
        "origin", "avg_conv", "pfir_conv", "1x1", "1x1_kxk_idconv1", "1x1_kxk_conv2", "gconv_dw", "gconv_pw",
        "avg_avg", "prior",
    )
)  # fmt: skip

MOBILEONE = ("rbr_conv", "rbr_scale", "rbr_skip")
FASTVIT = ("conv_kxk", "conv_scale", "identity")
GP = ("gp.fc1.weight", "gp.fc1.bias", "gp.fc2.weight", "gp.fc2.bias")


def wb(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def _cases() -> list[Case]:
    r = reparam
    uni13, uni7 = r.DILATED_BRANCHES[13], r.DILATED_BRANCHES[7]
    return [
        Case("replknet", lambda **f: r.ReparamLargeKernelConv(6, 6, 13, 1, 6, 5, **f), replknet(13, 5),
             (2, 6, 12, 11), wb("lkb_reparam"), pair_keys("lkb_origin", "small_conv")),
        Case("replknet-alone", lambda **f: r.ReparamLargeKernelConv(6, 6, 9, 1, 6, None, **f), replknet(9,
             None),
             (2, 6, 12, 11), wb("lkb_reparam"), pair_keys("lkb_origin")),
        Case("replknet-dense", lambda **f: r.ReparamLargeKernelConv(6, 8, 5, 2, 2, 3, **f),
             replknet(5, 3, 2, 2), (2, 6, 12, 11), wb("lkb_reparam"), pair_keys("lkb_origin", "small_conv")),
        Case("unireplknet-13", lambda **f: r.DilatedReparamBlock(5, 13, **f), unireplknet(13, uni13),
             (2, 5, 14, 10), wb("lk_origin"), unireplknet_keys(uni13)),
        Case("unireplknet-7", lambda **f: r.DilatedReparamBlock(5, 7, **f), unireplknet(7, uni7),
             (2, 5, 5, 10), wb("lk_origin"), unireplknet_keys(uni7)),
        Case("repvgg", lambda **f: r.RepVGGBlock(6, 6, 3, padding=1, **f), repvgg(1, 1, 1, True),
             (2, 6, 9, 8), wb("rbr_reparam"), (*pair_keys("rbr_dense", "rbr_1x1"), *bn_keys("rbr_identity"))),
        Case("repvgg-depthwise", lambda **f: r.RepVGGBlock(6, 6, 3, 1, 2, 2, 6, **f), repvgg(1, 2, 6, True),
             (2, 6, 9, 8), wb("rbr_reparam"), (*pair_keys("rbr_dense", "rbr_1x1"), *bn_keys("rbr_identity"))),
        Case("repvgg-stride", lambda **f: r.RepVGGBlock(6, 8, 3, 2, 1, groups=2, **f), repvgg(2, 1, 2, False),
             (2, 6, 9, 8), wb("rbr_reparam"), pair_keys("rbr_dense", "rbr_1x1")),
        Case("timm-repvgg", lambda **f: r.TimmRepVGGBlock(6, 6, group_size=3, **f),
             timm_repvgg(2), (2, 6, 9, 8), wb("reparam_conv"),
             (*pair_keys("conv_kxk", "conv_1x1"), *bn_keys("identity"))),
        Case("mobileone", lambda **f: r.MobileOneBlock(6, 6, 3, 1, 1, groups=6, num_conv_branches=3, **f),
             mobileone(MOBILEONE, 3, 3, 6, F.relu, True, True), (2, 6, 9, 8), wb("reparam_conv"),
             (*pair_keys("rbr_conv.0", "rbr_conv.1", "rbr_conv.2", "rbr_scale"), *bn_keys("rbr_skip"))),
        Case("mobileone-pointwise", lambda **f: r.MobileOneBlock(6, 4, 1, num_conv_branches=2, **f),
             mobileone(MOBILEONE, 2, 1, 1, F.relu, False, False), (2, 6, 9, 8), wb("reparam_conv"),
             pair_keys("rbr_conv.0", "rbr_conv.1")),
        Case("fastvit-mobileone", lambda **f: r.FastViTMobileOneBlock(6, 6, 3, group_size=1, **f),
             mobileone(FASTVIT, 1, 3, 6, F.gelu, True, True), (2, 6, 9, 8), wb("reparam_conv"),
             (*pair_keys("conv_kxk.0", "conv_scale"), *bn_keys("identity"))),
        Case("fastvit-embedding", lambda **f: r.FastViTReparamLargeKernelConv(4, 8, 7, 2, 1, 3, **f),
             fastvit_embedding, (2, 4, 11, 10), wb("reparam_conv"), pair_keys("large_conv", "small_conv")),
        Case("repmixer", lambda **f: r.RepMixer(6, 3, 0.5, **f), repmixer, (2, 6, 9, 8), wb("reparam_conv"),
             (*bn_keys("norm.identity", "mixer.identity"), "layer_scale.gamma",
              *pair_keys("mixer.conv_kxk.0", "mixer.conv_scale"))),
        Case("repcpe", lambda **f: r.RepConditionalPosEnc(6, **f), repcpe, (2, 6, 9, 8), wb("reparam_conv"),
             wb("pos_enc")),
        Case("repvit", lambda **f: r.RepVGGDW(6, **f), repvit(False), (2, 6, 9, 8), wb("reparam_conv"),
             ("conv.c.weight", *bn_keys("conv.bn"), *wb("conv1"), *bn_keys("bn"))),
        Case("repvit-legacy", lambda **f: r.RepVGGDW(6, legacy=True, **f), repvit(True), (2, 6, 9, 8),
             wb("reparam_conv"), ("conv.c.weight", *bn_keys("conv.bn"), "conv1.c.weight",
             *bn_keys("conv1.bn"))),
        Case("slak", lambda **f: r.SLaKReparamLargeKernelConv(5, 5, 21, 1, 5, 5, Decom=True, **f), slak,
             (2, 5, 14, 13), (*wb("strip_vertical"), *wb("strip_horizontal")),
             pair_keys("LoRA1", "LoRA2", "small_conv")),
        Case("slak-dense", lambda **f: r.SLaKReparamLargeKernelConv(6, 6, 13, 1, 6, 5, **f), replknet(13, 5),
             (2, 6, 12, 11), wb("lkb_reparam"), pair_keys("lkb_origin", "small_conv")),
        Case("slak-alone", lambda **f: r.SLaKReparamLargeKernelConv(6, 6, 9, 1, 6, None, **f),
             replknet(9, None), (2, 6, 12, 11), wb("lkb_reparam"), pair_keys("lkb_origin")),
        Case("slak-without-bn",
             lambda **f: r.SLaKReparamLargeKernelConv(5, 5, 21, 1, 5, 5, Decom=True, bn=False, **f),
             slak_without_bn, (2, 5, 14, 13), (*wb("strip_vertical"), *wb("strip_horizontal")),
             tuple(f"{name}.conv.weight" for name in ("LoRA1", "LoRA2", "small_conv"))),
        Case("acnet", lambda **f: r.ACBlock(6, 8, 3, padding=1, **f), acnet(3, 1, 1, 1), (2, 6, 9, 8),
             wb("fused_conv"), tuple(k for n in ("square", "ver", "hor")
                                     for k in (f"{n}_conv.weight", *bn_keys(f"{n}_bn")))),
        Case("acnet-cropped", lambda **f: r.ACBlock(6, 6, 5, 2, 1, groups=6, **f), acnet(5, 1, 2, 6),
             (2, 6, 11, 12), wb("fused_conv"), tuple(k for n in ("square", "ver", "hor")
                                                    for k in (f"{n}_conv.weight", *bn_keys(f"{n}_bn")))),
        Case("acnet-wide", lambda **f: r.ACBlock(6, 6, 3, 1, 4, groups=6, **f), acnet(3, 4, 1, 6), (2, 6,
             5, 6),
             wb("fused_conv"), tuple(k for n in ("square", "ver", "hor")
                                     for k in (f"{n}_conv.weight", *bn_keys(f"{n}_bn")))),
        Case("dbb", lambda **f: r.DiverseBranchBlock(6, 8, 3, 2, 1, groups=2, **f), dbb(3, 2, 2, False, True),
             (2, 6, 9, 8), wb("dbb_reparam"), dbb_keys(False)),
        Case("dbb-depthwise", lambda **f: r.DiverseBranchBlock(6, 6, 5, 1, 2, groups=6, **f),
             dbb(5, 1, 6, True, False), (2, 6, 9, 8), wb("dbb_reparam"), dbb_keys(True)),
        Case("resrep", lambda **f: r.ResRepBlock(6, 8, 3, padding=1, **f), resrep, (2, 6, 9, 8),
             wb("reparam_conv"), ("conv.weight", *bn_keys("bn"), "compactor.pwc.weight", "compactor.mask")),
        Case("refconv-depthwise", lambda **f: r.RefConv(6, 6, 5, groups=6, **f), refconv(6), (2, 6, 9, 8),
             ("reparam_conv.weight",), ("weight", "convmap.weight")),
        Case("refconv-grouped", lambda **f: r.RefConv(6, 4, 5, groups=2, **f), refconv(2), (2, 6, 9, 8),
             ("reparam_conv.weight",), ("weight", "convmap.weight")),
        Case("repmlp", lambda **f: r.RepMLPBlock(8, 8, 4, 3, (1, 3), 4, 2, **f), repmlp, (2, 8, 8, 6),
             (*wb("fc3"), *GP), ("fc3.weight", *bn_keys("fc3_bn"), *pair_keys("repconv1", "repconv3"), *GP)),
        Case("csla", lambda **f: r.LinearAddBlock(6, 6, 3, 1, 1, groups=6, conv_scale_init=0.7, **f),
             linear_add,
             (2, 6, 9, 8), wb("reparam_conv"),
             ("conv.weight", "conv_1x1.weight", "scale_conv.weight", "scale_1x1.weight",
             "scale_identity.weight",
              *bn_keys("bn"))),
        Case("orepa", lambda **f: r.OREPA(6, 6, 3, 1, 1, groups=6, **f), orepa, (2, 6, 9, 8),
             wb("orepa_reparam"),
             (*OREPA_KEYS, "vector", "id_tensor", *bn_keys("bn"))),
    ]  # fmt: skip


CASES = _cases()


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters and statistics, running_var in [2,
    3]: untouched batch norms would hide most mistakes."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor, low: float, high: float) -> None:
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.data.copy_(low + (high - low) * noise)

    for m in module.modules():
        if isinstance(m, _BatchNorm):
            fill(m.running_var, 2, 3)
            fill(m.running_mean, -1, 1)
            if m.affine:
                fill(m.weight, 0.5, 1.5)
                fill(m.bias, -1, 1)
        else:
            for name, tensor in m.named_parameters(recurse=False):
                if name != "vector":
                    fill(tensor, -0.5, 0.5)
            if isinstance(m, reparam.RefConv) and not m.is_merged:
                fill(m.weight, -0.5, 0.5)
    return module


def random_input(case: Case, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(case.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest magnitude expected."""
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def state_of(module: nn.Module, dtype: torch.dtype = torch.float64) -> State:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in module.state_dict().items()}


def flag_of(module: nn.Module, value: bool = True) -> dict[str, bool]:
    return {module.deploy_flag: value}
