"""Model FLOPs utilisation: FLOPs counted by hand over what the devices could do."""

import jax

# Dense bf16 FLOP/s of one JAX device, by a part of its `device_kind`; the first match counts.
PEAK_FLOPS = (
    ("TPU v7", 1153.5e12),  # A chip is two devices.
    ("TPU7x", 1153.5e12),
    ("TPU v6", 918e12),
    ("TPU v5p", 459e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("B200", 2250e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """Returns a device's bf16 FLOP/s, or None for CPUs and devices not in the table."""
    if device.platform == "cpu":
        return None
    return next((peak for name, peak in PEAK_FLOPS if name in device.device_kind), None)


def utilisation(flops: float | None, seconds: float, devices: list[jax.Device]) -> float | None:
    """Returns `flops` done in `seconds` as a fraction of the devices' peak, or None if unknown."""
    peak = peak_flops(devices[0])
    if flops is None or peak is None or seconds <= 0:
        return None
    return flops / seconds / (peak * len(devices))
