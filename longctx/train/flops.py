"""Model FLOPs and what share of a device's peak they are."""

from longctx.config.schema import Model

# Dense (no structured sparsity) half-precision peaks in FLOP/s, from the vendors' data sheets.
_PEAK_BF16 = {
    "A100": 312e12, "A800": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12, "GH200": 989e12,
    "H200": 989e12, "B200": 2250e12, "GB200": 2500e12, "L40S": 362e12, "MI300X": 1307e12,
}  # fmt: skip


def peak_flops(device_name: str | None, precision: str) -> float | None:
    """Peak FLOP/s of a device by its name, or None where unknown; an unknown device is never taken for another."""
    if device_name is None or precision != "bf16":
        return None
    known = sorted((name for name in _PEAK_BF16 if name in device_name), key=len)
    return _PEAK_BF16[known[-1]] if known else None


def flops_per_token(model: Model, parameters: int, length: int) -> float:
    """Forward and backward FLOPs per trained token: 6 per weight that multiplies, plus causal attention.

    The embedding is a lookup, so its weights count once, as the head. Attention is 12 * layers * heads * head_dim per
    visible key; a causal query sees ``length / 2`` keys on average, at most the layer's window or its recurrence's
    segment. What other mixers than softmax compute beside their weights does not count, nor does recomputation.
    """
    assert model.vocab_size is not None
    lookup = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    longest = min(length, model.recurrence.segment) if model.recurrence is not None else length
    softmax = [layer for layer, mixer in enumerate(model.mixers) if mixer == "softmax"]
    visible = sum(min(longest / 2, model.window(layer) or longest) for layer in softmax)
    return 6.0 * (parameters - lookup) + 12.0 * model.num_heads * model.head_size * visible
