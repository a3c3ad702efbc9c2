"""Diversity of a set of samples: mean distance between two of them, per entry, or LPIPS between pictures of one prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.distances import CHUNK, as_matrix
from ddil_agents.evaluation.metrics.pictures import check_pictures, digest_weights, import_optional, load_pretrained

LPIPS = "lpips_0.1_alex"  # name, in results, of the default of `lpips_distance`
TRUNKS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}  # name in LPIPS → name in torchvision


def pairwise_distance(x: Tensor) -> float:
    """Mean distance between two samples of a set, per entry; 0 if all samples are equal.

        D = mean_{i<j} ‖xᵢ − xⱼ‖/√d

    Args:
        x: Samples, (n, *shape).

    Raises:
        ValueError: fewer than 2 samples, or non-finite values.
    """
    x = as_matrix(x)
    n, d = x.shape
    if n < 2:
        raise ValueError(f"{n} samples make no pair: need at least 2")
    x = x - x.mean(0)  # cdist uses a matrix product, which loses digits where the mean is large
    total = sum(float(torch.cdist(part, x).sum()) for part in x.split(max(1, CHUNK // n)))
    return total / (n * (n - 1) * d**0.5)


def group_diversity(groups: Iterable[Tensor], distance: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean distance between samples of one group, averaged in each group and then over the groups.

        D = mean_g mean_{i<j} distance(x_gi, x_gj)

    This is the LPIPS diversity of DDIL, Section 5, with `lpips_distance`, 50 prompts of COCO 2017 and 10 samples (45 pairs) of each.

    Args:
        groups: The samples of each prompt, (k, *shape) with k ≥ 2; read one at a time, so that a generator suffices.
        distance: (p, *shape) and (p, *shape) → (p,).

    Raises:
        ValueError: no group, a group of fewer than 2 samples, or distances of another shape or not finite.
    """
    means = []
    for g, group in enumerate(groups):
        if len(group) < 2:
            raise ValueError(f"group {g} has {len(group)} samples and no pair: need at least 2")
        i, j = torch.triu_indices(len(group), len(group), 1)  # (k(k − 1)/2,) each
        distances = distance(group[i], group[j])
        bad = int((~torch.isfinite(distances)).sum())
        if distances.shape != i.shape or bad:
            raise ValueError(f"group {g} needs {len(i)} finite distances; got shape {tuple(distances.shape)}, {bad} of them not finite")
        means.append(float(distances.double().mean()))
    if not means:
        raise ValueError("no groups: need at least 1")
    return sum(means) / len(means)


def lpips_distance(
    weights_dir: Path | None = None, net: str = "alex", device: str | torch.device = "cpu", batch_size: int = 32
) -> LPIPSDistance:
    """LPIPS (Zhang et al. 2018, version 0.1), as the `lpips` package computes it.

    Args:
        weights_dir: torchvision's weights of the trunk, or a folder that holds them: `alexnet-owt-7be5be79.pth`,
            `vgg16-397923af.pth`, `squeezenet1_1-b8a52dc0.pth`, or one of these as safetensors; None downloads them. The package
            contains the linear heads.
        net: Trunk: `alex`, `vgg` or `squeeze`. Values of different trunks are not comparable.
        device: Where the network runs.
        batch_size: Pairs in one forward.

    Returns:
        The distance.

    Raises:
        ImportError: without the `eval` extra.
        ValueError: the trunk is unknown, or its weights are absent, unsafe or of another network.
    """
    if net not in TRUNKS:
        raise ValueError(f"unknown trunk {net!r}; choose one of: {', '.join(TRUNKS)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision warns of an argument that lpips passes
        network = import_optional("lpips").LPIPS(net=net, pnet_rand=True, verbose=False)
    url = getattr(import_optional("torchvision.models"), TRUNKS[net]).IMAGENET1K_V1.url
    load_pretrained(
        network.net, weights_dir, url, source=lambda name: "features." + name.partition(".")[2]
    )  # slice2.3.weight → features.3.…
    network.eval().requires_grad_(False).to(device)

    return LPIPSDistance(network, device, batch_size)


class LPIPSDistance:
    """Distances of uint8 pictures by a network of LPIPS, (p, height, width, 3) and (p, height, width, 3) → (p,) float32 on the CPU.

    Args:
        network: The network.
        device: Where it is.
        batch_size: Pairs in one forward.

    Attributes:
        weights: A digest of its weights.
    """

    def __init__(self, network: Any, device: str | torch.device, batch_size: int) -> None:
        self.network, self.device, self.batch_size = network, device, batch_size
        self.weights = digest_weights(network)

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        check_pictures(a)
        check_pictures(b)
        if a.shape != b.shape:
            raise ValueError(f"pictures of shapes {tuple(a.shape)} and {tuple(b.shape)}: LPIPS compares pairs of one size")
        pairs = zip(a.split(self.batch_size), b.split(self.batch_size), strict=True)
        return torch.cat([self.network(self._scale(x), self._scale(y)).flatten().cpu() for x, y in pairs])

    def _scale(self, pictures: Tensor) -> Tensor:
        """Scales uint8 pictures (b, h, w, 3) to [−1, 1], (b, 3, h, w)."""
        return pictures.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
