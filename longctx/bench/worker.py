"""A process of a benchmark: joins its world, then measures what it is told, one JSON line for another.

Started by :mod:`longctx.bench.crew` as ``python -m longctx.bench.worker``; the first line is its
:class:`longctx.bench.post.Post`.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist

from longctx.bench.bubble import measured_handoff
from longctx.bench.decode import measured_decode
from longctx.bench.mixers import measured_mixer
from longctx.bench.post import Post
from longctx.bench.problem import Shape, measured
from longctx.mixers import MIXERS
from longctx.runtime.mesh import Group, alone, build_mesh
from longctx.train.deepspeed_engine import quieten


def main() -> int:
    """Serve until the input ends."""
    post = Post(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(post.threads)
    group = _join(post)
    known: dict[str, Callable[[], float]] = {}
    for line in sys.stdin:
        print(json.dumps(_carry_out(json.loads(line), group, known)), flush=True)
    if post.world > 1:
        dist.destroy_process_group()
    return 0


def _join(post: Post) -> Group:
    if post.world == 1:
        return alone().sequence
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group("gloo", f"file://{post.store}", rank=post.rank, world_size=post.world)
    import deepspeed

    quieten(deepspeed)
    with redirect_stdout(sys.stderr):
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return build_mesh(post.world, torch.device("cpu"), 600, post.inner).sequence


def _carry_out(order: dict[str, Any], group: Group, known: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Mean seconds of ``runs`` runs; of a contender's first order, also the memory of one before, beyond its inputs."""
    name, answer = order["contender"], {}
    if name not in known:
        known[name] = _contender(name, order, group)
        before = _reset_peak()
        known[name]()
        answer["extra_bytes"] = float(_peak() - before)
    if group.size > 1:
        dist.barrier(group=group.handle)
    return {"seconds": mean(known[name]() for _ in range(order["runs"])), **answer}


def _contender(name: str, order: dict[str, Any], group: Group) -> Callable[[], float]:
    if name.startswith("handoff/"):
        return measured_handoff(name, group)
    if name.startswith("decode/"):
        return measured_decode(Shape(**order["shape"]), name, group)
    make = measured_mixer if name.partition("/")[0] in MIXERS else measured
    return make(Shape(**order["shape"]), name, group)


def _reset_peak() -> int:
    """Forget the peak memory of this process so far (Linux) and return what it uses now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


if __name__ == "__main__":
    sys.exit(main())
