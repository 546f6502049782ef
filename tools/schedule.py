"""The learning rate over a run, by timm's schedules."""

import timm
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from visionmix.tools.recipe_keys import ScheduleRecipe


def make_scheduler(optimizer: Optimizer, wanted: ScheduleRecipe, steps: int, scale: float) -> Scheduler:
    """Return timm's schedule called `wanted.name`, stepped at each update, or at each epoch where it is "plateau".

    Args:
        optimizer: whose groups it sets.
        wanted: the recipe's section.
        steps: updates an epoch.
        scale: by which warmup_lr and min_lr are multiplied.

    Raises:
        ValueError: timm does not know the schedule, or refuses its arguments.
    """
    # Published schedules count the warm-up among the epochs; timm's warmup_prefix adds it to num_epochs.
    epochs: float = wanted.epochs - wanted.warmup_epochs - wanted.cooldown_epochs
    try:
        if (cycles := wanted.kwargs.get("cycle_limit", 1)) != 1:  # num_epochs is the first cycle's length
            epochs /= sum(wanted.kwargs.get("cycle_mul", 1.0) ** cycle for cycle in range(cycles))
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=wanted.name,
            num_epochs=epochs,
            warmup_epochs=wanted.warmup_epochs,
            # Milestones are epochs of the run, as published ones are.
            warmup_prefix=wanted.name != "multistep",
            warmup_lr=wanted.warmup_lr * scale,
            min_lr=wanted.min_lr * scale,
            step_on_epochs=wanted.name == "plateau",
            updates_per_epoch=steps,
            **wanted.kwargs,
        )
    except (TypeError, ValueError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"schedule.name={wanted.name!r} with schedule.kwargs={wanted.kwargs}: {error}") from error
    if scheduler is None:
        raise ValueError(f"schedule.name={wanted.name!r} is not in timm {timm.__version__}; install a newer timm")
    return scheduler
