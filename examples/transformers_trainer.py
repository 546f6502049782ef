"""Fine-tune a visionmix model with the Trainer of transformers, save it, and open it again.

python examples/transformers_trainer.py                                       # a tiny model, random images
python examples/transformers_trainer.py --model vmamba_tiny --pretrained --data flowers/train --steps 2000
"""

import argparse
import tempfile

import timm
import torch
import transformers as hf
from timm.data import create_transform, resolve_data_config
from torchvision.datasets import FakeData, ImageFolder

import visionmix  # noqa: F401  registers the models with timm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="test_vmamba")
    parser.add_argument("--pretrained", action="store_true", help="begin with the published weights")
    parser.add_argument("--data", help="folder with a folder of images per class; random images without it")
    parser.add_argument("--output", help="folder for the result; a temporary one without it")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()

    cfg = timm.get_pretrained_cfg(args.model).to_dict()
    data = resolve_data_config({}, pretrained_cfg=cfg)
    transform = create_transform(**data, is_training=True)
    images = ImageFolder(args.data, transform) if args.data else FakeData(16, data["input_size"], 10, transform)

    config = hf.TimmWrapperConfig(architecture=args.model, num_labels=len(images.classes) if args.data else 10)
    config.pretrained_cfg = cfg  # from which the saved folder's image processor reads size, mean and deviation
    model = hf.TimmWrapperForImageClassification(config)
    if args.pretrained:
        model.timm_model = timm.create_model(args.model, pretrained=True, num_classes=config.num_labels)

    def collate(samples: list) -> dict[str, torch.Tensor]:
        pixels, labels = zip(*samples, strict=True)
        return {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels)}

    with tempfile.TemporaryDirectory() as scratch:
        settings = hf.TrainingArguments(
            args.output or scratch, max_steps=args.steps, per_device_train_batch_size=8,
            remove_unused_columns=False, report_to="none", logging_steps=50, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = hf.Trainer(model, settings, data_collator=collate, train_dataset=images)
        trainer.train()
        trainer.save_model()
        again = hf.AutoModelForImageClassification.from_pretrained(settings.output_dir).to(model.device).eval()
    x = torch.randn(1, *data["input_size"], device=model.device)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model.eval()(x).logits)
    print(f"{args.model}: {args.steps} steps, saved, opened again, the same logits")


if __name__ == "__main__":
    main()
