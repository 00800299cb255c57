"""Time to read a folder of JPEGs of 2 megapixels at 128x128: one core, all cores, and torchvision's ImageFolder.

python -m benchmarks.decoding                     (5,000 files, made in a temporary folder; 250 different pictures)
python -m benchmarks.decoding --count=500 --peer=/path/to/a/python/with/torchvision

The three take turns, forwards and backwards. Each is a process of its own; the time is that of reading alone. Here a picture
is decoded at a smaller size where that is allowed (`auto`) or in full (`strict`), as torchvision does.
"""

import argparse
import os
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

SIZE, HEIGHT, WIDTH, DIFFERENT, ROUNDS = 128, 1224, 1632, 250, 2

OURS = """
import os, sys, time
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[3])]))
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
from ddpm_tf.data import load_source
began = time.perf_counter()
source = load_source(f"folder:{sys.argv[1]}", image_shape=(128, 128, 3), convert=sys.argv[2], labels="none")
print(source.num_examples, time.perf_counter() - began)
"""
PEER = """
import sys, time
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
began = time.perf_counter()
steps = [transforms.Resize(128), transforms.CenterCrop(128), transforms.PILToTensor()]
loader = DataLoader(ImageFolder(sys.argv[1], transforms.Compose(steps)), batch_size=128, num_workers=int(sys.argv[3]))
print(sum(len(images) for images, _ in loader), time.perf_counter() - began)
"""


def make_pictures(folder: str, count: int) -> None:
    """Smooth noise with edges and grain; hard links of 250 different files."""
    rng = np.random.Generator(np.random.PCG64(0))
    for k in range(min(count, DIFFERENT)):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((WIDTH, HEIGHT))
        pixels = np.asarray(coarse).astype(np.int16)
        top, left = rng.integers(0, HEIGHT // 2), rng.integers(0, WIDTH // 2)
        pixels[top : top + 400, left : left + 500] += 60
        pixels += rng.integers(-8, 9, (HEIGHT, WIDTH, 1), np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(f"{folder}/{k:05}.jpg", quality=90)
    for k in range(DIFFERENT, count):
        os.link(f"{folder}/{k % DIFFERENT:05}.jpg", f"{folder}/{k:05}.jpg")


def measure(python: str, code: str, *arguments: str) -> tuple[int, float]:
    """(pictures, seconds) that one process prints last."""
    result = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=True)
    count, seconds = result.stdout.split()[-2:]
    return int(count), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--peer", default="", help="a Python with torchvision; without it the peer is not measured")
    args = parser.parse_args()
    cores = str(len(os.sched_getaffinity(0)))
    variants = {
        "ours, auto, one core": (sys.executable, OURS, "auto", "1"),
        f"ours, auto, {cores} cores": (sys.executable, OURS, "auto", cores),
        "ours, strict, one core": (sys.executable, OURS, "strict", "1"),
        f"ours, strict, {cores} cores": (sys.executable, OURS, "strict", cores),
    }
    if args.peer:
        variants[f"torchvision, {cores} workers"] = (args.peer, PEER, "", cores)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as root:
        os.mkdir(f"{root}/class")
        make_pictures(f"{root}/class", args.count)
        for turn in range(2 * ROUNDS):
            for name in list(variants)[:: 1 if turn % 2 == 0 else -1]:
                python, code, *arguments = variants[name]
                count, taken = measure(python, code, root, *arguments)
                assert count == args.count, (name, count)
                seconds[name].append(taken)
    for name, times in seconds.items():
        shown = " ".join(f"{t:.1f}" for t in times)
        print(f"{name:26} {args.count / np.median(times):7.0f} pictures/s   ({shown} s)")


if __name__ == "__main__":
    main()
