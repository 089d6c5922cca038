"""What the adapters for timm and transformers share: taking modules over and giving them back.

A module is taken over by changing the class of that one instance to a subclass of its own class
whose ``forward`` calls the kernels, and by one attribute, its ``impl``. Nothing else moves:
parameters, buffers, state-dict keys, hooks and every other instance of the library's class stay
what they were. Copies and pickles work, because the subclasses live in modules (who unpickles such
a model needs this package). A module whose arithmetic the kernels don't have is left alone and
named, with the reason.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ._api.layer_norm import scale_residual, scale_residual_layer_norm
from ._checks import KERNEL_HEAD_WIDTH, check_impl_name
from ._dispatch import Impl

# Classes outside an adapter's table are named in the report if they are called like these.
_ALIKE = re.compile(r"attention|attn|norm|block|layer$", re.IGNORECASE)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Report(NamedTuple):
    """What :func:`apply` did, by module name (as ``model.named_modules()`` has it)."""

    replaced: dict[str, str]
    """The public functions that now run in the module."""
    skipped: dict[str, str]
    """Why a module that looks like attention, a norm or a block runs its library's code."""


class Taken:
    """First base of every subclass that takes over a library's class, which is the second."""

    untouched: ClassVar[type[nn.Module]]
    runs: ClassVar[str]
    bypassed: ClassVar[tuple[str, ...]] = ()
    """Children that are not called any more; their parameters are used directly."""
    fastbeit_impl: Impl

    @staticmethod
    def unfit(module: Any, impl: Impl) -> str | None:
        """Why this module can't be taken over; None if it can. Called with an untouched module."""
        raise NotImplementedError

    def check_unhooked(self) -> None:
        """Refuse hooks that came after :func:`apply`: they would silently not run."""
        for name in self.bypassed:
            child = getattr(self, name, None)
            if isinstance(child, nn.Module) and any(getattr(child, hooks) for hooks in _HOOKS):
                raise RuntimeError(
                    f"{name} of a {type(self).__name__} got a hook after apply, which would not "
                    "run: a kernel does its work in the block; call restore(model) first"
                )


def take_over(
    model: nn.Module,
    impl: Impl,
    table: Iterable[type[Taken]],
    *,
    library: str,
    no_work: tuple[type[nn.Module], ...] = (),
) -> Report:
    """Put the classes of ``table`` into ``model``; those of ``no_work`` only hold other modules."""
    check_impl_name("apply", impl)
    by_class = {taken.untouched: taken for taken in table}
    chosen: list[tuple[Any, type[Taken]]] = []
    replaced: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Taken):
            raise ValueError(
                f"apply: {name or 'the model'} has the kernels already; call restore(model) first"
            )
        kind = type(module)
        taken = by_class.get(kind)
        if taken is None:
            base = next((known for known in by_class if isinstance(module, known)), None)
            if base is not None:
                skipped[name] = f"{kind.__name__} changes {base.__name__} in ways not known here"
            elif _ALIKE.search(kind.__name__) and kind not in no_work:
                skipped[name] = f"there are no kernels for {kind.__module__}.{kind.__name__}"
            continue
        parts = map(module._modules.get, taken.bypassed)
        reasons = [_replaced(module), *map(_unseen, parts), taken.unfit(module, impl)]
        reason = next(filter(None, reasons), None)
        if reason is None:
            chosen.append((module, taken))
            replaced[name] = taken.runs
        else:
            skipped[name] = reason
    if not chosen:
        raise ValueError(
            f"apply: found nothing of {library} in {type(model).__name__} that the kernels can run"
            + "".join(f"; {name}: {reason}" for name, reason in skipped.items())
        )
    for module, taken in chosen:
        module.__class__ = taken
        module.fastbeit_impl = impl
    _warn_of(skipped, library)
    return Report(replaced, skipped)


def give_back(model: nn.Module, table: Iterable[type[Taken]]) -> tuple[str, ...]:
    """Undo :func:`take_over`; the names of the modules that were given back, () if none was."""
    classes = set(table)
    taken: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, Taken)
    ]
    for name, module in taken:
        if type(module) not in classes:
            raise ValueError(
                f"restore: {name or 'the model'} is a {type(module).__name__}: something took it "
                "over after apply (FSDP does), or the other adapter did; undo that first"
            )
    for _, module in taken:
        module.__class__ = type(module).untouched
        del module.fastbeit_impl
    return tuple(name for name, _ in taken)


def _replaced(module: nn.Module) -> str | None:
    if "forward" in vars(module):
        return f"the forward of its {type(module).__name__} was replaced"
    return None


def _unseen(child: nn.Module | None) -> str | None:
    """Why a child must go on being called; None if its parameters may be used directly."""
    if child is None:
        return None
    if any(getattr(child, hooks) for hooks in _HOOKS):
        return f"its {type(child).__name__} has hooks, which would not run"
    return _replaced(child)


def _warn_of(skipped: Mapping[str, str], library: str) -> None:
    if not skipped:
        return
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name or "the model itself")
    lines = [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    warnings.warn(
        f"left to {library}'s own code ({len(skipped)} modules): " + "; ".join(lines),
        stacklevel=4,
    )


def head_unfit(width: int, impl: Impl) -> str | None:
    """Wide heads fit the reference only; "auto" takes it by itself."""
    if impl == "triton" and width > KERNEL_HEAD_WIDTH:
        return f"heads are {width} wide, and the kernels take up to {KERNEL_HEAD_WIDTH}"
    return None


def layer_norm_unfit(norm: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """Why the kernels can't be this norm; ``kinds`` are classes that compute F.layer_norm."""
    if type(norm) not in kinds:
        return f"its norm is {type(norm).__name__}, not LayerNorm"
    assert isinstance(norm, nn.LayerNorm)
    if len(norm.normalized_shape) != 1:
        return f"it normalises {len(norm.normalized_shape)} dimensions, and the kernels one"
    if norm.weight is None:
        return "its LayerNorm has no weight"
    if getattr(norm, "_fast_norm", False):
        return "timm's fast norm, which rounds under autocast, was chosen"
    return None


def layer_norm(norm: Any, x: Tensor, impl: Impl) -> Tensor:
    """LayerNorm of ``x [..., D]`` as F.layer_norm does it, autocast's widening included."""
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    _, normed = scale_residual_layer_norm(
        rows, weight=norm.weight, bias=norm.bias, eps=norm.eps, impl=impl
    )
    return normed if x.dim() == 3 else normed.reshape(x.shape)


def _widened(x: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
    """x in the dtype that ``x + gamma * branch`` has; the kernels answer in x's."""
    dtype = torch.promote_types(x.dtype, branch_dtype(branch, gamma))
    return x.to(dtype)


def branch_dtype(branch: Tensor, gamma: Tensor | None) -> torch.dtype:
    return branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)


def residual(
    x: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None, impl: Impl
) -> Tensor:
    x = _widened(x, branch, gamma)
    return scale_residual(x, branch, gamma=gamma, drop_scale=drop_scale, impl=impl)


def residual_norm(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    norm: Any,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    return scale_residual_layer_norm(
        _widened(x, branch, gamma),
        branch,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        gamma=gamma,
        drop_scale=drop_scale,
        impl=impl,
    )


def additive(mask: Tensor | None) -> Tensor | None:
    """A boolean mask (True: look here) as a bias; a bias as it is."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, float("-inf"))
