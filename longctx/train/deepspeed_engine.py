"""The DeepSpeed engine: ZeRO stages 0 to 3 over one flat data-parallel world.

DeepSpeed is not told about sequence groups, because its stages disagree there about the divisor, and never scales by
the accumulation, because that assumes equal label counts. Its optimizer is our own AdamW, which can sit out a step.
"""

import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any, cast

import torch
from torch import nn

from longctx.config.schema import Engine as EngineConfig
from longctx.config.schema import Train
from longctx.model.decoder import Output
from longctx.model.proposals import Targets
from longctx.runtime.mesh import Mesh
from longctx.sequence.context import SequenceContext
from longctx.train.engine import Fragment, Update, given
from longctx.train.optimizer import MOMENTS, AdamW, build_optimizer, trained
from longctx.train.torch_engine import gradient_norm, replicated_fragments

_BUCKET_ELEMENTS = 500_000_000


class DeepSpeedEngine:
    """Training under ``deepspeed.initialize``; collective over the world."""

    def __init__(self, model: nn.Module, config: EngineConfig, train: Train, mesh: Mesh, accumulation: int) -> None:
        import deepspeed

        quieten(deepspeed)
        self._zero = config.zero
        self._optimizer = build_optimizer(model.parameters(), train)
        settings = deepspeed_settings(config, train, accumulation, sum(p.numel() for p in model.parameters()))
        full = {name: p.detach() for name, p in model.named_parameters()}
        # The engine may round and partition what it does not train; what is saved of it is what it was before.
        self._untrained = {name: full[name] for name, p in model.named_parameters() if not p.requires_grad}
        self._holds_untrained = mesh.is_first or self.replicated
        # Stage 0 in bf16 takes an update while it is built, which would decay the weights and count as a step.
        self._optimizer.held = True
        with redirect_stdout(io.StringIO()):  # memory reports of its BF16 optimizer
            self._engine: Any = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=settings, dist_init_required=False
            )[0]
        self._optimizer.held = False
        self._names = {id(p): name for name, p in self._engine.module.named_parameters()}
        self._start(full)

    @property
    def module(self) -> nn.Module:
        return cast(nn.Module, self._engine.module)

    @property
    def replicated(self) -> bool:
        return self._zero == 0

    def forward(
        self, tokens_BT: torch.Tensor, context: SequenceContext, labels_BT: torch.Tensor, loss_chunk: int,
        targets: Targets | None = None,
    ) -> Output:  # fmt: skip
        return cast(Output, self._engine(tokens_BT, context, labels_BT, loss_chunk=loss_chunk, **given(targets)))

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()

    def step(self, lr: float, hold: bool) -> Update:
        norm = float(gradient_norm(self.module)) if self._plain else None
        hold = hold or (norm is not None and not math.isfinite(norm))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.held = hold
        try:
            self._engine.step()
        finally:
            self._optimizer.held = False
        if norm is None:
            reported = self._engine.get_global_grad_norm()
            norm = None if reported is None else float(reported)
        overflow = bool(getattr(self._engine.optimizer, "overflow", False))
        return Update(norm, not (hold or overflow))

    def fragments(self) -> Iterator[Fragment]:
        if self._plain:
            yield from replicated_fragments(self.module, self._optimizer.state)
            return
        if self._zero == 3:
            yield from self._fragments_of_stage_3()
        elif self._zero == 0:
            yield from self._fragments_of_copies()
        else:
            yield from self._fragments_of_stage_1_and_2()
        yield from self._fragments_untrained()

    @property
    def updates(self) -> int:
        return self._optimizer.updates

    def prepare_state(self, updates: int) -> None:
        for tensor in self._optimized():
            self._optimizer.prepare_state(tensor, updates)

    def _start(self, full: dict[str, torch.Tensor]) -> None:
        """Give every parameter moments, and the weights it had before DeepSpeed cast them to bf16 and back."""
        self.prepare_state(0)
        with torch.no_grad():
            for fragment in self.fragments():
                part = full[fragment.name].view(-1)[fragment.start : fragment.start + fragment.numel]
                fragment.weight.copy_(part)

    @property
    def _plain(self) -> bool:
        """Whether our optimizer works on the model's own parameters (no ZeRO, no copies in another precision)."""
        return isinstance(self._engine.optimizer, AdamW)

    @property
    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _fragments_untrained(self) -> Iterator[Fragment]:
        """Whole ones of the first rank, or of every rank where all hold everything."""
        for name, full in self._untrained.items():
            part = full.view(-1) if self._holds_untrained else torch.empty(0)
            yield Fragment(name, full.shape, 0, part, {})

    def _optimized(self) -> list[torch.Tensor]:
        """The full-precision tensors our optimizer updates: parameters, copies, or flat partitions of many."""
        inner = self._engine.optimizer
        if self._plain:
            return list(trained(self.module))
        if self._zero == 3:
            return list(inner.fp32_partitioned_groups_flat)
        if self._zero == 0:
            return [copy for group in inner.fp32_groups for copy in group]
        flat = getattr(inner, "fp32_groups_flat_partition", None)  # BF16_Optimizer's name for the same thing
        return list(inner.single_partition_of_fp32_groups if flat is None else flat)

    def _fragments_of_copies(self) -> Iterator[Fragment]:
        inner = self._engine.optimizer
        for low, full in zip(inner.fp16_groups, inner.fp32_groups, strict=True):
            for parameter, copy in zip(low, full, strict=True):
                state = self._optimizer.state[copy]
                moments = {key: state[key].view(-1) for key in MOMENTS}
                yield Fragment(self._names[id(parameter)], parameter.shape, 0, copy.detach().view(-1), moments)

    def _fragments_of_stage_1_and_2(self) -> Iterator[Fragment]:
        flats = self._optimized()
        for name, parameter in self._trained:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # this rank's partition holds no element of it
                nothing = torch.empty(0)
                yield Fragment(name, parameter.shape, 0, nothing, dict.fromkeys(MOMENTS, nothing))
                continue
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            state = self._optimizer.state[flats[mapping.param_group_index]]
            moments = {key: state[key].narrow(0, high.start, high.numel) for key in MOMENTS}
            yield Fragment(name, parameter.shape, low.start, mapping.hp_fragment.detach(), moments)

    def _fragments_of_stage_3(self) -> Iterator[Fragment]:
        inner = self._engine.optimizer
        for name, parameter in self._trained:
            shape, total = parameter.ds_shape, parameter.ds_numel  # type: ignore[attr-defined]
            group, offset, padded = inner.grad_position[inner.get_param_id(parameter)]
            start = min(padded * torch.distributed.get_rank(), total)
            flat = self._optimized()[group]
            numel = min(padded, total - start)  # the last partitions end in padding
            moments = {key: self._optimizer.state[flat][key].narrow(0, offset, numel) for key in MOMENTS}
            yield Fragment(name, shape, start, flat.detach().narrow(0, offset, numel), moments)


def deepspeed_settings(config: EngineConfig, train: Train, accumulation: int, parameters: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run; ``engine.options`` are merged into it."""
    bucket = min(_BUCKET_ELEMENTS, parameters + parameters % 2)  # stages 1 and 2 want it even
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.zero, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "overlap_comm": False,
            # It would replace torch's linear for the whole process, and for good.
            "memory_efficient_linear": False,
        },
    }  # fmt: skip
    if train.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["communication_data_type"] = "fp32"
        if config.zero:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(settings, config.options)


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def quieten(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling what a run never calls and from logging what a user cannot act on."""
    # Its shared-memory reduction serves inference only, yet would be compiled (a minute) when the first run starts.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
