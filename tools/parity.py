"""Write docs/parity.md: every quantity that the original code computed, beside ours.

python -m tools.parity            (about two minutes on 2 cores)
"""

import numpy as np
import tensorflow as tf

from ddpm_tf.convert.tf1 import load_tf1_checkpoint
from ddpm_tf.diffusion import losses
from ddpm_tf.diffusion.gaussian import discretized_gaussian_log_likelihood
from ddpm_tf.diffusion.schedules import make_betas
from ddpm_tf.evaluation.likelihood import bits_per_dim
from ddpm_tf.networks.layers import timestep_embedding
from ddpm_tf.samplers import make_sampler
from ddpm_tf.training.model import DiffusionModel
from ddpm_tf.training.optimizers import make_optimizer
from tests.conftest import DATA, Reference, draw_from_tables, run_chain, tf1_name

PREDICTIONS = {"eps": "eps", "x_0": "xstart", "x_prev": "xprev"}
VARIANCES = {"fixed_large": "fixedlarge", "fixed_small": "fixedsmall", "learned": "learned"}
NETWORK = "the network runs in float32 in both"
MATHS = "float32 formulas on the reference's own network output"
TAIL = "float32 mass of a bin in the tails: 1e-7 on the output moves it by 5e-5 of itself, in the original too"


class Table:
    """Rows of (quantity, keys, largest absolute and relative difference over all references, tolerance, why)."""

    def __init__(self):
        self.rows = {}

    def add(self, quantity, keys, tolerance, why, ours, reference):
        ours, reference = (np.asarray(a, np.float64) for a in (ours, reference))
        ours = np.broadcast_to(ours, reference.shape)
        absolute = np.abs(ours - reference).max()
        relative = absolute / max(np.abs(reference).max(), 1e-300)
        row = self.rows.setdefault(quantity, [keys, 0.0, 0.0, tolerance, why])
        row[1], row[2] = max(row[1], absolute), max(row[2], relative)

    def markdown(self):
        lines = [
            "| quantity | reference keys | largest difference | of the largest value | tolerance | why |",
            "|---|---|---|---|---|---|",
        ]
        for quantity, (keys, absolute, relative, tolerance, why) in self.rows.items():
            lines.append(f"| {quantity} | `{keys}` | {absolute:.1e} | {relative:.1e} | {tolerance} | {why} |")
        return "\n".join(lines)


def schedules(r, table):
    for key in r.arrays:
        if key.startswith("betas_"):
            _, name, T = key.split("_")
            table.add("beta schedules", "betas_*", "1e-12", "float64", make_betas(name, int(T)), r[key])
        elif key.startswith("table_"):
            ours = getattr(r.diffusion().schedule, key.removeprefix("table_"))
            table.add("tables of the chain", "table_*", "1e-12", "float64", ours, r[key])


def network(r, table):
    for width in (128, 33):
        ours = timestep_embedding(r["temb_t"], width)
        table.add("time embedding", "temb_*", "2e-5", "float32 sin and cos of up to 1000", ours, r[f"temb_{width}"])
    table.add("U-Net output", "unet_out", "2e-5", NETWORK, r.output(), r["unet_out"])


def maths(r, table):
    d, t = r.diffusion(), r["t"]
    table.add("q(x_t given x_0), Eq. 4", "q_sample", "2e-5", "float32", d.q_sample(r["x0"], t, r["eps"]), r["q_sample"])
    mean, log_variance = d.q_posterior(r["x0"], r["x_t"], t)
    table.add("posterior, Eqs. 6-7", "q_posterior_*", "2e-5", "float32", mean, r["q_posterior_mean"])
    table.add("posterior, Eqs. 6-7", "q_posterior_*", "2e-5", "float32", log_variance, r["q_posterior_log_variance"])
    table.add("prior term", "prior_bpd", "1e-5 relative", "float32", losses.prior_bpd(d, r["x0"]), r["prior_bpd"])
    old = r.diffusion(variance="fixed_small_floored").p_mean_variance(r["unet_out"], r["x_t"], t)
    table.add("older class (256x256)", "d1_p_*", "2e-5", MATHS, old.mean, r["d1_p_mean"])
    table.add("older class (256x256)", "d1_p_*", "2e-5", MATHS, old.log_variance, r["d1_p_logvar"])
    ours = discretized_gaussian_log_likelihood(r["dg_x"], mean=r["dg_mean"], log_scale=r["dg_log_scale"])
    table.add("discretized likelihood", "dg_*", "1e-5", "float32 tanh", ours, r["dg_loglik"])
    for prediction, theirs in PREDICTIONS.items():
        for variance, their_variance in VARIANCES.items():
            learned = variance == "learned"
            diffusion = r.diffusion(prediction=prediction, variance=variance)
            channels = 2 * r.args["C"] if learned else None
            output = r.output(out_channels=channels) if learned else r["unet_out"]
            for clip in (0, 1):
                p, prefix = (
                    diffusion.p_mean_variance(output, r["x_t"], t, clip=bool(clip)),
                    f"p_{theirs}_{their_variance}_clip{clip}",
                )
                kind = "p, learned variance" if learned else "p, fixed variances"
                why = NETWORK if learned else MATHS
                keys = "p_*_learned_*" if learned else "p_*_fixed*"
                table.add(f"{kind}: mean", keys, "2e-5", why, p.mean, r[f"{prefix}_mean"])
                table.add(f"{kind}: log-variance", keys, "2e-5", why, p.log_variance, r[f"{prefix}_log_variance"])
                if learned and prediction == "x_prev":
                    why = "x_0 is (x_prev - coef2 x_t) / coef1 with coef1 down to 0.03; values up to 90"
                    table.add(
                        f"{kind}: x_0 from x_prev", "p_xprev_learned_*", "1e-4", why, p.x_0, r[f"{prefix}_pred_xstart"]
                    )
                else:
                    table.add(f"{kind}: x_0", keys, "2e-5", why, p.x_0, r[f"{prefix}_pred_xstart"])
            bounds(r, table, diffusion, f"{theirs}_{their_variance}", channels)


def bounds(r, table, diffusion, name, channels):
    t, output = r["t"], r.output("q_sample", channels)
    args = {"x_0": r["x0"], "x_t": r["q_sample"], "t": t}
    for ours, key in (
        (losses.vb_terms_bpd(diffusion, output, clip=True, **args), f"vb_{name}"),
        (losses.vlb(diffusion, output, eps=r["eps"], **args), f"loss_{name}_kl"),
    ):
        later = t > 0
        table.add(
            "bound terms and kl loss, t > 0",
            "vb_*, loss_*_kl",
            "2e-5 or 1e-5 relative",
            NETWORK,
            ours[later],
            r[key][later],
        )
        table.add(
            "bound terms and kl loss, t = 0", "vb_*, loss_*_kl", "1e-4 relative", TAIL, ours[~later], r[key][~later]
        )
    if channels is None:
        mse = losses.simple(diffusion, output, eps=r["eps"], **args)
        table.add("mse loss", "loss_*_mse", "2e-5 or 1e-5 relative", NETWORK, mse, r[f"loss_{name}_mse"])


def loops(r, table):
    unet, noise, T = r.network(), tf.constant(r["noise_table"]), r.args["T"]
    run = tf.function(
        lambda x_0: bits_per_dim(
            r.diffusion(),
            lambda x_t, t: unet({"x_t": x_t, "t": t}),
            x_0,
            None,
            noise_fn=lambda s, t, shape: noise[1 + t],
        )
    )
    bound = run(tf.constant(r["x0"]))
    table.add("bits/dim loop, t > 0", "bpd_terms", "1e-5 relative", NETWORK, bound.terms[:, 1:], r["bpd_terms"][:, 1:])
    table.add("bits/dim loop, t = 0", "bpd_terms", "1e-4 relative", TAIL, bound.terms[:, 0], r["bpd_terms"][:, 0])
    table.add("bits/dim loop: squared error of x_0", "bpd_mse", "1e-5 relative", NETWORK, bound.mse, r["bpd_mse"])
    table.add("bits/dim, total", "bpd_total", "5e-5 relative", TAIL, bound.total, r["bpd_total"])
    for variance in ("fixed_large", "fixed_small"):
        sampler = make_sampler("ddpm", r.diffusion(variance=variance))
        chain = tf.function(
            lambda x, start, stop, sampler=sampler: run_chain(
                sampler,
                lambda x_t, i: unet({"x_t": x_t, "t": i}),
                x,
                tf.zeros([x.shape[0]], tf.int64),
                start=start,
                stop=stop,
                noise_fn=lambda s, i, shape: noise[T - i],
            )[:2]
        )
        name = f"sample_{variance.replace('_', '')}"
        recorded = sorted((int(k.rpartition("_t")[2]) for k in r.arrays if k.startswith(f"{name}_t")), reverse=True)
        x, top = noise[0], T
        for t in recorded:
            x, x_0 = chain(x, tf.constant(top), tf.constant(t))
            why = "40 steps of the network, float32"
            table.add("ancestral chain, 40 steps: states", f"{name}_t*", "1e-4", why, x, r[f"{name}_t{t}"])
            table.add(
                "ancestral chain, 40 steps: x_0",
                f"{name}_pred_xstart_t*",
                "1e-4",
                why,
                x_0,
                r[f"{name}_pred_xstart_t{t}"],
            )
            top = t


def training(r, table):
    model = DiffusionModel(r.network(), r.diffusion(), ema_decay=0.9)
    draw_from_tables(model, r)
    model.compile(make_optimizer(learning_rate=2e-3, warmup_steps=5))
    iterator = iter(tf.data.Dataset.from_tensor_slices({"image": r["train_x0"]}))
    model.make_train_function()
    logs = [model.train_function(iterator) for _ in range(12)]
    for ours, key, tolerance in (
        ("loss", "loss", "1e-4 relative"),
        ("grad_norm", "gnorm", "1e-3 relative"),
        ("learning_rate", "lr", "0"),
    ):
        values = [float(log[ours]) for log in logs]
        table.add(
            f"12 training steps: {ours}",
            f"train_{key}",
            tolerance,
            "Adam amplifies rounding",
            values,
            np.float32(r[f"train_{key}"]),
        )
    if r.args["ch"] < 64:
        return
    for kind, trained in (("param", model.network), ("ema", model.ema_network)):
        variables = {tf1_name(v.path): v.numpy().astype(np.float64) for v in trained.variables}
        for k, name in enumerate(r["train_names"]):
            value = variables[str(name)]
            why = "per variable, over sqrt(size); network f, with 2 channels per group"
            of_sum = (value.sum() / value.size**0.5, r[f"train_{kind}_sum"][k] / value.size**0.5)
            table.add(f"12 training steps: sums of {kind}", f"train_{kind}_sum", "1e-5 sqrt(size)", why, *of_sum)
            squares = ((value**2).sum() / r[f"train_{kind}_sq"][k], 1.0)
            table.add(
                f"12 training steps: squares of {kind}",
                f"train_{kind}_sq",
                "1e-5 relative",
                "ratio per variable",
                *squares,
            )


def checkpoint(table):
    r = Reference("ho2020_e")
    unet = r.network()
    for ema, key in ((False, "ckpt_raw_unet_out"), (True, "ckpt_ema_unet_out")):
        load_tf1_checkpoint(f"{DATA}/tf1_e/model.ckpt-12", unet, ema=ema)
        table.add(
            "imported TF1 checkpoint", "ckpt_*_unet_out", "2e-5", NETWORK, unet({"x_t": r["x_t"], "t": r["t"]}), r[key]
        )


def main():
    table = Table()
    for name in ("ho2020_a", "ho2020_b", "ho2020_f"):
        r = Reference(name)
        for section in (schedules, network, maths, loops, training):
            section(r, table)
    checkpoint(table)
    with open("docs/parity.md", "w") as f:
        f.write(
            "# Parity with the original code\n\n"
            "Made by `python -m tools.parity`. The references are values of the authors' TensorFlow 1 code "
            "(hojonathanho/diffusion, graph mode, float32, CPU), in `tests/data/`; three networks (16x16x3, 16x16x1, 8x8x3) "
            "and a checkpoint written by the original. Each row is the largest difference over all of them, absolute, and "
            "divided by the largest reference value. The same comparisons, element by element, are tests.\n\n"
            f"TensorFlow {tf.__version__}, CPU.\n\n{table.markdown()}\n"
        )


if __name__ == "__main__":
    main()
