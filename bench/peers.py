#!/usr/bin/python3
"""Measures cnbd beside nbdkit, qemu-nbd and Btrfs, on real data of this machine.

In every round each server goes through the same life, in another order each time:
what counts are the ratios within a round. Everything measured is written to a
result file; tables and what cnbd is to reach are made from it. See README.md.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time

import report
import servers
from datasets import MAKERS, Dataset
from machine import GIB, MIB, Failed, busy, description, filesystem, kernel_cpu, kernel_since, run

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
BEGIN, END = "<!-- tables begin -->", "<!-- tables end -->"


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little data, one round: to see that everything works; its figures say nothing")
    parser.add_argument("--dir", default=os.environ.get("DIR", os.path.join(ROOT, "build")), help="the disk that is measured (default: $DIR, or build)")
    parser.add_argument("--rounds", type=int, help="how often (default 3)")
    parser.add_argument("--size", type=int, help="MiB of the root image (default 1536); the other sets have a third")
    parser.add_argument("--seconds", type=float, help="for each random workload (default 5)")
    parser.add_argument("--pairs", type=int, help="of a write and a FLUSH (default 3000)")
    parser.add_argument("--idle", type=float, help="seconds of idle time after the storm (default 60)")
    parser.add_argument("--idle-max", type=float, help="most seconds to wait until a store changes no more (default 600)")
    parser.add_argument("--servers", help="names, or parts of them, with commas between (default: all)")
    parser.add_argument("--groups", help="of workloads, with commas between (default: all): " + "; ".join(f"{k}: {v}" for k, v in groups().items()))
    parser.add_argument("--sets", help="of data beside root, with commas between (default: all): source, postgres, noise")
    parser.add_argument("--data", metavar="DIR", help="keep the sets in DIR, and take them from there the next time (default: they are removed)")
    parser.add_argument("--cnbd", help="the program (default: bin/cnbd, which is built)")
    parser.add_argument("--out", default=os.path.join(ROOT, "build", "peers.json"), help="the result file (default build/peers.json)")
    parser.add_argument("--report", metavar="FILE", nargs="+", help="measure nothing, make the tables of result files, together")
    parser.add_argument("--docs", metavar="FILE", help="put the tables between the marks in FILE instead of printing them")
    args = parser.parse_args()
    defaults = {"rounds": 3, "size": 1536, "seconds": 5, "pairs": 3000, "idle": 60, "idle_max": 600}
    if args.quick:
        defaults = {"rounds": 1, "size": 64, "seconds": 0.2, "pairs": 200, "idle": 1, "idle_max": 2}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def groups():
    """Those of the workloads; without their module where libnbd's binding is missing."""
    try:
        from workloads import GROUPS
    except ImportError as e:
        sys.exit(f"{e}: bench/setup.sh installs it, for Debian's own python3")
    return GROUPS


def check(args, need):
    """That everything is there before anything is made."""
    missing = [t for t in ("fio", "nbdcopy", "nbdkit", "qemu-nbd", "qemu-img", "mkfs.ext4", "mkfs.btrfs", "btrfs", "losetup") if not shutil.which(t)]
    if missing:
        sys.exit("missing: " + ", ".join(missing) + " (bench/setup.sh installs them)")
    if os.geteuid() != 0:
        sys.exit("only root can mount Btrfs, limit memory, and drop the host's caches")
    free = shutil.disk_usage(args.dir).free
    if free < need:
        sys.exit(f"{args.dir}: {free / GIB:.1f} GiB are free, {need / GIB:.1f} are needed (--size makes it less)")


def choose(args, cnbd, loop):
    chosen = servers.all_servers(cnbd, loop)
    if args.servers:
        words = args.servers.split(",")
        chosen = [s for s in chosen if any(w == s.name or (w in s.name and w not in [x.name for x in chosen]) for w in words)]
    if not chosen:
        sys.exit("no such server: " + args.servers)
    return chosen


def command(words):
    """The command line, without the places of this machine."""
    kept, skip = [os.path.relpath(__file__, ROOT)], False
    for word in words:
        name, _, value = word.partition("=")
        if skip:
            skip = False
        elif name in ("--dir", "--data", "--out", "--cnbd", "--docs"):
            skip = not value
        else:
            kept.append(word)
    return shlex.join(kept)


def progress(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def round_of(n, args, chosen, sets, directory):
    """One round: floors of the disk, and the life of each server."""
    from workloads import Life, floors

    args.seed = n + 1
    result = {"load": os.getloadavg()[0], "servers": {}}
    began, (spent, stolen), own, kernel = time.monotonic(), busy(), os.times(), kernel_cpu()
    result["floors"] = floors(directory, sets["root"], args)
    order = chosen[:]
    random.Random(args.seed).shuffle(order)
    for s in order:
        progress(f"round {n + 1} of {args.rounds}: {s.name}")
        result["servers"][s.name] = Life(s, sets, directory, args).run()
        for name, figures in result["servers"][s.name].items():
            if "error" in figures:
                progress(f"  {name}: {figures['error'].splitlines()[-1]}")
    # Ours are this process and its children, and the kernel's threads.
    spent2, stolen2 = busy()
    now = os.times()
    ours = sum(now[:4]) - sum(own[:4]) + kernel_since(kernel)
    total = (time.monotonic() - began) * len(os.sched_getaffinity(0))
    result |= {"seconds": time.monotonic() - began, "others": max(0, spent2 - spent - ours) / total, "stolen": (stolen2 - stolen) / total}
    return result


def main():
    args = options()
    if args.report:
        runs = []
        for name in args.report:
            with open(name, encoding="utf-8") as f:
                runs.append(json.load(f))
        return show(args, runs)
    args.groups = args.groups.split(",") if args.groups else list(groups())
    unknown = [g for g in args.groups if g not in groups()]
    if unknown:
        sys.exit("no such group: " + ", ".join(unknown))
    args.sets = args.sets.split(",") if args.sets else list(MAKERS)
    unknown = [s for s in args.sets if s not in MAKERS]
    if unknown:
        sys.exit("no such set of data: " + ", ".join(unknown))
    size = args.size * MIB
    # In bytes. A sixth of the data, as far as a server has room to run in it.
    args.limit, args.region = max(192 * MIB, size // 6), min(128 * MIB, size // 2)
    os.makedirs(args.dir, exist_ok=True)
    check(args, 6 * size + 2 * GIB)
    cnbd = args.cnbd and os.path.abspath(args.cnbd)
    if not cnbd:
        run("make", "-C", ROOT, "build")
        cnbd = os.path.join(ROOT, "bin", "cnbd")
    loop, args.pipeline = (os.path.join(ROOT, "build", name) for name in ("loop", "pipeline"))
    run("go", "build", "-o", os.path.dirname(loop) + "/", "./bench/loop", "./bench/pipeline", cwd=ROOT)
    chosen = choose(args, cnbd, loop)

    # Ctrl-C and SIGTERM end it in good order, and nothing disturbs the end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as cleanups:
        directory = tempfile.mkdtemp(prefix="bench-", dir=os.path.abspath(args.dir))
        cleanups.callback(shutil.rmtree, directory)
        os.chmod(directory, 0o711)  # PostgreSQL runs as another user
        for s in chosen:
            cleanups.callback(s.remove)
        cleanups.callback(lambda: [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)])

        sets, data = {}, directory
        if args.data:
            data = os.path.abspath(args.data)
            os.makedirs(data, exist_ok=True)
        for name in MAKERS:
            if name == "root" or "data" in args.groups and name in args.sets:
                progress(f"data: {name}")
                sets[name] = Dataset(name, data, size if name == "root" else size // 3 // MIB * MIB)
        saved = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "command": command(sys.argv[1:]),
            "machine": description() | {"filesystem": filesystem(directory)},
            "versions": [run(cnbd, "version").splitlines()[0], run("nbdkit", "--version").strip(), run("qemu-nbd", "--version").splitlines()[0], run("fio", "--version").strip(), "libnbd " + run("nbdcopy", "--version").split()[1]],
            "options": {k: v for k, v in vars(args).items() if k in ("quick", "size", "seconds", "pairs", "idle", "idle_max", "groups", "limit", "region")},
            "sets": {name: {"size": s.size, "data": s.data} for name, s in sets.items()},
            "servers": [s.name for s in chosen],
            "rounds": [],
        }
        for n in range(args.rounds):
            saved["rounds"].append(round_of(n, args, chosen, sets, directory))
            os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
            with open(args.out, "w", encoding="utf-8") as f:
                json.dump(saved, f, indent=1)
    return show(args, [saved])


def show(args, runs):
    """Prints the tables, or puts them into a document."""
    text = report.tables(runs)
    if not args.docs:
        print(text)
        return
    with open(args.docs, encoding="utf-8") as f:
        document = f.read()
    before, rest = document.split(BEGIN)
    with open(args.docs, "w", encoding="utf-8") as f:
        f.write(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    try:
        main()
    except Failed as e:
        sys.exit(str(e))
    except KeyboardInterrupt:
        sys.exit(130)
