"""The outbox against a naive one: what is pending is one string of bytes, some of which are in files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pants_green import _outbox
from pants_green._outbox import JOIN_LIMIT, FileItem


class Outbox(_outbox.Outbox):
    """Counts its bytes, as a stream does for the real one."""

    __slots__ = ()

    @property
    def size(self):
        return sum(map(len, self.items))

    def put(self, data):
        self.items.append(data)
        self.files += isinstance(data, FileItem)

    def head(self):
        return super().head(self.size)

    def sent(self, count):
        """As the stream: a file of which all is gone, or cut off, is closed."""
        head = self.items[0] if self.items else None
        if isinstance(head, FileItem) and count == len(head):
            head.close()
            self.files -= 1
        super().sent(count)

    def clear(self):
        size = self.size
        super().clear()
        return size


class File:
    """Stands for an open file."""

    closed = 0

    def __init__(self, content):
        self.content = content

    def fileno(self):
        return 3

    def close(self):
        self.closed += 1


def part(content, offset=0, size=None):
    """Return an item that is a part of a file with this content."""
    return FileItem(File(content), offset, len(content) - offset if size is None else size)


def bytes_of(item):
    if isinstance(item, FileItem):
        return item._file.content[item.offset :][: item.size]
    return bytes(item)


def contents(outbox):
    return b"".join(bytes_of(item) for item in outbox.items)


def filled(*pieces):
    outbox = Outbox()
    for piece in pieces:
        outbox.put(piece)
    return outbox


def test_new_outbox_is_empty():
    outbox = Outbox()
    assert (outbox.size, outbox.items, bytes(outbox.head())) == (0, [], b"")


def test_put_small_pieces_head_joins_them_in_order():
    outbox = filled(b"a", b"bc", b"def")
    assert outbox.size == 6
    assert outbox.head() == b"abcdef"
    assert outbox.size == 6


def test_head_asked_again_gives_the_same_object():
    """A send that the kernel refuses is repeated; the pieces are not joined twice."""
    outbox = filled(b"a", b"b")
    assert outbox.head() is outbox.head()


def test_sent_whole_piece_leaves_nothing():
    outbox = filled(b"abc")
    outbox.sent(3)
    assert (outbox.size, outbox.items) == (0, [])


def test_sent_part_of_a_piece_the_rest_is_a_view_of_it():
    piece = b"x" * 1000
    outbox = filled(piece)
    outbox.sent(400)
    (rest,) = outbox.items
    assert isinstance(rest, memoryview)
    assert rest.obj is piece
    assert (len(rest), outbox.size) == (600, 600)


def test_sent_part_of_a_view_the_rest_is_a_view_of_the_piece_itself():
    """Views of views would be a chain as long as the number of sends."""
    piece = bytes(range(256)) * 4
    outbox = filled(piece)
    for _ in range(10):
        outbox.sent(100)
    assert outbox.items[0].obj is piece
    assert bytes(outbox.head()) == piece[1000:]


def test_sent_nothing_changes_nothing():
    outbox = filled(b"abc", b"def")
    outbox.sent(0)
    assert contents(outbox) == b"abcdef"
    assert outbox.size == 6


def test_put_after_a_partial_send_is_joined_behind_the_rest():
    outbox = filled(b"abcdef")
    outbox.sent(4)
    outbox.put(b"gh")
    assert bytes(outbox.head()) == b"efgh"
    assert outbox.size == 4


def test_big_piece_alone_is_never_copied():
    big = bytes(JOIN_LIMIT * 4)
    outbox = filled(big)
    assert outbox.head() is big


def test_big_piece_behind_small_ones_is_never_copied():
    big = bytes(JOIN_LIMIT + 1)
    outbox = filled(b"a", b"b", big, b"c")
    assert outbox.head() == b"ab"
    outbox.sent(2)
    assert outbox.head() is big
    outbox.sent(len(big))
    assert outbox.head() == b"c"


def test_big_piece_behind_one_small_one_is_never_copied():
    big = bytes(JOIN_LIMIT)
    small = b"a"
    outbox = filled(small, big)
    assert outbox.head() is small
    outbox.sent(1)
    assert outbox.head() is big


def test_big_piece_partly_sent_is_never_copied():
    big = bytes(JOIN_LIMIT * 3)
    outbox = filled(big, b"small")
    while outbox.size > JOIN_LIMIT + 5:
        head = outbox.head()
        assert head is big or head.obj is big
        outbox.sent(min(len(head), 65536))


def test_many_small_pieces_head_is_as_large_as_the_limit_allows():
    pieces = [bytes([number % 256]) * 1024 for number in range(1000)]
    outbox = filled(*pieces)
    head = outbox.head()
    assert len(head) == JOIN_LIMIT
    assert outbox.size == 1000 * 1024
    assert contents(outbox) == b"".join(pieces)


def test_small_pieces_that_fill_the_limit_exactly_are_one_head():
    outbox = filled(*[b"x" * 1024] * (JOIN_LIMIT // 1024))
    assert len(outbox.head()) == JOIN_LIMIT
    assert len(outbox.items) == 1


def test_many_small_pieces_every_byte_is_joined_once():
    """Joining is linear: no byte that was joined and then sent whole is ever joined again."""
    joined = 0
    outbox = filled(*[b"x" * 100] * 20_000)
    while outbox.items:
        before = outbox.items[0]
        head = outbox.head()
        if head is not before:
            joined += len(head)
        outbox.sent(len(head))
    assert joined <= 2_000_000


def test_clear_forgets_everything_and_says_how_much():
    outbox = filled(b"abc", b"de")
    outbox.sent(1)
    assert outbox.clear() == 4
    assert (outbox.size, outbox.items, outbox.clear()) == (0, [], 0)


def test_clear_keeps_the_list_that_the_stream_writes_to():
    outbox = filled(b"abc")
    items = outbox.items
    outbox.clear()
    assert outbox.items is items


@pytest.mark.parametrize("sent", [0, 1, 5, 6])
def test_list_of_items_stays_the_same_object(sent):
    """The stream appends to it in place."""
    outbox = filled(b"abc", b"def")
    items = outbox.items
    outbox.head()
    outbox.sent(sent)
    assert outbox.items is items


@pytest.mark.parametrize("pieces", [(b"", bytes(JOIN_LIMIT + 1)), (b"", b"", bytes(JOIN_LIMIT + 1))])
def test_empty_pieces_in_front_of_a_large_one_are_no_head(pieces):
    outbox = filled(*pieces)
    assert len(outbox.head()) > 0


# ---- parts of files


def test_file_item_knows_its_place_its_bytes_and_its_descriptor():
    item = part(b"0123456789", 2, 5)
    assert (len(item), item.offset, item.size, item.fileno()) == (5, 2, 5, 3)
    item.advance(3)
    assert (len(item), item.offset, bytes_of(item)) == (2, 5, b"56")


def test_file_alone_is_the_head_itself():
    item = part(b"content")
    outbox = filled(item)
    assert outbox.head() is item


def test_file_is_never_joined_with_what_is_around_it():
    item = part(b"content")
    outbox = filled(b"a", b"b", item, b"c", b"d")
    assert outbox.head() == b"ab"
    outbox.sent(2)
    assert outbox.head() is item
    outbox.sent(7)
    assert outbox.head() == b"cd"
    assert outbox.files == 0


def test_file_behind_one_piece_leaves_that_as_it_is():
    small = b"a"
    outbox = filled(small, part(b"content"))
    assert outbox.head() is small


def test_files_one_after_the_other_are_heads_one_by_one():
    items = [part(b"first"), part(b"second")]
    outbox = filled(*items)
    for item in items:
        assert outbox.head() is item
        outbox.sent(len(item))
    assert (outbox.items, outbox.files) == ([], 0)


def test_file_larger_than_the_limit_does_not_keep_what_is_before_it_from_being_joined():
    item = FileItem(File(b""), 0, 1 << 40)
    outbox = filled(b"a", b"b", item)
    assert outbox.head() == b"ab"
    outbox.sent(2)
    assert outbox.head() is item


def test_file_sent_in_part_goes_on_from_there():
    item = part(b"0123456789")
    outbox = filled(item, b"rest")
    outbox.sent(4)
    assert outbox.head() is item
    assert (item.offset, contents(outbox), outbox.size) == (4, b"456789rest", 10)


def test_file_cut_off_to_nothing_is_no_head():
    item = part(b"content")
    outbox = filled(item, b"rest")
    item.size = 0
    outbox.sent(0)
    assert outbox.head() == b"rest"
    assert (outbox.items, outbox.files) == ([b"rest"], 0)


def test_clear_closes_the_files():
    items = [part(b"first"), part(b"second")]
    outbox = filled(b"a", items[0], b"b", items[1])
    outbox.sent(1)
    assert outbox.clear() == 12
    assert [item._file.closed for item in items] == [1, 1]
    assert (outbox.items, outbox.files, outbox.clear()) == ([], 0, 0)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.binary(max_size=40)),
        st.tuples(st.just("put a file"), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("cut a file off"), st.integers(0, 40)),
        st.tuples(st.just("send"), st.integers(0, 100)),
        st.tuples(st.just("head"), st.none()),
        st.tuples(st.just("clear"), st.none()),
    ),
    max_size=60,
)


@given(steps=steps, limit=st.integers(1, 50))
def test_outbox_any_history_holds_what_a_naive_one_holds(steps, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_outbox, "JOIN_LIMIT", limit)
        outbox = Outbox()
        pending = b""
        longest = 0
        files = []
        for step, argument in steps:
            if step == "put a file":
                outbox.put(part(b"before" + argument, 6))
                files.append(outbox.items[-1]._file)
                pending += argument
                longest = max(longest, len(argument))
            elif step == "cut a file off":
                # Who sends it finds out, so it is the head; it sends what is left.
                head = outbox.head()
                if isinstance(head, FileItem):
                    pending = pending[len(head) :]
                    head.size = min(argument, len(head))
                    outbox.sent(head.size)
            elif step == "put":
                outbox.put(argument)
                pending += argument
                longest = max(longest, len(argument))
            elif step == "send":
                # As much as the kernel takes of the head that it is offered.
                count = min(argument, len(outbox.head()))
                outbox.sent(count)
                pending = pending[count:]
            elif step == "head":
                head = bytes_of(outbox.head())
                assert pending.startswith(head)
                assert len(head) <= max(limit, longest)
            else:
                assert outbox.clear() == len(pending)
                pending = b""
            assert contents(outbox) == pending
            assert outbox.size == len(pending)
            assert outbox.files == sum(not file.closed for file in files)
