"""What server-side batching gives to parallel clients, measured against the stand-in of the tests (not the real server).

  python run_export.py --workdir=runs/digits --out=exported/digits
  python -m benchmarks.serving_batching exported digits

Two servers of the same model run side by side, one with batching by exported/batching.config and one without; they are
asked in turn, round by round. A request is for one image; the clients are threads of one process, over REST.
"""

import argparse
import concurrent.futures
import contextlib
import os
import re
import subprocess
import sys
import time

import numpy as np

from ddpm_tf.serving.client import Client


@contextlib.contextmanager
def stand_in(models, *flags):
    """The REST address of a stand-in in a process of its own."""
    command = [sys.executable, "-m", "tests.serving.stand_in", models, "--port=0", "--rest_api_port=0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = process.stdout.readline()
        yield f"127.0.0.1:{re.search(r'REST on ([0-9]+)', line)[1]}"
    finally:
        process.terminate()
        process.wait()


def measure(address, model, num_clients, num_requests):
    """(seconds, [latency in seconds]) of num_clients parallel clients, each asking num_requests times for one image."""

    def ask(k):
        latencies = []
        with Client(address, model, deadline_s=600) as client:
            for r in range(num_requests):
                start = time.perf_counter()
                client.sample([k * num_requests + r])
                latencies.append(time.perf_counter() - start)
        return latencies

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
        latencies = [latency for part in pool.map(ask, range(num_clients)) for latency in part]
    return time.perf_counter() - start, latencies


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", help="a models folder, as run_export.py writes it")
    parser.add_argument("model", help="the name of one of its models")
    parser.add_argument("--num_requests", type=int, default=6, help="requests of a client in a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    batching = f"--batching_parameters_file={os.path.join(args.models, 'batching.config')}"
    results = {}
    with stand_in(args.models) as plain, stand_in(args.models, batching) as batched:
        servers = {"without batching": plain, "with batching": batched}
        for address in servers.values():  # the first runs of a session are slower
            measure(address, args.model, 8, 2)
        for _ in range(args.rounds):
            for num_clients in (1, 8):
                for name, address in servers.items():
                    results.setdefault((num_clients, name), []).append(
                        measure(address, args.model, num_clients, args.num_requests)
                    )
    print("| parallel clients | server | images/s, median of rounds (least, most) | latency, median | latency, 95 % |")
    print("|---|---|---|---|---|")
    for (num_clients, name), rounds in sorted(results.items()):
        rates = [num_clients * args.num_requests / seconds for seconds, _ in rounds]
        latencies = np.concatenate([part for _, part in rounds])
        median, most = np.quantile(latencies, [0.5, 0.95])
        print(
            f"| {num_clients} | {name} | {np.median(rates):.1f} ({min(rates):.1f}, {max(rates):.1f}) | {median:.3f} s "
            f"| {most:.3f} s |"
        )


if __name__ == "__main__":
    main()
