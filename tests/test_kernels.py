"""Sums of neighbours and 3x3 kernels, against direct evaluations of the whole scan."""

import numpy as np
import pytest

from airpi_py4d.kernels import kernel_batches, kernel_spacing, pattern_batches, summed_rows


def scan(rows, columns, missing=()):
    rng = np.random.default_rng(0)
    patterns = rng.poisson(3.0, (rows, columns, 2, 3)).astype(np.float32)
    valid = np.ones((rows, columns), bool)
    for place in missing:
        valid[place] = False
        patterns[place] = 1e9  # must never be used
    return patterns, valid


@pytest.mark.parametrize(("neighbours", "stride"), [(1, 1), (3, 1), (5, 2), (3, 4), (1, 3), (7, 2)])
@pytest.mark.parametrize("shape", [(6, 9), (11, 4), (7, 7)])
def test_sums_are_those_of_the_whole_scan(neighbours, stride, shape):
    patterns, valid = scan(*shape, missing=[(2, 3), (4, 1)])
    half = neighbours // 2
    result = list(summed_rows(zip(patterns, valid, strict=True), neighbours, stride))
    assert len(result) == -(-shape[0] // stride)
    for i, (sums, measured) in enumerate(result):
        assert len(sums) == len(measured) == -(-shape[1] // stride)
        for j in range(len(sums)):
            rows = slice(max(0, i * stride - half), i * stride + half + 1)
            columns = slice(max(0, j * stride - half), j * stride + half + 1)
            taken = valid[rows, columns]
            assert measured[j] == taken.any()
            if taken.any():
                expected = patterns[rows, columns][taken].mean(0) * neighbours**2
                np.testing.assert_allclose(sums[j], expected, rtol=1e-5)


@pytest.mark.parametrize("spacing", [(1, 1), (1, 3), (2, 1), (4, 1)])
@pytest.mark.parametrize("shape", [(3, 3), (5, 8), (9, 4)])
@pytest.mark.parametrize("batch", [3, 100])
def test_kernels_are_the_neighbours_of_every_position(spacing, shape, batch):
    patterns, valid = scan(*shape, missing=[(1, 1), (2, 2)])
    seen = np.zeros(shape, int)
    for row, first, kernels, measured in kernel_batches(zip(patterns, valid, strict=True), spacing, batch):
        assert len(kernels) == len(measured) <= batch
        for n in range(len(kernels)):
            column = first + n
            seen[row, column] += 1
            assert measured[n] == valid[row, column]
            rows = np.clip(row + np.array([-1, 0, 1]) * spacing[0], 0, shape[0] - 1)
            columns = np.clip(column + np.array([-1, 0, 1]) * spacing[1], 0, shape[1] - 1)
            expected, here = patterns[np.ix_(rows, columns)].copy(), valid[np.ix_(rows, columns)]
            expected[~here] = expected[here].mean(0)
            np.testing.assert_allclose(kernels[n], expected, rtol=1e-6)
    assert (seen == 1).all()


def test_spacing_makes_kernels_square():
    assert kernel_spacing((0.1, 0.1)) == (1, 1)
    assert kernel_spacing((0.1, 0.14)) == (1, 1)
    assert kernel_spacing((0.1, 0.21)) == (2, 1)
    assert kernel_spacing((0.5, 0.1)) == (1, 5)


@pytest.mark.parametrize(("columns", "copied"), [(3, True), (4, False), (7, False), (9, False)])
def test_patterns_of_short_rows_alone_are_copied_into_batches(columns, copied):
    rows = [(np.full((columns, 2, 2), row, np.float32), np.ones(columns, bool)) for row in range(4)]
    batches = list(pattern_batches(rows, 7))
    assert sum(len(patterns) for patterns, _ in batches) == 4 * columns
    for patterns, pieces in batches:
        assert len(patterns) <= 7
        for piece in pieces:
            assert (patterns[piece.here] == piece.row).all()
    assert any(np.shares_memory(patterns, rows[pieces[0].row][0]) for patterns, pieces in batches) is not copied
