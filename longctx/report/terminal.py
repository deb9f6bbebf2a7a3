"""The trainer's progress line. Pure text from one metrics record: what is shown is what was logged."""

from collections.abc import Mapping
from typing import Any

from longctx.report import units


def step_line(record: Mapping[str, Any], total_steps: int) -> str:
    """One line for one ``train`` record of metrics.jsonl.

    Fields that are missing or null print as ``n/a``; a step whose update was skipped ends in ``skipped``.

    Args:
        record: keys ``step``, ``loss`` (nats per token), ``grad_norm``, ``lr``, ``tokens_per_second``, ``mfu``
            (fraction of the device's peak), ``peak_memory`` (bytes), ``eta`` (seconds), ``skipped``.
        total_steps: optimizer steps of the whole run.
    """
    step = int(record["step"])
    parts = [
        f"step {step}/{total_steps} {units.percent(step, total_steps)}",
        f"loss {units.fixed(record.get('loss'), 3)}",
        f"gnorm {units.fixed(record.get('grad_norm'), 2)}",
        f"lr {units.scientific(record.get('lr'))}",
        f"{units.count(record.get('tokens_per_second'))} tok/s",
        f"mfu {units.share(record.get('mfu'))}",
        f"mem {units.memory(record.get('peak_memory'))}",
        f"eta {units.duration(record.get('eta'))}",
    ]
    if record.get("skipped"):
        parts.append("skipped")
    return " | ".join(parts)
