"""The typed configuration of a run. Imports no torch and has no side effects.

Whole numbers may be written ``128k`` or ``1Mi`` (:mod:`longctx.config.humanint`). Every section refuses unknown keys.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from longctx.config.mixers import parse_layers, unread
from longctx.config.proposals import Proposals
from longctx.config.section import Count, NonNegative, Section
from longctx.errors import ConfigError

Layers = Annotated[tuple[str, ...], BeforeValidator(parse_layers, json_schema_input_type=str | list[str])]


class Rope(Section):
    """Rotary position encoding and its length scaling, with the key names of transformers' ``rope_parameters``."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    rope_theta: float = Field(10000.0, gt=0)
    factor: float | None = Field(None, gt=0)
    partial_rotary_factor: float = Field(1.0, gt=0, le=1)
    original_max_position_embeddings: Count | None = None
    attention_factor: float | None = Field(None, gt=0)
    beta_fast: float | None = Field(None, gt=0)
    beta_slow: float | None = Field(None, gt=0)
    mscale: float | None = Field(None, gt=0)
    mscale_all_dim: float | None = Field(None, gt=0)
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> "Rope":
        needs = {
            "linear": ("factor",),
            "dynamic": ("factor",),
            "longrope": ("short_factor", "long_factor"),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        }
        missing = [name for name in needs.get(self.rope_type, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"rope_type {self.rope_type!r} also needs {', '.join(missing)}")
        return self

    def idle(self) -> dict[str, str]:
        """See :class:`Section`."""
        users = {key: [kind for kind, keys in _ROPE_KEYS.items() if key in keys] for key in Rope.model_fields}
        unused = {
            key: f"rope_type {self.rope_type} does not use it; of use to {', '.join(kinds)}"
            for key, kinds in users.items()
            if kinds and self.rope_type not in kinds
        }
        if self.attention_factor is not None:
            replaced = {"yarn": ("mscale", "mscale_all_dim"), "longrope": ("factor",)}.get(self.rope_type, ())
            return unused | dict.fromkeys(replaced, "attention_factor replaces it")
        if self.rope_type == "yarn" and not (self.mscale and self.mscale_all_dim):
            unused |= dict.fromkeys(("mscale", "mscale_all_dim"), "yarn uses mscale and mscale_all_dim only together")
        return unused


_ROPE_KEYS = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}  # fmt: skip
"""What each type reads besides ``rope_theta`` and ``partial_rotary_factor``, which all read."""


class Recurrence(Section):
    """What is handed from one segment of a sequence to the next (see ``longctx.recurrence``)."""

    kind: Literal["rmt", "armt"] = Field("rmt", description="memory tokens, or associative memory in every layer")
    segment: Count = Field(description="tokens per segment")
    memory: NonNegative = Field(16, description="memory tokens per segment")
    bptt: NonNegative | None = Field(None, description="segment boundaries that gradients cross at most; default: all")
    keys: PositiveInt | None = Field(None, description="armt: size of a memory key before its features; default: 64")
    wavefront: bool = Field(False, description="armt: ranks run whole segments in turn; default: each is cut over all")
    curriculum: tuple[tuple[NonNegative, PositiveInt], ...] = Field(
        (), description="[step, segments] pairs: from that step on memory is carried over at most so many segments"
    )

    @model_validator(mode="after")
    def _possible(self) -> "Recurrence":
        if self.wavefront and self.kind != "armt":
            raise ValueError(
                f"wavefront needs a memory of every layer, kind {self.kind} hands the last layer's to the first; "
                f"use kind armt or leave wavefront out"
            )
        steps = [step for step, _ in self.curriculum]
        if steps != sorted(set(steps)):
            raise ValueError(f"the steps of curriculum {steps} should ascend")
        return self

    def idle(self) -> dict[str, str]:
        """See :class:`Section`."""
        return {} if self.kind == "armt" else {"keys": "kind rmt has no keys; of use to armt"}

    def carried(self, step: int) -> int | None:
        """Segments that memory is carried over in optimizer step ``step`` (from 0); None: all."""
        reached = [segments for first, segments in self.curriculum if first <= step]
        return reached[-1] if reached else None


class Block(Section):
    """A global-to-local decoder: layers over blocks of tokens, then a decoder inside each block.

    ``num_layers``, ``mixer`` and ``layers`` of the model describe the layers over blocks, whose positions count blocks
    (see ``longctx.model.block_transformer``).
    """

    size: PositiveInt = Field(4, description="tokens per block")
    layers: int | None = Field(None, ge=0, description="softmax layers inside blocks; default: as many as over blocks")
    prefix: PositiveInt = Field(2, description="positions before a block's tokens that hold what came before it")


_BESIDE_HF = {"rope", "max_position_embeddings", "recurrence", "proposals"}
"""What may be set beside ``model.from_hf``."""


class Model(Section):
    """A Llama-family decoder.

    ``from_hf`` replaces every shape below by those of a local Hugging Face folder, ``from_run`` by those of a run.
    """

    from_hf: Path | None = Field(None, description="local Hugging Face folder to start from; shapes come from it")
    from_run: Path | None = Field(
        None,
        description="run or checkpoint whose weights to start from, without its optimizer; all but proposals is its",
    )
    family: Literal["llama", "mistral", "qwen2", "qwen3"] = Field("llama", description="export format")
    vocab_size: Count | None = Field(
        None, description="rows of the embedding; default: all tokens of the tokenizer, and sink_tokens"
    )
    sink_tokens: NonNegative = Field(0, description="learned tokens before every document and prompt (StreamingLLM)")
    hidden_size: Count = 256
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt | None = Field(None, description="default: num_heads")
    head_dim: PositiveInt | None = Field(None, description="default: hidden_size / num_heads")
    intermediate_size: Count | None = Field(None, description="default: 8/3 hidden_size, rounded up to 64")
    max_position_embeddings: Count | None = Field(None, description="default: sequence.length")
    mixer: str = Field("softmax", description="sequence mixer of every layer")
    layers: Layers | None = Field(
        None, description="mixer of each layer, as in [gated_retention*3, softmax] * 6; default: model.mixer in all"
    )
    mixer_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="settings of mixers by their name, as in {gated_retention: {chunk: 128}}"
    )
    recurrence: Recurrence | None = Field(None, description="recurrence over segments; default: none")
    block: Block | None = Field(None, description="layers over blocks and a decoder inside them; default: none")
    proposals: Proposals | None = Field(None, description="heads for several tokens per decoding step; default: none")
    norm_eps: float = Field(1e-5, gt=0)
    rope: Rope = Rope()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    sliding_window: Count | None = Field(None, description="tokens a query sees, itself included")
    window_layers: tuple[bool, ...] | None = Field(None, description="which layers use sliding_window; default: all")
    init_std: float = Field(0.02, gt=0)
    bos_token_id: NonNegative | None = None
    eos_token_id: NonNegative | None = None
    hf_config: dict[str, Any] | None = Field(
        None, description="read from model.from_hf: config.json of an architecture that trains as transformers' class"
    )

    @model_validator(mode="before")
    @classmethod
    def _counted(cls, given: Any) -> Any:
        """As many layers as the pattern has, where only that is given."""
        if isinstance(given, dict) and given.get("layers") is not None and "num_layers" not in given:
            return {**given, "num_layers": len(parse_layers(given["layers"]))}
        return given

    @model_validator(mode="after")
    def _shapes(self) -> "Model":
        if self.hf_config is not None:  # shaped by the rules of its own architecture
            return self
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; set head_dim"
            )
        if self.layers is not None and len(self.layers) != self.num_layers:
            raise ValueError(f"layers names {len(self.layers)} mixers for num_layers {self.num_layers}; leave one out")
        if unused := sorted(set(self.mixer_options) - set(self.mixers)):
            raise ValueError(f"mixer_options are given for {', '.join(unused)}, which no layer uses")
        if self.window_layers is not None and len(self.window_layers) != self.num_layers:
            raise ValueError(f"window_layers has {len(self.window_layers)} entries for {self.num_layers} layers")
        if int(self.head_size * self.rope.partial_rotary_factor) % 2:
            raise ValueError(f"head_dim {self.head_size} * rope.partial_rotary_factor must be even")
        return self

    @model_validator(mode="after")
    def _blocks(self) -> "Model":
        if self.block is None:
            return self
        size = self.block.size
        if self.hidden_size % size:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of block.size {size}")
        if self.recurrence is not None:
            raise ValueError("recurrence runs a decoder segment by segment, which block is not made for; leave one out")
        if self.sliding_window is not None:
            raise ValueError("sliding_window counts tokens, but what block's layers see are blocks; leave it out")
        if self.rope.rope_type != "default":
            raise ValueError(
                f"rope.rope_type {self.rope.rope_type} scales positions of tokens, but the positions of block's layers "
                "count blocks; use default"
            )
        return self

    def idle(self) -> dict[str, str]:
        """See :class:`Section`."""
        if self.from_run is not None:
            reason = f"it comes from model.from_run ({self.from_run})"
            return dict.fromkeys(Model.model_fields.keys() - {"from_run", "proposals"}, reason)
        if self.from_hf is not None:
            reason = f"it comes from model.from_hf ({self.from_hf})"
            return dict.fromkeys(Model.model_fields.keys() - {"from_hf"} - (_BESIDE_HF & self.model_fields_set), reason)
        inside = ("softmax",) if self.token_layers else ()
        idle = {"hf_config": "it is read from the folder that model.from_hf names", **unread((*self.mixers, *inside))}
        if self.layers is not None:
            idle["mixer"] = "model.layers names the mixer of every layer"
        return idle if self.sliding_window else {"window_layers": "there is no model.sliding_window", **idle}

    @property
    def architecture(self) -> str:
        """Name to show: one of our families, or the class of transformers that computes the model."""
        if self.hf_config is None:
            return self.family
        return str(next(iter(self.hf_config.get("architectures") or ()), self.hf_config.get("model_type")))

    @property
    def mixers(self) -> tuple[str, ...]:
        """Name of every layer's mixer."""
        return self.layers or (self.mixer,) * self.num_layers

    @property
    def kv_bias(self) -> bool:
        """Whether softmax layers have a learned key and value per kv head."""
        return bool(self.mixer_options.get("softmax", {}).get("kv_bias", False))

    @property
    def token_layers(self) -> int:
        """Layers inside blocks, beside the ``num_layers`` over them."""
        if self.block is None:
            return 0
        return self.num_layers if self.block.layers is None else self.block.layers

    @property
    def sink_ids(self) -> tuple[int, ...]:
        """Ids of the sink tokens: the last ones of the vocabulary."""
        size = self.vocab_size or 0
        return tuple(range(size - self.sink_tokens, size)) if self.sink_tokens else ()

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        return self.intermediate_size or -(-8 * self.hidden_size // 3 // 64) * 64

    def over(self, base: "Model") -> "Model":
        """The model that ``from_hf`` or ``from_run`` names with what may be set beside it, as rope or heads.

        Raises:
            ConfigError: one is set, and the model trains as transformers' class, which takes all from its config.json.
        """
        taken = sorted({"rope", "max_position_embeddings"} & self.model_fields_set)
        if taken and base.hf_config is not None:
            raise ConfigError(
                f"model.{taken[0]} cannot be set beside a {base.architecture}, which takes it from its config.json; "
                f"change it in {self.from_hf}"
            )
        if self.from_run is not None:
            if base.proposals is not None:
                raise ConfigError(
                    f"model.from_run: {self.from_run} has proposal heads already; go on in that run, or start from the "
                    "one that its decoder came from"
                )
            return base.model_copy(update={"proposals": self.proposals})
        chosen = {key: getattr(self, key) for key in _BESIDE_HF & self.model_fields_set}
        return base.model_copy(update={key: value for key, value in chosen.items() if value is not None})

    def window(self, layer: int) -> int | None:
        """Sliding window of one layer in tokens, or None for full attention."""
        uses = self.window_layers is None or self.window_layers[layer]
        return self.sliding_window if uses else None


class Source(Section):
    """One corpus built by ``longctx data build`` and its share of the training rows."""

    path: Path = Field(description="folder written by `longctx data build`")
    weight: float = Field(1.0, gt=0)
    long_documents: Count | None = Field(None, description="documents of at least this many tokens are repeated")
    long_repeat: float = Field(1.0, ge=1, description="how often a long document appears per epoch")

    def idle(self) -> dict[str, str]:
        """See :class:`Section`."""
        if self.long_documents is None:
            return {"long_repeat": "there is no long_documents"}
        return {} if "long_repeat" in self.model_fields_set else {"long_documents": "there is no long_repeat"}


class Data(Section):
    sources: tuple[Source, ...] = Field(min_length=1)
    tokenizer: Path | None = Field(None, description="default: the tokenizer stored with the first source")
    seed: NonNegative = 0
    verify: bool = Field(True, description="hash every shard before training; false checks sizes only")


class Sequence(Section):
    """How one sequence is cut over ranks."""

    length: Count = Field(description="tokens per sequence, over all ranks")
    degree: PositiveInt = Field(1, description="ranks that share one sequence")
    layout: Literal["contiguous", "zigzag", "striped", "balanced"] = Field(
        "zigzag", description="which tokens a rank holds; balanced follows the documents of each micro-batch"
    )
    scheme: Literal["ring", "ulysses", "hybrid", "double_ring", "allgather", "auto"] = Field(
        "ring", description="how attention moves over the ranks; auto: the fastest by a model of bytes and balance"
    )
    inner: PositiveInt | None = Field(
        None, description="ranks of an inner group, for hybrid, double_ring and auto; default: those that share a node"
    )

    def idle(self) -> dict[str, str]:
        """See :class:`Section`."""
        if self.has_inner_groups:
            return {}
        return {"inner": f"scheme {self.scheme} has no inner groups; of use to hybrid, double_ring and auto"}

    @property
    def has_inner_groups(self) -> bool:
        """Whether the scheme divides the ranks of a sequence once more."""
        return self.scheme in ("hybrid", "double_ring", "auto")


class Schedule(Section):
    """Learning-rate schedule over optimizer steps."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: NonNegative = 0
    decay: NonNegative | None = Field(
        None, description="wsd: steps of the final decay; default: a tenth of train.steps"
    )
    final: float = Field(0.1, ge=0, le=1, description="last learning rate as a share of train.lr")

    def idle(self) -> dict[str, str]:
        """See :class:`Section`."""
        kinds = {"final": ("cosine", "wsd"), "decay": ("wsd",)}
        return {
            key: f"kind {self.kind} does not use it; of use to {', '.join(users)}"
            for key, users in kinds.items()
            if self.kind not in users
        }


class Train(Section):
    steps: Count
    batch: PositiveInt = Field(1, description="sequences per optimizer step, over the whole world")
    micro_batch: PositiveInt = Field(1, description="sequences per forward, per data rank")
    lr: float = Field(3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, ge=0, description="global gradient norm; 0 turns clipping off")
    schedule: Schedule = Schedule()
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: NonNegative = 0
    loss_chunk: Count = Field(1024, description="local tokens per chunk of the output head")
    recompute: bool = Field(False, description="recompute activations in the backward; attention is never repeated")
    max_nonfinite: NonNegative = Field(
        3, description="updates skipped for a non-finite loss or gradient before the run ends"
    )
    log_every: PositiveInt = 1
    eval_every: NonNegative = Field(0, description="steps between held-out losses; 0: never")
    eval_batches: PositiveInt = 8

    @property
    def decay_steps(self) -> int:
        return self.schedule.decay if self.schedule.decay is not None else max(1, self.steps // 10)


class Engine(Section):
    kind: Literal["deepspeed", "torch"] = "deepspeed"
    zero: Literal[0, 1, 2, 3] = Field(1, description="deepspeed: ZeRO stage")
    options: dict[str, Any] = Field(default_factory=dict, description="further DeepSpeed settings, merged as they are")

    def idle(self) -> dict[str, str]:
        """See :class:`Section`."""
        reason = "engine.kind torch shards nothing and reads no DeepSpeed settings (engine={kind: torch} drops them)"
        return dict.fromkeys(("zero", "options"), reason) if self.kind == "torch" else {}

    @model_validator(mode="after")
    def _ours(self) -> "Engine":
        taken = sorted(set(self.options) & _OWNED_BY_LONGCTX)
        inner = self.options.get("zero_optimization", {})
        if not isinstance(inner, dict):
            raise ValueError("options.zero_optimization should be a section")
        taken += [f"zero_optimization.{key}" for key in sorted(set(inner) & {"stage", "compute_grad_norm"})]
        if taken:
            raise ValueError(
                f"options may not set {', '.join(taken)}: longctx derives them from the rest of the config"
            )
        lost = sorted(set(inner) & {"mics_shard_size", "zero_hpz_partition_size"})
        lost += [key for key in _OFFLOADS if _device_of(inner.get(key)) == "nvme"]
        if lost:
            raise ValueError(
                f"options.zero_optimization may not use {', '.join(lost)}: checkpoints could not read the state it "
                "places; leave it out or offload to cpu"
            )
        return self


_OFFLOADS = ("offload_optimizer", "offload_param")


def _device_of(offload: Any) -> Any:
    return offload.get("device") if isinstance(offload, dict) else None


_OWNED_BY_LONGCTX = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16", "prescale_gradients", "gradient_predivide_factor",
    "sequence_parallel_size",
}  # fmt: skip


class Checkpoint(Section):
    every: NonNegative = Field(0, description="steps between checkpoints; 0: only at the end")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")


class Runtime(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = Field(None, description="CPU threads per rank; default: cores / local ranks")
    timeout: PositiveInt = Field(600, description="seconds a collective may take")


class Trackers(Section):
    """Sinks besides metrics.jsonl, from the `track` extra."""

    tensorboard: bool = False
    wandb: str | None = Field(None, description="W&B project name")


class Config(Section):
    """A whole run."""

    run: Path = Field(description="folder that receives checkpoints, metrics and reports")
    model: Model = Model()
    data: Data
    sequence: Sequence
    train: Train
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    runtime: Runtime = Runtime()
    track: Trackers = Trackers()


__all__ = [
    "Block", "Checkpoint", "Config", "Data", "Engine", "Model", "Proposals", "Recurrence", "Rope", "Runtime",
    "Schedule", "Section", "Sequence", "Source", "Trackers", "Train",
]  # fmt: skip
