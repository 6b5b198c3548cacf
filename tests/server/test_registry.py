"""The registry on disk: versions that do not change, aliases that move, gates, several servers."""

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from server.adapters.registry import Registry, Rule, Version
from strategies.core.errors import InvalidRequest, NotFound, StorageFailed
from tests.server.faults import full_disk


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def published(registry: Registry, name: str, weights: str, **evaluation: float) -> Version:
    manifest = {"schema_version": 1, "kind": "policy", "evaluation": evaluation}
    with registry.incoming() as folder:
        (folder / "weights").write_text(weights)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        digest = sha256((weights + json.dumps(manifest)).encode()).hexdigest()
        return registry.publish(name, folder, digest)[0]


def test_a_version_is_named_by_its_content(registry: Registry):
    first = published(registry, "math", "one")
    assert first.id.startswith("math@")
    assert published(registry, "math", "one") == first
    second = published(registry, "math", "two")
    assert [one.id for one in registry.versions()] == sorted([first.id, second.id])
    assert (first.folder / "weights").read_text() == "one"
    registry.remove(first.id)
    with pytest.raises(NotFound):
        registry.version(first.id)
    hidden = {path.name for path in registry.root.iterdir()} - {"versions", "aliases", ".lock"}
    assert not hidden  # nothing is left of what came in or went


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b", "a@b", "x" * 65, "a b", "ä"])
def test_names_are_no_paths(registry: Registry, name: str):
    with pytest.raises(InvalidRequest, match="a name has"):
        published(registry, name, "one")
    with pytest.raises((InvalidRequest, NotFound)):
        registry.point(name, {published(registry, "math", "one").id: 1.0}, {})
    for ask in (registry.alias, registry.roll_back, registry.drop, registry.version):
        with pytest.raises(NotFound):
            ask(name)


def test_to_point_at_the_same_again_leaves_the_history(registry: Registry):
    one, two = (published(registry, "math", text).id for text in ("1", "2"))
    for shares in ({one: 1.0}, {two: 1.0}, {two: 1.0}):
        registry.point("prod", shares, {})
    assert registry.point("prod", {two: 1.0}, {}, pinned=True).pinned
    before = registry.roll_back("prod")
    assert (before.shares, before.pinned) == ({one: 1.0}, True)


def test_an_alias_moves_and_rolls_back(registry: Registry):
    one, two, three = (published(registry, "math", text).id for text in ("1", "2", "3"))
    registry.point("prod", {one: 1.0}, {})
    registry.point("prod", {two: 0.9, three: 0.1}, {})
    assert registry.alias("prod").shares == {two: 0.9, three: 0.1}
    with pytest.raises(InvalidRequest, match=f"alias 'prod' means '{three}'"):
        registry.remove(three)
    assert registry.roll_back("prod").shares == registry.alias("prod").shares == {one: 1.0}
    with pytest.raises(InvalidRequest, match="never meant anything else"):
        registry.roll_back("prod")
    registry.point("prod", {three: 1.0}, {})
    registry.remove(one)
    with pytest.raises(InvalidRequest, match="no longer there"):
        registry.roll_back("prod")
    assert registry.aliases().keys() == {"prod"}
    registry.drop("prod")
    assert registry.aliases() == {}


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {"1": 0.5},
        {"1": 1.5, "2": -0.5},
        {"1": 0.0, "2": 1.0},
        {"1": float("nan")},
        {"1": float("inf")},
    ],
)
def test_shares_are_positive_and_make_one(registry: Registry, shares: dict[str, float]):
    ids = {text: published(registry, "math", text).id for text in ("1", "2")}
    with pytest.raises(InvalidRequest, match=r"make 1 together|finite"):
        registry.point("prod", {ids[one]: share for one, share in shares.items()}, {})
    with pytest.raises(NotFound):
        registry.alias("prod")


def test_a_gate_holds_back_what_is_worse(registry: Registry):
    gate = {"accuracy": Rule(at_least=0.5, lose_at_most=0.05)}
    bare = published(registry, "math", "bare")
    with pytest.raises(InvalidRequest, match="has no 'accuracy'"):
        registry.point("prod", {bare.id: 1.0}, gate)
    low = published(registry, "math", "low", accuracy=0.49)
    with pytest.raises(InvalidRequest, match=r"is 0.49, and 0.5 is the least"):
        registry.point("prod", {low.id: 1.0}, gate)
    good = published(registry, "math", "good", accuracy=0.8)
    registry.point("prod", {good.id: 1.0}, gate)
    worse, near = (published(registry, "math", str(worth), accuracy=worth) for worth in (0.7, 0.76))
    with pytest.raises(InvalidRequest, match=r"is 0.7, and 0.75 is the least"):
        registry.point("prod", {good.id: 0.5, worse.id: 0.5}, gate)
    assert registry.alias("prod").shares == {good.id: 1.0}
    registry.point("prod", {near.id: 1.0}, gate)
    registry.point("prod", {near.id: 1.0}, {"other": Rule(at_least=1)})  # served already
    assert registry.roll_back("prod").shares == {good.id: 1.0}


def test_another_server_sees_every_change(registry: Registry):
    other = Registry(registry.root)
    seen = {other.stamp()}
    one, two = (published(registry, "math", text).id for text in ("1", "2"))
    seen.add(other.stamp())
    for shares in ({one: 1.0}, {two: 1.0}, {one: 1.0}, {two: 1.0}):
        registry.point("prod", shares, {})
        seen.add(other.stamp())
        assert other.alias("prod").shares == shares
    registry.drop("prod")
    seen.add(other.stamp())
    assert len(seen) == 6  # without an alias it is as it was before


def test_changes_from_many_sides_are_not_lost(registry: Registry):
    ids = [published(registry, "math", str(at)).id for at in range(32)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda id: Registry(registry.root).point("prod", {id: 1.0}, {}), ids))
    history = registry.alias("prod").history
    assert len(history) == 32
    assert {id for shares in history for id in shares} == set(ids)
    (registry.root / "aliases" / "prod.json").write_text("{")
    with pytest.raises(InvalidRequest, match="damaged"):
        registry.alias("prod")
    registry.point("other", {ids[0]: 1.0}, {})
    (registry.root / "versions" / ".DS_Store").touch()
    (registry.version(ids[1]).folder / "manifest.json").write_text("{")
    assert registry.aliases().keys() == {"other"}  # the others go on
    assert {one.id for one in registry.versions()} == set(ids) - {ids[1]}
    assert set(registry.ids()) == set(ids)
    registry.point("prod", {ids[2]: 1.0}, {})
    assert registry.alias("prod").shares == {ids[2]: 1.0}
    registry.remove(ids[1])


def test_a_full_disk_changes_nothing_and_is_named(registry: Registry):
    one, two = (published(registry, "math", text).id for text in ("1", "2"))
    registry.point("prod", {one: 1.0}, {})
    before = registry.stamp()
    with full_disk():
        with pytest.raises(StorageFailed, match="cannot be written: File too large"):
            published(registry, "math", "3")
        with pytest.raises(StorageFailed):
            registry.point("prod", {two: 1.0}, {})
    assert registry.stamp() == before
    assert registry.alias("prod").shares == {one: 1.0}
    assert not [*registry.root.glob(".incoming-*")]
    assert registry.point("prod", {two: 1.0}, {}).shares == {two: 1.0}
