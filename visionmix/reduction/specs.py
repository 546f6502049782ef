"""A reduction as a recipe or a command line writes it."""

import ast
from collections.abc import Mapping
from typing import Any

Spec = str | Mapping[str, Any]


def read_spec(spec: Spec) -> tuple[str, dict[str, Any]]:
    """Return the method and the options of a reduction.

    Args:
        spec: A method and, after a colon, its options as Python literals, ``"tome:r=13"`` or
            ``"evit:keep_rate=0.7, layers=[3, 6, 9]"``; or a mapping with the name under "method" and the options beside
            it, ``{"method": "tome", "r": 13}``.

    Raises:
        TypeError: it is neither a text nor a mapping.
        ValueError: it cannot be read, or names no method.
    """
    if isinstance(spec, Mapping):
        options = dict(spec)
        method = options.pop("method", None)
        if not isinstance(method, str):
            raise ValueError(f'the reduction {dict(spec)!r} names no method; write {{"method": "tome", "r": 13}}')
        return method, options
    if not isinstance(spec, str):
        raise TypeError(f"the reduction {spec!r} is {type(spec).__name__}; give a text such as tome:r=13, or a mapping")
    method, _, text = spec.partition(":")
    try:
        call = ast.parse(f"method({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("every option needs its name")
        return method, {str(keyword.arg): _literal(keyword) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the reduction {spec!r} cannot be read ({error}); write it as tome:r=13") from error


def _literal(keyword: ast.keyword) -> Any:
    try:
        return ast.literal_eval(keyword.value)
    except ValueError as error:
        raise ValueError(f"{keyword.arg}={ast.unparse(keyword.value)} is no number, quoted text or list") from error
