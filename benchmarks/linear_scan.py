"""Linear recurrence: ours against JAX's scans, the memory traffic, and the public package.

    python -m benchmarks.linear_scan [--shape 8,2048,1024] [--peer-python PATH]

`--peer-python`, or the environment variable `TENFOLD_PEER_PYTHON`, names the interpreter of an
environment that holds the public `recurrentgemma` package. Results go to `benchmarks/results/`.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks import harness
from common.errors import UserError
from common.kernels import linear_scan

_PEER_SCRIPT = Path(__file__).parent / "peers" / "recurrentgemma_scan.py"
_FORWARD_BOUND = "a + x"
_BACKWARD_BOUND = "3 in, 2 out"


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8,2048,1024", help="batch, length, width")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--unroll", default="1,8", help="unroll settings of the peer's scan")
    parser.add_argument("--peer-python", default=os.environ.get("TENFOLD_PEER_PYTHON"))
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("--name", default="linear_scan", help="stem of the result files")
    flags = parser.parse_args(arguments)
    try:
        path = _run(flags)
    except UserError as error:
        print(f"benchmarks.linear_scan: {error}", file=sys.stderr)
        return 2
    print(path.read_text())
    print(f"written to {path}")
    return 0


def _run(flags: argparse.Namespace) -> Path:
    try:
        shape = tuple(int(size) for size in flags.shape.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"--shape needs batch,length,width, such as 8,2048,1024; got {flags.shape}")
    keys = jax.random.split(jax.random.key(0), 3)
    a = jax.random.uniform(keys[0], shape, minval=0.8, maxval=0.999)
    x, dh = (jax.random.normal(key, shape) for key in keys[1:])
    forward = harness.measure(
        _forward_contenders(a, x), baseline=_FORWARD_BOUND, repeats=flags.repeats
    )
    backward = harness.measure(
        _backward_contenders(a, x, dh), baseline=_BACKWARD_BOUND, repeats=flags.repeats
    )
    notes = [
        f"shape [B, L, D] = {list(shape)}, float32; backward: gradients of a and x, residuals given"
    ]
    if flags.peer_python:
        peer_forward, peer_backward = _measure_peer(flags, a, x, dh)
        forward |= peer_forward
        backward |= peer_backward
        notes.append("the public package ran in its own process; ratios to the bound timed there")
    sections = [
        harness.Section("Forward", _FORWARD_BOUND, forward),
        harness.Section("Backward", _BACKWARD_BOUND, backward),
    ]
    return harness.write_report(
        flags.name, "Linear recurrence", sections, notes=notes, directory=flags.output
    )


def _scans() -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    return {
        "linear_scan (ours)": lambda a, x: linear_scan(a, x)[0],
        "lax.scan": lambda a, x: linear_scan(a, x, implementation="reference")[0],
        "lax.associative_scan": _associative_scan,
    }


def _associative_scan(a: jax.Array, x: jax.Array) -> jax.Array:
    def combine(
        earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    return jax.lax.associative_scan(combine, (a, x), axis=1)[1]


def _forward_contenders(a: jax.Array, x: jax.Array) -> dict[str, Callable[[], object]]:
    programs = {_FORWARD_BOUND: lambda a, x: a + x, **_scans()}
    return {name: _bound(jax.jit(program), a, x) for name, program in programs.items()}


def _backward_contenders(
    a: jax.Array, x: jax.Array, dh: jax.Array
) -> dict[str, Callable[[], object]]:
    traffic = jax.jit(lambda dh, a, h: (dh * h + a, dh + a * h))
    contenders = {_BACKWARD_BOUND: _bound(traffic, dh, a, x)}
    for name, program in _scans().items():
        _, pullback = jax.vjp(jax.jit(program), a, x)
        # The pullback is a pytree of its residuals, so that one compiled program takes it.
        contenders[name] = _bound(jax.jit(lambda pullback, dh: pullback(dh)), pullback, dh)
    return contenders


def _bound(program: Callable[..., object], *operands: object) -> Callable[[], object]:
    return lambda: program(*operands)


def _measure_peer(
    flags: argparse.Namespace, a: jax.Array, x: jax.Array, dh: jax.Array
) -> tuple[dict[str, harness.Measurement], dict[str, harness.Measurement]]:
    """Returns the peer's forward and backward measurements; its states must equal ours."""
    arrays = {name: np.asarray(value) for name, value in (("a", a), ("x", x), ("dh", dh))}
    options = [str(flags.repeats), *flags.unroll.split(",")]
    seconds, states = harness.run_elsewhere(
        flags.peer_python, _PEER_SCRIPT, arrays, options=options
    )
    ours = np.asarray(linear_scan(a, x)[0])
    for name, theirs in states.items():
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4, err_msg=name)
    return _peer_rows(seconds, "forward/"), _peer_rows(seconds, "backward/")


def _peer_rows(seconds: dict[str, np.ndarray], prefix: str) -> dict[str, harness.Measurement]:
    """Returns one direction's rows, their ratios to the bound that the peer's process timed."""
    own = {key.removeprefix(prefix): v for key, v in seconds.items() if key.startswith(prefix)}
    rows = harness.summarise(own, "baseline")
    return {f"recurrentgemma, {name}": row for name, row in rows.items() if name != "baseline"}


if __name__ == "__main__":
    sys.exit(main())
