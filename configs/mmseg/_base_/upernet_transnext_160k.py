# UperNet with TransNeXt (arXiv 2311.17132): its temperatures and learned addends are not decayed.
_base_ = "upernet_160k.py"
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "query_embedding": dict(decay_mult=0.0),
            "local_bias": dict(decay_mult=0.0),
            "temperature": dict(decay_mult=0.0),
        }
    ),
)
