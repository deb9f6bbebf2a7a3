"""Learning rate as a pure function of the optimizer step."""

import math

from longctx.config.schema import Train


def learning_rate(train: Train, step: int) -> float:
    """Learning rate of the update ``step``, counted from 1.

    All kinds warm up linearly over ``schedule.warmup`` steps. ``cosine`` then falls to ``schedule.final`` of the peak
    at ``train.steps``; ``wsd`` stays at the peak and falls linearly over its last ``decay`` steps; ``constant`` stays.
    """
    schedule = train.schedule
    if step <= schedule.warmup:
        return train.lr * step / schedule.warmup
    if schedule.kind == "constant":
        return train.lr
    start = schedule.warmup if schedule.kind == "cosine" else max(schedule.warmup, train.steps - train.decay_steps)
    progress = min(1.0, max(0.0, (step - start) / max(1, train.steps - start)))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.kind == "cosine" else 1 - progress
    return train.lr * (schedule.final + (1 - schedule.final) * remaining)
