"""Measure every sampler on a trained digits model, and write docs/samplers.md and its plot.

  python tools/samplers_page.py --workdir=runs/digits --out=runs/samplers [--docs=docs]

Each measurement is a line of OUT/measurements.jsonl. Started again, the command goes on where it was stopped; it takes about an
hour on 2 cores. The distance is the Frechet distance between 2,048 samples and all 1,797 real digits, in the 48 features of
tools/digits_quality.py.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator

import numpy as np

COUNT, BATCH = 2048, 256
SEEDS = (0, 1_000_000, 2_000_000)  # of the first image
EVALUATIONS = (5, 10, 20, 50, 100)
# (sampler, spacing, its settings); heun asks the network 2 S - 1 times
CURVES = (
    ("dpm_solver", "trailing", {}),
    ("dpm_solver", "logsnr", {}),
    ("dpm_solver", "uniform", {}),
    ("ddim", "trailing", {}),
    ("ddim", "uniform", {}),
    ("ddim", "quad", {}),
    ("heun", "karras", {}),
    ("heun", "trailing", {}),
    ("ddim", "uniform", {"eta": 1.0}),
    ("ddim", "uniform", {"sigma_hat": True}),
    ("ddpm", "trailing", {}),
    ("ddpm", "uniform", {}),
)
LONG = (("ddpm", "uniform", {}, 250), ("ddpm", "uniform", {}, 1000))


def plan() -> Iterator[dict]:
    """Every measurement, the cheap ones first."""
    for evaluations in EVALUATIONS:
        for sampler, spacing, settings in CURVES:
            steps = (evaluations + 1) // 2 if sampler == "heun" else evaluations
            for seed in SEEDS:
                yield {"sampler": sampler, "spacing": spacing, **settings, "num_steps": steps, "seed": seed}
    for sampler, spacing, settings, steps in LONG:
        for seed in SEEDS:
            yield {"sampler": sampler, "spacing": spacing, **settings, "num_steps": steps, "seed": seed}


def measure(workdir: str, path: str) -> None:
    """Add what is missing to measurements.jsonl."""
    from ddpm_tf import experiment
    from ddpm_tf.data.sources import load_digits
    from ddpm_tf.evaluation.distances import frechet_distance, moments
    from ddpm_tf.evaluation.features import DigitJudge
    from ddpm_tf.samplers import make_sampler

    done = [{k: v for k, v in row.items() if k not in RESULTS} for row in rows(path)]
    missing = [entry for entry in plan() if entry not in done]
    if not missing:
        return
    real, labels = (tensor.numpy() for tensor in load_digits().tensors.values())
    judge = DigitJudge(real, labels)
    of_real = moments(judge.features(real))
    inference = experiment.load_for_inference(workdir)
    for entry in missing:
        settings = {name: value for name, value in entry.items() if name not in ("sampler", "seed")}
        sampler = make_sampler(entry["sampler"], inference.diffusion, **settings)
        batches, seconds = [], []
        start = time.monotonic()
        for batch in experiment.generate(
            inference.network, sampler, num_images=COUNT, seed=entry["seed"], batch_size=BATCH
        ):
            batches.append(batch.images)
            seconds.append(time.monotonic() - start)
            start = time.monotonic()
        distance = frechet_distance(*moments(judge.features(np.concatenate(batches))), *of_real)
        row = {
            **entry,
            "evaluations": sampler.num_evaluations,
            "distance": distance,
            "seconds": float(np.median(seconds[1:]) * len(seconds)),  # the first batch also compiles
        }
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        print(row, flush=True)


RESULTS = ("evaluations", "distance", "seconds")


def rows(path: str) -> list[dict]:
    """The measurements so far; a last line that was cut off does not count."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a finished run of configs/digits.py")
    parser.add_argument("--out", required=True, help="where the measurements are kept")
    parser.add_argument("--docs", default="docs", help="the folder of samplers.md and samplers.png")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, "measurements.jsonl")
    measure(args.workdir, path)


if __name__ == "__main__":
    main()
