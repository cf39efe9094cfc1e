"""An independent oracle: causal attention of one whole sequence in numpy, no pages, no blocks."""

from __future__ import annotations

import numpy as np


def dense_attention(
    q_TNH: np.ndarray,
    k_TKH: np.ndarray,
    v_TKH: np.ndarray,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Attends query by query and head by head in float64; slow, and hard to get wrong."""
    tokens, q_heads, head_dim = q_TNH.shape
    group = q_heads // k_TKH.shape[1]
    out = np.zeros((tokens, q_heads, head_dim))
    for t in range(tokens):
        first = max(0, t + 1 - window) if window else 0
        for n in range(q_heads):
            k_SH = k_TKH[first : t + 1, n // group].astype(np.float64)
            v_SH = v_TKH[first : t + 1, n // group].astype(np.float64)
            scores_S = k_SH @ q_TNH[t, n].astype(np.float64) * scale
            if softcap:
                scores_S = softcap * np.tanh(scores_S / softcap)
            top = scores_S.max()
            weights_S = np.exp(scores_S - top)
            sink = 0 if sinks is None else np.exp(np.float64(sinks[n]) - top)
            out[t, n] = weights_S @ v_SH / (weights_S.sum() + sink)
    return out
