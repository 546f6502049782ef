"""Train a visionmix model with Lightning.

python examples/lightning_classification.py                                   # a tiny model, random images
python examples/lightning_classification.py --model vig_s --pretrained --data flowers/train --steps 2000
"""

import argparse

import lightning as L
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.datasets import FakeData, ImageFolder

import visionmix  # noqa: F401  registers the models with timm


class Classifier(L.LightningModule):
    def __init__(self, name: str, num_classes: int, lr: float, **options) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(name, num_classes=num_classes, **options)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        # Layers with a schedule over training, such as SLAB's norms, are told how far it is; others ignore it.
        self.model.set_progress(min(self.global_step / self.trainer.estimated_stepping_batches, 1.0))
        images, labels = batch
        loss = cross_entropy(self.model(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # timm's groups: what `model.no_weight_decay()` names is not decayed.
        return create_optimizer_v2(self.model, opt="adamw", lr=self.hparams.lr, weight_decay=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="test_vig_h")
    parser.add_argument("--pretrained", action="store_true", help="begin with the published weights")
    parser.add_argument("--data", help="folder with a folder of images per class; random images without it")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()

    data = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(args.model).to_dict())
    transform = create_transform(**data, is_training=True)
    images = ImageFolder(args.data, transform) if args.data else FakeData(16, data["input_size"], 10, transform)
    classes = len(images.classes) if args.data else 10
    loader = torch.utils.data.DataLoader(images, 8, shuffle=True)
    classifier = Classifier(args.model, classes, lr=1e-4, pretrained=args.pretrained)
    trainer = L.Trainer(max_steps=args.steps, logger=False, enable_checkpointing=bool(args.data))
    trainer.fit(classifier, loader)
    print(f"{args.model}: {trainer.global_step} steps, loss {trainer.callback_metrics['train_loss']:.3f}")


if __name__ == "__main__":
    main()
