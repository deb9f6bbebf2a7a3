"""Keys and values that many layers read: gathered over the ranks once, and their gradient summed over them once.

Legend: B batch, T local tokens, S global tokens, M = B S, H query heads, K kv heads, E head dim.
"""

import torch
from torch import Tensor

from longctx.attention.gathered import GatherKeys, WholeAttention
from longctx.attention.kernels import Scoring, choose_kernel
from longctx.attention.schemes import Request, gathered_call, gathered_rows
from longctx.attention.traffic import Call
from longctx.errors import UnsupportedError
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import run_once


def gather_keys(k_BTKE: Tensor, v_BTKE: Tensor, context: SequenceContext) -> Tensor:
    """Keys and values of all ranks' tokens in global order, kv_M2KE; collective, its backward too.

    What a rank makes of the result must enter its loss, or the others wait for its gradient for ever.

    Raises:
        UnsupportedError: past tokens, whose keys are no rank's own.
    """
    if context.past:
        raise UnsupportedError(f"{context.past} tokens are past: keys of new tokens alone cannot be gathered")
    rows = gathered_rows(context)

    def gather(kv_N2KE: Tensor) -> tuple[Tensor]:
        return (GatherKeys.apply(kv_N2KE, rows),)  # type: ignore[no-untyped-call]

    return run_once(gather, (torch.stack((k_BTKE, v_BTKE), dim=2).flatten(0, 1),), context.kept)[0]


def attention_over_gathered(q_BTHE: Tensor, kv_M2KE: Tensor, context: SequenceContext) -> Tensor:
    """Exact causal softmax attention of this rank's queries over keys that :func:`gather_keys` gave; sends nothing.

    Returns:
        out_BTHE in the dtype of q. Accumulates in fp32 (fp64 for fp64).

    Raises:
        UnsupportedError: head counts or sizes, dtypes or devices that no kernel takes.
    """
    heads, (kv_heads, head_dim) = q_BTHE.shape[2], kv_M2KE.shape[2:]
    if heads % kv_heads or q_BTHE.shape[3] != head_dim or q_BTHE.dtype != kv_M2KE.dtype:
        raise UnsupportedError(
            f"queries {tuple(q_BTHE.shape)} of {q_BTHE.dtype} over gathered keys {tuple(kv_M2KE.shape)} of "
            f"{kv_M2KE.dtype}: use a multiple of kv heads, one head size and one dtype"
        )
    kernel = choose_kernel(q_BTHE.device, q_BTHE.dtype, None)
    kernel.check(q_BTHE.dtype, head_dim, None)
    call = gathered_call(Request(context, True, None, kernel, Scoring(head_dim**-0.5, None)))

    def attend(q_BTHE: Tensor, kv_M2KE: Tensor) -> tuple[Tensor]:
        out_NHE, _ = WholeAttention.apply(q_BTHE.flatten(0, 1), kv_M2KE, None, None, call)  # type: ignore[no-untyped-call]
        return (out_NHE.view(q_BTHE.shape),)

    return run_once(attend, (q_BTHE, kv_M2KE), context.kept)[0]


def planned_gather(context: SequenceContext, call: Call) -> list[Transfer]:
    """What :func:`gather_keys` posts on this rank, forward and then backward."""
    return gathered_rows(context).planned(call.kv_bytes, call.kv_gradient_bytes)


def gathered_bytes(context: SequenceContext, call: Call) -> int:
    """Most bytes of gathered keys and of their gradients that a rank holds at once, whatever the number of readers.

    The keys and, as they add up, the readers' gradients in the keys' dtype; wide, those of the reader at work, and
    either its kernel's or, in the end, all readers' padded as they leave.
    """
    if context.degree == 1:
        return 0
    rows, padded = context.batch * context.length, context.degree * gathered_rows(context).rows
    return rows * (2 * call.kv_bytes + call.kv_gradient_bytes) + padded * call.kv_gradient_bytes
