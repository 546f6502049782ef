"""Names and options that a user types: what is unknown is refused, and the nearest known one named."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def nearest(word: str, words: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" with the one of `words` that is most like `word`, or "" where none is."""
    by_lower = {each.lower(): each for each in words}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[matches[0]]!r}?)" if matches else ""


def options_of(function: Callable[..., Any], besides: Iterable[str]) -> dict[str, inspect.Parameter]:
    """Return the parameters of `function` by name, without those named in `besides`."""
    return {key: value for key, value in inspect.signature(function).parameters.items() if key not in besides}


def check_options(owner: str, given: Mapping[str, Any], known: Mapping[str, inspect.Parameter]) -> None:
    """Raise ValueError where `given` holds an option that `owner` does not know or lacks one that it needs."""
    for option, value in given.items():
        if option not in known:
            raise ValueError(
                f"{owner} has no option {option}={value!r}{nearest(option, known)}; its options are {sorted(known)}"
            )
    for option, parameter in known.items():
        if option not in given and parameter.default is parameter.empty:
            raise ValueError(f"{owner} needs the option {option}; its options are {sorted(known)}")
