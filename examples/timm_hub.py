"""Save a model as timm saves it, open it again by its folder, and push it to the Hugging Face hub.

python examples/timm_hub.py                                                   # a tiny model, no network
python examples/timm_hub.py --model vmamba_tiny --checkpoint best.pth --classes 102 --push USER/flowers
"""

import argparse
import tempfile

import timm
import torch
from timm.models import push_to_hf_hub, save_for_hf

import visionmix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="test_vmamba")
    parser.add_argument("--checkpoint", help="weights to save; random ones without it")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--folder", help="where to save; a temporary folder without it")
    parser.add_argument("--push", help="repository to create, USER/NAME; needs a token (`hf auth login`)")
    args = parser.parse_args()

    # Options of the model go into the folder too: here its mixer, as a name or a dict, so that JSON can say it.
    model = timm.create_model(args.model, num_classes=args.classes, mixer={"name": "cross_scan", "order": "hilbert"})
    if args.checkpoint:
        visionmix.models.load_checkpoint(model, args.checkpoint)
    labels = {"label_names": [f"class {number}" for number in range(args.classes)]}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or scratch
        save_for_hf(model, folder, model_config=labels, safe_serialization=True)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model.eval()(images))
    print(f"{args.model}: saved, opened again with {again.num_classes} classes, the same logits")
    if args.push:
        push_to_hf_hub(model, args.push, model_config=labels, safe_serialization=True)
        print(f'import visionmix, timm; timm.create_model("hf-hub:{args.push}", pretrained=True)')


if __name__ == "__main__":
    main()
