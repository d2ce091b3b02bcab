"""Sample a trained hallusr generator: photos in, many plausible faces out.

    python sample.py PHOTO... --checkpoint C          grid, SR, hallucinations, mean, deviation map
    python sample.py SMALL... --checkpoint C --lr     the images are low-resolution already
    python sample.py PHOTO --checkpoint C --walk      and a GIF along a closed path in z
    python sample.py --evaluate FOLDER --checkpoint C Table 1's rows, and a JSON file of them

The faces are invented. They say which pictures fit the small one, never who is in it.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image

from hallusr import (LPIPS, contact_sheet, downscale, evaluate, from_uint8, load_checkpoint,
                     load_generator, lr_psnr, project_onto_lr, quantize, read_image, read_photo,
                     require, summarize, to_levels, upscale_nearest)
from train import FolderFaces, stack


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", nargs="*", metavar="PHOTO", help="image files")
    parser.add_argument("--checkpoint", required=True, help="last.pt or best.pt of a training run")
    parser.add_argument("--lr", action="store_true", help="the images are LR already")
    parser.add_argument("--samples", type=int, default=10, help="hallucinations (default: 10)")
    parser.add_argument("--temperature", type=float, default=1.0,
                        help="scale of z: 0 is SR, below 1 tamer, above 1 wilder (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of z (default: 0)")
    parser.add_argument("--project", action="store_true",
                        help="shift every block of the result to LR's value: exact consistency")
    parser.add_argument("--walk", action="store_true", help="write an animated GIF")
    parser.add_argument("--evaluate", metavar="FOLDER", help="score on the photos of this folder")
    parser.add_argument("--slice", default=":", metavar="FROM:TO",
                        help="which photos of the folder, in order of name (default: all)")
    parser.add_argument("--out", default="samples", help="folder for results (default: samples)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found = parser.parse_args(arguments)
    require(bool(found.photos) or found.evaluate is not None,
            "nothing to do: name at least one photo, or a folder with --evaluate")
    require(found.samples >= 1, f"--samples must be 1 or more, got {found.samples}")
    require(found.temperature >= 0, f"--temperature must be >= 0, got {found.temperature}")
    return found


def low_resolution(path: str, size: int, scale: int, is_lr: bool) -> tuple:
    """The LR image of a file, (1, 3, h, w) in [-1, 1], and HR where the file was a photo."""
    if is_lr:
        return from_uint8(read_image(path))[None], None
    hr = from_uint8(read_photo(path, size))[None]
    return quantize(downscale(hr, scale)), hr


@torch.no_grad()
def sample(generator, lr, arguments) -> dict:
    """SR and K hallucinations of one LR image, 8-bit levels: {name: (1, 3, H, W)}."""
    rng = torch.Generator().manual_seed(arguments.seed)
    z = arguments.temperature * torch.randn(arguments.samples, generator.z_dim, generator=rng)
    z = torch.cat([torch.zeros(1, generator.z_dim), z]).to(lr.device)
    images = generator.sample(lr.expand(len(z), -1, -1, -1), z)
    if arguments.project:
        images = quantize(project_onto_lr(images, lr.expand(len(z), -1, -1, -1)))
    names = ["sr"] + [f"hallucination_{k}" for k in range(1, len(z))]
    return dict(zip(names, images.split(1))), z[1:]


def write_samples(generator, path: str, config, arguments):
    """All files of one input, in a folder of its name."""
    lr, hr = low_resolution(path, config.size, generator.scale, arguments.lr)
    lr = lr.to(arguments.device)
    hr = None if hr is None else hr.to(arguments.device)
    made = "as it is" if arguments.lr else f"from its centre square, resized to {config.size}"
    print(f"{path}: LR of {lr.shape[-1]}x{lr.shape[-2]} pixels, {made}")
    images, z = sample(generator, lr, arguments)
    for name, image in images.items():
        print(f"  {name}: LR-PSNR {lr_psnr(image, lr).item():.1f} dB")
    hallucinations = torch.cat(list(images.values())[1:])
    images["lr"] = lr
    images["mean"] = hallucinations.mean(0, keepdim=True)
    # White is 64 grey levels: where the samples disagree, LR did not tell.
    images["std"] = to_levels(hallucinations).std(0, correction=0, keepdim=True) / 32 - 1
    folder = Path(arguments.out) / Path(path).stem
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        save_image(image, folder / f"{name}.png", normalize=True, value_range=(-1, 1))
    save_image(contact_sheet(generator, lr, z, hr), folder / "grid.png")
    if arguments.walk:
        write_walk(generator, lr, z, folder / "walk.gif")
    print(f"  written to {folder}/: {', '.join(images)}, grid{', walk' * arguments.walk}")


@torch.no_grad()
def write_walk(generator, lr, z, path: Path, frames: int = 48):
    """A GIF along a closed path in z: around the circle that two noise vectors span.

    On a circle every point is as likely as its ends; a straight line would pass near z = 0.
    """
    a, b = z[0], z[1 % len(z)]
    angles = torch.arange(frames, device=lr.device)[:, None] * 2 * math.pi / frames
    images = generator.sample(lr.expand(frames, -1, -1, -1), angles.cos() * a + angles.sin() * b)
    shown = to_levels(upscale_nearest(images, 3)).to(torch.uint8).cpu()
    first, *rest = [to_pil_image(image) for image in shown]
    first.save(path, save_all=True, append_images=rest, duration=80, loop=0)


def evaluate_folder(generator, config, arguments):
    """Print Table 1's rows for a folder and write them as JSON."""
    start, _, stop = arguments.slice.partition(":")
    faces = FolderFaces(arguments.evaluate, config.size)
    faces.paths = faces.paths[int(start or 0):int(stop or len(faces.paths))]
    require(len(faces) > 0, f"--slice {arguments.slice} leaves none of the folder's photos")
    hr = from_uint8(stack(faces)).to(arguments.device)
    rows = summarize(evaluate(generator, hr, arguments.samples, LPIPS().to(arguments.device),
                              arguments.seed, arguments.temperature, arguments.project))
    print(f"n = {len(hr)} faces of {config.size}x{config.size}, LR {config.size // config.scale}x"
          f"{config.size // config.scale}, {arguments.samples} samples, seed {arguments.seed}, "
          f"temperature {arguments.temperature:g}, project {arguments.project}")
    print(f"{'':14}" + "".join(f"{name:>11}" for name in rows["hallucination"]))
    for name, row in rows.items():
        print(f"{name:14}" + "".join(f"{value:11.3f}" for value in row.values()))
    print(definitions())
    path = Path(arguments.out) / "evaluate.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"n": len(hr), "arguments": vars(arguments), "rows": rows}
    path.write_text(json.dumps(found, indent=1))
    print(f"written to {path}")


def definitions() -> str:
    """How the numbers of --evaluate are made."""
    return """\
psnr, ssim   on 8-bit RGB, mean over faces; SSIM: 11x11 Gaussian window of sigma 1.5, whole windows
lpips        v0.1, AlexNet, inputs in [-1, 1]; of a hallucination: mean over samples
lr_psnr      8-bit image, box-averaged, rounded, against LR; dB of the mean error (exact: inf)
pixel_std    over samples, mean over pixels and channels, in grey levels
diversity    NTIRE 2021: 100 (global - local) / global; global: the best sample's mean LPIPS map,
             local: the mean of the per-pixel best"""


def main(arguments=None):
    arguments = parse_arguments(arguments)
    config, _ = load_checkpoint(arguments.checkpoint, arguments.device)
    generator = load_generator(arguments.checkpoint, arguments.device)
    for path in arguments.photos:
        write_samples(generator, path, config, arguments)
    if arguments.evaluate:
        evaluate_folder(generator, config, arguments)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"sample.py: {error}")
