"""Mixtral 8x7B: a transformer decoder whose feed-forward layers are sparse mixtures of experts.

Every layer holds eight feed-forward networks, called experts, and a router that sends each token
to two of them. The model stores 46.7 billion parameters and uses 12.9 billion of them for a token.
Both numbers count the whole embedding. Everything else is an ordinary dense transformer:

    x = embed_tokens[tokens]
    for each layer:
        x = x + self_attn(input_layernorm(x))
        x = x + block_sparse_moe(post_attention_layernorm(x))    # the sparse mixture of experts
    logits = lm_head(norm(x))

In the shapes of this repository, each letter has one meaning:

    letter  meaning                                   field in config.json       8x7B
    B       rows (sequences) of the batch             -                             -
    S       tokens per row of a call, or of a chunk   -                             -
    T       keys per row that queries can attend to   -                             -
    N       tokens of all rows, N = B·S               -                             -
    V       size of the vocabulary                    vocab_size                32000
    D       width of a hidden state                   hidden_size                4096
    L       layers                                    num_hidden_layers            32
    H       query heads                               num_attention_heads          32
    K       key/value heads                           num_key_value_heads           8
    d       width of a head                           head_dim                    128
    W       sliding window, in tokens                 sliding_window             null
    C       slots per row of the cache                -                             -
    E       experts per layer                         num_local_experts             8
    A       active experts, those used for a token    num_experts_per_tok           2
    R       tokens routed to one expert               -                             -
    M       inner width of an expert                  intermediate_size         14336
    G       neighbouring weights with one scale       -                             -

Precision: linear layers, attention, activations and residual sums take and give the dtype of the
weights. RMSNorm, rotation, the router's softmax and the weighted sum over experts compute in at
least float32. RMSNorm and rotation round to the dtype of the weights, and RMSNorm does so before it
multiplies by its weight. The softmax is not rounded, and the sum is rounded once, when it is
complete. In a float64 model every floating-point number is float64.

A paragraph "Difference:" names a result that differs from the released code by more than rounding.

Sources: "Mixtral of Experts" (arxiv.org/abs/2401.04088), here the paper; "Mistral 7B"
(arxiv.org/abs/2310.06825); the released code (github.com/mistralai/mistral-inference).
"""

import dataclasses
import json
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class MixtralConfig:
    """Hyperparameters, named as in config.json; the defaults are those of Mixtral 8x7B.

    Raises ValueError for impossible values.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None  # None means hidden_size / num_attention_heads
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 32768  # the context length in training; it is not enforced
    sliding_window: int | None = None  # None: a token sees itself and all earlier tokens
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self):
        check_config(self)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @classmethod
    def from_dict(cls, raw):
        """Read a config.json of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Only rope_parameters, rope_scaling and model_type are read besides MixtralConfig's fields.
        """
        raw = raw | {"rope_theta": read_rope_theta(raw, default=cls.rope_theta)}
        return cls(**{f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw})


def at_least_float32(x):
    """The precision rule: bfloat16 and float16 become float32; float32 and float64 are kept."""
    return x if x.dtype.itemsize >= 4 else x.to(torch.float32)


def route(logits, top_k):
    """The weights and the indices of the experts of each token (the paper, section 2.1).

    logits (N, E) -> (N, A), (N, A)

    The weights are Softmax(TopK(logits)), the largest first, and sum to one. `transformers` takes
    the softmax over all E experts, keeps the best A and divides by their sum. The result is the
    same, because softmax keeps the order of the logits and the sum over all experts cancels.

    Difference: of equal logits, the expert with the lower index is chosen first, because the sort
    is stable. The released code uses torch.topk, which promises no order.

    >>> weights, chosen = route(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), top_k=3)
    >>> chosen.tolist(), [round(w, 4) for w in weights[0].tolist()]
    ([[1, 3, 2]], [0.4223, 0.4223, 0.1554])
    """
    sorted_logits, experts = logits.sort(dim=-1, descending=True, stable=True)
    weights = at_least_float32(sorted_logits[:, :top_k]).softmax(dim=-1)
    return weights, experts[:, :top_k]


class Expert(nn.Module):
    """SwiGLU(x) = w2·(silu(w1·x) ⊙ (w3·x)), a feed-forward network with a gate.

    (..., D) -> (..., D)

    w1 is the gate projection, w3 the up projection and w2 the down projection. The router is
    another gate, `SparseMoE.gate`. w1 and w3 have the same shape, so a checkpoint in which they are
    exchanged loads without an error.
    """

    def __init__(self, D, M):
        super().__init__()
        self.w1 = nn.Linear(D, M, bias=False)
        self.w2 = nn.Linear(M, D, bias=False)
        self.w3 = nn.Linear(D, M, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseMoE(nn.Module):
    """y = Σₑ weightₑ · SwiGLUₑ(x), summed over the A chosen experts e of a token.

    (B, S, D) -> (B, S, D)

    This is the last equation in section 2.1 of the paper. Each expert that was chosen runs once, on
    all tokens that chose it. For 3 tokens, 4 experts and A = 2, the choices
    [[1, 3], [0, 1], [3, 2]] give this loop:

        expert 0 runs on token 1            expert 2 runs on token 2
        expert 1 runs on tokens 0 and 1     expert 3 runs on tokens 0 and 2

    An expert takes every token that chose it, so no token is dropped. Some other implementations
    give every expert a buffer for a fixed number of tokens, which is a capacity factor times the
    average A·N/E. A token that finds the buffer full is dropped: it misses that expert's output.
    """

    def __init__(self, config):
        super().__init__()
        D, E, self.top_k = config.hidden_size, config.num_local_experts, config.num_experts_per_tok
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(Expert(D, config.intermediate_size) for _ in range(E))

    def forward(self, x):
        tokens = x.flatten(0, 1)  # (N, D)
        weights, chosen = route(self.gate(tokens), self.top_k)  # (N, A), (N, A)
        y = torch.zeros_like(at_least_float32(tokens))  # (N, D)
        for e in sorted(set(chosen.flatten().tolist())):
            token, column = (chosen == e).nonzero(as_tuple=True)  # (R), (R)
            output = self.experts[e](tokens[token])  # (R, D)
            y.index_add_(0, token, weights[token, column, None] * output)  # y[token] += …
        return y.to(x.dtype).view(x.shape)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight.

    (..., D) -> (..., D)

    As in the released code, the quotient is rounded to the dtype of x before it is multiplied.
    """

    def __init__(self, D, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x):
        wide = at_least_float32(x)
        scale = torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def rotation(positions, d, theta):
    """The cosine and sine of the angle m·θ^(−2i/d), for every position m and pair i < d/2.

    positions (B, S) -> (B, S, 1, d/2), (B, S, 1, d/2)

    The axis of size 1 broadcasts over the heads, which turn by the same angles. Angles are float64,
    because near position 30,000 a float32 angle is wrong by up to 2e-3 radians.
    """
    frequencies = theta ** (-torch.arange(0, d, 2, device=positions.device).double() / d)
    angles = positions[:, :, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary position embedding: turn the pair (x[i], x[i + d/2]) of every head by its angle.

    x (B, S, H, d), cos (B, S, 1, d/2), sin (B, S, 1, d/2) -> (B, S, H, d)

    Keys have K heads instead of H. The product of a rotated query and a rotated key depends on
    their positions only through their distance. The released code pairs the neighbours x[2i] and
    x[2i+1]. Hugging Face checkpoints store the rows of q_proj and k_proj in an order that pairs
    halves instead. The products q·k are the same.
    """
    first, second = at_least_float32(x).tensor_split(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def visible(queries, keys, window):
    """The mask: a query at position i sees the keys at positions j with i − W < j ≤ i.

    queries (B, S), keys (B, T) -> (B, S, T)

    `queries` and `keys` hold positions. A query sees at most W keys, its own included. If W is
    None, it sees all j ≤ i. The position −1 marks an empty slot of the cache, which no query sees.

    Difference: in `moe_one_file_ref.py` of the released code, a query sees W + 1 keys while a
    prompt is read.

    >>> visible(torch.tensor([[9]]), torch.tensor([[5, 6, 7, 8, 9, 10, -1]]), window=4).tolist()
    [[[False, True, True, True, True, False, False]]]
    """
    i, j = queries[:, :, None], keys[:, None, :]
    mask = (j >= 0) & (j <= i)
    return mask if window is None else mask & (j > i - window)


def attend(q, k, v, mask):
    """softmax(q·kᵀ/√d + mask)·v, with grouped queries (Mistral 7B, section 2).

    q (B, S, H, d), k (B, T, K, d), v (B, T, K, d), mask (B, 1, S·H/K, T) -> (B, S, H·d)

    The mask holds 0 where a query sees a key, and −∞ elsewhere. Query head h uses key/value head
    h // (H/K), so H/K neighbouring query heads share one. They are treated as H/K queries of one
    head. These queries and the rows of the mask are ordered by token, with H/K rows for each token.
    In bfloat16, PyTorch computes scores and softmax in float32 and may round the probabilities.
    """
    (B, S, H, d), K = q.shape, k.shape[2]
    q = q.view(B, S, K, H // K, d).transpose(1, 2).flatten(2, 3)  # (B, K, S·H/K, d)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, T, d)
    mixed = F.scaled_dot_product_attention(q, k, v, mask)  # (B, K, S·H/K, d)
    return mixed.view(B, K, S, H // K, d).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """o_proj·attend(q, k, v), where q = q_proj·x and k = k_proj·x are rotated and v = v_proj·x.

    (B, S, D) -> (B, S, D)

    `remember(k, v)` returns all keys and values to attend to, those of a cache included.
    """

    def __init__(self, config):
        super().__init__()
        H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D, self.head_dim = config.hidden_size, d
        self.q_proj = nn.Linear(D, H * d, bias=False)
        self.k_proj = nn.Linear(D, K * d, bias=False)
        self.v_proj = nn.Linear(D, K * d, bias=False)
        self.o_proj = nn.Linear(H * d, D, bias=False)

    def forward(self, x, cos, sin, mask, remember):
        split = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(split), cos, sin)  # (B, S, H, d)
        k = rotate(self.k_proj(x).view(split), cos, sin)  # (B, S, K, d)
        v = self.v_proj(x).view(split)  # (B, S, K, d)
        k, v = remember(k, v)  # (B, T, K, d)
        return self.o_proj(attend(q, k, v, mask))


class Block(nn.Module):
    """One layer: h = x + attention(norm(x)), then h + moe(norm(h)).

    (B, S, D) -> (B, S, D)
    """

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = SparseMoE(config)

    def forward(self, x, cos, sin, mask, remember):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, remember)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything except the output projection; returns the final hidden states.

    tokens (B, S), lengths (B) -> (B, S, D)

    `lengths` counts the real tokens of each row. Only the cache needs it, to leave out padding.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # On the device "meta", nn.Embedding(V, D) triggers imports that take 2 s;
        # nn.Embedding.from_pretrained does not.
        table = torch.rand(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens, lengths, cache=None):
        (B, S), c = tokens.shape, self.config
        positions = torch.arange(S, device=tokens.device).expand(B, S)
        if cache is None:
            key_positions, remember = positions, (lambda layer, k, v: (k, v))
        else:
            positions = positions + cache.lengths[:, None]
            key_positions, remember = cache.extend(positions, lengths)
        x = self.embed_tokens(tokens)  # (B, S, D)
        angles = rotation(positions, c.head_dim, c.rope_theta)
        cos, sin = (part.to(at_least_float32(x).dtype) for part in angles)
        seen = visible(positions, key_positions, c.sliding_window)  # (B, S, T)
        mask = seen.to(x.dtype).log()[:, None]  # (B, 1, S, T); log 1 = 0, log 0 = −∞
        group = c.num_attention_heads // c.num_key_value_heads
        mask = mask.repeat_interleave(group, dim=2)  # (B, 1, S·H/K, T)
        for n, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, partial(remember, n))
        return self.norm(x)


class Mixtral(nn.Module):
    """The language model: the logits of the token that follows each token.

    tokens (B, S) -> (B, S, V)
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def new_cache(self, batch_size, max_length, chunk=256):
        """An empty cache for rows of up to `max_length` tokens, read `chunk` tokens at a time."""
        c, weight = self.config, self.lm_head.weight
        if any(type(size) is not int or size < 1 for size in (batch_size, max_length, chunk)):
            raise ValueError("new_cache: batch_size, max_length and chunk must be integers >= 1, "
                             f"got {batch_size!r}, {max_length!r} and {chunk!r}")
        C = min(max_length, (c.sliding_window or max_length) + chunk - 1)
        shape = (c.num_hidden_layers, 2, batch_size, C, c.num_key_value_heads, c.head_dim)
        positions = torch.full((batch_size, C), -1, device=weight.device)
        return Cache(weight.new_zeros(shape), positions, max_length, chunk)

    def forward(self, tokens, cache=None, lengths=None, last_only=False):
        """The logits (B, S, V), or with `last_only` (B, 1, V), widened to at least float32.

        With a cache, every row continues where its earlier calls ended, and the tokens are read in
        chunks of `cache.chunk`. `lengths` (B) is the number of real tokens of each row; the tokens
        after them are padding. No real token sees the padding, and the cache does not store it. A
        short row therefore gives what it would give alone, up to rounding. `last_only` selects the
        last real token of each row. The logits of padding or of an empty row mean nothing.
        """
        check_tokens(tokens, self.config.vocab_size)
        B, S = tokens.shape
        lengths = tokens.new_full((B,), S) if lengths is None else lengths
        check_lengths(lengths, B, S, cache)
        chunk = S if cache is None else cache.chunk
        hidden = []
        for start in range(0, S, chunk):
            count = (lengths - start).clamp(0, chunk)  # real tokens of each row in this chunk
            hidden.append(self.model(tokens[:, start:start + chunk], count, cache))
        hidden = torch.cat(hidden, dim=1)  # (B, S, D)
        if last_only:
            last = lengths.clamp(min=1) - 1
            hidden = hidden[torch.arange(B, device=last.device), last][:, None]  # (B, 1, D)
        return at_least_float32(self.lm_head(hidden))

    @classmethod
    def from_pretrained(cls, directory, dtype=None, device="cpu"):
        """Load a directory in the Hugging Face layout: config.json and model*.safetensors.

        With dtype None the weights keep their dtype, and on a CPU they stay memory-mapped files.
        Raises ValueError if a file is damaged or if weights do not fit config.json.
        """
        weights = read_weights(weight_files(directory))
        weights = {name: convert_floats(weight, dtype, device) for name, weight in weights.items()}
        return assemble(read_json(Path(directory) / "config.json"), weights)


@dataclass
class Cache:
    """The rolling buffer (Mistral 7B, section 2): position p is stored in slot p mod C.

    keys_and_values (L, 2, B, C, K, d), positions (B, C)

    `positions` holds the position in each slot, and −1 in an empty slot. If 300 tokens are read
    one by one into C = 128 slots, slot 3 holds position 3, then 131, and finally 259 = 2·128 + 3.

    Mixtral.forward reads `chunk` tokens at a time, and stores them before their queries attend. If
    all max_length tokens fit into W + chunk − 1 slots, or if there is no window, C = max_length and
    no slot is used twice. Otherwise C = W + chunk − 1. Then the last token of a full chunk that
    begins at position p overwrites position p + chunk − 1 − C = p − W, and the other tokens
    overwrite older ones. The queries of the chunk need positions from p − W + 1 on.
    """

    keys_and_values: Tensor
    positions: Tensor
    max_length: int
    chunk: int

    @property
    def lengths(self):
        """The number of tokens that each row has read, (B)."""
        return self.positions.amax(dim=1) + 1

    def extend(self, positions, lengths):
        """Reserve slots for the next tokens of each row, of which `lengths` are real.

        positions (B, S), lengths (B) -> (B, T)

        Returns the positions to attend to, and a function `remember(layer, k, v)` that stores k and
        v (B, S, K, d) and returns all keys and values to attend to (2, B, T, K, d). Padding is not
        stored, so no later query can see it.
        """
        C, S = self.positions.shape[1], positions.shape[1]
        real = torch.arange(S, device=positions.device) < lengths[:, None]  # (B, S)
        row, column = torch.where(real)
        position = positions[row, column]
        slot = position % C
        self.positions[row, slot] = position
        T = min(C, max(0, int(self.positions.max())) + 1)  # at least 1; slots from T on are empty

        def remember(layer, k, v):
            stored = self.keys_and_values[layer]
            stored[:, row, slot] = torch.stack((k, v))[:, row, column]
            return stored[:, :, :T]

        return self.positions[:, :T], remember


def one_line(error):
    """The text of an error as one line of printable characters, cut to 2,000 characters."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "?" for c in text)[:2000]


def read_json(path):
    """The object in a JSON file. Raises ValueError if there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: not readable as JSON: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def read_rope_theta(raw, default):
    """The rope_theta of a config.json. Raises ValueError for scaled rotation or another model."""
    rope = {"rope_theta": raw.get("rope_theta", default)}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), dict | None):
            raise ValueError(f"config: {name} must be an object or null, got {raw[name]!r:.80}")
        rope |= raw.get(name) or {}
    for name, wanted, value in (
            ("model_type", "mixtral", raw.get("model_type", "mixtral")),
            ("rope_type", "default", rope.get("rope_type", rope.get("type", "default")))):
        if value != wanted:
            raise ValueError(f"config: {name} must be {wanted!r}, got {value!r:.80}")
    return rope["rope_theta"]


def check_config(config):
    """Raises ValueError naming the first impossible field. Every size has an upper bound."""
    def check(name, wanted, holds):
        if not holds:
            raise ValueError(f"config: {name} must be {wanted}, got {getattr(config, name)!r:.80}")

    c = config
    for name, kind in type(c).__annotations__.items():
        value, optional = getattr(c, name), kind == (int | None)
        low = 0 if name.endswith("token_id") else 1
        if kind is float:
            check(name, "a number > 0 and < 2**63",
                  type(value) in (int, float) and 0 < value < 2**63)
        elif kind is int or (optional and value is not None):
            check(name, f"an integer in {low} … {2**20}{' or null' if optional else ''}",
                  type(value) is int and low <= value <= 2**20)
    D, d, E = c.hidden_size, c.head_dim, c.num_local_experts
    H, K = c.num_attention_heads, c.num_key_value_heads
    check("num_local_experts", f"<= {2**14} / num_hidden_layers", E * c.num_hidden_layers <= 2**14)
    check("num_experts_per_tok", f"<= num_local_experts {E}", c.num_experts_per_tok <= E)
    check("num_key_value_heads", f"a divisor of num_attention_heads {H}", H % K == 0)
    check("hidden_size", f"an even multiple of num_attention_heads {H}", d or D % (2 * H) == 0)
    check("head_dim", "even", d is None or d % 2 == 0)
    check("hidden_act", "'silu'", c.hidden_act == "silu")
    check("tie_word_embeddings", "false", c.tie_word_embeddings is False)


def check_tokens(tokens, V):
    """Raises ValueError unless the tokens are a batch of ids of the vocabulary."""
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError("tokens must be int64 of shape (B, S) with at least one token, got "
                         f"{tokens.dtype} of shape {tuple(tokens.shape)}")
    if wrong := [token for row in tokens.tolist() for token in row if not 0 <= token < V]:
        raise ValueError(f"tokens must be in 0 … {V - 1}, got {wrong[0]}")


def check_lengths(lengths, B, S, cache):
    """Raises ValueError unless the lengths fit the batch and the cache has room for them."""
    well_formed = lengths.shape == (B,) and lengths.dtype == torch.int64
    if not (well_formed and all(0 <= length <= S for length in lengths.tolist())):
        raise ValueError(f"lengths must be {B} int64 numbers in 0 … {S}, got {lengths.dtype} "
                         f"{lengths.tolist()}")
    if cache is None:
        return
    if len(cache.positions) != B:
        raise ValueError(f"cache: it has {len(cache.positions)} rows, got {B} rows of tokens")
    longest = int((cache.lengths + lengths).max())
    if longest > cache.max_length:
        raise ValueError(f"cache: it has room for {cache.max_length} tokens per row, got "
                         f"{longest}; pass a larger max_length to new_cache")


def weight_files(directory):
    """The model*.safetensors files of a directory. Raises ValueError if there are none."""
    files = sorted(Path(directory).glob("model*.safetensors"))
    if not files:
        source = shlex.quote(str(directory))
        raise ValueError(f"{directory}: no model*.safetensors there; to convert Mistral's weights "
                         f"run: python convert.py --input_dir {source} --output_dir converted")
    return files


def read_weights(files):
    """All tensors of some safetensors files by name. They are memory-mapped.

    Raises ValueError if a file is damaged or a name repeats.
    """
    weights = {}
    for file in files:
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            reason = one_line(error)
            raise ValueError(f"{file}: not a complete safetensors file: {reason}") from None
        for name, tensor in tensors.items():
            if name in weights:
                raise ValueError(f"{file}: {name} is in an earlier file too")
            if not tensor.is_floating_point() and name.endswith((".weight", "_scale")):
                raise ValueError(f"{file}: {name} must be floating-point, got {tensor.dtype}")
        weights |= tensors
    return weights


def convert_floats(weight, dtype, device):
    """Move a tensor to a device, and into a dtype if it is floating-point and dtype is not None."""
    return weight.to(device=device, dtype=dtype if weight.is_floating_point() else None)


def assemble(raw, weights):
    """The model that a config.json describes, with these weights, which are not copied.

    Raises ValueError unless all names, shapes and dtypes fit.
    """
    config = MixtralConfig.from_dict(raw)
    # A config.json with far too many layers or experts fails here, before the model is built.
    last = f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight"
    expert = f"experts.{config.num_local_experts - 1}."
    if last not in weights or not any(expert in name for name in weights):
        raise ValueError(f"the weights do not fit config.json: {last} or a weight of {expert[:-1]} "
                         "is missing")
    with torch.device("meta"):
        model = Mixtral(config)
        use_int4(model, raw, weights)
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit config.json: {one_line(error)}") from None
    dtypes = {weight.dtype for weight in weights.values() if weight.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32,
                                          torch.float64}:
        raise ValueError("the weights must have one floating-point dtype, got "
                         f"{', '.join(sorted(map(str, dtypes)))}; convert them with dtype=…; "
                         "bfloat16, float16, float32 and float64 are supported")
    return model.eval().requires_grad_(False)


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights: w[r, c] = (u[r, c] − 8) · scale[r, c // G], 0 ≤ u ≤ 15.

    (..., D) -> (..., M)

    For w2, exchange D and M. This is the format `pack-quantized` of compressed-tensors. G
    neighbouring weights of a row share one scale. A 32-bit word stores eight numbers u, the first
    in the lowest bits. Word j of a row holds the columns 8j … 8j + 7:

        bits   31…28  27…24  23…20  19…16  15…12  11…8   7…4    3…0
        holds   u₇     u₆     u₅     u₄     u₃     u₂     u₁     u₀
    """

    def __init__(self, inputs, outputs, group_size):
        super().__init__()
        self.register_buffer("weight_packed", torch.empty(outputs, inputs // 8, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.empty(outputs, inputs // group_size))
        self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64))

    def forward(self, x):
        return F.linear(x, unpack(self.weight_packed, self.weight_scale))


def unpack(packed, scale):
    """The weights that packed 32-bit words and their scales encode, in the dtype of the scales.

    packed (M, D/8), scale (M, D/G) -> (M, D)

    If the scales have been converted to float64, the products (u − 8)·scale are exact, because
    u − 8 has at most 3 significant bits, and a scale stored in float32 or less has at most 24.

    >>> unpack(torch.tensor([[0x76543210]], dtype=torch.int32), torch.tensor([[0.5]])).tolist()
    [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]]
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    u = ((packed[:, :, None] >> shifts) & 15).reshape(*scale.shape, -1)  # (M, D/G, G)
    return ((u - 8) * scale[:, :, None]).flatten(1)


def use_int4(model, raw, weights):
    """Replace each layer stored in 4 bits by an Int4Linear. Raises ValueError for other formats."""
    scheme = raw.get("quantization_config")
    if scheme is None:
        return
    G = int4_group_size(scheme)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and f"{name}.weight_packed" in weights:
            outputs, inputs = layer.weight.shape
            packed, shape = weights[f"{name}.weight_packed"], weights.get(f"{name}.weight_shape")
            if packed.dtype != torch.int32:
                raise ValueError(f"{name}.weight_packed must be torch.int32, got {packed.dtype}")
            if shape is None or shape.tolist() != [outputs, inputs] or inputs % G:
                found = "none" if shape is None else shape.tolist()
                raise ValueError(f"{name}.weight_shape must be [{outputs}, {inputs}], the last a "
                                 f"multiple of the group size {G}, got {found!s:.80}")
            model.set_submodule(name, Int4Linear(inputs, outputs, G))


def int4_group_size(scheme):
    """The group size G of a quantization_config. Raises ValueError unless Int4Linear reads it."""
    scheme = scheme if isinstance(scheme, dict) else {"quant_method": scheme}
    groups = scheme.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    group = groups[0] if groups and isinstance(groups[0], dict) else {}
    weights = group.get("weights") if isinstance(group.get("weights"), dict) else {}
    activations = group.get("input_activations") or group.get("output_activations")
    for name, wanted, found in (
            ("quant_method", "compressed-tensors", scheme.get("quant_method")),
            ("format", "pack-quantized", scheme.get("format")),
            ("transform_config", None, scheme.get("transform_config") or None),
            ("the number of config_groups", 1, len(groups)), ("activations", None, activations),
            ("num_bits", 4, weights.get("num_bits")), ("type", "int", weights.get("type")),
            ("symmetric", True, weights.get("symmetric")),
            ("strategy", "group", weights.get("strategy")),
            ("actorder", None, weights.get("actorder"))):
        if found != wanted:
            raise ValueError(f"config: quantization_config: {name} must be {wanted!r}, got "
                             f"{found!r:.80}; no other quantised format is supported")
    G = weights.get("group_size")
    if type(G) is not int or G < 8 or G % 8:
        raise ValueError(f"config: group_size must be a multiple of 8, got {G!r:.80}")
    return G
