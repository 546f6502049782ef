# The same in half the steps, with twice the learning rate, as RaftMLP has it (arXiv 2108.04384).
_base_ = "semantic_fpn_pvt_80k.py"
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=40000, by_epoch=False)]
train_cfg = dict(max_iters=40000)
