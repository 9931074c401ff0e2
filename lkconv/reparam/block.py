"""The protocol of every block: a training form, a merged form, one way between them, both checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lkconv.reparam.algebra import fold_dtype, merge_kernels
from lkconv.reparam.branches import ConvBN, is_plain, run_branches, uses_batch_statistics
from lkconv.reparam.convolution import autocast_input, convolve, make_layer
from lkconv.reparam.geometry import Geometry
from lkconv.reparam.planner import preferred_path


class ReparamBlock(nn.Module):
    """A block with a training form of several branches and a merged form of one layer.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W'), in the parameters' dtype or what autocast
    makes of it. Kernels are folded in float32 (float64 stays float64).

    A subclass sets ``merged_name`` (the merged layer's attribute), passes its geometry and channel counts to
    ``__init__``, keeps the constructor arguments that rebuild it in ``self._config`` and implements
    :meth:`_training_children`, :meth:`_fold` and :meth:`_forward_training`.

    Nothing derived from a parameter is kept between calls, so deep copies, pickling and averaging of
    weights see parameters and buffers only.

    Raises:
        ValueError: if the groups do not divide both channel counts.
    """

    merged_name = "reparam"
    merged_bias = True
    deploy_flag = "deploy"  # the constructor argument and attribute that tell the merged form
    # This family's own modules of which folding knows the formula.
    plain_types: tuple[type[nn.Module], ...] = ()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, in_channels: int, out_channels: int, target: Geometry) -> None:
        super().__init__()
        if in_channels % target.groups or out_channels % target.groups:
            raise ValueError(
                f"groups {target.groups} must divide in_channels {in_channels} and out_channels "
                f"{out_channels}"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self._target = target
        self._config: dict[str, Any] = {}

    # --- what a family implements -------------------------------------------------------------------------

    def _training_children(self) -> list[str]:
        """Names of the attributes that exist in the training form only."""
        raise NotImplementedError

    def _fold(self) -> tuple[Tensor, Tensor]:
        """Merged kernel and bias in the folding precision; differentiable."""
        raise NotImplementedError

    def _forward_training(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    # --- what users call ----------------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        """Whether the block holds its merged form."""
        return self._modules.get(self.merged_name) is not None

    def get_equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """The single kernel (O, I / groups, kh, kw) and bias (O,) that equal all branches.

        Differentiable in every branch parameter, in the parameters' dtype; uses the running statistics of
        batch norms. In the merged form these are the layer's own parameters.

        Raises:
            ValueError: if a batch norm keeps no running statistics.
        """
        if self.is_merged:
            layer = self._modules[self.merged_name]
            assert layer is not None
            weight, bias = layer.weight, layer.bias
            return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias  # type: ignore[return-value]
        weight, bias = self._fold()
        dtype = self._parameter_dtype()
        return weight.to(dtype), bias.to(dtype)

    def reparameterize(self) -> None:
        """Replace the branches by the merged layer, in place. Calling it again does nothing.

        The merged layer equals the branches in evaluation mode; in training mode they would normalise by the
        batch, so merging then warns.

        Raises:
            ValueError: as :meth:`get_equivalent_kernel_bias`.
        """
        if self.is_merged:
            return
        if self.training and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules()):
            warnings.warn(
                f"{type(self).__name__} is merged in training mode: the merged layer equals the branches in "
                "evaluation mode (running statistics), not what this module computed before. "
                "Call model.eval() first.",
                stacklevel=2,
            )
        self._merge()

    def merge_kernel(self) -> None:
        """Alias of :meth:`reparameterize` (the name in RepLKNet)."""
        self.reparameterize()

    def merge_dilated_branches(self) -> None:
        """Alias of :meth:`reparameterize` (the name in UniRepLKNet)."""
        self.reparameterize()

    def switch_to_deploy(self) -> None:
        """Alias of :meth:`reparameterize` (the name in RepVGG, ACNet and Diverse Branch Block)."""
        self.reparameterize()

    def linear_forward(self, input: Tensor) -> Tensor:
        """The convolution of the block, (N, out_channels, H', W'), without what follows it."""
        if self.is_merged:
            return self._modules[self.merged_name](input)  # type: ignore[misc]
        return self._forward_training(input)

    def forward(self, input: Tensor) -> Tensor:
        return self.linear_forward(input)

    # --- merging ------------------------------------------------------------------------------------------

    def _parameter_dtype(self) -> torch.dtype:
        return next((t.dtype for t in self.parameters() if t.is_floating_point()), torch.float32)

    def _runs_folded(self) -> bool:
        """Whether folding computes what calling the children would: plain modules, no batch statistics. Not
        where the user asked for module by module."""
        return (
            preferred_path() != "branches"
            and self._are_plain(self._training_children())
            and not any(
                isinstance(m, nn.modules.batchnorm._BatchNorm) and uses_batch_statistics(m)
                for m in self._submodules(self._training_children())
            )
        )

    def _are_plain(self, names: Sequence[str]) -> bool:
        """Whether the children ``names`` and all they hold may be read instead of called."""
        return all(is_plain(m, self.plain_types) for m in self._submodules(names))

    def _submodules(self, names: Sequence[str]) -> Iterator[nn.Module]:
        """The children ``names``, as far as they are modules, and all they hold."""
        for name in names:
            child = self._modules.get(name)
            if child is not None:
                yield from child.modules()

    def _convolve_folded(self, input: Tensor) -> Tensor:
        """Training form, evaluated as one convolution with the folded kernel."""
        weight, bias = self._fold()
        input = autocast_input(input)
        return convolve(input, weight.to(input.dtype), bias.to(input.dtype), self._target)

    def _new_merged_layer(self, **kwargs: Any) -> nn.Conv2d:
        return make_layer(self.in_channels, self.out_channels, self._target, self.merged_bias, **kwargs)

    def _merge_if_needed(self) -> None:
        if not self.is_merged:
            self._merge()

    @torch.no_grad()
    def _merge(self) -> None:
        trainable = any(p.requires_grad for p in self.parameters())
        weight, bias = self.get_equivalent_kernel_bias()
        # Built without storage: initialising parameters only to overwrite them would consume random numbers.
        layer = self._new_merged_layer(device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=trainable)
        if self.merged_bias:
            layer.bias = nn.Parameter(bias.clone(), requires_grad=trainable)
        layer.train(self.training)
        for name in self._training_children():
            if hasattr(self, name):
                delattr(self, name)
        setattr(self, self.merged_name, layer)
        setattr(self, self.deploy_flag, True)

    # --- checkpoints --------------------------------------------------------------------------------------

    def _training_twin(self) -> ReparamBlock:
        """This block in its training form, without storage."""
        with torch.device("meta"):
            twin = type(self)(**{**self._config, self.deploy_flag: False})
        return twin.eval()

    def _load_from_state_dict(  # type: ignore[override]
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        errors,
    ) -> None:
        if self.is_merged:
            self._merge_training_checkpoint(state_dict, prefix, missing_keys, errors)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
        )

    def _merge_training_checkpoint(
        self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str], errors: list[str]
    ) -> None:
        """Turn the training form's entries of ``state_dict`` into the merged form's, if it holds any."""
        own = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        twin = self._training_twin()
        expected = set(twin.state_dict())
        if not any(prefix + name in own for name in expected - set(self.state_dict())):
            return
        half = (torch.float16, torch.bfloat16)
        values = {k[len(prefix) :]: v.float() if v.dtype in half else v for k, v in own.items()}
        try:
            missing = twin.load_state_dict(values, strict=False, assign=True).missing_keys
        except RuntimeError as error:  # sizes that do not match, in load_state_dict's own words
            errors.append(f"{prefix}(training form): {error}")
            return
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing:
            missing_keys.extend(prefix + name for name in missing)
            return
        twin._merge()
        for name in expected:
            state_dict.pop(prefix + name, None)
        state_dict.update({prefix + name: value for name, value in twin.state_dict().items()})


class BranchSumBlock(ReparamBlock):
    """A block whose training form is a sum of convolution + batch-norm branches.

    A subclass implements :meth:`_parts`; shapes, dtypes and errors are those of :class:`ReparamBlock`. In
    training :func:`run_branches` chooses the path.
    """

    def _parts(self) -> Sequence[ConvBN]:
        """The live branches of the training form."""
        raise NotImplementedError

    def _fold(self) -> tuple[Tensor, Tensor]:
        like = next(self.parameters())
        branches = [part.linear(self._target, self.in_channels, like) for part in self._parts()]
        dtype = fold_dtype(*(t for b in branches for t in (b.weight, b.scale, b.bias)))
        return merge_kernels(branches, self._target, dtype)

    def _forward_training(self, input: Tensor) -> Tensor:
        return run_branches(input, self._parts(), self._target, self.out_channels)


def conv_bn(
    in_channels: int,
    out_channels: int,
    geometry: Geometry,
    names: tuple[str, str] = ("conv", "bn"),
    affine: bool = True,
    sync: bool = False,
    norm: bool = True,
    **kwargs: Any,
) -> Any:
    """A convolution without bias and its batch norm (unless ``norm`` is False), as an ``nn.Sequential`` with
    these child names."""
    pair = nn.Sequential()
    pair.add_module(names[0], make_layer(in_channels, out_channels, geometry, bias=False, **kwargs))
    if norm:
        pair.add_module(names[1], batch_norm(out_channels, affine, sync, **kwargs))
    return pair


def batch_norm(channels: int, affine: bool = True, sync: bool = False, **kwargs: Any) -> Any:
    """BatchNorm2d, or SyncBatchNorm where the official constructor asks for it."""
    return (nn.SyncBatchNorm if sync else nn.BatchNorm2d)(channels, affine=affine, **kwargs)


def require(condition: bool, message: str) -> None:
    """A ValueError with ``message`` unless ``condition``: what official code asserts."""
    if not condition:
        raise ValueError(message)


def config_of(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The constructor arguments ``names`` out of ``locals()``."""
    return {name: values[name] for name in names}
