# MSVMamba (arXiv 2405.14174), github.com/YuHengsss/MSVMamba,
# detection/configs/ms_vssm/mask_rcnn_ms_vssm_fpn_coco_micro_3x.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="msvmamba_micro", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 256, 512]))
