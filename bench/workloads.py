"""What is done to each server, and what is measured of it.

A life is one round of one server, from empty storage to its removal. Each
workload gives a dict of figures; one that fails gives {"error": why}, and the
life goes on as far as it can.
"""

import concurrent.futures
import contextlib
import json
import mmap
import os
import random
import subprocess
import time

import nbd  # of Debian's python3-libnbd

from datasets import BLOCK
from machine import GIB, MIB, Failed, drop_caches, run, warm
from servers import OFFERED, Meter, memory_server

GROUPS = {
    "sequential": "1 MiB sequential write at depth 8 with FLUSH, read cold and warm; start, stop, stored bytes, processor time, peak memory",
    "read": "4 KiB random read, within the cache and beyond it",
    "limited": "4 KiB random read with memory limited to a sixth of the data",
    "pairs": "4 KiB write and FLUSH, one after the other",
    "mix": "4 KiB mix of 70 % reads, by one connection and by four",
    "write": "4 KiB random write, with and without a FLUSH every 32",
    "pipelined": "4 KiB reads in cache, mixes and writes at depth 16 by bench/pipeline, a client that takes less of the machine than fio",
    "copy": "nbdcopy in and out, as it comes",
    "storm": "stored bytes after idle time, after a storm of 4 KiB overwrites, and after idle time again",
    "data": "sequential write of the other sets of data",
    "curve": "cnbd alone: sequential write at several speeds, and what it takes",
}


ERRORS = (Failed, nbd.Error, OSError, subprocess.TimeoutExpired)


def fio(uri, options, region, **more):
    """Runs fio for a time, and returns its report of the one group of jobs."""
    argv = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", "--thread", "--group_reporting", "--output-format=json", f"--size={region}"]
    argv += [f"--{name}={value}" for name, value in more.items()]
    if "runtime" in more:
        # Data that compress to a half, new for each write. Places from a seed that
        # is the same for all servers of a round.
        argv += ["--time_based", "--norandommap", "--refill_buffers", "--buffer_compress_percentage=50", f"--randseed={options.seed}"]
    try:
        out = run(*argv)
    except Failed as e:
        # What is wrong stands between its banner and a whole report.
        said = [line for line in str(e).splitlines() if line.startswith("fio: ") and "connected" not in line]
        raise Failed(said[-1] if said else str(e)) from e
    return json.loads(out[out.index("{") :])["jobs"][0]


def random_io(running, options, region, rw, depth, jobs=1, **more):
    """4 KiB at random places of region, for options.seconds."""
    job = fio(running.uri, options, region, rw=rw, bs="4k", iodepth=depth, numjobs=jobs, runtime=f"{options.seconds * 1000:.0f}ms", **more)
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides:
        raise Failed("fio did nothing")
    r = {"iops": sum(s["iops"] for s in sides), "requests": sum(s["total_ios"] for s in sides)}
    for name, side in zip(("read", "write"), (job["read"], job["write"])):
        if side["total_ios"]:
            percentiles = side["clat_ns"]["percentile"]
            r[f"{name} p50 us"], r[f"{name} p99 us"] = percentiles["50.000000"] / 1e3, percentiles["99.000000"] / 1e3
    return r


def pipelined(running, options, region, dataset, connections=1, reads=100, flush=0):
    """4 KiB at random places of region, at depth 16, by bench/pipeline: a process for
    each connection. What is written are blocks of dataset."""
    argv = [options.pipeline, "-depth=16", f"-size={region}", f"-seconds={options.seconds}", f"-reads={reads}", f"-flush={flush}", f"-data={dataset.path}"]
    with concurrent.futures.ThreadPoolExecutor(connections) as pool:
        said = pool.map(lambda n: run(*argv, f"-seed={options.seed * 100 + n}", running.socket, timeout=options.seconds + 60), range(connections))
        results = [json.loads(text) for text in said]
    return {"iops": sum(r["requests"] / r["seconds"] for r in results), "requests": sum(r["requests"] for r in results)}


def counted(server, work):
    """Work with the allocations of the server for each of its requests."""
    before = server.mallocs()
    if before is None:
        return work()
    looked = server.mallocs()  # what looking costs
    r = work()
    r["allocations"] = max(0, server.mallocs() - looked - (looked - before)) / r["requests"]
    return r


def connected(uri):
    h = nbd.NBD()
    h.connect_uri(uri)
    return h


def flush(running):
    """Has nothing of the workload before left to be written."""
    h = connected(running.uri)
    h.flush()
    h.shutdown()
    os.sync()


class Blocks:
    """Blocks of a data set, as data to overwrite with, by a seed."""

    def __init__(self, dataset, seed):
        self.dataset, self.random = dataset, random.Random(seed)

    def __enter__(self):
        with open(self.dataset.path, "rb") as f:
            self.map = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
        return self

    def __exit__(self, *_):
        self.map.close()

    def next(self):
        """A place anywhere in the device, in bytes, and a block of data."""
        block = self.random.choice(self.dataset.filled) * BLOCK
        return self.random.randrange(self.dataset.size // BLOCK) * BLOCK, self.map[block : block + BLOCK]


def percentiles(nanoseconds):
    ordered = sorted(nanoseconds)
    return {"p50 us": ordered[len(ordered) // 2] / 1e3, "p99 us": ordered[len(ordered) * 99 // 100] / 1e3, "count": len(ordered)}


def pairs(uri, dataset, options):
    """Time of a WRITE of 4 KiB and a FLUSH behind it, until both are answered."""
    h, times = connected(uri), []
    with Blocks(dataset, options.seed) as blocks:
        for n in range(options.pairs + options.pairs // 10):
            place, data = blocks.next()
            began = time.perf_counter_ns()
            h.pwrite(data, place)
            h.flush()
            if n >= options.pairs // 10:  # the first tenth is to warm up
                times.append(time.perf_counter_ns() - began)
    h.shutdown()
    return percentiles(times)


def storm(uri, dataset, options):
    """Overwrites a quarter as many blocks as there are, with real data, and a FLUSH
    every 256. Returns the numbers of blocks that are not zero afterwards."""
    h, written = connected(uri), set(dataset.filled)
    with Blocks(dataset, options.seed) as blocks:
        for n in range(dataset.size // BLOCK // 4):
            place, data = blocks.next()
            h.pwrite(data, place)
            if n % 256 == 255:
                h.flush()
            written.add(place // BLOCK)
    h.flush()
    h.shutdown()
    return len(written)


def paced_copy(running, dataset, rate):
    """Writes all of dataset in pieces of 1 MiB, 8 in flight, rate of them a second or as
    fast as it can, and a FLUSH."""
    h = connected(running.uri)
    with Meter(running) as m, open(dataset.path, "rb") as f:
        began = time.monotonic()
        for n in range(dataset.size // MIB):
            while (late := time.monotonic() - began - n / rate if rate else 0) < 0:
                if h.aio_in_flight():
                    h.poll(max(1, int(-late * 1000)))
                else:
                    time.sleep(-late)
            while h.aio_in_flight() >= 8:
                h.poll(-1)
            h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(f.read(MIB))), n * MIB, completion=lambda error: 1)
        while h.aio_in_flight():
            h.poll(-1)
        h.flush()
    h.shutdown()
    size = dataset.size
    return {"MiB/s": size / MIB / m.seconds, "server cpu s/GiB": m.server * GIB / size, "data": dataset.data}


def timed_copy(running, size, *argv):
    """nbdcopy of size bytes."""
    with Meter(running) as m:
        run("nbdcopy", *argv)
    return {"MiB/s": size / MIB / m.seconds, "server cpu s/GiB": m.server * GIB / size, "kernel cpu s/GiB": m.kernel * GIB / size}


# 1 MiB at depth 8 by one connection; every byte is sent, zeros as well.
SEQUENTIAL = ["--connections=1", "--threads=1", "--requests=8", "--request-size=1048576", "--no-extents", "--sparse=0"]


class Life:
    """One round of one server."""

    def __init__(self, server, sets, directory, options):
        self.server, self.sets, self.directory, self.options = server, sets, directory, options
        self.results = {}

    def wants(self, group):
        return group in self.options.groups and (self.server.groups is None or group in self.server.groups)

    def measure(self, name, work):
        """Notes the figures of a workload, or its error."""
        try:
            self.results[name] = work()
        except ERRORS as e:
            self.results[name] = {"error": str(e).strip()[-600:]}

    @contextlib.contextmanager
    def started(self, name, limit=None, writes=False):
        """The server running, cold; the times of start and stop, and memory."""
        drop_caches()
        r = self.results.setdefault(name, {})
        with self.server.start(limit, writes) as running:
            try:
                r["start ms"] = running.start_seconds * 1e3
                yield running
                if not running.alive():
                    raise Failed("the server has ended: " + running.said())
                r["peak"] = running.peak()
                if running.group:
                    r["group peak"] = running.group.peak()
                r["stop ms"] = running.stop() * 1e3
            except ERRORS as e:
                r["error"] = str(e).strip()[-600:]

    def run(self):
        """All workloads of the groups that are wanted."""
        try:
            self.live()
        except ERRORS as e:
            self.results["life"] = {"error": str(e).strip()[-600:]}
        finally:
            self.server.remove()
        return self.results

    def live(self):
        root = self.sets["root"]
        inplace = [g for g in ("sequential", "read", "limited", "pairs", "mix", "write", "pipelined") if self.wants(g)]
        if not self.server.keeps:
            self.fresh(root)
            with self.started("empty", writes=True) as s:
                self.write("write", s, root)
                self.reads(s, root)
                self.results.pop("read cold", None)  # it was in memory
                self.overwrite(s, root)
            return
        if inplace:
            self.fresh(root)
            with self.started("empty", writes=True) as s:
                self.write("write", s, root)
            if any(g in inplace for g in ("sequential", "read", "pipelined")):
                with self.started("with data") as s:
                    self.reads(s, root)
            if "limited" in inplace:
                with self.started("limited", self.options.limit) as s:
                    for depth in (1, 16):
                        self.measure(f"limited read, depth {depth}", lambda d=depth: random_io(s, self.options, root.size, "randread", d, ramp_time=f"{self.options.seconds * 200:.0f}ms"))
            if any(g in inplace for g in ("pairs", "mix", "write", "pipelined")):
                with self.started("overwritten", writes=True) as s:
                    self.overwrite(s, root)
        if self.wants("copy") or self.wants("storm"):
            self.fresh(root)
            with self.started("copied in", writes=True) as s:
                warm(root.path)
                self.measure("copy in" if self.wants("copy") else "copied", lambda: timed_copy(s, root.size, "--flush", root.path, s.uri))
                self.measure("stored, copied", self.server.stored)
            if self.wants("copy"):
                with self.started("copied out") as s:
                    self.measure("copy out", lambda: timed_copy(s, root.size, s.uri, "null:"))
            if self.wants("storm"):
                with self.started("storm", writes=True) as s:
                    self.storms(s, root)
        if self.wants("curve") and self.server.idles:
            for rate in OFFERED:
                self.fresh(root)
                with self.started(f"offered {rate}", writes=True) as s:
                    warm(root.path)
                    self.measure(f"write at {rate}", lambda r=rate: paced_copy(s, root, r))
                    self.measure(f"stored, write at {rate}", self.server.stored)
        if self.wants("data"):
            for name, data in self.sets.items():
                if name != "root":
                    self.fresh(data)
                    with self.started(f"with {name}", writes=True) as s:
                        self.write(f"write {name}", s, data)

    def fresh(self, dataset):
        self.server.remove()
        self.server.make(self.directory, dataset.size)

    def write(self, name, s, dataset):
        warm(dataset.path)
        self.measure(name, lambda: timed_copy(s, dataset.size, *SEQUENTIAL, "--flush", dataset.path, s.uri))
        self.results[name]["data"] = dataset.data
        self.measure("stored, " + name, self.server.stored)

    def reads(self, s, root):
        if self.wants("sequential"):
            for name in ("read cold", "read warm"):
                self.measure(name, lambda: timed_copy(s, root.size, *SEQUENTIAL, s.uri, "null:"))
        if not self.wants("read") and not self.wants("pipelined"):
            return
        self.results["cached region"] = {"bytes": self.options.region}
        for name, region in (("cached", self.options.region), ("beyond", root.size)):
            fio(s.uri, self.options, region, rw="read", bs="1m", iodepth=8)
            if self.wants("read"):
                for depth in (1, 16):
                    self.measure(f"{name} read, depth {depth}", lambda r=region, d=depth: counted(self.server, lambda: random_io(s, self.options, r, "randread", d)))
            if self.wants("pipelined") and name == "cached":
                self.measure("pipelined cached read", lambda r=region: pipelined(s, self.options, r, root))

    def overwrite(self, s, root):
        def quiet(name, work):
            flush(s)
            self.measure(name, work)

        if self.wants("pairs"):
            quiet("pairs", lambda: pairs(s.uri, root, self.options))
        if self.wants("mix"):
            for depth in (1, 16):
                for connections in (1, 4):
                    quiet(f"mix, depth {depth}, connections {connections}", lambda d=depth, c=connections: random_io(s, self.options, root.size, "randrw", d, c, rwmixread=70))
        if self.wants("write"):
            for depth in (1, 16):
                quiet(f"write, FLUSH every 32, depth {depth}", lambda d=depth: random_io(s, self.options, root.size, "randwrite", d, fsync=32))
            quiet("write, depth 16", lambda: counted(self.server, lambda: random_io(s, self.options, root.size, "randwrite", 16)))
        if self.wants("pipelined"):
            for connections in (1, 4):
                quiet(f"pipelined mix, connections {connections}", lambda c=connections: pipelined(s, self.options, root.size, root, c, reads=70))
            quiet("pipelined write, FLUSH every 32", lambda: pipelined(s, self.options, root.size, root, reads=0, flush=32))
            quiet("pipelined write", lambda: pipelined(s, self.options, root.size, root, reads=0))

    def storms(self, s, root):
        def settled(seconds):
            """Stored bytes when they have not changed for a while, at most after seconds."""
            began, last, since = time.monotonic(), self.server.stored(), time.monotonic()
            while time.monotonic() - began < seconds and time.monotonic() - since < min(30, seconds / 2):
                time.sleep(min(5, seconds / 4))
                now = self.server.stored()
                if now["live"] != last["live"] or now["garbage"] != last["garbage"]:
                    last, since = now, time.monotonic()
            return last | {"seconds": time.monotonic() - began, "settled": time.monotonic() - began < seconds}

        idle = self.server.idles  # the others are asked at once
        self.measure("stored, idle", lambda: settled(self.options.idle_max if idle else 0))
        blocks = []
        self.measure("storm", lambda: blocks.append(storm(s.uri, root, self.options)) or {"data": blocks[0] * BLOCK})
        if blocks:
            self.measure("stored, storm", self.server.stored)
            if idle:
                time.sleep(self.options.idle)
            self.measure("stored, storm and a minute", self.server.stored)
            self.measure("stored, storm and idle", lambda: settled(self.options.idle_max if idle else 0))


def floors(directory, dataset, options):
    """What the disk, and the sockets, take for the least that a server can do."""
    count, r = options.pairs // 2, {}
    path = os.path.join(directory, "floor")
    page = mmap.mmap(-1, BLOCK)  # aligned, as direct I/O wants it
    page.write(os.urandom(BLOCK))

    def appends(fd, sync):
        times = []
        for n in range(count):
            began = time.perf_counter_ns()
            os.pwritev(fd, [page], n * BLOCK)
            if sync:
                os.fdatasync(fd)
            times.append(time.perf_counter_ns() - began)
        os.close(fd)
        return percentiles(times)

    def fresh():
        if os.path.exists(path):
            os.unlink(path)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    fd = fresh()
    os.write(fd, os.urandom(count * BLOCK))
    os.fsync(fd)
    r["append, buffered + fdatasync, written space"] = appends(fd, True)
    r["append, O_DIRECT|O_DSYNC, written space"] = appends(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC), False)
    fd = fresh()
    os.posix_fallocate(fd, 0, count * BLOCK)
    os.fsync(fd)
    r["append, buffered + fdatasync, fallocated space"] = appends(fd, True)
    fd = fresh()
    os.fsync(fd)
    r["append, buffered + fdatasync, extending"] = appends(fd, True)
    os.unlink(path)

    fd, times, places = os.open(dataset.path, os.O_RDONLY | os.O_DIRECT), [], random.Random(options.seed)
    for _ in range(count):
        place = places.randrange(dataset.size // BLOCK) * BLOCK
        began = time.perf_counter_ns()
        os.preadv(fd, [page], place)
        times.append(time.perf_counter_ns() - began)
    os.close(fd)
    r["direct read"] = percentiles(times)

    server = memory_server()
    server.make(directory, dataset.size)
    with server.start() as s:
        r["two round trips (nbdkit memory)"] = pairs(s.uri, dataset, options)
    return r


