"""A region of a model that runs again in the backward, without its attention and without its communication."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """``function(*args, **keywords)``, whose activations are computed again in the backward.

    Gradients flow through all tensors in the arguments and in the result, at any depth of lists, tuples and dicts.
    """
    # Gradients pass a reentrant checkpoint through its positional tensors and flat results only. The other flavour
    # repeats the forward in the middle of the backward, and ZeRO-3 then frees a module's parameters before their
    # gradients arrive ("size of tensor a (0) must match ...").
    leaves, structure = tree_flatten((args, keywords))
    differentiable = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    tensors = [leaves[i] for i in differentiable]
    for i in differentiable:
        leaves[i] = None
    shape: list[Any] = []

    def run(_: Tensor, *given: Tensor) -> tuple[Any, ...]:
        values = list(leaves)
        for i, tensor in zip(differentiable, given, strict=True):
            values[i] = tensor
        again, words = tree_unflatten(values, structure)
        results, shape[:] = _flat(function(*again, **words))
        # A tensor that is only handed on must not itself become a result: autograd would make it part of the graph,
        # in place, and the second pass would take it for one that the first has computed.
        handed = {id(value) for value in values}
        return tuple(r.view_as(r) if isinstance(r, Tensor) and id(r) in handed else r for r in results)

    # The first tensor makes the region differentiable even where embeddings are frozen.
    always = torch.zeros((), requires_grad=True)
    results = checkpoint(run, always, *tensors, use_reentrant=True, preserve_rng_state=False)
    return tree_unflatten(list(results), shape[0])


def _flat(result: Any) -> tuple[tuple[Any, ...], list[Any]]:
    leaves, structure = tree_flatten(result)
    return tuple(leaves), [structure]
