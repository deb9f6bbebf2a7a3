"""Periodic checkpoints."""

from pathlib import Path

from longctx.checkpoint.save import prune, save_checkpoint
from longctx.train.trainer import Callback, Trainer


class Checkpoints(Callback):
    """Saves every ``checkpoint.every`` steps and at the end, and keeps the newest ``checkpoint.keep``."""

    def __init__(self, run: Path, tokenizer: Path, data_fingerprints: list[str]) -> None:
        self._run, self._tokenizer, self._fingerprints = run, tokenizer, data_fingerprints

    def on_step(self, trainer: Trainer) -> None:
        every, step = trainer.config.checkpoint.every, trainer.progress.step
        if step == trainer.config.train.steps or (every and step % every == 0):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        state = {
            "step": trainer.progress.step,
            "tokens": trainer.progress.tokens,
            "nonfinite": trainer.progress.nonfinite,
            "corpora": self._fingerprints,
        }
        folder = save_checkpoint(self._run, trainer.engine, trainer.mesh, trainer.model, state, self._tokenizer)
        prune(self._run, trainer.config.checkpoint.keep, trainer.mesh)
        trainer.event("checkpoint", path=str(folder))
