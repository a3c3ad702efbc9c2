"""Features that remember whose they are, so that a number never mixes two extractors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one extractor; every metric takes them where it takes a tensor, and refuses a pair of two extractors.

    Attributes:
        extractor: The extractor's name.
        values: Its features, (n, d).
    """

    extractor: str
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> Features:
        return Features(self.extractor, self.values[rows])


def check_same(a: Features, b: Features) -> None:
    """Refuses features of two extractors.

    Raises:
        ValueError: the names differ.
    """
    if a.extractor != b.extractor:
        raise ValueError(f"features of {a.extractor!r} against features of {b.extractor!r}: extract both sets with one extractor")


def values_of(x: Tensor | Features) -> Tensor:
    return x.values if isinstance(x, Features) else x


def comparable_values(a: Tensor | Features, b: Tensor | Features) -> tuple[Tensor, Tensor]:
    """The values of two sets that may be compared.

    Raises:
        ValueError: features of two extractors, or of one against a tensor that does not say whose it is.
    """
    if isinstance(a, Features) and isinstance(b, Features):
        check_same(a, b)
    elif isinstance(a, Features) or isinstance(b, Features):
        named = a if isinstance(a, Features) else b
        assert isinstance(named, Features)
        raise ValueError(f"features of {named.extractor!r} against a bare tensor: wrap it, Features(extractor.name, tensor)")
    return values_of(a), values_of(b)
