"""Recipes: `imagenet/*.yaml` and `demo/*.yaml`, read by `visionmix.tools.recipe`."""
