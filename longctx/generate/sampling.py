"""Choosing the next token from logits.

Shapes: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: nucleus: sample from the fewest most likely tokens whose probabilities reach this sum (Holtzman et al.
            2020); 1 keeps all.
        seed: of the random draws; each prompt has its own stream, so its text does not depend on its neighbours.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature} is out of range; use 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} is out of range; use a number above 0 and up to 1")

    def generator(self, prompt: int) -> torch.Generator:
        """The stream of random numbers of one prompt."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + prompt) % 2**63)

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """What a token is drawn from, fp64 on the host; needs a temperature above 0."""
        p_V = (logits_V.detach().to("cpu", torch.float64) / self.temperature).softmax(-1)
        if self.top_p == 1:
            return p_V
        sorted_V, order_V = p_V.sort(descending=True, stable=True)
        before_V = sorted_V.cumsum(-1) - sorted_V
        kept_V = torch.where(before_V < self.top_p, sorted_V, 0.0)
        return torch.zeros_like(p_V).scatter(0, order_V, kept_V / kept_V.sum())

    def choose(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """The next token."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        return int(torch.multinomial(self.probabilities(logits_V), 1, generator=generator))
