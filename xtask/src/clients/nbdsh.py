"""Every command of the protocol through libnbd, each answer compared with the image read directly.

Usage: nbdsh.py SERVER URI IMAGE. The image is 96 MiB of zeroes at the start, and the server may know only
this one export. Prints for each check `pass NAME SECONDS` or `fail NAME SECONDS WHY`.
"""

import errno
import os
import random
import sys
import time
import traceback

import nbd

SERVER, URI, IMAGE = sys.argv[1:4]
IS_OURS = SERVER == "tapdisk"
MIB = 1 << 20
SIZE = os.stat(IMAGE).st_size
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def connect(structured=True, strict=False, uri=URI):
    handle = nbd.NBD()
    # Requests that the server must refuse have to reach it.
    handle.set_strict_mode(nbd.STRICT_MASK if strict else 0)
    handle.set_request_structured_replies(structured)
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_uri(uri)
    return handle


def local(at, count):
    """What the image holds, read without the server."""
    with open(IMAGE, "rb", buffering=0) as image:
        return os.pread(image.fileno(), count, at)


areas = iter(range(0, SIZE, 4 * MIB))


def area():
    """4 MiB that no other check uses."""
    return next(areas)


def noise(count, seed):
    return random.Random(seed).randbytes(count)


def equal(found, wanted, what):
    if found != wanted:
        if isinstance(found, (bytes, bytearray)) and len(found) == len(wanted):
            place = next(i for i in range(len(found)) if found[i] != wanted[i])
            raise AssertionError(f"{what}: byte {place} is {found[place]:#x}, not {wanted[place]:#x}")
        raise AssertionError(f"{what}: {found!r}, not {wanted!r}")


def refused(wanted, what, call, *arguments):
    """The call must fail with exactly this error."""
    try:
        call(*arguments)
    except nbd.Error as error:
        found = errno.errorcode.get(error.errnum, error.errnum)
        if found != wanted:
            raise AssertionError(f"{what}: {found}, not {wanted}") from error
        return
    raise AssertionError(f"{what}: succeeded, and should have failed with {wanted}")


def same(handle, at, wanted, what):
    """The server and the image itself agree with what is wanted."""
    equal(handle.pread(len(wanted), at), wanted, f"{what}, through the server")
    equal(local(at, len(wanted)), wanted, f"{what}, in the image")


@check
def size_and_capabilities():
    handle = connect()
    equal(handle.get_size(), SIZE, "size")
    equal(handle.is_read_only(), False, "read-only")
    equal(handle.can_flush(), True, "flush")
    equal(handle.can_fua(), True, "FUA")
    equal(handle.can_trim(), True, "trim")
    equal(handle.can_zero(), True, "zero")
    equal(handle.can_multi_conn(), True, "multi-conn")
    equal(handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION), True, "base:allocation")
    equal(handle.get_structured_replies_negotiated(), True, "structured replies")
    equal(handle.get_protocol(), "newstyle-fixed", "protocol")
    if IS_OURS:
        equal(handle.can_cache(), True, "cache")
        equal(handle.can_df(), True, "DF")
        equal(handle.can_fast_zero(), True, "fast zero")
        equal(handle.get_block_size(nbd.SIZE_MINIMUM), 1, "minimum block size")
        equal(handle.get_block_size(nbd.SIZE_PREFERRED), 4096, "preferred block size")
        equal(handle.get_block_size(nbd.SIZE_MAXIMUM), 32 * MIB, "maximum block size")


@check
def exports_and_contexts_are_listed():
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(URI)
    names = []
    handle.opt_list(lambda name, description: names.append(name) or 0)
    equal(names, [""], "exports")
    contexts = []
    handle.opt_list_meta_context(lambda name: contexts.append(name) or 0)
    equal("base:allocation" in contexts, True, f"base:allocation in {contexts}")
    handle.opt_info()
    equal(handle.get_size(), SIZE, "size by NBD_OPT_INFO")
    handle.opt_go()
    equal(handle.pread(1, SIZE - 1), local(SIZE - 1, 1), "the last byte")


@check
def an_unknown_export_is_refused_and_the_client_may_go_on():
    if SERVER == "nbdkit":
        return  # It serves whatever name is asked for.
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(URI)
    handle.set_export_name("no such disk")
    refused("ENOENT", "NBD_OPT_INFO of another name", handle.opt_info)
    handle.set_export_name("")
    handle.opt_go()
    equal(handle.get_size(), SIZE, "size")


@check
def a_client_may_abort_the_negotiation():
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(URI)
    handle.opt_abort()
    equal(connect().get_size(), SIZE, "size for the next client")


@check
def an_old_client_is_served_by_export_name():
    for flags in (0, nbd.HANDSHAKE_FLAG_NO_ZEROES, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE):
        handle = nbd.NBD()
        handle.set_handshake_flags(flags)
        handle.connect_uri(URI)
        equal(handle.get_size(), SIZE, f"size with handshake flags {flags}")
        equal(handle.pread(512, 0), local(0, 512), f"read with handshake flags {flags}")


@check
def what_is_written_is_read_and_is_in_the_image():
    at = area()
    handle = connect()
    for number, count in enumerate((1, 2, 511, 512, 513, 4095, 4096, 4097, 65536, 100_001, MIB, 2 * MIB)):
        data = noise(count, number)
        handle.pwrite(data, at)
        same(handle, at, data, f"{count} bytes")


@check
def the_largest_request_is_served():
    at = 32 * MIB
    handle = connect()
    handle.pwrite(noise(32 * MIB, 32), at)
    equal(handle.pread(32 * MIB, at), noise(32 * MIB, 32), "32 MiB")
    equal(local(at, 32 * MIB), noise(32 * MIB, 32), "32 MiB in the image")
    handle.zero(32 * MIB, at)
    same(handle, at, bytes(32 * MIB), "32 MiB of zeroes")


@check
def a_larger_request_harms_nobody_else():
    bystander = connect()
    handle = connect()
    try:
        handle.pwrite(bytes(65 * MIB), 0)
        raise AssertionError("65 MiB in one request were taken")
    except nbd.Error:
        pass  # An error or the end of this connection: the protocol allows either.
    equal(bystander.pread(1, 0), local(0, 1), "another client's read")


@check
def unaligned_writes_change_only_their_own_bytes():
    at = area()
    handle = connect()
    numbers = random.Random(1)
    model = bytearray(noise(256 << 10, 99))
    handle.pwrite(bytes(model), at)
    for turn in range(300):
        start = numbers.randrange(len(model))
        count = min(numbers.choice((1, 3, 511, 513, 1000, 4097, 9999)), len(model) - start)
        data = noise(count, turn)
        handle.pwrite(data, at + start, nbd.CMD_FLAG_FUA if turn % 5 == 0 else 0)
        model[start : start + count] = data
        start = numbers.randrange(len(model))
        count = min(numbers.choice((1, 3, 511, 513, 1000, 4097, 9999)), len(model) - start)
        equal(handle.pread(count, at + start), bytes(model[start : start + count]), f"read in turn {turn}")
    same(handle, at, bytes(model), "after all")


@check
def unaligned_writes_side_by_side_in_flight_keep_each_other_whole():
    at = area()
    handle = connect()
    count = 333
    model = b"".join(noise(count, turn) for turn in range(600))
    for turn in random.Random(2).sample(range(600), 600):
        while handle.aio_in_flight() >= 32:
            handle.poll(-1)
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(noise(count, turn))), at + turn * count,
                          completion=completed)
    drain(handle)
    same(handle, at, model, "all pieces")


def completed(error):
    """A completion that retires its request, or raises where drain() sees it."""
    value = error.value if hasattr(error, "value") else error
    if value:
        failures.append(value)
    return 1


failures = []


def drain(handle):
    while handle.aio_in_flight():
        handle.poll(-1)
    equal(failures, [], "errors of requests in flight")


@check
def writes_with_fua_and_flush_succeed():
    at = area()
    handle = connect()
    handle.pwrite(noise(4096, 5), at, nbd.CMD_FLAG_FUA)
    handle.pwrite(noise(777, 6), at + 5000, nbd.CMD_FLAG_FUA)
    handle.flush()
    same(handle, at, noise(4096, 5), "4096 bytes with FUA")
    same(handle, at + 5000, noise(777, 6), "777 bytes with FUA")


@check
def trim_keeps_its_neighbours():
    at = area()
    handle = connect()
    data = noise(MIB, 7)
    for start, count in ((0, MIB), (4096, 65536), (1, 100_000), (511, 1), (4095, 8194)):
        for flags in (0, nbd.CMD_FLAG_FUA):
            handle.pwrite(data, at)
            handle.trim(count, at + start, flags)
            found = handle.pread(MIB, at)
            equal(local(at, MIB), found, "the image, as the server reads it")
            equal(found[:start], data[:start], "before the trim")
            equal(found[start + count :], data[start + count :], "behind the trim")
            for place in range(start, start + count):
                if found[place] not in (0, data[place]):
                    raise AssertionError(f"byte {place} is neither old nor zero after a trim")


@check
def zeroes_are_zeroes_and_nothing_else_changes():
    at = area()
    handle = connect()
    data = noise(MIB, 8)
    flag_sets = (0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    for start, count in ((0, MIB), (4096, 65536), (1, 100_000), (511, 1), (4095, 8194), (0, 512)):
        for flags in flag_sets:
            handle.pwrite(data, at)
            handle.zero(count, at + start, flags)
            wanted = data[:start] + bytes(count) + data[start + count :]
            same(handle, at, wanted, f"zero {count} bytes at {start} with flags {flags}")


@check
def zero_with_no_hole_keeps_the_space():
    at = area()
    handle = connect()
    handle.pwrite(noise(2 * MIB, 9), at)
    handle.flush()
    before = os.stat(IMAGE).st_blocks
    handle.zero(2 * MIB, at, nbd.CMD_FLAG_NO_HOLE)
    handle.flush()
    after = os.stat(IMAGE).st_blocks
    # A file system may spend a few blocks on its own tables, never return a mebibyte.
    equal(after >= before - 64, True, f"{before} sectors before, {after} after")
    same(handle, at, bytes(2 * MIB), "zeroes")


@check
def trim_gives_space_back():
    at = area()
    handle = connect()
    handle.pwrite(noise(2 * MIB, 10), at)
    handle.flush()
    before = os.stat(IMAGE).st_blocks
    handle.trim(2 * MIB, at)
    handle.flush()
    after = os.stat(IMAGE).st_blocks
    equal(after <= before - 2 * MIB // 512 + 64, True, f"{before} sectors before, {after} after")


@check
def a_fast_zero_is_fast_or_refused_and_then_changes_nothing():
    at = area()
    handle = connect()
    if not handle.can_fast_zero():
        equal(IS_OURS, False, "no fast zero offered")
        return
    for more in (0, nbd.CMD_FLAG_NO_HOLE):
        data = noise(MIB, 11)
        handle.pwrite(data, at)
        try:
            handle.zero(65536, at + 4096, nbd.CMD_FLAG_FAST_ZERO | more)
            wanted = data[:4096] + bytes(65536) + data[4096 + 65536 :]
        except nbd.Error as error:
            equal(errno.errorcode[error.errnum], "ENOTSUP", "the refusal of a fast zero")
            wanted = data
        same(handle, at, wanted, "after a fast zero")


@check
def cache_succeeds_and_changes_nothing():
    at = area()
    handle = connect()
    if not handle.can_cache():
        return
    handle.pwrite(noise(10_000, 12), at)
    handle.cache(8192, at)
    handle.cache(777, at + 333)
    same(handle, at, noise(10_000, 12), "after cache")


def extents(handle, count, at, flags=0):
    """[(length, state)] of base:allocation."""
    found = []

    def extent(context, offset, entries, error):
        equal(context, "base:allocation", "context")
        equal(offset, at, "offset")
        found.extend(zip(entries[::2], entries[1::2]))

    handle.block_status(count, at, extent, flags)
    return found


def local_extents(at, count):
    """The same from SEEK_DATA and SEEK_HOLE."""
    found = []
    with open(IMAGE, "rb", buffering=0) as image:
        place, end = at, at + count
        while place < end:
            try:
                data = min(os.lseek(image.fileno(), place, os.SEEK_DATA), end)
            except OSError as error:
                equal(error.errno, errno.ENXIO, "SEEK_DATA")
                data = end
            if data > place:
                found.append((data - place, nbd.STATE_HOLE | nbd.STATE_ZERO))
            if data < end:
                hole = min(os.lseek(image.fileno(), data, os.SEEK_HOLE), end)
                found.append((hole - data, 0))
                data = hole
            place = data
    return found


def clipped(found, count):
    """Merged, and cut where the question ended: the last extent may reach further."""
    result = []
    for length, state in found:
        length = min(length, count)
        count -= length
        if length and result and result[-1][1] == state:
            result[-1] = (result[-1][0] + length, state)
        elif length:
            result.append((length, state))
    return result


@check
def block_status_is_the_map_of_the_image():
    at = area()
    handle = connect()
    for start, count in ((MIB, 65536), (2 * MIB, 4096), (3 * MIB + 8192, 100_000)):
        handle.pwrite(noise(count, start), at + start)
    handle.flush()
    for start, count in ((0, 4 * MIB), (MIB - 1, 3), (MIB + 100, MIB), (3 * MIB + 8191, 50_000)):
        wanted = local_extents(at + start, count)
        found, place = [], start
        while place < start + count:
            some = extents(handle, start + count - place, at + place)
            equal(bool(some) and all(length > 0 for length, _ in some), True, "extents that lead on")
            found += some
            place += sum(length for length, _ in some)
        equal(clipped(found, count), wanted, f"{count} bytes at {start}")


@check
def block_status_gives_one_extent_where_one_is_asked_for():
    at = area()
    handle = connect()
    handle.pwrite(noise(65536, 13), at + MIB)
    handle.flush()
    found = extents(handle, 4 * MIB, at, nbd.CMD_FLAG_REQ_ONE)
    equal(found, [(MIB, nbd.STATE_HOLE | nbd.STATE_ZERO)], "the first extent")
    # With this flag the answer must not reach further than the question.
    equal(extents(handle, 1000, at + 5, nbd.CMD_FLAG_REQ_ONE)[0][0], 1000, "a part of an extent")


@check
def structured_reads_cover_each_byte_once():
    at = area()
    handle = connect()
    model = bytearray(2 * MIB)
    for start, count in ((4096, 65536), (MIB, 4096), (MIB + 40960, 333)):
        model[start : start + count] = noise(count, start)
        handle.pwrite(noise(count, start), at + start)
    handle.flush()
    for start, count in ((0, 2 * MIB), (1, MIB), (MIB - 1, 2), (MIB + 40960, 333)):
        for flags in (0, nbd.CMD_FLAG_DF) if handle.can_df() else (0,):
            seen = bytearray(count)
            chunks = []

            def chunk(data, offset, status, error):
                relative = offset - at - start
                for place in range(relative, relative + len(data)):
                    seen[place] += 1
                chunks.append(status)
                equal(status in (nbd.READ_DATA, nbd.READ_HOLE), True, f"chunk of kind {status}")
                if status == nbd.READ_HOLE:
                    equal(bytes(data), bytes(len(data)), "a hole")

            found = handle.pread_structured(count, at + start, chunk, flags)
            equal(found, bytes(model[start : start + count]), f"{count} bytes at {start}")
            equal(set(seen), {1}, "how often each byte came")
            if flags:
                equal(len(chunks), 1, "chunks of a read that must not be split")


@check
def simple_replies_serve_those_who_ask_for_no_others():
    at = area()
    handle = connect(structured=False)
    equal(handle.get_structured_replies_negotiated(), False, "structured replies")
    handle.pwrite(noise(70_000, 14), at + 13)
    same(handle, at + 13, noise(70_000, 14), "70000 bytes")
    refused("EINVAL", "a read past the end", handle.pread, 2, SIZE - 1)
    same(handle, at + 13, noise(70_000, 14), "after an error")


@check
def requests_past_the_end_are_refused_and_do_nothing():
    handle = connect()
    # The protocol says ENOSPC for what would have written; QEMU sees to the bounds before that.
    no_room = "EINVAL" if SERVER == "qemu-nbd" else "ENOSPC"
    last = local(SIZE - 512, 512)
    places = ((SIZE - 1, 2), (SIZE - 512, 1024), (SIZE, 1), (SIZE + 4096, 4096), ((1 << 63) - 4096, 4096))
    wrapping = ((1 << 63), 4096), ((1 << 64) - 4096, 8192), ((1 << 64) - 1, 1)
    # libnbd takes offsets as unsigned 64-bit numbers, so a wrap-around can be asked for.
    for at, count in places + wrapping:
        what = f"{count} bytes at {at:#x}"
        refused("EINVAL", f"read {what}", handle.pread, count, at)
        refused(no_room, f"write {what}", handle.pwrite, bytes(count), at)
        refused("EINVAL", f"trim {what}", handle.trim, count, at)
        refused(no_room, f"zero {what}", handle.zero, count, at)
        refused("EINVAL", f"status {what}", extents, handle, count, at)
        if handle.can_cache():
            refused("EINVAL", f"cache {what}", handle.cache, count, at)
    equal(os.stat(IMAGE).st_size, SIZE, "the image's size")
    same(handle, SIZE - 512, last, "the last sector")


@check
def the_last_bytes_can_be_written():
    handle = connect()
    for count in (1, 511, 4097):
        handle.pwrite(noise(count, count), SIZE - count)
        same(handle, SIZE - count, noise(count, count), f"the last {count} bytes")
    handle.zero(5000, SIZE - 5000)
    same(handle, SIZE - 5000, bytes(5000), "the last 5000 bytes, zeroed")
    equal(os.stat(IMAGE).st_size, SIZE, "the image's size")


@check
def several_connections_see_one_disk():
    at = area()
    handles = [connect() for _ in range(5)]
    for turn in range(50):
        writer, reader = handles[turn % 5], handles[(turn + 2) % 5]
        writer.pwrite(noise(1000, turn), at + turn * 1000)
        equal(reader.pread(1000, at + turn * 1000), noise(1000, turn), f"turn {turn}")
    handles[0].flush()
    equal(local(at, 50_000), b"".join(noise(1000, turn) for turn in range(50)), "the image")


@check
def many_requests_in_flight_each_get_their_own_answer():
    at = area()
    handle = connect()
    model = noise(4 * MIB, 15)
    handle.pwrite(model, at)
    numbers = random.Random(3)
    reads = []
    for turn in range(500):
        while handle.aio_in_flight() >= 64:
            handle.poll(-1)
        count = numbers.choice((1, 512, 4096, 5000, 65536))
        start = numbers.randrange(len(model) - count)
        buffer = nbd.Buffer(count)
        handle.aio_pread(buffer, at + start, completion=completed)
        reads.append((start, count, buffer))
    drain(handle)
    for start, count, buffer in reads:
        equal(bytes(buffer.to_bytearray()), model[start : start + count], f"{count} bytes at {start}")


@check
def a_client_that_vanishes_harms_nobody_else():
    at = area()
    bystander = connect()
    for _ in range(10):
        handle = connect()
        for turn in range(32):
            handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(65536)), at + turn * 65536)
        # Closes the socket with all that in flight.
        del handle
        equal(bystander.pread(1, SIZE - 1), local(SIZE - 1, 1), "another client's read")
    bystander.flush()


@check
def a_hundred_clients_are_served():
    handles = [connect() for _ in range(100 if IS_OURS else 10)]
    for handle in handles:
        equal(handle.pread(512, 0), local(0, 512), "read")
    for handle in handles:
        handle.shutdown()


def main():
    failed = 0
    for function in CHECKS:
        start = time.monotonic()
        failures.clear()
        why = None
        try:
            function()
        except Exception as error:  # Whatever it is, it is this check's failure and not the end.
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            mine = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.name == function.__name__]
            why = f"{error} (line {mine[-1] if mine else line})".replace("\n", " ")
        seconds = time.monotonic() - start
        name = function.__name__.replace("_", " ")
        print(f"{'fail' if why else 'pass'}\t{name}\t{seconds:.3f}\t{why or ''}", flush=True)
        failed += why is not None
    sys.exit(1 if failed else 0)


main()
