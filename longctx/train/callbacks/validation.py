"""Loss on the held-out split during training."""

import time

from longctx.train.batches import RowSource
from longctx.train.trainer import Callback, Trainer, finite


class Validation(Callback):
    """Evaluates the first ``rows_count`` held-out rows every ``train.eval_every`` steps and at the end."""

    def __init__(self, rows: RowSource, rows_count: int) -> None:
        self._rows, self._count = rows, rows_count

    def on_step(self, trainer: Trainer) -> None:
        every, step = trainer.config.train.eval_every, trainer.progress.step
        if step % every == 0 or step == trainer.config.train.steps:
            started = time.perf_counter()
            loss, tokens = trainer.evaluate(self._rows, self._count)
            seconds = time.perf_counter() - started
            trainer.log({"kind": "valid", "step": step, "loss": finite(loss), "tokens": tokens, "seconds": seconds})
