"""Features together with the name of their extractor, so that no metric compares features of two extractors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one extractor. Every metric accepts them in place of a tensor, and refuses two sets of different extractors.

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


def check_same_extractor(a: Features, b: Features) -> None:
    """Refuses features of different extractors.

    Raises:
        ValueError: the extractors differ.
    """
    if a.extractor != b.extractor:
        raise ValueError(f"features of {a.extractor!r} against features of {b.extractor!r}: extract both sets with one extractor")


def values_of(x: Tensor | Features) -> Tensor:
    return x.values if isinstance(x, Features) else x


def comparable_values(a: Tensor | Features, b: Tensor | Features) -> tuple[Tensor, Tensor]:
    """The values of two sets, after a check that they may be compared.

    Raises:
        ValueError: the extractors differ, or one of the sets is a tensor without the name of an extractor.
    """
    if isinstance(a, Features) and isinstance(b, Features):
        check_same_extractor(a, b)
    elif isinstance(a, Features) or isinstance(b, Features):
        named = a if isinstance(a, Features) else b
        assert isinstance(named, Features)
        raise ValueError(f"features of {named.extractor!r} against a bare tensor: wrap it, Features(extractor.name, tensor)")
    return values_of(a), values_of(b)
