"""Bases of principal components for keys: one for every layer and kv head, from the keys of a calibration text.

Singhania et al., arXiv 2406.02542: the rotated keys of a head lie close to a space of few dimensions, much the same for
any text. A basis is orthogonal, so that no dot product changes when queries and keys are both written in it, and its
first coordinates have the most variance. Keys are taken after the rotary positions, as they are cached.

Legend: B batch, T tokens, K kv heads, E head dim.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longctx.cache.search import Proposed, Search
from longctx.config.schema import Model
from longctx.errors import ConfigError, DataError, UnsupportedError

if TYPE_CHECKING:
    from longctx.cache.ragged import RaggedKV

_FORMAT = "longctx key bases 1"


@dataclass
class Moments:
    """Sums over the keys of one layer, in fp64."""

    count: int
    sum_KE: Tensor
    product_KEE: Tensor

    @classmethod
    def none(cls, kv_heads: int, size: int) -> "Moments":
        """Of no key."""
        sums_KE = torch.zeros(kv_heads, size, dtype=torch.float64)
        return cls(0, sums_KE, sums_KE.new_zeros(kv_heads, size, size))

    def add(self, k_BTKE: Tensor) -> None:
        """Count these keys, too."""
        k_KNE = k_BTKE.detach().double().flatten(0, 1).transpose(0, 1)
        self.count += k_KNE.shape[1]
        self.sum_KE += k_KNE.sum(1).cpu()
        self.product_KEE += (k_KNE.mT @ k_KNE).cpu()


@dataclass(frozen=True, eq=False)
class KeyRecorder(Search):
    """Adds up the keys that a model caches; its queries look at everything.

    Args:
        moments: by layer; filled while a model runs.
    """

    few: ClassVar[int] = 0

    moments: dict[int, Moments] = field(default_factory=dict)
    layer: int = 0

    def for_layer(self, layer: int, layers: int) -> "KeyRecorder":
        """See :class:`Search`."""
        return replace(self, layer=layer)

    def keys(self, k_BTKE: Tensor) -> Tensor:
        """See :class:`Search`."""
        if self.layer not in self.moments:
            self.moments[self.layer] = Moments.none(*k_BTKE.shape[2:])
        self.moments[self.layer].add(k_BTKE)
        return k_BTKE

    def propose(
        self, q_RQE: Tensor, at_RQ: Tensor, cache: "RaggedKV", window: int | None
    ) -> tuple[list[Proposed], Tensor]:
        """See :class:`Search`; never asked.

        Raises:
            UnsupportedError: it was.
        """
        raise UnsupportedError("a recorder of keys chooses none; decode with Loki")


def key_basis(moments: Moments) -> tuple[Tensor, Tensor]:
    """Orthogonal bases [K, E, E], a component in each column, that of the most variance first; the variances [K, E].

    Of the covariance of all keys of a head, in fp64. Its mean is not needed afterwards: it adds the same to all scores
    of a query.

    Raises:
        DataError: there are fewer than two keys.
    """
    if moments.count < 2:
        raise DataError("a basis needs two keys or more; give a longer text")
    mean_KE = moments.sum_KE / moments.count
    covariance_KEE = moments.product_KEE / moments.count - mean_KE[:, :, None] * mean_KE[:, None]
    variance_KE, basis_KEE = torch.linalg.eigh(covariance_KEE)
    return basis_KEE.flip(-1).contiguous(), variance_KE.flip(-1).clamp_min(0)


def coordinates_for(share: float, variance_KE: Tensor) -> float:
    """First coordinates that hold a share of the variance, the mean over heads."""
    held_KE = variance_KE.cumsum(-1) / variance_KE.sum(-1, keepdim=True)
    return float((held_KE < share - 1e-12).sum(-1).add(1).double().mean())


def fingerprint(config: Model) -> str:
    """Of a model section, which tells models of different shapes apart and not those of different weights."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


def save_bases(bases: Mapping[int, Tensor], config: Model, path: Path) -> None:
    """Write the bases [K, E, E] of a model's layers.

    Raises:
        DataError: the file cannot be written.
    """
    tensors = {str(layer): basis.double().contiguous() for layer, basis in bases.items()}
    try:
        save_file(tensors, str(path), metadata={"format": _FORMAT, "model": fingerprint(config)})
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write the key bases {path}: {error}") from None


def load_bases(path: Path, config: Model, like: Tensor | None = None) -> dict[int, Tensor]:
    """Read what :func:`save_bases` wrote.

    Args:
        like: device of the bases, and dtype if it is wider than fp32; None: as they were stored.

    Raises:
        DataError: the file is none of ours, damaged, or of another model.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header, names = file.metadata() or {}, list(file.keys())
            if header.get("format") != _FORMAT:
                raise DataError(f"{path} holds no key bases; give a file that longctx cache calibrate wrote")
            if header.get("model") != fingerprint(config):
                raise DataError(f"the key bases {path} are of another model; calibrate this one")
            found = {int(name): _checked(file.get_tensor(name), path) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"cannot read the key bases {path}: {error}") from None
    if like is None:
        return found
    dtype = torch.promote_types(like.dtype, torch.float32)
    return {layer: basis.to(like.device, dtype) for layer, basis in found.items()}


def _checked(basis_KEE: Tensor, path: Path) -> Tensor:
    """What is not orthogonal would change every score."""
    square = basis_KEE.dim() == 3 and basis_KEE.shape[1] == basis_KEE.shape[2] and basis_KEE.dtype == torch.float64
    if not square or not torch.allclose(
        basis_KEE.mT @ basis_KEE, torch.eye(basis_KEE.shape[2], dtype=torch.float64).expand_as(basis_KEE), atol=1e-8
    ):
        raise DataError(f"the key bases {path} are damaged: one is not orthogonal; calibrate again")
    return basis_KEE


def check_shape(basis_KEE: Tensor, kv_heads: int, size: int, layer: int) -> None:
    """Refuse a basis of other heads.

    Raises:
        ConfigError: it is one.
    """
    if basis_KEE.shape != (kv_heads, size, size):
        raise ConfigError(
            f"the key bases of layer {layer} are for {len(basis_KEE)} kv heads of {basis_KEE.shape[1]}, and it has "
            f"{kv_heads} of {size}; calibrate this model"
        )
