// Phase image [rad] of a 4D scan of electron counts by a self-contained model, in JavaScript.
//
//   npm install onnxruntime-node
//   node reconstruct.mjs MODEL.onnx SCAN.npy IMAGE.npy --energy 80e3 --semiangle 25 --k_pixel 0.05 --scan_step 0.25 \
//     --center_row 31 --center_column 31 [--defocus 0] [--spherical_aberration 0]
//
// Units: eV, mrad, 1/A, A, px. SCAN.npy is an array (scan rows, scan columns, detector rows, detector columns) in C
// order. With onnxruntime-web instead of onnxruntime-node the execution provider is "wasm"; in a browser, files and
// arguments come from elsewhere as well.

import { readFile, writeFile } from "node:fs/promises";
import { parseArgs } from "node:util";
import * as ort from "onnxruntime-node";

const TYPES = {
  "|u1": Uint8Array, "<u2": Uint16Array, "<u4": Uint32Array, "<i2": Int16Array, "<i4": Int32Array,
  "<f4": Float32Array, "<f8": Float64Array,
};

async function readArray(path) {
  const file = await readFile(path);
  const long = file[6] > 1; // version of the format
  const start = long ? 12 + file.readUInt32LE(8) : 10 + file.readUInt16LE(8);
  const header = file.toString("latin1", long ? 12 : 10, start);
  const kind = header.match(/'descr': '([^']*)'/)[1];
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(",").filter((part) => part.trim()).map(Number);
  if (!(kind in TYPES) || header.includes("'fortran_order': True") || shape.length !== 4) {
    throw new Error(`${path} holds ${header.trim()}; expected 4 dimensions in C order of ${Object.keys(TYPES)}`);
  }
  const content = file.buffer.slice(file.byteOffset + start, file.byteOffset + file.length);
  return { values: new TYPES[kind](content), shape };
}

async function writeArray(path, values, shape) {
  const text = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
  const header = text.padEnd(64 * Math.ceil((text.length + 11) / 64) - 11) + "\n";
  const start = Buffer.from([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, header.length & 255, header.length >> 8]);
  await writeFile(path, Buffer.concat([start, Buffer.from(header, "latin1"), Buffer.from(values.buffer)]));
}

// A pattern for each of the 3x3 neighbours of every position of a scan row; the scan's edges are repeated.
function kernels({ values, shape: [rows, columns, height, width] }, row) {
  const pixels = height * width;
  const result = new Float32Array(columns * 9 * pixels);
  const inside = (index, count) => Math.min(Math.max(index, 0), count - 1);
  let place = 0;
  for (let column = 0; column < columns; column++) {
    for (let n = 0; n < 9; n++, place += pixels) {
      const near = inside(row + Math.floor(n / 3) - 1, rows) * columns + inside(column + (n % 3) - 1, columns);
      result.set(values.subarray(near * pixels, (near + 1) * pixels), place);
    }
  }
  return new ort.Tensor("float32", result, [columns, 3, 3, height, width]);
}

// Complex image `source` (n x n pixels, real and imaginary interleaved) on the finer pixels: M source M^T.
function interpolate(matrix, source, n) {
  const size = matrix.length;
  const result = new Float64Array(2 * size * size);
  const half = new Float64Array(2 * size * n);
  for (let i = 0; i < size; i++)
    for (let k = 0; k < n; k++)
      for (let j = 0; j < 2 * n; j++) half[2 * i * n + j] += matrix[i][k] * source[2 * k * n + j];
  for (let i = 0; i < size; i++)
    for (let j = 0; j < size; j++)
      for (let k = 0; k < n; k++)
        for (let part = 0; part < 2; part++)
          result[2 * (i * size + j) + part] += matrix[j][k] * half[2 * (i * n + k) + part];
  return result;
}

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

const numbers = ["energy", "semiangle", "k_pixel", "scan_step", "center_row", "center_column"];
const aberrations = ["defocus", "spherical_aberration"];
const options = Object.fromEntries([
  ...numbers.map((name) => [name, { type: "string" }]),
  ...aberrations.map((name) => [name, { type: "string", default: "0" }]),
]);
const { values: texts, positionals } = parseArgs({ options, allowPositionals: true });
const given = Object.fromEntries(Object.keys(options).map((name) => [name, Number(texts[name])]));
const missing = Object.keys(given).filter((name) => Number.isNaN(given[name]));
if (missing.length || positionals.length !== 3) {
  throw new Error(`expected MODEL.onnx SCAN.npy IMAGE.npy and numbers for all of --${numbers.join(" --")}`);
}

const [modelPath, scanPath, imagePath] = positionals;
const session = await ort.InferenceSession.create(modelPath, { executionProviders: ["cpu"] });
const scan = await readArray(scanPath);
const [rows, columns] = scan.shape;
const tensor = (...values) => new ort.Tensor("float32", Float32Array.from(values), [values.length]);
const calibration = { center: tensor(given.center_row, given.center_column) };
for (const name of ["energy", "semiangle", "k_pixel", "scan_step", ...aberrations]) {
  calibration[name] = tensor(given[name]);
}

let grid; // of the image
for (let row = 0; row < rows; row++) {
  const outputs = await session.run({ ...calibration, patterns: kernels(scan, row) });
  const n = outputs.probe.dims[0];
  if (row === 0) {
    // the image's pixel is the step divided by a whole number, at most the model's
    const patchPixel = outputs.patch_pixel_size.data[0];
    const fine = Math.ceil(given.scan_step / patchPixel - 1e-6);
    const ratio = given.scan_step / fine / patchPixel;
    const half = Math.floor((0.375 * n) / ratio); // of the patch; its rim can't be interpolated
    const side = 2 * half + 1;
    const matrix = Array.from({ length: side }, (_, i) =>
      Array.from({ length: n }, (_, j) => sinc((i - half) * ratio - j + Math.floor(n / 2))),
    );
    const probe = interpolate(matrix, outputs.probe.data, n);
    const weights = Array.from({ length: side * side }, (_, i) => probe[2 * i] ** 2 + probe[2 * i + 1] ** 2);
    const threshold = Math.max(...weights) / 10; // eq. 7
    const height = (rows - 1) * fine + 1;
    const width = (columns - 1) * fine + 1;
    const real = new Float64Array(height * width);
    grid = { fine, half, side, matrix, weights, threshold, height, width, real, imaginary: real.slice() };
  }
  const { fine, half, side, matrix, weights, threshold, height, width, real, imaginary } = grid;
  for (let column = 0; column < columns; column++) {
    const patch = outputs.object_patch.data.slice(2 * n * n * column, 2 * n * n * (column + 1));
    for (let i = 0; i < patch.length; i += 2) patch[i] -= 1; // what is interpolated vanishes in vacuum
    const object = interpolate(matrix, patch, n);
    for (let i = 0; i < side; i++) {
      for (let j = 0; j < side; j++) {
        const [y, x, place] = [row * fine + i - half, column * fine + j - half, i * side + j];
        if (weights[place] <= threshold || y < 0 || x < 0 || y >= height || x >= width) continue;
        const [a, b] = [1 + object[2 * place], object[2 * place + 1]];
        real[y * width + x] += (weights[place] * a) / Math.hypot(a, b);
        imaginary[y * width + x] += (weights[place] * b) / Math.hypot(a, b);
      }
    }
  }
}
const phase = Float32Array.from(grid.real, (a, i) => Math.atan2(grid.imaginary[i], a));
await writeArray(imagePath, phase, [grid.height, grid.width]);
