"""Model FLOPs utilisation: FLOPs counted by hand over what the devices could do."""

import jax

from common.sharding import accelerator_of


def peak_flops(device: jax.Device) -> float | None:
    """Returns a device's bf16 FLOP/s, or None for CPUs and devices not in the table."""
    known = accelerator_of(device)
    return None if known is None else known.flops


def utilisation(flops: float | None, seconds: float, devices: list[jax.Device]) -> float | None:
    """Returns `flops` done in `seconds` as a fraction of the devices' peak, or None if unknown."""
    peak = peak_flops(devices[0])
    if flops is None or peak is None or seconds <= 0:
        return None
    return flops / seconds / (peak * len(devices))
