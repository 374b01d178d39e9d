"""How does a step run without the host and the GPU waiting for each other? As one recorded graph.

The host, which runs Python, only puts kernels into a queue, from which the GPU takes them. One step
of mixtral.py on Mixtral 8x7B launches about 3,000 kernels, and in every layer it waits to see which
experts were chosen. Meanwhile the queue runs empty, so that afterwards the GPU waits for Python. A
step takes 79 ms, of which the GPU works for 11. A CUDA graph ends this: the launches of one step
are recorded once, and later a single call replays them. But it repeats the same kernels on the same
addresses, so first the step must be written so that nothing depends on a number that the host would
have to read:

    the slot of the next token    The GPU counts by itself. `Step` has a copy of the positions in
                                  the cache, and every step advances it.
    the number of keys            Attention covers all slots, and the mask hides the empty ones.
    the experts that run          For one text, the kernels of fast/kernels.py look up the chosen
                                  experts on the card. For a batch, all experts run on all tokens.

To run all experts sounds wasteful, but for a batch it is not. With 16 texts, an expert is chosen by
none of them with probability (3/4)¹⁶ = 1 %, so nearly all weights must be read anyway. Reading
takes so long that the superfluous products fit into the same time. The limit of a batch is thus to
read all weights once for each step, which takes an H200 22 ms, for 64 texts as for 4. For 2 texts
more than half of the experts are read in vain, which is the price of not waiting.

Prompts run the modules of mixtral.py in chunks of 4,096 tokens, of which an expert gets 1,024 on
average. Now arithmetic is the limit, so each expert must run on its own tokens only. Only the card
knows how many these are, and a grouped product (F.grouped_mm) reads the counts there.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fast import int4
from fast.int4 import Int4Linear
from mixtral import SparseMoE, at_least_float32, route, visible

CHUNK = 4096
FEW_TOKENS = 128  # up to this number, all experts run on all tokens in about the time of reading
MASK_SIZE = 2**28  # most entries of a mask, of which PyTorch makes a copy in the dtype of the keys


def prepare(model):
    """Make a model on a GPU fast, layer by layer, so that memory for one more layer is enough.

    Matrices that are read together become views of one tensor: `attention.qkv`, and `w13` and `w2`
    of a mixture (see `merge`). The modules still compute what those of mixtral.py compute.
    """
    device, model.attend = model.lm_head.weight.device, Attend()
    for layer in model.model.layers:
        attention, moe = layer.self_attn, layer.block_sparse_moe
        attention.attend, E = model.attend, len(moe.experts)
        attention.qkv = merge([attention.q_proj, attention.k_proj, attention.v_proj], 1)
        moe.w13 = merge([matrix for expert in moe.experts for matrix in (expert.w1, expert.w3)], E)
        moe.w2 = merge([expert.w2 for expert in moe.experts], E)
        if moe.w13 and moe.w2:
            moe.__class__, moe.sorts = MergedMoE, has_grouped_product(device, moe)
            moe.unpack = unpacker(device, moe.w13[-1].dtype)
        torch.cuda.empty_cache()
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.unpack = unpacker(device, module.weight_scale.dtype)
            module.__class__ = UnpackedLinear
    return model


def triton_kernels(device):
    """The module fast.kernels, or None where Triton is missing or the GPU is too old for it."""
    if (device.type != "cuda" or torch.version.cuda is None
            or torch.cuda.get_device_capability(device) < (8, 0)):
        return None
    try:
        from fast import kernels
    except ModuleNotFoundError:
        return None
    return kernels


def unpacker(device, dtype):
    """The function that unpacks 4-bit weights; the kernel for it computes in float32."""
    if triton_kernels(device) is None or dtype == torch.float64:
        return int4.unpack
    from fast import kernels_int4
    return kernels_int4.unpack


def has_grouped_product(device, moe):
    """Whether F.grouped_mm multiplies these matrices in one kernel, without asking the host."""
    sizes = moe.w2[0].shape[1], moe.w13[0].shape[1] // 2  # D and M
    return (hasattr(F, "grouped_mm") and device.type == "cuda" and torch.version.cuda is not None
            and torch.cuda.get_device_capability(device) >= (9, 0)
            and moe.w13[-1].dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes))


def merge(layers, count):
    """Stack the weights of several linear layers in one tensor, of which each keeps a view.

    The result is a list of this tensor (count, rows, n), or in 4 bits of two, the words and the
    scales. It is None if the layers are not alike.
    """
    kinds = {(type(layer), *(t.shape[1:] for t in layer.state_dict().values())) for layer in layers}
    if len(kinds) > 1:
        return None
    in_4_bits, merged = isinstance(layers[0], Int4Linear), []
    for name in ("weight_packed", "weight_scale") if in_4_bits else ("weight",):
        parts = [getattr(layer, name).detach() for layer in layers]
        whole = torch.cat(parts)
        for layer, view in zip(layers, whole.split([len(part) for part in parts]), strict=True):
            setattr(layer, name, view if in_4_bits else nn.Parameter(view, requires_grad=False))
        merged.append(whole.unflatten(0, (count, -1)))
    return merged


class MergedMoE(SparseMoE):
    """The sparse mixture without a wait, in one of two ways that depend on the number of tokens.

    (B, S, D) -> (B, S, D)

    `prepare` sets the merged matrices w13 and w2, and two facts: `unpack` is the function that
    unpacks 4-bit weights, and `sorts` says whether a grouped product is there for `run_chosen`.
    """

    def forward(self, x):
        tokens = x.flatten(0, 1)  # (N, D)
        few = len(tokens) <= FEW_TOKENS
        if not few and not self.sorts:
            return super().forward(x)
        weights, chosen = route(self.gate(tokens), self.top_k)  # (N, A), (N, A)
        y = (self.run_all if few else self.run_chosen)(tokens, weights, chosen)
        return y.to(x.dtype).view(x.shape)

    def run_all(self, tokens, weights, chosen):
        """y = Σₑ weightₑ · SwiGLUₑ(x) over all experts e, with weight 0 if e was not chosen.

        tokens (N, D), weights (N, A), chosen (N, A) -> (N, D)
        """
        dense = weights.new_zeros(len(tokens), len(self.experts)).scatter(1, chosen, weights)
        # An expert gets zeros for the tokens that did not choose it, and gives zeros for them. Its
        # output for a kind of token that it never met in training could overflow, and 0·∞ ≠ 0.
        inputs = torch.where(dense.T[:, :, None] > 0, tokens, 0)  # (E, N, D)
        gate, up = torch.bmm(inputs, self.stacked(self.w13).mT).chunk(2, dim=2)  # (E, N, M)
        outputs = torch.bmm(F.silu(gate) * up, self.stacked(self.w2).mT)  # (E, N, D)
        return torch.einsum("ne,end->nd", dense, at_least_float32(outputs))

    def run_chosen(self, tokens, weights, chosen):
        """The same sum over the chosen experts only, each of which runs on its own tokens.

        tokens (N, D), weights (N, A), chosen (N, A) -> (N, D)

        The N·A choices are sorted by expert, so that the tokens of an expert are neighbours. The
        grouped product multiplies each of these groups by the matrix of its expert. It reads on the
        card where the groups end.
        """
        choices = chosen.flatten()
        order = choices.argsort(stable=True)
        experts = torch.arange(len(self.experts), device=choices.device)
        # How many choices are experts up to e: there the group of expert e ends.
        ends = (choices <= experts[:, None]).sum(dim=1, dtype=torch.int32)  # (E)
        inputs = tokens[order // self.top_k]
        if len(self.w13) == 1:
            gate, up = F.grouped_mm(inputs, self.w13[0].mT, offs=ends).chunk(2, dim=1)
        else:  # words and scales; the unpacked w1 is gone before w3 is unpacked
            w1, w3 = zip(*(part.chunk(2, dim=1) for part in self.w13), strict=True)
            gate, up = (F.grouped_mm(inputs, self.stacked(half).mT, offs=ends) for half in (w1, w3))
        outputs = F.grouped_mm(F.silu(gate) * up, self.stacked(self.w2).mT, offs=ends)
        outputs = outputs[order.argsort()].view(*chosen.shape, -1)  # (N, A, D)
        return (weights[:, :, None] * at_least_float32(outputs)).sum(dim=1)

    def stacked(self, merged):
        """Merged matrices as one tensor (E, rows, columns); 4-bit weights are unpacked for it."""
        if len(merged) == 1:
            return merged[0]
        words, scale = (part.flatten(0, 1) for part in merged)
        return self.unpack(words, scale).unflatten(0, (len(self.experts), -1))


class UnpackedLinear(Int4Linear):
    """A 4-bit layer whose weights one kernel unpacks: (..., D) -> (..., M)."""

    def forward(self, x):
        return F.linear(x, self.unpack(self.weight_packed, self.weight_scale))


class Attend:
    """`attend` of mixtral.py for prompts and batches. The layers of a model share one object.

    q (B, S, H, d), k (B, T, K, d), v (B, T, K, d), mask (B, 1, S, T) -> (B, S, H·d)

    With a mask and grouped heads, PyTorch would store all scores (B, H, S, T). Its kernel that
    avoids this accepts no mask, only a causal rule: the last query sees all keys, the query before
    it all but the last key, and so on. For a prompt this is often the whole mask. `reader` finds
    that out from the positions, which are on the CPU, and sets `causal`.
    """

    causal = False

    def __call__(self, q, k, v, mask):
        if not self.causal:
            return attend_masked(q, k, v, mask)
        first, mask = q.shape[1] == k.shape[1], None
        if not first:  # a later chunk; this import takes more than a second
            from torch.nn.attention.bias import causal_lower_right
            mask = causal_lower_right(q.shape[1], k.shape[1])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=first, enable_gqa=True)  # (B, H, S, d)
        return mixed.transpose(1, 2).flatten(2)


def attend_masked(q, k, v, mask):
    """`attend`, with the H/K query heads of a key/value head as rows of one head.

    q (B, S, H, d), k (B, T, K, d), v (B, T, K, d), mask (B, 1, S, T) -> (B, S, H·d)

    The kernel that takes a mask and stores no scores needs as many query heads as key heads. So the
    mask gets H/K equal rows for each token, and many queries are taken in parts that keep it small.
    """
    (B, S, H, d), (T, K) = q.shape, k.shape[1:3]
    part = max(1, MASK_SIZE // (B * H // K * T))
    if part < S:
        parts = [attend_masked(q[:, s:s + part], k, v, mask[:, :, s:s + part])
                 for s in range(0, S, part)]
        return torch.cat(parts, dim=1)
    q = q.reshape(B, S, K, H // K, d).transpose(1, 2).flatten(2, 3)  # (B, K, S·H/K, d)
    mask = mask.repeat_interleave(H // K, dim=2)  # (B, 1, S·H/K, T)
    mixed = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask)
    return mixed.view(B, K, S, H // K, d).transpose(1, 2).flatten(2)


# ------------------------------------------------------------------ one token for every row


def reader(model, cache):
    """A function read(tokens, lengths) that gives the logits after the last token of each row.

    It takes tokens (B, S) and lengths (B), and returns (B, V). Calls with S = 1 replay a graph,
    which stays with the cache. Between two calls of one `read` nobody else may change the cache.
    The ranks of a model that is split over several devices exchange their results in hooks of its
    modules, so its steps run as they are, without a graph. So does a model whose routers have
    hooks, as generate.py --experts gives them.
    """
    mixtures = [layer.block_sparse_moe for layer in model.model.layers]
    if getattr(model, "sharded", False) or any(
            type(m) is not MergedMoE or m.gate._forward_hooks for m in mixtures):
        return lambda tokens, lengths: model(tokens, cache, lengths, last_only=True)[:, 0]
    if not hasattr(cache, "step") or cache.step.model is not model:
        cache.step = Step(model, cache)
    step = cache.step
    step.stale = True

    @torch.inference_mode()
    def read(tokens, lengths):
        lengths = lengths.cpu()
        if tokens.shape[1] == 1 and lengths.any():
            return step(tokens, lengths, cache)
        step.stale = True
        model.attend.causal = tokens.shape[1] == lengths.max() and is_causal(model, cache, lengths)
        try:
            return model(tokens, cache, lengths, last_only=True)[:, 0]
        finally:
            model.attend.causal = False

    return read


def is_causal(model, cache, lengths):
    """Whether all rows continue at the same position, and no key leaves the window or the cache.

    Then the query at place i of S tokens sees all keys but the last S − 1 − i. Padding is at the
    end of a row, so no real token sees it.
    """
    read, window = cache.tokens_read, model.config.sliding_window
    last = int(read.max() + lengths.max())
    return bool((read == read[0]).all()) and last <= cache.positions.shape[1] and (
        window is None or last <= window)


def write_positions(positions, now, alive):
    """Store the position now[b] in its slot of each row b that is alive.

    positions (B, C), now (B), alive (B)
    """
    slot = now[:, None] % positions.shape[1]
    kept = positions.gather(1, slot)
    positions.scatter_(1, slot, torch.where(alive[:, None], now[:, None], kept))


class Step:
    """One token for each row of a cache, in operations that a CUDA graph can hold.

    The keys and values are those of the cache. Besides them, the card has its own:

        positions (B, C)    the position in each slot, as in the cache
        now (B)             the position of the next token
        alive (B)           false for a row that has ended

    The positions in the cache itself, on the CPU, advance while the GPU works.
    """

    def __init__(self, model, cache):
        c, (B, C), device = model.config, cache.positions.shape, cache.keys.device
        self.model, self.keys, self.values = model, cache.keys, cache.values
        self.positions = torch.empty(B, C, dtype=torch.int64, device=device)
        self.tokens = torch.empty(B, 1, dtype=torch.int64, device=device)
        self.now = torch.empty(B, dtype=torch.int64, device=device)
        self.alive = torch.empty(B, dtype=torch.bool, device=device)
        self.rows = torch.arange(B, device=device)
        exponents = torch.arange(0, c.head_dim, 2).double() / c.head_dim
        self.frequencies = (c.rope_theta ** -exponents).to(device)
        self.compiled, self.graph, self.logits, self.stale = False, None, None, True
        self.kernels, self.experts = chosen_kernels(model) if B == 1 else (None, None)

    def __call__(self, tokens, lengths, cache):
        if (cache.tokens_read + lengths).max() > cache.max_length:
            raise ValueError(f"cache: a row gets more than its {cache.max_length} tokens")
        if self.stale:  # others have read or forgotten tokens
            self.positions.copy_(cache.positions)
            self.now.copy_(cache.tokens_read)
        self.stale = True  # if this call is interrupted, the next one copies the positions again
        self.tokens.copy_(tokens, non_blocking=True)
        self.alive.copy_(lengths > 0, non_blocking=True)
        logits = self.replay()
        write_positions(cache.positions, cache.tokens_read, lengths > 0)
        self.stale = False
        return logits

    def replay(self):
        """The first step runs as it is and compiles the kernels, the second one is recorded."""
        if not self.compiled or self.keys.device.type != "cuda":
            self.compiled = True
            return self.run()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self.run()
            self.graph = graph  # only now, so that an interrupted recording is never replayed
        self.graph.replay()
        return self.logits.clone()  # the next replay overwrites them

    def run(self):
        """The logits (B, V) after the next token of each row."""
        write_positions(self.positions, self.now, self.alive)
        x = self.model.model.embed_tokens(self.tokens)  # (B, 1, D)
        angles = self.now[:, None, None, None] * self.frequencies  # (B, 1, 1, d/2)
        cos, sin = (part.to(at_least_float32(x).dtype) for part in (angles.cos(), angles.sin()))
        logits = self.one_text(x, cos, sin) if self.kernels else self.batch(x, cos, sin)
        self.now += self.alive
        return at_least_float32(logits)

    def batch(self, x, cos, sin):
        """The modules of mixtral.py, for which this object is the cache."""
        window = self.model.config.sliding_window
        mask = visible(self.now[:, None], self.positions, window)  # (B, 1, C)
        for layer in self.model.model.layers:
            x = layer(x, cos, sin, mask[:, None], self)
        return self.model.lm_head(self.model.model.norm(x))[:, 0]

    def update(self, layer, k, v):
        """Store the keys and values of the rows that are alive; returns those in all slots.

        k (B, 1, K, d), v (B, 1, K, d) -> (B, C, K, d), (B, C, K, d)
        """
        at = self.rows, self.now % self.positions.shape[1]
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            stored[at] = torch.where(self.alive[:, None, None], new[:, 0], stored[at])
        return self.keys[layer], self.values[layer]

    def one_text(self, x, cos, sin):
        """The forward pass of mixtral.py for one token, in kernels that read each weight once.

        The row is alive, because no step is taken when all rows have ended.
        """
        ops, c, x = self.kernels, self.model.config, x.view(-1)  # (D)
        cos, sin, slot = cos.view(-1), sin.view(-1), self.now % self.positions.shape[1]
        for n, layer in enumerate(self.model.model.layers):
            attention, moe, keys, values = (
                layer.self_attn, layer.block_sparse_moe, self.keys[n, 0], self.values[n, 0])
            [[qkv]] = attention.qkv  # ((H + 2K)·d, D)
            qkv = ops.product(qkv, ops.norm(x, layer.input_layernorm))
            q = ops.rotate(qkv, cos, sin, slot, keys, values, c.num_attention_heads)
            mixed = ops.attend(q, keys, values, self.positions, self.now, c.sliding_window)
            x = ops.product(attention.o_proj.weight, mixed, add=x)
            token, chosen, weights = ops.route(
                x, layer.post_attention_layernorm, moe.gate.weight, moe.top_k)
            h = self.experts.gate_up(token, chosen, *moe.w13)
            x = self.experts.down(h, chosen, weights, x, *moe.w2)
        return ops.product(self.model.lm_head.weight, ops.norm(x, self.model.model.norm))[None]


def chosen_kernels(model):
    """The modules with kernels for this model and for its experts, or None and None."""
    kernels = triton_kernels(model.lm_head.weight.device)
    mixtures = [layer.block_sparse_moe for layer in model.model.layers]
    if kernels is None or not all(kernels.fits(layer) for layer in model.model.layers):
        return None, None
    if all(len(moe.w13) == len(moe.w2) == 1 for moe in mixtures):
        return kernels, kernels
    from fast import kernels_int4
    fits = all(kernels_int4.fits(*weights) for moe in mixtures for weights in (moe.w13, moe.w2))
    return (kernels, kernels_int4) if fits else (None, None)
