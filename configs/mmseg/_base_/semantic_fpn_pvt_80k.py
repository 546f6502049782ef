# Semantic FPN with a PVT (arXiv 2102.12122): no norms after the maps.
_base_ = "semantic_fpn_80k.py"
model = dict(backbone=dict(norm_output=False))
