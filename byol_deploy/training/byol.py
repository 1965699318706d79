"""BYOL as a LightningModule: two networks, one loss, one moving average.

Source: Grill et al., "Bootstrap your own latent: a new approach to self-supervised learning", NeurIPS 33, 2020,
arXiv:2006.07733. Symbols: theta are the online parameters, xi the target ("momentum") parameters, k the number of
optimiser steps done, K their total, tau the target's decay.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_deploy.errors import UsageError
from byol_deploy.training.backbones import DeepLabV3Backbone, FeatureMap, Probe, probe_backbone
from byol_deploy.training.heads import byol_mlp
from byol_deploy.training.losses import NegativeCosineSimilarity

OptimizerFactory: TypeAlias = Callable[["BYOL"], Any]

# Rows that the effective rank is taken from: enough to see a collapse, small enough to cost a few milliseconds.
_RANK_ROWS = 256


class OnlineEncoder(nn.Module):
    """The online branch alone: what is deployed. Shares its modules with the `BYOL` that it came from.

    Its state-dict keys are the online keys of that model; the momentum branch cannot be reached from it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_map: FeatureMap,
        projection_head: nn.Module,
        prediction_head: nn.Module,
        head_takes_map: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_map = feature_map
        self.projection_head = projection_head
        self.prediction_head = prediction_head
        self.head_takes_map = head_takes_map

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (N, C, H, W) float. Returns embedding (N, D), projection (N, P), prediction (N, P)."""
        y = self.feature_map.unwrap(self.backbone(x))
        z = self.projection_head(self.feature_map(y) if self.head_takes_map else y)
        return self.feature_map.pool(y), z, self.prediction_head(z)


class BYOL(L.LightningModule):  # type: ignore[misc]
    """Bootstrap your own latent.

    The target network is updated exactly once after each optimiser step that really happened: not per micro-batch
    under gradient accumulation, not when a gradient scaler skips a step. It rides on the optimiser that
    `configure_optimizers` returned, so a hand-written loop gets it too; do not update it a second time by hand.

    Each view is a forward pass, and so a batch-norm batch, of its own. The target network runs in training mode on
    its own batches, as in the paper; its batch-norm buffers follow from these passes and are no part of the moving
    average. Statistics over several devices are the Trainer's business: ``Trainer(sync_batchnorm=True)``.

    Args:
        backbone: Takes (N, C, H, W) float; gives (N, D), a feature map (N, D, h, w) or (N, h, w, D), tokens
            (N, T, D), or a dict with one of them as ``"out"``. None is `DeepLabV3Backbone`. It is used as it is: a
            classifier at its end stays, and its scores become the features; `build_backbone` builds without one.
        projection_head: Takes what the backbone returns; None is average pooling and the paper's MLP on the probed
            width.
        prediction_head: Takes and gives projections; None is the paper's MLP.
        learning_rate: Of the plain SGD.
        schedule: Total number of optimiser steps K of the target's decay; ``"auto"`` is the Trainer's estimate.
        criterion: Takes (p, z), each (N, P); None is `NegativeCosineSimilarity`.
        base_tau: The target's decay at the first step; it rises to 1.
        projection_hidden: Hidden width of the default heads.
        projection_size: Output width P of the default heads.
        optimizer_factory: Called with this model; what it returns is what `configure_optimizers` returns.

    Raises:
        UsageError: An argument out of range, or a backbone whose output is not understood.
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        projection_head: nn.Module | None = None,
        prediction_head: nn.Module | None = None,
        learning_rate: float = 1e-3,
        schedule: int | Literal["auto"] = 90_000,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        base_tau: float = 0.996,
        projection_hidden: int = 4096,
        projection_size: int = 256,
        optimizer_factory: OptimizerFactory | None = None,
    ) -> None:
        super().__init__()
        if schedule != "auto" and (isinstance(schedule, bool) or not isinstance(schedule, int) or schedule < 1):
            raise UsageError(f'schedule is {schedule!r}; pass the number of optimiser steps, 1 or more, or "auto"')
        if not 0.0 <= base_tau <= 1.0:
            raise UsageError(f"base_tau is {base_tau}; it must lie in 0 to 1, e.g. 0.996")
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise UsageError(f"learning_rate is {learning_rate}; it must be a positive number, e.g. 0.001")

        self.learning_rate = learning_rate
        self.schedule_length = schedule
        self.base_tau = base_tau
        self.projection_hidden = projection_hidden
        self.projection_size = projection_size
        self.optimizer_factory = optimizer_factory

        self.backbone = DeepLabV3Backbone() if backbone is None else backbone
        # One's own head may take one's own backbone's output, whatever that is; only the default head needs to know.
        self._head_takes_map = projection_head is None
        self._probe: Probe | None = None
        try:
            self._probe = probe_backbone(self.backbone)
        except UsageError:
            if projection_head is None:
                raise
        probe = self._probe
        self.feature_map = FeatureMap(probe.layout, probe.prefix_tokens) if probe else FeatureMap()

        self.projection_head = self._default_projection_head() if projection_head is None else projection_head
        self.prediction_head = self._default_prediction_head() if prediction_head is None else prediction_head
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        self.deactivate_requires_grad(self.backbone_momentum)
        self.deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity() if criterion is None else criterion

        self.target_updates = 0
        """k: how often the target was updated, which is the number of optimiser steps."""
        self._total_steps: int | None = None
        self._masters: dict[Tensor, Tensor] = {}

    # ---- the networks ----

    def _default_projection_head(self) -> nn.Module:
        """Average pooling, then the paper's MLP: (N, D, h, w) gives (N, P)."""
        mlp = byol_mlp(self.width, self.projection_hidden, self.projection_size)
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), mlp)

    def _default_prediction_head(self) -> nn.Module:
        """The paper's MLP: (N, P) gives (N, P)."""
        return byol_mlp(self.projection_size, self.projection_hidden, self.projection_size)

    @property
    def width(self) -> int:
        """D, the number of features of an embedding, as probed."""
        if self._probe is None:
            self._probe = probe_backbone(self.backbone)
        return self._probe.width

    def online(self) -> OnlineEncoder:
        """The online branch alone, sharing this model's modules: (N, C, H, W) to embedding, projection, prediction."""
        encoder = OnlineEncoder(
            self.backbone, self.feature_map, self.projection_head, self.prediction_head, self._head_takes_map
        )
        # Not train(): it would reach into the shared modules and wake a layer that its owner froze with eval().
        encoder.training = self.training
        return encoder

    def features(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) float. Returns the online backbone's feature map (N, D, h, w), h = w = 1 where it pools."""
        features: Tensor = self.feature_map(self.backbone(x))
        return features

    def embed(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) float. Returns the online embedding (N, D): features averaged over space."""
        return self.feature_map.pool(self.backbone(x))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) float. Returns the online prediction (N, P)."""
        return self._online(x)[2]

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) float. Returns the target projection (N, P), without gradient."""
        y = self.backbone_momentum(x)
        return self._project(self.projection_head_momentum, y).detach()

    def _project(self, head: nn.Module, y: Any) -> Tensor:
        z: Tensor = head(self.feature_map(y) if self._head_takes_map else self.feature_map.unwrap(y))
        return z

    def _online(self, x: Tensor) -> tuple[Any, Tensor, Tensor]:
        y = self.backbone(x)
        z = self._project(self.projection_head, y)
        p: Tensor = self.prediction_head(z)
        return y, z, p

    # ---- one step ----

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One loss from two views, each predicting the target's projection of the other.

        Args:
            batch: (x0, x1), each (N, C, H, W) float; or ((x0, x1), label), where the label is not looked at.
            batch_idx: Not used.

        Returns:
            ``0.5 (criterion(p0, z1) + criterion(p1, z0))``, a scalar.
        """
        x0, x1 = _views(batch)
        y0, q0, p0 = self._online(x0)
        z0 = self.forward_momentum(x0)
        _, _, p1 = self._online(x1)
        z1 = self.forward_momentum(x1)
        loss: Tensor = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        if self._trainer is not None and self._trainer.training:
            self._log_step(loss, y0, q0, p0, z1)
        return loss

    def _log_step(self, loss: Tensor, y0: Any, q0: Tensor, p0: Tensor, z1: Tensor) -> None:
        trainer = self.trainer
        n = p0.shape[0]
        # Per step only: an epoch mean over devices would cost a synchronisation in each step.
        self.log("train_loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False, batch_size=n)
        self.log("tau", self.tau(), prog_bar=True, on_step=True, on_epoch=False, batch_size=n)
        if trainer.optimizers:
            lr = float(trainer.optimizers[0].param_groups[0]["lr"])
            self.log("lr", lr, prog_bar=True, on_step=True, on_epoch=False, batch_size=n)
        every = trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0:  # the steps that a logger writes down
            with torch.no_grad():
                values = collapse_indicators(self.feature_map.pool(y0), q0, p0, z1)
            self.log_dict(values, on_step=True, on_epoch=False, batch_size=n)

    # ---- the moving average ----

    @property
    def total_steps(self) -> int:
        """K, the number of optimiser steps over which tau rises to 1.

        Raises:
            UsageError: ``schedule="auto"`` and no Trainer that knows how long it will train.
        """
        if self.schedule_length != "auto":
            return int(self.schedule_length)
        if self._total_steps is None:
            estimate = self.trainer.estimated_stepping_batches if self._trainer is not None else math.inf
            if not 0 < estimate < math.inf:
                raise UsageError('schedule is "auto" but nothing says how long training is; pass a number of steps')
            self._total_steps = int(estimate)
        return self._total_steps

    def tau(self, step: int | None = None) -> float:
        """tau_k = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2 for ``step`` k (default: the coming update); 1 past K."""
        total = self.total_steps
        k = self.target_updates if step is None else step
        # cosine_schedule reaches its end at max_steps - 1, the paper's formula at K.
        return self.cosine_schedule(min(k, total), total + 1, self.base_tau, 1.0)

    def update_target(self) -> None:
        """Move the target one step towards the online network. Called after each optimiser step by itself."""
        tau = self.tau()
        if self.target_updates == self.total_steps:
            warnings.warn(
                f"the target stands still from here: schedule={self.total_steps} steps are done; "
                'pass a longer schedule, or schedule="auto"',
                RuntimeWarning,
                stacklevel=2,
            )
        self.update_momentum(self.backbone, self.backbone_momentum, tau)
        self.update_momentum(self.projection_head, self.projection_head_momentum, tau)
        self.target_updates += 1

    @torch.no_grad()
    def update_momentum(self, model: nn.Module, model_ema: nn.Module, m: float) -> None:
        """In place ``xi <- m xi + (1 - m) theta`` for all parameters of ``model_ema`` (BYOL eq. 1).

        Computed in float32: where a parameter itself is kept in less, a float32 master of it lives beside the model,
        because 0.4 % steps round to nothing in bfloat16. Buffers are left alone: the target's own forward passes
        keep its batch-norm statistics.

        Args:
            model: The online module.
            model_ema: Its target, of the same architecture.
            m: tau, the share of the target that stays, 0 to 1.
        """
        online: list[Tensor] = []
        target: list[Tensor] = []
        low: list[Tensor] = []
        pairs: Iterator[tuple[Tensor, Tensor]] = zip(model.parameters(), model_ema.parameters(), strict=True)
        for theta, xi in pairs:
            if xi.dtype in (torch.float16, torch.bfloat16):
                low.append(xi)
                online.append(theta.float())
                target.append(self._master(xi))
            elif theta.dtype != xi.dtype:
                online.append(theta.to(xi.dtype))
                target.append(xi)
            else:
                online.append(theta)
                target.append(xi)
        if target:
            torch._foreach_lerp_(target, online, 1.0 - m)  # xi.lerp_(theta, 1 - tau)  # BYOL eq. 1, arXiv:2006.07733
        for rounded in low:
            rounded.copy_(self._masters[rounded])

    def _master(self, xi: Tensor) -> Tensor:
        """The float32 copy of a low-precision target parameter, made anew when somebody else wrote the parameter."""
        master = self._masters.get(xi)
        if master is None or master.device != xi.device or not torch.equal(master.to(xi.dtype), xi):
            master = self._masters[xi] = xi.detach().float()
        return master

    def deactivate_requires_grad(self, model: nn.Module) -> None:
        """Freeze all parameters of ``model``."""
        for parameter in model.parameters():
            parameter.requires_grad = False

    def cosine_schedule(
        self, step: int, max_steps: int, start_value: float, end_value: float, period: int | None = None
    ) -> float:
        """Go from ``start_value`` to ``end_value`` along half a cosine.

        Args:
            step: Current step, from 0.
            max_steps: Number of steps; the end is reached at ``max_steps - 1``.
            start_value: Value at step 0.
            end_value: Value at the end.
            period: Steps of a full cycle, there and back; replaces ``max_steps``.

        Returns:
            ``end - (end - start)(cos(pi step / (max_steps - 1)) + 1) / 2``; with ``period`` the angle is
            ``2 pi step / period``. A step past ``max_steps`` warns and gives ``end_value``.

        Raises:
            ValueError: For a negative ``step`` or ``max_steps``, or a ``period`` below 1.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it must be 0 or more")
        if max_steps < 0:
            raise ValueError(f"max_steps is {max_steps}; it must be 0 or more")
        if period is not None:
            if period < 1:
                raise ValueError(f"period is {period}; it must be 1 or more")
            angle = 2 * math.pi * step / period
        else:
            if step > max_steps:
                warnings.warn(
                    f"step {step} is past max_steps {max_steps}; the value stays at its end",
                    RuntimeWarning,
                    stacklevel=2,
                )
            if max_steps < 2 or step >= max_steps - 1:
                return float(end_value)
            angle = math.pi * step / (max_steps - 1)
        return float(end_value - (end_value - start_value) * (math.cos(angle) + 1) / 2)

    # ---- the optimiser ----

    def online_parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of backbone, projection head and prediction head."""
        for module in (self.backbone, self.projection_head, self.prediction_head):
            yield from (parameter for parameter in module.parameters() if parameter.requires_grad)

    def configure_optimizers(self) -> Any:
        """Plain SGD over the online parameters, or what ``optimizer_factory`` returns; moves the target with it."""
        if self.optimizer_factory is not None:
            configured = self.optimizer_factory(self)
        else:
            configured = torch.optim.SGD(self.online_parameters(), lr=self.learning_rate)
        self._follow(configured["optimizer"] if isinstance(configured, dict) else configured)
        return configured

    def setup(self, stage: str) -> None:
        """Forget the K of an earlier fit before the optimiser and its schedule ask for it."""
        self._total_steps = None

    def on_fit_start(self) -> None:
        """Settle K, and follow the optimiser where a subclass has its own ``configure_optimizers``."""
        _ = self.total_steps
        if self.trainer.optimizers:
            self._follow(self.trainer.optimizers[0])

    def _follow(self, optimizer: Any) -> None:
        """Update the target after each step of ``optimizer``, once however often this is called.

        A hook on the optimiser is the only place that sees exactly the steps that happened: Lightning's own
        ``optimizer_step`` is also called where a gradient scaler then skips the step.
        """
        if isinstance(optimizer, torch.optim.Optimizer) and getattr(optimizer, "_byol_followed_by", None) is not self:
            optimizer.register_step_post_hook(self._after_optimizer_step)
            optimizer._byol_followed_by = self  # type: ignore[attr-defined]

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # fused optimisers skip the step inside
        if found_inf is None or not float(found_inf):
            self.update_target()

    # ---- checkpoints: plain data only ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep k beside the weights."""
        checkpoint["byol_target_updates"] = self.target_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take k up again; a checkpoint of the reference class knows only its optimiser steps."""
        self.target_updates = int(checkpoint.get("byol_target_updates", checkpoint.get("global_step", 0)))
        self._masters.clear()


def _views(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[0], Sequence):
        batch = batch[0]
    if isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(view, Tensor) for view in batch):
        x0, x1 = batch
        return x0, x1
    kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sequence) else type(batch).__name__
    raise UsageError(f"the batch is a {kind}; it must be (x0, x1) or ((x0, x1), label), two views as tensors")


def collapse_indicators(embedding: Tensor, projection: Tensor, p: Tensor, z: Tensor) -> dict[str, Tensor]:
    """What shows a collapse that the loss does not show.

    Args:
        embedding: (N, D) online embeddings.
        projection: (N, P) online projections.
        p: (N, P) online predictions of one view.
        z: (N, P) target projections of the other view.

    Returns:
        ``embedding_std`` and ``projection_std``: standard deviation over the batch of the L2-normalised vectors,
        times sqrt(width): about 1 for vectors in all directions, 0 when collapsed (Chen and He, arXiv:2011.10566).
        ``effective_rank``: exp of the entropy of the embeddings' singular values (Roy and Vetterli, 2007), at most
        the number of rows used, 256. ``online_target_cosine``: mean cosine of p and z.
    """
    embedding, projection = embedding.detach().float(), projection.detach().float()
    return {
        "embedding_std": _spread(embedding),
        "projection_std": _spread(projection),
        "effective_rank": _effective_rank(embedding[:_RANK_ROWS]),
        "online_target_cosine": F.cosine_similarity(p.detach().float(), z.float(), dim=1).mean(),
    }


def _spread(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1).std(dim=0, unbiased=False).mean() * math.sqrt(x.shape[1])


def _effective_rank(x: Tensor) -> Tensor:
    # The smaller Gram matrix has the squared singular values and costs far less than an SVD.
    x = x - x.mean(dim=0)
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    sigma = torch.linalg.eigvalsh(gram.double()).clamp_min(0).sqrt()
    share = sigma / sigma.sum().clamp_min(1e-30)
    return torch.exp(torch.special.entr(share).sum()).float()
