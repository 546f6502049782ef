"""Training of reduced models in several processes of gloo, in float64."""

from pathlib import Path

import timm
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from visionmix import reduction

SIZES = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
# With what couples the images of a batch left out: `COUPLED` has it.
METHODS = {
    "tome": {"r": 4},
    "mctf": {"r": 4},
    "mctf_fast": {},
    "evit": {"keep_rate": 0.6, "layers": [1, 2]},
    "ats": {"layers": [1, 2], "samples": 12},
    "algm": {"layers": [0, 2], "threshold": 0.1},
    "avit": {"gate_scale": 0.1, "gate_center": 1.0, "ponder_weight": 0.5, "prior_weight": 0.0},
    "zero_tprune": {"layers": [0, 1], "keep_rates": [0.9, 0.6], "similar": 3},
    "dynamicvit": {"keep_rate": 0.6},
    "ssm_prune": {"keep_rate": 0.6, "layers": [0, 1]},
    "rmeeto": {"r": 3, "layers": [1, 2]},
}
SCANS = ("ssm_prune", "rmeeto")
COUPLED = {"avit": {"gate_scale": 0.1, "gate_center": 1.0, "prior_weight": 1.0}, "dynamicvit": {"keep_rate": 0.6}}
BATCH, STEPS = 8, 2


class Losses(nn.Module):
    """The sum of a model's losses, as the trainer adds them up."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        losses = {}
        if hasattr(self.model, "forward_train"):
            logits, losses = self.model.forward_train(images)
        else:
            logits = self.model(images)
        return F.cross_entropy(logits, targets) + sum(losses.values(), torch.zeros_like(logits[0, 0]))


def gumbel_softmax(logits: Tensor, hard: bool) -> Tensor:
    """Decide as `F.gumbel_softmax` does, by noise that each logit has of its own in place of a drawn one."""
    soft = (logits + (1e3 * logits.detach()).sin()).softmax(dim=-1)
    first = (soft[..., :1] >= soft[..., 1:]).to(soft.dtype)
    return torch.cat([first, 1 - first], dim=-1) - soft.detach() + soft


def made(method: str, options: dict) -> nn.Module:
    """Return a model in training, the same in every process."""
    torch.manual_seed(0)
    if method in SCANS:
        model = timm.create_model("test_vim_tiny", img_size=96, depth=4, num_classes=5).double()
    else:
        model = VisionTransformer(**SIZES).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return reduction.apply(model, method, **options).train()


def trained(method: str, options: dict, rank: int = 0, world: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters before and after steps on equal parts of the same images."""
    fast = made(method, options)
    before = [value.detach().clone() for value in fast.parameters()]
    running = Losses(fast)
    if world > 1:
        running = DistributedDataParallel(running)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.05)
    side, generator = (96 if method in SCANS else 24), torch.Generator().manual_seed(1)
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, side, side, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        running(images[own], torch.arange(BATCH)[own] % 5).backward()
        optimizer.step()
    return before, [value.detach().clone() for value in fast.parameters()]


def work(rank: int, world: int, folder: str) -> None:
    """Train every method in this process of `world`, and write the parameters into `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    F.gumbel_softmax = gumbel_softmax
    found = {method: trained(method, options, rank, world)[1] for method, options in METHODS.items()}
    teacher = VisionTransformer(**SIZES).double()
    for method, options in COUPLED.items():
        more = {"teacher": teacher} if method == "dynamicvit" else {}
        found[f"{method}, coupled"] = trained(method, options | more, rank, world)[1]
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
