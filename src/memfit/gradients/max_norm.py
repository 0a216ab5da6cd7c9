"""Gradients divided by their largest element, so that steps keep their size whatever the samples are like.

Source: Gural, Nadeau, Tikekar, Murmann, "Low-Rank Training of Deep Neural Networks for Emerging Memory Technology",
arXiv 2009.03887.
"""

from __future__ import annotations

BETA = 0.999  # of the moving average
FLOOR = 1e-4


def max_norm(largest: float, average: float, number: int) -> tuple[float, float]:
    """What to divide a gradient by: its largest element or the moving average of those, whichever is larger.

    Without the average, a gradient of noise would be blown up to the size of all others.

    Args:
        largest: the gradient's largest magnitude.
        average: the second result for the gradient before; 0 at first.
        number: of this gradient, from 1: the average is corrected for its start at 0.

    Returns:
        The divisor, 1e-4 at least, and the new average.
    """
    average = BETA * average + (1 - BETA) * largest
    return max(largest, average / (1 - BETA**number), FLOOR), average
