import numpy as np
import pytest

from herd.data.encode import IGNORE, Example, encode_text, from_mask
from herd.data.pack import pack_stream, plan
from herd.errors import DataError


def documents(*sizes: int) -> list[Example]:
    return [encode_text([100 * d + i for i in range(size)], bos=1, eos=2) for d, size in enumerate(sizes, start=1)]


def test_labels_are_shifted_once_and_masked():
    example = from_mask([5, 6, 7, 8], [False, False, True, True])
    assert example.labels == (IGNORE, 7, 8, IGNORE)
    assert encode_text([9], bos=1, eos=2) == Example((1, 9, 2), (9, 2, IGNORE))
    with pytest.raises(DataError):
        from_mask([1, 2], [True])


def test_stream_positions_restart_at_documents_and_rows():
    rows = pack_stream(documents(3, 4), 4)  # 5 + 6 tokens: two rows of four, three tokens left out
    assert rows.tokens.tolist() == [[1, 100, 101, 102], [2, 1, 200, 201]]
    assert rows.positions.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert rows.labels.tolist() == [[100, 101, 102, 2], [IGNORE, 200, 201, 202]]


def test_stream_keeps_every_token_in_order():
    examples = documents(*range(1, 40))
    rows = pack_stream(examples, 7)
    flat = [token for example in examples for token in example.tokens]
    assert rows.tokens.flatten().tolist() == flat[: rows.tokens.size]
    assert len(flat) - rows.tokens.size < 7


def pieces_of(rows, r):
    first, last = rows.first[r], rows.first[r + 1]
    return list(zip(rows.document[first:last], rows.start[first:last], rows.size[first:last], strict=True))


SIZES = np.random.default_rng(5).integers(1, 90, 300)
LENGTH = 32


@pytest.mark.parametrize("kind", ["best-fit", "concat", "none"])
@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_every_token_is_in_one_row_exactly(kind, count):
    sizes = SIZES[:count].astype(np.int64)
    rows = plan(sizes, LENGTH, kind)
    seen = [np.zeros(size, int) for size in sizes]
    for r in range(len(rows)):
        found = pieces_of(rows, r)
        assert 0 < sum(size for _, _, size in found) <= LENGTH
        for document, start, size in found:
            seen[document][start : start + size] += 1
    assert all((times == 1).all() for times in seen)


def test_best_fit_splits_only_what_is_longer_than_a_row():
    sizes = SIZES.astype(np.int64)
    rows = plan(sizes, LENGTH, "best-fit")
    parts = np.bincount(rows.document, minlength=len(sizes))
    assert (parts == -(-sizes // LENGTH)).all()
    rest = [int(size % LENGTH) for size in sizes if size % LENGTH]
    # Best fit decreasing never needs more than 11/9 of the best possible number of rows, plus one (Johnson, 1973).
    least = -(-sum(rest) // LENGTH)
    assert len(rows) - int((sizes // LENGTH).sum()) <= 11 / 9 * least + 1


def best_fit_slow(sizes, length):
    """The definition: longest first, into the row with the least room that is enough."""
    free = []
    rows = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [(room, row) for row, room in enumerate(free) if room >= sizes[i]]
        if fitting:
            row = min(fitting)[1]
        else:
            free.append(length)
            rows.append([])
            row = len(rows) - 1
        free[row] -= sizes[i]
        rows[row].append(sizes[i])
    return sorted(sorted(row) for row in rows)


@pytest.mark.parametrize("length", [LENGTH, 1023, 1024, 5000])
def test_best_fit_is_what_its_definition_says(length):
    scale = max(1, length // 90)
    sizes = np.minimum(SIZES * scale + np.arange(300) % scale, length).astype(np.int64)
    rows = plan(sizes, length, "best-fit")
    found = sorted(sorted(int(sizes[d]) for d, _, _ in pieces_of(rows, r)) for r in range(len(rows)))
    slow = best_fit_slow(sizes.tolist(), length)
    assert len(found) == len(slow)  # rows of equal room may be taken in another order, never more of them
    assert sorted(map(sum, found)) == sorted(map(sum, slow))


def test_concat_leaves_no_gap_but_the_last():
    sizes = SIZES.astype(np.int64)
    rows = plan(sizes, LENGTH, "concat")
    filled = [sum(size for _, _, size in pieces_of(rows, r)) for r in range(len(rows))]
    assert filled[:-1] == [LENGTH] * (len(rows) - 1)
    assert len(rows) == -(-int(sizes.sum()) // LENGTH)


def test_none_is_a_row_for_each_document():
    rows = plan(np.array([5, 32, 70]), LENGTH, "none")
    assert sorted(tuple(map(int, pieces_of(rows, r)[0])) for r in range(len(rows))) == [
        (0, 0, 5),
        (1, 0, 32),
        (2, 0, 32),
        (2, 32, 32),
        (2, 64, 6),
    ]


@pytest.mark.parametrize("kind", ["best-fit", "concat"])
def test_chapters_of_a_book_are_not_neighbours(kind):
    rows = plan(np.full(1000, 8, np.int64), 64, kind)
    together = [[int(d) for d, _, _ in pieces_of(rows, r)] for r in range(len(rows))]
    near = sum(abs(a - b) == 1 for row in together for a in row for b in row) / 2
    assert near < 30  # 875 if rows followed the file
