"""An attached transformers model behind the interface of our own decoder, for training, evaluation and export.

Legend: B batch, T local tokens, D model, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longctx.cache.options import CacheOptions
from longctx.cache.sinks import protecting
from longctx.config.schema import Model
from longctx.errors import CheckpointError, ConfigError, UnsupportedError, first_line
from longctx.model.attach import attach
from longctx.model.attach_cache import LayerCaches, unfilled
from longctx.model.attach_rotary import length_dependent
from longctx.model.attach_shift import reporting
from longctx.model.decoder import Hidden, Output
from longctx.model.head import OutputHead, Shaping
from longctx.sequence.context import SequenceContext


class AttachedCausalLM(nn.Module):
    """The decoder inside ``hf``, and its output embedding as an :class:`OutputHead`.

    The head owns the weight of ``hf``'s output embedding together with it; ``hf``'s own is never run.

    Args:
        hf: a causal language model of transformers, weights loaded; it is attached here.
        config: a model section with ``hf_config``.
        recompute: see :func:`longctx.attach`.

    Raises:
        UnsupportedError: the model cannot be attached, or its logits are no function of one projection.
    """

    def __init__(self, hf: Any, config: Model, *, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.hf = attach(hf, recompute=recompute)
        projection = hf.get_output_embeddings()
        vocab_size, hidden_size = projection.weight.shape
        shaping = _find_shaping(hf, projection)
        with torch.device("meta"):
            self.head = OutputHead(vocab_size, hidden_size, shaping.scale, shaping.softcap)
        self.head.weight = projection.weight

    def forward(
        self, tokens_BT: Tensor, context: SequenceContext, labels_BT: Tensor | None = None,
        state: tuple[Any, ...] | None = None, loss_chunk: int = 1024, last_only: bool = False,
    ) -> Output:  # fmt: skip
        """As :meth:`longctx.model.decoder.CausalLM.forward`; see :meth:`empty_state` for states."""
        caches = LayerCaches(state) if state else None
        past = {} if caches is None else {"longctx_caches": caches}
        with reporting(self.hf, caches is not None and caches.reports):
            hidden_BTD = self.hf.base_model(tokens_BT, longctx=context, **past).last_hidden_state
        hidden_BTD = hidden_BTD[:, -1:] if last_only else hidden_BTD
        loss_sum = None if labels_BT is None else self.head(hidden_BTD, labels_BT, loss_chunk)
        return Output(loss_sum, hidden_BTD, state if caches is None else tuple(caches.states))

    def embed_tokens(self, tokens_BT: Tensor) -> Tensor:
        """Embeddings [B, T, D]."""
        x_BTD: Tensor = self.hf.get_input_embeddings()(tokens_BT)
        return x_BTD

    def run(self, x_BTD: Tensor, context: SequenceContext, state: Any = None) -> Hidden:
        """Last hidden states [B, T, D] of embedded tokens."""
        return Hidden(self.hf.base_model(inputs_embeds=x_BTD, longctx=context).last_hidden_state, state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AttachedCausalLM":
        """As any module's, but rotary frequencies and their like are never rounded to half precision."""
        exact = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, buffer.to(moved.device))
        return self

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] of hidden states."""
        logits_BTV: Tensor = self.head(hidden_BTD)
        return logits_BTV

    def empty_state(self, batch: int, cache: CacheOptions | None = None) -> tuple[Any, ...]:
        """Caches of all layers, which take no gradients; they are made by their first tokens.

        Raises:
            UnsupportedError: the compression must know how keys are rotated, and it is not known.
            ConfigError: the policy has shares for another number of layers, or no room for the model's sink tokens.
        """
        return unfilled(self.hf, protecting(replace(cache or CacheOptions(), starts={}), self.config))

    def state_survives(self, past: int, length: int) -> bool:
        """False where rotary frequencies depend on the length."""
        return past == 0 or not any(length_dependent(module) for module in self.hf.modules())


@torch.no_grad()
def check_training(model: AttachedCausalLM) -> None:
    """Run a few tokens in training mode: what is refused in it, such as attention dropout, is refused before a run.

    Raises:
        UnsupportedError: attention would drop something.
    """
    training, context = model.training, SequenceContext.single(1, 3)
    tokens_BT = torch.full((1, 3), 3, device=model.head.weight.device)
    with torch.random.fork_rng([]):
        model.train()
        try:
            model(tokens_BT, context)
        finally:
            model.train(training)


def open_attached(
    folder: Path, config: Model, *, dtype: torch.dtype | None = None, recompute: bool = False
) -> AttachedCausalLM:
    """Load a local Hugging Face folder, safetensors only.

    Raises:
        CheckpointError: transformers cannot load the folder, or its weights and its config.json do not fit.
        UnsupportedError: see :class:`AttachedCausalLM`.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        hf, info = auto.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {first_line(error)}") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            name = sorted(map(str, info[what]))[0]
            kind = what.partition("_")[0]
            raise CheckpointError(f"the weights in {folder} do not fit its config.json: {kind} {name}; copy it again")
    return AttachedCausalLM(_trainable(hf), config, recompute=recompute)


def build_attached(config: Model, *, dtype: torch.dtype = torch.float32, recompute: bool = False) -> AttachedCausalLM:
    """A model of ``config.hf_config`` with weights of its architecture's own initialisation, about to be replaced.

    Raises:
        ConfigError: transformers does not know the model type, or not with these values.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    values = dict(config.hf_config or {})
    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"model_type {kind!r} is not known to this version of transformers; install one that has it")
    try:
        hf = auto.from_config(CONFIG_MAPPING[kind].from_dict(values), dtype=dtype)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(f"transformers cannot build a {kind} from its config.json: {first_line(error)}") from None
    return AttachedCausalLM(_trainable(hf), config, recompute=recompute)


def _trainable(hf: Any) -> Any:
    """Refuse what a checkpoint of parameters alone would lose."""
    parameters = dict(hf.named_parameters(remove_duplicate=False))
    lost = sorted(set(hf.state_dict()) - set(parameters))
    if lost:
        raise UnsupportedError(
            f"{type(hf).__name__} keeps {lost[0]} beside its parameters (a buffer that training updates by other means "
            "than gradients); train it with longctx.attach in a loop of your own"
        )
    return hf


@torch.no_grad()
def _find_shaping(hf: Any, projection: Any) -> Shaping:
    """How the model turns the products of its output embedding into logits, found by running both.

    Raises:
        UnsupportedError: the projection has a bias, or the logits are neither scaled nor soft-capped products.
    """
    who = type(hf).__name__
    if getattr(projection, "bias", None) is not None:
        raise UnsupportedError(f"{who} has a bias in its output embedding, which the chunked loss does not take")
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(3, hf.config.get_text_config().vocab_size, (1, 7), generator=generator)
    tokens_BT = tokens_BT.to(projection.weight.device)
    context, training = SequenceContext.single(1, 7), hf.training
    hf.eval()
    logits_BTV = hf(tokens_BT, longctx=context).logits
    products_BTV = projection(hf.base_model(tokens_BT, longctx=context).last_hidden_state)
    hf.train(training)
    tolerance = 1e-3 if logits_BTV.dtype in (torch.float32, torch.float64) else 2e-2
    for shaping in _possible_shapings(hf.config.get_text_config(), products_BTV.double(), logits_BTV.double()):
        found_BTV = shaping.apply(products_BTV.double())
        if bool((found_BTV - logits_BTV).abs().max() <= tolerance * logits_BTV.abs().max()):
            return shaping
    raise UnsupportedError(
        f"{who} makes its logits in another way than by scaling or soft-capping its output embedding's products; "
        "use longctx.attach with a loss of your own"
    )


def _possible_shapings(config: Any, products: Tensor, logits: Tensor) -> list[Shaping]:
    """Plain; scaled as measured; soft-capped as the config says."""
    ratio = float((products * logits).sum() / products.square().sum())
    # Configs hold round numbers or their inverses; the measured one carries rounding.
    scale = next((x for x in _round(ratio) if abs(x - ratio) <= 1e-4 * abs(ratio)), ratio)
    shapings = [Shaping(), Shaping(scale)]
    cap = getattr(config, "final_logit_softcapping", None)
    return [Shaping(1.0, float(cap)), *shapings] if cap else shapings


def _round(ratio: float) -> Mapping[float, None]:
    return {float(f"{ratio:.3g}"): None, 1 / float(f"{1 / ratio:.3g}"): None} if ratio else {}
