"""The one statement of an op's arguments: its schema, and the tuples for implementations made from it."""

from collections import namedtuple
from operator import itemgetter

from visionmix.private_api import parse_schema

NAMESPACE = "visionmix"


def named_tuple(name: str, arguments: list) -> type[tuple]:
    """Return a named tuple of a parsed schema's arguments, with its defaults."""
    defaults = [argument.default_value for argument in arguments if argument.has_default_value()]
    return namedtuple(name, [argument.name for argument in arguments], defaults=defaults)


class Schema:
    """An op's arguments and outputs, and those of its backward op.

    The backward op takes the gradients of the op's outputs (`grad_<output>`; of an optional one, None where there is
    none), the arguments it needs again, under their own names, and outputs it needs, under theirs. It returns the
    gradients of the op's tensors, in their order, those of integers left out.

    Args:
        name: The op's name.
        text: Its schema.
        backward_text: The backward op's schema.
        indices: The names of the tensors of integers.

    Attributes:
        name: The op's name, in the namespace `visionmix`.
        text: The schema, whose first argument is a tensor on the op's device; it has `str implementation="auto"`.
        backward_text: The backward op's schema.
        Arguments: The op's arguments, a named tuple with the schema's defaults.
        Gradients: The backward op's further arguments, a named tuple.
        outputs: The names of the outputs.
        tensors: The places among the arguments of the tensors that have gradients.
        indices: The places of those that have none.
        input_tensors: A function of the arguments, which returns those of `tensors`, None for an option not given.
    """

    def __init__(self, name: str, text: str, backward_text: str, indices: tuple[str, ...] = ()):
        self.name, self.text, self.backward_text = name, text, backward_text
        forward = parse_schema(f"{NAMESPACE}::{name}{text}")
        backward = parse_schema(f"{NAMESPACE}::{name}_backward{backward_text}")
        self.Arguments = named_tuple("Arguments", forward.arguments)
        self._Backward = named_tuple("BackwardArguments", backward.arguments)
        names, taken = self.Arguments._fields, self._Backward._fields
        self.Gradients = namedtuple("Gradients", [field for field in taken if field not in names])
        self.outputs = [returned.name or "out" for returned in forward.returns]
        tensors = [place for place, x in enumerate(forward.arguments) if "Tensor" in str(x.type)]
        self.indices = [place for place in tensors if names[place] in indices]
        self.tensors = [place for place in tensors if place not in self.indices]
        self.input_tensors = itemgetter(*self.tensors)
        self.required = {argument.name for argument in backward.arguments if str(argument.type) == "Tensor"}
        self._places = [taken.index(field) if field in taken else None for field in names]
        self._others = [taken.index(field) for field in self.Gradients._fields]

    def split(self, *args) -> tuple:
        """Return (Arguments, Gradients) from the backward op's arguments; what it does not take is None."""
        given = self._Backward(*args)
        arguments = (None if place is None else given[place] for place in self._places)
        return self.Arguments._make(arguments), self.Gradients._make(given[place] for place in self._others)

    def join(self, arguments: tuple, gradients: tuple) -> tuple:
        """Undo `split`."""
        known = gradients._asdict() | {n: x for n, x in arguments._asdict().items() if n in self._Backward._fields}
        return tuple(known[field] for field in self._Backward._fields)
