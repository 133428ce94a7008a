"""Solutions of lesson 18."""


def affordable_rank(matrices: int, budget: int) -> int:
    """The largest rank whose LoRA-XS on so many matrices trains at most `budget` numbers."""
    return int((budget // matrices) ** 0.5)
