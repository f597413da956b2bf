"""Linear fits by second moments, in double precision: principal components and ridge regression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def principal(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest principal components [count, n] of rows [m, n], and their mean [n]."""
    mean = rows.mean(0)
    centred = (rows - mean).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors.flip(1)[:, :count].T.float(), mean


@dataclass(frozen=True)
class Fit:
    """y = mean_y + (x - mean_x) weights.

    Args:
        weights: [n, p].
        mean_x, mean_y: [n] and [p].
        covariance: of the fitted y, [p, p].
        error: mean squared, in units of y's mean variance, on the rows that were fitted.
    """

    weights: Tensor
    mean_x: Tensor
    mean_y: Tensor
    covariance: Tensor
    error: float


class Ridge:
    """A regression of y [m, p] from x [m, n] whose rows come in parts.

    Products are summed about the first part's mean, so that what hardly varies about a large mean
    survives the rounding of single precision.
    """

    def __init__(self) -> None:
        self.rows = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        if not self.rows:
            self.about = torch.cat([x.mean(0), y.mean(0)])
            self.inputs = x.shape[1]
            self.sums = torch.zeros(len(self.about)).double()
            self.products = torch.zeros(len(self.about), len(self.about)).double()
        part = torch.cat([x, y], dim=1) - self.about
        self.rows += len(part)
        self.sums += part.double().sum(0)
        self.products += part.T @ part

    def solve(self, penalty: float) -> Fit:
        """The fit whose weights are small, too.

        Args:
            penalty: on their squares, in units of the inputs' mean variance.
        """
        mean = self.sums / self.rows
        covariance = self.products / self.rows - torch.outer(mean, mean)
        n, mean = self.inputs, mean + self.about
        xx, xy, yy = covariance[:n, :n], covariance[:n, n:], covariance[n:, n:]
        load = penalty * xx.diagonal().mean() * torch.eye(n).double()
        weights = torch.linalg.solve(xx + load, xy)
        given = weights.T @ xx @ weights
        error = (yy - 2 * weights.T @ xy + given).diagonal().mean()
        return Fit(
            weights.float(),
            mean[:n].float(),
            mean[n:].float(),
            given.float(),
            float(error / yy.diagonal().mean()),
        )
