"""Dead and redundant dimensions of an embedding.

Shape legend: N images, F feature width, L live dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RANKME_EPSILON = 1e-7


@dataclass(frozen=True)
class Dimensions:
    """What the features of many images fill of their space.

    - `eigenvalues`: of the covariance, descending
    - `effective_rank`: exp of the entropy of the eigenvalues' shares (Roy & Vetterli 2007)
    - `rankme`: the same of the singular values of the features, not centred (Garrido et al. 2023)
    - `participation_ratio`: (sum of the eigenvalues)^2 / sum of their squares
    - `dead`: numbers of the dimensions that hardly vary; all that follow count the others
    - `mean_correlation`: mean |correlation| of two dimensions; `redundant_pairs`: those above the limit
    - `norms`: mean, standard deviation, least and largest of the features' lengths
    """

    images: int
    width: int
    eigenvalues: list[float]
    effective_rank: float
    rankme: float
    participation_ratio: float
    dead: list[int]
    mean_correlation: float
    redundant_pairs: int
    pairs: int
    most_correlated: tuple[int, int, float] | None
    norms: dict[str, float]


def measure_dimensions(features_NF: Tensor, dead_share: float, correlated: float) -> Dimensions:
    """All of `Dimensions` from features of any floating type; sums are float64.

    No rank can be above N - 1, so few images hide dimensions.
    """
    features_NF = features_NF.double()
    centred_NF = features_NF - features_NF.mean(dim=0)
    covariance_FF = centred_NF.T @ centred_NF / (len(centred_NF) - 1)
    eigenvalues_F = torch.linalg.eigvalsh(covariance_FF).flip(0).clamp_(min=0)
    deviation_F = covariance_FF.diagonal().sqrt()
    is_dead_F = deviation_F <= dead_share * deviation_F.median()

    live_L = (~is_dead_F).nonzero()[:, 0]
    scale_L = deviation_F[live_L]
    correlation_LL = (covariance_FF[live_L][:, live_L] / scale_L / scale_L[:, None]).abs_()
    upper_P = torch.triu_indices(len(live_L), len(live_L), offset=1)
    correlation_P = correlation_LL[upper_P[0], upper_P[1]]
    most = None
    if len(correlation_P):
        at = int(correlation_P.argmax())
        first, second = (int(live_L[place]) for place in upper_P[:, at])
        most = first, second, float(correlation_P[at])
    norms_N = features_NF.norm(dim=1)
    return Dimensions(
        images=len(features_NF),
        width=features_NF.shape[1],
        eigenvalues=eigenvalues_F.tolist(),
        effective_rank=_exp_entropy(eigenvalues_F / eigenvalues_F.sum().clamp(min=1e-300)),
        rankme=_rankme(features_NF),
        participation_ratio=_participation(eigenvalues_F),
        dead=is_dead_F.nonzero()[:, 0].tolist(),
        mean_correlation=float(correlation_P.mean()) if len(correlation_P) else 0.0,
        redundant_pairs=int((correlation_P > correlated).sum()),
        pairs=len(correlation_P),
        most_correlated=most,
        norms={
            "mean": float(norms_N.mean()),
            "std": float(norms_N.std()),
            "min": float(norms_N.min()),
            "max": float(norms_N.max()),
        },
    )


def _rankme(features_NF: Tensor) -> float:
    singular = torch.linalg.svdvals(features_NF)
    return _exp_entropy(singular / singular.sum().clamp(min=1e-300) + RANKME_EPSILON)


def _exp_entropy(shares: Tensor) -> float:
    """e to the power of -sum p log p, where 0 log 0 is 0."""
    return float(torch.special.entr(shares).sum().exp())


def _participation(eigenvalues_F: Tensor) -> float:
    return float(eigenvalues_F.sum() ** 2 / eigenvalues_F.square().sum().clamp(min=1e-300))
