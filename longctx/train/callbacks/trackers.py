"""TensorBoard and Weights & Biases, from the `track` extra; written by the first rank."""

from pathlib import Path
from typing import Any

from longctx.errors import ConfigError
from longctx.train.trainer import Callback, Record, Trainer


class TensorBoard(Callback):
    """Scalars under ``RUN/tensorboard``."""

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("track.tensorboard", "tensorboard") from error
        self._writer: Any = SummaryWriter(str(run / "tensorboard"))

    def on_record(self, trainer: Trainer, record: Record) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def on_end(self, trainer: Trainer) -> None:
        self._writer.close()


class Wandb(Callback):
    """Scalars in a W&B project."""

    def __init__(self, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("track.wandb", "wandb") from error
        self._run: Any = wandb.init(project=project, config=config, resume="allow")

    def on_record(self, trainer: Trainer, record: Record) -> None:
        self._run.log(_numbers(record), step=record["step"])

    def on_end(self, trainer: Trainer) -> None:
        self._run.finish()


def _numbers(record: Record) -> dict[str, float]:
    kind = record["kind"]
    plain = {
        name: value
        for name, value in record.items()
        if isinstance(value, (int, float)) and name not in ("step", "time")
    }
    return {} if kind == "event" else {f"{kind}/{name}": float(value) for name, value in plain.items()}


def _missing(key: str, package: str) -> ConfigError:
    return ConfigError(
        f"{key} needs the package {package}; install it with `pip install 'longctx[track]'` or unset {key}"
    )
