"""Why models of timm that are like ViT have no token that may go, and wrappers none at all."""

_WINDOWS = "its attention cuts whole maps into windows, and its stages shrink them"
_BIAS = "its attention has a bias for every pair of cells"
_WRAPPED = "it wraps another model (reduce that one, then wrap or compile the result)"
_ROTARY = "its attention turns queries and keys by the places of a whole map's cells"
# By the name of the class.
_REASONS = {
    "Beit": _BIAS,
    "VisionTransformerRelPos": _BIAS,
    "Eva": _ROTARY,
    "VisionTransformerSAM": "its attention cuts whole maps into windows and has a bias for every pair of cells",
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "SwinTransformerV2Cr": _WINDOWS,
    "MaxxVit": _WINDOWS,
    "DaVit": _WINDOWS,
    "Twins": _WINDOWS,
    "Hiera": "its stages pool groups of cells by their places in the sequence",
    "HieraDet": "its attention cuts whole maps into windows, and its stages pool them",
    "MultiScaleVit": "its attention pools whole maps",
    "PyramidVisionTransformerV2": "its attention shrinks whole maps",
    "PoolingVisionTransformer": "its stages pool whole maps",
    "NaFlexVit": "the images of a batch have grids of their own, which the method's tokens do not keep",
    "Cait": "its class token joins after the cells, in blocks of its own",
    "Xcit": "its attention is one of channels, and a convolution between the cells follows it",
    "TNT": "each token has pixels of its own beside it",
    "VOLO": "its outlook attention reads whole maps",
    "CrossVit": "it has two sequences, which exchange their class tokens",
    "ConVit": _BIAS,
    "OptimizedModule": _WRAPPED,
    "DataParallel": _WRAPPED,
    "DistributedDataParallel": _WRAPPED,
    "ModelEmaV3": _WRAPPED,
}


def reason(cls: type) -> str | None:
    """Return why models of the class `cls` cannot be reduced, a clause; None where nothing is known of it."""
    return next((_REASONS[each.__name__] for each in cls.__mro__ if each.__name__ in _REASONS), None)
