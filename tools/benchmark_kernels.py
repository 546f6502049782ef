"""Time and memory of the fused ops beside their peers and the least possible: `python tools/benchmark_kernels.py`.

Appends a row per op, pass and implementation to benchmarks/kernels.csv. Each op and its peers are measured in one run,
with the threads given. The floor is the time of the bytes that must move and the FLOPs that must be done, at the speeds
of copying and of matrix products that are measured at the start. A GPU gets batches, so that launches do not count:
`--device cuda --batch 16 --dtype bfloat16`. mamba_ssm is a peer there where it is installed.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from visionmix import kernels
from visionmix.tools import display, peers, timing
from visionmix.tools.arguments import check_least, check_out

_CSV = Path("benchmarks/kernels.csv")
_PEERS = ("token_loop", "mambapy", "mamba_ssm", "index_select", "flex_attention", "gather", "chunked")


@dataclass(frozen=True)
class Setting:
    """Where the ops run and on what: `dtype` is that of activations; a scan's A and D stay float32, as in models."""

    device: str
    dtype: torch.dtype
    batch: int

    def normal(self, *shape: int) -> Tensor:
        """Return activations (batch, *shape)."""
        return torch.randn(self.batch, *shape, device=self.device).to(self.dtype)

    @property
    def tolerance(self) -> float:
        """Of a peer's outputs, relative to the largest."""
        return 1e-4 if self.dtype == torch.float32 else 3e-2


@dataclass(frozen=True)
class Case:
    """An op at one shape.

    Attributes:
        inputs: Makes the tensors.
        ours: The op, called on them.
        peers: Functions of the same tensors that compute the same, by name.
        flops: Floating-point operations of a forward pass, without exponentials.
        forward_only: Peers whose backward pass does not exist or takes minutes.
    """

    inputs: Callable[[], list[Tensor]]
    ours: Callable[..., Tensor]
    peers: dict[str, Callable[..., Tensor]]
    flops: float
    forward_only: tuple[str, ...] = field(default=())


def _scan_inputs(setting: Setting, dim: int, length: int, states: int) -> Callable[[], list[Tensor]]:
    def make() -> list[Tensor]:
        torch.manual_seed(0)
        u, delta = (setting.normal(dim, length) for _ in range(2))
        B, C = (setting.normal(states, length) for _ in range(2))
        A = -torch.arange(1.0, states + 1, device=setting.device).repeat(dim, 1)
        return [u, delta - 3, A, B, C, torch.ones(dim, device=setting.device)]

    return make


def _ours_scan(u, delta, A, B, C, D):
    return kernels.selective_scan(u, delta, A, B, C, D, delta_softplus=True)


_CROSS = ("raster", "raster_transposed", "raster_reversed", "raster_transposed_reversed")


def _cross_inputs(setting: Setting, side: int, channels: int, states: int) -> Callable[[], list[Tensor]]:
    def make() -> list[Tensor]:
        torch.manual_seed(0)
        x = setting.normal(side, side, channels)
        delta = setting.normal(side, side, 4, channels) - 3
        B, C = (setting.normal(side, side, 4, states) for _ in range(2))
        A = -torch.ones(4, channels, states, device=setting.device)
        return [x, delta, A, B, C, torch.ones(4, channels, device=setting.device)]

    return make


def _ours_cross(x, delta, A, B, C, D):
    return kernels.selective_scan_2d(x, delta, A, B, C, D, delta_softplus=True, orders=_CROSS)


def _cross_by_index(x, delta, A, B, C, D):
    """The four directions by index_select and the 1-D op's PyTorch path."""
    from visionmix import scans

    height, width = x.shape[1:3]
    out = 0
    with kernels.use("reference"):
        for route, name in enumerate(_CROSS):
            index, inverse = scans.order(name, height, width, device=x.device)

            def sequence(tensor, index=index):
                return tensor.flatten(1, 2).index_select(1, index).transpose(1, 2)

            y = kernels.selective_scan(
                sequence(x), sequence(delta[..., route, :]), A[route], sequence(B[..., route, :]),
                sequence(C[..., route, :]), D[route], delta_softplus=True,
            )  # fmt: skip
            out = out + y.transpose(1, 2).index_select(1, inverse)
    return out.unflatten(1, (height, width))


def _gla_inputs(setting: Setting, length: int, gates: int) -> Callable[[], list[Tensor]]:
    def make() -> list[Tensor]:
        torch.manual_seed(0)
        q, k = (setting.normal(length, 12, 32) for _ in range(2))
        v = setting.normal(length, 12, 64)
        g = [F.logsigmoid(setting.normal(length, 12, 32)) / 16 for _ in range(gates)]
        return [q, k, v, *g]

    return make


def _ours_gla(q, k, v, g):
    return kernels.gated_linear_attention(q, k, v, g)[0]


def _chunked_gla(q, k, v, g):
    with kernels.use("reference"):
        return kernels.gated_linear_attention(q, k, v, g)[0]


def _gla_both_loops(q, k, v, forward, backward):
    flipped = peers.gated_linear_attention_token_loop(q.flip(1), k.flip(1), v.flip(1), backward.flip(1)).flip(1)
    return (peers.gated_linear_attention_token_loop(q, k, v, forward) + flipped) / 2


def _chunked_gla_both(*inputs):
    with kernels.use("reference"):
        return kernels.bidirectional_gated_linear_attention(*inputs)


def _na_inputs(setting: Setting) -> list[Tensor]:
    torch.manual_seed(0)
    return [setting.normal(56, 56, 3, 32) for _ in range(3)]


def _na_case(setting: Setting, dilation: int) -> Case:
    flex = peers.na2d_flex_attention(56, 56, 7, dilation, setting.device)
    return Case(
        lambda: _na_inputs(setting),
        lambda q, k, v: kernels.na2d(q, k, v, kernel_size=7, dilation=dilation),
        {"flex_attention": flex, "gather": lambda q, k, v: peers.na2d_gather(q, k, v, 7, dilation)},
        4.0 * setting.batch * 56 * 56 * 49 * 3 * 32,
        forward_only=("flex_attention",) if setting.device == "cpu" else (),  # it has no backward pass there
    )


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """Return every case by name; making one may compile a peer."""
    batch, full = setting.batch, setting.dtype == torch.float32

    def named(shape: str) -> str:
        return shape if full else f"{shape} {str(setting.dtype).removeprefix('torch.')}"

    scans = {"token_loop": peers.selective_scan_token_loop, "mambapy": peers.selective_scan_mambapy} if full else {}
    if setting.device == "cuda" and find_spec("mamba_ssm"):
        scans["mamba_ssm"] = peers.selective_scan_mamba_ssm
    made = {
        named(f"selective_scan {batch}x384x3136 N16"): lambda: Case(
            _scan_inputs(setting, 384, 3136, 16), _ours_scan, scans, 9.0 * batch * 384 * 3136 * 16
        ),
        named(f"selective_scan_2d cross {_batched(batch)}56x56x192 N1"): lambda: Case(
            _cross_inputs(setting, 56, 192, 1), _ours_cross, {"index_select": _cross_by_index},
            9.0 * batch * 4 * 192 * 3136,
        ),
        named(f"na2d {_batched(batch)}56x56 k7 3x32 dilation 1"): lambda: _na_case(setting, 1),
        named(f"na2d {_batched(batch)}56x56 k7 3x32 dilation 8"): lambda: _na_case(setting, 8),
    }  # fmt: skip
    one_way = {"token_loop": peers.gated_linear_attention_token_loop} if full else {}
    both_ways = {"token_loop": _gla_both_loops} if full else {}
    for side in (64, 14):
        length = side * side
        shape = f"{_batched(batch)}{side}x{side} 12x32x64"
        made[named(f"gated_linear_attention {shape}")] = lambda length=length: Case(
            _gla_inputs(setting, length, 1), _ours_gla, one_way | {"chunked": _chunked_gla},
            5.0 * batch * 12 * length * 32 * 64,
        )  # fmt: skip
        made[named(f"bidirectional_gated_linear_attention {shape}")] = lambda length=length: Case(
            _gla_inputs(setting, length, 2), kernels.bidirectional_gated_linear_attention,
            both_ways | {"chunked": _chunked_gla_both},
            10.0 * batch * 12 * length * 32 * 64,
        )  # fmt: skip
    return made


def _batched(batch: int) -> str:
    return "" if batch == 1 else f"{batch}x"


def _check_equal(case: Case, tolerance: float) -> None:
    inputs = case.inputs()
    with torch.no_grad():
        expected = case.ours(*inputs)
        for name, peer in case.peers.items():
            error = ((peer(*inputs) - expected).abs().max() / expected.abs().max()).item()
            if not error <= tolerance:
                raise RuntimeError(f"{name} differs from the op by {error:.1e} of the largest output; nothing is timed")


def run(name: str, case: Case, setting: Setting, *, memory: bool, skip: set[str]) -> list[dict[str, object]]:
    """Return the rows of one case, the op first."""
    case = replace(case, peers={label: peer for label, peer in case.peers.items() if label not in skip})
    _check_equal(case, setting.tolerance)
    copied, multiplied = timing.machine_limits(setting.device, setting.dtype)
    inputs = case.inputs()
    with torch.no_grad():
        out = case.ours(*inputs)
    moved = sum(tensor.nbytes for tensor in [*inputs, out])
    rows = []
    for backward in (False, True):
        # Backward reads the inputs and the output's gradient and writes the inputs' gradients; its products are twice
        # the forward's, and one more to recompute the states, which no op keeps.
        floor = max(moved * (3 if backward else 1) / copied, case.flops * (4 if backward else 1) / multiplied)
        our_time = None
        for label, function in {"visionmix": case.ours, **case.peers}.items():
            if backward and label in case.forward_only:
                continue
            timing.wait_until_quiet()
            call = timing.passes(function, inputs, backward)
            time = timing.measure(call)
            our_time = our_time or time.p50
            peak = float("nan")
            if memory and setting.device == "cuda":
                peak = timing.peak_gpu_memory(call)
            elif memory:
                batch = ["--batch", str(setting.batch)]
                peak = timing.peak_memory([__file__, *batch, "--child", name, label, str(int(backward))])
            rows.append({
                "op": name,
                "pass": "forward + backward" if backward else "forward",
                "implementation": label,
                "p20_ms": f"{time.p20 * 1e3:.4g}",
                "p50_ms": f"{time.p50 * 1e3:.4g}",
                "p80_ms": f"{time.p80 * 1e3:.4g}",
                "times_ours": f"{time.p50 / our_time:.3g}",
                "floor_ms": f"{floor * 1e3:.3g}",
                "times_floor": f"{time.p50 / floor:.3g}",
                "peak_mb": f"{peak / 1e6:.4g}",
                **timing.conditions(setting.device),
            })  # fmt: skip
    return rows


def _child(name: str, label: str, backward: bool, setting: Setting) -> None:
    case = cases(setting)[name]()
    function = case.ours if label == "visionmix" else case.peers[label]
    inputs = case.inputs()
    # A small call first, so that libraries and compiled code are loaded before the size is read.
    kernels.backends()
    timing.print_growth(timing.passes(function, inputs, backward))


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return the exit status."""
    parser = argparse.ArgumentParser(prog="visionmix benchmark-kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the activations")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--skip", nargs="*", default=[], choices=_PEERS, help="peers to leave out")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--csv", type=Path, default=_CSV, help="file the rows are appended to")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        check_least(1, threads=args.threads, batch=args.batch)
        check_out(args.csv, name="--csv")
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    setting = Setting(args.device, getattr(torch, args.dtype), args.batch)
    if args.child:
        name, label, backward = args.child
        _child(name, label, backward == "1", setting)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU was found")
    chosen = {name: make for name, make in cases(setting).items() if args.only in name}
    if not chosen:
        parser.error(f"--only {args.only!r} matches none of {list(cases(setting))}")
    console = display.table_console()
    for name, make in chosen.items():
        try:
            rows = run(name, make(), setting, memory=not args.no_memory, skip=set(args.skip))
        except timing.NoisyMachine as error:
            console.print(f"{name}: nothing recorded: {error}", style="red")
            return 1
        timing.append_rows(args.csv, rows)
        table = Table(title=name)
        columns = ["pass", "implementation", "p50_ms", "times_ours", "floor_ms", "times_floor", "peak_mb"]
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*(str(row[column]) for column in columns))
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
