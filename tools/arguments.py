"""Checks of arguments that several tools share."""


def check_least(least: int, **numbers: int | None) -> None:
    """Raise ValueError, with its name and value, at the first of `numbers` below `least`; None stands for not given."""
    for name, value in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} is too small; it must be at least {least}")
