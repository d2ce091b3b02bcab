"""Sample a trained hallusr generator: photos in, many plausible faces out.

    python sample.py                      try it on this repository's portrait
    python sample.py PHOTO...             grid, reconstruction, hallucinations, ...
    python sample.py SMALL... --lr        the images are low-resolution already
    python sample.py PHOTO --walk         and a GIF along a closed path in z
    python sample.py --evaluate FOLDER    scores on its photos, and a JSON file of them
    python sample.py ... --checkpoint RUN/last.pt    your own model, not the one here

The faces are invented. They say which pictures fit the small one, never who is in it.
"""
import argparse
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import torch
from PIL import Image, ImageCms, ImageOps  # Pillow comes with torchvision
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image

from hallusr import (LPIPS, Realism, TwoSampleAUC, downscale, draw_z, from_levels,
                     image_gradient, load_generator, lr_psnr, psnr, quantize, rank_histogram,
                     require, sample, spread_and_error, ssim, std_map, to_levels,
                     upscale_nearest)

# ---- Photos --------------------------------------------------------------------------

def read_image(path: str | Path) -> torch.Tensor:
    """Any image file as a viewer shows it: uint8 RGB (3, H, W), upright, in sRGB.

    What is transparent lies on white. Raises ValueError, naming it, when it cannot be
    read, or has no 8-bit values.
    """
    try:
        with Image.open(path) as image:
            require(image.mode[0] not in "IF", f"its values are of mode {image.mode}, not 8-bit")
            image.load()  # of a TIFF, Pillow turns it here
            exif = image.getexif()
            for field in set(exif) - {0x0112}:  # all but orientation are often broken
                del exif[field]
            ImageOps.exif_transpose(image, in_place=True)
            return v2.functional.pil_to_tensor(to_srgb(image, path))
    except Exception as error:  # it depends on where the file is damaged
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def to_srgb(image: Image.Image, path: str | Path) -> Image.Image:
    """An 8-bit image in sRGB by its own colour profile, on white where transparent."""
    profile = image.info.get("icc_profile")
    has_alpha = "A" in image.mode or "transparency" in image.info
    if has_alpha or image.mode == "P":
        image = image.convert("RGBA")
    if profile:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = "RGBA" if has_alpha else "RGB"
            image = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"),
                                              outputMode=mode)
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            print(f"WARNING: {path}: its colour profile is not used: {error}")
    if has_alpha:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_photo(path: str | Path, size: int) -> torch.Tensor:
    """A photo's centre square, resized: uint8 (3, size, size).

    Raises ValueError, naming the file, when it is no image or smaller than size.
    """
    image = read_image(path)
    height, width = image.shape[-2:]
    side = min(height, width)
    require(side >= size, f"{path} is {width}x{height} pixels, expected at least {size}x{size}")
    square = v2.functional.center_crop(image, [side, side])
    return v2.functional.resize(square, [size, size], v2.InterpolationMode.BICUBIC, antialias=True)


# What a photo's name ends in: Pillow also knows films, documents and icons.
ENDINGS = (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png",
           ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")


def list_photos(folder: str | Path) -> list[Path]:
    """Every photo below a folder, sorted; one line says how many other files there are.

    Hidden files and folders are left out, and the grid.png of a training run. Raises
    FileNotFoundError for a missing folder or fewer than two photos, OSError for a folder
    that cannot be read.
    """
    def stop(error):  # or os.walk would pass over that folder
        raise error

    # By their real paths: links are followed, but nothing is taken twice.
    photos = {}
    places = set()
    files_in_all = 0
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        if real in places:
            folders.clear()
            continue
        places.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files_in_all += len(files)
        for path in (Path(place, name) for name in sorted(files)):
            of_run = path.name == "grid.png" and path.with_name("last.pt").exists()
            hidden = path.name[0] == "." or of_run
            if path.suffix.lower() in ENDINGS and path.is_file() and not hidden:
                photos.setdefault(os.path.realpath(path), path)
    others = files_in_all - len(photos)
    if others:
        print(f"{folder}: {len(photos)} photos; {others} other files left out")
    if len(photos) < 2:
        raise FileNotFoundError(f"expected at least 2 images below {folder}, found {len(photos)}")
    return sorted(photos.values())


def read_photos(paths: list[Path], size: int) -> torch.Tensor:
    """The centre squares of photos, resized: uint8 (N, 3, size, size)."""
    photos = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for i, path in enumerate(paths):
        photos[i] = read_photo(path, size)
    return photos


# ---- Scores --------------------------------------------------------------------------

@torch.no_grad()
def evaluate(generator, hr: torch.Tensor, samples: int = 10, lpips=None, realism=None,
             auc=None, seed: int = 0, temperature: float = 1.0) -> dict:
    """Table 1's rows for hr (N, 3, H, W) in [-1, 1], from which LR is made.

    {"bicubic" | "SR" | "hallucination": {metric: (N,)}}, of a hallucination means over
    its samples, with z from seed. `lpips` is an LPIPS; `realism` and `auc`, a Realism and a
    TwoSampleAUC, give one number for all N, of hallucinations the first.
    """
    require(samples >= 1, f"samples must be 1 or more, got {samples}")
    lr = quantize(downscale(hr, generator.scale))               # (N, 3, h, w)
    rng = torch.Generator().manual_seed(seed)
    shape = (samples, len(lr), generator.z_dim, *lr.shape[-2:])
    z = temperature * draw_z(shape, generator.settings["z_shared"], rng).to(hr.device)
    scores = []
    images = []
    for part in zip(hr.split(50), lr.split(50), z.split(50, 1)):  # 50 fit any memory
        part_scores, part_images = evaluate_batch(generator, *part, lpips)
        scores.append(part_scores)
        images.append(part_images)
    rows = {}
    for row, names in scores[0].items():
        rows[row] = {name: torch.cat([part[row][name] for part in scores]) for name in names}
        made = torch.cat([part[row] for part in images])        # (N, 3, H, W)
        for name, metric in (("realism", realism), ("auc", auc)):
            if metric is not None:
                rows[row][name] = metric(made)
    return rows


def evaluate_batch(generator, hr, lr, z, lpips=None) -> tuple[dict, dict]:
    """`evaluate` for a few images, z (K, N, z_dim, h, w): their scores, and images."""
    hallucinations = torch.stack([sample(generator, lr, latent) for latent in z])
    images = {"bicubic": quantize(upscale_bicubic(lr, generator.scale)),
              "SR": sample(generator, lr, torch.zeros_like(z[0])),
              "hallucination": hallucinations[0]}
    rows = {name: score(images[name], hr, lr, lpips) for name in ("bicubic", "SR")}
    scores = [score(image, hr, lr, lpips) for image in hallucinations]
    mean = {name: torch.stack([row[name] for row in scores]).mean(0) for name in scores[0]}
    mean["lr_psnr"] = mean_decibel(torch.stack([row["lr_psnr"] for row in scores]))
    mean["pixel_std"] = std_map(hallucinations).mean((1, 2, 3))
    if len(z) > 1:
        mean["variance"], mean["error"] = spread_and_error(hallucinations, hr)
        mean["ranks"] = rank_histogram(hallucinations, hr)      # (N, K + 1)
        mean["outside"] = 100 * mean["ranks"][:, [0, -1]].sum(1)
    return rows | {"hallucination": mean}, images


def upscale_bicubic(lr: torch.Tensor, factor: int) -> torch.Tensor:
    """Table 1's baseline, clamped to [-1, 1]. (N, C, h, w) -> (N, C, H, W)."""
    # torch's cubic kernel has a = -0.75; others have -0.5, and slightly other scores.
    return torch.nn.functional.interpolate(lr, scale_factor=factor, mode="bicubic").clamp(-1, 1)


def score(image: torch.Tensor, hr: torch.Tensor, lr: torch.Tensor, lpips=None) -> dict:
    """Scores of one image per face, (N,) each."""
    values = {"psnr": psnr(image, hr), "ssim": ssim(image, hr), "lr_psnr": lr_psnr(image, lr)}
    if lpips is not None:
        values["lpips"] = lpips(image, hr)
    return values


def summarize(rows: dict) -> dict:
    """Means of `evaluate` over images, as plain numbers.

    "spread": spread / error, 1 is right. Exact images count as 100 dB.
    """
    summary = {}
    for row, metrics in rows.items():
        means = {name: values.mean().item() for name, values in metrics.items()
                 if name not in ("ranks", "variance", "error")}
        means["lr_psnr"] = mean_decibel(metrics["lr_psnr"]).clamp(max=100).item()
        means["psnr"] = metrics["psnr"].clamp(max=100).mean().item()
        if "variance" in metrics:
            ratio = metrics["variance"].mean() / metrics["error"].mean()
            means["spread"] = ratio.sqrt().item()
        summary[row] = means
    return summary


def print_scores(summary: dict):
    """A line for each row of `summarize`."""
    for name, row in summary.items():
        scores = "  ".join(f"{score} {value:.3f}" for score, value in row.items())
        print(f"  {name:13}  {scores}")


def mean_decibel(db: torch.Tensor) -> torch.Tensor:
    """The dB of the mean squared error, over the first dimension: finite if any is."""
    return -10 * torch.log10((10 ** (-db / 10)).mean(0))


def evenly(length: int, most: int) -> list[int]:
    """At most so many of range(length), evenly: neighbours are often of one kind."""
    count = min(most, length)
    return [i * length // count for i in range(count)]


def metrics_against(photographs: torch.Tensor) -> dict:
    """What `evaluate` can measure beside PSNR, against photographs (N, 3, H, W) of others."""
    return {"lpips": LPIPS().to(photographs.device), "realism": Realism(photographs),
            "auc": TwoSampleAUC(photographs)}


@torch.no_grad()
def directions_found(generator, truth: torch.Tensor, samples: int = 10) -> float:
    """In how many of four directions do hallucinations clearly look? A mean over faces.

    truth (16, N, 3, H, W), from train.py's `possibilities`: drawn faces that share an LR,
    four for each direction, k opposite to k + 8. Clearly: the nearest of the 16 has at
    most half of the squared error that its opposite has.
    """
    lr = quantize(downscale(truth[0], generator.scale))         # (N, 3, h, w)
    rng = torch.Generator().manual_seed(0)
    shape = (samples, len(lr), generator.z_dim, *lr.shape[-2:])
    z = draw_z(shape, generator.settings["z_shared"], rng).to(truth.device)
    made = torch.stack([sample(generator, lr, latent) for latent in z])
    error = torch.stack([(made - one).square().mean((2, 3, 4))
                         for one in truth])                     # (16, K, N)
    nearest = error.argmin(0)                                   # (K, N)
    opposite = error.gather(0, (nearest[None] + 8) % 16)[0]     # (K, N)
    clear = error.amin(0) <= opposite / 2                       # (K, N)
    looks = [clear & (nearest // 4 == direction) for direction in range(4)]
    found = torch.stack(looks).any(1).sum(0)                    # (N,), of four
    return found.float().mean().item()


def evaluate_folder(generator, arguments):
    """Print Table 1's rows for a folder and write them as JSON."""
    side = generator.settings["size"]
    faces = list_photos(arguments.evaluate)[arguments.slice]
    require(faces, "--slice leaves none of the folder's photos")
    if arguments.others:
        others = list_photos(arguments.others)
        shared = set(map(Path.resolve, faces)) & set(map(Path.resolve, others))
        require(not shared, "--others names the same folder, or a part")
        others = [others[i] for i in evenly(len(others), len(faces))]
        metrics = metrics_against(from_levels(read_photos(others, side)).to(arguments.device))
        print(f"realism and auc: against {len(others)} photos (below 50 they are chance)")
    else:
        metrics = {"lpips": LPIPS().to(arguments.device)}
    hr = from_levels(read_photos(faces, side)).to(arguments.device)
    rows = evaluate(generator, hr, arguments.samples, **metrics, seed=arguments.seed,
                    temperature=arguments.temperature)
    summary = summarize(rows)
    print(f"n = {len(hr)} faces of {side}x{side}, {arguments.samples} samples, seed "
          f"{arguments.seed}, temperature {arguments.temperature:g}")
    print_scores(summary)
    content = {"n": len(hr), "arguments": vars(arguments), "rows": summary}
    if "ranks" in rows["hallucination"]:
        content["ranks"] = rows["hallucination"]["ranks"].mean(0).tolist()
    # Named for the model: scores of a second one must not replace the first's.
    model = "_".join(Path(arguments.checkpoint).with_suffix("").parts[-2:])
    path = Path(arguments.out, f"evaluate_{model}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = " in place of earlier scores" if path.exists() else ""
    path.write_text(json.dumps(content, default=str))
    print(f"written to {path}{earlier}; assets/EXPERIMENTS.md says what each number is")


# ---- Pictures ------------------------------------------------------------------------

@torch.no_grad()
def contact_sheet(generator, lr: torch.Tensor, z: torch.Tensor,
                  hr: torch.Tensor | None = None) -> torch.Tensor:
    """One picture of all that G makes: (3, height, width) in [0, 1].

    lr (N, 3, h, w), z (K, z_dim, h, w), the same for every face, hr (N, 3, H, W) where
    it is known. Two rows per face: images, and their gradients below. Columns: LR,
    bicubic, SR, K hallucinations, their deviation (white: 64 grey levels), HR.
    """
    latents = [torch.zeros_like(z[0]), *z]
    outputs = [generator(lr, latent.expand(len(lr), -1, -1, -1)) for latent in latents]
    made = [quantize(output["image"][-1]) for output in outputs]
    spread = std_map(torch.stack(made[1:])) / 64
    nearest = upscale_nearest(lr, generator.scale)
    bicubic = upscale_bicubic(lr, generator.scale)
    above = [x / 2 + 0.5 for x in (nearest, bicubic, *made)] + [spread]
    # Of what G makes, its own gradients, not those of its images.
    below = [image_gradient(nearest), image_gradient(bicubic)]
    below += [output["gradient"][-1] for output in outputs] + [torch.zeros_like(spread)]
    if hr is not None:
        above.append(hr / 2 + 0.5)
        below.append(image_gradient(hr))
    rows = [torch.stack(above, 1), torch.stack(below, 1)]       # (N, columns, 3, H, W)
    tiles = torch.stack(rows, 1).flatten(0, 2).clamp(0, 1)      # (N*2*columns, 3, H, W)
    return make_grid(tiles, nrow=len(above), padding=1, pad_value=1.0)


def low_resolution(path: str, generator, is_lr: bool, device: str) -> tuple:
    """LR of a file (1, 3, h, w) in [-1, 1], and HR where the file was a photo."""
    size = generator.settings["size"]
    if not is_lr:
        hr = from_levels(read_photo(path, size))[None].to(device)
        return quantize(downscale(hr, generator.scale)), hr
    lr = from_levels(read_image(path))[None].to(device)
    height, width = lr.shape[-2:]
    require(max(height, width) <= size, f"{path} is {width}x{height} pixels, LR has "
                                        f"{size} at most: a photo goes without --lr")
    return lr, None


def write_samples(generator, path: str, arguments):
    """All files of one input, in a folder of its name."""
    lr, hr = low_resolution(path, generator, arguments.lr, arguments.device)
    height, width = lr.shape[-2:]
    side = generator.settings["size"] // generator.scale
    made = "as it is"
    if hr is not None:
        made = f"from its centre square, resized to {hr.shape[-1]}"
    print(f"{path}: LR of {width}x{height} pixels, {made}; learnt on {side}x{side}")

    # One z after another, the walk's two first: a larger --samples changes no face.
    rng = torch.Generator().manual_seed(arguments.seed)
    shape = (1, generator.z_dim, height, width)
    shared = generator.settings["z_shared"]
    z = torch.cat([draw_z(shape, shared, rng) for _ in range(2 + arguments.samples)])
    z = arguments.temperature * z.to(lr.device)
    for_walk, z = z.tensor_split([2])
    latents = torch.cat([torch.zeros_like(z[:1]), z])
    # One at a time: any number fits the memory, and none depends on how many there are.
    samples = torch.cat([sample(generator, lr, one) for one in latents.split(1)])

    images = {"lr": lr, "sr": samples[:1], "mean": samples[1:].mean(0, keepdim=True)}
    images["std"] = std_map(samples[1:, None]) / 32 - 1  # white: 64 grey levels
    digits = len(str(arguments.samples))  # 01 before 10, in order of name
    for k, image in enumerate(samples[1:].split(1), start=1):
        images[f"hallucination_{k:0{digits}}"] = image
    folder = results_folder(path, arguments)
    for name, image in images.items():
        save_image((image[0] + 1) / 2, folder / f"{name}.png")
    save_image(contact_sheet(generator, lr, z, hr), folder / "grid.png")
    if arguments.walk:
        write_walk(generator, lr, *for_walk, folder / "walk.gif")
    print(f"  written to {folder}/")


def results_folder(path: str, arguments) -> Path:
    """The folder of a photo's results below --out, made, and rid of earlier samples.

    Raises ValueError where there is anything else, such as results of another photo.
    """
    photo = os.fsencode(Path(path).resolve())
    folder = Path(arguments.out, Path(path).stem.lstrip("."))  # ".." would lead upwards
    source = folder / "source.txt"
    mine = source.exists() and source.read_bytes() == photo
    require(mine or not folder.exists(),
            f"{folder} holds something else than results of {path}: name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    source.write_bytes(photo)
    # Those of another model or seed must not stand among the new ones.
    for old in folder.iterdir():
        if re.fullmatch(r"hallucination_\d+\.png|walk\.gif", old.name):
            old.unlink()
    return folder


def write_walk(generator, lr, a, b, path: Path, frames: int = 48):
    """A GIF along a closed path in z: the circle that two noise vectors span."""
    # Every point of it is N(0, I) like any z; a straight line would pass near z = 0.
    angles = torch.arange(frames, device=lr.device) * 2 * math.pi / frames
    angles = angles.view(-1, 1, 1, 1)
    z = angles.cos() * a + angles.sin() * b                     # (frames, z_dim, h, w)
    images = torch.cat([sample(generator, lr, one) for one in z.split(1)])
    shown = to_levels(upscale_nearest(images, 3)).to(torch.uint8).cpu()
    pictures = [v2.functional.to_pil_image(image) for image in shown]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80, loop=0)


# ---- Command line --------------------------------------------------------------------

def parse_arguments(words=None):
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Sample or score a trained generator.")
    flag = parser.add_argument
    assets = Path(__file__).with_name("assets")
    flag("photos", nargs="*", metavar="PHOTO", type=path_argument,
         help="image files (default: NASA's portrait of Eileen Collins, in assets/)")
    flag("--checkpoint", default=assets / "faces64.pt", type=path_argument,
         help="last.pt or best.pt of a training run (default: assets/faces64.pt)")
    flag("--lr", action="store_true", help="the images are LR already")
    flag("--samples", type=count, default=10, help="hallucinations (default: 10)")
    flag("--temperature", type=float, default=1.0,
         help="scale of z: 0 is SR, below 1 tamer, above 1 wilder (default: 1)")
    flag("--seed", type=int, default=0, help="seed of z (default: 0)")
    flag("--walk", action="store_true", help="write an animated GIF")
    flag("--evaluate", metavar="FOLDER", type=path_argument, help="score on its photos")
    flag("--others", metavar="FOLDER", type=path_argument, help="photos of others, for realism")
    flag("--slice", type=span, default=slice(None), metavar="FROM:TO",
         help="which photos of the folder, in order of name (default: all)")
    flag("--out", default="samples", type=path_argument,
         help="folder for results (default: samples)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if found)")
    found = parser.parse_args(words)
    if not (found.photos or found.evaluate or found.lr):
        found.photos = [str(assets / "astronaut.png")]
    require(0 <= found.temperature < math.inf, f"--temperature {found.temperature} is no scale")
    require(0 <= found.seed < 2 ** 32, f"--seed must be in [0, 2^32), got {found.seed}")
    alone = found.slice == slice(None) and not found.others
    require(found.evaluate or alone, "--slice and --others go with --evaluate")
    require(found.photos or not found.lr, "--lr goes with images: --evaluate makes LR itself")
    return found


def count(word: str) -> int:
    """A positive whole number. argparse makes a sentence of the ValueError."""
    require(int(word) > 0, f"{word} is not positive")
    return int(word)


def path_argument(word: str) -> str:
    """An absolute path, ~ for home. An empty word, of an unset variable, is refused."""
    if not word:
        raise argparse.ArgumentTypeError("expected a path, got an empty word")
    return str(Path(os.path.expanduser(word)).absolute())  # ".." stays: it may follow a link


def span(words: str) -> slice:
    """FROM:TO as a slice; either may be missing."""
    start, stop = words.split(":")
    return slice(int(start) if start else None, int(stop) if stop else None)


def find_device(name: str) -> str:
    """A device of torch's; auto is the accelerator that torch finds, else cpu.

    Raises ValueError where there is no such device.
    """
    if name == "auto":
        if hasattr(torch, "accelerator") and torch.accelerator.is_available():
            return torch.accelerator.current_accelerator().type
        return "cuda" if torch.cuda.is_available() else "cpu"  # before torch 2.6
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: torch finds no such device here") from error
    return name


def run_as_script(main):
    """main(), with one sentence in place of a traceback for what a user can mend."""
    # float32 with all its digits on a GPU too: for scores, and for R1.
    torch.backends.cudnn.allow_tf32 = False
    script = Path(sys.argv[0]).name
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        # A log is read while it grows; a file's name may hold letters that a terminal has not.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # a shell's number for Ctrl-C
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{script}: {error}")
    except (RuntimeError, MemoryError) as error:
        known = re.search("out of memory|allocate memory|enough memory", str(error))
        if not known and not isinstance(error, MemoryError):
            raise
        sys.exit(f"{script}: out of memory: lower --batch or --samples, or take --device cpu "
                 f"({str(error).partition(chr(10))[0]})")


def main(words=None):
    arguments = parse_arguments(words)
    arguments.device = find_device(arguments.device)
    generator = load_generator(arguments.checkpoint, arguments.device)
    for path in arguments.photos:
        write_samples(generator, path, arguments)
    if arguments.evaluate:
        evaluate_folder(generator, arguments)


if __name__ == "__main__":
    run_as_script(main)
