"""Triton's interpreter without the work whose results it drops: the same numbers in about half the time.

For every call of a device function the interpreter replaces the functions of `triton.language` by its own once more; it
looks up NumPy's types in a table built anew for every tile, and checks integers for overflow by assertions that only
run in debug mode.
"""

import dataclasses
import functools
from typing import Any

import triton
from triton.runtime import interpreter


@functools.cache
def spare_repeated_work() -> None:
    """Change the interpreter of this process, once, if it is Triton 3.8's."""
    if not triton.__version__.startswith("3.8."):
        return
    replaced: set[int] = set()  # modules whose `triton.language` has been replaced in the present launch
    launch, np_dtype, np_dtypes = interpreter.GridExecutor.__call__, interpreter._get_np_dtype, {}

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(module)
        fn = self.rewrite()
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def known_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = known_np_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
