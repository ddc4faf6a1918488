"""JAX compiling its own ResNet-50 for a slice: what `scripts/bench verdict` holds us against.

Run as a program, it writes seconds to standard output as JSON. Importing is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from runner.config.chips import SLICES
from runner.preflight.tpu_compiler import ENVIRONMENT, topology_of

BLOCKS = 6


def main() -> None:
    """Trace, lower and compile for the slice that the argument names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("slice", choices=SLICES)
    target = SLICES[parser.parse_args().slice]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the figures
    os.environ.update(ENVIRONMENT)
    import jax
    from jax.experimental.topologies import get_topology_desc

    from tpu.twins import TWINS

    topology = topology_of(target.chip, target.shape)
    devices = get_topology_desc(
        topology_name=topology.name, platform="tpu", **topology.options
    ).devices
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)
    started = time.monotonic()
    lowered = TWINS["resnet50"].lowered(BLOCKS, mesh)
    traced = time.monotonic()
    lowered.compile()
    ended = time.monotonic()
    json.dump({"trace_s": traced - started, "compile_s": ended - traced}, out)
    out.close()


if __name__ == "__main__":
    sys.exit(main())
