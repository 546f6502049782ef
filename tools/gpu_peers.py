"""Other packages' kernels beside our ops on a GPU, on the same tensors: those installed, or given as source folders.

A peer is prepared once from an op's arguments: it imports its package, and brings the tensors into the layout that its
own model has them in. That takes no part in its time.
"""

import importlib
import inspect
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from visionmix.tools import peers

SOURCES = {
    "mamba_ssm": "a clone of state-spaces/mamba; its CUDA scan is built",
    "vmamba": "a clone of MzeroMiko/VMamba; its CUDA scan is built",
    "fla": "a clone of fla-org/flash-linear-attention",
    "natten": "a built clone of SHI-Labs/NATTEN",
}


class Missing(RuntimeError):
    """A peer is not at hand; says how to bring it."""


@dataclass(frozen=True)
class Ready:
    """A peer at work: `function` of `tensors` gives what our op's first output is, up to `view`'s strides.

    Attributes:
        function: What is timed.
        tensors: Its tensors, whose gradients the backward pass computes.
        view: Brings the output into the shape of ours.
    """

    function: Callable[..., Tensor]
    tensors: list[Tensor]
    view: Callable[[Tensor], Tensor] = lambda out: out


@dataclass(frozen=True)
class Peer:
    """A peer of an op.

    Attributes:
        name: Of the package, as the option for its folder takes it.
        prepare: Returns it `Ready` for an op's arguments; raises ImportError or `Missing` where it is not at hand.
        lacks: The op's arguments that it does not know; ours leaves them out beside it.
    """

    name: str
    prepare: Callable[[tuple], Ready]
    lacks: tuple[str, ...] = ()


def _import(name: str, package: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = f"install it, or give --peer {package}=FOLDER, {SOURCES[package]}"
        raise Missing(f"{package} is not at hand ({error}); {remedy}") from error


class _CudaScan(torch.autograd.Function):
    """The CUDA scan of mamba_ssm, or the one that VMamba's authors made of it (`oflex`)."""

    @staticmethod
    def forward(ctx, module, oflex, u, delta, A, B, C, D, bias):
        gate, end = ((), (1, True)) if oflex else ((None,), ())
        out, states, *_ = module.fwd(u, delta, A, B, C, D, *gate, bias, True, *end)
        ctx.save_for_backward(u, delta, A, B, C, D, bias, states)
        ctx.module, ctx.oflex = module, oflex
        return out

    @staticmethod
    def backward(ctx, grad):
        u, delta, A, B, C, D, bias, states = ctx.saved_tensors
        gate, end = ((), (True, 1)) if ctx.oflex else ((None,), (None, None, True, False))
        grads = ctx.module.bwd(u, delta, A, B, C, D, *gate, bias, grad.contiguous(), states, *end)
        return None, None, *grads[:7]


def _mamba_ssm(a) -> Ready:
    module = _import("selective_scan_cuda", "mamba_ssm")
    tensors = [a.u, a.delta, a.A, a.B, a.C, a.D, a.delta_bias]
    return Ready(lambda *tensors: _CudaScan.apply(module, False, *tensors), tensors)


def _vmamba(a) -> Ready:
    """The authors' scan of a map: copies in four directions, the low rank multiplied out, the scan, the sum."""
    module = _import("selective_scan_cuda_oflex", "vmamba")
    maps = _import("csm_triton", "vmamba")
    batch, height, width, channels = a.x.shape

    def by_order(x: Tensor) -> Tensor:
        """Return (batch, 4, features, length), each in its order, of (batch, height, width, 4, features)."""
        columns = x.transpose(1, 2)
        sequences = [(columns if order % 2 else x)[..., order, :].flatten(1, 2) for order in range(4)]
        return torch.stack([s.flip(1) if order > 1 else s for order, s in enumerate(sequences)], 1).mT.contiguous()

    def scan(x, delta, weight, A, B, C, D, bias):
        xs = maps.cross_scan_fn(x, in_channel_first=True, out_channel_first=True, scans=0)
        steps = torch.einsum("bkrl,kdr->bkdl", delta, weight)
        flat = (xs.flatten(1, 2), steps.flatten(1, 2), A.flatten(0, 1), B, C, D.flatten(), bias.flatten())
        ys = _CudaScan.apply(module, True, *flat).view(batch, 4, channels, height, width)
        return maps.cross_merge_fn(ys, in_channel_first=True, out_channel_first=True, scans=0).to(x.dtype)

    x = a.x.permute(0, 3, 1, 2).contiguous()
    tensors = [x, by_order(a.delta), a.delta_weight, a.A, by_order(a.B), by_order(a.C), a.D, a.delta_bias]
    return Ready(scan, tensors, lambda out: out.view(batch, channels, height, width).permute(0, 2, 3, 1))


def _fla(a) -> Ready:
    chunk_gla = _import("fla.ops.gla", "fla").chunk_gla
    # Older versions put heads first unless told.
    options = {"head_first": False} if "head_first" in inspect.signature(chunk_gla).parameters else {}
    return Ready(lambda q, k, v, g: chunk_gla(q, k, v, g, scale=a.scale, **options)[0], [a.q, a.k, a.v, a.g])


def _flex_attention(a) -> Ready:
    (height, width), kernel_size, dilation = a.query.shape[1:3], a.kernel_size[0], a.dilation[0]
    attend = peers.na2d_flex_attention(height, width, kernel_size, dilation, a.query.device.type)
    return Ready(attend, [a.query, a.key, a.value, a.relative_position_bias])


def _natten(a) -> Ready:
    na2d = _import("natten.functional", "natten").na2d
    options = {"kernel_size": tuple(a.kernel_size), "dilation": tuple(a.dilation)}
    return Ready(lambda q, k, v: na2d(q, k, v, **options), [a.query, a.key, a.value])


PEERS = {
    "selective_scan": [Peer("mamba_ssm", _mamba_ssm)],
    "selective_scan_2d": [Peer("vmamba", _vmamba)],
    "gated_linear_attention": [Peer("fla", _fla)],
    "neighborhood_attention": [
        Peer("flex_attention", _flex_attention),
        Peer("natten", _natten, lacks=("relative_position_bias",)),
    ],
}

# Name of the extension, and where a clone has its sources: those to compile, and the folder of their headers.
_EXTENSIONS = {
    "mamba_ssm": ("selective_scan_cuda", "csrc/selective_scan", "."),
    "vmamba": ("selective_scan_cuda_oflex", "kernels/selective_scan/csrc/selective_scan", "cusoflex"),
}
# Where a clone has the package that is imported.
_PACKAGES = {"vmamba": "classification/models", "fla": ".", "natten": "src"}
# CUDA 13's CUB no longer has these.
_RENAMED = {r"cub::LaneId\(\)": "(threadIdx.x & 31)", r"cub::CTA_SYNC\(\)": "__syncthreads()"}
_FLAGS = [
    "-O3",
    "-std=c++17",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT162_OPERATORS__",
    "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "--use_fast_math",
]


def check_folder(name: str, folder: Path) -> None:
    """Raise ValueError unless the folder holds what is needed of the peer."""
    if name not in SOURCES:
        raise ValueError(f"there is no peer {name!r} from a folder; there are {', '.join(SOURCES)}")
    needed = [_EXTENSIONS[name][1]] if name in _EXTENSIONS else [f"{_PACKAGES[name]}/{name}"]
    for path in needed:
        if not (folder / path).is_dir():
            raise ValueError(f"{folder} has no {path}; give {SOURCES[name]}")


def use_folder(name: str, folder: Path, build: Path) -> None:
    """Make a folder's package importable, and the extension that `build_extension` made of it, where it is there."""
    if name in _PACKAGES:
        sys.path.insert(0, str(folder / _PACKAGES[name]))
    if name in _EXTENSIONS:
        sys.path.insert(0, str(build / name))


def build_extension(name: str, folder: Path, build: Path) -> None:
    """Compile a clone's CUDA scan for this card into `build`/`name`, if the clone has one. Takes minutes."""
    if name not in _EXTENSIONS:
        return
    from torch.utils import cpp_extension

    module, sources, compiled = _EXTENSIONS[name]
    copy = build / name / "sources"
    if not copy.exists():  # else ninja compiles only what an earlier call did not finish
        shutil.copytree(folder / sources, copy)
        for path in copy.rglob("*.*"):
            text = path.read_text()
            for old, new in _RENAMED.items():
                text = re.sub(old, new, text)
            path.write_text(text)
    files = sorted(str(path) for path in (copy / compiled).iterdir() if path.suffix in (".cpp", ".cu"))
    cpp_extension.load(
        module,
        files,
        extra_cflags=["-O3", "-std=c++17"],
        extra_cuda_cflags=_FLAGS,
        extra_include_paths=[str(copy)],
        build_directory=str(build / name),
    )
