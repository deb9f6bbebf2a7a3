"""Comparing an export with transformers' own class.

Shapes: B batch, T tokens, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch

from longctx.errors import CheckpointError, first_line
from longctx.model.attached import AttachedCausalLM
from longctx.model.decoder import CausalLM
from longctx.sequence.context import SequenceContext

TOLERANCE = 1e-4
"""Largest accepted difference of logits in fp32."""


@torch.no_grad()
def compare_with_transformers(
    model: CausalLM | AttachedCausalLM, folder: Path | str, length: int = 512, seed: int = 0
) -> float:
    """Largest absolute difference between our logits and those of the folder's transformers class, both in fp32.

    Args:
        model: what was exported, with weights of the exported precision.
        length: tokens of the sample, drawn evenly from the vocabulary; at most ``max_position_embeddings``.

    Raises:
        CheckpointError: transformers cannot load the folder.
    """
    from transformers import AutoModelForCausalLM

    try:
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {first_line(error)}") from None
    theirs.eval()
    vocab_size = model.head.weight.shape[0]
    length = min(length, model.config.max_position_embeddings or length)
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, vocab_size, (1, length), generator=generator)
    ours = model.to("cpu", torch.float32)
    logits_BTV = ours.logits(ours(tokens_BT, SequenceContext.single(1, length)).hidden_BTD)
    return float((logits_BTV - theirs(tokens_BT, use_cache=False).logits).abs().max())
