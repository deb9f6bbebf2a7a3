"""Rotary position encoding (Su et al. 2021) and its length scalings, as transformers 5.23 defines them.

Half-split convention: feature ``m`` is paired with ``m + E/2``. Frequencies and angles are fp32, fp64 when the
activations are fp64; they are never bf16, where positions above 256 collide.

Types: ``default``; ``linear`` (position interpolation); ``dynamic`` (NTK, base grows with the length); ``yarn``
(Peng et al. 2023, section 3); ``longrope`` (Ding et al. 2024, one table up to the original length and one beyond);
``llama3`` (Llama 3.1). ``dynamic`` and ``longrope`` depend on the global length of the sequence.

Shapes: B batch, T local tokens, H heads, E head dim, R rotated features (R <= E).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longctx.config.schema import Model, Rope
from longctx.errors import ConfigError


@dataclass(frozen=True)
class RotaryEmbedding:
    """The rotation of one model, shared by all its layers.

    Args:
        rope: type and parameters of the scaling.
        rotary_dim: R, the leading features of every head that are rotated.
        max_position: ``max_position_embeddings`` of the model; None where the type does not need it.

    Raises:
        ConfigError: a length the type needs is missing, or a factor list has the wrong length.
    """

    rope: Rope
    rotary_dim: int
    max_position: int | None = None
    _tables: dict[tuple[int, torch.dtype, torch.device], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.rope.rope_type != "default":
            self._original_length()
        if self.rope.rope_type == "dynamic" and self.rotary_dim < 4:
            raise ConfigError(
                "model.rope.rope_type 'dynamic' needs at least 4 rotated features per head; raise model.head_dim"
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope, name)
            if factors is not None and len(factors) != self.rotary_dim // 2:
                raise ConfigError(
                    f"model.rope.{name} has {len(factors)} numbers, this model rotates {self.rotary_dim // 2} pairs;"
                    " give one per pair"
                )

    @classmethod
    def from_config(cls, config: Model) -> "RotaryEmbedding":
        """The rotation described by a model section."""
        rotary_dim = int(config.head_size * config.rope.partial_rotary_factor)
        return cls(config.rope, rotary_dim, config.max_position_embeddings)

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied with; attention logits therefore scale with its square."""
        rope = self.rope
        if rope.rope_type not in ("yarn", "longrope"):
            return 1.0
        if rope.attention_factor is not None:
            return rope.attention_factor
        factor = self._factor()
        if rope.rope_type == "longrope":
            return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(self._original_length()))
        if rope.mscale and rope.mscale_all_dim:
            return _yarn_scale(factor, rope.mscale) / _yarn_scale(factor, rope.mscale_all_dim)
        return _yarn_scale(factor, 1.0)

    def table(self, length: int) -> int:
        """Which frequency table a sequence of ``length`` global tokens uses: equal numbers, equal frequencies.

        Decode states computed under one table are invalid under another one (not only the keys: every later layer saw
        the old rotation), so a decoder must start over when this number changes.
        """
        if self.rope.rope_type == "dynamic":
            return max(length, self._original_length())
        if self.rope.rope_type == "longrope":
            return int(length > self._original_length())
        return 0

    def inv_freq(self, length: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Inverse frequencies [R/2] in radians per token for a sequence of ``length`` global tokens."""
        key = (self.table(length), dtype, torch.device(device))
        if key not in self._tables:
            # Computed on the host whatever the device, so that every device rotates with the same bits. Dynamic tables
            # change with every length, hence only one is kept.
            if self.rope.rope_type == "dynamic":
                self._tables.clear()
            self._tables[key] = self._frequencies(length, dtype).to(device)
        return self._tables[key]

    def cos_sin(self, positions_BT: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, 1, R/2] by which :meth:`rotate` turns heads of activations in ``dtype``.

        Args:
            positions_BT: position of each local token inside its document.
            length: global tokens of the sequence; only length-dependent types look at it.
        """
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        frequencies = self.inv_freq(length, precise, positions_BT.device)
        angles = positions_BT[..., None, None].to(precise) * frequencies
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def rotate(self, x_BTHE: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate queries or keys by the angles of :meth:`cos_sin`; the result has the dtype of ``x_BTHE``."""
        cos, sin = cos_sin
        whole = self.rotary_dim == x_BTHE.shape[-1]
        first, second = (x_BTHE if whole else x_BTHE[..., : self.rotary_dim]).chunk(2, dim=-1)
        out_BTHR = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHE.dtype)
        return out_BTHR if whole else torch.cat((out_BTHR, x_BTHE[..., self.rotary_dim :]), dim=-1)

    def _original_length(self) -> int:
        """Length the frequencies were trained at; dynamic scaling measures against ``max_position_embeddings``."""
        original = None if self.rope.rope_type == "dynamic" else self.rope.original_max_position_embeddings
        original = original or self.max_position
        if original is None:
            raise ConfigError(f"model.rope.rope_type {self.rope.rope_type!r} needs model.max_position_embeddings")
        return original

    def _factor(self) -> float:
        if self.rope.factor is not None:
            return self.rope.factor
        if self.max_position is None:
            raise ConfigError(
                f"model.rope.factor is missing and {self.rope.rope_type!r} can derive it only from"
                " model.max_position_embeddings; set either"
            )
        return self.max_position / self._original_length()

    def _frequencies(self, length: int, dtype: torch.dtype) -> Tensor:
        exponents = torch.arange(0, self.rotary_dim, 2).to(dtype) / self.rotary_dim
        base = self.rope.rope_theta
        match self.rope.rope_type:
            case "linear":
                return 1.0 / base**exponents / self._factor()
            case "dynamic":
                return 1.0 / self._dynamic_base(length, dtype) ** exponents
            case "longrope":
                factors = self.rope.long_factor if self.table(length) else self.rope.short_factor
                return 1.0 / (torch.tensor(factors, dtype=dtype) * base**exponents)
            case "yarn":
                return self._yarn(base**exponents)
            case "llama3":
                return self._llama3(1.0 / base**exponents)
            case _:
                return 1.0 / base**exponents

    def _dynamic_base(self, length: int, dtype: torch.dtype) -> Tensor:
        longest, factor = self._original_length(), self._factor()
        grown = factor * torch.tensor(max(length, longest), dtype=dtype) / longest - (factor - 1)
        return self.rope.rope_theta * grown ** (self.rotary_dim / (self.rotary_dim - 2))

    def _yarn(self, periods_R: Tensor) -> Tensor:
        """Fast pairs stay, slow pairs are interpolated, with a linear ramp in between."""
        low, high = self._yarn_range()
        pairs = torch.arange(self.rotary_dim // 2, dtype=torch.float32)
        kept = 1 - torch.clamp((pairs - low) / (high - low), 0, 1).to(periods_R.dtype)
        return 1.0 / (self._factor() * periods_R) * (1 - kept) + 1.0 / periods_R * kept

    def _yarn_range(self) -> tuple[float, float]:
        """Pairs the ramp runs between: they turn ``beta_fast`` and ``beta_slow`` times over the original length."""
        rope, length = self.rope, self._original_length()
        turns = (rope.beta_fast or 32, rope.beta_slow or 1)
        scale = self.rotary_dim / (2 * math.log(rope.rope_theta))
        low, high = (scale * math.log(length / (turn * 2 * math.pi)) for turn in turns)
        if rope.truncate is not False:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        return (low, high + 0.001) if low == high else (low, high)

    def _llama3(self, frequencies_R: Tensor) -> Tensor:
        """Long waves are interpolated, short ones stay, those in between are blended."""
        rope, length, factor = self.rope, self._original_length(), self._factor()
        low, high = rope.low_freq_factor, rope.high_freq_factor
        assert low is not None and high is not None  # the schema requires both
        waves = 2 * math.pi / frequencies_R
        blend = (length / waves - low) / (high - low)
        blended = (1 - blend) * frequencies_R / factor + blend * frequencies_R
        slow = torch.where(waves > length / low, frequencies_R / factor, frequencies_R)
        between = ~(waves < length / high) & ~(waves > length / low)
        return torch.where(between, blended, slow)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
