"""A training run: model, optimiser, schedule, moving average, scaler; an epoch at a time, saved and resumed whole."""

import copy
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from visionmix.tools import data, models, parallel, run_state
from visionmix.tools.display import Display
from visionmix.tools.distillation import Teacher, divergence, full, make_student
from visionmix.tools.evaluation import AMP_DTYPES, Evaluation, autocast, evaluate, gather_lines, model_dtype
from visionmix.tools.logs import Logs
from visionmix.tools.losses import criterion
from visionmix.tools.recipe_keys import Recipe
from visionmix.tools.schedule import make_scheduler
from visionmix.tools.score import score
from visionmix.tools.stopping import Stop
from visionmix.tools.stopwatch import Stopwatch
from visionmix.tools.transforms import Finish

_logger = logging.getLogger("visionmix.tools.trainer")


class _Float32:
    """A model's state dict in float32, from which an average in float32 is updated."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = self.model.state_dict()
        return {name: full(value) if value.is_floating_point() else value for name, value in state.items()}


class Trainer:
    """The state of a training run, and the steps of an epoch.

    A model may have a schedule of its own, `set_progress(done)`, which is called with the share of training steps done,
    0 at the start and 1 at the end; and losses of its own, `forward_train(images) -> (logits, losses)`, scalars by name
    that are added to the cross entropy, or stand alone where images have no labels.

    Args:
        recipe: settings of the run.
        classes: names, in the order of the model's outputs.
        steps: training steps an epoch, each of `train.accumulate` batches.
        device: where the model lives.
        rank: of this process.
        world: number of processes.

    Raises:
        ValueError: when the recipe names a model, an optimiser, a schedule or arguments that do not exist or fit.
    """

    def __init__(
        self, recipe: Recipe, classes: list[str], steps: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> None:
        self.recipe, self.classes, self.steps, self.device, self.rank, self.world = (
            recipe, classes, steps, device, rank, world,
        )  # fmt: skip
        self.epoch, self.step, self.history = 0, 0, []
        self.gathered = 0  # batches whose gradients wait for the step
        self.own_losses: dict[str, torch.Tensor] = {}  # beside that of the labels: means over the last epoch
        self.sums = run_state.Sums(0.0)  # of this epoch
        self.losses: list[torch.Tensor] = []  # that are not yet added to it
        self.begun: dict | None = None  # place, sums and generators in an epoch that a checkpoint begins in
        if recipe.train.sync_bn and world > 1 and device.type == "cpu":
            raise ValueError(f"train.sync_bn=True needs GPUs, and {world} processes run on the CPU; set it to false")
        data.seed_everything(recipe.train.seed)
        self.model = models.create_model(
            recipe.model.name,
            num_classes=len(classes),
            pretrained=recipe.model.pretrained,
            reduction=recipe.model.reduction,
            **recipe.model.kwargs,
        ).to(device)
        if not recipe.data.labels and not hasattr(self.model, "forward_train"):
            raise ValueError(
                f"data.labels=False trains by the model's own losses, and {recipe.model.name!r} has none; take a model "
                "with forward_train, e.g. roma_pretraining"
            )
        sizes = {recipe.data.image_size, *(size for _, *sizes in recipe.data.sizes or () for size in sizes)}
        for size in sorted(sizes):
            models.check_input(self.model, recipe.model.name, size, device)
        wanted = recipe.data
        self.input = models.model_input(
            self.model,
            image_size=wanted.image_size,
            interpolation="bicubic" if wanted.interpolation == "random" else wanted.interpolation,
            crop_pct=wanted.crop_pct,
            crop_mode=wanted.crop_mode,
            mean=wanted.mean,
            std=wanted.std,
        )
        self.ema = None
        self._prepare()
        self.teacher = None
        if recipe.distill.on:
            self.teacher = Teacher(recipe, self.input, classes, device)
            for size in sorted(sizes):
                models.check_input(self.teacher.model, self.teacher.name, size, device)
        self.student = make_student(self.model, recipe, self.teacher)
        self.amp, self.whole = recipe.train.amp, None  # a sharded model's own policy casts, and a whole copy is tested
        self.sharded: list[nn.Module] = []
        if recipe.train.parallel == "fsdp" and world > 1:
            self._shard()
        self.optimizer, self.scheduler = self._optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.train.amp == "float16")
        augment = recipe.augment
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                mode=augment.mix_mode,
                label_smoothing=recipe.train.label_smoothing,
                num_classes=len(classes),
            )
        self.finish_batch = Finish(self.input.normalise, augment.erase_mode, device)
        self.criterion = criterion(recipe)
        self.running = self.student
        if recipe.train.compile and not self.sharded:
            self.running = torch.compile(self.running, dynamic=False)
        if world > 1 and not self.sharded:
            self.running = DistributedDataParallel(
                self.running, device_ids=[device.index] if device.type == "cuda" else None
            )
        self.watch, self.logs = Stopwatch(device, self.running, world), Logs()
        self._set_progress()

    def _prepare(self) -> None:
        """Bring the model into the layout and type of the recipe, and make the moving average."""
        wanted = self.recipe.train
        if wanted.sync_bn:
            self.model = convert_sync_batchnorm(self.model)
        if wanted.split_bn:
            self.model = models.split_batch_norms(self.model, self.recipe.augment.splits, self.recipe.model.name)
        self.layout = torch.channels_last if wanted.channels_last else torch.preserve_format
        if wanted.channels_last:
            self.model.to(memory_format=self.layout)
        if wanted.ema_decay is not None:
            self.ema = ModelEmaV3(self.model, wanted.ema_decay, use_warmup=wanted.ema_warmup)
        if wanted.amp == "pure_bfloat16":  # but not the average: its small updates would round to nothing
            self.model.to(torch.bfloat16)
        self.dtype = model_dtype(self.model)
        if wanted.checkpointing:
            try:
                self.model.set_grad_checkpointing(True)
            except (AttributeError, AssertionError) as error:
                raise ValueError(
                    f"train.checkpointing=True is not for model {self.recipe.model.name!r} ({error}); set it to false"
                ) from error

    def _shard(self) -> None:
        """Shard the model, the moving average and a student's projection among all processes."""
        name, amp, compiled = self.recipe.model.name, self.recipe.train.amp, self.recipe.train.compile
        mesh = init_device_mesh(self.device.type, (self.world,))
        self.whole = copy.deepcopy(self.tested).cpu()
        if amp in AMP_DTYPES:
            self.amp = "none"
        parallel.shard(self.model, name, mesh, amp, compiled)
        self.sharded = [self.model]
        if self.ema:
            parallel.shard(self.ema.module, name, mesh, amp)
            self.ema.foreach = False  # which would take parameters in shards and whole buffers together
        if self.student.projection is not None:
            parallel.fully_shard(self.student.projection, mesh=mesh)
            self.sharded.append(self.student.projection)

    def _optimizer(self):
        wanted = self.recipe.optimizer
        if wanted.name not in list_optimizers():
            raise ValueError(f"optimizer.name={wanted.name!r} is not one of timm.optim.list_optimizers()")
        scale = self.images_a_step / wanted.lr_batch if wanted.lr_batch else 1.0
        try:
            optimizer = create_optimizer_v2(
                self.model, opt=wanted.name, lr=wanted.lr * scale, weight_decay=wanted.weight_decay, **wanted.kwargs
            )
            # Which timm passes on to those optimisers alone that have one.
            if "momentum" in wanted.kwargs and not any("momentum" in group for group in optimizer.param_groups):
                raise TypeError("it has no momentum")
        except (TypeError, ValueError) as error:
            raise ValueError(f"optimizer {wanted.name!r} does not take kwargs={wanted.kwargs}: {error}") from error
        except (AssertionError, ImportError, RuntimeError) as error:  # timm's words for a missing library or device
            raise ValueError(f"optimizer.name={wanted.name!r} cannot be used: {error}") from error
        if self.student.projection is not None:
            optimizer.add_param_group({"params": list(self.student.projection.parameters())})
        return optimizer, make_scheduler(optimizer, self.recipe.schedule, self.steps, scale)

    @property
    def images_a_step(self) -> int:
        """Images that all processes together take at each step."""
        return self.recipe.data.batch_size * self.recipe.train.accumulate * self.world

    @property
    def lr(self) -> float:
        """The greatest learning rate of the next step."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def tested(self) -> nn.Module:
        """The weights that are tested and used: the moving average where there is one; of the last test if sharded."""
        if self.whole is not None:
            return self.whole
        return self.ema.module if self.ema else self.model

    def train_epoch(
        self, loader: data.Loader, display: Display, stop: Stop, after_step: Callable[[], None] = lambda: None
    ) -> tuple[float, list[str]]:
        """Train one epoch, or the rest of one; return the mean loss and the files that could not be read.

        Args:
            loader: of the training images.
            display: shows the progress.
            stop: is asked between two batches.
            after_step: is called after each step.

        Raises:
            Interrupted: when a stop was requested.
            FloatingPointError: when the loss is no longer finite.
            UnreadableData: when no readable image was found for a batch.
        """
        accumulate = self.recipe.train.accumulate
        batches, self.gathered, self.losses = self.steps * accumulate, 0, []
        self._begin(loader)
        self.running.train()
        if self.whole is not None:
            self.whole.cpu()
        display.begin(self.epoch + 1, "train", batches - self.sums.batches)
        # Reading the loss waits for a GPU to finish the step, so there it is read now and then.
        every = 1 if self.device.type == "cpu" else 20
        self.watch.start()
        for batch in loader:
            self.watch.lap("data")
            stop.check()
            self.sums.unreadable += batch.unreadable
            if batch.missing:
                raise data.UnreadableData(
                    f"{data.MAX_DRAWS} training images drawn one after another cannot be read, e.g. "
                    + ", ".join(sorted(set(batch.unreadable))[:3])
                )
            self.losses.append(self._update(batch).detach())
            self.sums.batches += 1
            shown = None
            if self.sums.batches % every == 0 or self.sums.batches == batches:
                shown = self._read_losses()
            display.step(len(batch.targets), shown, self.lr)
            if shown is not None:
                self.logs.step(self.step, {"loss": shown, "lr": self.lr})
            if self.gathered == accumulate:
                after_step()
            self.watch.lap(None)
        total = torch.tensor(self.sums.loss, dtype=torch.float64, device=self.device)
        if self.world > 1:
            for value in (total, *self.own_losses.values()):
                torch.distributed.all_reduce(value)
            # Running statistics of BatchNorm layers differ from process to process until averaged.
            distribute_bn(self.model, self.world, reduce=True)
            if self.ema:
                distribute_bn(self.ema.module, self.world, reduce=True)
        self.own_losses = {name: value / (batches * self.world) for name, value in self.own_losses.items()}
        return total.item() / (batches * self.world), gather_lines(self.sums.unreadable)

    def _begin(self, loader: data.Loader) -> None:
        """Begin an epoch, or go on in the one that a checkpoint was written in."""
        begun, self.begun, self.sums, self.own_losses = self.begun, None, run_state.Sums(self.lr), {}
        # Together with the loader's order this makes an epoch a function of the state at its start.
        data.seed_everything(self.recipe.train.seed, self.epoch + 1, self.rank)
        loader.sampler.set_epoch(self.epoch)
        if begun is not None:
            loader.load_state_dict(begun["place"])
            self.sums = run_state.go_on(self, begun["processes"])
            self.own_losses = {
                name: torch.tensor(value, dtype=torch.float64, device=self.device)
                for name, value in self.sums.own_losses.items()
            }

    def _read_losses(self) -> float | None:
        """Add the losses of the last batches to the sum and return the last one; None where there are none.

        Raises:
            FloatingPointError: when one is not finite.
        """
        if not self.losses:
            return None
        values = torch.stack(self.losses).double().tolist()
        for number, value in enumerate(values, self.sums.batches - len(values)):
            if not math.isfinite(value):
                step = number // self.recipe.train.accumulate + 1
                raise FloatingPointError(f"the loss is {value} in epoch {self.epoch + 1}, step {step} of {self.steps}")
            self.sums.loss += value  # one by one, so that the sum does not depend on when they are read
        self.losses = []
        return values[-1]

    def _set_progress(self) -> None:
        done = min(self.step / (self.steps * self.recipe.schedule.epochs), 1.0)
        for model in (self.model, self.ema.module if self.ema else None):
            if hasattr(model, "set_progress"):
                model.set_progress(done)

    def _update(self, batch: data.Batch) -> torch.Tensor:
        """Add a batch's share to the gradient, make a step where it is complete, and return the batch's loss."""
        self.gathered = self.gathered % self.recipe.train.accumulate + 1
        complete = self.gathered == self.recipe.train.accumulate
        images = self.finish_batch(batch)
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.mixup:
            images, targets = self.mixup(images, targets)
        if self.gathered == 1:
            self.optimizer.zero_grad()
        # The processes add up their gradients once a step, in the last backward pass.
        for module in self.sharded:
            module.set_requires_gradient_sync(complete)
        with nullcontext() if complete or self.world == 1 or self.sharded else self.running.no_sync():
            loss = self._loss(images, targets)
            # A second-order optimiser differentiates the gradient once more.
            self.scaler.scale(loss / self.recipe.train.accumulate).backward(
                create_graph=getattr(self.optimizer, "is_second_order", False)
            )
        self.watch.lap("compute")
        if complete:
            self._step()
            self.watch.lap("optimizer")
        return loss

    def _loss(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wanted = self.recipe.train
        with autocast(self.device, self.amp):
            logits, matched, losses = self.running(images.to(self.dtype, memory_format=self.layout))
            given = self.teacher(images) if self.teacher else None
            if wanted.mesa and self.epoch >= int(wanted.mesa_start * self.recipe.schedule.epochs):
                with torch.no_grad():
                    averaged = self.ema.module(images)
                losses = losses | {"mesa": wanted.mesa * divergence(logits, averaged, wanted.mesa_temperature)}
        loss = self.criterion(full(logits), targets)
        if self.teacher:
            loss = self.recipe.distill.task_weight * loss
            losses = losses | {"distill": self.teacher.loss(matched, given)}
        for name, value in losses.items():
            loss = loss + full(value)
            self.own_losses[name] = self.own_losses.get(name, 0.0) + value.detach().double()
        return loss

    def _step(self) -> None:
        wanted = self.recipe.optimizer
        if wanted.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            spared = models.classifiers(self.model) if wanted.clip_mode == "agc" else []
            names = {id(parameter) for layer in spared for parameter in layer.parameters()}
            dispatch_clip_grad(
                [parameter for parameter in self.running.parameters() if id(parameter) not in names],
                wanted.clip_grad,
                mode=wanted.clip_mode,
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.ema:
            self.ema.update(_Float32(self.model) if self.dtype == torch.bfloat16 else self.model, step=self.step)
        self._set_progress()

    def test(self, loader: data.Loader, display: Display, stop: Stop) -> Evaluation:
        """Test the weights that are to be used.

        Raises:
            Interrupted: when a stop was requested.
            FloatingPointError: when the loss is not finite, as after a last step that went astray.
            UnreadableData: when not one image can be read.
        """
        display.begin(self.epoch + 1, "test", len(loader))
        if self.whole is not None:  # processes that test fewer images would not call a sharded model as often as others
            self.whole.load_state_dict(parallel.whole_state(self.ema.module if self.ema else self.model))
            self.whole.to(self.device)

        def after_batch(images: int) -> None:
            stop.check()
            display.step(images)

        result = evaluate(
            self.tested,
            loader,
            classes=len(self.classes),
            device=self.device,
            amp=self.recipe.train.amp,
            after_batch=after_batch,
            multilabel=self.recipe.data.multilabel,
            labels=self.recipe.data.labels,
        )
        if not math.isfinite(result.loss):
            raise FloatingPointError(f"the test loss is {result.loss} in epoch {self.epoch + 1}")
        return result

    def finish_epoch(self, row: dict) -> bool:
        """Count the epoch, keep its row, and return whether its test figure is the best so far."""
        best = max(map(score, self.history), default=-math.inf)
        self.epoch += 1
        self.history.append(row)
        self.scheduler.step(self.epoch, score(row))
        return score(row) > best

    def state(self, loader: data.Loader | None = None) -> dict:
        """Return a checkpoint's content, as `visionmix.tools.checkpoint` describes it, with this process's "process".

        Args:
            loader: of the training images, in the middle of an epoch; None between two epochs.

        Raises:
            FloatingPointError: when a loss of the last batches is not finite.
        """
        if loader is not None:
            self._read_losses()
            self.sums.own_losses = {name: value.item() for name, value in self.own_losses.items()}
        return run_state.state(self, loader)

    def load_state(self, content: dict, source: str) -> None:
        """Go on from a checkpoint. The recipe's own learning rate and weight decay apply, not the checkpoint's.

        Raises:
            ValueError: when the checkpoint is of another model, other classes, or another optimiser, or in the middle
                of an epoch whose images so far are not whole steps of this run.
        """
        run_state.load(self, content, source)
        self.scheduler.step_update(self.step)
        self._set_progress()
