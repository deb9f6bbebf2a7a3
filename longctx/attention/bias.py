"""The explicit attention bias: one learned key and value per kv head that every query also sees.

Massive Activations (Sun et al., arXiv 2402.17762, section 4.3): ``softmax([q K^T, q k'] * scale) [V; v']``. The pair is
no rank's token: it enters each row once, on the rank whose row it is and after all keys; the backward of the keys needs
nothing but the final output and log-sum-exp. Its gradient on a rank is that of the rank's own rows.

Legend: N = B*T flattened query rows, H query heads, K kv heads, E head dim; ``bias_2HE`` is k' and v' of every head.
"""

import torch

from longctx.attention.kernels import Scoring


def by_query_head(bias_2KE: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """The pair of its kv head for every query head, [2, H, E].

    Raises:
        ValueError: it is no pair per kv head.
    """
    if bias_2KE is None:
        return None
    if bias_2KE.dim() != 3 or bias_2KE.shape[0] != 2 or heads % bias_2KE.shape[1]:
        raise ValueError(f"bias_2KE of shape {tuple(bias_2KE.shape)}; give one key and one value per kv head")
    return bias_2KE.repeat_interleave(heads // bias_2KE.shape[1], dim=1)


def add_bias_(
    out_NHE: torch.Tensor, lse_NH: torch.Tensor, q_NHE: torch.Tensor, bias_2HE: torch.Tensor, scoring: Scoring
) -> None:
    """Let every row also see the pair, in place; once per row. Accumulators are fp32 or fp64."""
    score_NH = _scores(q_NHE, bias_2HE, scoring, lse_NH.dtype)
    # A row that saw nothing has -inf and takes all of the value; a score is finite.
    weight_NH1 = torch.sigmoid(score_NH - lse_NH)[..., None]
    out_NHE.mul_(1 - weight_NH1).add_(weight_NH1 * bias_2HE[1].to(lse_NH.dtype))
    torch.logaddexp(lse_NH, score_NH, out=lse_NH)


def bias_gradients(
    dout_NHE: torch.Tensor, q_NHE: torch.Tensor, out_NHE: torch.Tensor, lse_NH: torch.Tensor,
    bias_2HE: torch.Tensor | None, scoring: Scoring, dq_NHE: torch.Tensor,
) -> torch.Tensor | None:  # fmt: skip
    """Gradient [2, H, E] of the pair, if there is one, by these rows; its share of dq is added to ``dq_NHE``.

    ``out`` and ``lse`` are final: the pair is in them.
    """
    if bias_2HE is None:
        return None
    wide = lse_NH.dtype
    key_HE, value_HE = bias_2HE.to(wide)
    dout = dout_NHE.to(wide)
    score_NH = _scores(q_NHE, bias_2HE, scoring, wide)
    weight_NH = torch.exp(score_NH - lse_NH)
    dvalue_HE = torch.einsum("nh,nhe->he", weight_NH, dout)
    dscore_NH = weight_NH * (torch.einsum("nhe,he->nh", dout, value_HE) - (dout * out_NHE.to(wide)).sum(-1))
    if scoring.softcap is not None:
        dscore_NH = dscore_NH * (1 - (score_NH / scoring.softcap).square())
    dscore_NH = dscore_NH * scoring.scale
    dq_NHE += dscore_NH[..., None] * key_HE
    dkey_HE = torch.einsum("nh,nhe->he", dscore_NH, q_NHE.to(wide))
    return torch.stack((dkey_HE, dvalue_HE)).to(bias_2HE.dtype)


def _scores(q_NHE: torch.Tensor, bias_2HE: torch.Tensor, scoring: Scoring, wide: torch.dtype) -> torch.Tensor:
    score_NH = torch.einsum("nhe,he->nh", q_NHE.to(wide), bias_2HE[0].to(wide)) * scoring.scale
    return score_NH if scoring.softcap is None else scoring.softcap * torch.tanh(score_NH / scoring.softcap)
