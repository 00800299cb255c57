"""Memory of an exported model in a session, as a model server holds it: loaded, and the peak of parallel requests.

  python -m benchmarks.serving_memory exported/digits/1

Through the C API, each row in a process of its own; resident memory of the process (Linux), which without a model is that
of the TensorFlow library.
"""

import argparse
import subprocess
import sys
import threading

import numpy as np

from tests.serving.c_api import CSession

SETTINGS = ((1, 1), (4, 1), (16, 1), (16, 2))


def resident(what="VmRSS"):
    """MiB."""
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith(what)).split()[1]) / 1024


def measure(folder, num_images, num_threads):
    session = CSession(folder)
    loaded = resident()
    session.run("sample", {"seed": np.zeros(1, np.int64)})
    ready = resident()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # forget the peak so far
    seeds = np.arange(num_images)
    threads = [threading.Thread(target=session.run, args=("sample", {"seed": seeds})) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    peak = resident("VmHWM")
    print(
        f"| {num_images} | {num_threads} | {loaded:.0f} | {ready:.0f} | {peak:.0f} | {peak - ready:.0f} |", flush=True
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a version folder")
    parser.add_argument("setting", nargs="*", type=int, help="images and requests at once, to measure only that")
    args = parser.parse_args()
    if args.setting:
        measure(args.folder, *args.setting)
        return
    print("| images per request | requests at once | loaded, MiB | after a first request | peak | the requests' part |")
    print("|---|---|---|---|---|---|", flush=True)
    for setting in SETTINGS:
        command = [sys.executable, "-m", "benchmarks.serving_memory", args.folder, *map(str, setting)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
