"""Recipes: `imagenet/*.yaml`, `finetune/*.yaml` and `demo/*.yaml`, read by `visionmix.tools.recipe`."""
