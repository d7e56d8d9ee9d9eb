"""What ranks of a host exchange through memory: whole, in order, never overwritten while somebody reads it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
import torch
from torch import Tensor

from shoal.comm.group import Group, Like
from shoal.comm.rings import INLINE, SLOTS
from shoal.errors import PeerLost, StalledError
from tests.comm.shared import delayed, neighbours
from tests.pool import Pool

CPU = torch.device("cpu")
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool,
    torch.complex64, torch.complex128,
]  # fmt: skip


def world_of(carrier: object) -> Group:
    return Group("world", range(carrier.size), carrier)


def values(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randint(0, 100, (count,), generator=torch.Generator().manual_seed(seed))
    return drawn % 2 == 1 if dtype == torch.bool else drawn.to(dtype)


def every_dtype() -> None:
    with neighbours() as carrier:
        world, me = world_of(carrier), carrier.rank
        for dtype in DTYPES:
            for count in (1, 3, INLINE // dtype.itemsize, INLINE // dtype.itemsize + 1, 1000):
                box = torch.zeros(count, dtype=dtype)
                like = Like((count,), dtype, CPU)
                pending = world.swap("swap", [[[values(count, me, dtype)]] * 2] * 2, [[[box], like]] * 2)
                ((filled,), (view,)) = pending.wait()
                assert filled is box
                assert torch.equal(box, values(count, 1 - me, dtype))
                assert torch.equal(view, box)
                assert view.dtype == dtype
                pending.release()


def test_every_dtype_and_size(pool: Pool) -> None:
    pool.run(every_dtype)


def strips(lengths: tuple[int, ...]) -> None:
    with neighbours() as carrier:
        world, me = world_of(carrier), carrier.rank
        send = [[[values(n, 10 * me + r, torch.bfloat16) for n in lengths]] for r in range(3)]
        boxes = [[[torch.zeros(n, dtype=torch.bfloat16) for n in lengths]] for _ in range(3)]
        likes = [[Like(lengths, torch.bfloat16, CPU)] for _ in range(3)]
        for receive in (boxes, likes):
            came = world.swap("swap", send, receive).wait()
            for got, peer in zip(came, [r for r in range(3) if r != me], strict=True):
                assert [t.numel() for t in got] == list(lengths)
                assert all(
                    torch.equal(t, values(n, 10 * peer + me, torch.bfloat16)) for n, t in zip(lengths, got, strict=True)
                )


@pytest.mark.parametrize("lengths", [(3, 0, 5), (0, 0), (1000, 1, 0, 77), (2000,)])
def test_strips_side_by_side(lengths: tuple[int, ...], pool: Pool) -> None:
    pool.run(strips, lengths, world=3)


def prefixes() -> None:
    """Two parcels that begin at the same place are not the same parcel."""
    with neighbours() as carrier:
        world, me = world_of(carrier), carrier.rank
        mine = values(4000, me)
        send = [[[mine[: 1000 * (r + 1)]], [mine[:100], mine[100:700]], [mine[:100], mine[100:300]]] for r in range(3)]
        box = [
            [[torch.zeros(1000 * (me + 1))], [torch.zeros(100), torch.zeros(600)], [torch.zeros(100), torch.zeros(200)]]
        ] * 3
        boxes = [[[t.clone() for t in strip] for strip in one] for one in box]
        world.swap("swap", send, boxes).wait()
        for peer in {0, 1, 2} - {me}:
            for strip in boxes[peer]:
                whole = torch.cat(strip)
                assert torch.equal(whole, values(4000, peer)[: whole.numel()])


def test_parcels_that_begin_at_the_same_place(pool: Pool) -> None:
    pool.run(prefixes, world=3)


def kept_views() -> None:
    """They hold while the sender sends on, as long as they are not released."""
    with neighbours() as carrier:
        world, me = world_of(carrier), carrier.rank
        like, kept = Like((5000,), torch.float32, CPU), []
        for n in range(12):
            pending = world.swap("swap", [[[values(5000, 100 * me + n)]]] * 2, [[like]] * 2)
            ((view,),) = pending.wait()
            kept.append((n, pending, view))
            if n % 3 == 2:
                kept.pop(0)[1].release()
            for number, _, held in kept:
                assert torch.equal(held, values(5000, 100 * (1 - me) + number))
        assert len(carrier.arena.taken) < 12  # what was released was used again


def test_views_hold_until_they_are_released(pool: Pool) -> None:
    pool.run(kept_views)


def sent_as_it_lies() -> None:
    with neighbours() as carrier:
        world, me = world_of(carrier), carrier.rank
        whole = carrier.empty(3000, torch.float32, CPU).fill_(me)
        taken, half = len(carrier.arena.taken), whole[1000:2000]
        like = Like((1000,), torch.float32, CPU)
        pending = world.swap("swap", [[[half]]] * 2, [[like]] * 2)
        assert len(carrier.arena.taken) == taken  # no copy
        ((view,),) = pending.wait()
        assert view.tolist() == [1.0 - me] * 1000
        world.share("both", b"have it")
        assert not carrier.idle(whole)  # a part of it is read
        assert not carrier.idle(half)
        assert carrier.idle(whole[:1000])
        assert carrier.idle(torch.zeros(3))
        world.share("both", b"have asked")
        pending.release()
        world.share("both", b"let go")
        assert carrier.idle(whole)
        assert not carrier.readers


def test_memory_of_the_carrier_is_sent_as_it_lies_and_idle_when_it_was_let_go_of(pool: Pool) -> None:
    pool.run(sent_as_it_lies)


def overwritten_at_once() -> None:
    """What was sent into boxes may be overwritten when `wait` has returned, wherever it lies."""
    with neighbours() as carrier, delayed(3):
        world, me = world_of(carrier), carrier.rank
        mine = carrier.empty(5000, torch.float32, CPU)
        for n in range(40):
            box = torch.zeros(5000)
            mine.fill_(10 * n + me)
            world.swap("swap", [[[mine]]] * 2, [[[box]]] * 2).wait()
            mine.fill_(-1)
            assert box.tolist() == [10 * n + 1.0 - me] * 5000


def test_what_was_sent_may_be_overwritten_after_the_wait(pool: Pool) -> None:
    pool.run(overwritten_at_once)


def small_strips_of_something_large() -> None:
    with neighbours() as carrier:
        whole = torch.ones(100)
        world_of(carrier).gather("gather", whole, [0, 1, 2]).wait()
        whole.untyped_storage().resize_(0)


def test_what_was_sent_may_be_resized_after_the_wait(pool: Pool) -> None:
    pool.run(small_strips_of_something_large)


def crosswise() -> None:
    """Each rank waits first for what the other one waits for last."""
    with neighbours() as carrier:
        world, me = world_of(carrier), carrier.rank
        mine = [carrier.empty(5000, torch.float32, CPU).fill_(10 * n + me) for n in range(2)]
        boxes = [torch.zeros(5000) for _ in range(2)]
        under_way = [world.swap("swap", [[[m]]] * 2, [[[b]]] * 2) for m, b in zip(mine, boxes, strict=True)]
        for n in (me, 1 - me):
            under_way[n].wait()
            assert boxes[n].mean() == 10 * n + 1 - me


def test_ranks_that_wait_in_different_orders(pool: Pool) -> None:
    pool.run(crosswise, timeout=10)


def many_small() -> None:
    """More under way than there are slots, from both sides, before anybody looks."""
    with neighbours(timeout=20.0) as carrier:
        world, me = world_of(carrier), carrier.rank
        count = SLOTS + 500
        boxes = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
        one = world.swap("swap", [[[torch.tensor([2 * n + me])] for n in range(count)]] * 2, [[[b] for b in boxes]] * 2)
        two = world.swap("next", [[[torch.tensor([me])]]] * 2, [[[torch.zeros(1, dtype=torch.int64)]]] * 2)
        ((next_one,),) = two.wait()  # behind all the others
        assert next_one.item() == 1 - me
        one.wait()
        assert [b.item() for b in boxes] == [2 * n + 1 - me for n in range(count)]


def test_more_messages_than_there_is_room_for(pool: Pool) -> None:
    pool.run(many_small, timeout=30)


def growing() -> None:
    """Each message is longer than any before; then they shrink."""
    with neighbours() as carrier:
        world, me = world_of(carrier), carrier.rank
        for exponent in [*range(1, 23, 3), 2]:
            box = torch.zeros(2**exponent + 1)
            world.swap("swap", [[[values(2**exponent + 1, me)]]] * 2, [[[box]]] * 2).wait()
            assert torch.equal(box, values(2**exponent + 1, 1 - me))


def test_messages_longer_than_any_before(pool: Pool) -> None:
    pool.run(growing)


def in_common() -> None:
    with neighbours() as carrier, delayed(5):
        world, me = world_of(carrier), carrier.rank
        common = [world.common(10 * (n + 1), torch.bfloat16, CPU) for n in range(3)]
        assert all(c is not None and not c.data.any() for c in common)
        world.share("all", b"have seen zeros")
        for step in range(1, 20):
            for n, c in enumerate(common):
                part = slice(me * (n + 1), (me + 1) * (n + 1))
                c.data[part] = step + me
                c.publish()
            for n, c in enumerate(common):
                pending = c.current()
                assert pending.wait() == ()
                assert pending.lacks() is None
                want = [float(step + r) for r in range(3) for _ in range(n + 1)]
                assert c.data[: 3 * (n + 1)].tolist() == want
                pending.release()
            world.share("all", b"have read")


def test_memory_in_common(pool: Pool) -> None:
    pool.run(in_common, world=3)


def common_before(me: int) -> bool:
    with neighbours() as carrier:
        world = world_of(carrier)
        common = world.common(4, torch.float32, CPU)
        if carrier.rank == me:
            world.share("late", b"x")
            common.publish()
            return True
        common.publish()
        ready = common.current().ready()
        world.share("late", b"x")
        common.current().wait()
        return ready


@pytest.mark.parametrize("late", [0, 1])
def test_it_is_not_current_before_all_have_published(late: int, pool: Pool) -> None:
    assert pool.run(common_before, late)[1 - late] is False


def near_and_far() -> tuple[int, bool, bool]:
    """Two hosts of two ranks."""
    with neighbours(per_host=2) as carrier, delayed(7):
        world, me = world_of(carrier), carrier.rank
        for n, count in enumerate((1, 40, 3000)):
            send = [[[values(count, 100 * n + 10 * me + r)], [values(7, r)]] for r in range(4)]
            box = [[[torch.zeros(count)], Like((7,), torch.float32, CPU)] for _ in range(4)]
            pending = world.swap("swap", send, box)
            came = iter(pending.wait())
            for peer in [r for r in range(4) if r != me]:
                assert torch.equal(next(came)[0], values(count, 100 * n + 10 * peer + me))
                assert torch.equal(next(came)[0], values(7, me))
            pending.release()
        here, there = (
            Group("here", [me // 2 * 2, me // 2 * 2 + 1], carrier),
            Group("there", [me % 2, me % 2 + 2], carrier),
        )
        assert here.share("near", bytes([me])) == [bytes([r]) for r in here.ranks]
        assert there.share("far", bytes([me])) == [bytes([r]) for r in there.ranks]
        found = here.common(4, torch.float32, CPU), world.common(4, torch.float32, CPU)
        return len(carrier.near), found[0] is not None, found[1] is not None


def test_some_ranks_near_and_some_far(pool: Pool) -> None:
    assert pool.run(near_and_far, world=4) == [(1, True, False)] * 4


def storm(seed: int) -> None:
    """Many transfers under way, of any size, waited for and let go of in any order, by slow ranks."""
    with neighbours(per_host=0 if seed % 2 else 2, timeout=20.0) as carrier, delayed(seed):
        world, me = world_of(carrier), carrier.rank
        size = world.size
        same, own = random.Random(seed), random.Random(100 * seed + me)
        under_way, held = [], []
        for n in range(60):
            counts = [[same.choice([0, 1, 20, 56, 57, 3000]) for _ in range(size)] for _ in range(size)]  # from, to
            send = [[[values(counts[me][r], 1000 * n + 10 * me + r)]] for r in range(size)]
            box = [
                [Like((counts[r][me],), torch.float32, CPU) if same.random() < 0.5 else [torch.zeros(counts[r][me])]]
                for r in range(size)
            ]
            under_way.append((n, counts, world.swap("swap", send, box)))
            while len(under_way) > own.choice([0, 5, 10]):
                number, sizes, pending = under_way.pop(own.randrange(len(under_way)))
                came = pending.wait()
                held.append((pending, came, expected(sizes, number, me)))
            while len(held) > 5:
                pending, came, want = held.pop(own.randrange(len(held)))
                assert all(torch.equal(got, t) for (got,), t in zip(came, want, strict=True))
                pending.release()
        for _, _, pending in under_way:
            pending.wait()
        world.share("all", b"done")


def expected(counts: list[list[int]], number: int, me: int) -> list[Tensor]:
    return [values(counts[r][me], 1000 * number + 10 * r + me) for r in range(len(counts)) if r != me]


@pytest.mark.parametrize("seed", range(4))
def test_slow_ranks_with_many_transfers_under_way(seed: int, pool: Pool) -> None:
    pool.run(storm, seed, world=3 if seed % 2 else 4, timeout=40)


# ---------------------------------------------------------------- waiting


def waits(seconds: float) -> float:
    """How many seconds of a processor a rank needs to wait."""
    with neighbours() as carrier:
        world = world_of(carrier)
        world.share("both", b"here")
        if carrier.rank == 1:
            time.sleep(seconds)
        before = time.thread_time()
        world.share("late", b"x")
        return time.thread_time() - before


def test_waiting_burns_no_processor(pool: Pool) -> None:
    assert pool.run(waits, 1.5)[0] < 0.6


def interrupted() -> float:
    with neighbours(timeout=30.0) as carrier:
        world = world_of(carrier)
        world.share("both", b"here")
        if carrier.rank == 1:
            world.share("end", b"x")
            return 0.0
        signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs tests in the background ignores it
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            Group("never", [0, 1], carrier).share("never", b"x")
        took = time.monotonic() - begin
        world.share("end", b"x")
        return took


def test_who_waits_hears_an_interrupt(pool: Pool) -> None:
    assert 0.4 < pool.run(interrupted, timeout=15)[0] < 6


def last_word(seconds: float) -> bytes:
    """Rank 1 goes right after its last message, rank 0 is not there to read it."""
    with neighbours() as carrier:
        world, me = world_of(carrier), carrier.rank
        world.share("both", b"here")
        if me == 1:
            world.swap("last", [[[torch.tensor([7.0])]], []], [[], []])
            os._exit(0)
        waited, lacks = [], carrier.near[1].ring.has

        def late(tag: int) -> bool:  # its process has ended by the time that it is looked at
            if not waited:
                waited.append(time.sleep(seconds))
                return False
            return lacks(tag)

        carrier.near[1].ring.has = late
        box = torch.zeros(1)
        world.swap("last", [[], []], [[], [[box]]]).wait()
        return bytes([int(box.item())])


def test_the_last_message_of_one_that_has_gone_arrives(pool: Pool) -> None:
    first, second = pool.start(last_word, 0.5).results(15)
    assert second.exit_code == 0
    assert first.value == b"\7", first.error


def ends_well() -> None:
    """Three ranks; rank 2 needs nobody any more, closes the job and ends while the others still talk."""
    with neighbours() as carrier:
        world_of(carrier).share("all", b"here")
        if carrier.rank == 2:
            carrier.close()
            os._exit(0)
        pair = Group("pair", [0, 1], carrier)
        for n in range(4):
            time.sleep(0.2 * (carrier.rank == n % 2))
            pair.share("talk", b"x")


def test_a_neighbour_that_ended_well_disturbs_nobody(pool: Pool) -> None:
    results = pool.start(ends_well, world=3).results(15)
    assert [r.error for r in results[:2]] == [None, None]
    assert results[2].exit_code == 0


def hung_up(how: str) -> None:
    """Rank 2 waits for rank 1 only, on its own host; rank 1 learns from rank 0, on another host, that it is over."""
    with neighbours(per_host=0 if how == "near" else 2, timeout=8.0) as carrier:
        world, me = world_of(carrier), carrier.rank
        world.share("all", b"here")
        if me in (0, 1):
            if me == 0:
                os._exit(0)  # with the store
            time.sleep(6)
        begin = time.monotonic()
        try:
            pair = Group("pair", [[], [0, 1], [0, 2], [2, 3]][me], carrier)
            pair.share("chain", b"x")
        except PeerLost as error:
            error.took = time.monotonic() - begin
            time.sleep(3)  # slow to leave
            raise


@pytest.mark.slow
def test_news_of_another_host_travel_on_without_the_store(pool: Pool) -> None:
    *_, near, far = pool.start(hung_up, "far", world=4).results(20)
    for result in (near, far):
        assert isinstance(result.exception, PeerLost), result.error
        assert result.exception.what.startswith("rank 0 is gone; ")
        assert result.exception.took < 2


def differs() -> None:
    with neighbours(timeout=1.0) as carrier:
        world_of(carrier).common(4 + carrier.rank, torch.float32, CPU)


def test_memory_in_common_of_different_sizes_is_never_shared(pool: Pool) -> None:
    _, second = pool.start(differs).results(10)
    assert isinstance(second.exception, StalledError | PeerLost), second.error
