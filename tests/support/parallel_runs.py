"""Runs of 2 gloo processes, started by torchrun: python -m torch.distributed.run --nproc-per-node 2 THIS WHAT [FOLDER].

fsdp      print the greatest differences between sharded training and DDP, in float64 over 20 steps
policy    print types of weights and the losses under each train.amp, sharded
batch     print those between 2 processes, 1 with twice the batch, and accumulation
move      go on from FOLDER/one in shards and save as FOLDER/shards; from there by DDP, save as FOLDER/ddp
killed    train by the arguments that follow FOLDER; kill the second process once, in step 11
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from small_runs import CLASSES, CPU, VIT, batch, make

from visionmix.tools import checkpoint, parallel, saving, train
from visionmix.tools.trainer import Trainer

STEPS = 20
SHARDED = {
    "plain": {},
    "average": {"train": {"ema_decay": 0.9, "mesa": 1.0, "mesa_start": 0.0}},
    "accumulation": {"train": {"accumulate": 2}},
    "norm": {"optimizer": {"clip_grad": 0.05}},
    "value": {"optimizer": {"clip_grad": 0.01, "clip_mode": "value"}},
    "checkpointing": {"train": {"checkpointing": True}},
    "compiled": {"train": {"compile": True}},
    "lamb": {"optimizer": {"name": "lamb"}},
    "muon": {"optimizer": {"name": "muon"}},
    "stages": {"model": {"name": "test_vig_h", "kwargs": {}}},
    "own losses": {
        "model": {
            "name": "roma_pretraining",
            "kwargs": {
                "backbone": "test_roma_arm",
                "img_size": 32,
                "window": 1,
                "region": 1,
                "decoder_dim": 16,
                "depth": 1,
            },
        },
        "data": {"labels": False},
    },
}


def trainer(world: int, **sections) -> Trainer:
    made = make(None, **VIT | sections)
    classes = CLASSES if made.data.labels else []
    return Trainer(made, classes, 10, CPU, dist.get_rank() if world > 1 else 0, world)


def train_on(trainer: Trainer, images: int, places: list[int]) -> list[float]:
    """Return the mean losses of 20 steps over all processes, which take parts of `images` images of the same 8."""
    found = []
    for step in range(STEPS):
        torch.manual_seed(step)  # of what a model draws
        losses = []
        for place in places:
            part = batch(8, step)
            part.images = part.images.double()[place * images : (place + 1) * images]
            part.targets = part.targets[place * images : (place + 1) * images]
            losses.append(trainer._update(part).detach())
        loss = torch.stack(losses).mean()
        if trainer.world > 1:
            dist.all_reduce(loss)
        found.append(loss.item() / trainer.world)
    return found


def furthest(first, second) -> float:
    return max(abs(torch.as_tensor(a) - torch.as_tensor(b)).max().item() for a, b in zip(first, second, strict=True))


def weights(trainer: Trainer) -> list[torch.Tensor]:
    modules = [trainer.model, trainer.ema.module] if trainer.ema else [trainer.model]
    return [value for module in modules for value in parallel.whole_state(module).values()]


def fsdp() -> dict:
    found = {}
    for name, sections in SHARDED.items():
        runs = []
        for kind in ("ddp", "fsdp"):
            made = trainer(2, **sections | {"train": sections.get("train", {}) | {"parallel": kind}})
            accumulate = made.recipe.train.accumulate
            places = [dist.get_rank() * accumulate + place for place in range(accumulate)]
            runs.append((train_on(made, 4 // accumulate, places), weights(made)))
            if kind == "fsdp":
                shards = [value.to_local().numel() < value.numel() for value in made.model.parameters()]
                assert sum(shards) > len(shards) / 2
        losses, parameters = zip(*runs, strict=True)
        found[name] = furthest(*losses), furthest(*parameters), abs(losses[0][0] - losses[0][-1])
    return found


def policy() -> dict:
    torch.set_default_dtype(torch.float32)
    found = {}
    for amp in ("none", "bfloat16", "pure_bfloat16"):
        made, seen = trainer(2, train={"amp": amp, "parallel": "fsdp"}), set()
        layer = made.model.blocks[0].mlp.fc1
        layer.register_forward_hook(lambda layer, *_, seen=seen: seen.add(str(layer.weight.dtype)))
        losses = [made._update(batch(4, step)).item() for step in range(3)]
        found[amp] = [*seen, str(layer.weight.dtype), losses]
    return found


def batches() -> dict:
    rank = dist.get_rank()
    sections = {"optimizer": {"lr_batch": None, "clip_grad": 1.0}}
    runs = {
        "one": train_on(trainer(1, **sections), 8, [0]),
        "two": train_on(trainer(2, **sections), 4, [rank]),
        "accumulated": train_on(trainer(1, **sections | {"train": {"accumulate": 2}}), 4, [0, 1]),
        "both": train_on(trainer(2, **sections | {"train": {"accumulate": 2}}), 2, [2 * rank, 2 * rank + 1]),
    }
    return {name: [furthest(runs["one"], run), abs(run[0] - run[-1])] for name, run in runs.items()}


def move(folder: Path) -> None:
    for source, target, kind in (("one", "shards", "fsdp"), ("shards", "ddp", "ddp")):
        made = trainer(2, train={"ema_decay": 0.9, "parallel": kind})
        path = folder / source / "epoch_0001"
        made.load_state(checkpoint.read(path), str(path))
        saver = saving.Saver(folder / target, print, rank=dist.get_rank(), world=2)
        saver.save("epoch_0001", made.state())
        saver.wait()
        dist.barrier()


def killed(folder: Path, arguments: list[str]) -> int:
    """The process dies once the checkpoint of step 9 is whole; a file says that it has happened."""
    update, happened = Trainer._update, folder / "killed"

    def dying(self, part):
        if self.step == 10 and self.rank == 1 and not happened.exists():
            while not (folder / "out" / "checkpoints" / "epoch_0001_step_00000009").exists():
                time.sleep(0.01)
            happened.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, part)

    Trainer._update = dying
    return train.main(arguments)


def main(what: str, *arguments: str) -> int:
    if what == "killed":
        return killed(Path(arguments[0]), list(arguments[1:]))
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float32 if what == "move" else torch.float64)
    result = move(Path(arguments[0])) if what == "move" else {"fsdp": fsdp, "policy": policy, "batch": batches}[what]()
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
