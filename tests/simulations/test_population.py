"""Who owns what: every query once, nothing of another owner, the same for the same seed."""

from __future__ import annotations

from collections import Counter

from stillroom_shared.corpus import Corpus, Passage, Query, Split
from stillroom_shared.settings import PopulationSettings
from stillroom_simulations.population import make_population, opened_results

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


def topical_corpus() -> Corpus:
    """Two owners, topics of one to four queries over all splits, and a few queries without a topic."""
    passages, queries, qrels = [], [], {}
    splits: tuple[Split, ...] = ("train", "test", "train", "dev")
    for owner in ("clinic", "library"):
        for number in range(120):
            key = f"{owner}-{number}"
            topic = f"illness {number // (1 + number % 4)}" if number % 7 else ""
            passages.append(Passage(key, owner, f"text {key}"))
            queries.append(Query(f"q:{key}", owner, f"query {key}", splits[number % 4], topic))
            qrels[f"q:{key}"] = {key: 1}
    return Corpus("topical", tuple(passages), tuple(queries), qrels)


def test_queries_of_a_topic_stay_with_one_device() -> None:
    """Held-out questions about an illness asked by somebody else would measure another population."""
    corpus = topical_corpus()
    devices = make_population(corpus, SETTINGS, seed=3)
    homes: dict[tuple[str, str], set[str]] = {}
    for device in devices:
        for query in (*device.training, *device.held_out):
            if query.topic:
                homes.setdefault((query.owner, query.topic), set()).add(device.name)
    assert len(devices) > 10
    assert all(len(names) == 1 for names in homes.values())
    dealt = Counter(query.id for device in devices for query in (*device.training, *device.held_out))
    assert dealt == Counter(query.id for query in corpus.queries)


def test_a_silo_is_all_that_an_owner_has() -> None:
    """A hospital searches all its documents."""
    corpus = topical_corpus()
    silos = make_population(corpus, SETTINGS.model_copy(update={"silos": True}), seed=3)
    assert [silo.owner for silo in silos] == list(corpus.owners)
    for silo in silos:
        assert {p.id for p in silo.passages} == {p.id for p in corpus.passages if p.owner == silo.owner}
        assert len(silo.training) == sum(q.owner == silo.owner and q.split == "train" for q in corpus.queries)


def test_what_was_opened_lies_on_the_device() -> None:
    """A question with answers of two owners would make one of them open what it does not have."""
    corpus = toy_corpus()
    qrels = {name: {"bank-0": 1, "zoo-1": 0} | dict(grades) for name, grades in corpus.qrels.items()}
    for device in make_population(corpus, SETTINGS, seed=0):
        held = {passage.id for passage in device.passages}
        opened = opened_results(device, qrels)
        assert [text for text, _ in opened] == [query.text for query in device.training]
        assert {passage for _, passage in opened} <= held
