"""Measure class-conditional digits against the scale of guidance, and write docs/classes.md and its plot.

  python -m tools.classes_page --conditional=runs/digits_cond --unconditional=runs/digits_long \
      --classifier=runs/digits_classifier --out=runs/classes [--docs=docs]

Agreement: how many of 2,000 samples a logistic regression, trained on the real digits alone, takes for the class that was
asked for. The distance is that of tools/digits_quality.py, over all samples and, as a mean, class by class. Each measurement is
a line of OUT/measurements.jsonl; started again, the command goes on where it was stopped. About ten minutes on 2 cores.
"""

import argparse
import json
import os
from collections.abc import Iterator

import numpy as np

from tools.samplers_page import rows

COUNT, BATCH, CLASSES = 2000, 250, 10
SAMPLER = {"name": "dpm_solver", "num_steps": 20, "spacing": "trailing"}
GUIDANCE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
CLASSIFIER = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
ALONE, SEEDS = ("unconditional", "null class"), (0, 1_000_000, 2_000_000)  # without a class; seeds of the first image
RESULTS = ("agreement", "distance", "per_class")


def plan() -> Iterator[dict]:
    for kind in ALONE:
        for seed in SEEDS:
            yield {"kind": kind, "scale": 0.0, "seed": seed}
    for scale in GUIDANCE:
        yield {"kind": "classifier-free", "scale": scale}
    for scale in CLASSIFIER:
        yield {"kind": "classifier", "scale": scale}


def measure(args: argparse.Namespace, path: str) -> None:
    """Add what is missing to measurements.jsonl."""
    from ddpm_tf import experiment
    from ddpm_tf.data.sources import load_digits
    from ddpm_tf.evaluation.distances import frechet_distance, moments
    from ddpm_tf.evaluation.features import DigitJudge
    from ddpm_tf.samplers import guided_by, make_sampler

    done = [{k: v for k, v in row.items() if k not in RESULTS} for row in rows(path)]
    missing = [entry for entry in plan() if entry not in done]
    if not missing:
        return
    real, labels = (tensor.numpy() for tensor in load_digits().tensors.values())
    judge = DigitJudge(real, labels)
    of_all, of_class = (
        moments(judge.features(real)),
        [moments(judge.features(real[labels == k])) for k in range(CLASSES)],
    )
    conditional, unconditional = (experiment.load_for_inference(w) for w in (args.conditional, args.unconditional))
    guided = guided_by(unconditional.network, experiment.load_classifier(args.classifier, unconditional))
    for entry in missing:
        settings = {name: value for name, value in SAMPLER.items() if name != "name"}
        sampler = make_sampler(SAMPLER["name"], unconditional.diffusion, **settings)
        network, conditions = {
            "unconditional": (unconditional.network, {}),
            "null class": (conditional.network, {"labels": CLASSES}),
            "classifier-free": (conditional.network, {"guidance": entry["scale"]}),
            "classifier": (guided, {"classifier_scale": entry["scale"]}),
        }[entry["kind"]]
        batches = list(
            experiment.generate(
                network, sampler, num_images=COUNT, seed=entry.get("seed", 0), batch_size=BATCH, **conditions
            )
        )
        images = np.concatenate([batch.images for batch in batches])
        features = judge.features(images)
        row = {**entry, "distance": frechet_distance(*moments(features), *of_all)}
        if entry["kind"] not in ALONE:
            wanted = np.concatenate([batch.labels for batch in batches])
            row["agreement"] = float(np.mean(judge.probabilities(images).argmax(1) == wanted))
            parts = [frechet_distance(*moments(features[wanted == k]), *of_class[k]) for k in range(CLASSES)]
            row["per_class"] = float(np.mean(parts))
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        print(row, flush=True)


def write_page(measured: list[dict], docs: str) -> None:
    """Write classes.md, whose table are the measurements, and classes.png."""
    lines = ["| guidance | scale | agreement | distance | distance, by class |", "|---|---|---|---|---|"]
    for row in measured:
        if row["kind"] not in ALONE:
            cells = f"{row['agreement']:.1%} | {row['distance']:.3f} | {row['per_class']:.2f}"
            lines.append(f"| {row['kind']} | {row['scale']:g} | {cells} |")
    alone, null = ([row["distance"] for row in measured if row["kind"] == kind] for kind in ALONE)
    ranges = [f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in (null, alone)]
    text = (
        f"The null class has the distance {ranges[0]}, with three sets of seeds. An unconditional network with the same "
        f"number of training steps has {ranges[1]}."
    )
    with open(os.path.join(os.path.dirname(__file__), "classes_page.md"), encoding="utf-8") as f:
        template = f.read()
    with open(os.path.join(docs, "classes.md"), "w", encoding="utf-8") as f:
        f.write(template.replace("[[table]]", "\n".join(lines)).replace("[[null]]", text))
    plot(measured, os.path.join(docs, "classes.png"))


def plot(measured: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, parts = pyplot.subplots(1, 3, figsize=(12, 3.6))
    names = {
        "agreement": "agreement with the class",
        "distance": "Frechet distance",
        "per_class": "Frechet distance, by class",
    }
    for axes, (key, title) in zip(parts, names.items(), strict=True):
        for kind in ("classifier-free", "classifier"):
            rows_of = sorted((row for row in measured if row["kind"] == kind), key=lambda row: row["scale"])
            axes.plot([row["scale"] for row in rows_of], [row[key] for row in rows_of], marker="o", label=kind)
        axes.set(xlabel="scale", title=title)
        if key != "agreement":
            axes.set_yscale("log")
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("conditional", "unconditional", "classifier", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--docs", default="docs", help="the folder of the page and the plot")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, "measurements.jsonl")
    measure(args, path)
    write_page(rows(path), args.docs)


if __name__ == "__main__":
    main()
