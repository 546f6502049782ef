"""Count what a training step costs, op by op, on fake tensors: nothing is computed and no memory is taken.

Counted are the ops that PyTorch calls on a CPU without compilation, under `torch.autocast("cpu")` where the recipe asks
for mixed precision. Each op reads its inputs and writes its outputs once; views are free, and so is the memory that an
op takes for itself. FLOPs are those of `torch.utils.flop_counter`'s formulas, and 0 for other ops, which memory binds.
"""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

from visionmix.kernels.schema import NAMESPACE
from visionmix.private_api import FakeTensorMode, TorchDispatchMode, tree_leaves
from visionmix.registry import nearest
from visionmix.tools import models
from visionmix.tools.evaluation import autocast, model_dtype
from visionmix.tools.recipe import Recipe

_HALF = (torch.float16, torch.bfloat16)
# They write their first argument without reading it.
_OVERWRITING = {"bernoulli_", "copy_", "fill_", "normal_", "uniform_", "zero_"}
_ATEN = torch.ops.aten


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest, out_val: object = None) -> int:
    """Count each gradient asked for as the forward pass; PyTorch's formula lets each group see all channels."""
    *_, transposed, _, _, wanted = rest
    return 2 * (x if transposed else grad).numel() * weight[0].numel() * sum(wanted[:2])


# PyTorch's registry lacks the CPU's names of softmax attention, whose first arguments are those of a GPU's.
_FORMULAS: dict[object, Callable[..., int]] = {
    **flop_registry,
    _ATEN.convolution_backward: _convolution_backward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class Call:
    """A call of an op.

    Attributes:
        op: Its name.
        flops: Floating-point operations, 2 a multiply-add.
        moved: Bytes read and written.
        half: Whether it computes in a 16-bit type.
    """

    op: str
    flops: int
    moved: int
    half: bool = False

    @property
    def fused(self) -> bool:
        """Whether the op is one of `visionmix.kernels`."""
        return self.op.startswith(f"{NAMESPACE}.")


@dataclass(frozen=True)
class StepCost:
    """What a training step of one process costs; memory in bytes.

    Attributes:
        forward: Calls of the forward passes and the loss, of all batches of the step.
        backward: Calls of the backward passes, the same.
        update: Calls of gradient clipping, optimiser and moving average.
        parameters: Memory of parameters and buffers.
        gradients: Memory of the gradients.
        optimizer: Memory of the optimiser's state.
        average: Memory of the moving average of the weights.
        given: Memory of the teacher's parameters and buffers.
        activations: Memory of everything else that is alive between forward and backward pass.
        forward_peak: Most memory that a forward pass holds at once, the weights apart; gradients of earlier batches of
            the step are included, and so is the teacher's forward pass.
        backward_peak: The same of the backward passes, their gradients included.
        update_peak: The same of the update, gradients and state apart.
        teacher: Calls of the teacher's forward passes.
        accumulate: Batches of the step.
    """

    forward: list[Call]
    backward: list[Call]
    update: list[Call]
    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    forward_peak: int
    backward_peak: int
    update_peak: int
    given: int = 0
    teacher: list[Call] = field(default_factory=list)
    accumulate: int = 1

    def peak(self, replicas: int = 1) -> int:
        """Return the most memory that a step holds at once.

        `DistributedDataParallel` holds buffers as large as the gradients where there are several `replicas`.
        """
        lasting = self.parameters + self.optimizer + self.average + self.given
        lasting += self.gradients if replicas > 1 else 0
        return lasting + max(self.forward_peak, self.backward_peak, self.update_peak + self.gradients)


class _Counter(TorchDispatchMode):
    """Lists the calls of ops, and follows the memory of the tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.live = self.peak = 0
        self._held: set[int] = set()

    def take(self) -> list[Call]:
        """Return the calls since the last one of this method."""
        calls, self.calls = self.calls, []
        return calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        read, made = _tensors((args, kwargs)), _tensors(out)
        known = {id(x.untyped_storage()) for x in read}
        fresh = [x for x in made if id(x.untyped_storage()) not in known]
        for tensor in fresh:
            self._hold(tensor.untyped_storage())
        in_place = name.endswith("_")
        if name.startswith(("empty", "new_empty")) or not (in_place or fresh):
            return out  # nothing is moved, or only seen in another shape
        written = _tensors(args[:1]) if in_place else made
        if name in _OVERWRITING:
            read = _tensors((args[1:], kwargs))
        formula = _FORMULAS.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        half = bool(read) and read[0].dtype in _HALF
        self.calls.append(Call(str(func.overloadpacket), flops, sum(map(_bytes, read + written)), half))
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._held:
            return
        self._held.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.live -= size


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; those of a broadcast axis are one element."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def _total(tensors: list[Tensor]) -> int:
    return sum(storage.nbytes() for storage in {id(s): s for s in (x.untyped_storage() for x in tensors)}.values())


def count(recipe: Recipe, batch: int, *, classes: int, checkpointing: bool = False, foreach: bool = True) -> StepCost:
    """Return what a step costs that `visionmix train` makes by `recipe`, the loss scaler and a teacher's loss apart.

    Args:
        recipe: Settings of the run.
        batch: Images that this process takes at once; a step takes `train.accumulate` such batches.
        classes: Outputs of the model.
        checkpointing: Whether the model computes its blocks again in the backward pass, instead of keeping their
            activations.
        foreach: Whether the optimiser's ops take all parameters at once, as they do on GPUs.

    Raises:
        ValueError: the recipe names a model, an optimiser or arguments that do not exist or fit, or the model does not
            take such images, or cannot checkpoint.
    """
    with torch.device("meta"):
        model = models.create_model(
            recipe.model.name, num_classes=classes, reduction=recipe.model.reduction, **recipe.model.kwargs
        )
        teacher = _teacher(recipe)
    if checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ValueError(f"model {recipe.model.name!r} has no activation checkpointing") from error
    average = 0 if recipe.train.ema_decay is None else _total([*model.parameters(), *model.buffers()])
    if recipe.train.amp == "pure_bfloat16":
        model.to(torch.bfloat16)
    update, update_peak, state = _count_optimizer(model, recipe, foreach)
    forward, backward, taught = [], [], []
    forward_peak = backward_peak = activations = 0
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")  # PyTorch tells of kernels that it does not call here
        model.to_empty(device="cpu").train()
        if teacher:
            teacher.to_empty(device="cpu").eval().requires_grad_(False)
        with _Counter() as counter:
            for number in range(min(recipe.train.accumulate, 2)):  # the later ones are as the second
                times = recipe.train.accumulate - 1 if number else 1
                held = counter.live
                size = recipe.data.image_size
                images = torch.empty(batch, 3, size, size)
                counter.peak = counter.live
                value = loss(model, recipe, images, torch.empty(batch, classes))
                forward += counter.take() * times
                if teacher:
                    with torch.no_grad(), autocast(images.device, recipe.train.amp):
                        teacher(images)
                    taught += counter.take() * times
                activations = activations or counter.live - held
                forward_peak = max(forward_peak, counter.peak)
                counter.peak = counter.live
                value.backward()
                backward += counter.take() * times
                backward_peak = max(backward_peak, counter.peak)
                del value, images
            if recipe.optimizer.clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_grad, foreach=foreach)
        gradients = _total([value.grad for value in model.parameters() if value.grad is not None])
        weights = _total([*model.parameters(), *model.buffers()])
        given = _total([*teacher.parameters(), *teacher.buffers()]) if teacher else 0
    if average:  # reads both, writes one
        copied = average if average != weights else 0  # of weights in 16 bits, to which the average is not
        update.append(Call("moving average", 0, 3 * average + (weights + copied if copied else 0)))
        update_peak = max(update_peak, copied)
    return StepCost(
        forward=forward,
        backward=backward,
        update=counter.take() + update,
        parameters=weights,
        gradients=gradients,
        optimizer=state,
        average=average,
        activations=activations,
        forward_peak=forward_peak,
        backward_peak=backward_peak,
        update_peak=update_peak,
        given=given,
        teacher=taught,
        accumulate=recipe.train.accumulate,
    )


def _teacher(recipe: Recipe) -> nn.Module | None:
    """Return the teacher without weights, where there is one; raises ValueError where the recipe does not name it."""
    if not recipe.distill.on:
        return None
    if recipe.distill.teacher is None:
        raise ValueError(
            f"distill.checkpoint={recipe.distill.checkpoint!r} is not read for a plan; name its model by "
            "--set distill.teacher=NAME"
        )
    return models.create_model(recipe.distill.teacher)


def loss(model: nn.Module, recipe: Recipe, images: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of a step's forward pass; raises ValueError where the model does not take the images."""
    try:
        with autocast(images.device, recipe.train.amp):
            logits = model(images.to(model_dtype(model)))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"model {recipe.model.name!r} does not take RGB images of image_size={images.shape[-1]}: {error}; "
            f"build it for them, e.g. --set model.kwargs.img_size={images.shape[-1]}"
        ) from error
    return F.cross_entropy(logits.float(), targets)


def _count_optimizer(model: nn.Module, recipe: Recipe, foreach: bool) -> tuple[list[Call], int, int]:
    """Return the calls of the optimiser, the most memory that they hold at once, and that of its state.

    `model` is on the meta device: an optimiser may read its step's number, which a fake tensor lacks.
    """
    wanted = recipe.optimizer
    if wanted.name not in list_optimizers():
        hint = nearest(wanted.name, list_optimizers())
        raise ValueError(f"optimizer.name={wanted.name!r} is not one of timm.optim.list_optimizers(){hint}")
    try:
        optimizer = create_optimizer_v2(
            model, opt=wanted.name, lr=wanted.lr, weight_decay=wanted.weight_decay, **wanted.kwargs
        )
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = foreach
        for value in model.parameters():
            value.grad = torch.empty_like(value)
        for _ in range(2):  # the first step makes the state
            with _Counter() as counter:
                optimizer.step()
    except TypeError as error:
        raise ValueError(f"optimizer {wanted.name!r} does not take kwargs={wanted.kwargs}: {error}") from error
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # it reads values, or needs a GPU
        raise ValueError(
            f"optimizer.name={wanted.name!r} cannot be counted without data: {str(error).splitlines()[0]}; "
            "plan with one that can, e.g. --set optimizer.name=adamw"
        ) from error
    optimizer.zero_grad()
    return counter.take(), counter.peak, _total(_tensors(list(optimizer.state.values())))
