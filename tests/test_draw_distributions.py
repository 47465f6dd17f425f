"""20,000 draws are distributed as torchvision's own samplers and the authors' blur draw them.

Each test compares many statistics and asks of the smallest p-value that it exceeds 1 % divided by their
number (Bonferroni): samplers of the very same distribution would fail for one in a hundred seeds. That this
is enough to see a wrong sampler is tested too.

Shape legend: N samples.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
from torchvision import transforms

from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig, ViewConfig
from pipelines.draw import draw_views

N = 20_000
ALPHA = 0.01
CONFIG = AugmentConfig()
SIZES = (375, 500), (40, 300), (33, 32)  # of ImageNet's shape; one that no try may fit; a small one
FACTORS = ("brightness_VN", "contrast_VN", "saturation_VN", "hue_VN")


def draw(
    config: AugmentConfig, seed: int = 0, epoch: int = 0, size: tuple[int, int] = SIZES[0]
) -> ViewParams:
    return draw_views(config.views, seed, epoch, np.arange(N), np.full(N, size[0]), np.full(N, size[1]))


def both_views(**settings: object) -> AugmentConfig:
    return AugmentConfig(view_a=ViewConfig(**settings), view_b=ViewConfig(**settings))


def homogeneity(ours_N: np.ndarray, theirs_N: np.ndarray) -> float:
    """p-value of the chi-square test that two samples of whole numbers come from one distribution.

    Values seen fewer than 20 times are counted as one.
    """
    labels = np.unique(np.concatenate([ours_N, theirs_N]), return_inverse=True)[1]
    rare = np.bincount(labels) < 20
    cells = np.where(rare, 0, np.cumsum(~rare))[labels]
    table = np.stack(
        [np.bincount(part, minlength=cells.max() + 1) for part in np.split(cells, [len(ours_N)])]
    )
    table = table[:, table.sum(0) > 0].astype(float)
    if table.shape[1] == 1:
        return 1.0
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    halves = torch.tensor([table.shape[1] - 1, statistic], dtype=torch.float64) / 2
    return torch.special.gammaincc(*halves).item()


def smirnov(ours_N: np.ndarray, theirs_N: np.ndarray) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test, by the asymptotic formula."""
    both_N = np.concatenate([ours_N, theirs_N])
    a, b = (np.searchsorted(np.sort(x), both_N, side="right") / len(x) for x in (ours_N, theirs_N))
    z = abs(a - b).max() * math.sqrt(len(ours_N) * len(theirs_N) / len(both_N))
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * z) ** 2) for k in range(1, 101)))


@cache
def torchvision_switch(name: str, p: float) -> np.ndarray:
    """Whether torchvision's transform acted, N times; on an image of one row, black and red."""
    image = torch.zeros(3, 1, 2)
    image[0, 0, 1] = 1
    transform = {
        "flip_VN": lambda: transforms.RandomHorizontalFlip(p),
        "jitter_VN": lambda: transforms.RandomApply([torch.neg], p),
        "grayscale_VN": lambda: transforms.RandomGrayscale(p),
        "blur_VN": lambda: transforms.RandomApply([torch.neg], p),
        "solarize_VN": lambda: transforms.RandomSolarize(0.5, p),
    }[name]()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return np.array([not torch.equal(transform(image), image) for _ in range(N)])


@cache
def torchvision_jitter() -> tuple[np.ndarray, np.ndarray]:
    """The order, as one number, and the four factors of N draws of ColorJitter at the paper's strengths."""
    jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    with torch.random.fork_rng():
        torch.manual_seed(2)
        drawn = [transforms.ColorJitter.get_params(*ranges) for _ in range(N)]
    orders = torch.stack([order for order, *_ in drawn]).numpy() @ [64, 16, 4, 1]
    return orders, np.array([factors for _, *factors in drawn]).T


@cache
def torchvision_boxes(size: tuple[int, int]) -> np.ndarray:
    """Top, left, height and width of N draws of RandomResizedCrop, (N, 4)."""
    image = torch.empty(1).expand(3, *size)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return np.array(
            [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(N)]
        )


def cells_of(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """The joint distribution of `a` and `b`, in 6 x 6 cells cut at the quantiles of `of_a` and `of_b`."""
    edges = np.linspace(0, 1, 7)[1:-1]
    return np.digitize(a, np.quantile(of_a, edges)) * 6 + np.digitize(b, np.quantile(of_b, edges))


def p_values(config: AugmentConfig, seed: int) -> dict[str, float]:
    """Every comparison of both views drawn from `config` with the samplers of the default configuration."""
    found = {}
    for v, default in enumerate(CONFIG.views):
        params = {name: value[v].numpy() for name, value in vars(draw(config, seed)).items()}
        for name in ("flip_VN", "jitter_VN", "grayscale_VN", "blur_VN", "solarize_VN"):
            theirs = torchvision_switch(name, getattr(default, name.replace("_VN", "_p")))
            found[f"{v} {name}"] = homogeneity(params[name] > 0, theirs)

        jittered = params["jitter_VN"]
        orders, factors = torchvision_jitter()
        found[f"{v} order"] = homogeneity(params["order_VN4"][jittered] @ [64, 16, 4, 1], orders)
        for name, theirs in zip(FACTORS, factors, strict=True):
            found[f"{v} {name}"] = smirnov(params[name][jittered], theirs)
        sigma = params["blur_VN"][params["blur_VN"] > 0]
        theirs = 0.1 + 1.9 * np.random.default_rng(4).random(N)  # the authors' `GaussianBlur`
        found[f"{v} sigma"] = smirnov(sigma, theirs)

        for size in SIZES:
            ours = draw(config, seed, size=size).box_VN4[v].numpy()
            columns = {
                "area and ratio": lambda box: (box[:, 2] * box[:, 3], box[:, 3] / box[:, 2]),
                "top and left": lambda box: (box[:, 0], box[:, 1]),
                "height and top": lambda box: (box[:, 2], box[:, 0]),
                "width and left": lambda box: (box[:, 3], box[:, 1]),
            }
            theirs = torchvision_boxes(size)
            areas = (box[:, 2] * box[:, 3] for box in (ours, theirs))
            found[f"{v} area in {size}"] = smirnov(*areas)
            for name, of in columns.items():
                found[f"{v} {name} in {size}"] = homogeneity(
                    cells_of(*of(ours), *of(theirs)), cells_of(*of(theirs), *of(theirs))
                )
    return found


def test_draws_are_distributed_as_torchvisions() -> None:
    found = p_values(CONFIG, seed=0)
    assert len(found) == 52
    worst = min(found, key=found.get)
    assert found[worst] > ALPHA / len(found), (worst, found[worst])
    for v, view in enumerate(CONFIG.views):  # what is certain or impossible
        for name, p in {"blur_VN": view.blur_p, "solarize_VN": view.solarize_p}.items():
            if p in (0, 1):
                assert ((getattr(draw(CONFIG), name)[v] > 0) == p).all(), name


def test_slightly_wrong_distributions_would_be_seen() -> None:
    wrong = {
        "flip_p": 0.53,
        "jitter_p": 0.78,
        "brightness": 0.43,
        "contrast": 0.43,
        "saturation": 0.22,
        "hue": 0.11,
        "grayscale_p": 0.22,
        "blur_sigma": (0.1, 2.1),
    }
    view_a = ViewConfig(crop_scale=(0.12, 1.0), **wrong)
    view_b = ViewConfig(crop_ratio=(3 / 4, 1.4), blur_p=0.12, solarize_p=0.22)
    found = p_values(AugmentConfig(view_a=view_a, view_b=view_b), seed=0)
    seen = {name for name, p in found.items() if p < ALPHA / len(found)}
    assert seen >= {
        *("0 flip_VN", "0 jitter_VN", "0 grayscale_VN", "0 sigma", "1 blur_VN", "1 solarize_VN"),
        *(f"0 {factor}" for factor in FACTORS),
        *("0 area in (375, 500)", "1 area and ratio in (375, 500)"),
    }
    assert not seen & {"1 flip_VN", "1 jitter_VN", "1 grayscale_VN", "1 sigma", "1 order"}


@pytest.mark.parametrize(
    ("p", "names", "num_tied"),
    [
        (1.0, (*FACTORS, "first operation", "blur_VN"), 1),
        # Of the numbers that are constant without jitter or blur, the factors alone keep their means then.
        (0.5, (*FACTORS, "jitter_VN", "blurred"), 7),
    ],
    ids=["numbers", "switches"],
)
def test_views_samples_epochs_and_seeds_are_drawn_independently(
    p: float, names: tuple[str, ...], num_tied: int
) -> None:
    """Correlations of every number with every other: within a view, and with those of another stream.

    `p` is that of jitter and blur; flip, grayscale and solarize have 0.5. `num_tied` pairs of a view's
    numbers depend on each other: tries that do not fit into the image tie the area to the ratio, and a jitter
    that may be missing ties its factors.
    """
    config = both_views(jitter_p=p, grayscale_p=0.5, blur_p=p, solarize_p=0.5)
    params = draw(config)
    streams = [
        (params, 0, 0),
        (params, 1, 0),  # the other view
        (params, 0, 1),  # the next sample
        (draw(config, epoch=1), 0, 0),
        (draw(config, seed=1), 0, 0),
        (draw(config, seed=2**32), 0, 0),
    ]
    rows, labels = [], []
    for stream, (params, v, shift) in enumerate(streams):
        of = {name: value[v].double().roll(shift, 0) for name, value in vars(params).items()}
        height, width = of["box_VN4"][:, 2], of["box_VN4"][:, 3]
        numbers = {
            "area": height * width,
            "ratio": width / height,
            **{name: of[name] for name in ("flip_VN", "grayscale_VN", "solarize_VN")},
        }
        of |= {"first operation": of["order_VN4"][:, 0], "blurred": (of["blur_VN"] > 0).double()}
        numbers |= {name: of[name] for name in names}
        rows += numbers.values()
        labels += [(stream, name) for name in numbers]
    correlation = torch.corrcoef(torch.stack(rows))
    significance = torch.special.erfc(correlation.abs() * math.sqrt(N / 2))
    tied = [{"area", "ratio"}, set(FACTORS if p < 1 else ())]
    pairs = [
        (significance[i, j].item(), labels[i], labels[j])
        for i in range(len(labels))
        for j in range(i)
        if labels[i][0] != labels[j][0] or not any({labels[i][1], labels[j][1]} <= group for group in tied)
    ]
    count = len(streams) * (5 + len(names))
    assert len(pairs) == count * (count - 1) // 2 - num_tied * len(streams)
    assert min(pairs)[0] > ALPHA / len(pairs), min(pairs)
