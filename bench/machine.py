"""What the benchmarks do to the machine, and ask of it: programs, processor time,
the page cache, memory limits."""

import os
import platform
import shlex
import subprocess

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TICK = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A program, or a server, did not do what was asked of it."""


def run(*argv, timeout=3600, **options):
    """Runs a program that must succeed, and returns what it prints."""
    p = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False, timeout=timeout, **options)
    if p.returncode != 0:
        raise Failed(f"{shlex.join(argv)}: status {p.returncode}\n{p.stdout}{p.stderr}")
    return p.stdout


def stat(pid):
    """Parent, and seconds of all processors used, of a process."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / TICK


def kernel_cpu():
    """Seconds that each thread of the kernel has used: those of writeback, of loop
    devices, of Btrfs' compression. kthreadd, 2, is their parent."""
    threads = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent, seconds = stat(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == 2:
            threads[pid] = seconds
    return threads


def kernel_since(before):
    """Seconds that they have used since, but for those of threads that have ended."""
    return sum(seconds - before.get(pid, 0) for pid, seconds in kernel_cpu().items() if seconds >= before.get(pid, 0))


def peak(pid):
    """Most bytes that were resident of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmHWM:"))


def drop_caches():
    """Has everything that is read next come from the disk."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as f:
        f.write("3\n")


def warm(path):
    """Has a file in the page cache."""
    with open(path, "rb", buffering=0) as f:
        while f.read(MIB):
            pass


def allocated(path):
    """Bytes that a file takes of its filesystem."""
    return os.stat(path).st_blocks * 512


def write_text(path, text):
    with open(path, "w", encoding="ascii") as f:
        f.write(text)


class MemoryGroup:
    """A control group that limits the memory of a process and of the page cache
    that it fills: version 1, or the memory controller of version 2."""

    def __init__(self, limit):
        if os.path.exists("/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            with open("/proc/self/cgroup", encoding="ascii") as f:
                own = next(line.strip().split(":", 2)[2] for line in f if line.split(":")[1] == "memory")
            parent, name = "/sys/fs/cgroup/memory" + own, "memory.limit_in_bytes"
            self.peak_name = "memory.max_usage_in_bytes"
        else:
            parent, name = "/sys/fs/cgroup", "memory.max"
            self.peak_name = "memory.peak"
        self.path = os.path.join(parent, f"cnbd-bench-{os.getpid()}")
        try:
            os.mkdir(self.path)
            write_text(os.path.join(self.path, name), str(limit))
        except OSError as e:
            self.close()
            raise Failed(f"memory control group: {e}") from e

    def enter(self):
        """Puts the calling process into the group."""
        write_text(os.path.join(self.path, "cgroup.procs"), str(os.getpid()))

    def peak(self):
        """Most bytes that the group had, with its page cache."""
        with open(os.path.join(self.path, self.peak_name), encoding="ascii") as f:
            return int(f.read())

    def close(self):
        """Removes the group, whose processes have ended."""
        if os.path.isdir(self.path):
            force = os.path.join(self.path, "memory.force_empty")
            if os.path.exists(force):
                try:
                    write_text(force, "0")
                except OSError:
                    pass  # what is left goes to the parent
            os.rmdir(self.path)


def description():
    """What is to be known of the machine beside figures."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
        processor = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), platform.machine())
    with open("/proc/meminfo", encoding="ascii") as f:
        memory = next(int(line.split()[1]) << 10 for line in f if line.startswith("MemTotal:"))
    return {
        "processor": processor,
        "processors": len(os.sched_getaffinity(0)),
        "memory": memory,
        "kernel": platform.release(),
    }


def filesystem(path):
    """The type of the filesystem that path is on."""
    return run("df", "--output=fstype", path).split()[-1]


def busy():
    """Seconds that all processors were busy, and those that the hypervisor took."""
    with open("/proc/stat", encoding="ascii") as f:
        t = [int(x) / TICK for x in f.readline().split()[1:9]]
    return sum(t) - t[3] - t[4] - t[7], t[7]
