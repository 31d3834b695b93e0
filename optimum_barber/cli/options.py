"""Types of options that leave the complaint about a bad value to whoever knows what is legal."""


def number(value: str) -> float | str:
    """A float where it is one."""
    try:
        return float(value)
    except ValueError:
        return value


def whole(value: str) -> int | str:
    """An int where it is one."""
    try:
        return int(value)
    except ValueError:
        return value
