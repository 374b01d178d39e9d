"""How do four bits become a float without a conversion? In the mantissa of a known number.

This file computes the experts of one decode step in 4 bits. Reading eight weights as one word, as
fast/int4.py describes it, takes an eighth of the bytes of float32 and a quarter of those of
bfloat16. Now arithmetic is no longer free. At 4.2 TB/s, a processor of an H200 gets 33 weights in
each cycle, in which it can start 128 operations, or 3.9 for each weight. If a weight takes four
operations, the memory idles. Its four bits must be cut out of the word, become a float, be
multiplied with the scale of their group and with x, and be added, so every step is made cheap:

    four bits to float      no conversion; see `integers`            1.5 operations per weight
    times the scale         two weights in one register              0.5
    times x, and the sum    tensor cores; see `row_sums`             0.1
    loading and the rest                                             0.3

The functions stand for those of the same name in fast/kernels.py, which explains the pattern. They
differ from them in one rounding: the output of an expert stays in float32 until all are added.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv, next_power_of_2

from fast import int4
from fast.kernels import silu_times, tile

ROWS, WORDS, WARPS = 64, 64, 4  # a tile of 64 × 64 words for 4 warps
PROGRAMS = 512  # so many fill the card


def fits(packed, scale=None):
    """Whether tiles divide the rows of packed (E, M, D/8) with scale (E, M, D/G)."""
    if scale is None:  # 16 bits
        return False
    words, groups = packed.shape[2], scale.shape[2]
    P = words // groups  # words of a group
    return (words % 16 == words % groups == 0 and P == next_power_of_2(P)
            and P <= tile(words, WORDS))


def pairs(constant):
    """PTX code that makes eight pairs of 16-bit floats out of two words; see `integers`."""
    code = ["prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;"]
    for n in range(8):
        code += [f"shr.u32 t, {'low' if n < 4 else 'high'}, {n % 4 * 4};",
                 f"lop3.b32 ${n}, t, 0x000f000f, {constant}, 0xea;"]  # t & 0x000f000f | constant
    return "{ .reg .b32 low, high, t;\n" + "\n".join(code) + "}"


BFLOAT16_PAIRS = tl.constexpr(pairs("0x43004300"))
FLOAT16_PAIRS = tl.constexpr(pairs("0x64006400"))
REGISTERS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 2))  # eight results, two arguments


@triton.jit
def integers(words, t: tl.constexpr):
    """The integers u − 8 of the eight weights of each word, as eight tiles of dtype t.

    Instructions that convert integers to floats are four times as slow as others. But the float32
    number 2²³ has the bits 0x4B000000, and the last bit of its mantissa counts 1. With the four
    bits u in the place of its last four it is 2²³ + u, and a subtraction of 2²³ + 8 gives u − 8
    exactly. In bfloat16 the number is 128 and in float16 1,024. Then a register holds two numbers,
    and one operation sets the bits of both. `pairs` does this, in PTX, the assembly language of the
    card: it brings the lower halves of two words together, and the upper halves, and then takes
    every four bits of both at once.
    """
    tiles = ()
    if t == tl.float32:
        for n in tl.static_range(8):
            bits = ((words >> 4 * n) & 15) | 0x4B000000
            tiles = tiles + (bits.to(t, bitcast=True) - (2**23 + 8),)
    else:
        code: tl.constexpr = BFLOAT16_PAIRS if t == tl.bfloat16 else FLOAT16_PAIRS
        offset: tl.constexpr = 136.0 if t == tl.bfloat16 else 1032.0
        bits = tl.inline_asm_elementwise(code, REGISTERS, [words], (tl.int16,) * 8, is_pure=True,
                                         pack=2)  # the code takes two words at a time
        for n in tl.static_range(8):
            tiles = tiles + (bits[n].to(t, bitcast=True) - offset,)
    return tiles


@triton.jit
def row_sums(packed, scale, x, rows, first, last, n: tl.constexpr, G: tl.constexpr,
             ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Σ_c w[r, c]·x[c] over the words first … last − 1 of some rows r.

    packed (R, n/8), scale (R, n/G)

    The tensor cores multiply tiles with at least 8 columns, and one text has one. So column i of
    the tile of x holds the numbers x[8j + i] for the words j. The tile of the weights that are
    number i of their words is multiplied with all 8 columns, and of the result only column i is
    wanted. The other seven cost nothing, because the tensor cores would idle.
    """
    t: tl.constexpr = x.dtype.element_ty
    GROUPS: tl.constexpr = 8 * WORDS // G
    j, i, g = tl.arange(0, WORDS), tl.arange(0, 8), tl.arange(0, GROUPS)
    sums = (tl.zeros((ROWS, 8), tl.float32),) * 8
    for start in range(first, last, WORDS):
        words = tl.load(packed + rows[:, None] * (n // 8) + start + j[None, :])
        scales = tl.load(scale + rows[:, None] * (n // G) + 8 * start // G + g[None, :])
        scales = tl.broadcast_to(scales[:, :, None], (ROWS, GROUPS, G // 8))
        scales = tl.reshape(scales, (ROWS, WORDS))
        xs = tl.load(x + 8 * (start + j)[:, None] + i[None, :])
        weights = integers(words, t)
        new = ()
        for m in tl.static_range(8):
            product = tl.dot(weights[m] * scales, xs, sums[m], input_precision="ieee")
            new = new + (product,)
        sums = new
    wanted = tl.zeros((ROWS, 8), tl.float32)
    for m in tl.static_range(8):
        wanted += tl.where(i[None, :] == m, sums[m], 0.0)
    return tl.sum(wanted, 1)


@triton.jit
def gate_up_kernel(x, chosen, packed, scale, h, M: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
                   ROWS: tl.constexpr, WORDS: tl.constexpr):
    b, a, n = tl.program_id(0), tl.program_id(1), tl.arange(0, 2 * ROWS)
    rows = b * ROWS + n // 2 + n % 2 * M
    first = tl.load(chosen + a).to(tl.int64) * 2 * M  # the first row of the expert
    sums = row_sums(packed + first * (D // 8), scale + first * (D // G), x, rows, 0, D // 8, D, G,
                    2 * ROWS, WORDS)
    gate, up = tl.split(tl.reshape(sums, (ROWS, 2)))
    to = h + a * M + b * ROWS + tl.arange(0, ROWS)
    tl.store(to, silu_times(gate, up, h.dtype.element_ty))


def gate_up(x, chosen, packed, scale):
    """silu(w1·x) ⊙ (w3·x): x (D), chosen (A), packed (E, 2M, D/8), scale (E, 2M, D/G) -> (A, M)."""
    A, M, D, G = len(chosen), packed.shape[1] // 2, len(x), len(x) // scale.shape[2]
    h, rows, words = x.new_empty(A, M), tile(M, ROWS // 2), tile(D // 8, WORDS)
    gate_up_kernel[(M // rows, A)](x, chosen, packed, scale, h, M, D, G, rows, words,
                                   num_warps=WARPS, num_stages=1)
    return h


@triton.jit
def down_kernel(h, chosen, weights, packed, scale, parts, M: tl.constexpr, D: tl.constexpr,
                G: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Program (b, s, a) takes part s of each row in block b of the rows of expert chosen[a]."""
    b, s, a = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = b * ROWS + tl.arange(0, ROWS)
    first = tl.load(chosen + a).to(tl.int64) * D
    size: tl.constexpr = tl.cdiv(M // 8 // WORDS, SPLITS) * WORDS
    sums = row_sums(packed + first * (M // 8), scale + first * (M // G), h + a * M, rows, s * size,
                    tl.minimum(M // 8, s * size + size), M, G, ROWS, WORDS)
    tl.store(parts + (a * SPLITS + s) * D + rows, tl.load(weights + a) * sums)


@triton.jit
def add_kernel(x, parts, y, D: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr):
    t: tl.constexpr = x.dtype.element_ty
    r, total = tl.program_id(0) * SIZE + tl.arange(0, SIZE), tl.zeros((SIZE,), tl.float32)
    for n in tl.static_range(PARTS):
        total += tl.load(parts + n * D + r)
    tl.store(y + r, (tl.load(x + r).to(tl.float32) + total.to(t).to(tl.float32)).to(t))


def down(h, chosen, weights, x, packed, scale):
    """x + Σ_a weights[a]·w2[chosen[a]]·h[a], of which `packed` and `scale` hold the matrices w2.

    h (A, M), chosen (A), weights (A), x (D), packed (E, D, M/8), scale (E, D, M/G) -> (D)

    Programs of 64 whole rows would be too few to fill the card. So each row is cut into parts, for
    about 512 programs in all, and a second kernel adds their results.
    """
    (A, M), D, G, y = h.shape, len(x), h.shape[1] // scale.shape[2], torch.empty_like(x)
    rows, words, size = tile(D, ROWS), tile(M // 8, WORDS), tile(D, 64)
    splits = max(1, min(M // 8 // words, PROGRAMS * rows // (A * D)))
    parts = x.new_empty(A * splits, D, dtype=torch.float32)
    down_kernel[(D // rows, splits, A)](h, chosen, weights, packed, scale, parts, M, D, G, splits,
                                        rows, words, num_warps=WARPS, num_stages=1)
    add_kernel[(D // size,)](x, parts, y, D, A * splits, size, num_warps=1)
    return y


@triton.jit
def unpack_kernel(packed, scale, w, count, G: tl.constexpr, SIZE: tl.constexpr):
    j, n = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE), tl.arange(0, 8)
    u = (tl.load(packed + j, j < count, 0)[:, None] >> (4 * n)[None, :]) & 15
    scales = tl.load(scale + 8 * j // G, j < count, 0.0).to(tl.float32)
    weights = (u - 8).to(tl.float32) * scales[:, None]
    tl.store(w + 8 * j[:, None] + n[None, :], weights.to(w.dtype.element_ty), (j < count)[:, None])


def unpack(packed, scale):
    """`unpack` of fast/int4.py in one pass: packed (M, D/8), scale (M, D/G) -> (M, D)."""
    (M, words), groups = packed.shape, scale.shape[1]
    if words % groups:  # a word with weights of several groups
        return int4.unpack(packed, scale)
    w, count = scale.new_empty(M, 8 * words), packed.numel()
    unpack_kernel[(cdiv(count, 1024),)](packed, scale, w, count, 8 * words // groups, 1024)
    return w
