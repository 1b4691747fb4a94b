"""Losses of distillation, one number at a time, from their formulas: lists of floats, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Vector]
Cube = Sequence[Matrix]


def dot(one: Vector, other: Vector) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def cosine_of(one: Vector, other: Vector) -> float:
    lengths = math.sqrt(dot(one, one) * dot(other, other))
    return dot(one, other) / lengths if lengths else 0.0


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def softmax(scores: Vector) -> list[float]:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def projected(vector: Vector, weight: Matrix, bias: Vector) -> list[float]:
    return [dot(row[: len(vector)], vector) + b for row, b in zip(weight, bias, strict=True)]


def l2(students: Matrix, teachers: Matrix) -> float:
    return mean([sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) for s, t in zip(students, teachers, strict=True)])


def cosine(students: Matrix, teachers: Matrix) -> float:
    return mean([1 - cosine_of(s, t) for s, t in zip(students, teachers, strict=True)])


def margin_mse(student: Matrix, teacher: Matrix) -> float:
    errors = []
    for s, t in zip(student, teacher, strict=True):
        for j in range(1, len(s)):
            errors.append(((s[0] - s[j]) - (t[0] - t[j])) ** 2)
    return mean(errors)


def margin_hinge(student: Matrix, grades: Matrix | None, margin: float) -> float:
    short = []
    for row, s in enumerate(student):
        for j in range(1, len(s)):
            negative = grades is None or grades[row][j] <= 0
            short.append(max(0.0, margin - (s[0] - s[j])) if negative else 0.0)
    return mean(short)


def listwise_kl(student: Matrix, teacher: Matrix, temperature: float) -> float:
    divergences = []
    for s, t in zip(student, teacher, strict=True):
        q, p = softmax([x / temperature for x in s]), softmax([x / temperature for x in t])
        divergences.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
    return temperature**2 * mean(divergences)


def contrastive(student: Matrix, grades: Matrix | None, temperature: float) -> float:
    return mean([info_nce(s, relevant(grades, row, len(s)), temperature) for row, s in enumerate(student)])


def contrastive_in_batch(queries: Matrix, passages: Cube, grades: Matrix | None, temperature: float) -> float:
    losses = []
    for row, query in enumerate(queries):
        scores, positives = [], []
        for other, candidates in enumerate(passages):
            known = relevant(grades, row, len(candidates))
            for j, passage in enumerate(candidates):
                scores.append(dot(query, passage))
                positives.append(other == row and known[j])
        losses.append(info_nce(scores, positives, temperature))
    return mean(losses)


def relevant(grades: Matrix | None, row: int, k: int) -> list[bool]:
    return [j == 0 for j in range(k)] if grades is None else [grade > 0 for grade in grades[row]]


def info_nce(scores: Vector, positives: Sequence[bool], temperature: float) -> float:
    negatives = [math.exp(s / temperature) for s, positive in zip(scores, positives, strict=True) if not positive]
    own = [math.exp(s / temperature) for s, positive in zip(scores, positives, strict=True) if positive]
    return mean([-math.log(one / (one + sum(negatives))) for one in own]) if own else 0.0


def hidden_states(students: Sequence[Cube], teachers: Sequence[Cube], mask: Matrix, layer_map: Sequence[int]) -> float:
    """`students` are projected already; each [layer][text][token][value]."""
    layers = []
    for own, other in enumerate(layer_map):
        if other < 0:
            continue
        errors = []
        for b, tokens in enumerate(mask):
            for i, real in enumerate(tokens):
                if real:
                    pairs = zip(students[own][b][i], teachers[other][b][i], strict=True)
                    errors.append(mean([(x - y) ** 2 for x, y in pairs]))
        layers.append(mean(errors))
    return mean(layers)


def attention_maps(
    students: Sequence[Sequence[Cube]],
    teachers: Sequence[Sequence[Cube]],
    mask: Matrix,
    layer_map: Sequence[int],
    distance: str,
) -> float:
    """Maps are [layer][text][head][row][column]."""
    layers = []
    for own, other in enumerate(layer_map):
        if other < 0:
            continue
        values = []
        for b, tokens in enumerate(mask):
            ours, theirs = students[own][b], teachers[other][b]
            if len(ours) != len(theirs):
                ours, theirs = [over_heads(ours)], [over_heads(theirs)]
            real = [i for i, one in enumerate(tokens) if one]
            for a, t in zip(ours, theirs, strict=True):
                for row in real:
                    if distance == "mse":
                        values += [(a[row][column] - t[row][column]) ** 2 for column in real]
                    else:
                        values.append(sum(t[row][c] * math.log(t[row][c] / a[row][c]) for c in real))
        layers.append(mean(values))
    return mean(layers)


def over_heads(maps: Cube) -> list[list[float]]:
    size = range(len(maps[0]))
    return [[mean([head[row][column] for head in maps]) for column in size] for row in size]


def maxsim(query: Matrix, query_mask: Vector, passage: Matrix, passage_mask: Vector) -> float:
    real = [f for f, one in zip(passage, passage_mask, strict=True) if one]
    return sum(max(dot(e, f) for f in real) for e, one in zip(query, query_mask, strict=True) if one)


def pooled(
    query: Matrix, mask: Vector, passage: Matrix | None, passage_mask: Vector, temperature: float
) -> list[float]:
    real = [e for e, one in zip(query, mask, strict=True) if one]
    if passage is None:
        weights = [1 / len(real)] * len(real)
    else:
        weights = softmax([maxsim([e], [1], passage, passage_mask) / temperature for e in real])
    return [sum(w * e[value] for w, e in zip(weights, real, strict=True)) for value in range(len(query[0]))]


def token_alignment(students: Cube, teachers: Cube, mask: Matrix) -> float:
    found = []
    for b, tokens in enumerate(mask):
        for i, real in enumerate(tokens):
            if real:
                found.append(1 - cosine_of(students[b][i], teachers[b][i]))
    return mean(found)


def truncated(vector: Vector, dim: int) -> list[float]:
    length = math.sqrt(dot(vector[:dim], vector[:dim]))
    return [value / length for value in vector[:dim]]


def scheduled(schedule: str, progress: float, start: float, end: float, warmup: float) -> float:
    if progress < warmup:
        return (end if schedule == "constant" else start) * progress / warmup
    share = (progress - warmup) / (1 - warmup)
    if schedule == "constant":
        return end
    if schedule == "linear":
        return (1 - share) * start + share * end
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
