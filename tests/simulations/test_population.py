"""Who owns what: every query once, nothing of another owner, the same for the same seed."""

from __future__ import annotations

from collections import Counter

from stillroom_shared.corpus import Corpus, Passage, Query, Split
from stillroom_shared.settings import PopulationSettings
from stillroom_simulations.population import make_population

SETTINGS = PopulationSettings(queries_per_device=5, distractors_median=10, distractors_max=30)


def toy_corpus() -> Corpus:
    passages, queries, qrels = [], [], {}
    splits: tuple[Split, ...] = ("train", "train", "dev", "test")
    for owner, size in (("zoo", 80), ("bank", 40), ("hut", 3)):
        for number in range(size):
            key = f"{owner}-{number}"
            passages.append(Passage(key, owner, f"text {key}"))
            queries.append(Query(f"q:{key}", owner, f"query {key}", splits[number % 4]))
            qrels[f"q:{key}"] = {key: 1}
    return Corpus("toy", tuple(passages), tuple(queries), qrels)


def test_every_query_belongs_to_exactly_one_device_which_holds_its_answer() -> None:
    """A test query whose passage lies on another device scores zero whatever the model does."""
    corpus = toy_corpus()
    devices = make_population(corpus, SETTINGS, seed=0)
    training = Counter(query.id for device in devices for query in device.training)
    held_out = Counter(query.id for device in devices for query in device.held_out)
    assert training == Counter(q.id for q in corpus.queries if q.split == "train")
    assert held_out == Counter(q.id for q in corpus.queries if q.split != "train")
    for device in devices:
        held = {passage.id for passage in device.passages}
        assert {pid for q in (*device.training, *device.held_out) for pid in corpus.qrels[q.id]} <= held
        assert {passage.owner for passage in device.passages} == {device.owner}
        assert len(held) == len(device.passages)


def test_sizes_vary_within_their_bounds() -> None:
    """Devices of one size hide whatever breaks on small or large ones."""
    devices = make_population(toy_corpus(), SETTINGS, seed=0)
    sizes = [len(device.passages) for device in devices if device.owner == "zoo"]
    assert len(set(sizes)) > 3
    needed = max(len(d.training) + len(d.held_out) for d in devices)
    assert max(sizes) <= needed + SETTINGS.distractors_max


def test_a_seed_decides_everything() -> None:
    """A population that changes between two stages of a run gives each stage another federation."""
    first, again, other = (make_population(toy_corpus(), SETTINGS, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_an_owner_with_few_queries_is_one_device() -> None:
    """Integer division would leave its queries to nobody."""
    devices = [device for device in make_population(toy_corpus(), SETTINGS, seed=0) if device.owner == "hut"]
    assert len(devices) == 1
    assert len(devices[0].training) == 2
