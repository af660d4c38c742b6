"""The torch side of every model's benchmark: its threads, and a training step."""

import os
import time
from collections.abc import Callable

import torch

from benchmarks.peers.contender import Run


def use_all_cores() -> None:
    """Gives torch as many threads as this process may use cores, as JAX takes."""
    affinity = getattr(os, "sched_getaffinity", None)
    torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)


def torch_step(
    model: torch.nn.Module,
    logits_of: Callable[[torch.nn.Module], torch.Tensor],
    targets: torch.Tensor,
    dtype: str,
) -> Run:
    """Returns one step of AdamW of an fp32 model, which is changed.

    Args:
        model: The model.
        logits_of: Its forward pass: `[B, T, V]`.
        targets: `[B, T]`.
        dtype: "bfloat16" computes by autocast.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    def run() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = logits_of(model)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return run
