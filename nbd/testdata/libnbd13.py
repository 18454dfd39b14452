# As libnbd.py, of what a libnbd with extended headers (1.18 and later) adds. uri is
# that of an export of zeroes, huge of one of 16 TiB that is a hole.
import errno
import nbd

K, M, T = 1 << 10, 1 << 20, 1 << 40

h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(uri)
assert h.get_extended_headers_negotiated() and h.get_structured_replies_negotiated()
assert h.can_block_status_payload() and h.can_df()
h.pwrite(b"d" * (64 * K), 128 * K, nbd.CMD_FLAG_FUA)
assert h.pread(256 * K, 64 * K) == bytes(64 * K) + b"d" * (64 * K) + bytes(128 * K)
chunks = []
data = h.pread_structured(256 * K, 64 * K, lambda buf, at, status, error: chunks.append((at, len(buf), status)))
assert data == bytes(64 * K) + b"d" * (64 * K) + bytes(128 * K)
assert chunks == [(64 * K, 64 * K, nbd.READ_HOLE), (128 * K, 64 * K, nbd.READ_DATA), (192 * K, 128 * K, nbd.READ_HOLE)], chunks
del chunks[:]
h.pread_structured(256 * K, 64 * K, lambda buf, at, status, error: chunks.append((at, len(buf), status)), nbd.CMD_FLAG_DF)
assert chunks == [(64 * K, 256 * K, nbd.READ_DATA)], chunks
size = h.get_size()
HOLE = nbd.STATE_HOLE | nbd.STATE_ZERO


def status(h, count, offset, flags=0, filter=None):
    got = []

    def extent(context, at, entries, error):
        assert context == "base:allocation" and at == offset
        got.extend(tuple(e) for e in entries)

    if filter is None:
        h.block_status_64(count, offset, extent, flags)
    else:
        h.block_status_filter(count, offset, filter, extent, flags)
    return got


assert status(h, size, 0) == [(128 * K, HOLE), (64 * K, 0), (size - 192 * K, HOLE)]
assert status(h, size, 0, nbd.CMD_FLAG_REQ_ONE) == [(128 * K, HOLE)]
assert status(h, 100 * K, 150 * K, 0, ["base:allocation"]) == [(42 * K, 0), (58 * K, HOLE)]

h.set_strict_mode(nbd.STRICT_AUTO_FLAG)
for want, f, *args in [
    (errno.EINVAL, h.pread, 2, size - 1),
    (errno.ENOSPC, h.pwrite, b"12", size - 1),
    (errno.ENOSPC, h.zero, 1 << 40, 0),
    (errno.EINVAL, h.trim, 1 << 40, 0),
    (errno.EINVAL, h.cache, 1 << 40, 0),
    (errno.EINVAL, status, h, 1 << 40, 0),
    (errno.EINVAL, h.pwrite, b"12", 0, nbd.CMD_FLAG_DF),
]:
    try:
        f(*args)
    except nbd.Error as e:
        assert e.errnum == want, (f, args, e)
    else:
        assert False, (f, args)
h.flush()
h.zero(64 * K, 128 * K)
assert status(h, size, 0) == [(size, HOLE)]
h.shutdown()

# Lengths of 64 bits.
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(huge)
assert h.get_size() == 16 * T
assert status(h, 16 * T, 0) == [(16 * T, HOLE)]
assert status(h, 5 * T, 7 * T + 1) == [(5 * T, HOLE)]
h.trim(16 * T - 4096, 4096)
h.shutdown()

# Only structured replies.
h = nbd.NBD()
h.set_request_extended_headers(False)
h.connect_uri(uri)
assert not h.get_extended_headers_negotiated() and h.get_structured_replies_negotiated()
h.shutdown()
