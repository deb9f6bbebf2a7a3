"""Block Transformer: layers over blocks of tokens, and a small decoder inside each block.

Ho et al., arXiv 2406.02657. A block of C tokens is embedded as the C embeddings of width D / C of its tokens, one after
the other (section 2.2). The block decoder, any causal layers, turns the embeddings of blocks 0 to b of a document into
what they tell about block b + 1, its context (2.3). A linear map makes a few positions of a context, the prefix, which
stand before the tokens of the block; softmax layers run over prefix and tokens of one block, and nothing else (2.4).

The last position of the prefix predicts the first token of its block, a token the next one. So the hidden state of the
last token of a block is that of the prefix of the next block, and every token of a document has one: unlike in the
paper, the first block is predicted, too, from a learned context, but for its first token, which has nothing before it.
Blocks are counted from the start of each document, and what is left behind the last full block needs no embedding.

Over ranks the block decoder is any decoder, on a sequence shorter by C. Token layers send nothing, but a run that
begins inside a document needs one context of another rank, and inside a block the ids of the tokens before it there.
:mod:`longctx.sequence.blocks` says which.

Shapes: B batch, T local tokens, N blocks, C tokens per block, G groups (blocks with a prefix), P positions of a prefix,
J positions of a group, R rest of an open block, D model, M rows to choose from.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longctx.cache.options import CacheOptions
from longctx.config.schema import Model
from longctx.errors import ConfigError, UnsupportedError
from longctx.mixers.dense_softmax import DenseSoftmaxMixer
from longctx.mixers.layers import Embedding, Learned, Linear, RMSNorm
from longctx.mixers.softmax import KVState
from longctx.model.decoder import CausalLM, DecoderLayer, Hidden, Output, State
from longctx.sequence.blocks import Blocks, blocks_of
from longctx.sequence.collectives.halo import rows_at
from longctx.sequence.context import SequenceContext


class BlockState(NamedTuple):
    """Decode state: that of the block decoder, keys and values inside the open block, and its R < C tokens so far."""

    blocks: State
    inside: tuple[KVState, ...]
    open_BR: Tensor


class BlockTransformer(CausalLM):
    """See the top of this file. ``layers`` and ``norm`` are the block decoder's, ``embed`` is the token decoder's.

    Args:
        config, recompute, seed: as for :class:`CausalLM`, with ``config.block``. Tied, the head is the token decoder's
            embedding.
    """

    def __init__(self, config: Model, *, recompute: bool = False, seed: int | None = 0) -> None:
        if config.block is None:
            raise ConfigError("model.block is not set: the model is a CausalLM; build it with build_native")
        super().__init__(config.model_copy(update={"block": None}), recompute=recompute, seed=None)
        assert config.vocab_size is not None
        self.config, width = config, config.hidden_size
        self.size, self.prefix_length = config.block.size, config.block.prefix
        self.block_embed = Embedding(config.vocab_size, width // self.size)
        # As large as a context of the block decoder, which is normed.
        self.first_context = Learned((width,), lambda generator: torch.randn(width, generator=generator))
        self.prefix = Linear(width, self.prefix_length * width, bias=False)
        layers, inside = range(config.token_layers), _inside(config)
        self.token_layers = nn.ModuleList(
            DecoderLayer(inside, layer, recompute, DenseSoftmaxMixer(inside, layer)) for layer in layers
        )
        self.token_norm = RMSNorm(width, config.norm_eps)
        if seed is not None:
            self.init_weights(seed)

    def forward(
        self,
        tokens_BT: Tensor,
        context: SequenceContext,
        labels_BT: Tensor | None = None,
        state: Any = None,
        loss_chunk: int = 1024,
        last_only: bool = False,
    ) -> Output:
        """As :meth:`CausalLM.forward`. With ``last_only`` only the last block runs through the token decoder.

        Raises:
            UnsupportedError: the layout is striped, or a state is given with a sharded or packed sequence.
            ValueError: tokens follow others and the state does not hold those.
        """
        if state is None:
            if context.past:
                raise ValueError(f"the context has {context.past} past tokens but no state holds them")
            hidden_BTD, _, observed = self._whole(tokens_BT, blocks_of(context, self.size))
            hidden_BTD = hidden_BTD[:, -1:] if last_only else hidden_BTD
        else:
            self._check_state(state, context)
            hidden_BTD, state, observed = self._decode(tokens_BT, context, state, last_only)
        loss_sum = None if labels_BT is None else self.head(hidden_BTD, labels_BT, loss_chunk)
        return Output(loss_sum, hidden_BTD, state, observed)

    def empty_state(self, batch: int, cache: CacheOptions | None = None) -> Any:
        """See :class:`CausalLM`."""
        like = self.embed.weight
        none = KVState.empty(batch, self.config.kv_heads, self.config.head_size, like)
        open_BR = torch.empty(batch, 0, dtype=torch.int64, device=like.device)
        return BlockState(super().empty_state(batch, cache), (none,) * len(self.token_layers), open_BR)

    def state_survives(self, past: int, length: int) -> bool:
        """See :class:`CausalLM`; the block decoder's positions count blocks."""
        return super().state_survives(past // self.size, length // self.size)

    def _whole(self, tokens_BT: Tensor, blocks: Blocks) -> Hidden:
        """All tokens of a context."""
        device, own_1T = tokens_BT.device, tokens_BT.reshape(1, -1)
        near_1M = rows_at(own_1T, blocks.tokens, "tokens of blocks", blocks.tokens_wanted)
        ids_M = torch.cat((own_1T, near_1M, own_1T.new_zeros(1, 1)), dim=1)[0]
        x_1ND = self._embed_blocks(ids_M[blocks.on(device, "of_blocks_NC")])[None]
        after_1ND, _, observed = self.run(x_1ND, blocks.blocks)
        near_1MD = rows_at(after_1ND, blocks.blocks, "blocks before", blocks.blocks_wanted)
        known_MD = torch.cat((self.first_context()[None], after_1ND[0], near_1MD[0]))
        before_GD = known_MD.index_select(0, blocks.on(device, "before_G"))
        h_GCD, _ = self._groups(before_GD, ids_M[blocks.on(device, "of_groups_GC")])
        h_TD = h_GCD.flatten(0, 1).index_select(0, blocks.on(device, "outputs_T"))
        return Hidden(h_TD.view(*tokens_BT.shape, h_TD.shape[1]), None, observed)

    def _embed_blocks(self, ids_NC: Tensor) -> Tensor:
        x_ND: Tensor = self.block_embed(ids_NC).flatten(-2)
        return x_ND

    def _groups(self, before_GD: Tensor, ids_GC: Tensor, keep: bool = False) -> tuple[Tensor, tuple[KVState, ...]]:
        """Hidden states of the last position of each prefix and of its tokens; with ``keep`` keys and values of all."""
        prefix_GPD = self.prefix(before_GD).view(len(before_GD), self.prefix_length, before_GD.shape[1])
        x_GJD = torch.cat((prefix_GPD, self.embed(ids_GC)), dim=1)
        none = KVState.empty(len(x_GJD), self.config.kv_heads, self.config.head_size, x_GJD)
        state = (none,) * len(self.token_layers) if keep else None
        return self._inside(x_GJD, state, self.prefix_length - 1)

    def _inside(
        self, x_GJD: Tensor, state: Sequence[KVState] | None, start: int = 0
    ) -> tuple[Tensor, tuple[KVState, ...]]:
        """Token layers over the next positions of all groups, and the hidden states from position ``start`` on."""
        past = state[0].k_BSKE.shape[1] if state else 0
        context = SequenceContext.single(1, past).extend(x_GJD.shape[1])
        kept = []
        for index, layer in enumerate(self.token_layers):
            x_GJD, layer_state, _, _ = layer(x_GJD, context, state[index] if state else None)
            kept.append(layer_state)
        return self.token_norm(x_GJD[:, start:]), tuple(kept)

    def _check_state(self, state: BlockState, context: SequenceContext) -> None:
        if context.degree > 1 or any(len(starts) > 1 for starts in context.documents):
            raise UnsupportedError("a state holds one unsharded document per row; use degree 1, no packing")
        if state.open_BR.shape[1] != context.past % self.size:
            raise ValueError(
                f"the state holds {state.open_BR.shape[1]} tokens of a block, the context has {context.past} past "
                f"tokens, which leave {context.past % self.size} beside blocks of {self.size}"
            )

    def _decode(self, tokens_BT: Tensor, context: SequenceContext, state: BlockState, last_only: bool) -> Hidden:
        """Tokens that follow ``context.past`` ones."""
        inside, opened = state.inside, state.open_BR.shape[1]
        if context.past == 0:
            before_BD = self.first_context().expand(len(tokens_BT), -1)
            _, inside = self._groups(before_BD, state.open_BR, keep=True)
        ids = torch.cat((state.open_BR, tokens_BT), dim=1)
        full, outputs = ids.shape[1] // self.size, []
        # The last token of a block is not run inside it; its hidden state is that of the prefix of the next.
        going_on = tokens_BT[:, : self.size - 1 - opened]
        if going_on.shape[1] and not (last_only and full):
            hidden, inside = self._inside(self.embed(going_on), inside)
            outputs.append(hidden)
        before = state.blocks
        if full:
            hidden, before, inside = self._close(ids, full, context.past // self.size, before, last_only)
            outputs.append(hidden)
        hidden_BTD = torch.cat(outputs, dim=1)
        hidden_BTD = hidden_BTD[:, -1:] if last_only else hidden_BTD
        return Hidden(hidden_BTD, BlockState(before, inside, ids[:, full * self.size :]))

    def _close(
        self, ids: Tensor, full: int, past: int, before: State, last_only: bool
    ) -> tuple[Tensor, State, tuple[KVState, ...]]:
        """Run ``full`` blocks of ids behind ``past`` ones, and then inside each block after one of them.

        Returns:
            Hidden states from the last token of the first of the full blocks on (of the last, with ``last_only``), the
            block decoder's state, and keys and values inside the open block.
        """
        batch, size, rest = len(ids), self.size, ids.shape[1] - full * self.size
        blocks_BNC = ids[:, : full * size].view(batch, full, size)
        context = SequenceContext.single(batch, past).extend(full)
        after_BND, blocks, _ = self.run(self._embed_blocks(blocks_BNC), context, before, last_only)
        assert blocks is not None
        groups = after_BND.shape[1]
        following = nn.functional.pad(ids[:, (full - groups + 1) * size :], (0, size - rest))
        following_GC = following.view(batch * groups, size)[:, : size - 1]
        h_GCD, kept = self._groups(after_BND.flatten(0, 1), following_GC, keep=True)
        hidden = h_GCD.reshape(batch, groups * size, -1)[:, : (groups - 1) * size + rest + 1]
        return hidden, blocks, tuple(self._open(state, groups, rest) for state in kept)

    def _open(self, state: KVState, groups: int, rest: int) -> KVState:
        """Keys and values of the last group of each sequence, up to its ``rest`` tokens."""
        last, seen = slice(groups - 1, None, groups), self.prefix_length + rest
        # Copies, so that those of all other groups are freed.
        return KVState(state.k_BSKE[last, :seen].clone(), state.v_BSKE[last, :seen].clone())


def build_native(config: Model, *, recompute: bool = False, seed: int | None = 0) -> CausalLM:
    """The decoder that a model section describes; arguments and errors as those of :class:`CausalLM`."""
    kind = CausalLM if config.block is None else BlockTransformer
    return kind(config, recompute=recompute, seed=seed)


def _inside(config: Model) -> Model:
    """The section as the layers inside blocks read it: softmax in all of them, with a bias where blocks have one."""
    plain: dict[str, Any] = {
        "mixer": "softmax",
        "layers": None,
        "mixer_options": {"softmax": {"kv_bias": True}} if config.kv_bias else {},
        "block": None,
        "num_layers": config.token_layers,
    }
    return config.model_copy(update=plain)
