"""The servers that are compared, each with the storage it works on."""

import http.client
import json
import os
import signal
import socket
import subprocess
import time
import uuid

from machine import MIB, Failed, MemoryGroup, allocated, kernel_cpu, kernel_since, peak, run, stat

# The record header of a store, which stands before each stored extent: docs/format.md.
RECORD_HEADER = 56

# MiB a second that a client writes in "curve"; None: as fast as it can.
OFFERED = (50, 100, 200, 400, None)

NBDKIT = ["nbdkit", "--foreground", "--unix", "{socket}", "file", "{file}"]
QEMU = ["qemu-nbd", "--persistent", "--shared=16", "--socket={socket}"]


class Running:
    """A server that runs, as a context. It is in a session of its own, so that a
    Ctrl-C on the terminal is for us alone, who stop it in good order."""

    def __init__(self, argv, path, log, limit=None):
        self.argv, self.socket, self.log = argv, path, log
        self.uri = "nbd+unix:///?socket=" + path
        self.group = MemoryGroup(limit) if limit else None
        self.process = None

    def __enter__(self):
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        try:
            began = time.monotonic()
            with open(self.log, "wb") as log:
                self.process = subprocess.Popen(
                    self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    preexec_fn=self.group.enter if self.group else None,
                )
            while not self.greets():
                if self.process.poll() is not None or time.monotonic() - began > 120:
                    raise Failed(f"{' '.join(self.argv)}: does not serve\n{self.said()}")
                time.sleep(0.0005)
            self.start_seconds = time.monotonic() - began
            return self
        except BaseException:
            self.end()
            raise

    def greets(self):
        """Whether a client gets the first bytes of the protocol."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(60)
            try:
                s.connect(self.socket)
                return s.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
            except OSError:
                return False

    def __exit__(self, *_):
        self.end()

    def end(self):
        """Stops it, by force if nothing else helps."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=300)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.group:
            self.group.close()

    def stop(self):
        """Stops it in good order: the seconds until it has ended."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=300)
        # nbdkit and qemu-nbd end by themselves, or by the signal.
        if status not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise Failed(f"{self.argv[0]}: status {status} at SIGTERM\n{self.said()}")
        return time.monotonic() - began

    def said(self):
        with open(self.log, encoding="utf-8", errors="replace") as f:
            return f.read()[-2000:]

    def alive(self):
        return self.process.poll() is None

    def cpu(self):
        return stat(self.process.pid)[1]

    def peak(self):
        return peak(self.process.pid)


class Meter:
    """Seconds, and processor seconds of a server and of the kernel's threads."""

    def __init__(self, running):
        self.running = running

    def __enter__(self):
        self.kernel, self.server, self.began = kernel_cpu(), self.running.cpu(), time.monotonic()
        return self

    def __exit__(self, *_):
        self.seconds = time.monotonic() - self.began
        self.server, self.kernel = self.running.cpu() - self.server, kernel_since(self.kernel)


class Server:
    """A server, and the file that it serves."""

    suffix = ".raw"
    idles = False  # goes on working when nobody asks for anything
    groups = None  # of workloads that it is measured with; None: all
    keeps = True  # has the data when it is started again

    def __init__(self, name, argv, program):
        self.name, self.words, self.program = name, argv, program
        self.directory = self.file = None

    def make(self, directory, size):
        """Makes the storage, empty, for a device of size bytes."""
        self.directory, self.size = directory, size
        self.file = os.path.join(self.place(), "disk" + self.suffix)
        self.make_file()

    def place(self):
        return self.directory

    def make_file(self):
        with open(self.file, "wb") as f:
            f.truncate(self.size)

    def argv(self, limit, _writes):
        places = {"file": self.file, "socket": os.path.join(self.directory, "socket"), "size": self.size}
        return [w.format(**places) for w in self.words] + self.more(limit)

    def more(self, _limit):
        """What follows on the command line, when memory is limited or not."""
        return []

    def start(self, limit=None, writes=False):
        """The server, to be entered; limit is of its memory and page cache, in bytes;
        writes says whether anything is to be written."""
        return Running(self.argv(limit, writes), os.path.join(self.directory, "socket"), os.path.join(self.directory, "log"), limit)

    def stored(self):
        """What the data take: live is what is needed, garbage what is dead and not
        yet given back, host all that the machine has less for it. In bytes."""
        os.sync()
        n = allocated(self.file)
        return {"live": n, "garbage": 0, "host": n}

    def mallocs(self):
        """Objects that the server has allocated, of those that tell."""
        return None

    def remove(self):
        """Removes the storage, if it is there."""
        if self.file and os.path.exists(self.file):
            os.unlink(self.file)
        self.file = None


class Cnbd(Server):
    """Ours. Metrics are served for the count of allocations; nobody reads them
    while something is timed."""

    suffix = ".cnbd"
    idles = True

    def __init__(self, name, program, *codec):
        argv = [program, "serve", "--size", "{size}", "--listen", "unix:{socket}", "--metrics", "unix:{socket}.metrics", *codec, "{file}"]
        super().__init__(name, argv, program)

    def make_file(self):
        pass  # it does so itself

    def more(self, limit):
        if not limit:
            return []
        # So that the limits of its own and the documented overhead are the limit
        # together: payloads 64 MiB, the map 8, the overhead 64 and two workers.
        cache = max(16 * MIB, limit - (64 + 8 + 64 + 24) * MIB)
        return ["--cache", str(cache), "--map-cache", "8MiB", "--workers", "2"]

    def info(self):
        return json.loads(run(self.program, "info", "--json", self.file))

    def stored(self):
        s = self.info()["store"]
        return {
            "live": s["stored_bytes"] + s["map_bytes"] + RECORD_HEADER * s["extents"],
            "garbage": s["garbage_bytes"],
            "host": s["host_bytes"],
            "recompressed": s["recompressed_bytes"],
        }

    def mallocs(self):
        c = http.client.HTTPConnection("localhost", timeout=60)
        with socket.socket(socket.AF_UNIX) as c.sock:
            c.sock.connect(os.path.join(self.directory, "socket.metrics"))
            c.request("GET", "/metrics")
            text = c.getresponse().read().decode()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("go_memstats_mallocs_total "))

    def remove(self):
        super().remove()
        for name in ("socket.metrics", "disk.cnbd.control"):
            if self.directory and os.path.exists(os.path.join(self.directory, name)):
                os.unlink(os.path.join(self.directory, name))


class LargeCache(Cnbd):
    """Ours with a cache that has room for all of the device, as the host's page cache
    has, which is that of the others. It is there for what hangs on that."""

    groups = ("sequential", "read")

    def more(self, _limit):
        return ["--cache", str(self.size * 5 // 4)]


class Qcow2(Server):
    """qemu-nbd that compresses what it writes into a qcow2 image. With the filter
    that does it requests must be of whole clusters, 64 KiB, and a compressed one that is
    there cannot be written again, so it is there for writing alone."""

    suffix = ".qcow2"

    def make_file(self):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", self.file, str(self.size))

    def argv(self, limit, writes):
        if writes:
            return super().argv(limit, writes)
        return [*super().argv(limit, writes)[: len(QEMU)], "--format=qcow2", self.file]


class Btrfs(Server):
    """nbdkit on a raw file on Btrfs that compresses, on a loop device. The file
    below is wholly written before and read and written directly, so that Btrfs pays
    for no second filesystem and no second cache; metadata are stored once."""

    def __init__(self, name, argv, program, compress):
        super().__init__(name, argv, program)
        self.compress, self.loop = compress, None

    def place(self):
        return os.path.join(self.directory, "btrfs")

    def make_file(self):
        below, mount = os.path.join(self.directory, "below"), self.place()
        want = self.size * 17 // 10 + 512 * MIB
        if not os.path.exists(below) or os.path.getsize(below) < want:
            with open(below, "wb") as f:
                for _ in range(-(-want // MIB)):
                    f.write(bytes(MIB))
                os.fsync(f.fileno())
        os.makedirs(mount, exist_ok=True)
        self.loop = run("losetup", "--find", "--show", "--direct-io=on", below).strip()
        self.uuid = str(uuid.uuid4())
        run("mkfs.btrfs", "-q", "-f", "-K", "-m", "single", "-U", self.uuid, self.loop)
        run("mount", "-t", "btrfs", "-o", f"compress-force={self.compress},nodiscard,noatime", self.loop, mount)
        super().make_file()

    def stored(self):
        run("btrfs", "filesystem", "sync", self.place())
        total = 0
        for kind in ("data", "metadata", "system"):
            with open(f"/sys/fs/btrfs/{self.uuid}/allocation/{kind}/disk_used", encoding="ascii") as f:
                total += int(f.read())
        # What overwriting has left of older extents is in it, and in no other count.
        return {"live": total, "garbage": 0, "host": total}

    def remove(self):
        if not self.directory:
            return
        if os.path.ismount(self.place()):
            run("umount", self.place())
        if self.loop:
            run("losetup", "--detach", self.loop)
            self.loop = None
        self.file = None


class Memory(Server):
    """nbdkit on memory: what two ways through a socket take."""

    def make_file(self):
        self.file = None


class Loop(Memory):
    """bench/loop, the least that a server in Go can be, on memory: a limit."""

    keeps = False

    def stored(self):
        return {}


BASE, AGAIN = "nbdkit raw", "nbdkit raw, again"
AUTO, LARGE, FASTEST = "cnbd auto", "cnbd auto, large cache", "cnbd zstd:fastest"
ZSTD1, ZSTD3 = "Btrfs zstd:1", "Btrfs zstd:3"
LOOP = "bare loop in memory"


def all_servers(cnbd, loop):
    """Every server to compare, by the names that tables have; the programs of ours."""
    return [
        Cnbd(AUTO, cnbd, "--codec", "auto"),
        LargeCache(LARGE, cnbd, "--codec", "auto"),
        Cnbd(FASTEST, cnbd, "--codec", "zstd", "--level", "1"),
        Cnbd("cnbd s2", cnbd, "--codec", "s2"),
        Cnbd("cnbd none", cnbd, "--codec", "none"),
        Server(BASE, NBDKIT, "nbdkit"),
        Server(AGAIN, NBDKIT, "nbdkit"),
        Server("qemu-nbd raw", [*QEMU, "--format=raw", "{file}"], "qemu-nbd"),
        Qcow2("qemu-nbd qcow2 compress", [*QEMU, "--image-opts", "driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename={file}"], "qemu-nbd"),
        Btrfs(ZSTD1, NBDKIT, "nbdkit", "zstd:1"),
        Btrfs(ZSTD3, NBDKIT, "nbdkit", "zstd:3"),
        Btrfs("Btrfs lzo", NBDKIT, "nbdkit", "lzo"),
        Loop(LOOP, [loop, "-size", "{size}", "{socket}"], loop),
    ]


def memory_server():
    return Memory("nbdkit memory", ["nbdkit", "--foreground", "--unix", "{socket}", "memory", "{size}"], "nbdkit")
