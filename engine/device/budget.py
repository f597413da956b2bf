"""A memory budget as the artist writes it, and bytes as the artist reads them."""

from __future__ import annotations

GIB = 2**30
AUTO = "auto"
BUDGETS = (AUTO, "1 GB", "2 GB", "3 GB", "4 GB", "6 GB", "8 GB", "12 GB", "16 GB", "24 GB")


def parse_budget(budget: str) -> int | None:
    """Bytes of a budget such as "4 GB"; None for "auto".

    Raises:
        ValueError: it is neither.
    """
    if budget == AUTO:
        return None
    number, _, unit = budget.partition(" ")
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if unit != "GB" or not size > 0:
        raise ValueError(f'memory_budget is {budget!r}; write "auto" or a size such as "4 GB".')
    return int(size * GIB)


def size(count: float) -> str:
    """Bytes in words: 12.3 GiB, 340 MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"
