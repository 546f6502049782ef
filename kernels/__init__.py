"""Fused ops: selective scans, gated linear attention and neighborhood attention, on any device.

`use` chooses the implementation of all of them and `backends` says which are ready.
"""

if __name__ == "kernels":  # a script in the repository's root asked for a package of this name

    def __getattr__(name: str) -> object:
        if name.startswith("__"):  # transformers looks for the version of Hugging Face's package
            raise AttributeError(name)
        raise ImportError("import this as visionmix.kernels (from an installed visionmix: pip install -e .)")

else:
    from visionmix.kernels.dispatch import Unavailable, backends, use
    from visionmix.kernels.flops import fvcore_handles
    from visionmix.kernels.gated_linear_attention import bidirectional_gated_linear_attention, gated_linear_attention
    from visionmix.kernels.neighborhood_attention import na1d, na2d, na2d_av, na2d_qk, na3d
    from visionmix.kernels.selective_scan import selective_scan
    from visionmix.kernels.selective_scan_2d import selective_scan_2d

__all__ = [
    "Unavailable",
    "backends",
    "bidirectional_gated_linear_attention",
    "fvcore_handles",
    "gated_linear_attention",
    "na1d",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "selective_scan",
    "selective_scan_2d",
    "use",
]
