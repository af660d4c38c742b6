"""What accelerators can do: the declared capacities that plans, MFU and rooflines divide by."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Capacities of one JAX device.

    Attributes:
      name: as topologies name it ("v5e", "h100").
      kinds: parts of the `device_kind` that JAX reports; the first match in the table counts.
      memory: bytes of HBM.
      bandwidth: bytes per second to HBM.
      flops: dense bf16 FLOP per second, fp32 sums.
      link: bytes per second that a device sends to its neighbours, all links together.
      scratch: bytes of on-chip memory that a kernel's blocks share (VMEM of a TPU core, shared
        memory of a GPU's multiprocessor).
    """

    name: str
    kinds: tuple[str, ...]
    memory: float
    bandwidth: float
    flops: float
    link: float
    scratch: float


# From the vendors' data sheets. Order matters: "TPU v5" is a part of "TPU v5 lite".
ACCELERATORS = (
    Accelerator("v7", ("TPU v7", "TPU7x"), 96e9, 3690e9, 1153.5e12, 600e9, 64 * 2**20),
    Accelerator("v6e", ("TPU v6",), 32 * 2**30, 1640e9, 918e12, 448e9, 128 * 2**20),
    Accelerator("v5e", ("TPU v5 lite", "TPU v5e"), 16 * 2**30, 819e9, 197e12, 200e9, 128 * 2**20),
    Accelerator("v5p", ("TPU v5p", "TPU v5"), 95 * 2**30, 2765e9, 459e12, 600e9, 128 * 2**20),
    Accelerator("v4", ("TPU v4",), 32 * 2**30, 1228e9, 275e12, 300e9, 32 * 2**20),
    Accelerator("b200", ("B200",), 180e9, 8000e9, 2250e12, 900e9, 228 * 2**10),
    Accelerator("h200", ("H200",), 141e9, 4800e9, 989e12, 450e9, 227 * 2**10),
    Accelerator("h100pcie", ("H100 PCIe",), 80e9, 2000e9, 756e12, 64e9, 227 * 2**10),
    Accelerator("h100nvl", ("H100 NVL",), 94e9, 3900e9, 835e12, 300e9, 227 * 2**10),
    Accelerator("h100", ("H100", "GH200"), 84.9e9, 3352e9, 989e12, 450e9, 227 * 2**10),
    Accelerator("a100", ("A100",), 80e9, 2039e9, 312e12, 300e9, 163 * 2**10),
)


def accelerator_of(device: jax.Device) -> Accelerator | None:
    """Returns the table's entry for a device; None for CPUs and devices it does not hold."""
    if device.platform == "cpu":
        return None
    kind = device.device_kind
    return next((a for a in ACCELERATORS if any(part in kind for part in a.kinds)), None)


def accelerator(name: str) -> Accelerator | None:
    """Returns the entry of a topology's name ("v5e"), or None."""
    return next((a for a in ACCELERATORS if a.name == name), None)
