#!/usr/bin/env python3
"""Measures cnbd beside nbdkit and qemu-nbd, with nbdcopy as the client of all.

A disk image with a real filesystem is written in through NBD and flushed, the
server is stopped, started again, and the image is read out twice: cold and warm.
The servers take turns, in every round in another order, so that what else the
machine does hits all alike; what counts are the ratios within a round.

The result is a table in Markdown on standard output. See README.md.
"""

import argparse
import os
import platform
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
MIB, GIB = 1 << 20, 1 << 30
BASE = "nbdkit file"  # the server that ratios are against
STEPS = ("write", "cold", "warm")


class Server:
    """A server of one file on a unix socket."""

    def __init__(self, name, argv, suffix="", make=None):
        self.name = name
        self.argv = argv  # with {file}, {socket} and {size}
        self.suffix = suffix  # of the file
        self.make = make  # makes the file with the image in it: a read peer
        self.results = []  # of each round, a dict

    def command(self, **places):
        return [word.format(**places) for word in self.argv]


def servers(cnbd):
    """Those to measure. The machine must have their programs."""

    def ours(codec):
        return Server(
            f"cnbd {codec}",
            [cnbd, "serve", "--size", "{size}", "--codec", codec, "--listen", "unix:{socket}", "{file}"],
        )

    def qcow2(image, file):
        run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd", image, file)

    return [
        ours("auto"),
        ours("s2"),
        ours("none"),
        Server(BASE, ["nbdkit", "--foreground", "--unix", "{socket}", "file", "{file}"]),
        Server("qemu-nbd raw", ["qemu-nbd", "--persistent", "--shared=16", "--format=raw", "--socket={socket}", "{file}"]),
        Server(
            "qemu-nbd qcow2, zstd",
            ["qemu-nbd", "--persistent", "--shared=16", "--read-only", "--format=qcow2", "--socket={socket}", "{file}"],
            suffix=".qcow2",
            make=qcow2,
        ),
    ]


def run(*argv):
    """Runs a program that must succeed, and returns what it prints."""
    p = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if p.returncode != 0:
        sys.exit(f"{shlex.join(argv)}: status {p.returncode}\n{p.stdout}{p.stderr}")
    return p.stdout


class Running:
    """A server that runs, as a context."""

    def __init__(self, argv, socket, log):
        self.argv, self.socket, self.log = argv, socket, log

    def __enter__(self):
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        # It answers when nbdinfo is content.
        uri = self.uri = "nbd+unix:///?socket=" + self.socket
        for _ in range(600):
            if self.process.poll() is not None:
                break
            if os.path.exists(self.socket) and subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=False).returncode == 0:
                return self
            time.sleep(0.05)
        self.stop()
        with open(self.log, encoding="utf-8", errors="replace") as log:
            sys.exit(f"{shlex.join(self.argv)}: does not serve\n{log.read()}")

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=300)

    def cpu(self):
        """Seconds of all processors that it has used, user and system."""
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak(self):
        """Most bytes that were resident."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmHWM:"))

    def timed(self, *argv):
        """Runs a client: seconds, and processor seconds of the server."""
        cpu, began = self.cpu(), time.monotonic()
        run(*argv)
        return time.monotonic() - began, self.cpu() - cpu


def allocated(path):
    """Bytes that a file takes of its filesystem."""
    return os.stat(path).st_blocks * 512


def drop_cache(path):
    """Has the next read of the file come from its disk, as far as it can."""
    os.sync()
    with open(path, "rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if os.geteuid() == 0:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as f:
            f.write("1\n")


def warm(path):
    """Has the file in the page cache."""
    with open(path, "rb", buffering=0) as f:
        while f.read(1 << 20):
            pass


def measure(server, image, directory):
    """One round of one server."""
    file = os.path.join(directory, "disk" + server.suffix)
    socket, log = os.path.join(directory, "socket"), os.path.join(directory, "log")
    size = os.path.getsize(image)
    argv = server.command(file=file, socket=socket, size=size)
    r = {}
    if os.path.exists(file):
        os.unlink(file)
    if server.make:
        server.make(image, file)
    else:
        if not server.name.startswith("cnbd"):
            with open(file, "wb") as f:
                f.truncate(size)
        warm(image)
        os.sync()  # what was left of the one before
        with Running(argv, socket, log) as s:
            r["write"], r["write cpu"] = s.timed("nbdcopy", "--flush", image, s.uri)
            r["write peak"] = s.peak()
    r["stored"] = allocated(file)
    drop_cache(file)
    with Running(argv, socket, log) as s:
        for step in ("cold", "warm"):
            r[step], r[step + " cpu"] = s.timed("nbdcopy", "--no-extents", s.uri, "null:")
        r["read peak"] = s.peak()
    server.results.append(r)
    os.unlink(file)


def make_image(path, size, want):
    """Makes an ext4 filesystem with the Go toolchain and files of /usr."""
    tree = path + ".tree"
    total = 0
    for i, top in enumerate((run("go", "env", "GOROOT").strip(), "/usr")):
        for directory, subdirectories, files in os.walk(top):
            subdirectories.sort()
            to = os.path.join(tree, str(i), os.path.relpath(directory, top))
            os.makedirs(to, exist_ok=True)
            for name in sorted(files):
                source = os.path.join(directory, name)
                if total >= want or os.path.islink(source) or not os.path.isfile(source):
                    continue
                try:
                    if os.path.getsize(source) > size // 8:
                        continue
                    total += os.path.getsize(source)
                    shutil.copyfile(source, os.path.join(to, name))
                except OSError:
                    pass  # not to be read
    run("mkfs.ext4", "-q", "-F", "-d", tree, path, f"{size >> 10}k")
    shutil.rmtree(tree)


def spread(values, form):
    """Median, and least to most."""
    values = list(values)
    return f"{form % statistics.median(values)} ({form % min(values)}–{form % max(values)})"


def table(head, rows):
    """Prints a table in Markdown."""
    for row in [head, ["---"] * len(head)] + rows:
        print("| " + " | ".join(row) + " |")
    print()


def report(all_servers, image, conditions):
    """Prints what was measured."""
    base = next(s for s in all_servers if s.name == BASE).results
    size, data = os.path.getsize(image), allocated(image)
    amount = {"write": data, "cold": size, "warm": size}
    speeds, costs = [], []
    for s in all_servers:
        speed, cost = [s.name], [s.name]
        for step in STEPS:
            if step in s.results[0]:
                speed.append(spread((amount[step] / MIB / r[step] for r in s.results), "%.0f"))
                speed.append(spread((b[step] / r[step] for r, b in zip(s.results, base)), "%.2f"))
                cost.append("%.2f" % statistics.median(r[step + " cpu"] * GIB / amount[step] for r in s.results))
            else:
                speed += ["–", "–"]
                cost.append("–")
        cost.append("%.0f" % (max(max(r.get("write peak", 0), r["read peak"]) for r in s.results) / MIB))
        stored = statistics.median(r["stored"] for r in s.results)
        cost += ["%.0f" % (stored / MIB), "%.2f" % (data / stored)]
        speeds.append(speed)
        costs.append(cost)
    table(["server", "write MiB/s", "× nbdkit", "cold read MiB/s", "× nbdkit", "warm read MiB/s", "× nbdkit"], speeds)
    table(["server", "write CPU s/GiB", "cold CPU s/GiB", "warm CPU s/GiB", "peak MiB", "stored MiB", "data : stored"], costs)
    print(f"Image of {size / MIB:.0f} MiB with {data / MIB:.0f} MiB of data; {len(base)} rounds: median (least–most). " + " ".join(conditions))


def filesystem(path):
    """The type of the filesystem that path is on."""
    return run("df", "--output=fstype", path).split()[-1]


def processor():
    """Its name."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
        return next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), platform.machine())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default=os.environ.get("IMAGE"), help="disk image to copy, a file (default: $IMAGE, or one that is made)")
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("ROUNDS", "3")), help="how often (default: $ROUNDS, or 3)")
    parser.add_argument("--dir", default=os.environ.get("DIR", os.path.join(ROOT, "build")), help="where stores are made: the disk that is measured (default: $DIR, or build)")
    parser.add_argument("--cnbd", help="the program (default: bin/cnbd, which is built)")
    parser.add_argument("--only", help="servers whose name has this, and nbdkit")
    args = parser.parse_args()

    missing = [t for t in ("nbdcopy", "nbdinfo", "nbdkit", "qemu-nbd", "qemu-img", "mkfs.ext4") if not shutil.which(t)]
    if missing:
        sys.exit("missing: " + ", ".join(missing) + " (make setup installs them)")
    cnbd = args.cnbd
    if not cnbd:
        run("make", "-C", ROOT, "build")
        cnbd = os.path.join(ROOT, "bin/cnbd")

    os.makedirs(args.dir, exist_ok=True)
    directory = tempfile.mkdtemp(prefix="bench-", dir=args.dir)
    try:
        image = args.image
        if not image:
            image = os.path.join(directory, "image")
            make_image(image, 2 * GIB, 1200 * MIB)
        chosen = [s for s in servers(cnbd) if not args.only or args.only in s.name or s.name == BASE]
        load = os.getloadavg()[0]
        for n in range(args.rounds):
            order = chosen[:]
            random.shuffle(order)
            for s in order:
                print(f"round {n + 1} of {args.rounds}: {s.name}", file=sys.stderr)
                measure(s, image, directory)
        report(chosen, image, [
            f"{processor()}, {len(os.sched_getaffinity(0))} processors, Linux {platform.release()}, {filesystem(directory)};",
            f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after;",
            f"{run(cnbd, 'version').split(chr(10))[0]}, {run('nbdkit', '--version').strip()}, {run('qemu-nbd', '--version').split(chr(10))[0]};",
            "host caches dropped before cold reads." if os.geteuid() == 0 else "not root, so only the file's own pages were dropped before cold reads, as far as the kernel does that.",
        ])
        print(f"Command: `{shlex.join([os.path.relpath(__file__, ROOT)] + sys.argv[1:])}`")
    finally:
        shutil.rmtree(directory)


main()
