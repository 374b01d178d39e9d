"""How is each weight read once, at the speed of the memory? One decode step of one text in Triton.

To write one token, Mixtral 8x7B reads 12.75 billion weights, which are 25.5 GB in bfloat16, and
uses each of them for one multiplication and one addition. An H200 copies 4.2 TB/s, and in the time
in which it reads one weight it could do 380 such operations. So arithmetic is almost free, and a
step takes as long as reading takes: 25.5 GB / 4.2 TB/s = 6.1 ms, or 165 tokens/s. This is the limit
of one text. A kernel comes close to it if it reads each weight once and never lets the memory idle.

Therefore much must be on its way at any time. Memory answers after about 1 µs, in which it could
deliver 4 MB, so each of the 132 processors should always have asked for 32 KB. The products of this
file reach that with one pattern. A program takes a few rows of a matrix and reads them whole, in
tiles of some rows and up to 1,024 columns. Neighbouring threads read neighbouring 16 bytes, and all
loads of a tile start before the first result is needed. A weight meets its x in a register, where
float32 sums, one for each element of the tile, collect the products. They are added up at the end
of the row. x itself is small and stays in the caches.

How to read Triton: a function under @triton.jit is one program. `kernel[(n,)](...)` starts n of
them, in any order, and program_id(0) tells a program its number. Tensors become pointers, and
tl.load(pointer + offsets) reads a tile, a small tensor whose sides are powers of two. Its elements
are shared among the threads of the program, 32 times `num_warps`. A tl.constexpr is known when the
kernel is compiled. The letters are those of mixtral.py, and n is the length of a row.

Programs of one kernel cannot wait for each other, so a layer takes nine kernels:

    norm, product (q, k, v), rotate, attend, combine, product (o), route, gate_up, down

All compute in float32 and round where mixtral.py does.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv, next_power_of_2


def tile(n, most):
    """The largest power of two that divides n, up to `most`. Such tiles need no masks."""
    return min(n & -n, most)


def fits(layer):
    """Whether these kernels can compute a layer that fast.cuda has prepared."""
    attention, gate = layer.self_attn, layer.block_sparse_moe.gate
    router = next_power_of_2(gate.out_features) * next_power_of_2(gate.in_features)
    return (type(attention.o_proj) is type(gate) is torch.nn.Linear and attention.qkv is not None
            and len(attention.qkv) == 1  # not in 4 bits
            and gate.weight.dtype != torch.float64
            and router <= 2**20)  # the largest tile


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


def norm(x, layer):
    """RMSNorm of one token: (D) -> (D)."""
    y, D = torch.empty_like(x), len(x)
    norm_kernel[(1,)](x, layer.weight, y, layer.eps, D, next_power_of_2(D), num_warps=8)
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

    Tiles of 4 × 1,024 for 4 warps were the fastest of those measured. They let 8 programs, each of
    which has asked for 8 KB, share a processor.
    """
    (R, n), y = w.shape, x.new_empty(len(w))
    rows, cols = tile(R, 4), tile(n, 1024)
    product_kernel[(R // rows,)](w, x, x if add is None else add, y, n, add is not None, rows, cols,
                                 num_warps=4)
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

    qkv ((H + 2K)·d), cos (d/2), sin (d/2), slot (), keys (C, K, d), values (C, K, d) -> (H, d)
    """
    K, d = keys.shape[1:]
    q = qkv.new_empty(H, d)
    rotate_kernel[(H + 2 * K,)](qkv, cos, sin, slot, q, keys, values, H, K, d,
                                next_power_of_2(d // 2), num_warps=1)
    return q


@triton.jit
def attend_kernel(q, keys, values, positions, now, mixed, stats, C, window, K: tl.constexpr,
                  Q: tl.constexpr, d: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
                  SHARES: tl.constexpr, SLOTS: tl.constexpr):
    """Program (k, s) takes share s of the slots of key/value head k, for its Q = H/K queries.

    For each query it keeps the largest score m so far, Σ exp(score − m) and Σ exp(score − m)·v.
    When a tile has a larger score, both sums are multiplied by exp(old m − new m).
    """
    k, share = tl.program_id(0), tl.program_id(1)
    query, i = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    real = (query < Q)[:, None] & (i < d)[None, :]
    qs = tl.load(q + (k * Q + query)[:, None] * d + i[None, :], real, 0.0)
    position, factor = tl.load(now), 1 / tl.sqrt(d * 1.0)
    largest = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, WIDTH), tl.float32)
    size = tl.cdiv(tl.cdiv(C, SHARES), SLOTS) * SLOTS
    for start in range(share * size, tl.minimum(C, share * size + size), SLOTS):
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
    to = (k * Q + query) * SHARES + share
    tl.store(mixed + to[:, None] * d + i[None, :], sums, real)
    tl.store(stats + 2 * to, largest, query < Q)
    tl.store(stats + 2 * to + 1, total, query < Q)


@triton.jit
def combine_kernel(mixed, stats, y, d: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr):
    """Program h joins the shares s of head h: Σₛ exp(mₛ − m)·sumsₛ / Σₛ exp(mₛ − m)·totalₛ."""
    h, s, i = tl.program_id(0), tl.arange(0, SHARES), tl.arange(0, WIDTH)
    at = h * SHARES + s
    largest, total = tl.load(stats + 2 * at), tl.load(stats + 2 * at + 1)
    weight = tl.exp(largest - tl.max(largest))
    sums = tl.load(mixed + at[:, None] * d + i[None, :], (i < d)[None, :], 0.0)
    result = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight)
    tl.store(y + h * d + i, result.to(y.dtype.element_ty), i < d)


def attend(q, keys, values, positions, now, window):
    """softmax(q·kᵀ/√d)·v over the visible slots; `now` is the position of the token.

    q (H, d), keys (C, K, d), values (C, K, d), positions (C), now () -> (H·d)

    One program per key/value head would occupy 8 of 132 processors. So the slots are split into
    shares, for about 256 programs in all, and a second kernel joins the results of the shares.
    """
    (H, d), (C, K), y = q.shape, keys.shape[:2], q.new_empty(q.numel())
    width = max(16, next_power_of_2(d))
    slots = max(16, min(64, 2**14 // (width * q.itemsize)))  # 16 KB of keys are one tile
    shares = min(next_power_of_2(cdiv(C, slots)), next_power_of_2(cdiv(256, K)))
    mixed = q.new_empty(H, shares, d, dtype=torch.float32)
    stats = q.new_empty(H, shares, 2, dtype=torch.float32)
    attend_kernel[(K, shares)](q, keys, values, positions, now, mixed, stats, C, window or 2**40, K,
                               H // K, d, max(16, next_power_of_2(H // K)), width, shares, slots,
                               num_warps=4)
    combine_kernel[(H,)](mixed, stats, y, d, width, shares, num_warps=1)
    return y


# ------------------------------------------------------------------ the sparse mixture


@triton.jit
def route_kernel(x, weight, gate, y, chosen, share, eps, D: tl.constexpr, BLOCK: tl.constexpr,
                 E: tl.constexpr, EXPERTS: tl.constexpr, A: tl.constexpr, CHOICES: tl.constexpr):
    i, e, a = tl.arange(0, BLOCK), tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    v = normed(x, weight, eps, D, BLOCK)
    tl.store(y + i, v, i < D)
    real = (e < E)[:, None] & (i < D)[None, :]
    rows = tl.load(gate + e[:, None] * D + i[None, :], real, 0.0).to(tl.float32)
    logits = tl.sum(rows * v.to(tl.float32)[None, :], 1).to(v.dtype).to(tl.float32)
    logits = tl.where(e < E, logits, -float("inf"))
    best, experts, shares = tl.max(logits), tl.zeros_like(a), tl.zeros((CHOICES,), tl.float32)
    for n in tl.static_range(A):
        largest = tl.max(logits)
        winner = tl.min(tl.where(logits == largest, e, E - 1))  # of equal logits the first
        experts = tl.where(a == n, winner, experts)
        shares = tl.where(a == n, tl.exp(largest - best), shares)
        logits = tl.where(e == winner, -float("inf"), logits)
    tl.store(chosen + a, experts, a < A)
    tl.store(share + a, shares / tl.sum(shares), a < A)


def route(x, layer, gate, A):
    """The normed token, its experts and their weights: x (D), gate (E, D) -> (D), (A), (A)."""
    (E, D), y, chosen = gate.shape, torch.empty_like(x), x.new_empty(A, dtype=torch.int32)
    share = x.new_empty(A, dtype=torch.float32)
    route_kernel[(1,)](x, layer.weight, gate, y, chosen, share, layer.eps, D, next_power_of_2(D),
                       E, next_power_of_2(E), A, next_power_of_2(A), num_warps=16)
    return y, chosen, share


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

    Only their rows are read. The kernel finds out on the card which these are, so that the host
    need not know and never waits.
    """
    A, M, D = len(chosen), w13.shape[1] // 2, len(x)
    h, rows = x.new_empty(A, M), tile(M, 4)
    gate_up_kernel[(M // rows, A)](x, chosen, w13, h, M, D, rows, tile(D, 1024), num_warps=4)
    return h


@triton.jit
def down_kernel(h, chosen, share, x, w2, y, M: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr):
    t: tl.constexpr = x.dtype.element_ty
    r, total = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.zeros((ROWS,), tl.float32)
    for a in range(A):
        w = w2 + tl.load(chosen + a).to(tl.int64) * D * M
        output = row_sums(w, h + a * M, r, M, ROWS, COLS).to(t).to(tl.float32)
        total += tl.load(share + a) * output
    tl.store(y + r, (tl.load(x + r).to(tl.float32) + total.to(t).to(tl.float32)).to(t))


def down(h, chosen, share, x, w2):
    """x + Σ_a share[a]·w2[chosen[a]]·h[a].

    h (A, M), chosen (A), share (A), x (D), w2 (E, D, M) -> (D)
    """
    (A, M), D, y = h.shape, len(x), torch.empty_like(x)
    rows = tile(D, 4)
    down_kernel[(D // rows,)](h, chosen, share, x, w2, y, M, D, A, rows, tile(M, 1024), num_warps=4)
    return y
