"""The run folder: created once, and refused when it already holds a run of another kind."""

from typing import Any

from longctx.config.load import dump_config, load_config
from longctx.config.schema import Config
from longctx.errors import ConfigError

STORED = "config.yaml"
# What may change between a run and its continuation without changing what is learned.
_FREE = {
    "sequence": {"degree", "layout", "scheme"},
    "train": {"micro_batch", "loss_chunk", "recompute", "max_nonfinite", "log_every", "eval_every", "eval_batches"},
    "data": {"verify"},
}
_FREE_SECTIONS = {"run", "engine", "checkpoint", "runtime", "track"}


def check_run_folder(config: Config) -> None:
    """Refuse a folder that this run may not use; touches nothing.

    Raises:
        ConfigError: ``config.run`` holds another run, or something that is no run.
    """
    run = config.run
    stored = run / STORED
    if stored.is_file():
        changed = differing_keys(load_config(stored), config)
        if changed:
            raise ConfigError(
                f"run: {run} already holds a run with other settings ({'; '.join(changed)}); "
                "use the same settings to continue it, or another `run` folder"
            )
    elif run.is_dir() and any(run.iterdir()):
        raise ConfigError(f"run: {run} is not empty and holds no run of longctx; choose another `run` folder")


def claim_run_folder(config: Config) -> None:
    """Create ``config.run`` and store the resolved config there.

    Raises:
        ConfigError: as :func:`check_run_folder`, or the folder cannot be written.
    """
    check_run_folder(config)
    run = config.run
    try:
        run.mkdir(parents=True, exist_ok=True)
        partial = run / f".{STORED}.writing"
        partial.write_text(dump_config(config), encoding="utf-8")
        partial.replace(run / STORED)
        (run / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run: {run} cannot be written ({error.strerror}); choose another `run` folder") from error


def differing_keys(stored: Config, wanted: Config) -> list[str]:
    """Settings that define what is learned and differ, as ``key: stored -> wanted``."""
    before, after = stored.model_dump(mode="json"), wanted.model_dump(mode="json")
    found: list[str] = []
    for section in before.keys() - _FREE_SECTIONS:
        free = _FREE.get(section, set())
        for key in before[section].keys() - free:
            found += _difference(f"{section}.{key}", before[section][key], after[section][key])
    return sorted(found)


def _difference(path: str, before: Any, after: Any) -> list[str]:
    if before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        return [line for key in before for line in _difference(f"{path}.{key}", before[key], after.get(key))]
    return [f"{path}: {before} -> {after}"]
