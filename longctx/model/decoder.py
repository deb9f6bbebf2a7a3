"""The decoder of the Llama family, assembled from a config.

Pre-norm layers of a sequence mixer and a SwiGLU feed-forward, RMSNorm, optional tied embeddings. Everything a layer
knows about the sequence comes through its context; this module never communicates.

Shapes: B batch, T local tokens, D model, F feed-forward, V vocabulary.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.representation import told
from longctx.cache.sinks import protecting
from longctx.config.schema import Model
from longctx.errors import ConfigError
from longctx.mixers import MIXERS, Mixer
from longctx.mixers.layers import Embedding, Learned, Linear, RMSNorm
from longctx.mixers.statistics import Observed, Statistics, merged
from longctx.model.head import OutputHead
from longctx.model.recompute import recomputed
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import Kept

State = tuple[Any, ...]
"""Decode state of a model: one entry per layer."""


Memory = Mapping[str, Any]
"""What layers have made for those above, by the name of their mixer."""


class Output(NamedTuple):
    """What a forward returns.

    Summed loss (None without labels), last hidden states [B, T, D], new state or None, and in training what the mixers
    observed beside the token loss (None: nothing). Of a decoder with proposal heads also their summed loss (see
    ``longctx.model.proposals``), where it was asked for.
    """

    loss_sum: Tensor | None
    hidden_BTD: Tensor
    state: State | None
    observed: Observed | None = None
    proposal_loss_sum: Tensor | None = None


class Hidden(NamedTuple):
    """Last hidden states [B, T, D], new state or None, and what was observed."""

    hidden_BTD: Tensor
    state: Any
    observed: Observed | None = None


class LayerOutput(NamedTuple):
    """The tokens after a layer, its new state, the memory for the layers above, and what its mixer observed."""

    x_BTD: Tensor
    state: Any
    memory: Memory
    observed: Observed | None


class SwiGLU(nn.Module):
    """Feed-forward ``down(silu(gate(x)) * up(x))`` (Shazeer 2020)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.ffn_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.ffn_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.ffn_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Token-local map [B, T, D] -> [B, T, D]."""
        y_BTD: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return y_BTD


class DecoderLayer(nn.Module):
    """One pre-norm layer. With ``recompute`` all of it but attention and communication runs again in the backward.

    Args:
        mixer: default: the one that the config names.
    """

    def __init__(self, config: Model, layer: int, recompute: bool = False, mixer: Mixer | None = None) -> None:
        super().__init__()
        self.recompute, self.kind = recompute, config.mixers[layer]
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = mixer or MIXERS[self.kind](config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x_BTD: Tensor,
        context: SequenceContext,
        state: Any = None,
        memory: Memory | None = None,
        last: bool = False,
    ) -> LayerOutput:
        """The tokens after this layer, its new state (state None in, None out), and what it hands on.

        Args:
            memory: what the layers below have made.
            last: give the last token alone, after all have entered the memory that this layer offers.
        """
        memory = memory or {}
        if not (self.recompute and torch.is_grad_enabled()):
            return self._run(x_BTD, context, state, memory, last)
        result: LayerOutput = recomputed(self._run, x_BTD, context.keeping(Kept()), state, memory, last)
        return result

    def _run(self, x_BTD: Tensor, context: SequenceContext, state: Any, memory: Memory, last: bool) -> LayerOutput:
        mixer = self.mixer
        normed_BTD = self.mixer_norm(x_BTD)
        if mixer.offers:
            memory = {**memory, self.kind: mixer.offer(normed_BTD, context, state)}
        if last:
            x_BTD, normed_BTD, context = x_BTD[:, -1:], normed_BTD[:, -1:], context.last()
        mixed = mixer.run(normed_BTD, context, state, memory.get(self.kind) if mixer.takes_memory else None)
        if mixed.memory is not None:
            memory = {**memory, self.kind: mixed.memory}
        x_BTD = x_BTD + mixed.y_BTD
        added_BTD = self.mlp(self.mlp_norm(x_BTD))
        state = told(mixed.state, mixed.y_BTD, added_BTD)
        return LayerOutput(x_BTD + added_BTD, state, memory, mixed.observed)


class CausalLM(nn.Module):
    """Embedding, layers, final norm and output head.

    Args:
        config: the model section, with ``vocab_size`` set.
        recompute: recompute activations in the backward; attention is never repeated.
        seed: initialise the weights from this seed; None leaves them uninitialised (they are about to be loaded).

    Raises:
        ConfigError: ``vocab_size`` is missing, a mixer is not registered or has an option it does not know, or the
            config asks for layers over blocks.
    """

    def __init__(self, config: Model, *, recompute: bool = False, seed: int | None = 0) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size is not set and no tokenizer has filled it in; set model.vocab_size")
        if config.block is not None:
            raise ConfigError("a model with model.block is a BlockTransformer; build it with build_native")
        for name in config.mixers:
            if name not in MIXERS:
                raise ConfigError(f"the mixer {name!r} is not registered; choose from {', '.join(MIXERS)}")
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, recompute=recompute) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = OutputHead(config.vocab_size, config.hidden_size)
        self.tie_weights()
        if seed is not None:
            self.init_weights(seed)

    def tie_weights(self) -> None:
        """Make head and embedding one Parameter, if the config says so. Needed again after parameters were replaced."""
        if self.config.tie_embeddings:
            self.head.weight = cast(nn.Parameter, self.embed.weight)

    def init_weights(self, seed: int) -> None:
        """Draw every weight from N(0, init_std), norms 1, biases 0, :class:`Learned` ones as they say.

        Each tensor is drawn on the host from the seed and its own name, so the values depend neither on the device,
        nor on the dtype, nor on what other tensors a model has. Meta tensors are left alone.
        """
        draw_weights(self, self.config.init_std, seed)

    def empty_state(self, batch: int, cache: CacheOptions | None = None) -> State:
        """The decode state before the first token; passing it to :meth:`forward` asks for a state back.

        Args:
            cache: how keys and values are stored, without gradients; None: as plain tensors, with gradients.

        Raises:
            UnsupportedError: something is asked of the cache, and there are no keys and values.
        """
        like, mixers = self.embed.weight, [_layer(layer).mixer for layer in self.layers]
        if cache is None:
            return tuple(mixer.empty_state(batch, like) for mixer in mixers)
        # Of this batch: its layers share what they start from.
        cache = protecting(replace(cache, starts={}), self.config)
        caches = [cache.for_layer(layer, len(mixers)) for layer in range(len(mixers))]
        states = tuple(mixer.empty_cache(batch, like, own) for mixer, own in zip(mixers, caches, strict=True))
        if not any(isinstance(leaf, RaggedKV) for leaf in tree_leaves(states)):
            kinds = enumerate(self.config.mixers)
            shared = all(MIXERS[name].carries_over_ranks(self.config, layer) for layer, name in kinds)
            # Ranks without anything to keep can still share the work of a prompt.
            plain = replace(cache, ranks=None) if shared else cache
            plain.check_plain("no layer of this model keeps keys and values")
        return states

    def forward(
        self,
        tokens_BT: Tensor,
        context: SequenceContext,
        labels_BT: Tensor | None = None,
        state: Sequence[Any] | None = None,
        loss_chunk: int = 1024,
        last_only: bool = False,
    ) -> Output:
        """Run this rank's tokens.

        Args:
            tokens_BT: int64 ids of the local tokens.
            labels_BT: the next token of each, or -100; already shifted. Given: ``loss_sum`` is the sum of the token
                cross entropies of this rank in fp32 (fp64 for fp64), connected to the graph even without any token.
            state: one entry per layer (see :meth:`empty_state`), or None.
            loss_chunk: tokens per chunk of the output head.
            last_only: with a state, hidden states of the last token alone: the others leave the decoder where no later
                layer needs them (YOCO's early exit), and nothing of a token is lost to the state.
        """
        hidden_BTD, after, observed = self.run(self.embed_tokens(tokens_BT), context, state, last_only)
        loss_sum = None if labels_BT is None else self.head(hidden_BTD, labels_BT, loss_chunk)
        return Output(loss_sum, hidden_BTD, after, observed)

    def embed_tokens(self, tokens_BT: Tensor) -> Tensor:
        """Embeddings [B, T, D]."""
        x_BTD: Tensor = self.embed(tokens_BT)
        return x_BTD

    def run(
        self, x_BTD: Tensor, context: SequenceContext, state: Sequence[Any] | None = None, last_only: bool = False
    ) -> Hidden:
        """Last hidden states [B, T, D] of embedded tokens (see ``last_only`` above), and what else they give."""
        new_state, memory, parts = [], None, []
        leaves = self._exit if last_only and state is not None else None
        for index, layer in enumerate(self.layers):
            before = None if state is None else state[index]
            x_BTD, layer_state, memory, observed = layer(x_BTD, context, before, memory, index == leaves)
            context = context.last() if index == leaves else context
            new_state.append(layer_state)
            parts.append(named(observed, index))
        x_BTD = x_BTD[:, -1:] if last_only else x_BTD
        return Hidden(self.norm(x_BTD), None if state is None else tuple(new_state), merged(parts))

    @property
    def _exit(self) -> int | None:
        """The layer that makes the memory, if it and all above are of its kind and keep nothing else of a token."""
        mixers, kinds = [_layer(layer).mixer for layer in self.layers], self.config.mixers
        first = next((index for index, mixer in enumerate(mixers) if mixer.offers), None)
        if first is None or not mixers[first].memory_suffices:
            return None
        return first if set(kinds[first:]) == {kinds[first]} else None

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] of hidden states."""
        logits_BTV: Tensor = self.head(hidden_BTD)
        return logits_BTV

    def state_survives(self, past: int, length: int) -> bool:
        """Whether a decode state of ``past`` tokens may be continued to ``length`` tokens, or all must run again.

        Length-dependent rotary types change what every earlier position computed (see ``RotaryEmbedding.table``).
        """
        return all(_layer(layer).mixer.state_survives(past, length) for layer in self.layers)


@torch.no_grad()
def draw_weights(module: nn.Module, std: float, seed: int, leave: str | None = None) -> None:
    """See :meth:`CausalLM.init_weights`, statistics included; what has a name that starts with ``leave`` is left."""
    drawn = {f"{name}.weight": part for name, part in module.named_modules() if isinstance(part, Learned)}
    for name, parameter in module.named_parameters():
        if parameter.is_meta or (leave is not None and name.startswith(leave)):
            continue
        if name in drawn:
            parameter.copy_(drawn[name].initial(generator_of(name, seed)))
        else:
            parameter.copy_(initial_weight(name, parameter.shape, std, seed))
    for name, part in module.named_modules():
        left = leave is not None and name.startswith(leave)
        if isinstance(part, Statistics) and not left and not any(buffer.is_meta for buffer in part.buffers()):
            part.start(generator_of(name, seed))


def initial_weight(name: str, shape: Sequence[int], std: float, seed: int) -> Tensor:
    """Initial fp32 value, on the host, of the parameter called ``name``."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    return torch.randn(shape, generator=generator_of(name, seed)) * std


def generator_of(name: str, seed: int) -> torch.Generator:
    """The random numbers of the parameter called ``name``."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def parameter_shapes(config: Model) -> dict[str, torch.Size]:
    """Shape of every parameter by name, in model order, without allocating any; a tied head is not listed."""
    with torch.device("meta"):
        model = CausalLM(config, seed=None)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def named(observed: Observed | None, layer: int) -> Observed | None:
    """What the mixer of a layer observed, with names as its decoder knows them."""
    return None if observed is None else observed.under(f"layers.{layer}.mixer.")


def _layer(module: nn.Module) -> DecoderLayer:
    return cast(DecoderLayer, module)
