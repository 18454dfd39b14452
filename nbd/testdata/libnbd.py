# A client in libnbd's shell, of what the programs of libnbd do not do: chunks, block
# status, and requests that libnbd would refuse to send if it was not told otherwise.
# uri is that of an export of zeroes of at least 8 MiB.
import errno
import nbd

K, M = 1 << 10, 1 << 20

# Options, one by one.
h = nbd.NBD()
h.set_opt_mode(True)
h.add_meta_context("base:allocation")
h.connect_uri(uri)
assert h.get_structured_replies_negotiated()
names = []
h.opt_list(lambda name, description: names.append(name))
assert "" in names, names
contexts = []
for queries in [[], ["base:"], ["base:allocation", "x-no:thing"], ["x-no:thing"]]:
    h.clear_meta_contexts()
    for q in queries:
        h.add_meta_context(q)
    found = []
    h.opt_list_meta_context(lambda name: found.append(name))
    contexts.append(found)
assert contexts == [["base:allocation"]] * 3 + [[]], contexts
h.clear_meta_contexts()
h.add_meta_context("base:allocation")
h.opt_info()
size = h.get_size()
assert h.can_df() and h.can_cache() and h.can_zero() and h.can_fast_zero() and h.can_multi_conn() and not h.is_read_only()
assert [h.get_block_size(i) for i in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)] == [1, 4 * K, 32 * M]
h.opt_go()
assert h.can_meta_context("base:allocation")

# Chunks: data where it was written, holes beside it.
h.pwrite(b"d" * (64 * K), 128 * K)


def chunks(count, offset, flags=0):
    got = []

    def chunk(buf, at, status, error):
        assert error.value == 0
        got.append((at, len(buf), status))

    data = h.pread_structured(count, offset, chunk, flags)
    return bytes(data), sorted(got)


data, got = chunks(256 * K, 64 * K)
assert data == bytes(64 * K) + b"d" * (64 * K) + bytes(128 * K)
assert got == [
    (64 * K, 64 * K, nbd.READ_HOLE),
    (128 * K, 64 * K, nbd.READ_DATA),
    (192 * K, 128 * K, nbd.READ_HOLE),
], got
data, got = chunks(256 * K, 64 * K, nbd.CMD_FLAG_DF)
assert got == [(64 * K, 256 * K, nbd.READ_DATA)], got
assert data == bytes(64 * K) + b"d" * (64 * K) + bytes(128 * K)


# Block status.
def status(count, offset, flags=0):
    got = []

    def extent(context, at, entries, error):
        assert context == "base:allocation" and at == offset
        got.extend(entries)

    h.block_status(count, offset, extent, flags)
    return got


HOLE = nbd.STATE_HOLE | nbd.STATE_ZERO
assert status(size, 0) == [128 * K, HOLE, 64 * K, 0, size - 192 * K, HOLE]
assert status(100 * K, 150 * K) == [42 * K, 0, 58 * K, HOLE]
assert status(100 * K, 150 * K, nbd.CMD_FLAG_REQ_ONE) == [42 * K, 0]
assert status(10, 128 * K - 5, nbd.CMD_FLAG_REQ_ONE) == [5, HOLE]
h.zero(32 * K, 144 * K, nbd.CMD_FLAG_FAST_ZERO)
assert status(size, 0) == [128 * K, HOLE, 16 * K, 0, 32 * K, HOLE, 16 * K, 0, size - 192 * K, HOLE]
h.trim(64 * K, 128 * K, nbd.CMD_FLAG_FUA)
assert status(size, 0) == [size, HOLE]
h.cache(size, 0)

# Requests that are wrong, and their error numbers; the connection stays in sync.
h.set_strict_mode(0)


def refused(want, f, *args):
    try:
        f(*args)
    except nbd.Error as e:
        assert e.errnum == want, (f, args, e)
    else:
        assert False, (f, args)


refused(errno.EINVAL, h.pread, 512, size)
refused(errno.EINVAL, h.pread, 2, size - 1)
refused(errno.ENOSPC, h.pwrite, b"12", size - 1)
refused(errno.ENOSPC, h.zero, 2, size - 1)
refused(errno.EINVAL, h.trim, 2, size - 1)
refused(errno.EINVAL, h.cache, 2, size - 1)
refused(errno.EINVAL, h.pread, 512, 2**63)
refused(errno.EINVAL, status, 2, size - 1)
refused(errno.EINVAL, status, 0, 0)
refused(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_REQ_ONE)
refused(errno.EINVAL, h.pwrite, b"12", 0, nbd.CMD_FLAG_DF)
refused(errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_NO_HOLE)
h.zero(64 * K, 0, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(64 * K, 0) == bytes(64 * K)
h.flush()
h.shutdown()

# Without what is newer.
h = nbd.NBD()
h.set_request_structured_replies(False)
h.connect_uri(uri)
assert not h.get_structured_replies_negotiated() and not h.can_df()
assert h.pread(10, 128 * K) == bytes(10)
h.shutdown()
