"""Measure every sampler on a trained digits model, and write docs/samplers.md and its plot.

  python -m tools.samplers_page --workdir=runs/digits --out=runs/samplers [--docs=docs]

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
RESULTS = ("evaluations", "distance")
SEEDS = (0, 1_000_000, 2_000_000)  # of the first image
EVALUATIONS = (5, 10, 20, 50)
ENCODING_STEPS = (10, 20, 50, 100, 200)
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
    ("ddpm", "trailing", {}),
    ("ddpm", "uniform", {}),
)
# The same with their steps, where the curves above have become flat or are of interest far out
LONG = (
    ("dpm_solver", "trailing", {}, 100),
    ("ddim", "uniform", {}, 100),
    ("heun", "karras", {}, 50),
    ("ddpm", "uniform", {}, 100),
    ("ddpm", "uniform", {}, 250),
    ("ddpm", "uniform", {}, 1000),
)


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
        batches = [
            batch.images
            for batch in experiment.generate(
                inference.network, sampler, num_images=COUNT, seed=entry["seed"], batch_size=BATCH
            )
        ]
        distance = frechet_distance(*moments(judge.features(np.concatenate(batches))), *of_real)
        row = {
            **entry,
            "evaluations": sampler.num_evaluations,
            "distance": distance,
        }
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        print(row, flush=True)


def rows(path: str) -> list[dict]:
    """The measurements so far; a last line that was cut off does not count."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def name_of(row: dict) -> str:
    """The name of the curve that a measurement belongs to."""
    return f"{row['sampler']}, {row['spacing']}" + (f", eta {row['eta']:g}" if "eta" in row else "")


def timing(workdir: str) -> str:
    """A table of the seconds that one evaluation of 2,048 images takes; the samplers take turns, since machines are shared."""
    from ddpm_tf import experiment
    from ddpm_tf.samplers import make_sampler

    inference, seconds = experiment.load_for_inference(workdir), dict[str, list[float]]()
    samplers = {
        name: make_sampler(name, inference.diffusion, num_steps=6 if name == "heun" else 11, spacing="trailing")
        for name in ("ddpm", "ddim", "dpm_solver", "heun")
    }
    for turn in range(4):
        for name, sampler in samplers.items():
            start = time.monotonic()
            for _ in experiment.generate(inference.network, sampler, num_images=COUNT, batch_size=BATCH):
                pass
            if turn:  # the first also compiles
                seconds.setdefault(name, []).append((time.monotonic() - start) / sampler.num_evaluations)
    lines = ["| sampler | seconds | of ddim's |", "|---|---|---|"]
    lines += [
        f"| {name} | {np.median(v):.3f} | {np.median(v) / np.median(seconds['ddim']):.2f} |"
        for name, v in seconds.items()
    ]
    return "\n".join(lines)


def distance_table(measured: list[dict]) -> str:
    """A row for every curve, a column for every number of evaluations."""
    columns = [*EVALUATIONS, 100, 250, 1000]
    lines = [
        "| sampler, spacing | " + " | ".join(map(str, columns)) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for curve in dict.fromkeys(map(name_of, measured)):
        values = [[row["distance"] for row in measured if name_of(row) == curve and near(row, n)] for n in columns]
        lines.append(
            f"| {curve} | "
            + " | ".join(f"{np.mean(v):.3f} ±{(max(v) - min(v)) / 2:.3f}" if v else "" for v in values)
            + " |"
        )
    return "\n".join(lines)


def near(row: dict, evaluations: int) -> bool:
    """Whether a measurement belongs to a column; heun cannot ask the network an even number of times."""
    return row["num_steps"] == ((evaluations + 1) // 2 if row["sampler"] == "heun" else evaluations)


def plot(measured: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for curve in dict.fromkeys(map(name_of, measured)):
        points: dict[int, list[float]] = {}
        for row in measured:
            if name_of(row) == curve:
                points.setdefault(row["evaluations"], []).append(row["distance"])
        x = sorted(points)
        axes.plot(
            x,
            [np.mean(points[n]) for n in x],
            marker="o",
            linestyle="--" if curve.startswith("ddpm") else "-",
            label=curve,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="network evaluations for an image",
        ylabel="Frechet distance to the real digits",
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def floor() -> str:
    """What real digits have as their distance to real digits."""
    from ddpm_tf.data.sources import load_digits
    from ddpm_tf.evaluation.distances import frechet_distance, moments
    from ddpm_tf.evaluation.features import DigitJudge

    real, labels = (tensor.numpy() for tensor in load_digits().tensors.values())
    features = DigitJudge(real, labels).features(real)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(real))
    half = len(real) // 2
    halves = frechet_distance(*moments(features[order[:half]]), *moments(features[order[half:]]))
    part = frechet_distance(*moments(features[order[:1024]]), *moments(features))
    return f"For scale: 1,024 real digits are at {part:.3f} from all of them, and two halves at {halves:.3f} from each other."


def encoding(workdir: str, docs: str) -> str:
    """A table of the error of DDIM's way up and down by its steps, for 100 real digits; writes encoding.png."""
    from ddpm_tf import experiment, images
    from ddpm_tf.samplers import make_sampler
    from ddpm_tf.samplers.inversion import encode

    inference, digits = experiment.load_for_inference(workdir), real_digits(100)
    x = images.from_uint8(digits.astype(np.float32))
    lines = ["| S | mean squared error |", "|---|---|"]
    for num_steps in ENCODING_STEPS:
        encoded = encode(inference.network, make_sampler("ddim", inference.diffusion, num_steps=num_steps), x)
        error = np.mean(((np.clip(encoded.images, -1, 1) - x) / 2) ** 2)
        lines.append(f"| {num_steps} | {error:.1e} |")
        if num_steps == 100:
            shown = [digits[:16], images.to_uint8(encoded.x_T[:16] / 3), images.to_uint8(encoded.images[:16])]
            save_picture(os.path.join(docs, "encoding.png"), np.concatenate(shown))
    return "\n".join(lines)


def inpainting(workdir: str, docs: str) -> None:
    """Write inpainting.png: the lower half of real digits filled in, with three seeds."""
    from ddpm_tf import experiment, images
    from ddpm_tf.samplers import make_sampler, sample

    inference, digits = experiment.load_for_inference(workdir), real_digits(16)
    is_known = np.arange(8)[:, None] < np.full(8, 4)[None]
    sampler = make_sampler("repaint", inference.diffusion, num_steps=50, jump_length=5, num_resamples=10)
    rows = [digits, np.where(is_known[..., None], digits, 127).astype(np.uint8)]
    filled_in = [
        sample(
            inference.network, sampler.with_known(images.from_uint8(digit.astype(np.float32)), is_known), range(3)
        ).images
        for digit in digits
    ]
    rows += [images.to_uint8(np.stack([three[k] for three in filled_in])) for k in range(3)]
    save_picture(os.path.join(docs, "inpainting.png"), np.concatenate(rows))


def real_digits(count: int) -> np.ndarray:
    """Some of the real digits, uint8 [count, 8, 8, 1]."""
    from ddpm_tf.data.sources import load_digits

    real = load_digits().tensors["image"].numpy()
    return real[np.random.Generator(np.random.PCG64(1)).permutation(len(real))[:count]]


def save_picture(path: str, shown: np.ndarray) -> None:
    from ddpm_tf import images

    with open(path, "wb") as f:
        f.write(images.png_bytes(images.picture(shown, columns=16)))


def write_page(measured: list[dict], docs: str, workdir: str) -> None:
    """Write samplers.md, whose tables are the measurements, and its pictures."""
    with open(os.path.join(os.path.dirname(__file__), "samplers_page.md"), encoding="utf-8") as f:
        template = f.read()
    values: dict[str, str] = {"distances": distance_table(measured), "seconds": timing(workdir), "floor": floor()}
    values["encoding"] = encoding(workdir, docs)
    inpainting(workdir, docs)
    for name, value in values.items():
        template = template.replace(f"[[{name}]]", value)
    with open(os.path.join(docs, "samplers.md"), "w", encoding="utf-8") as f:
        f.write(template)
    plot(measured, os.path.join(docs, "samplers.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a finished run of configs/digits.py")
    parser.add_argument("--out", required=True, help="where the measurements are kept")
    parser.add_argument("--docs", default="docs", help="the folder of samplers.md and samplers.png")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, "measurements.jsonl")
    measure(args.workdir, path)
    planned = list(plan())
    measured = [row for row in rows(path) if {k: v for k, v in row.items() if k not in RESULTS} in planned]
    write_page(measured, args.docs, args.workdir)


if __name__ == "__main__":
    main()
