"""Which parameters optimisers must not decay, in a model and in whatever a copy of it is."""

import copy
import pickle

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from tiny_models import CORE, TINY

from visionmix.backbones.contract import Backbone

# What begins as a recurrence's rates, skips and steps, or as positions in a table or of a kernel's elements.
LEAVES = {"A_log", "D", "delta_bias", "move_B", "bias_table", "position_bias", "positions"}
LEAVES |= {"temperature", "query_embedding", "local_bias"}  # TransNeXt's; its position biases come from a network:
NETWORK = ("position_bias.fc1.weight", "position_bias.fc2.weight")
MONARCH = ".mixer.kernel."  # the network that computes the kernels of Monarch Mixer
LEAVES |= {"global_tokens"}  # DualToken-ViT's
EMBEDDINGS = {"pos_embed", "class_token"}


def on_meta(model):
    """Return a model of the same kind that was begun without memory, and given it afterwards."""
    with torch.device("meta"):
        fresh = timm.create_model(model.default_cfg["architecture"])
    fresh.to_empty(device="cpu")
    fresh.init_weights()
    return fresh


def with_assigned_tensors(model):
    other = timm.create_model(model.default_cfg["architecture"])
    other.load_state_dict(model.state_dict(), assign=True)
    return other


COPIES = {
    "fresh": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "meta": on_meta,
    "assign": with_assigned_tensors,
    "ema": lambda model: ModelEmaV3(model).module,
    "half": lambda model: model.half(),
}


@pytest.mark.parametrize(
    ("name", "made"),
    [
        pytest.param(name, made, marks=[] if made in ("fresh", "pickle") or name in CORE else pytest.mark.long)
        for name in TINY
        for made in COPIES
    ],
)
def test_no_weight_decay_outlives_a_copy(name, made):
    model = COPIES[made](timm.create_model(name))
    keys = [key for key, _ in model.named_parameters()]
    expected = {key for key in keys if key.rpartition(".")[2] in LEAVES or EMBEDDINGS & {*key.split(".")}}
    expected |= {key for key in keys if key.endswith(NETWORK) or MONARCH in key}
    assert model.no_weight_decay() == expected
    decayed = {
        id(value)
        for group in create_optimizer_v2(model, opt="adamw", weight_decay=0.1).param_groups
        for value in group["params"]
        if group["weight_decay"]
    }
    assert not [key for key, value in model.named_parameters() if key in expected and id(value) in decayed]
    assert decayed


def test_no_weight_decay_of_resized_windows():
    model = timm.create_model("test_agent_swin")
    before = model.no_weight_decay()
    model.set_input_size((160, 192))
    assert model.no_weight_decay() == before != set()


def test_no_weight_decay_names_a_shared_parameter_once():
    class Owner(torch.nn.Module):
        undecayed = ("place", "absent")

        def __init__(self, place):
            super().__init__()
            self.place, self.absent = place, None

    model = Backbone()
    place = torch.nn.Parameter(torch.zeros(2, 2))
    model.first, model.second = Owner(place), Owner(place)
    assert model.no_weight_decay() == {"first.place"}
