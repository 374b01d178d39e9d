"""Mixtral 8x7B, whole: a decoder in which each token visits two of eight feed-forward experts.

The forward pass, of which everything below is a part:

    x = embed_tokens[token]
    for each layer:
        x = x + self_attn(input_layernorm(x))        gather from the visible tokens
        h = post_attention_layernorm(x)
        w, e = route(gate(h))                        choose two experts, and their weights
        x = x + Σᵢ wᵢ · expert[eᵢ](h)                the sparse mixture: the one new idea
    logits = lm_head(norm(x))

To see the new idea first, read `route` and `SparseMoE`; then from the top.

Key of letters, each with this one meaning in every shape line of the repository:

    letter  meaning                                 config field                8x7B
    B       rows of a batch                         -                              -
    S       tokens of a row in this call            -                              -
    T       keys that this call attends to          -                              -
    N       tokens of a call, rows joined: B·S      -                              -
    V       vocabulary                              vocab_size                 32000
    D       features of the residual stream         hidden_size                 4096
    L       layers                                  num_hidden_layers             32
    H       query heads                             num_attention_heads           32
    K       key and value heads                     num_key_value_heads            8
    d       features of a head                      head_dim                     128
    W       keys a query sees, itself included      sliding_window      null: no end
    C       slots of the rolling buffer             -                              -
    E       experts                                 num_local_experts              8
    k       experts that a token visits             num_experts_per_tok            2
    F       features inside an expert               intermediate_size          14336

Precision: `at_least_float32` is the whole rule. Norms, rotation, attention from its scores to its
mixed values, router weights and the sum over experts are float32 even where the weights are
bfloat16, and are rounded to the weights' dtype once, where the result leaves the function; linear
maps, the router's included, run in the weights' dtype. In a float64 model everything is float64.

Departures from the released code; none changes the result beyond rounding:
  * Softmax over the k chosen logits: equal to softmax over all E, renormalised over the chosen.
  * Equal router logits choose the lowest expert on every device; torch.topk promises no order.
  * Rotation pairs feature i with i + d/2, not 2i with 2i + 1: the Hugging Face checkpoint has the
    rows of q_proj and k_proj permuted to match, and a dot product is blind to order.
  * A query sees W keys, its own included; the mask of Mistral's one-file reference lets W + 1
    through in a prefill, and then disagrees with its own decoding.
  * Attention scores and expert sums stay float32 where others round them to bfloat16 in between.
  * Rotation angles are float64: at position 32767 a float32 angle is off by up to 2e-3.

Leaves out: dropout and router noise (zero in the release), rope scaling, tied embeddings,
quantisation, tensor and expert parallelism, devices without float64 (MPS).
Sources: "Mixtral of Experts" (arXiv 2401.04088), here "the paper"; "Mistral 7B" (arXiv 2310.06825)
for window and buffer; the released config.json and the names in its checkpoint.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class MixtralConfig:
    """The sizes of a model under the names of its config.json; the defaults are 8x7B's.

    Raises ValueError for a model that cannot be. Sources: (1) the paper's Table 1, under the name
    that follows if it differs; (2) the released config.json, for what the paper leaves open.
    """

    vocab_size: int = 32000  # (1)
    hidden_size: int = 4096  # (1) dim
    intermediate_size: int = 14336  # (1) hidden_dim, of one expert
    num_hidden_layers: int = 32  # (1) n_layers
    num_attention_heads: int = 32  # (1) n_heads
    num_key_value_heads: int = 8  # (1) n_kv_heads
    head_dim: int | None = None  # (1) 128; null means hidden_size / num_attention_heads
    num_local_experts: int = 8  # (1) num_experts
    num_experts_per_tok: int = 2  # (1) top_k_experts
    max_position_embeddings: int = 32768  # (1) context_len; a claim about training, not a limit
    sliding_window: int | None = None  # (2) null; 4096 in the first release
    rope_theta: float = 1e6  # (2)
    rms_norm_eps: float = 1e-5  # (2)
    hidden_act: str = "silu"  # (2) the S of SwiGLU
    tie_word_embeddings: bool = False  # (2)
    bos_token_id: int | None = 1  # (2)
    eos_token_id: int | None = 2  # (2)

    def __post_init__(self):
        for name, kind in type(self).__annotations__.items():
            value = getattr(self, name)
            if kind is int or (name in ("sliding_window", "head_dim") and value is not None):
                self._require(name, "an integer >= 1", type(value) is int and value >= 1)
            if kind is float:
                number = type(value) in (int, float)
                self._require(name, "a finite number > 0", number and 0 < value < math.inf)
        D, H, E = self.hidden_size, self.num_attention_heads, self.num_local_experts
        self._require("num_key_value_heads", f"a divisor of num_attention_heads {H}",
                      H % self.num_key_value_heads == 0)
        self._require("num_experts_per_tok", f"<= num_local_experts {E}",
                      self.num_experts_per_tok <= E)
        self._require("hidden_act", "'silu'", self.hidden_act == "silu")
        self._require("tie_word_embeddings", "false", self.tie_word_embeddings is False)
        if self.head_dim is None:
            self._require("num_attention_heads", f"a divisor of hidden_size {D}", D % H == 0)
            object.__setattr__(self, "head_dim", D // H)
        self._require("head_dim", "even", self.head_dim % 2 == 0)

    def _require(self, name, wanted, holds):
        if not holds:
            raise ValueError(f"config: {name} must be {wanted}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, raw):
        """Read the config.json of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        What does not shape the forward pass is ignored; an absent rope_theta means 1e6, not 1e4.
        """
        rope = {}
        for field in ("rope_scaling", "rope_parameters"):
            if not isinstance(raw.get(field), dict | None):
                raise ValueError(f"config: {field} must be an object or null, got {raw[field]!r}")
            rope |= raw.get(field) or {}
        for field, wanted, got in (
                ("model_type", "mixtral", raw.get("model_type", "mixtral")),
                ("rope_type", "default", rope.get("rope_type", rope.get("type", "default")))):
            if got != wanted:
                raise ValueError(f"config: {field} must be {wanted!r}, got {got!r}")
        raw = raw | {name: rope[name] for name in ("rope_theta",) if name in rope}
        return cls(**{f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw})


def at_least_float32(x):
    """The precision rule: bfloat16 and float16 widen to float32, float32 and float64 stay."""
    return x if x.dtype.itemsize >= 4 else x.to(torch.float32)


watch = None  # called with each probe's name and tensor while generate.trace runs


def probe(name, x):
    """Give back a quantity that no module returns; where a trace is made, show it there."""
    if watch is not None:
        watch(name, x)
    return x


# An AVX2 CPU multiplies 16-bit floats at 12 GFLOP/s and float32 at 100 (2 cores, 256 rows or more);
# from 5 rows on, widening the weight first is cheaper. It rounds as before: sums are float32.
WIDEN_ROWS = 5 if torch.backends.cpu.get_cpu_capability() == "AVX2" else math.inf


# F.linear of up to 256 rows leaves a core idle; 16 slices of the weight, as one batch of products,
# do not: they take 0.6 of its time at 1 row, 0.5 at 4, 0.7 at 64 (2 cores, float32, 3584 × 1024).
SLICES, FEW_ROWS = 16, 256


class Linear(nn.Linear):
    """W·x without a bias, the released weights' only kind; the one place to ask for the machine."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        rows = x.numel() // x.shape[-1]
        if not x.is_cpu or (x.dtype.itemsize < 4 and rows < WIDEN_ROWS):
            return F.linear(x, self.weight)
        wide, weight = at_least_float32(x), at_least_float32(self.weight)
        if rows > FEW_ROWS or len(weight) % (16 * SLICES):
            return F.linear(wide, weight).to(x.dtype)
        y = wide.reshape(1, rows, -1).expand(SLICES, -1, -1) @ weight.unflatten(0, (SLICES, -1)).mT
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1).to(x.dtype)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight, rounded before the weight as the released model does.

    (..., D) -> (..., D)
    """

    def __init__(self, D, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x):
        wide = at_least_float32(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def rotation(positions, d, theta):
    """Angle of pair i at position m: m · θ^(−2i/d), as cosine and sine for both of the pair.

    positions (B, S) -> (B, S, d), (B, S, d)

    In float64. The sine carries the minus that the first of a pair takes its partner with.
    """
    pair = torch.arange(0, d, 2, dtype=torch.float64, device=positions.device)
    angle = positions[..., None] * theta ** (-pair / d)
    sin = angle.sin()
    return angle.cos().repeat(1, 1, 2), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (xᵢ, xᵢ₊d/2) of every head by its angle: R(m)q · R(n)k depends on m − n only.

    x (B, S, ..., d), cos (B, S, d), sin (B, S, d) -> (B, S, ..., d)

    A feature's partner is half a head away, not its neighbour: the commonest bug of ports.
    """
    wide = at_least_float32(x)
    partner = wide.roll(x.shape[-1] // 2, dims=-1)
    return (wide * cos[:, :, None] + partner * sin[:, :, None]).to(x.dtype)


def visible(queries, keys, window):
    """Token i sees token j when i − W < j ≤ i: W keys, itself among them; W = None is all j ≤ i.

    queries (B, S), keys (B, T) -> (B, S, T)

    It compares positions, so it holds for any chunk of a text; a negative j is an empty slot.

    >>> visible(torch.tensor([[3]]), torch.tensor([[-1, 0, 1, 2, 3, 4]]), window=2).int().tolist()
    [[[0, 0, 0, 1, 1, 0]]]
    """
    i, j = queries[:, :, None], keys[:, None, :]
    causal = (j >= 0) & (j <= i)
    return causal if window is None else causal & (j > i - window)


def attend(q, k, v, mask):
    """softmax(q·kᵀ/√d)·v over the visible keys; query heads n·H/K … share key head n (GQA).

    q (B, S, H, d), k (B, K, T, d), v (B, K, T, d), mask (B, S, T) -> (B, S, H, d)

    The heads of a group are more rows of one product: K and V are never repeated in memory.
    """
    (B, S, H, d), K = q.shape, k.shape[1]
    rows = (at_least_float32(q) / math.sqrt(d)).transpose(1, 2).reshape(B, K, -1, d)
    scores = (rows @ at_least_float32(k).mT).view(B, H, S, -1)
    scores = probe("scores", scores.masked_fill_(~mask[:, None], -math.inf))
    probabilities = probe("probabilities", scores.softmax(dim=-1))
    mixed = probabilities.view(B, K, H // K * S, -1) @ at_least_float32(v)
    return probe("mixed", mixed.view(B, H, S, d).transpose(1, 2).to(q.dtype))


@dataclass
class Cache:
    """The rolling buffer: the key and value of position p live in slot p mod C, until overwritten.

    keys, values (L, B, K, C, d); lengths (B): tokens that each row has seen. C is W + chunk − 1: a
    chunk is written whole before its first query attends, which still needs the W − 1 before it;
    or max_length where that is smaller or there is no window. Nothing else is stored: which
    position a slot holds follows from the length. What padding writes lies beyond a row's length,
    where no query looks before the row's next tokens overwrite it.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    max_length: int
    chunk: int
    fed: int = 0  # columns fed so far, padding included: bounds every length without a device sync

    def held(self, last):
        """The latest position p ≤ last with p mod C = slot, for each used slot; negative: empty.

        last (B) -> (B, T)

        After 300 tokens, 0 … 299, fed one by one under W = 128, C is 128 and slot 3 holds 259:

        >>> cache = Cache(torch.empty(1, 1, 1, 128, 2), None, None, 300, chunk=1, fed=300)
        >>> cache.held(torch.tensor([299]))[0, 3:5].tolist()
        [259, 260]
        """
        C = self.keys.shape[3]
        last, used = last[:, None], min(C, self.fed)
        return last - (last - torch.arange(used, device=last.device)) % C

    def write(self, layer, k, v, slots):
        """Store a chunk and return all that its queries may attend to, in slot order.

        k (B, K, S, d), v (B, K, S, d), slots (B, S) -> (B, K, T, d), (B, K, T, d)
        """
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        used = min(self.keys.shape[3], self.fed)
        for buffer, new in ((self.keys[layer], k), (self.values[layer], v)):
            # Not scatter_, which for bfloat16 on a CPU copies the whole buffer first.
            buffer.transpose(1, 2)[rows, slots] = new.transpose(1, 2)
        return self.keys[layer][:, :, :used], self.values[layer][:, :, :used]


class Place(NamedTuple):
    """Where the tokens of one call stand, worked out once for all layers."""

    cos: Tensor  # (B, S, d)
    sin: Tensor  # (B, S, d)
    mask: Tensor  # (B, S, T)
    slots: Tensor | None  # (B, S), of the cache


class Attention(nn.Module):
    """Each token's query gathers the values of the visible tokens (Mistral 7B, section 2).

    (B, S, D) -> (B, S, D)
    """

    def __init__(self, config, layer):
        super().__init__()
        D, d, self.layer = config.hidden_size, config.head_dim, layer
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.heads = H, K
        self.q_proj = Linear(D, H * d)
        self.k_proj = Linear(D, K * d)
        self.v_proj = Linear(D, K * d)
        self.o_proj = Linear(H * d, D)

    def forward(self, x, place, cache=None):
        H, K = self.heads
        qk = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1).unflatten(-1, (H + K, -1))
        q, k = rotate(qk, place.cos, place.sin).split((H, K), dim=2)
        q, k = probe("q_rotated", q), probe("k_rotated", k).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (K, -1)).transpose(1, 2)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, place.slots)
        return self.o_proj(attend(q, k, v, place.mask).flatten(2))


def route(logits, k):
    """Softmax(TopK(x·W_g)): each token's k best experts and their weights (the paper's 2.1).

    logits (N, E) -> (N, k), (N, k)

    Weights come first, in at least float32, largest first, and sum to one; experts are their
    indices. Of equal logits the lowest index wins: the sort is stable, which topk is not. To choose
    before the softmax is to renormalise after it: softmax keeps the order of the logits, and the
    sum over all E cancels.

    >>> weights, experts = route(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), k=3)
    >>> experts.tolist(), [round(w, 4) for w in weights[0].tolist()]
    ([[1, 3, 2]], [0.4223, 0.4223, 0.1554])
    """
    chosen, experts = logits.sort(dim=-1, descending=True, stable=True)
    experts = probe("chosen", experts[:, :k])
    return probe("weights", at_least_float32(chosen[:, :k]).softmax(dim=-1)), experts


class Expert(nn.Module):
    """SwiGLU: w2(silu(w1·x) ⊙ w3·x). w1 gates, w3 carries: swapping them still trains and talks.

    (..., D) -> (..., D)
    """

    def __init__(self, D, F):
        super().__init__()
        self.w1 = Linear(D, F)
        self.w2 = Linear(F, D)
        self.w3 = Linear(D, F)

    def forward(self, x):
        return self.w2(probe("hidden", F.silu(self.w1(x)) * self.w3(x)))


class SparseMoE(nn.Module):
    """y = Σᵢ Softmax(Top2(x·W_g))ᵢ · SwiGLUᵢ(x)   (the paper's section 2.1).

    (B, S, D) -> (B, S, D)

    Visit n is one of token n // k. Visits are sorted by expert so that each expert that was hit
    runs once, over all its tokens; `order.argsort()`, the inverse of that permutation, puts the
    results back. There is no capacity: an expert takes as many tokens as chose it, none is dropped.
    """

    def __init__(self, config):
        super().__init__()
        D, E, self.k = config.hidden_size, config.num_local_experts, config.num_experts_per_tok
        self.gate = Linear(D, E)
        self.experts = nn.ModuleList(Expert(D, config.intermediate_size) for _ in range(E))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, experts = route(self.gate(tokens), self.k)
        visits = experts.flatten()
        order = visits.argsort(stable=True)
        loads = visits.bincount(minlength=len(self.experts)).tolist()
        groups = zip(self.experts, tokens[order // self.k].split(loads), strict=True)
        y = torch.cat([expert(group) for expert, group in groups if len(group)])
        y = y[order.argsort()].unflatten(0, (-1, self.k)) * weights[..., None]
        return y.sum(dim=1).to(x.dtype).view_as(x)


class Block(nn.Module):
    """x + attention of x, then + mixture of that, each behind its norm: the residual stream.

    (B, S, D) -> (B, S, D)
    """

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = SparseMoE(config)

    def forward(self, x, place, cache=None):
        x = probe("residual", x + self.self_attn(self.input_layernorm(x), place, cache))
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Tokens in, normed residual stream out: all of the model but its last linear map.

    tokens (B, S), lengths (B) -> (B, S, D)
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # nn.Embedding's own normal_ start would, on the meta device, take 1.5 s of imports.
        start = torch.rand(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(start, freeze=False)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens, cache=None, lengths=None):
        B, S = tokens.shape
        positions = keys = torch.arange(S, device=tokens.device).expand(B, S)
        slots = None
        if cache is not None:
            positions = positions + cache.lengths[:, None]
            cache.fed += S  # before `held`: the slots of this call count as used
            keys, slots = cache.held(positions[:, -1]), positions % cache.keys.shape[3]
        x = self.embed_tokens(tokens)
        angles = rotation(positions, self.config.head_dim, self.config.rope_theta)
        cos, sin = (part.to(at_least_float32(x).dtype) for part in angles)
        place = Place(cos, sin, visible(positions, keys, self.config.sliding_window), slots)
        for layer in self.layers:
            x = layer(x, place, cache)
        if cache is not None:
            cache.lengths += S if lengths is None else lengths
        return self.norm(x)


class Mixtral(nn.Module):
    """The language model: logits of the next token after every token.

    tokens (B, S) -> (B, S, V)
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def new_cache(self, batch_size, max_length, chunk=256):
        """An empty rolling buffer for rows of up to max_length tokens, fed in pieces of chunk."""
        c, weight = self.config, self.lm_head.weight
        for size in (batch_size, max_length, chunk):
            if type(size) is not int or size < 1:
                raise ValueError("cache: batch_size, max_length and chunk must be integers >= 1, "
                                 f"got {batch_size}, {max_length} and {chunk}")
        C = min(max_length, (c.sliding_window or max_length) + chunk - 1)
        shape = (c.num_hidden_layers, batch_size, c.num_key_value_heads, C, c.head_dim)
        lengths = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return Cache(weight.new_zeros(shape), weight.new_zeros(shape), lengths, max_length, chunk)

    def forward(self, tokens, cache=None, lengths=None, last_only=False):
        """Logits in at least float32; last_only gives each row's last alone, as (B, 1, V).

        A cache continues every row where its earlier calls ended. `lengths` (B) says how many
        tokens of a row are real; the rest, on the right, is padding: real tokens never see it and
        the cache forgets it, but its own logits, and the last of an empty row, mean nothing.
        """
        lengths = self._check(tokens, cache, lengths)
        B, S = tokens.shape
        chunk = S if cache is None else cache.chunk
        hidden = torch.cat([
            self.model(tokens[:, at:at + chunk], cache, (lengths - at).clamp(0, chunk))
            for at in range(0, S, chunk)], dim=1)
        if last_only:
            hidden = hidden[torch.arange(B, device=tokens.device), lengths.clamp(1) - 1][:, None]
        return at_least_float32(self.lm_head(hidden))

    def _check(self, tokens, cache, lengths):
        V = self.config.vocab_size
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or not tokens.numel():
            raise ValueError("tokens must be int64 of shape (B, S), at least one, got "
                             f"{tokens.dtype} of shape {tuple(tokens.shape)}")
        least, most = tokens.aminmax()
        if least < 0 or most >= V:
            wrong = tokens[(tokens < 0) | (tokens >= V)][0]
            raise ValueError(f"tokens must be in 0 … {V - 1}, got {wrong}")
        B, S = tokens.shape
        if cache is not None and (len(cache.lengths) != B or cache.fed + S > cache.max_length):
            raise ValueError(
                f"cache: {len(cache.lengths)} rows with room for {cache.max_length - cache.fed} of "
                f"{cache.max_length} tokens, got {B} rows of {S}; see new_cache")
        if lengths is None:
            return tokens.new_full((B,), S)
        if lengths.shape != (B,) or lengths.min() < 0 or lengths.max() > S:
            raise ValueError(f"lengths must be {B} integers in 0 … {S}, got {lengths.tolist()}")
        return lengths

    @classmethod
    def from_pretrained(cls, directory, dtype=None, device="cpu", through=iter):
        """Load a Hugging Face directory: every parameter is assigned exactly once.

        dtype None keeps the checkpoint's, and on the CPU leaves the weights mapped from disk. All
        names and tensors pass `through`, which may count them for a progress bar.
        Raises ValueError naming every missing, unknown, repeated or mis-shaped tensor.
        """
        directory = Path(directory)
        files = weight_files(directory)
        with torch.device("meta"):
            model = cls(MixtralConfig.from_dict(read_json(directory / "config.json")))
        if wrong := model._assign(through(stored_tensors(files, device)), dtype):
            raise ValueError(f"{directory}: does not fit its config.json: {'; '.join(wrong)}")
        return model.eval()

    def _assign(self, tensors, dtype):
        wanted, wrong, dtypes = dict(self.named_parameters()), [], set()
        for name, tensor in tensors:
            if name not in wanted:
                wrong.append(f"unknown or repeated {name}")
                continue
            expected, shape = list(wanted.pop(name).shape), list(tensor.get_shape())
            if shape != expected:
                wrong.append(f"{name} has shape {shape}, not {expected}")
            elif not wrong:
                weight = tensor[...].to(dtype)
                dtypes.add(weight.dtype)
                module, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(module), leaf, nn.Parameter(weight, False))
        if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
            wrong.append(f"dtypes {sorted(map(str, dtypes))}: wanted one of floats, or dtype=…")
        return wrong + [f"missing {name}" for name in wanted]


def stored_tensors(files, device):
    """Each name and unread tensor of some safetensors files. Raises ValueError if one is cut."""
    for file in files:
        try:
            with safe_open(file, framework="pt", device=str(device)) as stored:
                for name in stored.keys():
                    yield name, stored.get_slice(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from None


def read_json(path):
    """The object in a JSON file. Raises ValueError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted a JSON object, got {type(content).__name__}")
    return content


def weight_files(directory):
    """The safetensors files of a directory, from its index or the single one.

    Raises ValueError where they are not there: with the command to run for raw Mistral weights.
    """
    index, names = directory / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: wanted weight_map, an object from tensors to files")
        names = sorted(set(map(str, weight_map.values())))
    absent = [n for n in names if Path(n).name != n or not (directory / n).is_file()]
    if not absent:
        return [directory / name for name in names]
    if any(found for raw in ("consolidated.*", "*.bin") for found in directory.glob(raw)):
        raise ValueError(f"{directory}: not in the Hugging Face layout; convert it first: python "
                         f"convert.py --input_dir {directory} --output_dir {directory.name}-hf")
    raise ValueError(f"{directory}: wanted a directory with config.json and safetensors weights, "
                     f"not found: {', '.join(absent)}")
