"""RT-DETR, DETR and Mask2Former of transformers on a visionmix backbone: one training step each on random images.

python examples/transformers_detection.py                                     # tiny heads on a tiny model
python examples/transformers_detection.py --model vmamba_tiny --pretrained --size 640 --dim 256
"""

import argparse

import timm
import torch
import transformers as hf

import visionmix  # noqa: F401  registers the models with timm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="test_vmamba", help="a model of four stages")
    parser.add_argument("--pretrained", action="store_true", help="begin with the published weights of the backbone")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--dim", type=int, default=32, help="width of the heads")
    args = parser.parse_args()

    info = timm.create_model(args.model, features_only=True).feature_info  # stages 0 to 3, strides 4 to 32
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    widths = {"d_model": args.dim, "encoder_ffn_dim": 2 * args.dim, "decoder_ffn_dim": 2 * args.dim}

    def backbone(*stages: int) -> hf.TimmBackboneConfig:
        return hf.TimmBackboneConfig(backbone=args.model, out_indices=list(stages))

    models = {
        "RT-DETR": hf.RTDetrForObjectDetection(hf.RTDetrConfig(
            backbone_config=backbone(1, 2, 3), encoder_in_channels=info.channels([1, 2, 3]), num_labels=3,
            encoder_hidden_dim=args.dim, decoder_in_channels=[args.dim] * 3, num_queries=20, **heads, **widths,
        )),
        "DETR": hf.DetrForObjectDetection(hf.DetrConfig(
            backbone_config=backbone(3), num_labels=3, num_queries=20, **heads, **widths,
        )),
        "Mask2Former": hf.Mask2FormerForUniversalSegmentation(hf.Mask2FormerConfig(
            backbone_config=backbone(0, 1, 2, 3), feature_strides=info.reduction(), num_labels=3,
            hidden_dim=args.dim, feature_size=args.dim, mask_feature_size=args.dim, num_attention_heads=2,
            dim_feedforward=2 * args.dim, encoder_feedforward_dim=2 * args.dim, encoder_layers=1, decoder_layers=2,
            num_queries=20, train_num_points=64,
        )),
    }  # fmt: skip
    image = torch.randn(1, 3, args.size, args.size)
    boxes = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])}]  # x, y, width, height
    for name, model in models.items():
        if args.pretrained:
            weights = timm.create_model(args.model, pretrained=True, num_classes=0).state_dict()
            maps = next(each for each in model.modules() if isinstance(each, timm.models.FeatureGetterNet))
            maps.model.load_state_dict(weights, strict=False)  # layers behind the last chosen stage are left out
        masks = {"mask_labels": [torch.ones(1, args.size, args.size)], "class_labels": [torch.tensor([1])]}
        loss = model.train()(pixel_values=image, **(masks if name == "Mask2Former" else {"labels": boxes})).loss
        loss.backward()
        print(f"{name} on {args.model}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
