"""Where a process of a benchmark stands; what starts it and what it is told both know this."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Post:
    """Place of a process in a world of ``world`` ranks of ``threads`` threads each that meets in the file ``store``."""

    rank: int
    world: int
    threads: int
    store: str
    inner: int

    def line(self) -> str:
        """As the first line a process reads."""
        return json.dumps(asdict(self))
