"""The private names of PyTorch and timm do what they are used for, in the versions at hand."""

import pytest
import timm
import torch
import torch.distributed.checkpoint

from visionmix import private_api


def test_parse_schema_reads_names_types_and_defaults():
    arguments = private_api.parse_schema('any::op(Tensor x, Tensor? y=None, str z="a") -> Tensor').arguments
    assert [(x.name, str(x.type)) for x in arguments] == [("x", "Tensor"), ("y", "Optional[Tensor]"), ("z", "str")]
    assert [x.default_value for x in arguments if x.has_default_value()] == [None, "a"]


def test_outside_of_tracing_tensors_are_real():
    with private_api.FakeTensorMode():
        assert type(torch.ones(2)) is not torch.Tensor
        with private_api.outside_of_tracing():
            assert torch.ones(2).numpy().sum() == 2


def test_fake_tensors_have_shapes_types_and_gradients_but_no_memory():
    with private_api.FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        weight = torch.empty(1 << 20, 1 << 20, requires_grad=True)
        out = torch.empty(4, 1 << 20) @ weight
        assert (out.shape, out.dtype, out.device.type) == ((4, 1 << 20), torch.bfloat16, "cpu")
        out.sum().backward()
        assert weight.grad.untyped_storage().nbytes() == 1 << 42


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


def test_feature_take_indices_counts_from_the_end():
    assert private_api.feature_take_indices(4, 2) == ([2, 3], 3)
    assert private_api.feature_take_indices(4, [0, 2]) == ([0, 2], 2)


def test_feature_getter_is_what_features_only_makes():
    assert isinstance(timm.create_model("test_plain", features_only=True), private_api.FeatureGetterNet)


def test_every_batch_norm_is_one():
    norms = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm)
    assert all(issubclass(norm, private_api.AnyBatchNorm) for norm in norms)
    assert not issubclass(torch.nn.LayerNorm, private_api.AnyBatchNorm)


def test_a_distributed_checkpoint_is_read_whole(tmp_path):
    content = {"a": {"b": torch.arange(3.0)}, "c": torch.ones(2, 2)}
    torch.distributed.checkpoint.save(content, checkpoint_id=tmp_path)
    found = private_api.load_whole_state_dict(torch.distributed.checkpoint.FileSystemReader(tmp_path))
    assert torch.equal(found["a"]["b"], content["a"]["b"])
    assert torch.equal(found["c"], content["c"])


@pytest.mark.long
def test_a_compiled_package_computes_and_says_its_metadata(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 3), (torch.ones(4, 2),))
    private_api.compile_and_package(program, tmp_path / "linear.pt2", {"key": "value"})
    package = private_api.load_compiled_package(tmp_path / "linear.pt2")
    assert package.get_metadata()["key"] == "value"
    assert torch.allclose(package(torch.ones(4, 2)), program.module()(torch.ones(4, 2)))
