"""Slow, plain re-statements of the methods: Python loops, float64, no code of the package."""

import math
from fractions import Fraction


def share(ratio, count):
    """floor(ratio * count) in exact arithmetic of the decimal that was written."""
    return math.floor(Fraction(str(ratio)) * count)


def lowest_pruned(scores, count):
    """Indices of the `count` lowest scores, the lower index first among equals."""
    return set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count])


def groups_of(shapes, granularity):
    """Comparison groups as lists of (tensor, row, column), in row-major order."""
    cells = [[(t, i, j) for i in range(rows) for j in range(cols)] for t, (rows, cols) in enumerate(shapes)]
    if granularity == "block":
        return [[cell for tensor in cells for cell in tensor]]
    if granularity == "layer":
        return cells
    key = 1 if granularity == "output" else 2
    result = {}
    for tensor in cells:
        for cell in tensor:
            result.setdefault((cell[0], cell[key]), []).append(cell)
    return list(result.values())


def pairs_of(group, score, keep):
    """(grown, pruned, value) of every pair of a group, best first."""
    pruned = sorted((c for c in group if not keep(c)), key=lambda c: -score(c))
    kept = sorted((c for c in group if keep(c)), key=score)
    return [(g, p, score(g) - score(p)) for g, p in zip(pruned, kept, strict=False)]


def barber_swap(scores, keeps, granularity, ratio):
    """Steps 4 and 5: new masks, N+ and the number of swaps; all as nested lists."""
    masks = [[row[:] for row in keep] for keep in keeps]
    positive = swaps = 0
    shapes = [(len(s), len(s[0])) for s in scores]
    for group in groups_of(shapes, granularity):
        pairs = pairs_of(group, lambda c: scores[c[0]][c[1]][c[2]], lambda c: keeps[c[0]][c[1]][c[2]])
        worthwhile = sum(value > 0 for *_, value in pairs)
        positive += worthwhile
        for grown, pruned, _ in pairs[: share(ratio, worthwhile)]:
            masks[grown[0]][grown[1]][grown[2]] = True
            masks[pruned[0]][pruned[1]][pruned[2]] = False
            swaps += 1
    return masks, positive, swaps


def barber_swap_groups(scores, keeps, m, scope, ratio):
    """Step 6, `pairing: group`: pairs inside each M-group, the best of a scope swapped."""
    masks = [[row[:] for row in keep] for keep in keeps]
    offers = {}
    for t, keep in enumerate(keeps):
        for i, row in enumerate(keep):
            for start in range(0, len(row), m):
                group = [(t, i, j) for j in range(start, start + m)]
                scope_key = {"output": (t, i), "layer": t, "block": 0}[scope]
                offers.setdefault(scope_key, []).extend(
                    pairs_of(group, lambda c: scores[c[0]][c[1]][c[2]], lambda c: keeps[c[0]][c[1]][c[2]])
                )
    positive = swaps = 0
    for pairs in offers.values():
        worthwhile = [pair for pair in pairs if pair[2] > 0]
        positive += len(worthwhile)
        for grown, pruned, _ in sorted(worthwhile, key=lambda pair: -pair[2])[: share(ratio, len(worthwhile))]:
            masks[grown[0]][grown[1]][grown[2]] = True
            masks[pruned[0]][pruned[1]][pruned[2]] = False
            swaps += 1
    return masks, positive, swaps


def barber_swap_rows(scores, keeps, m, ratio):
    """Step 6, `pairing: row`: the row decides what grows, the M-group what goes."""
    masks = [[row[:] for row in keep] for keep in keeps]
    positive = 0
    for t, keep in enumerate(keeps):
        for i, row in enumerate(keep):
            cells = [(t, i, j) for j in range(len(row))]
            pairs = pairs_of(cells, lambda c: scores[c[0]][c[1]][c[2]], lambda c: keeps[c[0]][c[1]][c[2]])
            worthwhile = sum(value > 0 for *_, value in pairs)
            positive += worthwhile
            grown = {g[2] for g, *_ in pairs[: share(ratio, worthwhile)]}
            for start in range(0, len(row), m):
                group = range(start, start + m)
                kept = sorted((j for j in group if row[j]), key=lambda j: scores[t][i][j])
                grows = sorted((j for j in group if j in grown), key=lambda j: -scores[t][i][j])[: len(kept)]
                for j in grows:
                    masks[t][i][j] = True
                for j in kept[: len(grows)]:
                    masks[t][i][j] = False
    return masks, positive


def sparsegpt(weight, gram, sparsity, damping, block_size, n_of_m=None):  # noqa: C901
    """Column-by-column optimal brain surgery, every quantity from its definition, in float64 lists."""
    import torch

    weight, gram = weight.double().clone(), gram.double().clone()
    rows, columns = weight.shape
    for j in range(columns):
        if gram[j, j] == 0:
            gram[j, j] = 1
            weight[:, j] = 0
    mean = sum(float(gram[j, j]) for j in range(columns)) / columns
    for j in range(columns):
        gram[j, j] += damping * mean
    inverse = torch.linalg.inv(gram)
    upper = torch.linalg.cholesky(inverse).T  # inverse = L L^T = U^T U with U = L^T
    keep = torch.ones(rows, columns, dtype=torch.bool)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        if n_of_m is None:
            cells = [(i, j) for i in range(rows) for j in range(start, end)]
            score = [float(weight[i, j] ** 2 / upper[j, j] ** 2) for i, j in cells]
            for index in lowest_pruned(score, share(sparsity, len(cells))):
                keep[cells[index]] = False
        for j in range(start, end):
            if n_of_m is not None and (j - start) % n_of_m[1] == 0:
                for i in range(rows):
                    score = [float(weight[i, k] ** 2 / upper[k, k] ** 2) for k in range(j, j + n_of_m[1])]
                    for k in lowest_pruned(score, n_of_m[1] - n_of_m[0]):
                        keep[i, j + k] = False
            for i in range(rows):
                if not keep[i, j]:
                    error = float(weight[i, j] / upper[j, j])
                    weight[i, j] = 0
                    for k in range(j + 1, columns):
                        weight[i, k] -= error * upper[j, k]
    return keep, weight


def explicit_bip(inputs, out_weight, makers=(), down=None, gain=None):
    """LLM-BIP's score of every input channel of `out_weight`, with the explicit (hidden, hidden) product.

    `makers` and `down` are those of the MLP behind an attention; none for an FFN's own down projection.
    """
    tokens, hidden = inputs.double().tolist(), out_weight.shape[0]
    weight = out_weight.double().abs().tolist()
    through = [[float(a == b) for b in range(hidden)] for a in range(hidden)]  # I + |W_up|^T |W_down|^T
    for maker in makers:
        up, last = maker.double().abs().tolist(), down.double().abs().tolist()
        for a in range(hidden):
            scale = 1.0 if gain is None else abs(float(gain[a]))
            for b in range(hidden):
                through[a][b] += scale * sum(up[k][a] * last[b][k] for k in range(len(up)))
    scores = []
    for j in range(out_weight.shape[1]):
        seen = sum(abs(token[j]) for token in tokens)
        scores.append(seen * sum(weight[a][j] * through[a][b] for a in range(hidden) for b in range(hidden)))
    return scores


def unit_sums(values, members):
    """Sum of `values[name][i][j]` over the (name, i, j) of each unit."""
    return [sum(values[name][i][j] for name, i, j in cells) for cells in members]
