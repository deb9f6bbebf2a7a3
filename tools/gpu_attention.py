#!/usr/bin/env python
"""Check and time every attention kernel on one device.

    python tools/gpu_attention.py [--plan] [--lengths 32Ki,128Ki,512Ki] [--out FOLDER]

Checks each kernel against the fp64 oracle: output, log-sum-exp and gradients of one block, of many blocks in one call,
and of key blocks that share a global log-sum-exp. Times each kernel on a whole causal sequence and as a ring of virtual
ranks in this process, whose arithmetic rate should come within 5 percent of the one call's. Writes attention.json and
attention.md with device, versions and date.

Exit status: 0 good, 1 a kernel is wrong, 2 no such device. ``--device cpu --lengths 1k`` rehearses it without a GPU.

Legend: N query rows, M key rows, S tokens, H query heads, K kv heads, E head dim.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from longctx import __version__
from longctx.attention.kernels import NAIVE, Kernel, Scoring, kernels_of
from longctx.attention.local import Partial, gradients
from longctx.attention.sums import Sums
from longctx.bench.virtual_ring import VirtualRing, cut
from longctx.config.humanint import parse_int
from longctx.errors import first_line
from longctx.sequence.layout import contiguous, zigzag
from longctx.sequence.plan import AttentionPlan, Documents, Mask, Slice

# Largest error over largest entry. One rounding to bf16 is 0.2 percent, and each number sees several.
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.03}
PARTS = ("out", "lse", "dq", "dk", "dv")
MASKS: tuple[Mask, ...] = ("full", "causal", "anticausal")
RANKS = 8
DESCRIPTION = f"""\
checks, per kernel and dtype, against the fp64 oracle (out, lse, dq, dk, dv): one full, causal and anticausal block;
  packed documents (many blocks in one call where the kernel can); four key blocks under one global log-sum-exp;
  soft-capped scores where the kernel takes them
timings, per kernel and length, forward and backward: one call on the whole causal sequence;
  a zigzag ring of {RANKS} virtual ranks; the same with packed documents of lognormal length, mean S/16
results: milliseconds, TFLOP/s of the unmasked area, and the ring's rate as a share of the one call's (aim: 0.95)"""


@dataclass(frozen=True)
class Shape:
    """Heads of the timed attention."""

    heads: int
    kv_heads: int
    head_dim: int

    def operands(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """q, k, v and dout."""
        counts = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return tuple(torch.randn(length, count, self.head_dim, dtype=dtype, device=device) for count in counts)


@dataclass(frozen=True)
class Check:
    """Largest error over largest entry, per result."""

    kernel: str
    dtype: str
    case: str
    errors: dict[str, float]
    bound: float
    raised: str = ""

    @property
    def good(self) -> bool:
        # A NaN compares as wrong.
        return not self.raised and all(error <= self.bound for error in self.errors.values())


@dataclass(frozen=True)
class Timing:
    """Median milliseconds, and the rate over the unmasked area; ``share``: of the rate of one call."""

    kernel: str
    length: int
    case: str
    forward_ms: float
    backward_ms: float
    tflops: float
    share: float


def through_slices(
    kernel: Kernel, slices: list[Slice], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scoring: Scoring
) -> dict[str, Tensor]:
    """Everything by the local step of the ring."""
    partial = Partial.empty(q)
    partial.attend(q, k, v, slices, kernel, scoring)
    out, lse = partial.finished(None, q.dtype)
    dq = Sums.like(q, lse.dtype)
    dkv = gradients(dout, q, k, v, out, lse, slices, kernel, scoring, dq).finished()
    return dict(zip(PARTS, (out, lse, dq.finished(), dkv[:, 0], dkv[:, 1]), strict=True))


def cases(rows: int) -> Iterator[tuple[str, list[Slice]]]:
    """The work of each check."""
    for mask in MASKS:
        yield mask, [Slice(0, rows, 0, rows, mask)]
    layout = contiguous(rows, 1)
    documents = (0, 1, 20, rows // 3, rows // 2 + 7)
    yield "packed documents", list(AttentionPlan(layout, layout, (documents,)).slices(0, 0))
    yield "window of 37", list(AttentionPlan(layout, layout, ((0,),), window=37).slices(0, 0))
    bounds = [rows * i // 4 for i in range(5)]
    yield "four key blocks", [Slice(0, rows, a, b, "full") for a, b in pairwise(bounds)]


def check(kernel: Kernel, dtype: torch.dtype, device: torch.device, rows: int = 517) -> Iterator[Check]:
    """Compare ``kernel`` with the oracle in every case."""
    operands = Shape(8, 2, 64).operands(rows, dtype, device)
    for softcap in (None, 20.0) if kernel.softcaps else (None,):
        scoring = Scoring(0.2, softcap)
        for case, slices in cases(rows):
            name = case + (", soft-capped" if softcap else "")
            wanted = through_slices(NAIVE, slices, *(t.double() for t in operands), scoring)
            try:
                found = through_slices(kernel, slices, *operands, scoring)
            except (RuntimeError, TypeError, ValueError, ImportError) as error:
                # The others are still worth checking.
                yield Check(kernel.name, str(dtype), name, {}, BOUNDS[dtype], first_line(error) or type(error).__name__)
                continue
            errors = {
                part: float((found[part].double() - wanted[part]).abs().max() / wanted[part].abs().max())
                for part in PARTS
            }
            yield Check(kernel.name, str(dtype), name, errors, BOUNDS[dtype])


def packed(length: int) -> Documents:
    """One row of documents of lognormal length, mean S/16."""
    rng, starts = random.Random(0), [0]
    while True:
        # The mean of exp(normal(m, 1)) is exp(m + 1/2).
        starts.append(starts[-1] + max(1, int(rng.lognormvariate(0.0, 1.0) * length / 16 / 2.718281828459045**0.5)))
        if starts[-1] >= length:
            return (tuple(starts[:-1]),)


def one_call(kernel: Kernel, scoring: Scoring, operands: tuple[Tensor, ...]) -> Iterator[None]:
    """The whole causal sequence, forward, then backward."""
    q, k, v, dout = operands
    out, lse = kernel.forward(q, k, v, "causal", scoring)
    yield
    kernel.backward(dout, q, k, v, out, lse, "causal", scoring)
    yield


def one_ring(ring: VirtualRing, shards: list[list[Tensor]]) -> Iterator[None]:
    q, k, v, dout = shards
    out, lse = ring.forward(q, k, v)
    yield
    ring.backward(dout, q, k, v, out, lse)
    yield


def timed(work: Iterator[None], device: torch.device) -> list[float]:
    """Milliseconds of each part of the work."""
    times = []
    for _ in range(2):
        _wait(device)
        start = time.perf_counter()
        next(work)
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_kernel(
    kernel: Kernel, shape: Shape, length: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> Iterator[Timing]:
    """One call and the rings, taking turns; medians after one round to warm up."""
    operands, scoring = shape.operands(length, dtype, device), Scoring(shape.head_dim**-0.5)
    layout = zigzag(length, RANKS)
    shards = [cut(t, layout) for t in operands]
    plans = {
        f"ring of {RANKS}": AttentionPlan(layout, layout, ((0,),)),
        f"ring of {RANKS}, packed": AttentionPlan(layout, layout, packed(length)),
    }
    works: dict[str, Callable[[], Iterator[None]]] = {"one call": lambda: one_call(kernel, scoring, operands)}
    areas = {"one call": length * (length + 1) // 2}
    for case, plan in plans.items():
        works[case] = lambda plan=plan: one_ring(VirtualRing(plan, kernel, scoring), shards)  # type: ignore[misc]
        areas[case] = sum(s.area for rank in range(RANKS) for source in range(RANKS) for s in plan.slices(rank, source))
    rounds = [{case: timed(work(), device) for case, work in works.items()} for _ in range(repeats + 1)][1:]
    rates: dict[str, float] = {}
    for case in works:
        forward, backward = (median(times[case][part] for times in rounds) for part in range(2))
        # Two products of E numbers per pair and head forward, five backward, two operations each.
        rates[case] = 14 * shape.head_dim * shape.heads * areas[case] / (forward + backward) / 1e9
        yield Timing(kernel.name, length, case, forward, backward, rates[case], rates[case] / rates["one call"])


def markdown(about: dict[str, str], checks: list[Check], timings: list[Timing]) -> str:
    """The tables as they are committed."""
    lines = [", ".join(f"{name} {value}" for name, value in about.items()), ""]
    lines += [
        "| kernel | dtype | case | " + " | ".join(PARTS) + " | |",
        "|---|---|---|" + "---:|" * len(PARTS) + "---|",
    ]
    for row in checks:
        errors = " | ".join(f"{row.errors[part]:.1e}" if part in row.errors else "" for part in PARTS)
        verdict = "good" if row.good else row.raised or "WRONG"
        lines.append(f"| {row.kernel} | {row.dtype} | {row.case} | {errors} | {verdict} |")
    lines += [
        "",
        "| kernel | tokens | case | forward ms | backward ms | TFLOP/s | share |",
        "|---|---:|---|" + "---:|" * 4,
    ]
    for t in timings:
        numbers = f"{t.forward_ms:.2f} | {t.backward_ms:.2f} | {t.tflops:.3g} | {t.share:.3f}"
        lines.append(f"| {t.kernel} | {t.length:,} | {t.case} | {numbers} |")
    return "\n".join(lines) + "\n"


def environment(device: torch.device) -> dict[str, str]:
    """Device, versions and date."""
    cuda = device.type == "cuda"
    about = {"device": torch.cuda.get_device_name(device) if cuda else platform.machine()}
    about |= {"longctx": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if cuda:
        about |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    for package in ("flash_attn", "flash_attn_3"):
        try:
            about[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return about | {"date": datetime.now(UTC).date().isoformat()}


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--lengths", default="32Ki,128Ki,512Ki", help="tokens, separated by commas")
    parser.add_argument("--heads", default="32,8,128", help="query heads, kv heads, head size")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds after one to warm up")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_attention"), help="folder for the results")
    parser.add_argument("--plan", action="store_true", help="print what would be measured and stop")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    if args.plan:
        print(DESCRIPTION)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "no GPU here: on one, this checks every kernel against the fp64 oracle and times each and a ring of "
            f"{RANKS} virtual ranks against one call at {args.lengths} tokens (--plan: all; --device cpu: a rehearsal)",
            file=sys.stderr,
        )
        return 2
    device = torch.device(args.device)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernels = kernels_of(device)
    checks = []
    for kernel in kernels:
        for dtype in sorted(kernel.dtypes, key=str):
            checks += check(kernel, dtype, device)
    timings: list[Timing] = []
    shape = Shape(*(int(number) for number in args.heads.split(",")))
    for kernel in kernels:
        if kernel.name == NAIVE.name or any(c.raised for c in checks if c.kernel == kernel.name):
            continue
        for length in map(parse_int, args.lengths.split(",")):
            timings += time_kernel(kernel, shape, length, half, device, args.repeats)
    about = environment(device)
    text = markdown(about, checks, timings)
    print(text, end="")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "attention.md").write_text(text)
    results = {"about": about, "checks": [asdict(c) for c in checks], "timings": [asdict(t) for t in timings]}
    (args.out / "attention.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(c.good for c in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
