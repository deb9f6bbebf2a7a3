"""What a few tokens tell about a model that was just attached; it names no architecture and so knows them all.

1. Every module computes what it computed with the model's own attention.
2. The order of a shard's tokens does not matter: all that mixes tokens is our attention, all positions are those given.
3. A document does not depend on the one before it.
4. A token does not depend on those after it.

Modules are compared at their own scale, on the tokens that must not have changed. The first one whose inputs agree and
whose outputs differ is the culprit. Windows are longer than a probe: the mask function checks them at any length.

Legend: B batch, T tokens, S global tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longctx.errors import LongctxError, UnsupportedError, first_line
from longctx.model.attach_attention import MissingContextError, PlannedMask
from longctx.model.attach_cache import NAME
from longctx.model.attach_rotary import length_dependent, length_of
from longctx.runtime.mesh import Group
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Layout, Run, contiguous
from longctx.sequence.plan import AttentionPlan

LENGTH, CUT = 13, 5
"""Tokens of a probe, a prime that no feature size has, and where it is cut."""
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""In fp64 too transformers computes softmax and norms in fp32."""
_COARSE = 5e-2


@dataclass(frozen=True, eq=False)
class WatchedContext(SequenceContext):
    """A context that counts how often attention asked for a plan."""

    asked: list[int] = field(default_factory=list)

    def plan(self, causal: bool = True, window: int | None = None) -> AttentionPlan:
        self.asked.append(1)
        return super().plan(causal, window)


Call = tuple[str, int]
"""Name of a module and which of its calls in one forward."""


@dataclass
class Trace:
    """What the module calls of one forward got and gave, in the order in which they ended."""

    inputs: dict[Call, list[Tensor]] = field(default_factory=dict)
    outputs: dict[Call, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        call = (name, sum(known == name for known, _ in self.outputs))
        self.inputs[call], self.outputs[call] = inputs, outputs


def probe(model: nn.Module, switch: Callable[[str], None]) -> None:
    """Compare the attached model with itself under its own attention ("eager") and with altered inputs.

    Args:
        switch: sets the attention implementation by name.

    Raises:
        UnsupportedError: the model cannot be sharded; the sentence names what stands in the way.
    """
    tokens_BT, changed_BT = _tokens(model)
    with _undisturbed(model):
        switch("eager")
        try:
            wanted = _reference(model, tokens_BT)
        finally:
            switch(NAME)
        whole = _context()
        found = _run(model, tokens_BT, whole)
        _check_calls(model, whole)
        _compare(model, wanted, found, slice(0, LENGTH), "computes something else than with its own attention")
        _check_order(model, tokens_BT, found)
        _check_documents(model, tokens_BT, changed_BT)
        later_BT = torch.cat((tokens_BT[:, :CUT], changed_BT[:, CUT:]), dim=1)
        _compare(model, found, _run(model, later_BT, _context()), slice(0, CUT), "lets a token see those after it")


def _check_calls(model: nn.Module, context: WatchedContext) -> None:
    if not context.asked:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention that goes through transformers' AttentionInterface, and longctx "
            "can shard nothing else"
        )


def _check_order(model: nn.Module, tokens_BT: Tensor, found: Trace) -> None:
    # One rank that holds the end before the beginning: one document, so that its plan stays a plan.
    layout = Layout(LENGTH, ((Run(CUT, LENGTH), Run(0, CUT)),))
    context = WatchedContext(Group(0, (0,)), layout, ((0,),))
    moved = _run(model, context.shard(tokens_BT), context)
    order = [*range(LENGTH - CUT, LENGTH), *range(LENGTH - CUT)]
    sides = (moved.inputs, moved.outputs)
    back = Trace(*({call: [_select(t, order) for t in ts] for call, ts in side.items()} for side in sides))
    what = "mixes tokens outside of attention, or takes their order from elsewhere than position_ids"
    _compare(model, found, back, slice(0, LENGTH), what)


def _check_documents(model: nn.Module, tokens_BT: Tensor, changed_BT: Tensor) -> None:
    first_BT = torch.cat((changed_BT[:, :CUT], tokens_BT[:, CUT:]), dim=1)
    found, wanted = (_run(model, tokens, _context(((0, CUT),))) for tokens in (first_BT, tokens_BT))
    what = "mixes tokens of different documents outside of attention"
    _compare(model, wanted, found, slice(CUT, LENGTH), what)


def _context(documents: tuple[tuple[int, ...], ...] = ((0,),)) -> WatchedContext:
    return WatchedContext(Group(0, (0,)), contiguous(LENGTH, 1), documents)


def _reference(model: nn.Module, tokens_BT: Tensor) -> Trace:
    positions_BT = torch.arange(LENGTH, device=tokens_BT.device)[None]
    with _recorded(model) as trace:
        _call(model, tokens_BT, position_ids=positions_BT, use_cache=False)
    return trace


def _run(model: nn.Module, tokens_BT: Tensor, context: WatchedContext) -> Trace:
    with _recorded(model) as trace, _rotary_knows_length(model):
        _call(model, tokens_BT, longctx=context)
    return trace


def _call(model: nn.Module, tokens_BT: Tensor, **keywords: Any) -> None:
    """Run the model; whatever a model that is not made for this raises becomes one sentence."""
    try:
        model(tokens_BT, **keywords)
    except MissingContextError:
        raise UnsupportedError(
            f"{type(model).__name__} does not hand its keyword arguments down to attention, so the context cannot get "
            "there; a version of it that passes **kwargs through its layers is needed"
        ) from None
    except LongctxError:
        raise
    except Exception as error:
        if PlannedMask.__name__ in str(error):
            raise UnsupportedError(
                f"{type(model).__name__} computes with its attention mask ({first_line(error)}); longctx makes no mask"
            ) from error
        raise UnsupportedError(
            f"{type(model).__name__} cannot be called as model(input_ids, {', '.join(f'{k}=' for k in keywords)}): "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _compare(model: nn.Module, wanted: Trace, found: Trace, tokens: slice, what: str) -> None:
    """Refuse the model if any module's output differs on ``tokens``; name the first one whose inputs do not.

    How often a module inside of experts runs depends on all tokens; the block around it does not.
    """
    common = [call for call in found.outputs if call in wanted.outputs]
    differing = [call for call in common if not _agree(wanted.outputs[call], found.outputs[call], tokens)]
    if not differing:
        return
    to_blame = (call for call in differing if _agree(wanted.inputs[call], found.inputs[call], tokens))
    name = next(to_blame, differing[0])[0]
    culprit = model.get_submodule(name)
    raise UnsupportedError(
        f"{type(model).__name__} cannot be sharded: its module {name or 'itself'} ({type(culprit).__name__}) {what}"
    )


def _agree(wanted: Sequence[Tensor], found: Sequence[Tensor], tokens: slice) -> bool:
    """Whether what can be compared is equal on ``tokens``."""
    return all(_close(a, b, tokens) for a, b in zip(wanted, found, strict=False) if a.shape == b.shape)


def _close(wanted: Tensor, found: Tensor, tokens: slice) -> bool:
    positions = list(range(LENGTH))[tokens]
    a, b = (_select(t, positions) for t in (wanted, found))
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = _TOLERANCE.get(a.dtype, _COARSE)
    scale = a.abs().amax() if a.numel() else a.new_zeros(())
    near = (a - b).abs() <= tolerance * scale.nan_to_num(1.0, 1.0, 1.0)
    return bool((near | (a == b) | (a.isnan() & b.isnan())).all())  # infinities, and weights that give nan anyway


def _select(tensor: Tensor, positions: Sequence[int]) -> Tensor:
    return tensor.index_select(_token_dim(tensor), torch.tensor(positions, device=tensor.device))


def _token_dim(tensor: Tensor) -> int:
    return next(dim for dim, size in enumerate(tensor.shape) if size == LENGTH)


def _per_token(value: Any) -> Iterator[Tensor]:
    """Tensors [1, ... T ...] inside what modules take and give: without the batch, T may be tokens of an expert."""
    if isinstance(value, Tensor):
        if value.shape[:1] == (1,) and LENGTH in value.shape:
            yield value.detach().clone()  # some modules work in place
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _per_token(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _per_token(item)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[Trace]:
    trace = Trace()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # What comes second are attention weights, which ours does not have, and router scores.
            first = output[0] if type(output) is tuple and output else output
            trace.add(name, list(_per_token((args, _seen(kwargs)))), list(_per_token(first)))

        return hook

    handles = [m.register_forward_hook(keep(name), with_kwargs=True) for name, m in model.named_modules()]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _seen(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What says something about tokens: masks differ by design, and no module may look at them."""
    return {name: value for name, value in kwargs.items() if "mask" not in name}


@contextmanager
def _rotary_knows_length(model: nn.Module) -> Iterator[None]:
    """Refuse rotary modules that depend on the length but get positions that do not know it."""

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(positions, Tensor) or length_of(positions) is None:
            raise UnsupportedError(
                f"{type(model).__name__}: {type(module).__name__} of rope_type {getattr(module, 'rope_type', None)} "
                "cannot be told the global length of the sequence; use another rope_type"
            )

    handles = [m.register_forward_pre_hook(check, with_kwargs=True) for m in model.modules() if length_dependent(m)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes and random numbers are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(list(devices)):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _tokens(model: Any) -> tuple[Tensor, Tensor]:
    """Two samples that differ everywhere, of ids that are not special to the model."""
    config = model.config.get_text_config(decoder=True)
    special = {v for name in dir(config) if name.endswith("token_id") for v in _ids(getattr(config, name, None))}
    usual = [token for token in range(min(int(config.vocab_size), 4096)) if token not in special]
    if len(usual) < 2:
        raise UnsupportedError(f"{type(model).__name__} has fewer than two usual tokens; use a larger vocabulary")
    generator = torch.Generator().manual_seed(0)
    first_T = torch.randint(0, len(usual), (LENGTH,), generator=generator)
    second_T = (first_T + torch.randint(1, len(usual), (LENGTH,), generator=generator)) % len(usual)
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":
        raise UnsupportedError(f"{type(model).__name__} has no weights yet (meta device); load them before attaching")
    ids = torch.tensor(usual)
    return ids[first_T][None].to(device), ids[second_T][None].to(device)


def _ids(value: Any) -> list[int]:
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)]
