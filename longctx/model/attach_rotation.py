"""How the layers of an attached model rotate keys, found by asking it: the keys of one token at two positions.

A lone token attends to itself, so that nothing but the rotation of its keys tells where it stands; in every layer. The
frequencies are those that one of the model's rotary modules holds, where moving the key of the first position by them
gives that of the second. Anything else (pairs that are neighbours, learned positions, features rotated at the end of a
head) is not known.

Legend: B = 1 row, T = 1 token, H query heads, K kv heads, E head dim.
"""

from typing import Any

import torch
from torch import Tensor, nn

from longctx.cache.rotation import Rotation
from longctx.model.attach_rotary import length_dependent
from longctx.sequence.context import SequenceContext

_AT = 257
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Angles of transformers are fp32 in any case."""
_COARSE = 3e-2


class _Keys:
    """Stands for the caches of one forward: records keys, and every token attends to itself."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}

    def attend(
        self, module: nn.Module, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, context: SequenceContext,
        **others: Any,
    ) -> Tensor:  # fmt: skip
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            self.keys[layer] = k_BTKE[0, 0]
        return v_BTKE.repeat_interleave(q_BTHE.shape[2] // v_BTKE.shape[2], dim=2)


@torch.no_grad()
def find_rotations(model: nn.Module) -> list[Rotation | None]:
    """The rotation of each layer's keys; None where it is not known, or depends on the length.

    Args:
        model: attached; it runs two tokens.
    """
    config: Any = model.config
    layers: int = config.get_text_config(decoder=True).num_hidden_layers
    if any(length_dependent(module) for module in model.modules()):
        return [None] * layers
    training = model.training
    model.eval()
    near, far = _keys_at(model, 0), _keys_at(model, _AT)
    model.train(training)
    known = _candidates(model)
    return [_matching(near[layer], far[layer], known) if layer in near else None for layer in range(layers)]


def _keys_at(model: nn.Module, position: int) -> dict[int, Tensor]:
    """Keys [K, E] of every layer for a token at a position."""
    device = next(model.parameters()).device
    keys, context = _Keys(), SequenceContext.single(1, position).extend(1)
    model(torch.full((1, 1), 3, device=device), longctx=context, longctx_caches=keys)
    return keys.keys


def _candidates(model: nn.Module) -> list[Rotation]:
    """What rotary modules hold, one of each kind."""
    found: dict[tuple[float, ...], Rotation] = {}
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dim() == 1:
            frequencies_F = buffer.detach().double().cpu()
            found[tuple(frequencies_F.tolist())] = Rotation(frequencies_F)
    return list(found.values())


def _matching(near_KE: Tensor, far_KE: Tensor, known: list[Rotation]) -> Rotation | None:
    limit = _TOLERANCE.get(near_KE.dtype, _COARSE) * float(near_KE.abs().max())
    for rotation in known:
        if 2 * len(rotation.frequencies_F) <= near_KE.shape[1]:
            moved_KE = rotation.moved(near_KE.double(), torch.tensor(_AT))
            if float((moved_KE - far_KE.double()).abs().max()) <= limit:
                return rotation
    return None
