"""PyTorch's private names do what they are used for, in the version at hand."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from visionmix.kernels import private_api


def test_parse_schema_reads_names_types_and_defaults():
    arguments = private_api.parse_schema('any::op(Tensor x, Tensor? y=None, str z="a") -> Tensor').arguments
    assert [(x.name, str(x.type)) for x in arguments] == [("x", "Tensor"), ("y", "Optional[Tensor]"), ("z", "str")]
    assert [x.default_value for x in arguments if x.has_default_value()] == [None, "a"]


def test_outside_of_tracing_tensors_are_real():
    with FakeTensorMode():
        assert type(torch.ones(2)) is not torch.Tensor
        with private_api.outside_of_tracing():
            assert torch.ones(2).numpy().sum() == 2


def test_inside_functorch_sees_transforms():
    seen = []

    def function(x):
        seen.append(private_api.inside_functorch())
        return x.sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    assert seen == [False, True]


def test_is_traced_tensor_tells_tensors_from_numbers():
    graph = torch.jit.trace(lambda x: x.sum(0), torch.ones(2, 3)).graph
    (node,) = [node for node in graph.nodes() if node.kind() == "aten::sum"]
    assert [private_api.is_traced_tensor(value) for value in node.inputs()][:2] == [True, False]
