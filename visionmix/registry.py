"""Classes by name, modules found by themselves, and the known name nearest to a mistyped one.

Every room may import this file; it imports none of them.
"""

import difflib
import importlib
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

import torch
from torch import nn

_T = TypeVar("_T")


def close_matches(word: str, words: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return up to `count` of `words` that are most like `word`, best first, upper and lower case alike.

    A word is like another from a ratio of `cutoff` on, between 0 (any word) and 1 (the same word), as `difflib` has it.
    """
    by_lower = {each.lower(): each for each in words}
    return [by_lower[each] for each in difflib.get_close_matches(word.lower(), by_lower, count, cutoff)]


def nearest(word: str, words: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" with the one of `words` that is most like `word`, or "" where none is."""
    matches = close_matches(word, words)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def import_modules(package: str, path: Iterable[str]) -> None:
    """Import every module of `package`, which lies at `path`, so that each registers its classes or models."""
    for module in pkgutil.iter_modules(path):
        if not module.ispkg:
            importlib.import_module(f"{package}.{module.name}")


def constructor_options(cls: type, besides: Iterable[str] = ("self",)) -> dict[str, inspect.Parameter]:
    """Return the named parameters of the constructor of `cls` but for `besides`, by name.

    A constructor that ends in ``**options``, or in any such name but ``**dd``, passes them on to its parent class and
    has the parameters of that as well.
    """
    found: dict[str, inspect.Parameter] = {}
    for each in cls.__mro__:
        if "__init__" in vars(each):
            parameters = inspect.signature(vars(each)["__init__"]).parameters
            found = dict(parameters) | found
            if all(value.kind != value.VAR_KEYWORD or key == "dd" for key, value in parameters.items()):
                break
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {key: value for key, value in found.items() if key not in besides and value.kind not in variadic}


def is_int(value: object) -> bool:
    """Return whether `value` is an integer and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether `value` is a real number and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_list(value: object) -> bool:
    """Return whether `value` has entries by number: a list, a tuple, or what a configuration library has for them."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def plain(value: Any) -> Any:
    """Return numbers of NumPy, and what configuration libraries have for lists and dicts, as Python's own."""
    if type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if type(value) is tuple:
        return tuple(map(plain, value))
    if is_list(value) and not isinstance(value, tuple):
        return [plain(each) for each in value]
    return value


def is_maker(value: object) -> bool:
    """Return whether `value` is a class or function that makes layers: anything to call but a layer itself."""
    return callable(value) and not isinstance(value, nn.Module)


def check_positive(**values: float) -> None:
    """Raise TypeError or ValueError unless each of the options is a number above 0."""
    for name, value in values.items():
        if not is_number(value):
            raise TypeError(f"{name}={value!r}: give a number above 0")
        if not value > 0:
            raise ValueError(f"{name}={value}: give a number above 0")


def check_finite(*, least: float = -math.inf, **values: float) -> None:
    """Raise TypeError or ValueError unless each of the options is a finite number, and at least `least`."""
    wanted = "a number" if least == -math.inf else f"a number of {least} or more"
    for name, value in values.items():
        if not is_number(value):
            raise TypeError(f"{name}={value!r}: give {wanted}")
        if not max(least, -sys.float_info.max) <= value <= sys.float_info.max:
            raise ValueError(f"{name}={value}: give {wanted}" + (", not infinite" if value == math.inf else ""))


def factory_kwargs(
    device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, torch.device | str | torch.dtype | None]:
    """Return where parameters lie and their type, as PyTorch's modules take them.

    Raises:
        TypeError: `dtype` is no type that layers compute in, or `device` neither a device nor a name.
        ValueError: no device is called `device`.
    """
    if dtype is not None and dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(
            f"dtype={dtype!r} is no type that layers compute in; give torch.float32, bfloat16, float16 or float64"
        )
    if device is not None:
        remedy = 'give "cpu", "cuda", "cuda:1" or the like, or a torch.device'
        try:
            torch.device(device)
        except TypeError as error:
            raise TypeError(f"device={device!r} is no device; {remedy}") from error
        except RuntimeError as error:
            raise ValueError(f"device={device!r} is no device; {remedy}") from error
    return {"device": device, "dtype": dtype}


_KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: (str, "a name"),
    type(None): (type(None), "None"),
}


def check_kind(owner: str, option: str, value: Any, annotation: Any) -> None:
    """Check a value whose annotation is of truth values, numbers, names, makers and None, or several of one of them.

    Others are not checked.

    Raises:
        TypeError: it is of another kind.
        ValueError: it is NaN.
    """
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if value is None and type(None) in kinds:
        return
    if tuple[int, int] in kinds:
        if not is_list(value) or [is_int(each) and each > 0 for each in value] != [True, True]:
            raise TypeError(f"{owner}: {option}={value!r} is not two positive integers; give (rows, columns)")
        return
    if get_origin(annotation) is Sequence:
        if not isinstance(value, Sequence) or (isinstance(value, str) and get_args(annotation) != (str,)):
            raise TypeError(f"{owner}: {option}={value!r} is of type {type(value).__name__}; give a list")
        for each in () if isinstance(value, str) else value:
            check_kind(owner, option, each, *get_args(annotation))
    makers = [kind for kind in kinds if get_origin(kind) is Callable]
    kinds = [kind for kind in kinds if kind not in makers]
    if any(kind not in _KINDS for kind in kinds) or (makers and is_maker(value)):
        return
    truth = isinstance(value, bool)  # for Python a number, too
    fitting = [kind for kind in kinds if isinstance(value, _KINDS[kind][0]) and (kind is bool) == truth]
    if not fitting:
        meant = " or ".join([*(_KINDS[kind][1] for kind in kinds), *(["a class or function"] if makers else [])])
        raise TypeError(f"{owner}: {option}={value!r} is of type {type(value).__name__}; give {meant}")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{owner}: {option}={value} is not a number")


# Names of options of mixers and layers whose numbers may be 0, and the largest they may be; all others are above 0.
_FROM_ZERO = {
    "alpha": math.inf,
    "attn_drop": 1.0,
    "bias_scale": math.inf,
    "drop": 1.0,
    "drop_rate": 1.0,
    "eps": math.inf,
    "filter_depth": math.inf,
    "high": 1.0,
    "momentum": 1.0,
    "negative_slope": math.inf,
    "norm_eps": math.inf,
    "padding": math.inf,
    "proj_drop": 1.0,
    "share": 1.0,
    "steps": math.inf,
    "threshold": math.inf,
}


def out_of_range(options: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first of `options` that has a number out of its range, and the words that refuse it, or None."""
    for option, value in options.items():
        for each in filter(is_number, value if is_list(value) else (value,)):
            highest = _FROM_ZERO.get(option, math.inf)
            if (each > 0 or (option in _FROM_ZERO and each == 0)) and each <= highest and math.isfinite(each):
                continue
            allowed = "above 0, not infinite"
            if option in _FROM_ZERO:
                allowed = "from 0 up, not infinite" if highest == math.inf else f"from 0 to {highest:g}"
            return option, f"{option}={value!r} is out of range; give numbers {allowed}"
    return None


class Registry(Generic[_T]):
    """Classes by name, with the options that each of their constructors takes.

    Options are those of `constructor_options`; a constructor that ends in ``**dd`` takes a device and a dtype besides
    what it names.

    Args:
        kind: Their kind, for messages: "mixer".
        besides: Parameters of the constructors that are not options.
    """

    def __init__(self, kind: str, besides: Iterable[str]) -> None:
        self.kind, self.besides = kind, {"self", *besides}
        self._classes: dict[str, type[_T]] = {}

    def register(self, name: str) -> Callable[[type[_T]], type[_T]]:
        """Return a class decorator that registers a class under `name`.

        Raises:
            TypeError: `name` is no str.
            ValueError: `name` is empty or taken.
        """
        if not isinstance(name, str):
            raise TypeError(f"{self.kind}={name!r} is no name; give a str")
        if not name:
            raise ValueError(f"{self.kind}={name!r} is empty; give a name")

        def register(cls: type[_T]) -> type[_T]:
            if name in self._classes:
                raise ValueError(
                    f"{self.kind}={name!r} is taken by {self._classes[name].__qualname__}; choose another name"
                )
            self._classes[name] = cls
            return cls

        return register

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._classes)

    def classes(self) -> tuple[type[_T], ...]:
        """Return the registered classes."""
        return tuple(self._classes.values())

    def class_called(self, class_name: str) -> type[_T] | None:
        """Return the registered class whose own name is `class_name`, or None."""
        return next((each for each in self._classes.values() if each.__name__ == class_name), None)

    def named(self, name: str) -> type[_T]:
        """Return the class registered as `name`.

        Raises:
            TypeError: `name` is no str.
            ValueError: no class has this name.
        """
        if not isinstance(name, str):
            raise TypeError(f"{self.kind}={name!r} is no name; give a str, one of {self.names()}")
        if name not in self._classes:
            hint = nearest(name, self._classes)
            raise ValueError(f"unknown {self.kind}={name!r}{hint}; the {self.kind}s are {self.names()}")
        return self._classes[name]

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the options of the class called `name`, by name.

        Raises:
            ValueError: no class has this name.
        """
        return constructor_options(self.named(name), self.besides)

    def checked(self, name: str, options: Mapping[str, Any]) -> type[_T]:
        """Return the class called `name`, which must know all of `options` and need no others.

        Raises:
            ValueError: no class has this name, or it does not know one of `options` or needs another.
        """
        known = self.options(name)
        for option, value in options.items():
            if option not in known:
                raise ValueError(
                    f"{self.kind} {name!r} has no option {option}={value!r}{nearest(option, known)}; "
                    f"its options are {sorted(known)}"
                )
        for option, parameter in known.items():
            if option not in options and parameter.default is parameter.empty:
                raise ValueError(f"{self.kind} {name!r} needs the option {option}; its options are {sorted(known)}")
        return self._classes[name]

    def check_kinds(self, name: str, options: Mapping[str, Any]) -> None:
        """Check the values of `options` by the annotations of the class called `name`, which knows all of them.

        Raises:
            TypeError: a truth value, a number, a name, a list or a size is given as something else.
            ValueError: a number is NaN.
        """
        known = self.options(name)
        for option, value in options.items():
            check_kind(f"{self.kind} {name!r}", option, value, known[option].annotation)
