"""The graphs of `airpi_py4d.device_path`: resampling and stitching on the model's device.

    python -m export.device_graphs airpi_py4d/graphs

The package ships them, so that ONNX isn't needed to run them. They hold no numbers: matrices, shapes and places are
inputs, the same for every batch of a scan but for the place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx
from onnx import parser

#: Raw patterns cross the bus as they are where they have one of these types.
COUNTS = {"uint8": "uint8", "uint16": "uint16", "float32": "float"}

_HEADER = '<ir_version: 9, opset_import: ["" : 17]>'

#: resampled = W s - background, for a sparse W of at most `taken` entries a row, s the patterns' sums over squares of
#: pixels; 0 where nothing was measured.
_RESAMPLING = """
resampling (
    {counts}[n, pixels] patterns, bool[n] measured,
    int32[taken, grid] places, float[taken, grid] weights, float[grid] background,
    int64[5] squares, int64[3] shape
) => (float[n, side, side] resampled, float[n] electrons) {{
    zero = Constant<value = float {{0}}>()
    one = Constant<value_ints = [1]>()
    within = Constant<value_ints = [2, 4]>()
    all = Constant<value_ints = [0, -1]>()
    counts = Cast<to = 1>(patterns)
    in_squares = Reshape(counts, squares)
    sums = ReduceSum<keepdims = 0>(in_squares, within)
    pixel_sums = Reshape(sums, all)
    taken = Gather<axis = 1>(pixel_sums, places)
    weighted = Mul(taken, weights)
    summed = ReduceSum<keepdims = 0>(weighted, one)
    corrected = Sub(summed, background)
    used = Unsqueeze(measured, one)
    flat = Where(used, corrected, zero)
    electrons = ReduceSum<keepdims = 0>(flat, one)
    resampled = Reshape(flat, shape)
}}"""

#: `FeatureStitcher.add_row` of r scan rows of b blocks of c positions; p the patch's side, f features, s the image
#: columns from block to block.
_STITCHING = """
stitching (
    float[n, f, p, p] patches, float[n] electrons, bool[n] measured,
    float[cp, two_s] columns, float[c, two_s] column_window, float[h, rp] rows, float[h, r] row_window,
    int64[6] blocks, int64[3] strip, int64[4] block_weights, int64[6] place, float[channels, height, width] sums
) => (float[channels, height, width] sums_after) {
    zero = Constant<value = float {0}>()
    patch_axes = Constant<value_ints = [1, 2, 3]>()
    first_axis = Constant<value_ints = [0]>()

    at_least_none = Max(electrons, zero)
    counted = Where(measured, at_least_none, zero)
    used = Greater(counted, zero)
    used_patches = Unsqueeze(used, patch_axes)
    factor = Unsqueeze(counted, patch_axes)
    clean = Where(used_patches, patches, zero)
    weighted = Mul(clean, factor)

    in_blocks = Reshape(weighted, blocks)
    by_feature = Transpose<perm = [3, 0, 4, 1, 2, 5]>(in_blocks)
    block_columns = Constant<value_ints = [0, 0, 0, 0, -1]>()
    joined = Reshape(by_feature, block_columns)
    spans = MatMul(joined, columns)
    here, beyond = Split<axis = -1>(spans)
    one_block_right = Constant<value_ints = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]>()
    one_block_left = Constant<value_ints = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]>()
    here_padded = Pad(here, one_block_right)
    beyond_padded = Pad(beyond, one_block_left)
    overlapped = Add(here_padded, beyond_padded)
    strips = Reshape(overlapped, strip)
    features = MatMul(rows, strips)

    number = Cast<to = 1>(measured)
    counted_once = Unsqueeze(counted, first_axis)
    number_once = Unsqueeze(number, first_axis)
    pair = Concat<axis = 0>(counted_once, number_once)
    pair_blocks = Reshape(pair, block_weights)
    weight_spans = MatMul(pair_blocks, column_window)
    weights_here, weights_beyond = Split<axis = -1>(weight_spans)
    weight_right = Constant<value_ints = [0, 0, 0, 0, 0, 0, 1, 0]>()
    weight_left = Constant<value_ints = [0, 0, 1, 0, 0, 0, 0, 0]>()
    weights_here_padded = Pad(weights_here, weight_right)
    weights_beyond_padded = Pad(weights_beyond, weight_left)
    weights_overlapped = Add(weights_here_padded, weights_beyond_padded)
    row_columns = Constant<value_ints = [0, 0, -1]>()
    weight_strips = Reshape(weights_overlapped, row_columns)
    weight_sums = MatMul(row_window, weight_strips)

    added = Concat<axis = 0>(features, weight_sums)
    placed = Pad(added, place)
    sums_after = Add(sums, placed)
}"""


def graphs() -> dict[str, onnx.ModelProto]:
    """All graphs, by the names of their files."""
    texts = {f"resampling_{name}": _RESAMPLING.format(counts=counts) for name, counts in COUNTS.items()}
    made = {name: parser.parse_model(_HEADER + text) for name, text in {**texts, "stitching": _STITCHING}.items()}
    for graph in made.values():
        onnx.checker.check_model(graph, full_check=True)
    return made


def main(arguments: list[str] | None = None) -> None:
    parsed = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsed.add_argument("folder", type=Path)
    folder = parsed.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, graph in graphs().items():
        (folder / f"{name}.onnx").write_bytes(graph.SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
