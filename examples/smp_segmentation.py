"""Unet, FPN and UPerNet of segmentation_models_pytorch on a visionmix encoder: training steps on random masks.

python examples/smp_segmentation.py                                           # a tiny model
python examples/smp_segmentation.py --encoder vmamba_tiny --pretrained --decoder UPerNet --size 512
"""

import argparse

import segmentation_models_pytorch as smp
import torch

import visionmix  # noqa: F401  registers the models with timm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--encoder", default="test_vmamba", help="a model whose maps have the strides 4, 8, 16 and 32")
    parser.add_argument("--pretrained", action="store_true", help="begin with the published weights of the encoder")
    parser.add_argument("--decoder", nargs="+", default=["Unet", "FPN", "UPerNet"])
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="a multiple of 32")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)

    images = torch.randn(2, 3, args.size, args.size)
    masks = torch.randint(args.classes, (2, args.size, args.size))
    for decoder in args.decoder:
        model = smp.create_model(
            decoder,
            encoder_name=f"tu-{args.encoder}",  # "tu-" takes any model of timm
            encoder_weights="imagenet" if args.pretrained else None,
            classes=args.classes,
        )
        loss_of = smp.losses.DiceLoss("multiclass")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(args.steps):
            logits = model(images)
            loss = loss_of(logits, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert logits.shape == (2, args.classes, args.size, args.size)
        print(f"{decoder} on {args.encoder}: loss {loss.item():.3f} after {args.steps} steps")


if __name__ == "__main__":
    main()
