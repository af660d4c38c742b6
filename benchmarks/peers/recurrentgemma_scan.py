"""Times the scans of the public `recurrentgemma` package, in that package's own environment.

Run by `benchmarks.linear_scan` as `python -P recurrentgemma_scan.py inputs.npz outputs.npz
repeats unroll...`; imports nothing of this repository.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from recurrentgemma.jax import scan

from recurrentgemma import common


def main() -> None:
    inputs, outputs, repeats, *unrolls = sys.argv[1:]
    with np.load(inputs) as loaded:
        a, x, dh = (jnp.asarray(loaded[name]) for name in ("a", "x", "dh"))
    forms = {
        f"native, unroll {u}": {"scan_type": common.ScanType.LINEAR_NATIVE, "unroll": int(u)}
        for u in unrolls
    }
    forms["associative"] = {"scan_type": common.ScanType.ASSOCIATIVE_NATIVE}
    contenders = {
        "forward/baseline": (jax.jit(lambda a, x: a + x), (a, x)),
        "backward/baseline": (jax.jit(lambda d, a, h: (d * h + a, d + a * h)), (dh, a, x)),
    }
    results = {}
    for name, form in forms.items():
        forward = jax.jit(lambda a, x, form=form: scan.linear_scan(x, a, **form)[0])
        h, pullback = jax.vjp(forward, a, x)
        # The pullback is a pytree of its residuals, so that one compiled program takes it.
        backward = jax.jit(lambda pullback, dh: pullback(dh))
        contenders[f"forward/{name}"] = (forward, (a, x))
        contenders[f"backward/{name}"] = (backward, (pullback, dh))
        results[f"h/{name}"] = np.asarray(h)
    seconds = {name: [] for name in contenders}
    for turn in range(int(repeats) + 2):
        for name, (run, operands) in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*operands))
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    np.savez(outputs, **results, **{f"seconds/{k}": np.array(v) for k, v in seconds.items()})


if __name__ == "__main__":
    main()
