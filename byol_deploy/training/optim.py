"""LARS, parameter groups and the learning-rate schedule of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from byol_deploy.errors import UsageError

# Every module whose parameters scale and shift normalised values. Subclasses (timm's BatchNormAct2d) count too.
_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


class LARS(Optimizer):
    """SGD with momentum whose step is, per tensor, a fixed share of the tensor's norm.

    For each parameter p with gradient g::

        g     <- g + weight_decay * p
        trust <- eta |p| / |g|          (1 where either norm is 0, or where the group says adapt=False)
        mu    <- momentum * mu + trust * g
        p     <- p - lr * mu

    The trust ratio depends on the group's ``adapt`` alone: it stays on where ``weight_decay`` is 0. Biases and norm
    parameters should get neither; `parameter_groups` makes such groups.

    Source: You et al., arXiv:1708.03888, in the form that BYOL's authors use (arXiv:2006.07733, appendix J).

    Args:
        params: Parameters, or groups of them; a group may set ``lr``, ``weight_decay``, ``momentum``, ``eta``, and
            ``adapt``.
        lr: Learning rate.
        momentum: Share of the old direction that stays, 0 to below 1.
        weight_decay: Added to the gradient, before the trust ratio.
        eta: Trust coefficient.

    Raises:
        UsageError: A setting out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
    ) -> None:
        for name, value, low in (("lr", lr, 0.0), ("weight_decay", weight_decay, 0.0), ("eta", eta, 0.0)):
            if not (math.isfinite(value) and value >= low):
                raise UsageError(f"{name} is {value}; it must be a number of at least {low:g}")
        if not 0.0 <= momentum < 1.0:
            raise UsageError(f"momentum is {momentum}; it must lie in 0 to below 1, e.g. 0.9")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure`` computes the loss and its gradients; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Lists of tensors that share device and type go through one fused kernel per operation.
            buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    buckets.setdefault((p.device, p.dtype), []).append(p)
            for params in buckets.values():
                self._step(params, group)
        return loss

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        if any(g.is_sparse for g in grads):
            raise UsageError("LARS got a sparse gradient; use optim.name=sgd for this model")
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        if group["adapt"]:
            p_norm = torch.stack(list(torch._foreach_norm(params)))
            g_norm = torch.stack(list(torch._foreach_norm(grads)))
            trust = torch.where((p_norm > 0) & (g_norm > 0), group["eta"] * p_norm / g_norm, 1.0)
            grads = list(torch._foreach_mul(grads, list(trust.unbind())))
        mu = [self._momentum_buffer(p) for p in params]
        torch._foreach_mul_(mu, group["momentum"])
        torch._foreach_add_(mu, grads)
        torch._foreach_add_(params, mu, alpha=-group["lr"])

    def _momentum_buffer(self, p: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of ``model``, in two groups, for every optimiser alike.

    The first group is decayed. The second gets neither weight decay nor (``adapt=False``) the trust ratio of `LARS`:
    biases, the parameters of normalisation layers, everything else of one axis or none (layer scales), and what a
    module names in timm's ``no_weight_decay()`` (position embeddings and class tokens).

    Args:
        model: Frozen parameters, such as the target network's, are left out.
        weight_decay: Of the first group.

    Returns:
        One or two groups; an empty one is left out. Other optimisers than LARS ignore ``adapt``.
    """
    exempt: set[int] = set()
    for module in model.modules():
        named = getattr(module, "no_weight_decay", None)
        names = set(named()) if callable(named) else set()
        if names:
            exempt.update(id(p) for name, p in module.named_parameters() if name in names)
        for name, p in module.named_parameters(recurse=False):
            if p.ndim <= 1 or isinstance(module, _NORMS) or name == "bias":
                exempt.add(id(p))
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if id(p) not in exempt], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in trainable if id(p) in exempt], "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str, model: nn.Module, *, lr: float, weight_decay: float = 0.0, momentum: float = 0.9
) -> Optimizer:
    """An optimiser over the trainable parameters of ``model``, grouped by `parameter_groups`.

    Args:
        name: ``sgd``, ``adamw`` or ``lars``.
        model: For `BYOL`, the target network is left out by being frozen.
        lr: Peak learning rate.
        weight_decay: Not for biases and norm parameters. Decoupled from the gradient in ``adamw``.
        momentum: Of ``sgd`` and ``lars``; ``adamw`` keeps its own betas.

    Raises:
        UsageError: Another name, or a model without trainable parameters.
    """
    groups = parameter_groups(model, weight_decay)
    if not groups:
        raise UsageError(f"{type(model).__name__} has no trainable parameter; set requires_grad on some")
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if name == "lars":
        return LARS(groups, lr=lr, momentum=momentum)
    raise UsageError(f"optimiser {name!r} is unknown; use sgd, adamw or lars")


def warmup_cosine(optimizer: Optimizer, *, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear warm-up, then a cosine to zero. Call its ``step`` once per optimiser step.

    Optimiser step k, from 0, uses the peak rate times `warmup_cosine_factor`.
    """
    return LambdaLR(optimizer, lambda k: warmup_cosine_factor(k, warmup_steps, total_steps))


def warmup_cosine_factor(k: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at optimiser step ``k``, 0 to 1.

    ``(k + 1) / warmup_steps`` while k < warmup_steps, so that no step has a rate of zero; then
    ``(cos(pi (k - warmup_steps) / (total_steps - warmup_steps)) + 1) / 2``, which is 1 right after the warm-up and
    would be 0 at ``total_steps``; 0 from there on.

    Raises:
        UsageError: A negative number of steps, or a warm-up longer than everything.
    """
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise UsageError(
            f"warmup_steps is {warmup_steps} of total_steps {total_steps}; "
            "there must be at least one step, and the warm-up must fit into them"
        )
    if k < warmup_steps:
        return (k + 1) / warmup_steps
    if k >= total_steps:
        return 0.0
    return (math.cos(math.pi * (k - warmup_steps) / (total_steps - warmup_steps)) + 1) / 2
