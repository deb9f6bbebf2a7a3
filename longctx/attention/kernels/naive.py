"""The oracle: dense attention of one block, every score held. Works in any floating dtype on any device.

Output and gradients stay in the wide dtype, so that partial results are not rounded before they are joined.
"""

import torch

from longctx.attention.kernels.base import Gradients, Kernel, Scoring
from longctx.sequence.plan import Mask


def _scores(
    q_NHE: torch.Tensor, k_MKE: torch.Tensor, mask: Mask, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Masked scores [H, N, M], and where they are capped their derivative by the uncapped ones."""
    wide = torch.promote_types(q_NHE.dtype, torch.float32)
    groups = q_NHE.shape[1] // k_MKE.shape[1]
    k_MHE = k_MKE.to(wide).repeat_interleave(groups, dim=1)
    scores_HNM = torch.einsum("nhe,mhe->hnm", q_NHE.to(wide), k_MHE) * scoring.scale
    slope_HNM = None
    if scoring.softcap is not None:
        tanh_HNM = torch.tanh(scores_HNM / scoring.softcap)
        scores_HNM, slope_HNM = tanh_HNM * scoring.softcap, 1 - tanh_HNM * tanh_HNM
    if mask == "full":
        return scores_HNM, slope_HNM
    ones = torch.ones(scores_HNM.shape[1:], dtype=torch.bool, device=q_NHE.device)
    visible = ones.tril() if mask == "causal" else ones.triu()
    return scores_HNM.masked_fill(~visible, float("-inf")), slope_HNM


def forward(
    q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, mask: Mask, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    scores_HNM, _ = _scores(q_NHE, k_MKE, mask, scoring)
    lse_HN = scores_HNM.logsumexp(-1)
    weights_HNM = torch.exp(scores_HNM - lse_HN.masked_fill(lse_HN.isneginf(), 0)[..., None])
    v_MHE = v_MKE.to(weights_HNM.dtype).repeat_interleave(q_NHE.shape[1] // k_MKE.shape[1], dim=1)
    return torch.einsum("hnm,mhe->nhe", weights_HNM, v_MHE), lse_HN.T


def backward(
    dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
    out_NHE: torch.Tensor, lse_NH: torch.Tensor, mask: Mask, scoring: Scoring,
) -> Gradients:  # fmt: skip
    wide = lse_NH.dtype
    groups = q_NHE.shape[1] // k_MKE.shape[1]
    lse_HN = lse_NH.T
    scores_HNM, slope_HNM = _scores(q_NHE, k_MKE, mask, scoring)
    weights_HNM = torch.exp(scores_HNM - lse_HN.masked_fill(lse_HN.isneginf(), 0)[..., None])
    dout, q, out = dout_NHE.to(wide), q_NHE.to(wide), out_NHE.to(wide)
    k_MHE, v_MHE = (t.to(wide).repeat_interleave(groups, dim=1) for t in (k_MKE, v_MKE))
    delta_HN = (dout * out).sum(-1).T
    dscores_HNM = weights_HNM * (torch.einsum("nhe,mhe->hnm", dout, v_MHE) - delta_HN[..., None]) * scoring.scale
    if slope_HNM is not None:
        dscores_HNM *= slope_HNM
    dq_NHE = torch.einsum("hnm,mhe->nhe", dscores_HNM, k_MHE)
    dk_MHE = torch.einsum("hnm,nhe->mhe", dscores_HNM, q)
    dv_MHE = torch.einsum("hnm,nhe->mhe", weights_HNM, dout)
    dk, dv = (t.view(t.shape[0], -1, groups, t.shape[2]).sum(2) for t in (dk_MHE, dv_MHE))
    return dq_NHE, dk, dv


NAIVE = Kernel(
    "naive", frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}), forward, backward,
    tile=(1024, 1024), softcaps=True,
)  # fmt: skip
