"""Efficient vision backbones and token mixers; importing registers every model with timm."""

from pathlib import Path

_FOLDER = Path(__file__).parent
if not (_FOLDER / "kernels").is_dir() and (_FOLDER.parent / "pyproject.toml").is_file():
    # A clone's own folder, which Python reads first when it is started there, whatever is installed: the packages that
    # `pyproject.toml` maps lie beside this one.
    __path__.append(str(_FOLDER.parent))

from visionmix import adaptive, kernels, models, reduction, scans  # noqa: E402
from visionmix.mixers import create_mixer, list_mixers  # noqa: E402
from visionmix.models import list_models  # noqa: E402

__all__ = ["adaptive", "create_mixer", "kernels", "list_mixers", "list_models", "models", "reduction", "scans"]

__version__ = "0.1.0"
