from itertools import pairwise

import numpy as np
import pytest
import torch

from herd.data.batch import Loader, LoaderState
from herd.data.encode import IGNORE, Example, encode_text, from_mask
from herd.data.pack import Rows, concatenate, pack_stream, pack_whole
from herd.data.read import DataError


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


def test_whole_examples_are_never_cut_and_padding_is_not_learned():
    examples = documents(8, 1, 2, 20, 5, 3)
    rows, too_long = pack_whole(examples, 10, pad=0)
    assert too_long == [3]
    found = []
    for tokens, labels, positions in zip(rows.tokens, rows.labels, rows.positions, strict=True):
        starts = [*np.flatnonzero(positions == 0), len(positions)]
        for start, end in pairwise(starts):
            if tokens[start] == 0:
                assert (tokens[start:end] == 0).all()
                assert (labels[start:end] == IGNORE).all()
            else:
                found.append(Example(tuple(tokens[start:end].tolist()), tuple(labels[start:end].tolist())))
            assert positions[start:end].tolist() == list(range(end - start))
    assert sorted(found, key=lambda e: e.tokens) == sorted(
        (examples[i] for i in (0, 1, 2, 4, 5)), key=lambda e: e.tokens
    )
    assert rows.learned == sum(len(examples[i]) - 1 for i in (0, 1, 2, 4, 5))


def test_best_fit_fills_rows():
    rows, _ = pack_whole(documents(4, 4, 2, 2), 10, pad=0)  # 6 + 4 and 6 + 4
    assert len(rows) == 2


def test_rows_of_different_length_do_not_join():
    with pytest.raises(DataError):
        concatenate([pack_stream(documents(9), 4), pack_stream(documents(9), 5)])
    assert len(concatenate([pack_stream(documents(9), 4), pack_stream(documents(9), 4)])) == 4


def numbered(count: int) -> Rows:
    tokens = np.arange(count, dtype=np.int32)[:, None]
    return Rows(tokens, tokens, np.zeros_like(tokens))


def test_an_epoch_gives_every_row_once_and_epochs_differ():
    loader = Loader(numbered(12), 4, seed=3)
    first = torch.cat([loader.draw().tokens.flatten() for _ in range(3)]).tolist()
    second = torch.cat([loader.draw().tokens.flatten() for _ in range(3)]).tolist()
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_a_loader_continues_from_its_state():
    loader = Loader(numbered(10), 4, seed=3)
    for _ in range(4):
        loader.draw()
    again = Loader(numbered(10), 4, seed=3)
    again.restore(LoaderState(loader.state.epoch, loader.state.index))
    for _ in range(5):
        assert torch.equal(loader.draw().tokens, again.draw().tokens)


def test_no_rows_is_an_error():
    with pytest.raises(DataError):
        Loader(pack_stream(documents(1), 10), 2, seed=0)
