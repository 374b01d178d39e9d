"""How is each weight read once, at the speed of the memory? By programs that stream whole rows.

This file computes one decode step of one text in Triton. To write one token, Mixtral 8x7B reads
12.75 billion weights, which are 25.5 GB in bfloat16, and uses each of them for one multiplication
and one addition. The memory of an H200 delivers 4.2 TB/s, as measured by a copy, and in the time in
which one weight arrives the card could multiply and add 15 times, or 190 times with its tensor
cores. So arithmetic is almost free, and a step takes as long as reading takes, which is
25.5 GB / 4.2 TB/s = 6.1 ms, or 165 tokens/s. This is the limit of one text. A kernel comes close to
it if it reads each weight once and never lets the memory idle.

Therefore much must be on its way at any time. Memory answers after about 1 µs, in which it could
deliver 4 MB, so each of the 132 processors should always have asked for 32 KB. The products of this
file reach that with one pattern. A program takes a few rows of a matrix and reads them whole, in
tiles of some rows and up to 1,024 columns. Neighbouring threads read neighbouring 16 bytes, and all
loads of a tile start before the first result is needed. Each weight is multiplied by its x in
registers. Every element of the tile has a float32 sum of its own, and only at the end of a row are
these sums added together. x itself is small and stays in the caches.

How to read Triton: a function under @triton.jit is a program, or a helper that programs call.
`kernel[(count,)](...)` starts that many programs, in any order, and program_id(0) tells a program
its number. Tensors become pointers. tl.load(pointer + offsets, mask, other) reads a tile, which is
a small tensor whose sides are powers of two, with `other` where the mask is false. The elements of
a tile are divided among the 32 · num_warps threads of a program. tl.dot multiplies two tiles on the
tensor cores, which take sides of 16 and more; input_precision="ieee" keeps float32 exact there. A
tl.constexpr is known when the kernel is compiled, and tl.static_range unrolls a loop then. The
letters are those of mixtral.py, and n is the length of a row.

Programs of one kernel cannot wait for each other, so a layer takes nine kernels:

    norm, product (q, k, v), rotate, attend, combine, product (o), route, gate_up, down

All compute in float32 and round where mixtral.py does.
"""

import math

import torch
import triton
import triton.language as tl
from triton import cdiv, next_power_of_2


def tile(n, most):
    """The largest power of two that divides n, up to `most`. Such tiles need no masks."""
    return min(n & -n, most)


def fits(layer):
    """Whether these kernels can compute a layer that `prepare` of fast/cuda.py has changed.

    `attention.qkv` is there a list: one merged matrix, or words and scales of matrices in 4 bits.
    """
    attention, gate = layer.self_attn, layer.block_sparse_moe.gate
    return (type(attention.o_proj) is type(gate) is torch.nn.Linear and attention.qkv is not None
            and len(attention.qkv) == 1 and gate.weight.dtype != torch.float64
            and math.prod(map(next_power_of_2, gate.weight.shape)) <= 2**20)  # the largest tile


# ------------------------------------------------------------------ norm and products


@triton.jit
def normed(x, weight, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """RMSNorm of x (D), followed by zeros up to BLOCK numbers."""
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, i < D, 0.0).to(tl.float32)
    v = (v * tl.rsqrt(tl.sum(v * v) / D + eps)).to(x.dtype.element_ty).to(tl.float32)
    return (tl.load(weight + i, i < D, 0.0).to(tl.float32) * v).to(x.dtype.element_ty)


@triton.jit
def norm_kernel(x, weight, y, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, normed(x, weight, eps, D, BLOCK), i < D)


def norm(x, rms):
    """The RMSNorm `rms` of one token: (D) -> (D)."""
    y, D = torch.empty_like(x), len(x)
    norm_kernel[(1,)](x, rms.weight, y, rms.eps, D, next_power_of_2(D), num_warps=8)
    return y


@triton.jit
def row_sums(w, x, rows, n: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Σ_c w[r, c]·x[c] for some rows r of a matrix with rows of n numbers."""
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, n, COLS):
        c = start + tl.arange(0, COLS)
        weights = tl.load(w + rows.to(tl.int64)[:, None] * n + c[None, :])
        sums += weights.to(tl.float32) * tl.load(x + c).to(tl.float32)[None, :]
    return tl.sum(sums, 1)


@triton.jit
def product_kernel(w, x, add, y, n: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = row_sums(w, x, r, n, ROWS, COLS).to(y.dtype.element_ty)
    if ADD:
        sums = sums.to(tl.float32) + tl.load(add + r).to(tl.float32)
    tl.store(y + r, sums.to(y.dtype.element_ty))


def product(w, x, add=None):
    """w·x, or add + w·x: w (R, n), x (n), add (R) -> (R).

    Tiles of 4 × 1,024 for 4 warps were the fastest of those measured. With them, 8 programs share a
    processor and each has 8 KB on the way, which is twice the 32 KB that are needed.
    """
    (R, n), y = w.shape, x.new_empty(len(w))
    rows, cols = tile(R, 4), tile(n, 1024)
    product_kernel[(R // rows,)](
        w, x, x if add is None else add,  # a kernel wants a pointer even if it does not read there
        y, n, add is not None, rows, cols, num_warps=4)
    return y


# ------------------------------------------------------------------ attention


@triton.jit
def rotate_kernel(qkv, cos, sin, slot, q, keys, values, H: tl.constexpr, K: tl.constexpr,
                  d: tl.constexpr, HALF: tl.constexpr):
    """Program h has head h of the H query, K key and K value heads, which lie behind each other."""
    h, i = tl.program_id(0), tl.arange(0, HALF)
    inside = i < d // 2
    first = tl.load(qkv + h * d + i, inside).to(tl.float32)
    second = tl.load(qkv + h * d + d // 2 + i, inside).to(tl.float32)
    c, s = tl.load(cos + i, inside), tl.load(sin + i, inside)
    to = q + h * d
    if h >= H + K:
        to = values + (tl.load(slot) * K + h - H - K) * d
        c, s = c * 0 + 1, s * 0  # a value is not rotated
    elif h >= H:
        to = keys + (tl.load(slot) * K + h - H) * d
    tl.store(to + i, (first * c - second * s).to(q.dtype.element_ty), inside)
    tl.store(to + d // 2 + i, (second * c + first * s).to(q.dtype.element_ty), inside)


def rotate(qkv, cos, sin, slot, keys, values, H):
    """The rotated queries. The rotated key and the value go directly into their slot of the cache.

    qkv ((H + 2K)·d), cos (d/2), sin (d/2), slot (1), keys (C, K, d), values (C, K, d) -> (H, d)
    """
    K, d = keys.shape[1:]
    q = qkv.new_empty(H, d)
    rotate_kernel[(H + 2 * K,)](qkv, cos, sin, slot, q, keys, values, H, K, d,
                                next_power_of_2(d // 2), num_warps=1)
    return q


@triton.jit
def attend_kernel(q, keys, values, positions, now, mixed, stats, C, window, K: tl.constexpr,
                  Q: tl.constexpr, d: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
                  PARTS: tl.constexpr, SLOTS: tl.constexpr):
    """Program (k, s) takes part s of the slots of key/value head k, for its Q = H/K queries.

    For each query it keeps the largest score m so far, Σ exp(score − m) and Σ exp(score − m)·v, and
    writes m and the first sum to `stats` and the second to `mixed`. When a tile has a larger score,
    both sums are multiplied by exp(old m − new m).
    """
    k, part = tl.program_id(0), tl.program_id(1)
    query, i = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    real = (query < Q)[:, None] & (i < d)[None, :]
    qs = tl.load(q + (k * Q + query)[:, None] * d + i[None, :], real, 0.0)
    position, factor = tl.load(now), 1 / tl.sqrt(d * 1.0)
    largest = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, WIDTH), tl.float32)
    size = tl.cdiv(tl.cdiv(C, PARTS), SLOTS) * SLOTS  # the slots of a part, in whole tiles
    for start in range(part * size, tl.minimum(C, part * size + size), SLOTS):
        j = start + tl.arange(0, SLOTS)
        p = tl.load(positions + j, j < C, -1)
        seen = (p >= 0) & (p <= position) & (p > position - window)
        at = (j[:, None].to(tl.int64) * K + k) * d + i[None, :]
        ks = tl.load(keys + at, seen[:, None] & (i < d)[None, :], 0.0)
        vs = tl.load(values + at, seen[:, None] & (i < d)[None, :], 0.0)
        scores = tl.dot(qs, tl.trans(ks), input_precision="ieee") * factor
        new = tl.maximum(largest, tl.max(tl.where(seen[None, :], scores, -1e30), 1))
        e = tl.where(seen[None, :], tl.exp(scores - new[:, None]), 0.0)
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(e, 1)
        sums = sums * shrink[:, None] + tl.dot(e.to(vs.dtype), vs, input_precision="ieee")
        largest = new
    to = (k * Q + query) * PARTS + part
    tl.store(mixed + to[:, None] * d + i[None, :], sums, real)
    tl.store(stats + 2 * to, largest, query < Q)
    tl.store(stats + 2 * to + 1, total, query < Q)


@triton.jit
def combine_kernel(mixed, stats, y, d: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Program h joins the parts s of head h: Σₛ exp(mₛ − m)·sumsₛ / Σₛ exp(mₛ − m)·totalₛ."""
    h, s, i = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, WIDTH)
    at = h * PARTS + s
    largest, total = tl.load(stats + 2 * at), tl.load(stats + 2 * at + 1)
    weight = tl.exp(largest - tl.max(largest))
    sums = tl.load(mixed + at[:, None] * d + i[None, :], (i < d)[None, :], 0.0)
    result = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight)
    tl.store(y + h * d + i, result.to(y.dtype.element_ty), i < d)


def attend(q, keys, values, positions, now, window):
    """softmax(q·kᵀ/√d)·v over the visible slots; `now` is the position of the token.

    q (H, d), keys (C, K, d), values (C, K, d), positions (1, C), now (1) -> (H·d)

    One program per key/value head would occupy 8 of 132 processors. So the slots are split into
    parts, for about 256 programs in all, and a second kernel joins the results of the parts.
    """
    (H, d), (C, K), y = q.shape, keys.shape[:2], q.new_empty(q.numel())
    width = max(16, next_power_of_2(d))
    slots = max(16, min(64, 2**14 // (width * q.itemsize)))  # 16 KB of keys are one tile
    parts = min(next_power_of_2(cdiv(C, slots)), next_power_of_2(cdiv(256, K)))
    mixed = q.new_empty(H, parts, d, dtype=torch.float32)
    stats = q.new_empty(H, parts, 2, dtype=torch.float32)
    attend_kernel[(K, parts)](q, keys, values, positions, now, mixed, stats, C, window or 2**40, K,
                              H // K, d, max(16, next_power_of_2(H // K)), width, parts, slots,
                              num_warps=4)
    combine_kernel[(H,)](mixed, stats, y, d, width, parts, num_warps=1)
    return y


# ------------------------------------------------------------------ the sparse mixture


@triton.jit
def route_kernel(x, weight, gate, y, chosen, weights, eps, D: tl.constexpr, BLOCK: tl.constexpr,
                 E: tl.constexpr, EXPERTS: tl.constexpr, A: tl.constexpr, CHOICES: tl.constexpr):
    i, e, a = tl.arange(0, BLOCK), tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    v = normed(x, weight, eps, D, BLOCK)
    tl.store(y + i, v, i < D)
    real = (e < E)[:, None] & (i < D)[None, :]
    rows = tl.load(gate + e[:, None] * D + i[None, :], real, 0.0).to(tl.float32)
    logits = tl.sum(rows * v.to(tl.float32)[None, :], 1).to(v.dtype).to(tl.float32)
    logits = tl.where(e < E, logits, -float("inf"))
    best, experts, sizes = tl.max(logits), tl.zeros_like(a), tl.zeros((CHOICES,), tl.float32)
    for n in tl.static_range(A):
        largest = tl.max(logits)
        # Of equal logits the first wins. If all are NaN, E − 1 does, a valid index.
        winner = tl.min(tl.where(logits == largest, e, E - 1))
        experts = tl.where(a == n, winner, experts)
        sizes = tl.where(a == n, tl.exp(largest - best), sizes)
        logits = tl.where(e == winner, -float("inf"), logits)
    tl.store(chosen + a, experts, a < A)
    tl.store(weights + a, sizes / tl.sum(sizes), a < A)


def route(x, rms, gate, A):
    """The normed token, its experts and their weights: x (D), gate (E, D) -> (D), (A), (A)."""
    (E, D), y, chosen = gate.shape, torch.empty_like(x), x.new_empty(A, dtype=torch.int32)
    weights = x.new_empty(A, dtype=torch.float32)
    route_kernel[(1,)](x, rms.weight, gate, y, chosen, weights, rms.eps, D, next_power_of_2(D),
                       E, next_power_of_2(E), A, next_power_of_2(A), num_warps=16)
    return y, chosen, weights


@triton.jit
def silu_times(gate, up, t: tl.constexpr):
    """silu(gate) ⊙ up in dtype t, rounded after each operation as in Expert.forward."""
    gate = gate.to(t).to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(t).to(tl.float32)
    return (gate * up.to(t).to(tl.float32)).to(t)


@triton.jit
def gate_up_kernel(x, chosen, w13, h, M: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr):
    """Program (b, a) takes block b of the rows of w1 and of w3 of the expert chosen[a]."""
    b, a, n = tl.program_id(0), tl.program_id(1), tl.arange(0, 2 * ROWS)
    rows = b * ROWS + n // 2 + n % 2 * M  # a row of w1, the same of w3, the next of w1, …
    w = w13 + tl.load(chosen + a).to(tl.int64) * 2 * M * D
    gate, up = tl.split(tl.reshape(row_sums(w, x, rows, D, 2 * ROWS, COLS), (ROWS, 2)))
    to = h + a * M + b * ROWS + tl.arange(0, ROWS)
    tl.store(to, silu_times(gate, up, h.dtype.element_ty))


def gate_up(x, chosen, w13):
    """silu(w1·x) ⊙ (w3·x) of the chosen experts: x (D), chosen (A), w13 (E, 2M, D) -> (A, M).

    w13 has the rows of w1 and then those of w3, and only those of the chosen experts are read. The
    kernel finds out on the card which these are, so the host need not know and never waits.
    """
    A, M, D = len(chosen), w13.shape[1] // 2, len(x)
    h, rows = x.new_empty(A, M), tile(M, 4)
    gate_up_kernel[(M // rows, A)](x, chosen, w13, h, M, D, rows, tile(D, 1024), num_warps=4)
    return h


@triton.jit
def down_kernel(h, chosen, weights, x, w2, y, M: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr):
    t: tl.constexpr = x.dtype.element_ty
    r, total = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.zeros((ROWS,), tl.float32)
    for a in range(A):
        w = w2 + tl.load(chosen + a).to(tl.int64) * D * M
        output = row_sums(w, h + a * M, r, M, ROWS, COLS).to(t).to(tl.float32)
        total += tl.load(weights + a) * output
    tl.store(y + r, (tl.load(x + r).to(tl.float32) + total.to(t).to(tl.float32)).to(t))


def down(h, chosen, weights, x, w2):
    """x + Σ_a weights[a]·w2[chosen[a]]·h[a].

    h (A, M), chosen (A), weights (A), x (D), w2 (E, D, M) -> (D)
    """
    (A, M), D, y = h.shape, len(x), torch.empty_like(x)
    rows = tile(D, 4)
    down_kernel[(D // rows,)](h, chosen, weights, x, w2, y, M, D, A, rows, tile(M, 1024),
                              num_warps=4)
    return y
