"""Key bases of a model from a text: see :mod:`longctx.cache.bases`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longctx.cache.bases import KeyRecorder, key_basis
from longctx.cache.options import CacheOptions
from longctx.errors import DataError, UnsupportedError
from longctx.generate.decode import LanguageModel, advance


def key_bases(
    model: LanguageModel, ids: Sequence[int], length: int, chunk: int = 1024,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[int, tuple[Tensor, Tensor]]:  # fmt: skip
    """Bases [K, E, E] and variances [K, E] of every layer that caches keys.

    Args:
        ids: the text; it is read in pieces, each a sequence of its own from position 0.
        length: tokens of a piece.
        chunk: tokens that run at a time.
        progress: told how many tokens have run.

    Raises:
        DataError: the text is too short.
        UnsupportedError: no layer caches keys, or they are not those of a token for good (length-dependent rotation).
    """
    if len(ids) < 2:
        raise DataError("the calibration text is empty; give some thousand tokens or more")
    if not model.state_survives(1, length):
        raise UnsupportedError(
            f"rotary positions of this model change up to {length} tokens, so that keys have no one basis; calibrate "
            "with shorter pieces"
        )
    recorder, done = KeyRecorder(), 0
    for piece_1T in torch.split(torch.tensor([ids], device=model.head.weight.device), length, dim=1):
        state = None
        for part in torch.split(piece_1T, chunk, dim=1):
            _, state = advance(model, part, state, last_only=True, cache=CacheOptions(search=recorder))
            done += part.shape[1]
            progress(done)
    if not recorder.moments:
        raise UnsupportedError("no layer of this model caches keys; there is nothing to calibrate")
    return {layer: key_basis(moments) for layer, moments in sorted(recorder.moments.items())}
