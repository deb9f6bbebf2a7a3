"""Tables of integers and masks that layers index with, on their device."""

from collections.abc import Callable, Hashable
from typing import Any

import numpy.typing as npt
import torch


class Tables:
    """Each is made and brought to a device once, however many layers ask for it."""

    def __init__(self) -> None:
        self._made: dict[tuple[Hashable, torch.device], torch.Tensor] = {}

    def on(self, device: torch.device, name: Hashable, make: Callable[[], npt.NDArray[Any]]) -> torch.Tensor:
        """What ``make`` returned the first time that ``name`` was asked for."""
        if (name, device) not in self._made:
            self._made[name, device] = torch.from_numpy(make()).to(device)
        return self._made[name, device]
