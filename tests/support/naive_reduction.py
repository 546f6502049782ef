"""Token reduction written as its papers define it: token by token, one image at a time."""

import math

import torch
from torch import Tensor, nn


def merge_groups(metric: Tensor, r: int, prefix: int) -> list[list[int]]:
    """Return, for each token that is left of one image (tokens, features), the tokens that ToMe merges into it."""
    count = len(metric)
    free_even = [token for token in range(0, count, 2) if token >= prefix]
    free_odd = [token for token in range(1, count, 2) if token >= prefix]
    best = {}
    for token in free_even:
        cosines = [torch.cosine_similarity(metric[token], metric[other], dim=0).item() for other in free_odd]
        best[token] = (max(cosines), free_odd[cosines.index(max(cosines))]) if free_odd else (-math.inf, None)
    ranked = sorted(free_even, key=lambda token: -best[token][0])
    away = ranked[: min(r, (count - prefix) // 2)]
    if not away:
        return [[token] for token in range(count)]
    left = ranked[len(away) :] if prefix == 0 else [token for token in range(0, count, 2) if token not in away]
    order = left + list(range(1, count, 2))
    if prefix > 1:
        order = list(range(prefix)) + [token for token in order if token >= prefix]
    return [[token] + [gone for gone in away if best[gone][1] == token] for token in order]


def _join(members: list[list[int]], group: list[int]) -> list[int]:
    return [member for token in group for member in members[token]]


def attention(layer: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return output (tokens, channels), weights and keys (heads, tokens, ...) of timm's attention on one image."""
    heads = layer.num_heads
    q, k, v = (part.reshape(len(x), heads, -1).transpose(0, 1) for part in layer.qkv(x).chunk(3, dim=-1))
    q, k = layer.q_norm(q), layer.k_norm(k)
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if size is not None:
        logits = logits + size.log()
    weights = logits.softmax(-1)
    return layer.proj(layer.norm((weights @ v).transpose(0, 1).reshape(len(x), -1))), weights, k


def tome(model: nn.Module, x: Tensor, amounts: list[int]) -> tuple[Tensor, list[list[int]]]:
    """Return the tokens of one image (tokens, channels) behind the blocks, and which first ones each is the mean of."""
    prefix = model.num_prefix_tokens
    size, members = None, [[token] for token in range(len(x))]
    for block, r in zip(model.blocks, amounts, strict=True):
        mixed, _, keys = attention(block.attn, block.norm1(x), size)
        x = x + block.ls1(mixed)
        if r:
            groups = merge_groups(keys.mean(0), r, prefix)
            old = torch.ones(len(x), dtype=x.dtype) if size is None else size
            x = torch.stack([(x[group] * old[group, None]).sum(0) / old[group].sum() for group in groups])
            size = torch.stack([old[group].sum() for group in groups])
            members = [_join(members, group) for group in groups]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, members


def evit(model: nn.Module, x: Tensor, rates: list[float], fuse: bool) -> tuple[Tensor, list[list[int]]]:
    """Return the tokens of one image (tokens, channels) behind the blocks, and which of the first each holds."""
    prefix = model.num_prefix_tokens
    members = [[token] for token in range(len(x))]
    for block, rate in zip(model.blocks, rates, strict=True):
        mixed, weights, _ = attention(block.attn, block.norm1(x), None)
        x = x + block.ls1(mixed)
        scores = weights[:, 0].mean(0)
        ranked = sorted(range(prefix, len(x)), key=lambda token: -scores[token].item())
        keep = math.ceil(rate * len(ranked))
        if keep == len(ranked):
            ranked = list(range(prefix, len(x)))
        kept, gone = list(range(prefix)) + ranked[:keep], ranked[keep:]
        fused = [sum(scores[token] * x[token] for token in gone)] if fuse and gone else []
        x = torch.stack([*x[kept], *fused])
        members = [members[token] for token in kept] + [_join(members, gone) for _ in fused]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, members


def mctf_groups(
    x: Tensor, received: Tensor, size: Tensor | None, r: int, prefix: int, options: dict
) -> list[list[int]]:
    """Return, for each token that is left of one image (tokens, channels), the tokens that MCTF merges into it."""
    count = len(x)
    taus = [options.get(f"tau_{name}", tau) for name, tau in [("similarity", 1), ("informativeness", 20), ("size", 40)]]

    def attraction(one: int, other: int) -> float:
        value = ((1 + torch.cosine_similarity(x[one], x[other], dim=0).item()) / 2) ** (1 / taus[0])
        for each, tau in ((received, taus[1]), (size, taus[2])):
            if each is not None:
                least = each.min().item()
                value *= (least / each[one].item() * least / each[other].item()) ** (1 / tau)
        return value

    even = [token for token in range(0, count, 2) if token >= prefix]
    odd = [token for token in range(1, count, 2) if token >= prefix]
    first = r // 2 if options.get("bidirectional", True) else r
    best = {token: max(odd, key=lambda other: attraction(token, other)) for token in even}
    ranked = sorted(even, key=lambda token: -attraction(token, best[token]))
    away = {token: best[token] for token in ranked[:first]}
    left = [token for token in range(0, count, 2) if token not in away]
    if not prefix:
        left = [token for token in ranked if token not in away]
    last = list(range(1, count, 2))
    if options.get("bidirectional", True):
        free = [token for token in left if token >= prefix]
        back = {token: max(free, key=lambda other: attraction(other, token)) for token in odd}
        ranked = sorted(odd, key=lambda token: -attraction(back[token], token))
        ranked += [token for token in last if token < prefix]
        away |= {token: back[token] for token in ranked[: r - first]}
        last = ranked[r - first :]

    def end(token: int) -> int:
        return end(away[token]) if token in away else token

    return [[token for token in range(count) if end(token) == stay] for stay in left + last]


def mctf(model: nn.Module, x: Tensor, amounts: list[int], **options) -> tuple[Tensor, list[list[int]]]:
    """Return the tokens of one image (tokens, channels) behind the blocks, and which first ones each stands for."""
    prefix = model.num_prefix_tokens
    size, members = None, [[token] for token in range(len(x))]
    for block, r in zip(model.blocks, amounts, strict=True):
        _, weights, _ = attention(block.attn, block.norm1(x), size)
        if r:
            received = weights.mean((0, 1))
            groups = mctf_groups(x, received, size, r, prefix, options)
            old = torch.ones(len(x), dtype=x.dtype) if size is None else size
            share = received * old
            part = torch.stack([torch.zeros(len(x), dtype=x.dtype)] * len(groups))
            for row, group in zip(part, groups, strict=True):
                row[group] = share[group] / share[group].sum()
            weights = torch.stack([(part @ weights)[:, :, group].sum(2) for group in groups], dim=2)
            x = part @ x
            size = torch.stack([old[group].sum() for group in groups])
            members = [_join(members, group) for group in groups]
        if r and not options.get("one_step_ahead", True):
            _, weights, _ = attention(block.attn, block.norm1(x), size)
        layer = block.attn
        v = layer.qkv(block.norm1(x)).chunk(3, dim=-1)[2].reshape(len(x), layer.num_heads, -1).transpose(0, 1)
        mixed = layer.proj(layer.norm((weights @ v).transpose(0, 1).reshape(len(x), -1)))
        x = x + block.ls1(mixed)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, members


def sampled(scores: Tensor, points: int) -> list[int]:
    """Return which of the tokens with `scores` (tokens,) ATS keeps, in rising order of score."""
    order = sorted(range(len(scores)), key=lambda token: scores[token].item())
    total, sums = 0.0, []
    for token in order:
        total += (scores[token] / scores.sum()).item()
        sums.append(total)
    places = [(value - sums[0]) / (sums[-1] - sums[0]) for value in sums]
    first = min(place for place in places if place > 0)
    taken = set()
    for step in range(points):
        point = first + (1 - first) * step / (points - 1)
        taken.add(min(range(len(order)), key=lambda at: abs(places[at] - point)))
    return [order[at] for at in sorted(taken)]


def ats(model: nn.Module, x: Tensor, layers: list[int], points: int) -> Tensor:
    """Return the tokens of one image (tokens, channels) behind the blocks."""
    prefix = model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        mixed, weights, _ = attention(block.attn, block.norm1(x), None)
        if index in layers:
            values = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)[2]
            scores = weights[:, 0].sum(0) * values.norm(dim=1)
            kept = [*range(prefix), *(prefix + token for token in sampled(scores[prefix:], points))]
            x, mixed = x[kept], mixed[kept]
        x = x + block.ls1(mixed)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x


def page_rank(graph: Tensor, rounds: int) -> Tensor:
    """Return the tokens' importance by Zero-TPrune in a graph (heads, tokens, tokens)."""
    count = graph.shape[1]
    scores = []
    for head in graph:
        value = [1 + count / 2] + [1.0] * (count - 1)
        value = [each / sum(value) for each in value]
        for _ in range(rounds):
            value = [sum(value[i] * head[i, j].item() for i in range(count)) for j in range(count)]
        scores.append(torch.tensor(value, dtype=torch.float64))
    scaled = [(value * count - 1).square().mean().item() for value in scores]
    counted = [value for value, variance in zip(scores, scaled, strict=True) if 0.01 <= variance <= 0.7] or scores
    return torch.stack(counted).square().sum(0).sqrt()


def zero_tprune(graph: Tensor, keys: Tensor, rounds: int, similar: int, rate: float, prefix: int) -> list[int]:
    """Return the tokens that Zero-TPrune keeps of one image, by its graph (heads, tokens, tokens) and keys."""
    count = len(keys)
    similar = min(similar, (count - prefix) // 2)
    kept = list(range(count))
    if similar:
        ranks = page_rank(graph, rounds)
        ranked = sorted(range(prefix, count), key=lambda token: -ranks[token].item())
        half = len(ranked) - len(ranked) // 2
        likeness = {
            token: max(torch.cosine_similarity(keys[token], keys[other], dim=0).item() for other in ranked[:half])
            for token in ranked[half:]
        }
        gone = sorted(likeness, key=lambda token: -likeness[token])[:similar]
        kept = [token for token in kept if token not in gone]
        graph = graph[:, kept][:, :, kept]
        graph = graph / graph.sum(2, keepdim=True)
    stay = int(rate * (len(kept) - prefix))
    ranks = page_rank(graph, rounds)
    ranked = sorted(range(prefix, len(kept)), key=lambda at: -ranks[at].item())[:stay]
    return kept[:prefix] + [kept[at] for at in sorted(ranked)]


def algm(model: nn.Module, x: Tensor, columns: int, layers: list[int], threshold: float) -> tuple[Tensor, list]:
    """Return the tokens of one image (tokens, channels) behind the blocks, and which first ones each is the mean of."""
    prefix = model.num_prefix_tokens
    members = [[token] for token in range(len(x))]

    def cosine(one: int, other: int) -> float:
        return torch.cosine_similarity(x[one], x[other], dim=0).item()

    for index, block in enumerate(model.blocks):
        x = x + block.attn(block.norm1(x.unsqueeze(0)))[0]
        groups = [[token] for token in range(len(x))]
        if index == layers[0]:
            rows, found = (len(x) - prefix) // columns, []
            for row in range(0, rows - 1, 2):
                for column in range(0, columns - 1, 2):
                    at = prefix + row * columns + column
                    window = [at, at + 1, at + columns, at + columns + 1]
                    pairs = [cosine(one, other) for one in window for other in window if one != other]
                    if sum(pairs) / len(pairs) >= threshold:
                        found.append((sum(pairs) / len(pairs), window))
            found = [window for _, window in sorted(found, key=lambda each: -each[0])]
            taken = {token for window in found for token in window}
            rest = [[token] for token in range(prefix, len(x)) if token not in taken]
            groups = [[token] for token in range(prefix)] + found + rest
        elif index in layers:
            even = [token for token in range(0, len(x), 2) if token >= prefix]
            odd = [token for token in range(1, len(x), 2) if token >= prefix]
            best = {token: max(odd, key=lambda other: cosine(token, other)) for token in even}
            values = torch.tensor([cosine(token, best[token]) for token in even])
            limit = (values.mean() + values.std() / (index + 1)).item()
            away = {token: best[token] for token in even if cosine(token, best[token]) >= limit}
            order = [token for token in range(0, len(x), 2) if token not in away] + list(range(1, len(x), 2))
            groups = [[token, *(gone for gone in away if away[gone] == token)] for token in order]
        sizes = torch.tensor([float(len(each)) for each in members], dtype=x.dtype)
        x = torch.stack([(x[group] * sizes[group, None]).sum(0) / sizes[group].sum() for group in groups])
        members = [_join(members, group) for group in groups]
        x = x + block.mlp(block.norm2(x))
    return x, members
