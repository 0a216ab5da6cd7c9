"""Published memory technologies: what a bit costs to read and to write, and how often a cell can be written.

Figures are for the macro or chip that the source measured or modelled, and differ within a technology by orders of
magnitude: take them for comparisons, and your own device's for decisions. What a source does not say is ``None``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from memfit.errors import MemfitError


@dataclass(frozen=True)
class Technology:
    """A memory's cost and wear.

    Attributes:
        title: what it is called for people.
        endurance: writes that a cell survives.
        source: where the figures are from, and what they are of.
        read_picojoules: energy to read a bit, or None.
        write_picojoules: energy to write a bit, or None.

    Raises:
        ValueError: a figure is not a positive number.
    """

    title: str
    endurance: float
    source: str
    read_picojoules: float | None = None
    write_picojoules: float | None = None

    def __post_init__(self) -> None:
        for name in ("endurance", "read_picojoules", "write_picojoules"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 < float(value) < math.inf):
                raise ValueError(f"{name}={value!r} of {self.title} is not possible: give a positive number.")


TECHNOLOGIES: dict[str, Technology] = {
    "rram": Technology(
        title="RRAM macro",
        read_picojoules=1.76,
        write_picojoules=10.9,
        endurance=1e6,
        source="an RRAM macro, as quoted by Gural et al., Low-Rank Training of Deep Neural Networks for Emerging "
        "Memory Technology, arXiv 2009.03887, 2020: energies, and the order of magnitude of the endurance",
    ),
    "rram-mcu": Technology(
        title="RRAM of a microcontroller",
        endurance=1e4,
        source="Nordic Semiconductor, nRF54L15 product specification, RRAMC: guaranteed writes of a 128-bit word line; "
        "energy per bit is not given",
    ),
    "pcm": Technology(
        title="phase-change memory",
        read_picojoules=2.47,
        write_picojoules=16.82,
        endurance=1e8,
        source="Lee, Ipek, Mutlu and Burger, Architecting Phase Change Memory as a Scalable DRAM Alternative, ISCA "
        "2009: array reads and writes, and the endurance that they assume after a survey of prototypes",
    ),
    "mram": Technology(
        title="embedded STT-MRAM, 14 nm",
        write_picojoules=25.0,
        endurance=1e14,
        source="Samsung, World's most energy-efficient MRAM technology for non-volatile RAM applications, IEDM 2022, "
        "paper 10.7, by its announcement: energy of a written bit; of reading, only the chip's power is given",
    ),
}
"""Named presets. ``rram``, the technology of the method's paper, is the default of ``memfit nvm``."""


def technology(name: str) -> Technology:
    """The preset of this name.

    Raises:
        MemfitError: there is none.
    """
    if name not in TECHNOLOGIES:
        raise MemfitError(f"there is no memory technology {name!r}: choose from {', '.join(TECHNOLOGIES)}.")
    return TECHNOLOGIES[name]
