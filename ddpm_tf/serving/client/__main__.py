"""The client's command line: python -m ddpm_tf.serving.client."""

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from ddpm_tf import images as images_lib
from ddpm_tf.errors import InputError, RunError
from ddpm_tf.serving.client import Client
from ddpm_tf.serving.client.pictures import make_new_folder, save_pngs
from ddpm_tf.serving.transports import TRANSPORTS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_tf.serving.client",
        allow_abbrev=False,
        description="Draw images on a model server and save them as PNGs. Image k has the seed --seed + k.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--address", default="localhost:8501", help="host:port, or a URL for REST")
    add("--model", required=True, help="the model's name on the server")
    add("--version", type=int, help="a version of the model, else the newest")
    add("--label", help="a version label of the server's model config, instead of --version")
    add("--transport", default="rest", choices=sorted(TRANSPORTS), help="grpc is usually port 8500")
    add("--num_images", type=int, default=16, help="how many images")
    add("--seed", type=int, default=0, help="seed of the first image, an int64")
    add("--labels", type=_integers, help="classes for a class-conditional model, used in turn, for example 0,1,2")
    add("--guidance_scale", type=float, help="0 ignores the labels, above 1 strengthens them; None means 1")
    add("--classifier_scale", type=float, help="weight of the exported classifier, 0 switches it off; None means 1")
    add("--max_batch", type=int, default=16, help="images per request; at most the export's --max_batch")
    add("--out", help="a new or empty folder for the PNGs")
    add("--deadline_s", type=float, default=60.0, help="seconds that one request may take")
    add(
        "--attempts",
        type=int,
        default=6,
        help="how often a request is sent, at most, while the server is not available",
    )
    add(
        "--progress_steps",
        type=int,
        help="draw step by step and show progress; the model's moves (sampler.num_moves in its model_card.json)",
    )
    add("--status", action="store_true", help="only print the model's versions and signatures")
    return parser


def _integers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 0,1,2, found {text!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit codes are listed in docs/serving.md."""
    args = _parser().parse_args(argv)
    try:
        if args.out is None and not args.status:
            raise InputError("--out is missing; give a new or empty folder, or ask for --status.")
        client = Client(
            args.address,
            args.model,
            version=args.version,
            label=args.label,
            transport=args.transport,
            deadline_s=args.deadline_s,
            attempts=args.attempts,
            max_batch=args.max_batch,
        )
        with client:
            if args.status:
                _print_status(client)
            else:
                _draw(client, args)
    except RunError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _print_status(client: Client) -> None:
    for v in client.status():
        print(f"version {v.version}: {v.state} {v.error}".rstrip())
    for name, signature in sorted(client.metadata().items()):
        sides = (", ".join(f"{k} {t.dtype} {t.shape}" for k, t in sorted(side.items())) for side in signature)
        print(f"{name}: " + " -> ".join(sides))


def _draw(client: Client, args: argparse.Namespace) -> None:
    if args.num_images < 1:
        raise InputError(f"--num_images must be at least 1, found {args.num_images}.")
    make_new_folder(args.out)
    seeds = range(args.seed, args.seed + args.num_images)
    labels = None if args.labels is None else np.resize(args.labels, args.num_images)
    scales = {"guidance_scale": args.guidance_scale, "classifier_scale": args.classifier_scale}
    conditions = {"labels": labels, **scales}
    if args.progress_steps is None:
        images = client.sample(seeds, **conditions)
    else:
        from tqdm import tqdm

        steps = client.denoise(seeds, num_steps=args.progress_steps, **conditions)
        *_, last = tqdm(steps, total=args.progress_steps, unit=" steps", desc="denoising")
        images = images_lib.to_uint8(last.x)
    save_pngs(args.out, seeds, images)
    print(f"Pictures: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
