"""Memory of packed weights: pieces are aligned, apart from each other, and last as long as they are held."""

from __future__ import annotations

from pawl_workers.kernels.weight_memory import WeightMemory

SIZES = [1, 64, 65, 1 << 20, 31 << 20, 33 << 20, 3 << 20]  # in all, more than one chunk, and one that is larger


def test_pieces_are_aligned_and_do_not_overlap() -> None:
    memory = WeightMemory()
    pieces = [memory.take(size) for size in SIZES]
    assert [piece.numel() for piece in pieces] == SIZES
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % 64 == 0
        piece.fill_(number + 1)
    for number, piece in enumerate(pieces):
        assert int(piece.min()) == int(piece.max()) == number + 1


def test_a_piece_outlives_the_memory_that_it_came_from() -> None:
    piece = WeightMemory().take(1000).fill_(7)
    others = [WeightMemory().take(1000).fill_(9) for _ in range(3)]
    assert int(piece.min()) == int(piece.max()) == 7
    assert all(int(other.min()) == 9 for other in others)
