"""The devices that a run may be planned on: their peak rates, and the shares of these that are assumed."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peak rates of a device, without sparsity, and where they are printed.

    Attributes:
        half: FLOPs a second of matrix products in bfloat16 and float16, with sums in float32.
        single: FLOPs a second in float32.
        bandwidth: Bytes a second of its memory.
        memory: Bytes; data sheets print GiB as GB.
        link: Bytes a second that it sends to the others of its node.
        network: Bytes a second that it sends to other nodes: its share of the network cards of the vendor's server.
        source: The data sheet.
        cached: For calls that move few enough bytes for a cache to hold them, the most bytes and the bytes a second,
            rising.
    """

    half: float
    single: float
    bandwidth: float
    memory: float
    link: float
    network: float
    source: str
    cached: tuple[tuple[int, float], ...] = ()

    def rate(self, moved: int) -> float:
        """Return the bytes a second at which a call moves so many."""
        return next((rate for most, rate in self.cached if moved <= most), self.bandwidth)


DEVICES = {
    "a100": Device(
        312e12, 19.5e12, 2.039e12, 80 * GIB, 300e9, 25e9, "NVIDIA A100 80GB SXM and DGX A100 data sheets, 2021"
    ),
    "h100": Device(
        989e12, 67e12, 3.35e12, 80 * GIB, 450e9, 50e9, "NVIDIA H100 SXM and DGX H100 data sheets, 2023"
    ),
    "h200": Device(
        989e12, 67e12, 4.8e12, 141 * GIB, 450e9, 50e9, "NVIDIA H200 SXM and DGX H200 data sheets, 2024"
    ),
    "b200": Device(
        2.25e15, 75e12, 8e12, 180 * GIB, 900e9, 50e9, "NVIDIA HGX B200 and DGX B200 data sheets, 2025"
    ),
    "rtx4090": Device(
        165e12, 82.6e12, 1.008e12, 24 * GIB, 32e9, 12.5e9,
        "NVIDIA Ada GPU architecture white paper, 2022; PCIe 4.0 x16, and 100 Gb/s of network a GPU supposed",
    ),
    "mi300x": Device(
        1307e12, 163.4e12, 5.3e12, 192 * GIB, 448e9, 50e9,
        "AMD Instinct MI300X and MI300X platform data sheets, 2023; 400 Gb/s of network a GPU supposed",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Assumed:
    """What is assumed, not counted.

    Attributes:
        compute: Share of the peak FLOP rate that an op reaches.
        memory: Share of the peak bandwidth that an op reaches.
        fused: Share of either that the library's fused ops reach.
        link: Share of the bandwidth between devices that an all-reduce reaches.
        overlap: Share of the backward pass that hides an all-reduce.
        launch: Seconds of the host to start an op.
        usable: Share of a device's memory that tensors may take.
    """

    compute: float
    memory: float
    fused: float
    link: float
    overlap: float
    launch: float
    usable: float


GPU = Assumed(compute=0.7, memory=0.55, fused=0.02, link=0.8, overlap=0.8, launch=40e-6, usable=0.9)
CPU = Assumed(compute=0.85, memory=0.6, fused=0.3, link=1.0, overlap=0.0, launch=5e-6, usable=0.9)
OPTIONS = {
    "compute": "share of the peak FLOP rate that an op reaches",
    "memory": "share of the peak memory bandwidth that an op reaches",
    "fused": "share of either that this library's fused ops reach",
    "link": "share of the bandwidth between GPUs that an all-reduce reaches",
    "overlap": "share of the backward pass that hides the all-reduce",
    "launch": "seconds of the host to start an op",
    "usable": "share of a GPU's memory that tensors may take; the rest is for CUDA, its libraries and gaps",
}
