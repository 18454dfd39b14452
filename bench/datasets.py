"""The data of the benchmarks: real data of this machine, and noise.

Each set is a file that is copied to the device, wholly: what is a filesystem is
an ext4 image that is nearly full. Which files are in it is chosen by a hash of
their names, so a machine gives the same set every time, and a small one is a
sample of a large one.
"""

import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile

from machine import MIB, Failed, run

FULL = 0.88  # share of an image that is files and directories; ext4 needs the rest
BLOCK = 4096


def files(tops):
    """All regular files below tops on their filesystem: top, path, size."""
    for top in tops:
        if not os.path.isdir(top):
            continue
        device = os.stat(top).st_dev
        for directory, subdirectories, names in os.walk(top):
            subdirectories[:] = sorted(d for d in subdirectories if os.lstat(os.path.join(directory, d)).st_dev == device)
            for name in sorted(names):
                path = os.path.join(directory, name)
                try:
                    if not os.path.islink(path) and os.path.isfile(path) and os.access(path, os.R_OK):
                        yield top, path, os.path.getsize(path)
                except OSError:
                    pass


def image_of_tree(path, tree, size):
    inodes = sum(len(names) + 1 for _, _, names in os.walk(tree)) * 5 // 4 + 64
    run("mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=4", "-N", str(inodes), "-d", tree, path, f"{size >> 10}k")


def sample(path, tops, size, wanted=lambda name: True):
    """An image of size bytes with a sample of the files below tops."""
    found = []
    for top, file, length in files(tops):
        if length <= size // 8 and wanted(file):
            rank = hashlib.sha256(os.path.relpath(file, "/").encode(errors="surrogateescape")).digest()
            found.append((rank, file, length))
    found.sort()
    # Blocks of files and directories, and half a block more for inodes.
    tree, total, directories = path + ".tree", 5 * MIB, set()
    try:
        for _, file, length in found:
            to = tree + file
            rounded = -(-length // BLOCK) * BLOCK + BLOCK // 2
            if os.path.dirname(to) not in directories:
                directories.add(os.path.dirname(to))
                rounded += BLOCK * 3 // 2
            if total + rounded > size * FULL:
                if total > size * FULL * 0.97:
                    break
                continue
            try:
                os.makedirs(os.path.dirname(to), exist_ok=True)
                shutil.copyfile(file, to)
            except OSError:
                continue  # went away, or is not to be read
            total += rounded
        if total < size * FULL / 2:
            # Less than was wished for: a smaller image, not an empty one.
            size = max(16 * MIB, int(total / FULL) & ~(MIB - 1))
        image_of_tree(path, tree, size)
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def root(path, size):
    """A root filesystem: programs, libraries, what packages bring."""
    sample(path, ["/usr", "/etc", "/var/lib/dpkg"], size)


def source(path, size):
    """Source trees: that of Go, the modules that this machine has, C headers."""
    goroot, modules = run("go", "env", "GOROOT", "GOMODCACHE").split()
    text = (".go", ".s", ".c", ".h", ".hpp", ".cc", ".py", ".md", ".txt", ".proto", ".mod", ".sum", ".json", ".yaml", ".sh")
    sample(path, [os.path.join(goroot, "src"), modules, "/usr/include", "/usr/lib/python3"], size, lambda name: name.endswith(text))


def postgres(path, size):
    """The cluster of a PostgreSQL server after pgbench, without its log."""
    versions = "/usr/lib/postgresql"
    if not os.path.isdir(versions):
        raise Failed("no PostgreSQL below " + versions)
    programs = os.path.join(versions, max(os.listdir(versions), key=float), "bin")
    user = []
    place = tempfile.mkdtemp(prefix="cnbd-pg-", dir=os.path.dirname(path))
    socket = tempfile.mkdtemp(prefix="cnbd-pg-")  # the name of a socket must be short
    data = os.path.join(place, "data")
    server = None
    try:
        if os.geteuid() == 0:  # as whom it refuses to run
            user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            owner = pwd.getpwnam("postgres")
            for d in (place, socket):
                os.chown(d, owner.pw_uid, owner.pw_gid)

        def pg(program, *argv):
            return run(*user, os.path.join(programs, program), *argv, cwd="/")

        pg("initdb", "-D", data, "--no-sync", "-A", "trust", "-U", "bench")
        argv = [*user, os.path.join(programs, "postgres"), "-D", data, "-k", socket, "-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_wal_size=64MB"]
        # Alone in a session: Ctrl-C is for us, who stop it.
        server = subprocess.Popen(argv, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        ready = subprocess.run([*user, os.path.join(programs, "pg_isready"), "-h", socket, "-t", "0"], check=False, capture_output=True)
        for _ in range(300):
            if ready.returncode == 0 or server.poll() is not None:
                break
            try:
                server.wait(0.1)
            except subprocess.TimeoutExpired:
                pass
            ready = subprocess.run([*user, os.path.join(programs, "pg_isready"), "-h", socket], check=False, capture_output=True)
        # The catalogs of three databases take 24 MiB, and updates bloat.
        scale = max(1, int((size * FULL - 40 * MIB) / (18 * MIB)))
        connect = ["-h", socket, "-U", "bench", "postgres"]
        pg("pgbench", "-i", "-q", "-s", str(scale), *connect)
        pg("pgbench", "-n", "-c", "4", "-t", str(500 * scale), *connect)
        stop(server)
        shutil.rmtree(os.path.join(data, "pg_wal"))
        taken = sum(-(-length // BLOCK) * BLOCK for _, _, length in files([data]))
        image_of_tree(path, data, max(size, int(taken / FULL / MIB + 6) * MIB))
    finally:
        if server:
            stop(server)
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(socket, ignore_errors=True)


def stop(server):
    """Stops PostgreSQL in good order."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def noise(path, size):
    """What does not compress."""
    with open(path, "wb") as f:
        for _ in range(size // MIB):
            f.write(os.urandom(MIB))


MAKERS = {"root": root, "source": source, "postgres": postgres, "noise": noise}


class Dataset:
    """A file to be copied to a device, and which of its blocks are not zero. It is
    made in directory unless it is there from an earlier run."""

    def __init__(self, name, directory, size):
        self.name, self.path = name, os.path.join(directory, f"{name}-{size // MIB}")
        if not os.path.exists(self.path):
            making = self.path + ".new"
            try:
                MAKERS[name](making, size)
                os.rename(making, self.path)
            finally:
                if os.path.exists(making):
                    os.unlink(making)
        self.size = os.path.getsize(self.path)
        self.filled = []  # numbers of the blocks that are not zero
        zero = bytes(BLOCK)
        with open(self.path, "rb") as f:
            for n in range(self.size // BLOCK):
                if f.read(BLOCK) != zero:
                    self.filled.append(n)
        self.data = len(self.filled) * BLOCK  # what ratios are of
