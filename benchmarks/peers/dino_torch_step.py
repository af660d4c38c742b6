"""A training step of DINOv2 in torch, written for the benchmark from the specification (section 3).

As a careful user would write it: fused AdamW, foreach operations for clipping and the teacher,
one pass over the targets of both views, only the masked patches through the head.
"""

import copy
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.peers import dino_workload as workload
from benchmarks.peers.contender import Run
from benchmarks.peers.dino_torch import Network, load
from benchmarks.peers.dino_workload import Setting
from benchmarks.peers.torch_step import use_all_cores
from dino.data import MEAN, STD

_TEACHER_TEMPERATURE, _STUDENT_TEMPERATURE = 0.04, 0.1  # The first step's; they do not move here.


class TorchStep:
    """Student, teacher and optimizer of one setting."""

    def __init__(self, setting: Setting, prototypes: int, params: Any, batch: Any):
        use_all_cores()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._low = setting.dtype == "bfloat16"
        student = Network(workload.network(setting, prototypes))
        teacher = copy.deepcopy(student)
        load(student, params["student"])
        load(teacher, params["teacher"])
        self.student = student.to(self._device).train()
        self.teacher = teacher.to(self._device).eval().requires_grad_(False)
        self._batch = {name: torch.from_numpy(np.array(x)) for name, x in batch.items()}
        settings = workload.OPTIMIZER
        self._optimizer = torch.optim.AdamW(
            _groups(self.student, settings.learning_rate, settings.weight_decay),
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            fused=True,
        )

    def step(self) -> dict[str, torch.Tensor]:
        """Trains on the batch; returns the loss and its parts."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._low):
            losses = self.losses()
        losses["loss"].backward()
        for part in (self.student.backbone, self.student.dino_head, self.student.ibot_head):
            torch.nn.utils.clip_grad_norm_(
                part.parameters(), workload.OPTIMIZER.clip_norm, foreach=True
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        share = 1 - workload.OBJECTIVE.momentum[0]
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.teacher.parameters()), list(self.student.parameters()), share
            )
        return losses

    def run(self) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        self.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def losses(self) -> dict[str, torch.Tensor]:
        """The loss and its parts."""
        batch = {name: x.to(self._device, non_blocking=True) for name, x in self._batch.items()}
        crops = batch["global_crops"], batch["local_crops"]
        images, views, local_views = len(crops[0]), crops[0].shape[1], crops[1].shape[1]
        large, small = (_normalized(crop) for crop in crops)
        masks = batch["masks"].flatten(0, 1)
        # Padding lies behind the masked patches.
        weights = batch["masked_weights"].flatten()
        count = int((weights > 0).sum())
        chosen, weights = batch["masked_indices"].flatten()[:count].long(), weights[:count]

        with torch.no_grad():
            (tokens,) = self.teacher.backbone([large])
            said = self.teacher.dino_head(tokens[:, 0])
            of_images = _sinkhorn(said).reshape(images, views, -1)
            patches = tokens[:, 1:].flatten(0, 1)[chosen]
            of_patches = _sinkhorn(self.teacher.ibot_head(patches))

        on_large, on_small = self.student.backbone([large, small], masks)
        cls = torch.cat([on_large[:, 0], on_small[:, 0]])
        logits = self.student.dino_head(cls) / _STUDENT_TEMPERATURE
        log_p = functional.log_softmax(logits, dim=-1)
        pairs = views + views * local_views
        on_global, on_local = log_p.split([images * views, images * local_views])
        on_global = -(of_images.flip(1).flatten(0, 1) * on_global).sum() / (pairs * images)
        on_local = on_local.reshape(images, local_views, -1).sum(1)
        on_local = -(of_images.sum(1) * on_local).sum() / (pairs * images)
        patches = on_large[:, 1:].flatten(0, 1)[chosen]
        logits = self.student.ibot_head(patches) / _STUDENT_TEMPERATURE
        each = -(of_patches * functional.log_softmax(logits, dim=-1)).sum(-1)
        ibot = (each * weights).sum() / (views * images)
        tokens = on_large[:, 0].float().reshape(images, views, -1)
        koleo = sum(_koleo(tokens[:, v]) for v in range(views))
        return {
            "loss": on_global + on_local + ibot + workload.OBJECTIVE.koleo_weight * koleo,
            "dino_global": on_global,
            "dino_local": on_local,
            "ibot": ibot,
            "koleo": koleo,
        }


def prepare(setting: Setting, prototypes: int, params: Any, batch: Any) -> Run:
    """Returns one step, after one that warms up."""
    step = TorchStep(setting, prototypes, params, batch)
    step.run()
    return step.run


def _normalized(crops: torch.Tensor) -> torch.Tensor:
    mean, std = (255 * torch.tensor(x, device=crops.device) for x in (MEAN, STD))
    return ((crops.flatten(0, 1).float() - mean) / std).permute(0, 3, 1, 2)


@torch.no_grad()
def _sinkhorn(logits: torch.Tensor, iterations: int = 3) -> torch.Tensor:
    q = (logits / _TEACHER_TEMPERATURE).exp_()
    rows, prototypes = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0, keepdim=True) * prototypes
        q /= q.sum(1, keepdim=True) * rows
    return q.mul_(rows)


def _koleo(features: torch.Tensor) -> torch.Tensor:
    with torch.autocast(features.device.type, enabled=False):
        z = functional.normalize(features, dim=-1, eps=1e-8)
        with torch.no_grad():
            nearest = (z @ z.T).fill_diagonal_(-1).argmax(1)
        distance = functional.pairwise_distance(z, z[nearest], eps=1e-8)
        return -torch.log(distance + 1e-8).mean()


def _groups(student: Network, rate: float, decay: float) -> list[dict[str, Any]]:
    """Parameters by learning rate and decay (section 3.9)."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        own_rate = rate * (0.2 if "patch_embed" in name else 1.0)
        own_decay = 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else decay
        groups.setdefault((own_rate, own_decay), []).append(parameter)
    return [{"params": p, "lr": r, "weight_decay": d} for (r, d), p in groups.items()]
