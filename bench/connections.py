#!/usr/bin/env python3
"""Measures what many connections do beside one: 4 KiB random reads and writes by fio.

One connection and many take turns on the same served device; what counts is the
ratio of their throughputs. The result is a table in Markdown on standard output.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def fio(uri, seconds, **options):
    """Runs fio and returns its report of the one group of jobs."""
    argv = ["fio", "--name=t", "--ioengine=nbd", f"--uri={uri}", "--size=256m", "--buffer_compress_percentage=50"]
    argv += ["--group_reporting", "--output-format=json"]
    if seconds:
        argv += ["--time_based", f"--runtime={seconds}", "--norandommap", "--thread"]
    argv += [f"--{name}={value}" for name, value in options.items()]
    p = subprocess.run(argv, capture_output=True, text=True, check=False)
    if p.returncode != 0:
        sys.exit(f"fio: status {p.returncode}\n{p.stdout}{p.stderr}")
    return json.loads(p.stdout[p.stdout.index("{") :])["jobs"][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cnbd", default=os.path.join(ROOT, "bin", "cnbd"), help="the program (bin/cnbd)")
    parser.add_argument("--connections", type=int, default=64, help="how many are compared with one (64)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (3)")
    parser.add_argument("--seconds", type=int, default=4, help="for how long (4)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        argv = [args.cnbd, "serve", "--size", "1GiB", "--cache", "512MiB", os.path.join(directory, "store")]
        server = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            uri = server.stdout.readline().strip()
            fio(uri, 0, rw="write", bs="1m", iodepth=8)
            print(f"| | depth | 1 connection, IOPS | {args.connections} connections, IOPS | ratio (least to most) |")
            print("|---|---|---|---|---|")
            for direction in ("read", "write"):
                for depth in (1, 16):
                    one, many = [], []
                    for _ in range(args.rounds):
                        for jobs, results in ((1, one), (args.connections, many)):
                            job = fio(uri, args.seconds, rw="rand" + direction, bs="4k", iodepth=depth, numjobs=jobs)
                            results.append(job[direction]["iops"])
                    ratios = sorted(m / o for o, m in zip(one, many))
                    print(
                        f"| random {direction}s | {depth} | {statistics.median(one):.0f} | {statistics.median(many):.0f} "
                        f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
                        flush=True,
                    )
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
