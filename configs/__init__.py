"""Recipes: `imagenet/`, `finetune/`, `pretrain/` and `demo/*.yaml`, read by `visionmix.tools.recipe`."""
