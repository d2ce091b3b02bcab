"""Sample a trained hallusr generator: photos in, many plausible faces out.

    python sample.py                      try it on the portrait that comes with this repository
    python sample.py PHOTO...             grid, SR, hallucinations, mean, deviation map
    python sample.py SMALL... --lr        the images are low-resolution already
    python sample.py PHOTO --walk         and a GIF along a closed path in z
    python sample.py --evaluate FOLDER    Table 1's rows, and a JSON file of them

with the small face model of this repository, or with yours: --checkpoint RUN/last.pt

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

from hallusr import (LPIPS, contact_sheet, downscale, evaluate, from_levels, load_generator,
                     lr_psnr, project_onto_lr, quantize, require, sample, std_map, summarize,
                     to_levels, upscale_nearest)
from train import FolderFaces, count, find_device, read_image, read_photo, stack


class Projected(torch.nn.Module):
    """A generator whose finest image is shifted, block by block, to shrink to LR.

    Exactly, until values beyond [-1, 1] are cut off and the rest rounded to 8 bits.
    """

    def __init__(self, generator):
        super().__init__()
        self.generator, self.scale, self.z_dim = generator, generator.scale, generator.z_dim

    def forward(self, lr, z):
        images, gradients = self.generator(lr, z)
        # Clamped first: what saving would cut off must not unbalance the blocks afterwards.
        return [*images[:-1], project_onto_lr(images[-1].clamp(-1, 1), lr)], gradients


def parse_arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    assets = Path(__file__).with_name("assets")
    parser.add_argument("photos", nargs="*", metavar="PHOTO",
                        help="image files (default: NASA's portrait of Eileen Collins, in assets/)")
    parser.add_argument("--checkpoint", default=assets / "faces64.pt",
                        help="last.pt or best.pt of a training run (default: assets/faces64.pt)")
    parser.add_argument("--lr", action="store_true", help="the images are LR already")
    parser.add_argument("--samples", type=count, default=10, help="hallucinations (default: 10)")
    parser.add_argument("--temperature", type=float, default=1.0,
                        help="scale of z: 0 is SR, below 1 tamer, above 1 wilder (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of z (default: 0)")
    parser.add_argument("--project", action="store_true",
                        help="shift every block of the result to LR's value (see project_onto_lr)")
    parser.add_argument("--walk", action="store_true", help="write an animated GIF")
    parser.add_argument("--evaluate", metavar="FOLDER", help="score on the photos of this folder")
    parser.add_argument("--slice", type=span, default=slice(None), metavar="FROM:TO",
                        help="which photos of the folder, in order of name (default: all)")
    parser.add_argument("--out", default="samples", help="folder for results (default: samples)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    found = parser.parse_args(words)
    if not found.photos and not found.evaluate:
        require(not found.lr, "--lr says that the images are LR already: name at least one")
        found.photos = [str(assets / "astronaut.png")]
    names = [Path(path).stem for path in found.photos]
    require(len(set(names)) == len(names), f"two photos have one name, and so one folder: {names}")
    require(found.temperature >= 0, f"--temperature must be >= 0, got {found.temperature}")
    return found


def span(words: str) -> slice:
    """FROM:TO as a slice; either may be missing. argparse turns a ValueError into a sentence."""
    start, stop = words.split(":")
    return slice(int(start) if start else None, int(stop) if stop else None)


def low_resolution(path: str, config, is_lr: bool) -> tuple:
    """The LR image of a file, (1, 3, h, w) in [-1, 1], and HR where the file was a photo."""
    if is_lr:
        lr = from_levels(read_image(path))[None]
        require(max(lr.shape[-2:]) <= config.size, f"{path} is {lr.shape[-1]}x{lr.shape[-2]} pixels"
                f", LR has {config.size} at most: a photo goes without --lr")
        return lr, None
    hr = from_levels(read_photo(path, config.size))[None]
    return quantize(downscale(hr, config.scale)), hr


def write_samples(generator, config, path: str, arguments):
    """All files of one input, in a folder of its name."""
    lr, hr = (x if x is None else x.to(arguments.device)
              for x in low_resolution(path, config, arguments.lr))
    made = "as it is" if arguments.lr else f"from its centre square, resized to {config.size}"
    print(f"{path}: LR of {lr.shape[-1]}x{lr.shape[-2]} pixels, {made}")
    rng = torch.Generator().manual_seed(arguments.seed)
    z = torch.randn(arguments.samples, generator.z_dim, *lr.shape[-2:], generator=rng)
    z = arguments.temperature * z.to(lr.device)
    latents = torch.cat([torch.zeros_like(z[:1]), z])
    samples = sample(generator, lr.expand(len(latents), -1, -1, -1), latents)
    names = ["sr"] + [f"hallucination_{k}" for k in range(1, len(latents))]
    images = dict(zip(names, samples.split(1)))
    for name, image in images.items():
        print(f"  {name}: LR-PSNR {lr_psnr(image, lr).item():.1f} dB")
    images["lr"] = lr
    images["mean"] = samples[1:].mean(0, keepdim=True)
    images["std"] = std_map(samples[1:, None]) / 32 - 1  # white: 64 grey levels
    folder = Path(arguments.out) / Path(path).stem
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        save_image(image, folder / f"{name}.png", normalize=True, value_range=(-1, 1))
    save_image(contact_sheet(generator, lr, z, hr), folder / "grid.png")
    if arguments.walk:
        a, b = arguments.temperature * torch.randn(2, *z[0].shape, generator=rng).to(lr.device)
        write_walk(generator, lr, a, b, folder / "walk.gif")
    print(f"  written to {folder}/: {', '.join(images)}, grid{', walk' * arguments.walk}")


def write_walk(generator, lr, a, b, path: Path, frames: int = 48):
    """A GIF along a closed path in z: around the circle that two noise vectors a and b span.

    On that circle every point is as likely as any other; a straight line would pass near z = 0.
    """
    angles = torch.arange(frames, device=lr.device).view(-1, 1, 1, 1) * 2 * math.pi / frames
    images = sample(generator, lr.expand(frames, -1, -1, -1), angles.cos() * a + angles.sin() * b)
    shown = to_levels(upscale_nearest(images, 3)).to(torch.uint8).cpu()
    first, *rest = [to_pil_image(image) for image in shown]
    first.save(path, save_all=True, append_images=rest, duration=80, loop=0)


def evaluate_folder(generator, config, arguments):
    """Print Table 1's rows for a folder and write them as JSON."""
    faces = FolderFaces(arguments.evaluate, config.size)
    faces.paths = faces.paths[arguments.slice]
    require(len(faces) > 0, "--slice leaves none of the folder's photos")
    hr = from_levels(stack(faces)).to(arguments.device)
    rows = summarize(evaluate(generator, hr, arguments.samples, LPIPS().to(arguments.device),
                              arguments.seed, arguments.temperature))
    small = config.size // config.scale
    print(f"n = {len(hr)} faces of {config.size}x{config.size}, LR {small}x{small}, "
          f"{arguments.samples} samples, seed {arguments.seed}, "
          f"temperature {arguments.temperature:g}, project {arguments.project}")
    print(f"{'':14}" + "".join(f"{name:>11}" for name in rows["hallucination"]))
    for name, row in rows.items():
        print(f"{name:14}" + "".join(f"{value:11.3f}" for value in row.values()))
    print(definitions())
    path = Path(arguments.out) / "evaluate.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {row: {name: value if math.isfinite(value) else None for name, value in values.items()}
             for row, values in rows.items()}  # JSON has no infinity
    settings = {name: str(value) for name, value in vars(arguments).items()}
    path.write_text(json.dumps({"n": len(hr), "arguments": settings, "rows": plain}, indent=1))
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


def main(words=None):
    arguments = parse_arguments(words)
    arguments.device = find_device(arguments.device)
    generator = load_generator(arguments.checkpoint, arguments.device)
    config = generator.config
    if arguments.project:
        generator = Projected(generator)
    for path in arguments.photos:
        write_samples(generator, config, path, arguments)
    if arguments.evaluate:
        evaluate_folder(generator, config, arguments)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"sample.py: {error}")
